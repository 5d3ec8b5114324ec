"""Ranks that are forked from this process, which has imported everything, so that starting them takes little time."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

SECONDS = 60  # after which a process that should have ended is taken for one that hangs


def fork_ranks(ranks: int, folder: Path, work: Callable[[], None]) -> list[int]:
    """Run `work` in so many processes that find each other by their environment.

    Args:
        ranks: how many.
        folder: for what they print, in `rank-0.txt`, ….
        work: what each of them does; an exception ends it with 1.

    Returns:
        Their process ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        if process := os.fork():
            processes.append(process)
            continue
        code = 1
        try:
            into = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            output = os.open(folder / f"rank-{rank}.txt", into)
            os.dup2(output, 1)
            os.dup2(output, 2)
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(number) for name, number in place.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return processes


def wait(processes: Sequence[int], seconds: float = SECONDS) -> list[int]:
    """The exit statuses; what hangs is killed, and raises."""
    until = time.monotonic() + seconds
    found: dict[int, int] = {}
    while len(found) < len(processes):
        for process in set(processes) - found.keys():
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                found[process] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for process in set(processes) - found.keys():
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            raise RuntimeError(f"a process has not ended after {seconds:g} s")
        time.sleep(0.002)
    return [found[process] for process in processes]
