"""A program that is run again to look at one step of an earlier run: what it does otherwise than it did then.

It trains as it did, from the beginning or from a checkpoint, and writes nothing: its loggers are dummies, callbacks
that persist or show are not called, and no checkpoint is saved. Before the step that is asked for it stops, and after
it the process ends; what follows in the program is not run.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import torch

from ... import callbacks as builtin_callbacks
from ...callbacks.base import Callback
from ...loggers.dummy import DummyLogger, LoggerFolders
from ...strategies.launch.processes import die_with
from ..engine.compile import read_compilation
from ..loop.record import NoRecord
from ..messages import log
from ..seed import isolated_rng, set_rng_state
from .asked import Asked, asked, own_rank
from .black_box import box_path, clean_text_of
from .fingerprints import Fingerprints
from .packed import plain, read_packed
from .recorded_steps import RecordedSteps
from .step_values import StepValues, is_same

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ...loggers.base import Logger
    from ..loop.run import Run, RunRequest
    from ..module import Module
    from ..trainer import Trainer
    from .trace import Trace

# What draws, prints, tells others, writes, or ends a run after a time, which is another one now.
_LEFT_OUT = (
    "MaxTime",
    "MemorySnapshot",
    "ModelSummary",
    "Notify",
    "Profiler",
    "ProgressBar",
    "Timer",
)
# A rank that waits for the one that is looked at looks so often.
_WAIT_SECONDS = 0.1


def begin_program() -> None:
    """Let the generators of a program that is run again begin as they did, if it never seeds them."""
    request = asked()
    if request is None or multiprocessing.parent_process() is not None:
        return
    die_with(os.getppid())
    start = read_start(request, own_rank())
    if start is not None:
        torch.manual_seed(start["torch_seed"])


def read_start(request: Asked, rank: int) -> dict[str, Any] | None:
    """Return how a rank began, as the black box holds it; None if the run has left nothing of it."""
    try:
        return read_packed(box_path(request.record, "start", rank))
    except (OSError, ValueError, KeyError):
        return None


class Replay(NoRecord):
    """Takes the place of a Trainer's record in a program that is run again.

    Args:
        request: what is asked for.
    """

    is_replay = True

    def __init__(self, request: Asked) -> None:
        self.request = request
        self.rank = own_rank()
        self._is_on = False
        self._steps_by_parts = True
        self._values: StepValues | None = None
        self._open = ExitStack()
        self._trace: Trace | None = None
        self._recorded = RecordedSteps(request.record, request.step, self.rank)
        self._row: dict[str, Any] = {}
        log.setLevel("WARNING")
        # They were told in the run that is repeated.
        warnings.simplefilter("ignore")

    @property
    def is_looked_at(self) -> bool:
        """Whether this process is the rank to show."""
        return self.rank == self.request.rank

    # What the Trainer asks.

    def deals_out(self, requested: bool | None) -> bool | None:
        """Return ``use_distributed_sampler`` for a process that cannot ask the other ranks what they read."""
        start = read_start(self.request, self.rank)
        if not self.request.shows_batch or start is None:
            return requested
        return start["deals_out"]

    def silent_loggers(self, loggers: Sequence[Logger]) -> list[Logger]:
        """Return loggers that take everything and do nothing; their folders are removed afterwards."""
        scratch = self.request.scratch
        folders = LoggerFolders("replay", 0, scratch, scratch)
        return [DummyLogger(folders) for _ in loggers]

    def heard(self, callbacks: list[Callback]) -> list[Callback]:
        """Return the callbacks whose hooks are called: no bars, and nothing that persists."""
        kinds = tuple(getattr(builtin_callbacks, name) for name in _LEFT_OUT)
        kept = [
            callback
            for callback in callbacks
            if callback.phase != "persist" and not isinstance(callback, kinds)
        ]
        if not self._is_on:
            return kept
        # What the ranks compare was compared.
        kept = [each for each in kept if not isinstance(each, Fingerprints)]
        before = _BeforeStep(self) if self._steps_by_parts else _BeforeBatch(self)
        return [before, *kept, _AfterStep(self)]

    def take_up(self, trainer: Trainer, request: RunRequest) -> RunRequest:
        """Begin the fit that is repeated where it is asked to begin; other runs of the program go on as they are."""
        wanted = self.request
        # The program may have given it others since it was made.
        trainer.loggers = self.silent_loggers(trainer.loggers)
        if request.fn != "fit" or request.number != wanted.fit:
            return request
        if trainer.world_size != wanted.world_size or trainer.engine.must_launch:
            raise RuntimeError(
                f"the run had {wanted.world_size} process(es), and this program now asks for {trainer.world_size}: let "
                "it see as many devices as then (CUDA_VISIBLE_DEVICES), and pass the same arguments"
            )
        self._is_on = True
        self._steps_by_parts = read_compilation(trainer.compile)[0] != "step"
        if self.is_looked_at:
            with open(wanted.begun, "w"):
                pass
        start = read_start(wanted, self.rank)
        if start is not None:
            if torch.get_num_threads() != start["threads"]:
                torch.set_num_threads(start["threads"])
            set_rng_state(start["generators"], trainer.engine.device)
        if wanted.shows_batch:
            from .batch import show_batch

            self.show_output()
            show_batch(trainer, request, wanted, start)
            leave(0)
        return replace(request, ckpt_path=wanted.checkpoint)

    # What the loop tells.

    def begin_training(self, run: Run) -> None:
        """See whether the training begins as it did."""
        is_new = self._is_on and not run.state.global_step
        if is_new and self._recorded.begins_otherwise(run.trainer, run.module):
            print(
                "The program has begun with other weights than it did: what it draws them from is seeded otherwise, or "
                "its code, packages or arguments are others now",
                file=sys.stderr,
            )

    def add_row(self, step: int, values: dict[str, Any]) -> None:
        """Keep a row of the step, to compare it with what was recorded."""
        if step == self.request.step:
            self._row |= values

    # The step.

    def begin_batch(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int
    ) -> None:
        """A batch is about to be trained on: stop if the step begins with it."""
        if trainer.global_step != self.request.step - 1:
            return
        if self._values is None or not trainer.window_is_open:
            with isolated_rng(trainer.engine.device):
                self._arrive(trainer, module, batch, batch_idx)
        assert self._values is not None
        self._values.begin_batch(batch_idx)

    def _arrive(
        self, trainer: Trainer, module: Module, batch: Any, batch_idx: int
    ) -> None:
        self._values = StepValues(trainer, self.request, batch_idx)
        if self.is_looked_at:
            self.show_output()
            print(self._values.head(), flush=True)
            self._compare_batch(batch, batch_idx)
        if self.request.trace:
            from .trace import traced

            self._trace = self._open.enter_context(traced(module))
        if not self.request.debugger:
            return
        gate = os.path.join(self.request.scratch, "go")
        if self.is_looked_at:
            _look(trainer, module, batch, batch_idx, trainer.optimizers)
            with open(gate, "w"):
                pass
        while not os.path.exists(gate):
            time.sleep(_WAIT_SECONDS)

    def _compare_batch(self, batch: Any, batch_idx: int) -> None:
        """Say whether the batch is the one that the black box holds."""
        box = self._box()
        if box is None or box["batch_idx"] != batch_idx or box["batch"] is None:
            return
        same = "equals" if is_same(plain(batch), box["batch"]) else "differs from"
        print(f"batch             {same} that of the black box", flush=True)

    def _box(self) -> dict[str, Any] | None:
        """Return the black box of this step, if there is one."""
        for kind in ("failure", "not-finite"):
            try:
                box = read_packed(box_path(self.request.record, kind, self.rank))
            except (OSError, ValueError, KeyError):
                continue
            if box["step"] == self.request.step:
                return box
        return None

    def note_gradients(self, optimizer: Optimizer) -> None:
        """Gradients are complete, and not clipped yet."""
        if self._values is not None:
            self._values.note_gradients(optimizer)

    def end_batch(
        self, trainer: Trainer, module: Module, outputs: Any, batch_idx: int
    ) -> None:
        """A batch was trained on: if the step ends with it, tell its values, and leave."""
        values = self._values
        if values is None:
            if not trainer.window_is_open:
                self._recorded.pass_by(trainer, module, outputs)
            return
        values.end_batch(batch_idx, outputs)
        if trainer.global_step < self.request.step:
            return
        self._open.close()
        if self._trace is not None and self.is_looked_at:
            self._trace.write(self.request.trace)
        # Collectives.
        lines = values.lines()
        lines += self._recorded.compare(trainer, module, outputs, self._row)
        if self.is_looked_at:
            print("\n".join(lines), flush=True)
        # Nobody goes while another one still reads what it has sent.
        trainer.strategy.barrier()  # collective
        trainer.run.loaders.close()
        leave(0)

    def fail(self, trainer: Trainer, error: BaseException) -> None:
        """The run is ended by an error: before the step, or in it."""
        from bdb import BdbQuit

        if isinstance(error, BdbQuit):
            leave(0)
        if self.is_looked_at:
            self._tell_of_failure(trainer, error)
        # Not back to the program, which may catch the error and go on.
        if isinstance(error, SystemExit):
            leave(error.code if isinstance(error.code, int) else 1)
        sys.excepthook(type(error), error, error.__traceback__)
        leave(1)

    def _tell_of_failure(self, trainer: Trainer, error: BaseException) -> None:
        """Say where the run has failed, and whether it did so before."""
        self.show_output()
        wanted = self.request.step
        if self._values is None:
            if trainer.training and trainer.global_step == wanted - 1:
                # The step's first batch could not be read.
                values = StepValues(trainer, self.request, trainer.batch_idx)
                print(values.head(), flush=True)
            else:
                place = trainer.state.where
                print(f"This happened before step {wanted}: {place}", flush=True)
        self._compare_error(error)
        if self.request.debugger:
            _look_back(error)
            leave(1)

    def _compare_error(self, error: BaseException) -> None:
        """Say whether the black box holds this error."""
        box = self._box()
        text = clean_text_of(error)
        if box is None:
            return
        if box["why"] == text:
            print("error             the one that was recorded", flush=True)
        else:
            print(
                f"error             another one than recorded: {box['why']}", flush=True
            )

    def never_came(self, trainer: Trainer) -> NoReturn:
        """The fit has ended before the step."""
        if self.is_looked_at:
            self.show_output()
            print(
                f"The run ended after step {trainer.global_step}: there is no step {self.request.step}",
                file=sys.stderr,
            )
        leave(1)

    def show_output(self) -> None:
        """Let standard output be seen from now on."""
        warnings.simplefilter("default")
        if self.is_looked_at and self.request.output >= 0:
            sys.stdout.flush()
            # 1 is standard output.
            os.dup2(self.request.output, 1)


class _BeforeBatch(Callback):
    """Is called first at each moment but those inside of a step, which may be one graph.

    Args:
        replay: what to tell.
    """

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int
    ) -> None:
        self._replay.begin_batch(trainer, pl_module, batch, batch_idx)

    def on_exception(
        self, trainer: Trainer, pl_module: Module, exception: BaseException
    ) -> None:
        self._replay.fail(trainer, exception)


class _BeforeStep(_BeforeBatch):
    """Is called first at each moment.

    Args:
        replay: what to tell.
    """

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Module, optimizer: Optimizer
    ) -> None:
        self._replay.note_gradients(optimizer)


class _AfterStep(Callback):
    """Is called last, when the step's values have been logged.

    Args:
        replay: what to tell.
    """

    phase: ClassVar[Literal["observe", "decide", "persist"]] = "persist"

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._replay.end_batch(trainer, pl_module, outputs, batch_idx)

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._replay.never_came(trainer)


def _look(
    trainer: Any, module: Any, batch: Any, batch_idx: int, optimizers: list[Any]
) -> None:
    """Open pdb in a function that has these names."""
    import pdb

    # Read by the user.
    optimizer = optimizers[0] if len(optimizers) == 1 else optimizers  # noqa: F841  # a name for pdb
    debugger = pdb.Pdb()
    step = getattr(type(module), "training_step", None)
    code = getattr(step, "__code__", None)
    if code is not None:
        debugger.set_break(
            code.co_filename, code.co_firstlineno, True, None, code.co_name
        )
    print(
        "pdb has trainer, module, batch, batch_idx, optimizer; c goes on to training_step, q leaves",
        flush=True,
    )
    debugger.set_trace()
    # It stops here, and the step follows.
    del debugger


def _look_back(error: BaseException) -> None:
    """Open pdb where an error was raised."""
    import pdb

    traceback.print_exception(error)
    print("pdb is where this was raised; q leaves", flush=True)
    pdb.post_mortem(error.__traceback__)


def leave(code: int) -> NoReturn:
    """End this process here, whatever the program would do next."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
