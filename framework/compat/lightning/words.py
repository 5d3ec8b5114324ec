"""Lightning's words for errors and warnings of ours: its programs catch and filter them by class and text."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from ...errors import CheckpointError
from .utilities import (
    MisconfigurationException,
    MisconfiguredValue,
    PossibleUserWarning,
    rank_zero_only,
)

log = logging.getLogger("loopwright")


class MisconfiguredType(MisconfigurationException, TypeError):
    """The same where Loopwright raises a TypeError."""


class MisconfiguredArgument(MisconfiguredValue, TypeError):
    """The same where Lightning raises a TypeError, and Loopwright a ValueError."""


class MisconfiguredRun(MisconfigurationException, RuntimeError):
    """The same where Loopwright raises a RuntimeError."""


class MisconfiguredTogether(MisconfiguredValue, RuntimeError):
    """The same where Lightning raises a RuntimeError, and Loopwright a ValueError."""


class RemovedHook(MisconfiguredValue, NotImplementedError):
    """A hook of Lightning 1, which nobody would call."""


class MissingModel(RuntimeError, AttributeError):
    """There is no module to save yet."""


class MissingCheckpoint(CheckpointError, FileNotFoundError):
    """There is no checkpoint at a path."""


class IncompleteCheckpoint(CheckpointError, KeyError):
    """A checkpoint has weights only, and a run was to be resumed."""

    # A KeyError shows its text in quotation marks.
    __str__ = Exception.__str__


# What an error of ours says, the class under Lightning's names, and what is said before ours.
_ERRORS: tuple[tuple[str, type[Exception], str], ...] = (
    # Arguments of the Trainer.
    (
        r"^(max_epochs|max_steps) must be an integer",
        MisconfiguredValue,
        r"`\1` must be a non-negative integer or -1.",
    ),
    (
        r"^gradient_clip_val must be a number",
        MisconfiguredArgument,
        "`gradient_clip_val` should be an int or a float.",
    ),
    (
        r"^gradient_clip_algorithm must be .* got '?(\w+)",
        MisconfiguredValue,
        r"`gradient_clip_algorithm` \1 is invalid.",
    ),
    (
        r"^check_val_every_n_epoch must be",
        MisconfiguredValue,
        "`check_val_every_n_epoch` should be an integer.",
    ),
    (
        r"^val_check_interval must be a number of batches \(int\) with check_val",
        MisconfiguredValue,
        "`val_check_interval` should be an integer when `check_val_every_n_epoch=None`.",
    ),
    (
        r"^(\w+_batches|val_check_interval) must be a number.* got (.*)$",
        MisconfiguredValue,
        r"You have passed invalid value \2 for \1.",
    ),
    (
        r"^fast_dev_run must be .* got (.*)$",
        MisconfiguredValue,
        r"fast_dev_run=\1 is not valid: it should be >= 0.",
    ),
    (
        r"^reload_dataloaders_every_n_epochs must be",
        MisconfiguredValue,
        "`reload_dataloaders_every_n_epochs` should be an int >= 0.",
    ),
    (
        r"^Trainer has no argument ('\w+')",
        TypeError,
        r"Trainer.__init__() got an unexpected keyword argument \1.",
    ),
    (
        r"^two callbacks keep their states under the same key .*: (\w+) and",
        MisconfiguredTogether,
        r"Found more than one stateful callback of type `\1`.",
    ),
    (
        r"^save_hyperparameters takes names",
        MisconfiguredArgument,
        "Unsupported config type.",
    ),
    # What a run is given.
    (
        r"^\w+ takes a loopwright.framework.Module; got (\w+)",
        TypeError,
        r"`model` must be a `LightningModule`, got `\1`.",
    ),
    (
        r"^(\w+) needs a model: this Trainer has not run",
        MisconfiguredArgument,
        r"`Trainer.\1()` requires a `LightningModule` in the first run.",
    ),
    (
        r"has no (\w+)\(batch, batch_idx\): define it",
        MisconfiguredValue,
        r"No `\1()` method defined.",
    ),
    (
        r"has no configure_optimizers: return",
        MisconfiguredValue,
        "No `configure_optimizers()` method defined.",
    ),
    (
        r"sets predict_step to None",
        MisconfiguredValue,
        "`predict_step` cannot be None.",
    ),
    (
        r"\.(\w+_epoch_end) would never be called",
        RemovedHook,
        r"Support for `\1` has been removed in v2.0.",
    ),
    (
        r"^there is no (train) loader: pass (\w+)=",
        MisconfiguredArgument,
        r"An invalid dataloader was passed to `Trainer.fit(\2=...)`: there is none.",
    ),
    (
        r"^there is no (\w+) loader: pass (\w+)=",
        MisconfiguredArgument,
        r"An invalid dataloader was passed to `Trainer.\1(\2=...)`: there is none.",
    ),
    (
        r"^a loader must be iterable",
        MisconfiguredType,
        "An invalid dataloader was passed to `Trainer.{fn}(...dataloaders=...)`, or was returned.",
    ),
    (
        r"^fit takes loaders or a datamodule",
        MisconfiguredValue,
        "You cannot pass `train_dataloaders` or `val_dataloaders` to `trainer.fit(datamodule=...)`.",
    ),
    (
        r"^(\w+) takes loaders or a datamodule",
        MisconfiguredValue,
        r"You cannot pass both `trainer.\1(dataloaders=..., datamodule=...)`.",
    ),
    (
        r"^val_check_interval=\d+ is more than the \d+ training batches",
        MisconfiguredValue,
        "`val_check_interval` must be less than or equal to the number of the training batches.",
    ),
    (
        r"^(limit_\w+)=\S+: the loader has no length",
        MisconfiguredValue,
        r"When using an `IterableDataset`, `Trainer(\1)` must be `1.0` or an int.",
    ),
    (
        r"^(limit_\w+)=(\S+) of (\d+) batches is less than one",
        MisconfiguredValue,
        r"\2 * \3 < 1. Please increase the `\1` argument.",
    ),
    # Optimizers and schedulers.
    (
        r"needs \"monitor\" in its dict",
        MisconfiguredValue,
        "`configure_optimizers` must include a monitor when a `ReduceLROnPlateau` is used; the lr scheduler dict must "
        "include a monitor when a `ReduceLROnPlateau` stands in it.",
    ),
    (
        r"^(\w+) monitors '(.*)', which was not logged .*; logged were: (.*)\. Log it",
        MisconfiguredRun,
        r"\1 conditioned on metric \2 which is not available. Available metrics are: \3.",
    ),
    (
        r"^configure_optimizers must return an optimizer",
        MisconfiguredType,
        "Unknown configuration for model optimizers.",
    ),
    (
        r"^lr_scheduler: interval must be",
        MisconfiguredValue,
        'The "interval" key in lr scheduler dict must be "step" or "epoch".',
    ),
    (
        r"^lr_scheduler: a scheduler must have .* got <.*?(\w+) object at",
        MisconfiguredType,
        r"The provided lr scheduler `\1` is invalid.",
    ),
    (
        r'^lr_scheduler: the dict has no "scheduler"',
        MisconfiguredValue,
        'The lr scheduler dict must have the key "scheduler".',
    ),
    (
        r"so it would change nothing: return that optimizer",
        MisconfiguredValue,
        "A scheduler is attached with an optimizer that wasn't returned.",
    ),
    (
        r"in automatic optimization each parameter is trained by one optimizer",
        MisconfiguredTogether,
        "Training a parameter by multiple optimizers is only supported with manual optimization.",
    ),
    (
        r"^training_step must return .* got \{",
        MisconfiguredType,
        "In automatic optimization, the 'loss' key needs to be present in a dict that `training_step` returns.",
    ),
    (
        r"^training_step must return",
        MisconfiguredType,
        "In automatic optimization, `training_step` must return a Tensor, a dict, or None.",
    ),
    # Logged values.
    (
        r"would keep nothing; set one of them",
        MisconfiguredValue,
        "`self.log(..., on_step=False, on_epoch=False)` is not useful.",
    ),
    (
        r"^log\('(.*?)'\): value must be .* got (\{.*\})",
        MisconfiguredArgument,
        r"`self.log(\1, \2)` was called, but nested dictionaries cannot be logged.",
    ),
    (
        r"^log\('(.*?)'\): value must be .* got (.*)",
        MisconfiguredArgument,
        r"`self.log(\1, \2)` was called, but such values cannot be logged.",
    ),
    (
        r"^log\('(.*?)'\): the tensor must have one element",
        MisconfiguredValue,
        r"`self.log(\1, ...)` was called, but the tensor must have a single element.",
    ),
    (
        r"^log\('(.*?)', .*: it was logged with",
        MisconfiguredValue,
        r"You called `self.log(\1, ...)` twice in `training_step` or a hook with different arguments.",
    ),
    (
        r"^log\('.*?'\): the \w+ must be an attribute of the module",
        MisconfiguredValue,
        "Could not find the `LightningModule` attribute for the `torchmetrics.Metric` logged.",
    ),
    (
        r"^log\('.*?'\) here has no effect",
        MisconfiguredRun,
        "You can't `self.log()` here: the result collection is not registered yet.",
    ),
    (
        r"^log\('.*?', on_step=True\): this is no step",
        MisconfiguredValue,
        "You can't `self.log(on_step=True)` here: on_step must be one of (False,).",
    ),
    (
        r"^EarlyStopping\(monitor='(.*?)'\): nothing of that name",
        MisconfiguredRun,
        r"Early stopping conditioned on metric `\1` which is not available.",
    ),
    (
        r"^(ModelCheckpoint\(monitor='.*?'\)): nothing of that name",
        MisconfiguredRun,
        r"`\1` could not find the monitored key in the returned metrics.",
    ),
    # Checkpoints.
    (
        r"^save_checkpoint: this Trainer has run nothing",
        MissingModel,
        "Saving a checkpoint is only possible if a model is attached to the Trainer.",
    ),
    (
        r"^there is no checkpoint at (.*)$",
        MissingCheckpoint,
        r"Checkpoint file not found: \1.",
    ),
    (
        r"it cannot resume a run; load its weights",
        IncompleteCheckpoint,
        "The checkpoint contains only the model.",
    ),
)

# The same for what we log: the class of the warning, and what is said before ours.
_WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    (
        r"has a validation_step, and there is no validation loader",
        PossibleUserWarning,
        "You defined a `validation_step` but have no `val_dataloader`.",
    ),
    (
        r"^There is a val_dataloader, and \w+ has no validation_step",
        PossibleUserWarning,
        "You passed in a `val_dataloader` but have no `validation_step`.",
    ),
    (
        r'^ckpt_path="last": there is no checkpoint yet',
        UserWarning,
        "There is no last checkpoint. No checkpoint will be loaded.",
    ),
    (
        r"^An epoch has (\d+) optimizer steps, fewer than log_every_n_steps=(\d+)",
        PossibleUserWarning,
        r"The number of training batches (\1) is smaller than the logging interval Trainer(log_every_n_steps=\2).",
    ),
    (
        r"^(\w+) monitors '(.*)', which was not logged: it does not step",
        RuntimeWarning,
        r"\1 conditioned on metric \2 which is not available but strict is set to `False`.",
    ),
    (
        r"^In evaluation mode when training begins",
        PossibleUserWarning,
        "Found module(s) in eval mode at the start of training.",
    ),
)


def _with_words(text: str, pattern: str, words: str) -> str | None:
    """A text with Lightning's words before it; None if it is not one of these."""
    found = re.search(pattern, text)
    return None if found is None else f"{found.expand(words)} {text}"


