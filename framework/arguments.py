"""Checks of arguments of the Trainer and the Engine: each error names the argument, what is accepted and what came."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

from ..callbacks.intervals import Interval, read_interval

Initializer = TypeVar("Initializer", bound=Callable[..., None])

# Arguments that other trainers have, or had in older versions, and what does the same here.
ELSEWHERE = {
    "accumulate_grad_batches": "gradient_accumulation_steps=…",
    "amp_backend": 'precision="16-mixed"',
    "amp_level": 'precision="16-mixed"',
    "args": "arguments of their own, by name",
    "auto_lr_find": "a short fit for each learning rate that you want to compare",
    "auto_scale_batch_size": 'micro_batch="auto", which divides a batch that does not fit',
    "auto_select_gpus": 'devices="auto"',
    "bf16": 'precision="bf16-mixed"',
    "checkpoint_callback": "enable_checkpointing=…, or a ModelCheckpoint in callbacks",
    "cpu": 'accelerator="cpu"',
    "data_collator": "collate_fn=… of the DataLoader that fit gets",
    "deepspeed_plugin": "strategy=DeepSpeedStrategy(…)",
    "dispatch_batches": "use_distributed_sampler=… of the Trainer; an Engine deals the batches out by itself",
    "distributed_backend": "strategy=…",
    "dynamo_backend": "torch.compile on the model",
    "early_stop_callback": "an EarlyStopping in callbacks",
    "eval_dataset": "val_dataloaders=… of fit",
    "eval_steps": "val_check_interval=…",
    "even_batches": "what an Engine does by itself",
    "flush_logs_every_n_steps": "flush_logs_every_n_steps=… of CSVLogger",
    "fp16": 'precision="16-mixed"',
    "fsdp_plugin": "strategy=FSDPStrategy(…)",
    "gpus": 'devices=…, with accelerator="gpu"',
    "gradient_accumulation_plugin": "gradient_accumulation_steps=…",
    "gradient_accumulation_steps": "accumulate_grad_batches=…",
    "kwargs_handlers": "strategy=DDPStrategy(…), and precision=Precision(…) for the loss scale",
    "learning_rate": "the learning rate of the optimizer that configure_optimizers returns",
    "log_with": "logger=TensorBoardLogger(…) or another",
    "logging_steps": "log_every_n_steps=…",
    "max_grad_norm": "gradient_clip_val=…",
    "mixed_precision": 'precision="16-mixed" or "bf16-mixed"',
    "model": "the first argument of fit",
    "multiple_trainloader_mode": "a CombinedLoader with a mode",
    "num_processes": "devices=…",
    "num_train_epochs": "max_epochs=…",
    "output_dir": "default_root_dir=…",
    "per_device_train_batch_size": "batch_size=… of the DataLoader that fit gets",
    "plugins": "strategy=… or precision=…, with an object",
    "progress_bar_refresh_rate": "a RichProgressBar(refresh_rate=…) in callbacks, or enable_progress_bar=False",
    "project_dir": "the folder of the logger",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs=1",
    "replace_sampler_ddp": "use_distributed_sampler=…",
    "report_to": "logger=…",
    "resume_from_checkpoint": "ckpt_path=… of fit",
    "save_steps": "a ModelCheckpoint(every_n_train_steps=…) in callbacks",
    "seed": "seed_everything(…) before the Trainer is made",
    "stochastic_weight_avg": "torch.optim.swa_utils in a callback",
    "terminate_on_nan": "detect_anomaly=True",
    "tpu_cores": "devices=…",
    "train_dataset": "train_dataloaders=… of fit",
    "train_percent_check": "limit_train_batches=…",
    "val_percent_check": "limit_val_batches=…",
    "weights_save_path": "a ModelCheckpoint(dirpath=…) in callbacks",
    "weights_summary": "enable_model_summary=…, or a ModelSummary in callbacks",
}


def names_arguments(init: Initializer) -> Initializer:
    """Decorate a constructor: for an argument that it does not have, the error says what does the same here.

    Raises:
        TypeError: when the constructor is called with such an argument.
    """
    parameters = list(inspect.signature(init).parameters.values())[1:]
    known = [parameter.name for parameter in parameters]
    num_positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
    owner = init.__qualname__.partition(".")[0]

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > num_positional:
            raise TypeError(
                f"{owner} takes its arguments by name, such as {known[0]}=…; got {args[-1]!r}"
            )
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{owner} has no argument {name!r}{advice_on(name, known)}"
                )
        plain = {name: _plain(value) for name, value in kwargs.items()}
        init(self, *map(_plain, args), **plain)

    return checked  # type: ignore[return-value] # it has the constructor's signature


def formerly(**names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a method to take arguments under former names, too.

    Args:
        **names: the present name of each former one.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            renamed = {names.get(name, name): kwargs[name] for name in kwargs}
            return method(*args, **renamed)

        return call

    return decorate


def _plain(value: Any) -> Any:
    """Python's own number for one of NumPy's, such as a computed count of steps; any other value as it is."""
    is_scalar = (
        type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    )
    return value.item() if is_scalar else value


def advice_on(name: str, known: list[str]) -> str:
    """What to use instead of an argument that there is not: the end of a sentence that says so.

    Args:
        name: the argument.
        known: the arguments that there are.
    """
    if name in ELSEWHERE:
        return f": here that is {ELSEWHERE[name]}"
    close = get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; its arguments are {', '.join(known)}"


def check_count(
    name: str,
    value: Any,
    minimum: int,
    extra: tuple[Any, ...] = (),
) -> None:
    """Require an integer from ``minimum``, or one of ``extra``.

    Raises:
        ValueError: if it is neither.
    """
    # True does not count as 1; and a value of another type, such as an array, may not be comparable at all.
    if value in [item for item in extra if type(item) is type(value)]:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        others = "".join(f", or {item!r}" for item in extra)
        raise ValueError(
            f"{name} must be an integer from {minimum}{others}; got {value!r}"
        )


def check_limit(name: str, value: Any) -> int | float:
    """Require a number of batches (int) or a fraction of them (float from 0.0 to 1.0).

    Returns:
        The value; 1.0, which is all, for None.

    Raises:
        ValueError: if it is neither.
    """
    if value is None:
        return 1.0
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    fraction = isinstance(value, float) and 0.0 <= value <= 1.0
    if not whole and not fraction:
        raise ValueError(
            f"{name} must be a number of batches (int from 0) or a fraction (0.0 to 1.0); got {value!r}"
        )
    return value


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Require one of ``choices``.

    Raises:
        ValueError: if it is none of them.
    """
    # True does not count as 1; and a value of another type, such as an array, may not be comparable at all.
    if value not in [choice for choice in choices if isinstance(value, type(choice))]:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}"
        )


