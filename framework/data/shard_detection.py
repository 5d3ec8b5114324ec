"""Whether loaders give each rank a part of the data of its own, which must not be sharded once more."""

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


def data_parallel_rank_and_size(strategy: Strategy) -> tuple[int, int]:
    """This rank among those that get different batches, and their number."""
    size = strategy.tensor_parallel_size
    return strategy.global_rank // size, strategy.world_size // size


def is_sharded(
    source: BatchSource,
    strategy: Strategy,
    requested: bool | None,
    epoch: int,
    name: str,
    cursor: Mapping[str, Any] | None = None,
    mixed: bool = True,
) -> bool:
    """Whether each rank's loader gives it a part of the data, rather than all of it.

    Of loaders that are read together, some may do so, while others give all of the data: the batches of these others
    are then sharded here, and the answer is yes. A collective.

    Args:
        source: the loader, as it is on each rank.
        strategy: lets the ranks talk to each other.
        requested: ``use_distributed_sampler``, as the user gave it; None lets the ranks find out.
        epoch: the epoch that begins.
        name: what to call the loader in messages.
        cursor: the position in the checkpoint from which to resume, if there is one. It tells whether a loader with a
            state of its own was sharded, so that the loader need not be read to find out.
        mixed: whether loaders that are read together may differ.

    Raises:
        ValueError: if a sampler was made for ranks that are not there, or loaders differ that may not.
        RuntimeError: if another rank could not read its first batch.
    """
    parts = source.parts
    has_state = any(part.stateful for part in parts)
    if requested is None and has_state and cursor and cursor["dealt_to"] > 1:
        requested = bool(cursor["dealt"])
    sharded = []
    for number, part in enumerate(parts):
        if requested is not False:
            draw_alike(part, strategy)
        part_name = name if len(parts) == 1 else f"{name}'s part {number}"
        sharded.append(_is_part_sharded(part, strategy, requested, epoch, part_name))
        part.plan_steps()
    if len(set(sharded)) == 1:
        return sharded[0]
    if not mixed:
        given = ["its own part" if own else "all of the data" for own in sharded]
        raise ValueError(
            f"of the loaders that are read together as {name}, some give each process its own part, and others all of "
            f"the data (in their order: {', '.join(given)}): give the others a DistributedSampler, too"
        )
    log.info(
        "Those parts of the %s that give all of the data are dealt out; the others are read as they are",
        name,
    )
    for part, own in zip(parts, sharded, strict=True):
        if not own:
            part.read_shard(*data_parallel_rank_and_size(strategy))
    return True


def _is_part_sharded(
    source: BatchSource,
    strategy: Strategy,
    requested: bool | None,
    epoch: int,
    name: str,
) -> bool:
    """As :func:`is_sharded`, of one loader.

    A sampler says so by the rank that it was made for. Of a stream, the ranks compare the first batch that they read,
    which the source keeps for the iteration that follows.
    """
    if requested is not None:
        samplers = samplers_of(source.loader)
        return not requested or any(
            isinstance(sampler, DistributedSampler) for sampler in samplers
        )
    seen = _look(source, strategy, epoch, name)
    size = strategy.tensor_parallel_size
    by_rank = strategy.gather_objects(seen)  # collective
    for rank, seen_there in enumerate(by_rank):
        if seen_there != by_rank[rank - rank % size]:
            raise ValueError(
                f"the {name} gives different batches to ranks that compute each batch together (tensor parallel size "
                f"{size}): shard it by rank // {size}, of {len(by_rank) // size}"
            )
    made_for = [rank_and_size for rank_and_size, _ in by_rank[::size]]
    if any(made_for):
        _check_ranks(made_for, name)
        log.info(
            "The sampler of the %s knows its rank: its batches are not dealt out once more",
            name,
        )
        return True
    return _differ([mark for _, mark in by_rank[::size]], source, name)


def _look(
    source: BatchSource,
    strategy: Strategy,
    epoch: int,
    name: str,
) -> tuple[tuple[int, int] | None, str]:
    """The rank and size that the loader's sampler was made for, or else a mark of its first batch. A collective.

    Raises:
        RuntimeError: if another rank could not look; what this one could not do raises its own error.
    """
    rank_and_size = None
    mark = ""
    failure = None
    # This rank raises only when the others know of it, which would wait for it otherwise.
    try:
        rank_and_size = sampler_rank_and_size(source.loader)
        if rank_and_size is None:
            mark = _mark_of_first(source, epoch)
    except Exception as error:
        failure = error
    reason = failure and f"{type(failure).__name__}: {failure}"
    failures = strategy.gather_objects(reason)  # collective
    if failure is not None:
        raise failure
    for rank, failed in enumerate(failures):
        if failed:
            raise RuntimeError(
                f"rank {rank} could not read the first batch of the {name}: {failed}"
            )
    return rank_and_size, mark


def _mark_of_first(source: BatchSource, epoch: int) -> str:
    first = source.peek(epoch)
    if first is NO_BATCH:
        return ""
    mark = fingerprint(first)
    # If a second look shows another batch on the same rank, differences between ranks tell nothing.
    is_readable_again = source.has_own_iteration and not source.is_stream
    if is_readable_again and fingerprint(source.peek(epoch)) != mark:
        return "random"
    return mark


