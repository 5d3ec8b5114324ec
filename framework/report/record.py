"""The record of a run: what ran, where and how, what was measured, and how it ended, as files in the run's folder."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ...loggers.files import exists, filesystem, is_local, read_text
from ...loggers.media import file_names
from ...strategies.launch.attempts import this_attempt
from ...strategies.launch.processes import has_ended, process_here
from ..loop.record import NoRecord
from ..messages import log
from . import describe, environment
from .black_box import BlackBox
from .captured import CapturedWarnings
from .clock import Clock
from .ending import ending
from .files import MEDIA_FOLDER, RUN_FILE, RecordFiles
from .monitors import Monitors
from .secrets import Secrets

if TYPE_CHECKING:
    from ..loop.run import Run

SCHEMA = 1
FOLDER = "record"

# At a run's end, its last rows are waited for so long, in seconds.
_LAST_SECONDS = 10.0
# Media of a run take so many bytes at most.
_MOST_MEDIA = 1 << 29


class Record(NoRecord):
    """Keeps the record of a Trainer's fits; the main rank writes it.

    See ``docs/record.md`` for the files.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.clock = Clock()
        self._is_open = False
        self._state: dict[str, Any] | None = None
        self._document: dict[str, Any] = {}
        self._monitors: Monitors | None = None
        self._pending: dict[str, Any] = {}
        self._began = 0.0
        self._program_seconds: float | None = None
        self._files: RecordFiles | None = None
        self._secrets = Secrets({})
        self._warnings: CapturedWarnings | None = None
        self._media_bytes = 0
        self._box: BlackBox | None = None
        self._last_values: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a Trainer keeps a record of its own.
        return {**vars(Record()), "folder": self.folder}

    # The beginning.

    def begin(self, run: Run, number: int) -> None:
        """Open the record of a fit, or go on with it in a later run of the same Trainer."""
        # A logger may keep no files.
        folder = run.trainer.log_dir or run.trainer.default_root_dir
        if is_local(folder):
            folder = os.path.abspath(folder)
        folder = os.path.join(folder, FOLDER)
        if run.fn != "fit" and folder != self.folder:
            # An evaluation by itself has no folder of its own.
            return
        self._began = perf_counter()
        self._program_seconds = environment.seconds_of_program()
        self.clock.begin()
        self.folder = folder
        self._is_open = True
        is_main = run.trainer.is_global_zero
        if is_main:
            self._secrets = Secrets(os.environ, sys.argv)
        clean = self._secrets.clean_arguments if is_main else None
        self._box = BlackBox(folder, clean, number)
        self._box.begin(run)
        if not is_main:
            return
        self._files = RecordFiles(folder, self._contents)
        try:
            if not self._open(run):
                self._is_open = False
                self._files = self._box = None
                return
        except Exception as error:
            # A disk, a remote storage's library, or files of somebody else.
            log.warning(
                "The record in %s cannot be read (%s: %s): it begins anew",
                folder,
                type(error).__name__,
                error,
            )
            self._document = _empty()
            # Its rows must not be taken for those of this run, nor lost.
            with suppress(Exception):
                _put_aside(folder)
        self._describe(run, number)
        self._start_writing()

    def _start_writing(self) -> None:
        files = self._files
        assert files is not None
        self._warnings = CapturedWarnings(files.refresh)
        self._warnings.begin()
        files.start()
        files.refresh()
        files.call(partial(self._look_at_git, files))

    def _open(self, run: Run) -> bool:
        """Find out whether this run goes on with the record that is there; returns whether it has one."""
        assert self.folder is not None
        assert self._files is not None
        path = os.path.join(self.folder, RUN_FILE)
        before = json.loads(read_text(path)) if exists(path) else None
        state = self._state
        self._state = None
        own = self._document.get("id")
        self._document = _empty()
        self.clock.reset()
        self._media_bytes = 0
        if before is None:
            return True
        steps = run.state.global_step
        is_same_fit = bool(run.name) and before.get("job") == run.name
        is_own = own in (None, before["id"])
        if state is not None and state["id"] == before["id"]:
            self._files.go_on(state["files"])
            self.clock.go_on(state["clock"])
        elif is_same_fit or (state is None and is_own and (steps or run.fn != "fit")):
            self._files.cut_after(steps)
        elif run.fn != "fit":
            # Of another run, which has the folder now.
            return False
        else:
            self._leave_to(before)
            return True
        self._document = before
        if run.fn == "fit":
            self._document["ended"] = None
        return True

    def _leave_to(self, before: dict[str, Any]) -> None:
        """Keep the record of another run: under another name, or there, if it is still being written."""
        assert self.folder is not None
        if not _is_running(before):
            _put_aside(self.folder)
            return
        self.folder = _free_name(self.folder)
        self._files = RecordFiles(self.folder, self._contents)
        log.info(
            "Another run writes its record beside this one's, which is %s", self.folder
        )

    def _describe(self, run: Run, number: int) -> None:
        document = self._document
        document["job"] = run.name
        document["attempts"].append(self._secrets.clean_value(_attempt(run)))
        if run.fn != "fit":
            return
        document["fit"] = number
        document["command"] = environment.command(self._secrets)
        document["packages"] = environment.packages()
        device = run.engine.device
        found = run.engine.environment
        world_size = run.trainer.world_size
        self._put("hardware", lambda: environment.hardware(device))
        self._put("launcher", lambda: environment.launcher(found, world_size))
        self._put("strategy", lambda: describe.strategy(run))
        self._put("precision", lambda: describe.precision(run))
        self._put("seeds", lambda: describe.seeds(run))
        # Once more when all is known, for a run that comes so far.
        self._put("config", lambda: describe.config(run))

    def begin_training(self, run: Run) -> None:
        """Describe what is only known now, and measure from here on."""
        if not self._is_open or self._box is None:
            return
        try:
            self._box.begin_training(run)
        except Exception as error:
            log.warning(
                "This run cannot be replayed (%s: %s)", type(error).__name__, error
            )
        # A norm of another fit's gradients is none of this one's.
        run.engine.accumulation.note_norm(None)
        # What was before is told by itself.
        self.clock.begin()
        known = self._document.get("model", {}).get("flops_per_sample")
        self._monitors = monitors = Monitors(run, self.clock, known)
        if not run.trainer.is_global_zero:
            return
        run.hooks.put_first("on_train_batch_end", monitors.after_step)
        self._put(
            "config", lambda: {**describe.config(run), "data": describe.data(run)}
        )
        self._put("batch", lambda: describe.batch(run))
        self._put("model", lambda: describe.model(run.module))
        timings = self._document["timings"]
        start = {
            **timings["start"],
            "program": self._program_seconds,
            "setup": perf_counter() - self._began,
        }
        # The thread that writes may be reading the one that is there.
        self._document["timings"] = {**timings, "start": start}
        self._refresh()

    def _put(self, key: str, describe_it: Callable[[], Any]) -> None:
        """Describe a part of the run; what fails at that, as a user's object may, ends no run."""
        try:
            self._document[key] = self._secrets.clean_value(describe_it())
        except Exception as error:
            log.warning(
                "The run's record lacks %r (%s: %s)", key, type(error).__name__, error
            )

    def _look_at_git(self, files: RecordFiles) -> None:
        """Ask git, in the thread that writes."""
        self._document["git"] = environment.git(self._secrets, files.add_blob)
        files.refresh()

    def _contents(self) -> dict[str, Any]:
        """What ``run.json`` holds now; called in the thread that writes."""
        document = dict(self._document)
        document["written"] = time.time()
        # An evaluation leaves those of the training before it.
        if self._monitors is not None:
            document["timings"] = {**document["timings"], "run": self.clock.so_far()}
        if self._warnings is not None:
            earlier = document["warnings"]
            document["warnings"] = earlier + self._secrets.clean_value(
                self._warnings.rows()
            )
        return document

    def _refresh(self) -> None:
        if self._files is not None:
            self._files.refresh()

    # While it runs.

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Measure how long the loop waits for each batch."""
        if self._monitors is None or self._files is None:
            return batches
        return self._monitors.timed(batches)

    def timed_transfer(
        self, transfer: Callable[[Any, int], Any] | None
    ) -> Callable[[Any, int], Any] | None:
        """Measure how long batches take to the device."""
        if transfer is None or self._files is None or not self._is_open:
            return transfer
        return self.clock.timed_transfer(transfer)

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Measure something that is not a step."""
        return self.clock.phase(name)

    def begin_row(self, run: Run) -> None:
        """Measure what goes with the values of a step."""
        monitors = self._monitors
        if monitors is None:
            return
        self._pending = monitors.row()
        self._note_first_batch(monitors)

    def _note_first_batch(self, monitors: Monitors) -> None:
        """Note what the first batch has told."""
        model = self._document.get("model")
        if monitors.flops_per_sample and model:
            model["flops_per_sample"] = monitors.flops_per_sample
        if monitors.first_batch and self._document:
            self._document["timings"]["start"]["first_batch"] = monitors.first_batch

    def add_row(self, step: int, values: dict[str, Any]) -> None:
        """Write a row, with what was measured, if it is a step's."""
        if self._files is None or not self._is_open:
            return
        others = {**values, **self._pending}
        self._last_values = others
        self._pending = {}
        epoch = others.pop("epoch", None)
        row = {"step": step, "epoch": epoch, "time": time.time(), "values": others}
        self._files.add(self._files.metrics, row)

    def end_row(self, run: Run) -> None:
        """Write what was measured, if the step had no values of its own."""
        if self._pending:
            state = run.state
            self.add_row(state.global_step, {"epoch": state.epoch})
        if self._box is not None:
            # No training ends as something of it could not be kept.
            with suppress(Exception):
                self._box.see(run, self._last_values)
        self._last_values = {}

    def add_media(self, kind: str, name: str, media: dict[str, Any], step: int) -> None:
        """Write an image or the like, and a line that tells of it."""
        files = self._files
        if files is None or not self._is_open:
            return
        head = {"step": step, "name": name, "kind": kind}
        if kind not in ("image", "audio"):
            value = media["text"] if kind == "text" else media
            files.add(files.media, {**head, "value": self._secrets.clean_value(value)})
            return
        for number, (file, data) in enumerate(
            file_names(name, step, kind, media).items()
        ):
            self._media_bytes += len(data)
            if self._media_bytes > _MOST_MEDIA:
                self._tell_of_media(name)
                return
            path = f"{MEDIA_FOLDER}/{file}"
            files.add_blob(path, data)
            captions = media.get("caption")
            caption = captions[number] if captions else None
            files.add(files.media, {**head, "file": path, "caption": caption})

    def _tell_of_media(self, name: str) -> None:
        if self._media_bytes < 1 << 60:
            log.warning(
                "The run's record keeps at most %d MB of media: %s and what follows are left out of it",
                _MOST_MEDIA >> 20,
                name,
            )
        self._media_bytes = 1 << 60

    def begin_save(self, run: Run) -> Callable[[str], None]:
        """Note a checkpoint, its step and scores, when it is complete."""
        state = run.state
        scores = run.trainer.callback_metrics
        entry = {"step": state.global_step, "epoch": state.epoch}
        began = perf_counter()

        def note(path: str) -> None:
            if not self._is_open:
                return
            self._add_checkpoint(
                {
                    "path": self._path_of(path),
                    **entry,
                    "scores": {name: float(value) for name, value in scores.items()},
                    "time": time.time(),
                    "seconds": perf_counter() - began,
                }
            )

        return note

    def note_removed(self, path: str) -> None:
        """Note that a checkpoint is gone; its scores stay."""
        path = self._path_of(path)
        known = self._document.get("checkpoints", [])
        self._document["checkpoints"] = [
            {**entry, "removed": True} if entry["path"] == path else entry
            for entry in known
        ]

    def _path_of(self, path: str) -> str:
        return self._secrets.clean(os.path.abspath(path) if is_local(path) else path)

    def _add_checkpoint(self, entry: dict[str, Any]) -> None:
        known = self._document.get("checkpoints", [])
        # It may have taken an older one's place.
        kept = [each for each in known if each["path"] != entry["path"]]
        self._document["checkpoints"] = [*kept, entry]
        self._refresh()

    def end_epoch(self, run: Run, values: dict[str, Any]) -> None:
        """Note where the time of the epoch went, and look at its values."""
        if self._files is None or not self._is_open:
            return
        if self._box is not None:
            with suppress(Exception):
                self._box.see(run, values)
        if self._monitors is not None:
            self._note_first_batch(self._monitors)
        timings = self._document["timings"]
        epoch = run.state.epoch
        seconds = {"epoch": epoch, **self.clock.end_epoch()}
        kept = [each for each in timings["epochs"] if each["epoch"] < epoch]
        timings["epochs"] = [*kept, seconds]
        self._refresh()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any] | None:
        """What a run that resumes needs to go on with the record."""
        if self._files is None or not self._is_open:
            return None
        return {
            "id": self._document["id"],
            "files": self._files.state(),
            "clock": self.clock.state(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from there: now, or when the run begins that reads the checkpoint."""
        if not self._is_open:
            self._state = state
        elif self._files is not None and state is not None:
            try:
                self._files.go_on(state["files"])
            except Exception as error:
                log.warning(
                    "The run's record keeps rows that were taken back (%s)", error
                )
            self.clock.go_on(state["clock"])
        if self._is_open and self._monitors is not None:
            self._monitors.begin_anew()

    def take(self, folder: str | None) -> None:
        """Know where a run of another process has left its record."""
        self.folder = folder

    # The end.

    def end(self, run: Run, error: BaseException | None = None) -> None:
        """Note how the run ended, and write what is left."""
        if not self._is_open:
            return
        self._is_open = False
        monitors = self._monitors
        self._monitors = None
        if monitors is not None:
            monitors.close()
        box = self._box
        self._box = None
        if box is not None and error is not None:
            with suppress(Exception):
                box.fail(run, error)
        files = self._files
        self._files = None
        if files is None:
            return
        ended = self._secrets.clean_value(ending(run, error))
        # A training that has come to its end stays so, if what is evaluated after it does.
        if error is not None or not self._document["ended"]:
            self._document["ended"] = ended
        # It may have been interrupted before there was an attempt.
        if attempts := self._document.get("attempts"):
            last_step = run.state.global_step
            attempts[-1] = {**attempts[-1], "ended": ended, "last_step": last_step}
        if self._warnings is not None:
            self._warnings.end()
        if monitors is not None:
            timings = self._document["timings"]
            self._document["timings"] = {**timings, "run": self.clock.so_far()}
        files.close(_LAST_SECONDS)


def _empty() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "id": uuid.uuid4().hex,
        "job": "",
        "fit": 0,
        "command": None,
        "git": None,
        "config": {},
        "packages": {},
        "hardware": {},
        "launcher": {},
        "seeds": {},
        "batch": {},
        "strategy": {},
        "precision": {},
        "model": {},
        "timings": {"start": {}, "run": {}, "epochs": []},
        "checkpoints": [],
        "warnings": [],
        "attempts": [],
        "ended": None,
    }


def _attempt(run: Run) -> dict[str, Any]:
    """What is known of an attempt as it begins."""
    attempt = this_attempt()
    return {
        "fn": run.fn,
        "started": time.time(),
        "job": None if attempt is None else attempt.job,
        "restarts": None if attempt is None else attempt.restarts,
        "resumed_from": run.ckpt_path,
        "first_step": run.state.global_step,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ended": None,
    }


def _is_running(document: dict[str, Any]) -> bool:
    """Whether a process of this machine, another than this one, still writes a record."""
    last = document["attempts"][-1]
    if last["ended"] is not None or last["host"] != socket.gethostname():
        return False
    return last["pid"] != os.getpid() and not has_ended(
        (process_here()[0], last["pid"])
    )


def _free_name(folder: str) -> str:
    number = 1
    while exists(name := f"{folder}-{number}"):
        number += 1
    return name


def _put_aside(folder: str) -> None:
    """Keep the record of another run, which was in the same folder."""
    aside = _free_name(folder)
    if is_local(folder):
        os.rename(folder, aside)
    else:
        filesystem(folder).mv(folder, aside, recursive=True)
    log.info("%s is another run's, and is kept as %s", folder, os.path.basename(aside))
