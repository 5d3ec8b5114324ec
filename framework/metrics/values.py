"""Values that were logged, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .metric_state import list_states

REDUCTIONS = ("mean", "sum", "min", "max")


REDUCTION_FUNCTIONS = {
    torch.mean: "mean",
    torch.sum: "sum",
    torch.min: "min",
    torch.max: "max",
    min: "min",
    max: "max",
}


# So many values of an epoch are kept as they came before they are folded into their sum: folding each at once would
# cost several kernels a step, folding none would grow without bound.
CHUNK = 256


@dataclass
class LoggedValue:
    """One name that was logged in a stage."""

    name: str
    dataloader_idx: int | None
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduction: str
    value: Any = None  # the last one: a 0-dim tensor, a number or a torchmetrics Metric
    metric: str | None = None  # the Metric's name among the module's submodules
    total: Any = None  # folded values: a float64 sum (float32 where the device has no float64), or the minimum/maximum
    weight: float = 0.0
    pending: list[Any] = field(default_factory=list)
    pending_weights: list[float] = field(default_factory=list)
    reduced: bool = (
        False  # whether the epoch's value has been shown since the last value came
    )
    rank_zero_only: bool = False

    def add(self, value: Any, weight: float) -> None:
        """Take a value into the epoch's."""
        self.pending.append(value)
        self.pending_weights.append(weight)
        if len(self.pending) == CHUNK:
            self.total, self.weight = self.folded()
            self.pending, self.pending_weights = [], []

    def folded(self) -> tuple[Any, float]:
        """The epoch's total and weight so far."""
        if not self.pending:
            return self.total, self.weight
        device = next(
            (value.device for value in self.pending if isinstance(value, Tensor)),
            torch.device("cpu"),
        )
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack(
            [
                torch.as_tensor(v, dtype=dtype, device=device).detach()
                for v in self.pending
            ]
        )
        if self.reduction in ("min", "max"):
            reduce = torch.amin if self.reduction == "min" else torch.amax
            total = (
                reduce(values, 0)
                if self.total is None
                else reduce(torch.cat([values, self.total[None]]), 0)
            )
            return total, self.weight + len(self.pending)
        if self.reduction == "mean":
            values = values * torch.tensor(
                self.pending_weights, dtype=dtype, device=device
            )
        total = values.sum() if self.total is None else self.total + values.sum()
        return total, self.weight + sum(self.pending_weights)

    @property
    def key(self) -> tuple[str, int | None]:
        """Under which it is kept."""
        return self.name, self.dataloader_idx

    def facts(self) -> dict[str, Any]:
        """What another process needs to make the same entry."""
        names = ("prog_bar", "logger", "on_step", "on_epoch", "reduction", "metric")
        return {name: getattr(self, name) for name in names}

    def list_states(self) -> dict[Any, Any]:
        """What another process needs to know of the Metric, if it is one."""
        return (
            {} if self.metric is None or self.value is None else list_states(self.value)
        )

    def names(self) -> tuple[str, str]:
        """Its name as a step's value and as the epoch's."""
        suffix = (
            ""
            if self.dataloader_idx is None
            else f"/dataloader_idx_{self.dataloader_idx}"
        )
        if self.on_step and self.on_epoch:
            return f"{self.name}_step{suffix}", f"{self.name}_epoch{suffix}"
        return self.name + suffix, self.name + suffix


@dataclass
class Results:
    """Values by name, in the three places in which the Trainer shows them."""

    callback: dict[str, Any] = field(default_factory=dict)
    logged: dict[str, Any] = field(default_factory=dict)
    progress_bar: dict[str, Any] = field(default_factory=dict)

    def add(self, logged_value: LoggedValue, name: str, value: Any) -> None:
        """Show ``value`` where it was logged to."""
        self.callback[name] = value
        if logged_value.logger:
            self.logged[name] = value
        if logged_value.prog_bar:
            self.progress_bar[name] = value

    def update(self, other: Results) -> None:
        """Take over another's values."""
        self.callback.update(other.callback)
        self.logged.update(other.logged)
        self.progress_bar.update(other.progress_bar)


def merge_logged(states: list[dict[str, Any]], keep: bool) -> dict[str, Any]:
    """One of the states that :meth:`Metrics.state_dict` gave in several processes: their epoch values joined.

    Args:
        states: by rank; each may lack what it had not logged yet.
        keep: False leaves the values out, as another process has them, and keeps the names.
    """
    merged: dict[Any, LoggedValue] = {}
    for state in states:
        for entry in (LoggedValue(**values) for values in state["train"]):
            if entry.key in merged and entry.rank_zero_only:
                continue
            total, weight = entry.folded()
            first = merged.setdefault(
                entry.key,
                replace(entry, total=None, weight=0.0, pending=[], pending_weights=[]),
            )
            if not keep or total is None:
                continue
            if first.total is None:
                first.total = total
            elif entry.reduction in ("min", "max"):
                first.total = (
                    torch.minimum if entry.reduction == "min" else torch.maximum
                )(first.total, total)
            else:
                first.total = first.total + total
            first.weight += weight
    return {
        "train": [vars(entry) for entry in merged.values()],
        "results": states[0]["results"],
    }


def join_values(entry: LoggedValue, value: Any, fraction: float, first: bool) -> Any:
    """The step's value so far, of a batch that is run in parts."""
    before = entry.value
    if entry.reduction in ("min", "max"):
        choose = min if entry.reduction == "min" else max
        return value if first else choose(before, value)
    part = value * fraction if entry.reduction == "mean" else value
    return part if first else before + part


def is_number(value: Any) -> bool:
    """Whether it is one number, as a tensor or not."""
    return (
        value.numel() == 1
        if isinstance(value, Tensor)
        else isinstance(value, (int, float))
    )


def described(value: Any) -> str:
    """A value for a message: of a tensor, its shape."""
    return (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else repr(value)
    )


def as_number(name: str, value: Any) -> float:
    """A logged value as a number.

    Raises:
        TypeError: if it is none.
    """
    try:
        return float(value)  # bool, NumPy scalars, and anything else that is a number
    except (TypeError, ValueError):
        several = "; log_dict takes several" if hasattr(value, "items") else ""
        raise TypeError(
            f"log({name!r}): value must be a number, a tensor or a Metric; got {value!r}{several}"
        ) from None


def as_floats(values: dict[str, Any]) -> dict[str, float]:
    """Read values into Python numbers: one host–device sync for all of them."""
    tensors = {
        name: value for name, value in values.items() if isinstance(value, Tensor)
    }
    read: dict[str, float] = {}
    if tensors and any(value.device.type != "cpu" for value in tensors.values()):
        device = next(
            value.device for value in tensors.values() if value.device.type != "cpu"
        )
        stacked = torch.stack(
            [
                value.detach().to(device, torch.float32).reshape(())
                for value in tensors.values()
            ]
        )
        read = dict(zip(tensors, stacked.tolist(), strict=True))
    return {
        name: read[name] if name in read else float(value)
        for name, value in values.items()
    }


def as_tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    """Values as 0-dim tensors of their own."""
    return {
        name: value.clone() if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in values.items()
    }
