"""What iterating means: lengths, epochs, and random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypeGuard

from torch.utils.data import DataLoader, IterableDataset

from ..messages import log
from ..seed import isolated_rng, rng_state, seed_batch, set_rng_state
from .workers import iterate_protected

INFINITE = float("inf")


NO_BATCH = object()  # a batch that is not there


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
    if isinstance(loader, DataLoader):
        samplers = (
            loader.sampler,
            loader.batch_sampler,
            getattr(loader.batch_sampler, "sampler", None),
        )
        kept = [
            sampler
            for sampler in samplers
            if type(sampler).__module__.startswith(_TORCH)
        ]
        exact = not isinstance(loader.dataset, IterableDataset)
        exact = exact and (
            trusts_samplers
            or len(kept) == sum(sampler is not None for sampler in samplers)
        )
    else:
        exact = isinstance(loader, Sequence)
    return loader_length(loader) if exact else INFINITE


def up_to(
    loader: Any, batches: Iterator[Any], count: int, told: int, said: set[Any]
) -> Iterator[Any]:
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
    with (
        isolated_rng()
    ):  # nobody has asked for this batch: what it draws must change nothing
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
    return (
        iterates_alone(loader)
        or exact_length(loader, trusts_samplers=False) == INFINITE
    )


def iterates_alone(loader: DataLoader[Any]) -> bool:
    """Whether a ``DataLoader`` has an ``__iter__`` of a user's own, which may give more than its length tells."""
    iterating = next(
        part for part in type(loader).__mro__ if "__iter__" in part.__dict__
    )
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


def read_again(batches: Iterator[Any], count: int) -> None:
    """Read batches that have been read before: what they draw was drawn then."""
    if count:
        with isolated_rng():
            for _ in islice(batches, count):
                pass


def isolated_iteration(
    source: Iterable[Any], seed: int, at_once: int | None = None
) -> Iterator[Any]:
    """Iterate ``source`` with random generators of its own, whose numbers depend on ``seed`` alone.

    To swap all generators' states costs about 0.1 ms; ``at_once`` reads so many at the first item, with one swap.
    """
    outside = rng_state()
    seed_batch(seed)
    try:
        iterator = iterate_protected(source)
        first = (
            [] if at_once is None else list(islice(iterator, at_once + 1))
        )  # one more shows that it has ended
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


class OpenedIteration:
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
        following = (
            _with_generators(self.batches, self.inside) if isolated else self.batches
        )
        return iter(()) if self.first is NO_BATCH else chain((self.first,), following)


def is_map_style(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether it is a ``DataLoader`` over a dataset with ``__getitem__``."""
    return isinstance(loader, DataLoader) and not isinstance(
        loader.dataset, IterableDataset
    )


def has_state(loader: Any) -> bool:
    """Whether a loader keeps a state of its own, to be saved and given back."""
    return callable(getattr(loader, "state_dict", None)) and callable(
        getattr(loader, "load_state_dict", None)
    )


def set_epoch(obj: Any, epoch: int) -> None:
    """Tell ``obj``, its dataset and its samplers the epoch, where they want to know (``set_epoch``)."""
    for part in (obj, getattr(obj, "dataset", None), getattr(obj, "sampler", None)):
        if callable(method := getattr(part, "set_epoch", None)):
            method(epoch)
