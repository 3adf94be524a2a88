"""The same samples and pixels for every number of threads, ranks and restarts; errors reach the consumer."""

from concurrent.futures import wait
from dataclasses import replace
from math import ceil
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.core.config import JitterConfig, StorageConfig, StreamConfig, ViewConfig
from datapipe.core.errors import DataError
from datapipe.dataset.manifest import Manifest
from datapipe.sampling.epoch_order import Order
from datapipe.stream.batch import Batch, LoaderCounters
from datapipe.stream.loader import FEWEST_ROWS, Loader, rows_of_a_piece
from datapipe.stream.stream import Stream
from datapipe.views.erasing import ErasingSpec, Erasures, draw_erasures
from datapipe.views.masking import MaskConfig, MaskSpec, draw_masks
from datapipe.views.render import make_views
from datapipe.views.spec import RegionSpec, ViewSpec, multi_crop, regions
from tests.datapipe import crop_set
from tests.datapipe.crop_set import CropSet

ROWS = 53
CONFIG = StreamConfig(block=5, window=3, threads=2, max_bad=1.0)
ERASING = ErasingSpec((32, 16), 0.6, (0.02, 1 / 3), logarithmic=True, noise=True)
VIEWS = ViewConfig(interpolation="linear", jitter=JitterConfig(white_balance=0.1), erase=(0.3, 0.3, 0.3))
SPEC = multi_crop(VIEWS, size=(32, 16), local_size=(16, 8), local_bands=((0.0, 0.5), (0.5, 1.0)))


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> CropSet:
    return crop_set.write(tmp_path_factory.mktemp("crops") / "set", ROWS)


def loader(
    crops: CropSet,
    *,
    batch: int = 12,
    rank: int = 0,
    world: int = 1,
    micro_batch: int = 4,
    config: StreamConfig = CONFIG,
    spec: ViewSpec = SPEC,
    **more: Any,
) -> Loader:
    stream = Stream(Manifest.load(str(crops.folder)), StorageConfig(), config)
    order = Order(stream.rows, 9, config.block, config.window)
    return Loader(
        stream,
        order,
        spec,
        seed=4,
        global_batch=batch,
        rank=rank,
        world=world,
        micro_batch=micro_batch,
        config=config,
        **more,
    )


def copy(batch: Batch) -> Batch:
    views = {name: array.copy() for name, array in batch.views.items()}
    return Batch(views, batch.sample, batch.position, batch.weight, batch.label, batch.camera, batch.start, batch.after)


def run(crops: CropSet, position: int, until: int, **more: Any) -> list[Batch]:
    with loader(crops, **more) as running:
        return [copy(batch) for batch in running.after(position, until)]


