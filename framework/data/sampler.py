"""The batches of indices of a map-style loader, for any epoch from any batch."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, islice, tee
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from ..messages import log
from ..seed import mix_seeds, seed_batch
from .iteration import (
    INFINITE,
    NO_BATCH,
    has_own_iteration,
    is_map_style,
    isolated_iteration,
    loader_length,
    set_epoch,
)
from .position import WHOLE_EPOCH, Segment
from .workers import protect_workers


class IndexPlan:
    """The batches of indices of a map-style loader, for any epoch from any batch; stands in for its sampler.

    What torch's own sequential and random samplers give is computed from the seed instead. Any other sampler is asked
    for its indices, and moved forward without loading samples.

    Args:
        loader: the loader.
        seed: the run's seed.
        shuffle: False gives the indices of a random sampler in the dataset's order.

    Attributes:
        is_planned: whether the indices are computed from the seed.
        size: number of samples of an epoch, where torch's own samplers tell it.
        batch_size: samples of a batch, where torch's own batch sampler makes the batches.
        drop_last: whether that batch sampler leaves out what does not fill a batch.
        in_workers: whether worker processes load the samples.
        replaces: the loader's attribute that it stands in for.
        kept: by epoch, an iteration of the user's own sampler that a :class:`Look` began, for the epoch to use; copies
            share it.
        plans_steps: whether several ranks count on the length that the sampler tells.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        shuffle: bool,
    ) -> None:
        self._seed = seed
        self.plans_steps = False
        self._look: Look | None = None
        self.kept: dict[int, Iterator[Any]] = {}
        self.in_workers = loader.num_workers > 0
        is_batched = loader.batch_sampler is not None
        self.replaces = "batch_sampler" if is_batched else "sampler"
        self.sampler: Any = getattr(loader, self.replaces)
        length = loader_length(self.sampler)
        self.length = int(length) if length != INFINITE else None
        self.batch_size: int | None = None
        self.drop_last = False
        inner: Any = self.sampler
        if is_batched and type(inner) is BatchSampler:
            self.batch_size = inner.batch_size
            self.drop_last = inner.drop_last
            inner = inner.sampler
        self._random = inner if shuffle and type(inner) is RandomSampler else None
        is_torchs = type(inner) in (RandomSampler, SequentialSampler)
        self.size = len(inner) if is_torchs else None
        is_cut_evenly = self.batch_size is not None or not is_batched
        self.is_planned = is_torchs and is_cut_evenly
        self.seek(0)
        self._generators: list[tuple[torch.Generator, int]] = []
        for sampler in (self.sampler, getattr(self.sampler, "sampler", None)):
            generator = getattr(sampler, "generator", None)
            if isinstance(generator, torch.Generator):
                self._generators.append((generator, generator.initial_seed()))

    def plan_steps(self) -> None:
        """Let several ranks count on the length that the sampler tells."""
        self.plans_steps = True

    def seek(
        self,
        epoch: int,
        start: int = 0,
        step: int = 1,
        segment: Segment = WHOLE_EPOCH,
    ) -> None:
        """Set what the next iteration gives.

        Args:
            epoch: the epoch.
            start: the first batch, counted from the segment's begin.
            step: every how many batches to give one.
            segment: the part of the epoch.
        """
        self.epoch = epoch
        self.start = start
        self.step = step
        self.segment = segment
        self.seed = self._seed
        if self._random is not None and self._random.generator is not None:
            self.seed = mix_seeds(self._seed, self._random.generator.initial_seed())

    def reseed(self, seed: int) -> None:
        """Draw from another seed, as if nothing had been drawn."""
        self._seed = seed
        self.kept.clear()
        self.seek(0)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the sampler has no length")
        return self.length

    def __iter__(self) -> Iterator[Any]:
        if self._look is not None:
            self._look.ask()
        batches = self._planned() if self.is_planned else self._replayed()
        if self._look is not None:
            return self._look.until_ended(batches)
        if not self.in_workers:
            return batches
        return self._seeded(batches)

    def _planned(self) -> Iterator[Any]:
        order = self.segment.slice(self._order())
        size = self.batch_size
        if size is None:
            yield from order[self.start :: self.step]
            return
        if self.step > 1:
            firsts = range(self.start * size, len(order), self.step * size)
            indices = iter(
                [index for first in firsts for index in order[first : first + size]]
            )
        else:
            indices = iter(order[self.start * size :])
        while batch := [*islice(indices, size)]:
            if self.drop_last and len(batch) < size:
                return
            yield batch

    def _order(self) -> Sequence[int]:
        """The epoch's sample indices."""
        assert self.size is not None
        if self._random is None:
            return range(self.size)
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        population = len(self._random.data_source)
        if population == 0:
            raise ValueError(
                "the training loader is empty: its sampler draws from a dataset without samples"
            )
        if self._random.replacement:
            return torch.randint(population, (self.size,), generator=generator).tolist()
        order: list[int] = []
        while len(order) < self.size:
            order += torch.randperm(population, generator=generator).tolist()
        return order[: self.size]

    def _replayed(self) -> Iterator[Any]:
        """The user's own sampler, drawing from (seed, epoch) alone, moved to the start."""
        drawn = self._drawn() if self._look is None else self.draw_ahead()
        if self.plans_steps and self.length is not None:
            drawn = self._noting_more(drawn, self.length)
        start = self.segment.begin + self.start
        return islice(drawn, start, self.segment.end, self.step)

    def _noting_more(self, drawn: Iterator[Any], reported: int) -> Iterator[Any]:
        """The same indices, as many as the length tells; a warning says once if there are more."""
        planned = list(islice(drawn, reported))
        if next(drawn, NO_BATCH) is not NO_BATCH:
            self.plans_steps = False
            log.warning(
                "A loader's sampler (%s) gives more than the %d batches that its length tells. Several processes plan "
                "their steps by the length, and leave the others out: have its __len__ tell how many it gives",
                type(getattr(self.sampler, "sampler", self.sampler)).__name__,
                reported,
            )
        return iter(planned)

    def _drawn(self) -> Iterator[Any]:
        if self.epoch in self.kept:
            return self.kept.pop(self.epoch)
        set_epoch(self.sampler, self.epoch)
        for generator, seed in self._generators:
            generator.manual_seed(mix_seeds(seed, self.epoch))
        return isolated_iteration(
            self.sampler, mix_seeds(self.seed, self.epoch), at_once=self.length
        )

    def draw_ahead(self) -> Iterator[Any]:
        """What the user's own sampler gives in this epoch. Drawn only once, it is kept for the iteration, too."""
        drawn, self.kept[self.epoch] = tee(self._drawn())
        return drawn

    def apart(self, loader: DataLoader[Any]) -> IndexPlan:
        """A plan of the same indices that can be iterated while this one is; ``loader`` is the one that it is of.

        Raises:
            Exception: whatever keeps a user's own sampler from being copied.
        """
        if self.is_planned:
            plan = copy.copy(self)
        else:
            dataset = loader.dataset
            sampler = copy.deepcopy(self.sampler, {id(dataset): dataset})
            copied = fresh_copy(loader, **{self.replaces: sampler})
            plan = IndexPlan(copied, self._seed, self._random is not None)
        plan.in_workers = False
        return plan

    def for_a_look(self, is_trap: bool = False) -> tuple[IndexPlan, Look]:
        """A copy of the plan, to be put into a loader for a :class:`Look`, and that look; no worker is used."""
        plan = copy.copy(self)
        plan.in_workers = False
        plan._look = look = Look(is_trap)
        return plan, look

    def _seeded(self, batches: Iterator[Any]) -> Iterator[Any]:
        seeds = self.segment.seeds
        for number, indices in zip(count(self.start, self.step), batches, strict=False):
            yield _SeededIndices(
                indices, mix_seeds(self.seed, self.epoch, *seeds, number)
            )


