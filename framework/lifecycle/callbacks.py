"""Which callbacks take part in a run: the user's, the default ones, and the module's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ... import callbacks as builtin_callbacks
from ...callbacks.base import Callback
from ..arguments import check_choice
from ..loop.hooks import check_callback, order_callbacks
from ..subclasses import overrides

if TYPE_CHECKING:
    from ..module import Module

# By kind of callback, the argument of the Trainer that asks for one.
_ARGUMENTS = {
    "ModelCheckpoint": "enable_checkpointing",
    "ProgressBar": "enable_progress_bar",
    "ModelSummary": "enable_model_summary",
}
PROFILERS = {
    "advanced": "AdvancedProfiler",
    "pytorch": "PyTorchProfiler",
    "simple": "SimpleProfiler",
}


def default_callbacks(
    given: Any,
    requested: dict[str, bool | None],
    defaults: list[str],
    max_time: Any,
    profiler: Any,
) -> list[Callback]:
    """The user's callbacks, and those that the Trainer's arguments ask for.

    Args:
        given: a callback, a list of them, or None.
        requested: by kind of callback, whether the user wants one; None if the user does not say.
        defaults: the kinds of which there is one if the user does not say.
        max_time: after which time to end the training, as the Trainer takes it.
        profiler: a callback that measures, or None.

    Raises:
        TypeError, ValueError: if one is no callback, or is there though its argument says that there is none.
    """
    if given is None:
        given = []
    callbacks = list(given) if isinstance(given, Sequence) else [given]
    for callback in callbacks:
        check_callback(callback)
    _check_bars(callbacks)
    for name, wanted in requested.items():
        kind = getattr(builtin_callbacks, name)
        is_given = any(isinstance(callback, kind) for callback in callbacks)
        if is_given and wanted is False:
            raise ValueError(
                f"{_ARGUMENTS[name]}=False, but callbacks holds a {name}; leave one of them out"
            )
        if is_given or wanted is False or name not in defaults:
            continue
        if name == "ProgressBar":
            kind = builtin_callbacks.RichProgressBar
        callbacks.append(kind())
    if max_time is not None:
        callbacks.append(builtin_callbacks.MaxTime(max_time))
    if profiler is not None:
        check_callback(profiler)
        callbacks.append(profiler)
    _check_that_they_differ(callbacks)
    return order_callbacks(callbacks)


def make_profiler(profiler: Any) -> Callback | None:
    """The Trainer's profiler, which it takes by name, too.

    Raises:
        ValueError: if it is neither a callback, a name that there is, nor None.
    """
    if isinstance(profiler, Callback):
        return profiler
    check_choice("profiler", profiler, (None, *PROFILERS))
    return getattr(builtin_callbacks, PROFILERS[profiler])() if profiler else None


def with_module_callbacks(
    callbacks: list[Callback], module: Module, previous: list[Callback], is_same: bool
) -> tuple[list[Callback], list[Callback]]:
    """Add a module's callbacks to the Trainer's, where they replace those of their own classes.

    Args:
        callbacks: the Trainer's, with those of the module before.
        module: the module that runs.
        previous: the callbacks of the module before.
        is_same: whether the module before is this one, which keeps the callbacks of its first run.

    Returns:
        All callbacks in the order of their phases, and the module's alone.
    """
    returned = module.configure_callbacks()
    configured = list(returned) if isinstance(returned, Sequence) else [returned]
    for callback in configured:
        check_callback(callback)
    if is_same:
        return order_callbacks(callbacks), previous
    kinds = {type(callback) for callback in configured}
    merged = [
        callback
        for callback in callbacks
        if callback not in previous and type(callback) not in kinds
    ]
    merged += configured
    _check_that_they_differ(merged)
    return order_callbacks(merged), configured


def _check_bars(callbacks: list[Callback]) -> None:
    """Refuse several progress bars."""
    bars = [c for c in callbacks if isinstance(c, builtin_callbacks.ProgressBar)]
    if len(bars) > 1:
        kinds = ", ".join(type(bar).__name__ for bar in bars)
        raise ValueError(
            f"callbacks holds {len(bars)} progress bars ({kinds}), which would draw over each other; keep one"
        )


def _check_that_they_differ(callbacks: list[Callback]) -> None:
    """Refuse a callback that is there twice, and two whose states would overwrite each other in a checkpoint."""
    seen: dict[str, Callback] = {}
    for place, callback in enumerate(callbacks):
        if any(callback is other for other in callbacks[:place]):
            raise ValueError(
                f"callbacks holds the same {type(callback).__name__} twice, and its hooks would run twice: leave one "
                "out (profiler= and configure_callbacks add to the list, too)"
            )
        if not overrides(callback, "state_dict", Callback):
            continue
        other = seen.get(callback.state_key)
        if other is not None:
            raise ValueError(
                f"two callbacks keep their states under the same key {callback.state_key!r}: {type(other).__name__} "
                f"and {type(callback).__name__}; give them different arguments, or override state_key"
            )
        seen[callback.state_key] = callback
