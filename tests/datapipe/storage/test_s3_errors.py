"""Stores behind a proxy that misbehaves: what passes is survived, what does not is said clearly and in time."""

import email.utils
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from datapipe.core.config import StorageConfig
from datapipe.core.errors import NotFoundError, RefusedError, StorageError
from datapipe.storage import Store, open_object, open_store, retry, s3_errors
from datapipe.storage import s3 as s3_store
from datapipe.storage.s3_client import connection
from tests.conftest import S3Server
from tests.support.faulty_proxy import ALWAYS, KINDS, Faults, FaultyProxy

GIVE_UP_S, ALL_TRIES_S = 2.0, 300.0
"""Long enough for a second try on a busy machine; far less than all tries take, each after the longest wait."""
DEFAULT_S = 60.0
"""What one silent answer takes where a shorter limit is not heeded."""
NOW_S = 1_800_000_000
SLOW_DOWN = {"Error": {"Code": "SlowDown"}}
DATA = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 1e-3)


def patient(endpoint: str) -> StorageConfig:
    """Tries and time in abundance."""
    return StorageConfig(endpoint_url=endpoint, timeout_s=21)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_s3__survives_each_fault_in_every_request(kind: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 5 << 20)
    bucket, large = s3.bucket(), DATA * 210
    with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=(kind,), most=1)) as proxy:
        store = open_store(f"s3://{bucket}/set", patient(proxy.endpoint))
        won = store.create("a", DATA)
        store.replace("b", large)
        assert [(entry.name, entry.size) for entry in store.list()] == [("a", len(DATA)), ("b", len(large))]
        assert store.read("a") == DATA and store.read("b", start=1000, size=70_000) == large[1000:71_000]
        assert store.size("b") == len(large)
        assert not store.create("a", b"other")
        store.delete("b")
    assert s3.objects(bucket) == {"set/a": DATA} and proxy.met[kind] > 8
    lost = kind in ("lost", "cut", "empty")
    assert won or lost  # the answer to the put that won never came whole
    for upload in s3.client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
        assert lost  # the answer that named it
        assert "Parts" not in s3.client.list_parts(Bucket=bucket, Key="set/b", UploadId=upload["UploadId"])


def test_proxy__does_the_same_every_time() -> None:
    faults = Faults(rate=0.5, seed=3, most=2)
    told = [faults.of("GET /x", earlier) for earlier in range(300)]
    assert told == [faults.of("GET /x", earlier) for earlier in range(300)] and set(told) == {"", *KINDS}
    assert all("" in told[first : first + 3] for first in range(298))
    assert told != [Faults(rate=0.5, seed=4, most=2).of("GET /x", earlier) for earlier in range(300)]


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("name"),
    "range": lambda store: store.read("name", start=5, size=9),
    "size": lambda store: store.size("name"),
    "list": lambda store: list(store.list()),
    "create": lambda store: store.create("new", b"content"),
    "stream": lambda store: open_object(store, "name").read(),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "told"), [("reset", "did not answer fully"), ("cut", "fully"), ("503", "SlowDown")])
def test_s3__gives_up_in_time_and_says_so(kind: str, told: str, s3: S3Server) -> None:
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket, Key="name", Body=DATA)
    with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=(kind,), most=ALWAYS)) as proxy:
        config = StorageConfig(endpoint_url=proxy.endpoint, give_up_s=GIVE_UP_S, attempts=ALWAYS)
        store = open_store(f"s3://{bucket}", config)
        connection(config, os.getpid())  # half a second where the machine is busy
        began = time.monotonic()
        with pytest.raises(StorageError, match=told) as caught:
            store.read("name")
        assert time.monotonic() - began < ALL_TRIES_S
    assert "given up after" in caught.value.what and f"s3://{bucket}/name" in caught.value.where
    assert proxy.met[kind] > 1


def test_s3__tries_as_often_as_it_may(s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=("500",), most=ALWAYS)) as proxy:
        store = open_store("s3://bucket", StorageConfig(endpoint_url=proxy.endpoint, attempts=4))
        with pytest.raises(StorageError, match=r"answered 500 InternalError: as ordered \(given up after 4 tries"):
            store.read("name")
    assert proxy.met == {"500": 4} and [line.count("as ordered; try") for line in caplog.messages] == [1, 1, 1]


def test_s3__waits_double_each_time_up_to_a_limit_and_no_two_clients_alike(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.2)
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=("500",), most=ALWAYS)) as proxy:
        store = open_store("s3://bucket", StorageConfig(endpoint_url=proxy.endpoint, attempts=9, give_up_s=1e6))
        for _ in range(2):
            with pytest.raises(StorageError, match="after 9 tries"):
                store.read("name")
    longest = [0.4, 0.8, 1.6, 3.2, 6.4, *[retry.LONGEST_WAIT_S] * 3]
    once, again = waits[:8], waits[8:]
    for waited in (once, again):
        assert all(most / 2 <= wait <= most for wait, most in zip(waited, longest, strict=True))
    assert once != again


