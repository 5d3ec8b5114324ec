"""Python's logging among several processes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import torch.distributed as dist

# Frames between the caller and logging's own record. Since Python 3.11 logging leaves its own frames out of the count.
_OWN_FRAMES = 2 if sys.version_info >= (3, 11) else 3

_said: set[str] = set()  # by ``warning_once``


class RankLogger(logging.LoggerAdapter):
    """Logs in the main process only, unless a call says otherwise.

    Each call takes two more arguments: ``main_process_only=False`` logs in all processes, ``in_order=True`` in all of
    them one after the other (all have to make that call).
    """

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """As ``logging.Logger.log``."""
        main_only, in_order = (
            kwargs.pop("main_process_only", True),
            kwargs.pop("in_order", False),
        )
        kwargs.setdefault("stacklevel", 1)
        if in_order and _processes() > 1:
            for rank in range(_processes()):
                if rank == _rank():
                    self._log_here(level, msg, args, kwargs)
                dist.barrier()
        elif not main_only or _rank() == 0:
            self._log_here(level, msg, args, kwargs)

    def warning_once(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """As ``warning``, the first time only that this is said."""
        said = repr((self.logger.name, msg, args))
        if said not in _said:
            _said.add(said)
            self.warning(
                msg, *args, **{**kwargs, "stacklevel": kwargs.get("stacklevel", 1) + 1}
            )

    def _log_here(
        self, level: int, msg: Any, args: Any, kwargs: dict[str, Any]
    ) -> None:
        if self.isEnabledFor(level):
            told, options = self.process(
                msg, {**kwargs, "stacklevel": kwargs["stacklevel"] + _OWN_FRAMES}
            )
            self.logger.log(level, told, *args, **options)

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Put the rank before messages of several processes."""
        return (f"[rank {_rank()}] {msg}" if _processes() > 1 else msg), kwargs


def _processes() -> int:
    return (
        dist.get_world_size()
        if dist.is_initialized()
        else int(os.environ.get("WORLD_SIZE", 1))
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


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
