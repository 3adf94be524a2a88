"""Threads fill preallocated slots with whole batches of views, ahead of the training step; waiting is measured.

Which samples, which rank and which pixels are pure functions of (seed, position): threads, prefetch and world size
change only who makes them and when. Order and shares are worked out by a thread of their own, each once; the thread
that asks for batches only waits for them.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import chain, cycle
from threading import Lock
from time import perf_counter
from typing import Any

import numpy as np

from datapipe.core.config import StreamConfig
from datapipe.core.randomness import Ints
from datapipe.core.resource_limits import available_cores
from datapipe.sampling.epoch_order import SampleOrder
from datapipe.sampling.rank_assignment import Assignment, RankBatch, shares
from datapipe.stream.batch import Batch, LoaderCounters
from datapipe.stream.batch_feed import BatchFeed
from datapipe.stream.mixed_stream import MixedStream
from datapipe.stream.stream import Stream
from datapipe.views import bicubic
from datapipe.views.bicubic import Resize
from datapipe.views.erasing import Erasures, draw_erasures
from datapipe.views.makers import ViewMaker, ViewProcesses, ViewsHere
from datapipe.views.masking import draw_masks
from datapipe.views.spec import View, ViewSpec

FEWEST_ROWS = 8
"""Smallest piece of a batch that is handed to a thread."""
PIECES_A_THREAD = 2
"""Pieces of all batches under way, for each thread: enough to keep it busy. Fewer, larger ones cost less: one view of a
crop took 280 us in pieces of 8 rows, 195 in pieces of 32 and 159 in pieces of 256."""

UNDER_WAY = 3
"""Batches, beside `prefetch`, that ranks of a machine may still be making when one of them begins another."""


def rows_of_a_piece(rows: int, threads: int, prefetch: int) -> int:
    """Into how large pieces a batch of so many rows is cut, where `prefetch` + 1 batches are under way at a time."""
    pieces = -(-PIECES_A_THREAD * threads // (prefetch + 1))
    return max(FEWEST_ROWS, -(-rows // pieces))


class Loader:
    """Global batches of a stream, one rank's share of each.

    Rank r of w gets rows [r * per, (r + 1) * per) of the global batch, per = ceil(global_batch / w) rounded up to a
    multiple of `micro_batch`; what is missing is padding, so that all ranks have equal micro-batches. With `nodes`, the
    node of each rank, it gets as many, but those whose blocks are at home on its node: see `Assignment`.
    `allocate(shape, dtype)` makes the slots, prefetch + 2 of them (training passes pinned memory); where processes fill
    them, `lock` pins what is there and returns what undoes it. `ranks_here`: ranks that share this machine's cores.
    `labels` of all rows take the place of the stream's identities; `resize` is `make_views`'. Use as a context manager,
    or close.
    """

    def __init__(
        self,
        stream: Stream | MixedStream,
        order: SampleOrder,
        spec: ViewSpec,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        micro_batch: int,
        config: StreamConfig,
        allocate: Callable[..., Any] = np.empty,
        lock: Callable[[View], Callable[[], None]] | None = None,
        ranks_here: int = 1,
        nodes: tuple[int, ...] = (),
        labels: Ints | None = None,
        resize: Resize = bicubic.resize,
    ) -> None:
        if order.rows != stream.rows:
            raise ValueError(f"the order is for {order.rows} rows, the stream has {stream.rows}")
        if min(global_batch, micro_batch) < 1 or not 0 <= rank < world:
            raise ValueError(f"impossible: batch {global_batch}, micro-batch {micro_batch}, rank {rank} of {world}")
        if nodes and len(nodes) != world:
            raise ValueError(f"{len(nodes)} nodes are given for {world} ranks")
        self.stream, self.order, self.spec, self.seed, self._labels = stream, order, spec, seed, labels
        self.global_batch, self.rank, self.world, self.micro_batch = global_batch, rank, world, micro_batch
        self.rows = -(-global_batch // (world * micro_batch)) * micro_batch
        self._nodes, self._assignment_version = nodes or (0,) * world, config.assignment_version
        self._assignment = self._shared_by(order)
        self.threads = config.threads or max(1, available_cores() // ranks_here)
        self._prefetch, self._window = config.prefetch, config.window * config.block
        makers = config.processes or self.threads
        self._piece = min(micro_batch, rows_of_a_piece(self.rows, makers, config.prefetch))
        shapes = {group.name: spec.shape(group, self.rows) for group in spec.groups}
        about: dict[str, Any] = {"slots": config.prefetch + 2, "spec": spec, "seed": seed, "resize": resize}
        self._views: ViewMaker
        if config.processes:
            self._views = ViewProcesses(makers, shapes, lock=lock, **about)
        else:
            self._views = ViewsHere(shapes, allocate=allocate, **about)
        # threads that wait for processes: each of these has a piece in its hands and the next one at hand
        self._pool = ThreadPoolExecutor(PIECES_A_THREAD * makers if config.processes else makers, "datapipe-views")
        self._lock = Lock()
        self._reading_s, self._making_s = 0.0, 0.0
        self._running: Generator[Batch, None, None] | None = None
        self._feed: BatchFeed[tuple[Batch, list[Future[None]]]] | None = None

    @property
    def intake(self) -> LoaderCounters:
        """What has been done so far."""
        stream = self.stream
        spent_s = self._reading_s, self._making_s
        return LoaderCounters(stream.replaced, stream.bytes_read, *stream.cached, *spent_s, stream.renewed)

    def after(self, position: int, until: int) -> Iterator[Batch]:
        """The batches of the stream positions [position, until), the last one shorter where they do not divide.

        A batch's arrays are overwritten once the batch after the next is asked for, or `after` is called again
        (which ends the iteration before). An error in a thread is raised here.
        """
        if position < 0:
            raise ValueError(f"the stream starts at 0, not {position}")
        if self._running is not None:
            self._running.close()
        self._running = self._batches(range(position, until, self.global_batch), until)
        return self._running

    def ready(self) -> bool:
        """Is the next batch of the running `after` made, without an error? False where none is left."""
        begun = None if self._feed is None else self._feed.peek()
        return begun is not None and all(piece.done() and piece.exception() is None for piece in begun[1])

    def follow(self, order: SampleOrder, labels: Ints) -> None:
        """Take another order and other labels of all rows, from the next call of `after` on."""
        if order.rows != self.stream.rows or len(labels) != self.stream.rows:
            raise ValueError(f"an order of {order.rows} and {len(labels)} labels for {self.stream.rows} rows")
        if self._running is not None:
            self._running.close()
        self.order, self._labels = order, labels
        self._assignment = self._shared_by(order)

    def close(self) -> None:
        """Stop the threads, as soon as they have finished the pieces in their hands."""
        if self._running is not None:
            self._running.close()
        self._pool.shutdown(cancel_futures=True)
        self._views.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shared_by(self, order: SampleOrder) -> Assignment:
        return Assignment(self.rows, self._nodes, order.together, self._assignment_version)

    def _batches(self, starts: range, until: int) -> Generator[Batch, None, None]:
        follows = self.stream.reads_ahead
        under_way = self._prefetch + UNDER_WAY
        # a little less than a window: the next one is begun when the batches of the one before are made
        distance = max(0, -(-self._window // self.global_batch) - under_way) if follows else 0
        slots, begun = cycle(enumerate(self._views.slots)), deque[RankBatch]()

        def begin(share: RankBatch) -> tuple[Batch, list[Future[None]]]:
            if follows:
                begun.append(share)
                if len(begun) > under_way:
                    self.stream.passed(*self._coming(begun.popleft()))
            slot, views = next(slots)
            return self._begin(replace(self._without_views(share), views=views), slot)

        self._feed = feed = BatchFeed(
            self._shares(starts, until, later=distance),
            begin,
            count=len(starts),
            room=self._prefetch + 1,  # and the slot of the batch before is still the consumer's: prefetch + 2 in all
            ahead=(lambda share: self.stream.prepare(*self._coming(share))) if follows else None,
            distance=distance,
        )
        pieces: list[Future[None]] = []
        try:
            for number in range(len(starts)):
                if number:
                    feed.make_room()
                before = perf_counter()
                batch, pieces = feed.take()
                for piece in pieces:
                    piece.result()
                batch.waited_s = perf_counter() - before
                yield batch
        finally:
            self._feed = None
            # nothing may still write into a slot that somebody else gets
            unfinished = [pieces, *(left for _, left in feed.close())]
            wait([piece for some in unfinished for piece in some if not piece.cancel()])

    def _shares(self, starts: range, until: int, *, later: int = 0) -> Iterator[RankBatch]:
        """This rank's share of the batches that start there, and of so many that would follow."""
        batches = (range(start, min(start + self.global_batch, until)) for start in starts)
        following = (range(start, start + self.global_batch)
                     for start in range(until, until + later * self.global_batch, self.global_batch))  # fmt: skip
        return shares(self.order, self._assignment, self.rank, chain(batches, following))

    def _coming(self, share: RankBatch) -> tuple[Ints, Ints]:
        """A share's samples without padding, and their turns."""
        real = share.positions >= 0
        return share.samples[real], self.order.turns(share.positions[real])

    def _without_views(self, share: RankBatch) -> Batch:
        masks, erasing = self.spec.masks, self.spec.erasing
        return Batch(
            views={},
            sample=share.samples,
            position=share.positions,
            weight=(share.positions >= 0) / len(share.batch),
            label=np.full(self.rows, -1, dtype=np.int64),
            camera=np.full(self.rows, -1, dtype=np.int64),
            start=share.batch.start,
            after=share.batch.stop,
            masks=np.zeros((len(masks), self.rows, *masks[0].grid), dtype=np.bool_) if masks else None,
            boxes=np.zeros((self.spec.boxed, self.rows, 5), dtype=np.int64) if self.spec.boxed else None,
            erasures=Erasures.none(erasing, self.rows) if erasing else None,
        )

    def _begin(self, batch: Batch, slot: int) -> tuple[Batch, list[Future[None]]]:
        """The batch, and what fills it."""
        pieces, first = [], 0
        for micro_batch in batch.micro_batches(self.micro_batch):
            for part in micro_batch.micro_batches(self._piece):
                pieces.append(self._pool.submit(self._make, part, slot, first))
                first += len(part.sample)
        return batch, pieces

    def _make(self, part: Batch, slot: int, first: int) -> None:
        """Fill the views, labels and cameras of one piece, which begins at row `first` of a slot; its padding comes
        last."""
        real = int((part.position >= 0).sum())
        for array in part.views.values():
            array[:, real:] = 0
        if not real:
            return
        part = part._part(slice(0, real))
        began = perf_counter()
        rows, data = self.stream.fetch(part.sample)
        fetched = perf_counter()
        if part.masks is not None:
            part.masks[:] = draw_masks(self.spec.masks, self.seed, part.position)
        if part.erasures is not None and self.spec.erasing is not None:
            draw_erasures(self.spec.erasing, self.seed, part.position, part.erasures)
        made = self._views.make(data, part.position, slot=slot, first=first)
        if part.boxes is not None:
            part.boxes[:] = made.boxes
        for row in made.bad:
            rows[row] = self._substitute(part._part(slice(row, row + 1)), int(rows[row]), slot, first + row)
        pid, camera = self.stream.labels(rows)
        part.label[:] = pid if self._labels is None else self._labels[rows]
        part.camera[:] = camera
        with self._lock:
            self._reading_s += fetched - began
            self._making_s += perf_counter() - fetched

    def _substitute(self, one: Batch, row: int, slot: int, at: int) -> int:
        """Other crops in place of one that does not decode, until one does; the stream counts, and ends it."""
        while True:
            rows, data = self.stream.replace(int(one.sample[0]), row, "does not decode")
            row = int(rows[0])
            made = self._views.make(data, one.position, slot=slot, first=at)
            if not made.bad:
                if one.boxes is not None:
                    one.boxes[:] = made.boxes
                return row
