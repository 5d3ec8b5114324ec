"""The files of a record, written by a thread of their own: a slow disk keeps no run waiting, a full one ends none."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from ...loggers.files import exists, is_local, read_text, write_bytes, write_text
from ..messages import log

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
MEDIA_FILE = "media.jsonl"
MEDIA_FOLDER = "media"

# Between two writes, in seconds: at least so long, and so many times what the last one took.
_INTERVAL = 1.0
_PATIENCE = 20
# While writing fails, the next attempt comes later and later.
_LONGEST_INTERVAL = 60.0
# So many rows wait for a disk that takes none; then the oldest are lost.
_MOST_WAITING = 200_000


def as_line(row: dict[str, Any]) -> str:
    """A row as a line of JSON; numbers that JSON lacks become texts: ``"NaN"``, ``"Infinity"``, ``"-Infinity"``."""
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:
        return json.dumps(strict(row), allow_nan=False)


def strict(value: Any) -> Any:
    """A value without numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return "NaN"
        return "Infinity" if value > 0 else "-Infinity"
    return value


def read_rows(
    path: str | os.PathLike[str], steps: range | None = None
) -> Iterator[dict[str, Any]]:
    """Give the rows of a local file of JSON lines; none if there is no such file.

    Args:
        path: the file.
        steps: the steps of which rows are given; None for all.
    """
    if not os.path.exists(path):
        return
    wanted = ""
    if steps is not None and len(steps) == 1:
        # Cheaper than to read all of the JSON: there may be a million of lines.
        wanted = f'"step": {steps[0]},'
    with open(path, encoding="utf-8") as file:
        for line in file:
            # A run that was killed may have left a part of the last one.
            if wanted not in line or not line.endswith("\n"):
                continue
            row = json.loads(line)
            if steps is None or row["step"] in steps:
                yield row


