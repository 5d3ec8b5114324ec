"""Whether loaders give each rank a part of the data of its own, which must not be dealt out once more."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from ..messages import log
from .iteration import NO_BATCH
from .sources import BatchSource

if TYPE_CHECKING:
    from ...strategies import Strategy

# What samplers call the rank that they were made for, and the number of ranks.
_RANKS = ("rank", "data_parallel_rank", "dp_rank", "process_index")
_SIZES = (
    "num_replicas",
    "world_size",
    "data_parallel_size",
    "dp_size",
    "num_processes",
)


def is_sharded(
    loader: BatchSource, strategy: Strategy, asked: bool | None, epoch: int, name: str
) -> bool:
    """Whether each rank's loader gives it a part of the data, rather than all of it.

    A sampler says so by the rank that it was made for. Of a stream, the ranks compare the first batch that they read,
    which :class:`BatchSource` keeps for the iteration that follows. A collective, if nothing is asked for.

    Args:
        loader: the loader, as it is on each rank.
        strategy: lets the ranks talk to each other.
        asked: ``use_distributed_sampler``, as the user gave it.
        epoch: the epoch that begins.
        name: what to call the loader in messages.

    Raises:
        ValueError: if its samplers say something that cannot be.
        RuntimeError: if another rank could not read its first batch.
    """
    if asked is not None:
        return not asked or any(
            isinstance(sampler, DistributedSampler)
            for sampler in samplers_of(loader.loader)
        )
    place, mark = _look(loader, strategy, epoch, name)
    size = strategy.tensor_parallel_size
    by_rank = strategy.gather_objects((place, mark))  # collective
    if any(
        by_rank[rank] != by_rank[rank - rank % size] for rank in range(len(by_rank))
    ):
        raise ValueError(
            f"the {name} gives different batches to ranks that compute each batch together (tensor parallel size "
            f"{size}): shard it by rank // {size}, of {len(by_rank) // size}"
        )
    places = [place for place, _ in by_rank[::size]]
    if any(places):
        _check_places(places, name)
        log.info(
            "The sampler of the %s knows its rank: its batches are not dealt out once more",
            name,
        )
        return True
    return _differ([mark for _, mark in by_rank[::size]], loader, name)


def _look(
    loader: BatchSource, strategy: Strategy, epoch: int, name: str
) -> tuple[tuple[int, int] | None, str]:
    """The rank that the loader's sampler was made for, or else a mark of its first batch. A collective.

    Raises:
        RuntimeError: if another rank could not look; what this one could not do raises its own error.
    """
    place, mark, failure = None, "", None
    try:
        place = place_of_sampler(loader.loader)
        first = None if place is not None else loader.peek(epoch)
        mark = "" if first is NO_BATCH else fingerprint(first)
        again = (
            place is None and loader.has_own_iteration and not loader.is_stream
        )  # which can be read from its start again
        if again and fingerprint(loader.peek(epoch)) != mark:
            mark = "random"  # what differs in one process, too, tells nothing
    except (
        Exception
    ) as error:  # which this rank raises when its peers know, who would wait for it
        failure = error
    failures = strategy.gather_objects(
        failure and f"{type(failure).__name__}: {failure}"
    )  # collective
    if failure is not None:
        raise failure
    for rank, failed in enumerate(failures):
        if failed:
            raise RuntimeError(
                f"rank {rank} could not read the first batch of the {name}: {failed}"
            )
    return place, mark


def draw_alike(loader: BatchSource, strategy: Strategy) -> None:
    """Have the random samplers of torch and torchdata draw the same order in all processes: that of rank 0.

    Their generators may be seeded by rank; torchdata's take a seed from torch's. A collective.
    """
    samplers = samplers_of(loader.loader)
    generators = [
        sampler.generator
        for sampler in samplers
        if type(sampler).__name__ == "RandomSampler"
    ]
    generators = [generator for generator in generators if generator is not None]
    states = strategy.broadcast([generator.get_state() for generator in generators])
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)


def _check_places(places: list[Any], name: str) -> None:
    expected = [(rank, len(places)) for rank in range(len(places))]
    if sorted(places, key=repr) != sorted(expected, key=repr):
        found = ", ".join(
            f"rank {rank}: none"
            if place is None
            else f"rank {rank}: {place[0]} of {place[1]}"
            for rank, place in enumerate(places)
        )
        raise ValueError(
            f"the sampler of the {name} was made for other ranks than those that are there ({found}): make it where "
            "the process knows its rank, such as in train_dataloader(); or pass use_distributed_sampler=True to deal "
            "out what it gives, False to read it as it is"
        )


def _differ(marks: list[str], loader: BatchSource, name: str) -> bool:
    """Whether the ranks have read different first batches; says what follows from it."""
    if len(set(marks)) == 1:
        if loader.is_stream:
            log.info(
                "The %s gives all %d ranks the same first batch: it counts as one stream, of which each rank reads "
                "all and keeps every %d-th batch", name, len(marks), len(marks),
            )  # fmt: skip
        return False
    log.info(
        "The %s gives each rank another first batch: it counts as sharded already, and each rank reads all that it "
        "gets. If it is one stream that each rank shuffles in its own way, seed it alike, or pass "
        "use_distributed_sampler=True", name,
    )  # fmt: skip
    loader.mark_sharded()
    alike = [
        [rank for rank, own in enumerate(marks) if own == mark]
        for mark in dict.fromkeys(marks)
        if mark
    ]
    for ranks in alike:
        if len(ranks) > 1:
            log.warning(
                "The %s gives ranks %s the same first batch, and others another",
                name,
                ranks,
            )
    return True


def samplers_of(loader: Any) -> list[Any]:
    """The samplers of a map-style ``DataLoader``, those inside others too."""
    found: list[Any] = []
    pending = (
        [loader.batch_sampler, loader.sampler] if isinstance(loader, DataLoader) else []
    )
    while pending:
        sampler = pending.pop(0)
        if sampler is None or any(sampler is known for known in found):
            continue
        found.append(sampler)
        pending += [
            getattr(sampler, name, None) for name in ("sampler", "batch_sampler")
        ]
        for value in getattr(sampler, "__dict__", {}).values():
            several = (
                value
                if isinstance(value, (list, tuple))
                and isinstance(next(iter(value), None), Sampler)
                else ()
            )
            pending += [value] if isinstance(value, Sampler) else several
    return found


def place_of_sampler(loader: Any) -> tuple[int, int] | None:
    """The rank that a loader's sampler was made for, and the number of ranks; None if it knows of no others."""
    for sampler in samplers_of(loader):
        rank, size = _number(sampler, _RANKS), _number(sampler, _SIZES)
        if rank is not None and size is not None and size > 1:
            return rank, size
    return None


