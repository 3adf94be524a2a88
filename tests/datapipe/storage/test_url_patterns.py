"""Patterns of files mean the same on a disk and in a bucket: the same files, in the same order, with the same names."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from cluster.core.shared_paths import witnesses
from datapipe.__main__ import main
from datapipe.core.cli import run as run_command
from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.core.errors import DataError
from datapipe.ingest.pipeline import ingest
from datapipe.sources import open_sources
from datapipe.sources.location import list_entries
from tests.conftest import S3Server
from tests.datapipe.sources.read_source import crops
from tests.datapipe.sources.test_archive import write_tar, write_zip
from tests.datapipe.sources.test_lmdb import convert
from tests.datapipe.sources.test_parquet import images, write
from tests.datapipe.sources.test_video import BOXES, frames, write_mot, write_video  # noqa: F401  (`frames` is a fixture)

WriteCrops = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all kinds; each image holds its own path."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("crops/cam1/a.jpg", "crops/cam1/deep/b.jpg", "crops/cam2/a.jpg", "crops/cam3/a.jpg", "crops/top.jpg",
                 "crops/cam1/notes.txt", "crops/[old]/a.jpg", "crops/[old]/b.png", "crops/o/a.jpg"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in ("hf/train-1", "hf/train-0", "hf/train-10", "hf/test-0", "more/train-0"):
        write(root / f"{name}.parquet", {"image": images([f"{name}.jpg"])})
    (root / "tars" / "x").mkdir(parents=True)
    for name in ("tars/0", "tars/1", "tars/x/0"):
        write_tar(root / f"{name}.tar", {f"{name}.jpg": name.encode()})
    (root / "zips").mkdir()
    write_zip(root / "zips" / "whole.zip", {"a.jpg": b"whole"})
    write_zip(root / "zips" / "cut.zip", {"a.jpg": b"cut" * 100})
    cut = (root / "zips" / "cut.zip").read_bytes()
    (root / "zips" / "cut.zip").unlink()
    for number in range(3):
        part = cut[number * len(cut) // 3 : (number + 1) * len(cut) // 3]
        (root / "zips" / f"cut.zip.{number + 1:03d}").write_bytes(part)
    return root


@pytest.fixture(scope="module")
def bucket(tree: Path, s3: S3Server) -> str:
    """The same in a bucket."""
    name = s3.bucket()
    for path in tree.rglob("*"):
        if path.is_file():
            s3.client.upload_file(str(path), name, f"all/{path.relative_to(tree)}")
    return f"s3://{name}/all"


@pytest.fixture(scope="module")
def memory(tree: Path) -> Iterator[str]:
    """And behind another scheme of fsspec."""
    system, root = fsspec.filesystem("memory"), f"/{uuid4().hex}"
    for path in tree.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{root}/{path.relative_to(tree)}", path.read_bytes())
    yield f"memory:/{root}"
    system.rm(root, recursive=True)


MEANT = {
    "hf/train-*.parquet": ["train-0.parquet/hf/train-0.jpg", "train-1.parquet/hf/train-1.jpg",
                           "train-10.parquet/hf/train-10.jpg"],
    "hf/train-?.parquet": ["train-0.parquet/hf/train-0.jpg", "train-1.parquet/hf/train-1.jpg"],
    "hf/t[!r]*": ["test-0.parquet/hf/test-0.jpg"],
    "*/train-0.parquet": ["hf/train-0.parquet/hf/train-0.jpg", "more/train-0.parquet/more/train-0.jpg"],
    "{hf,more}/train-0*.parquet": ["hf/train-0.parquet/hf/train-0.jpg", "more/train-0.parquet/more/train-0.jpg"],
    "hf/{train-1,test-*}.parquet": ["test-0.parquet/hf/test-0.jpg", "train-1.parquet/hf/train-1.jpg"],
    "**/train-10.parquet": ["hf/train-10.parquet/hf/train-10.jpg"],
    "crops/*.jpg": ["top.jpg"],
    "crops/cam[12]": ["cam1/a.jpg", "cam1/deep/b.jpg", "cam2/a.jpg"],
    "crops/*/a.jpg": ["[old]/a.jpg", "cam1/a.jpg", "cam2/a.jpg", "cam3/a.jpg", "o/a.jpg"],
    "crops/**/b.*": ["[old]/b.png", "cam1/deep/b.jpg"],
    "crops/cam1/**": ["a.jpg", "deep/b.jpg"],
    "crops/[old]": ["a.jpg", "b.png"],  # it is there as it is written
    "crops/[old]/*.jpg": ["a.jpg"],
    "crops/{[old],o}/a*": ["[old]/a.jpg", "o/a.jpg"],
    "tars/*.tar": ["0.tar/tars/0.jpg", "1.tar/tars/1.jpg"],
    "tars/**/0.tar": ["0.tar/tars/0.jpg", "x/0.tar/tars/x/0.jpg"],
    "tars/1*": ["1.tar/tars/1.jpg"],
    "zips/*.zip": ["cut.zip/a.jpg", "whole.zip/a.jpg"],
    "zips/*.zip.001": ["cut.zip/a.jpg"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pattern", MEANT)
def test_pattern__means_the_same_everywhere(pattern: str, tree: Path, bucket: str, memory: str, s3: S3Server) -> None:
    here = crops(f"{tree}/{pattern}")
    assert [crop.name for crop in here] == MEANT[pattern]
    assert crops(f"{bucket}/{pattern}", s3.storage) == here == crops(f"{memory}/{pattern}", StorageConfig())


@pytest.mark.parametrize("pattern", ["mot/*.mkv", "mot/x*", "*/x.mkv"])
def test_pattern__of_videos_takes_the_boxes_beside_them(
    pattern: str,
    tmp_path: Path,
    frames: list,  # noqa: F811
    s3: S3Server,
) -> None:
    write_video(tmp_path / "mot" / "x.mkv", frames)
    write_mot(tmp_path / "mot" / "x.txt", BOXES)
    name, found = s3.bucket(), crops(f"{tmp_path}/{pattern}")
    for file in ("mot/x.mkv", "mot/x.txt"):
        s3.client.upload_file(f"{tmp_path}/{file}", name, f"all/{file}")
    assert len(found) == len(BOXES) and crops(f"s3://{name}/all/{pattern}", s3.storage) == found


def test_pattern__of_an_lmdb(tmp_path: Path) -> None:
    expected = convert(tmp_path, {"00_00_0000": 3})
    assert [crop.name for crop in crops(f"{tmp_path}/lup_*")] == list(expected)


def test_pattern__looks_into_no_folder_beside(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, scandir = [], os.scandir

    def watched(path: Path) -> object:
        looked.append(Path(path).relative_to(tree).as_posix())
        return scandir(path)

    monkeypatch.setattr(os, "scandir", watched)
    assert len(list(list_entries(f"{tree}/*/train-0.parquet", StorageConfig())[1])) == 2
    assert sorted(looked) == [".", "crops", "hf", "more", "tars", "zips"]


def test_pattern__labels(tree: Path) -> None:
    urls = [f"{tree}/hf/train-*.parquet", f"{tree}/crops/**", f"{tree}/tars/*.tar", f"{tree}/more/*"]
    labels = ["train-*.parquet", "crops", "*.tar", "more"]
    assert [source.label for source in open_sources(urls, StorageConfig())] == labels


def test_pattern__that_meets_nothing_says_what_is_near(tree: Path, bucket: str, s3: S3Server) -> None:
    for root in (str(tree), bucket):
        with pytest.raises(DataError, match="nothing matches the pattern") as caught:
            open_sources([f"{root}/hf/trian-*.parquet"], s3.storage)
        assert caught.value.where == f"{root}/hf/trian-*.parquet"
        assert f"below {root}/hf there is " in caught.value.hint and "train-" in caught.value.hint
    with pytest.raises(DataError, match="nothing matches the pattern: the folder does not exist") as caught:
        open_sources([f"{tree}/fh/*.parquet"], s3.storage)
    assert f"{tree}/fh" in caught.value.hint


def test_pattern__where_nothing_can_be_listed() -> None:
    with pytest.raises(DataError, match="a pattern needs a list of files, which an http server does not give"):
        open_sources(["http://127.0.0.1:1/set/*.tar"], StorageConfig(attempts=1, give_up_s=1))
    with pytest.raises(DataError, match="a pattern begins after the bucket"):
        open_sources(["s3://buck*/set/0.tar"], StorageConfig(attempts=1, give_up_s=1))


def test_pattern__data_set_and_dry_run(
    tmp_path: Path, write_crops: WriteCrops, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same shards wherever the command is given; the folder of the shards must not be met by the pattern."""
    for number in (1, 2, 3):
        write_crops(tmp_path / "in" / f"cam{number}", 4, seed=number)
    made = ingest([f"{tmp_path}/in/cam[12]"], f"{tmp_path}/a", ShardConfig(workers=1), StorageConfig()).manifest
    monkeypatch.chdir(tmp_path)
    assert run_command(main, ["shard", "in/cam[12]", "--out", "b", "--workers", "1"]) == 0
    assert made.rows == 8 and f"id {made.id}" in capsys.readouterr().out
    assert run_command(main, ["shard", "in/cam*", "--out", "c", "--dry-run"]) == 0
    assert "about 12 crops" in capsys.readouterr().out
    assert run_command(main, ["shard", "in/*", "--out", "in/shards"]) == 1
    assert "--out lies inside a source" in capsys.readouterr().err


def test_witness__of_a_pattern_is_a_file_near_it(tree: Path) -> None:
    found = witnesses([f"{tree}/hf/train-*.parquet", f"{tree}/crops/[old]"])
    assert [str(Path(one.file).parent) for one in found] == [f"{tree}/hf", f"{tree}/crops/[old]"]
