"""Gradient accumulation: the micro-batches whose gradients make one optimizer step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..data.iteration import INFINITE
from ..data.shard_detection import data_parallel_rank_and_size

if TYPE_CHECKING:
    from ...strategies.base import Strategy
    from .engine import Engine

# The unit of weights where ranks cannot agree on one. To multiply by a power of two rounds nothing.
_USUAL_WEIGHT = 1024.0


class StepCounter(Protocol):
    """What counts optimizer steps."""

    global_step: int


class GradientAccumulation:
    """The accumulation window that is open: where it ends, and by what to multiply each micro-batch's loss.

    An optimizer steps on the mean gradient of its window, over all micro-batches and ranks. Dummy batches do not count
    in it, and with weights it is a weighted mean. Each loss is divided by the planned length at once; if fewer
    micro-batches come, or they have weights, :meth:`factor` corrects the sum before the step. The Trainer's loops hand
    in the index of each micro-batch (:meth:`begin`); for the Engine this object counts them (:meth:`begin_next`).

    Args:
        strategy: reduces weights over the ranks.
        num_batches: micro-batches of a window.
        counter: counts the windows in which an optimizer has stepped.

    Attributes:
        num_batches: micro-batches of a window; set anew, it counts from the next window on.
        counter: as given.
        loader: where the batches come from; its ``batch_weight`` is what the running batch counts beside those of the
            other ranks. With None, all batches count alike.
        start: index of the window's first micro-batch in the epoch.
        end: index of the micro-batch after its last one.
        length: micro-batches planned.
        is_last: whether the running micro-batch is the last of its window, after which optimizers step.
        count: micro-batches whose loss was added.
        begun: micro-batches that :meth:`begin_next` has begun, with a loss or without; 0 where :meth:`begin` is called.
        weight: the sum of the weights so far, a number or a tensor; None without weights.
        total_weight: that sum over all ranks, once :meth:`factor` was called.
        has_stepped: whether an optimizer has stepped in the window.
        completed: optimizers, by id, whose gradients are the window's mean already.
        gradient_norm: of the newest gradients that were clipped, before that; None if it was not computed.
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
        self.total_weight: Any = None
        self.has_stepped = False
        self.completed: set[int] = set()
        self.gradient_norm: Any = None
        self._window_loader: Any = None
        # Weights may be thousands of tokens, and a loss times that overflows half precision. So they are divided by
        # this unit, which is the same on all ranks and about as large as they are; `factor` multiplies it back.
        self._unit: Any = 1
        # Whether there are weights: None until several ranks have agreed about it.
        self._weighted: bool | None = None

    def over(self, num_batches: int) -> None:
        """Let windows have so many micro-batches, from the next one on."""
        self.num_batches = num_batches

    def note_norm(self, norm: Any) -> None:
        """Keep the norm of the window's gradients, as clipping has computed it."""
        self.gradient_norm = norm

    def read_from(self, loader: Any) -> None:
        """Take the batches from ``loader``."""
        self.loader = loader

    def let_go(self) -> None:
        """Hold no loader any more."""
        self.loader = None
        self._window_loader = None

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
        """Begin the next micro-batch, whose index follows from the loader and from those begun before."""
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
        self.total_weight = None
        self.has_stepped = False
        self.completed.clear()

    def restart(self) -> None:
        """Begin another window of one micro-batch, after one in which nothing but the step was noted."""
        self.has_stepped = False

    def abandon(self) -> None:
        """Give the window up: the next micro-batch opens another."""
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
        """Whether the window stays open after ``batch_idx``, the next micro-batch, unless the epoch ends with it."""
        if self.is_last:
            return self.num_batches > 1
        return batch_idx + 1 < self.end

    def goes_on_next(self) -> bool:
        """As :meth:`goes_on`, for the micro-batch that :meth:`begin_next` would begin."""
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

    def state(self) -> tuple[Any, ...]:
        """What has been gathered, for :meth:`load_state`."""
        return self.count, self.weight, self._unit, self._weighted

    def load_state(self, state: tuple[Any, ...]) -> None:
        """Take back :meth:`state`."""
        self.count, self.weight, self._unit, self._weighted = state

    def add_part(
        self, loss: Tensor, weight: Any, fraction: float, is_first: bool
    ) -> Tensor:
        """Count a part of a micro-batch that is computed in several, as :meth:`add` does for a whole one.

        Ranks do not agree on the weights here: one that runs out of memory would not come to that collective.

        Args:
            loss: the mean over the part.
            weight: what the part counts, or None.
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
        """Count a micro-batch. The first one with several ranks is a collective.

        Args:
            loss: the mean over the micro-batch.
            weight: what it counts beside the window's others (such as its number of tokens): for all or for none.

        Returns:
            The loss multiplied by its part in the window's mean: what to compute gradients of.

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
            # A dummy batch counts nothing, whatever its weight.
            weight = weight * bool(self.batch_weight)
        if self.weight is None:
            self.weight = 0
            if not has_ranks:
                self._unit = _nonzero(weight)
        self.weight = self.weight + weight
        return weight / self._unit

    def _agree_on_weights(self, weight: Any) -> None:
        """Agree with the other ranks, at the first batch, whether there are weights, and on their unit. A collective.

        Raises:
            RuntimeError: if only some ranks, or only some batches, have a weight.
        """
        batch_idx = self.start + self.count
        if self._weighted is not None:
            raise RuntimeError(
                f"a weight was given for some batches and not for others (rank {self.strategy.global_rank}, batch "
                f"{batch_idx}): with several processes, give one for all of them or for none"
            )
        unit = None
        if weight is not None:
            # To multiply by a power of two rounds nothing, so losses do not depend on whose weight gives the unit.
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
        """What to multiply the window's gradients with before the step, to make them its mean; None if they are it.

        With weights and several ranks, a collective of one number.
        """
        if self.weight is None:
            held = self.begun or self.count
            return self.length / held if 0 < held < self.length else None
        weight = self.weight
        self.total_weight = weight
        if self.strategy.world_size > 1:
            weight = torch.as_tensor(weight, dtype=torch.float64)
            weight = self.strategy.reduce(weight, "mean")  # collective
            _, num_shards = data_parallel_rank_and_size(self.strategy)
            self.total_weight = weight * num_shards
        # Where all weights are zero, so are the gradients.
        return self.length * self._unit / _nonzero(weight)


def _nonzero(weight: Any) -> Any:
    """``weight``, or 1 in the place of zero."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 1, weight)
    return weight or 1


class MicroBatch:
    """The context of ``Engine.accumulate``: a class, as entering it takes a fifth of the time of a generator."""

    def __init__(self, engine: Engine, models: tuple[nn.Module, ...] = ()) -> None:
        self.engine = engine
        self.models = models
        self.is_entered = False
        # Inside the window, the open context in which gradients stay local.
        self._no_sync: Any = None

    def __enter__(self) -> None:
        engine = self.engine
        self.is_entered = True
        engine.begin_micro_batch()
        if not engine.accumulation.is_last:
            self._no_sync = engine.no_sync(*self.models)
            self._no_sync.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.is_entered = False
        no_sync = self._no_sync
        if no_sync is not None:
            self._no_sync = None
            no_sync.__exit__(*error)
