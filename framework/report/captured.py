"""The warnings of a run, of Python and of our own log: each once, with how often it came."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

from ..messages import log

_MOST = 200
_LONGEST = 2000


class CapturedWarnings(logging.Handler):
    """Listens from :meth:`begin` to :meth:`end`.

    Args:
        on_new: called with each warning that has not come before, in the thread in which it comes.
    """

    def __init__(self, on_new: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._on_new = on_new
        self._show: Any = None
        self._listener: Any = None
        # By text.
        self.found: dict[str, dict[str, Any]] = {}
        self.left_out = 0
        self._process = os.getpid()

    def begin(self) -> None:
        """Listen from now on."""
        log.addHandler(self)
        self._show = shown = warnings.showwarning

        def listener(
            message: Any,
            category: Any,
            filename: Any,
            lineno: Any,
            *more: Any,
            **others: Any,
        ) -> None:
            self._note(str(message), category.__name__, f"{filename}:{lineno}")
            shown(message, category, filename, lineno, *more, **others)

        self._listener = listener
        warnings.showwarning = listener

    def end(self) -> None:
        """Listen no longer."""
        log.removeHandler(self)
        # Somebody may listen since, and calls what is there now.
        if warnings.showwarning is self._listener:
            warnings.showwarning = self._show

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of the log."""
        self._note(record.getMessage(), record.levelname.lower(), record.name)

    def _note(self, text: str, category: str, source: str) -> None:
        if os.getpid() != self._process:
            # A fork, such as a loader's worker, has inherited this.
            return
        text = text[:_LONGEST]
        known = self.found.get(text)
        if known is not None:
            known["count"] += 1
            return
        if len(self.found) >= _MOST:
            self.left_out += 1
            return
        self.found[text] = {
            "text": text,
            "category": category,
            "source": source,
            "time": time.time(),
            "count": 1,
        }
        self._on_new()

    def rows(self) -> list[dict[str, Any]]:
        """All of them, and how many were left out."""
        rows = list(self.found.values())
        if self.left_out:
            text = f"{self.left_out} more warnings were left out"
            rows.append({"text": text, "category": "record", "source": "", "count": 1})
        return rows
