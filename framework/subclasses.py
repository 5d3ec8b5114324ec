"""Checks of what users write in subclasses of ours: that the framework calls their methods, and can call them.

A method that nobody calls does nothing, without a word. So a method whose name is nearly that of a hook, or is the name
that a hook has in another trainer, is an error. A method that the class itself calls is its author's business; so are
the methods of mixins from other libraries, and what overrides them.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import CodeType
from typing import Any

from ..loggers.base import Logger

_EPOCH_END = ", which gets no outputs: keep what you need of them in the step"
# Hooks of Lightning 1, Keras and Hugging Face, and what is called at the same moment here.
HOOKS_ELSEWHERE = {
    "configure_sharded_model": "configure_model",
    "get_progress_bar_dict": "get_metrics of a ProgressBar; self.log(name, value, prog_bar=True) shows a value",
    "on_batch_begin": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_batch_start": "on_train_batch_start",
    "on_before_accelerator_backend_setup": "setup",
    "on_configure_sharded_model": "configure_model",
    "on_epoch_begin": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end, on_validation_epoch_end or on_test_epoch_end",
    "on_epoch_start": "on_train_epoch_start, on_validation_epoch_start or on_test_epoch_start",
    "on_evaluate": "on_validation_end",
    "on_init_end": "setup",
    "on_init_start": "setup",
    "on_keyboard_interrupt": "on_exception",
    "on_post_move_to_device": "on_fit_start",
    "on_predict_dataloader": "predict_dataloader itself, or setup",
    "on_pretrain_routine_end": "on_fit_start",
    "on_pretrain_routine_start": "on_fit_start",
    "on_step_begin": "on_train_batch_start",
    "on_step_end": "on_train_batch_end",
    "on_test_dataloader": "test_dataloader itself, or setup",
    "on_train_begin": "on_train_start",
    "on_train_dataloader": "train_dataloader itself, or setup",
    "on_val_dataloader": "val_dataloader itself, or setup",
    "predict_epoch_end": f"on_predict_epoch_end{_EPOCH_END}",
    "tbptt_split_batch": "a loop over parts of the batch in training_step, with automatic_optimization = False",
    "test_epoch_end": f"on_test_epoch_end{_EPOCH_END}",
    "test_step_end": "on_test_batch_end, or the end of test_step",
    "training_epoch_end": f"on_train_epoch_end{_EPOCH_END}",
    "training_step_end": "on_train_batch_end, or the end of training_step",
    "validation_epoch_end": f"on_validation_epoch_end{_EPOCH_END}",
    "validation_step_end": "on_validation_batch_end, or the end of validation_step",
}
# Steps whose names are too short to be found as near ones.
STEPS_ELSEWHERE = {
    "eval_step": "validation_step",
    "val_step": "validation_step",
}
LOGGERS_ELSEWHERE = {
    "agg_and_log_metrics": "log_metrics",
    "log_hparams": "log_hyperparams",
    "store_init_configuration": "log_hyperparams",
}
STRATEGIES_ELSEWHERE = {
    "lightning_module_state_dict": "model_state",
    "load_checkpoint": "load_model_state and load_optimizer_state; the Trainer reads the files",
    "model_to_device": "setup",
    "optimizer_step": "step",
    "post_backward": "backward",
    "pre_backward": "backward, or prepare_backward",
    "predict_step": "evaluate",
    "reduce_boolean_decision": "reduce",
    "save_checkpoint": "model_state and optimizer_state; the Trainer writes the files",
    "setup_module": "setup",
    "test_step": "evaluate",
    "training_step": "forward",
    "validation_step": "evaluate",
}


def check_names(
    obj: object,
    base: type,
    known: Iterable[str],
    elsewhere: dict[str, str],
) -> None:
    """Raise if a user has written a method that nobody calls.

    Args:
        obj: an object of a user's subclass of ``base``.
        base: the contract.
        known: names in the contract that the framework calls.
        elsewhere: names that other trainers call, and what does the same here.

    Raises:
        ValueError: naming the method, and what may have been meant.
    """
    known = list(known)
    kinds = list(_written_by_users(type(obj), base))
    called = _called_names(type(obj), kinds)
    for index, kind in enumerate(kinds):
        for name, value in vars(kind).items():
            if name.startswith("_") or name in called or not callable(value):
                continue
            if any(name in vars(other) for other in kinds[index + 1 :]):
                # It overrides a method that is judged there.
                continue
            meant = elsewhere.get(name) or _meant(name, known)
            if meant is None or any(fnmatchcase(name, pattern) for pattern in called):
                continue
            if any(meant in vars(other) for other in kinds[: index + 1]):
                # Whoever writes both knows the right name.
                continue
            problem = f"{kind.__name__}.{name} would never be called"
            if name in elsewhere:
                raise ValueError(f"{problem}: here that is {meant}")
            raise ValueError(
                f"{problem}; did you mean {meant!r}? "
                "(If it is not meant to be a hook, give it another name.)"
            )


def _called_names(kind: type, kinds: list[type]) -> set[str]:
    """Names, and patterns of names, that the user's classes ``kinds`` call in other methods or other bases have."""
    called = set()
    for parent in kind.__mro__:
        if parent not in kinds:
            called.update(dir(parent))
            continue
        for method, value in vars(parent).items():
            called.update(name for name in _names_in(value) if name != method)
    return called


def _meant(name: str, known: list[str]) -> str | None:
    """The method of the contract whose name is nearly this one, or None."""
    if STEPS_ELSEWHERE.get(name) in known:
        return STEPS_ELSEWHERE[name]
    for close in get_close_matches(name, known, 1, 0.8):
        # With more words, as in predict_next_step, it says something else: only what begins so is meant as a hook.
        has_more_words = name.count("_") > close.count("_")
        same_letters = name.replace("_", "") == close.replace("_", "")
        if same_letters or not has_more_words or name.startswith("on_"):
            return close
    return None


