"""Odd worlds, dead threads, slow stores: batches come as they should, or an error does. Nothing hangs."""

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.sampling.epoch_order import Order
from datapipe.stream.batch import Batch
from datapipe.stream.block_reader import BlockReader
from datapipe.stream.loader import Loader
from datapipe.stream.stream import Stream
from tests.bench.specs import one_view
from tests.datapipe import crop_set
from tests.datapipe.crop_set import CropSet

SOON_S = 300.0
"""Longer than anything here takes; what comes later counts as hanging."""
CONFIG = StreamConfig(block=5, window=2, threads=2, max_bad=1.0)


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> CropSet:
    """All in a single shard."""
    return crop_set.write(tmp_path_factory.mktemp("crops") / "set", 40, per_shard=40)


def loader(url: str, config: StreamConfig = CONFIG, *, batch: int = 8, rank: int = 0, world: int = 1,
           nodes: tuple[int, ...] = ()) -> Loader:  # fmt: skip
    stream = Stream(Manifest.load(url), StorageConfig(), config)
    order = Order(stream.rows, 9, config.block, config.window)
    return Loader(stream, order, one_view(), seed=4, global_batch=batch, rank=rank, world=world, micro_batch=2,
                  config=config, nodes=nodes)  # fmt: skip


def soon(work: Callable[[], Any]) -> Any:
    """What the work returns or raises; TimeoutError where it hangs."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(SOON_S)
    finally:
        pool.shutdown(wait=False)


def pixels(batches: Iterator[Batch]) -> dict[int, np.ndarray]:
    """Position -> its view, of all real rows."""
    return {int(position): batch.views["one"][0, row].copy()
            for batch in batches for row, position in enumerate(batch.position) if position >= 0}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_after__fewer_shards_crops_or_rows_than_ranks(tmp_path: Path, rows: int, nodes: tuple[int, ...]) -> None:
    few = crop_set.write(tmp_path / "set", rows, per_shard=40)
    for batch in (1, 8):
        with loader(str(few.folder), batch=batch) as alone:
            expected = soon(lambda running=alone: pixels(running.after(0, 24)))
        found: dict[int, np.ndarray] = {}
        for rank in range(3):
            with loader(str(few.folder), batch=batch, rank=rank, world=3, nodes=nodes) as running:
                mine = soon(lambda running=running: pixels(running.after(0, 24)))
            assert not mine.keys() & found.keys()
            found |= mine
        assert found.keys() == expected.keys() == set(range(24))
        assert all(np.array_equal(found[position], expected[position]) for position in expected)


def test_after__a_thread_that_dies_ends_the_iteration(crops: CropSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(samples: np.ndarray) -> Any:
        raise SystemExit("a thread ends")

    with loader(str(crops.folder)) as running:
        monkeypatch.setattr(running.stream, "fetch", die)
        with pytest.raises(SystemExit, match="a thread ends"):
            soon(lambda: list(running.after(0, 24)))


@pytest.mark.parametrize("cache_mb", [0, 100])
def test_after__reading_threads_that_are_gone_end_the_iteration(crops: CropSet, cache_mb: float) -> None:
    config = StreamConfig(block=5, window=2, threads=2, cache_mb=cache_mb, cache_gb=0)
    with loader(f"local://{crops.folder}", config) as running:
        batches = running.after(0, 10**6)
        soon(lambda: next(batches))
        pool = running.stream._now.reader._pool  # type: ignore[union-attr]
        assert pool is not None
        pool.shutdown(cancel_futures=True)
        if cache_mb:
            running.stream._now.reader.cache._blocks.clear()  # type: ignore[union-attr]
        with pytest.raises((RuntimeError, CancelledError)):
            soon(lambda: list(batches))


def test_after__the_next_window_is_fetched_ahead(
    crops: CropSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StreamConfig(block=5, window=2, threads=2, cache_mb=0, cache_dir=str(tmp_path / "cache"), reads=2)
    prepared = SimpleQueue[int]()
    prepare = BlockReader.prepare

    def note(reader: BlockReader, rows: np.ndarray, turns: np.ndarray) -> None:
        prepare(reader, rows, turns)
        prepared.put(len(rows))

    monkeypatch.setattr(BlockReader, "prepare", note)
    with loader(f"local://{crops.folder}", config, batch=5) as running:
        batches = running.after(0, 40)
        found = soon(lambda: pixels(islice(batches, 2)))
        soon(lambda: [prepared.get() for _ in range(4)])
        reader = running.stream._now.reader  # type: ignore[union-attr]
        assert reader.ahead is not None
        reader.ahead.shutdown()  # waits for what was asked for
        later = np.unique(reader.blocks.of(running.order.samples(np.arange(10, 20))))
        assert all(reader.cache.has(reader.blocks.key(number)) for number in later.tolist())
        batches.close()  # type: ignore[attr-defined]
    with loader(str(crops.folder), batch=5) as plain:
        expected = pixels(plain.after(0, 10))
    assert all(np.array_equal(found[position], expected[position]) for position in range(10))
