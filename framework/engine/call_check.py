"""Calls that all processes must make are compared before they are made: one that makes another is told, none hangs."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ...strategies.launch.failures import has_ended, process_here
from ...strategies.launch.rendezvous import BEFORE_LEAVING
from ..data.batches import leaves

DEBUG_TIMEOUT = "LOOPWRIGHT_DEBUG_TIMEOUT"  # seconds
_ROOT = Path(__file__).absolute().parents[2]
_OWN_FOLDERS = tuple(
    os.path.join(_ROOT / name, "")
    for name in ("framework", "callbacks", "loggers", "strategies")
)
_TORCH = os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), "")
_LOOK_SECONDS = 0.5  # between two looks at processes that have not come
_STANDS_SECONDS = 0.1  # after which a process that is at the same place waits there
_END_SECONDS = 1.0  # that a process waits at its end for these threads
_LONGEST_WAIT = timedelta(
    days=24
)  # for a question, in the thread that answers: poll() takes no more milliseconds


def of_group() -> CallCheck:
    """The check of torch's process group. All engines share it, as a process makes one sequence of calls."""
    global _current
    store = dist.distributed_c10d._get_default_store()
    if _current is None or _current.store is not store:
        if _current is not None:  # its group was destroyed by somebody else
            _current.end()
        _current = CallCheck(store)
    return _current


