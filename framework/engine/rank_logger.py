"""Python's logging in several processes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from types import FrameType
from typing import Any

import torch.distributed as dist

# What ``warning_once`` has said.
_said: set[str] = set()


class RankLogger(logging.LoggerAdapter):
    """Logs in the main process only, unless a call says otherwise.

    Each call takes two more arguments: ``main_process_only=False`` logs in all processes, ``in_order=True`` in all of
    them one after the other (all have to make that call).
    """

    def log(
        self,
        level: int,
        msg: Any,
        *args: Any,
        main_process_only: bool = True,
        in_order: bool = False,
        stacklevel: int = 1,
        **kwargs: Any,
    ) -> None:
        """As ``logging.Logger.log``."""
        rank, world_size = _rank_and_world_size()
        kwargs["stacklevel"] = stacklevel + _own_frames(sys._getframe(1))
        if in_order and world_size > 1:
            for turn in range(world_size):
                if turn == rank:
                    super().log(level, msg, *args, **kwargs)
                dist.barrier()
        elif rank == 0 or not main_process_only:
            super().log(level, msg, *args, **kwargs)

    def warning_once(
        self,
        msg: Any,
        *args: Any,
        stacklevel: int = 1,
        **kwargs: Any,
    ) -> None:
        """As ``warning``, the first time only that this is said."""
        said = repr((self.logger.name, msg, args))
        if said not in _said:
            _said.add(said)
            self.warning(msg, *args, stacklevel=stacklevel + 1, **kwargs)

    def process(
        self,
        msg: Any,
        kwargs: MutableMapping[str, Any],
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Put the rank before messages of several processes."""
        rank, world_size = _rank_and_world_size()
        return (f"[rank {rank}] {msg}" if world_size > 1 else msg), kwargs


def _own_frames(caller: FrameType) -> int:
    """What is to be added to ``stacklevel``, so that a record names the line of ``log``'s caller, or of ``info``'s."""
    if sys.version_info >= (3, 11):
        return 1
    # Before, logging counted frames of its own: one in any case, and that of its ``info``, which calls ``log``.
    return 3 if caller.f_globals.get("__name__") == "logging" else 2


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def get_logger(name: str, log_level: str | None = None) -> RankLogger:
    """A logger that speaks once for all processes.

    ::

        logger = get_logger(__name__)
        logger.info("once")
        logger.warning("of each", main_process_only=False)
        logger.info("of each, by rank", main_process_only=False, in_order=True)
        logger.warning_once("in the first round only")

    Args:
        name: as of ``logging.getLogger``.
        log_level: the level to set (default: the environment's ``LOOPWRIGHT_LOG_LEVEL``, else unchanged).
    """
    logger = logging.getLogger(name)
    level = log_level or os.environ.get("LOOPWRIGHT_LOG_LEVEL")
    if level is not None:
        logger.setLevel(level.upper())
        logger.root.setLevel(level.upper())
    return RankLogger(logger, {})
