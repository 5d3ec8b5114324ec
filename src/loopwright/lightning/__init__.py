"""Lightning's names, answered by Loopwright; see :mod:`loopwright.framework.compat.lightning`."""

from ..framework.compat.lightning import (
    Callback,
    Fabric,
    LightningDataModule,
    LightningModule,
    Trainer,
    __version__,
    install,
    seed_everything,
)

__all__ = [
    "Callback",
    "Fabric",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "__version__",
    "install",
    "seed_everything",
]
