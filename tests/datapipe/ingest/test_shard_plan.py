"""The plan is a pure function: every crop once, both bounds kept, whatever the order of the scan."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.core.config import ShardConfig
from datapipe.dataset.duplicates import Marks
from datapipe.dataset.tar import BLOCK, END_BYTES, layout, member_bytes
from datapipe.ingest.shard_plan import (
    MOST_TOGETHER,
    PREFIXES,
    Candidates,
    Plan,
    cut,
    hot_columns,
    key_texts,
    key_words,
    places,
    plan_shards,
    rank,
    ranked,
    repeated,
    sample_key,
)

PRINTABLE = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
CROPS = st.lists(
    st.tuples(
        st.text(PRINTABLE, min_size=1, max_size=130),
        st.integers(1, 9_000),
        st.integers(0, 9),
        st.integers(0, 7),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda crop: crop[0],
)
"""name, bytes, which content, which hash, which track"""


def candidates(crops: list[tuple[str, int, int, int, int]], seed: int = 0, **others: Any) -> Candidates:
    count = len(crops)
    names, sizes, contents, hashes, tracks = (list(column) for column in zip(*crops, strict=True))
    rows = pyarrow.table(
        {
            "key": [sample_key("set", name) for name in names],
            "source": ["set"] * count,
            "video": [""] * count,
            "track": tracks,
            "sha256": [bytes([content]) * 32 for content in contents],
            "dhash": pyarrow.array([bits << 3 for bits in hashes], pyarrow.uint64()),
            **{name: [others.get(name, 1)] * count for name in ("height", "width", "pid", "camera", "frame")},
        }
    )
    hot = hot_columns(rows, member_bytes(np.array(sizes)), seed=seed, near_within="track")
    found = Candidates.room(count)
    for column in hot.column_names:
        rows = rows.append_column(column, hot[column])
    half = count // 2
    found.put(half, rows.slice(half))
    found.put(0, rows.slice(0, half))
    return found


def by_key(crops: Candidates, plan: Plan) -> dict[str, Any]:
    """A plan in terms that know no rows."""

    def pairs(marks: Marks) -> set[tuple[str, str]]:
        return set(zip(key_texts(crops.key[marks.places]), key_texts(crops.key[marks.originals]), strict=True))

    return {
        "order": key_texts(crops.key[plan.order]),
        "cuts": plan.cuts.tolist(),
        "id": plan.id,
        "exact": pairs(plan.exact),
        "near": pairs(plan.near),
        "bytes": plan.bytes,
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 200_000))
def test_cut__keeps_both_bounds_and_wastes_none(sizes: list[int], samples: int, most_bytes: int) -> None:
    taken = member_bytes(np.array(sizes))
    cuts = cut(taken, samples=samples, most_bytes=most_bytes)
    assert cuts[0] == 0 and cuts[-1] == len(sizes) and (np.diff(cuts) > 0).all()
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        assert end - start <= samples
        assert layout(np.array(sizes[start:end]))[1] <= most_bytes or end - start == 1
        if end < len(sizes) and end - start < samples:
            assert taken[start : end + 1].sum() + END_BYTES > most_bytes


def test_member_bytes__are_a_header_and_whole_blocks() -> None:
    assert member_bytes(np.array([1, 512, 513])).tolist() == [2 * BLOCK, 2 * BLOCK, 3 * BLOCK]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(CROPS, st.randoms(), st.sampled_from(["none", "exact", "near"]))
def test_plan__is_a_permutation_whatever_the_order_of_the_scan(
    crops: list[tuple[str, int, int, int, int]], random: Any, exclude: str
) -> None:
    config = ShardConfig(samples_per_shard=7, exclude=exclude)  # type: ignore[arg-type]
    one = candidates(crops)
    mixed = list(crops)
    random.shuffle(mixed)
    two = candidates(mixed)
    plan = plan_shards(one, config)
    assert by_key(one, plan) == by_key(two, plan_shards(two, config))
    left_out = set(plan.exact.places if exclude != "none" else ()) | set(plan.near.places if exclude == "near" else ())
    assert sorted(plan.order.tolist()) == sorted(set(range(len(crops))) - left_out)
    found = places(plan.order, len(crops))
    assert (found[plan.order] == np.arange(len(plan.order))).all() and set(np.flatnonzero(found < 0)) == left_out


@settings(max_examples=60, deadline=None)
@given(CROPS)
def test_plan__marks_the_first_of_equal_crops_as_original(crops: list[tuple[str, int, int, int, int]]) -> None:
    found = candidates(crops)
    plan = plan_shards(found, ShardConfig())
    contents: dict[int, list[int]] = {}
    for row in plan.order.tolist():
        contents.setdefault(crops[row][2], []).append(row)
    assert dict(zip(plan.exact.places.tolist(), plan.exact.originals.tolist(), strict=True)) == {
        row: rows[0] for rows in contents.values() for row in rows[1:]
    }
    place = places(plan.order, len(crops))
    for row, original in zip(*plan.near, strict=True):
        assert crops[row][4] == crops[original][4] and place[original] < place[row]
        assert (crops[row][3] ^ crops[original][3]).bit_count() <= 2 and original not in plan.near.places


def test_plan__excluded_crops_are_nobodys_original() -> None:
    """A and B hold the same bytes, B and C look alike; B is of another source than A."""
    crops = candidates([(name, 9, 0, 0, 0) for name in "abc"])
    first, second, third = ranked(crops)
    crops.content[third], crops.group[first] = 7, 99
    kept = plan_shards(crops, ShardConfig())
    assert kept.near.places.tolist() == [third] and kept.near.originals.tolist() == [second]
    less = plan_shards(crops, ShardConfig(exclude="near"))
    assert less.exact.places.tolist() == [second] and not len(less.near.places)
    assert less.order.tolist() == [first, third]


def test_plan__shuffles_by_the_seed() -> None:
    names = [(f"{number:04d}.jpg", 9, 0, 0, 0) for number in range(2_000)]
    plans = [plan_shards(candidates(names, seed), ShardConfig(seed=seed)) for seed in (0, 1)]
    orders = [plan.order for plan in plans]
    assert plans[0].id != plans[1].id
    for order in (*orders, orders[0][np.argsort(orders[1])]):
        assert abs(np.corrcoef(order, np.arange(2_000))[0, 1]) < 0.1


def test_plan__knows_every_change() -> None:
    crops = [("a", 5, 0, 0, 0), ("b", 600, 1, 0, 1)]
    base = plan_shards(candidates(crops), ShardConfig()).id
    changed = [
        plan_shards(candidates([crops[0], other]), ShardConfig()).id
        for other in (
            ("c", 600, 1, 0, 1),
            ("b", 500, 1, 0, 1),
            ("b", 600, 2, 0, 1),
            ("b", 600, 1, 1, 1),
            ("b", 600, 1, 0, 2),
            ("b", 600, 0, 0, 1),
            ("b", 600, 1, 0, 0),
        )
    ]
    others = [
        plan_shards(candidates(crops, **{name: 2}), ShardConfig()).id
        for name in ("height", "width", "pid", "camera", "frame")
    ]
    cuts = plan_shards(candidates(crops), ShardConfig(samples_per_shard=1)).id
    assert len({base, cuts, *changed, *others}) == 2 + len(changed) + len(others)


def test_ranked__settles_ties_by_the_key() -> None:
    crops = candidates([(str(number), 9, 0, 0, 0) for number in range(300)])
    tied = replace(crops, rank=crops.rank % np.uint64(3))
    order = ranked(tied)
    expected = sorted(range(300), key=lambda row: (tied.rank[row], key_texts(tied.key)[row]))
    assert order.tolist() == expected
    assert repeated(tied) is None


@pytest.mark.parametrize("ties", [1, 1000])
def test_repeated__finds_a_name_that_occurs_twice(ties: int) -> None:
    names = [("a", 1, 0, 0, 0), *((str(number), 1, 0, 0, 0) for number in range(50)), ("a", 2, 1, 1, 0)]
    crops = candidates(names)
    crops = replace(crops, rank=crops.rank // np.uint64(ties) * np.uint64(ties))
    assert repeated(crops) in (0, 51)
    assert repeated(candidates(names[:-1])) is None


def test_keys__survive_as_numbers() -> None:
    keys = [sample_key("a", str(number)) for number in range(20)]
    words = key_words(pyarrow.chunked_array([keys]))
    assert key_texts(words) == keys
    assert [keys[row] for row in np.lexsort((words[:, 1], words[:, 0]))] == sorted(keys)


def test_sample_key__tells_equal_names_of_two_sources_apart() -> None:
    pairs = [("a", "b"), ("a", "c"), ("b", "b"), ("", "ab"), ("ab", "")]
    keys = {sample_key(source, name) for source, name in pairs}
    assert len(keys) == len(pairs) and all(len(key) == 32 and key.isalnum() for key in keys)
    assert sample_key("set", "0001_c1.jpg") == "736fcf4d6922c4668bcdf979a0bf9b13"  # data sets of before hang on it
    assert rank("736fcf4d6922c4668bcdf979a0bf9b13", 0) != rank("736fcf4d6922c4668bcdf979a0bf9b13", 1)


def test_name__many_shards_are_spread_over_prefixes_and_few_lie_together() -> None:
    """Names of data sets that exist stay: those of few shards, and of any that an earlier version has begun."""

    def plan(shards: int) -> Plan:
        none = Marks(np.empty(0, np.int64), np.empty(0, np.int64))
        return Plan(np.arange(shards), np.arange(shards + 1), none, none, shards, "0123456789abcdef")

    few, many = plan(MOST_TOGETHER), plan(40 * PREFIXES)
    assert few.name(7) == few.together(7) == "shards/0123456789ab-000007.tar"
    names = [many.name(shard) for shard in range(many.shards)]
    assert names[259] == "shards/03/0123456789ab-000259.tar" and many.together(259) == "shards/0123456789ab-000259.tar"
    folders = Counter(name.split("/")[1] for name in names)
    assert len(folders) == PREFIXES and set(folders.values()) == {40}
    assert len({name.rpartition("/")[2] for name in names}) == many.shards
