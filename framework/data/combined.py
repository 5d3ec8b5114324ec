"""Several loaders that are read together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, ValuesView
from itertools import islice, pairwise
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ..errors import CheckpointError
from ..messages import log
from .batches import LISTS
from .iteration import (
    INFINITE,
    NO_BATCH,
    exact_length,
    has_own_iteration,
    has_state,
    loader_length,
    read_again,
)
from .position import WHOLE_EPOCH, Segment
from .sources import BatchSource, single_source

# What may hold loaders.
_COLLECTIONS = (tuple, *LISTS, ValuesView, Mapping)
# What may be iterated, and is rather a batch, or a part of one, than a loader if a list holds it.
_NO_LOADERS = (*_COLLECTIONS, str, bytes, set)


def is_loader(item: Any) -> bool:
    """Whether ``item`` gives batches: a ``DataLoader``, or what has a dataset as torchdata's and PyG's loaders have."""
    return isinstance(item, CombinedLoader) or (
        hasattr(item, "__iter__") and hasattr(item, "dataset")
    )


def is_other_stream(item: Any) -> bool:
    """Whether ``item`` is for reading batches, though :func:`is_loader` does not know it; False if that is not sure."""
    # As webdataset's loader is.
    if isinstance(item, IterableDataset):
        return True
    # Python's own iterators may give a model's parameters; what has items may be a configuration.
    is_plain = type(item).__module__ in ("builtins", "itertools", "_io") or hasattr(
        item, "__getitem__"
    )
    return (
        hasattr(item, "__iter__")
        and not is_plain
        and (hasattr(item, "__next__") or has_state(item))
    )


def may_read_ahead(loader: Any) -> bool:
    """Whether batches are there already, or are made by other processes: to read one early changes nothing then."""
    if isinstance(loader, CombinedLoader):
        return all(map(may_read_ahead, loader.flattened))
    if type(loader) in (list, tuple):
        return True
    in_workers = isinstance(loader, DataLoader) and loader.num_workers > 0
    return in_workers and not has_state(loader) and not has_own_iteration(loader)


def holds_loaders(item: Any) -> bool:
    """Whether a list, tuple or mapping is a collection of loaders, rather than a loader: a list of batches."""
    if _holds_known_loaders(item):
        return True
    items = _items_of(item) if isinstance(item, _COLLECTIONS) else []
    return all(map(_may_be_loader, items)) and any(
        not isinstance(part, _NO_LOADERS) for part in items
    )


def _may_be_loader(item: Any) -> bool:
    # A batch is a tensor, a text, or graphs. A loader may have a ``to``, which moves its batches, but has no items.
    is_batch = hasattr(item, "shape") or isinstance(item, (str, bytes))
    is_batch = is_batch or (hasattr(item, "to") and hasattr(item, "__getitem__"))
    return hasattr(item, "__iter__") and not is_batch


def _holds_known_loaders(item: Any) -> bool:
    """Whether :func:`is_loader` knows something in a collection, at any depth; batches may hold other iterables."""
    if not isinstance(item, _COLLECTIONS):
        return False
    return any(
        is_loader(part) or _holds_known_loaders(part) for part in _items_of(item)
    )


def loaders_in(collection: Any) -> list[Any]:
    """The loaders of a list, tuple or mapping, those in collections inside too.

    Raises:
        TypeError: for what is neither.
    """
    loaders = []
    for item in _items_of(collection):
        if not _may_be_loader(item):
            raise TypeError(
                f"a collection of loaders must hold nothing else; got {item!r} in {collection!r}"
            )
        loaders += loaders_in(item) if _nests(item) else [item]
    return loaders


def _nests(item: Any) -> bool:
    """Whether an item of a collection of loaders is such a collection itself, as a mapping is no loader."""
    return isinstance(item, Mapping) or holds_loaders(item)


def _items_of(collection: Any) -> list[Any]:
    return list(collection.values() if isinstance(collection, Mapping) else collection)


class _Structure:
    """How a collection holds its loaders, so that their batches can be put in their places."""

    def __init__(self, collection: Any) -> None:
        self.inside = [
            _Structure(item) if _nests(item) else None for item in _items_of(collection)
        ]
        self.keys = list(collection.keys()) if isinstance(collection, Mapping) else None
        self.make = getattr(
            collection, "_make", tuple if isinstance(collection, tuple) else list
        )

    def fill(self, batches: Iterator[Any]) -> Any:
        """A collection of the same kind with batches in it."""
        filled = [
            next(batches) if structure is None else structure.fill(batches)
            for structure in self.inside
        ]
        return (
            self.make(filled)
            if self.keys is None
            else dict(zip(self.keys, filled, strict=True))
        )


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
            raise ValueError(
                f"mode must be one of {', '.join(self.MODES)}; got {mode!r}"
            )
        if not isinstance(iterables, _COLLECTIONS) or not iterables:
            raise ValueError(
                f"iterables must be a list, tuple or mapping with at least one loader; got {iterables!r}"
            )
        self.iterables = iterables
        self.mode = mode
        self.flattened = loaders_in(iterables)
        if not self.flattened:
            raise ValueError(
                f"iterables must hold at least one loader; got {iterables!r}"
            )
        self._structure = _Structure(iterables)

    def for_runs(self) -> CombinedLoader:
        """What gives a run batches."""
        return self

    def in_places(self, batches: Iterable[Any]) -> Any:
        """A batch of each loader, in the order of :attr:`flattened`, in the loaders' places."""
        return self._structure.fill(iter(batches))

    def __len__(self) -> int:
        length = combined_length(
            [loader_length(loader) for loader in self.flattened], self.mode
        )
        if length == INFINITE:
            raise TypeError("a loader has no length")
        return int(length)

    def __iter__(self) -> Iterator[Any]:
        parts = [_PlainSource(loader) for loader in self.flattened]
        return CombinedSource(self, parts).iterate(0)


