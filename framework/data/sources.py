"""Loaders of a user that can be iterated from any batch of any epoch.

What a user gives is never re-created or patched. A ``torch.utils.data.DataLoader`` over a map-style dataset is
shallow-copied and its index sampler replaced in the copy, so that the order of the data is a pure function of
(seed, epoch, position) and a resumed run jumps to its position without loading what it skips.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import CheckpointError
from ..messages import log
from ..seed import isolated_rng, mix_seeds, seed_batch
from .generators import Generators
from .iteration import (
    INFINITE,
    NO_BATCH,
    OpenedIteration,
    exact_length,
    has_own_iteration,
    has_state,
    is_map_style,
    isolated_iteration,
    loader_length,
    read_again,
    set_epoch,
    up_to,
)
from .position import WHOLE_EPOCH, Segment
from .sampler import (
    IndexPlan,
    NotedIndices,
    SamplerWasAsked,
    fresh_copy,
    replace_sampler,
)
from .workers import iterate_protected, workers_protected

Watch = Callable[[Iterator[Any]], Iterator[Any]]


@dataclass
class Reading:
    """How a rank reads a source.

    Attributes:
        first: the first of the source's batches that the rank reads.
        every: from there on it reads every ``every``-th batch.
        is_ahead: whether batches are read before the loop asks for them, or in step with other ranks. What reading them
            draws at random must then not depend on what the loop has drawn.
        draws_apart: numbers that are mixed into the seeds, where ranks that read other batches are to draw otherwise.
        watch: a function that is given the iterator of all of a stream's batches, before the rank's own are chosen, and
            returns another one of the same batches.
    """

    first: int = 0
    every: int = 1
    is_ahead: bool = False
    draws_apart: tuple[int, ...] = ()
    watch: Watch | None = None

    def count(self, batches: float) -> float:
        """How many of ``batches`` the rank reads."""
        if batches == INFINITE:
            return batches
        return len(range(self.first, int(batches), self.every))


class BatchSource(ABC):
    """A user's loader, or several that are read together, iterated epoch by epoch.

    Args:
        loader: any iterable that can be iterated again.
        seed: the run's seed.

    Attributes:
        reading: how this rank reads it.
        drop_last: whether the loader leaves out what does not fill a batch.
        batch_sizes: the loader's, in a list, as far as it tells.
        has_own_iteration: whether a user's own ``__iter__`` gives a ``DataLoader``'s batches, maybe more or less than
            its length tells.
        is_stream: whether we cannot choose where it begins: it is read from its start, or from a state of its own.
        keeps_iterator: whether it is a stream that, iterated again, goes on where it was left.
        stateful: whether the loader has a state of its own.
        counts_samples: whether the positions of a :class:`Segment` count samples of it; else they count batches.
        unit: by how much a batch moves the position.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader: Any = loader
        self.seed = seed
        self.reading = Reading()
        self.drop_last = bool(getattr(loader, "drop_last", False))
        self.batch_sizes = [getattr(loader, "batch_size", None)]
        self.has_own_iteration = has_own_iteration(loader)
        self.is_stream = False
        self.keeps_iterator = False
        self.stateful = False
        self.counts_samples = False
        self.unit = 1
        self._exact_length = exact_length(loader)
        self._reported_length = loader_length(loader)
        # The iteration that `peek` has begun, until it is used.
        self._opened: OpenedIteration | None = None

    @property
    def reads_once(self) -> bool:
        """Whether the loader, iterated again, does not begin again."""
        return self.keeps_iterator or isinstance(self.loader, Iterator)

    @property
    def parts(self) -> Sequence[BatchSource]:
        """The sources that are read together, or the only one."""
        return [self]

    @property
    def length(self) -> float:
        """Number of batches that this rank reads; infinite if that is not certain."""
        return self.length_in(WHOLE_EPOCH)

    @property
    def reported_length(self) -> float:
        """Number of batches that this rank reads, as the loader tells it: an estimate where it is a stream."""
        return self.reading.count(self._reported_length)

    def length_in(self, segment: Segment) -> float:
        """Number of batches that this rank reads in a segment of an epoch."""
        return self.reading.count(self._length_in(segment))

    def _length_in(self, segment: Segment) -> float:
        return segment.length_of(self._exact_length)

    def last_fraction_in(self, segment: Segment) -> float:
        """Size of a segment's last batch, as a fraction of the others'."""
        return 1.0

    def read_shard(self, first: int, every: int) -> None:
        """Read the batch ``first`` and every ``every``-th after it, as if there were no others."""
        self.reading.first = first
        self.reading.every = every

    def read_ahead(self, is_ahead: bool, draws_apart: tuple[int, ...] = ()) -> None:
        """Set :attr:`Reading.is_ahead` and :attr:`Reading.draws_apart`."""
        self.reading.is_ahead = is_ahead
        self.reading.draws_apart = draws_apart

    def watch(self, function: Watch) -> None:
        """Set :attr:`Reading.watch`."""
        self.reading.watch = function

    def plan_steps(self) -> None:
        """Leave out what a sampler gives beyond its length, by which several ranks plan their steps."""

    def mark_sharded(self) -> None:
        """Take note that the loader gives each rank another part of the data by itself."""

    def note_indices(self) -> NotedIndices | None:
        """Note from now on of which samples each batch is made; None where nobody can tell."""
        return None

    def reseed(self, seed: int) -> None:
        """Draw from another seed, as if nothing had been read; a source that keeps its iterator goes on with it."""
        self.seed = seed
        if not self.keeps_iterator:
            self._opened = None

    def iterate(
        self,
        epoch: int,
        start: int = 0,
        step: int = 1,
        segment: Segment = WHOLE_EPOCH,
    ) -> Iterator[Any]:
        """Iterate a segment of an epoch from its batch ``start``, every ``step``-th batch."""
        if not self._has_begun(epoch):
            set_epoch(self.loader, epoch)
        reading = self.reading
        start = reading.first + start * reading.every
        return self._iterate(epoch, start, step * reading.every, segment)

    def _has_begun(self, epoch: int) -> bool:
        return self._opened is not None and self._opened.epoch == epoch

    @abstractmethod
    def _iterate(
        self,
        epoch: int,
        start: int,
        step: int,
        segment: Segment,
    ) -> Iterator[Any]:
        """As :meth:`iterate`, but ``start`` and ``step`` count all batches of the source, not only this rank's."""

    def peek(self, epoch: int) -> Any:
        """What differs between ranks whose loaders give other data: the first batch of a stream or of a sequence.

        A stream is not read again for it: :meth:`iterate` begins with this batch.

        Returns:
            The batch, or :data:`NO_BATCH` if there is none; of a ``DataLoader`` with a sampler of its own the first
            indices; None where torch's own samplers give all of a dataset's indices.
        """
        set_epoch(self.loader, epoch)
        return self._peek(epoch)

    def _peek(self, epoch: int) -> Any:
        return None

    def _open(self, source: Any, epoch: int) -> OpenedIteration:
        return OpenedIteration(source, mix_seeds(self.seed, epoch), epoch)

    def _take_opened(self, epoch: int, goes_on: bool) -> OpenedIteration | None:
        """The iteration that :meth:`peek` has begun, if it is one of ``epoch``, or ``goes_on`` from epoch to epoch."""
        opened = self._opened
        self._opened = None
        if opened is None or (opened.epoch != epoch and not goes_on):
            return None
        return opened

    def begun_iteration(self) -> Iterator[Any] | None:
        """The iteration that :meth:`peek` has begun, if any, to be used instead of :meth:`iterate`."""
        opened = self._opened
        self._opened = None
        return None if opened is None else opened.iterate(isolated=False)

    def samples_of(
        self, epoch: int, number: int, segment: Segment = WHOLE_EPOCH
    ) -> list[Any] | None:
        """The indices in the dataset of the samples of a batch; None where nobody can tell them.

        Of several loaders, pairs of a loader's number and an index.

        Args:
            epoch: the epoch.
            number: of the batch among all of the segment's.
            segment: the part of the epoch.
        """
        return None

    def close(self) -> None:
        """End the workers of our copy of the loader, which it may keep from epoch to epoch."""
        self._opened = None

    def require_resumable(self) -> None:
        """Refuse to resume inside an epoch if nobody can tell at which batches the loaders' own states are.

        Raises:
            CheckpointError: if so, which only loaders that are read together can be.
        """

    def state_dict(self, following: int | None = None, done: bool = False) -> Any:
        """The loader's own state, for those that keep one (such as torchdata's ``StatefulDataLoader``).

        Args:
            following: number of the batch to go on with; None for the next one that the loader gives.
            done: whether the epoch is over, even if the loader would give more batches.
        """
        return None

    def load_state_dict(self, state: Any) -> None:
        """Take back :meth:`state_dict`; it is applied by the next :meth:`iterate`."""

    def _choose(
        self,
        batches: Iterator[Any],
        read: int,
        start: int,
        step: int,
        segment: Segment,
    ) -> Iterator[Any]:
        """Every ``step``-th batch from ``start`` to the segment's end; ``batches`` begins with number ``read``."""
        if self.reading.watch is not None:
            batches = self.reading.watch(batches)
        stop = None
        if segment.end is not None:
            stop = max(start, segment.end) - read
        return islice(batches, start - read, stop, step)

    def _seeded(
        self,
        source: Iterable[Any],
        epoch: int,
        numbers: Iterator[int],
        seeds: tuple[int, ...] = (),
    ) -> Iterator[Any]:
        """Iterate ``source`` so that what is drawn for a batch depends on the seed, the epoch and its number alone.

        So it is the same after a resume, though no loader's own state holds random generators, and it is the same on
        all ranks that read the same batches. Ranks that read different batches draw different numbers.

        Args:
            source: what to iterate.
            epoch: the epoch.
            numbers: the batches' numbers in it.
            seeds: further numbers that all batches' seeds depend on.
        """
        generators = Generators(mix_seeds(self.seed, epoch))
        # A loader that draws an order when it is begun must draw that of the epoch's begin, wherever it goes on.
        with generators:
            iterator = iterate_protected(source)
        if getattr(self.loader, "num_workers", 0):
            # Workers draw with generators of their own.
            numbers = islice(numbers, 1)
        reading = self.reading
        apart = () if reading.every > 1 else reading.draws_apart

        def batches() -> Iterator[Any]:
            for number in numbers:
                with generators:
                    # Some draw their order only with the first batch: from the generators with which they were begun.
                    if number or seeds:
                        seed_batch(mix_seeds(self.seed, epoch, *seeds, number, *apart))
                    batch = next(iterator, NO_BATCH)
                if batch is NO_BATCH:
                    return
                yield batch
            yield from iterator

        return batches()