class CallCheck:
    """Tells the other processes, through the store in which they met, what this one is about to call.

    That needs no collective, so it works where one would hang. A process that does not come is waited for, unless it
    can come no more: it calls something else, it has ended, or it waits in a collective that this one has not begun.
    The last is told by a thread of that process, which sleeps until somebody asks.

    Args:
        store: that of torch's process group.

    Attributes:
        calls: how many calls all processes have agreed on.
        timeout: how long a call waits for the slowest process, in seconds.
    """

    def __init__(self, store: Any) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.store: Any = store
        self.timeout = store.timeout.total_seconds()
        self.calls = 0
        self._last = ""
        self._to_forget: list[str] = []
        self._posts = 0
        self._process = os.getpid()
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._answer,
            args=(store.clone(), threading.get_ident()),
            name="loopwright-calls",
            daemon=True,
        )
        self._thread.start()
        self._tell(f"process/{self.rank}", process_here())
        BEFORE_LEAVING.append(self.end)
        atexit.register(self.end)  # of a group that is not ours

    def check(
        self, call: str, data: Any = None, sizes: bool = True, alone: bool = False
    ) -> bool:
        """Compare this call with those of the other processes, and wait until all of them have come.

        Args:
            call: its name.
            data: tensors that it takes.
            sizes: whether their shapes must be alike; their types must in any case.
            alone: whether this process can also make it alone.

        Returns:
            Whether all processes make it; False only if ``alone``.

        Raises:
            RuntimeError: if another process calls something else, with other tensors, or does not come in time;
                each rank's file and line are named.
        """
        words = f"{call}({_describe(data, sizes)})"
        where = _place(sys._getframe())
        number = self.calls
        self._posts += 1
        mine = {
            "call": words, "where": where, "alone": alone, "collectives": _collectives(), "post": self._posts
        }  # fmt: skip
        together = f"calls/{number}/{words}"
        self._tell(f"calls/{number}/{self.rank}", mine)
        if self.store.add(together, 1) == self.world_size:
            self.store.set(f"calls/{number}/agreed", "")
        all_came = False
        try:
            all_came = self._wait(number, mine)
        finally:
            if not all_came:
                with suppress(dist.DistError):  # such as that the store is gone
                    self.store.add(together, -1)
                    self._tell(
                        f"calls/{number}/{self.rank}", None
                    )  # not deleted: another may be about to get it
        if not all_came:
            return False
        self.calls += 1
        self._last = f"{words} at {where}"
        self._forget()
        self._to_forget = [together, f"calls/{number}/agreed"]
        return True

    def _wait(self, number: int, mine: dict[str, Any]) -> bool:
        """Wait until all have made a call; returns whether they have."""
        began = time.monotonic()
        look_at = began + _LOOK_SECONDS / 2
        pause = 1e-4
        while not self.store.check([f"calls/{number}/agreed"]):
            now = time.monotonic()
            if now > look_at:
                if (
                    error := self._read(f"error/{self.rank}/{mine['post']}")
                ) is not None:
                    raise _mismatch(*error)
                posts = {
                    rank: self._read(f"calls/{number}/{rank}")
                    for rank in range(self.world_size)
                }
                strays = self._strays(number, mine, posts)
                came = [
                    rank
                    for rank, post in posts.items()
                    if post is not None and post["call"] == mine["call"]
                ]
                if strays and mine["alone"] and came == [self.rank]:
                    return False
                if strays:
                    raise _mismatch(*self._share_error(mine, posts, strays))
                if now - began > self.timeout:
                    raise RuntimeError(self._missing(number, mine, posts))
                # Many processes look less often, as all of them look at each other.
                look_at = time.monotonic() + max(_LOOK_SECONDS, self.world_size / 64)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def _strays(
        self, number: int, mine: dict[str, Any], posts: dict[int, Any]
    ) -> dict[int, str]:
        """What the processes do that will not make this call, by rank."""
        found: dict[int, str] = {}
        for rank, post in posts.items():
            if rank == self.rank:
                continue
            if post is not None and not post["alone"]:
                if post["call"] != mine["call"]:
                    found[rank] = f"{post['call']} at {post['where']}"
            elif (last := self._read(f"ended/{rank}")) is not None or has_ended(
                self._read(f"process/{rank}")
            ):
                found[rank] = (
                    f"has ended; its last call was {last}" if last else "has ended"
                )
            elif post is None or post["call"] != mine["call"]:
                report = self._ask(rank)
                if (
                    report.get("waits")
                    and report["calls"] == number
                    and report["collectives"] > mine["collectives"]
                ):
                    found[rank] = f"waits in another collective, at {report['where']}"
        return found

    def _share_error(
        self, mine: dict[str, Any], posts: dict[int, Any], strays: dict[int, str]
    ) -> tuple[str, bool]:
        """Tell all that wait in a call what is wrong; returns that, and whether processes have merely been lost."""
        lines = []
        for rank, post in posts.items():
            came = (
                "has not come yet"
                if post is None
                else f"{post['call']} at {post['where']}"
            )
            own = f"{mine['call']} at {mine['where']}"
            lines.append(
                f"  rank {rank}: {own if rank == self.rank else strays.get(rank, came)}"
            )
        lost = all(words.startswith("has ended") for words in strays.values())
        error = "the processes call different things:\n" + "\n".join(lines), lost
        for rank, post in posts.items():
            if post is not None and not post["alone"]:
                self._tell(f"error/{rank}/{post['post']}", error)
        return error

    def _missing(self, number: int, mine: dict[str, Any], posts: dict[int, Any]) -> str:
        rank = next((rank for rank, post in posts.items() if post is None), 0)
        before = self._read(f"calls/{number - 1}/{rank}")
        last = (
            "it has made no call"
            if before is None
            else f"its last call was {before['call']} at {before['where']}"
        )
        return (
            f"rank {self.rank} waits in {mine['call'].removesuffix('()')} at {mine['where']}, and rank {rank} has not "
            f"come within {self.timeout:g} s: {last}"
        )

    def _ask(self, rank: int) -> dict[str, Any]:
        """Ask a process where it is; returns what it has answered so far."""
        report = self._read(f"report/{rank}") or {"question": 0}
        if self.store.add(f"questions/{rank}", 0) == report["question"]:
            self._send(rank, "where")
        return report

    def _send(self, rank: int, question: str) -> None:
        number = self.store.add(f"questions/{rank}", 1)
        self.store.set(f"question/{rank}/{number}", question)

    def _answer(self, store: Any, thread: int) -> None:
        """In a thread: sleep until another process asks where this one is, and tell it."""
        store.set_timeout(_LONGEST_WAIT)
        question = 1
        with suppress(
            Exception
        ):  # such as that the store is gone: there is nobody to answer
            while store.get(f"question/{self.rank}/{question}") != b"end":
                before = _standing(thread)
                self._over.wait(_STANDS_SECONDS)
                now = _standing(thread)
                report = {
                    **now,
                    "calls": self.calls,
                    "question": question,
                    "waits": now == before and now["inside"],
                }
                store.set(f"report/{self.rank}", json.dumps(report))
                question += 1
            store.set(f"closed/{self.rank}", "")

    def end(self) -> None:
        """This process makes no further call."""
        global _current
        if (
            self._over.is_set() or os.getpid() != self._process
        ):  # a fork of it is another
            return
        self._over.set()
        atexit.unregister(self.end)
        BEFORE_LEAVING.remove(self.end)
        # The main process may hold the store. So when it ends, it ends the threads that wait in it, of all processes;
        # and to a store that may be gone, nothing is told: torch would complain at length.
        with suppress(Exception):
            if self._thread.is_alive():
                self._tell(f"ended/{self.rank}", self._last)
                ranks = range(self.world_size) if self.rank == 0 else [self.rank]
                for rank in ranks:
                    self._send(rank, "end")
                deadline = time.monotonic() + _END_SECONDS
                while (
                    not self.store.check([f"closed/{rank}" for rank in ranks])
                    and time.monotonic() < deadline
                ):
                    time.sleep(1e-3)
                self._thread.join(timeout=_END_SECONDS)
        self.store = None
        if _current is self:
            _current = None

    def _tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _forget(self) -> None:
        """Delete what all have read: as they have come to this call, they have gone on from the one before."""
        old = self._to_forget if self.rank == 0 else []
        for key in (*old, f"calls/{self.calls - 3}/{self.rank}"):
            self.store.delete_key(key)


