"""How far an epoch has come, for any number of processes."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from .combined import CombinedEpochLoader
from .sharding import SharedLoader
from .sources import EpochLoader


def cursor_of(
    source: EpochLoader | CombinedEpochLoader | SharedLoader,
    world_size: int,
    batches: int,
    part: dict[str, Any] | None,
    limited_to: int | float | None = None,
) -> dict[str, Any]:
    """How much of an epoch's data all processes have been given.

    Args:
        source: the training loader, as this process reads it.
        world_size: how many processes get different batches.
        batches: given to each of them in this epoch.
        part: what was left of the epoch when these processes took it over, if others had begun it: ``first``, the
            batches given before, and ``begin`` and ``end`` of the rest.
        limited_to: how many batches of the epoch each is to be given, if not all.

    Returns:
        ``position`` and ``end`` (None for all of the epoch), both in samples where the order is planned, else in the
        loader's batches; and what is needed to tell whether they mean the same in another run.
    """
    loader, dealt = _loader_of(source)
    each = loader.unit * (world_size if dealt else 1)
    if part is None:
        part = {
            "first": 0,
            "begin": 0,
            "end": None if limited_to is None else limited_to * each,
        }
    return {
        "position": part["begin"] + (batches - part["first"]) * each,
        "end": part["end"],
        "in_samples": loader.in_samples,
        "batch_sizes": loader.batch_sizes,
        "dealt": dealt,
        "dealt_to": world_size,
    }


def rest_of_epoch(
    cursor: dict[str, Any], source: Any, saved_by: int, world_size: int
) -> dict[str, Any] | None:
    """What is left of an epoch that other processes have begun, or the same ones with another batch size.

    Args:
        cursor: what :func:`cursor_of` gave there.
        source: the training loader, as this process reads it now.
        saved_by: how many processes they were.
        world_size: how many of those that there are now get different batches.

    Returns:
        ``begin`` and ``end`` for :meth:`EpochLoader.cut`; None if nothing has changed.

    Raises:
        CheckpointError: if it cannot be dealt out anew.
    """
    loader, dealt = _loader_of(source)
    saved_by = cursor.get("dealt_to", saved_by)
    if saved_by == world_size and cursor["batch_sizes"] == loader.batch_sizes:
        return None
    why = ""
    if not (cursor["dealt"] and dealt):
        why = "each process has a loader of its own (use_distributed_sampler=False, or a DistributedSampler)"
    elif cursor["in_samples"] != loader.in_samples:
        why = "the loader's sampler has been changed for one of another kind"
    elif not loader.in_samples and cursor["batch_sizes"] != loader.batch_sizes:
        why = f"only its batches can be counted, whose sizes have been changed from {cursor['batch_sizes']} to "
        why += f"{loader.batch_sizes}"
    if why:
        raise CheckpointError(
            f"the checkpoint was saved inside an epoch by {saved_by} process(es), now there are {world_size}, and what "
            f"is left of the epoch cannot be dealt out anew: {why}. Resume with {saved_by} and the same loaders, or "
            "from a checkpoint of an epoch's end"
        )
    return {"begin": cursor["position"], "end": cursor["end"]}


def cut_to(
    source: EpochLoader | CombinedEpochLoader | SharedLoader,
    epoch: int,
    part: dict[str, Any] | None,
) -> int | float:
    """Have ``source`` give a part of an epoch, as :func:`cursor_of` has it, or all of it (None).

    Returns:
        Batches of the epoch in each process, those before the part included.
    """
    first, begin, end = (
        (0, 0, None) if part is None else (part["first"], part["begin"], part["end"])
    )
    source.cut(epoch, begin, end)
    return first + source.length_in(epoch)


def _loader_of(
    source: EpochLoader | CombinedEpochLoader | SharedLoader,
) -> tuple[Any, bool]:
    return (
        (source.loader, source.deal)
        if isinstance(source, SharedLoader)
        else (source, True)
    )