class Lines:
    """A file of JSON lines that grows, and that a resumed run cuts back.

    Args:
        path: the file, local or any fsspec URL.

    Attributes:
        size: how many bytes of it are this run's and on disk.
        waiting: rows that are not, as lines.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self.waiting: list[str] = []

    def add(self, row: dict[str, Any]) -> None:
        """Take a row, to be written next time."""
        self.waiting.append(as_line(row))
        if len(self.waiting) > _MOST_WAITING:
            del self.waiting[: _MOST_WAITING // 10]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: how much is on disk, and the newest rows that are not."""
        return {"bytes": self.size, "waiting": self.waiting[-2000:]}

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on after what :meth:`state` knew of; the rest of the file is of what is done again."""
        self.cut(state["bytes"])
        self.waiting = list(state["waiting"])

    def cut(self, size: int) -> None:
        """Keep so many bytes of the file, from its beginning."""
        self.waiting = []
        self.size = 0
        if not exists(self.path):
            return
        if is_local(self.path):
            self.size = min(size, os.path.getsize(self.path))
            os.truncate(self.path, self.size)
            return
        kept = read_text(self.path).encode()[:size]
        write_bytes(self.path, kept)
        self.size = len(kept)

    def cut_after(self, step: int) -> None:
        """Keep the rows until an optimizer step, in a file of which no checkpoint tells how much to keep."""
        if not exists(self.path):
            return
        size = 0
        # What follows the last line's end was cut short.
        for line in read_text(self.path).split("\n")[:-1]:
            if json.loads(line)["step"] > step:
                break
            size += len(line.encode()) + 1
        self.cut(size)

    def write(self, text: str) -> int:
        """Append to the file; returns how many bytes of it are this run's now.

        Raises:
            OSError: if that is not possible; the file then is as before.
        """
        data = text.encode()
        if not is_local(self.path):
            before = read_text(self.path).encode()[: self.size] if self.size else b""
            write_bytes(self.path, before + data)
            return len(before) + len(data)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            # Somebody may have removed it, and a kill in the middle of a write may have left a part of a row.
            size = min(self.size, file.seek(0, os.SEEK_END))
            file.truncate(size)
            end = size + len(data)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise
        return end


class RecordFiles:
    """Writes a record's files in the background.

    Args:
        folder: where they lie, local or any fsspec URL.
        document: gives what ``run.json`` holds; called in the thread that writes.

    Attributes:
        metrics: the rows of values.
        media: the rows that tell of images and the like.
    """

    def __init__(self, folder: str, document: Callable[[], dict[str, Any]]) -> None:
        self.folder = folder
        self.metrics = Lines(os.path.join(folder, METRICS_FILE))
        self.media = Lines(os.path.join(folder, MEDIA_FILE))
        self._document = document
        self._lock = threading.Lock()
        # Held while files are written.
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self._tasks: list[Callable[[], None]] = []
        self._blobs: list[tuple[str, bytes]] = []
        self._is_stale = False
        self._must_end = False
        self._failure = ""
        self._interval = _INTERVAL

    def start(self) -> None:
        """Begin to write."""
        self._must_end = False
        self._hurry.clear()
        # A daemon: a disk that never answers keeps no program from ending.
        self._thread = threading.Thread(
            target=self._run, name="loopwright-record", daemon=True
        )
        self._thread.start()

    def add(self, lines: Lines, row: dict[str, Any]) -> None:
        """Take a row for one of the two files of rows."""
        with self._lock:
            lines.add(row)
        self._wake.set()

    def add_blob(self, name: str, data: bytes) -> None:
        """Take a file of the record as bytes."""
        with self._lock:
            self._blobs.append((name, data))
        self._wake.set()

    def refresh(self) -> None:
        """The document has changed."""
        self._is_stale = True
        self._wake.set()

    def call(self, task: Callable[[], None]) -> None:
        """Call this in the thread that writes, after what is written next."""
        with self._lock:
            self._tasks.append(task)
        self._wake.set()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on in the files."""
        with self._lock:
            return {"metrics": self.metrics.state(), "media": self.media.state()}

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on where the files were when :meth:`state` was called.

        Raises:
            OSError: if that is not possible.
        """
        with self._writing, self._lock:
            self.metrics.go_on(state["metrics"])
            self.media.go_on(state["media"])
        self._wake.set()

    def cut_after(self, step: int) -> None:
        """Go on after the rows of this optimizer step, in files of which no checkpoint tells how much to keep."""
        with self._writing, self._lock:
            self.metrics.cut_after(step)
            self.media.cut_after(step)

    def close(self, seconds: float) -> bool:
        """Write what is left, and end; returns whether all of it was written within these seconds."""
        self._must_end = True
        self._is_stale = True
        self._hurry.set()
        self._wake.set()
        thread = self._thread
        self._thread = None
        if thread is None:
            return True
        thread.join(seconds)
        return not thread.is_alive() and not self._failure

    # In the thread.

    def _run(self) -> None:
        while not self._must_end:
            self._wake.wait()
            self._wake.clear()
            self._write()
            self._call_tasks()
            # What comes meanwhile is written together.
            self._hurry.wait(self._interval)
        self._call_tasks()
        self._write()

    def _call_tasks(self) -> None:
        with self._lock:
            tasks = self._tasks
            self._tasks = []
        for task in tasks:
            try:
                task()
            except Exception as error:
                # A record is not worth a run.
                log.warning("The run's record lacks a part (%s)", error)

    def _write(self) -> None:
        began = perf_counter()
        try:
            with self._writing:
                self._write_all()
        except Exception as error:
            # Of a disk, or of whatever library has the remote storage.
            self._note_failure(error)
            return
        if self._failure:
            self._failure = ""
            log.warning("The record of the run is written again: no row is lost")
        self._interval = max(_INTERVAL, _PATIENCE * (perf_counter() - began))

    def _write_all(self) -> None:
        for lines in (self.metrics, self.media):
            with self._lock:
                waiting = list(lines.waiting)
            if not waiting:
                continue
            size = lines.write("".join(f"{line}\n" for line in waiting))
            with self._lock:
                lines.size = size
                del lines.waiting[: len(waiting)]
        while self._blobs:
            name, data = self._blobs[0]
            write_bytes(os.path.join(self.folder, name), data)
            with self._lock:
                self._blobs.pop(0)
        if self._is_stale:
            self._is_stale = False
            try:
                text = json.dumps(strict(self._document()), indent=1, default=str)
                write_text(os.path.join(self.folder, RUN_FILE), f"{text}\n")
            except BaseException:
                self._is_stale = True
                raise

    def _note_failure(self, error: Exception) -> None:
        """Say once that nothing can be written, and try again later."""
        if not self._failure:
            log.warning(
                "The run's record cannot be written in %s (%s: %s): training goes on, and it is written when it can",
                self.folder,
                type(error).__name__,
                error,
            )
        self._failure = str(error)
        self._interval = min(_LONGEST_INTERVAL, 2 * self._interval)
        self._wake.set()
