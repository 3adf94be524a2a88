"""Our loader at work, as the benches of the loader and of streaming measure it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.sampling.epoch_order import Order
from datapipe.stream.loader import Loader
from datapipe.stream.stream import Stream
from tests.bench.measure import Work
from tests.bench.scale import Scale
from tests.bench.specs import one_view


@contextmanager
def loading(url: str, storage: StorageConfig, scale: Scale, *, threads: int = 1, **settings: Any) -> Iterator[Work]:
    """An epoch of one view per crop; what opening costs is another bench. `settings`: of the stream."""
    config = StreamConfig(threads=threads, cache_mb=0, **settings)
    stream = Stream(Manifest.load(url, storage), storage, config)
    order = Order(stream.rows, 0, config.block, config.window)
    begin = 0
    with Loader(stream, order, one_view(), seed=0, global_batch=scale.batch, rank=0, world=1, micro_batch=scale.batch,
                config=config) as batches:  # fmt: skip

        def work() -> int:
            nonlocal begin
            for batch in batches.after(begin, begin + stream.rows):
                begin = batch.after
            return stream.rows

        yield work
    stream.close()
