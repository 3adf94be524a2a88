"""What `stats` says, counted again by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datapipe.core.config import RemoveConfig, SelectConfig, ShardConfig, StorageConfig
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.stats import as_text, statistics
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.remove import remove
from datapipe.maintain.select import select

STORAGE = StorageConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_crops: Callable[..., dict[str, bytes]]) -> Path:
    """30 crops of two sources; "a" has two files under names of other people, and one that is no image."""
    folder = tmp_path_factory.mktemp("stats")
    crops = list(write_crops(folder / "a", 20).items())
    write_crops(folder / "b", 8, seed=1)
    (folder / "a" / "0777_c3s1_000001_00.jpg").write_bytes(crops[0][1])
    (folder / "a" / f"{crops[4][0][:4]}_c3s1_000002_00.jpg").write_bytes(crops[4][1])
    (folder / "a" / "0001_c1s1_999999_00.jpg").write_bytes(b"no image")
    (folder / "a" / "0001_c1s1_999998_00.jpg").write_bytes(crops[0][1][:300])
    ingest(
        [f"{folder}/a", f"{folder}/b"],
        f"{folder}/set",
        ShardConfig(samples_per_shard=13, workers=1, max_bad=0.5),
        STORAGE,
        licence="research only",
    )
    return folder


def test_stats__counts_what_is_there(folder: Path) -> None:
    facts = statistics(f"{folder}/set", STORAGE)
    assert json.loads(json.dumps(facts)) == facts
    rows = Manifest.load(f"{folder}/set").table(["source", "name", "height", "width", "size"]).to_pylist()
    assert (facts["crops"], facts["stored_crops"], facts["shards"], facts["removed"]) == (30, 30, 3, 0)
    assert facts["bytes"] == sum((folder / row["source"] / row["name"]).stat().st_size for row in rows)
    assert facts["tar_bytes"] == sum(path.stat().st_size for path in (folder / "set").glob("shards/*.tar"))
    sizes = [Image.open(folder / row["source"] / row["name"]).size for row in rows]
    assert facts["width"]["50"] == median(size[0] for size in sizes)
    assert facts["height"]["100"] == max(size[1] for size in sizes)
    assert facts["aspect"]["25"] == pytest.approx(np.percentile([size[1] / size[0] for size in sizes], 25))
    assert sum(facts["quarantine"].values()) == 2 and facts["quarantine"]["not an image"] == 1
    assert facts["licence"] == "research only"


def test_stats__per_source(folder: Path) -> None:
    facts = statistics(f"{folder}/set", STORAGE)
    counts = {
        name: {key: one[key] for key in ("crops", "people", "cameras", "tracks", "exact")}
        for name, one in facts["sources"].items()
    }
    assert counts == {
        "a": {"crops": 22, "people": 6, "cameras": 3, "tracks": 0, "exact": 2},
        "b": {"crops": 8, "people": 2, "cameras": 2, "tracks": 0, "exact": 0},
    }
    assert (facts["people"], facts["cameras"], facts["exact"]) == (8, 5, 2)


def test_stats__price_of_excluding_is_the_share_of_other_people(folder: Path) -> None:
    price = statistics(f"{folder}/set", STORAGE)["price"]
    assert price["exact"] == {"labelled_pairs": 2, "different_people": 1, "share": 0.5}
    assert price["near"]["labelled_pairs"] >= 2


def test_stats__text_says_the_same(folder: Path) -> None:
    text = as_text(statistics(f"{folder}/set", STORAGE))
    assert "30 crops, " in text and "3 shards" in text and "licence: research only" in text
    assert "2 exact duplicates are marked; of 2 labelled pairs, 1 (50.0%) are different people" in text
    assert "1 not an image" in text and [line.split()[:3] for line in text.splitlines() if line.startswith("a ")] == [
        ["a", "22", "6"]
    ]


def test_stats__of_a_selection_and_after_a_removal(
    folder: Path, tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    write_crops(tmp_path / "a", 12)
    write_crops(tmp_path / "b", 4, seed=1)
    url = f"{tmp_path}/set"
    ingest([f"{tmp_path}/a", f"{tmp_path}/b"], url, ShardConfig(samples_per_shard=4, workers=1), STORAGE)
    part = select(url, SelectConfig(where='source == "b"'), STORAGE).manifest
    facts = statistics(f"{url}/{part.file}", STORAGE)
    assert (facts["crops"], facts["stored_crops"], list(facts["sources"])) == (4, 16, ["b"])
    assert "4 crops of 16 stored" in as_text(facts)
    remove(url, RemoveConfig(source="b", workers=1), STORAGE)
    whole = next(path for path in Path(url).glob("manifest-v0003-*"))
    facts = statistics(str(whole), STORAGE)
    assert (facts["crops"], facts["removed"], facts["stored_crops"], list(facts["sources"])) == (12, 4, 12, ["a"])
    empty: dict[str, Any] = statistics(url, STORAGE)
    assert empty["crops"] == 0 and empty["sources"] == {} and "0 crops" in as_text(empty)
