"""Several loaders that are read together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, ValuesView
from itertools import islice, pairwise
from typing import Any

from torch.utils.data import IterableDataset

from ..messages import log
from .batches import LISTS
from .iteration import (
    INFINITE,
    NO_BATCH,
    exact_length,
    has_state,
    loader_length,
    read_again,
)
from .position import WHOLE_EPOCH, Segment
from .sources import EpochLoader

# What may hold loaders.
_COLLECTIONS = (tuple, *LISTS, ValuesView, Mapping)


# What may be iterated and is a batch or a part of one where it stands in a list.
_NO_LOADERS = (*_COLLECTIONS, str, bytes, set)


def is_loader(item: Any) -> bool:
    """Whether ``item`` gives batches: a ``DataLoader``, or what has a dataset as torchdata's and PyG's loaders have."""
    return isinstance(item, CombinedLoader) or (
        hasattr(item, "__iter__") and hasattr(item, "dataset")
    )


def is_other_stream(item: Any) -> bool:
    """Whether ``item`` is for reading batches, though :func:`is_loader` does not know it; False if that is not sure."""
    if isinstance(item, IterableDataset):  # as webdataset's loader
        return True
    # Python's own iterators may give parameters; what has items may be a configuration.
    is_plain = type(item).__module__ in ("builtins", "itertools", "_io") or hasattr(
        item, "__getitem__"
    )
    return (
        hasattr(item, "__iter__")
        and not is_plain
        and (hasattr(item, "__next__") or has_state(item))
    )


def holds_loaders(item: Any) -> bool:
    """Whether a list, tuple or mapping is a collection of loaders, rather than a loader: a list of batches."""
    if _holds_known_loaders(item):
        return True
    items = _items_of(item) if isinstance(item, _COLLECTIONS) else []
    return all(map(_may_be_loader, items)) and any(
        not isinstance(part, _NO_LOADERS) for part in items
    )


def _may_be_loader(item: Any) -> bool:
    # A tensor, a text, or graphs; a loader may move its batches by a ``to`` of its own, but has no items.
    is_batch = hasattr(item, "shape") or isinstance(item, (str, bytes))
    is_batch = is_batch or (hasattr(item, "to") and hasattr(item, "__getitem__"))
    return hasattr(item, "__iter__") and not is_batch


def _holds_known_loaders(item: Any) -> bool:
    """Whether there is what surely is a loader somewhere in a collection; batches may hold other iterables."""
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
    """Whether an item of a collection of loaders is one in turn: no mapping is a loader."""
    return isinstance(item, Mapping) or holds_loaders(item)


def _items_of(collection: Any) -> list[Any]:
    return list(collection.values() if isinstance(collection, Mapping) else collection)


class _Places:
    """Where the loaders of a collection are, so that their batches can be put there."""

    def __init__(self, collection: Any) -> None:
        self.inside = [
            _Places(item) if _nests(item) else None for item in _items_of(collection)
        ]
        self.keys = list(collection.keys()) if isinstance(collection, Mapping) else None
        self.make = getattr(
            collection, "_make", tuple if isinstance(collection, tuple) else list
        )

    def fill(self, batches: Iterator[Any]) -> Any:
        """A collection of the same kind with batches in it."""
        filled = [
            next(batches) if places is None else places.fill(batches)
            for places in self.inside
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
        self._places = _Places(iterables)

    def in_places(self, batches: Iterable[Any]) -> Any:
        """A batch of each loader, in the order of :attr:`flattened`, in the loaders' places."""
        return self._places.fill(iter(batches))

    def __len__(self) -> int:
        length = combined_length(
            [loader_length(loader) for loader in self.flattened], self.mode
        )
        if length == INFINITE:
            raise TypeError("a loader has no length")
        return int(length)

    def __iter__(self) -> Iterator[Any]:
        return CombinedEpochLoader(
            self, [_Again(loader) for loader in self.flattened]
        ).iterate(0)


class _Again:
    """A loader as it is, behind the calls of :class:`EpochLoader`."""

    stateful = False

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.length = exact_length(loader)

    def iterate(self, epoch: int, start: int = 0, step: int = 1) -> Iterator[Any]:
        return islice(iter(self.loader), start, None, step)


