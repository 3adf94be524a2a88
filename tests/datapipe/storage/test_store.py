"""Stores hold what was written, whole or not at all, and say clearly why they cannot."""

import pickle
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import NotFoundError, RefusedError, StorageError
from datapipe.storage import Entry, Store, is_remote, open_store, open_stream, split_url
from datapipe.storage import s3 as s3_store
from tests.conftest import S3Server
from tests.support.faulty_proxy import Faults, FaultyProxy


@pytest.fixture(params=["local", "s3", "memory", "fsspec_disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Store:
    """An empty store of each kind; in the last one, fsspec's own folders, a put is not whole by itself."""
    url = {
        "local": str(tmp_path / "folder"),
        "s3": f"s3://{s3.bucket()}/pre/fix",
        "memory": f"memory://{uuid4().hex}",
        "fsspec_disk": f"local://{tmp_path}/folder",
    }[request.param]
    return pickle.loads(pickle.dumps(open_store(url, s3.storage)))


def test_store__reads_back_what_was_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a file")
    assert store.create("a/b.txt", b"hello")
    assert store.create("c", tmp_path / "file")
    assert store.read("a/b.txt") == b"hello" and store.size("a/b.txt") == 5
    assert store.read("c") == b"from a file"
    assert store.at("a").read("b.txt") == b"hello"
    assert store.read("a/b.txt", start=1, size=3) == b"ell"
    assert store.read("a/b.txt", start=3, size=10) == b"lo"
    assert store.read("a/b.txt", start=5, size=10) == b""
    assert store.read("a/b.txt", size=0) == b""
    assert store.read("a/b.txt", start=2) == b"llo"


def test_store__creates_once_and_replaces(store: Store) -> None:
    assert store.create("name", b"first")
    assert not store.create("name", b"second")
    assert store.read("name") == b"first"
    store.replace("name", b"third")
    assert store.read("name") == b"third"
    store.delete("name")
    store.delete("name")
    assert not store.exists("name")
    with pytest.raises(NotFoundError):
        store.read("name")
    with pytest.raises(NotFoundError):
        store.size("name")


def test_store__lists_sorted_by_full_name(store: Store) -> None:
    names = ["a.jpg", "a/b.jpg", "a/c/d.jpg", "b", "a-b.jpg", "a0"]
    for name in names:
        store.create(name, name.encode())
    assert list(store.list()) == [Entry(name, len(name)) for name in sorted(names)]
    assert [entry.name for entry in store.list("a/")] == ["a/b.jpg", "a/c/d.jpg"]
    assert [entry.name for entry in store.list("a")] == sorted(names)[:-1]
    assert [entry.name for entry in store.list("a/c/x")] == []


def test_children__are_what_lies_right_below(store: Store) -> None:
    for name in ("b/deep/er", "b/file", "a.json", "z", "b-c/file"):
        store.replace(name, b"x")
    assert store.children() == (["b", "b-c"], ["a.json", "z"])
    assert store.at("b").children() == (["deep"], ["file"])


@pytest.mark.slow
def test_children__of_more_than_one_answer(s3: S3Server) -> None:
    store = open_store(f"s3://{s3.bucket()}/pre", s3.storage)
    for number in range(5):
        store.replace(f"{number}/file", b"x")
        store.replace(f"file_{number}", b"x")
    seen: list[str] = []
    with FaultyProxy(s3.endpoint, before=lambda method, path: seen.append(path)) as proxy:
        through = open_store(store.url, StorageConfig(endpoint_url=proxy.endpoint, attempts=1))
        assert isinstance(through, s3_store.S3Store)
        paged = list(through._pages("", Delimiter="/", MaxKeys=3))
        assert len(paged) == len(seen) == 4
        assert through.children() == ([*"01234"], [f"file_{number}" for number in range(5)])
        assert len(seen) == 5


def test_delete_many__removes_them_and_takes_absent_ones_for_removed(store: Store) -> None:
    names = [f"{folder}/{number}" for folder in "ab" for number in range(3)]
    for name in names:
        store.replace(name, b"x")
    store.delete_many([*names[1:], "a/absent"])
    assert [entry.name for entry in store.list()] == ["a/0"]
    store.delete_many([])
    with pytest.raises(StorageError, match="leads out of the folder"):
        store.delete_many(["a/0", "../other"])
    assert store.exists("a/0")


def test_delete_many__takes_one_request_for_a_thousand_objects(s3: S3Server) -> None:
    store = open_store(f"s3://{s3.bucket()}/pre", s3.storage)
    seen = Counter[str]()
    with FaultyProxy(s3.endpoint, before=lambda method, path: seen.update([method])) as proxy:
        through = open_store(store.url, StorageConfig(endpoint_url=proxy.endpoint, attempts=1))
        for number in range(10):
            store.replace(f"{number}", b"x")
        through.delete_many(str(number) for number in range(1_500))
    assert seen == {"POST": 2} and not list(store.list())


def test_delete_many__one_by_one_where_the_store_knows_no_batches(s3: S3Server) -> None:
    store = open_store(f"s3://{s3.bucket()}/pre", s3.storage)

    class Unknowing(FaultyProxy):
        def fault(self, request: str) -> str:
            return "501" if request.startswith("POST") else super().fault(request)

    for number in range(10):
        store.replace(f"{number}", b"x")
    with Unknowing(s3.endpoint) as proxy:
        through = open_store(store.url, StorageConfig(endpoint_url=proxy.endpoint, attempts=1))
        through.delete_many(str(number) for number in range(1, 10))
        assert [entry.name for entry in store.list()] == ["0"]
        assert proxy.met[""] == 9


def test_delete_many__says_which_one_may_not_be_removed(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer as a whole is a success then."""
    store = open_store(f"s3://{s3.bucket()}/pre", s3.storage)
    assert isinstance(store, s3_store.S3Store)
    answer = {"Errors": [{"Key": "pre/b", "Code": "AccessDenied", "Message": "Access Denied"}]}
    monkeypatch.setattr(store._client, "delete_objects", lambda **_: answer)
    with pytest.raises(RefusedError, match="refuses access"):
        store.delete_many(["a", "b"])


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_create__has_one_winner_in_a_race(kind: str, tmp_path: Path, s3: S3Server) -> None:
    store = open_store(str(tmp_path) if kind == "local" else f"s3://{s3.bucket()}", s3.storage)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda writer: store.create("name", bytes([writer]) * 1000), range(8)))
    assert sum(won) == 1
    assert store.read("name") == bytes([won.index(True)]) * 1000


@pytest.mark.slow
def test_s3__sends_large_data_in_parts(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 5 << 20)
    bucket = s3.bucket()
    data = bytes(range(256)) * (86 << 10)
    (tmp_path / "large").write_bytes(data)
    store = open_store(f"s3://{bucket}", s3.storage)
    assert store.create("large", tmp_path / "large")
    answer = s3.client.get_object(Bucket=bucket, Key="large")
    assert answer["ETag"].endswith('-5"') and answer["Body"].read() == data
    assert not store.create("large", data)
    assert open_stream(f"s3://{bucket}/large", config=s3.storage).read() == data
    store.replace("large", data[:-1])
    assert store.size("large") == len(data) - 1
    assert not s3.client.list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_s3__creates_once_where_conditions_are_ignored(s3: S3Server) -> None:
    bucket = s3.bucket()
    with FaultyProxy(s3.endpoint, Faults(without=("If-None-Match",))) as proxy:
        store = open_store(f"s3://{bucket}", StorageConfig(endpoint_url=proxy.endpoint))
        assert store.create("name", b"first")
        assert not store.create("name", b"second")
    assert s3.objects(bucket) == {"name": b"first"}


def test_local__leaves_nothing_behind_when_writing_fails(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "folder"))
    with pytest.raises(StorageError):
        store.create("name", tmp_path / "missing")
    assert list((tmp_path / "folder").iterdir()) == []


def test_local__does_not_follow_a_link_to_a_folder_above(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"1")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "other").symlink_to(tmp_path / "a" / "b" / "file")
    assert [entry.name for entry in open_store(str(tmp_path)).list()] == ["a/b/file", "other"]


def test_local__lists_what_is_left_of_a_folder_that_others_delete_from(tmp_path: Path) -> None:
    for name in ("a/1", "b/1", "b/2", "c/1", "d/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = open_store(str(tmp_path)).list()
    assert next(listing).name == "a/1" and next(listing).name == "b/1"
    (tmp_path / "b" / "2").unlink()
    shutil.rmtree(tmp_path / "c")
    assert [entry.name for entry in listing] == ["d/1"]


def test_s3__unreachable_endpoint_and_wrong_bucket_are_named(s3: S3Server) -> None:
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        open_store("s3://bucket", StorageConfig(endpoint_url="http://127.0.0.1:9", attempts=2)).read("name")
    assert "http://127.0.0.1:9" in caught.value.where
    store = open_store("s3://no-such-bucket", s3.storage)
    for attempt in (lambda: store.read("x"), lambda: list(store.list()), lambda: store.create("x", b"")):
        with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
            attempt()


def test_open_store__refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nosuch"):
        open_store("nosuch://x").read("name")
    with pytest.raises(NotFoundError, match="does not exist"):
        list(open_store(str(tmp_path / "missing")).list())
    with pytest.raises(StorageError):
        open_store("")
    with pytest.raises(StorageError, match="no bucket"):
        open_store("s3://")


def test_urls__are_split_and_told_apart() -> None:
    assert split_url("s3://b/p/x.tar") == ("s3://b/p", "x.tar")
    assert split_url("x.tar") == (".", "x.tar")
    assert split_url("/x.tar") == ("/", "x.tar")
    assert is_remote("s3://b") and not is_remote("/a/b") and not is_remote("file:///a")
