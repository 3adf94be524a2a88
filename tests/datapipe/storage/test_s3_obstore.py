"""Ranges from S3 by obstore: what it reads, what it leaves to boto3, and that nothing gets lost between the two."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import NotFoundError, RefusedError, StorageError
from datapipe.storage import Store, open_store, retry, s3_obstore
from datapipe.storage.s3 import S3Store
from tests.conftest import S3Server
from tests.support.faulty_proxy import ALWAYS, KINDS, Faults, FaultyProxy

AWS = "amazonaws.com"
DATA = bytes(range(256)) * 4000
KEYS = ("plain", "a b", "a+b", "a%20b", "ü/é 日本", "x=1/y", "q?x#y", "a&b~'()*!", "[x]{y}^`|<>", "dir/.hidden", "a\\b")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 1e-3)


@pytest.fixture
def without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a range through boto3 is an error."""

    def read(_self: S3Store, name: str, start: int, size: int | None) -> bytes:
        raise AssertionError(f"boto3 was asked for {size} bytes from {start} of {name}")

    monkeypatch.setattr(S3Store, "_read_range", read)


@pytest.fixture
def without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading through obstore is an error that nobody expects."""

    def read(*_: object) -> bytes:
        raise AssertionError("obstore was asked")

    monkeypatch.setattr(s3_obstore.Ranges, "_read", read)


def ranged(store: Store, name: str, start: int, size: int) -> bytes:
    """Read as the loader's threads do."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(store.read, name, start=start, size=size).result()


def filled(s3: S3Server, *names: str) -> str:
    bucket = s3.bucket()
    for name in names or ("name",):
        s3.client.put_object(Bucket=bucket, Key=name, Body=DATA)
    return bucket


@pytest.mark.usefixtures("without_boto3")
def test_range__is_what_lies_there_under_every_name(s3: S3Server) -> None:
    store = open_store(f"s3://{filled(s3, *KEYS)}", StorageConfig(endpoint_url=s3.endpoint))
    for key in KEYS:
        assert ranged(store, key, 7, 1000) == DATA[7:1007]
    for start, size in [(0, 1), (0, len(DATA)), (5, 10**7), (len(DATA) - 1, 1), (len(DATA) - 1, 2)]:
        assert ranged(store, "plain", start, size) == DATA[start : start + size]


def test_range__of_a_name_that_obstore_would_take_for_another_is_read_by_boto3(s3: S3Server) -> None:
    bucket = filled(s3, "name")
    odd = {"/name": b"slash before", "a//b": b"an empty part", "./a": b"a dot", "tab\tx": b"a tab"}
    for key, data in odd.items():
        s3.client.put_object(Bucket=bucket, Key=key, Body=data)
    store = open_store(f"s3://{bucket}", StorageConfig(endpoint_url=s3.endpoint))
    assert {key: ranged(store, key, 0, 99) for key in odd} == odd


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_range__survives_each_fault(kind: str, s3: S3Server) -> None:
    bucket = filled(s3)
    with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=(kind,), most=1)) as proxy:
        store = open_store(f"s3://{bucket}", StorageConfig(endpoint_url=proxy.endpoint))
        for start in (0, 7, 500_000):
            assert ranged(store, "name", start, 70_000) == DATA[start : start + 70_000]
    assert proxy.met[kind] == 3


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [1, 2, 5])
@pytest.mark.parametrize(("kind", "told"), [("reset", "fully"), ("cut", "fully"), ("503", "503"), ("500", "500")])
def test_range__is_tried_as_often_as_it_may(kind: str, told: str, attempts: int, s3: S3Server) -> None:
    bucket = filled(s3)
    with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=(kind,), most=ALWAYS)) as proxy:
        store = open_store(f"s3://{bucket}", StorageConfig(endpoint_url=proxy.endpoint, attempts=attempts))
        with pytest.raises(StorageError, match=told) as caught:
            ranged(store, "name", 0, 9)
    assert proxy.met == {kind: attempts} and "given up after" in caught.value.what
    assert f"s3://{bucket}/name" in caught.value.where and "\n" not in str(caught.value.what)