def exact_length_of(loader: Any, trusts_samplers: bool = True) -> int | float:
    """As :func:`.exact_length`, of a :class:`CombinedLoader` too."""
    if not isinstance(loader, CombinedLoader):
        return exact_length(loader, trusts_samplers)
    lengths = [exact_length(part, trusts_samplers) for part in loader.flattened]
    return INFINITE if INFINITE in lengths else combined_length(lengths, loader.mode)


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
        self.length = exact_length_of(combined)
        self.estimate = combined_length(
            [loader_length(loader) for loader in combined.flattened], combined.mode
        )
        self.drop_last = any(getattr(loader, "drop_last", False) for loader in loaders)
        self.batch_sizes = [
            size for loader in loaders for size in getattr(loader, "batch_sizes", ())
        ]
        # The epoch that is iterated, and where the segment of it begins.
        self._epoch = self._begin = 0

    @property
    def resumable(self) -> bool:
        """Whether it can go on inside an epoch: what each loader with a state of its own gives when is known."""
        if self.loader.mode == "min_size" or not any(
            loader.stateful for loader in self.loaders
        ):
            return True
        if self.loader.mode != "max_size_cycle" or any(
            loader.read_ahead for loader in self.loaders
        ):
            return False
        return all(_round_length(loader) < INFINITE for loader in self.loaders)

    def deal_to(self, places: Sequence[tuple[int, int]]) -> None:
        """As :meth:`EpochLoader.deal_to`, for each of the loaders."""
        for loader, place in zip(self.loaders, places, strict=True):
            loader.deal_to(*place)
        lengths = [loader.length for loader in self.loaders]
        self.length = (
            INFINITE
            if INFINITE in lengths
            else combined_length(lengths, self.loader.mode)
        )
        self.estimate = combined_length(
            [loader.estimate for loader in self.loaders], self.loader.mode
        )

    def opened(self) -> None:
        """None: what has been looked at is read again."""
        for loader in self.loaders:
            loader.opened()

    def length_in(self, segment: Segment) -> int | float:
        """Number of batches in a segment of an epoch."""
        return segment.length_of(self.length)

    def last_fraction_in(self, segment: Segment) -> float:
        """Size of a segment's last batch, as a fraction of the others'."""
        return 1.0

    def iterate(
        self,
        epoch: int,
        start: int = 0,
        step: int = 1,
        segment: Segment = WHOLE_EPOCH,
    ) -> Iterator[Any]:
        """Iterate as :meth:`EpochLoader.iterate`. What this draws at random, it draws before it returns."""
        self._epoch, self._begin = epoch, segment.begin
        start += segment.begin
        batches = self._iterate(epoch, start, step)
        if segment.end is None:
            return batches
        return islice(batches, len(range(start, segment.end, step)))

    def _iterate(self, epoch: int, start: int, step: int) -> Iterator[Any]:
        counts = self.loader.mode in (
            "max_size_cycle",
            "sequential",
        )  # which loader gives which batch
        if (
            counts
            and (start or step > 1)
            and any(_round_length(loader) == INFINITE for loader in self.loaders)
        ):
            if start >= step:
                log.info(
                    "Resuming inside an epoch of loaders without length: reading %d batches again",
                    start,
                )
            batches = self._iterate(epoch, 0, 1)
            read_again(batches, start)
            return islice(batches, 0, None, step)
        if self.loader.mode == "sequential":
            return self._sequential(list(self.loaders), epoch, start, step)
        cycle = self.loader.mode == "max_size_cycle"
        return self._together(
            [_Stream(loader, epoch, start, step, cycle) for loader in self.loaders]
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
            for place, stream in enumerate(streams):
                while batch[place] is NO_BATCH:
                    batch[place] = stream.next()
            yield self.loader.in_places(batch)

    @staticmethod
    def _sequential(
        rest: list[Any], epoch: int, start: int, step: int
    ) -> Iterator[Any]:
        while len(rest) > 1 and start >= _round_length(
            rest[0]
        ):  # never where the length is not known
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
        for loader, own in zip(
            self.loaders, state if isinstance(state, list) else (), strict=False
        ):
            loader.load_state_dict(own)


def by_epochs(
    loader: Any, seed: int, shuffle: bool = True
) -> EpochLoader | CombinedEpochLoader:
    """A user's loader, or the loaders of a :class:`CombinedLoader`, to be iterated epoch by epoch."""
    if not isinstance(loader, CombinedLoader):
        return EpochLoader(loader, seed, shuffle)
    parts = [
        EpochLoader(part, seed + i, shuffle) for i, part in enumerate(loader.flattened)
    ]
    return CombinedEpochLoader(loader, parts)


class _Stream:
    """One loader among several: begun again as often as needed, each time in another order."""

    def __init__(
        self, loader: Any, epoch: int, start: int, step: int, cycle: bool
    ) -> None:
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
            self.iterator = self.loader.iterate(
                _epoch_of(self.epoch, self.round), self.position, self.step
            )
        try:
            batch = next(self.iterator)
        except StopIteration:
            self.ended = True
            if not self.cycle:
                return None
            if self.position == 0:
                raise RuntimeError(
                    f"a loader gave no batch when it was begun: {self.loader.loader!r}"
                ) from None
            self.position = (
                0
                if self.step == 1
                else max(0, self.position - int(_round_length(self.loader)))
            )
            self.round += 1
            self.iterator = None
            return NO_BATCH
        self.position += self.step
        return batch
