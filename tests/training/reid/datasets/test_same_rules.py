"""Evaluation reads the files, and sees the pixels, that ingestion does: folders and their shards are one data set."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.ingest.pipeline import ingest
from tests.training.reid.people import crop, market
from training.reid.datasets.open_dataset import ReIDSet, open_reid
from training.reid.datasets.training_shards import shard_training_part
from training.reid.embed import decode
from training.reid.zero_shot import evaluate_histogram

ENDINGS = ("webp", "tif", "png", "bmp", "JFIF", "jpe", "gif", "ppm")


def recoded(file: Path, ending: str) -> Path:
    """The image in another format, in place of its file."""
    kind = {"tif": "TIFF", "JFIF": "JPEG", "jpe": "JPEG"}.get(ending, ending.upper())
    image = Image.open(file)
    made = file.with_suffix(f".{ending}")
    file.unlink()
    image.save(made, kind)
    return made


def sharded(folder: Path, out: Path) -> ReIDSet:
    ingest([str(folder)], str(out), ShardConfig(workers=1), StorageConfig())
    return open_reid(str(out), name="own")


def test_folder__is_the_set_that_its_shards_are(tmp_path: Path) -> None:
    folder = market(tmp_path / "set")
    files = sorted((folder / "bounding_box_test").glob("*.jpg"))
    for file, ending in zip(files, ENDINGS, strict=False):
        recoded(file, ending)
    for hidden in (
        ".DS_Store",
        "._0001_c1s1_000000_00.jpg",
        "Thumbs.db",
        ".git/0001_c1s1.jpg",
        "__MACOSX/0001_c1s1.jpg",
    ):
        (folder / "query" / hidden).parent.mkdir(exist_ok=True)
        (folder / "query" / hidden).write_bytes(b"x")
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = files[len(ENDINGS)]
    Image.open(lying).rotate(90, expand=True).save(lying, exif=exif, quality=95)
    grey = np.asarray(Image.open(files[len(ENDINGS) + 1]).convert("L")).astype(np.uint16) * 16
    Image.fromarray(grey).save(files[len(ENDINGS) + 1].with_suffix(".png"))
    files[len(ENDINGS) + 1].unlink()
    own, shards = open_reid(str(folder), name="own"), sharded(folder, tmp_path / "shards")
    for part in ("query", "gallery", "train"):
        mine, theirs = own.parts[part], shards.parts[part]
        assert mine.paths.tolist() == theirs.paths.tolist() and mine.pids.tolist() == theirs.pids.tolist()
        for path in mine.paths.tolist():
            seen, stored = decode(own.read(path), path).astype(int), decode(shards.read(path), path)
            assert seen.shape == stored.shape and np.abs(seen - stored).mean() < 4, path
    assert len(own.gallery) == len(files) - 1  # one is junk


@pytest.mark.parametrize(
    ("kind", "within"), [("as it is", 0), ("turned", 0.005), ("12 bits in 16", 0.001), ("tif", 0.006), ("webp", 0.005)]
)
def test_folder__scores_as_its_shards_do(real_crops: Path, tmp_path: Path, kind: str, within: float) -> None:
    """Half of a gallery of real people as phones, depth cameras and scanners write it. What differs comes from the JPEG
    that ingestion makes of other formats; images that lay on their side would halve the score of colours in stripes."""
    folder = tmp_path / "set"
    taken = {file.name[:4] for file in sorted((real_crops / "query").glob("*.jpg"))[:60]}
    for part in ("query", "bounding_box_test"):
        (folder / part).mkdir(parents=True)
        for number, file in enumerate(sorted((real_crops / part).glob("*.jpg"))):
            if file.name[:4] in taken:
                place = folder / part / file.name
                place.write_bytes(file.read_bytes())
                if part != "query" and number % 2:
                    as_another_program_writes(place, kind)
    own, shards = open_reid(str(folder), name="own"), sharded(folder, tmp_path / "shards")
    assert len(own.gallery) == len(shards.gallery) > 100
    scores = [evaluate_histogram(reid).best.mAP for reid in (own, shards)]
    assert scores[0] == pytest.approx(scores[1], abs=within, rel=0) and scores[0] > 0.05


def as_another_program_writes(file: Path, kind: str) -> None:
    image = Image.open(file)
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.rotate(90, expand=True).save(file, exif=exif, quality=95)
    elif kind == "12 bits in 16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 16).save(file.with_suffix(".png"))
        file.unlink()
    elif kind != "as it is":
        recoded(file, kind)


def test_folder__says_what_it_passes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = market(tmp_path / "set")
    for name in ("0001_c1s1_000009_00.heic", "0001_c1s1_000008_00.avif", "list.csv"):
        (folder / "bounding_box_test" / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        open_reid(str(folder), name="own")
    (line,) = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert "bounding_box_test" in line and "1 .avif, 1 .csv, 1 .heic" in line


def test_warning__of_a_data_set_is_told_once_however_many_weights_it_scores(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = market(tmp_path / "set")
    (folder / "query" / "list.csv").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        for _ in range(7):
            open_reid(str(folder), name="own")
    assert len([record for record in caplog.records if "passed over" in record.getMessage()]) == 1


def test_shards__say_how_many_images_they_lack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = market(tmp_path / "set")
    (folder / "bounding_box_test" / "0001_c1s1_000009_00.jpg").write_bytes(crop(1, 1, 9)[:300])
    with caplog.at_level(logging.WARNING):
        sharded(folder, tmp_path / "shards")
    assert "1 image of its sources not in these shards" in caplog.text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_decode__refuses_cut_images_by_name(kind: str) -> None:
    sink = io.BytesIO()
    Image.open(io.BytesIO(crop(1, 1, 0))).save(sink, kind)
    with pytest.raises(DataError, match="cut|corrupt") as raised:
        decode(sink.getvalue()[: sink.tell() // 2], "query/0001_c1.jpg")
    assert raised.value.where == "query/0001_c1.jpg"


def renamed(root: Path, before: str) -> Path:
    for file in list(root.rglob("*.jpg")):
        if not file.name.startswith("-1"):
            file.rename(file.with_name(before + file.name))
    return root


def test_names__of_large_identities_are_read(tmp_path: Path) -> None:
    folder = renamed(market(tmp_path / "set"), "2023110500")
    found = open_reid(str(folder), name="own")
    assert found.query.pids.min() > 1 << 32
    with pytest.raises(DataError, match="too large to be trained on"):
        shard_training_part(found, str(tmp_path / "train"), StorageConfig())
    assert sharded(folder, tmp_path / "shards").query.pids.tolist() == found.query.pids.tolist()


@pytest.mark.parametrize("before", ["9" * 30])
def test_names__of_too_large_identities_are_said(tmp_path: Path, before: str) -> None:
    with pytest.raises(DataError, match="too large: identities take up to 64 bits"):
        open_reid(str(renamed(market(tmp_path / "set"), before)), name="own")
