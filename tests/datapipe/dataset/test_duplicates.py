"""Duplicates are those that a loop over all pairs finds, also where hashes crowd."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.dataset import duplicates
from datapipe.dataset.duplicates import DISTANCE, Marks, exact_duplicates, near_duplicates


def naive_near(hashes: np.ndarray, groups: np.ndarray) -> Marks:
    """One crop after the other against all that were kept so far."""
    kept: list[int] = []
    places, originals = [], []
    for place in range(len(hashes)):
        if not groups[place]:
            continue
        near = [
            other
            for other in kept
            if groups[other] == groups[place] and int(hashes[other] ^ hashes[place]).bit_count() <= DISTANCE
        ]
        if near:
            places.append(place)
            originals.append(near[0])
        else:
            kept.append(place)
    return Marks(np.array(places, np.int64), np.array(originals, np.int64))


def assert_equal(found: Marks, wanted: Marks) -> None:
    assert found.places.tolist() == wanted.places.tolist()
    assert found.originals.tolist() == wanted.originals.tolist()


def crowded(random: np.random.Generator, count: int, centres: int, flips: int) -> np.ndarray:
    """Hashes uint64[count] with up to `flips` bits off one of some centres."""
    hashes = random.integers(0, 2**64, centres, np.uint64)[random.integers(0, centres, count)]
    for _ in range(flips):
        bit = np.uint64(1) << random.integers(0, 64, count).astype(np.uint64)
        hashes = np.where(random.random(count) < 0.6, hashes ^ bit, hashes)
    return hashes


@pytest.mark.parametrize(
    ("count", "centres", "flips", "groups"),
    [(0, 1, 0, 1), (1, 1, 0, 1), (400, 400, 0, 2), (600, 20, 3, 3), (600, 3, 2, 1), (600, 2, 6, 2), (500, 5, 0, 4)],
)
@pytest.mark.parametrize("small", [2, 512])
def test_near__is_what_a_loop_over_all_pairs_finds(
    count: int, centres: int, flips: int, groups: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "SMALL", small)
    monkeypatch.setattr(duplicates, "PORTION", 50 * small)
    random = np.random.default_rng([count, centres, flips])
    hashes = crowded(random, count, centres, flips)
    group = random.integers(0, groups + 1, count).astype(np.uint64)
    assert_equal(near_duplicates(hashes, group), naive_near(hashes, group))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 63), max_size=4), st.integers(0, 2)), max_size=30))
def test_near__is_what_a_loop_finds_for_a_few_bits(crops: list[tuple[set[int], int]]) -> None:
    hashes = np.array([sum(1 << bit for bit in bits) for bits, _ in crops], np.uint64)
    groups = np.array([group for _, group in crops], np.uint64)
    assert_equal(near_duplicates(hashes, groups), naive_near(hashes, groups))


def test_near__copes_with_one_huge_bucket() -> None:
    """200 000 equal hashes, and all that differ in the last 12 bits alone: hours, were each pair compared."""
    equal = np.full(200_000, 0xDEAD_BEEF_0000_0000, np.uint64)
    spread = np.arange(1 << 12, dtype=np.uint64) | np.uint64(0x1234_0000_0000_0000)
    hashes = np.concatenate([equal, np.random.default_rng(0).permutation(spread)])
    found = near_duplicates(hashes, np.ones(len(hashes), np.uint64))
    assert found.places[:199_999].tolist() == list(range(1, 200_000)) and not found.originals[:199_999].any()
    kept = hashes[np.setdiff1d(np.arange(200_000, len(hashes)), found.places)]
    assert (1 << 12) // 79 < len(kept) <= (1 << 12) // 13  # spheres of 1 + 12 + 66 cover, those of 1 + 12 are disjoint
    distances = np.bitwise_count(kept[:, None] ^ kept)
    assert distances[~np.eye(len(kept), dtype=bool)].min() == DISTANCE + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=40))
def test_exact__marks_all_but_the_first(contents: list[tuple[int, int]]) -> None:
    """Also where one word of the hash is equal by chance."""
    found = exact_duplicates(np.array(contents, np.uint64).reshape(-1, 2))
    wanted = [
        (place, contents.index(content)) for place, content in enumerate(contents) if contents.index(content) != place
    ]
    assert list(zip(found.places.tolist(), found.originals.tolist(), strict=True)) == wanted
