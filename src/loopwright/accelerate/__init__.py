"""Accelerate's names: programs that were written for it run on Loopwright by ``import loopwright.accelerate``.

For programs that nobody may edit, :func:`install` answers imports of ``accelerate`` with these names.
"""

from __future__ import annotations

from typing import Any

from ..framework.compat.accelerate.accelerator import (
    Accelerator,
)
from ..framework.compat.accelerate.big_models import (
    prepare_pippy,
)
from ..framework.compat.accelerate.device_maps import (
    infer_auto_device_map,
)
from ..framework.compat.accelerate.dispatch import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    init_on_device,
    load_checkpoint_and_dispatch,
)
from ..framework.compat.accelerate.imports import (
    install,
)
from ..framework.compat.accelerate.launchers import (
    debug_launcher,
    notebook_launcher,
)
from ..framework.compat.accelerate.loaders import (
    skip_first_batches,
)
from ..framework.compat.accelerate.loading import (
    load_checkpoint_in_model,
)
from ..framework.compat.accelerate.memory import (
    find_executable_batch_size,
)
from ..framework.compat.accelerate.options import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProfileKwargs,
)
from ..framework.compat.accelerate.parallelism import (
    ParallelismConfig,
)
from ..framework.compat.accelerate.plugins import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
)
from ..framework.compat.accelerate.random import (
    synchronize_rng_states,
)
from ..framework.compat.accelerate.state import (
    PartialState,
)
from . import utils

__all__ = [
    "Accelerator",
    "AutocastKwargs",
    "DDPCommunicationHookType",
    "DataLoaderConfiguration",
    "DeepSpeedPlugin",
    "DistributedDataParallelKwargs",
    "DistributedType",
    "FullyShardedDataParallelPlugin",
    "GradScalerKwargs",
    "InitProcessGroupKwargs",
    "ParallelismConfig",
    "PartialState",
    "ProfileKwargs",
    "cpu_offload",
    "cpu_offload_with_hook",
    "debug_launcher",
    "disk_offload",
    "dispatch_model",
    "find_executable_batch_size",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "install",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "notebook_launcher",
    "prepare_pippy",
    "skip_first_batches",
    "synchronize_rng_states",
]

# The version of Accelerate whose names these are: packages ask for it.
__version__ = "1.15.0"


def __getattr__(name: str) -> Any:
    if name.startswith("is_"):
        return getattr(utils, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
