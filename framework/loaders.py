"""Loaders that can be iterated from any batch of any epoch, and combinations of several.

What a user gives is never re-created or patched. A ``torch.utils.data.DataLoader`` over a map-style dataset is
shallow-copied and its index sampler replaced in the copy, so that the order of the data is a pure function of
(seed, epoch, cursor) and a resumed run jumps to its cursor without loading what it skips.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from contextlib import suppress
from itertools import chain, count, islice, pairwise, tee
from typing import Any, TypeGuard

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from .batches import LISTS
from .checkpoint import CheckpointError
from .messages import log
from .seed import isolated_rng, mix_seeds, rng_state, seed_batch, set_rng_state
from .signals import iterate_protected, protect_workers, workers_protected

INFINITE = float("inf")

# A loader's own state is asked for after so many batches, for it may have to be told from which one to go on.
_NOTED_EVERY = 64
NO_BATCH = object()  # a batch that is not there
# What is saved of such a loader: its own state, the batches to read again after it, whether that iteration is then
# left, how many of the epoch's batches had been read when the state was taken, and the epoch. Earlier versions had the
# first two or three.
_KEYS = {"state", "batches", "left", "read", "epoch"}
# What may hold loaders.
_COLLECTIONS = (tuple, *LISTS, ValuesView, Mapping)
# What may be iterated and is a batch or a part of one where it stands in a list.
_NO_LOADERS = (*_COLLECTIONS, str, bytes, set)
# Modules whose samplers and loaders give as many batches as their length tells.
_TORCH = ("torch.", "torchdata.")


def loader_length(loader: Any) -> int | float:
    """Number of batches, as the loader tells it; infinite if it does not."""
    asked = getattr(loader, "_IterableDataset_len_called", None)
    try:
        return len(loader)
    except (TypeError, ValueError, RuntimeError):  # no __len__, or one that cannot tell
        return INFINITE
    finally:
        if isinstance(loader, DataLoader):
            # Once asked, torch warns of each batch beyond the length of a stream.
            loader.__dict__["_IterableDataset_len_called"] = asked


def exact_length(loader: Any, trusts_samplers: bool = True) -> int | float:
    """Number of batches where that is certain; infinite where what the loader tells is an estimate.

    A stream may tell a length, but each of its workers divides its own samples into batches, and rounds for itself. A
    sampler of a user's own, which may fill batches by size, is trusted where several processes plan their steps by it.
    """
    if isinstance(loader, CombinedLoader):
        lengths = [exact_length(part, trusts_samplers) for part in loader.flattened]
        return INFINITE if INFINITE in lengths else combined_length(lengths, loader.mode)
    if isinstance(loader, DataLoader):
        samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        kept = [sampler for sampler in samplers if type(sampler).__module__.startswith(_TORCH)]
        exact = not isinstance(loader.dataset, IterableDataset)
        exact = exact and (trusts_samplers or len(kept) == sum(sampler is not None for sampler in samplers))
    else:
        exact = isinstance(loader, Sequence)
    return loader_length(loader) if exact else INFINITE


def up_to(loader: Any, batches: Iterator[Any], count: int, told: int, said: set[Any]) -> Iterator[Any]:
    """``count`` of a loader's batches; a line says if it has more than the ``told`` ones of its length.

    Args:
        loader: where they come from.
        batches: what gives them.
        count: how many of the ``told`` ones those are.
        told: the loader's length.
        said: of which loaders the line has been given; this one is added.
    """
    yield from islice(batches, count - 1)
    last = next(batches, NO_BATCH)
    if last is NO_BATCH:
        return
    with isolated_rng():  # nobody has asked for this batch: what it draws must change nothing
        beyond = next(batches, NO_BATCH)
    if beyond is not NO_BATCH and id(loader) not in said:
        said.add(id(loader))
        log.warning(
            "A loader (%s) gives more than the %d batches that its length tells, and the others are left out: have its "
            "__len__ tell how many it gives", type(loader).__name__, told,
        )  # fmt: skip
    yield last


def may_give_more(loader: Any) -> bool:
    """Whether a map-style ``DataLoader`` is iterated, or its samples drawn, by a user's own code."""
    if not is_map_style(loader):
        return False
    return iterates_alone(loader) or exact_length(loader, trusts_samplers=False) == INFINITE


def iterates_alone(loader: DataLoader[Any]) -> bool:
    """Whether a ``DataLoader`` has an ``__iter__`` of a user's own, which may give more than its length tells."""
    iterating = next(part for part in type(loader).__mro__ if "__iter__" in part.__dict__)
    return not iterating.__module__.startswith(_TORCH)


