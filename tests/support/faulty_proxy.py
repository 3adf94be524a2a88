"""An HTTP proxy in front of a server that misbehaves on purpose, the same way every time.

What happens to a request follows from the seed, from what is asked for and from how often it was asked for before:
never from the time or from other requests. No request meets more than `Faults.most` faults in a row.

    with FaultyProxy(s3.endpoint, Faults(rate=0.3, seed=1)) as proxy:
        open_store("s3://bucket", StorageConfig(endpoint_url=proxy.endpoint)).read("name")
    assert proxy.met["cut"]
"""

import hashlib
import http.client
import re
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import urlsplit

KINDS = ("reset", "lost", "cut", "empty", "delay", "500", "503")
"""reset: the connection is reset before the server hears of the request. lost: after it has carried it out. cut: half
of the body is missing. empty: all of it. delay: the answer comes late. 500, 503: answers, the latter with Retry-After.
Also to be had: silence, no answer until the proxy ends, and 501."""
DELAY_S = 0.05
FRAMING = {"connection", "content-length", "expect", "transfer-encoding"}
"""Headers that are about one connection, not about the message."""
DRAWN = re.compile(r"(?<=bucket-)[0-9a-f]+|(?<=probe-)[0-9a-f]+|(?<=uploadId=)[^& ]+")
"""Parts of a request that are another random name in every run; they do not decide about its faults."""


@dataclass(frozen=True)
class Faults:
    """Which requests meet which faults."""

    rate: float = 0.0
    """Share of requests that meet one."""
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    most: int = 2
    """Faults in a row that one request may meet. `ALWAYS`: it never gets through."""
    retry_after: str = "0"
    """What a 503 asks for."""
    without: tuple[str, ...] = ()
    """Headers that are taken out of requests: ("If-None-Match",) makes a store that ignores conditions."""
    without_for: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    """Methods whose requests lose them."""

    def of(self, request: str, earlier: int) -> str:
        """The fault that a request meets which was made so many times before; empty: none."""
        if earlier % (self.most + 1) == self.most:
            return ""
        digest = hashlib.sha256(f"{self.seed}\0{request}\0{earlier}".encode()).digest()
        share, choice = struct.unpack("<QQ", digest[:16])
        return self.kinds[choice % len(self.kinds)] if share < self.rate * 2.0**64 else ""


ALWAYS = 1 << 30


@dataclass
class FaultyProxy:
    """A context: listens on a free port of the loopback address. `tls` makes it speak https to its clients."""

    upstream: str
    faults: Faults = Faults()
    tls: ssl.SSLContext | None = None
    before: "Callable[[str, str], None]" = lambda method, path: None
    """Called with each request before it is passed on; it may wait, to bring two clients to the same place."""
    met: Counter[str] = field(default_factory=Counter)
    """How often each fault was met; "" counts requests that went through."""
    seen: Counter[str] = field(default_factory=Counter)
    """How often each request was made."""
    signed_by: set[str] = field(default_factory=set)
    """Access keys that requests were signed with."""
    lock: Any = field(default_factory=Lock)
    ended: Event = field(default_factory=Event)

    def __enter__(self) -> "FaultyProxy":
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        if self.tls:
            self.server.socket = self.tls.wrap_socket(self.server.socket, server_side=True)
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        """Where clients reach it."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.server.server_address[1]}"

    def fault(self, request: str) -> str:
        """What happens to this request now, and make a note of it."""
        with self.lock:
            found = self.faults.of(request, self.seen[request])
            self.seen[request] += 1
            self.met[found] += 1
        return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up, or refuse the certificate, are no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    proxy: FaultyProxy

    def answer(self) -> None:
        """Take a request whole, then let its fault happen to it."""
        body = self._body()
        self.proxy.signed_by.update(re.findall(r"Credential=([^/]+)/", self.headers.get("Authorization", "")))
        asked = DRAWN.sub("", f"{self.command} {self.path} {self.headers.get('Range', '')}")
        fault = self.proxy.fault(asked)
        if fault == "reset":
            return self._reset()
        if fault in ("500", "501", "503"):
            return self._refuse(int(fault))
        if fault == "silence":
            self.proxy.ended.wait()
            return self._reset()
        if fault == "delay":
            time.sleep(DELAY_S)
        self.proxy.before(self.command, self.path)
        status, headers, data = self._forward(body)
        if fault == "lost":
            return self._reset()
        kept = {"cut": len(data) // 2, "empty": 0}.get(fault, len(data))
        self._send(status, headers, data[:kept])
        if kept != len(data):
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def handle_expect_100(self) -> bool:
        """boto3 waits for this before it sends a body."""
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        address = urlsplit(self.proxy.upstream)
        faults = self.proxy.faults
        dropped = FRAMING | {name.lower() for name in faults.without if self.command in faults.without_for}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=300)
        try:
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            answer = connection.getresponse()
            data = answer.read()
            length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in FRAMING]
            return answer.status, [*kept, ("Content-Length", length)], data
        finally:
            connection.close()

    def _send(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        """An answer with the headers of the whole, whatever is left of the data."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _refuse(self, status: int) -> None:
        code = {500: "InternalError", 501: "NotImplemented", 503: "SlowDown"}[status]
        data = f"<Error><Code>{code}</Code><Message>as ordered</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(data)))]
        if status == 503:
            headers.append(("Retry-After", self.proxy.faults.retry_after))
        self._send(status, headers, b"" if self.command == "HEAD" else data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Quiet."""
