"""Lightning's ``CombinedLoader``, and what reads its loaders by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from ...data.combined import CombinedLoader as NativeCombinedLoader
from ...data.combined import combined_length
from ...data.iteration import INFINITE, loader_length

__all__ = [
    "_LITERAL_SUPPORTED_MODES",
    "_SUPPORTED_MODES",
    "CombinedLoader",
    "_MaxSize",
    "_MaxSizeCycle",
    "_MinSize",
    "_ModeIterator",
    "_Sequential",
]

_LITERAL_SUPPORTED_MODES = Literal[
    "min_size", "max_size_cycle", "max_size", "sequential"
]
# What a batch, its index, and that of its loader are.
_Item = tuple[Any, int, int]


class _ModeIterator(Iterator[_Item]):
    """Reads several loaders.

    Args:
        iterables: the loaders.
        limits: how many batches to read of each, at most.

    Raises:
        ValueError: if there are not as many limits as loaders.
    """

    def __init__(
        self, iterables: list[Iterable[Any]], limits: list[float] | None = None
    ) -> None:
        if limits is not None and len(limits) != len(iterables):
            raise ValueError(
                f"Mismatch in number of limits ({len(limits)}) and number of iterables ({len(iterables)})"
            )
        self.iterables = iterables
        self.limits = limits
        self.iterators: list[Iterator[Any]] = []
        self._idx = 0

    def limit(self, loader: int) -> float:
        """How many batches of a loader are read at most."""
        return INFINITE if self.limits is None else self.limits[loader]

    def lengths(self) -> list[float]:
        """How many batches of each loader are read; infinite where that is not known."""
        return [
            min(loader_length(loader), self.limit(index))
            for index, loader in enumerate(self.iterables)
        ]

    def __iter__(self) -> Iterator[_Item]:
        self.iterators = [iter(loader) for loader in self.iterables]
        self._idx = 0
        return self

    def reset(self) -> None:
        """Forget how far the loaders have been read."""
        self.iterators = []
        self._idx = 0


class _MinSize(_ModeIterator):
    """Ends with the shortest loader."""

    def __next__(self) -> _Item:
        if self._idx >= min(map(self.limit, range(len(self.iterables)))):
            raise StopIteration
        batches = [next(iterator) for iterator in self.iterators]
        self._idx += 1
        return batches, self._idx - 1, 0


class _MaxSize(_ModeIterator):
    """Ends with the longest loader; the others give None then."""

    def __next__(self) -> _Item:
        batches = [
            next(iterator, None) if self._idx < self.limit(index) else None
            for index, iterator in enumerate(self.iterators)
        ]
        if all(batch is None for batch in batches):
            raise StopIteration
        self._idx += 1
        return batches, self._idx - 1, 0


class _MaxSizeCycle(_ModeIterator):
    """Ends with the longest loader; the others begin again."""

    def __iter__(self) -> Iterator[_Item]:
        self._consumed = [False] * len(self.iterables)
        return super().__iter__()

    def __next__(self) -> _Item:
        batches = [self._read(index) for index in range(len(self.iterators))]
        if all(self._consumed):
            raise StopIteration
        self._idx += 1
        return batches, self._idx - 1, 0

    def _read(self, index: int) -> Any:
        if self._idx >= self.limit(index):
            self._consumed[index] = True
        try:
            return next(self.iterators[index])
        except StopIteration:
            self._consumed[index] = True
        if all(self._consumed):
            return None
        self.iterators[index] = iter(self.iterables[index])
        return next(self.iterators[index], None)


class _Sequential(_ModeIterator):
    """Reads one loader after the other."""

    def __iter__(self) -> Iterator[_Item]:
        self._loader = -1
        self._idx = 0
        self._open_next()
        return self

    def __next__(self) -> _Item:
        while self._loader < len(self.iterables):
            if self._idx < self.limit(self._loader):
                for batch in self.iterators:
                    self._idx += 1
                    return batch, self._idx - 1, self._loader
            self._open_next()
        raise StopIteration

    def _open_next(self) -> None:
        # A loader that nothing is read of is not begun.
        self._loader += 1
        self._idx = 0
        self.iterators: Any = iter(())
        if self._loader < len(self.iterables) and self.limit(self._loader) > 0:
            self.iterators = iter(self.iterables[self._loader])


_SUPPORTED_MODES: dict[str, dict[str, Any]] = {
    "min_size": {"fn": min, "iterator": _MinSize},
    "max_size_cycle": {"fn": max, "iterator": _MaxSizeCycle},
    "max_size": {"fn": max, "iterator": _MaxSize},
    "sequential": {"fn": sum, "iterator": _Sequential},
}


class CombinedLoader(NativeCombinedLoader):
    """A :class:`~loopwright.framework.CombinedLoader` that gives, read by hand, each batch with two indices.

    They are the batch's and, with ``mode="sequential"``, its loader's; otherwise that is 0. A run gets batches alone.

    Args:
        iterables: of :class:`~loopwright.framework.CombinedLoader`.
        mode: of :class:`~loopwright.framework.CombinedLoader`.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in _SUPPORTED_MODES:
            raise ValueError(
                f"Unsupported mode {mode!r}, please select one of: {list(_SUPPORTED_MODES)}"
            )
        self._flattened: list[Any] | None = None
        self._limits: list[float] | None = None
        self._iterator: _ModeIterator | None = None
        super().__init__(iterables, mode)
        self._mode = mode

    @property
    def flattened(self) -> list[Any]:
        """The loaders as a list; others may be set in their places."""
        return self._flattened or []

    @flattened.setter
    def flattened(self, loaders: list[Any]) -> None:
        known = self._flattened
        if known is not None and len(known) != len(loaders):
            raise ValueError(
                f"Mismatch in flattened length ({len(loaders)}) and existing length ({len(known)})"
            )
        self._flattened = loaders
        if known is not None:
            self.iterables = self.in_places(loaders)

    @property
    def limits(self) -> list[float] | None:
        """How many batches are read of each loader by hand, at most; a number holds for all."""
        return self._limits

    @limits.setter
    def limits(self, limits: float | list[float] | None) -> None:
        count = len(self.flattened)
        each: list[Any] | None
        if isinstance(limits, list) or limits is None:
            each = limits
        else:
            each = [limits] * count
        if each is not None and len(each) != count:
            raise ValueError(
                f"Mismatch in number of limits ({len(each)}) and number of iterables ({count})"
            )
        self._limits = each

    @property
    def sampler(self) -> Any:
        """The loaders' samplers, in the loaders' places."""
        return self._of_each("sampler")

    @property
    def batch_sampler(self) -> Any:
        """The loaders' batch samplers, in the loaders' places."""
        return self._of_each("batch_sampler")

    def for_runs(self) -> NativeCombinedLoader:
        """The same, which gives batches alone."""
        return NativeCombinedLoader(self.iterables, self.mode)

    def _of_each(self, name: str) -> Any:
        return self.in_places(getattr(loader, name, None) for loader in self.flattened)

    def __iter__(self) -> Iterator[_Item]:
        iterator = _SUPPORTED_MODES[self.mode]["iterator"](self.flattened, self.limits)
        iter(iterator)
        self._iterator = iterator
        return self

    def __next__(self) -> _Item:
        if self._iterator is None:
            raise RuntimeError("Please call `iter(combined_loader)` first")
        batch, batch_idx, loader_idx = next(self._iterator)
        if self.mode != "sequential":
            batch = self.in_places(batch)
        return batch, batch_idx, loader_idx

    def __len__(self) -> int:
        lengths = [loader_length(loader) for loader in self.flattened]
        for index, limit in enumerate(self.limits or ()):
            lengths[index] = min(lengths[index], limit)
        length = combined_length(lengths, self.mode)
        if length == INFINITE:
            raise TypeError("a loader has no length")
        return int(length)

    def reset(self) -> None:
        """Forget how far the loaders have been read by hand."""
        self._iterator = None

    def _dataset_length(self) -> int:
        """How many samples the datasets have, read together."""
        sizes = []
        for loader in self.flattened:
            dataset: Any = getattr(loader, "dataset", None)
            size = len(dataset) if hasattr(dataset, "__len__") else None
            if isinstance(size, int):
                sizes.append(size)
        if not sizes:
            raise NotImplementedError("All datasets are iterable-style datasets")
        combine: Callable[[list[int]], int] = _SUPPORTED_MODES[self.mode]["fn"]
        return combine(sizes)

    def _stateful(self) -> list[Any]:
        names = ("state_dict", "load_state_dict")
        return [
            loader
            for loader in self.flattened
            if all(callable(getattr(loader, name, None)) for name in names)
        ]

    def _state_dicts(self) -> list[Any]:
        """The states of those loaders that have one."""
        return [loader.state_dict() for loader in self._stateful()]

    def _load_state_dicts(self, states: list[Any]) -> None:
        """Give loaders their states back; without any, nothing is done."""
        loaders = self._stateful()
        if states and len(states) != len(loaders):
            raise RuntimeError(
                f"The CombinedLoader has {len(loaders)} stateful loaders, but found {len(states)} states in the "
                "checkpoint"
            )
        for loader, state in zip(loaders, states, strict=False):
            loader.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        # A DataLoader's iterator cannot be pickled.
        return {**self.__dict__, "_iterator": None}
