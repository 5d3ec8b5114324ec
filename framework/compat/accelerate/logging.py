"""Accelerate's logging: Python's, once for all processes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

from ...engine.rank_logger import RankLogger


class MultiProcessAdapter(RankLogger):
    """Logs in the main process only, unless a call says ``main_process_only=False``, or ``in_order=True``."""

    def log(
        self,
        level: int,
        msg: Any,
        *args: Any,
        stacklevel: int = 2,
        **kwargs: Any,
    ) -> None:
        """As ``logging.Logger.log``; a ``stacklevel`` of 2 is the line that calls this, as in Accelerate."""
        # Before 3.11, logging counts its own `info` that calls this.
        caller = sys._getframe(1).f_globals.get("__name__")
        if sys.version_info < (3, 11) and caller == "logging":
            stacklevel += 1
        super().log(level, msg, *args, stacklevel=stacklevel, **kwargs)

    def warning_once(
        self, msg: Any, *args: Any, stacklevel: int = 2, **kwargs: Any
    ) -> None:
        """As ``warning``, the first time only that this is said."""
        super().warning_once(msg, *args, stacklevel=stacklevel + 1, **kwargs)

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave messages as they are."""
        return msg, kwargs


def get_logger(name: str, log_level: str | None = None) -> MultiProcessAdapter:
    """A logger that speaks once for all processes.

    Args:
        name: as of ``logging.getLogger``.
        log_level: the level to set (default: the environment's ``ACCELERATE_LOG_LEVEL``, else unchanged).
    """
    level = log_level or os.environ.get("ACCELERATE_LOG_LEVEL")
    logger = logging.getLogger(name)
    if level is not None:
        logger.setLevel(level.upper())
        logger.root.setLevel(level.upper())
    return MultiProcessAdapter(logger, {})
