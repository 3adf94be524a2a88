"""Batches of P identities with K instances: always P different ones, all used evenly; the values are pinned."""

from collections import Counter, defaultdict
from hashlib import sha256
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datapipe.core.errors import DataError
from datapipe.sampling.identity_sampler import IDENTITY_ORDER_VERSION, IdentityOrder, numbered

SMALL = [10, -1, 10, 0, 40, -1, 10, 40, 30, 20, 0, 40, 10, 10, -1, -1, 40, 30, 0, -1]
GOLDEN_SMALL = [9, 9, 9, 11, 16, 7, 13, 6, 12, 8, 17, 8, 9, 9, 9, 18, 10, 3, 17, 8, 17, 11, 4, 16]
GOLDEN_LARGE = "2e3cff4fdd64376ec54d197997ccce3b7ed649f8"

MANY = st.lists(st.integers(1, 13), min_size=1, max_size=25)
"""Images of each identity."""


def labels_of(images: list[int], seed: int = 0) -> np.ndarray:
    """So many images of identities 0, 10, 20 ... and some junk, in a random order."""
    labels = np.concatenate([np.repeat(10 * np.arange(len(images)), images), np.full(5, -1)])
    return np.random.default_rng(seed).permutation(labels)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(images=MANY, identities=st.integers(1, 9), instances=st.integers(1, 6), seed=st.integers(0, 2**63),
       start=st.integers(0, 40))  # fmt: skip
