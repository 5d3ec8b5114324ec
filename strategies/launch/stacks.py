"""What the threads of a process are doing, in words, and what that says of it."""

from __future__ import annotations

import faulthandler
import json
import linecache
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

# On this signal, a process that has called `serving_stacks` writes the stacks of all its threads, even if C code holds
# Python's lock. No program is known to use it for something else.
STACKS_SIGNAL = getattr(signal, "SIGRTMIN", 34) + 9

# A process whose thread is in functions of these modules waits for other processes ...
_WAITING = re.compile(
    r"torch\.distributed\b|torch\.autograd\.graph$|deepspeed\.comm\b|.*\.launch\.rendezvous$"
)
# ... or for its user.
_DEBUGGER = re.compile(r"(i?pdb|bdb|debugpy|_?pydevd\w*)(\.|$)")
_HOOK = re.compile(
    r", line \d+ in ([a-z]\w*_step|on_\w+|setup|prepare_data|\w+_dataloader|configure_\w+)$",
    re.MULTILINE,
)
# In the file of the thread that watches.
_OWN_THREADS = "launch/heartbeat.py"


def frames_of(thread_id: int) -> list[FrameType]:
    """Return what a thread of this process runs, the outermost function first; nothing if it has ended."""
    return frames_until(sys._current_frames().get(thread_id))


def frames_until(frame: FrameType | None) -> list[FrameType]:
    """Return a function that runs and those that have called it, the outermost first."""
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def waits_for_peers(frames: Sequence[FrameType]) -> bool:
    """Whether what a thread runs is a collective, or may be one: a backward pass waits inside of C++.

    Or it waits for another thread that does.
    """
    if frames and _module(frames[-1]) == "threading":
        joined = frames[-1].f_locals.get("self")
        if isinstance(joined, threading.Thread) and joined.ident:
            frames = frames_of(joined.ident)
    return bool(frames) and _WAITING.match(_module(frames[-1])) is not None


def is_debugged(frames: Sequence[FrameType]) -> bool:
    """Whether a debugger has stopped a thread that runs this."""
    return any(_DEBUGGER.match(_module(frame)) for frame in frames[-10:])


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def all_stacks(first: int) -> str:
    """Return the stacks of the threads of this process, that of the thread with the id ``first`` first.

    Our own threads that only wait for something are left out. The last line tells of the last collective.
    """
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for thread_id in [*frames]:
        name = names.get(thread_id, "")
        if name.startswith("loopwright-") and name != "loopwright-checkpoint":
            del frames[thread_id]
    texts = []
    for thread_id in sorted(frames, key=lambda each: each != first):
        stack = "".join(traceback.format_stack(frames[thread_id]))
        texts.append(f"Thread {names.get(thread_id, thread_id)}:\n{stack}")
    return "\n".join([*texts, last_collective()])


@contextmanager
def serving_stacks(file: int) -> Iterator[None]:
    """Return a context in which this process writes its stacks into an open file whenever it gets the signal for it."""
    faulthandler.register(STACKS_SIGNAL, file, all_threads=True, chain=False)
    try:
        yield
    finally:
        faulthandler.unregister(STACKS_SIGNAL)


def readable(dump: str) -> str:
    """Return what faulthandler wrote in the form of Python's tracebacks: the innermost call last, with its line."""
    threads = []
    for part in re.split(r"\n(?=(?:Current thread|Thread) )", dump.strip()):
        calls = part.splitlines()[1:]
        if not calls or any(_OWN_THREADS in call for call in calls):
            continue
        # The last one is the main thread.
        lines = ["Thread:"]
        for call in reversed(calls):
            lines.append(call)
            if place := re.match(r'  File "(.+)", line (\d+) in', call):
                source = linecache.getline(place[1], int(place[2])).strip()
                lines += [f"    {source}"] if source else []
        threads.append("\n".join(lines))
    return "\n\n".join(reversed(threads))


def hook_in(stacks: str) -> str:
    """Return the innermost step or hook of the first thread; empty if there is none."""
    first_thread = stacks.partition("\n\n")[0]
    return next(iter(_HOOK.findall(first_thread)[::-1]), "")


def native_stacks(process: int) -> str:
    """Return the stacks of a process with those of C and C++, if ``py-spy`` is installed and may look; else nothing."""
    program = shutil.which("py-spy")
    if program is None:
        return ""
    command = [program, "dump", "--native", "--pid", str(process)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"With native frames, by py-spy:\n{done.stdout}" if done.stdout else ""


def last_collective() -> str:
    """Return the last collective that this process has begun, and whether that has ended; nothing if it is not known.

    Ranks of which one has come less far than the others have different numbers. torch records them for gloo and NCCL,
    2000 by default (``TORCH_FR_BUFFER_SIZE``).
    """
    torch_records = sys.modules.get("torch._C._distributed_c10d")
    # The record is torch's own, and may differ from version to version.
    with suppress(Exception):
        last = json.loads(torch_records._dump_fr_trace_json())["entries"][-1]  # type: ignore[union-attr]
        state = "has ended" if last["retired"] else "has not ended"
        return (
            f"Last collective: number {last['collective_seq_id']} of {last['process_group'][-1]}, "
            f"{last['profiling_name']} of {last['input_sizes']}, {state}"
        )
    return ""