@pytest.mark.slow
def test_range__a_silent_server_is_left_in_time(s3: S3Server) -> None:
    with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=("silence",), most=ALWAYS)) as proxy:
        store = open_store("s3://bucket", StorageConfig(endpoint_url=proxy.endpoint, timeout_s=0.3, give_up_s=3))
        began = time.monotonic()
        with pytest.raises(StorageError, match="did not answer fully"):
            ranged(store, "name", 0, 9)
        assert time.monotonic() - began < 60 and proxy.met["silence"] > 1


def test_range__what_is_no_passing_fault_is_told_at_once(s3: S3Server) -> None:
    bucket, slow = filled(s3), {"attempts": 2, "give_up_s": 600.0}
    with FaultyProxy(s3.endpoint) as proxy:
        config = StorageConfig(endpoint_url=proxy.endpoint, **slow)
        assert ranged(open_store(f"s3://{bucket}", config), "name", len(DATA) + 3, 9) == b""
        with pytest.raises(NotFoundError, match="the object does not exist"):
            ranged(open_store(f"s3://{bucket}", config), "other", 0, 9)
        with pytest.raises(StorageError, match="the bucket 'nowhere' does not exist"):
            ranged(open_store("s3://nowhere", config), "name", 0, 9)
    assert proxy.met[""] == 6  # obstore's and boto3's, once each


def test_range__no_right_ends_at_once(s3_without_rights: StorageConfig) -> None:
    with pytest.raises(RefusedError, match="refuses access"):
        ranged(open_store("s3://locked", s3_without_rights), "name", 0, 9)


def test_range__without_credentials_boto3_says_what_is_missing(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(RefusedError, match="AWS_ACCESS_KEY_ID"):
        ranged(open_store(f"s3://{filled(s3)}", StorageConfig(endpoint_url=s3.endpoint, timeout_s=31)), "name", 0, 9)


@pytest.mark.usefixtures("without_boto3")
def test_range__trusts_whom_boto3_trusts(s3_tls: S3Server, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    config = StorageConfig(endpoint_url=s3_tls.endpoint, timeout_s=33)
    assert ranged(open_store(f"s3://{filled(s3_tls)}", config), "name", 3, 5) == DATA[3:8]


def test_range__from_a_server_that_signed_its_own_certificate(
    s3_self_signed: tuple[S3Server, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenSSL, and with it boto3, trusts it; rustls does not take an authority's certificate for a server's."""
    server, certificate = s3_self_signed
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    store = open_store(f"s3://{filled(server)}", StorageConfig(endpoint_url=server.endpoint, timeout_s=34))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: store.read("name", start=start, size=5), range(8)))
    assert parts == [DATA[start : start + 5] for start in range(8)]
    told = [record.message for record in caplog.records if record.name.startswith("datapipe")]
    assert len(told) == 1 and "certificate" in told[0]


KEYS_OF_A_COMMAND = """#!{python}
import datetime, json, pathlib
calls = pathlib.Path("{calls}")
calls.write_text(calls.read_text() + "x")
until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes={minutes})
print(json.dumps({{"Version": 1, "AccessKeyId": f"key{{len(calls.read_text())}}", "SecretAccessKey": "secret",
                   "SessionToken": "token", "Expiration": until.isoformat()}}))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("without_boto3")
@pytest.mark.parametrize(("minutes", "keys"), [(60, range(1, 2)), (9, range(3, 100))])
def test_range__is_signed_with_credentials_that_boto3_keeps_fresh(
    minutes: int, keys: range, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """boto3 renews those with 9 minutes left whenever it is asked; obstore asks it where what it has is to be kept for
    less than 5 minutes, at most ten times a second."""
    bucket, command = filled(s3), tmp_path / "command"
    (tmp_path / "calls").write_text("")
    command.write_text(KEYS_OF_A_COMMAND.format(python=sys.executable, calls=tmp_path / "calls", minutes=minutes))
    command.chmod(0o755)
    (tmp_path / "config").write_text(f"[profile reid]\ncredential_process = {command}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "reid")
    monkeypatch.setattr(s3_obstore, "CREDENTIALS_FOR", timedelta(minutes=4))
    reads, began = 0, time.monotonic()
    with FaultyProxy(s3.endpoint) as proxy:
        store = open_store(f"s3://{bucket}", StorageConfig(endpoint_url=proxy.endpoint, timeout_s=34))
        while reads < 20 or len(proxy.signed_by) < keys.start and time.monotonic() - began < 300:
            assert ranged(store, "name", reads, 5) == DATA[reads : reads + 5]
            reads += 1
    assert len(proxy.signed_by) in keys


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "region", "endpoint", "address"),
    [
        ("addressing_style = auto", "eu-west-1", "", (f"https://bucket.s3.eu-west-1.{AWS}", True)),
        ("addressing_style = auto", "us-east-1", "http://10.0.0.5:9000", ("http://10.0.0.5:9000", False)),
        ("addressing_style = auto", "us-east-1", "https://host/store", ("https://host/store", False)),
        ("addressing_style = virtual", "x", "https://oss.example.com", ("https://bucket.oss.example.com", True)),
        ("addressing_style = path", "eu-west-1", "", (f"https://s3.eu-west-1.{AWS}", False)),
        ("use_dualstack_endpoint = true", "us-west-2", "", (f"https://bucket.s3.dualstack.us-west-2.{AWS}", True)),
    ],
)
def test_address__is_where_boto3_looks(
    settings: str,
    region: str,
    endpoint: str,
    address: tuple[str, bool],
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "config").write_text(f"[default]\ns3 =\n  {settings}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    client = boto3.session.Session().client("s3", endpoint_url=endpoint or None, region_name=region)
    assert s3_obstore._address(client, "bucket") == address


@pytest.mark.slow
@pytest.mark.usefixtures("without_obstore")
def test_range__in_the_main_thread_heeds_signals(s3: S3Server) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, interrupt)
    try:
        with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=("silence",), most=ALWAYS)) as proxy:
            store = open_store("s3://bucket", StorageConfig(endpoint_url=proxy.endpoint, timeout_s=60))
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 1, 5)  # again, in case an interpreter's callback swallowed the first
            with pytest.raises(KeyboardInterrupt):
                store.read("name", start=0, size=9)
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert time.monotonic() - began < 30
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


