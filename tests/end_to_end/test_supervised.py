"""Fine-tuning from a labelled folder to scores: run, stopped and gone on with, exported, scored anew."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError, DataError, NotFoundError
from datapipe.storage import open_store
from datapipe.stream.training_data import load_data
from tests.end_to_end import tiny
from tests.support.ranks import run_ranks
from tests.training.reid.people import market
from training.__main__ import main
from training.config.recipe_toml import load
from training.config.run_config import RunConfig
from training.config.run_plan import milestone_ends, plan_run
from training.core.host import LocalHost
from training.core.world import World
from training.engine.clock import Clock
from training.evaluation import evaluation
from training.evaluation.evaluation import score, tasks
from training.evaluation.fine_tune import prepare, suited_recipe
from training.recipes import SHIPPED
from training.reid.datasets.open_dataset import open_reid
from training.reid.datasets.training_shards import shard_training_part
from training.trainer import milestones
from training.trainer.pretrain import Ending, pretrain
from training.weights.export import load_backbone, load_card
from training.weights.published import Stated, read_published

TINY = [
    "--backbone.arch", "custom", "--backbone.size", "32", "16", "--backbone.patch", "8", "--backbone.width", "24",
    "--backbone.depth", "2", "--backbone.heads", "2", "--engine.threads", "1", "--engine.device", "cpu",
    "--engine.audit", "True", "--stream.threads", "1", "--optimisation.precision", "fp32", "--optimisation.batch", "8",
    "--optimisation.micro-batch", "8", "--optimisation.epochs", "3", "--optimisation.warmup-epochs", "1",
    "--optimisation.lr", "0.01", "--evaluation.every-epochs", "1",
]  # fmt: skip
STEPS = 9
"""Three epochs of 24: six identities with three images each, which count as four, by batches of eight."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(market(tmp_path_factory.mktemp("sets") / "people", images=2))


def fine_tuning(data: str, out: Path, *flags: str, weights: str = "random", recipe: str = "supervised") -> RunConfig:
    return prepare(weights, data, str(out), recipe=recipe, flags=[*TINY, *flags])


def run(config: RunConfig, host: LocalHost | None = None) -> Any:
    return pretrain(config, world=World(), host=host or LocalHost())


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / milestones.SUMMARY).read_text())


