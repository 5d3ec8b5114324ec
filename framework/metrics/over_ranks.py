"""How the values of an epoch are reduced over ranks: in one collective, after all have agreed on the names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..messages import log
from .context import LogContext
from .metric_state import fill_list_states
from .values import CUSTOM, LoggedValue, sum_dtype

if TYPE_CHECKING:
    from ...strategies.base import Strategy

# The total of a rank without a value, which changes nothing; it is 0 where totals are added.
_NEUTRAL = {"min": torch.inf, "max": -torch.inf}


def agree_on_entries(
    strategy: Strategy,
    module: torch.nn.Module | None,
    context: LogContext,
    due: list[LoggedValue],
    only_restored: set[Any],
) -> list[LoggedValue]:
    """The entries that all ranks are about to reduce, in one order. A collective.

    A rank that had no batch takes part in reducing what the others logged, and adds nothing.

    Args:
        strategy: knows the ranks.
        module: holds the torchmetrics that were logged.
        context: that of the running stage; its values get an entry for what only other ranks have logged.
        due: the entries that this rank has to reduce.
        only_restored: the keys of those that stem from a checkpoint, and have not been logged since.

    Raises:
        RuntimeError: if a rank that had batches did not log what another one did; on all of them.
    """
    shared = {entry.key: entry for entry in due if not entry.rank_zero_only}
    described = {
        key: (entry.facts(), entry.list_states()) for key, entry in shared.items()
    }
    # collective
    by_rank = strategy.gather_objects(
        (context.empty_loaders, described, context.loaders_by_name, only_restored),
    )
    for _, _, loaders_by_name, _ in by_rank:
        for name, loaders in loaders_by_name.items():
            context.loaders_by_name.setdefault(name, set()).update(loaders)
    logged_by_rank = [logged for _, logged, _, _ in by_rank]
    facts_by_key = {}
    for logged in reversed(logged_by_rank):
        for key, (facts, _) in logged.items():
            facts_by_key[key] = facts
    for key in [*facts_by_key]:
        if _is_outdated(key, by_rank):
            del facts_by_key[key]
            context.values.pop(key, None)
            if strategy.is_global_zero:
                log.warning(
                    "The checkpoint has values of log(%r) from some of the processes only, and nothing has logged that "
                    "name since: it is left out of this epoch",
                    key[0],
                )
        else:
            _require_everywhere(key, context.stage, by_rank)
    agreed = []
    for key in sorted(facts_by_key, key=repr):
        entry = shared.get(key)
        if entry is None:
            entry = LoggedValue(*key, **facts_by_key[key])
            entry.find_metric_in(module)
            context.values[key] = entry
        if entry.metric is not None:
            states = [logged[key][1] for logged in logged_by_rank if key in logged]
            fill_list_states(entry.value, states)
        agreed.append(entry)
    return [*agreed, *(entry for entry in due if entry.rank_zero_only)]


def _is_outdated(key: Any, by_rank: list[Any]) -> bool:
    """Whether ranks that had batches lack an entry, which the others have from a checkpoint alone.

    The program that saved it has failed for that, and this one may be mended.
    """
    lacking = []
    all_restored = True
    for empty_loaders, logged, _, only_restored in by_rank:
        if key not in logged:
            lacking.append(empty_loaders)
        elif key not in only_restored:
            all_restored = False
    return all_restored and not all(lacking)


def _require_everywhere(
    key: Any,
    stage: str | None,
    by_rank: list[Any],
) -> None:
    """Raise if a rank that had batches did not log what another one did."""
    having = []
    lacking = []
    names = []
    is_excused = True
    for rank, (empty_loaders, logged, _, _) in enumerate(by_rank):
        names.append(f"rank {rank} logged {_names(logged)}")
        if key in logged:
            having.append(rank)
        else:
            lacking.append(rank)
            is_excused &= bool(empty_loaders)
    if is_excused:
        return
    raise RuntimeError(
        f"log({key[0]!r}) was called on rank {_listed(having)} and not on rank {_listed(lacking)} in this "
        f"{stage} epoch ({'; '.join(names)}). Epoch values are reduced over all processes: log the same names on "
        "all of them, or pass rank_zero_only=True to keep rank 0's own"
    )


def _names(keys: Iterable[tuple[str, int | None]]) -> str:
    return ", ".join(sorted({repr(name) for name, _ in keys})) or "nothing"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def reduce_entries(
    strategy: Strategy, entries: list[LoggedValue]
) -> Iterator[tuple[LoggedValue, Any]]:
    """Give each entry that has an epoch's value on any rank, and that value: one collective for all entries."""
    shared = []
    for entry in entries:
        if entry.reduction == CUSTOM:
            yield from _by_function(strategy, entry)
            continue
        if strategy.world_size > 1 and not entry.rank_zero_only:
            shared.append(entry)
            continue
        total, weight = entry.folded()
        if total is not None:
            yield entry, entry.epoch_value(total, weight)
    if not shared:
        return
    rows = [_total_and_weight(entry, strategy.device) for entry in shared]
    # collective, of which the result has the shape (world_size, entries, 2)
    by_rank = strategy.all_gather(torch.stack(rows))
    totals = by_rank[:, :, 0].unbind(1)
    # host–device sync
    weights = by_rank[:, :, 1].sum(0).tolist()
    for entry, column, weight in zip(shared, totals, weights, strict=True):
        yield entry, entry.epoch_value(entry.reduce(column), weight)


def _by_function(
    strategy: Strategy, entry: LoggedValue
) -> Iterator[tuple[LoggedValue, Any]]:
    """Give an entry, and what its function makes of the values of all ranks. Two collectives with several ranks."""
    values, weight = entry.folded()
    if strategy.world_size > 1 and not entry.rank_zero_only:
        mine = None if values is None else values.cpu()
        by_rank = [v for v in strategy.gather_objects(mine) if v is not None]
        values = torch.cat(by_rank) if by_rank else None
        found = None
        if values is not None and entry.function is not None:
            found = entry.epoch_value(values, weight)
        # A rank that had no batch does not know the function.
        results = [v for v in strategy.gather_objects(found) if v is not None]
        if results:
            yield entry, results[0]
    elif values is not None and entry.function is not None:
        yield entry, entry.epoch_value(values, weight)


def _total_and_weight(entry: LoggedValue, device: torch.device) -> torch.Tensor:
    total, weight = entry.folded()
    if total is None:
        total = _NEUTRAL.get(entry.reduction, 0.0)
    numbers = [
        torch.as_tensor(number, dtype=sum_dtype(device), device=device)
        for number in (total, weight)
    ]
    return torch.stack(numbers)
