"""Bytes by sample id: right, checked, replaced where broken, never waited for in vain."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.core.errors import DataError
from datapipe.dataset.manifest import Manifest
from datapipe.storage import open_store
from datapipe.stream.memory_cache import MemoryCache
from datapipe.stream.stream import Stream
from tests.datapipe import crop_set
from tests.datapipe.crop_set import CropSet

CACHED = StreamConfig(block=7, window=3, max_bad=1.0)
DIRECT = StreamConfig(block=7, window=3, max_bad=1.0, cache_mb=0, cache_gb=0)


@pytest.fixture
def crops(tmp_path: Path) -> CropSet:
    return crop_set.write(tmp_path / "set", 35)


def stream(crops: CropSet, config: StreamConfig = CACHED) -> Stream:
    return Stream(Manifest.load(str(crops.folder)), StorageConfig(), config)


def everything(source: Stream) -> list[bytes]:
    return source.fetch(np.arange(source.rows)).data


@pytest.mark.parametrize("config", [CACHED, DIRECT])
def test_fetch__gives_each_sample_its_bytes(crops: CropSet, config: StreamConfig) -> None:
    asked = np.array([34, 0, 9, 10, 11, 0, 20, 19])
    fetched = stream(crops, config).fetch(asked)
    assert fetched.data == [crops.jpegs[row] for row in asked]
    np.testing.assert_array_equal(fetched.rows, asked)
    assert everything(stream(crops, config)) == crops.jpegs


def test_fetch__reads_a_block_once(crops: CropSet) -> None:
    source = stream(crops)
    for _ in range(3):
        everything(source)
    assert source.bytes_read < sum((crops.folder / shard.name).stat().st_size for shard in crops.manifest.shards)


def test_fetch__joins_neighbours_but_does_not_read_what_is_far_between(tmp_path: Path) -> None:
    crops = crop_set.write(tmp_path / "set", 300, per_shard=300)
    source = stream(crops, DIRECT)
    source.fetch(np.array([0, 299]))
    assert source.bytes_read == len(crops.jpegs[0]) + len(crops.jpegs[299])
    source.fetch(np.array([0, 1, 2]))
    assert source.bytes_read > len(crops.jpegs[299]) + sum(map(len, crops.jpegs[:3])) + len(crops.jpegs[0]) + 1024


def test_fetch__keeps_no_more_than_the_cache_may_hold(tmp_path: Path) -> None:
    crops = crop_set.write(tmp_path / "set", 60)
    limit = sum(map(len, crops.jpegs[:30]))
    source = stream(crops, StreamConfig(block=5, window=3, cache_mb=limit / 1e6))
    assert everything(source) == crops.jpegs
    cache = source._now.reader.cache
    assert isinstance(cache, MemoryCache)
    held = sum(len(block.result()) for block in cache._blocks.values())
    assert 0 < held <= limit and held == cache._held


def test_fetch__many_threads_get_the_right_bytes(crops: CropSet) -> None:
    source = stream(crops, StreamConfig(block=7, window=1, cache_mb=sum(map(len, crops.jpegs[:20])) / 1e6))
    asked = [np.random.default_rng(seed).integers(0, 35, 20) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for samples, fetched in zip(asked, pool.map(source.fetch, asked), strict=True):
            assert fetched.data == [crops.jpegs[row] for row in samples]


@pytest.mark.parametrize("config", [CACHED, DIRECT])
def test_fetch__reads_from_other_stores_in_parallel(
    crops: CropSet, config: StreamConfig, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(f"memory://{crops.folder.parent.name}")
    for path in crops.folder.iterdir():
        store.replace(path.name, path)
    source = Stream(Manifest.load(store.url), StorageConfig(), config)
    assert everything(source) == crops.jpegs
    assert ("one by one" in caplog.text) == (config is DIRECT)
    source.close()


def test_fetch__several_requests_are_in_flight(crops: CropSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four blocks' reads waits for the other three."""
    source = Stream(Manifest.load(f"local://{crops.folder}"), StorageConfig(), replace(CACHED, reads=4))
    store, together = source._now.reader.store, Barrier(4)
    read = store.read

    def held(name: str, *, start: int = 0, size: int | None = None) -> bytes:
        together.wait(300)
        return read(name, start=start, size=size)

    monkeypatch.setattr(store, "read", held)
    assert source.fetch(np.array([0, 7, 14, 28])).data == [crops.jpegs[row] for row in (0, 7, 14, 28)]
    source.close()


