"""The batch that a plan is made for, taken from where it lies without moving anything there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ...data.batches import batch_size_of, rebuild


def example_batch(given: Any) -> Any:
    """Return a batch: what was given, or the first one of a loader, or of each of several.

    Raises:
        ValueError: for what can be read once only, or has no batch.
    """
    if _is_loader(given):
        return first_batch(given)
    if _are_loaders(given):
        return rebuild(given, first_batch)
    return given


def first_batch(loader: Any) -> Any:
    """Return a batch of a loader, of a list of batches, or of several loaders that are read together.

    A ``DataLoader`` starts no workers for it. Its dataset is asked for its first samples, and its sampler for nothing,
    unless only that one knows the size of a batch.

    Raises:
        ValueError: for what can be read once only, or has no batch.
    """
    if _are_loaders(loader):
        return rebuild(loader, first_batch)
    if isinstance(loader, Iterator):
        raise ValueError(
            f"batch: a {type(loader).__name__} can be read once only, and a plan would take its first batch away: pass "
            "a batch"
        )
    try:
        return (
            _first_of(loader) if isinstance(loader, DataLoader) else _read(loader, 1)[0]
        )
    except (StopIteration, IndexError):
        raise ValueError("batch: the loader has no batch to plan for") from None


def _is_loader(given: Any) -> bool:
    """Whether this is something that gives batches, and is none itself."""
    if isinstance(given, (torch.Tensor, Mapping, list, tuple)):
        return False
    is_iterable = hasattr(given, "__iter__")
    return is_iterable and any(
        hasattr(given, name) for name in ("dataset", "state_dict", "__next__")
    )


def _are_loaders(given: Any) -> bool:
    several: Any = given.values() if isinstance(given, Mapping) else given
    if not isinstance(given, (Mapping, list, tuple)) or not several:
        return False
    return all(_is_loader(each) for each in several)


def _read(stream: Any, count: int) -> list[Any]:
    """Read from the beginning, and let what keeps a position have it back."""
    state = None
    if hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict"):
        state = copy.deepcopy(stream.state_dict())
    iterator = iter(stream)
    if iterator is stream:
        raise ValueError(
            f"batch: a {type(stream).__name__} can be read once only, and a plan would take its first batch away: pass "
            "a batch"
        )
    found = list(islice(iterator, count))
    if state is not None:
        stream.load_state_dict(state)
    return found


def _first_of(loader: DataLoader[Any]) -> Any:
    dataset: Any = loader.dataset
    size = loader.batch_size
    if isinstance(dataset, IterableDataset):
        samples = _read(dataset, size or 1)
    else:
        if size is not None:
            indices = list(range(min(size, len(dataset))))
        else:
            indices = _indices(loader)
        if hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(indices)
        else:
            samples = [dataset[index] for index in indices]
    if loader.batch_size is None and loader.batch_sampler is None:
        return loader.collate_fn(samples[0])
    if not samples:
        raise StopIteration
    return loader.collate_fn(samples)


def _indices(loader: DataLoader[Any]) -> list[Any]:
    """The first batch's indices, by its sampler, whose generators go back."""
    sampler: Any = (
        loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    )
    owners = (loader, sampler, getattr(sampler, "sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
    states = [g.get_state() for g in generators if isinstance(g, torch.Generator)]
    first = _read(sampler, 1)[0]
    for generator, state in zip(
        (g for g in generators if isinstance(g, torch.Generator)), states, strict=True
    ):
        generator.set_state(state)
    return [first] if loader.batch_sampler is None else list(first)


def size_of(batch: Any) -> int:
    """Return how many samples a batch has.

    Raises:
        ValueError: if it does not show that.
    """
    with suppress(ValueError):
        return batch_size_of(batch)
    raise ValueError(
        "batch: how many samples it has is not to be seen: its tensors have different first dimensions, or it has "
        f"none; got a {type(batch).__name__}"
    )
