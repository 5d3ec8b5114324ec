"""Lightning's samplers for several processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler, Sampler

__all__ = [
    "DistributedSamplerWrapper",
    "UnrepeatedDistributedSampler",
    "UnrepeatedDistributedSamplerWrapper",
    "_IndexBatchSamplerWrapper",
]


class _Indices:
    """What a sampler gives, by position.

    Args:
        sampler: with a length.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._indices: list[Any] = []

    def __getitem__(self, position: int) -> Any:
        if position == 0 or not self._indices:
            self.draw()
        return self._indices[position]

    def draw(self) -> None:
        """Let the sampler give its indices anew."""
        self._indices = list(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


class DistributedSamplerWrapper(DistributedSampler):
    """A process's part of what a sampler gives.

    Args:
        sampler: which gives the same in all processes.
        *args: of ``torch.utils.data.DistributedSampler``.
        **kwargs: of ``torch.utils.data.DistributedSampler``.
    """

    def __init__(self, sampler: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_Indices(sampler), *args, **kwargs)  # type: ignore[arg-type] # it has a length

    def __iter__(self) -> Iterator[Any]:
        indices: Any = self.dataset
        indices.draw()
        return (indices[position] for position in super().__iter__())


class UnrepeatedDistributedSampler(DistributedSampler):
    """A process's part of a dataset, in which no sample is there twice: some processes may have one more.

    Args:
        *args: of ``torch.utils.data.DistributedSampler``.
        **kwargs: of ``torch.utils.data.DistributedSampler``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size = len(self.dataset)  # type: ignore[arg-type] # it has a length
        self.num_samples = len(range(self.rank, size, self.num_replicas))
        self.total_size = size

    def __iter__(self) -> Iterator[int]:
        import torch

        indices = list(range(self.total_size))
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(self.epoch)
            indices = torch.randperm(self.total_size, generator=generator).tolist()
        return itertools.islice(indices, self.rank, None, self.num_replicas)


class UnrepeatedDistributedSamplerWrapper(UnrepeatedDistributedSampler):
    """The same of what a sampler gives; arguments as of :class:`DistributedSamplerWrapper`."""

    def __init__(self, sampler: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_Indices(sampler), *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        indices: Any = self.dataset
        indices.draw()
        return (indices[position] for position in super().__iter__())


class _IndexBatchSamplerWrapper(Sampler[Any]):
    """A batch sampler that remembers the indices that it has given, in ``seen_batch_indices``.

    Args:
        batch_sampler: which gives them.
    """

    def __init__(self, batch_sampler: BatchSampler) -> None:
        self._batch_sampler = batch_sampler
        self.seen_batch_indices: list[list[int]] = []
        self._iterator: Iterator[list[int]] = iter(())

    @property
    def sampler(self) -> Any:
        """What the batch sampler takes its indices from."""
        return self._batch_sampler.sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_batch_sampler"], name)

    def __iter__(self) -> Iterator[list[int]]:
        self.seen_batch_indices = []
        self._iterator = iter(self._batch_sampler)
        return self

    def __next__(self) -> list[int]:
        batch = next(self._iterator)
        self.seen_batch_indices.append(batch)
        return batch

    def __len__(self) -> int:
        return len(self._batch_sampler)
