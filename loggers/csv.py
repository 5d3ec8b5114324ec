"""Metrics as a CSV file."""

from __future__ import annotations

import csv
import io
import os
from typing import Any

from .files import append_text, exists, is_local, read_text, write_text
from .folders import FolderLogger


class CSVLogger(FolderLogger):
    """Write ``metrics.csv`` and ``hparams.json`` in a numbered folder for each run.

    There is a row for each call of :meth:`log_metrics`, by default with one step more than the highest before, and a
    column for each name, in the order in which names came up; ``step`` and ``epoch`` are among them.
    A resumed run keeps the rows that its checkpoint knew of and drops later ones. A ``metrics.csv`` that another run
    left in the folder is kept as ``metrics-1.csv``, and so on.

    Args:
        save_dir: under which all experiments are kept, a path or an fsspec URL.
        name: the experiment; "" or None puts the runs into ``save_dir`` itself.
        version: the run: a number, or a folder's name. By default one more than the highest number there is.
        prefix: put before the name of each value, with a ``-``.
        flush_logs_every_n_steps: write rows to disk after so many steps; also with each checkpoint and at the end.

    Raises:
        ValueError: if ``flush_logs_every_n_steps`` is less than 1.
    """

    NAME_METRICS_FILE = "metrics.csv"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "loopwright_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        if flush_logs_every_n_steps < 1:
            raise ValueError(
                f"flush_logs_every_n_steps must be an int of at least 1; got {flush_logs_every_n_steps!r}"
            )
        self._flush_every = flush_logs_every_n_steps
        # Rows that are not on disk yet, and how many are.
        self._rows: list[dict[str, Any]] = []
        self._num_written = 0
        self._columns: list[str] = []
        self._flushed_step = 0
        # Whether the file on disk holds this run's rows.
        self._is_ours = False

    @property
    def metrics_file_path(self) -> str:
        """The CSV file."""
        return os.path.join(self.log_dir, self.NAME_METRICS_FILE)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = self._note_step(step)
        row = {
            f"{self._prefix}{name}": _number(name, value)
            for name, value in metrics.items()
        }
        self._rows.append({"step": step, **row})
        if step - self._flushed_step >= self._flush_every:
            self._attempt(self.save)
            self._flushed_step = step

    def save(self) -> None:
        if not self._rows:
            return
        self._write_hparams()
        is_ours = self._is_ours and exists(self.metrics_file_path)
        if not self._is_ours:
            self.keep_aside(self.metrics_file_path)
        columns = _names([dict.fromkeys(self._columns), *self._rows])
        if is_ours and columns == self._columns and is_local(self.log_dir):
            text = io.StringIO()
            csv.DictWriter(text, columns).writerows(self._rows)
            append_text(self.metrics_file_path, text.getvalue())
        else:
            # New columns need a new header, and few remote file systems can append. Somebody may have removed the file.
            earlier = self._read() if is_ours else []
            self._num_written = len(earlier)
            self._rewrite([*earlier, *self._rows], columns)
        self._columns = columns
        self._num_written += len(self._rows)
        self._rows = []
        self._is_ours = True

    def state_dict(self) -> dict[str, Any]:
        # What the checkpoint knows of must not get lost after it.
        self._attempt(self.save)
        return {**super().state_dict(), "rows": self._num_written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._rows or not self._continues(state_dict):
            return
        if not exists(self.metrics_file_path):
            return
        rows = self._read()[: state_dict["rows"]]
        self._columns = _names(rows)
        self._num_written = len(rows)
        self._is_ours = True
        self._flushed_step = int(float(rows[-1]["step"])) if rows else 0
        self._last_step = self._flushed_step if rows else -1
        self._rewrite(rows, self._columns)

    def _read(self) -> list[dict[str, Any]]:
        text = io.StringIO(read_text(self.metrics_file_path))
        return list(csv.DictReader(text))

    def _rewrite(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics_file_path, text.getvalue())


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """The names in all rows, in the order in which they come up."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _number(name: str, value: Any) -> float | int:
    if type(value) in (int, float):
        return value
    try:
        # Tensors, among others.
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"CSVLogger takes numbers; {name!r} is {value!r}") from None
