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
    return _schedule(optimizer, num_steps, warmup, None, final, "linear")


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
    return _schedule(optimizer, num_steps, warmup, None, final, "cosine")


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
    return _schedule(optimizer, num_steps, warmup, decay, final, shape)


# By what the highest rate is multiplied, as a function of how far it has fallen, from 0.0 to 1.0.
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


def _schedule(
    optimizer: Optimizer,
    num_steps: int | float,
    warmup: int | float,
    decay: int | float | None,
    final: float,
    shape: str,
) -> StepSchedule:
    """Make a schedule; without ``decay``, it falls from the end of the warm-up on."""
    if shape not in _SHAPES:
        raise ValueError(f"shape must be one of {', '.join(_SHAPES)}; got {shape!r}")
    is_number = isinstance(num_steps, (int, float))
    if not is_number or not 1 <= num_steps < math.inf or num_steps % 1:
        raise ValueError(
            f"num_steps must be a number of optimizer steps from 1; got {num_steps!r}. A Trainer without max_steps, "
            "whose loader has no length, cannot tell how many there will be"
        )
    if not 0.0 <= final <= 1.0:
        raise ValueError(
            f"final must be a fraction of the highest rate (0.0 to 1.0); got {final!r}"
        )
    total = int(num_steps)
    rise = _steps("warmup", warmup, total)
    start = rise if decay is None else total - _steps("decay", decay, total)
    if start < rise:
        raise ValueError(
            f"warmup={warmup!r} and decay={decay!r} are {rise} and {total - start} steps, more than num_steps={total}"
        )
    # A partial has no state: a checkpoint keeps plain numbers, and a run that resumes takes its own schedule.
    factor = partial(
        _factor, rise=rise, start=start, total=total, final=final, shape=shape
    )
    return StepSchedule(optimizer, factor)


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


def _factor(
    step: int, rise: int, start: int, total: int, final: float, shape: str
) -> float:
    """By what the highest learning rate is multiplied in a step, counted from 0."""
    if step < rise:
        return step / rise
    progress = (min(step, total) - start) / max(1, total - start)
    return final + (1 - final) * _SHAPES[shape](max(0.0, progress))
