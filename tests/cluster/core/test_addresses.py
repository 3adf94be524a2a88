"""Addresses where no cluster answers: one clear error each, at once, in place of minutes of trying."""

import os
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest

from cluster.__main__ import main
from cluster.core import addresses
from cluster.core.addresses import dashboard_of, head_of
from cluster.core.arguments import PretrainJob
from cluster.core.session import chosen_address
from datapipe.core import cli
from datapipe.core.errors import ClusterError, UsageError


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(addresses, "ANSWER_S", 1.0)


@pytest.fixture
def silent() -> Iterator[str]:
    """Somebody takes connections, and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing() -> Iterator[str]:
    """A web server that lets nobody in, as a dashboard without its token does."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def closed() -> str:
    """A port where nobody listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(("address", "said"), [
    ("http://127.0.0.1:8265", "address of a dashboard"), ("ray://127.0.0.1:10001", "through ray://"),
    ("127.0.0.1", "HOST:PORT"), ("127.0.0.1:port", "HOST:PORT"), ("head:99999", "HOST:PORT"), ("", "HOST:PORT"),
    (":6379", "HOST:PORT"), ("[fe80::1:6379", "HOST:PORT"), ("no-such-host.invalid:6379", "name of the host"),
])  # fmt: skip
def test_head__of_an_address_of_another_kind(address: str, said: str) -> None:
    with pytest.raises(ClusterError, match=said) as refused:
        head_of(address)
    assert refused.value.where == address and "ray start --head" in refused.value.hint


@pytest.mark.slow
def test_head__that_does_not_answer_is_named(closed: str, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(ClusterError, match=rf"nobody answers at {closed} \(Connection refused\)") as refused:
        head_of(chosen_address(""))
    assert refused.value.where == f"RAY_ADDRESS={closed}"
    with pytest.raises(ClusterError, match=f"who listens at {silent} is not the head") as refused:
        head_of(silent)
    assert refused.value.where == silent


def test_head__that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gRPC server, and proxies in the environment that must not be asked."""
    for name in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(addresses, "ANSWER_S", 60.0)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert head_of(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_head__a_name_server_that_is_silent_does_not_hold_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = threading.Event(), threading.Event()

    def look_up(*_: object, **__: object) -> list[object]:
        asked.set()
        answered.wait(60)
        return []

    monkeypatch.setattr(addresses, "LOOK_UP_S", 0.2)
    monkeypatch.setattr(addresses.socket, "getaddrinfo", look_up)
    with pytest.raises(ClusterError, match="name of the host is not found"):
        head_of("head.cluster:6379")
    assert asked.is_set()
    answered.set()


@pytest.mark.slow
def test_dashboard__that_does_not_answer_is_named(
    closed: str, silent: str, refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (f"http://{closed}", "http://no-such-host.invalid:8265", "anyscale://x", "http://", "http://h:port"):
        with pytest.raises(ClusterError) as refused:
            dashboard_of(url)
        assert refused.value.where == url and ":8265" in refused.value.hint
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(ClusterError, match="nobody answers") as refused:
        dashboard_of(None)
    assert refused.value.where == f"RAY_ADDRESS={closed}"
    with pytest.raises(ClusterError, match="does not answer as a dashboard does"):
        dashboard_of(f"http://{silent}")
    assert dashboard_of(refusing) == refusing  # what was given wins


def test_dashboard__that_is_reached_is_reached_without_a_proxy(refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "elsewhere")
    assert dashboard_of(refusing) == refusing
    assert "127.0.0.1" in os.environ["no_proxy"]


def test_commands__say_it_in_one_error(closed: str, tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["shard", str(tmp_path), "--out", f"{tmp_path}/out"]
    for words in ([*line, "--address", closed], ["submit", "--address", f"http://{closed}", *line]):
        assert cli.run(main, words) == 1
        said = capsys.readouterr().err
        assert f"error: no Ray cluster is reached: nobody answers at {closed}" in said and "try:" in said


@pytest.mark.parametrize("words", [["demo", "--address", "h:1", "--seed", "2"],
                                   ["--address=h:1", "demo", "--seed", "2"]])  # fmt: skip
def test_pretrain__takes_an_address_in_both_spellings(words: list[str]) -> None:
    chosen, rest = cli.read_some(PretrainJob, words, prog="")
    assert (chosen.address, chosen.recipe, rest) == ("h:1", "demo", ["--seed", "2"])


@pytest.mark.parametrize("words", [["demo", "--address"], ["demo", "--address="]])
def test_pretrain__an_address_that_is_missing_is_said(words: list[str]) -> None:
    with pytest.raises(UsageError, match="`--address`: "):
        cli.read_some(PretrainJob, words, prog="")
