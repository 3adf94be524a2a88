"""The packed index: equal to the indexes it is made of, fetched once a machine, never believed where it is wrong."""

import logging
import multiprocessing
import os
import shutil
import signal
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from datapipe.core.config import RemoveConfig, SelectConfig, StorageConfig, StreamConfig
from datapipe.core.errors import DataError, RefusedError
from datapipe.dataset import packed_index
from datapipe.dataset.index import Shard
from datapipe.dataset.manifest import ORDINAL, Manifest
from datapipe.dataset.packed_index import NAME, pack, packed_entries, unpack
from datapipe.dataset.verify import verify
from datapipe.maintain.remove import remove
from datapipe.maintain.repair import repair
from datapipe.maintain.select import select
from datapipe.storage import open_store
from datapipe.storage.fsspec_store import FsspecStore
from datapipe.stream import index_cache
from datapipe.stream.block_reader import Blocks, Places
from datapipe.stream.mixed_stream import MixedStream
from datapipe.stream.stream import Stream
from datapipe.stream.training_data import load_data
from tests.conftest import S3Server
from tests.datapipe import crop_set
from tests.datapipe.crop_set import CropSet
from tests.support.faulty_proxy import FaultyProxy

ROWS = 45
STORAGE = StorageConfig()
RANKS = 8
COLUMNS = [ORDINAL, "offset", "size", "xxh3", "pid", "camera"]


@pytest.fixture
def crops(tmp_path: Path) -> CropSet:
    return crop_set.write(tmp_path / "set", ROWS)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every packed index is large enough for the cache, and is fetched in several parts."""
    monkeypatch.setattr(index_cache, "SMALL_ROWS", 0)
    monkeypatch.setattr(packed_index, "LEAST_PART", 4096)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each object was read through fsspec: "read NAME"."""
    counts: Counter[str] = Counter()
    read = FsspecStore.read

    def counted(self: FsspecStore, name: str, **where: Any) -> bytes:
        counts[f"read {name}"] += 1
        return read(self, name, **where)

    monkeypatch.setattr(FsspecStore, "read", counted)
    yield counts


def url(crops: CropSet) -> str:
    """The data set as object storage has it: fetched, never linked."""
    return f"local://{crops.folder}"


def config(cache: Path) -> StreamConfig:
    return StreamConfig(block=5, window=3, cache_dir=str(cache), max_bad=1.0)


def opened(address: str, cache: Path) -> Stream:
    return Stream(Manifest.load(address), STORAGE, config(cache))


def everything(source: Stream) -> list[bytes]:
    data = source.fetch(np.arange(source.rows)).data
    source.close()
    return data


def packed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if NAME.fullmatch(path.name))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def with_columns(crops: CropSet, folder: Path, **columns: Any) -> Manifest:
    """The same shards with indexes in which these columns are functions of what they were."""
    store, shards = open_store(str(folder)), []
    for shard in crops.manifest.shards:
        table = pyarrow.parquet.read_table(crops.folder / shard.index)
        for name, change in columns.items():
            place = table.column_names.index(name)
            values = pyarrow.array(change(table[name].to_numpy()), table.schema.field(name).type)
            table = table.set_column(place, name, values)
        sink = BytesIO()
        pyarrow.parquet.write_table(table, sink)
        store.create(shard.index, sink.getvalue())
        end = int((table["offset"].to_numpy() + table["size"].to_numpy()).max())
        sizes = {"bytes": max(shard.bytes, end), "index_sha256": sha256(sink.getvalue()).hexdigest()}
        shards.append(replace(shard, **sizes))
    return Manifest(tuple(shards)).save(store)


