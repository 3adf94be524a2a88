"""Reading labelled data sets in their published layouts, and refusing what would give a wrong score."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.ingest.pipeline import ingest
from datapipe.storage import open_store
from tests.conftest import S3Server
from tests.training.reid.people import crop, cuhk03, market, msmt17, occluded_reid, p_dukemtmc, partial_reid, tiff
from training.reid.datasets import benchmarks, open_dataset
from training.reid.datasets.benchmarks import PARTS, PUBLISHED, Count
from training.reid.datasets.open_dataset import check_images, open_reid
from training.reid.datasets.reid_set import Labelled
from training.reid.datasets.training_shards import shard_training_part
from training.reid.zero_shot import evaluate_histogram


def counts(**parts: tuple[int, int]) -> dict[str, Count]:
    return {part: Count(*parts[part]) for part in PARTS}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published data sets with the counts of the tests' own."""
    sizes = {
        "msmt17": counts(query=(4, 2), gallery=(8, 2), train=(18, 3)),
        "msmt17_v2": counts(query=(4, 2), gallery=(8, 2), train=(18, 3)),
        "cuhk03_detected": counts(query=(4, 2), gallery=(4, 2), train=(8, 2)),
        "market1501": counts(query=(18, 6), gallery=(37, 7), train=(18, 6)),
        "dukemtmc": counts(query=(12, 4), gallery=(25, 5), train=(12, 4)),
        "occluded_duke": counts(query=(3, 3), gallery=(22, 5), train=(11, 4)),
        "occluded_reid": counts(query=(6, 3), gallery=(6, 3), train=(0, 0)),
        "partial_reid": counts(query=(6, 3), gallery=(6, 3), train=(0, 0)),
        "p_dukemtmc": counts(query=(2, 2), gallery=(4, 2), train=(6, 2)),
    }
    for name, count in sizes.items():
        monkeypatch.setitem(PUBLISHED, name, dataclasses.replace(PUBLISHED[name], counts=count))


def test_own_folder__reads_labels_in_sorted_order(tmp_path: Path) -> None:
    found = open_reid(str(market(tmp_path / "people", identities=2, cameras=2, images=1)))
    assert (found.name, found.official, found.differences, found.warnings) == ("people", "", (), ())
    assert found.query.paths.tolist() == [f"query/000{pid}_c{cam}s1_000000_00.jpg" for pid in (1, 2) for cam in (1, 2)]
    assert found.query.pids.tolist() == [1, 1, 2, 2]
    assert found.query.cameras.tolist() == [0, 1, 0, 1]
    assert found.train is not None and found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.read(found.query.paths[0]) == crop(1, 1, 0)
    assert found.about()["counts"]["gallery"] == {"images": 5, "identities": 3, "cameras": 2}


def test_own_folder__drops_junk_and_keeps_distractors(tmp_path: Path) -> None:
    found = open_reid(str(market(tmp_path)))
    assert -1 not in found.gallery.pids and 0 in found.gallery.pids
    assert len(found.gallery) == 6 * 3 * 2 + 1
    assert found.gallery.pids.dtype == found.gallery.cameras.dtype == np.int64
    assert found.gallery.paths.tolist() == sorted(found.gallery.paths.tolist())


def test_own_folder__reads_double_endings(tmp_path: Path) -> None:
    root = market(tmp_path)
    (root / "bounding_box_test" / "1488_c3s1_000001_00.jpg.jpg").write_bytes(crop(1488, 3, 1))
    assert 1488 in open_reid(str(root)).gallery.pids


def test_own_folder__needs_no_training_images(tmp_path: Path) -> None:
    root = market(tmp_path)
    shutil.rmtree(root / "bounding_box_train")
    found = open_reid(str(root))
    assert found.train is None and check_images(found) == found
    (root / "bounding_box_train").mkdir()
    assert open_reid(str(root)).train is None


