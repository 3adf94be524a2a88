"""What would make a score wrong, found before any work starts: counts, identities, cameras, equal images."""

import numpy as np
from numpy.typing import NDArray

from datapipe.core.errors import DataError
from training.reid.datasets.benchmarks import PARTS, Benchmark
from training.reid.datasets.read_part import PartRead
from training.reid.datasets.reid_set import DISTRACTOR, JUNK, Labelled, ReIDSet

SHOWN = 3
"""Names in a message."""


def differences(published: Benchmark, parts: dict[str, PartRead]) -> list[str]:
    """How the parts differ from the published counts, one sentence each; none: all is there."""
    lines = []
    for name in PARTS:
        images, identities = published.counts[name]
        part = parts[name].images
        if (len(part), part.identities) != (images, identities):
            counts = f"{len(part):,} of {images:,} images and {part.identities:,} of {identities:,} identities"
            more = " (too many)" if len(part) > images else ""
            lines.append(f"{name} has {counts}{more}{_named(parts[name].missing)}")
    return lines


def _named(missing: tuple[str, ...]) -> str:
    return f"; listed and not there: {_listed(missing)}" if missing else ""


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def unmatched(query: Labelled, gallery: Labelled, where: str) -> list[str]:
    """Warnings about queries that cannot be scored. Raises DataError where none can: one camera, or no match at all."""
    for name, part in (("query", query), ("gallery", gallery)):
        if not len(part):
            raise DataError(f"no images of people in {name}", where=where, hint="is everything in its folder?")
    cameras = np.union1d(query.cameras, gallery.cameras)
    if len(cameras) == 1:
        raise DataError(
            f"all images are from camera {cameras[0] + 1}: retrieval compares a person across cameras",
            where=where,
            hint="the camera is the number after _c in the file name",
        )
    alone = ~has_match(query, gallery)
    if alone.all():
        raise DataError(
            f"none of the {len(query)} queries has an image of its identity from another camera in the gallery",
            where=where,
            hint="query and gallery must show the same people; are the folders from the same data set?",
        )
    if not alone.any():
        return []
    absent = len(np.setdiff1d(query.pids, gallery.pids))
    return [
        f"queries without an image of their identity from another camera in the gallery: {alone.sum():,} of "
        f"{len(query):,}; identities of queries that are not in it at all: {absent:,} of {query.identities:,}; these "
        "queries are skipped, not scored 0"
    ]


def has_match(query: Labelled, gallery: Labelled) -> NDArray[np.bool_]:
    """[queries]: whether another camera of the gallery has seen the person."""
    pairs = np.unique(np.stack([gallery.pids, gallery.cameras]), axis=1)
    people, first, cameras = np.unique(pairs[0], return_index=True, return_counts=True)
    at = np.searchsorted(people, query.pids).clip(max=len(people) - 1)
    seen = people[at] == query.pids
    only_camera = pairs[1][first[at]]
    return seen & ((cameras[at] > 1) | (only_camera != query.cameras))


def shared_identities(train: Labelled, query: Labelled, gallery: Labelled) -> list[str]:
    """Complaints about people of the training images who are tested on, where one number is one person everywhere."""
    distractors = [DISTRACTOR] if DISTRACTOR not in query.pids else []
    tested = np.setdiff1d(np.union1d(query.pids, gallery.pids), [JUNK, *distractors])
    both = np.intersect1d(train.pids, tested)
    if not len(both):
        return []
    named = _listed(tuple(str(pid) for pid in both.tolist()))
    return [f"{len(both):,} identities are both in train and in query or gallery: {named}"]


def shared_images(reid: ReIDSet) -> list[str]:
    """Complaints about training images that are tested on, byte for byte. Reads every image, unless it is in shards."""
    if reid.train is None:
        return []
    train = reid.images.hashes(reid.train.paths.tolist())
    lines = []
    for name, part in (("query", reid.query), ("gallery", reid.gallery)):
        hashes = reid.images.hashes(part.paths.tolist())
        both, at_train, at_part = np.intersect1d(train, hashes, return_indices=True)
        if len(both):
            pair = f"{reid.train.paths[at_train[0]]} is {part.paths[at_part[0]]}"
            lines.append(f"{np.isin(hashes, both).sum():,} images of {name} are also in train, byte for byte: {pair}")
    return lines
