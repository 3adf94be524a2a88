"""Notices of a preemption: a file, and servers that answer as those of the clouds do."""

import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from training.core.host import LocalHost
from training.core.preemption_notice import Notice, look

ANSWERS = {"/google": b"FALSE", "/azure": b"NONE\n", "/spot": b'{"action": "terminate"}', "/secured": b"soon"}


class Metadata(BaseHTTPRequestHandler):
    """Google's `preempted`, Amazon's `spot/instance-action` with and without session tokens."""

    def do_GET(self) -> None:
        answer = ANSWERS.get(self.path)
        if self.path == "/google" and self.headers["Metadata-Flavor"] != "Google":
            answer = None
        if self.path == "/secured" and self.headers["X-aws-ec2-metadata-token"] != "session":
            self._answer(401, b"")
        else:
            self._answer(200 if answer else 404, answer or b"")

    def do_PUT(self) -> None:
        right = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if right else 404, b"session")

    def _answer(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def metadata() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(("path", "said"), [
    ("/google", None), ("/azure", None), ("/absent", None), ("/spot", '{"action": "terminate"}'), ("/secured", "soon"),
])  # fmt: skip
def test_look__at_a_server(metadata: str, path: str, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert look(metadata + path) == said


def test_look__a_server_that_does_not_answer_says_nothing() -> None:
    assert look("http://127.0.0.1:1/spot") is None


def test_look__at_a_file(tmp_path: Path) -> None:
    assert look(str(tmp_path / "going")) is None
    (tmp_path / "going").touch()
    assert look(str(tmp_path / "going")) == "going"
    (tmp_path / "going").write_text("at noon\n")
    assert look(str(tmp_path / "going")) == "at noon"


def test_notice__is_heard_once_and_stops_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host, told = LocalHost(), threading.Event()

    def heard(words: str) -> None:
        host.notice(words)
        told.set()

    notice = Notice(str(tmp_path / "going"), every_s=0.01, callback=heard)
    assert not host.preempted()
    (tmp_path / "going").write_text("at noon")
    assert told.wait(300)
    notice.close()
    assert host.preempted() and host.received == signal.SIGTERM
    assert "at noon" in capsys.readouterr().err
