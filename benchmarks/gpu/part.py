"""What a part of the benchmark consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..report import Table
from .rounds import Found, Plan


@dataclass(frozen=True)
class Part:
    """One part, which runs in a process of its own.

    Attributes:
        name: under which it is started.
        seconds: that it may take, its process's start among them.
        measure: gives measurements as they are made: those before a part is stopped count.
        tabulate: makes them a table.
        needs: what it reads that there is only with CUDA; "" for a part that can be rehearsed on a CPU.
    """

    name: str
    seconds: float
    measure: Callable[[Plan], Iterator[Found]]
    tabulate: Callable[[list[Found]], Table]
    needs: str = ""
