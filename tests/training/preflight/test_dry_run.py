"""`pretrain --dry-run`: what a run would be, without data and without starting anything."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import main as cluster_main
from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError
from tests.end_to_end import tiny as flow
from tests.training.reid.people import market
from training.__main__ import main
from training.config import recipe_toml as recipes
from training.config.recipe_toml import load
from training.preflight.dry_run import GB, LUPERSON, dry_run
from training.preflight.dry_run_text import page, to_tree
from training.recipes import SHIPPED
from training.reid.datasets.open_dataset import open_reid
from training.reid.datasets.training_shards import shard_training_part

RECIPES = sorted(
    path.stem for path in SHIPPED.glob("*.toml") if not path.stem.startswith(("supervised", "usl_", "uda_", "demo_usl"))
)
"""Those of pre-training."""
LARGE = [name for name in RECIPES if name.endswith("_4096")]
PUBLISHED = [name for name in RECIPES if name != "demo" and name not in LARGE]


def called(*words: str) -> int:
    """Exit code of the command line."""
    try:
        return cli.run(main, ["pretrain", *words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on machines with and without one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PUBLISHED, "demo", LARGE[0]])
def test_dry_run__recipe_reads_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """In an empty folder: the data set that a recipe names is not there."""
    monkeypatch.chdir(tmp_path)
    assert called(name, "--dry-run") == cli.COMPLETE
    answer = capsys.readouterr().out
    assert called(name, "--dry-run", "--full") == cli.COMPLETE
    said = capsys.readouterr().out
    assert said.startswith(answer.rpartition("--full")[0].rstrip()) and len(answer.splitlines()) < 25
    recipe = said.partition("== Recipe, resolved ==\n")[2]
    assert recipes.validate(tomllib.loads(recipe), where=name) == load(name)
    assert f"{LUPERSON:,} (assumed: all of LUPerson" in said
    for title in ("Parameters", "Memory of one GPU, calculated", "Beside what is published"):
        assert f"\n== {title}" in said


def test_dry_run__steps_of_a_published_run() -> None:
    """4,180,243 images, 8 x 128 at once: 4 082 steps an epoch, 100 epochs."""
    steps = dry_run(load("pass_vits")).steps
    assert (steps.rows, steps.total) == (LUPERSON, 408_226)
    assert steps.images == 408_226 * 1_024 <= 100 * LUPERSON
    assert steps.per_epoch == pytest.approx(4_082.27, abs=0.01) and steps.warmup == 10 * steps.per_epoch
    assert (steps.per_rank, steps.micro_batch, steps.micro_batches, steps.padding) == (128, 128, 1, 0)
    thousands, milestones = 408, 8  # every 40 800 steps, of which each fifth is a multiple of 1 000
    assert steps.checkpoints == thousands + milestones + 1  # the last step
    assert steps.kept == 10 + 1  # the tenth milestone is the one before the last step


def test_dry_run__ranks_that_do_not_divide_the_batch_are_padded() -> None:
    flags = ["--optimisation.batch", "100", "--optimisation.micro-batch", "16", "--cluster.max-workers", "3"]
    steps = dry_run(load("pass_vits", flags), rows=1_000).steps
    assert (steps.per_rank, steps.micro_batch, steps.micro_batches) == (36, 12, 3)
    assert steps.padding == 3 * 36 - 100 and steps.known_from == "--rows"


def test_dry_run__counts_the_rows_of_a_data_set(tmp_path: Path) -> None:
    manifest = flow.generated(tmp_path, count=18)
    config = load("pass_vits", ["--stream.manifest", manifest, "--optimisation.batch", "6"])
    assert dry_run(config).steps.rows == 18 and dry_run(config).steps.total == 300
    with pytest.raises(ConfigError, match="rows are given"):
        dry_run(config, rows=5)


@pytest.mark.slow
@pytest.mark.parametrize("manifest", ["absent/shards", "s3://bucket/shards"])
def test_dry_run__says_that_a_named_data_set_is_not_at_hand(manifest: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--stream.manifest", manifest, "--storage.endpoint-url", "http://127.0.0.1:1"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    steps = dry_run(load("pass_vits", flags)).steps
    assert steps.rows == LUPERSON and f"as {manifest}" in steps.known_from and "is not at hand: " in steps.known_from
    steps = dry_run(load("pass_vits", flags), rows=5_000).steps
    assert steps.rows == 5_000 and steps.known_from.startswith(f"--rows, as {manifest}")


def test_dry_run__of_unsupervised_training_counts_its_iterations() -> None:
    found = dry_run(load("usl_pass_market"))
    assert (found.steps.per_epoch, found.steps.total, found.steps.rows) == (200, 10_000, 12_936)
    assert found.comparison.recipe == "usl_pass_market" and not found.comparison.differences


@pytest.mark.parametrize("name", ["supervised", "supervised_384", "supervised_pass", "supervised_mae"])
def test_dry_run__of_fine_tuning_counts_identities(name: str, tmp_path: Path) -> None:
    """Without its data set as many as Market-1501 has; with it, its own. What is calculated is what it holds."""
    calculated = dry_run(load(name))
    assert calculated.steps.rows == 12_936 and calculated.config.method.classes == 751
    assert calculated.comparison.recipe == name
    assert {one.key for one in calculated.comparison.differences} <= {"optimisation.precision"}  # bf16 for fp16
    assert calculated.sizes.student["head MLPs"] >= 751 * calculated.config.backbone.shape.width
    reid = open_reid(str(market(tmp_path / "people", identities=4, images=3)), StorageConfig())
    shards = shard_training_part(reid, str(tmp_path / "shards"), StorageConfig()).url
    known = dry_run(load(name, ["--stream.manifest", shards, "--optimisation.batch", "16"]))
    train = reid.train
    assert train is not None
    assert known.steps.rows == len(train) and known.config.method.classes == train.identities


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PUBLISHED, *LARGE])
def test_dry_run__recipe_fits_the_gpu_of_its_header(name: str) -> None:
    said = re.search(r"# Hardware: .*?\d+ GPUs of (\d+) GB", (SHIPPED / f"{name}.toml").read_text())
    assert said is not None
    assert dry_run(load(name), gpu_memory_gb=float(said[1])).fits


@pytest.mark.slow
def test_dry_run__says_what_would_make_it_fit() -> None:
    config = load("pass_vitl")
    found = dry_run(config, gpu_memory_gb=16)
    assert found.fits is False and found.remedies
    for remedy in found.remedies:
        changed = load("pass_vitl", remedy.change.split())
        again = dry_run(changed, gpu_memory_gb=16)
        assert again.fits and again.memory.needed == remedy.needed <= 16 * GB
    text = page(found)
    answer = text.splitlines()[1]
    assert answer.startswith("does NOT fit: needs") and ", has 16.00 GB" in answer
    assert found.remedies[0].change in text.splitlines()[2]


def test_dry_run__nothing_makes_it_fit() -> None:
    found = dry_run(load("pass_vitl"), gpu_memory_gb=4)
    assert found.fits is False and not found.remedies
    assert "a larger GPU, or more workers" in page(found)


@pytest.mark.slow
def test_dry_run__a_batch_that_must_stay_whole_is_not_split() -> None:
    found = dry_run(load("dino_vitb"), gpu_memory_gb=20)
    assert found.fits is False and all("micro-batch" not in remedy.change for remedy in found.remedies)
    assert dry_run(load("dino_vitb", ["--cluster.max-workers", "4"])).steps.micro_batch == 128
    with pytest.raises(ConfigError, match="batch norm in the stem") as refused:
        dry_run(load("dino_vitb", ["--cluster.max-workers", "4", "--optimisation.micro-batch", "64"]))
    assert "optimisation.micro_batch = 0 (here 128 images at once)" in refused.value.hint


def test_dry_run__json_holds_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("pass_vitb", "--dry-run", "--json", "--gpu-memory-gb", "40", "--rows", "100000",
                  "--optimisation.batch", "256") == cli.COMPLETE  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    config = load("pass_vitb", ["--optimisation.batch", "256"])
    assert said == json.loads(json.dumps(to_tree(dry_run(config, rows=100_000, gpu_memory_gb=40))))
    assert said["memory"]["fits"] is True and said["steps"]["rows"] == 100_000
    (batch,) = [one for one in said["published"]["differences"] if one["key"] == "optimisation.batch"]
    assert (batch["ours"], batch["published"], batch["source"]) == (256, 512, "PASS scripts")


def test_dry_run__text_names_a_deviation_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("personmae_vitb", "--dry-run", "--method.mask-ratio", "0.5", "--full") == cli.COMPLETE
    said = capsys.readouterr().out
    assert "  method.mask_ratio = 0.5 (the recipe: 0.75)   BootMAE, MAE; HAP .5\n" in said
    assert "  optimisation.precision = 'bf16', published 'fp16'\n      MAE main_pretrain.py" in said


def test_dry_run__of_a_cpu_run() -> None:
    config = load("pass_vits")
    config = replace(config, engine=replace(config.engine, device="cpu"))
    text = page(dry_run(config), full=True)
    assert "Memory of one process, calculated" in text and " this CPU: " in text and " process hours" in text
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        dry_run(replace(config, optimisation=replace(config.optimisation, precision="fp16")))


def test_dry_run__starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert called("dino_vits", "--dry-run", "--out", str(tmp_path / "run")) == cli.COMPLETE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "code", "said"), [
    (["pass_vitx", "--dry-run"], cli.FAILED, "no such recipe"),
    (["pass_vits", "--dry-run", "--rows", "0"], cli.USAGE, "`--rows`: input should be greater than 0"),
    (["pass_vits", "--dry-run", "--gpu", "abacus"], cli.FAILED, "no datasheet of a GPU named abacus is known"),
    (["pass_vits", "--gpu", "h100"], cli.USAGE, "`--gpu` goes with `--dry-run`"),
    (["pass_vits", "--dry-run", "--gpu-memory-gb", "much"], cli.USAGE, "`--gpu-memory-gb`: a number, not much"),
    (["pass_vits", "--rows", "5"], cli.USAGE, "`--rows` goes with `--dry-run`"),
    (["pass_vits", "--dry-run", "--optimisation.lrr", "1"], cli.USAGE, "optimisation.lrr"),
    (["pass_vits", "--dry-run", "--rows", "3"], cli.FAILED, "less than one batch"),
], ids=["recipe", "rows", "gpu", "gpu_alone", "gpu_memory", "without_dry_run", "flag", "too_few_rows"])  # fmt: skip
def test_dry_run__mistakes(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(*words) == code
    assert said in capsys.readouterr().err


def test_dry_run__of_the_cluster_s_command_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pass_vits", "--dry-run", "--gpu-memory-gb", "24", "--rows", "100000")
    assert called(*words) == cli.COMPLETE
    ours = capsys.readouterr().out
    assert cli.run(cluster_main, ["pretrain", *words]) == cli.COMPLETE
    assert capsys.readouterr().out == ours and ours.splitlines()[1].startswith("fits: needs ")


def test_dry_run__shows_the_same_step_on_other_workers() -> None:
    """World, accumulation and learning rate; what is left when a machine of 64 is lost; bytes between machines."""
    config = load("pass_vitl_4096", ["--cluster.max-workers", "512"])
    found = dry_run(config)
    by_workers = {one.workers: one for one in found.spreads}
    assert by_workers.keys() == {64, 128, 256, 504, 512}
    assert [(one.per_rank, one.micro_batch, one.micro_batches, one.padding) for one in found.spreads] == [
        (64, 32, 2, 0), (32, 32, 1, 0), (16, 16, 1, 0), (9, 9, 1, 9 * 504 - 4096), (8, 8, 1, 0)]  # fmt: skip
    one, trained = by_workers[512], found.sizes.trained
    assert one.machines == 64 and one.traffic.gradients == round(511 / 512 * 4 * trained) == one.traffic.parameters
    assert one.lowered.gradients == round(511 / 512 * 2 * trained) and one.lowered.parameters == one.traffic.parameters
    assert one.whole == (2 * one.lowered.gradients, 0)
    bf16 = dry_run(load("pass_vitl_4096", ["--cluster.max-workers", "512", "--optimisation.reduction", "bf16"]))
    assert bf16.spreads[-1].traffic == one.lowered
    text = page(found, full=True)
    assert "workers        " in text and "up to 512, at least 32\n" in text
    assert "learning rate           0.008 (0.0005 for each 256 images), on any number of ranks" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["64"])
    assert (
        row.split()[1:6] == ["64", "32", "x", "2", "0"] and row.split()[-3] == f"{by_workers[64].traffic.seconds():.3f}"
    )
    assert "parameters" in to_tree(found)["spreads"][0]["traffic"] and to_tree(found)["learning_rate"] == 8e-3


def test_dry_run__counts_with_one_machine_where_the_cluster_decides() -> None:
    found = dry_run(load("pass_vitb"))
    assert (found.steps.workers, found.steps.least_workers, found.steps.most_workers) == (8, 1, 0)
    assert [one.workers for one in found.spreads] == [8, 16, 64, 128, 256, 512]
    assert "as many as the cluster has, at least 1; 8 are counted with here" in page(found)
    assert found.spreads[0].traffic.total == 0 < found.spreads[1].lowered.total < found.spreads[1].traffic.total


def test_dry_run__time_by_part_on_the_gpu_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Whose memory it must fit, too. What the text says is what programs are told."""
    assert called("pass_vits", "--dry-run", "--gpu", "h100", "--json") == cli.COMPLETE
    said = json.loads(capsys.readouterr().out)
    (time,) = said["time"]
    assert time["machine"] == "H100 SXM" and said["memory"]["gpu"] == 80 * GB and said["memory"]["fits"] is True
    assert said["operations"]["total"] == pytest.approx(91.6e9, rel=1e-3)
    assert time["least_s"] < time["step_s"] < time["most_s"]
    assert sum(time["parts"].values()) == pytest.approx(time["step_s"]) == pytest.approx(sum(time["limits"].values()))
    assert time["gpu_hours"] == pytest.approx(said["steps"]["total"] * time["step_s"] * 8 / 3600)
    assert time["mfu"] == pytest.approx(time["images_per_s"] * said["operations"]["total"] / (8 * 989.5e12))
    assert called("pass_vits", "--dry-run", "--gpu", "h100", "--full") == cli.COMPLETE
    text = capsys.readouterr().out
    assert f"on 8 GPUs, H100 SXM: {time['gpu_hours']:,.0f} GPU hours" in text
    assert f"MFU {time['mfu']:.0%}, limited by {time['limited_by']}" in text
    assert (
        f"H100 SXM: {1e3 * time['step_s']:,.1f} ms a step" in text
        and "steps of these recipes were measured on no GPU" in text
    )


def test_dry_run__time_without_a_gpu_is_that_of_two_common_ones() -> None:
    assert [one.machine for one in dry_run(load("dino_vits")).forecasts] == ["H100 SXM", "A100 SXM 80 GB"]


def test_help__tells_of_dry_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--help") == cli.COMPLETE
    assert "--gpu-memory-gb NUMBER" in capsys.readouterr().out


def test_dry_run__of_a_recipe_that_wants_more_workers_than_it_has_images() -> None:
    found = dry_run(load("pass_vits", ["--optimisation.batch", "4", "--cluster.min-workers", "6"]), rows=100)
    assert [(one.workers, one.per_rank, one.padding) for one in found.spreads] == [(6, 1, 2)]
    assert page(found, full=True)
