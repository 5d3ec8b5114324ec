"""Lightning's plugins: precisions, the environments of launchers, and what writes checkpoints."""

from __future__ import annotations

import signal
from typing import Any

import torch

from ....strategies import Precision
from ....strategies.precision import create_precision
from ..imports import unserved

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


class MixedPrecision(Precision):
    """A :class:`~loopwright.strategies.Precision` with Lightning's arguments.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``.
        device: accepted for familiarity; the Trainer chooses the device.
        scaler: a ``torch.amp.GradScaler``, whose scale and factors are taken.
    """

    def __init__(self, precision: str, device: str = "cpu", scaler: Any = None) -> None:
        policy = create_precision(precision)
        fields = {name: getattr(policy, name) for name in policy.__dataclass_fields__}
        if scaler is not None:
            fields |= {
                "init_scale": scaler.get_scale(),
                "growth_factor": scaler.get_growth_factor(),
                "backoff_factor": scaler.get_backoff_factor(),
                "growth_interval": scaler.get_growth_interval(),
            }
        super().__init__(**fields)


def HalfPrecision(precision: str = "16-true") -> Precision:  # noqa: N802 # Lightning's name
    """The precision ``"16-true"`` or ``"bf16-true"``."""
    return create_precision(precision)


def DoublePrecision() -> Precision:  # noqa: N802 # Lightning's name
    """The precision ``"64-true"``."""
    return create_precision("64-true")


class ClusterEnvironment:
    """The environment of a launcher, which Loopwright finds by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args, kwargs


class LightningEnvironment(ClusterEnvironment):
    """No launcher: the Trainer starts the processes."""


class SLURMEnvironment(ClusterEnvironment):
    """Processes that ``srun`` has started.

    Args:
        auto_requeue: the Trainer's argument of that name.
        requeue_signal: SIGUSR1, which is what None means, or SIGUSR2; either one works, whichever is named.

    Raises:
        NotImplementedError: for another signal.
    """

    def __init__(self, auto_requeue: bool = True, requeue_signal: Any = None) -> None:
        if requeue_signal not in (None, signal.SIGUSR1, signal.SIGUSR2):
            raise NotImplementedError(
                "requeue_signal must be SIGUSR1 or SIGUSR2, as in #SBATCH --signal=SIGUSR1@120; got "
                f"{requeue_signal!r}"
            )
        super().__init__(auto_requeue=auto_requeue, requeue_signal=requeue_signal)
        self.auto_requeue = auto_requeue
        self.requeue_signal = requeue_signal


class TorchElasticEnvironment(ClusterEnvironment):
    """Processes that torchrun has started."""


class MPIEnvironment(ClusterEnvironment):
    """Processes that MPI has started."""


class KubeflowEnvironment(ClusterEnvironment):
    """Processes that a PyTorchJob has started."""


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
        """
        if storage_options is not None:
            raise NotImplementedError("storage_options must be None; configure fsspec")
        torch.save(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a dict that ``torch.save`` has written."""
        return torch.load(path, map_location=map_location, weights_only=weights_only)


_IO = "checkpoints are written while the training goes on by themselves; ModelCheckpoint(async_save=False) waits"
AsyncCheckpointIO = unserved("AsyncCheckpointIO", _IO)
_WrappingCheckpointIO = unserved("_WrappingCheckpointIO", _IO)
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
