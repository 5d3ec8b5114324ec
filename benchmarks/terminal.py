"""A program in a terminal of its own, which we read: progress bars draw there as they would for a user."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_in_terminal(
    name: str,
    command: Sequence[str],
    on_device: bool = False,
    limit: float | None = None,
) -> bool:
    """Run a command to its end; if it fails, `name` does, with what it showed last.

    Args:
        name: what is run, in words.
        command: how.
        on_device: whether it may see CUDA devices.
        limit: seconds after which it is killed, and all that it has started.

    Returns:
        Whether it came to its end within that time.
    """
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1",
        "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30",
    }  # fmt: skip
    if not on_device:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    master, slave = os.openpty()
    resize(slave, rows=30, columns=100)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=limit is not None,
    )  # fmt: skip
    os.close(slave)
    killed = threading.Event()
    killer = threading.Timer(limit or 0, kill_group, (process.pid, killed))
    if limit is not None:
        killer.start()
    try:
        shown = drain(master)
        code = process.wait()
    finally:
        killer.cancel()
        if limit is not None:
            # After Ctrl-C, which processes of another session do not get; and what is left over at the end.
            kill_group(process.pid, threading.Event())
        os.close(master)
    if code != 0 and not killed.is_set():
        raise RuntimeError(f"{name} failed:\n{shown}")
    return not killed.is_set()


def kill_group(leader: int, killed: threading.Event) -> None:
    """Kill the processes of a session that we have started, as far as there are any."""
    killed.set()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def resize(terminal: int, rows: int, columns: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def drain(terminal: int) -> str:
    """Read until the other side is closed; returns the last of it."""
    shown = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that nobody holds the other side any more
            data = b""
        if not data:
            return shown.decode(errors="replace")
        shown = (shown + data)[-4000:]
