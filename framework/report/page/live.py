"""Serves the page of runs that go on, to this machine alone."""

from __future__ import annotations

import json
import sys
import threading
import time
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .document import content_of, document, read_runs
from .folders import files_of, find_runs
from .run import Run

ADDRESS = "127.0.0.1"
# The page asks this often, in seconds; or more seldom, so that reading takes at most a tenth of the time.
LEAST_WAIT = 2.0
READING_SHARE = 0.1


class LiveRuns:
    """The runs of some paths, read again when their files have changed.

    Args:
        paths: see :func:`~.folders.find_runs`; runs that begin later are found, too.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self._lock = threading.Lock()
        self._runs: list[Run] = []
        # Of the files that were read.
        self._version = ""
        self._seconds = 0.0

    def read(self) -> tuple[str, list[Run]]:
        """Return the runs, and what their files are like."""
        with self._lock:
            version = self._version_now()
            if version != self._version:
                began = time.monotonic()
                self._runs = read_runs(self.paths)
                self._seconds = time.monotonic() - began
                self._version = version
            return self._version, self._runs

    @property
    def wait(self) -> float:
        """For how many seconds the page is to wait."""
        return max(LEAST_WAIT, self._seconds / READING_SHARE)

    def _version_now(self) -> str:
        sizes = []
        for folder in find_runs(self.paths):
            for file in files_of(folder):
                status = file.stat()
                sizes.append(f"{status.st_size:x}.{status.st_mtime_ns:x}")
        # A run that falls silent changes its state, though not its files.
        return "-".join([*sizes[-200:], str(len(sizes)), str(int(time.time() // 60))])


class _Handler(BaseHTTPRequestHandler):
    """Answers two addresses: the page, and its values."""

    @property
    def live(self) -> LiveRuns:
        """The runs that are served."""
        assert isinstance(self.server, _Server)
        return self.server.live

    def do_GET(self) -> None:
        """Answer the browser."""
        # A page of another site could otherwise have its own name lead here, and read the values.
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if host not in (ADDRESS, "localhost"):
            return self._answer(403, "text/plain", "this server is for this machine")
        path = urlsplit(self.path)
        try:
            if path.path == "/":
                _, runs = self.live.read()
                return self._answer(200, "text/html", document(runs, live=True))
            if path.path == "/data.json":
                return self._answer_data(parse_qs(path.query).get("since", [""])[0])
        except (OSError, ValueError) as error:
            # A run's folder is being moved, say.
            return self._answer(503, "text/plain", str(error))
        return self._answer(404, "text/plain", "there is nothing of this name")

    def _answer_data(self, since: str) -> None:
        version, runs = self.live.read()
        if version == since:
            return self._answer(204, "application/json", "", version)
        text = json.dumps(content_of(runs), allow_nan=False)
        return self._answer(200, "application/json", text, version)

    def _answer(self, status: int, kind: str, text: str, version: str = "") -> None:
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Next", f"{self.live.wait:.1f}")
        if version:
            self.send_header("ETag", version)
        self.end_headers()
        try:
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            # The page was closed.
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""


class _Server(ThreadingHTTPServer):
    """Knows the runs that it serves."""

    daemon_threads = True

    def __init__(self, live: LiveRuns, port: int) -> None:
        self.live = live
        super().__init__((ADDRESS, port), _Handler)


def serve(paths: list[str], port: int = 0, open_browser: bool = False) -> int:
    """Serve the page until Ctrl-C.

    Args:
        paths: of runs.
        port: 0 stands for any that is free.
        open_browser: show it.

    Returns:
        The exit code, 0.
    """
    with _Server(LiveRuns(paths), port) as server:
        address = f"http://{ADDRESS}:{server.server_address[1]}/"
        names = ", ".join(str(Path(path)) for path in paths)
        print(f"{address} shows {names} until Ctrl-C", flush=True)
        if open_browser:
            webbrowser.open(address)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print("no longer served", file=sys.stderr)
    return 0
