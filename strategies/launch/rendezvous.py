"""Where the processes of a job meet, and how they leave."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

LAST_WORK: list[Any] = []  # the last barrier's


STORE: list[
    Any
] = []  # where the processes meet: kept for the next process group, which must not meet in another


BEFORE_LEAVING: list[
    Callable[[], None]
] = []  # what is to be done while the process group is still there


def leave_group() -> None:
    """Leave the process group, and so end gloo's threads: one that drops a tensor as the interpreter ends aborts it."""
    import torch.distributed as dist

    for function in list(BEFORE_LEAVING):
        function()
    LAST_WORK.clear()
    gc.collect()  # the traceback of what ended the program may hold DDP, which holds the group
    if dist.is_initialized():
        dist.destroy_process_group()
    if (groups := sys.modules.get("deepspeed.utils.groups")) is not None:
        groups._release_process_group_references()  # which it keeps for its next engine


def leave() -> None:
    """Leave the process group for good."""
    leave_group()
    STORE.clear()
