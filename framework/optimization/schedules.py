"""Schedules of the learning rate over a run's optimizer steps: linear, cosine and WSD, each with a warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class StepSchedule(LambdaLR):
    """A ``LambdaLR`` that a Trainer steps with the optimizer, though ``configure_optimizers`` says nothing of it.

    Attributes:
        interval: ``"step"``, by which the Trainer steps it.
    """

    interval = "step"


def linear_schedule(
    optimizer: Optimizer,
    num_steps: int | float,
    *,
    warmup: int | float = 0,
    final: float = 0.0,
) -> StepSchedule:
    """Let the learning rate fall on a line, after a warm-up.

    Args:
        optimizer: whose learning rates are the highest ones.
        num_steps: optimizer steps of the run, such as ``self.trainer.estimated_stepping_batches``.
        warmup: steps in which the rate rises from 0 on a line: a number (int), or a fraction of all (float).
        final: at the end, and after it, the rate is this fraction of the highest.

    Returns:
        A scheduler that steps by steps: ``return [optimizer], [linear_schedule(optimizer, 1000)]``.

    Raises:
        ValueError: if the numbers do not fit together, or ``num_steps`` is infinite.
    """
    total, rise = _check(num_steps, warmup, final)
    fall = partial(_line, final=final)
    return _schedule(optimizer, rise, total, fall)


def cosine_schedule(
    optimizer: Optimizer,
    num_steps: int | float,
    *,
    warmup: int | float = 0,
    final: float = 0.0,
) -> StepSchedule:
    """Let the learning rate fall on half a cosine, after a warm-up.

    The formula is that of SGDR, without restarts: https://arxiv.org/abs/1608.03983.

    Args:
        optimizer: whose learning rates are the highest ones.
        num_steps: optimizer steps of the run.
        warmup: steps in which the rate rises from 0 on a line: a number (int), or a fraction of all (float).
        final: at the end, and after it, the rate is this fraction of the highest.

    Returns:
        A scheduler that steps by steps.

    Raises:
        ValueError: if the numbers do not fit together, or ``num_steps`` is infinite.
    """
    total, rise = _check(num_steps, warmup, final)
    fall = partial(_cosine, final=final)
    return _schedule(optimizer, rise, total, fall)


def wsd_schedule(
    optimizer: Optimizer,
    num_steps: int | float,
    *,
    warmup: int | float = 0,
    decay: int | float = 0.2,
    final: float = 0.0,
    shape: Literal["linear", "cosine", "1-sqrt"] = "linear",
) -> StepSchedule:
    """Let the learning rate rise, stay, and fall at the end (warm-up, stable, decay).

    The stable part may be cut or made longer in another run, as the rate does not depend on ``num_steps`` there. See
    https://arxiv.org/abs/2404.06395, and https://arxiv.org/abs/2405.18392 for the shape ``"1-sqrt"``.

    Args:
        optimizer: whose learning rates are the highest ones.
        num_steps: optimizer steps of the run.
        warmup: steps in which the rate rises from 0 on a line: a number (int), or a fraction of all (float).
        decay: steps at the end in which it falls, likewise.
        final: at the end, and after it, the rate is this fraction of the highest.
        shape: how it falls.

    Returns:
        A scheduler that steps by steps.

    Raises:
        ValueError: if the numbers do not fit together, ``num_steps`` is infinite, or the shape is another one.
    """
    shapes = {"linear": _line, "cosine": _cosine, "1-sqrt": _root}
    if shape not in shapes:
        raise ValueError(f"shape must be one of {', '.join(shapes)}; got {shape!r}")
    total, rise = _check(num_steps, warmup, final)
    last = _steps("decay", decay, total)
    if rise + last > total:
        raise ValueError(
            f"warmup={warmup!r} and decay={decay!r} are {rise} and {last} steps, more than num_steps={total}"
        )
    fall = partial(_late, first=total - last, shape=shapes[shape], final=final)
    return _schedule(optimizer, rise, total, fall)


def _check(
    num_steps: int | float, warmup: int | float, final: float
) -> tuple[int, int]:
    """Check what all schedules have; returns the steps in all, and those of the warm-up."""
    if not 1 <= num_steps < math.inf or num_steps != int(num_steps):
        raise ValueError(
            f"num_steps must be a number of optimizer steps from 1; got {num_steps!r}. A Trainer without max_steps, "
            "whose loader has no length, cannot tell how many there will be"
        )
    if not 0.0 <= final <= 1.0:
        raise ValueError(
            f"final must be a fraction of the highest rate (0.0 to 1.0); got {final!r}"
        )
    total = int(num_steps)
    return total, _steps("warmup", warmup, total)


def _steps(name: str, value: int | float, total: int) -> int:
    """A number of steps that was given as such, or as a fraction of ``total``."""
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return round(value * total)
    if not isinstance(value, int) or not 0 <= value <= total:
        raise ValueError(
            f"{name} must be a number of steps (int from 0 to num_steps={total}) or a fraction of them (float from 0.0 "
            f"to 1.0); got {value!r}"
        )
    return value


def _schedule(
    optimizer: Optimizer, rise: int, total: int, fall: Callable[..., float]
) -> StepSchedule:
    # A partial has no state: a checkpoint keeps plain numbers, and a run that resumes takes its own schedule.
    return StepSchedule(optimizer, partial(_factor, rise=rise, total=total, fall=fall))


def _factor(step: int, rise: int, total: int, fall: Callable[..., float]) -> float:
    """By what the highest learning rate is multiplied in a step, counted from 0."""
    if step < rise:
        return step / rise
    return fall(min(step, total), start=rise, end=total)


# How it falls from one step to another.


def _late(
    step: int,
    start: int,
    end: int,
    first: int,
    shape: Callable[..., float],
    final: float,
) -> float:
    """Not before the step ``first``, and then in a shape."""
    return 1.0 if step < first else shape(step, start=first, end=end, final=final)


def _progress(step: int, start: int, end: int) -> float:
    return (step - start) / max(1, end - start)


def _line(step: int, start: int, end: int, final: float) -> float:
    return final + (1 - final) * (1 - _progress(step, start, end))


def _cosine(step: int, start: int, end: int, final: float) -> float:
    angle = math.pi * _progress(step, start, end)
    return final + (1 - final) * 0.5 * (1 + math.cos(angle))


def _root(step: int, start: int, end: int, final: float) -> float:
    return final + (1 - final) * (1 - math.sqrt(_progress(step, start, end)))
