"""Running programs to their end, for tests; those that hang say where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest


def run_program(
    *arguments: Any, timeout: float = 90, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` to its end, and return its exit status and output.

    Args:
        arguments: Python's.
        timeout: seconds after which the test fails, with what was printed and the stacks of all its processes.
        options: of ``subprocess.Popen``.
    """
    command = [sys.executable, *map(str, arguments)]
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    program = subprocess.Popen(command, **pipes, **options)
    try:
        out, err = program.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        show_stacks(descendants(program.pid))
        with suppress(subprocess.TimeoutExpired):
            program.communicate(timeout=5)  # to write them takes a moment
        for process in descendants(program.pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            out, err = program.communicate(timeout=10)
        except (
            subprocess.TimeoutExpired
        ) as error:  # a process that is no descendant any more writes to the same
            out, err = error.stdout, error.stderr
        pytest.fail(
            f"did not end within {timeout} s: {arguments}\n{out}\n{err}", pytrace=False
        )
    return subprocess.CompletedProcess(command, program.returncode, out, err)


def descendants(process: int) -> list[int]:
    """A process, its children, and theirs."""
    found = [process]
    for each in found:
        for file in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):  # it has just ended
                found += map(int, file.read_text().split())
    return found


def show_stacks(processes: list[int]) -> None:
    """Have processes that tests have started write the stacks of their threads to their standard errors."""
    for process in processes:
        with suppress(OSError):
            caught = (
                Path(f"/proc/{process}/status")
                .read_text()
                .partition("SigCgt:")[2]
                .split()[0]
            )
            if int(caught, 16) >> (signal.SIGUSR2 - 1) & 1:  # else it would end
                os.kill(process, signal.SIGUSR2)
                time.sleep(0.1)  # or what they write is mixed