def _written_by_users(kind: type, base: type) -> Iterator[type]:
    """The bases of ``kind`` that are a user's: subclasses of ``base``, and mixins from the same package."""
    package = kind.__module__.partition(".")[0]
    for parent in kind.__mro__:
        is_near = parent.__module__.partition(".")[0] == package
        if not _is_ours(parent) and (is_near or issubclass(parent, base)):
            yield parent


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("loopwright.")


def _names_in(value: Any) -> Iterator[str]:
    """The names that a function or property, or a function inside it, uses.

    Where it has ``getattr``, also the texts in it: parts of names, such as ``"_step"``, as patterns.
    """
    inside = (getattr(value, name, None) for name in ("fget", "fset", "func"))
    functions: list[Any] = [value, *inside]
    for function in functions:
        code = function
        if not isinstance(code, CodeType):
            code = getattr(inspect.unwrap(function), "__code__", None)
        if not isinstance(code, CodeType):
            continue
        yield from code.co_names
        has_getattr = "getattr" in code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names_in(constant)
            elif has_getattr and isinstance(constant, str) and constant.isidentifier():
                start = "*" if constant.startswith("_") else ""
                end = "*" if constant.endswith("_") else ""
                yield f"{start}{constant}{end}"


def check_hook_arguments(owner: object, name: str, base: type) -> None:
    """Raise unless a hook takes the arguments that the contract gives it; it may do without those that have defaults.

    Args:
        owner: the object with the hook.
        name: of the hook.
        base: the contract.

    Raises:
        TypeError: as :func:`check_arguments`.
    """
    parameters = list(inspect.signature(getattr(base, name)).parameters.values())[1:]
    required = [p.name for p in parameters if p.default is p.empty]
    check_arguments(owner, name, required, [p.name for p in parameters])


def check_arguments(owner: object, name: str, *accepted: Sequence[str]) -> None:
    """Raise unless a method takes the arguments with which it will be called.

    Args:
        owner: the object.
        name: of the method.
        *accepted: lists of names of arguments, by position; the method has to take one of them.

    Raises:
        TypeError: with what it takes and what it would get.
    """
    method = getattr(owner, name)
    try:
        signature = inspect.signature(method)
        decorated = inspect.signature(method, follow_wrapped=False)
    except ValueError:
        # A function without a signature, such as one written in C.
        return
    # With a default, it would take another argument's place, or its default for an index.
    is_of_lightning_1 = "optimizer_idx" in signature.parameters
    for arguments in () if is_of_lightning_1 else accepted:
        # A decorator may give the function more than it is given itself.
        if _takes(signature, *arguments) or _takes(decorated, *arguments):
            return
    advice = ""
    if is_of_lightning_1:
        advice = (
            "; with several optimizers of one loss, leave optimizer_idx out; with several losses, set "
            "self.automatic_optimization = False in __init__ and call opt.update(loss) for each in training_step"
        )
    given = ", ".join(accepted[0])
    raise TypeError(
        f"{type(owner).__name__}.{name}{signature} is called with ({given}){advice}"
    )


def call_with_stage(stage: str, *hooks: Any) -> None:
    """Call ``setup`` or ``teardown``: with the stage by name, as Lightning does, if it takes that; else by position."""
    for hook in hooks:
        if _takes(inspect.signature(hook, follow_wrapped=False), stage=stage):
            hook(stage=stage)
        else:
            hook(stage)


def _takes(signature: inspect.Signature, *args: str, **kwargs: str) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def check_initialized(obj: object) -> None:
    """Raise if a class's ``__init__`` has not called that of the framework's class above it.

    Raises:
        TypeError: if the object has none of the attributes that the latter sets.
    """
    for parent in type(obj).__mro__:
        if not _is_ours(parent) or "__init__" not in vars(parent):
            continue
        attributes = {
            step.argval
            for step in dis.get_instructions(parent.__init__)
            if step.opname == "STORE_ATTR"
        }
        if attributes and not attributes & vars(obj).keys():
            raise TypeError(
                f"{type(obj).__name__}.__init__ has not called {parent.__name__}'s: begin it with super().__init__(…)"
            )


def overrides(obj: object, name: str, base: type) -> bool:
    """Whether an object has a method of its own, in its class or set on itself; None there switches it off.

    Args:
        obj: the object.
        name: of the method.
        base: the contract, whose method does nothing.
    """
    if name in vars(obj):
        return vars(obj)[name] is not None
    method = getattr(type(obj), name, None)
    return method is not None and method is not getattr(base, name, None)


def check_loggers(loggers: Any, accepted: str) -> list[Logger]:
    """Return a list of loggers.

    Args:
        loggers: a logger or several.
        accepted: what the argument may be, for the error.

    Raises:
        TypeError: if one of them is no :class:`~loopwright.loggers.Logger`.
    """
    is_list = isinstance(loggers, Sequence) and not isinstance(loggers, str)
    listed: list[Any] = list(loggers) if is_list else [loggers]
    for logger in listed:
        if not isinstance(logger, Logger):
            raise TypeError(
                f"logger must be {accepted}, such as TensorBoardLogger(…) of loopwright.loggers; got {logger!r}"
            )
        check_initialized(logger)
        check_names(logger, Logger, public_methods(Logger), LOGGERS_ELSEWHERE)
        for name in ("log_metrics", "log_hyperparams"):
            check_hook_arguments(logger, name, Logger)
    return listed


def public_methods(base: type) -> list[str]:
    """The names of a contract's methods."""
    return [
        name
        for name, value in vars(base).items()
        if callable(value) and not name.startswith("_")
    ]
