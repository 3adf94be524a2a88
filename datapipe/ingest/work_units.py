"""What the sources hold, found out once and never held in memory: parts of the work, kept in a nameless file."""

import hashlib
import json
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from datapipe.core.config import ShardConfig
from datapipe.dataset.remarks import Remarks
from datapipe.ingest.ownership import RULES_SETTING
from datapipe.ingest.scan import Work
from datapipe.ingest.screen import RULES
from datapipe.sources.base import Source, Unit

PART_BYTES = 64_000_000
"""Bytes of sources at which a part ends: a few seconds of work, and few enough parts that a shard, which takes some
crops of each, reads long ranges. Independent of the number of workers, so that another one can go on."""
DECIDING = (
    "samples_per_shard",
    "shard_mb",
    "min_size",
    "max_aspect",
    "max_pixels",
    "jpeg_quality",
    "exclude",
    "near_within",
    "sidecars",
    "seed",
)
"""Settings that change what is written."""


class Listing:
    """All units of the sources, in their order: `with Listing(sources) as listing: ...`."""

    def __init__(self, sources: Sequence[Source], local: Path | None = None) -> None:
        """List them. `local`: a folder with room for some ten bytes per file; the temporary folder by default."""
        self.sources = sorted(sources, key=lambda source: source.label)
        self.parts = self.bytes = 0
        self.remarks = Remarks()
        self._digests = {source.label: hashlib.sha256() for source in self.sources}
        self._file = tempfile.TemporaryFile(dir=local)  # noqa: SIM115  (closed at the end of the context)
        self._list()

    def __enter__(self) -> "Listing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def name(self) -> str:
        """The data set's name: the labels of its sources."""
        return "+".join(source.label for source in self.sources)

    def work(self) -> Iterator[Work]:
        """The parts, each as its units and their sources. One pass at a time."""
        self._file.seek(0)
        for _ in range(self.parts):
            yield [(self.sources[number], unit) for number, unit in pickle.load(self._file)]

    def request(self, config: ShardConfig, licence: str) -> bytes:
        """What a data set is made from, the same on every machine and in whatever order the sources are given."""
        record = {
            "format": 2,
            "licence": licence,
            "settings": {name: getattr(config, name) for name in DECIDING} | {RULES_SETTING: RULES},
            "sources": {label: digest.hexdigest() for label, digest in self._digests.items()},
        }
        return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()

    def _list(self) -> None:
        part: list[tuple[int, Any]] = []
        size = 0
        for number, unit in self._units():
            part.append((number, unit))
            size += unit.bytes
            if size >= PART_BYTES:
                self._keep(part, size)
                part, size = [], 0
        if part:
            self._keep(part, size)
        self._file.flush()

    def _units(self) -> Iterator[tuple[int, Unit]]:
        for number, source in enumerate(self.sources):
            for unit in source.units(self.remarks):
                self._digests[source.label].update(unit.digest.encode())
                yield number, unit

    def _keep(self, part: list[tuple[int, Any]], size: int) -> None:
        pickle.dump(part, self._file)
        self.parts, self.bytes = self.parts + 1, self.bytes + size