@pytest.mark.slow
def test_fetch__reads_from_s3(crops: CropSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        storage = StorageConfig(endpoint_url="http://{}:{}".format(*server.get_host_and_port()), attempts=2)
        boto3.client("s3", endpoint_url=storage.endpoint_url, region_name="us-east-1").create_bucket(Bucket="crops")
        store = open_store("s3://crops/set", storage)
        for path in crops.folder.iterdir():
            store.replace(path.name, path)
        for config in (CACHED, DIRECT):
            source = Stream(Manifest.load(store.url, storage), storage, config)
            assert everything(source) == crops.jpegs
            source.close()
        store.delete("shard-001.tar")
        source = Stream(Manifest.load(store.url, storage), storage, CACHED)
        with pytest.raises(DataError, match=r"shard-001\.tar of the data set is missing"):
            everything(source)
        source.close()
    finally:
        server.stop()


def test_labels__are_those_of_the_index(crops: CropSet) -> None:
    source = stream(crops)
    np.testing.assert_array_equal(source.pid, np.arange(35) // 2)
    np.testing.assert_array_equal(source.camera, np.arange(35) % 3 + 1)


@pytest.mark.parametrize("config", [CACHED, DIRECT])
def test_fetch__replaces_a_damaged_crop_by_the_next_of_its_block(
    crops: CropSet, config: StreamConfig, caplog: pytest.LogCaptureFixture
) -> None:
    crops.damage(3)
    crops.damage(4)
    crops.damage(13)  # the last of its block: the first takes its place
    source = stream(crops, config)
    with caplog.at_level(logging.WARNING):
        fetched = source.fetch(np.array([2, 3, 4, 13]))
    assert fetched.rows.tolist() == [2, 5, 5, 7]
    assert fetched.data == [crops.jpegs[row] for row in (2, 5, 5, 7)]
    assert source.replaced == 3
    assert "crop 3 in" in caplog.text and "shard-000.tar" in caplog.text and "checksum" in caplog.text
    assert source.fetch(np.array([13, 3])).rows.tolist() == [7, 5]
    assert source.replaced == 5


def test_fetch__a_tar_that_is_cut_counts_as_broken_crops(crops: CropSet) -> None:
    crops.cut(25)
    source = stream(crops, StreamConfig(block=7, window=3, max_bad=0.002))
    assert source.fetch(np.arange(25)).data == crops.jpegs[:25]
    with pytest.raises(DataError, match=r"5 of the 60 crops read so far are broken.*0\.20%") as caught:
        everything(source)
    assert "shard-002.tar" in caught.value.where and "verify" in caught.value.hint


def test_fetch__one_broken_crop_does_not_end_a_run(crops: CropSet) -> None:
    crops.damage(3)
    source = stream(crops, StreamConfig(block=7, window=3))
    assert source.config.max_bad == 0.001
    everything(source)
    assert source.replaced == 1
    with pytest.raises(DataError, match="2 of the 70 crops"):
        everything(source)


def test_fetch__a_block_without_a_sound_crop_is_named(crops: CropSet) -> None:
    for row in range(7, 14):
        crops.damage(row)
    with pytest.raises(DataError, match="none of the 7 crops from number 7 on"):
        stream(crops).fetch(np.array([8]))


@pytest.mark.parametrize("config", [CACHED, DIRECT])
def test_fetch__a_missing_shard_is_named(crops: CropSet, config: StreamConfig) -> None:
    (crops.folder / "shard-001.tar").unlink()
    source = stream(crops, config)
    assert source.fetch(np.array([1, 2])).data == crops.jpegs[1:3]
    for _ in range(2):
        with pytest.raises(DataError, match=r"shard-001\.tar of the data set is missing") as caught:
            source.fetch(np.array([12]))
        assert str(crops.folder) in caught.value.where


def test_replace__gives_another_crop_once_for_all_threads(crops: CropSet) -> None:
    source = stream(crops)
    first = source.replace(5, 5, "does not decode")
    assert (first.rows.tolist(), first.data) == ([6], [crops.jpegs[6]])
    again = source.replace(5, 5, "does not decode")  # another thread that had fetched row 5 as well
    assert again.rows.tolist() == [6]
    assert source.replace(5, 6, "does not decode").rows.tolist() == [0]
    assert source.fetch(np.array([5, 4])).rows.tolist() == [0, 4]


def test_stream__works_with_one_sample_and_refuses_none(tmp_path: Path) -> None:
    one = crop_set.write(tmp_path / "one", 1)
    assert everything(stream(one, StreamConfig())) == one.jpegs
    none = crop_set.write(tmp_path / "none", 0)
    with pytest.raises(DataError, match="no crops"):
        stream(none, StreamConfig())