def test_real_crops__are_an_own_folder(real_crops: Path) -> None:
    found = check_images(open_reid(str(real_crops)))
    assert found.train is not None
    assert (found.name, found.official) == ("cuhk03", "")
    assert [(len(part), part.identities) for part in found.parts.values()] == [(120, 60), (442, 60), (2_331, 240)]
    assert set(found.query.cameras) == {0, 1}
    assert "in the gallery: 1 of 120; identities of queries that are not in it at all: 0 of 60;" in found.warnings[0]


def test_market1501__is_recognised_by_its_folder_and_by_its_counts(tmp_path: Path, small: None) -> None:
    named = open_reid(str(market(tmp_path / "Market-1501-v15.09.15")))
    assert (named.name, named.official) == ("market1501", "Market-1501")
    counted = open_reid(str(market(tmp_path / "anything")))
    assert (counted.name, counted.differences) == ("market1501", ())
    assert open_reid(str(tmp_path / "anything"), name="own").name == "anything"
    with pytest.raises(DataError, match="this is not DukeMTMC-reID as it was published: query has 18 of 12 images"):
        open_reid(str(tmp_path / "anything"), name="dukemtmc")


def test_market1501__half_unpacked_is_refused_with_what_is_missing(
    tmp_path: Path, small: None, caplog: pytest.LogCaptureFixture
) -> None:
    root = market(tmp_path / "market1501")
    for path in sorted((root / "query").iterdir())[14:]:
        path.unlink()
    shutil.rmtree(root / "bounding_box_train")
    expected = "query has 14 of 18 images and 5 of 6 identities; train has 0 of 18 images and 0 of 6 identities"
    with pytest.raises(DataError, match=f"Market-1501 as it was published: {expected}") as caught:
        open_reid(str(root))
    assert "--allow-partial" in caught.value.hint
    with caplog.at_level(logging.WARNING):
        found = open_reid(str(root), allow_partial=True)
    assert "; ".join(found.differences) == expected and found.official == "Market-1501"
    assert "query has 14 of 18 images" in caplog.text


def test_too_many_images__are_told(tmp_path: Path, small: None) -> None:
    root = market(tmp_path / "market1501")
    (root / "query" / "0001_c1s1_000009_00.jpg").write_bytes(crop(1, 1, 9))
    with pytest.raises(DataError, match=r"query has 19 of 18 images and 6 of 6 identities \(too many\)"):
        open_reid(str(root))


def test_msmt17__is_read_by_its_lists(tmp_path: Path, small: None) -> None:
    found = open_reid(str(msmt17(tmp_path / "data")))
    assert found.train is not None
    assert (found.name, found.official, found.differences) == ("msmt17", "MSMT17", ())
    assert found.query.paths[0] == "test/0000/0000_000_01_0303morning_0015_0.jpg"
    assert found.query.pids.tolist() == [0, 0, 1, 1] and found.query.cameras.tolist() == [0, 10, 0, 10]
    assert len(found.gallery) == 8 and not set(found.gallery.paths) & set(found.query.paths)
    assert sorted(set(found.train.pids)) == [0, 1, 2]  # train and val, numbered apart from the test's people
    assert found.read(found.query.paths[0]) == crop(0, 1, 0)


def test_msmt17__v2_in_place_of_v1_is_named(tmp_path: Path, small: None) -> None:
    root = str(msmt17(tmp_path, train="mask_train_v2", test="mask_test_v2"))
    assert open_reid(root).name == open_reid(root, name="msmt17_v2").name == "msmt17_v2"
    message = r"this is not MSMT17 as it was published: it is MSMT17 V2 \(faces blurred\), in place of MSMT17"
    with pytest.raises(DataError, match=message):
        open_reid(root, name="msmt17")
    found = open_reid(root, name="msmt17", allow_partial=True)
    assert found.name == "msmt17_v2" and "in place of MSMT17" in found.differences[0]


