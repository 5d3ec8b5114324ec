"""The black box: what a run leaves of a step that failed, so that the step can be looked at and run again.

::

    record/black-box/
      start-0.json, .safetensors        how rank 0 began: its generators, the number of ranks and threads, the fit
      failure-0.json, .safetensors      the step in which rank 0 raised: the batch, its samples, generators, counters
      not-finite-0.json, .safetensors   the step at which a logged loss was first seen not to be finite

A healthy step pays nothing for it. Where a step has failed, the batch is found in the frames of the traceback, and
which samples it had follows from (seed, epoch, position).
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ...callbacks.base import Callback
from ...strategies.launch.failures import is_loss, message_of
from ...strategies.launch.launcher import can_rerun, started_in
from ..checkpoint.storage import join
from ..data import iteration
from ..loop.fit import do_what_is_due, train_batches
from ..messages import log
from ..seed import isolated_rng, rng_state
from .monitors import Monitors
from .packed import read_packed, write_packed
from .secrets import Secrets

if TYPE_CHECKING:
    from ..loop.run import Run

SCHEMA = 1
FOLDER = "black-box"

# Bytes of tensors in a box at most, and characters of its JSON.
_LARGEST = 64 << 20
# How many batches before the failing one are told, too.
_BATCHES_BEFORE = 8
# Variables on which the numbers that are computed may depend.
ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "LOOPWRIGHT_SEED",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
)
# Of what a run that resumes takes over.
_OF_BEGINNING = ("step", "checkpoint", "fit", "torch_seed", "data_seed", "generators")
_GRADIENT_NORM = "monitor/grad_norm"
# Where code lies that reads loaders: ours and torch's.
_READERS = tuple(
    os.path.dirname(str(module.__file__)) + os.sep
    for module in (iteration, torch.utils.data)
)


def box_path(record: str, kind: str, rank: int) -> str:
    """Return where a box lies, without the endings of its two files.

    Args:
        record: the record's folder.
        kind: ``"start"``, ``"failure"`` or ``"not-finite"``.
        rank: whose it is.
    """
    return join(record, FOLDER, f"{kind}-{rank}")


def command_for(
    record: str, step: int, rank: int = 0, detects_anomaly: bool = False
) -> str:
    """Return the command that replays a step of the run with this record."""
    words = ["loopwright", "replay", os.path.dirname(record), "--step", str(step)]
    if rank:
        words += ["--rank", str(rank)]
    if detects_anomaly:
        words.append("--detect-anomaly")
    return shlex.join(words)


class BlackBox:
    """Writes the boxes of one run, on each of its ranks.

    Args:
        record: the record's folder.
        clean: leaves secrets out of a command line; None on all ranks but the main one, which tells it.
        fit: which fit of the program this is, from 1.
    """

    def __init__(
        self, record: str, clean: Callable[[Sequence[str]], Any] | None, fit: int
    ) -> None:
        self._record = record
        self._clean = clean
        self._fit = fit
        self._generators: dict[str, Any] = {}
        self._start = 0
        # The last step whose losses were seen to be finite.
        self._finite_step = 0
        self._has_seen = False

    def begin(self, run: Run) -> None:
        """Note the generators, as the fit begins and nothing has drawn from them."""
        self._generators = rng_state(run.engine.device)
        self._start = self._finite_step = run.state.global_step

    def begin_training(self, run: Run) -> None:
        """Write how this rank has begun; a run that goes on with another one's record keeps how that began."""
        trainer = run.trainer
        loader = run.loaders.train
        start = {
            "schema": SCHEMA,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "local_world_size": trainer.num_devices,
            "strategy": trainer.strategy.name,
            "fit": self._fit,
            "step": self._start,
            "checkpoint": _absolute(run.ckpt_path),
            "command": self._command(),
            "torch_seed": torch.initial_seed(),
            "data_seed": run.state.seed,
            "deals_out": loader is None or loader.shards_batches,
            "threads": torch.get_num_threads(),
            "environment": {
                name: os.environ[name] for name in ENVIRONMENT if name in os.environ
            },
            "generators": self._generators,
        }
        if run.resume.is_from_checkpoint:
            start |= self._began_before(start)
        self._write("start", trainer.global_rank, start)
        self._generators = {}

    def _began_before(self, start: dict[str, Any]) -> dict[str, Any]:
        """Return how the run began that this one goes on with, in the same folder and with as many ranks."""
        try:
            before = read_packed(box_path(self._record, "start", start["rank"]))
            is_same = before["world_size"] == start["world_size"]
            return {name: before[name] for name in _OF_BEGINNING} if is_same else {}
        except (OSError, ValueError, KeyError):
            return {}

    def _command(self) -> dict[str, Any] | None:
        """Return how the program was started, as the main rank tells it."""
        if self._clean is None:
            return None
        return {
            "executable": sys.executable,
            "orig_argv": self._clean(sys.orig_argv),
            # None where there is no program to start again, as in a notebook.
            "folder": started_in() if can_rerun() else None,
        }

    def fail(self, run: Run, error: BaseException) -> None:
        """Write what is known of a training step that has raised, and let the error end with what replays it.

        Args:
            run: the run.
            error: what ended it. Nothing is done if that is no exception of a training step of this rank.
        """
        if not isinstance(error, Exception) or is_loss(error):
            return
        at = _find_step(_frames_of(error.__traceback__))
        if at is None:
            return
        step = run.state.global_step
        if at.is_reading or not (
            run.step.stepped and at.batch_idx < run.state.batch_idx
        ):
            step += 1
        batch_idx = run.state.batch_idx if at.is_reading else at.batch_idx
        text = clean_text_of(error)
        box = _contents(run, step, batch_idx, None if at.is_reading else at.batch)
        rank = run.trainer.global_rank
        path = self._write("failure", rank, {"why": text, **box})
        hint = f"The step's batch and samples: {path}.json"
        if can_rerun():
            hint = f"To run this step again:\n{command_for(self._record, step, rank)}"
        add_note = getattr(error, "add_note", None)
        if add_note is None:
            # Before Python 3.11, an error has no notes.
            log.error("%s", hint)
        else:
            add_note(hint)

    def see(self, run: Run, values: Mapping[str, Any]) -> None:
        """Look at the values that are logged of a step or an epoch; the first loss that is not finite is told.

        Args:
            run: the run.
            values: numbers or tensors by name.
        """
        if self._has_seen:
            return
        step = run.state.global_step
        bad = [
            name
            for name, value in values.items()
            if _tells_of_loss(run, name) and not math.isfinite(value)
        ]
        if not bad:
            self._finite_step = step
            return
        self._has_seen = True
        # Rather a loss than what was measured of it.
        name = min(bad, key=lambda each: each == _GRADIENT_NORM)
        why = f"{name} is {float(values[name])}"
        since = "at an epoch's end"
        way_out = ""
        # An epoch's end has no batch.
        at = _find_step(_running_frames())
        if at is not None:
            since = f"and was finite at step {self._finite_step}"
            box = _contents(run, step, at.batch_idx, at.batch)
            box |= {"why": why, "first_step": self._finite_step + 1}
            path = self._write("not-finite", run.trainer.global_rank, box)
            way_out = f"The batch and its samples: {path}.json"
        if can_rerun():
            way_out = f"To find the step and the operation: {command_for(self._record, step, 0, True)}"
        log.warning(
            "%s at step %d, %s. %s",
            why,
            step,
            since,
            way_out,
        )

    def _write(self, kind: str, rank: int, content: dict[str, Any]) -> str:
        path = box_path(self._record, kind, rank)
        # What ended the run is more important, and a full disk may be that.
        with suppress(Exception), torch.no_grad():
            write_packed(path, content, _LARGEST)
        return path


