"""Serves the page on loopback, with new data as long as a run goes on: the server checks the files when the page asks.

A page that asks for data.json says what it has (its ETag). If no file has changed, the answer is 304 and nothing is
read. The server only answers this machine, and only under its own names, so that no web page can ask through a browser.
"""

import re
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

from train_loop.console import say
from train_loop.errors import InputError, one_line
from train_loop.report.html_page import as_json, page
from train_loop.report.page_data import gather
from train_loop.report.run_reader import RunFiles

HOST = "127.0.0.1"
# Who asks under another name may be a stranger's web page, whose name was made to lead here (DNS rebinding). The port
# may be another one, that of a tunnel.
_OWN_NAME = re.compile(r"(localhost\.?|127\.0\.0\.1|\[::1\])(:\d*)?", re.IGNORECASE)
MOST_CONNECTIONS = 64  # a client that says nothing holds one of them
_IDLE_SECONDS = 10  # before a client has asked
_SLOW_SECONDS = 300  # for an answer to arrive, such as through a slow tunnel


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


class _Server(ThreadingHTTPServer):
    """A thread for each connection. If there are too many, the oldest ends; no client's mistake is shown."""

    daemon_threads = True
    request_queue_size = 2 * MOST_CONNECTIONS  # or a burst of connections waits for seconds

    def __init__(self, port: int, source: Live) -> None:
        self._open: deque[socket.socket] = deque()
        super().__init__((HOST, port), type("Handler", (_Handler,), {"source": source}))

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a client on a thread of its own."""
        self._open.append(request)
        if len(self._open) > MOST_CONNECTIONS:
            with suppress(OSError, IndexError):  # their threads may be closing them
                self._open.popleft().shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with suppress(ValueError):
            self._open.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, unless the client just went away."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):
            say(f"report: {type(error).__name__}: {one_line(error)}")


def server(runs: Sequence[RunFiles], port: int) -> ThreadingHTTPServer:
    """A server for these runs' page at http://127.0.0.1:port/, not started yet. Port 0 takes any free port.

    Raises InputError if the port is not available.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--serve {port}: the port must be between 0 (any free one) and 65535")
    try:
        return _Server(port, Live(runs))
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"--serve {port}: {reason}; choose another port, or 0 for any free one") from None


def serve(runs: Sequence[RunFiles], port: int, ready: Callable[[str], None]) -> None:
    """Serve, as `server` does, until the user interrupts or ends it. `ready` is called with the address."""
    with server(runs, port) as serving, _ended_by_signals():
        ready(f"http://{HOST}:{serving.server_port}/")
        serving.serve_forever()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A context that SIGTERM and SIGHUP (unless they are ignored) and an interrupt end quietly."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Handler(BaseHTTPRequestHandler):
    source: Live
    timeout = _IDLE_SECONDS
    server_version = "train-loop"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer with the page, or with its data."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1 or (not hosts and self.request_version == "HTTP/1.1"):
            return self._answer(400, "text/plain", "exactly one Host is needed")
        if hosts and _OWN_NAME.fullmatch(hosts[0].strip()) is None:
            return self._answer(403, "text/plain", "only 127.0.0.1 is served")
        path = self.path.partition("?")[0]
        if path == "/":
            return self._answer(200, "text/html", page(self.source.data(), live=True))
        if path == "/data.json":
            tag = self.source.tag()  # from before the files are read, so anything newer is asked for again
            if self.headers.get("If-None-Match") == tag:
                return self._answer(304, "application/json", "", tag)
            return self._answer(200, "application/json", as_json(self.source.data() | {"live": True}), tag)
        return self._answer(404, "text/plain", "only / and /data.json exist")

    do_HEAD = do_GET

    def _no_such_method(self) -> None:
        self._answer(405, "text/plain", "only GET and HEAD work here")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _no_such_method

    def _answer(self, status: int, kind: str, text: str, tag: str | None = None) -> None:
        """Send a response; `kind` is its content type, `tag` its ETag."""
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status == 405:
            self.send_header("Allow", "GET, HEAD")
        if tag is not None:
            self.send_header("ETag", tag)
        if status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.connection.settimeout(_SLOW_SECONDS)
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: a line every two seconds would be of no use."""