def test_msmt17__both_versions_in_one_folder_need_a_name(tmp_path: Path, small: None) -> None:
    msmt17(tmp_path)
    root = str(msmt17(tmp_path, train="mask_train_v2", test="mask_test_v2"))
    with pytest.raises(ConfigError, match="several data sets lie here: msmt17 and msmt17_v2"):
        open_reid(root)
    assert open_reid(root, name="msmt17").query.paths[0].startswith("test/")
    assert open_reid(root, name="msmt17_v2").query.paths[0].startswith("mask_test_v2/")


def test_msmt17__names_listed_images_that_are_not_there(tmp_path: Path, small: None) -> None:
    root = msmt17(tmp_path)
    for path in sorted((root / "test" / "0001").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match="gallery has 4 of 8 images and 1 of 2 identities; listed and not there: "
                                        "test/0001/0001_001_01_.*, .* and 1 more"):  # fmt: skip
        open_reid(str(root))
    (root / "list_query.txt").unlink()
    with pytest.raises(DataError, match="list_query.txt missing"):
        open_reid(str(root), name="msmt17")


def test_msmt17__copies_in_the_layout_of_market(tmp_path: Path, small: None) -> None:
    root = msmt17(tmp_path / "lists")
    copy = tmp_path / "MSMT17_V1"
    for part, folder in (("query", "query"), ("gallery", "bounding_box_test"), ("train", "bounding_box_train"),
                         ("val", "bounding_box_train")):  # fmt: skip
        (copy / folder).mkdir(parents=True, exist_ok=True)
        for line in (root / f"list_{part}.txt").read_text().splitlines():
            path = root / ("train" if part in ("train", "val") else "test") / line.split()[0]
            shutil.copy(path, copy / folder)
    found = open_reid(str(copy))
    assert found.name == "msmt17" and found.query.cameras.tolist() == [0, 10, 0, 10]


def test_occluded_duke__is_read_by_its_lists(tmp_path: Path, small: None) -> None:
    """Some of its queries are gallery images of DukeMTMC-reID; some training images are left out."""
    root = market(tmp_path / "DukeMTMC-reID", identities=4)
    assert open_reid(str(root)).name == "dukemtmc"
    names = {folder: sorted(path.name for path in (root / folder).glob("*.jpg"))
             for folder in ("query", "bounding_box_test", "bounding_box_train")}  # fmt: skip
    tested = [name for name in names["bounding_box_test"] if not name.startswith("-1")]
    moved = ["0001_c1s1_000001_00.jpg", "0002_c1s1_000001_00.jpg"]
    lists = {"query": [*moved, "0003_c1s1_000000_00.jpg"],
             "gallery": [name for name in tested if name not in moved][:-1],
             "train": names["bounding_box_train"][1:]}  # fmt: skip
    for part, listed in lists.items():
        (root / f"{part}.list").write_text("\n".join(listed))
    found = open_reid(str(root))
    assert found.name == "occluded_duke"
    assert found.query.paths.tolist() == ["bounding_box_test/0001_c1s1_000001_00.jpg",
                                          "bounding_box_test/0002_c1s1_000001_00.jpg",
                                          "query/0003_c1s1_000000_00.jpg"]  # fmt: skip
    assert not set(found.query.paths) & set(found.gallery.paths)
    assert open_reid(str(root), name="dukemtmc").name == "dukemtmc"


def test_cuhk03__is_read_by_its_matlab_file(tmp_path: Path, small: None) -> None:
    found = open_reid(str(cuhk03(tmp_path, "detected")))
    assert found.train is not None
    assert (found.name, found.differences) == ("cuhk03_detected", ())
    assert found.query.paths.tolist() == [f"images_detected/2_00{person}_{camera}_01.png"
                                          for person in (1, 2) for camera in (1, 2)]  # fmt: skip
    assert found.query.pids.tolist() == [3, 3, 4, 4] and found.query.cameras.tolist() == [0, 1, 0, 1]
    assert found.train.pids.tolist() == [1] * 4 + [2] * 4
    cuhk03(tmp_path, "labeled")
    with pytest.raises(ConfigError, match="cuhk03_detected and cuhk03_labeled"):
        open_reid(str(tmp_path))
    with pytest.raises(DataError, match="CUHK03, new protocol, labelled boxes as it was published: query has 4 of 1,4"):
        open_reid(str(tmp_path), name="cuhk03_labeled")


