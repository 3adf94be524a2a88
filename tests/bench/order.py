"""The sample order of a very large data set: time and memory per global batch."""

import tracemalloc

import numpy as np

from datapipe.core.config import StreamConfig
from datapipe.sampling.epoch_order import Order
from tests.bench.measure import Spread, rates
from tests.bench.scale import Scale
from tests.bench.table import Row, Table, Target

GLOBAL_BATCH = 4096
BATCHES = 50
"""Per round, spread over three epochs."""


def order(scale: Scale) -> Table:
    """CPU milliseconds and megabytes for the samples of a global batch of 4 096."""
    rows = (
        Row("CPU ms per global batch of 4 096", Spread.of(_milliseconds(scale)), target=Target(2, at_least=False)),
        Row("MB held while a batch is drawn", Spread.of([_megabytes(scale)]), target=Target(50, at_least=False)),
    )
    about = f"{scale.order_rows:_} rows".replace("_", " ")
    return Table("order", about, "see the row", rows)


def _milliseconds(scale: Scale) -> list[float]:
    law = _law(scale)
    starts = np.linspace(0, 3 * scale.order_rows, BATCHES).astype(np.int64)

    def work() -> int:
        for start in starts:
            law.samples(start + np.arange(GLOBAL_BATCH))
        return len(starts)

    return [1e3 / rate for rate in rates({"order": work}, scale.rounds)["order"]]


def _megabytes(scale: Scale) -> float:
    tracemalloc.start()
    try:
        _law(scale).samples(np.arange(GLOBAL_BATCH))
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def _law(scale: Scale) -> Order:
    return Order(scale.order_rows, 0, StreamConfig().block, StreamConfig().window)
