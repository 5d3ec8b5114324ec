"""A real local server that takes what is sent to a webhook."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Service(ThreadingHTTPServer):
    """A service that keeps what it is sent, and answers when it is let."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Takes)
        self.messages: list[dict[str, Any]] = []
        self.answers = threading.Event()
        self.answers.set()
        self.url = f"http://127.0.0.1:{self.server_port}/secret"


class Takes(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        service: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        service.messages.append(json.loads(body))
        service.answers.wait(30)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Service]:
    """A context in which it runs."""
    service = Service()
    thread = threading.Thread(target=service.serve_forever, args=[0.05])
    thread.start()
    try:
        yield service
    finally:
        service.answers.set()
        service.shutdown()
        thread.join()
        service.server_close()