def test_occluded_reid__asks_for_whole_bodies_by_occluded_ones(tmp_path: Path, small: None) -> None:
    found = check_images(open_reid(str(occluded_reid(tmp_path / "Occluded_REID"))))
    assert (found.name, found.official, found.differences, found.warnings) == ("occluded_reid", "Occluded-REID", (), ())
    assert found.train is None
    assert found.query.paths[:2].tolist() == [f"occluded_body_images/001/001_0{number}.tif" for number in (1, 2)]
    assert found.gallery.paths[-1] == "whole_body_images/003/003_02.tif"
    assert found.query.pids.tolist() == found.gallery.pids.tolist() == [1, 1, 2, 2, 3, 3]
    assert set(found.query.cameras) == {0} and set(found.gallery.cameras) == {1}
    assert found.read(found.query.paths[0]) == tiff(crop(1, 1, 1))


def test_occluded_reid__is_scored_with_no_camera_left_out(tmp_path: Path, small: None) -> None:
    """Of three people with two whole images each, every occluded image has two matches among six."""
    found = evaluate_histogram(open_reid(str(occluded_reid(tmp_path))))
    assert (found.best.skipped, len(found.best.matching), len(found.best.others)) == (0, 6 * 2, 6 * 4)


def test_occluded_reid__a_flat_copy_wants_its_name(tmp_path: Path, small: None) -> None:
    for kind, folder in enumerate(("query", "gallery"), start=1):
        (tmp_path / folder).mkdir()
        for pid in (1, 2, 3):
            for number in (1, 2):
                (tmp_path / folder / f"{pid:03d}_{number:02d}.jpg").write_bytes(crop(pid, kind, number))
    found = open_reid(str(tmp_path), name="occluded_reid")
    assert found.differences == () and set(found.query.cameras) == {0} and set(found.gallery.cameras) == {1}
    with pytest.raises(DataError, match="no data set of people"):
        open_reid(str(tmp_path))


def test_partial_reid__is_told_from_occluded_reid(tmp_path: Path, small: None) -> None:
    """It has the folders of both; its own occluded images take no part."""
    found = open_reid(str(partial_reid(tmp_path / "Partial-REID_Dataset")))
    assert (found.name, found.differences, found.train) == ("partial_reid", (), None)
    assert found.query.paths[0] == "partial_body_images/001_001.jpg"
    assert found.gallery.paths[0] == "whole_body_images/001_001.jpg"
    assert (found.query.cameras == 0).all() and (found.gallery.cameras == 1).all()


def test_p_dukemtmc__counts_no_cameras_of_names(tmp_path: Path, small: None) -> None:
    """Train and test may number their people alike, and occluded and whole images their files."""
    found = check_images(open_reid(str(p_dukemtmc(tmp_path / "P-DukeMTMC-reid"))))
    assert found.train is not None and (found.name, found.differences, found.warnings) == ("p_dukemtmc", (), ())
    assert found.query.paths.tolist() == ["test/occluded_body_images/0001/0001_01.jpg",
                                          "test/occluded_body_images/0002/0002_c3_f0046182.jpg"]  # fmt: skip
    assert found.query.cameras.tolist() == [0, 0] and found.gallery.cameras.tolist() == [1] * 4
    assert found.train.pids.tolist() == [1, 2, 1, 1, 2, 2] and found.train.cameras.tolist() == [0, 0, 1, 1, 1, 1]
    shards = shard_training_part(found, str(tmp_path / "shards"), StorageConfig())
    assert shards.rows == 6


