"""A labelled data set by its place: recognised or named, read, and compared with what was published.

benchmarks.py  the facts of every data set      image_stores.py    folders, object stores, shards
read_part.py    a layout -> labelled images      recognise.py  which layout it is
reid_set.py   what comes out                   checks.py     what would make a score wrong
"""

import logging
from dataclasses import replace
from pathlib import PurePosixPath

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.core.warn_once import warn_once
from training.reid.datasets import checks
from training.reid.datasets.benchmarks import PUBLISHED
from training.reid.datasets.image_stores import open_source
from training.reid.datasets.read_part import PartRead, read_part
from training.reid.datasets.recognise import OWN, by_counts, recognise
from training.reid.datasets.reid_set import DISTRACTOR, JUNK, Images, Labelled, ReIDSet

__all__ = ["DISTRACTOR", "JUNK", "OWN", "Images", "Labelled", "ReIDSet", "check_images", "open_reid"]

log = logging.getLogger(__name__)

PARTIAL = "`evaluate --allow-partial` goes on with what is there; scores are then marked as not comparable"
UNPACK = f"unpack the archive again, or look which data set it is. {PARTIAL}"
APART = f"scores would be too good: take them out of one side. {PARTIAL}"


def open_reid(
    url: str, storage: StorageConfig | None = None, *, name: str = "", allow_partial: bool = False
) -> ReIDSet:
    """The data set in a folder, below a prefix, or in shards made by `datapipe`; labels alone are read.

    `name` is one of PUBLISHED or OWN. Without it the set is recognised by its lists and folders, by the name of its
    folder, or by its counts; what is none of these is the user's own, named after the folder. A published set that
    differs from its counts is refused, unless `allow_partial`: then the differences are logged and kept.
    Errors: `ConfigError` for an unknown or ambiguous name; `DataError` for what is missing or contradicts itself.
    """
    source = open_source(url, storage or StorageConfig())
    recognised, layout = recognise(source, name)
    parts = {part: read_part(source, where, layout) for part, where in layout.parts.items()}
    query, gallery, train = (parts[part].images for part in ("query", "gallery", "train"))
    if not recognised and name != OWN:
        recognised = by_counts({part: read.images for part, read in parts.items()})
    published = PUBLISHED.get(recognised)
    differences = _differences(recognised, name, parts)
    if differences and not allow_partial:
        stated = PUBLISHED.get(name) or PUBLISHED[recognised]
        raise DataError(f"this is not {stated.title} as it was published: {'; '.join(differences)}", where=source.url,
                        hint=UNPACK)  # fmt: skip
    warnings = checks.unmatched(query, gallery, source.url)
    if published is None or published.one_space:
        warnings += _apart(checks.shared_identities(train, query, gallery), source.url, allow_partial)
    for remark in (*differences, *warnings):
        warn_once(log, f"{source.url}: {remark}")
    return ReIDSet(
        name=recognised or PurePosixPath(str(url).rstrip("/")).name,
        images=source,
        query=query,
        gallery=gallery,
        train=train if len(train) else None,
        official=published.title if published else "",
        differences=tuple(differences),
        warnings=tuple(warnings),
    )


def check_images(reid: ReIDSet, *, allow_partial: bool = False) -> ReIDSet:
    """Refuse training images that are tested on, byte for byte; with `allow_partial` warn, and keep the warning.

    Reads every image once (1.2 GB for MSMT17), unless they are in shards, whose indexes know the hashes. Once per
    command, before the work starts. A set without training images passes unread.
    """
    shared = _apart(checks.shared_images(reid), reid.images.url, allow_partial)
    for remark in shared:
        warn_once(log, f"{reid.images.url}: {remark}")
    return replace(reid, warnings=(*reid.warnings, *shared))


def _differences(recognised: str, stated: str, parts: dict[str, PartRead]) -> list[str]:
    if recognised not in PUBLISHED:
        return []
    other = stated in PUBLISHED and stated != recognised
    named = [f"it is {PUBLISHED[recognised].title}, in place of {PUBLISHED[stated].title}"] if other else []
    return named + checks.differences(PUBLISHED[recognised], parts)


def _apart(shared: list[str], where: str, allow_partial: bool) -> list[str]:
    if shared and not allow_partial:
        raise DataError(f"train and test are not apart: {'; '.join(shared)}", where=where, hint=APART)
    return shared
