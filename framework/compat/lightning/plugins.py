"""Lightning's plugins: precisions, the environments of launchers, and what writes checkpoints."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..imports import unserved
from .cluster import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from .precisions import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from .utilities import apply_to_collection, get_filesystem

__all__ = [
    "AsyncCheckpointIO",
    "BitsandbytesPrecision",
    "CheckpointIO",
    "ClusterEnvironment",
    "DeepSpeedPrecision",
    "DoublePrecision",
    "FSDPPrecision",
    "HalfPrecision",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LayerSync",
    "LightningEnvironment",
    "MPIEnvironment",
    "MixedPrecision",
    "Precision",
    "PrecisionPlugin",
    "SLURMEnvironment",
    "TorchCheckpointIO",
    "TorchElasticEnvironment",
    "TorchSyncBatchNorm",
    "TransformerEnginePrecision",
    "_WrappingCheckpointIO",
]

PrecisionPlugin = Precision


class LayerSync:
    """The base of what makes layers compute over all processes."""


class TorchSyncBatchNorm(LayerSync):
    """Batch norms over all processes: the Trainer's ``sync_batchnorm=True``."""


class CheckpointIO:
    """The base of what writes checkpoints in another trainer.

    A Trainer takes none: what it writes is complete or does not count, which a plugin could not promise. A URL as
    ``ModelCheckpoint(dirpath=…)`` writes to any store that fsspec knows.
    """


class TorchCheckpointIO(CheckpointIO):
    """Writes one file, as ``save_format="file"`` does by itself; with Lightning's methods for use by hand."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a dict with ``torch.save``.

        Args:
            checkpoint: the dict.
            path: the file.
            storage_options: must be None.

        Raises:
            TypeError: for ``storage_options``.
        """
        if storage_options is not None:
            raise TypeError("storage_options must be None: configure fsspec")
        torch.save(checkpoint, path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file or folder."""
        fs = get_filesystem(path)
        if fs.exists(str(path)):
            fs.rm(str(path), recursive=True)

    def teardown(self) -> None:
        """Nothing is to be done at the end."""

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a dict that ``torch.save`` has written."""
        return torch.load(path, map_location=map_location, weights_only=weights_only)


class WrappingCheckpointIO(CheckpointIO):
    """Does more than another one, which it calls.

    Args:
        checkpoint_io: the other one.
    """

    def __init__(self, checkpoint_io: Any = None) -> None:
        self.checkpoint_io = checkpoint_io or TorchCheckpointIO()

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint."""
        self.checkpoint_io.save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Read a checkpoint."""
        return self.checkpoint_io.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Remove a checkpoint."""
        self.checkpoint_io.remove_checkpoint(*args, **kwargs)

    def teardown(self) -> None:
        """Let the other one end."""
        self.checkpoint_io.teardown()


# Lightning's name for it.
_WrappingCheckpointIO = WrappingCheckpointIO


class AsyncCheckpointIO(WrappingCheckpointIO):
    """Writes in a thread, while the program goes on; a Trainer does so without it.

    Args:
        checkpoint_io: what writes.
    """

    def __init__(self, checkpoint_io: Any = None) -> None:
        super().__init__(checkpoint_io)
        self._executor: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Begin to write a copy of a checkpoint; what the last writing has raised is raised now."""
        if self._last is not None and self._last.done():
            self._last.result()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1)
        args, kwargs = apply_to_collection((args, kwargs), Tensor, torch.clone)
        write = super().save_checkpoint
        self._last = self._executor.submit(write, *args, **kwargs)

    def teardown(self) -> None:
        """Wait until all is written."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        if self._last is not None:
            self._last.result()
            self._last = None


BitsandbytesPrecision = unserved(
    "BitsandbytesPrecision", "make the model of bitsandbytes' layers in configure_model"
)
_BY_STRATEGY = 'pass precision="16-mixed" or another name: the strategy applies it'
DeepSpeedPrecision = unserved("DeepSpeedPrecision", _BY_STRATEGY)
FSDPPrecision = unserved("FSDPPrecision", _BY_STRATEGY)
LSFEnvironment = unserved("LSFEnvironment", "start the program with torchrun")
TransformerEnginePrecision = unserved(
    "TransformerEnginePrecision", "use its layers in configure_model"
)
