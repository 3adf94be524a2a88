"""Blocks kept in memory and on disk: always the right bytes, never more of them than allowed, whoever dies."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import numpy as np
import pytest

from datapipe.core.config import RemoveConfig, StorageConfig, StreamConfig
from datapipe.core.errors import DataError, StorageError
from datapipe.dataset.manifest import Manifest
from datapipe.maintain.remove import remove
from datapipe.stream import disk_cache as caches
from datapipe.stream.disk_cache import ROOM_MADE, DiskCache
from datapipe.stream.memory_cache import MemoryCache
from datapipe.stream.stream import Stream
from tests.conftest import S3Server
from tests.datapipe import crop_set
from tests.datapipe.crop_set import CropSet
from tests.support.faulty_proxy import Faults, FaultyProxy

ROWS, BLOCK = 60, 5
PATIENCE_S = 300
BLOCKS = 12


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> CropSet:
    return crop_set.write(tmp_path_factory.mktemp("crops") / "set", ROWS)


def url(crops: CropSet) -> str:
    """The data set as another scheme than a path: read in blocks, as object storage is."""
    return f"local://{crops.folder}"


def config(folder: Path, **more: float) -> StreamConfig:
    return StreamConfig(
        **{"block": BLOCK, "window": 3, "max_bad": 1.0, "cache_mb": 0, "reads": 3, "cache_dir": str(folder), **more}
    )  # type: ignore[arg-type]


@pytest.fixture
def opened(crops: CropSet, tmp_path: Path) -> Iterator[Stream]:
    source = Stream(Manifest.load(url(crops)), StorageConfig(), config(tmp_path / "cache"))
    yield source
    source.close()


def everything(source: Stream) -> list[bytes]:
    return source.fetch(np.arange(source.rows)).data


def blocks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name not in caches.SERVICE)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in blocks(folder))


# ---------------------------------------------------------------------------------------------------------- the stream


def test_disk__another_reader_fetches_nothing(crops: CropSet, opened: Stream, tmp_path: Path) -> None:
    assert everything(opened) == crops.jpegs
    assert len(blocks(tmp_path / "cache")) == BLOCKS and opened.cached == (0, ROWS)
    assert held(tmp_path / "cache") == sum(map(len, crops.jpegs))
    other = Stream(Manifest.load(url(crops)), StorageConfig(), config(tmp_path / "cache"))
    assert everything(other) == crops.jpegs
    assert other.bytes_read == 0 and other.cached == (ROWS, ROWS)
    other.close()


@pytest.mark.parametrize("damage", ["vanished", "cut", "changed", "folder gone"])
def test_disk__what_is_broken_is_read_from_the_store(
    crops: CropSet, opened: Stream, tmp_path: Path, damage: str
) -> None:
    everything(opened)
    for path in blocks(tmp_path / "cache")[::2]:
        content = path.read_bytes()
        match damage:
            case "vanished":
                path.unlink()
            case "cut":
                path.write_bytes(content[:-1])
            case "changed":
                path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    if damage == "folder gone":
        (tmp_path / "cache").rename(tmp_path / "elsewhere")
    for _ in range(2):
        assert everything(opened) == crops.jpegs
    assert opened.replaced == 0
    before = opened.bytes_read
    assert everything(opened) == crops.jpegs
    assert opened.bytes_read == before  # what was mended stays


def test_disk__data_sets_with_equal_names_are_told_apart(crops: CropSet, opened: Stream, tmp_path: Path) -> None:
    everything(opened)
    other = crop_set.write(tmp_path / "set", ROWS, seed=1)
    source = Stream(Manifest.load(url(other)), StorageConfig(), config(tmp_path / "cache"))
    assert everything(source) == other.jpegs != crops.jpegs
    source.close()


@pytest.mark.slow
def test_disk__through_a_faulty_s3(
    crops: CropSet, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datapipe.storage.retry.FIRST_WAIT_S", 0.001)
    bucket = s3.bucket()
    for path in crops.folder.iterdir():
        s3.client.upload_file(str(path), bucket, f"set/{path.name}")
    with FaultyProxy(s3.endpoint, Faults(rate=0.4, seed=3)) as proxy:
        storage = StorageConfig(endpoint_url=proxy.endpoint, attempts=4, timeout_s=20)
        manifest = Manifest.load(f"s3://{bucket}/set", storage)
        source = Stream(manifest, storage, config(tmp_path / "cache"))
        assert everything(source) == crops.jpegs
        assert sum(proxy.met.values()) - proxy.met[""] > 3 and source.replaced == 0
        requests = proxy.met.total()
        assert everything(source) == crops.jpegs and proxy.met.total() == requests
        source.close()


def test_disk__a_crop_broken_in_the_store_is_replaced_and_the_others_are_kept(tmp_path: Path) -> None:
    broken = crop_set.write(tmp_path / "set", ROWS)
    broken.damage(7)
    broken.cut(18)
    source = Stream(Manifest.load(url(broken)), StorageConfig(), config(tmp_path / "cache"))
    served = {7: 8, 18: 15, 19: 15}
    for _ in range(2):
        fetched = source.fetch(np.arange(ROWS))
        assert fetched.rows.tolist() == [served.get(row, row) for row in range(ROWS)]
        assert fetched.data == [broken.jpegs[row] for row in fetched.rows]
    source.close()


def test_prepare__brings_blocks_in_before_they_are_asked_for(crops: CropSet, opened: Stream) -> None:
    rows = np.array([3, 4, 30])
    opened.prepare(rows, np.zeros(3, np.int64))
    opened.prepare(rows, np.zeros(3, np.int64))
    ahead = opened._now.reader.ahead
    assert ahead is not None
    ahead.shutdown()  # waits for what was asked for
    before = opened.bytes_read
    assert before > 0
    assert opened.fetch(rows).data == [crops.jpegs[row] for row in rows]
    assert opened.cached == (3, 3) and opened.bytes_read == before


def test_prepare__brings_in_as_much_of_the_next_window_as_there_is_room_for(
    crops: CropSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is switched off at once: less room, fewer blocks ahead; below a window some crops are read singly."""
    window = sum(map(len, crops.jpegs)) / ROWS * 3 * BLOCK / (1 - ROOM_MADE)
    found = []
    for number, windows in enumerate((0.5, 1.05, 1.5, 2.1)):
        caplog.clear()
        source = Stream(Manifest.load(url(crops)), StorageConfig(),
                        config(tmp_path / f"cache-{number}", cache_gb=windows * window / 1e9))  # fmt: skip
        reader = source._now.reader
        source.prepare(np.arange(ROWS), np.arange(ROWS) // (3 * BLOCK))
        assert reader.ahead is not None
        reader.ahead.shutdown()
        kept = int(reader.keeps(reader.blocks.first).sum())
        brought = sum(reader.cache.has(reader.blocks.key(block)) for block in range(len(reader.blocks.first)))  # type: ignore
        found.append((kept, brought))
        assert everything(source) == crops.jpegs
        assert ("stream.cache_gb = " in caplog.text) == (windows < 2)
        assert ("one by one" in caplog.text) == (windows < 1)
        source.close()
    total = len(reader.blocks.first)
    (half, none), (one, little), (all_, some), (_, most) = found
    assert 0 < half < total and none == 0 and one == all_ == total
    assert little <= some and 0 < some < total and most > 0


def test_passed__blocks_of_a_window_that_is_over_go_first(crops: CropSet, opened: Stream) -> None:
    """Though they were brought in after the ones that are still wanted."""
    reader = opened._now.reader
    assert reader.ahead is not None and isinstance(reader.cache, DiskCache)
    numbers = np.array([0, 1, 2])
    rows, turns = reader.blocks.first[numbers], np.array([8, 7, 9])
    for row, turn in zip(rows, turns, strict=True):
        opened.prepare(np.array([row]), np.array([turn]))
    reader.ahead.shutdown()
    opened.passed(rows, np.array([8, 9, 9]))
    age = {number: (reader.cache.folder / reader.blocks.key(number)).stat().st_mtime for number in numbers.tolist()}
    assert min(age, key=lambda number: age[number]) == 1
    assert age[1] < min(age[0], age[2]) - 1e8
    reader.cache.limit = held(reader.cache.folder)
    reader._bring(3)
    assert [reader.cache.has(reader.blocks.key(number)) for number in range(4)] == [True, False, True, True]


def test_prepare__a_retired_block_that_is_wanted_again_is_kept(crops: CropSet, opened: Stream) -> None:
    reader = opened._now.reader
    assert isinstance(reader.cache, DiskCache)
    path = reader.cache.folder / reader.blocks.key(0)
    reader._bring(0)
    written = path.stat().st_mtime
    reader.cache.retire(reader.blocks.key(0))
    assert path.stat().st_mtime < written - 1e8
    opened.prepare(np.array([0]), np.array([0]))
    assert reader.ahead is not None
    reader.ahead.shutdown()
    assert path.stat().st_mtime >= written


def test_disk__drops_removed_crops_when_it_is_next_opened(tmp_path: Path) -> None:
    crops = crop_set.write(tmp_path / "set", ROWS)
    source = Stream(Manifest.load(url(crops)), StorageConfig(), config(tmp_path / "cache"))
    everything(source)
    source.close()
    (tmp_path / "keys").write_text(f"{13:032x}\n")
    remove(str(crops.folder), RemoveConfig(keys=str(tmp_path / "keys"), workers=1), StorageConfig())
    source = Stream(Manifest.load(url(crops)), StorageConfig(), config(tmp_path / "cache"))
    assert not any(crops.jpegs[13] in path.read_bytes() for path in blocks(tmp_path / "cache"))
    assert len(blocks(tmp_path / "cache")) == BLOCKS - 2  # those of the other shards stay
    assert crops.jpegs[13] not in everything(source)
    source.close()


def test_disk__a_folder_that_cannot_be_used_is_refused(crops: CropSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="the cache cannot be used") as caught:
        Stream(Manifest.load(url(crops)), StorageConfig(), config(tmp_path / "file"))
    assert "cache_dir" in caught.value.hint and caught.value.where == str(tmp_path / "file")


# ----------------------------------------------------------------------------------------------------------- the folder


def test_add__the_oldest_make_room(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 1000)
    for number in range(30):
        cache.load(f"{number:02d}", [], lambda: bytes(90))
        assert held(tmp_path) <= 1000
    names = [path.name for path in blocks(tmp_path)]
    assert names == [f"{number:02d}" for number in range(30 - len(names), 30)] and len(names) >= 10
    assert cache.load("large", [(0, 2)], lambda: bytes(1001)) == [bytes(2)]
    assert not cache.has("large") and held(tmp_path) > 0
    DiskCache(str(tmp_path), 200)
    assert 0 < held(tmp_path) <= 200


@pytest.mark.parametrize("total", ["", "7", "9" * 20])
def test_add__a_wrong_total_is_mended_when_the_folder_is_next_opened(tmp_path: Path, total: str) -> None:
    DiskCache(str(tmp_path), 1000).load("a", [], lambda: bytes(900))
    (tmp_path / "lock").write_text(total)
    (tmp_path / "b.part").write_bytes(bytes(5000))  # begun by a process that died
    DiskCache(str(tmp_path), 1000).load("c", [], lambda: bytes(200))
    assert [path.name for path in blocks(tmp_path)] == ["c"]
    assert int((tmp_path / "lock").read_text()) == 200


def test_add__a_full_disk_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(str(tmp_path), 1000)

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for key in "abc":
        assert cache.load(key, [(1, 2)], lambda: b"0123") == [b"12"]
    assert caplog.text.count("No space left") == 1 and not blocks(tmp_path)


def test_load__one_fetches_and_the_others_wait(tmp_path: Path) -> None:
    begun, go_on, fetched = Event(), Event(), []

    def fetch() -> bytes:
        fetched.append(1)
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return b"abc"

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(DiskCache(str(tmp_path), 100).load, "key", [(0, 1)], fetch)
        assert begun.wait(PATIENCE_S)
        others = [pool.submit(DiskCache(str(tmp_path), 100).load, "key", [(1, 2)], fetch) for _ in range(2)]
        go_on.set()
        assert first.result(PATIENCE_S) == [b"a"] and [other.result(PATIENCE_S) for other in others] == [[b"bc"]] * 2
    assert len(fetched) == 1


def test_load__does_not_wait_for_a_halted_process_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caches, "PATIENCE_S", 0.02)
    cache, other = DiskCache(str(tmp_path), 100), DiskCache(str(tmp_path), 100)
    with other._turn("key"), other._alone():
        assert cache.load("key", [(0, 1)], lambda: b"abc") == [b"a"]
    assert "going on without it" in caplog.text and not cache.has("key")