@dataclass
class _Step:
    """Where the loop was.

    Attributes:
        batch: the last that was read.
        batch_idx: its index.
        is_reading: whether the next one was being read.
    """

    batch: Any
    batch_idx: int
    is_reading: bool


def _find_step(frames: Iterator[FrameType]) -> _Step | None:
    """Return at which batch the loop of training was whose frame is one of these, the outermost first.

    None if there is none, or it was not doing a step.
    """
    for frame in frames:
        if frame.f_code is train_batches.__code__:
            at = frame.f_locals
            inner = list(frames)
            if any(map(_is_beside, inner)):
                return None
            is_reading = bool(inner) and _reads(inner[0])
            return _Step(at.get("batch"), at.get("batch_idx", 0), is_reading)
    return None


def _is_beside(frame: FrameType) -> bool:
    """Whether a function does what is no part of a step: it validates, or saves."""
    is_due = frame.f_code is do_what_is_due.__code__
    owner = frame.f_locals.get("self")
    return is_due or (isinstance(owner, Callback) and owner.phase == "persist")


def _reads(frame: FrameType) -> bool:
    """Whether a function that the loop has called gives batches."""
    if frame.f_code is Monitors.timed.__code__:
        return True
    path = frame.f_code.co_filename
    file = path.replace("\\", "/")
    name = frame.f_code.co_name
    is_ours = file.endswith(("loop/loaders.py", "loop/record.py", "report/record.py"))
    is_generator = name in ("_leaving_out", "_ending_windows")
    return is_generator or is_ours or path.startswith(_READERS)


def _frames_of(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _running_frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return reversed(found)


def _contents(run: Run, step: int, batch_idx: int, batch: Any) -> dict[str, Any]:
    """Return what every box holds of a step."""
    trainer = run.trainer
    generators = rng_state(run.engine.device)
    first = max(0, batch_idx - _BATCHES_BEFORE)
    with isolated_rng():
        samples = {str(i): trainer.samples_of(i) for i in range(first, batch_idx + 1)}
    return {
        "schema": SCHEMA,
        "step": step,
        "epoch": run.state.epoch,
        "batch_idx": batch_idx,
        "window_start": run.step.accumulation.start,
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "time": time.time(),
        "samples": samples,
        "counters": run.progress(),
        "generators": generators,
        # The last, as what is too large to be kept is left out from there on.
        "batch": batch,
    }


def _tells_of_loss(run: Run, name: str) -> bool:
    """Whether a logged value must be finite: a loss, or the gradients' norm where no scaler lets it overflow."""
    if name == _GRADIENT_NORM:
        return run.engine.scaler is None
    return "loss" in name.rpartition("/")[2].lower()


def clean_text_of(error: BaseException) -> str:
    """Return an error in words, without secrets, as a box holds it."""
    return Secrets(os.environ, sys.argv).clean(message_of(error)[:2000])


def _absolute(path: str | None) -> str | None:
    if path is None or "://" in path:
        return path
    return os.path.abspath(path)