@example(images=[1] * 7, identities=3, instances=4, seed=0, start=0)
def test_samples__every_batch_has_p_identities_with_k_instances(
    images: list[int], identities: int, instances: int, seed: int, start: int
) -> None:
    labels = labels_of(images)
    if len(images) < identities:
        with pytest.raises(DataError, match=f"the data set has {len(images)}"):
            IdentityOrder(labels, seed=seed, identities=identities, instances=instances)
        return
    order = IdentityOrder(labels, seed=seed, identities=identities, instances=instances)
    for batch in range(start, start + 6):
        rows = order.samples(batch * order.batch + np.arange(order.batch)).reshape(identities, instances)
        people = labels[rows]
        assert (people == people[:, :1]).all() and (people >= 0).all()
        assert len(set(people[:, 0].tolist())) == identities
        for person, shown in zip(people[:, 0].tolist(), rows.tolist(), strict=True):
            often = Counter(shown)
            available = images[person // 10]
            assert len(often) == min(available, instances)
            assert max(often.values()) == -(-instances // available)


@settings(max_examples=60, deadline=None)
@given(images=MANY, identities=st.integers(1, 9), instances=st.integers(1, 6), rounds=st.integers(1, 12))
def test_samples__identities_and_their_images_are_used_evenly(
    images: list[int], identities: int, instances: int, rounds: int
) -> None:
    """After any number of rounds all identities have had as many turns, to within one; and of each one's turns, whole
    rounds of its images used all of them as often, to within one."""
    identities = min(identities, len(images))
    labels = labels_of(images)
    order = IdentityOrder(labels, seed=3, identities=identities, instances=instances)
    rows = order.samples(np.arange(rounds * order.epoch))
    turns = Counter(labels[rows[::instances]].tolist())
    counts = [turns[10 * person] for person in range(len(images))]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == rounds * (len(images) // identities) * identities
    shown = defaultdict(list)
    for row in rows.tolist():
        shown[labels[row]].append(row)
    for person, seen in shown.items():
        available = images[person // 10]
        whole = len(seen) // _full_round(available, instances) * _full_round(available, instances)
        often = [Counter(seen[:whole])[row] for row in np.flatnonzero(labels == person).tolist()]
        assert max(often) - min(often) <= 1


def _full_round(images: int, instances: int) -> int:
    return images // instances * instances if images >= instances else instances


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(offset=st.integers(0, 10**12), pieces=st.lists(st.integers(0, 90), min_size=1, max_size=5))
def test_samples__do_not_depend_on_how_they_are_asked(offset: int, pieces: list[int]) -> None:
    order = IdentityOrder(labels_of(list(range(1, 30))), seed=1, identities=4, instances=3)
    positions = offset + np.arange(sum(pieces))
    together = order.samples(positions)
    parts = [order.samples(part) for part in np.split(positions, np.cumsum(pieces))]
    np.testing.assert_array_equal(np.concatenate(parts), together)
    np.testing.assert_array_equal(order.samples(positions[::-1])[::-1], together)


def test_samples__golden_values() -> None:
    """Pinned: no library release may change them. If we change them, IDENTITY_ORDER_VERSION goes up."""
    assert IDENTITY_ORDER_VERSION == 1
    small = IdentityOrder(np.array(SMALL), seed=0, identities=2, instances=3)
    assert small.samples(np.arange(24)).tolist() == GOLDEN_SMALL
    large = IdentityOrder(np.arange(500_000) * 7919 % 60_000, seed=7, identities=16, instances=4)
    found = large.samples(10**9 + np.arange(1024)).astype("<i8").tobytes()
    assert sha256(found).hexdigest()[:40] == GOLDEN_LARGE


def test_samples__rounds_turns_and_seeds_differ() -> None:
    labels = labels_of([9] * 60)
    order = IdentityOrder(labels, seed=1, identities=8, instances=4)
    first = order.samples(np.arange(order.epoch))
    reseeded = IdentityOrder(labels, seed=2, identities=8, instances=4)
    for other in (order.samples(order.epoch + np.arange(order.epoch)), reseeded.samples(np.arange(order.epoch))):
        assert (labels[first] == labels[other]).mean() < 0.1
        assert (first == other).mean() < 0.05


def test_samples__neighbours_in_a_batch_come_together_by_chance() -> None:
    """Pairs of identities meet as often as in random batches: chi-square over 20 identities, 5 in each of 4 000."""
    order = IdentityOrder(np.repeat(np.arange(20), 4), seed=0, identities=5, instances=1)
    batches = order.samples(np.arange(4_000 * 5)).reshape(-1, 5) // 4
    met = np.zeros((20, 20))
    for batch in batches:
        met[np.ix_(batch, batch)] += 1
    pairs = met[np.triu_indices(20, 1)]
    expected = 4_000 * 10 / 190
    assert ((pairs - expected) ** 2 / expected).sum() < 190 + 5 * (2 * 190) ** 0.5


def published(labels: np.ndarray, identities: int, instances: int, seed: int) -> np.ndarray:
    """One epoch of RandomIdentitySampler (TransReID's datasets/sampler.py), by its rule: every identity's images
    shuffled and cut into turns of K, with replacement where there are fewer than K; batches of P identities, drawn
    among those with turns left, until fewer than P of them have any."""
    random = np.random.default_rng(seed)
    left = {}
    for person in np.unique(labels[labels >= 0]).tolist():
        rows = np.flatnonzero(labels == person)
        rows = random.choice(rows, instances) if len(rows) < instances else random.permutation(rows)
        left[person] = [rows[at : at + instances] for at in range(0, len(rows) - instances + 1, instances)]
    drawn = []
    while len(left) >= identities:
        for person in random.permutation(list(left))[:identities].tolist():
            drawn.append(left[person].pop(0))
            if not left[person]:
                del left[person]
    return np.array(list(chain(*drawn)))


def test_samples__statistics_of_the_published_sampler() -> None:
    """With as many images of everybody both give each identity about as many turns and each image about as many
    places; ours are even to within one, the published one's not."""
    labels = labels_of([12] * 150)
    order = IdentityOrder(labels, seed=0, identities=16, instances=4)
    theirs = np.concatenate([published(labels, 16, 4, seed) for seed in range(8)])
    ours = order.samples(np.arange(len(theirs) // order.batch * order.batch))
    turns, images = [], []
    for rows in (ours, theirs):
        groups = labels[rows].reshape(-1, 16, 4)
        assert (groups == groups[..., :1]).all()
        assert all(len(np.unique(batch)) == 16 for batch in groups[..., 0])
        turns.append(np.bincount(labels[rows][::4] // 10, minlength=150))
        images.append(np.bincount(rows, minlength=len(labels))[labels >= 0])
    assert abs(turns[0].mean() - turns[1].mean()) < 1
    assert np.ptp(turns[0]) <= 1 <= np.ptp(turns[1])
    assert images[0].std() <= images[1].std() and abs(images[0].mean() - images[1].mean()) < 0.5


def test_order__leaves_junk_out() -> None:
    labels = np.array([0, -1, 5, 5, 0, -1, 9, 9])
    rows = IdentityOrder(labels, seed=0, identities=3, instances=2).samples(np.arange(60))
    assert set(rows.tolist()) == {0, 2, 3, 4, 6, 7}


@pytest.mark.parametrize("wrong", [(0, 1), (1, 0)])
def test_order__refuses_impossible_sizes(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        IdentityOrder(np.array([1]), seed=0, identities=wrong[0], instances=wrong[1])


def test_numbered__ascending_from_zero_without_the_negative() -> None:
    assert numbered(np.array(SMALL)).tolist() == [1, -1, 1, 0, 4, -1, 1, 4, 3, 2, 0, 4, 1, 1, -1, -1, 4, 3, 0, -1]
    assert numbered(np.array([-1, -2])).tolist() == [-1, -1]


def test_numbered__a_smaller_fraction_is_part_of_a_larger_one() -> None:
    pids = np.repeat(np.arange(3, 203), 4)
    kept = {}
    for fraction in (0.001, 0.1, 0.5, 1.0):
        labels = numbered(pids, fraction=fraction, seed=7)
        kept[fraction] = set(pids[labels >= 0].tolist())
        assert np.unique(labels[labels >= 0]).tolist() == list(range(max(1, round(200 * fraction))))
        assert all(len(set(labels[pids == pid].tolist())) == 1 for pid in range(3, 203)), "all images of one or none"
        chosen = pids[labels >= 0]
        assert (np.diff(labels[labels >= 0][np.argsort(chosen, kind="stable")]) >= 0).all()
    assert kept[0.001] < kept[0.1] < kept[0.5] < kept[1.0]
    other = numbered(pids, fraction=0.5, seed=8)
    assert set(pids[other >= 0].tolist()) != kept[0.5]