def test_memory__a_failed_load_fails_all_who_wait_and_is_forgotten() -> None:
    cache, started, release = MemoryCache(100), Barrier(2), Event()

    def fail() -> bytes:
        started.wait(PATIENCE_S)
        release.wait(PATIENCE_S)
        raise DataError("gone")

    with ThreadPoolExecutor(2) as pool:
        owner = pool.submit(cache.load, "1", [(0, 4)], fail)
        started.wait(PATIENCE_S)
        waiter = pool.submit(cache.load, "1", [(0, 4)], lambda: b"late")  # waits, or comes after the failure
        release.set()
        assert isinstance(owner.exception(PATIENCE_S), DataError)
        assert isinstance(waiter.exception(PATIENCE_S), DataError) or waiter.result() == [b"late"]
    assert cache.load("2", [(0, 2)], lambda: b"ok") == [b"ok"] == cache.held("2", [(0, 2)])


# ---------------------------------------------------------------------------------------------------------- processes

READER = """
import sys
import numpy as np
from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.stream.stream import Stream
url, folder, gigabytes, seed, rounds = sys.argv[1:]
config = StreamConfig(block=5, window=1, cache_mb=0, cache_dir=folder, cache_gb=float(gigabytes), reads=3)
source = Stream(Manifest.load(url), StorageConfig(), config)
random = np.random.default_rng(int(seed))
for number in range(int(rounds)):
    fetched = source.fetch(random.integers(0, source.rows, 12))
    assert source.replaced == 0
    print(*fetched.rows, *map(hash, map(bytes, fetched.data)), flush=True)
source.close()
"""

