"""Runs that stand still: what counts as that, who is reported, and how it ends."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import FileStore

from loopwright.framework import Engine, Trainer
from loopwright.strategies.launch.hang_timeout import HangTimeout
from loopwright.strategies.launch.heartbeat import Moves
from loopwright.strategies.launch.rendezvous import comes
from loopwright.strategies.launch.stacks import (
    frames_of,
    hook_in,
    readable,
    waits_for_peers,
)
from tests.programs import run_program


def test_a_phase_has_its_own_time():
    timeout = HangTimeout.read({"train": 60, "checkpoint": timedelta(hours=2)})
    assert timeout.limit("train") == 60
    assert timeout.limit("checkpoint") == 7200
    assert timeout.limit("validate") == 1800
    assert HangTimeout.read(7).limit("test") == 7
    assert HangTimeout.read(0).is_off
    assert HangTimeout.read({"train": 0}).limit("train") == math.inf


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (-1, "got -1"),
        (True, "got True"),
        ("5 minutes", "got '5 minutes'"),
        (math.nan, "got nan"),
        ({"training": 5}, "'train'.*got 'training'"),
    ],
)
def test_another_hang_timeout_is_refused(value: Any, says: str):
    for make in (Trainer, Engine):
        with pytest.raises(ValueError, match=f"hang_timeout .*{says}"):
            make(hang_timeout=value)


def stands(moves: Moves, seconds: float, place: Any, waits: bool = False) -> None:
    """Look at a run that stands still for so long."""
    phase, batch_idx = place
    for _ in range(int(seconds) + 1):
        moves.note(phase, "somewhere", ((0, batch_idx), 0), waits, 1.0)


def test_by_default_a_run_with_long_steps_has_more_time():
    for value, seconds in ((None, 600.0), (300, 300.0)):
        moves = Moves(HangTimeout.read(value))
        for batch_idx in range(3):
            stands(moves, 200, ("train", batch_idx))
        assert moves.limit == seconds


def test_who_waits_gives_the_others_their_time():
    moves = Moves(HangTimeout.read(60))
    stands(moves, 0, ("train", 0))
    stands(moves, 50, ("train", 1), waits=True)
    assert moves.still < moves.limit == 63
    stands(moves, 5, ("train", 1))
    assert moves.still == 5, "the time of waiting is no time of standing still"


DUMP = """\
Thread 0x00007f6d4fd306c0 (most recent call first):
  File "/lib/threading.py", line 327 in wait
  File "/loopwright/strategies/launch/heartbeat.py", line 106 in _watch

Current thread 0x00007f6d71840b80 (most recent call first):
  File "train.py", line 30 in _wait_for_step
  File "train.py", line 12 in validation_step
  File "train.py", line 45 in <module>
"""


def test_stacks_from_outside_read_as_others_do():
    stacks = readable(DUMP)
    assert stacks.count("Thread") == 1, "without our own thread"
    assert re.findall(r"line (\d+) in", stacks) == ["45", "12", "30"]
    assert hook_in(stacks) == "validation_step"


STUCK = """
import ctypes, os, signal, sys, torch
from loopwright.framework import Module, Trainer
from torch.utils.data import DataLoader

class Stuck(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and os.environ.get("RANK", "1") == "1":
            stand_still()
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def stand_still():
    if sys.argv[1] == "loop":
        while True:
            pass
    if sys.argv[1] == "lock":
        lock, libc = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)
    os.kill(os.getpid(), signal.SIGSTOP)

options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
trainer = Trainer(
    accelerator="cpu", devices=int(sys.argv[2]), max_epochs=1, hang_timeout=4, enable_checkpointing=False, **options
)
trainer.fit(Stuck(), DataLoader(torch.ones(8, 1)))
print("trained")
"""


def test_who_joins_a_thread_that_waits_for_others_waits_for_them(tmp_path: Path):
    """As for one that writes a checkpoint with them: it does not hang."""
    store = FileStore(str(tmp_path / "store"), 2)
    is_over = threading.Event()
    for wait, is_waiting in (
        (lambda: comes(store, "part", is_over.is_set), True),
        (is_over.wait, False),
    ):
        inner = threading.Thread(target=wait)
        outer = threading.Thread(target=inner.join)
        inner.start()
        outer.start()
        time.sleep(0.5)
        waits = waits_for_peers(frames_of(outer.ident or 0))
        is_over.set()
        outer.join(5)
        is_over.clear()
        assert waits == is_waiting
        assert not inner.is_alive(), "who has ended is not waited for"
    store.set("part", "written")
    assert comes(store, "part", lambda: True)


@pytest.mark.parametrize(
    ("fault", "devices", "code", "says"),
    [
        ("loop", 1, 124, "did not move for 4 s (train"),
        pytest.param(
            "lock", 1, -signal.SIGKILL, "keeps Python's lock", marks=pytest.mark.slow
        ),
        pytest.param("stop", 2, 124, "a signal has stopped it", marks=pytest.mark.slow),
        pytest.param("loop", 2, 124, "did not move for 4 s", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_stands_still_is_ended(
    fault: str, devices: int, code: int, says: str, tmp_path: Path
):
    (tmp_path / "train.py").write_text(STUCK)
    ended = run_program("train.py", fault, devices, cwd=tmp_path)
    assert ended.returncode == code, ended.stderr
    rank = devices - 1
    begin = f"Rank {rank} of {devices} did not answer at epoch 0, batch "
    report = ended.stderr[ended.stderr.index(begin) :]
    assert says in report
    assert "in stand_still" in report, "the stack"
    assert "loopwright-heartbeat" not in report, "not that of the watch"
    if (fault, devices) == ("loop", 2):
        written = next(tmp_path.rglob("failure.txt")).read_text()
        numbers = re.findall(r"Last collective: number (\d+) of ", written)
        hung, waiting = map(int, numbers)
        assert waiting == hung + 1, "the one that the other rank did not join"


@pytest.mark.slow
def test_a_process_that_its_user_has_stopped_goes_on(tmp_path: Path):
    """Ctrl-Z and fg, or a machine that sleeps: longer than the time-out."""
    program = STUCK.replace("stand_still()", "os.kill(os.getppid(), signal.SIGUSR1)", 1)
    (tmp_path / "train.py").write_text(program)
    stopped = """
import signal, subprocess, sys, time
train = []
def suspend(*_):
    train[0].send_signal(signal.SIGSTOP)
    time.sleep(6)
    train[0].send_signal(signal.SIGCONT)
signal.signal(signal.SIGUSR1, suspend)
train.append(subprocess.Popen([sys.executable, "train.py", "", "1"]))
sys.exit(train[0].wait())
"""
    ended = run_program("-c", stopped, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "trained\n"), ended.stderr
