"""Hands rows to a service from a thread of its own, so that a slow or failing one costs the training nothing."""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections import deque
from itertools import islice
from logging import getLogger
from time import monotonic
from typing import TYPE_CHECKING, Any

from .files import exists, read_text, write_text
from .journal import Journal, Row

if TYPE_CHECKING:
    from .service import ServiceLogger

log = getLogger("loopwright")

SEND_INTERVAL_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0
# How long the end of a run, or of the program, waits for what is still to be sent, and for a service that fails.
FINISH_SECONDS = 30.0
FAILING_SECONDS = 5.0
# How long a run's beginning waits for the service.
OPEN_SECONDS = 20.0


Entry = tuple[Row | None, Any]
"""A row; or None, and a value that no file can hold."""


class Sender:
    """Keeps rows in a file, and sends each as soon as the service takes it.

    A row is in the file before it is sent, at the latest when a checkpoint is saved. While the service fails, rows wait
    there, and are sent when it is there again, or by the run or program that next goes on in that folder.

    Args:
        service: to which.
        name: of the logger, for messages.
    """

    def __init__(self, service: ServiceLogger, name: str) -> None:
        self._service = service
        self._name = name
        # What was logged and is not in the file yet, and what is, but was not sent.
        self._incoming: deque[Entry] = deque()
        self._unsent: deque[Entry] = deque()
        self._journal: Journal | None = None
        self._dropped: list[Row] = []
        self._num_sent = 0
        self._is_open = False
        self._failing: Exception | None = None
        self._num_failures = 0
        # What was said of rows that are refused, and of how many are not sent.
        self._refused: set[str] = set()
        self._num_said = 0
        # Until when the service may take to open, on the monotonic clock.
        self._open_by = 0.0
        self._is_finishing = False
        self._thread: threading.Thread | None = None
        self._writing = threading.RLock()
        self._changed = threading.Condition()
        self._wake = threading.Event()

    @property
    def failing(self) -> Exception | None:
        """Why the service was not reached the last time; None if it was."""
        return self._failing

    @property
    def num_rows(self) -> int:
        """Rows in the file."""
        return 0 if self._journal is None else self._journal.num_rows

    def put(self, row: Row | None, value: Any = None) -> None:
        """Take a row; or a value that no file can hold, which is sent, but not kept."""
        self._incoming.append((row, value))
        self.start()

    def start(self) -> None:
        """Begin to send, if that is not so yet."""
        with self._writing:
            if self._thread is not None:
                return
            self._thread = threading.Thread(
                target=self._work, name=self._name, daemon=True
            )
            self._is_finishing = False
            self._thread.start()
            self._end_with_program()

    def go_on(self, folder: str, num_rows: int | None = None) -> None:
        """Take up the file of a folder, with its first rows or with all."""
        with self._writing:
            self._journal = Journal(os.path.join(folder, "rows.jsonl"))
            self._dropped = self._journal.rewind(num_rows)
            state = os.path.join(folder, "sent.json")
            if exists(state):
                self._num_sent = json.loads(read_text(state))["sent"]

    @property
    def last_step(self) -> int:
        """The highest step in the file, or -1."""
        rows = [] if self._journal is None else self._journal.read()
        return max(
            (row["step"] for row in rows if row.get("step") is not None), default=-1
        )

    def forget_unsent(self, num_rows: int) -> None:
        """Go back to so many rows of the file, and open the service again before anything else is sent."""
        self.write()
        with self._writing:
            self._unsent.clear()
            self._is_open = False
        self.go_on(self._service.folder(), num_rows)

    def write(self) -> None:
        """Put what was logged into the file."""
        with self._writing:
            if not self._incoming:
                return
            if self._journal is None:
                self.go_on(self._service.folder())
            assert self._journal is not None
            taken = [self._incoming[i] for i in range(len(self._incoming))]
            self._journal.append([row for row, _ in taken if row is not None])
            # Each row is in one of the two at any moment, as those who wait look at both without the lock.
            self._unsent.extend(taken)
            for _ in taken:
                self._incoming.popleft()

    def wait(self, seconds: float, opened: bool = False, again: bool = False) -> bool:
        """Wait until all is sent; returns whether it is.

        Args:
            seconds: at most so long, and no longer than until the service fails.
            opened: wait only until the service is open.
            again: let a service that fails be tried once more.
        """

        def is_done() -> bool:
            return self._is_open and (opened or not (self._unsent or self._incoming))

        if is_done() or threading.current_thread() is self._thread:
            return True
        self.start()
        if not self._is_open and not again:
            # All who wait for the service to open wait so long together.
            self._open_by = self._open_by or monotonic() + OPEN_SECONDS
            seconds = min(seconds, max(self._open_by - monotonic(), 0))
        failures = self._num_failures
        self._wake.set()
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    is_done()
                    or (self._failing and not again)
                    or self._num_failures > failures
                ),
                seconds,
            )
        return is_done()

    def finish(self) -> None:
        """Wait for what is still to be sent, and say where it is if the service does not take it."""
        if self._thread is None:
            return
        self._is_finishing = True
        # A service that was waited for in vain is not waited for so long again.
        is_lost = self._failing is not None or self._num_said
        if self.wait(FAILING_SECONDS if is_lost else FINISH_SECONDS, again=True):
            self._num_said = 0
            return
        self.write()
        if len(self._unsent) == self._num_said:
            return
        self._num_said = len(self._unsent)
        where = "memory" if self._journal is None else self._journal.path
        log.warning(
            "%s: %d rows are not sent (%s). They are in %s, and are sent by a resumed run, or by send_rows(folder)",
            self._name,
            len(self._unsent),
            self._failing or "the service is slow",
            where,
        )

    def _end_with_program(self) -> None:
        # Before what the service's library itself does then: what is registered last comes first.
        atexit.unregister(self._end)
        atexit.register(self._end)

    def _end(self) -> None:
        # At the program's end: there may be rows of a run that nobody has finished.
        if len(self._unsent) + len(self._incoming) != self._num_said:
            self.finish()
        if self._is_open:
            self._service.close()

    def _work(self) -> None:
        pause = SEND_INTERVAL_SECONDS
        while True:
            try:
                self._send_all()
            except Exception as error:
                self._note_failure(error)
                pause = min(2 * pause, MAX_RETRY_SECONDS)
            else:
                self._note_success()
                pause = SEND_INTERVAL_SECONDS
            with self._changed:
                self._changed.notify_all()
            if self._is_finishing and self._is_idle():
                return
            self._wake.wait(pause)
            self._wake.clear()

    def _is_idle(self) -> bool:
        """Whether nothing is left to do; if so, the thread ends, and what comes later begins another one."""
        with self._writing:
            if self._unsent or self._incoming:
                return False
            self._thread = None
            return True

    def _send_all(self) -> None:
        if not self._is_open:
            self._open()
        self.write()
        sent = self._num_sent
        try:
            while self._unsent:
                with self._writing:
                    entries = list(islice(self._unsent, self._service.rows_at_once))
                self._send(entries)
                for _ in entries:
                    self._unsent.popleft()
        finally:
            if self._num_sent != sent:
                self._note_sent()

    def _send(self, entries: list[Entry]) -> None:
        try:
            self._service.send(entries)
        except Exception as error:
            if not self._service.is_refused(error):
                raise
            if len(entries) > 1:
                for entry in entries:
                    self._send([entry])
                return
            self._note_refused(entries[0][0], error)
        self._num_sent += sum(row is not None for row, _ in entries)

    def _open(self) -> None:
        self._service.open()
        with self._writing:
            if self._journal is None:
                self.go_on(self._service.folder())
            assert self._journal is not None
            waiting = len([row for row, _ in self._unsent if row is not None])
            earlier = self._journal.read()[: self._journal.num_rows - waiting]
            lacking = self._service.recall(earlier, self._num_sent, self._dropped)
            again = [(row, None) for row in lacking]
            # What is sent again counts again.
            self._num_sent = len(earlier) - len(again)
            self._unsent.extendleft(reversed(again))
            self._dropped = []
        self._is_open = True
        self._end_with_program()

    def _note_sent(self) -> None:
        assert self._journal is not None
        state = json.dumps({"sent": self._num_sent})
        write_text(
            os.path.join(os.path.dirname(self._journal.path), "sent.json"), state
        )

    def _note_failure(self, error: Exception) -> None:
        if self._failing is None:
            log.warning(
                "%s cannot reach its service (%s: %s). Rows are kept in a file and sent later; training goes on",
                self._name,
                type(error).__name__,
                error,
            )
        self._failing = error
        self._num_failures += 1
        try:
            self.write()
        except OSError as unwritten:
            log.warning("%s cannot keep its rows: %s", self._name, unwritten)

    def _note_success(self) -> None:
        if self._failing is not None:
            self._failing = None
            log.warning("%s reaches its service again: all rows are sent", self._name)

    def _note_refused(self, row: Row | None, error: Exception) -> None:
        kind = "value" if row is None else row["kind"]
        if kind not in self._refused:
            self._refused.add(kind)
            log.warning(
                "%s: the service does not take a row (%s, step %s), which is left out: %s",
                self._name,
                kind,
                None if row is None else row.get("step"),
                error,
            )
