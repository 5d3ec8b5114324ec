"""What Lightning checks and says of a run before it begins and after it has ended, beside what Loopwright does."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from ...subclasses import overrides
from .core import LightningModule
from .utilities import MisconfiguredValue, suggested_max_num_workers
from .words import warn

# Programs read these lines under this name. Nothing shows them, unless a program asks for that.
_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")


# What `barebones=True` switches off, with the values that ask for nothing.
_NOT_BAREBONES = {
    "logger": (None, False),
    "enable_checkpointing": (None, False),
    "enable_progress_bar": (None, False),
    "enable_model_summary": (None, False),
    "num_sanity_val_steps": (None, 0),
    "log_every_n_steps": (None, 0),
    "fast_dev_run": (False,),
    "detect_anomaly": (False,),
    "profiler": (None,),
}


def check_barebones(arguments: dict[str, Any]) -> None:
    """Raise for arguments of the Trainer that ask for what ``barebones=True`` leaves out.

    Raises:
        MisconfigurationException: naming the first one.
    """
    for name, allowed in _NOT_BAREBONES.items():
        value = arguments.get(name, allowed[0])
        if not any(value is each for each in allowed) and value != 0:
            raise MisconfiguredValue(
                f"`Trainer(barebones=True, {name}={value!r})` was passed: barebones switches it off"
            )


def check_run(trainer: Any, fn: str, model: Any, ckpt_path: Any) -> None:
    """Say what a run does, where its arguments leave that open, and refuse what it cannot do.

    Args:
        trainer: whose run it is.
        fn: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        model: the module that was given, or None.
        ckpt_path: as given.

    Raises:
        MisconfigurationException: if there is no such checkpoint, or nothing to predict with.
    """
    if ckpt_path == "best":
        _check_best(trainer, fn)
    if model is None and ckpt_path is None and _best_path(trainer):
        warn(
            f"`.{fn}(ckpt_path=None)` was called without a model. The best model of the previous `fit` call will be "
            f"used, as with `{fn}(ckpt_path='best')`; for the last one, pass the model.",
            UserWarning,
        )
    if fn == "predict" and isinstance(model, LightningModule):
        _check_forward(model)


def _check_forward(model: LightningModule) -> None:
    """Raise unless there is something to predict with."""
    if model.forward is None and not overrides(model, "predict_step", LightningModule):
        raise MisconfiguredValue(
            f"predict_step requires `forward` method to run. {type(model).__name__} sets it to None"
        )


def warn_of_loaders(trainer: Any, prefix: str, loaders: Any) -> None:
    """Warn of loaders that do what their user may not have meant.

    Args:
        trainer: which reads them.
        prefix: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
        loaders: that were given: one, a list of them, or None.
    """
    for loader in loaders if isinstance(loaders, (list, tuple)) else (loaders,):
        if not isinstance(loader, DataLoader):
            continue
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
            warn(
                "Your `IterableDataset` has `__len__` defined. It is an estimate where several workers read a stream.",
                UserWarning,
            )
        _warn_of_order(trainer, prefix, loader)
        _warn_of_few_workers(trainer, prefix, loader)


def _warn_of_order(trainer: Any, prefix: str, loader: Any) -> None:
    """Warn of a loader that is shuffled where that is of no use."""
    if not isinstance(loader.sampler, RandomSampler):
        return
    if prefix != "train":
        warn(
            f"Your `{prefix}_dataloader`'s sampler has shuffling enabled: it is recommended that you turn shuffling "
            "off for val/test/predict dataloaders"
        )
    elif trainer.overfit_batches:
        warn(
            "You requested to overfit but enabled train dataloader shuffling. It is turned off for you."
        )


def _warn_of_few_workers(trainer: Any, prefix: str, loader: Any) -> None:
    """Warn of a loader with fewer workers than there are CPUs for them."""
    most = suggested_max_num_workers(trainer.num_devices)
    if loader.num_workers < 2 and most > 1:
        warn(
            f"The '{prefix}_dataloader' does not have many workers which may be a bottleneck. Consider "
            f"`DataLoader(num_workers={most})`."
        )


def check_loader_indices(step: str, prefix: str, model: Any, loaders: Any) -> None:
    """Raise if a module's hooks do not take what tells them the loader, or take it though there is one only.

    Args:
        step: what its step's name begins with.
        prefix: what the loaders' name begins with.
        model: the module, or None.
        loaders: that were given.

    Raises:
        RuntimeError: naming the hook.
    """
    if not isinstance(model, LightningModule) or loaders is None:
        return
    given = list(loaders) if isinstance(loaders, (list, tuple)) else []
    if any(isinstance(item, torch.Tensor) for item in given):
        # A list of batches.
        return
    several = len(given) > 1
    batch = f"on_{step}_batch"
    for name in (f"{step}_step", f"{batch}_start", f"{batch}_end"):
        parameters = inspect.signature(getattr(model, name)).parameters
        index = parameters.get("dataloader_idx")
        takes_any = any(
            p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()
        )
        hook = f"`{type(model).__name__}.{name}()`"
        if several and index is None and not takes_any:
            raise RuntimeError(
                f"You provided multiple `{prefix}_dataloader`, but no `dataloader_idx` argument in {hook}. Try adding "
                "`dataloader_idx=0` to its signature."
            )
        if not several and index is not None and index.default is index.empty:
            raise RuntimeError(
                f"You provided only a single `{prefix}_dataloader`, but have included `dataloader_idx` in {hook}. "
                "Either remove the argument or give it a default value, as `dataloader_idx=0`."
            )


def _best_path(trainer: Any) -> str:
    """The best checkpoint of the last fit, or an empty string."""
    if trainer.last_fit is None:
        return ""
    return getattr(trainer.checkpoint_callback, "best_model_path", "")


def _check_best(trainer: Any, fn: str) -> None:
    """Raise unless a best checkpoint may be there."""
    asked = f'`.{fn}(ckpt_path="best")`'
    if not trainer.checkpoint_callbacks:
        raise MisconfiguredValue(
            f"{asked} is set but `ModelCheckpoint` is not configured."
        )
    if len(trainer.checkpoint_callbacks) > 1:
        warn(
            f"{asked}: of several `ModelCheckpoint`, it is the best checkpoint path from first checkpoint callback",
            UserWarning,
        )
    if _best_path(trainer):
        return
    if trainer.fast_dev_run:
        raise MisconfiguredValue(
            f"{asked} has no checkpoint with `fast_dev_run=True`. There, pass an exact checkpoint path"
        )
    if trainer.last_fit is not None:
        raise MisconfiguredValue(
            f"{asked} is set but `ModelCheckpoint` is not configured to save the best model."
        )


def require_epochs_left(trainer: Any) -> None:
    """Raise if a fit has done nothing, as its checkpoint is of a later epoch than the last one it was to train.

    Raises:
        MisconfigurationException: with both epochs.
    """
    epochs = trainer.max_epochs
    if epochs not in (None, -1) and trainer.current_epoch > epochs:
        raise MisconfiguredValue(
            f"You restored a checkpoint with current_epoch={trainer.current_epoch}, but you have set "
            f"Trainer(max_epochs={epochs}): nothing was trained"
        )


def say_why_it_stopped(trainer: Any) -> None:
    """Log which limit a fit has reached."""
    if not trainer.is_global_zero:
        return
    max_steps = trainer.max_steps
    if trainer.num_training_batches == 0:
        _log.info("`Trainer.fit` stopped: No training batches.")
    elif max_steps != -1 and trainer.global_step >= max_steps:
        _log.info("`Trainer.fit` stopped: `max_steps=%s` reached.", max_steps)
    elif trainer.max_epochs != -1 and trainer.current_epoch >= trainer.max_epochs:
        _log.info("`Trainer.fit` stopped: `max_epochs=%s` reached.", trainer.max_epochs)
    elif trainer.should_stop:
        _log.debug("`Trainer.fit` stopped: `trainer.should_stop` was set.")


def say_if_it_goes_on(trainer: Any) -> None:
    """Log that a training which somebody asks to stop goes on, as it has not been as long as it has to be."""
    # The running epoch may be the last one that is asked for.
    needs_epochs = trainer.current_epoch + 1 < (trainer.min_epochs or 0)
    needs_steps = trainer.global_step < (trainer.min_steps or 0)
    if needs_epochs or needs_steps:
        _log.info(
            "The training is to stop, but `min_epochs=%s` or `min_steps=%s` has not been met. Training will continue",
            trainer.min_epochs,
            trainer.min_steps,
        )


def print_results(stage: str, results: list[dict[str, float]]) -> None:
    """Print a table of the values that a run has logged, with a column for each loader.

    Args:
        stage: ``"validate"`` or ``"test"``.
        results: values by name, for each loader.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column(f"{stage.capitalize()} metric")
    for index in range(len(results)):
        table.add_column(f"DataLoader {index}", justify="right")
    columns = [
        {name.split("/dataloader_idx_")[0]: value for name, value in result.items()}
        for result in results
    ]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(str(column.get(name, "")) for column in columns))
    Console().print(table)


def without_doubles(results: list[dict[str, float]]) -> list[dict[str, float]]:
    """Results without the plain name of what is there as ``<name>_epoch``, as Lightning returns them."""
    kept = []
    for result in results:
        plain = {name.split("/dataloader_idx_")[0] for name in result}
        kept.append(
            {
                name: value
                for name, value in result.items()
                if f"{name.split('/dataloader_idx_')[0]}_epoch" not in plain
            }
        )
    return kept


def warn_of_missing_predictions(outputs: Any) -> None:
    """Warn where ``predict_step`` has returned None."""
    loaders = outputs if outputs and isinstance(outputs[0], list) else [outputs]
    if any(output is None for loader in loaders for output in loader or ()):
        warn(
            "predict returned None for some batches: did predict_step forget to return?",
            UserWarning,
        )