class Look:
    """Finds out, before an epoch begins, whether a loader asks for its sampler's indices, or what its first batch is.

    The thread that constructs this iterates the loader, which may read indices in threads of its own.

    Args:
        is_trap: raise in the constructing thread when it asks for the indices, as no batch is wanted.

    Attributes:
        was_asked: whether any thread has asked for them.
        ended: set when the loader has given a batch, or ended without one.
    """

    def __init__(self, is_trap: bool) -> None:
        self._thread = threading.get_ident()
        self._is_trap = is_trap
        self.was_asked = False
        self.ended = threading.Event()

    def ask(self) -> None:
        """Note that the indices are asked for.

        Raises:
            SamplerWasAsked: in this thread, if it is a trap.
        """
        self.was_asked = True
        if self._is_trap and threading.get_ident() == self._thread:
            raise SamplerWasAsked

    def until_ended(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same indices; a thread of the loader's own gets no more after the look, so that the thread ends."""
        for batch in batches:
            yield batch
            # The loader may need the indices of several batches before it gives one: go on after a second without.
            if threading.get_ident() != self._thread and self.ended.wait(1):
                return


class NotedIndices:
    """Stands in for the sampler of a loader's copy, and notes the indices that it gives for each batch.

    Args:
        sampler: gives the indices of a batch, or of a sample where the loader makes no batches.

    Attributes:
        given: the indices of batches, in their order, for those who take them out as the batches come.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.given: deque[list[Any]] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.given.clear()
        for indices in self._sampler:
            plain: Any = indices
            if isinstance(indices, _SeededIndices):
                plain = indices.indices
            is_one = not hasattr(plain, "__iter__")
            self.given.append([plain] if is_one else [*plain])
            yield indices

    def __len__(self) -> int:
        return len(self._sampler)


class _SeededIndices:
    """Indices on their way to a worker: unpickling them there seeds its generators and gives the plain indices.

    So a batch's random augmentation depends on the seed, the epoch and the batch's number alone, whatever worker makes
    it, and neither the dataset nor the worker function is touched.
    """

    def __init__(self, indices: Any, seed: int) -> None:
        self.indices = indices
        self.seed = seed

    def __reduce__(self) -> tuple[Any, ...]:
        return _seed_and_unwrap, (self.indices, self.seed)


def _seed_and_unwrap(indices: Any, seed: int) -> Any:
    seed_batch(seed)
    return indices


class SamplerWasAsked(BaseException):
    """A loader has asked for its sampler's indices; no loader's own ``except Exception`` hides it."""


def fresh_copy(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A shallow copy of a loader that starts workers of its own, with other values of some attributes."""
    copied = copy.copy(loader)
    # Past __setattr__, which refuses a new sampler after construction.
    copied.__dict__.update(changes, _iterator=None)
    protect_workers(copied)
    return copied


def replace_sampler(
    loader: DataLoader[Any],
    indices: IndexPlan,
    **changes: Any,
) -> DataLoader[Any]:
    """As :func:`fresh_copy`, with another index sampler."""
    if loader.persistent_workers:
        # Such workers draw their seeds once in a process, from torch's generator if the loader has none. With one of
        # its own, it makes no difference whether a process begins with the first epoch or with a later one.
        changes["generator"] = torch.Generator().manual_seed(indices.seed)
    return fresh_copy(loader, **{indices.replaces: indices}, **changes)


def own_copy(loader: Any) -> Any:
    """``loader``, or a copy of it that starts workers of its own."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return loader
    return fresh_copy(loader)


def noting_indices(loader: Any) -> tuple[Any, NotedIndices | None]:
    """A copy of a loader, and what notes the indices of its batches; as of :func:`own_copy`, and None, for others.

    Others are streams, and what reads its batches in a way of its own.
    """
    is_plain = is_map_style(loader) and not has_own_iteration(loader)
    if not is_plain or not getattr(loader, "in_order", True):
        return own_copy(loader), None
    replaces = "sampler" if loader.batch_sampler is None else "batch_sampler"
    noted = NotedIndices(getattr(loader, replaces))
    return fresh_copy(loader, **{replaces: noted}), noted
