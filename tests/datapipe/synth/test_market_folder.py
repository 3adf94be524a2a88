"""Rendered pedestrians: the same bytes every time, a folder the Market protocol can use, neither easy nor hopeless."""

import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from datapipe.core.config import SynthConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.synth.market_folder import FINISHED, GALLERY, QUERY, TRAIN, UNFINISHED, render
from datapipe.synth.scene import Shot, crop, person
from tests.conftest import S3Server

ROOT = Path(__file__).parents[3]
SMALL = {"train_identities": 3, "test_identities": 4, "cameras": 3, "images": 3, "workers": 1}
NAME = re.compile(r"(\d{4})_c(\d)s1_(\d{6})_00\.jpg")
LUMINANCE_TABLE_START = 16  # first step of the standard luminance table at quality 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "people"
    render(out, SynthConfig(**SMALL))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def identities(folder: Path) -> set[int]:
    return {int(path.name[:4]) for path in folder.glob("*.jpg")}


@pytest.mark.slow
def test_render__same_bytes_for_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    render(tmp_path / "two", SynthConfig(**{**SMALL, "workers": 2}))
    assert contents(tmp_path / "two") == contents(folder)


def test_crop__depends_on_seed_identity_camera_and_index() -> None:
    base = crop(SynthConfig(), Shot(1, 1, 0))
    assert crop(SynthConfig(), Shot(1, 1, 0)) == base
    others = [
        crop(SynthConfig(seed=1), Shot(1, 1, 0)),
        crop(SynthConfig(), Shot(2, 1, 0)),
        crop(SynthConfig(), Shot(1, 2, 0)),
        crop(SynthConfig(), Shot(1, 1, 1)),
    ]
    assert len({base, *others}) == 5


def test_crop__does_not_depend_on_how_many_people_or_images_there_are() -> None:
    shot = Shot(5, 2, 1)
    assert crop(SynthConfig(train_identities=9, images=7), shot) == crop(SynthConfig(), shot)


def test_render__test_identities_are_not_trained_on(folder: Path) -> None:
    train, gallery, query = (identities(folder / name) for name in (TRAIN, GALLERY, QUERY))
    assert train == {1, 2, 3}
    assert gallery == query == {4, 5, 6, 7}


def test_render__names_parse_and_counts_add_up(folder: Path) -> None:
    counts = {name: len(list((folder / name).iterdir())) for name in (TRAIN, GALLERY, QUERY)}
    assert counts == {TRAIN: 27, GALLERY: 24, QUERY: 12}
    for path in folder.rglob("*.jpg"):
        parts = NAME.fullmatch(path.name)
        assert parts is not None, path.name
        assert 1 <= int(parts[2]) <= 3 and int(parts[3]) < 3


def test_render__every_query_has_a_match_under_another_camera(folder: Path) -> None:
    cameras = defaultdict(set)
    for path in (folder / GALLERY).glob("*.jpg"):
        cameras[path.name[:4]].add(path.name.split("_")[1])
    for path in (folder / QUERY).glob("*.jpg"):
        assert cameras[path.name[:4]] - {path.name.split("_")[1]}


def test_render__sizes_and_qualities_vary_within_their_ranges(folder: Path) -> None:
    sizes, steps = set(), set()
    for path in folder.rglob("*.jpg"):
        height, width = cv2.imread(str(path)).shape[:2]
        assert 150 <= height <= 320 and 60 <= width <= 130
        sizes.add((height, width))
        steps.add(_first_quantisation_step(path.read_bytes()))
    assert len(sizes) > 20
    assert min(steps) >= _step_at(95) and max(steps) <= _step_at(75) and len(steps) > 3


def _first_quantisation_step(jpeg: bytes) -> int:
    return jpeg[jpeg.index(b"\xff\xdb") + 5]


def _step_at(quality: int) -> int:
    return (LUMINANCE_TABLE_START * (200 - 2 * quality) + 50) // 100


@pytest.mark.slow
def test_render__an_interrupted_run_is_completed_and_nothing_is_rendered_twice(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "people"
    render(out, SynthConfig(**SMALL))
    (out / FINISHED).rename(out / UNFINISHED)
    images = sorted(out.rglob("*.jpg"))
    for path in images[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in images[1::2]}
    render(out, SynthConfig(**SMALL))
    assert contents(out) == contents(folder)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


KILLED = """
from pathlib import Path
from datapipe.core.config import SynthConfig
from datapipe.synth.market_folder import render
render(Path({out!r}), SynthConfig(train_identities=400, test_identities=4, cameras=3, images=3, workers=2))
"""


@pytest.mark.slow
def test_render__killed_leaves_whole_images_no_marker_and_no_processes(tmp_path: Path) -> None:
    out = tmp_path / "people"
    run = subprocess.Popen([sys.executable, "-c", KILLED.format(out=str(out))], cwd=ROOT, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(list(out.glob("*/*.jpg"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.communicate()
    assert workers and psutil.wait_procs(workers, timeout=300)[1] == []
    images = list(out.glob("*/*.jpg"))
    assert images and all(cv2.imread(str(path)) is not None for path in images)
    assert (out / UNFINISHED).exists() and not (out / FINISHED).exists()


def test_render__a_finished_folder_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    render(folder, SynthConfig(**{**SMALL, "workers": 2}))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "complete: 63 images" in capsys.readouterr().out


def test_render__other_settings_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(DataError, match=r"seed: 0 there, 7 asked for"):
        render(folder, SynthConfig(**{**SMALL, "seed": 7}))


def test_render__a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="not made by synth"):
        render(tmp_path, SynthConfig(**SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("wrong", [{"height": (320, 150)}, {"quality": (75, 101)}, {"width": (0, 60)}])
def test_render__ranges_are_checked(tmp_path: Path, wrong: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        render(tmp_path / "people", SynthConfig(**SMALL, **wrong))


def test_person__clothes_colours_are_shared_but_people_differ() -> None:
    people = [person(0, identity) for identity in range(1, 101)]
    assert len({_coarse(who.upper.colour) for who in people}) <= 40
    looks = {tuple(str(value) for key, value in asdict(who).items()) for who in people}
    assert len(looks) == 100
    patterned = np.mean([who.upper.pattern != "plain" for who in people])
    bags = np.mean([who.bag != "" for who in people])
    assert 0.55 < patterned < 0.85 and 0.4 < bags < 0.7


def _coarse(colour: tuple[float, float, float]) -> tuple[int, ...]:
    return tuple(round(channel * 4) for channel in colour)


def test_render__fills_an_object_store(folder: Path, s3: S3Server, capsys: pytest.CaptureFixture[str]) -> None:
    bucket = s3.bucket()
    for _ in range(2):
        render(f"s3://{bucket}/people", SynthConfig(**SMALL), s3.storage)
    written = {name.removeprefix("people/"): data for name, data in s3.objects(bucket).items()}
    assert written == contents(folder)
    assert "is complete: 63 images" in capsys.readouterr().out
