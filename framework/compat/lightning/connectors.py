"""What programs call of the parts of Lightning's Trainer."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch


class CheckpointConnector:
    """What would be in a checkpoint, as ``trainer._checkpoint_connector.dump_checkpoint()``.

    Args:
        trainer: whose checkpoint it is.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def dump_checkpoint(self, weights_only: bool = False) -> dict[str, Any]:
        """Return the contents of a checkpoint that is saved now. A collective.

        Args:
            weights_only: leave out all that only resuming needs.
        """
        trainer = self._trainer
        with tempfile.TemporaryDirectory() as folder:
            # All processes read what the main one has written.
            path = trainer.strategy.broadcast(os.path.join(folder, "checkpoint.ckpt"))
            trainer.save_checkpoint(path, weights_only)
            content = torch.load(path, map_location="cpu", weights_only=False)
            trainer.strategy.barrier()
        return content
