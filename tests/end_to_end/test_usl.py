"""Training without labels from a labelled folder to scores: run, killed anywhere, gone on with, on ranks."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import adjusted_rand_score

from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.storage import open_store
from tests.end_to_end import tiny
from tests.support.forked import call, forkserver
from tests.support.ranks import run_ranks
from tests.training.reid.people import market
from training.__main__ import main
from training.config.run_config import RunConfig
from training.core.host import LocalHost
from training.core.world import World
from training.evaluation.evaluation import score, tasks
from training.evaluation.fine_tune import prepare
from training.trainer import milestones, pseudo_labels
from training.trainer.pretrain import Ending, pretrain
from training.weights import export as exports
from training.weights.export import Provenance
from training.weights.published import Stated, read_published

TINY = [
    "--backbone.arch", "custom", "--backbone.size", "32", "16", "--backbone.patch", "8", "--backbone.width", "24",
    "--backbone.depth", "2", "--backbone.heads", "2", "--engine.threads", "1", "--engine.device", "cpu",
    "--engine.audit", "True", "--stream.threads", "1", "--optimisation.batch", "12", "--optimisation.micro-batch", "6",
    "--optimisation.epochs", "3", "--optimisation.lr", "0.01", "--evaluation.every-epochs", "3",
    "--method.iterations", "4", "--method.instances", "3", "--method.norm-group", "6", "--method.clustering.k1", "6",
    "--method.clustering.k2", "2", "--method.clustering.min-samples", "2", "--checkpoints.every-steps", "2",
]  # fmt: skip
STEPS = 12
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(market(tmp_path_factory.mktemp("sets") / "people", identities=16, images=1))


def without_labels(data: str, out: Path, *flags: str) -> RunConfig:
    return prepare("random", data, str(out), task="usl", flags=[*TINY, *flags])


def run(config: RunConfig) -> Any:
    return pretrain(config, world=World(), host=LocalHost())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return tiny.final_state(out)


@pytest.fixture(scope="module")
def straight(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert run(without_labels(data, out)) == Ending(STEPS, True)
    return out


def test_run__leaves_the_labels_of_every_epoch(straight: Path) -> None:
    epochs = [json.loads(line) for line in (straight / pseudo_labels.HISTORY).read_text().splitlines()]
    assert [one["epoch"] for one in epochs] == [0, 1, 2]
    for one in epochs:
        name = straight / "pseudo_labels" / f"epoch_{one['epoch'] + 1:04d}.parquet"
        table = pyarrow.parquet.read_table(name).to_pandas()
        labels = table["label"].to_numpy()
        assert table["key"].is_unique and len(table) == one["outliers"] + (labels >= 0).sum()
        assert one["clusters"] == labels.max() + 1 >= 4
        identities = table["name"].str.extract(r"(\d{4})_c")[0].astype(int).to_numpy()
        inside = labels >= 0
        assert one["ari"] == pytest.approx(adjusted_rand_score(identities[inside], labels[inside]))
    steps = tiny.audited(straight)
    assert sorted(steps) == list(range(1, STEPS + 1))


def _embed(moment: str) -> None:
    real = pseudo_labels.embed_stream

    def embed_stream(*args: Any, **named: Any) -> Any:
        _perhaps(moment, "embed")
        return real(*args, **named)

    pseudo_labels.embed_stream = embed_stream  # type: ignore[assignment]


def _around(name: str, moment: str, kind: Any, *, after: bool) -> None:
    """Have a function of a class or module end this process, before or after its work."""
    real: Callable[..., Any] = getattr(kind, name)

    def replaced(*args: Any, **named: Any) -> Any:
        if not after:
            _perhaps(moment, name)
        result = real(*args, **named)
        if after:
            _perhaps(moment, name)
        return result

    setattr(kind, name, replaced)


_seen: dict[str, int] = {}


def _perhaps(moment: str, name: str) -> None:
    """End this process in the second epoch, without a word."""
    _seen[name] = _seen.get(name, 0) + 1
    if moment == name and _seen[name] == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def _doomed(config: RunConfig, moment: str) -> None:
    from training.trainer import loop

    _embed(moment)
    _around("_clustered", moment, pseudo_labels.PseudoLabels, after=False)
    _around("begin_epoch", moment, __import__("training.methods.cluster_contrast", fromlist=["x"]).ClusterContrast,
            after=True)  # fmt: skip
    _around("_keep", moment, pseudo_labels.PseudoLabels, after=True)
    steps = [0]
    real = loop._step

    def step(*args: Any, **named: Any) -> Any:
        steps[0] += 1
        if moment == "step" and steps[0] == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)

    loop._step = step
    run(config)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["embed", "_clustered", "begin_epoch", "_keep", "step"])
def test_run__killed_anywhere_ends_with_the_same_bits(data: str, straight: Path, tmp_path: Path, moment: str) -> None:
    """In the features of the second epoch, before its clustering, with its memory made, with its labels put down, and
    in its iterations."""
    config = without_labels(data, tmp_path / "run")
    process = forkserver().Process(target=call, args=(dict(os.environ), _doomed, config, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert run(config) == Ending(STEPS, True)
    ours, theirs = weights_of(tmp_path / "run"), weights_of(straight)
    assert ours.keys() == theirs.keys() and any(key.endswith("memory") for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert tiny.audited(tmp_path / "run") == tiny.audited(straight)


def _train(world: World, config: RunConfig) -> None:
    assert pretrain(config, world=world, host=LocalHost()) == Ending(STEPS, True)


@pytest.mark.slow
def test_run__on_two_ranks_of_deepspeed_is_that_of_one(data: str, straight: Path, tmp_path: Path) -> None:
    """Each rank embeds half of the images and trains on a group of the batch; labels and order are the same."""
    run_ranks(2, _train, without_labels(data, tmp_path / "run", "--engine.stepper", "deepspeed"))
    for number in range(1, 4):
        ours, theirs = (pyarrow.parquet.read_table(out / "pseudo_labels" / f"epoch_{number:04d}.parquet")
                        for out in (tmp_path / "run", straight))  # fmt: skip
        assert ours.equals(theirs), number
    losses, expected = ([one["loss"] for one in tiny.step_records(out)] for out in (tmp_path / "run", straight))
    assert losses == pytest.approx(expected, rel=2e-5)
    assert tiny.audited(tmp_path / "run") == tiny.audited(straight)


@pytest.mark.slow
def test_command__trains_scores_and_reports(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["evaluate", "random", "--data", data, "--tasks", "usl", "--out", str(out), *TINY]) == 0
    said = capsys.readouterr().out
    assert "epoch 3: " in said and "chosen on the test set" in said
    assert "Agreement of clustered images" in (out / "report.html").read_text()
    summary = json.loads((out / milestones.SUMMARY).read_text())
    assert summary["last"]["headline"] == "neck" and summary["quoted"] == "best"
    assert {*summary["last"]["features"]} == {"neck", "cls"}
    assert {*map(str, (out / "exports" / "last").iterdir())} >= {
        str(out / "exports" / "last" / "fine_tuned.safetensors")
    }


@pytest.mark.parametrize("way", ["export", "safetensors", "pth.tar"])
def test_weights__score_alike_as_run_export_and_file(data: str, straight: Path, tmp_path: Path, way: str) -> None:
    """Behind their necks; a file as the reference saves it: names in `module.`, its best score a NumPy number."""
    last = straight / "exports" / "last"
    weights, file = str(last), tmp_path / "model_best.pth.tar"
    if way == "safetensors":
        weights = str(last / "fine_tuned.safetensors")
    elif way == "pth.tar":
        state = {f"module.{name}": tensor for name, tensor in load_file(last / "fine_tuned.safetensors").items()}
        torch.save({"state_dict": state, "epoch": 3, "best_mAP": np.float64(0.5)}, file)
        weights = str(file)
    if way != "export":
        published = read_published(weights, StorageConfig(), Stated(heads=2))
        assert published.necks is not None and published.origin["layout"] == "usl"
        weights = str(tmp_path / "import")
        provenance = Provenance(origin=published.origin, mean=HALF, std=HALF)
        exports.export(published.backbone, open_store(weights), provenance, published.necks)
    (task,) = tasks(weights, data, StorageConfig(), out=str(tmp_path / "scores"), interpolation="bicubic")
    scored = score(task)
    summary = json.loads((straight / milestones.SUMMARY).read_text())
    assert scored["headline"] == "neck" and scored["settings"]["model"]["task"] == "usl"
    assert scored["features"] == summary["last"]["features"]


@pytest.mark.parametrize(("flags", "said"), [
    (("--method.clustering.min-samples", "40"), "all 48 images are noise"),
    (("--method.clustering.eps", "0.99", "--method.clustering.k1", "40"), "a batch takes 4 clusters, and clustering"),
    (("--method.clustering.k1", "49"), "48 images are fewer than the 49 neighbours"),
], ids=["noise", "giant", "few"])  # fmt: skip
def test_run__clusters_that_cannot_be_trained_on_are_one_error(data: str, tmp_path: Path, flags: tuple[str, ...],
                                                             said: str) -> None:  # fmt: skip
    with pytest.raises(DataError, match=said) as caught:
        run(without_labels(data, tmp_path / "run", *flags))
    assert caught.value.hint


def test_run__groups_that_micro_batches_cut_are_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 images at once cut groups of 6"):
        run(without_labels(data, tmp_path / "run", "--optimisation.micro-batch", "4"))
    with pytest.raises(ConfigError, match="a batch of 12 is not a multiple of 5"):
        run(without_labels(data, tmp_path / "run", "--method.norm-group", "5"))


def test_prepare__a_recipe_of_another_task_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not training for --tasks usl") as caught:
        prepare("random", data, str(tmp_path / "run"), task="usl", recipe="supervised")
    assert "--tasks supervised" in str(caught.value.hint)
