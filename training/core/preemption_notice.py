"""Is this machine about to be taken away? A file or an address says so some seconds or minutes before."""

import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

HEADERS = {"Metadata-Flavor": "Google", "Metadata": "true"}
"""What the metadata servers of Google and Azure ask for; others do not mind."""
TOKEN_PATH, TOKEN_HEADER, TOKEN_TTL = "/latest/api/token", "X-aws-ec2-metadata-token", "21600"
NOTHING = ("", "false", "none")
"""Answers that mean that nothing is planned, in lower case."""
ANSWER_S = 2.0
MOST_BYTES = 4_096
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # metadata servers are behind no proxy


class Notice:
    """Looks at a file or an http(s) address now and then, in a thread of its own.

    The file's being there, or an answer other than 404 or NOTHING, is the notice. Amazon's session token is fetched
    where the server asks for one. A server that does not answer says nothing.
    """

    def __init__(self, source: str, *, every_s: float, callback: Callable[[str], None]) -> None:
        """`callback(words)` is called once, from the thread. An empty source is never looked at."""
        self._source, self._every_s, self._callback = source, every_s, callback
        self._closed = threading.Event()
        if source:
            threading.Thread(target=self._watch, name="preemption notice", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.is_set():
            words = look(self._source)
            if words is not None:
                self._callback(words)
                return
            self._closed.wait(self._every_s)


def look(source: str) -> str | None:
    """What the notice says; None while there is none."""
    if not source.startswith(("http://", "https://")):
        return _in_file(Path(source))
    try:
        answer = _fetch(source)
    except OSError:  # no answer, 404, a proxy's trouble: none of them is a notice
        return None
    return None if answer.strip().lower() in NOTHING else answer.strip()


def _in_file(path: Path) -> str | None:
    try:
        return path.read_bytes()[:MOST_BYTES].decode(errors="replace").strip() or path.name
    except OSError:
        return None


def _fetch(address: str) -> str:
    try:
        return _read(urllib.request.Request(address, headers=HEADERS))
    except urllib.error.HTTPError as refusal:
        if refusal.code != 401:
            raise
    return _read(urllib.request.Request(address, headers={**HEADERS, TOKEN_HEADER: _token(address)}))


def _token(address: str) -> str:
    where = urlsplit(address)
    lifetime = {f"{TOKEN_HEADER}-ttl-seconds": TOKEN_TTL}
    return _read(urllib.request.Request(f"{where.scheme}://{where.netloc}{TOKEN_PATH}", method="PUT", headers=lifetime))


def _read(request: urllib.request.Request) -> str:
    with _DIRECT.open(request, timeout=ANSWER_S) as answer:
        return answer.read(MOST_BYTES).decode(errors="replace")
