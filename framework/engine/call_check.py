"""Compares the calls that all processes must make before they are made: where they differ is an error, and no hang."""

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

from ...strategies.launch.environment import detect_environment
from ...strategies.launch.failures import note_peers
from ...strategies.launch.peers import Peer, place_file
from ...strategies.launch.processes import has_ended, process_here
from ...strategies.launch.rendezvous import RENDEZVOUS
from ..data.batches import leaves

# A variable of the environment: how many seconds a call waits for the slowest process in debug mode.
DEBUG_TIMEOUT = "LOOPWRIGHT_DEBUG_TIMEOUT"

_ROOT = Path(__file__).absolute().parents[2]
_OWN_FOLDERS = tuple(
    os.path.join(_ROOT / name, "")
    for name in ("framework", "callbacks", "loggers", "strategies")
)
_TORCH = os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), "")

# A waiting process looks so often at those that have not come.
_LOOK_SECONDS = 0.5
# A process that stays at the same instruction for so long is taken to wait there.
_STANDING_SECONDS = 0.1
# When a process ends, it waits for so long until the threads that answer have ended.
_END_SECONDS = 1.0
# The thread that answers waits for so long for a question: poll(), under it, takes no more milliseconds.
_LONGEST_WAIT = timedelta(days=24)
# What is said of a process that has ended; errors of such alone mean that processes are lost, and are not to blame.
_ENDED = "has ended"


def of_group(timeout_seconds: float | None = None) -> CallCheck:
    """The check of torch's process group. All engines share it, as a process makes one sequence of calls.

    Args:
        timeout_seconds: how long a call waits for the slowest process from now on (default: as before; at first as
            long as the process group does).
    """
    global _current
    store = dist.distributed_c10d._get_default_store()
    if _current is None or _current.store is not store:
        if _current is not None:
            # Somebody else has destroyed the group of that check, without what is called before leaving.
            _current.end()
        _current = CallCheck(store)
    if timeout_seconds is not None:
        _current.timeout = timeout_seconds
    return _current


