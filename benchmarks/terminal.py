"""A program in a terminal of its own, which we read: progress bars draw there as they would for a user."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_in_terminal(name: str, command: Sequence[str]) -> None:
    """Run a command to its end; if it fails, `name` does, with what it showed last."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DO_NOT_TRACK": "1",
        "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30",
    }  # fmt: skip
    master, slave = os.openpty()
    resize(slave, rows=30, columns=100)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown = drain(master)
    os.close(master)
    if process.wait() != 0:
        raise RuntimeError(f"{name} failed:\n{shown}")


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
