"""Accelerate's names for models that are too big for one device."""

from __future__ import annotations

from ..framework.compat.accelerate.dispatch import (
    attach_layerwise_casting_hooks,
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    init_on_device,
    load_checkpoint_and_dispatch,
    refuse_recurrent_layers,
)
from ..framework.compat.accelerate.imports import names_of_others

# Programs that divide sequences by themselves ask Accelerate under this name.
_refuse_recurrent_layers_under_sequence_parallelism = refuse_recurrent_layers

__all__ = [
    "attach_layerwise_casting_hooks",
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "init_empty_weights",
    "init_on_device",
    "load_checkpoint_and_dispatch",
]

__getattr__ = names_of_others(__name__)