class LookAhead:
    """The batches of a loader without a certain length; it tells whether one follows, by reading it.

    Args:
        batches: what to iterate.
        loader: where they come from.

    Attributes:
        share: of the batch given last, as the loader's own ``share`` is of the one read last.
    """

    def __init__(self, batches: Iterable[Any], loader: Any) -> None:
        self._batches, self._loader = iter(batches), loader
        self._following: Any = NO_BATCH
        self._following_share = self.share = 1.0

    def __iter__(self) -> LookAhead:
        return self

    def __next__(self) -> Any:
        batch = self._following
        if batch is NO_BATCH:
            batch = next(self._batches)
            self.share = self._loader.share
        else:
            self._following, self.share = NO_BATCH, self._following_share
        return batch

    @property
    def at_end(self) -> bool:
        """Whether the batch given last is the last one."""
        if self._following is NO_BATCH:
            self._following = next(self._batches, NO_BATCH)
            self._following_share = self._loader.share
        return self._following is NO_BATCH


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
        in_samples: whether :meth:`cut` counts samples: where torch's own samplers are planned. Else it counts batches.
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
            raise TypeError(f"a loader must be iterable, such as a DataLoader or a list; got {loader!r}")
        self.loader: Any = loader
        self.seed = seed
        self.length = exact_length(loader)
        self.estimate = loader_length(loader)
        self.stateful = has_state(loader)
        self._resumed: dict[str, Any] | None = None
        # Of the last iteration, of a loader with a state of its own: the step, the epoch's batches that have been read,
        # whether it has ended, and its first state and two others, with the batches read until then.
        self._step, self._read, self._ended = 1, 0, False
        self._begin = 0  # of the part of the epoch that it iterates
        self.iterated: int | None = None
        self._noted: list[tuple[int, dict[str, Any]]] = []
        self._indices: IndexPlan | None = None
        self._opened: _Opened | None = None  # an iteration whose first batch has been looked at
        self._asks = False  # whether it is sure to ask for our indices
        self.keeps_iterator = False
        self._left: Iterator[Any] = iter(())  # what is left of an iteration that the next one would go on with
        if not self.stateful and is_map_style(loader):
            self._indices = IndexPlan(loader, seed, shuffle)
            self._copy = _replace_sampler(loader, self._indices)
            self._asks = type(loader).__iter__ is DataLoader.__iter__
        self.drop_last = bool(getattr(loader, "drop_last", False))
        self.in_samples = self._indices is not None and self._indices.planned
        self.unit = (self._indices.batch_size or 1) if self._indices is not None and self.in_samples else 1
        self.batch_sizes = [getattr(loader, "batch_size", None)]
        self._cut: tuple[int, int, int | None] | None = None
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

    def cut(self, epoch: int, begin: int, end: int | None) -> None:
        """In one epoch, leave out what lies before ``begin`` and from ``end`` on; its batches are counted from there.

        So it can be completed after a change of the number of processes, or of the batch size. Both are numbers of
        samples, or of batches where :attr:`unit` is 1.
        """
        self._cut = epoch, begin, end

    def _part(self, epoch: int) -> tuple[int, int | None]:
        return self._cut[1:] if self._cut is not None and self._cut[0] == epoch else (0, None)

    def length_in(self, epoch: int) -> int | float:
        """Number of batches in an epoch."""
        begin, end = self._part(epoch)
        if begin == 0 and end is None:
            return self.length
        if self._indices is None or not self.in_samples:
            return max(0, (self.length if end is None else min(end, self.length)) - begin)
        samples = len(range(self._indices.size or 0)[begin:end])
        return samples // self.unit if self._indices.drop_last else -(-samples // self.unit)

    def last_fraction_in(self, epoch: int) -> float:
        """Size of an epoch's last batch, as a fraction of the others'."""
        if self._indices is None or not self.in_samples or self._indices.drop_last:
            return 1.0
        begin, end = self._part(epoch)
        samples = len(range(self._indices.size or 0)[begin:end])
        return (samples % self.unit or self.unit) / self.unit

    def iterate(self, epoch: int, start: int = 0, step: int = 1) -> Iterator[Any]:
        """Iterate epoch ``epoch`` from batch ``start``, every ``step``-th batch."""
        first, every = self.place
        start, step = first + start * every, step * every
        if self._opened is None or self._opened.epoch != epoch:  # else the epoch has begun
            set_epoch(self.loader, epoch)
        self.find_out(epoch)
        begin, end = self._part(epoch)
        if self._indices is not None:
            # Which batches a part has, its own way of iterating counts from the first one on.
            again = start if self.shards else 0
            self._indices.place(epoch, start - again, step, begin, end)
            if iterates_alone(self.loader):
                # A number is drawn when such a one is begun, which may be only when its first batch is asked for.
                self._copy.__dict__["generator"] = self._generator(epoch)
            if self.read_ahead and not self._indices.in_workers:
                part = (begin,) if begin else ()
                batches = self._seeded_by_batch(self._copy, epoch, start - again, step, part)
            else:
                batches = iterate_protected(self._copy)
            _read_again(batches, again)
            if self.length == INFINITE or not iterates_alone(self.loader):
                return batches
            left = len(range(start, int(self.length_in(epoch)), step))
            return up_to(self.loader, batches, left, int(self.length), self._said) if left else iter(())
        start += begin  # what is not planned is read from its first batch on
        left = None if end is None else max(0, end - start)
        if self.stateful:
            self._begin = begin
            batches, start = self._iterate_stateful(epoch, start, step)
        elif isinstance(self.loader, Sequence):
            batches = iter(self.loader)
        else:
            if self.keeps_iterator and start >= step:
                self._require_order(epoch)
            batches = self._iterate_stream(epoch)
            if start >= step:
                log.info("Resuming inside an epoch of a loader without state: reading %d batches again", start)
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
            self._indices.place(epoch, 0, 1, 0, None)
            if self.alone:
                plan = self._indices.looking()
                try:
                    return _Opened(self._probe(plan), seed, epoch).first
                finally:
                    plan.found.set()
            return None if self._indices.planned else next(self._indices.look(), NO_BATCH)
        if isinstance(self.loader, Sequence):
            return next(iter(self.loader), NO_BATCH)
        if self.stateful and is_map_style(self.loader) and not self.alone:
            with suppress(Exception):  # one that cannot be copied is opened
                dataset = self.loader.dataset
                sampler: Any = copy.deepcopy(self.loader._index_sampler, {id(dataset): dataset})
                return next(_isolated(sampler, seed), NO_BATCH)
        if self._opened is None:
            self._opened = _Opened(self._source(epoch), seed, epoch)
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
        trap.place(epoch, 0, 1, 0, None)
        trap.is_trap = True
        probe = self._probe(trap)
        with suppress(_Asked, Exception):  # it asks, or cannot be iterated with another sampler
            self._opened = _Opened(probe, mix_seeds(self.seed, epoch), epoch)
        trap.found.set()
        if trap.asked:
            self._asks, self._opened = True, None
            return
        # One that goes on for ever makes its next iterator from what is iterated now: as it was given.
        given = self.loader.__dict__
        probe.__dict__.update({name: given[name] for name in (trap.replaces, "num_workers", "timeout")})
        self._indices, self.keeps_iterator = None, True
        self.in_samples, self.unit = False, 1
        log.info(
            "A loader (%s) iterates in a way of its own and does not ask for its sampler's indices: its batches are "
            "read as a stream, in the order in which it gives them", type(self.loader).__name__,
        )  # fmt: skip

    def _probe(self, indices: IndexPlan) -> DataLoader[Any]:
        """A copy of the loader to be looked at, with other indices; no worker is started for it."""
        probe = _replace_sampler(self.loader, indices)
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
        copied.__dict__.update(generator=self._generator(epoch), _iterator=None)  # workers take their seeds from it
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
        isolated = not self.stateful and (self.keeps_iterator or not getattr(self.loader, "num_workers", 0))
        for _ in self._left:  # so that it begins where all processes do
            pass
        opened, self._opened = self._opened, None
        goes_on = self.keeps_iterator or isinstance(self.loader, Iterator)
        if opened is not None and (opened.epoch == epoch or goes_on):
            batches = opened.iterate(isolated)
        elif isolated:
            batches = _isolated(self._source(epoch), mix_seeds(self.seed, epoch))
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
        self, source: Iterable[Any], epoch: int, first: int | None = None, step: int = 1, part: tuple[int, ...] = ()
    ) -> Iterator[Any]:
        """Iterate ``source`` so that what a batch draws depends on (seed, epoch, its number) alone.

        So it is the same after a resume, though no loader's own state holds random generators, and it is the same in
        all processes that read the same batches. Processes that read different batches draw different numbers.

        Args:
            source: what to iterate.
            epoch: the epoch.
            first: the number of its first batch; None is the number of those that have been read.
            step: by how much the next batch's number is higher.
            part: where the part of the epoch begins whose batches are counted, if it is not all of it.
        """
        in_workers = bool(getattr(self.loader, "num_workers", 0))
        with isolated_rng():
            seed_batch(mix_seeds(self.seed, epoch))  # an order is drawn again as at the epoch's begin
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
                        set_rng_state(begun)  # some draw an order now, and others when they were begun
                    batch = next(iterator, NO_BATCH)
                if batch is NO_BATCH:
                    return
                yield batch
            yield from iterator

        return batches()

    def _iterate_stateful(self, epoch: int, start: int, step: int) -> tuple[Iterator[Any], int]:
        """Iterate a loader with a state of its own; also returns how many batches to leave out at first."""
        saved, self._resumed = self._resumed, None
        read, batches = 0, None
        if saved is None:
            with suppress(Exception):  # which only a save is to tell
                saved = self.state_dict(done=True) if self._noted else None  # that in which the last one was left
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

    def _restored(self, saved: dict[str, Any], epoch: int, start: int, step: int) -> Iterator[Any] | None:
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
            if inside and saved["state"] is not None and getattr(self.loader, "num_workers", 0):
                log.info(
                    "%s has workers, whose random states are not in its state: their order is kept, and what they draw "
                    "at random (augmentation) is drawn anew", type(self.loader).__name__,
                )  # fmt: skip
            if saved["left"]:
                with isolated_rng():
                    iterate_protected(self.loader)  # as a new iteration begins that was, too
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
        if first is NO_BATCH and self._noted[0][1]["left"]:  # it went on with the last iteration, and only ended that
            batches = self._iterate_stream(epoch)
        for batch in batches if first is NO_BATCH else chain((first,), batches):
            self._read += 1
            if self._read % _NOTED_EVERY == 0 or len(self._noted) == 1:
                with suppress(Exception):  # which only a save is to tell
                    self._noted = [self._noted[0], self._noted[-1], (self._read, copy.deepcopy(self._now()))]
            yield batch
        self._ended = True

    def _now(self, left: bool = False) -> dict[str, Any]:
        with workers_protected(self.loader):  # asked before it is iterated, it may start them
            state = self.loader.state_dict()
        return {"state": state, "batches": 0, "left": left, "read": self._read, "epoch": self.iterated}

    def close(self) -> None:
        """End the workers of our copy of the loader, which it may keep from epoch to epoch."""
        self._opened = None
        if self._indices is not None:
            self._copy.__dict__["_iterator"] = None

    def state_dict(self, following: int | None = None, done: bool = False) -> dict[str, Any] | None:
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
            ours = isinstance(state, dict) and {"state", "batches"} <= state.keys() <= _KEYS
            self._resumed = {"batches": 0, "left": False, **(state if ours else {"state": state})}
            if self._resumed["state"] is not None:
                self._opened = None


