"""A run in processes that are started for it, and how what came of it gets back."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from torch import nn
from torch.optim import Optimizer

from ...strategies.launch.environment import detect_environment
from ...strategies.launch.launcher import call_in_processes, can_rerun, rerun_script
from ...strategies.tensor_shards import full_state
from ..arguments import check_count
from ..attributes import TrainerAttributes
from ..data.batches import move_batch
from ..datamodule import DataHooks
from ..messages import configure
from ..seed import rng_state, set_rng_state

if TYPE_CHECKING:
    from ..datamodule import DataModule
    from ..module import Module
    from ..trainer import Trainer


@dataclass
class Run:
    """One call of ``fit``, ``validate``, ``test`` or ``predict``, its arguments checked.

    Attributes:
        fn: which of them.
        model, datamodule: what runs.
        given: the loaders passed, by stage.
        ckpt_path, weights_only: as passed.
        keep: which predictions to return: ``"own"``, ``"all"`` or ``"none"``.
    """

    fn: str
    model: Module
    datamodule: DataModule | None
    given: dict[str, Any]
    ckpt_path: Any
    weights_only: bool | None
    keep: str


@dataclass
class CarriedFit:
    """What another process left of a fit, for the next one to go on with."""

    module: Module
    configured: str
    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """The states of optimizers and schedulers."""
        return self.state


def launch(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    num_processes: int | None = None,
) -> Any:
    """Call a function that makes an :class:`~loopwright.framework.Engine` in several processes, as from a notebook.

    In a process that a launcher has started already, the function is just called.

    Args:
        function: may be defined in a notebook; it and its arguments are sent by cloudpickle.
        args: its arguments.
        num_processes: how many (default: the accelerators of this machine, or 1).

    Returns:
        What it returned in the main process.

    Raises:
        TypeError: if something cannot be pickled.
        RuntimeError: if a process died or hung; with the rank that did first, and what is known of it.
        BaseException: what the process that failed first has raised, caused by such a RuntimeError with its traceback.
    """
    check_count("num_processes", num_processes, 1, (None,))
    count = num_processes or max(1, torch.accelerator.device_count())
    if detect_environment() is not None or count == 1:
        return function(*args)
    return call_in_processes(_portable_result, (function, args), count)


def _portable_result(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return move_batch(function(*args), torch.device("cpu"))


def run_in_processes(trainer: Trainer, run: Run) -> Any:
    """Run in one process for each device: this program again, or, where it cannot be run again, sent to fresh ones."""
    processes = trainer.world_size
    if can_rerun():
        rerun_script(processes, trainer.strategy.max_restarts)
    trainer.data_seed()  # drawn here, where the user has seeded
    trainer.callbacks = trainer.with_module_callbacks(run.model)
    left = call_in_processes(_run_here, (trainer, run, rng_state()), processes)
    _take_back(trainer, run, left)
    return left["returned"]


def _run_here(trainer: Trainer, run: Run, rng: dict[str, Any]) -> dict[str, Any]:
    """What each of the fresh processes does; the main one's result goes back."""
    configure()
    set_rng_state(rng)
    trainer.engine.detect_environment()
    returned = trainer.execute(run)
    states = (
        trainer.strategy.model_state(),
        trainer.optimization.state_dict() if trainer.fitted else None,
    )
    weights, optimization = (full_state(trainer.strategy, state) for state in states)
    if not trainer.is_global_zero:
        return {}
    left = {
        "returned": returned,
        "weights": weights,
        "buffers": dict(
            run.model.named_buffers()
        ),  # those that are no part of the state, too
        "modules": {
            name: _portable(module) for name, module in run.model.named_modules()
        },
        "callbacks": [
            (type(callback), _portable(callback)) for callback in trainer.callbacks
        ],
        "loggers": [_portable(logger) for logger in trainer.loggers],
        "state": trainer.state,
        "results": trainer.metrics.results,
        "unfinished": trainer.unfinished,
        "fit": (trainer.optimization.configured, optimization)
        if trainer.fitted
        else None,
        "ckpt_path": trainer.ckpt_path,
        "rng": rng_state(),
    }
    return move_batch(left, torch.device("cpu"))


def _portable(obj: Any) -> dict[str, bytes]:
    """The attributes of an object that can be sent, such as what a callback has recorded, each by itself."""
    state = obj.__getstate__() if hasattr(obj, "__getstate__") else vars(obj)
    own = vars(nn.Module()) if isinstance(obj, nn.Module) else {}
    kept = {}
    for name, value in (state or {}).items():
        file = io.BytesIO()
        try:
            if name not in own:
                _AttributePickler(file).dump(value)
                kept[name] = file.getvalue()
        except (
            Exception
        ):  # an open file, a lock, a part of the module: it stays where it was made
            continue
    return kept


class _AttributePickler(cloudpickle.Pickler):
    """Refuses what is no value of its own: copies of modules, parameters and the like would part from the originals."""

    def persistent_id(self, obj: Any) -> None:
        if isinstance(
            obj, (nn.Module, nn.Parameter, Optimizer, TrainerAttributes, DataHooks)
        ):
            raise pickle.PicklingError(f"{type(obj).__name__} stays where it is")


def _set_attributes(obj: Any, attributes: dict[str, bytes]) -> None:
    vars(obj).update({name: pickle.loads(value) for name, value in attributes.items()})


def _take_back(trainer: Trainer, run: Run, left: dict[str, Any]) -> None:
    """Let the run have happened here."""
    module = run.model
    if module.state_dict().keys() != left["weights"].keys():
        with trainer.engine.precision.init_context():
            module.configure_model()  # what it makes was made there only
    trainer.engine.precision.convert_module(module)
    module.load_state_dict(left["weights"])
    for name, buffer in module.named_buffers():
        buffer.data = left["buffers"][name].to(buffer.device, copy=True)
    for name, part in module.named_modules():
        _set_attributes(part, left["modules"].get(name, {}))
    for callback, (kind, attributes) in zip(
        trainer.callbacks, left["callbacks"], strict=True
    ):
        if type(callback).__qualname__ == kind.__qualname__:
            _set_attributes(callback, attributes)
    for logger, attributes in zip(trainer.loggers, left["loggers"], strict=True):
        _set_attributes(logger, attributes)
    trainer.module, trainer.datamodule = module, run.datamodule
    module.trainer = trainer
    trainer.state, trainer.unfinished, trainer.ckpt_path = (
        left["state"],
        left["unfinished"],
        left["ckpt_path"],
    )
    trainer.metrics.module, trainer.metrics.results = module, left["results"]
    if left["fit"] is not None:
        trainer.carried = CarriedFit(module, *left["fit"])
    set_rng_state(left["rng"])