class ListSource(BatchSource):
    """A list of batches, or another sequence. A resume leaves out what has been read."""

    def _iterate(
        self,
        epoch: int,
        start: int,
        step: int,
        segment: Segment,
    ) -> Iterator[Any]:
        start += segment.begin
        return self._choose(iter(self.loader), 0, start, step, segment)

    def _peek(self, epoch: int) -> Any:
        return next(iter(self.loader), NO_BATCH)


class IndexedSource(BatchSource):
    """What reads a ``DataLoader`` over a map-style dataset, in a copy that gets its indices from an :class:`IndexPlan`.

    Args:
        loader: the loader.
        seed: the run's seed.
        shuffle: False puts the samples of a shuffling loader in their stored order.

    Attributes:
        indices: the plan.
        copy: the loader's copy with the plan in place of its sampler.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        shuffle: bool,
    ) -> None:
        super().__init__(loader, seed)
        self.indices = IndexPlan(loader, seed, shuffle)
        self.copy = replace_sampler(loader, self.indices)
        self.counts_samples = self.indices.is_planned
        if self.counts_samples:
            self.unit = self.indices.batch_size or 1

    def reseed(self, seed: int) -> None:
        super().reseed(seed)
        self.indices.reseed(seed)
        self.copy = replace_sampler(self.loader, self.indices)

    def _samples_in(self, segment: Segment) -> int:
        return len(segment.slice(range(self.indices.size or 0)))

    def _length_in(self, segment: Segment) -> float:
        if segment == WHOLE_EPOCH or not self.counts_samples:
            return super()._length_in(segment)
        samples = self._samples_in(segment)
        if self.indices.drop_last:
            return samples // self.unit
        return -(-samples // self.unit)

    def last_fraction_in(self, segment: Segment) -> float:
        if not self.counts_samples or self.indices.drop_last:
            return 1.0
        return (self._samples_in(segment) % self.unit or self.unit) / self.unit

    def _iterate(
        self,
        epoch: int,
        start: int,
        step: int,
        segment: Segment,
    ) -> Iterator[Any]:
        self.indices.seek(epoch, start, step, segment)
        if not self.reading.is_ahead or self.indices.in_workers:
            return iterate_protected(self.copy)
        return self._seeded(self.copy, epoch, count(start, step), segment.seeds)

    def samples_of(
        self, epoch: int, number: int, segment: Segment = WHOLE_EPOCH
    ) -> list[Any] | None:
        # A sampler that is going on in the running epoch is not asked, but a copy, if it can be copied.
        with suppress(Exception):
            plan = self.indices.apart(self.loader)
            plan.seek(epoch, number, 1, segment)
            batch = next(iter(plan), [])
            return list(batch) if isinstance(batch, Iterable) else [batch]
        return None

    def begun_iteration(self) -> Iterator[Any] | None:
        # The epochs of which `peek` has drawn indices.
        epochs = [*self.indices.kept]
        return chain.from_iterable(map(self.iterate, epochs)) if epochs else None

    def close(self) -> None:
        self.copy.__dict__["_iterator"] = None


class SampledSource(IndexedSource):
    """A ``DataLoader`` that asks its sampler for indices.

    A resume begins with the indices of the batch to go on with: no sample before it is loaded.
    """

    def plan_steps(self) -> None:
        self.indices.plan_steps()

    def note_indices(self) -> NotedIndices | None:
        if not getattr(self.loader, "in_order", True):
            return None
        noted = NotedIndices(self.indices)
        self.copy.__dict__[self.indices.replaces] = noted
        return noted

    def _peek(self, epoch: int) -> Any:
        self.indices.seek(epoch)
        if self.indices.is_planned:
            return None
        return next(self.indices.draw_ahead(), NO_BATCH)


class StreamSource(BatchSource):
    """What can only be read from its start, with random generators that follow from (seed, epoch).

    A resume inside an epoch reads again what had been read.

    Args:
        loader: the loader.
        seed: the run's seed.
        keeps_iterator: whether, iterated again, it goes on where it was left. Such a one is resumed inside an epoch
            only where it draws the epoch's order again.
        opened: an iteration that has been begun, to be used first.
    """

    def __init__(
        self,
        loader: Any,
        seed: int,
        keeps_iterator: bool = False,
        opened: OpenedIteration | None = None,
    ) -> None:
        super().__init__(loader, seed)
        self.is_stream = True
        self.keeps_iterator = keeps_iterator
        self._opened = opened
        # What is left of an iteration that the next one would go on with.
        self._left: Iterator[Any] = iter(())

    def _iterate(
        self,
        epoch: int,
        start: int,
        step: int,
        segment: Segment,
    ) -> Iterator[Any]:
        start += segment.begin
        is_inside = start >= step
        if self.keeps_iterator and is_inside:
            self._require_order(epoch)
        batches = self._begin(epoch)
        read = 0
        if is_inside:
            log.info(
                "Resuming inside an epoch of a loader without state: reading %d batches again",
                start,
            )
            for _ in islice(batches, start):
                pass
            read = start
        return self._choose(batches, read, start, step, segment)

    def _begin(self, epoch: int) -> Iterator[Any]:
        """Iterate from the start, so that what it draws depends on (seed, epoch) alone."""
        # Workers have generators of their own; but a kept iterator draws its order in this process.
        is_isolated = self.keeps_iterator or not getattr(self.loader, "num_workers", 0)
        # To its end, so that the next iteration begins at the same batch on all ranks.
        for _ in self._left:
            pass
        goes_on = self.reads_once
        opened = self._take_opened(epoch, goes_on)
        if opened is not None:
            batches = opened.iterate(is_isolated)
        elif is_isolated:
            seed = mix_seeds(self.seed, epoch)
            batches = isolated_iteration(self._copy(epoch), seed)
        else:
            batches = iterate_protected(self._copy(epoch))
        # Some kept iterators go on for ever: end an epoch where the length tells.
        if self.keeps_iterator and self.reported_length < INFINITE:
            batches = self._left = islice(batches, int(self.reported_length))
        return batches

    def _require_order(self, epoch: int) -> None:
        """Raise a CheckpointError if a kept iterator would not draw the order of the epoch again."""
        begun = epoch if self._opened is None else self._opened.epoch
        in_workers = self.loader.num_workers > 0
        if in_workers or begun != epoch:
            raise CheckpointError(
                f"{type(self.loader).__name__} keeps its iterator from epoch to epoch"
                f"{', and its workers draw the order ahead' if in_workers else ''}: it does not go on "
                "inside an epoch. Resume from a checkpoint of an epoch's end, or give torch's DataLoader with "
                "persistent_workers=True"
            )

    def _copy(self, epoch: int) -> Any:
        """The loader, or a copy of a ``DataLoader`` whose workers take their seeds from a generator of ours."""
        if not isinstance(self.loader, DataLoader):
            return self.loader
        generator = _generator_of(self.loader, self.seed, epoch)
        return fresh_copy(self.loader, generator=generator)

    def _peek(self, epoch: int) -> Any:
        if self._opened is None:
            self._opened = self._open(self._copy(epoch), epoch)
        return self._opened.first


def _generator_of(
    loader: DataLoader[Any],
    seed: int,
    epoch: int,
) -> torch.Generator:
    """A generator that follows from (seed, epoch), and from the seed of the loader's own."""
    given = loader.generator
    own = () if given is None else (given.initial_seed(),)
    return torch.Generator().manual_seed(mix_seeds(seed, epoch, *own))


