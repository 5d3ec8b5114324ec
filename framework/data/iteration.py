"""How a loader is iterated: its length, a look ahead, and random numbers apart from those of the program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any, TypeGuard

from torch.utils.data import DataLoader, IterableDataset

from ..messages import log
from ..seed import isolated_rng
from .generators import NO_BATCH, Generators
from .workers import iterate_protected

INFINITE = float("inf")

# Packages whose samplers and loaders give as many batches as their length tells.
_TORCH = ("torch.", "torchdata.")


def loader_length(loader: Any) -> float:
    """Number of batches, as the loader tells it; infinite if it does not."""
    length_before = getattr(loader, "_IterableDataset_len_called", None)
    try:
        return len(loader)
    except (TypeError, ValueError, RuntimeError):
        # It has no __len__, or one that cannot tell.
        return INFINITE
    finally:
        if isinstance(loader, DataLoader):
            # Here torch notes that a stream was asked for its length, and warns of each batch beyond it from then on.
            loader.__dict__["_IterableDataset_len_called"] = length_before


def exact_length(loader: Any, trusts_samplers: bool = True) -> float:
    """Number of batches where that is certain; infinite where what the loader tells is an estimate.

    A stream may tell a length, but each of its workers divides its own samples into batches, and rounds for itself.

    Args:
        loader: what is to be iterated.
        trusts_samplers: whether to believe a user's own sampler, though it may fill batches by size. Several ranks have
            to, as they plan their steps by the length.
    """
    is_exact = isinstance(loader, Sequence)
    if isinstance(loader, DataLoader):
        inner = getattr(loader.batch_sampler, "sampler", None)
        samplers = (loader.sampler, loader.batch_sampler, inner)
        is_exact = not isinstance(loader.dataset, IterableDataset) and (
            trusts_samplers
            or all(sampler is None or _is_torchs(sampler) for sampler in samplers)
        )
    return loader_length(loader) if is_exact else INFINITE


def _is_torchs(sampler: Any) -> bool:
    return type(sampler).__module__.startswith(_TORCH)


def up_to(
    loader: Any,
    batches: Iterator[Any],
    count: int,
    reported: int,
    warned: set[Any],
) -> Iterator[Any]:
    """Give ``count`` of a loader's batches, and warn once if there are more than its length tells.

    Args:
        loader: the loader.
        batches: an iteration of it, of which ``count`` batches are left by its length.
        count: how many batches to give.
        reported: the loader's length.
        warned: ids of the loaders of which a warning has been given; this one's is added.
    """
    yield from islice(batches, count - 1)
    last = next(batches, NO_BATCH)
    if last is NO_BATCH:
        return
    # Nobody has asked for this batch: what it draws must change nothing.
    with isolated_rng():
        beyond = next(batches, NO_BATCH)
    if beyond is not NO_BATCH and id(loader) not in warned:
        warned.add(id(loader))
        log.warning(
            "A loader (%s) gives more than the %d batches that its length tells, and the others are left out: have its "
            "__len__ tell how many it gives",
            type(loader).__name__,
            reported,
        )
    yield last


def may_give_more(loader: Any) -> bool:
    """Whether a map-style ``DataLoader`` is iterated, or sampled, by a user's own code, maybe beyond its length."""
    if not is_map_style(loader):
        return False
    return (
        has_own_iteration(loader)
        or exact_length(loader, trusts_samplers=False) == INFINITE
    )


def has_own_iteration(loader: Any) -> bool:
    """Whether a user's own ``__iter__`` gives a ``DataLoader``'s batches, maybe more than its length tells."""
    if not isinstance(loader, DataLoader):
        return False
    definer = next(cls for cls in type(loader).__mro__ if "__iter__" in cls.__dict__)
    return not definer.__module__.startswith(_TORCH)


class LookAhead:
    """The batches of a loader without a certain length; it tells whether one follows, by reading it.

    Args:
        batches: what to iterate.
        loader: where they come from; its ``batch_weight`` is that of the batch read last.

    Attributes:
        batch_weight: that of the batch given last, after which another one may have been read already.
    """

    def __init__(self, batches: Iterable[Any], loader: Any) -> None:
        self._batches = iter(batches)
        self._loader = loader
        self._following: tuple[Any, float] | None = None
        self.batch_weight = 1.0

    def __iter__(self) -> LookAhead:
        return self

    def __next__(self) -> Any:
        if self._following is not None:
            batch, self.batch_weight = self._following
            self._following = None
            return batch
        batch = next(self._batches)
        self.batch_weight = self._loader.batch_weight
        return batch

    @property
    def at_end(self) -> bool:
        """Whether the batch given last is the last one."""
        if self._following is None:
            with suppress(StopIteration):
                self._following = (next(self._batches), self._loader.batch_weight)
        return self._following is None


def read_again(batches: Iterator[Any], count: int) -> None:
    """Read batches that have been read before: what they draw was drawn then."""
    if count:
        with isolated_rng():
            for _ in islice(batches, count):
                pass


def isolated_iteration(
    source: Iterable[Any],
    seed: int,
    at_once: int | None = None,
) -> Iterator[Any]:
    """Iterate ``source`` with random generators of its own, whose numbers depend on ``seed`` alone.

    Args:
        source: what to iterate.
        seed: what the generators are seeded with.
        at_once: how many items to read when the first one is asked for, so that generators are swapped once for all
            of them; None reads each when it is asked for.
    """
    generators = Generators(seed)
    with generators:
        iterator = iterate_protected(source)
        # One more than these shows whether it has ended.
        first = [] if at_once is None else list(islice(iterator, at_once + 1))
    if at_once is not None and len(first) <= at_once:
        return iter(first)
    return chain(first, generators.iterate(iterator))


class OpenedIteration:
    """An iteration whose first batch has been read, with random generators of its own until then.

    Args:
        source: what to iterate.
        seed: what the generators are seeded with.
        epoch: the epoch that is iterated.

    Attributes:
        epoch: that epoch.
        first: the first batch, or :data:`NO_BATCH` if there is none.
    """

    def __init__(
        self,
        source: Iterable[Any],
        seed: int,
        epoch: int,
    ) -> None:
        self.epoch = epoch
        self._generators = Generators(seed)
        with self._generators:
            self._batches = iterate_protected(source)
            self.first = next(self._batches, NO_BATCH)

    def iterate(self, isolated: bool) -> Iterator[Any]:
        """All of it, with these generators or with those of the process."""
        if self.first is NO_BATCH:
            return iter(())
        following = self._batches
        if isolated:
            following = self._generators.iterate(following)
        return chain((self.first,), following)


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
    for target in (obj, getattr(obj, "dataset", None), getattr(obj, "sampler", None)):
        if callable(method := getattr(target, "set_epoch", None)):
            method(epoch)
