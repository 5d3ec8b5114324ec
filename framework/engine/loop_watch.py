"""Noticing that a program's own loop, on an Engine, stands still."""

from __future__ import annotations

from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

from ...strategies.launch.heartbeat import Heartbeat

if TYPE_CHECKING:
    from .engine import Engine


class LoopWatch:
    """Watches the loops of a process's engines: one of them is as good as another.

    Args:
        engines: those that there are; not kept alive by this.
    """

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = engines
        self._heartbeat: Heartbeat | None = None

    def begin(self, engine: Engine) -> None:
        """Watch from now on, with the time-outs of this engine, if that is not done.

        By default, a process alone is not: nobody waits for it, and the program may do other things than train.
        """
        timeout = engine.hang_timeout
        is_alone = engine.num_processes == 1
        if self._heartbeat is not None or (timeout.is_default and is_alone):
            return
        strategy = engine.strategy
        self._heartbeat = Heartbeat(
            timeout,
            self._place,
            self._counters,
            strategy.global_rank,
            strategy.world_size,
        )
        self._heartbeat.begin()

    def end(self) -> None:
        """Watch no longer."""
        if self._heartbeat is not None:
            self._heartbeat.end()
            self._heartbeat = None

    def _place(self, _: list[FrameType]) -> tuple[str, str]:
        steps = [engine.global_step for engine in self._engines]
        phase = "setup"
        if any(engine.running_loader is not None for engine in self._engines):
            phase = "train"
        return phase, f"global step {max(steps, default=0)}"

    def _counters(self) -> list[Any]:
        """What changes when a loop goes on: steps, micro-batches, and the batches that loaders have given."""
        return [
            (
                engine.accumulation.begun,
                engine.accumulation.count,
                [loader.batches for loader in engine.prepared.loaders],
            )
            for engine in self._engines
        ]
