"""Lightning's ``SpikeDetection``, which ends the training at a spike of the loss."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....callbacks import Callback

__all__ = ["SpikeDetection", "TrainingSpikeException"]


class TrainingSpikeException(RuntimeError):
    """The loss of a batch spiked.

    Args:
        batch_idx: the batch.
        *args: for ``RuntimeError``.
        **kwargs: for ``RuntimeError``.
    """

    def __init__(self, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            f"Training spike detected in batch {batch_idx}", *args, **kwargs
        )


class SpikeDetection(Callback):
    """Ends the training with a :class:`TrainingSpikeException` when the loss of any process spikes.

    It reads the loss in each step, and names this batch and the one before in a file. Loopwright's own
    ``SpikeDetector`` goes on without the batch instead.

    Args:
        mode: ``"min"`` if less is better, ``"max"`` if more is.
        window: over how many values the running mean is taken.
        warmup: the first batch of an epoch that can be a spike.
        atol: a spike is at least so far from the running mean.
        rtol: a spike is at least this multiple of the running mean away from it.
        exclude_batches_path: the JSON file for the batches' indices, or the folder of ``skip_batches.json``. Default:
            the Trainer's ``default_root_dir``.
        finite_only: count NaN and infinity as spikes in any case.

    Attributes:
        bad_batches: the indices of the batches that the file names.
        last_val: the last value that was no spike.
        running_mean: the running mean, of torchmetrics.

    Raises:
        ValueError: for another mode.
    """

    def __init__(
        self,
        mode: str = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None,
        finite_only: bool = True,
    ) -> None:
        from torchmetrics.aggregation import MeanMetric
        from torchmetrics.wrappers import Running

        if mode not in ("min", "max"):
            raise ValueError(f"Invalid mode. Has to be min or max, found {mode}")
        self.last_val: Tensor | float = 0.0
        # Each process has the mean of its own values.
        mean = MeanMetric(dist_sync_on_step=False, sync_on_compute=False)
        self.running_mean = Running(mean, window=window)
        self.running_mean.dist_sync_on_step = False
        self.running_mean.sync_on_compute = False
        self.mode = mode
        self.warmup = warmup
        self.atol = atol
        self.rtol = rtol
        self.bad_batches: list[int] = []
        self.exclude_batches_path = exclude_batches_path
        self.finite_only = finite_only

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = outputs
        if isinstance(outputs, Mapping):
            loss = outputs["loss"]
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"outputs have to be of type torch.Tensor or Mapping, got {type(outputs).__qualname__}"
            )
        loss = loss.detach()
        if batch_idx == 0:
            self.running_mean.to(trainer.strategy.root_device)
        is_spike = batch_idx >= self.warmup and self._is_spike(loss)
        is_finite = bool(torch.isfinite(loss).all())
        found = torch.tensor([is_spike, not is_finite], dtype=torch.int64)
        any_spikes, any_infinite = trainer.strategy.reduce(found, "max").tolist()
        if any_spikes:
            self._end(trainer, batch_idx)
        if self.finite_only or not any_infinite:
            self.running_mean.update(loss)
            self.last_val = loss

    def _is_spike(self, loss: Tensor) -> bool:
        if self.finite_only and not torch.isfinite(loss).all():
            return True
        change = loss - self.last_val
        if bool(((change <= 0) if self.mode == "min" else (change >= 0)).all()):
            return False
        with warnings.catch_warnings():
            # Torchmetrics warns of a mean of no value yet, which is NaN, and so no limit.
            warnings.simplefilter("ignore")
            mean = float(self.running_mean.compute())
        distance = float(abs(loss - mean))
        is_far = self.atol is None or distance >= abs(self.atol)
        return is_far and (self.rtol is None or distance >= abs(self.rtol * mean))

    def _end(self, trainer: Any, batch_idx: int) -> None:
        """Name the batches, and end the training."""
        # That batch may be broken; or the step of the one before has broken the weights.
        self.bad_batches += [batch_idx - 1, batch_idx]
        path = str(self.exclude_batches_path or trainer.default_root_dir)
        if not path.endswith(".json"):
            path = os.path.join(path, "skip_batches.json")
        self.exclude_batches_path = path
        if trainer.is_global_zero:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(self.bad_batches, file, indent=4)
        raise TrainingSpikeException(batch_idx=batch_idx)

    def state_dict(self) -> dict[str, Any]:
        path = self.exclude_batches_path
        return {
            "last_val": float(self.last_val),
            "mode": self.mode,
            "warmup": self.warmup,
            "atol": self.atol,
            "rtol": self.rtol,
            "bad_batches": self.bad_batches,
            "bad_batches_path": None if path is None else os.fspath(path),
            "running": self.running_mean.state_dict(),
            "mean": self.running_mean.base_metric.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_val = state_dict["last_val"]
        self.mode = state_dict["mode"]
        self.warmup = state_dict["warmup"]
        self.atol = state_dict["atol"]
        self.rtol = state_dict["rtol"]
        self.bad_batches = list(state_dict["bad_batches"])
        self.exclude_batches_path = state_dict["bad_batches_path"]
        self.running_mean.load_state_dict(state_dict["running"])
        self.running_mean.base_metric.load_state_dict(state_dict["mean"])
