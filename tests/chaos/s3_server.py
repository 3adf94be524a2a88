"""python -m tests.chaos.s3_server PORT FOLDER: an S3-compatible server on the loopback address that may be killed.

moto keeps objects in memory. Here every change that was carried out is also written to a journal in FOLDER before it is
acknowledged, and carried out again when a server starts there: what clients were told to be stored stays stored.
"""

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.test import create_environ
from werkzeug.wrappers import Request

READING = ("GET", "HEAD")
Answer = Iterable[bytes]


class Journal:
    """A WSGI application around moto's."""

    def __init__(self, folder: Path) -> None:
        self._inner = DomainDispatcherApplication(create_backend_app)
        self._folder, self._lock = folder, Lock()
        folder.mkdir(parents=True, exist_ok=True)
        entries = sorted(folder.glob("*.json"))
        for entry in entries:
            self._repeat(entry)
        self._next = len(entries)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        if environ["REQUEST_METHOD"] in READING:
            return self._inner(environ, start_response)
        with self._lock:  # the journal has the order in which changes were carried out
            return self._change(environ, start_response)

    def _change(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        body = Request(environ).get_data()
        status, headers, answer = self._carry_out(environ, body)
        if status.startswith("2"):
            self._note(environ, body)
        start_response(status, headers)
        return answer

    def _carry_out(self, environ: dict[str, Any], body: bytes) -> tuple[str, list[tuple[str, str]], list[bytes]]:
        """(status, headers, body) of moto's answer."""
        heard: list[Any] = []
        answer = list(self._inner({**environ, "wsgi.input": io.BytesIO(body)}, lambda *words: heard.append(words)))
        return heard[0][0], heard[0][1], answer

    def _note(self, environ: dict[str, Any], body: bytes) -> None:
        name = self._folder / f"{self._next:08d}"
        name.with_suffix(".body").write_bytes(body)
        plain = {key: value for key, value in environ.items() if isinstance(value, str)}
        name.with_suffix(".part").write_text(json.dumps(plain))
        os.replace(name.with_suffix(".part"), name.with_suffix(".json"))
        self._next += 1

    def _repeat(self, entry: Path) -> None:
        given = create_environ(environ_overrides=json.loads(entry.read_text()))
        status, _, answer = self._carry_out(given, entry.with_suffix(".body").read_bytes())
        assert status.startswith("2"), (entry, status, answer)


def serve(port: int, folder: Path) -> None:
    """Until killed. Requests are answered by one thread each."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    make_server("127.0.0.1", port, Journal(folder), threaded=True).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
