"""What the framework tells its user: one logger, which can be configured or silenced as any other."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger("loopwright")


class _StandardError(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is now: a progress bar may have replaced it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def configure() -> None:
    """Show information on standard error, unless the program has set up logging itself."""
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(_StandardError())
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)


def silence() -> None:
    """Keep information to the main process: this is another one."""
    if any(isinstance(handler, _StandardError) for handler in log.handlers):
        log.setLevel(logging.WARNING)
