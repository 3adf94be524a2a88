"""Order, shares and hand-over in a thread of their own: each worked out once, ahead, and no error or close lost."""

from collections.abc import Iterator
from dataclasses import replace
from threading import Event, get_ident
from typing import Any, Literal

import numpy as np
import pytest

from datapipe.core.config import StreamConfig
from datapipe.sampling.epoch_order import Order
from datapipe.sampling.rank_assignment import Assignment, RankBatch
from datapipe.sampling.rank_assignment import shares as shares_of
from datapipe.stream.batch_feed import BatchFeed
from datapipe.stream.loader import UNDER_WAY, Loader
from tests.bench.specs import one_view
from tests.bench.training_thread import MadeUpStream

VERSIONS: tuple[Literal[1, 2], ...] = (1, 2)
ROWS, BATCH, COUNT = 5_000, 40, 20
CONFIG = StreamConfig(block=8, window=25, threads=2, prefetch=2)
DISTANCE = 8 * 25 // BATCH


class WatchedOrder(Order):
    """Notes who asks for which places."""

    asked: list[tuple[int, np.ndarray]]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        self.asked.append((get_ident(), positions))
        return super().samples(positions)


def watched() -> WatchedOrder:
    order = WatchedOrder(ROWS, 3, CONFIG.block, CONFIG.window)
    object.__setattr__(order, "asked", [])
    return order


def loader(order: Order, nodes: tuple[int, ...] = (0, 0, 1, 1), config: StreamConfig = CONFIG) -> Loader:
    stream: Any = MadeUpStream(ROWS, config)
    return Loader(stream, order, one_view(), seed=0, global_batch=BATCH, rank=1, world=4, micro_batch=10, config=config,
                  nodes=nodes)  # fmt: skip


@pytest.mark.parametrize("version", [1, 2])
def test_after__ranks_share_by_the_version_of_the_rule_that_is_set(version: Literal[1, 2]) -> None:
    nodes, order = (0, 1, 2, 3), Order(ROWS, 3, CONFIG.block, CONFIG.window)
    with loader(order, nodes, replace(CONFIG, assignment_version=version)) as running:
        found = [batch.sample.tolist() for batch in running.after(0, 5 * BATCH)]
    expected = {
        law: [share.samples.tolist() for share in shares_of(order, Assignment(BATCH // 4, nodes, version=law), 1,
                                                            (range(low, low + BATCH) for low in BATCH * np.arange(5)))]
        for law in VERSIONS
    }  # fmt: skip
    assert found == expected[version] and expected[1] != expected[2]


@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), ()], ids=["by node", "in slices"])
def test_after__the_thread_that_asks_works_out_no_order_and_each_place_is_worked_out_once(
    nodes: tuple[int, ...],
) -> None:
    order = watched()
    with loader(order, nodes) as running:
        seen = [batch.start for batch in running.after(0, BATCH * COUNT)]
        prepared_by = running.stream.prepared_by  # type: ignore[union-attr]
    assert seen == list(range(0, BATCH * COUNT, BATCH))
    threads, places = {thread for thread, _ in order.asked}, np.concatenate([some for _, some in order.asked])
    assert threads == prepared_by and len(threads) == 1 and get_ident() not in threads
    assert len(np.unique(places)) == len(places)


def test_after__blocks_are_prepared_a_window_ahead_and_passed_when_their_batches_are_made() -> None:
    """Each share once, in order; nothing is passed before the batches that may be under way."""
    noted: list[tuple[str, list[int]]] = []
    under_way = CONFIG.prefetch + UNDER_WAY
    with loader(watched()) as running:
        stream: Any = running.stream
        stream.prepare = lambda samples, turns: noted.append(("prepared", samples.tolist()))
        stream.passed = lambda samples, turns: noted.append(("passed", samples.tolist()))
        distance = max(0, DISTANCE - under_way)
        shares_ = running._shares(range(0, BATCH * COUNT, BATCH), BATCH * COUNT, later=distance)
        wanted = [share.samples[share.samples >= 0].tolist() for share in shares_]
        batches = running.after(0, BATCH * COUNT)
        for number in range(COUNT):
            next(batches)
            passed = sum(what == "passed" for what, _ in list(noted))
            assert passed <= max(0, number + 1 + CONFIG.prefetch + 1 - under_way)
        batches.close()  # type: ignore[attr-defined]
    prepared = [samples for what, samples in noted if what == "prepared"]
    passed_shares = [samples for what, samples in noted if what == "passed"]
    assert prepared == wanted[: len(prepared)] and len(prepared) >= COUNT
    assert passed_shares == wanted[: COUNT - under_way]


def shares(count: int) -> Iterator[RankBatch]:
    for number in range(count):
        yield RankBatch(range(number, number + 1), np.array([number]), np.array([number]))


def test_take__gives_what_was_begun_in_order_and_no_more_than_there_is_room_for() -> None:
    begun: list[int] = []
    ahead: list[int] = []

    def begin(share: RankBatch) -> int:
        begun.append(share.batch.start)
        return share.batch.start

    feed = BatchFeed(shares(9), begin, count=6, room=2, ahead=lambda share: ahead.append(share.batch.start), distance=3)
    assert [feed.take(), feed.take()] == [0, 1] and begun == [0, 1]
    feed.make_room()
    assert feed.take() == 2
    assert feed.close() == [] and begun == [0, 1, 2]
    assert ahead == list(range(len(ahead))) and len(ahead) >= 3


def test_take__raises_what_ended_the_thread_after_what_was_begun_before() -> None:
    def begin(share: RankBatch) -> int:
        if share.batch.start == 1:
            raise ValueError("of the thread")
        return share.batch.start

    feed = BatchFeed(shares(9), begin, count=9, room=9)
    assert feed.take() == 0
    with pytest.raises(ValueError, match="of the thread"):
        feed.take()
    assert feed.close() == []


def test_close__ends_a_thread_that_waits_for_room_and_returns_what_nobody_took() -> None:
    feed = BatchFeed(shares(9), lambda share: share.batch.start, count=9, room=4)
    assert [feed.take(), feed.take()] == [0, 1]
    left = feed.close()
    assert left == list(range(2, 2 + len(left))) and len(left) <= 2
    assert not feed._thread.is_alive()


def test_peek__shows_what_would_be_taken_and_takes_nothing() -> None:
    made, closed = Event(), Event()

    def begin(share: RankBatch) -> int:
        if share.batch.start == 2:
            made.set()
            closed.wait()
            raise ValueError("of the thread")
        return share.batch.start

    feed = BatchFeed(shares(9), begin, count=9, room=9)
    made.wait()
    assert [feed.peek(), feed.peek(), feed.take(), feed.peek(), feed.take()] == [0, 0, 0, 1, 1]
    assert feed.peek() is None, "it would have to be waited for"
    closed.set()
    feed._thread.join()
    assert feed.peek() is None
    with pytest.raises(ValueError, match="of the thread"):
        feed.take()
    feed = BatchFeed(shares(9), lambda share: share.batch.start, count=2, room=2)
    feed._thread.join()
    assert feed.peek() == 0 and feed.close() == [0, 1]
