"""Accelerate's samplers: the indices of one process's batches, filled up at the end or skipped at the beginning."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler


class SeedableRandomSampler(RandomSampler):
    """A random order that follows from a seed and the epoch.

    Args:
        *args: of ``RandomSampler``.
        data_seed: the seed (default: torch's).
        **kwargs: of ``RandomSampler``.

    Attributes:
        epoch: the epoch that is iterated next.
        initial_seed: the seed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        seed = kwargs.pop("data_seed", None)
        super().__init__(*args, **kwargs)
        self.initial_seed = torch.initial_seed() if seed is None else seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.manual_seed(self.epoch + self.initial_seed)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is iterated next."""
        self.epoch = epoch


class BatchSamplerShard(BatchSampler):
    """The batches of one of several processes.

    Of *n* processes, process *p* gets batches *p*, *p + n*, *p + 2n*, …, or with ``split_batches`` its part of each
    batch. In the last round, which may be incomplete, samples from the beginning fill up what is missing.

    Args:
        batch_sampler: that of all processes.
        num_processes: how many there are.
        process_index: which one this is.
        split_batches: divide each batch.
        even_batches: fill up the last round; otherwise processes may have one batch, or some samples, less.

    Raises:
        ValueError: for batches that cannot be divided or filled up.
    """

    # BatchSampler's own constructor is not called: batches are those of the other sampler.
    def __init__(
        self,
        batch_sampler: Any,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
        even_batches: bool = True,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches
        self.even_batches = even_batches
        self.batch_size: Any = getattr(batch_sampler, "batch_size", None)
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        if split_batches and self.batch_size is None:
            raise ValueError(
                "split_batches=True needs a batch sampler with a batch_size, as its batches are divided; got "
                f"{batch_sampler!r}"
            )
        if split_batches and self.batch_size % num_processes:
            raise ValueError(
                f"To use `BatchSamplerShard` in `split_batches` mode, the batch size ({self.batch_size}) needs to be a "
                f"round multiple of the number of processes ({num_processes})."
            )

    @property
    def total_length(self) -> int:
        """Batches of all processes."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        batches = len(self.batch_sampler)
        if self.split_batches:
            return batches
        rounds, rest = divmod(batches, self.num_processes)
        if not rest or self.drop_last:
            return rounds
        return rounds + (self.even_batches or self.process_index < rest)

    def __iter__(self) -> Iterator[Any]:
        return self._parts() if self.split_batches else self._own_batches()

    def _parts(self) -> Iterator[Any]:
        """This process's part of each batch."""
        size = self.batch_size // self.num_processes
        begin = size * self.process_index
        first: list[Any] = []
        for number, batch in enumerate(self.batch_sampler):
            if number == 0:
                first = list(batch)
            if len(batch) < self.batch_size:
                if self.drop_last:
                    return
                if self.even_batches:
                    batch = _filled(batch, first, self.batch_size)
            part = batch[begin : begin + size]
            if len(part) > 0:
                yield part

    def _own_batches(self) -> Iterator[Any]:
        """Every batch of which it is this process's turn."""
        count = self.num_processes
        batches = iter(self.batch_sampler)
        first: list[Any] = []
        while given := list(islice(batches, count)):
            first = first or given
            is_complete = len(given) == count
            is_full = self.batch_size is None or len(given[-1]) == self.batch_size
            if is_complete and (is_full or not (self.drop_last or self.even_batches)):
                yield given[self.process_index]
            elif not self.drop_last:
                yield from self._of_last_round(given, first)

    def _of_last_round(self, given: list[Any], first: list[Any]) -> Iterator[Any]:
        if not self.even_batches:
            yield from given[self.process_index : self.process_index + 1]
            return
        size = self.batch_size
        if size is None:
            # Batches of any size: what is missing of the round are the first ones again.
            yield _filled(given, first, self.num_processes)[self.process_index]
            return
        begin = size * self.process_index
        rest = [index for batch in given for index in batch]
        beginning = [index for batch in first for index in batch]
        yield _filled(rest, beginning, size * self.num_processes)[begin : begin + size]


def _filled(batch: Any, first: list[Any], size: int) -> list[Any]:
    """Samples, and then those of ``first`` again and again, up to so many."""
    filled = list(batch)
    while len(filled) < size and first:
        filled += first[: size - len(filled)]
    return filled


class IterableDatasetShard(IterableDataset):
    """The samples of one of several processes, from a dataset that all of them iterate.

    Args:
        dataset: that of all processes.
        batch_size: samples of a batch; with ``split_batches``, of all processes together.
        drop_last: leave out the last, incomplete round; otherwise samples from the beginning fill it up.
        num_processes: how many there are.
        process_index: which one this is.
        split_batches: divide each batch, instead of dealing out batches.

    Raises:
        ValueError: for batches that cannot be divided.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        split_batches: bool = False,
    ) -> None:
        if split_batches and batch_size > 1 and batch_size % num_processes:
            raise ValueError(
                f"To use `IterableDatasetShard` in `split_batches` mode, the batch size ({batch_size}) needs to be a "
                f"round multiple of the number of processes ({num_processes})."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.split_batches = split_batches

    def set_epoch(self, epoch: int) -> None:
        """Set the dataset's epoch, if it has one."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    @property
    def round_size(self) -> int:
        """Samples of all processes together."""
        return self.batch_size * (1 if self.split_batches else self.num_processes)

    def __len__(self) -> int:
        size = self.round_size
        rounds, rest = divmod(len(self.dataset), size)
        rounds += rest > 0 and not self.drop_last
        return rounds * size // self.num_processes

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if not hasattr(self.dataset, "set_epoch") and isinstance(
            generator, torch.Generator
        ):
            generator.manual_seed(getattr(self, "epoch", 0))
        size = self.round_size
        share = size // self.num_processes
        begin = share * self.process_index
        samples = iter(self.dataset)
        first: list[Any] = []
        while given := list(islice(samples, size)):
            first = first or given
            if len(given) < size:
                if self.drop_last:
                    return
                given = _filled(given, first, size)
            yield from given[begin : begin + share]


class SkipBatchSampler(BatchSampler):
    """A batch sampler without its first batches.

    Args:
        batch_sampler: with them.
        skip_batches: how many are left out.
    """

    # BatchSampler's own constructor is not called: batches are those of the other sampler.
    def __init__(self, batch_sampler: Any, skip_batches: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.skip_batches = skip_batches

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler":
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    @property
    def total_length(self) -> int:
        """Batches, the first ones included."""
        return len(self.batch_sampler)

    def __len__(self) -> int:
        return len(self.batch_sampler) - self.skip_batches

    def __iter__(self) -> Iterator[Any]:
        return islice(self.batch_sampler, self.skip_batches, None)
