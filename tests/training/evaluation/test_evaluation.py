"""What there is to score at an address, what the scores say of the weights, and what is not done twice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from tests.end_to_end.tiny import generated, recipe
from tests.training.commands.test_reproduce import PEOPLE, SIZE, weights
from tests.training.reid.people import market
from training import checkpoint
from training.__main__ import main
from training.config.run_config import RunConfig
from training.evaluation import evaluation
from training.evaluation.feature_file import header_of
from training.evaluation.score_features import score_features
from training.evaluation.weights_origin import of_card, of_run, quoted_feature
from training.methods.supervised import SupervisedConfig
from training.reid.settings import ScoringConfig
from training.trainer.milestones import summary
from training.weights.initialise import InitConfig

STORAGE = StorageConfig()


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(market(tmp_path_factory.mktemp("data") / "people", identities=PEOPLE))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["pretrain", str(recipe(folder, generated(folder), str(folder / "run")))]) == 0
    return folder / "run"


@pytest.mark.slow
def test_tasks__of_a_run_of_one_checkpoint_and_of_an_export(run: Path, people: str, tmp_path: Path) -> None:
    whole = evaluation.tasks(str(run), people, STORAGE)
    (name,) = checkpoint.complete(evaluation.open_run(str(run), STORAGE)[0].at("checkpoints"))
    assert [task.weights.name for task in whole] == ["colour_histogram", "random", name]
    (one,) = evaluation.tasks(f"{run}/checkpoints/{name}/", people, STORAGE)
    assert one.run == str(run) and one.weights == whole[-1].weights
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    (exported,) = evaluation.tasks(str(tmp_path / "export"), people, STORAGE, out=str(tmp_path / "scores"))
    ours, theirs = evaluation.score(exported), evaluation.score(one)
    assert ours["features"] == theirs["features"] and ours["settings"]["model"]["family"] == "pass"
    assert (tmp_path / "scores" / "evaluation" / "people" / "exported" / "metrics.json").is_file()
    with pytest.raises(DataError, match="this checkpoint is not complete"):
        evaluation.tasks(f"{run}/checkpoints/step_0000099", people, STORAGE)


@pytest.mark.slow
def test_score__is_not_done_twice_unless_settings_differ(run: Path, people: str, tmp_path: Path) -> None:
    task = evaluation.tasks(str(run), people, STORAGE, out=str(tmp_path))[-1]
    path = tmp_path / "evaluation" / "people" / task.weights.name / "metrics.json"
    first = evaluation.score(task)
    written = path.stat().st_mtime_ns
    again = evaluation.score(task)
    assert again["features"] == first["features"] and path.stat().st_mtime_ns == written
    assert first["headline"] == "cls+parts"
    path.write_text(json.dumps({**first, "headline": "cls"}))  # as versions wrote that quoted CLS
    assert evaluation.score(task)["headline"] == json.loads(path.read_text())["headline"] == "cls+parts"
    written = path.stat().st_mtime_ns
    reranked = evaluation.score(replace(task, scoring=ScoringConfig(rerank=True)))
    assert "cls re-ranked" in reranked["features"] and path.stat().st_mtime_ns > written
    assert evaluation.score(replace(task, interpolation="bicubic"))["settings"]["interpolation"] == "bicubic"


@pytest.mark.slow
def test_evaluate__a_file_and_the_file_of_an_export(
    people: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", people, "--out", str(tmp_path / "scores")]
    assert main(["evaluate", weights(tmp_path), *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "scores" / "report.html")
    path = tmp_path / "scores" / "evaluation" / "people" / "exported" / "metrics.json"
    model = json.loads(path.read_text())["settings"]["model"]
    assert (model["arch"], model["task"], model["file"]) == ("vit_tiny", "zero-shot", "weights.pth")
    written = path.stat().st_mtime_ns
    (export,) = (tmp_path / "scores" / "init").iterdir()
    assert main(["evaluate", str(export / "backbone.safetensors"), *words]) == 0
    assert path.stat().st_mtime_ns == written  # the same weights on the same images
    report = (tmp_path / "scores" / "report.html").read_text()
    assert "Nothing is published for weights of this kind, nor on this data set." in report


@pytest.mark.slow
def test_embed__a_run_stands_for_its_newest_checkpoint_and_a_file_for_what_it_is_imported_as(
    run: Path, people: str, tmp_path: Path
) -> None:
    task = evaluation.tasks(str(run), people, STORAGE, out=str(tmp_path))[-1]
    name, file = task.weights.name, str(tmp_path / "F.parquet")
    assert main(["embed", str(run), "--data", people, "--out", file]) == 0
    expected, found = evaluation.score(task), score_features(file, people, str(tmp_path), STORAGE, ScoringConfig())[0]
    quoted = expected["headline"]
    assert found["features"] == {quoted: expected["features"][quoted]} and found["weights"] == name
    assert found["settings"]["model"] == expected["settings"]["model"] and found["step"] == expected["step"]
    said = header_of(file, STORAGE)
    assert said is not None and said["weights"]["address"] == f"{run}/checkpoints/{name}"
    assert main(["embed", weights(tmp_path), "--data", people, "--out", str(tmp_path / "P.parquet")]) == 0
    published = header_of(str(tmp_path / "P.parquet"), STORAGE)
    assert published is not None and published["weights"]["file"] == "weights.pth"
    assert (published["weights"]["name"], published["weights"]["arch"]) == ("weights", "vit_tiny")


def card(**changes: object) -> dict[str, object]:
    """Of weights that are exported."""
    backbone = {"arch": "vit_tiny", "size": list(SIZE)}
    return {"method": "", "backbone": backbone, "parts": 0, "file": {"sha256": "ab"}, "origin": {}} | changes


TUNED = {"evaluation": {"data": "data/msmt17"}, "method": {"label_fraction": 0.1}}


@pytest.mark.parametrize(
    ("changes", "family", "task"),
    [
        ({"method": "personvit"}, "personvit", "zero-shot"),
        ({"origin": {"layout": "pass_fine_tuned", "file": "x.pth"}}, "pass", "supervised"),
        ({"origin": {"layout": "ics", "file": "x.pth"}}, "dino", "zero-shot"),
        ({"origin": {"layout": "fine_tuned", "file": "x.pth"}}, "", "supervised"),
        ({"method": "supervised", "origin": {"layout": "export", "method": "personmae"}}, "personmae", "supervised"),
        ({"method": "supervised", "origin": {"layout": "export", "method": "", "origin": {"layout": "pass"}}}, "pass",
         "supervised"),
    ],
)  # fmt: skip
def test_pedigree__of_a_card(changes: dict[str, object], family: str, task: str) -> None:
    found = of_card(card(**changes), "data/market1501")
    assert (found.family, found.task, found.sha256, found.trained_on) == (family, task, "ab", "")


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"method": "pass", "parts": 3}, "cls+parts"),
        ({"method": "personvit"}, "cls"),
        ({"method": "supervised", "parts": 3}, "cls+parts"),
        ({"method": "supervised"}, "cls"),
        ({"origin": {"layout": "pass"}, "parts": 3}, "cls+parts"),
        ({"origin": {"layout": "pass_fine_tuned"}, "parts": 3}, "cls+parts"),
        ({"origin": {"layout": "pass_fine_tuned", "fusion": "mean"}, "parts": 3}, "cls_parts_mean"),
        ({"method": "supervised", "parts": 3, "fusion": "mean", "origin": {"fusion": "cat"}}, "cls_parts_mean"),
        ({"method": "cluster_contrast", "parts": 3, "fusion": "mean"}, "cls_parts_mean"),  # its necks are not there
        ({"origin": {"layout": "ics"}}, "cls"),
    ],
)
def test_quoted_feature__has_the_parts_where_a_backbone_has_some(changes: dict[str, object], feature: str) -> None:
    assert quoted_feature(card(**changes)) == feature


def test_summary__compares_milestones_by_the_feature_that_is_quoted_now() -> None:
    """The first was scored by a version that quoted CLS."""
    rows = [
        {"step": step, "headline": headline, "features": {"cls": {"mAP": cls}, "cls+parts": {"mAP": both}}}
        for step, headline, cls, both in (
            (10, "cls", 0.9, 0.2),
            (20, "cls+parts", 0.1, 0.6),
            (30, "cls+parts", 0.8, 0.5),
        )
    ]
    found = summary(rows, "last")
    assert (found["best"]["step"], found["last"]["step"]) == (20, 30)
    assert [row["mAP"] for row in found["milestones"]] == [0.2, 0.6, 0.5]


def test_pedigree__of_weights_fine_tuned_elsewhere_with_fewer_labels() -> None:
    elsewhere = of_card(card(method="supervised", recipe=TUNED), "data/market1501")
    assert (elsewhere.trained_on, elsewhere.label_fraction) == ("msmt17", 0.1)
    assert of_card(card(method="supervised", recipe=TUNED), "data/../data/msmt17/").trained_on == ""


def test_pedigree__random_weights_are_of_no_method() -> None:
    config = RunConfig(method=SupervisedConfig(label_fraction=0.5), init=InitConfig(weights="x"))
    assert (of_run(config, "people").family, of_run(config, "people").task) == ("", "zero-shot")
    tuned = of_run(config, "people", sha256="ab", origin={"layout": "pass", "file": "x.pth"})
    assert (tuned.family, tuned.task, tuned.label_fraction, tuned.file) == ("pass", "supervised", 0.5, "x.pth")
