"""The training part of a labelled data set as a source of `datapipe`: fine-tuning reads shards like all else."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.remarks import Remarks
from datapipe.ingest.pipeline import ingest_sources
from datapipe.sources.base import UNIT_CROPS, Crop
from datapipe.sources.labels import WIDTHS, fits
from training.reid.datasets.image_stores import ImageStore, open_source
from training.reid.datasets.reid_set import ReIDSet

EVERYTHING = ShardConfig(min_size=(1, 1), max_aspect=1_000.0)
"""Nothing that decodes is screened out: a benchmark's training part is what it is."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring images of the part: (path, identity, camera from 1, bytes) each."""

    images: tuple[tuple[str, int, int, int], ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for *_, size in self.images)

    @property
    def digest(self) -> str:
        """A digest of paths, labels and sizes."""
        return hashlib.sha256(repr(self.images).encode()).hexdigest()


@dataclass(frozen=True)
class TrainingPart:
    """Every training image, with the identity and camera that the data set's reader found. Crosses processes: the
    images are opened where they are read."""

    label: str
    url: str
    storage: StorageConfig
    stretches: tuple[Stretch, ...]

    @classmethod
    def of(cls, reid: ReIDSet, storage: StorageConfig) -> "TrainingPart":
        """Raises DataError where the set has no training part."""
        if reid.train is None:
            raise DataError("this data set has no images to train on", where=reid.images.url,
                            hint="fine-tuning needs its training part, e.g. bounding_box_train")  # fmt: skip
        if beyond := [int(pid) for pid in reid.train.pids if not fits("pid", int(pid))]:
            raise DataError(f"an identity is too large to be trained on: {beyond[0]} takes over {WIDTHS['pid']} bits",
                            where=reid.images.url, hint="number them anew, from 0")  # fmt: skip
        paths = reid.train.paths.tolist()
        sizes = _sizes(open_source(reid.images.url, storage), paths)
        rows = list(zip(paths, reid.train.pids.tolist(), (reid.train.cameras + 1).tolist(), sizes, strict=True))
        stretches = (Stretch(tuple(rows[start : start + UNIT_CROPS])) for start in range(0, len(rows), UNIT_CROPS))
        return cls(reid.name, reid.images.url, storage, tuple(stretches))

    @cached_property
    def _images(self) -> ImageStore:
        return open_source(self.url, self.storage)

    def units(self, remarks: Remarks | None = None) -> Iterator[Stretch]:
        yield from self.stretches

    def read(self, unit: Stretch, remarks: Remarks | None = None) -> Iterator[Crop]:
        for path, pid, camera, _ in unit.images:
            yield Crop(self.label, path, self._images.read(path), pid, camera)


def shard_training_part(reid: ReIDSet, out: str, storage: StorageConfig) -> Manifest:
    """Shard the training part into `out`, or find it there. Raises DataError as `ingest` does."""
    return ingest_sources([TrainingPart.of(reid, storage)], out, EVERYTHING, storage).manifest


def _sizes(source: ImageStore, paths: list[str]) -> list[int]:
    folders = sorted({path.partition("/")[0] for path in paths})
    size_of_path = {entry.path: entry.size for folder in folders for entry in source.images(folder)}
    return [size_of_path[path] for path in paths]
