"""What the loggers of services share: one run through kills, resumes and failures, with each row once."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from argparse import Namespace
from contextlib import suppress
from importlib.util import find_spec
from json import JSONDecodeError
from time import time
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from .base import Logger
from .dummy import NullObject
from .files import absolute, exists
from .folders import as_json
from .journal import Row
from .media import file_names
from .sender import FINISH_SECONDS, OPEN_SECONDS, Entry, Sender

if TYPE_CHECKING:
    from ..callbacks import ModelCheckpoint

# How long a checkpoint that is soon removed waits for its upload.
UPLOAD_SECONDS = 60.0
# What a library raises that cannot do with a row what is asked of it; trying again would not help.
_REFUSALS = (
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
# The beginning of a folder's name, of a run that the service could not be asked to name.
UNNAMED = "unsent-"


def require(logger: str, module: str, package: str) -> None:
    """Raise ModuleNotFoundError, with what to install, if a service's library is not there."""
    if module not in sys.modules and find_spec(module) is None:
        raise ModuleNotFoundError(f"{logger} needs {module}: pip install {package}")


class ServiceLogger(Logger):
    """The base of loggers that write to a service.

    A thread opens the run and sends what is logged, so that the training waits for nothing. All that is logged is also
    kept in ``save_dir/<project>/<run>/rows.jsonl``, from where it is sent later if the service fails. A checkpoint
    holds the run's id and how many rows there were: a resumed run goes on in the same run, with each step once.

    A logger of a service overrides the methods that raise here.

    Args:
        project: under which the service keeps its runs.
        save_dir: where rows are kept.
        run_id: of the run to go on with.
        prefix: put before the name of each value, with a ``-``.
        log_model: also upload checkpoints: ``"all"`` as they are saved, True at the end (as they are saved if
            ``save_top_k=-1``).

    Raises:
        ValueError: if ``log_model`` is none of these.
    """

    LOGGER_JOIN_CHAR = "-"
    # How many rows `send_metrics` may have; more than one only if the service takes all of them or none.
    rows_at_once = 1
    # How long each row waits for the service. Lightning's loggers wait.
    answer_seconds = 0.0

    def __init__(
        self,
        project: str | None,
        save_dir: str | os.PathLike[str] | None,
        run_id: str | None,
        prefix: str | None,
        log_model: bool | str,
    ) -> None:
        if log_model not in (True, False, "all"):
            raise ValueError(
                f'log_model must be True, False or "all"; got {log_model!r}'
            )
        self._project = project
        self._save_dir = None if save_dir is None else os.fspath(save_dir)
        self._given_id = run_id
        self._run_id = run_id
        self._prefix = prefix
        self._log_model = log_model
        self._experiment: Any = None
        # Where rows are kept, once that is known.
        self._folder: str | None = None
        # What the service has of steps after the checkpoint: names and steps.
        self._known: set[tuple[str, int]] = set()
        # From which step on it has other values of them, of what the run has taken back.
        self._other_from = math.inf
        self._uploaded: dict[str, float] = {}
        self._checkpoint_callbacks: list[ModelCheckpoint] = []
        self._answers = True
        self._sender = Sender(self, type(self).__name__)

    # What a service's logger overrides.

    def begin(self) -> tuple[Any, str]:
        """Begin the run, or go on with that of ``self._run_id``; returns what the library gives, and the run's id."""
        raise NotImplementedError

    def send_metrics(self, rows: list[Row]) -> None:
        """Send rows with ``values``, ``step`` and ``time`` (seconds since 1970); see ``rows_at_once``."""
        raise NotImplementedError

    def send_hparams(self, values: Row) -> None:
        """Send hyperparameters: nested dicts of plain values."""
        raise NotImplementedError

    def send_media(self, kind: str, name: str, media: Row, step: int) -> None:
        """Send an image, text, table, histogram or sound; see :meth:`files_of`."""
        raise NotImplementedError

    def send_checkpoint(self, path: str, row: Row) -> None:
        """Upload a checkpoint.

        Args:
            path: a file or a folder.
            row: its ``aliases`` and ``metadata``.
        """
        raise NotImplementedError

    def send_graph(self, text: str) -> None:
        """Send the model as text."""

    def send_value(self, value: Any) -> None:
        """Send what only this service knows."""
        raise NotImplementedError

    def recall(self, earlier: list[Row], sent: int, dropped: list[Row]) -> list[Row]:
        """Say which rows of before the service lacks; a service that can be asked knows it better than this.

        Args:
            earlier: all rows that were kept.
            sent: how many of them, and then of ``dropped``, were sent.
            dropped: rows after the checkpoint from which the run was resumed.
        """
        self._known = {
            (name, row["step"])
            for row in dropped[: max(0, sent - len(earlier))]
            for name in row.get("values", [row.get("name")])
        }
        return earlier[sent:]

    def is_refused(self, error: Exception) -> bool:
        """Whether an error says that the service is there, but will never take this row."""
        # An answer that cannot be read may be that of a proxy; libraries for HTTP derive some errors from both.
        if isinstance(error, (OSError, JSONDecodeError)):
            return isinstance(error, FileNotFoundError)
        return isinstance(error, _REFUSALS)

    def close(self) -> None:
        """The program ends, and all is sent."""

    # The run.

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def name(self) -> str | None:
        return self._project

    @property
    def version(self) -> str | None:
        if self._run_id is None and self._folder is not None:
            # The service could not be reached to name the run.
            return os.path.basename(self._folder)
        return self._run_id

    @property
    def experiment(self) -> Any:
        """What the service's library offers, with all sent that was logged before.

        While the service cannot be reached, it is an object that takes every call and does nothing.
        """
        self._sender.wait(OPEN_SECONDS)
        return NullObject() if self._experiment is None else self._experiment

    def claim(self) -> None:
        self._sender.wait(OPEN_SECONDS, opened=True)

    def open(self) -> None:
        """Begin or go on; the sender calls it."""
        self._experiment, run_id = self.begin()
        self._run_id = str(run_id)

    def folder(self) -> str:
        """Where rows are kept."""
        if self._folder is None:
            name = self._run_id or f"{UNNAMED}{int(time() * 1000):x}"
            parts = (self._save_dir or ".", self._project or "", name)
            folder = absolute(os.path.join(*parts))
            if self._given_id is None and exists(os.path.join(folder, "rows.jsonl")):
                # Another logger's of the same run, or of another service's run of that name.
                folder += f"-{int(time() * 1000):x}"
            self._folder = folder
        return self._folder

    # What is logged.

    def prefixed(self, name: str) -> str:
        """The name under which the service gets a value."""
        return f"{self._prefix}{self.LOGGER_JOIN_CHAR}{name}" if self._prefix else name

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        plain = {}
        special = {}
        values: dict[str, Any] = metrics
        for name, value in values.items():
            if isinstance(value, (Tensor, np.generic)):
                value = value.tolist()
            group = plain if _is_plain(value) else special
            group[self.prefixed(name)] = value
        if plain:
            self._put("metrics", step, values=plain)
        if special:
            self._sender.put(None, {"values": special, "step": step})
            self._wait_for_answer()

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self._put("hparams", None, values=as_json(params))

    def log_media(self, kind: str, name: str, media: Row, step: int) -> None:
        self._put(kind, step, name=self.prefixed(name), media=media)

    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        self._put("graph", None, text=str(model))

    def _put(self, kind: str, step: int | None, **content: Any) -> None:
        self._sender.put({"kind": kind, "step": step, "time": time(), **content})
        self._wait_for_answer()

    def _wait_for_answer(self) -> None:
        if self.answer_seconds:
            # A service that did not answer in time is not waited for until it has caught up.
            seconds = self.answer_seconds if self._answers else 0
            self._answers = self._sender.wait(seconds)

    def send(self, entries: list[Entry]) -> None:
        """Give rows to the service; the sender calls it."""
        metrics = []
        for row, value in entries:
            if row is None:
                self.send_value(value)
            elif row["kind"] == "metrics":
                values = row["values"]
                step = row["step"]
                left = {n: v for n, v in values.items() if not self._has(n, step)}
                if left:
                    metrics.append({**row, "values": left})
            else:
                self._send_other(row)
        if metrics:
            self.send_metrics(metrics)

    def _has(self, name: str, step: int) -> bool:
        """Whether the service has this value already."""
        return step < self._other_from and (name, step) in self._known

    def _send_other(self, row: Row) -> None:
        kind = row["kind"]
        if kind == "hparams":
            self.send_hparams(row["values"])
        elif kind == "graph":
            self.send_graph(row["text"])
        elif kind == "checkpoint":
            self.send_checkpoint(row["path"], row)
        elif not self._has(row["name"], row["step"]):
            self.send_media(kind, row["name"], row["media"], row["step"])

    # Checkpoints.

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if self._log_model == "all" or (
            self._log_model and checkpoint_callback.save_top_k == -1
        ):
            self._put_checkpoints(checkpoint_callback)
            # The callback may be about to remove one of them.
            self._sender.wait(UPLOAD_SECONDS)
        elif self._log_model and checkpoint_callback not in self._checkpoint_callbacks:
            self._checkpoint_callbacks.append(checkpoint_callback)

    def _put_checkpoints(self, callback: ModelCheckpoint) -> None:
        """Upload what a callback has saved since the last time."""
        scores: dict[str, Any] = {callback.best_model_path: callback.best_model_score}
        scores |= callback.best_k_models
        found = []
        for path, score in scores.items():
            with suppress(OSError):
                found.append((os.path.getmtime(path), path, score))
        for moment, path, score in sorted(found, key=lambda each: each[:2]):
            if self._uploaded.get(path) == moment:
                continue
            self._uploaded[path] = moment
            is_best = path == callback.best_model_path
            self._put(
                "checkpoint",
                None,
                path=path,
                aliases=["latest", "best"] if is_best else ["latest"],
                metadata={
                    "score": score.item() if isinstance(score, Tensor) else score,
                    "original_filename": os.path.basename(path),
                    type(callback).__name__: self.describe(callback),
                },
            )

    def describe(self, callback: ModelCheckpoint) -> Row:
        """What the metadata of a checkpoint tell of the callback that has saved it."""
        names = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only")
        return {name: getattr(callback, name) for name in names}

    # The end, and how it goes on.

    def save(self) -> None:
        self._sender.write()

    def finalize(self, status: str) -> None:
        if status == "success":
            for callback in self._checkpoint_callbacks:
                self._put_checkpoints(callback)
        self._sender.finish()

    def state_dict(self) -> dict[str, Any]:
        # What the checkpoint knows of must not get lost after it.
        self._sender.write()
        return {
            "project": self._project,
            "run_id": self._run_id,
            "folder": self.folder(),
            "rows": self._sender.num_rows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("project") != self._project:
            return
        if self._given_id not in (None, state_dict["run_id"]):
            return
        if self._experiment is not None:
            if state_dict["run_id"] == self._run_id:
                self._go_back(state_dict["rows"])
            return
        self._run_id = state_dict["run_id"]
        folder: str = state_dict["folder"]
        if not exists(folder):
            # The whole may have been moved.
            parts = (self._save_dir or ".", self._project or "")
            folder = absolute(os.path.join(*parts, os.path.basename(folder)))
        self._folder = folder
        self._sender.go_on(folder, state_dict["rows"])

    def _go_back(self, num_rows: int) -> None:
        """Go on after so many rows, as another program would: the run goes back to its checkpoint."""
        self._sender.forget_unsent(num_rows)
        self._other_from = self._sender.last_step + 1
        self.close()
        self._experiment = None

    def send_rows(self, folder: str | os.PathLike[str]) -> bool:
        """Send what another program has kept in a folder, and could not send; returns whether that is done now.

        Args:
            folder: that of its run, with ``rows.jsonl``.
        """
        self._folder = absolute(os.fspath(folder))
        run = os.path.basename(self._folder)
        if not run.startswith(UNNAMED):
            self._run_id = run
        self._sender.go_on(self._folder)
        return self._sender.wait(FINISH_SECONDS)

    def __getstate__(self) -> dict[str, Any]:
        if self._run_id is not None:
            self._sender.write()
            self.folder()
        state = {**self.__dict__, "_experiment": None}
        del state["_sender"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._sender = Sender(self, type(self).__name__)


def files_of(kind: str, name: str, media: Row, step: int) -> Any:
    """Files of an image or a sound, for a moment; ``with`` gives their paths."""
    return _Files(file_names(name, step, kind, media))


class _Files(tempfile.TemporaryDirectory):
    """A folder with files of this content, which is removed again."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__()
        self._content = files

    def __enter__(self) -> Any:
        paths = []
        for name, data in self._content.items():
            path = os.path.join(self.name, name)
            with open(path, "wb") as file:
                file.write(data)
            paths.append(path)
        return paths


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))
