"""A logged value: how it is kept, reduced over an epoch, joined over ranks, and shown."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .metric_state import State, list_states

REDUCTIONS = ("mean", "sum", "min", "max")
# What else may be passed as ``reduce_fx`` in place of these names.
REDUCTION_FUNCTIONS: dict[Any, str] = {
    "avg": "mean",
    torch.mean: "mean",
    torch.sum: "sum",
    torch.min: "min",
    torch.max: "max",
    min: "min",
    max: "max",
    sum: "sum",
}
# That of any other function, which gets all values of the epoch.
CUSTOM = "custom"
# How a row of values becomes one, and how two totals do; where nothing else is said, they are added.
_REDUCE = {"min": torch.amin, "max": torch.amax}
_JOIN = {"min": torch.minimum, "max": torch.maximum, CUSTOM: lambda *v: torch.cat(v)}
# So many values of an epoch are kept as they came, and then folded into their total: to fold each at once would cost
# several kernels a step, and to fold none would let memory grow.
CHUNK = 256


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type in which values are added up: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class LoggedValue:
    """One name that was logged in a stage. A checkpoint holds these fields, by their names.

    Attributes:
        name: as it was logged.
        dataloader_idx: index of the evaluation loader that it belongs to, if there are several.
        prog_bar: show it in the progress bar.
        logger: send it to the loggers.
        on_step: keep the values of steps.
        on_epoch: keep the reduction over the epoch.
        reduction: that reduction: ``"mean"``, ``"sum"``, ``"min"``, ``"max"``, or ``"custom"`` by ``function``.
        value: the last one: a 0-dim tensor, a number or a torchmetrics ``Metric``.
        metric: if the value is a ``Metric``, its name among the module's submodules.
        total: the folded values: their weighted sum, or the minimum or maximum; all of them if the reduction is custom.
        weight: the sum of their weights.
        pending: values that are not folded yet.
        pending_weights: the weights of these.
        reduced: whether the epoch's value, with all that has come, has been shown.
        rank_zero_only: whether only the main process's values count.
        function: what a custom reduction calls with all values of the epoch. A checkpoint does not hold it.
    """

    name: str
    dataloader_idx: int | None
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduction: str
    value: Any = None
    metric: str | None = None
    total: Any = None
    weight: float = 0.0
    pending: list[Any] = field(default_factory=list)
    pending_weights: list[float] = field(default_factory=list)
    reduced: bool = False
    rank_zero_only: bool = False
    function: Any = None

    def show(self, value: Any) -> None:
        """Take a new last value, which the epoch's does not show yet."""
        self.value = value
        self.reduced = False

    def reduce_by(self, function: Any) -> None:
        """Reduce by this function, which a resumed run finds out when the name is logged again."""
        self.function = function

    def mark_reduced(self) -> None:
        """Take note that the epoch's value, with all that has come, has been shown."""
        self.reduced = True

    def add(
        self,
        value: Any,
        weight: float,
    ) -> None:
        """Add a value to those of the epoch."""
        self.pending.append(value)
        self.pending_weights.append(weight)
        if len(self.pending) == CHUNK:
            self.total, self.weight = self.folded()
            self.pending = []
            self.pending_weights = []

    def folded(self) -> tuple[Any, float]:
        """The epoch's total and weight so far."""
        if not self.pending:
            return self.total, self.weight
        tensors = [value for value in self.pending if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        dtype = sum_dtype(device)
        values = torch.stack(
            [
                torch.as_tensor(value, dtype=dtype, device=device).detach()
                for value in self.pending
            ]
        )
        if self.reduction == "mean":
            weights = torch.tensor(self.pending_weights, dtype=dtype)
            # The host need not wait for the device.
            values *= weights.to(device, non_blocking=True)
        total = self.join(self.reduce(values))
        return total, self.weight + sum(self.pending_weights)

    def reduce(self, values: Tensor) -> Tensor:
        """The total of several values or totals, of the shape ``(count,)``."""
        if self.reduction == CUSTOM:
            return values
        return _REDUCE.get(self.reduction, torch.sum)(values, 0)

    def join(self, total: Tensor) -> Tensor:
        """The folded values' total together with another one."""
        if self.total is None:
            return total
        return _JOIN.get(self.reduction, torch.add)(self.total, total)

    def epoch_value(
        self,
        total: Any,
        weight: float,
    ) -> Any:
        """The epoch's value, given its total and weight over all ranks: a mean is the total divided by the weight."""
        if self.reduction == CUSTOM:
            return as_number(self.name, self.function(total))
        return total / weight if self.reduction == "mean" and weight else total

    def find_metric_in(self, module: torch.nn.Module | None) -> None:
        """If a ``Metric`` was logged, take the one of its name in ``module`` as the value."""
        if self.metric is not None:
            assert module is not None, "a run has a module"
            self.value = module.get_submodule(self.metric)

    @property
    def key(self) -> tuple[str, int | None]:
        """Name and loader, under which the value is kept."""
        return self.name, self.dataloader_idx

    def facts(self) -> State:
        """The fields that another rank needs to make the same entry."""
        names = ("prog_bar", "logger", "on_step", "on_epoch", "reduction", "metric")
        return {name: getattr(self, name) for name in names}

    def list_states(self) -> dict[Any, Any]:
        """As :func:`.list_states`, if a ``Metric`` was logged: other ranks need it to gather its lists."""
        if self.metric is None or self.value is None:
            return {}
        return list_states(self.value)

    def names(self) -> tuple[str, str]:
        """The names under which a step's value is shown, and the epoch's."""
        suffix = ""
        if self.dataloader_idx is not None:
            suffix = f"/dataloader_idx_{self.dataloader_idx}"
        if self.on_step and self.on_epoch:
            return f"{self.name}_step{suffix}", f"{self.name}_epoch{suffix}"
        return self.name + suffix, self.name + suffix


@dataclass
class Results:
    """Values by name, for the three places in which the Trainer shows them: callbacks, loggers and progress bars."""

    callback: State = field(default_factory=dict)
    logged: State = field(default_factory=dict)
    progress_bar: State = field(default_factory=dict)

    def add(
        self,
        logged_value: LoggedValue,
        name: str,
        value: Any,
    ) -> None:
        """Show ``value`` where it was logged to."""
        self.callback[name] = value
        if logged_value.logger:
            self.logged[name] = value
        if logged_value.prog_bar:
            self.progress_bar[name] = value

    def update(self, other: Results) -> None:
        """Take over another's values."""
        for place, values in vars(other).items():
            getattr(self, place).update(values)


def merge_logged(states: list[State], keep: bool) -> State:
    """Join the states that :meth:`.Metrics.state_dict` gave on several ranks into one, with their epoch values.

    Args:
        states: by rank; each may lack names that it had not logged yet.
        keep: False leaves the values out and keeps the names, for a rank beside the one that gets the values.
    """
    merged = {}
    for state in states:
        for fields in state["train"]:
            entry = LoggedValue(**fields)
            joined = merged.get(entry.key)
            if joined is None:
                joined = replace(
                    entry,
                    total=None,
                    weight=0.0,
                    pending=[],
                    pending_weights=[],
                    function=None,
                )
                merged[entry.key] = joined
            elif entry.rank_zero_only:
                continue
            total, weight = entry.folded()
            if keep and total is not None:
                joined.total = joined.join(total)
                joined.weight += weight
    return {
        "train": [vars(entry) for entry in merged.values()],
        "results": states[0]["results"],
    }


def join_part(
    entry: LoggedValue,
    value: Any,
    fraction: float,
    is_first: bool,
) -> Any:
    """The value of a step until now, where a batch is run in parts.

    Args:
        entry: holds the value of the parts before.
        value: that of this part.
        fraction: of the batch's samples, how many are in this part.
        is_first: whether no part came before.
    """
    if entry.reduction == "mean":
        value = value * fraction
    if is_first or entry.reduction == CUSTOM:
        return value
    if entry.reduction == "min":
        return min(entry.value, value)
    if entry.reduction == "max":
        return max(entry.value, value)
    return entry.value + value


def is_number(value: Any) -> bool:
    """Whether it is one number, as a tensor or not."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float))


def describe(value: Any) -> str:
    """A value for a message: of a tensor, its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def as_number(name: str, value: Any) -> float:
    """A logged value as a number.

    Raises:
        TypeError: if it is none.
    """
    try:
        # Also for a bool, a NumPy scalar, and whatever else can be made a float.
        return float(value)
    except (TypeError, ValueError):
        several = "; log_dict takes several" if hasattr(value, "items") else ""
        raise TypeError(
            f"log({name!r}): value must be a number, a tensor or a Metric; got {value!r}{several}"
        ) from None


def as_floats(values: State) -> dict[str, float]:
    """Values as Python numbers: one host–device sync for all of them."""
    elsewhere = {
        name: value.detach()
        for name, value in values.items()
        if isinstance(value, Tensor) and value.device.type != "cpu"
    }
    read = {}
    if elsewhere:
        device = next(iter(elsewhere.values())).device
        numbers = [
            value.to(device, torch.float32).reshape(()) for value in elsewhere.values()
        ]
        # host–device sync
        read = dict(zip(elsewhere, torch.stack(numbers).tolist(), strict=True))
    return {
        name: read[name] if name in read else float(value)
        for name, value in values.items()
    }


def as_tensors(values: State) -> dict[str, Tensor]:
    """Values as 0-dim tensors of their own."""
    return {
        name: value.clone() if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in values.items()
    }
