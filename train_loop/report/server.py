"""Serves the page on loopback, with new data as long as a run goes on: the server checks the files when the page asks.

A page that asks for data.json says what it has (its ETag). If no file has changed, the answer is 304 and nothing is
read. The server only answers this machine, and only under its own names, so that no web page can ask through a browser.
"""

import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from train_loop.errors import InputError, one_line
from train_loop.report.html_page import as_json, page
from train_loop.report.page_data import gather
from train_loop.report.run_reader import RunFiles

HOST = "127.0.0.1"


class Live:
    """The data of runs as they are now. It is gathered again only when a file has changed."""

    def __init__(self, runs: Sequence[RunFiles]) -> None:
        self.runs = runs
        self._lock = threading.Lock()
        self._stamp: Any = None
        self._data: dict[str, Any] = {}

    def tag(self) -> str:
        """A tag that changes with the files."""
        return f'"{hash(self._now()) & 0xFFFFFFFFFFFFFFFF:x}"'

    def _now(self) -> Any:
        return tuple(run.stamp() for run in self.runs)

    def data(self) -> dict[str, Any]:
        """What `gather` finds now."""
        with self._lock:
            now = self._now()
            if now != self._stamp:
                for run in self.runs:
                    run.refresh()
                self._data, self._stamp = gather(self.runs), now
            return self._data


def server(runs: Sequence[RunFiles], port: int) -> ThreadingHTTPServer:
    """A server for these runs' page at http://127.0.0.1:port/, not started yet. Port 0 takes any free port.

    Raises:
        InputError: if the port is not available.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--serve {port}: the port must be between 0 (any free one) and 65535")
    live = Live(runs)

    class Handler(_Handler):
        source = live

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise InputError(f"--serve {port}: {one_line(error)}; choose another port, or 0 for any free one") from None


def serve(runs: Sequence[RunFiles], port: int, ready: Callable[[str], None]) -> None:
    """Serve until the user interrupts. `ready` is called with the address.

    Raises:
        InputError: if the port is not available.
    """
    with server(runs, port) as serving:
        serving.daemon_threads = True
        ready(f"http://{HOST}:{serving.server_port}/")
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            pass


class _Handler(BaseHTTPRequestHandler):
    source: Live

    def do_GET(self) -> None:
        """Answer with the page, or with its data."""
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            return self._answer(403, "text/plain", "only 127.0.0.1 is served")
        if self.path == "/":
            return self._answer(200, "text/html", page(self.source.data(), live=True))
        if self.path == "/data.json":
            tag = self.source.tag()  # from before the files are read, so anything newer is asked for again
            if self.headers.get("If-None-Match") == tag:
                return self._answer(304, "application/json", "", tag)
            return self._answer(200, "application/json", as_json(self.source.data() | {"live": True}), tag)
        return self._answer(404, "text/plain", "only / and /data.json exist")

    def _answer(self, status: int, kind: str, text: str, tag: str | None = None) -> None:
        """Send a response; `kind` is its content type, `tag` its ETag."""
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        if tag is not None:
            self.send_header("ETag", tag)
        if status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the client has gone
            pass

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: a line every two seconds would be of no use."""