def packed_and_compared(manifest: Manifest, folder: Path) -> bytes:
    """The packed index of a version, which says of each row what the indexes say."""
    with open(folder / f"made-{manifest.id[:8]}", "x+b") as file:
        digest = pack(manifest, file, STORAGE)
        file.seek(0)
        data = file.read()
    assert sha256(data).hexdigest() == digest
    index, table, rows = unpack(data, manifest, "here"), manifest.table(COLUMNS), np.arange(manifest.rows)
    places = Places(manifest.shards, index.starts, index.offset, index.size, index.xxh3, index.unit)
    found = {ORDINAL: places.shard(rows), "offset": places.offset(rows), "size": index.size, "xxh3": index.xxh3,
             "pid": index.pid, "camera": index.camera}  # fmt: skip
    for name, column in found.items():
        np.testing.assert_array_equal(column, table[name].to_numpy(), err_msg=name)
    assert index.jpeg_bytes == int(table["size"].to_numpy().sum())
    return data


# ------------------------------------------------------------------------------------------------------------ the file


def test_pack__says_what_the_indexes_say(crops: CropSet, tmp_path: Path) -> None:
    whole = packed_and_compared(crops.manifest, tmp_path)
    part = select(str(crops.folder), SelectConfig(fraction=0.4), STORAGE).manifest
    assert len(packed_and_compared(part, tmp_path)) < len(whole) and part.rows == 18
    nobody = with_columns(crops, tmp_path / "nobody", pid=lambda pid: pid * 0 - 1, camera=lambda camera: camera * 0 - 1)
    assert len(packed_and_compared(nobody, tmp_path)) < len(whole)
    someone = with_columns(crops, tmp_path / "someone", pid=lambda pid: pid * 0 - 1)
    packed_and_compared(someone, tmp_path)
    for folder, change in (("odd", lambda offset: offset + 1), ("far", lambda offset: offset + (512 << 32))):
        packed_and_compared(with_columns(crops, tmp_path / folder, offset=change), tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "other version", "columns", "footer"])
def test_unpack__refuses_what_is_no_packed_index_of_the_version(crops: CropSet, tmp_path: Path, damage: str) -> None:
    data = packed_and_compared(crops.manifest, tmp_path)
    manifest = crops.manifest
    if damage == "other version":
        manifest = replace(manifest, name="other")
    elif damage == "columns":
        data = data.replace(b'"size":["<i4"', b'"size":["<i8"')
    elif damage == "footer":
        data = data[:-9] + b"\xff" + data[-8:]
    with pytest.raises(DataError, match="the packed index cannot be used"):
        unpack({"cut": data[:-1], "empty": b""}.get(damage, data), manifest, "here")


def test_blocks__where_crops_begin() -> None:
    random = np.random.default_rng(0)
    size = random.integers(0, 100, 40).astype(np.int32)
    shard = Shard("a.tar", 0, 0, "", "a.parquet", "")
    places = Places((shard,) * 4, np.array([0, 13, 13, 27, 40]), np.zeros(40, np.uint32), size, np.zeros(40, np.uint64))
    blocks = Blocks(places, 5)
    assert blocks.first.tolist() == [0, 5, 10, 13, 15, 20, 25, 27, 30, 35]
    for rows in (np.arange(40), np.array([3, 4, 12, 13, 26, 27, 39]), np.array([11]), np.array([], np.int64)):
        naive = [int(size[blocks.first[blocks.of(np.array([row]))[0]] : row].sum()) for row in rows.tolist()]
        assert blocks.start(rows).tolist() == naive
    assert places.shard(np.array([12, 13, 39])).tolist() == [0, 2, 3]


# --------------------------------------------------------------------------------------------------- once on a machine