@pytest.mark.slow
def test_s3__waits_as_long_as_the_store_asks(s3: S3Server) -> None:
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket, Key="name", Body=DATA)
    busy = Faults(rate=1.0, kinds=("503",), most=1, retry_after="1")
    with FaultyProxy(s3.endpoint, busy) as proxy:
        began = time.monotonic()
        assert open_store(f"s3://{bucket}", patient(proxy.endpoint)).read("name") == DATA
        assert time.monotonic() - began >= 1
        short = StorageConfig(endpoint_url=proxy.endpoint, give_up_s=0.9)
        with pytest.raises(StorageError, match="after 1 try"):
            open_store(f"s3://{bucket}", short).read("name", start=1)


@pytest.mark.parametrize(("given", "seconds"), [("7", 7), ("+40", 40), ("-40", 0), ("", 0), ("soon", 0)])
def test_retry_after__is_a_number_or_a_date(given: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if given.startswith(("+", "-")):
        monkeypatch.setattr(s3_errors.time, "time", lambda: NOW_S)
        given = email.utils.formatdate(NOW_S + int(given), usegmt=True)
    answer = {"ResponseMetadata": {"HTTPHeaders": {"retry-after": given}}}
    found = s3_errors.explained(
        ClientError({**answer, **SLOW_DOWN}, "GetObject"), s3_errors.S3Address("", "", ""), True
    )
    assert isinstance(found, retry.PassingFault) and found.after_s == seconds


@pytest.mark.slow
def test_s3__a_silent_server_is_left_in_time(s3: S3Server) -> None:
    with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=("silence",), most=ALWAYS)) as proxy:
        store = open_store("s3://bucket", StorageConfig(endpoint_url=proxy.endpoint, timeout_s=0.3, give_up_s=0.5))
        began = time.monotonic()
        with pytest.raises(StorageError, match="Read timeout"):
            store.read("name")
        assert time.monotonic() - began < DEFAULT_S


@pytest.mark.parametrize("operation", OPERATIONS)
def test_s3__no_right_ends_at_once(operation: str, s3_without_rights: StorageConfig, s3: S3Server) -> None:
    with FaultyProxy(s3_without_rights.endpoint_url) as proxy:
        store = open_store("s3://locked", replace(s3_without_rights, endpoint_url=proxy.endpoint))
        with pytest.raises(RefusedError, match="refuses access") as caught:
            OPERATIONS[operation](store)
        assert proxy.met[""] <= 2, "it was not tried again, but for a look at what was refused"
    assert "s3://locked" in caught.value.where and "AWS_ACCESS_KEY_ID" in caught.value.hint


@pytest.mark.slow
def test_s3__a_certificate_is_checked(
    s3_tls: S3Server, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket = s3_tls.bucket()
    with pytest.raises(StorageError, match="no trusted connection") as caught:
        distrusting = StorageConfig(endpoint_url=s3_tls.endpoint, timeout_s=22)  # clients are kept by configuration
        open_store(f"s3://{bucket}", distrusting).create("name", b"")
    assert "AWS_CA_BUNDLE" in caught.value.hint
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    monkeypatch.setattr(s3_store, "PART_BYTES", 5 << 20)
    store = open_store(f"s3://{bucket}", StorageConfig(endpoint_url=s3_tls.endpoint, timeout_s=20))
    large = DATA * 210
    (tmp_path / "large").write_bytes(large)
    assert store.create("small", DATA) and not store.create("small", b"")
    assert store.create("large", tmp_path / "large")
    assert s3_tls.objects(bucket) == {"small": DATA, "large": large}
    assert open_object(store, "large").read() == large
    plain = s3_tls.endpoint.replace("https", "http")
    with pytest.raises(StorageError):
        open_store(f"s3://{bucket}", StorageConfig(endpoint_url=plain, give_up_s=0.5)).read("small")


@pytest.mark.parametrize("kind", ["reset", "cut", "empty", "503"])
def test_http__is_read_through_the_same_loop(kind: str, s3: S3Server) -> None:
    """fsspec's http does not retry, does not notice every cut, and calls whatever goes wrong "not found"."""
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket, Key="name", Body=DATA, ACL="public-read")
    with FaultyProxy(s3.endpoint, Faults(rate=1.0, kinds=(kind,), most=1)) as proxy:
        store = open_store(f"{proxy.endpoint}/{bucket}")
        assert store.read("name") == DATA and store.read("name", start=7, size=1000) == DATA[7:1007]
        assert open_object(store, "name").read() == DATA
        with pytest.raises(NotFoundError):
            store.read("other")
    assert proxy.met[kind] > 3
