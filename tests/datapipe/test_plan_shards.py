"""The plan is a pure function: every crop once, both bounds kept, whatever the order of the scan."""

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.config import ShardConfig
from datapipe.errors import DataError
from datapipe.plan_shards import BLOCK, END_BYTES, cut, member_bytes, plan_shards, rank, sample_key
from datapipe.scan import ROWS


def scan(names: list[str], sizes: list[int], seed: int = 0) -> pyarrow.Table:
    keys = [sample_key("set", name) for name in names]
    fixed = {"height": 2, "width": 1, "sha256": bytes(32), "xxh3": 5, "source": "set", "pid": -1, "camera": -1,
             "dhash": 0, "video": "", "track": -1, "frame": -1, "duplicate_of": None, "near_of": None,
             "removed": False, "spool_offset": 0, "bytes": 0, "reason": "", "detail": ""}
    columns = {"key": keys, "name": names, "size": sizes, "rank": [rank(key, seed) for key in keys],
               **{name: [value] * len(names) for name, value in fixed.items()}}
    return pyarrow.table({name: columns[name] for name in ROWS.names}, schema=ROWS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 200_000))
def test_cut__keeps_both_bounds_and_wastes_none(sizes: list[int], samples: int, most_bytes: int) -> None:
    cuts = cut(np.array(sizes), samples=samples, most_bytes=most_bytes)
    taken = member_bytes(np.array(sizes))
    assert cuts[0] == 0 and cuts[-1] == len(sizes) and (np.diff(cuts) > 0).all()
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        assert end - start <= samples
        assert taken[start:end].sum() + END_BYTES <= most_bytes or end - start == 1
        if end < len(sizes) and end - start < samples:
            assert taken[start:end + 1].sum() + END_BYTES > most_bytes


def test_member_bytes__are_a_header_and_whole_blocks() -> None:
    assert member_bytes(np.array([1, 512, 513])).tolist() == [2 * BLOCK, 2 * BLOCK, 3 * BLOCK]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=130), min_size=1, max_size=40, unique=True), st.randoms())
def test_plan__does_not_depend_on_the_order_of_the_scan(names: list[str], random: object) -> None:
    names = [name for name in names if name.isprintable()] or ["a"]
    sizes = [len(name) for name in names]
    config = ShardConfig(samples_per_shard=7)
    mixed = sorted(range(len(names)), key=lambda _: random.random())  # type: ignore[attr-defined]
    one = plan_shards(scan(names, sizes), config)
    two = plan_shards(scan([names[row] for row in mixed], [sizes[row] for row in mixed]), config)
    assert one.id == two.id
    for shard in range(one.shards):
        assert one.rows(shard).equals(two.rows(shard)) and one.name(shard) == two.name(shard)
    planned = [name for shard in range(one.shards) for name in one.rows(shard)["name"].to_pylist()]
    assert sorted(planned) == sorted(names)


def test_plan__shuffles_by_the_seed() -> None:
    names = [f"{number:04d}.jpg" for number in range(2_000)]
    plans = [plan_shards(scan(names, [9] * 2_000, seed), ShardConfig(seed=seed)) for seed in (0, 1)]
    orders = [np.array([int(name[:4]) for name in plan.rows(0)["name"].to_pylist()]) for plan in plans]
    assert plans[0].id != plans[1].id
    for order in (*orders, orders[0][np.argsort(orders[1])]):
        assert abs(np.corrcoef(order, np.arange(2_000))[0, 1]) < 0.1


def test_plan__knows_every_change() -> None:
    base = plan_shards(scan(["a", "b"], [5, 6]), ShardConfig()).id
    changed = [plan_shards(scan(["a", "c"], [5, 6]), ShardConfig()),
               plan_shards(scan(["a", "b"], [5, 7]), ShardConfig()),
               plan_shards(scan(["a", "b"], [5, 6]), ShardConfig(samples_per_shard=1))]
    assert len({base, *(plan.id for plan in changed)}) == 4


def test_sample_key__tells_equal_names_of_two_sources_apart() -> None:
    pairs = [("a", "b"), ("a", "c"), ("b", "b"), ("", "ab"), ("ab", "")]
    keys = {sample_key(source, name) for source, name in pairs}
    assert len(keys) == len(pairs) and all(len(key) == 32 and key.isalnum() for key in keys)
    assert sample_key("set", "0001_c1.jpg") == "736fcf4d6922c4668bcdf979a0bf9b13"  # data sets of before hang on it


def test_plan__refuses_a_name_that_occurs_twice() -> None:
    with pytest.raises(DataError, match="same name") as caught:
        plan_shards(scan(["a", "b", "a"], [1, 2, 3]), ShardConfig())
    assert caught.value.where == "set: a"