@pytest.mark.parametrize(("made", "gone", "expected"), [
    (occluded_reid, "occluded_body_images/002", "query has 4 of 6 images and 2 of 3 identities"),
    (partial_reid, "whole_body_images/003_002.jpg", "gallery has 5 of 6 images and 3 of 3 identities"),
    (p_dukemtmc, "train/whole_body_images/0001", "train has 4 of 6 images and 2 of 2 identities"),
])  # fmt: skip
def test_occlusion_sets__half_unpacked_are_refused(
    tmp_path: Path, small: None, made: Callable[[Path], Path], gone: str, expected: str
) -> None:
    path = made(tmp_path) / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=expected):
        open_reid(str(tmp_path))
    assert open_reid(str(tmp_path), allow_partial=True).differences == (expected,)


def test_occlusion_sets__in_shards(tmp_path: Path, small: None) -> None:
    local = open_reid(str(p_dukemtmc(tmp_path / "files")))
    shard(str(tmp_path / "files"), str(tmp_path / "shards"))
    found = open_reid(str(tmp_path / "shards"))
    assert found.name == "p_dukemtmc"
    for part in PARTS:
        assert_equal(found.parts[part], local.parts[part])


def test_occlusion_sets__names_without_an_identity_are_refused(tmp_path: Path) -> None:
    (occluded_reid(tmp_path) / "whole_body_images" / "holiday.tif").write_bytes(tiff(crop(1, 1, 1)))
    with pytest.raises(DataError, match="1 images carry no identity in their name") as caught:
        open_reid(str(tmp_path))
    assert "001_01.jpg" in caught.value.hint


@pytest.mark.parametrize(("file", "name", "content"), [
    ("cuhk03_new_protocol_config_detected.mat", "cuhk03_detected", b"no Matlab file"),
    ("list_query.txt", "msmt17", b"0000/0000_000_01_0303morning_0015_0.jpg zero"),
])  # fmt: skip
def test_lists__that_cannot_be_read_are_named(tmp_path: Path, file: str, name: str, content: bytes) -> None:
    cuhk03(msmt17(tmp_path), "detected")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match="the list cannot be read") as caught:
        open_reid(str(tmp_path), name=name)
    assert caught.value.where.endswith(file)


def test_published__official_counts_are_those_of_the_literature() -> None:
    """Images of query, gallery and train; test identities."""
    found = {name: (*(one.counts[part].images for part in PARTS), one.counts["query"].identities)
             for name, one in PUBLISHED.items()}  # fmt: skip
    assert found == {
        "market1501": (3_368, 15_913, 12_936, 750),
        "dukemtmc": (2_228, 17_661, 16_522, 702),
        "occluded_duke": (2_210, 17_661, 15_618, 519),
        "msmt17": (11_659, 82_161, 32_621, 3_060),
        "msmt17_v2": (11_659, 82_161, 32_621, 3_060),
        "cuhk03_detected": (1_400, 5_332, 7_365, 700),
        "cuhk03_labeled": (1_400, 5_328, 7_368, 700),
        "occluded_reid": (1_000, 1_000, 0, 200),
        "partial_reid": (300, 300, 0, 60),
        "p_dukemtmc": (2_163, 9_053, 12_927, 634),
    }


@pytest.mark.parametrize(("folder", "name"), [
    ("/data/Market-1501-v15.09.15", "market1501"), ("s3://b/DukeMTMC-reID/", "dukemtmc"),
    ("Occluded_Duke", "occluded_duke"), ("/data/cuhk03-np/detected", "cuhk03_detected"), ("MSMT17_V1", "msmt17"),
    ("/data/cuhk03", ""), ("/market1501/mine", ""), ("supermarket1501", ""),
])  # fmt: skip
def test_by_folder__knows_usual_names(folder: str, name: str) -> None:
    assert benchmarks.by_folder(folder) == name


def test_names__unknown_ones_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data set is called market1051") as caught:
        open_reid(str(market(tmp_path)), name="market1051")
    assert caught.value.hint.startswith("market1501?")


