"""A file of JSON lines that a run appends to, and that a resumed run rewinds."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from typing import Any

from .files import append_text, exists, is_local, read_text, write_text

Row = dict[str, Any]


class Journal:
    """Rows in a file, one a line. A line that a kill has cut short is no row.

    Args:
        path: the file, a path or an fsspec URL. It is made with the first row.

    Attributes:
        num_rows: how many rows are in it.
    """

    def __init__(self, path: str) -> None:
        # The program may go to another folder.
        self.path = os.path.abspath(path) if is_local(path) else path
        self.num_rows = 0

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows. Once this returns, a kill of the process does not lose them."""
        if not rows:
            return
        text = "".join(f"{_dumped(row)}\n" for row in rows)
        if is_local(self.path):
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            append_text(self.path, text)
        else:
            # Few remote file systems can append.
            written = read_text(self.path) if exists(self.path) else ""
            write_text(self.path, written + text)
        self.num_rows += len(rows)

    def read(self) -> list[Row]:
        """All rows."""
        return [json.loads(line, object_hook=_loaded) for line in self._lines()]

    def rewind(self, num_rows: int | None = None) -> list[Row]:
        """Go on after the first ``num_rows`` rows, or after all that are there.

        Returns:
            The rows behind them, which the file no longer has.
        """
        lines = self._lines()
        kept = lines[:num_rows]
        if exists(self.path):
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.num_rows = len(kept)
        return [
            json.loads(line, object_hook=_loaded) for line in lines[self.num_rows :]
        ]

    def _lines(self) -> list[str]:
        if not exists(self.path):
            return []
        # What follows the last line's end was cut short.
        return read_text(self.path).split("\n")[:-1]


def _dumped(row: Row) -> str:
    return json.dumps(row, default=_as_json)


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    return str(value)


def _loaded(written: Row) -> Any:
    if written.keys() == {"$bytes"}:
        return base64.b64decode(written["$bytes"])
    return written
