"""Which callbacks take part in a run: the user's, those that are usual, and the module's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import callbacks as builtin_callbacks
from ...callbacks.base import Callback
from ..loop.hooks import check_callback, order_callbacks
from ..subclasses import overrides

if TYPE_CHECKING:
    from ..module import Module

# What the Trainer's argument is called that asks for such a callback.
_ARGUMENTS = {
    "ModelCheckpoint": "enable_checkpointing",
    "ProgressBar": "enable_progress_bar",
    "ModelSummary": "enable_model_summary",
}
_PROFILERS = {"simple": "SimpleProfiler", "pytorch": "PyTorchProfiler"}


def default_callbacks(
    given: Any,
    asked: dict[str, bool | None],
    usual: list[str],
    max_time: Any,
    profiler: str | None,
) -> list[Callback]:
    """The user's callbacks, and those that the Trainer's arguments ask for.

    Args:
        given: a callback, a list of them, or None.
        asked: by kind of callback, whether the user wants one; None if he does not say.
        usual: the kinds of which there is one if he does not say.
        max_time: when to end the training.
        profiler: ``"simple"``, ``"pytorch"`` or None.

    Raises:
        TypeError, ValueError: if one is no callback, or is there though its argument says that there is none.
    """
    if given is None:
        given = []
    callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
    for callback in callbacks:
        check_callback(callback)
    for name, wanted in asked.items():
        kind = getattr(builtin_callbacks, name)
        is_given = any(isinstance(callback, kind) for callback in callbacks)
        if is_given and wanted is False:
            raise ValueError(
                f"{_ARGUMENTS[name]}=False, but callbacks holds a {name}; leave one of them out"
            )
        if is_given or wanted is False or name not in usual:
            continue
        if name == "ProgressBar":
            kind = builtin_callbacks.RichProgressBar
        callbacks.append(kind())
    if max_time is not None:
        callbacks.append(builtin_callbacks.MaxTime(max_time))
    if profiler is not None:
        callbacks.append(getattr(builtin_callbacks, _PROFILERS[profiler])())
    _check_state_keys(callbacks)
    return order_callbacks(callbacks)


def with_module_callbacks(
    callbacks: list[Callback], module: Module, earlier: list[Callback], is_same: bool
) -> tuple[list[Callback], list[Callback]]:
    """The Trainer's callbacks and the module's, which take the place of those of its own kind.

    Args:
        callbacks: the Trainer's, with those of the module before.
        module: the module that runs.
        earlier: those of the module before.
        is_same: whether that is this module: it keeps those of its first run.

    Returns:
        All callbacks in the order of their phases, and the module's own.
    """
    returned = module.configure_callbacks()
    own = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    for callback in own:
        check_callback(callback)
    if is_same:
        return order_callbacks(callbacks), earlier
    kinds = {type(callback) for callback in own}
    merged = [
        callback
        for callback in callbacks
        if callback not in earlier and type(callback) not in kinds
    ]
    merged += own
    _check_state_keys(merged)
    return order_callbacks(merged), own


def _check_state_keys(callbacks: list[Callback]) -> None:
    seen: dict[str, Callback] = {}
    for callback in callbacks:
        if not overrides(callback, "state_dict", Callback):
            continue
        other = seen.get(callback.state_key)
        if other is not None:
            raise ValueError(
                f"two callbacks keep their states under the same key {callback.state_key!r}: {type(other).__name__} "
                f"and {type(callback).__name__}; give them different arguments, or override state_key"
            )
        seen[callback.state_key] = callback