@pytest.mark.parametrize("folder", ["query", "bounding_box_test"])
@pytest.mark.parametrize("gone", [False, True])
def test_missing_folder__is_named(tmp_path: Path, folder: str, gone: bool) -> None:
    root = market(tmp_path)
    for path in (root / folder).iterdir():
        path.unlink()
    if gone:
        (root / folder).rmdir()
    with pytest.raises(DataError, match=f"no data set of people: {folder}/ missing or without images") as caught:
        open_reid(str(root))
    assert str(root) in caught.value.where


def test_missing_folder__the_data_set_may_lie_one_below(tmp_path: Path) -> None:
    market(tmp_path / "Market-1501-v15.09.15")
    with pytest.raises(DataError, match="no data set of people") as caught:
        open_reid(str(tmp_path))
    assert caught.value.hint == f"{tmp_path}/Market-1501-v15.09.15 has one"
    with pytest.raises(DataError, match="no data set of people"):
        open_reid(str(tmp_path / "nowhere"))


def test_queries__without_a_match_are_counted_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = market(tmp_path)
    for path in (root / "bounding_box_test").glob("0003_*"):
        path.unlink()
    for path in (root / "bounding_box_test").glob("0004_c[23]*"):
        path.unlink()
    with caplog.at_level(logging.WARNING):
        found = open_reid(str(root))
    (warning,) = found.warnings
    assert "in the gallery: 4 of 18; identities of queries that are not in it at all: 1 of 6;" in warning
    assert warning in caplog.text


def test_queries__all_without_a_match_are_refused(tmp_path: Path) -> None:
    root = market(tmp_path)
    for path in (root / "query").iterdir():
        path.rename(path.with_name(f"9{path.name}"))
    with pytest.raises(DataError, match="none of the 18 queries"):
        open_reid(str(root), allow_partial=True)


def test_cameras__a_single_one_is_refused(tmp_path: Path) -> None:
    root = market(tmp_path)
    for path in [*root.glob("*/*_c2*"), *root.glob("*/*_c3*")]:
        path.unlink()
    with pytest.raises(DataError, match="all images are from camera 1"):
        open_reid(str(root), allow_partial=True)


def test_identities__in_train_and_test_are_refused(tmp_path: Path) -> None:
    root = market(tmp_path)
    (root / "bounding_box_train" / "0002_c1s1_000009_00.jpg").write_bytes(crop(2, 1, 9))
    (root / "bounding_box_train" / "0000_c1s1_000009_00.jpg").write_bytes(crop(0, 1, 9))  # a distractor is nobody
    with pytest.raises(DataError, match="1 identities are both in train and in query or gallery: 2"):
        open_reid(str(root))
    assert "both in train" in open_reid(str(root), allow_partial=True).warnings[0]


@pytest.mark.parametrize("part", ["query", "bounding_box_test"])
def test_images__in_train_and_test_are_refused(tmp_path: Path, part: str) -> None:
    root = market(tmp_path)
    (root / part / "0001_c3s1_000077_00.jpg").write_bytes(crop(101, 1, 0))
    found = open_reid(str(root))
    pair = f"bounding_box_train/0101_c1s1_000000_00.jpg is {part}/0001_c3s1_000077_00.jpg"
    with pytest.raises(DataError, match=f"1 images of .* are also in train, byte for byte: {pair}"):
        check_images(found)
    assert pair in check_images(found, allow_partial=True).warnings[0]


def test_names__without_labels_are_refused(tmp_path: Path) -> None:
    root = market(tmp_path)
    (root / "query" / "holiday.jpg").write_bytes(crop(1, 1, 1))
    with pytest.raises(DataError, match="1 images carry no identity") as caught:
        open_reid(str(root))
    assert caught.value.where.endswith("query/holiday.jpg")