class OwnIterationSource(IndexedSource):
    """A ``DataLoader`` of a class with an ``__iter__`` of its own.

    When it is first used, a copy of it shows whether it asks for its sampler's indices. If so, it is resumed as a
    :class:`SampledSource`, and gives as many batches as its length tells. If not, as a loader that keeps one iterator
    for all epochs, it is read as a :class:`StreamSource` from then on.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        shuffle: bool,
    ) -> None:
        super().__init__(loader, seed, shuffle)
        self._stream: StreamSource | None = None
        self._is_known = False
        self._shards_itself = False
        # Holds the loader's id once a warning has said that it gives more batches than its length tells.
        self._warned: set[Any] = set()

    def mark_sharded(self) -> None:
        self._shards_itself = True

    def reseed(self, seed: int) -> None:
        super().reseed(seed)
        if self._stream is not None:
            self._stream.reseed(seed)

    def _has_begun(self, epoch: int) -> bool:
        return self._stream is not None and self._stream._has_begun(epoch)

    def find_out(self, epoch: int) -> None:
        """See whether the loader asks for our indices; if not, it is a stream of batches."""
        if self._is_known:
            return
        self._is_known = True
        indices, look = self.indices.for_a_look(is_trap=True)
        indices.seek(epoch)
        probe = self._probe(indices)
        opened = None
        # It raises if the loader asks, or cannot be iterated with another sampler.
        with suppress(SamplerWasAsked, Exception):
            opened = self._open(probe, epoch)
        look.ended.set()
        if look.was_asked:
            return
        # A loader that goes on for ever makes its next iterator from the copy that is iterated now, which therefore
        # gets back the sampler and workers that it was given.
        given = self.loader.__dict__
        names = (indices.replaces, "num_workers", "timeout")
        probe.__dict__.update({name: given[name] for name in names})
        self._stream = StreamSource(self.loader, self.seed, True, opened)
        self._stream.reading = self.reading
        self.is_stream = True
        self.keeps_iterator = True
        self.counts_samples = False
        self.unit = 1
        log.info(
            "A loader (%s) iterates in a way of its own and does not ask for its sampler's indices: its batches are "
            "read as a stream, in the order in which it gives them",
            type(self.loader).__name__,
        )

    def _probe(self, indices: IndexPlan) -> DataLoader[Any]:
        """A copy of the loader to be looked at, with other indices; no worker is started for it."""
        return replace_sampler(self.loader, indices, num_workers=0, timeout=0)

    def _iterate(
        self,
        epoch: int,
        start: int,
        step: int,
        segment: Segment,
    ) -> Iterator[Any]:
        self.find_out(epoch)
        if self._stream is not None:
            return self._stream._iterate(epoch, start, step, segment)
        # A loader that shards its batches itself counts them from the first one on: read all of them again.
        again = start if self._shards_itself else 0
        # torch draws a number when a loader is begun, maybe only with its first batch: let it use another one than the
        # process's generator.
        generator = _generator_of(self.loader, self.seed, epoch)
        self.copy.__dict__["generator"] = generator
        batches = super()._iterate(epoch, start - again, step, segment)
        read_again(batches, again)
        length = self._length_in(segment)
        if length == INFINITE:
            return batches
        left = len(range(start, int(length), step))
        if not left:
            return iter(())
        return up_to(self.loader, batches, left, int(self._exact_length), self._warned)

    def _peek(self, epoch: int) -> Any:
        self.find_out(epoch)
        if self._stream is not None:
            return self._stream._peek(epoch)
        self.indices.seek(epoch)
        indices, look = self.indices.for_a_look()
        try:
            return self._open(self._probe(indices), epoch).first
        finally:
            look.ended.set()

    def samples_of(
        self, epoch: int, number: int, segment: Segment = WHOLE_EPOCH
    ) -> list[Any] | None:
        if self._stream is not None:
            return None
        return super().samples_of(epoch, number, segment)

    def begun_iteration(self) -> Iterator[Any] | None:
        if self._stream is not None:
            return self._stream.begun_iteration()
        return super().begun_iteration()

    def close(self) -> None:
        super().close()
        if self._stream is not None:
            self._stream.close()


# A loader's `state_dict` is taken every so many batches: a resume has to read fewer than that again.
_STATE_EVERY = 64
# What is saved of a stateful loader: its own `state_dict`, how many batches to read again after it, whether its
# iteration was left before it ended, how many of the epoch's batches had been read when the state was taken, and the
# epoch. Earlier versions saved the first two or three.
_KEYS = {"state", "batches", "left", "read", "epoch"}
_NO_STATE = {"state": None, "batches": 0, "left": False}


class _Iteration:
    """An iteration of a stateful loader.

    Attributes:
        epoch: the epoch; None if there is no iteration yet.
        step: every how many batches this rank reads one.
        begin: where the segment of the epoch begins.
        read: how many of the epoch's batches have been read.
        has_ended: whether the loader has given them all.
        states: pairs of how many batches had been read, and the loader's state then: the one with which the iteration
            began, and the last two.
    """

    def __init__(
        self,
        epoch: Any,
        step: int = 1,
        begin: int = 0,
    ) -> None:
        self.epoch = epoch
        self.step = step
        self.begin = begin
        self.read = 0
        self.has_ended = False
        self.states: list[tuple[int, dict[str, Any]]] = []

    def numbers(self) -> Iterator[int]:
        """The numbers of the batches to come, counted from those read when the first number is asked for."""
        yield from count(self.read)


class StatefulSource(BatchSource):
    """A loader with ``state_dict`` and ``load_state_dict``.

    Its state is taken every 64 batches. A resume loads the last one before the batch to go on with, and reads again
    what had been read since then.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        super().__init__(loader, seed)
        self.stateful = True
        self.is_stream = True
        self._resumed: dict[str, Any] | None = None
        self._iteration = _Iteration(None)

    @property
    def iterated_epoch(self) -> int | None:
        """The epoch that has been iterated last."""
        return self._iteration.epoch

    def reseed(self, seed: int) -> None:
        super().reseed(seed)
        self._resumed = None
        self._iteration = _Iteration(None)

    def _iterate(
        self,
        epoch: int,
        start: int,
        step: int,
        segment: Segment,
    ) -> Iterator[Any]:
        start += segment.begin
        iteration = _Iteration(epoch, step, segment.begin)
        resumed = self._resumed
        self._resumed = None
        batches = state = None
        if resumed is not None:
            batches = self._restore(resumed, iteration, start)
            if batches is not None:
                state = resumed
                iteration.read = _read_before(resumed, iteration, start)
        elif self._iteration.states:
            # The state in which the last iteration was left. If the loader cannot tell it, whoever saves hears of that.
            with suppress(Exception):
                state = self.state_dict(done=True)
        if batches is None:
            batches = self._begin(iteration)
        iteration.states = [(iteration.read, state or _NO_STATE)]
        self._iteration = iteration
        batches = self._keeping_states(batches, iteration)
        return self._choose(batches, iteration.read, start, step, segment)

    def _begin(self, iteration: _Iteration) -> Iterator[Any]:
        epoch = iteration.epoch
        source = self.loader
        opened = self._take_opened(epoch, isinstance(self.loader, Iterator))
        if opened is not None:
            source = opened.iterate(isolated=False)
        return self._seeded(source, epoch, iteration.numbers())

    def _restore(
        self,
        resumed: dict[str, Any],
        iteration: _Iteration,
        start: int,
    ) -> Iterator[Any] | None:
        """Iterate the loader from a state; None if it cannot, and an epoch begins.

        Raises:
            CheckpointError: if it cannot, inside an epoch.
        """
        attributes = getattr(self.loader, "__dict__", {})
        unchanged = dict(attributes)
        is_inside = start >= iteration.step or resumed["batches"]
        try:
            if resumed["state"] is not None:
                self.loader.load_state_dict(resumed["state"])
                if is_inside and getattr(self.loader, "num_workers", 0):
                    log.info(
                        "%s has workers, whose random states are not in its state: their order is kept, and what they "
                        "draw at random (augmentation) is drawn anew",
                        type(self.loader).__name__,
                    )
            if resumed["left"]:
                # The state was taken in an iteration that was left. Begin that one, as the next one begins after it.
                with isolated_rng():
                    iterate_protected(self.loader)
            return self._begin(iteration)
        except Exception as error:
            if is_inside:
                raise CheckpointError(
                    f"the training loader does not go on inside the epoch ({type(error).__name__}: {error}): resume "
                    "with the one that the checkpoint was saved with, or from a checkpoint of an epoch's end"
                ) from error
            log.warning(
                "The training loader is not the one that the checkpoint was saved with (%s: %s); the epoch begins as "
                "with a new one",
                type(error).__name__,
                error,
            )
            attributes.clear()
            attributes.update(unchanged)
            return None

    def _keeping_states(
        self, batches: Iterator[Any], iteration: _Iteration
    ) -> Iterator[Any]:
        first = next(batches, NO_BATCH)
        if first is not NO_BATCH:
            batches = chain((first,), batches)
        elif iteration.states[0][1]["left"]:
            # The loader went on with the iteration that was left, and this was only its end.
            batches = self._begin(iteration)
        for batch in batches:
            iteration.read += 1
            states = iteration.states
            if iteration.read % _STATE_EVERY == 0 or len(states) == 1:
                # If the loader cannot tell its state, whoever saves hears of that, and the training goes on.
                with suppress(Exception):
                    state = copy.deepcopy(self._state(iteration))
                    iteration.states = [states[0], states[-1], (iteration.read, state)]
            yield batch
        iteration.has_ended = True

    def _state(self, iteration: _Iteration, is_left: bool = False) -> dict[str, Any]:
        # A loader that is asked before it is iterated may start its workers.
        with workers_protected(self.loader):
            state = self.loader.state_dict()
        return {
            "state": state,
            "batches": 0,
            "left": is_left,
            "read": iteration.read,
            "epoch": iteration.epoch,
        }

    def _peek(self, epoch: int) -> Any:
        if is_map_style(self.loader) and not self.has_own_iteration:
            # A sampler that cannot be copied is not looked at: the loader is begun instead.
            with suppress(Exception):
                dataset = self.loader.dataset
                memo = {id(dataset): dataset}
                sampler: Any = copy.deepcopy(self.loader._index_sampler, memo)
                seed = mix_seeds(self.seed, epoch)
                return next(isolated_iteration(sampler, seed), NO_BATCH)
        if self._opened is None:
            self._opened = self._open(self.loader, epoch)
        return self._opened.first

    def state_dict(self, following: int | None = None, done: bool = False) -> Any:
        if self._resumed is not None:
            return self._resumed
        # It has given a batch that nobody has got yet, so its own state is ahead.
        if self._opened is not None:
            return dict(_NO_STATE)
        iteration = self._iteration
        has_begun = bool(iteration.states)
        if following is None or done or not has_begun:
            is_left = done and has_begun and not iteration.has_ended
            return self._state(iteration, is_left)
        earliest = iteration.states[0][0]
        wanted = max(earliest, iteration.begin + following - iteration.step + 1)
        if wanted == iteration.read > earliest and not iteration.has_ended:
            return self._state(iteration)
        read, state = [kept for kept in iteration.states if kept[0] <= wanted][-1]
        again = wanted - read
        return {**state, "batches": again, "read": read, "epoch": iteration.epoch}

    def load_state_dict(self, state: Any) -> None:
        if state is None:
            return
        is_ours = (
            isinstance(state, dict) and {"state", "batches"} <= state.keys() <= _KEYS
        )
        self._resumed = {**_NO_STATE, **(state if is_ours else {"state": state})}
        if self._resumed["state"] is not None:
            self._opened = None