def check_clipping(value: Any, algorithm: Any) -> str:
    """Check ``gradient_clip_val`` and ``gradient_clip_algorithm``.

    Returns:
        The algorithm; ``"norm"`` for None.

    Raises:
        ValueError: if one of them is not as it should be.
    """
    if value is not None and (
        not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0
    ):
        raise ValueError(
            f"gradient_clip_val must be a number from 0, or None; got {value!r}"
        )
    check_choice("gradient_clip_algorithm", algorithm, (None, "norm", "value"))
    return algorithm or "norm"


def check_validation(
    val_check_interval: Any, check_val_every_n_epoch: Any, validate_every: Any
) -> tuple[Any, int | None, Interval | None]:
    """Check the three arguments that say when ``fit`` validates.

    Args:
        val_check_interval: a number of batches, a fraction of an epoch, or a time.
        check_val_every_n_epoch: in which epochs; None: in all, and batches are counted over them.
        validate_every: instead of these two, an interval as text.

    Returns:
        The first two, to which the third is translated where it can be; and the interval, if it is one of steps, tokens
        or time.

    Raises:
        ValueError: if one of them is not as described, or they contradict each other.
    """
    check_count("check_val_every_n_epoch", check_val_every_n_epoch, 1, (None,))
    if validate_every is None:
        if isinstance(val_check_interval, (str, dict, timedelta)):
            interval = read_interval(
                "val_check_interval", val_check_interval, "seconds"
            )
            return val_check_interval, check_val_every_n_epoch, interval
        value = check_interval(val_check_interval, check_val_every_n_epoch)
        return value, check_val_every_n_epoch, None
    if val_check_interval is not None or check_val_every_n_epoch != 1:
        raise ValueError(
            f"validate_every={validate_every!r} takes the place of val_check_interval={val_check_interval!r} and "
            f"check_val_every_n_epoch={check_val_every_n_epoch!r}: leave these out"
        )
    units = ("steps", "epochs", "seconds", "tokens", "batches")
    interval = read_interval("validate_every", validate_every, *units)
    if interval.unit == "batches":
        return interval.count("batches"), None, None
    if interval.unit == "epochs":
        return min(interval.amount, 1.0), max(int(interval.amount), 1), None
    return validate_every, None, interval


def check_interval(value: Any, check_val_every_n_epoch: Any) -> int | float:
    """Check ``val_check_interval``: a number of batches, or a fraction of an epoch.

    Returns:
        The value; 1.0 for None.

    Raises:
        ValueError: if it is neither, or a fraction although validation counts batches over epochs.
    """
    if value is None:
        return 1.0
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0.0 < value <= 1.0:
        if check_val_every_n_epoch is None and value != 1.0:
            raise ValueError(
                f"val_check_interval must be a number of batches (int) with check_val_every_n_epoch=None; got {value!r}"
            )
        return value
    raise ValueError(
        "val_check_interval must be a number of batches (int from 1), a fraction of an epoch (up to 1.0) or a time; "
        f"got {value!r}"
    )


def check_max_time(value: Any) -> None:
    """Require a duration that the Timer takes.

    Raises:
        TypeError: if it is none.
    """
    if value is not None and not isinstance(value, (str, dict, timedelta)):
        raise TypeError(
            f'max_time must be "DD:HH:MM:SS", "10 minutes", a timedelta or a dict of its arguments; got {value!r}'
        )