@pytest.fixture(scope="module")
def straight(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    out = tmp_path_factory.mktemp("straight") / "run"
    ending = run(fine_tuning(data, out))
    assert ending.complete and ending.step == STEPS
    return out


@pytest.mark.slow
def test_run__is_scored_after_each_epoch_and_keeps_the_last_and_the_best(straight: Path) -> None:
    found = summary_of(straight)
    assert [one["step"] for one in found["milestones"]] == [3, 6, 9]
    assert found["quoted"] == "last" and found["result"] == found["last"] and found["last"]["step"] == STEPS
    assert found["best"]["step"] == max(found["milestones"], key=lambda one: one["mAP"])["step"]
    for which in ("last", "best"):
        card = json.loads((straight / "exports" / which / "card.json").read_text())
        assert card["step"] == found[which]["step"] and card["method"] == "supervised"
        assert card["input"]["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.slow
def test_run__batches_are_of_identities_and_labels_of_all(straight: Path, data: str) -> None:
    reid = open_reid(data)
    assert reid.train is not None
    for samples in tiny.audited(straight).values():
        config = load(str(straight / "config.toml"))
        pids = load_data(config.stream, config.storage).stream(config.storage, config.stream).pid[samples]
        found, counts = np.unique(pids, return_counts=True)
        assert counts.tolist() == [4, 4] and set(found.tolist()) <= set(reid.train.pids.tolist())


@pytest.mark.slow
@pytest.mark.parametrize(("step", "ends"), [(3, 4), (5, 6), (8, 9)])
def test_run__stopped_and_gone_on_with_ends_as_if_never_stopped(step: int, ends: int, data: str, straight: Path,
                                                                 tmp_path: Path) -> None:  # fmt: skip
    """Told to after a step, it ends after the next one, a milestone too: whose score is left to the next start."""
    saves = "--checkpoints.every-steps", str(step)
    stopped = run(fine_tuning(data, tmp_path / "run", *saves), tiny.StoppingHost(ends))
    assert stopped == Ending(ends, False)
    scored = {path.parent.name for path in (tmp_path / "run" / "evaluation").rglob("metrics.json")}
    assert scored == {f"step_{milestone:07d}" for milestone in (3, 6, 9) if milestone <= step}
    assert run(fine_tuning(data, tmp_path / "run", *saves)) == Ending(STEPS, True)
    expected = tiny.final_state(straight)
    for name, value in tiny.final_state(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name
    scores = [one["milestones"] for one in map(summary_of, (straight, tmp_path / "run"))]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_run__a_milestone_that_was_not_scored_is_made_up_for(data: str, straight: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    config = fine_tuning(data, tmp_path / "run")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "score", fail)
        with pytest.raises(RuntimeError, match="gone"):
            run(config)
    assert run(config).complete
    assert summary_of(tmp_path / "run")["milestones"] == summary_of(straight)["milestones"]


def test_run__the_rule_of_what_is_quoted_cannot_change(straight: Path) -> None:
    """Whether the best or the last is quoted cannot be chosen once scores are known."""
    config = load(str(straight / "config.toml"))
    with pytest.raises(ConfigError, match="evaluation.quote"):
        run(replace(config, evaluation=replace(config.evaluation, quote="best")))


def test_export__the_whole_in_transreid_s_layout_loads_and_scores_the_same(straight: Path, data: str,
                                                                           tmp_path: Path) -> None:  # fmt: skip
    file = straight / "exports" / "last" / "fine_tuned.safetensors"
    published = read_published(str(file), StorageConfig(), Stated(heads=2, depth=2))
    assert published.origin["layout"] == "fine_tuned" and published.statistics == "half"
    ours = load_backbone(str(straight / "exports" / "last"))
    for name, value in published.backbone.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    left = {name.split(".")[0] for name in published.origin["left_out"]}
    assert left == {"bottleneck", "classifier"}
    assert load_file(file)["classifier.weight"].shape == (6, 24)
    (task,) = tasks(str(straight / "exports" / "last"), data, StorageConfig(), out=str(tmp_path))
    scored = score(task)
    assert scored["features"]["cls"] == summary_of(straight)["last"]["features"]["cls"]


def test_export__trained_on_one_set_and_scored_on_another(straight: Path, tmp_path: Path) -> None:
    """Direct transfer: no image of the other set was trained on, and the scores say where the weights come from."""
    other = market(tmp_path / "other", identities=5, cameras=2, images=1)
    (task,) = tasks(str(straight / "exports" / "last"), str(other), StorageConfig(), out=str(tmp_path / "scores"))
    scored = score(task)
    assert scored["set"] == "other" and scored["data"]["counts"]["query"]["images"] == 10
    assert scored["settings"]["model"]["trained_on"] == "people"
    assert scored["features"]["cls"] != summary_of(straight)["last"]["features"]["cls"]


def _fine_tune(world: World, config: RunConfig) -> None:
    assert pretrain(config, world=world, host=LocalHost()) == Ending(STEPS, True)


@pytest.mark.slow
def test_run__on_two_ranks_of_deepspeed_is_that_of_one(data: str, straight: Path, tmp_path: Path) -> None:
    """Triplets are mined in the whole batch, which neither rank holds; the rates are those of the batch."""
    stepper = ("--engine.stepper", "deepspeed", "--engine.zero-stage", "2", "--optimisation.micro-batch", "4")
    run_ranks(2, _fine_tune, fine_tuning(data, tmp_path / "run", *stepper))
    runs = (tmp_path / "run", straight)
    losses, expected_losses = ([one["loss"] for one in tiny.step_records(run)] for run in runs)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    found, expected = (load_backbone(str(run / "exports" / "last")).state_dict() for run in runs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert len(summary_of(tmp_path / "run")["milestones"]) == 3


@pytest.mark.slow
def test_command__a_fine_tuned_file_is_scored_by_its_feature(data: str, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    flags = [*TINY, "--backbone.width", "192", "--backbone.heads", "3", "--backbone.depth", "12", "--method.parts", "3",
             "--optimisation.epochs", "0.4", "--optimisation.warmup-epochs", "0"]  # fmt: skip
    out = tmp_path / "run"
    words = [
        "random",
        "--data",
        data,
        "--tasks",
        "supervised",
        "--recipe",
        "supervised_pass",
        "--out",
        str(out),
        *flags,
    ]
    assert main(["evaluate", *words]) == 0
    said = capsys.readouterr().out
    assert "the last weights, whatever their score" in said
    file = out / "exports" / "last" / "fine_tuned.safetensors"
    assert main(["evaluate", str(file), "--data", data, "--out", str(tmp_path / "scores")]) == 0
    (scores,) = (tmp_path / "scores" / "evaluation").rglob("metrics.json")
    content, before = json.loads(scores.read_text()), summary_of(out)["last"]
    assert content["headline"] == "cls+parts" == before["headline"]
    assert content["features"] == before["features"]


@pytest.mark.slow
def test_fusion__mean_is_followed_from_the_run_to_its_files(data: str, tmp_path: Path) -> None:
    """Stopped and gone on with, exported, imported as the reference saves it: all are scored by one feature."""
    out, storage = tmp_path / "run", StorageConfig()
    flags = ["--method.parts", "2", "--method.fusion", "mean", "--method.neck", "each", "--optimisation.epochs", "2"]
    assert not run(fine_tuning(data, out, *flags), tiny.StoppingHost(4)).complete
    with pytest.raises(ConfigError, match=r"method\.fusion"):
        run(fine_tuning(data, out, *flags, "--method.fusion", "cat"))
    assert run(fine_tuning(data, out, *flags)).complete
    found = summary_of(out)
    scored = found["last"]["features"]
    assert [one["mAP"] for one in found["milestones"]][-1] == scored["cls_parts_mean"]["mAP"]
    assert found["last"]["headline"] == "cls_parts_mean"
    assert found["last"]["settings"]["model"]["fusion"] == "mean"
    last, imported = out / "exports" / "last", tmp_path / "import"
    assert load_card(open_store(str(last)))["fusion"] == "mean"
    file = str(last / "fine_tuned.safetensors")
    assert load_file(file)["classifier.weight"].shape == (6, 24)
    words = ["import", file, "--out", str(imported), "--heads", "2", "--depth", "2"]
    with pytest.raises(DataError, match="by 'mean', not by 'cat': what lies behind takes 24 channels"):
        main([*words, "--fusion", "cat"])
    assert main(words) == 0
    assert load_card(open_store(str(imported)))["origin"]["fusion"] == "mean"
    for weights in (last, imported):
        (task,) = tasks(str(weights), data, storage, out=str(tmp_path / weights.name))
        again = score(task)
        assert (again["headline"], again["features"]) == ("cls_parts_mean", scored)
        assert again["settings"]["model"]["fusion"] == "mean"


@pytest.mark.slow
def test_fusion__needs_part_tokens(data: str, straight: Path, tmp_path: Path) -> None:
    """A recipe for them takes weights without any; what the user asks for by a flag is refused."""
    export = str(straight / "exports" / "last")
    recipe = tmp_path / "mean.toml"
    recipe.write_text((SHIPPED / "supervised_pass.toml").read_text().replace('fusion = "cat"', 'fusion = "mean"'))
    method = fine_tuning(data, tmp_path / "a", weights=export, recipe=str(recipe)).method
    assert (method.parts, method.fusion, method.neck) == (0, "cat", "one")
    with pytest.raises(ConfigError, match="needs part tokens, and there are none"):
        fine_tuning(data, tmp_path / "b", "--method.fusion", "mean", weights=export)


def test_prepare__weights_of_a_run_and_of_its_export_are_the_same(straight: Path, data: str, tmp_path: Path) -> None:
    export = straight / "exports" / "last"
    found = [fine_tuning(data, tmp_path / str(number), "--backbone.size", "48", "16", weights=str(weights))
             for number, weights in enumerate((straight, export))]  # fmt: skip
    assert found[0].init.weights.startswith(str(tmp_path)) and found[1].init.weights == str(export)
    assert all(config.backbone.width == 24 and config.backbone.size == (48, 16) for config in found)
    first, second = (load_backbone(config.init.weights).state_dict() for config in found)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_prepare__the_recipe_that_suits_the_weights() -> None:
    assert suited_recipe({}) == "supervised" == suited_recipe({"method": "dino", "parts": 0})
    assert suited_recipe({"method": "pass", "parts": 3}) == "supervised_pass"
    assert suited_recipe({"method": "personmae", "parts": 0}) == "supervised_mae"
    assert suited_recipe({"method": "", "parts": 0, "origin": {"layout": "mae"}}) == "supervised_mae"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["supervised_384", "supervised_pass", "supervised_mae"])
def test_recipe__runs(recipe: str, data: str, tmp_path: Path) -> None:
    short = ("--optimisation.epochs", "1", "--optimisation.warmup-epochs", "0", "--evaluation.data", "")
    ending = run(fine_tuning(data, tmp_path / "run", *short, recipe=recipe))
    assert ending.complete
    records = tiny.step_records(tmp_path / "run")
    told = {"loss_identity", "uniform_entropy_identity", "done", "loss_triplet", "identified", "feature_rank"}
    assert told <= records[-1].keys()
    assert not (tmp_path / "run" / "evaluation").exists()


def test_label_fraction__keeps_whole_identities(data: str, tmp_path: Path) -> None:
    config = fine_tuning(data, tmp_path / "run", "--method.label-fraction", "0.5")
    plan = plan_run(config, load_data(config.stream, config.storage), 1)
    assert plan.config.method.classes == 3 and plan.config.samples_per_epoch == 3 * 4
    assert plan.identities is not None
    samples = plan.order().samples(np.arange(96))
    pids = plan.data.stream(config.storage, config.stream).pid[samples]
    assert set(plan.identities.labels[samples].tolist()) == {0, 1, 2} and len(set(pids.tolist())) == 3


@pytest.mark.slow
def test_refused__before_anything_starts(data: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run folder"):
        prepare("random", data, "")
    with pytest.raises(ConfigError, match="of dino, which is not training for --tasks supervised") as caught:
        fine_tuning(data, tmp_path / "a", recipe="dino_vits")
    assert "one of supervised, " in str(caught.value.hint) and "usl_" not in str(caught.value.hint)
    with pytest.raises(ConfigError, match="whole identities of 3"):
        run(fine_tuning(data, tmp_path / "b", "--method.instances", "3"))
    with pytest.raises(ConfigError, match="the recipe is for 5 identities, the data has 6"):
        run(fine_tuning(data, tmp_path / "c", "--method.classes", "5"))
    with pytest.raises(DataError, match="batches of 2 identities need as many"):
        run(fine_tuning(data, tmp_path / "d", "--method.label-fraction", "0.1"))
    with pytest.raises(ConfigError, match="mining"):
        run(fine_tuning(data, tmp_path / "e", "--optimisation.micro-batch", "4"))
    with pytest.raises(NotFoundError, match="no weights here"):
        fine_tuning(data, tmp_path / "f", weights=str(tmp_path))


def test_training_part__all_images_with_the_reader_s_labels(data: str, tmp_path: Path) -> None:
    reid = open_reid(data)
    assert reid.train is not None
    manifest = shard_training_part(reid, str(tmp_path / "shards"), StorageConfig())
    rows = manifest.table(["name", "pid", "camera"]).to_pylist()
    expected = zip(reid.train.paths.tolist(), reid.train.pids.tolist(), reid.train.cameras.tolist(), strict=True)
    assert sorted((row["name"], row["pid"], row["camera"] - 1) for row in rows) == sorted(expected)
    with pytest.raises(DataError, match="no images to train on"):
        shard_training_part(replace(reid, train=None), str(tmp_path / "none"), StorageConfig())


def test_ends__whole_steps_nearest_to_every_so_many_epochs() -> None:
    clock = Clock(batch=8, epoch_samples=20, epochs=5, seed=0)  # 12 steps, 2.5 an epoch
    config = load("supervised").evaluation
    assert milestone_ends(config, clock) == [96]
    assert milestone_ends(replace(config, data="x", every_epochs=0), clock) == [96]
    assert milestone_ends(replace(config, data="x", every_epochs=2), clock) == [40, 80, 96]
    assert milestone_ends(replace(config, data="x", every_epochs=5), clock) == [96]