def draw_alike(source: BatchSource, strategy: Strategy) -> None:
    """Have the random samplers of torch and torchdata draw the same order in all processes: that of rank 0.

    Their generators may be seeded by rank; torchdata's take a seed from torch's. A collective.
    """
    generators = [
        sampler.generator
        for sampler in samplers_of(source.loader)
        if type(sampler).__name__ == "RandomSampler" and sampler.generator is not None
    ]
    states = [generator.get_state() for generator in generators]
    states = strategy.broadcast(states)  # collective
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)


def _check_ranks(made_for: list[Any], name: str) -> None:
    expected = [(rank, len(made_for)) for rank in range(len(made_for))]
    if sorted(made_for, key=repr) == sorted(expected, key=repr):
        return
    by_rank = []
    for rank, own in enumerate(made_for):
        by_rank.append(
            f"rank {rank}: {'none' if own is None else f'{own[0]} of {own[1]}'}"
        )
    raise ValueError(
        f"the sampler of the {name} was made for other ranks than those that are there ({', '.join(by_rank)}): make it "
        "where the process knows its rank, such as in train_dataloader(); or pass use_distributed_sampler=True to deal "
        "out what it gives, False to read it as it is"
    )


def _differ(
    marks: list[str],
    source: BatchSource,
    name: str,
) -> bool:
    """Whether the ranks have read different first batches, so that the source counts as sharded; a line says so."""
    ranks_by_mark: dict[str, list[int]] = {}
    for rank, mark in enumerate(marks):
        ranks_by_mark.setdefault(mark, []).append(rank)
    if len(ranks_by_mark) == 1:
        if source.is_stream:
            log.info(
                "The %s gives all %d ranks the same first batch: it counts as one stream, of which each rank reads "
                "all and keeps every %d-th batch",
                name,
                len(marks),
                len(marks),
            )
        return False
    log.info(
        "The %s gives each rank another first batch: it counts as sharded already, and each rank reads all that it "
        "gets. If it is one stream that each rank shuffles in its own way, seed it alike, or pass "
        "use_distributed_sampler=True",
        name,
    )
    source.mark_sharded()
    for mark, ranks in ranks_by_mark.items():
        if mark and len(ranks) > 1:
            log.warning(
                "The %s gives ranks %s the same first batch, and others another",
                name,
                ranks,
            )
    return True


def samplers_of(loader: Any) -> list[Any]:
    """The samplers of a map-style ``DataLoader``, those inside others too."""
    if not isinstance(loader, DataLoader):
        return []
    samplers: list[Any] = []
    pending: list[Any] = [loader.batch_sampler, loader.sampler]
    while pending:
        sampler = pending.pop(0)
        if sampler is None or any(sampler is known for known in samplers):
            continue
        samplers.append(sampler)
        pending += [
            getattr(sampler, name, None) for name in ("sampler", "batch_sampler")
        ]
        for value in getattr(sampler, "__dict__", {}).values():
            several = value if isinstance(value, (list, tuple)) else [value]
            if isinstance(next(iter(several), None), Sampler):
                pending += several
    return samplers


def sampler_rank_and_size(loader: Any) -> tuple[int, int] | None:
    """The rank that a loader's sampler was made for, and the number of ranks; None if it knows of no others."""
    for sampler in samplers_of(loader):
        rank = _number(sampler, _RANKS)
        size = _number(sampler, _SIZES)
        if rank is not None and size is not None and size > 1:
            return rank, size
    return None


def _number(sampler: Any, names: Iterable[str]) -> int | None:
    for name in names:
        for attribute in (name, f"_{name}"):
            value = getattr(sampler, attribute, None)
            if isinstance(value, int):
                return value
    return None


def fingerprint(batch: Any) -> str:
    """A hash of a batch's content, equal in all processes; any object will do, and none is changed or rebuilt."""
    digest = blake2b(digest_size=16)
    for part in _content(batch, set()):
        digest.update(part)
    return digest.hexdigest()


def _content(item: Any, outer: set[int]) -> Iterator[bytes]:
    """What a batch holds, piece by piece; ``outer`` are the ids of the objects around it, which may hold themselves."""
    yield type(item).__qualname__.encode()
    if id(item) in outer:
        return
    outer = outer | {id(item)}
    if isinstance(item, Tensor) and (
        item.layout is not torch.strided or item.is_nested
    ):
        # What it is pickled as has its dense parts.
        yield from _content(item.__reduce_ex__(2)[1], outer)
    elif isinstance(item, Tensor):
        yield repr((item.dtype, *item.shape)).encode()
        # Copied even if it is contiguous: one element may have any stride, of which a view as bytes is refused.
        values = (
            item.detach()
            .cpu()
            .resolve_conj()
            .resolve_neg()
            .clone(memory_format=torch.contiguous_format)
        )
        yield values.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(item, (set, frozenset)):
        # A set's order differs between processes.
        yield from sorted(fingerprint(part).encode() for part in item)
    elif isinstance(item, Mapping):
        # Each process may have put them in another order.
        for key in sorted(item.keys(), key=repr):
            yield from _content(key, outer)
            yield from _content(item[key], outer)
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _content(part, outer)
    else:
        try:
            yield _pickled(item)
        except Exception:
            # A local class, a lock or an open file cannot be pickled: take its attributes.
            yield from _content(dict(getattr(item, "__dict__", {})), outer)


class _Pickler(pickle.Pickler):
    """Gives the same bytes in all processes: a tensor's usual ones hold addresses, and the order of a set is random."""

    def persistent_id(self, obj: Any) -> str | None:
        return fingerprint(obj) if isinstance(obj, (Tensor, set, frozenset)) else None


def _pickled(item: Any) -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(item)
    return written.getvalue()