def in_lightnings_words(error: Exception, fn: str = "") -> Exception:
    """An error of ours as one that Lightning's programs expect; any other error as it is.

    Args:
        error: which was raised.
        fn: the Trainer's method in which it was.
    """
    if isinstance(error, MisconfigurationException) or not _is_ours(error):
        return error
    text = str(error)
    for pattern, kind, words in _ERRORS:
        message = _with_words(text, pattern, words)
        if message is not None:
            return _like(error, kind(message.replace("{fn}", fn)))
    # Others, such as a UnicodeDecodeError, come from what a user's loader calls.
    if type(error) is ValueError:
        return _like(error, MisconfiguredValue(text))
    return error


def _is_ours(error: Exception) -> bool:
    """Whether code of Loopwright has raised it, and not the user's or a library's."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return str(name).startswith("loopwright.")


def _like(error: Exception, other: Exception) -> Exception:
    """The other one, with the first one's place and notes."""
    other.__dict__.update(error.__dict__)
    other.__cause__ = error.__cause__
    return other.with_traceback(error.__traceback__)


@contextmanager
def lightnings_words(fn: str = "") -> Iterator[None]:
    """Raise our errors, and give our warnings, as Lightning's programs expect them, inside a ``with`` block.

    Args:
        fn: the Trainer's method that runs in it.
    """
    # A checkpoint may be saved, or another Trainer run, inside of a run.
    is_outermost = _warn_instead not in log.filters
    log.addFilter(_warn_instead)
    try:
        yield
    except Exception as error:
        other = in_lightnings_words(error, fn)
        if other is error:
            raise
        raise other from other.__cause__
    finally:
        if is_outermost:
            log.removeFilter(_warn_instead)


