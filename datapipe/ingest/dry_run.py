"""What a run of `shard` would do, from a listing and a few seconds of trying; nothing is written."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.core.resource_limits import available_cores
from datapipe.dataset.remarks import Remarks
from datapipe.dataset.tar import END_BYTES, member_bytes
from datapipe.ingest.pipeline import refuse_inside
from datapipe.ingest.scan import Work, inspected
from datapipe.ingest.screen import Kept
from datapipe.ingest.work_units import Listing
from datapipe.sources import open_sources

SAMPLE_S = 3.0
"""Seconds of reading and decoding."""
PLACES = 16
"""Parts of the sources that are looked into, evenly spread."""
LEAST_BYTES = 100
"""No image has fewer, so that there are no more of them than the bytes of the sources allow."""
SIDECAR_BYTES = 300
"""Bytes of the JSON beside a crop, about."""
OTHER_WORK = 1.4
"""Time of the whole run over that of reading and decoding."""


@dataclass(frozen=True)
class Estimate:
    """Figures from a sample; the bytes of the sources alone are exact."""

    source_bytes: int
    crops: int
    refused: float
    """Share that would be quarantined."""
    shards: int
    bytes: int
    """Bytes of all tars."""
    seconds: float
    """With the processes of the configuration."""
    remarks: Remarks
    """What is passed over and not understood: of the listing, and of the crops that were looked at."""


def estimate(sources: Sequence[str], out: str, config: ShardConfig, storage: StorageConfig) -> Estimate:
    """List the sources and read some crops of them. Raises DataError as `ingest` does where that is not possible."""
    refuse_inside(sources, out)
    with Listing(open_sources(sources, storage, jpeg_quality=config.jpeg_quality)) as listing:
        sample = _Sample.of(listing, config)
        total, remarks = listing.bytes, listing.remarks
        remarks.add(sample.remarks)
    crops = sample.crops if sample.whole else round(total / sample.read * sample.crops)
    crops = max(sample.crops, min(crops, total // LEAST_BYTES))
    kept = crops * len(sample.sizes) / sample.crops
    taken = _taken(np.array(sample.sizes), config)
    mean = float(taken.mean()) if len(taken) else 0.0
    per_shard = max(1.0, min(config.samples_per_shard, (config.shard_mb * 1e6 - END_BYTES) / max(mean, 1.0)))
    shards = -(-kept // per_shard)
    seconds = crops * sample.seconds / sample.crops * OTHER_WORK / (config.workers or available_cores())
    return Estimate(total, crops, 1 - kept / crops, int(shards), round(kept * mean + shards * END_BYTES), seconds,
                    remarks)  # fmt: skip


@dataclass
class _Sample:
    """Some crops of all parts of the sources."""

    crops: int = 0
    read: int = 0
    """Bytes of these crops in their sources."""
    seconds: float = 0.0
    sizes: tuple[int, ...] = ()
    """Bytes of those that would be kept."""
    whole: bool = True
    """Nothing was left out."""
    remarks: Remarks = field(default_factory=Remarks)

    @staticmethod
    def of(listing: Listing, config: ShardConfig) -> "_Sample":
        sample, sizes = _Sample(), []
        step = max(1, listing.parts // PLACES)
        sample.whole = step == 1
        begin = time.process_time()
        end = time.monotonic() + SAMPLE_S
        for number, work in enumerate(islice(listing.work(), 0, None, step)):
            until = time.monotonic() + (end - time.monotonic()) / max(1, -(-listing.parts // step) - number)
            for size, kept in _looked_at(work, config, sample.remarks):
                sample.crops, sample.read = sample.crops + 1, sample.read + size
                if kept:
                    sizes.append(kept)
                if time.monotonic() > until:
                    sample.whole = False
                    break
        if not sample.crops:
            raise DataError("the sources hold no images", hint="look into the tars")
        sample.seconds, sample.sizes = time.process_time() - begin, tuple(sizes)
        return sample


def _looked_at(work: Work, config: ShardConfig, remarks: Remarks) -> Iterator[tuple[int, int]]:
    """(bytes as found, bytes as kept; 0 if it is refused) of each crop."""
    for crop, verdict in inspected(work, config, remarks):
        yield max(1, len(crop.data)), len(verdict.data) if isinstance(verdict, Kept) else 0


def _taken(sizes: np.ndarray, config: ShardConfig) -> np.ndarray:
    taken = member_bytes(sizes)
    return taken + member_bytes(np.array([SIDECAR_BYTES])) if config.sidecars == "json" else taken
