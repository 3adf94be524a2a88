"""What a store can do is found out by doing it; what it cannot do is said before any work."""

from pathlib import Path
from uuid import uuid4

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import RefusedError, StorageError
from datapipe.storage import Capabilities, open_store, probe
from tests.conftest import S3Server
from tests.support.faulty_proxy import Faults, FaultyProxy

ALL = Capabilities(creates_once=True, ranges=True, lists=True, deletes=True)


@pytest.mark.parametrize("kind", ["local", "s3", "memory"])
def test_probe__tells_what_works_and_leaves_nothing(
    kind: str, tmp_path: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    url = {"local": str(tmp_path), "s3": f"s3://{s3.bucket()}/set", "memory": f"memory://{uuid4().hex}"}[kind]
    store = open_store(url, s3.storage)
    found = probe(store)
    assert found == Capabilities(creates_once=kind != "memory", ranges=True, lists=True, deletes=True)
    assert len(caplog.messages) == (kind == "memory") and list(store.list()) == []


@pytest.mark.parametrize("ignored", ["always", "in_parts"])
def test_probe__sees_that_conditions_are_ignored(ignored: str, s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    bucket = s3.bucket()
    methods = ("PUT", "POST") if ignored == "always" else ("POST",)  # POST completes an upload in parts
    front = Faults(without=("If-None-Match",), without_for=methods)
    with FaultyProxy(s3.endpoint, front) as proxy:
        found = probe(open_store(f"s3://{bucket}", StorageConfig(endpoint_url=proxy.endpoint)))
    assert found == Capabilities(creates_once=False, ranges=True, lists=True, deletes=True)
    assert [f"s3://{bucket} does not enforce create-once" in line for line in caplog.messages] == [True]
    assert s3.objects(bucket) == {}


def test_probe__sees_that_ranges_are_ignored(s3: S3Server) -> None:
    bucket = s3.bucket()
    with FaultyProxy(s3.endpoint, Faults(without=("Range",), without_for=("GET",))) as proxy:
        store = open_store(f"s3://{bucket}", StorageConfig(endpoint_url=proxy.endpoint))
        found = probe(store)
        assert found == Capabilities(creates_once=True, ranges=False, lists=True, deletes=True)
        with pytest.raises(StorageError, match="lacks .* exact range reads"):
            found.demand("ranges", "lists", where=store.url)
        store.replace("name", b"0123456789")
        with pytest.raises(StorageError, match="bytes=2-4 with no range"):
            store.read("name", start=2, size=3)
        assert store.read("name", size=100) == b"0123456789"  # the whole is what was asked for
    ALL.demand("ranges", "lists", "deletes", "creates_once", where="")


@pytest.mark.slow
def test_probe__refusals_come_before_any_work(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="not a folder|refused"):
        probe(open_store(str(tmp_path / "file")))
    with pytest.raises(StorageError, match="refused: "):
        probe(open_store("/sys/nowhere"))
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        probe(open_store("s3://no-such-bucket/set", s3.storage))
    with pytest.raises(StorageError, match="cannot be reached"):
        probe(open_store("s3://bucket", StorageConfig(endpoint_url="http://127.0.0.1:9", attempts=2)))
    with pytest.raises(StorageError, match="full address"):
        probe(open_store("s3://bucket", StorageConfig(endpoint_url="127.0.0.1:9")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_probe__no_right_to_write(s3_without_rights: StorageConfig) -> None:
    with pytest.raises(RefusedError, match="AccessDenied"):
        probe(open_store("s3://locked/set", s3_without_rights))
