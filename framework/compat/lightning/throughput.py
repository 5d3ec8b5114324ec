"""Lightning Fabric's ``Throughput``, for loops of one's own."""

from __future__ import annotations

from collections import deque
from typing import Any

from ....callbacks.peak_flops import available_flops
from .utilities import measure_flops

__all__ = ["Throughput", "ThroughputMonitor", "get_available_flops", "measure_flops"]


class Throughput:
    """Computes how much is done per second, over the last updates.

    Args:
        available_flops: operations that a device can do per second, for ``device/mfu``.
        world_size: number of devices, all of which do as much.
        window_size: over how many updates.
        separator: stands between ``device`` and a name.
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        if world_size < 1 or window_size < 2:
            raise ValueError(
                f"world_size must be at least 1, and window_size 2; got {world_size} and {window_size}"
            )
        self.available_flops = available_flops
        self.world_size = world_size
        self.separator = separator
        self._counts: deque[dict[str, float]] = deque(maxlen=window_size)
        self._flops: deque[float] = deque(maxlen=window_size)

    def update(
        self,
        *,
        time: float,
        batches: int,
        samples: int,
        lengths: int | None = None,
        flops: int | None = None,
    ) -> None:
        """Take note of what has been done so far.

        Args:
            time: seconds since the beginning.
            batches: batches on this device.
            samples: samples in them.
            lengths: items in those, such as tokens.
            flops: operations since the last update.

        Raises:
            ValueError: for a number that is less than it was, or fewer samples than batches, or items than samples.
        """
        if samples < batches:
            raise ValueError(
                f"Expected samples ({samples}) to be greater or equal than batches ({batches})"
            )
        if lengths is not None and lengths < samples:
            raise ValueError(
                f"Expected lengths ({lengths}) to be greater or equal than samples ({samples})"
            )
        counts: dict[str, float] = {
            "time": time,
            "batches": batches,
            "samples": samples,
        }
        if lengths is not None:
            counts["lengths"] = lengths
        last = self._counts[-1] if self._counts else {}
        for name, value in counts.items():
            if name in last and value < last[name]:
                raise ValueError(
                    f"Expected the value to increase, last: {last[name]}, current: {value}"
                )
        self._counts.append(counts)
        if flops is not None:
            self._flops.append(flops * self.world_size)

    def compute(self) -> dict[str, float]:
        """What was noted last, and, once there are enough updates, what was done per second."""
        metrics = dict(self._counts[-1])
        if len(self._counts) < (self._counts.maxlen or 0):
            return metrics
        first = self._counts[0]
        last = self._counts[-1]
        seconds = last["time"] - first["time"]
        titles = {"batches": "batches", "samples": "samples", "lengths": "items"}
        for name, title in titles.items():
            if name in first and name in last:
                rate = (last[name] - first[name]) / seconds
                self._add(metrics, f"{title}_per_sec", rate)
        if len(self._flops) == self._flops.maxlen:
            done = sum(self._flops) - self._flops[0]
            rate = done / seconds / self.world_size
            self._add(metrics, "flops_per_sec", rate)
            if self.available_flops:
                metrics[f"device{self.separator}mfu"] = rate / self.available_flops
        return metrics

    def _add(self, metrics: dict[str, float], name: str, rate: float) -> None:
        metrics[f"device{self.separator}{name}"] = rate
        if self.world_size > 1:
            metrics[name] = rate * self.world_size

    def reset(self) -> None:
        """Forget all updates."""
        self._counts.clear()
        self._flops.clear()


class ThroughputMonitor(Throughput):
    """A :class:`Throughput` that logs what it computes.

    Args:
        fabric: has ``log_dict`` and ``world_size``, such as an ``Engine``.
        **kwargs: of :class:`Throughput`.
    """

    def __init__(self, fabric: Any, **kwargs: Any) -> None:
        kwargs.setdefault("world_size", fabric.world_size)
        super().__init__(**kwargs)
        self._fabric = fabric
        self.step = -1

    def compute_and_log(self, step: int | None = None, **kwargs: Any) -> Any:
        """Log what :meth:`compute` returns, and return it.

        Args:
            step: of the row; by default one more than the last.
            **kwargs: of :meth:`compute`.
        """
        self.step = self.step + 1 if step is None else step
        metrics = self.compute(**kwargs)
        self._fabric.log_dict(metrics, step=self.step)
        return metrics


def get_available_flops(device: Any, dtype: Any) -> int | None:
    """The operations that a device can do per second, if it is known; None else."""
    flops = available_flops(device, dtype)
    return None if flops is None else int(flops)
