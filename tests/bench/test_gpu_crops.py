"""The bench's short pre-training on real crops: on a CPU, on a GPU that is not there, and from few packages."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from datapipe.core.errors import UserError
from datapipe.core.randomness import Ints
from datapipe.stream.batch import Batch
from tests.bench.gpu import crops, pillow_jpeg
from tests.bench.gpu.__main__ import NEEDED
from tests.bench.gpu.crops import Pace, Request
from tests.bench.gpu.plan import Machine, planned
from tests.bench.gpu.result import Report
from tests.bench.gpu.run import Session, _on_crops
from tests.end_to_end.tiny import command, finished
from tests.null_gpu.build import environment, missing
from tests.support.golden import ROOT
from tests.training.reid.people import crop, market
from training.config.build import build_method
from training.config.run_plan import RunPlan, make_loader
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.recipes import SHIPPED

PACKAGES = ",".join((*NEEDED, *crops.NEEDED.values()))
CPU = torch.device("cpu")
IDENTITIES, STEPS, HELD_S = 30, 7, 0.05


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return market(tmp_path_factory.mktemp("people") / "people", identities=IDENTITIES)


@pytest.fixture(scope="module")
def sets(people: Path, tmp_path_factory: pytest.TempPathFactory) -> crops.CropSets:
    return crops.prepare(Request(str(people), ""), tmp_path_factory.mktemp("shards"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pass_vits", "personmae_vits"])
def test_pretrained__scores_what_the_evaluation_command_does(
    people: Path, sets: crops.CropSets, recipe: str, tmp_path: Path
) -> None:
    text = (SHIPPED / f"{recipe}.toml").read_text()
    (tmp_path / "fast.toml").write_text(re.sub(r"(?m)^lr = \S+", "lr = 1.0", text))  # moves scores in so few steps
    request = Request(str(people), "", str(tmp_path / "fast.toml"), steps=STEPS)
    check = crops.pretrained(request, sets, tmp_path / "run", CPU, tiny=True)
    found = check.figures
    assert check.passed and not check.lacks and found["decoder"] == "simplejpeg"
    assert (found["crops"], found["steps"], found["planned_steps"], found["images"]) == (
        3 * IDENTITIES,
        STEPS,
        STEPS,
        8,
    )
    assert found["before"] != found["after"] and found["images_per_s"] > 0 and 0 <= found["data_wait"] < 1
    shutil.rmtree(tmp_path / "run/evaluation")
    words = ("training", "evaluate", str(tmp_path / "run"), "--data", str(people), "--device", "cpu")
    code, output, errors = finished(command(*words))
    assert code == 0, output + errors
    for when, weights in (("before", "random"), ("after", f"step_{STEPS:07d}")):
        metrics = json.loads((tmp_path / f"run/evaluation/people/{weights}/metrics.json").read_text())
        assert metrics["headline"] == found["headline"]
        assert metrics["features"][found["headline"]] == pytest.approx(found[when], abs=1e-6), when


class Held:
    """A stream that reads a batch's crops only when the batch has been asked for, and then takes its time."""

    def __init__(self, stream: Any, gate: Semaphore) -> None:
        self._stream, self._gate = stream, gate

    def fetch(self, samples: Ints) -> Any:
        self._gate.acquire()
        time.sleep(HELD_S)
        return self._stream.fetch(samples)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Slow:
    """The loader of a plan, over such a stream. A batch is one piece of work."""

    def __init__(self, plan: RunPlan, world: World) -> None:
        self._gate = Semaphore(0)
        held: Any = Held(plan.stream, self._gate)
        self._loader = make_loader(replace(plan, opened=held), world)

    def after(self, position: int, until: int) -> Iterator[Batch]:
        batches = self._loader.after(position, until)
        for _ in range(position, until, self._loader.global_batch):
            self._gate.release()
            yield next(batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __enter__(self) -> "Slow":
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()


@pytest.mark.slow
def test_pretrained__counts_what_steps_wait_for_the_loader(people: Path, sets: crops.CropSets, tmp_path: Path) -> None:
    request = Request(str(people), "", steps=STEPS)
    usual, slow = (
        crops.pretrained(request, sets, tmp_path / name, CPU, tiny=True, make=make).figures
        for name, make in (("usual", make_loader), ("slow", Slow))
    )
    assert slow["data_wait_ms"] > 0.9e3 * HELD_S, "every batch is held back that long after it was asked for"
    assert slow["data_wait"] > usual["data_wait"] and slow["loss"] == usual["loss"]


@pytest.mark.slow
def test_pretrained__takes_as_many_steps_as_there_is_time_for(
    people: Path, sets: crops.CropSets, tmp_path: Path
) -> None:
    request = Request(str(people), "", seconds=1.0)
    found = crops.pretrained(request, sets, tmp_path / "run", CPU, tiny=True).figures
    assert 1 <= found["steps"] <= found["planned_steps"]
    config = (tmp_path / "run/config.toml").read_text()
    epochs = float(re.findall(r"(?m)^epochs = (\S+)", config)[0])
    assert epochs == pytest.approx(found["planned_steps"] * 8 / (3 * IDENTITIES))


@pytest.mark.slow
def test_run__that_is_late_stops_with_a_checkpoint(sets: crops.CropSets, tmp_path: Path) -> None:
    config = crops.configured(Request("", "", steps=50), sets, tmp_path / "run", 1 << 62, tiny=True)
    config = crops.of_steps(config, 50)
    folder = RunFolder(config.out, config.storage)
    trial, _ = crops._run(config, build_method(config), CPU, make_loader, into=folder, seconds=1e-9)
    assert 1 <= trial.position // trial.batch < 4
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert saved.name == f"step_{trial.position // trial.batch:07d}"


def test_of_steps__schedules_end_with_the_run(sets: crops.CropSets, tmp_path: Path) -> None:
    config = crops.of_steps(crops.configured(Request("", ""), sets, tmp_path, 1 << 62, tiny=True), 40)
    assert config.optimisation.epochs == pytest.approx(40 * 8 / (3 * IDENTITIES))
    assert config.optimisation.warmup_epochs == pytest.approx(4 * 8 / (3 * IDENTITIES))
    assert config.optimisation.lr == pytest.approx(2e-3 * 8 / 1_024)


def test_pace__shares_of_the_time_between_ends_of_steps() -> None:
    found = Pace(ends=[10.0, 11.0, 12.0, 14.0], waited_s=[0.0, 0.5, 0.5]).figures(8)
    assert found == {"images_per_s": 6.0, "ms": 1_000.0, "data_wait": 0.25, "data_wait_ms": 500.0}


@pytest.mark.parametrize("kind", ["photo", "grey", "444", "422"])
def test_pillow_jpeg__decodes_as_simplejpeg_does(kind: str) -> None:
    pixels = simplejpeg.decode_jpeg(crop(3, 1, 0))
    sampling = {"grey": "Gray", "photo": "420"}.get(kind, kind)
    space = "Gray" if kind == "grey" else "RGB"
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels[..., :1] if kind == "grey" else pixels), colorspace=space, colorsubsampling=sampling
    )
    assert pillow_jpeg.decode_jpeg_header(data) == simplejpeg.decode_jpeg_header(data)
    for colours in ("RGB", "Gray"):
        np.testing.assert_array_equal(
            pillow_jpeg.decode_jpeg(data, colours), simplejpeg.decode_jpeg(data, colorspace=colours)
        )
    room = np.zeros(pixels.nbytes + 5, np.uint8)
    there = pillow_jpeg.decode_jpeg(data, "RGB", buffer=room)
    assert np.shares_memory(there, room) and (there == simplejpeg.decode_jpeg(data)).all()
    for broken in (data[: len(data) // 2], b"no image", b""):
        with pytest.raises(ValueError):
            pillow_jpeg.decode_jpeg(broken)


def test_pillow_jpeg__writes_what_simplejpeg_reads() -> None:
    pixels = simplejpeg.decode_jpeg(crop(3, 1, 0))
    data = pillow_jpeg.encode_jpeg(pixels, quality=95, colorsubsampling="420")
    assert simplejpeg.decode_jpeg_header(data) == (64, 32, "YCbCr", "420")
    assert np.abs(simplejpeg.decode_jpeg(data).astype(int) - pixels).mean() < 5


@pytest.mark.parametrize(
    ("names", "chosen"), [(["supervised", "usl_market", "personmae_vits", "pass_vits"], "personmae_vits"),
                          (["supervised"], ""), (["pass_vits"], "pass_vits")],
)  # fmt: skip
def test_recipe_of__the_first_that_learns_without_labels(names: list[str], chosen: str) -> None:
    assert crops.recipe_of(names) == chosen


def without_names(root: Path) -> None:
    for number, path in enumerate(sorted((root / "query").iterdir())):
        path.rename(path.with_name(f"photo{number}.jpg"))


def one_person(root: Path) -> None:
    for path in (*(root / "query").iterdir(), *(root / "bounding_box_test").iterdir()):
        if not path.name.startswith("0001_"):
            path.unlink()


BAD = {
    "no such folder": (shutil.rmtree, "there is no such folder"),
    "no identities": (without_names, "18 images carry no identity and camera in their name"),
    "one identity": (one_person, "all images that are scored are of one identity"),
    "no test set": (lambda root: shutil.rmtree(root / "query"), "no data set of people: query/ missing"),
    "no training part": (lambda root: shutil.rmtree(root / "bounding_box_train"), "a test set alone"),
    "nothing to train on": (
        lambda root: [path.unlink() for path in (root / "bounding_box_train").iterdir()], "there are no images"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_prepare__bad_crops_are_one_error(kind: str, tmp_path: Path) -> None:
    spoil, what = BAD[kind]
    root = market(tmp_path / "people")
    spoil(root)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        crops.prepare(Request(str(root), ""), tmp_path / "shards")
    assert caught.value.what.startswith(what) and caught.value.hint and "people" in caught.value.where


def test_prepare__refuses_to_score_what_is_trained_on(people: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would be trained on"):
        crops.prepare(Request(str(people.parent), str(people)), tmp_path / "shards")


def test_report__says_why_real_crops_are_left_out() -> None:
    left_out = {
        _on_crops(None, Session(1), tiny=True).why: "no crops are given: --crops FOLDER",
        _on_crops(Request("somewhere", "", recipe=""), Session(1), tiny=True).why: "none of these recipes",
    }
    for why, begins in left_out.items():
        assert why.startswith(begins)
    check = _on_crops(None, Session(1), tiny=True)
    report = Report({}, planned([], (), Machine(1.0, 1, 1), seconds=1.0), check)
    assert report.left_out == [f"crops: {crops.NO_CROPS}"] and f"left out: crops: {crops.NO_CROPS}" in str(report)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}")
def test_bench__on_real_crops_from_few_packages(real_crops: Path, tmp_path: Path) -> None:
    """On a GPU that computes as the CPU does, without simplejpeg."""
    flags = ("--tiny", "--threads", "1", "--kinds", "speed", "--recipes", "supervised", "pass_vits",
             "--crops", str(real_crops), "--crops-steps", "6")  # fmt: skip
    words = ("-m", "tests.support.only_packages", PACKAGES, "tests.null_gpu.inside", "tests.bench.gpu", *flags)
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    figures = found["crops"]["figures"]
    assert not found["failed"] and not found["left_out"]
    assert (figures["recipe"], figures["steps"], figures["queries"], figures["set"]) == ("pass_vits", 6, 120, "cuhk03")
    assert figures["decoder"] == "Pillow" and "simplejpeg" in "".join(found["crops"]["lacks"].values()) + done.stdout
    assert 0 < figures["before"]["mAP"] < 1 and 0 < figures["after"]["mAP"] < 1 and 0 <= figures["data_wait"] < 1
    assert "rank-1 before" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}")
def test_bench__bad_crops_end_it_before_anything_is_tried(tmp_path: Path) -> None:
    words = ("-m", "tests.null_gpu.inside", "tests.bench.gpu", "--tiny", "--crops", "nowhere")
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 2 and not done.stdout and not os.listdir(tmp_path)
    assert done.stderr.splitlines()[0] == "error: there is no such folder: nowhere"