def _read_before(
    resumed: dict[str, Any],
    iteration: _Iteration,
    start: int,
) -> int:
    """How many of the epoch's batches had been read when a state was taken.

    Raises:
        CheckpointError: if the batch to go on with is among them, or the state is of another epoch.
    """
    if resumed["left"]:
        return 0
    step = iteration.step
    if "read" not in resumed:
        return max(0, start - step + 1) - resumed["batches"]
    is_other_epoch = resumed["epoch"] != iteration.epoch
    if is_other_epoch and start < step:
        return 0
    if is_other_epoch or resumed["read"] > start:
        raise CheckpointError(
            "the training loader does not go on inside the epoch: its own state, as it was saved, is ahead of the "
            "training; resume from a checkpoint of an epoch's end"
        )
    return resumed["read"]


def single_source(
    loader: Any,
    seed: int,
    shuffle: bool = True,
) -> BatchSource:
    """A user's loader, to be iterated epoch by epoch.

    Args:
        loader: any iterable that can be iterated again.
        seed: the run's seed.
        shuffle: False puts the samples of a shuffling ``DataLoader`` in their stored order.

    Raises:
        TypeError: if it cannot be iterated.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"a loader must be iterable, such as a DataLoader or a list; got {loader!r}"
        )
    if has_state(loader):
        return StatefulSource(loader, seed)
    if is_map_style(loader):
        kind = OwnIterationSource if has_own_iteration(loader) else SampledSource
        return kind(loader, seed, shuffle)
    if isinstance(loader, Sequence):
        return ListSource(loader, seed)
    return StreamSource(loader, seed)


def kept_iterator_source(loader: Any) -> BatchSource | None:
    """The source of a loader that keeps its iterator; None for any other loader.

    Before such a source begins an iteration, it reads what is left of the one before.
    """
    source = single_source(loader, seed=0)
    if isinstance(source, OwnIterationSource):
        source.find_out(0)
    return source if source.keeps_iterator else None