class IndexPlan:
    """The batches of indices of a map-style loader, for any epoch from any batch; stands in for its sampler.

    torch's own sequential and random samplers are planned anew from the seed; any other sampler is kept, and moved
    forward without loading.
    """

    looker: int | None = None  # the thread that has a look at what a loader makes of the indices, if it is one
    found: threading.Event  # set when it has got a batch, or none
    is_trap = False  # whether it is told, by an exception, when it asks for the indices
    asked = False  # whether any thread has
    plans_steps = False  # whether several processes count on the length that the sampler tells

    def __init__(self, loader: DataLoader[Any], seed: int, shuffle: bool) -> None:
        self._seed = seed
        # By epoch, what has been drawn of the user's own sampler for a look; copies share it.
        self.kept: dict[int, Iterator[Any]] = {}
        self.in_workers = loader.num_workers > 0
        self.batched = loader.batch_sampler is not None
        self.replaces = "batch_sampler" if self.batched else "sampler"
        self.sampler: Any = getattr(loader, self.replaces)
        length = loader_length(self.sampler)
        self.length = int(length) if length != INFINITE else None
        self.batch_size: int | None = None
        self.drop_last = False
        inner: Any = self.sampler
        if self.batched and type(inner) is BatchSampler:
            self.batch_size, self.drop_last = inner.batch_size, inner.drop_last
            inner = inner.sampler
        self.random = inner if shuffle and type(inner) is RandomSampler else None
        self.size = len(inner) if type(inner) in (RandomSampler, SequentialSampler) else None
        self.planned = self.size is not None and (self.batch_size is not None or not self.batched)
        self.place(0, 0, 1, 0, None)
        samplers = (self.sampler, getattr(self.sampler, "sampler", None))
        generators = [getattr(sampler, "generator", None) for sampler in samplers]
        self.generators = [(g, g.initial_seed()) for g in generators if isinstance(g, torch.Generator)]

    def place(self, epoch: int, start: int, step: int, begin: int, end: int | None) -> None:
        """Set the part of the epoch to iterate next, the batch to begin with, and every how many batches to give one.

        The part is counted in samples where the order is planned, else in batches.
        """
        self.epoch, self.start, self.step, self.begin, self.end = epoch, start, step, begin, end
        self.seed = self._seed
        if self.random is not None and self.random.generator is not None:
            self.seed = mix_seeds(self._seed, self.random.generator.initial_seed())

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the sampler has no length")
        return self.length

    def __iter__(self) -> Iterator[Any]:
        self.asked = True
        if self.is_trap and threading.get_ident() == self.looker:
            raise _Asked
        batches = self._planned() if self.planned else self._replayed()
        if self.looker is not None:
            return self._until_found(batches)
        if not self.in_workers:
            return batches
        return self._seeded(batches)

    def _planned(self) -> Iterator[Any]:
        order = self._order()
        if self.begin or self.end is not None:
            order = order[self.begin : self.end]
        if not self.batched:
            yield from order[self.start :: self.step]
            return
        size = self.batch_size
        assert size is not None
        if self.step > 1:
            firsts = range(self.start * size, len(order), self.step * size)
            indices = iter([index for first in firsts for index in order[first : first + size]])
        else:
            indices = iter(order[self.start * size :])
        while batch := [*islice(indices, size)]:
            if self.drop_last and len(batch) < size:
                return
            yield batch

    def _order(self) -> Sequence[int]:
        """The epoch's sample indices."""
        assert self.size is not None
        if self.random is None:
            return range(self.size)
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        population = len(self.random.data_source)
        if population == 0:
            raise ValueError("the training loader is empty: its sampler draws from a dataset without samples")
        if self.random.replacement:
            return torch.randint(population, (self.size,), generator=generator).tolist()
        order: list[int] = []
        while len(order) < self.size:
            order += torch.randperm(population, generator=generator).tolist()
        return order[: self.size]

    def _replayed(self) -> Iterator[Any]:
        """The user's own sampler, drawing from (seed, epoch) alone, moved to the start."""
        drawn = self._drawn() if self.looker is None else self.look()
        if self.plans_steps and self.length is not None:
            drawn = self._noting_more(drawn, self.length)
        return islice(drawn, self.begin + self.start, self.end, self.step)

    def _noting_more(self, drawn: Iterator[Any], told: int) -> Iterator[Any]:
        """The same indices, as many as the length tells; a line says once that there are more."""
        planned = list(islice(drawn, told))
        if next(drawn, NO_BATCH) is not NO_BATCH:
            self.plans_steps = False
            log.warning(
                "A loader's sampler (%s) gives more than the %d batches that its length tells. Several processes plan "
                "their steps by the length, and leave the others out: have its __len__ tell how many it gives",
                type(getattr(self.sampler, "sampler", self.sampler)).__name__, told,
            )  # fmt: skip
        return iter(planned)

    def _drawn(self) -> Iterator[Any]:
        if self.epoch in self.kept:
            return self.kept.pop(self.epoch)
        set_epoch(self.sampler, self.epoch)
        for generator, seed in self.generators:
            generator.manual_seed(mix_seeds(seed, self.epoch))
        return _isolated(self.sampler, mix_seeds(self.seed, self.epoch), at_once=self.length)

    def look(self) -> Iterator[Any]:
        """What the user's own sampler gives in this epoch; it may be drawn once only, and is kept for the iteration."""
        drawn, self.kept[self.epoch] = tee(self._drawn())
        return drawn

    def looking(self) -> IndexPlan:
        """A copy for a look at what a loader makes of the indices, without workers."""
        plan = copy.copy(self)
        plan.looker, plan.found, plan.in_workers = threading.get_ident(), threading.Event(), False
        return plan

    def _until_found(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same; to a thread of the loader's only until that has given a batch, so that the thread ends."""
        for batch in batches:
            yield batch
            # It may have to read more than one before the loader gives one.
            if threading.get_ident() != self.looker and self.found.wait(1):
                return

    def _seeded(self, batches: Iterator[Any]) -> Iterator[Any]:
        part = (self.begin,) if self.begin else ()
        for place, indices in enumerate(batches):
            yield _SeededIndices(indices, mix_seeds(self.seed, self.epoch, *part, self.start + place * self.step))


class _SeededIndices:
    """Indices on their way to a worker: unpickling them there seeds its generators and gives the plain indices.

    So a batch's random augmentation depends on (seed, epoch, cursor) alone, whatever worker makes it, and neither the
    dataset nor the worker function is touched.
    """

    def __init__(self, indices: Any, seed: int) -> None:
        self.indices = indices
        self.seed = seed

    def __reduce__(self) -> tuple[Any, ...]:
        return _seed_and_unwrap, (self.indices, self.seed)


def _seed_and_unwrap(indices: Any, seed: int) -> Any:
    seed_batch(seed)
    return indices


def _read_again(batches: Iterator[Any], count: int) -> None:
    """Read batches that have been read before: what they draw was drawn then."""
    if count:
        with isolated_rng():
            for _ in islice(batches, count):
                pass


def _isolated(source: Iterable[Any], seed: int, at_once: int | None = None) -> Iterator[Any]:
    """Iterate ``source`` with random generators of its own, whose numbers depend on ``seed`` alone.

    To swap all generators' states costs about 0.1 ms; ``at_once`` reads so many at the first item, with one swap.
    """
    outside = rng_state()
    seed_batch(seed)
    try:
        iterator = iterate_protected(source)
        first = [] if at_once is None else list(islice(iterator, at_once + 1))  # one more shows that it has ended
        inside = rng_state()
    finally:
        set_rng_state(outside)
    yield from first
    if at_once is None or len(first) > at_once:
        yield from _with_generators(iterator, inside)


def _with_generators(iterator: Iterator[Any], inside: dict[str, Any]) -> Iterator[Any]:
    """Go on with random generators of its own."""
    while True:
        outside = rng_state()
        set_rng_state(inside)
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            inside = rng_state()
            set_rng_state(outside)
        yield item


class _Opened:
    """An iteration whose first batch has been read, with random generators of its own until then."""

    def __init__(self, source: Iterable[Any], seed: int, epoch: int) -> None:
        self.epoch = epoch
        outside = rng_state()
        seed_batch(seed)
        try:
            self.batches = iterate_protected(source)
            self.first = next(self.batches, NO_BATCH)
            self.inside = rng_state()
        finally:
            set_rng_state(outside)

    def iterate(self, isolated: bool) -> Iterator[Any]:
        """All of it, with these generators or with those of the process."""
        following = _with_generators(self.batches, self.inside) if isolated else self.batches
        return iter(()) if self.first is NO_BATCH else chain((self.first,), following)


class _Asked(BaseException):
    """A loader has asked for its sampler's indices; no loader's own ``except Exception`` hides it."""


def is_map_style(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether it is a ``DataLoader`` over a dataset with ``__getitem__``."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _replace_sampler(loader: DataLoader[Any], indices: IndexPlan) -> DataLoader[Any]:
    """A shallow copy with another index sampler."""
    changed = copy.copy(loader)  # past __setattr__, which refuses a new sampler after construction
    changed.__dict__.update({indices.replaces: indices, "_iterator": None})
    protect_workers(changed)
    if loader.persistent_workers:
        # Their seeds are drawn once in a process, from torch's generator if the loader has none: with one of its own
        # it makes no difference whether a process begins with the first epoch or with a later one.
        changed.__dict__["generator"] = torch.Generator().manual_seed(indices.seed)
    return changed


def own_copy(loader: Any) -> Any:
    """``loader``, or a shallow copy of it that starts workers of its own."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return loader
    copied = copy.copy(loader)
    copied.__dict__["_iterator"] = None
    protect_workers(copied)
    return copied


def has_state(loader: Any) -> bool:
    """Whether a loader keeps a state of its own, to be saved and given back."""
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def set_epoch(obj: Any, epoch: int) -> None:
    """Tell ``obj``, its dataset and its samplers the epoch, where they want to know (``set_epoch``)."""
    for part in (obj, getattr(obj, "dataset", None), getattr(obj, "sampler", None)):
        if callable(method := getattr(part, "set_epoch", None)):
            method(epoch)


def is_loader(item: Any) -> bool:
    """Whether ``item`` gives batches: a ``DataLoader``, or what has a dataset as torchdata's and PyG's loaders have."""
    return isinstance(item, CombinedLoader) or (hasattr(item, "__iter__") and hasattr(item, "dataset"))


def is_other_stream(item: Any) -> bool:
    """Whether ``item`` is for reading batches, though :func:`is_loader` does not know it; False if that is not sure."""
    if isinstance(item, IterableDataset):  # as webdataset's loader
        return True
    # Python's own iterators may give parameters; what has items may be a configuration.
    is_plain = type(item).__module__ in ("builtins", "itertools", "_io") or hasattr(item, "__getitem__")
    return hasattr(item, "__iter__") and not is_plain and (hasattr(item, "__next__") or has_state(item))


def holds_loaders(item: Any) -> bool:
    """Whether a list, tuple or mapping is a collection of loaders, rather than a loader: a list of batches."""
    if _holds_known_loaders(item):
        return True
    items = _items_of(item) if isinstance(item, _COLLECTIONS) else []
    return all(map(_may_be_loader, items)) and any(not isinstance(part, _NO_LOADERS) for part in items)


def _may_be_loader(item: Any) -> bool:
    # A tensor, a text, or graphs; a loader may move its batches by a ``to`` of its own, but has no items.
    is_batch = hasattr(item, "shape") or isinstance(item, (str, bytes))
    is_batch = is_batch or (hasattr(item, "to") and hasattr(item, "__getitem__"))
    return hasattr(item, "__iter__") and not is_batch


def _holds_known_loaders(item: Any) -> bool:
    """Whether there is what surely is a loader somewhere in a collection; batches may hold other iterables."""
    if not isinstance(item, _COLLECTIONS):
        return False
    return any(is_loader(part) or _holds_known_loaders(part) for part in _items_of(item))


def loaders_in(collection: Any) -> list[Any]:
    """The loaders of a list, tuple or mapping, those in collections inside too.

    Raises:
        TypeError: for what is neither.
    """
    loaders = []
    for item in _items_of(collection):
        if not _may_be_loader(item):
            raise TypeError(f"a collection of loaders must hold nothing else; got {item!r} in {collection!r}")
        loaders += loaders_in(item) if _nests(item) else [item]
    return loaders


def _nests(item: Any) -> bool:
    """Whether an item of a collection of loaders is one in turn: no mapping is a loader."""
    return isinstance(item, Mapping) or holds_loaders(item)


def _items_of(collection: Any) -> list[Any]:
    return list(collection.values() if isinstance(collection, Mapping) else collection)


class _Places:
    """Where the loaders of a collection are, so that their batches can be put there."""

    def __init__(self, collection: Any) -> None:
        self.inside = [_Places(item) if _nests(item) else None for item in _items_of(collection)]
        self.keys = list(collection.keys()) if isinstance(collection, Mapping) else None
        self.make = getattr(collection, "_make", tuple if isinstance(collection, tuple) else list)

    def fill(self, batches: Iterator[Any]) -> Any:
        """A collection of the same kind with batches in it."""
        filled = [next(batches) if places is None else places.fill(batches) for places in self.inside]
        return self.make(filled) if self.keys is None else dict(zip(self.keys, filled, strict=True))


class CombinedLoader:
    """Several loaders read together.

    Args:
        iterables: a list, tuple or mapping of loaders, or of such collections of them.
        mode: ``"min_size"`` ends with the shortest; ``"max_size_cycle"`` ends with the longest and begins the others
            again; ``"max_size"`` ends with the longest and gives None for the others; ``"sequential"`` reads one
            after the other. A batch has the loaders' batches in their places, mappings as dicts; with
            ``"sequential"``, it is one of them.

    Attributes:
        flattened: the loaders as a list, those in collections inside too.

    Raises:
        ValueError: for another mode, or no loader.
        TypeError: for a loader among things that are none.
    """

    MODES = ("min_size", "max_size_cycle", "max_size", "sequential")

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in self.MODES:
            raise ValueError(f"mode must be one of {', '.join(self.MODES)}; got {mode!r}")
        if not isinstance(iterables, _COLLECTIONS) or not iterables:
            raise ValueError(f"iterables must be a list, tuple or mapping with at least one loader; got {iterables!r}")
        self.iterables = iterables
        self.mode = mode
        self.flattened = loaders_in(iterables)
        if not self.flattened:
            raise ValueError(f"iterables must hold at least one loader; got {iterables!r}")
        self._places = _Places(iterables)

    def in_places(self, batches: Iterable[Any]) -> Any:
        """A batch of each loader, in the order of :attr:`flattened`, in the loaders' places."""
        return self._places.fill(iter(batches))

    def __len__(self) -> int:
        length = combined_length([loader_length(loader) for loader in self.flattened], self.mode)
        if length == INFINITE:
            raise TypeError("a loader has no length")
        return int(length)

    def __iter__(self) -> Iterator[Any]:
        return CombinedEpochLoader(self, [_Again(loader) for loader in self.flattened]).iterate(0)


class _Again:
    """A loader as it is, behind the calls of :class:`EpochLoader`."""

    stateful = False

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.length = exact_length(loader)

    def iterate(self, epoch: int, start: int = 0, step: int = 1) -> Iterator[Any]:
        return islice(iter(self.loader), start, None, step)


def combined_length(lengths: list[int | float], mode: str) -> int | float:
    """Number of batches of several loaders read together."""
    return {"min_size": min, "sequential": sum}.get(mode, max)(lengths)


def _round_of(batch: int, length: int | float) -> tuple[int, int]:
    """In which round of a loader that begins again a batch is, and its number there."""
    if length in (0, INFINITE):
        return 0, batch
    round_, place = divmod(batch, int(length))
    if place == 0 and round_ > 0:
        # The round before is over, but its end is only seen by the next read.
        return round_ - 1, int(length)
    return round_, place


def _epoch_of(epoch: int, round_: int) -> int:
    # Further rounds need orders of their own; no training has this many epochs.
    return epoch + round_ * 1_000_000_007


def _round_length(loader: Any) -> int | float:
    """Batches until a loader begins again; one with a state of its own cannot be read again to count them."""
    return loader.estimate if loader.stateful else loader.length


class CombinedEpochLoader:
    """The loaders of a :class:`CombinedLoader`, iterated epoch by epoch as one :class:`EpochLoader` is."""

    share = 1.0
    in_samples = stateful = keeps_iterator = alone = False
    unit = 1

    def __init__(self, combined: CombinedLoader, loaders: Sequence[Any]) -> None:
        self.loader = combined
        self.loaders = loaders
        self.length = exact_length(combined)
        self.estimate = combined_length([loader_length(loader) for loader in combined.flattened], combined.mode)
        self.drop_last = any(getattr(loader, "drop_last", False) for loader in loaders)
        self.batch_sizes = [size for loader in loaders for size in getattr(loader, "batch_sizes", ())]
        self._cut: tuple[int, int, int | None] | None = None
        self._epoch = self._begin = 0  # the epoch that is iterated, and where the part of it begins

    @property
    def resumable(self) -> bool:
        """Whether it can go on inside an epoch: what each loader with a state of its own gives when is known."""
        if self.loader.mode == "min_size" or not any(loader.stateful for loader in self.loaders):
            return True
        if self.loader.mode != "max_size_cycle" or any(loader.read_ahead for loader in self.loaders):
            return False
        return all(_round_length(loader) < INFINITE for loader in self.loaders)

    def cut(self, epoch: int, begin: int, end: int | None) -> None:
        """As :meth:`EpochLoader.cut`, in batches."""
        self._cut = epoch, begin, end

    def _part(self, epoch: int) -> tuple[int, int | None]:
        return self._cut[1:] if self._cut is not None and self._cut[0] == epoch else (0, None)

    def deal_to(self, places: Sequence[tuple[int, int]]) -> None:
        """As :meth:`EpochLoader.deal_to`, for each of the loaders."""
        for loader, place in zip(self.loaders, places, strict=True):
            loader.deal_to(*place)
        lengths = [loader.length for loader in self.loaders]
        self.length = INFINITE if INFINITE in lengths else combined_length(lengths, self.loader.mode)
        self.estimate = combined_length([loader.estimate for loader in self.loaders], self.loader.mode)

    def opened(self) -> None:
        """None: what has been looked at is read again."""
        for loader in self.loaders:
            loader.opened()

    def length_in(self, epoch: int) -> int | float:
        """Number of batches in an epoch."""
        begin, end = self._part(epoch)
        return max(0, (self.length if end is None else min(end, self.length)) - begin)

    def last_fraction_in(self, epoch: int) -> float:
        """Size of an epoch's last batch, as a fraction of the others'."""
        return 1.0

    def iterate(self, epoch: int, start: int = 0, step: int = 1) -> Iterator[Any]:
        """Iterate as :meth:`EpochLoader.iterate`. What this draws at random, it draws before it returns."""
        begin, end = self._part(epoch)
        self._epoch, self._begin = epoch, begin
        batches = self._iterate(epoch, begin + start, step)
        return islice(batches, None if end is None else len(range(begin + start, end, step)))

    def _iterate(self, epoch: int, start: int, step: int) -> Iterator[Any]:
        counts = self.loader.mode in ("max_size_cycle", "sequential")  # which loader gives which batch
        if counts and (start or step > 1) and any(_round_length(loader) == INFINITE for loader in self.loaders):
            if start >= step:
                log.info("Resuming inside an epoch of loaders without length: reading %d batches again", start)
            batches = self._iterate(epoch, 0, 1)
            _read_again(batches, start)
            return islice(batches, 0, None, step)
        if self.loader.mode == "sequential":
            return self._sequential(list(self.loaders), epoch, start, step)
        cycle = self.loader.mode == "max_size_cycle"
        return self._together([_Stream(loader, epoch, start, step, cycle) for loader in self.loaders])

    def _together(self, streams: list[_Stream]) -> Iterator[Any]:
        shortest = self.loader.mode == "min_size"
        while True:
            batch = []
            for stream in streams:
                batch.append(stream.next())
                if shortest and stream.ended:
                    return
            if all(stream.ended for stream in streams):
                return
            for place, stream in enumerate(streams):
                while batch[place] is NO_BATCH:
                    batch[place] = stream.next()
            yield self.loader.in_places(batch)

    @staticmethod
    def _sequential(rest: list[Any], epoch: int, start: int, step: int) -> Iterator[Any]:
        while len(rest) > 1 and start >= _round_length(rest[0]):  # never where the length is not known
            start -= int(_round_length(rest.pop(0)))
        first = rest[0].iterate(epoch, start, step)

        def batches() -> Iterator[Any]:
            nonlocal start
            yield from first
            for before, loader in pairwise(rest):
                # Where every step-th batch goes on in the next loader; each batch does at its beginning.
                start = 0 if step == 1 else (start - int(_round_length(before))) % step
                yield from loader.iterate(epoch, start, step)

        return batches()

    def close(self) -> None:
        """End the workers of the loaders' copies."""
        for loader in self.loaders:
            loader.close()

    def state_dict(self, following: int | None = None, done: bool = False) -> list[Any]:
        """The loaders' states, to go on with batch ``following``, as far as each loader tells."""
        if following is None or not self.resumable:
            return [loader.state_dict(done=done) for loader in self.loaders]
        states = []
        for loader in self.loaders:
            first, every = loader.place
            place = first + (self._begin + following) * every
            if self.loader.mode == "max_size_cycle" and loader.stateful:
                round_, place = _round_of(place, _round_length(loader))
                if loader.iterated != _epoch_of(self._epoch, round_):
                    place = None  # it has begun the next round: its state is ahead, which a resume finds
            states.append(loader.state_dict(place, done))
        return states

    def load_state_dict(self, state: Any) -> None:
        """Take back :meth:`state_dict`."""
        for loader, own in zip(self.loaders, state if isinstance(state, list) else (), strict=False):
            loader.load_state_dict(own)


def by_epochs(loader: Any, seed: int, shuffle: bool = True) -> EpochLoader | CombinedEpochLoader:
    """A user's loader, or the loaders of a :class:`CombinedLoader`, to be iterated epoch by epoch."""
    if not isinstance(loader, CombinedLoader):
        return EpochLoader(loader, seed, shuffle)
    parts = [EpochLoader(part, seed + i, shuffle) for i, part in enumerate(loader.flattened)]
    return CombinedEpochLoader(loader, parts)


class _Stream:
    """One loader among several: begun again as often as needed, each time in another order."""

    def __init__(self, loader: Any, epoch: int, start: int, step: int, cycle: bool) -> None:
        self.loader, self.epoch, self.step, self.cycle = loader, epoch, step, cycle
        self.ended = False  # whether it has been read to its end at least once
        self.round = 0
        length = _round_length(loader)
        if cycle and start and length not in (0, INFINITE):
            self.round, start = _round_of(start, length)
            self.ended = self.round > 0
        self.position = start  # of the next batch in its round
        self.iterator: Any = loader.iterate(_epoch_of(epoch, self.round), start, step)

    def next(self) -> Any:
        """The next batch, or None when there is no more.

        At the end of a round it is NO_BATCH, and the call after that begins the next one: where all loaders have ended,
        there is none, and what goes on where it was left loses no batch to it.
        """
        if self.iterator is None:
            self.iterator = self.loader.iterate(_epoch_of(self.epoch, self.round), self.position, self.step)
        try:
            batch = next(self.iterator)
        except StopIteration:
            self.ended = True
            if not self.cycle:
                return None
            if self.position == 0:
                raise RuntimeError(f"a loader gave no batch when it was begun: {self.loader.loader!r}") from None
            self.position = 0 if self.step == 1 else max(0, self.position - int(_round_length(self.loader)))
            self.round += 1
            self.iterator = None
            return NO_BATCH
        self.position += self.step
        return batch