@pytest.mark.usefixtures("large")
def test_open__packs_once_and_reads_no_index_after_that(crops: CropSet, tmp_path: Path, asked: Counter[str]) -> None:
    """An old data set; then another machine, whose cache is empty; then that one again."""
    assert everything(opened(url(crops), tmp_path / "one")) == crops.jpegs
    (file,) = packed(crops.folder)
    assert all(asked[f"read {shard.index}"] == 1 for shard in crops.manifest.shards)
    for shard in crops.manifest.shards:
        (crops.folder / shard.index).unlink()
    asked.clear()
    assert everything(opened(url(crops), tmp_path / "two")) == crops.jpegs
    parts = asked.pop(f"read {file.name}")
    assert parts == -(-file.stat().st_size // 4096) > 1
    assert not any(name.endswith(("parquet", "index")) for name in asked)
    asked.clear()
    source = opened(url(crops), tmp_path / "two")
    assert set(asked) == {f"read {crops.manifest.file}"}
    np.testing.assert_array_equal(source.pid, np.arange(ROWS) // 2)
    np.testing.assert_array_equal(source.camera, np.arange(ROWS) % 3 + 1)
    assert everything(source) == crops.jpegs


@pytest.mark.usefixtures("large")
def test_open__of_a_local_folder_shares_its_file(crops: CropSet, tmp_path: Path) -> None:
    for _ in range(2):
        assert everything(opened(str(crops.folder), tmp_path / "cache")) == crops.jpegs
    shutil.rmtree(tmp_path / "cache")
    assert everything(opened(str(crops.folder), tmp_path / "cache")) == crops.jpegs
    (file,), (cached,) = packed(crops.folder), packed(tmp_path / "cache" / "indexes")
    assert file.samefile(cached) and cached.name == file.name


def test_open__a_small_one_leaves_no_file_in_the_cache(crops: CropSet, tmp_path: Path, asked: Counter[str]) -> None:
    for _ in range(3):
        assert everything(opened(url(crops), tmp_path / "cache")) == crops.jpegs
    (file,) = packed(crops.folder)
    assert asked[f"read {file.name}"] == 2 and asked[f"read {crops.manifest.shards[0].index}"] == 1
    assert not packed(tmp_path / "cache" / "indexes")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("made_before", [False, True])
def test_open__ranks_that_start_together_fetch_once(
    crops: CropSet, tmp_path: Path, asked: Counter[str], made_before: bool
) -> None:
    if made_before:
        opened(url(crops), tmp_path / "other machine").close()
        asked.clear()
    together = Barrier(RANKS)

    def rank(_: int) -> list[bytes]:
        manifest = Manifest.load(url(crops))
        together.wait(300)
        return everything(Stream(manifest, STORAGE, config(tmp_path / "cache")))

    with ThreadPoolExecutor(RANKS) as pool:
        assert list(pool.map(rank, range(RANKS))) == [crops.jpegs] * RANKS
    (file,) = packed(crops.folder)
    assert asked[f"read {file.name}"] == (-(-file.stat().st_size // 4096) if made_before else 0)
    assert {asked[f"read {shard.index}"] for shard in crops.manifest.shards} == {0 if made_before else 1}
    assert sorted(path.suffix for path in (tmp_path / "cache" / "indexes").iterdir()) == [".index", ".seen"]


def _fetch_for_ever(address: str, cache: Path, begun: Any) -> None:
    """In a process that is killed while the second part is under way."""
    index_cache.SMALL_ROWS, packed_index.LEAST_PART, packed_index.PARTS_IN_FLIGHT = 0, 4096, 1
    read = FsspecStore.read

    def stop(self: FsspecStore, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        if name.endswith(".index") and start:
            begun.set()
            signal.pause()
        return read(self, name, start=start, size=size)

    FsspecStore.read = stop  # type: ignore[method-assign]
    opened(address, cache)


@pytest.mark.usefixtures("large")
def test_open__after_a_fetch_that_was_killed(crops: CropSet, tmp_path: Path) -> None:
    opened(url(crops), tmp_path / "other machine").close()
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=_fetch_for_ever, args=(url(crops), tmp_path / "cache", begun))
    process.start()
    assert begun.wait(300) and process.pid
    folder = tmp_path / "cache" / "indexes"
    assert [path.suffix for path in folder.iterdir()] == [".part"]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert everything(opened(url(crops), tmp_path / "cache")) == crops.jpegs
    assert sorted(path.suffix for path in folder.iterdir()) == [".index", ".seen"]


@pytest.mark.usefixtures("large")
def test_open__goes_on_without_one_who_does_not_get_on(
    crops: CropSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_cache, "PATIENCE_S", 0.01)
    half = tmp_path / "cache" / "indexes" / f"{packed_index.prefix(crops.manifest.id)}0.part"
    turn = index_cache.turn_of(tmp_path / "cache", packed_index.prefix(crops.manifest.id))
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    with index_cache.locked(turn) as lock:
        assert lock is not None
        assert everything(opened(url(crops), tmp_path / "cache")) == crops.jpegs
    assert "going on without it" in caplog.text and half.exists()  # whose file it is may still write


# ------------------------------------------------------------------------------------------------- what is not believed


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("damage", ["changed", "cut", "of another version"])
def test_open__a_wrong_file_of_the_data_set_is_replaced(
    crops: CropSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: str,
    small: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(index_cache, "SMALL_ROWS", ROWS if small else 0)
    opened(url(crops), tmp_path / "one").close()
    (file,) = packed(crops.folder)
    good = file.read_bytes()
    if damage == "of another version":
        data = good.replace(crops.manifest.id.encode(), b"f" * 64)
        file.unlink()
        file = file.with_name(f"{packed_index.prefix(crops.manifest.id)}{sha256(data).hexdigest()}.index")
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(good[:-5])
    else:
        flip(file, 4096 + 7)
    assert everything(opened(url(crops), tmp_path / "two")) == crops.jpegs
    assert "made anew" in caplog.text and str(crops.folder) in caplog.text
    (file,) = packed(crops.folder)
    assert file.read_bytes() == good


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("linked", [False, True])
def test_open__a_wrong_file_of_the_cache_is_replaced(
    crops: CropSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, linked: bool
) -> None:
    address = str(crops.folder) if linked else url(crops)
    for _ in range(2):
        opened(address, tmp_path / "cache").close()
    (file,) = packed(tmp_path / "cache" / "indexes")
    good = file.read_bytes()
    flip(file, 4096 + 7)
    assert everything(opened(address, tmp_path / "cache")) == crops.jpegs
    assert "is damaged" in caplog.text
    (file,) = packed(tmp_path / "cache" / "indexes")
    assert file.read_bytes() == good


@pytest.mark.parametrize("small", [True, False])
def test_open__of_a_data_set_that_cannot_be_written(
    crops: CropSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, small: bool,
    asked: Counter[str],
) -> None:  # fmt: skip
    def refused(*_: Any) -> None:
        raise RefusedError("writing is not allowed", where=str(crops.folder))

    monkeypatch.setattr(index_cache, "SMALL_ROWS", ROWS if small else 0)
    monkeypatch.setattr(FsspecStore, "replace", refused)
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert everything(opened(url(crops), tmp_path / "cache")) == crops.jpegs
    (said,) = [record.getMessage() for record in caplog.records if "index" in record.getMessage()]
    assert "cannot be written" in said and str(tmp_path / "cache") in said and url(crops) in said
    assert not packed(crops.folder) and {asked[f"read {shard.index}"] for shard in crops.manifest.shards} == {1}


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.usefixtures("large")
def test_open__without_a_cache(
    crops: CropSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, made_before: bool
) -> None:
    if made_before:
        opened(url(crops), tmp_path / "one").close()
    (tmp_path / "file").write_text("")
    assert everything(opened(url(crops), tmp_path / "file")) == crops.jpegs
    assert "in the memory of each process" in caplog.text and len(packed(crops.folder)) == 1


def test_open__without_a_packed_index_names_a_damaged_index(crops: CropSet, tmp_path: Path) -> None:
    flip(crops.folder / crops.manifest.shards[1].index, 9)
    with pytest.raises(DataError, match="not the one that was written") as caught:
        opened(url(crops), tmp_path / "cache")
    assert crops.manifest.shards[1].index in caught.value.where and not packed(crops.folder)


# --------------------------------------------------------------------------------------------- versions come and go


@pytest.mark.usefixtures("large")
def test_remove__leaves_no_row_in_packed_files(crops: CropSet, tmp_path: Path) -> None:
    """Neither in the data set nor in caches; also in what a reader of the old version writes meanwhile."""
    part = select(str(crops.folder), SelectConfig(fraction=0.6), STORAGE).manifest
    versions, cache = (crops.manifest, part), tmp_path / "cache"
    for version in versions:
        Stream(version, STORAGE, config(cache)).close()
    before = {path.name: path.read_bytes() for path in packed(crops.folder)}
    old = before.keys()
    assert len(old) == 2 and {path.name for path in packed(cache / "indexes")} == old
    key = int(part.selected()[3])
    hashes = crops.manifest.table(["xxh3"])["xxh3"].to_numpy()
    gone = hashes[key].tobytes()
    (tmp_path / "keys").write_text(f"{key:032x}\n")
    done = remove(str(crops.folder), RemoveConfig(keys=str(tmp_path / "keys"), workers=1, runs=(str(cache),)), STORAGE)
    new = {path.name for path in packed(crops.folder)}
    assert len(new) == 2 and not new & old and not packed(cache / "indexes")
    assert not any(gone in path.read_bytes() for path in crops.folder.rglob("*.index"))
    assert sorted(name for address in done.cleared.deleted for name in old if address.endswith(name)) == sorted(old)
    for file in done.versions:
        manifest = Manifest.load(f"{crops.folder}/{file}")
        assert len(packed_entries(open_store(str(crops.folder)), manifest)) == 1
        packed_and_compared(manifest, tmp_path)
    store = open_store(str(crops.folder))
    for version in versions:
        (name,) = (name for name in old if packed_index.of_version(name, version.id))
        packed_index.publish(store, version, packed_index.stated_sha256(name), before[name])
        packed_index.ensure_packed(version, STORAGE)
    assert {path.name for path in packed(crops.folder)} == new


@pytest.mark.usefixtures("large")
def test_open__drops_what_the_version_took_the_place_of_from_the_cache(crops: CropSet, tmp_path: Path) -> None:
    opened(url(crops), tmp_path / "cache").close()
    (old,) = packed(tmp_path / "cache" / "indexes")
    (tmp_path / "keys").write_text(f"{13:032x}\n")
    remove(str(crops.folder), RemoveConfig(keys=str(tmp_path / "keys"), workers=1), STORAGE)
    opened(url(crops), tmp_path / "cache").close()
    (new,) = packed(tmp_path / "cache" / "indexes")
    assert new != old
    os.utime(new.with_suffix(".seen"), (0, 0))  # nobody has used it for long, and another one comes
    opened(url(crop_set.write(tmp_path / "other", 5)), tmp_path / "cache").close()
    assert not new.exists() and len(packed(tmp_path / "cache" / "indexes")) == 1


def test_verify__finds_a_wrong_packed_index_and_mends_it(crops: CropSet, tmp_path: Path) -> None:
    packed_index.ensure_packed(crops.manifest, STORAGE)
    (file,) = packed(crops.folder)

    def found() -> list[str]:
        findings = verify(str(crops.folder), "none", STORAGE, workers=1).findings
        return [finding.where for finding in findings if finding.where.endswith(".index")]

    good = file.read_bytes()
    assert found() == []
    flip(file, 4096)
    assert found() == [file.name]
    repair(str(crops.folder), STORAGE, workers=1)
    assert found() == [] and file.read_bytes() == good
    file.unlink()
    assert found() == []
    repair(str(crops.folder), STORAGE, workers=1)
    assert file.read_bytes() == good


def test_labels__of_some_rows_are_those_of_all(crops: CropSet, tmp_path: Path) -> None:
    other = crop_set.write(tmp_path / "other", 20, seed=2)
    mixed = load_data(replace(config(tmp_path / "cache"), mix=(str(crops.folder), str(other.folder))), STORAGE)
    stream = mixed.stream(STORAGE, config(tmp_path / "cache"))
    assert isinstance(stream, MixedStream)
    rows = np.array([64, 0, 44, 45, 3])
    for source in (stream, *stream.streams):
        some = rows[rows < source.rows]
        pid, camera = source.labels(some)
        np.testing.assert_array_equal(pid, source.pid[some])
        np.testing.assert_array_equal(camera, source.camera[some])
        replaced = source.replaced
        assert source.peek(some) == source.fetch(some).data and source.replaced == replaced
    stream.close()


# ------------------------------------------------------------------------------------------------ how much it may cost


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("sets", [1, 5])
def test_requests__of_a_machine_at_a_start_a_restart_and_a_resize(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch, sets: int
) -> None:
    """Eight ranks, one of which reads the manifests for all; the packed index of each data set of a mix comes in as
    many parts as there may be."""
    monkeypatch.setattr(packed_index, "LEAST_PART", 1)
    bucket, addresses, files = s3.bucket(), [], []
    for number in range(sets):
        crops = crop_set.write(tmp_path / f"set-{number}", ROWS + number)
        packed_index.ensure_packed(crops.manifest, STORAGE)
        files += packed(crops.folder)
        addresses.append(f"s3://{bucket}/{number}")
        for path in crops.folder.iterdir():
            s3.client.upload_file(str(path), bucket, f"{number}/{path.name}")
    named = {"mix": tuple(addresses)} if sets > 1 else {"manifest": addresses[0]}
    parts = sets * packed_index.PARTS
    with FaultyProxy(s3.endpoint) as proxy:
        storage = replace(s3.storage, endpoint_url=proxy.endpoint)

        def start(ranks: int, cache: Path) -> int:
            before = proxy.met.total()
            data = load_data(StreamConfig(**named), storage)  # type: ignore[arg-type]
            for _ in range(ranks):
                data.stream(storage, config(cache)).close()
            return proxy.met.total() - before

        first = start(RANKS, tmp_path / "cache")
        assert parts <= first <= 100
        assert start(RANKS, tmp_path / "cache") == start(2 * RANKS, tmp_path / "cache") <= first - parts
        assert not any("parquet" in request for request in proxy.seen)
        assert len(files) == sets and all(sum(file.name in request for request in proxy.seen) for file in files)


def test_parts__of_very_large_indexes_are_few_and_do_not_fill_the_memory() -> None:
    """1e8 crops: 1.6 to 2.6 GB."""
    assert [len(packed_index.parts_of(size)[0]) for size in (0, 1, 32 << 20, 1 << 30)] == [0, 1, 1, 16]
    for size in (5 << 20, 300 << 20, 1_600_000_000, 2_600_000_000, 10_000_000_000):
        parts, at_a_time = packed_index.parts_of(size)
        assert len(parts) <= packed_index.PARTS and parts.step >= packed_index.LEAST_PART
        assert at_a_time * parts.step <= max(packed_index.MOST_IN_FLIGHT, parts.step) and at_a_time >= 1
        assert at_a_time == packed_index.PARTS_IN_FLIGHT or size > 1 << 30


def repeated(crops: CropSet, folder: Path, shards: int) -> str:
    """A data set of so many shards, without their tars, which have the same 10,000 rows each."""
    table = pyarrow.parquet.read_table(crops.folder / crops.manifest.shards[0].index)
    sink, store = BytesIO(), open_store(str(folder))
    pyarrow.parquet.write_table(table.take(np.arange(10_000) % len(table)), sink)
    store.create("a.parquet", sink.getvalue())
    index = ("a.parquet", sha256(sink.getvalue()).hexdigest())
    tars = ((f"{number}.tar", 10_000, 1 << 40, sha256(bytes([number])).hexdigest()) for number in range(shards))
    return Manifest(tuple(Shard(*tar, *index) for tar in tars)).save(store).url


@pytest.mark.usefixtures("large")
def test_memory__of_a_process_does_not_grow_with_the_rows(crops: CropSet, tmp_path: Path) -> None:
    held, some = [], np.arange(0, 20_000, 97)
    for shards in (2, 100):
        address = repeated(crops, tmp_path / f"{shards}", shards)
        settings = StreamConfig(cache_dir=str(tmp_path / "cache"))
        Stream(Manifest.load(address), STORAGE, settings).close()
        tracemalloc.start()
        try:
            source = Stream(Manifest.load(address), STORAGE, settings)
            source._now.reader.blocks.start(some)
            source.labels(some)
            held.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        source.close()
        assert source.rows == shards * 10_000
    assert held[1] < held[0] + 500_000  # half a byte a row
