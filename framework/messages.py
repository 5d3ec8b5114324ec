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


def print_results(stage: str, results: list[dict[str, float]]) -> None:
    """Print a table of values, a column for each loader."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column(f"{stage} metric")
    several = len(results) > 1
    for index in range(len(results)):
        table.add_column(f"loader {index}" if several else "value", justify="right")
    bare = [
        {name.split("/dataloader_idx_")[0]: value for name, value in result.items()}
        for result in results
    ]
    for name in dict.fromkeys(name for result in bare for name in result):
        table.add_row(
            name, *(f"{result[name]:.6g}" if name in result else "" for result in bare)
        )
    Console().print(table)