HOLDER = """
import sys
from pathlib import Path
from datapipe.stream.disk_cache import DiskCache
cache = DiskCache(sys.argv[1], 1000)
with cache._turn("key"), cache._alone() as lock:
    cache._make_room(lock, 500)
    Path(sys.argv[1], "key.part").write_bytes(bytes(400))
    print("holds", flush=True)
    sys.stdin.read()
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, env=environment,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip


@pytest.mark.slow
def test_disk__two_processes_share_it_while_a_third_is_killed(crops: CropSet, tmp_path: Path) -> None:
    folder, limit = tmp_path / "cache", sum(map(len, crops.jpegs)) // 2
    largest = max(sum(map(len, crops.jpegs[low : low + BLOCK])) for low in range(0, ROWS, BLOCK))
    arguments = (url(crops), folder, limit / 1e9)
    readers = [start(READER, *arguments, seed, 60) for seed in range(2)]
    victim = start(READER, *arguments, 2, 10**9)
    sizes = []
    try:
        assert victim.stdout is not None
        for _ in range(20):
            assert victim.stdout.readline()
            sizes.append(folder_size(folder))
        victim.kill()
        outputs = [reader.communicate(timeout=PATIENCE_S)[0] for reader in readers]
    finally:
        for process in (victim, *readers):
            process.kill()
            process.wait()
    assert [reader.returncode for reader in readers] == [0, 0]
    for seed, output in enumerate(outputs):
        random = np.random.default_rng(seed)
        rows = [random.integers(0, ROWS, 12).tolist() for _ in range(60)]
        assert [[int(word) for word in line.split()[:12]] for line in output.splitlines()] == rows
    assert max(sizes) <= limit + 3 * largest
    assert limit // 2 < held(folder) <= limit
    assert int((folder / "lock").read_text()) >= held(folder)


def folder_size(folder: Path) -> int:
    """While others write and delete there."""
    total = 0
    for path in blocks(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.slow
def test_disk__the_locks_of_a_killed_process_are_free(tmp_path: Path) -> None:
    holder = start(HOLDER, tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
    holder.kill()
    holder.wait()
    assert (tmp_path / "key.part").exists()
    cache = DiskCache(str(tmp_path), 1000)
    assert cache.load("key", [(0, 3)], lambda: b"abc") == [b"abc"] == cache.held("key", [(0, 3)])
    assert not (tmp_path / "key.part").exists() and int((tmp_path / "lock").read_text()) == 3


def test_stream__works_without_any_cache(crops: CropSet, caplog: pytest.LogCaptureFixture) -> None:
    source = Stream(Manifest.load(url(crops)), StorageConfig(), StreamConfig(block=5, window=3, cache_mb=0, cache_gb=0))
    assert everything(source) == crops.jpegs and "one by one" in caplog.text
    source.close()
