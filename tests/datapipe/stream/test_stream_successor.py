"""Crops are removed while a stream is read: the same rows go on, from the version that took the place."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.config import RemoveConfig, StorageConfig, StreamConfig
from datapipe.core.errors import DataError
from datapipe.dataset.manifest import Manifest
from datapipe.maintain.remove import remove
from datapipe.stream.stream import Stream
from tests.datapipe import crop_set
from tests.datapipe.crop_set import CropSet

ROWS, GONE = 35, 13


@pytest.fixture
def crops(tmp_path: Path) -> CropSet:
    return crop_set.write(tmp_path / "set", ROWS)


@pytest.fixture(params=["kept descriptors", "memory", "disk"])
def open_stream(request: pytest.FixtureRequest, crops: CropSet, tmp_path: Path) -> Callable[[], Stream]:
    """A stream whose memory of what it has read is of this kind."""
    url = str(crops.folder) if request.param == "kept descriptors" else f"local://{crops.folder}"
    config = StreamConfig(block=7, window=2, cache_mb=1 if request.param == "memory" else 0,
                          cache_dir=str(tmp_path / "cache"))  # fmt: skip
    return lambda: Stream(Manifest.load(url), StorageConfig(), config)


def take_out(crops: CropSet, row: int = GONE) -> None:
    keys = crops.folder.with_name(f"keys-{row}")
    keys.write_text(f"{row:032x}\n")
    remove(str(crops.folder), RemoveConfig(keys=str(keys), workers=1), StorageConfig())


def test_fetch__goes_on_with_the_version_that_took_the_place(
    crops: CropSet, open_stream: Callable[[], Stream], caplog: pytest.LogCaptureFixture
) -> None:
    source, untouched = open_stream(), np.array([0, 1, 2])
    assert source.fetch(untouched).data == crops.jpegs[:3]
    before = source.manifests
    take_out(crops)
    rows = np.array([25, GONE, 12, GONE])
    fetched = source.fetch(rows)
    np.testing.assert_array_equal(fetched.rows, rows)
    substitute = fetched.data[1]
    assert fetched.data == [crops.jpegs[25], substitute, crops.jpegs[12], substitute]
    assert substitute in crops.jpegs[10:20] and substitute != crops.jpegs[GONE]
    assert source.pid[GONE] == crops.jpegs.index(substitute) // 2
    (now,) = source.manifests
    assert before[0].id in now.replaces and now.file in caplog.text
    assert source.fetch(untouched).data == crops.jpegs[:3] and source.replaced == 0
    source.close()
    again = open_stream()
    assert again.fetch(rows).data == fetched.data
    again.close()


def test_fetch__removals_may_follow_one_another(crops: CropSet) -> None:
    source = Stream(Manifest.load(str(crops.folder)), StorageConfig(), StreamConfig(block=7, cache_mb=0))
    for row in (3, 23, 4):
        take_out(crops, row)
    kept = [row for row in range(ROWS) if row not in (3, 4, 23)]
    assert source.fetch(np.array(kept)).data == [crops.jpegs[row] for row in kept]
    assert not {crops.jpegs[row] for row in (3, 4, 23)} & set(source.fetch(np.array([3, 4, 23])).data)
    source.close()


def test_fetch__many_threads_go_over_together(crops: CropSet, caplog: pytest.LogCaptureFixture) -> None:
    source = Stream(Manifest.load(f"local://{crops.folder}"), StorageConfig(), StreamConfig(cache_mb=0, cache_gb=0))
    take_out(crops)
    kept = np.array([row for row in range(ROWS) if row != GONE])
    with ThreadPoolExecutor(6) as pool:
        for fetched in pool.map(source.fetch, [kept] * 12):
            assert fetched.data == [crops.jpegs[row] for row in kept]
    assert caplog.text.count("is read from now on") == 1
    source.close()


def test_fetch__a_shard_that_is_gone_from_the_successor_too_is_named(crops: CropSet) -> None:
    source = Stream(Manifest.load(str(crops.folder)), StorageConfig(), StreamConfig(cache_mb=0))
    take_out(crops)
    (crops.folder / "shard-002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-002\.tar of the data set is missing"):
        source.fetch(np.array([25]))
    assert source.fetch(np.array([1])).data == [crops.jpegs[1]]
    source.close()
