"""A web page that renders a model while you move the camera. It is served to this machine only."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from sitdist.errors import ConfigError, as_told, one_line, save_traceback, shortened, shown
from sitdist.inference.flow import Flow
from sitdist.io.video import to_images

HOST = "127.0.0.1"
LOCAL = re.compile(
    r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE | re.ASCII
)  # what a request may call us
CONNECTIONS = 32  # at once
SECONDS = 5.0  # within which a request has to have come, and an answer to have been taken
LONGEST = 2048  # characters of a path with its query
TEXT, PNG, HTML = "text/plain; charset=utf-8", "image/png", "text/html; charset=utf-8"
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def make_server(flow: Flow, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1, not yet serving; ConfigError where the port cannot be had.

    `/` is the page, `/picture?azimuth=30&elevation=20&radius=4&label=0` (degrees and the dataset's units) a PNG. Asked
    by a page of another site, or by another name than this machine's, it refuses.
    """
    why_not = flow.run.config.flow.why_no_picture()
    if why_not:
        raise ConfigError(f"{flow.run.manifest.name}: renders no pictures: {why_not}")
    try:
        return _Server(flow, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--port {port}: cannot be used ({reason}); give another, or 0 for a free one") from None


class _Server(ThreadingHTTPServer):
    """At most CONNECTIONS at once, whose requests come within SECONDS; pictures are rendered one by one."""

    request_queue_size = 256

    def __init__(self, flow: Flow, port: int) -> None:
        self.flow, self.page, self.rendering = flow, _page(flow), threading.Lock()
        self.policy = _policy(self.page)
        self.until: dict[socket.socket, float] = {}  # when requests that are on their way have to be here
        self._free = threading.Semaphore(CONNECTIONS)
        super().__init__((HOST, port), _Handler)

    def service_actions(self) -> None:
        """Twice a second: end connections whose request does not come."""
        for connection, until in list(self.until.items()):
            if time.monotonic() > until:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self._refuse(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def _refuse(self, request: socket.socket) -> None:
        answer = "HTTP/1.0 503 Service Unavailable\r\nRetry-After: 5\r\n\r\ntoo many connections; try again\n"
        with suppress(OSError):
            request.setblocking(False)
            request.sendall(answer.encode())
            request.recv(LONGEST)  # what is left unread would take the answer back
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.until.pop(request, None)
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line, and none for a connection that the other side has ended."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            _tell(error)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: _Server
    timeout = SECONDS

    def version_string(self) -> str:
        return "sitdist"

    def setup(self) -> None:
        self.server.until[self.request] = time.monotonic() + SECONDS
        super().setup()

    def parse_request(self) -> bool:
        whole = super().parse_request()
        self.server.until.pop(self.request, None)
        return whole

    def do_GET(self) -> None:
        status, kind, body = self._found()
        self._answer(status, kind, body)

    do_HEAD = do_GET  # _answer leaves the body out

    def _found(self) -> tuple[HTTPStatus, str, bytes]:
        if not self._is_ours():
            return HTTPStatus.FORBIDDEN, TEXT, b"asked by another page, or by another name than this machine's\n"
        if len(self.path) > LONGEST:
            return HTTPStatus.REQUEST_URI_TOO_LONG, TEXT, b"a longer query than any camera has\n"
        try:
            url = urlsplit(self.path)
            if url.path == "/":
                return HTTPStatus.OK, HTML, self.server.page.encode()
            if url.path != "/picture":
                return HTTPStatus.NOT_FOUND, TEXT, b"no such page\n"
            query = parse_qs(url.query, keep_blank_values=True, max_num_fields=8)
        except ValueError as error:
            return HTTPStatus.BAD_REQUEST, TEXT, f"no such camera: {error}\n".encode()
        try:
            with self.server.rendering:
                return HTTPStatus.OK, PNG, picture(self.server.flow, query)
        except Exception as error:  # the next request is answered again
            told = as_told(error)
            if told is None:
                _tell(error)
                return (
                    HTTPStatus.INTERNAL_SERVER_ERROR,
                    TEXT,
                    b"an error; where the server was started, a line says more\n",
                )
            return HTTPStatus.BAD_REQUEST, TEXT, f"{one_line(str(told))}\n".encode()

    def _is_ours(self) -> bool:
        """Whether the request names this machine, and is not made by a page of another site or port."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not LOCAL.fullmatch(hosts[0]):
            return False
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        return origin in (None, f"http://{hosts[0]}") and site in ("none", "same-origin")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: a request that it cannot read, or another method."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self.close_connection = True
        self._answer(status, TEXT, f"{status.phrase.lower()}\n".encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.request_version = self.protocol_version  # never without headers, as HTTP/0.9 would have it
        self.send_response(status)
        headers = HEADERS | {"Content-Security-Policy": self.server.policy, "Content-Type": kind}
        for name, value in (headers | {"Allow": "GET, HEAD", "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a moved camera asks for many pictures."""


def _tell(error: BaseException) -> None:
    line = f"sitdist: view: {type(error).__name__}: {shortened(str(error))}; see {save_traceback(error)}"
    print(one_line(line), file=sys.stderr, flush=True)


def _policy(page: str) -> str:
    """The content security policy of a page: its own script and style, pictures and answers of this server, no more."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src blob: data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


def picture(flow: Flow, query: dict[str, list[str]]) -> bytes:
    """A PNG of the camera that a query asks for, which looks at the origin; ConfigError for what is no such camera."""
    given: dict[str, Any] = {"azimuth": 0.0, "elevation": 20.0, "radius": None, "label": min(flow.objects)}
    for name, texts in query.items():
        try:
            (text,) = texts
            given[name] = {"azimuth": float, "elevation": float, "radius": float, "label": int}[name](text)
        except (KeyError, ValueError):
            what = f"{shortened(name)}={shown(texts[-1])}"
            raise ConfigError(f"{what}: expected azimuth, elevation, radius or label, a number, once") from None
    pose = flow.orbit([given["azimuth"]], given["elevation"], given["radius"])
    file = io.BytesIO()
    to_images(flow.render(pose, label=given["label"]))[0].save(file, format="PNG")
    return file.getvalue()


def _page(flow: Flow) -> str:
    low, high = flow.training_radius
    values = {
        "name": flow.run.config.name,
        "low": round(0.5 * low, 2),
        "high": round(1.5 * high, 2),
        "radius": round(0.5 * (low + high), 2),
        "objects": [[label, name] for label, name in flow.objects.items()],
    }
    data = json.dumps(values, allow_nan=False).replace("<", "\\u003c")
    return files("sitdist.inference").joinpath("viewer.html").read_text("utf-8").replace("DATA", data)
