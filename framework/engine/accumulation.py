"""A window: the micro-batches whose gradients make one optimizer step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ...strategies.base import Strategy
    from .engine import Engine


class Window:
    """The open window: its micro-batches, and what each of them counts in the mean that its gradients are.

    That mean is over all micro-batches and processes: of those that came, if they were fewer than planned; weighted, if
    they came with weights; and without the batches that only keep a process in step with its peers.

    Attributes:
        loader: where the batches come from; it has ``share``, what its running batch counts beside those of the other
            processes. None counts all alike.
        start: index of its first micro-batch in the epoch.
        end: index of the micro-batch after its last one.
        length: micro-batches planned.
        count: losses that were added.
        weight: the sum of their weights, numbers or tensors, if there are any.
        begun: micro-batches that have begun, where somebody counts them; else there is one for each loss.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.loader: Any = None
        self.start = self.end = 0
        self.length = 1
        self.count = self.begun = 0
        self.weight: Any = None
        self._unit: Any = 1  # the first of them, in which the others are measured; with several processes, one for all
        self._weighted: bool | None = (
            None  # whether there are weights, once several processes agree about it
        )

    def read_from(self, loader: Any) -> None:
        """Take the batches from ``loader``."""
        self.loader = loader

    def open(self, start: int, length: int) -> None:
        """Begin at micro-batch ``start`` of the epoch."""
        self.start, self.end, self.length = start, start + length, length
        self.close()

    def close(self) -> None:
        """Nothing is gathered."""
        self.count = self.begun = 0
        self.weight = None

    @property
    def is_complete(self) -> bool:
        """Whether the gradients of all planned micro-batches have come, and need no further factor."""
        return self.count == self.length and self.weight is None

    @property
    def share(self) -> float:
        """What the running batch counts beside those of the other processes."""
        return 1.0 if self.loader is None else self.loader.share

    def state(self) -> tuple[Any, ...]:
        """What has been gathered."""
        return self.count, self.weight, self._unit, self._weighted

    def load_state(self, state: tuple[Any, ...]) -> None:
        """Take back :meth:`state`."""
        self.count, self.weight, self._unit, self._weighted = state

    def add_part(
        self,
        loss: Tensor,
        weight: Any,
        fraction: float,
        first: bool,
    ) -> Tensor:
        """As :meth:`add`, for a part of a micro-batch: ``fraction`` of its samples. No collective."""
        if self._weighted is None and self.strategy.world_size > 1:
            self._weighted, self._unit = (
                weight is not None,
                1024.0,
            )  # a power of two, about the size of a weight
        part = self.add(loss if weight is not None else loss * fraction, weight)
        self.count -= not first
        return part

    def add(self, loss: Tensor, weight: Any = None) -> Tensor:
        """Count a micro-batch; returns what of its loss to compute gradients of.

        Args:
            loss: the mean over the micro-batch.
            weight: what it counts beside the window's others (such as its number of tokens): for all or for none.

        Raises:
            RuntimeError: for weights that come for some micro-batches, or on some ranks, only.
        """
        several = self.strategy.world_size > 1
        if several and (weight is not None) is not self._weighted:
            self._agree_on_weights(weight)
        if self.count and (weight is None) != (self.weight is None):
            raise RuntimeError(
                f"some batches of a window have a weight and others have none (batch {self.start + self.count}): give "
                "one for all of them or for none"
            )
        self.count += 1
        part = loss / self.length if self.length > 1 else loss
        if weight is not None:
            if several:
                weight = weight * bool(self.share)
            if self.weight is None:
                self.weight = 0
                self._unit = self._unit if several else _nonzero(weight)
            self.weight = self.weight + weight
            part = part * (
                weight / self._unit
            )  # of the size of a loss, which half precision can hold
        elif several and self.share != 1.0:
            part = part * self.share
        return part

    def _agree_on_weights(self, weight: Any) -> None:
        """At the first batch: whether there are weights, and the unit to measure them in. A collective."""
        batch_idx = self.start + self.count
        if self._weighted is None:
            # A power of two: to multiply by it changes no digit, whichever weight came first.
            unit = (
                None
                if weight is None
                else 2.0 ** round(math.log2(abs(float(weight)) or 1.0))
            )
            units = self.strategy.gather_objects(unit)
            if None in units and any(units):
                without = [rank for rank, unit in enumerate(units) if unit is None]
                raise RuntimeError(
                    f"a weight was given on some ranks and none on rank {', '.join(map(str, without))} (batch "
                    f"{batch_idx}): give one on all of them or on none"
                )
            self._weighted, self._unit = weight is not None, units[0] or 1
            return
        raise RuntimeError(
            f"a weight was given for some batches and not for others (rank {self.strategy.global_rank}, batch "
            f"{batch_idx}): with several processes, give one for all of them or for none"
        )

    def factor(self) -> Any:
        """What to multiply the gathered gradients with before the step, or None.

        With weights and several processes, a collective of one number.
        """
        if self.weight is None:
            held = self.begun or self.count
            return self.length / held if 0 < held < self.length else None
        several = self.strategy.world_size > 1
        weight = self.weight
        if several:
            weight = self.strategy.reduce(
                torch.as_tensor(weight, dtype=torch.float64),
                "mean",
            )
        return (
            self.length * self._unit / _nonzero(weight)
        )  # where all weights are zero, so are the gradients


def _nonzero(weight: Any) -> Any:
    """``weight``, or 1 in the place of zero."""
    return (
        torch.where(weight == 0, 1, weight)
        if isinstance(weight, Tensor)
        else weight or 1
    )


class Accumulation:
    """The context of ``Engine.accumulate``: as a class, it costs a fifth of what a generator does."""

    def __init__(self, engine: Engine, models: tuple[nn.Module, ...] = ()) -> None:
        self.engine, self.models = engine, models
        self.local: Any = None

    def __enter__(self) -> None:
        engine = self.engine
        engine.begin_micro_batch()
        if not engine.sync_gradients:
            self.local = engine.no_sync(*self.models)
            self.local.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.engine.accumulating = False
        if self.local is not None:
            local, self.local = self.local, None
            local.__exit__(*error)
