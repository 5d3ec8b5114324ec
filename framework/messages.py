"""What the framework tells its user, through one logger that can be configured or silenced as any other."""

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

    def emit(self, record: logging.LogRecord) -> None:
        # A library may have set up logging since; its handler then writes the line as well.
        if not log.propagate or not any(
            _shows(handler, record) for handler in logging.getLogger().handlers
        ):
            super().emit(record)


def _shows(handler: logging.Handler, record: logging.LogRecord) -> bool:
    """Whether a handler writes a record where users see it."""
    stream = getattr(handler, "stream", None)
    is_seen = stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    return stream is not None and is_seen and record.levelno >= handler.level


def configure() -> None:
    """Show information on standard error, unless the program has set up logging itself."""
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(_StandardError())
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)


def silence() -> None:
    """Show warnings only, as is done in all processes but the main one."""
    if any(isinstance(handler, _StandardError) for handler in log.handlers):
        log.setLevel(logging.WARNING)


def print_results(stage: str, results: list[dict[str, float]]) -> None:
    """Print a table of the values that a run has logged.

    Args:
        stage: such as ``"test"``.
        results: values by name, for each loader.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column(f"{stage} metric")
    columns = []
    for index, result in enumerate(results):
        heading = f"loader {index}" if len(results) > 1 else "value"
        table.add_column(heading, justify="right")
        column = {}
        for name, value in result.items():
            column[name.split("/dataloader_idx_")[0]] = f"{value:.6g}"
        columns.append(column)
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name, "") for column in columns]
        table.add_row(name, *cells)
    Console().print(table)
