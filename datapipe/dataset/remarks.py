"""What of the sources was passed over or not understood: counted where it is met, told at the end, kept for `stats`."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

SHOWN = 8
"""Kinds that a line names; the others are counted."""
METADATA = b"remarks"
"""Where the list of quarantined crops has them, as JSON."""
NO_ENDING = "without ending"
LONGEST_ENDING = 12


def ending_of(name: str) -> str:
    """The ending by which a file that is passed over is counted: ".heic", in small letters."""
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    usable = dot and 0 < len(ending) <= LONGEST_ENDING and ending.isalnum() and ending.isascii()
    return f".{ending.lower()}" if usable else NO_ENDING


@dataclass
class Remarks:
    """Counts by kind; empty where all was taken in and understood."""

    passed_over: Counter[str] = field(default_factory=Counter)
    """Files and members that are no images by their names, by ending."""
    unread_labels: Counter[str] = field(default_factory=Counter)
    """Labels that are there and were not understood, by what they are."""
    test_images: Counter[str] = field(default_factory=Counter)
    """Crops of a benchmark's test set, by their folder."""

    def pass_over(self, name: str) -> None:
        """Count a file."""
        self.passed_over[ending_of(name)] += 1

    def add(self, other: "Remarks") -> None:
        """Count what another one has as well."""
        for one in fields(self):
            getattr(self, one.name).update(getattr(other, one.name))

    def to_json(self) -> str:
        return json.dumps({one.name: dict(sorted(getattr(self, one.name).items())) for one in fields(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Remarks":
        """Empty for what is none."""
        try:
            given: Any = json.loads(text)
            known = {one.name: Counter({str(kind): int(count) for kind, count in given.get(one.name, {}).items()})
                     for one in fields(cls)}  # fmt: skip
        except (ValueError, AttributeError, TypeError):
            return cls()
        return cls(**known)

    def lines(self) -> Iterator[str]:
        """Sentences for a person, one for each kind of remark that there is."""
        if self.passed_over:
            yield f"passed over, no images by their names: {_listed(self.passed_over)}"
        if self.unread_labels:
            yield f"labels that were not understood, left unknown: {_listed(self.unread_labels)}"
        if self.test_images:
            yield (f"crops of test folders are among them: {_listed(self.test_images)}; pre-training on this data set "
                   "would learn from the images that it is scored on: shard the training folder alone "
                   "(bounding_box_train); for evaluation all is well")  # fmt: skip


def _listed(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[SHOWN:])
    shown = ", ".join(f"{count:,} {kind}" for kind, count in ordered[:SHOWN])
    return f"{shown} and {rest:,} of other kinds" if rest else shown