def _number(sampler: Any, names: Iterable[str]) -> int | None:
    values = (
        getattr(sampler, prefix + name, None) for name in names for prefix in ("", "_")
    )
    return next((value for value in values if isinstance(value, int)), None)


def fingerprint(batch: Any) -> str:
    """A hash of a batch's content, equal in all processes; any object will do, and none is changed or rebuilt."""
    digest = blake2b(digest_size=16)
    for part in _content(batch, set()):
        digest.update(part)
    return digest.hexdigest()


def _content(item: Any, outer: set[int]) -> Iterator[bytes]:
    """What a batch holds, piece by piece; ``outer`` are the objects around it."""
    yield type(item).__qualname__.encode()
    if id(item) in outer:
        return
    outer = outer | {id(item)}
    if isinstance(item, Tensor) and (
        item.layout is not torch.strided or item.is_nested
    ):
        yield from _content(item.__reduce_ex__(2)[1], outer)  # its dense parts
    elif isinstance(item, Tensor):
        yield repr((item.dtype, *item.shape)).encode()
        # Of its own: one element may have any stride, of which a view as bytes is refused.
        values = (
            item.detach()
            .cpu()
            .resolve_conj()
            .resolve_neg()
            .clone(memory_format=torch.contiguous_format)
        )
        yield values.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(item, (set, frozenset)):  # whose order differs between processes
        yield from sorted(fingerprint(part).encode() for part in item)
    elif isinstance(item, Mapping):
        for key in sorted(
            item.keys(), key=repr
        ):  # in whatever order a process has put them
            yield from _content(key, outer)
            yield from _content(item[key], outer)
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _content(part, outer)
    else:
        try:
            yield _pickled(item)
        except (
            Exception
        ):  # a class of a function, a lock, an open file: what can be seen of it
            yield from _content(dict(getattr(item, "__dict__", {})), outer)


class _Pickler(pickle.Pickler):
    """Gives the same bytes in all processes: tensors' own contain addresses, and sets have an order of chance."""

    def persistent_id(self, obj: Any) -> str | None:
        return fingerprint(obj) if isinstance(obj, (Tensor, set, frozenset)) else None


def _pickled(item: Any) -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(item)
    return written.getvalue()