FORK = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from datapipe.core.config import StorageConfig
from datapipe.storage import open_store, s3_obstore as s3_ranges

store = open_store(sys.argv[1], StorageConfig(endpoint_url=sys.argv[2]))
def read():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(store.read, "name", start=3, size=5).result()

before = read()
child = os.fork()
if not child:
    ways = [s3_ranges.ranges(store.bucket, store.config, process) for process in (os.getppid(), os.getpid())]
    os._exit(0 if read() == before and ways[0] is not None and ways[1] is None else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_range__in_a_fork_does_not_wait_for_threads_that_are_gone(s3: S3Server) -> None:
    address = f"s3://{filled(s3)}"
    subprocess.run([sys.executable, "-c", FORK, address, s3.endpoint], check=True, timeout=120, env=os.environ)


def test_range__goes_back_to_boto3_where_obstore_never_gets_through(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = filled(s3)
    tries: list[int] = []

    def wrong_address(of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda client, bucket: of(client, bucket)._replace(endpoint="http://127.0.0.1:9")

    read = s3_obstore.Ranges._read

    def counted(self: s3_obstore.Ranges, key: str, start: int, size: int) -> bytes:
        tries.append(start)
        return read(self, key, start, size)

    monkeypatch.setattr(s3_obstore, "_address", wrong_address(s3_obstore._address))
    monkeypatch.setattr(s3_obstore.Ranges, "_read", counted)
    store = open_store(f"s3://{bucket}", StorageConfig(endpoint_url=s3.endpoint, timeout_s=37))
    for start in range(15):
        assert ranged(store, "name", start, 9) == DATA[start : start + 9]
    assert tries == list(range(s3_obstore.MOST_IN_VAIN))
    assert sum("obstore cannot read here" in message for message in caplog.messages) == 1
