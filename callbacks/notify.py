"""Tell a chat or another service by a webhook that a run has ended or failed."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from contextlib import suppress
from logging import getLogger
from platform import node
from tempfile import gettempdir
from threading import Thread
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

from .base import Callback

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")


class Notify(Callback):
    """Send a message to a webhook when a training has ended or failed.

    The message is a JSON object with ``text`` (Slack) and ``content`` (Discord), and for other services with ``event``
    (``"finished"``, ``"failed"``, ``"stopped"`` or ``"checkpoint"``), ``name``, ``host``, ``rank``, ``epoch``,
    ``global_step``, ``metrics`` and ``exception``. The main process sends it; if that has died, the first one on its
    machine that notices, where no launcher ends it before. The training neither waits for a checkpoint's message nor
    fails for one that is not taken; at its end, it waits for the answer, for as long as ``timeout`` says.

    Args:
        url: of the webhook.
        on_checkpoint: whether to send a message at each checkpoint, too.
        name: of the run in messages. Default: the program's.
        timeout: seconds that the service has to answer.
        headers: further ones of HTTP, such as for authorization.

    Raises:
        ValueError: if ``url`` is none of HTTP.
    """

    def __init__(
        self,
        url: str,
        on_checkpoint: bool = False,
        name: str | None = None,
        timeout: float = 5.0,
        headers: dict[str, str] | None = None,
    ) -> None:
        # Its path is a secret, which an error does not tell.
        is_http = isinstance(url, str) and url.startswith(("http://", "https://"))
        self._service = urlsplit(url).hostname if is_http else None
        if not self._service:
            raise ValueError(
                "url must be that of a webhook, such as 'https://…'; got "
                + ("another text" if isinstance(url, str) else repr(url))
            )
        self.url = url
        self.on_checkpoint = on_checkpoint
        self.name = name or os.path.basename(sys.argv[0])
        self.timeout = timeout
        self.headers = headers or {}
        # By rank, where the processes of this run are.
        self._processes: list[tuple[str, int]] = []
        # A file that there is once one of them has told of a failure: the others then fail for want of it.
        self._told = ""

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._processes = trainer.strategy.gather_objects((node(), os.getpid()))
        name = f"loopwright-told-{trainer.strategy.broadcast(uuid4().hex)}"
        # A launcher removes what is in its own folder; each process has one there.
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        folder = os.path.dirname(os.path.dirname(error_file)) if error_file else ""
        self._told = os.path.join(folder or gettempdir(), name)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]
    ) -> None:
        if self.on_checkpoint and trainer.is_global_zero:
            self._send(trainer, "checkpoint", "saves a checkpoint")

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            self._wait(self._send(trainer, "finished", "has ended"))

    def on_exception(
        self, trainer: Trainer, pl_module: Module, exception: BaseException
    ) -> None:
        # Whoever presses Ctrl-C twice does not wait.
        if trainer.must_end_at_once:
            return
        what = f"{type(exception).__name__}: {exception}"
        event = "failed"
        text = f"has failed: {what}"
        if not isinstance(exception, Exception):
            event = "stopped"
            text = f"was stopped ({what})"
        # When a process has died, whoever has started them all ends the others as well, within a moment.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            if self._speaks(trainer.global_rank):
                self._wait(self._send(trainer, event, text, exception=what))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _speaks(self, rank: int) -> bool:
        """Whether all processes before this one are on its machine and have died."""
        before = self._processes[:rank]
        if any(host != node() for host, _ in before):
            return False
        # A process that dies closes its connections a moment before.
        deadline = monotonic() + 1
        while any(_is_alive(pid) for _, pid in before):
            if monotonic() > deadline:
                return False
            sleep(0.02)
        if len(self._processes) == 1:
            return True
        try:
            open(self._told, "x").close()
        except FileExistsError:
            return False
        return True

    def _send(self, trainer: Trainer, event: str, text: str, **details: Any) -> Thread:
        metrics = {}
        # A device that has failed may give none.
        with suppress(Exception):
            for name, value in trainer.callback_metrics.items():
                number = float(value)
                metrics[name] = number if math.isfinite(number) else str(number)
        step = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        text = f"{self.name} on {node()} {text} ({step})"
        message = {
            "text": text,
            # Discord takes so many characters.
            "content": text[:2000],
            "event": event,
            "name": self.name,
            "host": node(),
            "rank": trainer.global_rank,
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "metrics": metrics,
            **details,
        }
        headers = {"Content-Type": "application/json", "User-Agent": "loopwright"}
        body = json.dumps(message).encode()
        request = Request(self.url, body, {**headers, **self.headers})
        thread = Thread(target=self._post, args=[request], daemon=True)
        thread.start()
        return thread

    def _post(self, request: Request) -> None:
        try:
            urlopen(request, timeout=self.timeout).close()
        except Exception as error:
            log.warning("Notify: %s has not taken a message: %s", self._service, error)

    def _wait(self, thread: Thread) -> None:
        # A service may also answer slowly, bit by bit.
        thread.join(self.timeout)
        if thread.is_alive():
            log.warning("Notify: %s has not answered yet", self._service)


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that has been killed is a zombie until its parent asks for it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
