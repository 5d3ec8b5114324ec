"""LightningModule and LightningDataModule."""

from ..framework.compat.lightning.core import *  # noqa: F403 # all that it lists

# So that the paths below it are imported, too.
__path__: list[str] = []
