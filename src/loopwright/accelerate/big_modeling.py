"""Accelerate's names for models that are too big for one device."""

from __future__ import annotations

from ..framework.compat.accelerate.big_models import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    init_on_device,
)
from ..framework.compat.accelerate.checkpoints import load_checkpoint_and_dispatch
from ..framework.compat.accelerate.imports import names_of_others

__all__ = [
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
]

__getattr__ = names_of_others(__name__)