class _PlainSource:
    """A loader as it is, without a seed or a position, with the methods of :class:`BatchSource` that it needs here."""

    stateful = False
    drop_last = False
    batch_sizes = ()

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.length = exact_length(loader)
        self.reported_length = self.length

    def iterate(
        self,
        epoch: int,
        start: int = 0,
        step: int = 1,
    ) -> Iterator[Any]:
        return islice(iter(self.loader), start, None, step)


def exact_length_of(loader: Any, trusts_samplers: bool = True) -> float:
    """As :func:`.exact_length`, of a :class:`CombinedLoader` too."""
    if not isinstance(loader, CombinedLoader):
        return exact_length(loader, trusts_samplers)
    lengths = [exact_length(part, trusts_samplers) for part in loader.flattened]
    return certain_length(lengths, loader.mode)


def certain_length(lengths: list[float], mode: str) -> float:
    """Number of batches of several loaders read together; infinite if one of theirs is not certain."""
    return INFINITE if INFINITE in lengths else combined_length(lengths, mode)


def combined_length(lengths: list[float], mode: str) -> float:
    """Number of batches of several loaders read together."""
    return {"min_size": min, "sequential": sum}.get(mode, max)(lengths)


def _round_of(batch: int, length: float) -> tuple[int, int]:
    """The round of a loader that begins again at its end, and the number in that round, of its ``batch``-th batch."""
    if length in (0, INFINITE):
        return 0, batch
    round_, number = divmod(batch, int(length))
    if number == 0 and round_ > 0:
        # The round before is over, but its end is only seen by the next read.
        return round_ - 1, int(length)
    return round_, number


def _epoch_of(epoch: int, round_: int) -> int:
    # Further rounds need orders of their own; no training has this many epochs.
    return epoch + round_ * 1_000_000_007


def _round_length(source: Any) -> float:
    """Batches until a loader begins again; one with a state of its own cannot be read again to count them."""
    return source.reported_length if source.stateful else source.length


