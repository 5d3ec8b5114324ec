"""Which process has other parameters than the others, and what it is that differs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...strategies import Strategy


@dataclass
class Difference:
    """Between two tensors of one shape and type.

    Attributes:
        count: how many numbers differ in any bit.
        total: of so many.
        largest: between two of them, as an absolute value.
        index: where that is; or the first that differs, if one of them is not finite.
        own: the number there.
        other: the other tensor's.
    """

    count: int
    total: int
    largest: float
    index: tuple[int, ...]
    own: Any
    other: Any

    def __str__(self) -> str:
        place = f" at {list(self.index)}" if self.index else ""
        return (
            f"{self.count} of {self.total} numbers, by up to {self.largest:.6g}{place}"
        )


def difference(own: Tensor, other: Tensor) -> Difference | None:
    """Compare all bits of two tensors of one shape and type; None if they are equal. It waits for the device."""
    first = _rows_of_bytes(own)
    second = _rows_of_bytes(other)
    differs = (first != second).any(1).nonzero().flatten()
    if not len(differs):
        return None
    wide = torch.complex128 if own.is_complex() else torch.float64
    own_values = own.detach().reshape(-1)[differs]
    other_values = other.detach().reshape(-1)[differs]
    distance = (own_values.to(wide) - other_values.to(wide)).abs()
    # Numbers that are not finite are the first to look at.
    place = int(distance.nan_to_num(nan=torch.inf).argmax())
    index = _index_in(own.shape, int(differs[place]))
    return Difference(
        len(differs),
        own.numel(),
        float(distance[place]),
        index,
        own_values[place].item(),
        other_values[place].item(),
    )


def _index_in(shape: tuple[int, ...], place: int) -> tuple[int, ...]:
    """Return the index of a number that has this place in the flattened tensor."""
    index = []
    for size in reversed(shape):
        place, within = divmod(place, size)
        index.append(within)
    return tuple(reversed(index))


def _rows_of_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of each number: ``(numbers, bytes)``."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1, 1)
    return plain.view(torch.uint8)


def describe_departure(
    strategy: Strategy,
    parameters: dict[str, tuple[Tensor, int]],
    of_ranks: list[int],
) -> str:
    """Say which process has other parameters than the others, and what differs. Collectives.

    Args:
        strategy: of the processes.
        parameters: by name, each with its fingerprint.
        of_ranks: fingerprints of all of them together, by rank: not all are equal.

    Returns:
        One or more sentences, whose first says on a process that is not to blame that another one is.
    """
    reference, is_certain = _reference(of_ranks)
    departed = [
        rank for rank, found in enumerate(of_ranks) if found != of_ranks[reference]
    ]
    own = {name: found for name, (_, found) in parameters.items()}
    by_rank: list[dict[str, int]] = strategy.gather_objects(own)  # collective
    expected = by_rank[reference]
    found = by_rank[departed[0]]
    names = [name for name in expected if expected[name] != found.get(name)]
    others = f"rank {reference}" if len(of_ranks) == 2 else "the other processes"
    who = f"rank {departed[0]} departs from {others}"
    if len(departed) > 1:
        who = f"rank {', '.join(map(str, departed))} depart from {others}"
    text = f"{who}: its parameters are not the same any more."
    if names:
        text += _describe_first(strategy, parameters, names, reference, departed[0])
    if not is_certain:
        text += " Which side is right cannot be told, as there is no majority."
    text += (
        " Faults of a device or of memory do this, and code that differs by process: parameters changed outside of the "
        "optimizer, or by gradients that were not averaged."
    )
    if strategy.global_rank in departed:
        text = f"this process, {text}"
    return text


def _reference(of_ranks: list[int]) -> tuple[int, bool]:
    """Return a rank with the fingerprint that most have, and whether these are the majority; else it is rank 0."""
    value, count = Counter(of_ranks).most_common(1)[0]
    if 2 * count > len(of_ranks):
        return of_ranks.index(value), True
    return 0, False


def _describe_first(
    strategy: Strategy,
    parameters: dict[str, tuple[Tensor, int]],
    names: list[str],
    reference: int,
    departed: int,
) -> str:
    """Say how the first parameter that differs does. A collective or two."""
    name = names[0]
    own = parameters[name][0].detach()
    sent = own.cpu() if strategy.global_rank == reference else None
    expected = strategy.broadcast(sent, reference)  # collective
    found = None
    if own.shape == expected.shape and own.dtype == expected.dtype:
        found = difference(own.cpu(), expected)
    seen = strategy.broadcast(found, departed)  # collective
    text = f" {len(names)} of {len(parameters)} differ, the first is {name!r}"
    if seen is None:
        return f"{text}, in its shape or type."
    return f"{text}: {seen}, {seen.own!r} on rank {departed} and {seen.other!r} on rank {reference}."
