"""Lightning's names, answered by Loopwright; see :mod:`loopwright.framework.compat.lightning`."""

from ..framework.compat.imports import import_parts_of
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

# `import loopwright.lightning as pl` is enough to use `pl.callbacks`, as Lightning imports its parts itself.
__getattr__ = import_parts_of(__name__)