class CallCheck:
    """Tells the other processes, through torch's store, what this one is about to call, and reads what they call.

    That needs no collective, so it works where one would hang. A process waits for the others, unless one of them can
    no longer come: it calls something else, it has ended, or it waits in a collective that this one has not begun. The
    last of these it learns by asking: in each process a thread sleeps until a question comes, and answers where the
    process is.

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
        # The current call as the others read it, and its number: a call that is made again has another.
        self._post: dict[str, Any] = {}
        self._num_posts = 0
        # The last call on which all agreed, in words.
        self._last_call = ""
        # Keys of the last call, which all processes have read once they come to the next one.
        self._to_delete: list[str] = []
        self._process = os.getpid()
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._answer,
            args=(store.clone(), threading.get_ident()),
            name="loopwright-calls",
            daemon=True,
        )
        self._thread.start()
        self._write(f"process/{self.rank}", process_here())
        self._write(f"place/{self.rank}", place_file())
        RENDEZVOUS.before_leaving.append(self.end)
        # If the process group is not ours, its end does not call what is in before_leaving.
        atexit.register(self.end)

    def check(
        self,
        call: str,
        data: Any = None,
        sizes: bool = True,
        alone: bool = False,
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
        self._num_posts += 1
        self._post = {
            "call": words,
            "where": _users_line(sys._getframe()),
            "alone": alone,
            "collectives": _num_collectives(),
            "number": self._num_posts,
        }
        key = f"calls/{self.calls}/{self.rank}"
        count = f"calls/{self.calls}/{words}"
        agreed = f"calls/{self.calls}/agreed"
        self._write(key, self._post)
        if self.store.add(count, 1) == self.world_size:
            self.store.set(agreed, "")
        all_came = False
        try:
            all_came = self._wait(agreed)
        finally:
            if not all_came:
                # This call was not made. The store may be gone together with the processes.
                with suppress(dist.DistError):
                    self.store.add(count, -1)
                    # The key is not deleted, as another process may be about to read it.
                    self._write(key, None)
        if all_came:
            if self.calls == 0:
                self._note_peers()
            self.calls += 1
            self._last_call = _text(self._post)
            self._delete_old_keys()
            self._to_delete = [count, agreed]
        return all_came

    def _note_peers(self) -> None:
        """Remember the processes of this machine: when the store is gone, it can still be seen which have ended."""
        place = detect_environment()
        if place is None:
            return
        first = self.rank - place.local_rank
        ranks = range(first, first + place.local_world_size)
        peers = {
            rank: Peer(process, self._read(f"place/{rank}"))
            for rank in ranks
            if (process := self._read(f"process/{rank}"))
        }
        note_peers(peers)

    def _wait(self, agreed: str) -> bool:
        """Wait until all processes make the current call; returns whether they do, and not this one alone."""
        began = time.monotonic()
        look_at = began + _LOOK_SECONDS / 2
        pause = 1e-4
        while not self.store.check([agreed]):
            if time.monotonic() > look_at:
                ranks = range(self.world_size)
                posts = [self._read(f"calls/{self.calls}/{rank}") for rank in ranks]
                if self._is_alone(posts, agreed):
                    return False
                if time.monotonic() - began > self.timeout:
                    raise RuntimeError(self._missing(posts))
                # Many processes look less often, as all of them look at each other.
                look_at = time.monotonic() + max(_LOOK_SECONDS, self.world_size / 64)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def _is_alone(self, posts: list[Any], agreed: str) -> bool:
        """Whether nobody else comes to a call that this process can make alone.

        Args:
            posts: what each process has posted for the current call; None if it has not come.
            agreed: a key of the store that is there once all have come; who came last may have ended since.

        Raises:
            RuntimeError: if somebody does not come to a call that all must make.
        """
        error: Any = self._read(f"error/{self.rank}/{self._post['number']}")
        if error is None:
            strays = self._find_strays(posts)
            if not strays or self.store.check([agreed]):
                return False
            if self._post["alone"] and sum(map(self._is_current, posts)) == 1:
                return True
            error = self._share_error(posts, strays)
        text, lost = error
        # By the type, launchers see that this process has merely lost another and is not the one to blame.
        raise dist.DistError(text) if lost else RuntimeError(text)

    def _is_current(self, post: dict[str, Any] | None) -> bool:
        return post is not None and post["call"] == self._post["call"]

    def _find_strays(self, posts: list[Any]) -> dict[int, str]:
        """What those processes do that will not make the current call, by rank."""
        strays: dict[int, str] = {}
        for rank, post in enumerate(posts):
            if rank == self.rank:
                continue
            is_current = self._is_current(post)
            if post is not None and not (post["alone"] or is_current):
                strays[rank] = _text(post)
            elif (last_call := self._read(f"ended/{rank}")) is not None or has_ended(
                self._read(f"process/{rank}")
            ):
                last = f"; its last call was {last_call}" if last_call else ""
                strays[rank] = _ENDED + last
            elif not is_current:
                report = self._ask(rank)
                waits = report.get("waits") and report["calls"] == self.calls
                if waits and report["collectives"] > self._post["collectives"]:
                    strays[rank] = f"waits in another collective, at {report['where']}"
        return strays

    def _share_error(
        self,
        posts: list[Any],
        strays: dict[int, str],
    ) -> tuple[str, bool]:
        """Write an error for all processes that wait in a call; returns its text, and whether others merely ended."""
        lines = []
        for rank, post in enumerate(posts):
            doing = strays.get(rank, _text(post))
            lines.append(f"  rank {rank}: {doing}")
        lost = all(text.startswith(_ENDED) for text in strays.values())
        error = "the processes call different things:\n" + "\n".join(lines), lost
        for rank, post in enumerate(posts):
            if post is not None and not post["alone"]:
                self._write(f"error/{rank}/{post['number']}", error)
        return error

    def _missing(self, posts: list[Any]) -> str:
        rank = posts.index(None) if None in posts else 0
        before = self._read(f"calls/{self.calls - 1}/{rank}")
        last = f"its last call was {_text(before)}" if before else "it has made no call"
        call = self._post["call"].removesuffix("()")
        return (
            f"rank {self.rank} waits in {call} at {self._post['where']}, and rank {rank} has not come within "
            f"{self.timeout:g} s: {last}"
        )

    def _ask(self, rank: int) -> dict[str, Any]:
        """Ask a process where it is, and return its last answer without waiting for the next one."""
        report = self._read(f"report/{rank}") or {"question": 0}
        # The next question is asked only when the last one has been answered.
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
        # When the store is gone, there is nobody to answer.
        with suppress(Exception):
            while store.get(f"question/{self.rank}/{question}") != b"end":
                before = _position(thread)
                self._over.wait(_STANDING_SECONDS)
                now = _position(thread)
                report = {
                    **now,
                    "calls": self.calls,
                    "question": question,
                    "waits": now == before and now["may_wait"],
                }
                store.set(f"report/{self.rank}", json.dumps(report))
                question += 1
            store.set(f"closed/{self.rank}", "")

    def end(self) -> None:
        """This process makes no further call."""
        global _current
        # A forked process, such as a DataLoader's worker, has a copy of this object and must not end it.
        if self._over.is_set() or os.getpid() != self._process:
            return
        self._over.set()
        atexit.unregister(self.end)
        RENDEZVOUS.before_leaving.remove(self.end)
        # The main process may be the one that serves the store. So when it ends, it first ends the threads of all
        # processes that wait in the store. A thread that has ended shows that the store may be gone: then nothing is
        # written to it, as torch would complain at length.
        with suppress(Exception):
            if self._thread.is_alive():
                self._write(f"ended/{self.rank}", self._last_call)
                self._end_threads()
        self.store = None
        if _current is self:
            _current = None

    def _end_threads(self) -> None:
        ranks = range(self.world_size) if self.rank == 0 else [self.rank]
        for rank in ranks:
            self._send(rank, "end")
        closed = [f"closed/{rank}" for rank in ranks]
        deadline = time.monotonic() + _END_SECONDS
        while not self.store.check(closed) and time.monotonic() < deadline:
            time.sleep(1e-3)
        self._thread.join(timeout=_END_SECONDS)

    def _write(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _delete_old_keys(self) -> None:
        """Delete the keys of calls that all have left: as they have come to this call, they are done with those."""
        old = self._to_delete if self.rank == 0 else []
        for key in (*old, f"calls/{self.calls - 3}/{self.rank}"):
            self.store.delete_key(key)


_current: CallCheck | None = None


def _text(post: dict[str, Any] | None) -> str:
    return "has not come yet" if post is None else f"{post['call']} at {post['where']}"


def _describe(data: Any, sizes: bool) -> str:
    described = []
    for tensor in leaves(data):
        if isinstance(tensor, torch.Tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = list(tensor.shape) if sizes else f", {max(1, tensor.dim())}-d"
            described.append(f"{dtype}{shape}")
    return ", ".join(described)


def _num_collectives() -> int:
    """How many collectives this process has begun: as many in each, as long as all goes well."""
    world_size = dist.get_world_size()
    count = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        # Of groups that a program makes for some of its ranks, each rank may be in another number.
        if group.size() == world_size or group.group_desc.startswith("mesh_"):
            for device in group._device_types:
                backend = group._get_backend(device)
                count += getattr(backend, "_get_sequence_number_for_group")()  # noqa: B009 # torch does not declare it
    return count


def _position(thread: int) -> dict[str, Any]:
    """How far a thread has come, and where it is; ``may_wait`` tells whether it can be there to wait for others."""
    frame = sys._current_frames()[thread]
    # gloo also counts messages from one process to another, so its count does not show that a process waits in a
    # collective. There, the thread must also be in torch's code.
    in_torch = frame.f_code.co_filename.startswith(_TORCH)
    return {
        "collectives": _num_collectives(),
        "where": _users_line(frame),
        "step": frame.f_lasti,
        "may_wait": dist.get_backend() != "gloo" or in_torch,
    }


def _users_line(frame: FrameType) -> str:
    """File and line of the user's code from which the code of a frame was reached."""
    while frame.f_back is not None:
        file = os.path.abspath(frame.f_code.co_filename)
        is_ours = file.startswith((*_OWN_FOLDERS, _TORCH))
        if not is_ours and os.path.basename(file) != "contextlib.py":
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
