"""Reading a folder in the layout of Market-1501, and refusing what would give a wrong score."""

from pathlib import Path

import numpy as np
import pytest

from datapipe.errors import DataError
from datapipe.storage import open_store
from tests.training.reid.people import crop, market
from training.reid.datasets import MarketLayout, market_folder, read_market


def test_market_folder__reads_labels_in_sorted_order(tmp_path: Path) -> None:
    found = market_folder(market(tmp_path / "people", identities=2, cameras=2, images=1))
    assert found.name == "people"
    assert found.query.paths.tolist() == [f"query/000{pid}_c{cam}s1_000000_00.jpg" for pid in (1, 2) for cam in (1, 2)]
    assert found.query.pids.tolist() == [1, 1, 2, 2]
    assert found.query.cameras.tolist() == [0, 1, 0, 1]
    assert found.train is not None and len(found.train) == 4
    assert found.read(found.query.paths[0]) == crop(1, 1, 0)


def test_market_folder__drops_junk_and_keeps_distractors(tmp_path: Path) -> None:
    found = market_folder(market(tmp_path))
    assert -1 not in found.gallery.pids and 0 in found.gallery.pids
    assert len(found.gallery) == 6 * 3 * 2 + 1


def test_market_folder__reads_double_endings(tmp_path: Path) -> None:
    root = market(tmp_path)
    (root / "bounding_box_test" / "1488_c3s1_000001_00.jpg.jpg").write_bytes(crop(1488, 3, 1))
    assert 1488 in market_folder(str(root)).gallery.pids


def test_market_folder__needs_no_training_images(tmp_path: Path) -> None:
    root = market(tmp_path)
    for path in (root / "bounding_box_train").iterdir():
        path.unlink()
    assert market_folder(root).train is None
    (root / "bounding_box_train").rmdir()
    assert market_folder(root, name="mine").train is None


@pytest.mark.parametrize("folder", ["query", "bounding_box_test"])
@pytest.mark.parametrize("gone", [False, True])
def test_market_folder__names_the_folder_that_is_missing_or_empty(tmp_path: Path, folder: str, gone: bool) -> None:
    root = market(tmp_path)
    for path in (root / folder).iterdir():
        path.unlink()
    if gone:
        (root / folder).rmdir()
    with pytest.raises(DataError, match=f"no images of people in {folder}/") as caught:
        market_folder(root)
    assert str(root) in caught.value.where


def test_market_folder__refuses_a_set_without_matches(tmp_path: Path) -> None:
    root = market(tmp_path)
    for path in (root / "query").iterdir():
        path.rename(path.with_name(f"9{path.name}"))
    with pytest.raises(DataError, match="none of the 18 queries"):
        market_folder(root)


def test_market_folder__refuses_one_camera(tmp_path: Path) -> None:
    root = market(tmp_path)
    for path in [*root.glob("*/*_c2*"), *root.glob("*/*_c3*")]:
        path.unlink()
    with pytest.raises(DataError, match="all images are from camera 1"):
        market_folder(root)


def test_market_folder__refuses_names_without_labels(tmp_path: Path) -> None:
    root = market(tmp_path)
    (root / "query" / "holiday.jpg").write_bytes(crop(1, 1, 1))
    with pytest.raises(DataError, match="1 of 19 images carry no identity") as caught:
        market_folder(root)
    assert caught.value.where.endswith("query/holiday.jpg")


def test_market_folder__refuses_the_same_name_twice(tmp_path: Path) -> None:
    root = market(tmp_path)
    (root / "query" / "again").mkdir()
    (root / "query" / "again" / "0001_c1s1_000000_00.jpg").write_bytes(crop(1, 1, 0))
    with pytest.raises(DataError, match="2 files are called 0001_c1s1_000000_00.jpg"):
        market_folder(root)


def test_read_market__compares_official_counts(tmp_path: Path) -> None:
    store = open_store(str(market(tmp_path)))
    assert read_market(store, MarketLayout("ours", counts={"query": 18, "gallery": 37})).name == "ours"
    with pytest.raises(DataError, match="not all of ours: gallery has 37 images, not 38"):
        read_market(store, MarketLayout("ours", counts={"query": 18, "gallery": 38}))


def test_market_folder__reads_any_store(tmp_path: Path) -> None:
    local, remote = market_folder(market(tmp_path / "people")), open_store("memory://sets/people")
    for part in (local.query, local.gallery, local.train):
        for path in part.paths if part else ():
            remote.create(path, local.read(path))
    found = market_folder("memory://sets/people")
    assert found.name == "people" and found.gallery.paths.tolist() == local.gallery.paths.tolist()
    assert found.read(found.query.paths[0]) == crop(1, 1, 0)


def test_labelled__holds_arrays(tmp_path: Path) -> None:
    gallery = market_folder(market(tmp_path)).gallery
    assert gallery.pids.dtype == gallery.cameras.dtype == np.int64
    assert gallery.paths.tolist() == sorted(gallery.paths.tolist())