def _warn_instead(record: logging.LogRecord) -> bool:
    """Give a warning of ours by Python's means, so that a program's filters hold; leave the rest to be logged."""
    text = record.getMessage()
    for pattern, kind, words in _WARNINGS:
        message = _with_words(text, pattern, words)
        if message is not None:
            _warn(message, kind)
            return False
    if record.levelno == logging.WARNING:
        # It may be about this process alone.
        _warn_here(text, UserWarning)
        return False
    return True


def _warn_here(message: str, kind: type[Warning]) -> None:
    # At one place, as its line tells nothing: Python shows each text once.
    warnings.warn(message, kind, stacklevel=1)


_warn = rank_zero_only(_warn_here)


def warn(message: str, kind: type[Warning] = PossibleUserWarning) -> None:
    """Give a warning that only Lightning's programs expect.

    Args:
        message: the warning.
        kind: its class.
    """
    _warn(message, kind)


def may_log(trainer: Any, name: str, logger: bool | None) -> bool:
    """Whether ``self.log`` can do anything; where not, a warning says so.

    Args:
        trainer: the module's, or None.
        name: of the value.
        logger: the argument of ``self.log``.
    """
    if trainer is None:
        warn(
            f"log({name!r}) has no effect, as the `self.trainer` reference is not registered on the model yet",
            UserWarning,
        )
        return False
    if trainer.barebones:
        warn(
            "You are trying to `self.log()` but `Trainer(barebones=True)` is set, which keeps nothing",
            UserWarning,
        )
        return False
    if logger and not trainer.loggers:
        warn(
            f"self.log({name!r}, logger=True) was called but have no logger configured",
            UserWarning,
        )
    return True


def warn_of_integers(trainer: Any, name: str, value: Any) -> None:
    """Warn, once for each name, that a tensor of integers is logged as a float.

    Args:
        trainer: the module's.
        name: of the value.
        value: the tensor.
    """
    if value.is_floating_point() or name in trainer.integers_logged:
        return
    trainer.integers_logged.add(name)
    stage = {"train": "training", "validate": "validation"}.get(
        trainer.state.stage, trainer.state.stage
    )
    warn(
        f"You called `self.log({name!r}, ...)` in your `{stage}_step` but the value needs to be floating to be "
        "reduced. Converting it to torch.float32. For a value that is not to be reduced, call "
        "`self.logger.log_metrics`.",
        UserWarning,
    )
