"""Metrics as JSON lines."""

from __future__ import annotations

import os
from time import monotonic
from typing import Any

from .files import exists, write_bytes
from .folders import FolderLogger
from .journal import Journal
from .media import file_names

WRITE_INTERVAL_SECONDS = 1.0


class JSONLinesLogger(FolderLogger):
    """Write ``metrics.jsonl`` and ``hparams.json`` in a numbered folder for each run.

    Each line is an object: ``step``, ``epoch``, and what was logged, under its name. Texts, tables and histograms stand
    in lines of their own, images and sounds in files of the folder ``media``, with their path in the line.
    A resumed run keeps the lines that its checkpoint knew of and drops later ones. A ``metrics.jsonl`` that another run
    left in the folder is kept as ``metrics-1.jsonl``, and so on.

    Args:
        save_dir: under which all experiments are kept, a path or an fsspec URL.
        name: the experiment; "" or None puts the runs into ``save_dir`` itself.
        version: the run: a number, or a folder's name. By default one more than the highest number there is.
        prefix: put before the name of each value, with a ``-``.
    """

    NAME_METRICS_FILE = "metrics.jsonl"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "loopwright_logs",
        version: int | str | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self._rows: list[dict[str, Any]] = []
        self._journal: Journal | None = None
        # When to write the rows, on the monotonic clock.
        self._write_at = 0.0

    @property
    def metrics_file_path(self) -> str:
        """The file of JSON lines."""
        return os.path.join(self.log_dir, self.NAME_METRICS_FILE)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = self._note_step(step)
        row: dict[str, Any] = {"step": step}
        values: dict[str, Any] = metrics
        for name, value in values.items():
            # Tensors and NumPy's numbers, among others.
            plain = value.tolist() if hasattr(value, "tolist") else value
            row[f"{self._prefix}{name}"] = plain
        self._rows.append(row)
        if monotonic() >= self._write_at:
            self._attempt(self.save)
            self._write_at = monotonic() + WRITE_INTERVAL_SECONDS

    def log_media(self, kind: str, name: str, media: dict[str, Any], step: int) -> None:
        shown: Any = media["text"] if kind == "text" else media
        if kind in ("image", "audio"):
            self.claim()
            shown = []
            for file, data in file_names(name, step, kind, media).items():
                write_bytes(os.path.join(self.log_dir, "media", file), data)
                shown.append(f"media/{file}")
        self._rows.append({"step": step, f"{self._prefix}{name}": shown})

    def save(self) -> None:
        if not self._rows:
            return
        self._write_hparams()
        if self._journal is None:
            self.keep_aside(self.metrics_file_path)
            self._journal = Journal(self.metrics_file_path)
        self._journal.append(self._rows)
        self._rows = []

    def state_dict(self) -> dict[str, Any]:
        # What the checkpoint knows of must not get lost after it.
        self._attempt(self.save)
        num_rows = 0 if self._journal is None else self._journal.num_rows
        return {**super().state_dict(), "rows": num_rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._rows or not self._continues(state_dict):
            return
        if exists(self.metrics_file_path):
            self._journal = Journal(self.metrics_file_path)
            self._journal.rewind(state_dict["rows"])
