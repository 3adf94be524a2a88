"""Rendered crops of two kinds, as loose files and as shards; made once, kept in the cache folder.

They need not look like people: what counts for decoding is their size in pixels and in bytes.
"""

import os
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path

import cv2
import numpy as np

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.dataset.manifest import FORMAT
from datapipe.ingest.pipeline import ingest
from tests.bench.scale import Scale

RENDERER = 1
"""Raise when the crops change, so that kept ones are not used any more."""
QUALITY = 88
NOISE = 5.0
"""Of the sensor, in grey levels; it decides how many bytes the crops take."""
SHARDS = 8
KINDS = ("large", "small")
ABOUT = (
    "large crops: 224-288 x 112-144 pixels, about 9 kB; small ones, like LUPerson's: median 160 x 50 pixels and "
    "3 kB; JPEG quality 88"
)


@dataclass(frozen=True)
class Crops:
    """Crops of one kind: files in `folder`/files/<class>/, and as a data set of webdataset shards."""

    kind: str
    folder: Path

    @property
    def files(self) -> Path:
        return self.folder / "files"

    @property
    def dataset(self) -> str:
        return str(self.folder / "dataset")

    @cached_property
    def paths(self) -> list[str]:
        return sorted(str(path) for path in self.files.rglob("*.jpg"))

    @cached_property
    def jpegs(self) -> list[bytes]:
        return [Path(path).read_bytes() for path in self.paths]


def crops(kind: str, scale: Scale) -> Crops:
    """The crops of this kind, rendered if they are not there yet."""
    found = Crops(kind, scale.cache / f"{kind}-{scale.crops}-v{RENDERER}.{FORMAT}")
    if not found.folder.exists():
        part = Crops(kind, found.folder.with_name(found.folder.name + f".{os.getpid()}.part"))
        _write_files(part, scale.crops)
        _write_shards(part, scale.crops)
        try:
            part.folder.rename(found.folder)
        except OSError:  # another run was quicker
            shutil.rmtree(part.folder)
    return found


def _write_files(target: Crops, count: int) -> None:
    random = np.random.default_rng(KINDS.index(target.kind))
    for number in range(count):
        path = target.files / f"{number % 32:02d}" / f"{number // 32 + 1:04d}_c{number % 6 + 1}s1_{number:06d}_00.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = _render(random, *_size(random, target.kind))
        path.write_bytes(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes())


def _write_shards(target: Crops, count: int) -> None:
    config = ShardConfig(samples_per_shard=-(-count // SHARDS), workers=1)
    with redirect_stderr(StringIO()):
        ingest([str(target.files)], target.dataset, config, StorageConfig())


def _size(random: np.random.Generator, kind: str) -> tuple[int, int]:
    """(height, width) in pixels. The small ones are spread as boxes that a detector cut from street scenes."""
    if kind == "large":
        return int(random.integers(224, 289)), int(random.integers(112, 145))
    near = np.exp(random.normal(0, 0.4))  # the person's distance
    return max(40, int(160 * near)), max(16, int(50 * near * np.exp(random.normal(0, 0.15))))


def _render(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Head, trunk and legs before a mottled background, slightly out of focus, with the sensor's noise. uint8 BGR."""
    picture = random.uniform(60, 190, 3) + _texture(random, (height, width), 24, 30)
    picture += _texture(random, (height, width), 6, 12)
    centre = width / 2 + random.normal(0, 0.04 * width)
    for top, bottom, half in ((0.18, 0.62, 0.30), (0.60, 0.96, 0.22)):
        rows = slice(int(top * height), int(bottom * height))
        columns = slice(max(0, int(centre - half * width)), min(width, int(centre + half * width)))
        piece = picture[rows, columns]
        piece[:] = random.uniform(10, 240, 3) + _texture(random, piece.shape[:2], 5, 18)
    head, radii = (int(centre), int(0.11 * height)), (int(0.13 * width), int(0.07 * height))
    picture = np.ascontiguousarray(picture, dtype=np.float32)
    cv2.ellipse(picture, head, radii, 0, 0, 360, (150, 170, 200), cv2.FILLED, cv2.LINE_AA)
    picture = cv2.GaussianBlur(picture, (0, 0), 0.7) + random.normal(0, NOISE, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _texture(random: np.random.Generator, size: tuple[int, ...], cell: int, strength: float) -> np.ndarray:
    """Smooth colour noise whose grains are `cell` pixels wide."""
    coarse = random.normal(0, strength, (max(2, size[0] // cell), max(2, size[1] // cell), 3)).astype(np.float32)
    return cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
