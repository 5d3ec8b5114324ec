"""Metrics as a CSV file."""

from __future__ import annotations

import csv
import io
import os
from logging import getLogger
from typing import Any

from .folders import FolderLogger, filesystem, is_local, write_text

log = getLogger("loopwright")


class CSVLogger(FolderLogger):
    """Write ``metrics.csv`` and ``hparams.json`` in a numbered folder for each run.

    There is a row for each call of :meth:`log_metrics`, and a column for each name, in the order in which names came
    up; ``step`` and ``epoch`` are among them. A resumed run keeps the rows that its checkpoint knew of and drops
    later ones. A ``metrics.csv`` that another run left in the folder is kept as ``metrics-1.csv``, and so on.

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
        self._rows: list[dict[str, Any]] = []  # not on disk yet
        self._columns: list[str] = []
        self._written = 0  # rows on disk
        self._flushed_step = 0
        self._is_ours = False  # whether the file on disk holds this run's rows

    @property
    def metrics_file_path(self) -> str:
        """The CSV file."""
        return os.path.join(self.log_dir, self.NAME_METRICS_FILE)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        row = {
            f"{self._prefix}{name}": _number(name, value)
            for name, value in metrics.items()
        }
        self._rows.append({"step": step, **row})
        if step - self._flushed_step >= self._flush_every:
            self.save()
            self._flushed_step = step

    def save(self) -> None:
        if not self._rows:
            return
        self._write_hparams()
        if not self._is_ours:
            self._keep_aside()
        known = len(self._columns)
        self._columns = list(
            dict.fromkeys(
                [*self._columns, *(name for row in self._rows for name in row)]
            )
        )
        if self._is_ours and len(self._columns) == known and is_local(self.log_dir):
            with open(
                self.metrics_file_path, "a", encoding="utf-8", newline=""
            ) as file:
                csv.DictWriter(file, self._columns).writerows(self._rows)
        else:  # new columns need a new header, and few remote file systems can append
            self._rewrite([*(self._read() if self._is_ours else []), *self._rows])
        self._written += len(self._rows)
        self._rows = []
        self._is_ours = True

    def finalize(self, status: str) -> None:
        self.save()
        if status == "success" and not self._hparams_written:
            self._write_hparams()
        self._give_back()

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.save()  # what the checkpoint knows of must not get lost after it
        return {**super().state_dict(), "rows": self._written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (
            self._rows
            or not self._takes_up(state_dict)
            or not self._exists(self.metrics_file_path)
        ):
            return
        rows = self._read()[: state_dict["rows"]]
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        self._written, self._is_ours = len(rows), True
        self._flushed_step = int(float(rows[-1]["step"])) if rows else 0
        self._rewrite(rows)

    # -- the file ---------------------------------------------------------------------------------------------

    def _read(self) -> list[dict[str, Any]]:
        path = self.metrics_file_path
        if is_local(path):
            with open(path, encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        return list(
            csv.DictReader(io.StringIO(filesystem(path).cat_file(path).decode()))
        )

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics_file_path, text.getvalue())

    def _exists(self, path: str) -> bool:
        return os.path.exists(path) if is_local(path) else filesystem(path).exists(path)

    def _keep_aside(self) -> None:
        """Rename a file that another run left here."""
        path = self.metrics_file_path
        if not self._exists(path):
            return
        number = 1
        while self._exists(aside := path.replace(".csv", f"-{number}.csv")):
            number += 1
        os.rename(path, aside) if is_local(path) else filesystem(path).mv(path, aside)
        log.warning(
            "CSVLogger: %s is another run's, and is kept as %s",
            path,
            os.path.basename(aside),
        )


def _number(name: str, value: Any) -> float | int:
    if type(value) in (int, float):
        return value
    try:
        return float(value)  # tensors, among others
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"CSVLogger takes numbers; {name!r} is {value!r}") from None