class CombinedSource(BatchSource):
    """The loaders of a :class:`CombinedLoader`, read together.

    Segments count batches. A resume begins each loader, and each round of one that begins again, where it was. Where
    nobody can tell which loader gives which batch, as without a length, it reads again what had been read.

    Args:
        combined: the loaders.
        sources: what reads each of them.
    """

    def __init__(self, combined: CombinedLoader, sources: Sequence[Any]) -> None:
        super().__init__(combined, seed=0)
        self._sources = sources
        self.drop_last = any(source.drop_last for source in sources)
        self.batch_sizes = [size for source in sources for size in source.batch_sizes]
        # The epoch that is iterated, and where the segment of it begins.
        self._epoch = 0
        self._begin = 0

    @property
    def parts(self) -> Sequence[Any]:
        return self._sources

    @property
    def reported_length(self) -> float:
        lengths = [source.reported_length for source in self._sources]
        return combined_length(lengths, self.loader.mode)

    def length_in(self, segment: Segment) -> float:
        lengths = [source.length for source in self._sources]
        return segment.length_of(certain_length(lengths, self.loader.mode))

    def reseed(self, seed: int) -> None:
        for number, source in enumerate(self._sources):
            source.reseed(seed + number)

    def read_ahead(self, is_ahead: bool, draws_apart: tuple[int, ...] = ()) -> None:
        for source in self._sources:
            source.read_ahead(is_ahead, draws_apart)

    def samples_of(
        self, epoch: int, number: int, segment: Segment = WHOLE_EPOCH
    ) -> list[Any] | None:
        """Pairs of a loader's number, as of ``flattened``, and an index in its dataset."""
        mode = self.loader.mode
        number += segment.begin
        samples = []
        for place, source in enumerate(self._sources):
            length = _round_length(source)
            has_ended = number >= length
            round_ = 0
            own = number
            if has_ended and mode == "max_size_cycle":
                round_, own = divmod(number, int(length))
            elif has_ended:
                # The next one's, where one is read after the other.
                number -= int(length) if mode == "sequential" else 0
                continue
            indices = source.samples_of(_epoch_of(epoch, round_), own)
            if indices is None:
                return None
            samples += [(place, index) for index in indices]
            if mode == "sequential":
                break
        return samples

    def begun_iteration(self) -> None:
        """None: what has been looked at is read again."""
        for source in self._sources:
            source.begun_iteration()

    @property
    def _is_resumable(self) -> bool:
        """Whether it is known at which batch each loader with a state of its own is, inside an epoch."""
        mode = self.loader.mode
        if mode == "min_size" or not any(source.stateful for source in self._sources):
            return True
        is_ahead = any(source.reading.is_ahead for source in self._sources)
        if mode != "max_size_cycle" or is_ahead:
            return False
        return all(_round_length(source) < INFINITE for source in self._sources)

    def require_resumable(self) -> None:
        if not self._is_resumable:
            raise CheckpointError(
                f"loaders combined in mode {self.loader.mode!r}, or without length, of which some have a state of "
                "their own, cannot go on inside an epoch: resume from a checkpoint of an epoch's end"
            )

    def _iterate(
        self,
        epoch: int,
        start: int,
        step: int,
        segment: Segment,
    ) -> Iterator[Any]:
        # The iterations of the sources begin here, not with the first batch: what they draw, they draw now.
        self._epoch = epoch
        self._begin = segment.begin
        start += segment.begin
        batches = self._batches(epoch, start, step)
        if segment.end is None:
            return batches
        return islice(batches, len(range(start, segment.end, step)))

    def _batches(
        self,
        epoch: int,
        start: int,
        step: int,
    ) -> Iterator[Any]:
        sources = self._sources
        mode = self.loader.mode
        # In these modes, only lengths tell which loader gives which batch.
        needs_lengths = mode in ("max_size_cycle", "sequential")
        is_moved = start > 0 or step > 1
        if (
            needs_lengths
            and is_moved
            and any(_round_length(source) == INFINITE for source in sources)
        ):
            if start >= step:
                log.info(
                    "Resuming inside an epoch of loaders without length: reading %d batches again",
                    start,
                )
            batches = self._batches(epoch, 0, 1)
            read_again(batches, start)
            return islice(batches, 0, None, step)
        if mode == "sequential":
            return self._sequential(list(sources), epoch, start, step)
        is_cycle = mode == "max_size_cycle"
        return self._together(
            [_Stream(source, epoch, start, step, is_cycle) for source in sources]
        )

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
            for number, stream in enumerate(streams):
                while batch[number] is NO_BATCH:
                    batch[number] = stream.next()
            yield self.loader.in_places(batch)

    @staticmethod
    def _sequential(
        rest: list[Any],
        epoch: int,
        start: int,
        step: int,
    ) -> Iterator[Any]:
        # An unknown length is infinite, and is not skipped.
        while len(rest) > 1 and start >= _round_length(rest[0]):
            start -= int(_round_length(rest.pop(0)))
        first = rest[0].iterate(epoch, start, step)

        def batches() -> Iterator[Any]:
            nonlocal start
            yield from first
            for before, source in pairwise(rest):
                # Of every `step`-th batch, the next one may not be the first of the next loader.
                start = 0 if step == 1 else (start - int(_round_length(before))) % step
                yield from source.iterate(epoch, start, step)

        return batches()

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def state_dict(self, following: int | None = None, done: bool = False) -> list[Any]:
        """The loaders' states, to go on with batch ``following``, as far as each loader tells."""
        if following is None or not self._is_resumable:
            return [source.state_dict(done=done) for source in self._sources]
        states = []
        for source in self._sources:
            reading = source.reading
            number = self._begin + following
            is_ahead = False
            if self.loader.mode == "max_size_cycle" and source.stateful:
                # Rounds have this rank's batches.
                round_, number = _round_of(number, _round_length(source))
                is_ahead = source.iterated_epoch != _epoch_of(self._epoch, round_)
            # It has begun the next round, so its state is ahead: a resume finds that, and refuses.
            number = None if is_ahead else reading.first + number * reading.every
            states.append(source.state_dict(number, done))
        return states

    def load_state_dict(self, state: Any) -> None:
        states = state if isinstance(state, list) else ()
        for source, own in zip(self._sources, states, strict=False):
            source.load_state_dict(own)


