"""What every test gets: one thread, a seed, a directory of its own, and a check that it leaves nothing running."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

# Before torch is imported, and for the processes that tests start: one thread each unless the caller says how many, no
# compile workers that outlive a test, and no usage reports from the libraries under test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    # Two of Trackio's servers that look for a free port at once may take the same one, and then rows of the other.
    GRADIO_SERVER_PORT=str(
        7860 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    ),
    TORCHINDUCTOR_COMPILE_THREADS="1",
    DO_NOT_TRACK="true",
    WANDB_ERROR_REPORTING="false",
    WANDB_MODE="offline",
)

import numpy as np
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Where processes that a test starts look first. torchmetrics imports transformers if it finds that it is installed,
# which takes more than a second: here is version 0, for which it has no use; `import transformers` goes on to find the
# real one. And sitecustomize lets them say where they hang.
STARTING = str(Path(__file__).resolve().parent / "starting")
if STARTING not in sys.path:
    sys.path.insert(0, STARTING)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (STARTING, os.environ.get("PYTHONPATH")))
    )

# What a shell starts in the background ignores Ctrl-C, and so would all that tests start: some of them send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Seconds that threads and processes get to end after a test. torch waits 5 for a worker of a loader that is collected.
GRACE = 12.0


# Seconds for a slow test. The first one that offloads to the CPU waits until DeepSpeed has compiled its optimizer: that
# took 108 s with an empty cache of torch's extensions and two other programs on two cores.
SLOW_TIMEOUT = 400


# The tests of a file run in one worker. The files that take longest come first: at the end, no worker is left with one
# of them while the others have nothing to do.
LONGEST = (
    "test_launch",
    "test_docstrings",
    "test_kill",
    "test_signals",
    "test_engine",
    "test_resumed_loaders",
    "test_layouts",
    "test_rules",
    "test_failing_saves",
    "test_sharded",
    "test_spike_detector",
)


def place_of(item: pytest.Item) -> int:
    """Where a test's file comes, in the order of these."""
    name = item.path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, skip tests that need a GPU where there is none, and give slow ones more time."""
    items.sort(key=place_of)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def is_running(pid: int) -> bool:
    """Whether a process is more than a zombie, which only waits for its exit code to be read."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


def child_processes() -> set[int]:
    """Process ids of our running children; on systems without /proc, none."""
    children: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has just ended
            children.update(
                pid for pid in map(int, file.read_text().split()) if is_running(pid)
            )
    # multiprocessing starts one tracker with the first spawn, and keeps it until the interpreter ends.
    tracker = vars(resource_tracker._resource_tracker).get("_pid")
    return children - {tracker}


def foreground_threads() -> set[threading.Thread]:
    """Threads that would keep the interpreter from ending."""
    return {thread for thread in threading.enumerate() if not thread.daemon}


@pytest.fixture(autouse=True)
def leaves_nothing_running() -> Iterator[None]:
    """Fail a test that leaves a process, a non-daemon thread or a process group behind."""
    processes, threads = child_processes(), foreground_threads()
    yield
    group_open = torch.distributed.is_initialized()
    if group_open:
        torch.distributed.destroy_process_group()

    deadline = time.monotonic() + GRACE
    while (left := (child_processes() - processes, foreground_threads() - threads)) != (
        set(),
        set(),
    ):
        if time.monotonic() > deadline:
            break
        gc.collect()  # ends the workers of an abandoned DataLoader iterator
        time.sleep(0.02)
    for pid in left[0]:
        os.kill(pid, signal.SIGKILL)
    found = [f"process {pid} (killed)" for pid in left[0]] + [
        f"thread {thread.name}" for thread in left[1]
    ]
    if group_open:
        found.append("an open process group (closed)")
    if found:
        pytest.fail("the test left behind: " + ", ".join(found))


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seed, and run in an empty directory; put RNG states, the environment and what is logged back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    log = logging.getLogger("loopwright")
    levels = logging.root.level, log.level
    handlers = list(log.handlers)
    environment = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    os.environ.clear()
    os.environ.update(environment)
    logging.root.setLevel(levels[0])
    log.setLevel(levels[1])
    log.handlers[:] = handlers
