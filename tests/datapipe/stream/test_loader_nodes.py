"""What the machines of a run fetch: nearly only what their own ranks use, counted in bytes that reached the store."""

from pathlib import Path

import numpy as np
import pytest

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.sampling.epoch_order import Order
from datapipe.stream.loader import Loader
from datapipe.stream.stream import Stream
from datapipe.views.spec import Photometric, ViewGroup, ViewSpec
from tests.datapipe import crop_set

ROWS, BATCH, NODES = 480, 48, (0, 0, 1, 1)
SPEC = ViewSpec((ViewGroup("one", (8, 4), (0.5, 1.0), (0.4, 0.6), 0.5, ((0.0, 1.0),), (Photometric(),)),), "linear")


def epoch(url: str, cache: Path, rank: int, nodes: tuple[int, ...]) -> tuple[int, dict[int, int]]:
    """(bytes that one rank asked of the store, position -> sample) of an epoch."""
    config = StreamConfig(block=4, window=40, threads=1, prefetch=1, cache_mb=0, cache_dir=str(cache), reads=2)
    stream = Stream(Manifest.load(url), StorageConfig(), config)
    seen: dict[int, int] = {}
    with Loader(stream, Order(ROWS, 3, config.block, config.window), SPEC, seed=0, global_batch=BATCH, rank=rank,
                world=len(NODES), micro_batch=BATCH // len(NODES), config=config, nodes=nodes) as loader:  # fmt: skip
        for batch in loader.after(0, ROWS):
            seen |= zip(batch.position.tolist(), batch.sample.tolist(), strict=True)
    stream.close()
    return stream.bytes_read, seen


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "at_least", "at_most"), [(NODES, 0.8, 1.2), ((), 1.6, 2.0)], ids=["node", "slice"])
def test_epoch__a_machine_fetches_what_its_ranks_use(
    tmp_path: Path, nodes: tuple[int, ...], at_least: float, at_most: float
) -> None:
    """Two machines with two ranks and a cache each. All of them see each crop once; in slices, both machines fetch
    nearly everything."""
    crops = crop_set.write(tmp_path / "set", ROWS, per_shard=60)
    url, whole = f"local://{crops.folder}", crops.manifest.bytes
    fetched, seen = np.zeros(2), dict[int, int]()
    for rank, node in enumerate(NODES):
        count, mine = epoch(url, tmp_path / f"cache-{node}", rank, nodes)
        assert not mine.keys() & seen.keys()
        seen |= mine
        fetched[node] += count
    assert sorted(seen) == sorted(seen.values()) == list(range(ROWS))
    assert at_least < fetched.sum() / whole < at_most
    assert nodes == () or fetched.max() < 0.6 * whole
