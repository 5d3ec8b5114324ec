"""What a run is of, in plain values: its Trainer's arguments, hyperparameters, data, model, batch and numbers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...callbacks.model_summary import summarize
from ...loggers.folders import as_json
from ..checkpoint.configs import portable
from ..data.iteration import INFINITE
from ..data.shard_detection import data_parallel_rank_and_size
from ..seed import SEED_VARIABLE

if TYPE_CHECKING:
    from ..loop.run import Run

# So many parts of a model are listed, and characters of a value are kept.
_MOST_LAYERS = 200
_LONGEST_VALUE = 2000


def config(run: Run) -> dict[str, Any]:
    """The Trainer's arguments as they hold, the hyperparameters, and what the data are."""
    return {
        "trainer": _arguments(run),
        "hyperparameters": _hyperparameters(run),
        "module": _class_of(run.module),
        "datamodule": None if run.datamodule is None else _class_of(run.datamodule),
        "optimizers": [_class_of(optimizer) for optimizer in run.trainer.optimizers],
    }


def _arguments(run: Run) -> dict[str, Any]:
    trainer: Any = run.trainer
    engine = run.engine
    resolved = {
        "accelerator": engine.device.type,
        "strategy": engine.strategy.name,
        "devices": trainer.num_devices,
        "precision": engine.precision.name,
        "logger": [described(logger) for logger in trainer.loggers],
        "callbacks": [described(callback) for callback in trainer.callbacks],
        "log_every_n_steps": _limit(trainer.log_every_n_steps),
    }
    # Of a subclass, too, those of the Trainer.
    kind = next(k for k in type(trainer).__mro__ if "use_callbacks_of" in vars(k))
    for name in inspect.signature(kind.__init__).parameters:
        if name != "self" and name not in resolved and hasattr(trainer, name):
            resolved[name] = _plain(getattr(trainer, name))
    return dict(sorted(resolved.items()))


def _limit(value: Any) -> Any:
    return None if value == INFINITE else value


def described(obj: Any) -> dict[str, Any]:
    """An object's class and those of its public attributes that are plain: as good as its arguments."""
    known = {}
    for name, value in vars(obj).items():
        is_plain = value is None or isinstance(value, (str, int, float))
        if is_plain and not name.startswith("_"):
            known[name] = value
    return {"class": type(obj).__name__, **known}


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, whatever it is."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, torch.device):
        return str(value)
    if hasattr(value, "__dict__") and not callable(value):
        return described(value)
    return str(value)[:_LONGEST_VALUE]


def _hyperparameters(run: Run) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for owner in (run.module, run.datamodule):
        if owner is not None and owner.logs_hparams:
            merged.update(portable(owner.hparams_initial))
    return _shortened(as_json(merged))


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value[:1000]]
    if isinstance(value, str) and len(value) > _LONGEST_VALUE:
        return f"{value[:_LONGEST_VALUE]} …"
    return value


def _class_of(obj: Any) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def data(run: Run) -> dict[str, Any]:
    """The loaders: classes, sizes, and how they are read."""
    trainer = run.trainer
    loader = trainer.train_dataloader
    batches = trainer.num_training_batches
    facts: dict[str, Any] = {"train": _loader(loader), "train_batches": _limit(batches)}
    if run.loaders.has("validate"):
        counts = trainer.num_val_batches
        facts["val_batches"] = [_limit(count) for count in counts]
    return facts


def _loader(loader: Any) -> Any:
    if isinstance(loader, (list, tuple)) and loader and hasattr(loader[0], "dataset"):
        return [_loader(each) for each in loader]
    facts: dict[str, Any] = {"class": type(loader).__name__}
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return facts
    facts["dataset"] = type(dataset).__name__
    try:
        facts["samples"] = len(dataset)
    except Exception:
        # A stream, which may say so by any error.
        facts["samples"] = None
    for name in (
        "batch_size",
        "num_workers",
        "pin_memory",
        "drop_last",
        "prefetch_factor",
    ):
        facts[name] = _plain(getattr(loader, name, None))
    sampler = getattr(loader, "sampler", None)
    facts["sampler"] = None if sampler is None else type(sampler).__name__
    return facts


def batch(run: Run) -> dict[str, Any]:
    """How many samples an optimizer step takes, and of what that number is the product."""
    trainer = run.trainer
    per_device = getattr(trainer.train_dataloader, "batch_size", None)
    if not isinstance(per_device, int):
        per_device = None
    _, num_shards = data_parallel_rank_and_size(run.engine.strategy)
    accumulate = trainer.accumulate_grad_batches
    total = None if per_device is None else per_device * num_shards * accumulate
    return {
        "per_device": per_device,
        "processes": num_shards,
        "accumulate": accumulate,
        "effective": total,
        "micro_batch": trainer.micro_batch,
    }


def strategy(run: Run) -> dict[str, Any]:
    """The strategy, and how many processes it has."""
    chosen = run.engine.strategy
    return {
        **described(chosen),
        "name": chosen.name,
        "processes": chosen.world_size,
        "tensor_parallel_size": chosen.tensor_parallel_size,
        "sync_batchnorm": chosen.sync_batchnorm,
    }


def precision(run: Run) -> dict[str, Any]:
    """The precision policy."""
    policy = run.engine.precision
    facts = {field.name: getattr(policy, field.name) for field in fields(policy)}
    return {
        name: str(value).removeprefix("torch.")
        if isinstance(value, torch.dtype)
        else value
        for name, value in facts.items()
    }


def seeds(run: Run) -> dict[str, Any]:
    """The numbers from which all that is random follows."""
    everything = os.environ.get(SEED_VARIABLE)
    return {
        "seed_everything": int(everything) if everything else None,
        "data": run.state.seed,
        "torch": torch.initial_seed(),
        "deterministic": _plain(run.trainer.deterministic),
    }


def model(module: nn.Module) -> dict[str, Any]:
    """The module: how many numbers its parameters have, and its parts."""
    summary = summarize(module, max_depth=2, with_sizes=False)
    layers = [
        {"name": layer.name, "type": layer.type, "parameters": layer.parameters}
        for layer in summary.layers
    ]
    return {
        "class": type(module).__name__,
        "parameters": summary.total_parameters,
        "trainable": summary.trainable,
        "bytes": summary.bytes,
        "layers": layers[:_MOST_LAYERS],
        "flops_per_sample": None,
    }