def source_of(
    loader: Any,
    seed: int,
    shuffle: bool = True,
) -> BatchSource:
    """A user's loader, or the loaders of a :class:`CombinedLoader`, to be iterated epoch by epoch.

    Args:
        loader: any iterable that can be iterated again.
        seed: the run's seed.
        shuffle: False puts the samples of a shuffling ``DataLoader`` in their stored order.
    """
    if not isinstance(loader, CombinedLoader):
        return single_source(loader, seed, shuffle)
    parts = [
        single_source(part, seed + number, shuffle)
        for number, part in enumerate(loader.flattened)
    ]
    return CombinedSource(loader, parts)


class _Stream:
    """One loader among several: begun again as often as needed, each time in another order."""

    def __init__(
        self,
        loader: Any,
        epoch: int,
        start: int,
        step: int,
        cycle: bool,
    ) -> None:
        self.loader = loader
        self.epoch = epoch
        self.step = step
        self.cycle = cycle
        self.round = 0
        # The number of the next batch in its round.
        self.position = start
        if cycle:
            self.round, self.position = _round_of(start, _round_length(loader))
        # Whether it has been read to its end at least once.
        self.ended = self.round > 0
        self.iterator: Iterator[Any] | None = self._begin()

    def _begin(self) -> Iterator[Any]:
        epoch = _epoch_of(self.epoch, self.round)
        return self.loader.iterate(epoch, self.position, self.step)

    def next(self) -> Any:
        """The next batch, or None when there is no more.

        At the end of a round it is NO_BATCH, and the next round begins only with the call after that. If all loaders
        have ended, that call never comes: a loader that keeps its iterator would lose the batch.
        """
        if self.iterator is None:
            self.iterator = self._begin()
        batch = next(self.iterator, NO_BATCH)
        if batch is not NO_BATCH:
            self.position += self.step
            return batch
        self.ended = True
        if not self.cycle:
            return None
        if self.position == 0:
            raise RuntimeError(
                f"a loader gave no batch when it was begun: {self.loader.loader!r}"
            )
        left = 0
        if self.step > 1:
            left = max(0, self.position - int(_round_length(self.loader)))
        self.position = left
        self.round += 1
        self.iterator = None
        return NO_BATCH