def joined(ranks: list[list[Batch]]) -> list[Batch]:
    """Global batches without padding, from those of all ranks."""
    whole = []
    for parts in zip(*ranks, strict=True):
        real = [part.position >= 0 for part in parts]
        pick = {
            name: np.concatenate([getattr(part, name)[mine] for part, mine in zip(parts, real, strict=True)])
            for name in ("sample", "position", "weight", "label", "camera")
        }
        views = {
            name: np.concatenate([part.views[name][:, mine] for part, mine in zip(parts, real, strict=True)], 1)
            for name in parts[0].views
        }
        whole.append(Batch(views, **pick, start=parts[0].start, after=parts[0].after))
    return whole


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [(batch.start, batch.after) for batch in ours] == [(batch.start, batch.after) for batch in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("sample", "position", "weight", "label", "camera"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        for name in one.views:
            np.testing.assert_array_equal(one.views[name], other.views[name], err_msg=name)


@pytest.fixture(scope="module")
def truth(crops: CropSet) -> list[Batch]:
    """Two epochs and a bit, in a world of one."""
    return joined([run(crops, 0, 120)])


def test_after__batches_hold_what_order_and_views_say(crops: CropSet, truth: list[Batch]) -> None:
    order = Order(ROWS, 9, 5, 3)
    for batch in truth:
        positions = np.arange(batch.start, batch.after)
        np.testing.assert_array_equal(batch.position, positions)
        np.testing.assert_array_equal(batch.sample, order.samples(positions))
        np.testing.assert_array_equal(batch.label, batch.sample // 2)
        np.testing.assert_array_equal(batch.camera, batch.sample % 3 + 1)
        assert batch.weight.tolist() == [1 / 12] * 12
        expected = {group.name: np.zeros(SPEC.shape(group, 12), np.uint8) for group in SPEC.groups}
        assert make_views([crops.jpegs[row] for row in batch.sample], SPEC, 4, positions, expected) == []
        for name in expected:
            np.testing.assert_array_equal(batch.views[name], expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [1, 4, 5])
def test_after__any_world_makes_the_same_global_batches(
    crops: CropSet, truth: list[Batch], world: int, micro_batch: int
) -> None:
    ranks = [run(crops, 0, 120, rank=rank, world=world, micro_batch=micro_batch) for rank in range(world)]
    assert_same(joined(ranks), truth)
    for batches in ranks:
        for batch in batches:
            assert len(batch.sample) == len(ranks[0][0].sample) and len(batch.sample) % micro_batch == 0
            padding = batch.position < 0
            assert (batch.sample[padding] == -1).all() and (batch.weight[padding] == 0).all()
            assert (batch.label[padding] == -1).all() and (batch.camera[padding] == -1).all()
            assert not any(array[:, padding].any() for array in batch.views.values())
    assert np.isclose(sum(batch.weight.sum() for batch in (batches[0] for batches in ranks)), 1)


@pytest.mark.parametrize("no_images", [(), (7, 30)])
def test_after__processes_change_nothing(tmp_path: Path, no_images: tuple[int, ...]) -> None:
    """Neither masks and boxes nor crops that stand in for broken ones, on the second of two ranks."""
    crops = crop_set.write(tmp_path / "set", ROWS, no_images=no_images)
    law = RegionSpec((0.3, 0.9), (0.375, 0.667), (0.0, 1.0), True)
    masks = (MaskSpec((4, 2), MaskConfig(ratios=(0.5,), spreads=(0.0,)), equal=True),)
    spec = replace(regions(VIEWS, law, size=(32, 16), pair=True, masks=masks), erasing=ERASING)
    found = []
    for processes in (0, 2):
        config = replace(CONFIG, processes=processes)
        with loader(crops, rank=1, world=2, batch=14, spec=spec, config=config) as running:
            found.append([(copy(batch), batch.masks, batch.boxes, batch.erasures) for batch in running.after(0, 120)])
            assert (running.intake.replaced > 0) == bool(no_images)
    assert_same(*([batch for batch, *_ in batches] for batches in found))
    for (batch, masks_made, boxes, erased), (_, other_masks, other_boxes, others) in zip(*found, strict=True):
        assert erased is not None and others is not None
        np.testing.assert_array_equal(erased.rectangle, others.rectangle)
        np.testing.assert_array_equal(erased.noise, others.noise)
        np.testing.assert_array_equal(masks_made, other_masks)
        np.testing.assert_array_equal(boxes, other_boxes)
        assert boxes is not None and boxes.any() == (batch.position >= 0).any()


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (1, 3), (3, 1), (3, 4)])
def test_after__threads_and_prefetch_change_nothing(
    crops: CropSet, truth: list[Batch], threads: int, prefetch: int
) -> None:
    config = StreamConfig(block=5, window=3, threads=threads, prefetch=prefetch, cache_mb=prefetch % 2)
    assert_same(run(crops, 0, 120, config=config), truth)


@pytest.mark.parametrize("skipped", [1, 4, 9])
def test_after__a_resumed_run_sees_the_rest(crops: CropSet, truth: list[Batch], skipped: int) -> None:
    ranks = [
        run(crops, 12 * skipped, 120, rank=rank, world=2, config=StreamConfig(block=5, window=3, threads=3))
        for rank in range(2)
    ]
    assert_same(joined(ranks), truth[skipped:])


def test_after__starts_anywhere_and_ends_where_it_is_told(crops: CropSet, truth: list[Batch]) -> None:
    batches = joined([run(crops, 7, 38)])
    assert [(batch.start, batch.after) for batch in batches] == [(7, 19), (19, 31), (31, 38)]
    assert [len(batch.sample) for batch in batches] == [12, 12, 7]
    assert batches[-1].weight.tolist() == [1 / 7] * 7
    np.testing.assert_array_equal(
        np.concatenate([batch.sample for batch in batches]), np.concatenate([batch.sample for batch in truth])[7:38]
    )
    assert run(crops, 38, 38) == []


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 40),
    world=st.integers(1, 4),
    micro_batch=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_audit__each_sample_exactly_once_per_epoch(
    rows: int, batch: int, world: int, micro_batch: int, epoch: int
) -> None:
    """By the batches' own records, over all ranks, whether or not the batch divides the rows."""
    order = Order(rows, 2, 4, 3)
    seen: dict[int, int] = {}
    for rank in range(world):
        running = Loader(
            NoPixels(rows),
            order,
            SPEC,
            seed=0,
            global_batch=batch,
            rank=rank,
            world=world,  # type: ignore
            micro_batch=micro_batch,
            config=StreamConfig(threads=1),
        )
        first = epoch * rows
        starts = range(first // batch * batch, first + rows, batch)
        for share in running._shares(starts, starts[-1] + batch):
            part = running._without_views(share)
            real = part.position >= 0
            assert not set(part.position[real].tolist()) & set(seen)
            seen.update(zip(part.position[real].tolist(), part.sample[real].tolist(), strict=True))
        running.close()
    samples = [seen[position] for position in range(epoch * rows, (epoch + 1) * rows)]
    assert sorted(samples) == list(range(rows))


class NoPixels:
    """A stream of which only the number of rows is asked."""

    def __init__(self, rows: int) -> None:
        self.rows = rows


@pytest.mark.parametrize("rows", [1, 3])
def test_after__fewer_rows_than_the_batch_go_round(tmp_path: Path, rows: int) -> None:
    few = crop_set.write(tmp_path / "few", rows)
    batches = run(few, 0, 24)
    samples = np.concatenate([batch.sample for batch in batches])
    assert len(samples) == 24
    for epoch in range(24 // rows):
        assert sorted(samples[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    views = batches[0].views["global"]
    assert (views[:, 0] != views[:, rows]).any()  # a sample that repeats gets other views


def test_after__slots_stay_until_the_batch_after_the_next_is_asked_for(crops: CropSet) -> None:
    with loader(crops, config=StreamConfig(block=5, window=3, threads=3, prefetch=1)) as running:
        before: Batch | None = None
        kept: Batch | None = None
        for batch in running.after(0, 240):
            if before is not None and kept is not None:
                for name in before.views:
                    np.testing.assert_array_equal(before.views[name], kept.views[name])
            before, kept = batch, copy(batch)


def test_after__slots_come_from_the_allocator_and_are_reused(crops: CropSet) -> None:
    made: list[np.ndarray] = []

    def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        made.append(np.empty(shape, dtype))
        return made[-1]

    with loader(crops, allocate=allocate, config=StreamConfig(block=5, window=3, threads=2, prefetch=2)) as running:
        for batch in running.after(0, 120):
            assert any(batch.views["global"] is array for array in made)
    assert len(made) == 2 * (2 + 2)


def test_micro_batches__are_views_of_the_batch(crops: CropSet) -> None:
    with loader(crops) as running:
        batch = next(iter(running.after(0, 12)))
        parts = list(batch.micro_batches(5))
        assert [len(part.sample) for part in parts] == [5, 5, 2]
        assert all(np.shares_memory(part.views["local"], batch.views["local"]) for part in parts)
        np.testing.assert_array_equal(np.concatenate([part.views["local"] for part in parts], 1), batch.views["local"])
        assert {(part.start, part.after) for part in parts} == {(0, 12)}


def test_after__called_again_ends_the_iteration_before(crops: CropSet, truth: list[Batch]) -> None:
    with loader(crops) as running:
        first = running.after(0, 120)
        next(first)
        assert_same([copy(batch) for batch in running.after(24, 60)], truth[2:5])
        assert list(first) == []
        assert_same([copy(batch) for batch in running.after(0, 12)], truth[:1])


def test_after__reports_the_time_it_waited(crops: CropSet) -> None:
    with loader(crops) as running:
        assert all(batch.waited_s >= 0 for batch in running.after(0, 60))


def test_intake__counts_bytes_and_hits_and_seconds(crops: CropSet) -> None:
    """Of whole blocks kept in memory: the second epoch reads nothing."""
    with loader(crops, batch=ROWS, micro_batch=ROWS) as running:
        assert running.intake == LoaderCounters()
        list(running.after(0, ROWS))
        once = running.intake
        assert once.fetched >= sum(map(len, crops.jpegs)) and (once.sought, once.replaced) == (ROWS, 0)
        assert once.reading_s > 0 and once.making_s > 0
        list(running.after(ROWS, 2 * ROWS))
        twice = running.intake
        assert twice.fetched == once.fetched and twice.cached - once.cached == twice.sought - once.sought == ROWS
        assert twice.reading_s > once.reading_s and twice.making_s > once.making_s


def test_after__a_crop_that_does_not_decode_is_replaced_by_the_next_of_its_block(tmp_path: Path) -> None:
    crops = crop_set.write(tmp_path / "set", 20, no_images=(6, 7, 14))
    order = Order(20, 9, 5, 3)
    for threads in (1, 3):
        config = StreamConfig(block=5, window=3, threads=threads, max_bad=1.0)
        with loader(crops, batch=20, micro_batch=20, config=config) as running:
            (batch,) = [copy(batch) for batch in running.after(0, 20)]
            assert running.intake.replaced == 3
        np.testing.assert_array_equal(batch.sample, order.samples(np.arange(20)))
        served = np.array([{6: 8, 7: 8, 14: 10}.get(row, row) for row in batch.sample.tolist()])
        np.testing.assert_array_equal(batch.label, served // 2)
        expected = {group.name: np.zeros(SPEC.shape(group, 20), np.uint8) for group in SPEC.groups}
        make_views([crops.jpegs[row] for row in served], SPEC, 4, np.arange(20), expected)
        for name in expected:
            np.testing.assert_array_equal(batch.views[name], expected[name])


def test_after__too_many_broken_crops_end_the_run(tmp_path: Path) -> None:
    crops = crop_set.write(tmp_path / "set", 20, no_images=(6, 7, 14))
    config = StreamConfig(block=5, window=3, threads=2)
    with loader(crops, config=config) as running, pytest.raises(DataError, match="crops read so far are broken"):
        list(running.after(0, 40))


def test_after__an_error_in_a_thread_reaches_the_consumer_and_leaves_the_loader_usable(
    crops: CropSet, truth: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    with loader(crops) as running:
        fetch = running.stream.fetch

        def fail(samples: np.ndarray) -> Any:
            raise DataError("the disk is gone")

        batches = running.after(0, 120)
        next(batches)
        monkeypatch.setattr(running.stream, "fetch", fail)
        with pytest.raises(DataError, match="the disk is gone"):
            list(batches)
        monkeypatch.setattr(running.stream, "fetch", fetch)
        assert_same([copy(batch) for batch in running.after(0, 24)], truth[:2])


def test_close__ends_an_unfinished_iteration(crops: CropSet) -> None:
    running = loader(crops)
    batches = running.after(0, 10**9)
    next(batches)
    running.close()
    assert list(batches) == []


def test_loader__refuses_what_cannot_be(crops: CropSet) -> None:
    for wrong in ({"batch": 0}, {"rank": 2, "world": 2}, {"micro_batch": 0}):
        with pytest.raises(ValueError, match="impossible"):
            loader(crops, **wrong)
    with loader(crops) as running, pytest.raises(ValueError, match="starts at 0"):
        running.after(-1, 5)
    with pytest.raises(ValueError, match="order is for 5 rows"):
        Loader(
            NoPixels(6),
            Order(5, 0, 1, 1),
            SPEC,
            seed=0,
            global_batch=1,
            rank=0,
            world=1,  # type: ignore[arg-type]
            micro_batch=1,
            config=CONFIG,
        )


def test_threads__divide_the_cores_among_the_ranks_of_a_machine(
    crops: CropSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datapipe.stream.loader.available_cores", lambda: 8)
    shared = StreamConfig(block=5, window=3)
    for ranks, expected in ((1, 8), (2, 4), (16, 1)):
        with loader(crops, config=shared, ranks_here=ranks) as running:
            assert running.threads == expected


@pytest.mark.parametrize("rows", [1, 12, 64, 250])
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 16, 64])
@pytest.mark.parametrize("prefetch", [1, 3, 8])
def test_rows_of_a_piece__leave_two_pieces_to_every_thread_and_no_more(rows: int, threads: int, prefetch: int) -> None:
    piece, batches = rows_of_a_piece(rows, threads, prefetch), prefetch + 1
    pieces = ceil(rows / piece)
    assert piece >= FEWEST_ROWS
    assert pieces * batches >= 2 * threads or piece == FEWEST_ROWS
    assert (pieces - 1) * batches < 2 * threads


def test_after__masks_boxes_and_erasures_follow_their_images_in_any_world(crops: CropSet) -> None:
    law = MaskSpec((4, 2), MaskConfig(ratios=(0.5,), spreads=(0.0,)), equal=True)
    region = RegionSpec(scale=(0.3, 0.9), ratio=(0.375, 0.667), iou=(0.2, 0.8), share_flip=True)
    spec = replace(regions(VIEWS, region, size=(32, 16), pair=True, masks=(law,)), erasing=ERASING)
    found = {}
    for world in (1, 3):
        for rank in range(world):
            with loader(crops, spec=spec, rank=rank, world=world) as running:
                for batch in running.after(0, 24):
                    assert batch.masks is not None and batch.boxes is not None
                    assert not batch.masks[:, batch.position < 0].any() and not batch.boxes[:, batch.position < 0].any()
                    for part in batch.micro_batches(2):
                        assert part.masks is not None and part.boxes is not None and part.erasures is not None
                        assert not part.erasures.rectangle[part.position < 0].any()
                        for row in np.flatnonzero(part.position >= 0):
                            key = (world, int(part.position[row]))
                            found[key] = (part.masks[:, row].copy(), part.boxes[:, row].copy(),
                                          *(array[row].copy() for array in part.erasures))  # fmt: skip
    assert len(found) == 2 * 24
    for position in range(24):
        for one, other in zip(found[1, position], found[3, position], strict=True):
            np.testing.assert_array_equal(one, other)
        masks, boxes, rectangle, noise = found[1, position]
        expected = Erasures.none(ERASING, 1)
        draw_erasures(ERASING, 4, np.array([position]), expected)
        np.testing.assert_array_equal(rectangle, expected.rectangle[0])
        np.testing.assert_array_equal(noise, expected.noise[0])
        np.testing.assert_array_equal(masks, draw_masks((law,), 4, np.array([position]))[:, 0])
        assert masks.sum() == 4 and (boxes[:, 2:4] > 0).all() and boxes.shape == (2, 5)
    assert 0 < sum(bool(found[1, position][2].any()) for position in range(24)) < 24


def test_ready__says_whether_the_next_batch_can_be_had_without_waiting(crops: CropSet) -> None:
    gate = Event()

    with loader(crops, config=replace(CONFIG, prefetch=1)) as running:
        assert not running.ready()
        real = running._make

        def make(part: Batch, slot: int, first: int) -> None:
            if part.start:
                gate.wait()
            real(part, slot, first)

        running._make = make  # type: ignore[method-assign]
        batches = running.after(0, 24)
        next(batches)
        assert not running.ready()
        feed = running._feed
        assert feed is not None
        while feed.peek() is None:
            feed._thread.join(0.01)
        assert not running.ready(), "begun, and not made"
        gate.set()
        wait(feed.peek()[1])  # type: ignore[index]
        assert running.ready()
        assert next(batches).start == 12 and not running.ready()
        assert list(batches) == [] and not running.ready()
