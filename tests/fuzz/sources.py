"""What the readers of crops have in common: sound crops, their ingestion, and how files are put there."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from datapipe.__main__ import main
from datapipe.core import cli
from tests.datapipe.crop_set import jpegs
from tests.fuzz.reader import Make

BLOCK = 512


@cache
def crops() -> tuple[bytes, ...]:
    """Small JPEGs, as people find them."""
    return tuple(jpegs(6))


def shard(folder: Path, out: Path) -> int:
    """Ingest the one thing in the folder."""
    source = folder / "set" if (folder / "set").is_dir() else next(path for path in folder.iterdir())
    words = ["shard", str(source), "--out", str(out / "set"), "--workers", "1", "--max-bad", "1"]
    tried = cli.run(main, [*words, "--dry-run"])
    code = cli.run(main, words)
    if code == 0 and tried != 0:
        raise AssertionError("a dry run fails where the run does not")
    return code


def shard_all(folder: Path, out: Path) -> int:
    """Ingest a folder of images, of which none may be lost: each is kept, or in quarantine."""
    code = shard(folder, out)
    if code == 0:
        rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in out.glob("set/shards/*.parquet"))
        rows += pyarrow.parquet.read_metadata(out / "set" / "quarantine.parquet").num_rows
        found = len(list((folder / "set").iterdir()))
        if rows != found:
            raise AssertionError(f"{found} images became {rows} rows")
    return code


def written(name: str, data: bytes) -> Make:
    """One file of this content."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return make


def later(name: str, data: Callable[[], bytes]) -> Make:
    """One file whose content is made when it is wanted."""
    return lambda folder: written(name, data())(folder)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def picture(height: int = 96, width: int = 48) -> Image.Image:
    noise = np.random.default_rng(height * width).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
