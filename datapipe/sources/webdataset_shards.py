"""WebDataset samples in tars made by others: which members belong together is for the webdataset library to say.

Members come from `tars`, not from the library's own reader: that one drops links in silence, and takes a tar that was
cut between two members for a complete one.
"""

import json
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple, cast

from datapipe.errors import DataError
from datapipe.sources import Crop
from datapipe.sources.labels import labelled
from datapipe.sources.place import IMAGE_ENDINGS, is_image
from datapipe.sources.tars import Member

LOOKED_AT, LOOKED_BYTES = 64, 16 << 20
"""Members, and bytes, at the beginning of a tar that tell whether it holds samples."""


class Found(NamedTuple):
    """The members of a tar, all of them, and what the first ones tell."""

    has_samples: bool
    """An image has a file of the same name and another ending beside it: its labels."""
    members: Iterator[Member]


def look_ahead(members: Iterator[Member]) -> Found:
    """Whether a tar holds WebDataset samples, or just images. Its own members decide, so all machines agree."""
    first: list[Member] = []
    while len(first) < LOOKED_AT and sum(len(member.data) for member in first) < LOOKED_BYTES:
        if (member := next(members, None)) is None:
            break
        first.append(member)
    has_samples = any(
        _key(one.name) == _key(next_one.name) and is_image(one.name) != is_image(next_one.name)
        for one, next_one in pairwise(first)
    )
    return Found(has_samples, chain(first, members))


def read_samples(members: Iterator[Member], label: str, prefix: str, url: str) -> Iterator[Crop]:
    """The images of all samples, with the labels of the .json beside them; links and the like come last.

    Raises DataError where two members have the same name, or labels are not JSON.
    """
    # Imported here because webdataset loads torch where it finds it: seconds that other sources do without.
    from webdataset.tariterators import group_by_keys

    problems: list[Member] = []

    def files() -> Iterator[dict[str, Any]]:
        for member in members:
            if member.problem:
                problems.append(member)
            else:
                yield {"fname": member.name, "data": member.data, "__url__": url}

    try:
        for sample in group_by_keys(files(), lcase=False):
            yield from _crops(sample, label, prefix)
    except ValueError as error:
        raise DataError(
            f"the samples cannot be read: {error}", where=url, hint="correct the tar, or leave it out"
        ) from error
    for member in problems:
        yield labelled(label, prefix + member.name, b"", problem=member.problem)


def _key(name: str) -> str:
    """What members of one sample share: all up to the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _crops(sample: dict[str, object], label: str, prefix: str) -> Iterator[Crop]:
    record = _record(sample)
    for ending, data in sample.items():
        if not ending.startswith("__") and ("." + ending).lower().endswith(IMAGE_ENDINGS):
            yield labelled(label, f"{prefix}{sample['__key__']}.{ending}", cast(bytes, data), record)


def _record(sample: dict[str, object]) -> dict[str, Any]:
    text = sample.get("json")
    if not isinstance(text, bytes):
        return {}
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{sample['__key__']}.json is not JSON: {error}") from error
    return record if isinstance(record, dict) else {}