def test_names__twice_are_refused(tmp_path: Path) -> None:
    root = market(tmp_path)
    (root / "query" / "again").mkdir()
    (root / "query" / "again" / "0001_c1s1_000000_00.jpg").write_bytes(crop(1, 1, 0))
    with pytest.raises(DataError, match="2 files are called 0001_c1s1_000000_00.jpg"):
        open_reid(str(root))


def test_empty_files__are_refused(tmp_path: Path) -> None:
    root = market(tmp_path)
    (root / "query" / "0001_c1s1_000000_00.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="1 images are empty files"):
        open_reid(str(root))


def test_any_store__is_read(tmp_path: Path) -> None:
    local, remote = open_reid(str(market(tmp_path / "people"))), open_store("memory://sets/people")
    for part in local.parts.values():
        for path in part.paths:
            remote.create(path, local.read(path))
    found = open_reid("memory://sets/people")
    assert found.name == "people" and found.gallery.paths.tolist() == local.gallery.paths.tolist()
    assert found.read(found.query.paths[0]) == crop(1, 1, 0)


def shard(source: str, out: str, storage: StorageConfig | None = None) -> None:
    ingest([source], out, ShardConfig(workers=1, min_size=(8, 8)), storage or StorageConfig())


def assert_equal(found: Labelled | None, local: Labelled | None) -> None:
    assert found is not None and local is not None
    for name in ("paths", "pids", "cameras"):
        assert getattr(found, name).tolist() == getattr(local, name).tolist()


def test_shards__of_the_whole_folder(tmp_path: Path, s3: S3Server) -> None:
    root = market(tmp_path / "people")
    local, url = open_reid(str(root)), f"s3://{s3.bucket()}/people"
    shard(str(root), url, s3.storage)
    found = open_reid(url, s3.storage)
    for part in PARTS:
        assert_equal(found.parts[part], local.parts[part])
    for path in found.query.paths[:3]:
        assert found.read(path) == local.read(path)
    assert check_images(found).warnings == ()


def test_shards__one_data_set_for_each_part(tmp_path: Path) -> None:
    root = market(tmp_path / "people")
    local = open_reid(str(root))
    (root / "bounding_box_train" / "0101_c3s1_000077_00.jpg").write_bytes(local.read(local.gallery.paths[3]))
    for part, folder in (("query", "query"), ("gallery", "bounding_box_test"), ("train", "bounding_box_train")):
        shard(str(root / folder), str(tmp_path / "shards" / part))
    found = open_reid(str(tmp_path / "shards"))
    assert_equal(found.gallery, local.gallery)
    assert found.read(found.gallery.paths[-1]) == local.read(local.gallery.paths[-1])
    with pytest.raises(DataError, match="1 images of gallery are also in train, byte for byte"):
        check_images(found)


def test_shards__a_damaged_crop_is_named_and_not_replaced(tmp_path: Path) -> None:
    shard(str(market(tmp_path / "people")), str(tmp_path / "shards"))
    (tar,) = (tmp_path / "shards").rglob("*.tar")
    data = bytearray(tar.read_bytes())
    data[512:] = data[512:].replace(b"\xff\xd8\xff", b"\xff\xd8\x00")
    tar.write_bytes(data)
    found = open_reid(str(tmp_path / "shards"))
    with pytest.raises(DataError, match="the crop query/0001_c1s1_000000_00.jpg is damaged"):
        found.read("query/0001_c1s1_000000_00.jpg")


def test_shards__lists_beside_them_count(tmp_path: Path, small: None) -> None:
    root = msmt17(tmp_path / "MSMT17")
    shard(str(root), str(tmp_path / "shards"))
    for path in root.glob("list_*.txt"):
        shutil.copy(path, tmp_path / "shards")
    found, local = open_reid(str(tmp_path / "shards")), open_reid(str(root))
    assert found.name == "msmt17" and found.differences == ()
    for part in PARTS:
        assert_equal(found.parts[part], local.parts[part])


def test_module__says_what_may_be_asked_for() -> None:
    assert set(open_dataset.__all__) <= set(vars(open_dataset))
