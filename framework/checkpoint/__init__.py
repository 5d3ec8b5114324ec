"""What is on disk: checkpoints as folders of tensors and JSON, or as single files."""

from ..errors import CheckpointError
from .find import find_checkpoints, resolve
from .manifest import is_complete, read_manifest
from .reader import load_checkpoint
from .writer import remove_checkpoint, save_checkpoint

__all__ = [
    "CheckpointError",
    "find_checkpoints",
    "is_complete",
    "load_checkpoint",
    "read_manifest",
    "remove_checkpoint",
    "resolve",
    "save_checkpoint",
]
