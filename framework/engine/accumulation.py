"""Gradient accumulation: the micro-batches whose gradients make one optimizer step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..data.iteration import INFINITE

if TYPE_CHECKING:
    from ...strategies.base import Strategy
    from .engine import Engine

# A power of two, about the size of a weight.
_USUAL_WEIGHT = 1024.0


class StepCounter(Protocol):
    """What counts optimizer steps."""

    global_step: int


class GradientAccumulation:
    """The window of micro-batches that is open, and what each of them counts in the mean that its gradients are.

    That mean is over all micro-batches and ranks: of those that came, if they were fewer than planned; weighted, if
    they came with weights; and without dummy batches. The loops of the Trainer and the Engine's :meth:`accumulate`
    count by this object alone.

    Args:
        strategy: reduces weights over the ranks.
        num_batches: micro-batches of a window.
        counter: counts the windows in which an optimizer has stepped.

    Attributes:
        num_batches: micro-batches of a window; set anew, it counts from the next window on.
        counter: as given.
        loader: where the batches come from; it has ``batch_weight``, what its running batch counts beside those of the
            other ranks. None counts all alike.
        start: index of the window's first micro-batch in the epoch.
        end: index of the micro-batch after its last one.
        length: micro-batches planned.
        is_last: whether the running micro-batch is the last of its window, after which optimizers step.
        count: losses that were added.
        begun: micro-batches that have begun, where those without a loss count, too; else 0.
        weight: the sum of the weights, numbers or tensors, if there are any.
        has_stepped: whether an optimizer has stepped in the window.
        completed: optimizers, by id, whose gradients are the window's mean already.
    """

    def __init__(
        self, strategy: Strategy, num_batches: int, counter: StepCounter
    ) -> None:
        self.strategy = strategy
        self.num_batches = num_batches
        self.counter = counter
        self.loader: Any = None
        self.start = 0
        self.end = 0
        self.length = 1
        self.is_last = True
        self.count = 0
        self.begun = 0
        self.weight: Any = None
        self.has_stepped = False
        self.completed: set[int] = set()
        self._window_loader: Any = None
        # In which the weights are measured: with several ranks, the same on all of them.
        self._unit: Any = 1
        # Whether there are weights, once several ranks have agreed about it.
        self._weighted: bool | None = None

    def over(self, num_batches: int) -> None:
        """Let windows have so many micro-batches, from the next one on."""
        self.num_batches = num_batches

    # The window.

    def read_from(self, loader: Any) -> None:
        """Take the batches from ``loader``."""
        self.loader = loader

    def begin(self, batch_idx: int, left: int | float = INFINITE) -> None:
        """Begin a micro-batch: the next one of the open window, or, if that is complete, the first of another.

        Args:
            batch_idx: its index in the epoch.
            left: batches of the epoch that are left, this one included, as far as is known: a window ends with it.
        """
        if self.is_last:
            self.open(batch_idx, int(min(self.num_batches, left)))
            self._window_loader = self.loader
        self.is_last = batch_idx + 1 >= self.end or left <= 1

    def begin_next(self) -> None:
        """Begin a micro-batch that follows upon the one before, where nobody else counts them."""
        loader = self.loader
        left: int | float = INFINITE
        batch_idx = self.start + self.begun
        if self.is_last:
            batch_idx = 0
            if loader is not None:
                batch_idx = loader.batches - 1
                left = loader.length - batch_idx
        if loader is not None and loader.end_of_dataloader:
            left = 1
        self.begin(batch_idx, left)
        self.begun += 1

    def open(self, start: int, length: int) -> None:
        """Open a window at micro-batch ``start`` of the epoch."""
        self.start = start
        self.end = start + length
        self.length = length
        self.close()

    def close(self) -> None:
        """Forget what the window has gathered: its optimizers have stepped."""
        self.count = 0
        self.begun = 0
        self.weight = None
        self.has_stepped = False
        self.completed.clear()

    def restart(self) -> None:
        """Begin a window of a single micro-batch, of which nothing is kept."""
        self.has_stepped = False

    def abandon(self) -> None:
        """Let the next micro-batch open a window, whatever has become of this one."""
        self.close()
        self.length = 1
        self.end = 0
        self.is_last = True

    def batches_of(self, loader: Any) -> int:
        """How many of a loader's batches wait in a window that has not ended."""
        if self.is_last or self._window_loader is not loader:
            return 0
        return min(self.begun, loader.batches)

    def goes_on(self, batch_idx: int) -> bool:
        """Whether micro-batch ``batch_idx``, the next one, does not complete its window, if others follow it."""
        if self.is_last:
            return self.num_batches > 1
        return batch_idx + 1 < self.end

    def goes_on_next(self) -> bool:
        """As :meth:`goes_on`, where nobody else counts the micro-batches."""
        return self.goes_on(self.start + self.begun)

    def count_in(self, counter: StepCounter) -> None:
        """Count windows in ``counter`` from now on, and forget whether there were weights."""
        self.counter = counter
        self._weighted = None
        self._unit = 1
        self.abandon()

    def count_step(self) -> None:
        """Count the window: an optimizer has stepped in it."""
        self.counter.global_step += 1
        self.has_stepped = True

    @property
    def is_complete(self) -> bool:
        """Whether the gradients of all planned micro-batches have come, and need no further factor."""
        return self.count == self.length and self.weight is None

    @property
    def batch_weight(self) -> float:
        """What the running batch counts beside those of the other ranks."""
        return 1.0 if self.loader is None else self.loader.batch_weight

    # What the window has gathered.

    def state(self) -> tuple[Any, ...]:
        """What has been gathered, for :meth:`load_state`."""
        return self.count, self.weight, self._unit, self._weighted

    def load_state(self, state: tuple[Any, ...]) -> None:
        """Take back :meth:`state`."""
        self.count, self.weight, self._unit, self._weighted = state

    def add_part(
        self, loss: Tensor, weight: Any, fraction: float, is_first: bool
    ) -> Tensor:
        """Count a part of a micro-batch, without a collective; arguments and result as of :meth:`add`.

        Args:
            loss: the mean over the part.
            weight: what it counts.
            fraction: the part's fraction of the micro-batch's samples.
            is_first: whether it is the micro-batch's first.
        """
        if self._weighted is None and self.strategy.world_size > 1:
            self._weighted = weight is not None
            self._unit = _USUAL_WEIGHT
        if weight is None:
            loss = loss * fraction
        part = self.add(loss, weight)
        if not is_first:
            self.count -= 1
        return part

    def add(self, loss: Tensor, weight: Any = None) -> Tensor:
        """Count a micro-batch.

        Args:
            loss: the mean over the micro-batch.
            weight: what it counts beside the window's others (such as its number of tokens): for all or for none.

        Returns:
            What of the loss to compute gradients of.

        Raises:
            RuntimeError: for weights that come for some micro-batches, or on some ranks, only.
        """
        has_ranks = self.strategy.world_size > 1
        if has_ranks and (weight is not None) is not self._weighted:
            self._agree_on_weights(weight)
        if self.count and (weight is None) != (self.weight is None):
            raise RuntimeError(
                f"some batches of a window have a weight and others have none (batch {self.start + self.count}): give "
                "one for all of them or for none"
            )
        self.count += 1
        part = loss / self.length if self.length > 1 else loss
        if weight is not None:
            return part * self._add_weight(weight, has_ranks)
        if has_ranks and self.batch_weight != 1.0:
            part = part * self.batch_weight
        return part

    def _add_weight(self, weight: Any, has_ranks: bool) -> Any:
        """Add a weight; returns it in units, so that its product with a loss is a number that half precision holds."""
        if has_ranks:
            weight = weight * bool(self.batch_weight)
        if self.weight is None:
            self.weight = 0
            if not has_ranks:
                self._unit = _nonzero(weight)
        self.weight = self.weight + weight
        return weight / self._unit

    def _agree_on_weights(self, weight: Any) -> None:
        """At the first batch: whether there are weights, and the unit to measure them in. A collective."""
        batch_idx = self.start + self.count
        if self._weighted is not None:
            raise RuntimeError(
                f"a weight was given for some batches and not for others (rank {self.strategy.global_rank}, batch "
                f"{batch_idx}): with several processes, give one for all of them or for none"
            )
        unit = None
        if weight is not None:
            # A power of two: to multiply by it changes no digit, whichever weight came first.
            unit = 2.0 ** round(math.log2(abs(float(weight)) or 1.0))
        units = self.strategy.gather_objects(unit)  # collective
        if None in units and any(units):
            ranks = [str(rank) for rank, unit in enumerate(units) if unit is None]
            raise RuntimeError(
                f"a weight was given on some ranks and none on rank {', '.join(ranks)} (batch {batch_idx}): give one "
                "on all of them or on none"
            )
        self._weighted = weight is not None
        self._unit = units[0] or 1

    def factor(self) -> Any:
        """What to multiply the gathered gradients with before the step, or None.

        With weights and several ranks, a collective of one number.
        """
        if self.weight is None:
            held = self.begun or self.count
            return self.length / held if 0 < held < self.length else None
        weight = self.weight
        if self.strategy.world_size > 1:
            weight = torch.as_tensor(weight, dtype=torch.float64)
            weight = self.strategy.reduce(weight, "mean")  # collective
        # Where all weights are zero, so are the gradients.
        return self.length * self._unit / _nonzero(weight)


def _nonzero(weight: Any) -> Any:
    """``weight``, or 1 in the place of zero."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 1, weight)
    return weight or 1


class MicroBatch:
    """The context of ``Engine.accumulate``: as a class, it costs a fifth of what a generator does."""

    def __init__(self, engine: Engine, models: tuple[nn.Module, ...] = ()) -> None:
        self.engine = engine
        self.models = models
        self.is_entered = False
        self._local: Any = None

    def __enter__(self) -> None:
        engine = self.engine
        self.is_entered = True
        engine.begin_micro_batch()
        if not engine.accumulation.is_last:
            self._local = engine.no_sync(*self.models)
            self._local.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.is_entered = False
        if self._local is not None:
            local, self._local = self._local, None
            local.__exit__(*error)
