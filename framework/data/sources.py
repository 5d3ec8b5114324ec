"""Loaders that can be iterated from any batch of any epoch, and combinations of several.

What a user gives is never re-created or patched. A ``torch.utils.data.DataLoader`` over a map-style dataset is
shallow-copied and its index sampler replaced in the copy, so that the order of the data is a pure function of
(seed, epoch, cursor) and a resumed run jumps to its cursor without loading what it skips.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import CheckpointError
from ..messages import log
from ..seed import isolated_rng, mix_seeds, rng_state, seed_batch, set_rng_state
from .iteration import (
    INFINITE,
    NO_BATCH,
    OpenedIteration,
    exact_length,
    has_state,
    is_map_style,
    isolated_iteration,
    iterates_alone,
    loader_length,
    read_again,
    set_epoch,
    up_to,
)
from .position import WHOLE_EPOCH, Segment
from .sampler import IndexPlan, SamplerWasAsked, replace_sampler
from .workers import iterate_protected, protect_workers, workers_protected

# A loader's own state is asked for after so many batches, for it may have to be told from which one to go on.
_NOTED_EVERY = 64
# What is saved of such a loader: its own state, the batches to read again after it, whether that iteration is then
# left, how many of the epoch's batches had been read when the state was taken, and the epoch. Earlier versions had the
# first two or three.
_KEYS = {"state", "batches", "left", "read", "epoch"}


class EpochLoader:
    """One loader of a user, iterated epoch by epoch.

    Args:
        loader: any iterable that can be iterated again.
        seed: the run's seed.
        shuffle: False puts the samples of a shuffling ``DataLoader`` in their stored order.

    Attributes:
        length: number of batches; infinite if that is not certain.
        estimate: number of batches, as the loader tells it.
        drop_last: whether the loader leaves out what does not fill a batch.
        in_samples: whether a :class:`Segment` counts samples, as where torch's own samplers are planned, or batches.
        unit: what a batch is in that count.
        batch_sizes: the loader's, in a list, as far as it tells.
        stateful: whether the loader has a state of its own.
        iterated: the epoch that such a one has been iterated for last.
        keeps_iterator: whether it goes on where it was left, as a stream, when it is iterated again.
        place: which of its batches this process reads: the first, and every how many.
        share: how much a batch counts beside those of other processes; see :class:`~.dealing.SharedLoader`.
        shards: whether its own way of iterating gives each process another part.
        read_ahead: whether it is read before the loop asks for it, or in step with other processes: what it draws must
            then be apart from what the loop draws.
        draws_apart: numbers by which what this process draws differs from what others do, which read other batches.
        watch: what all of a stream's batches go through before this process's are chosen.
    """

    share = 1.0
    shards = read_ahead = False
    draws_apart: tuple[int, ...] = ()
    watch: Callable[[Iterator[Any]], Iterator[Any]] | None = None

    def __init__(self, loader: Any, seed: int, shuffle: bool = True) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"a loader must be iterable, such as a DataLoader or a list; got {loader!r}"
            )
        self.loader: Any = loader
        self.seed = seed
        self.length = exact_length(loader)
        self.estimate = loader_length(loader)
        self.stateful = has_state(loader)
        self._resumed: dict[str, Any] | None = None
        # Of the last iteration, of a loader with a state of its own: the step, the epoch's batches that have been read,
        # whether it has ended, and its first state and two others, with the batches read until then.
        self._step, self._read, self._ended = 1, 0, False
        self._begin = 0  # of the segment that it iterates
        self.iterated: int | None = None
        self._noted: list[tuple[int, dict[str, Any]]] = []
        self._indices: IndexPlan | None = None
        self._opened: OpenedIteration | None = (
            None  # an iteration whose first batch has been looked at
        )
        self._asks = False  # whether it is sure to ask for our indices
        self.keeps_iterator = False
        self._left: Iterator[Any] = iter(
            ()
        )  # what is left of an iteration that the next one would go on with
        if not self.stateful and is_map_style(loader):
            self._indices = IndexPlan(loader, seed, shuffle)
            self._copy = replace_sampler(loader, self._indices)
            self._asks = type(loader).__iter__ is DataLoader.__iter__
        self.drop_last = bool(getattr(loader, "drop_last", False))
        self.in_samples = self._indices is not None and self._indices.planned
        self.unit = (
            (self._indices.batch_size or 1)
            if self._indices is not None and self.in_samples
            else 1
        )
        self.batch_sizes = [getattr(loader, "batch_size", None)]
        self.place = (0, 1)
        self._said: set[Any] = set()

    def deal_to(self, first: int, every: int) -> None:
        """Read the batch ``first`` and every ``every``-th after it, as if there were no others."""
        self.place = (first, every)
        self.length, self.estimate = (
            batches if batches == INFINITE else len(range(first, int(batches), every))
            for batches in (exact_length(self.loader), loader_length(self.loader))
        )

    def plan_steps(self) -> None:
        """Several processes plan their steps by the length: they have to leave out what a sampler gives beyond."""
        if self._indices is not None:
            self._indices.plans_steps = not self.alone

    def length_in(self, segment: Segment) -> int | float:
        """Number of batches in a segment of an epoch."""
        if segment == WHOLE_EPOCH:
            return self.length
        if self._indices is None or not self.in_samples:
            return segment.length_of(self.length)
        samples = len(segment.slice(range(self._indices.size or 0)))
        if self._indices.drop_last:
            return samples // self.unit
        return -(-samples // self.unit)

    def last_fraction_in(self, segment: Segment) -> float:
        """Size of a segment's last batch, as a fraction of the others'."""
        if self._indices is None or not self.in_samples or self._indices.drop_last:
            return 1.0
        samples = len(segment.slice(range(self._indices.size or 0)))
        return (samples % self.unit or self.unit) / self.unit

    def iterate(
        self,
        epoch: int,
        start: int = 0,
        step: int = 1,
        segment: Segment = WHOLE_EPOCH,
    ) -> Iterator[Any]:
        """Iterate a segment of epoch ``epoch`` from its batch ``start``, every ``step``-th batch."""
        first, every = self.place
        start, step = first + start * every, step * every
        if (
            self._opened is None or self._opened.epoch != epoch
        ):  # else the epoch has begun
            set_epoch(self.loader, epoch)
        self.find_out(epoch)
        if self._indices is not None:
            # Which batches a part has, its own way of iterating counts from the first one on.
            again = start if self.shards else 0
            self._indices.seek(epoch, start - again, step, segment)
            if iterates_alone(self.loader):
                # A number is drawn when such a one is begun, which may be only when its first batch is asked for.
                self._copy.__dict__["generator"] = self._generator(epoch)
            if self.read_ahead and not self._indices.in_workers:
                batches = self._seeded_by_batch(
                    self._copy, epoch, start - again, step, segment.seeds
                )
            else:
                batches = iterate_protected(self._copy)
            read_again(batches, again)
            if self.length == INFINITE or not iterates_alone(self.loader):
                return batches
            left = len(range(start, int(self.length_in(segment)), step))
            return (
                up_to(self.loader, batches, left, int(self.length), self._said)
                if left
                else iter(())
            )
        start += segment.begin  # what is not planned is read from its first batch on
        left = None if segment.end is None else max(0, segment.end - start)
        if self.stateful:
            self._begin = segment.begin
            batches, start = self._iterate_stateful(epoch, start, step)
        elif isinstance(self.loader, Sequence):
            batches = iter(self.loader)
        else:
            if self.keeps_iterator and start >= step:
                self._require_order(epoch)
            batches = self._iterate_stream(epoch)
            if start >= step:
                log.info(
                    "Resuming inside an epoch of a loader without state: reading %d batches again",
                    start,
                )
                for _ in islice(batches, start):
                    pass
                start = 0
        if self.watch is not None:
            batches = self.watch(batches)
        return islice(batches, start, None if left is None else start + left, step)

    @property
    def alone(self) -> bool:
        """Whether a user's own ``__iter__`` gives a ``DataLoader``'s batches: how many, nobody knows."""
        return isinstance(self.loader, DataLoader) and iterates_alone(self.loader)

    @property
    def is_stream(self) -> bool:
        """Whether it can only be read from its start, by what it does itself."""
        return self._indices is None and not isinstance(self.loader, Sequence)

    def peek(self, epoch: int) -> Any:
        """Look at what tells whether other processes read the same: the first batch of a stream or of a sequence.

        A stream is not read again for it: :meth:`iterate` begins with this batch.

        Returns:
            The batch, or :data:`NO_BATCH` if it has none; of a ``DataLoader`` with a sampler of its own the first
            indices; None where torch's own samplers give all of a dataset's indices.
        """
        set_epoch(self.loader, epoch)
        self.find_out(epoch)
        seed = mix_seeds(self.seed, epoch)
        if self._indices is not None:
            self._indices.seek(epoch)
            if self.alone:
                plan = self._indices.looking()
                try:
                    return OpenedIteration(self._probe(plan), seed, epoch).first
                finally:
                    plan.found.set()
            return (
                None if self._indices.planned else next(self._indices.look(), NO_BATCH)
            )
        if isinstance(self.loader, Sequence):
            return next(iter(self.loader), NO_BATCH)
        if self.stateful and is_map_style(self.loader) and not self.alone:
            with suppress(Exception):  # one that cannot be copied is opened
                dataset = self.loader.dataset
                sampler: Any = copy.deepcopy(
                    self.loader._index_sampler, {id(dataset): dataset}
                )
                return next(isolated_iteration(sampler, seed), NO_BATCH)
        if self._opened is None:
            self._opened = OpenedIteration(self._source(epoch), seed, epoch)
        return self._opened.first

    def opened(self) -> Iterator[Any] | None:
        """The iteration that was begun by :meth:`peek`, for whom it has not been given to."""
        if self._indices is not None and self._indices.kept:
            return chain.from_iterable(map(self.iterate, [*self._indices.kept]))
        opened, self._opened = self._opened, None
        return None if opened is None else opened.iterate(isolated=False)

    def find_out(self, epoch: int) -> None:
        """See whether a ``DataLoader`` that is iterated in a way of its own asks for our indices.

        One that does not, such as one that keeps its iterator for all epochs, is a stream of batches.
        """
        if self._indices is None or self._asks:
            return
        trap = self._indices.looking()
        trap.seek(epoch)
        trap.is_trap = True
        probe = self._probe(trap)
        with suppress(
            SamplerWasAsked, Exception
        ):  # it asks, or cannot be iterated with another sampler
            self._opened = OpenedIteration(probe, mix_seeds(self.seed, epoch), epoch)
        trap.found.set()
        if trap.asked:
            self._asks, self._opened = True, None
            return
        # One that goes on for ever makes its next iterator from what is iterated now: as it was given.
        given = self.loader.__dict__
        probe.__dict__.update(
            {name: given[name] for name in (trap.replaces, "num_workers", "timeout")}
        )
        self._indices, self.keeps_iterator = None, True
        self.in_samples, self.unit = False, 1
        log.info(
            "A loader (%s) iterates in a way of its own and does not ask for its sampler's indices: its batches are "
            "read as a stream, in the order in which it gives them", type(self.loader).__name__,
        )  # fmt: skip

    def _probe(self, indices: IndexPlan) -> DataLoader[Any]:
        """A copy of the loader to be looked at, with other indices; no worker is started for it."""
        probe = replace_sampler(self.loader, indices)
        probe.__dict__.update(num_workers=0, timeout=0)
        return probe

    def _require_order(self, epoch: int) -> None:
        """Refuse to go on inside an epoch whose order a kept iterator does not draw again as it did before."""
        begun = epoch if self._opened is None else self._opened.epoch
        if self.loader.num_workers > 0 or begun != epoch:
            raise CheckpointError(
                f"{type(self.loader).__name__} keeps its iterator from epoch to epoch"
                f"{', and its workers draw the order ahead' if self.loader.num_workers > 0 else ''}: it does not go on "
                "inside an epoch. Resume from a checkpoint of an epoch's end, or give torch's DataLoader with "
                "persistent_workers=True"
            )

    def _source(self, epoch: int) -> Any:
        """What is iterated of a stream: a copy of a ``DataLoader``, unless it is to know how far it has been read."""
        if not isinstance(self.loader, DataLoader) or self.stateful:
            return self.loader
        copied = copy.copy(self.loader)
        copied.__dict__.update(
            generator=self._generator(epoch), _iterator=None
        )  # workers take their seeds from it
        if copied.num_workers > 0:
            protect_workers(copied)
        return copied

    def _generator(self, epoch: int) -> torch.Generator:
        given = getattr(self.loader, "generator", None)
        own = (given.initial_seed(),) if given is not None else ()
        return torch.Generator().manual_seed(mix_seeds(self.seed, epoch, *own))

    def _iterate_stream(self, epoch: int) -> Iterator[Any]:
        """Iterate what can only be read from its start, so that what it draws depends on (seed, epoch) alone."""
        # Workers have generators of their own; what is kept draws its order where it is iterated.
        isolated = not self.stateful and (
            self.keeps_iterator or not getattr(self.loader, "num_workers", 0)
        )
        for _ in self._left:  # so that it begins where all processes do
            pass
        opened, self._opened = self._opened, None
        goes_on = self.keeps_iterator or isinstance(self.loader, Iterator)
        if opened is not None and (opened.epoch == epoch or goes_on):
            batches = opened.iterate(isolated)
        elif isolated:
            batches = isolated_iteration(
                self._source(epoch), mix_seeds(self.seed, epoch)
            )
        elif self.stateful:
            batches = self._source(epoch)  # begun below
        else:
            batches = iterate_protected(self._source(epoch))
        if self.stateful:
            batches = self._seeded_by_batch(batches, epoch)
        if self.keeps_iterator and self.estimate < INFINITE:  # some go on for ever
            batches = self._left = islice(batches, int(self.estimate))
        return batches

    def _seeded_by_batch(
        self,
        source: Iterable[Any],
        epoch: int,
        first: int | None = None,
        step: int = 1,
        part: tuple[int, ...] = (),
    ) -> Iterator[Any]:
        """Iterate ``source`` so that what a batch draws depends on (seed, epoch, its number) alone.

        So it is the same after a resume, though no loader's own state holds random generators, and it is the same in
        all processes that read the same batches. Processes that read different batches draw different numbers.

        Args:
            source: what to iterate.
            epoch: the epoch.
            first: the number of its first batch; None is the number of those that have been read.
            step: by how much the next batch's number is higher.
            part: the segment's own numbers, as its batches are counted from 0.
        """
        in_workers = bool(getattr(self.loader, "num_workers", 0))
        with isolated_rng():
            seed_batch(
                mix_seeds(self.seed, epoch)
            )  # an order is drawn again as at the epoch's begin
            iterator = iterate_protected(source)
            begun = rng_state()

        def batches() -> Iterator[Any]:
            apart = () if self.place[1] > 1 else self.draws_apart
            numbers: Iterator[int] = count(self._read if first is None else first, step)
            if in_workers:  # which draw with generators of their own
                numbers = islice(numbers, 1)
            for number in numbers:
                with isolated_rng():
                    if number or part:
                        seed_batch(mix_seeds(self.seed, epoch, *part, number, *apart))
                    else:
                        set_rng_state(
                            begun
                        )  # some draw an order now, and others when they were begun
                    batch = next(iterator, NO_BATCH)
                if batch is NO_BATCH:
                    return
                yield batch
            yield from iterator

        return batches()

    def _iterate_stateful(
        self, epoch: int, start: int, step: int
    ) -> tuple[Iterator[Any], int]:
        """Iterate a loader with a state of its own; also returns how many batches to leave out at first."""
        saved, self._resumed = self._resumed, None
        read, batches = 0, None
        if saved is None:
            with suppress(Exception):  # which only a save is to tell
                saved = (
                    self.state_dict(done=True) if self._noted else None
                )  # that in which the last one was left
        elif (batches := self._restored(saved, epoch, start, step)) is None:
            saved = None
        elif not saved["left"]:
            read = self._read_until(saved, epoch, start, step)
        if batches is None:
            batches = self._iterate_stream(epoch)
        self._step, self._read, self._ended, self.iterated = step, read, False, epoch
        self._noted = [(read, saved or {"state": None, "batches": 0, "left": False})]
        return self._noting(batches, epoch), start - read

    @staticmethod
    def _read_until(saved: dict[str, Any], epoch: int, start: int, step: int) -> int:
        """How many of the epoch's batches had been read when a state was taken.

        Raises:
            CheckpointError: if those to go on with are among them.
        """
        if "read" not in saved:
            return max(0, start - step + 1) - saved["batches"]
        if saved["epoch"] != epoch and start < step:
            return 0
        if saved["epoch"] != epoch or saved["read"] > start:
            raise CheckpointError(
                "the training loader does not go on inside the epoch: its own state, as it was saved, is ahead of the "
                "training; resume from a checkpoint of an epoch's end"
            )
        return saved["read"]

    def _restored(
        self, saved: dict[str, Any], epoch: int, start: int, step: int
    ) -> Iterator[Any] | None:
        """Iterate the loader from a state; None if it cannot, and an epoch begins.

        Raises:
            CheckpointError: if it cannot, inside an epoch.
        """
        attributes = getattr(self.loader, "__dict__", {})
        unchanged = dict(attributes)
        try:
            if saved["state"] is not None:
                self.loader.load_state_dict(saved["state"])
            inside = start >= step or saved["batches"]
            if (
                inside
                and saved["state"] is not None
                and getattr(self.loader, "num_workers", 0)
            ):
                log.info(
                    "%s has workers, whose random states are not in its state: their order is kept, and what they draw "
                    "at random (augmentation) is drawn anew", type(self.loader).__name__,
                )  # fmt: skip
            if saved["left"]:
                with isolated_rng():
                    iterate_protected(
                        self.loader
                    )  # as a new iteration begins that was, too
            return self._iterate_stream(epoch)
        except Exception as error:
            if start >= step or saved["batches"]:
                raise CheckpointError(
                    f"the training loader does not go on inside the epoch ({type(error).__name__}: {error}): resume "
                    "with the one that the checkpoint was saved with, or from a checkpoint of an epoch's end"
                ) from error
            log.warning(
                "The training loader is not the one that the checkpoint was saved with (%s: %s); the epoch begins as "
                "with a new one", type(error).__name__, error,
            )  # fmt: skip
            attributes.clear()
            attributes.update(unchanged)
            return None

    def _noting(self, batches: Iterator[Any], epoch: int) -> Iterator[Any]:
        first = next(batches, NO_BATCH)
        if (
            first is NO_BATCH and self._noted[0][1]["left"]
        ):  # it went on with the last iteration, and only ended that
            batches = self._iterate_stream(epoch)
        for batch in batches if first is NO_BATCH else chain((first,), batches):
            self._read += 1
            if self._read % _NOTED_EVERY == 0 or len(self._noted) == 1:
                with suppress(Exception):  # which only a save is to tell
                    self._noted = [
                        self._noted[0],
                        self._noted[-1],
                        (self._read, copy.deepcopy(self._now())),
                    ]
            yield batch
        self._ended = True

    def _now(self, left: bool = False) -> dict[str, Any]:
        with workers_protected(
            self.loader
        ):  # asked before it is iterated, it may start them
            state = self.loader.state_dict()
        return {
            "state": state,
            "batches": 0,
            "left": left,
            "read": self._read,
            "epoch": self.iterated,
        }

    def close(self) -> None:
        """End the workers of our copy of the loader, which it may keep from epoch to epoch."""
        self._opened = None
        if self._indices is not None:
            self._copy.__dict__["_iterator"] = None

    def state_dict(
        self, following: int | None = None, done: bool = False
    ) -> dict[str, Any] | None:
        """The loader's own state, for those that keep one (such as torchdata's ``StatefulDataLoader``).

        Args:
            following: the batch of the epoch to go on with, if it is not the next one.
            done: the epoch is, even if the loader would give more batches.
        """
        if not self.stateful or self._resumed is not None:
            return self._resumed
        if self._opened is not None:  # it has given a batch that nobody has got yet
            return {"state": None, "batches": 0, "left": False}
        if not self._noted or following is None or done:
            return self._now(left=done and not self._ended and bool(self._noted))
        earliest = self._noted[0][0]
        wanted = max(earliest, self._begin + following - self._step + 1)
        if wanted == self._read > earliest and not self._ended:
            return self._now()
        read, state = [noted for noted in self._noted if noted[0] <= wanted][-1]
        return {**state, "batches": wanted - read, "read": read, "epoch": self.iterated}

    def load_state_dict(self, state: Any) -> None:
        """Take back :meth:`state_dict`; it is applied by the next :meth:`iterate`."""
        if self.stateful and state is not None:
            ours = (
                isinstance(state, dict)
                and {"state", "batches"} <= state.keys() <= _KEYS
            )
            self._resumed = {
                "batches": 0,
                "left": False,
                **(state if ours else {"state": state}),
            }
            if self._resumed["state"] is not None:
                self._opened = None