_current: CallCheck | None = None


def _mismatch(text: str, lost: bool) -> RuntimeError:
    # One that merely lost another process is not the first to blame, as launchers see by the type.
    return dist.DistError(text) if lost else RuntimeError(text)


def _describe(data: Any, sizes: bool) -> str:
    described = []
    for tensor in leaves(data):
        if isinstance(tensor, torch.Tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            described.append(
                f"{dtype}{list(tensor.shape)}"
                if sizes
                else f"{dtype}, {max(1, tensor.dim())}-d"
            )
    return ", ".join(described)


def _collectives() -> int:
    """How many collectives this process has begun: as many in each, as long as all goes well."""
    world_size = dist.get_world_size()
    return sum(
        getattr(group._get_backend(device), "_get_sequence_number_for_group")()  # noqa: B009 # torch does not declare it
        for group in list(dist.distributed_c10d._world.pg_map)
        if group.size() == world_size
        or group.group_desc.startswith("mesh_")  # others need not be symmetrical
        for device in group._device_types
    )


def _standing(thread: int) -> dict[str, Any]:
    """How far a thread has come, and where it is; ``inside`` tells whether it can be there to wait for others."""
    frame = sys._current_frames()[thread]
    # gloo counts messages from one process to another, too: there, it must also be in torch's code.
    inside = dist.get_backend() != "gloo" or frame.f_code.co_filename.startswith(_TORCH)
    return {
        "collectives": _collectives(),
        "where": _place(frame),
        "step": frame.f_lasti,
        "inside": inside,
    }


def _place(frame: FrameType) -> str:
    """File and line of the user's code in which a frame was called."""
    while frame.f_back is not None:
        file = os.path.abspath(frame.f_code.co_filename)
        if (
            not file.startswith((*_OWN_FOLDERS, _TORCH))
            and os.path.basename(file) != "contextlib.py"
        ):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
