"""Bad input ends in one clear message, a non-zero exit code, and no stack trace unless --debug asks for one."""

from collections.abc import Callable
from pathlib import Path

import pytest

import cluster.__main__
import training.__main__
from datapipe.core.cli import run
from datapipe.dataset.manifest import Manifest
from tests.conftest import S3Server
from tests.end_to_end.tiny import command, finished, recipe, shards
from tests.support.ports import free_port

Write = Callable[..., dict[str, bytes]]
Run = Callable[..., tuple[int, str, str]]
MAIN = {"training": training.__main__.main, "cluster": cluster.__main__.main}


def _fails(code: int, errors: str, *words: str) -> None:
    assert code == 1, errors
    assert "Traceback" not in errors, errors
    assert errors.startswith("error: ") or "\nerror: " in errors, errors
    assert "  try:   " in errors, errors
    for word in words:
        assert word in errors, errors


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one of our commands in this process, which has its imports behind it: (exit code, output, errors)."""

    def ran(module: str, *words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(MAIN[module], words)
        return code, *capsys.readouterr()

    return ran


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_crops: Write) -> Manifest:
    folder = tmp_path_factory.mktemp("data")
    write_crops(folder / "crops", 24)
    return shards(folder / "crops", str(folder / "shards"), each=9)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["training", "cluster"])
def test_pretrain__no_data_set(tmp_path: Path, module: str) -> None:
    path = recipe(tmp_path, str(tmp_path / "absent"), str(tmp_path / "run"))
    code, _, errors = finished(command(module, "pretrain", str(path)))
    _fails(code, errors, "absent")


@pytest.mark.slow
def test_pretrain__a_variable_that_deepspeed_cannot_read(data: Manifest, tmp_path: Path) -> None:
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    words = ("training", "pretrain", str(path), "--engine.stepper", "deepspeed")
    code, _, errors = finished(command(*words, DEEPSPEED_TIMEOUT="abc"))
    _fails(code, errors, "DEEPSPEED_TIMEOUT='abc'", "unset DEEPSPEED_TIMEOUT")


@pytest.mark.slow
def test_pretrain__debug_shows_the_trace(tmp_path: Path) -> None:
    path = recipe(tmp_path, str(tmp_path / "absent"), str(tmp_path / "run"))
    code, _, errors = finished(command("training", "pretrain", str(path), "--debug"))
    assert code == 1 and "Traceback" in errors


@pytest.mark.slow
def test_pretrain__fewer_crops_than_a_batch(here: Run, tmp_path: Path, data: Manifest) -> None:
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    code, _, errors = here("training", "pretrain", str(path), "--optimisation.batch", "25")
    _fails(code, errors, "less than one batch of 25", "optimisation.batch")


@pytest.mark.slow
def test_pretrain__a_missing_shard_is_named(here: Run, tmp_path: Path, write_crops: Write) -> None:
    write_crops(tmp_path / "crops", 24)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"), each=9)
    (tmp_path / "shards" / data.shards[1].name).unlink()
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    code, _, errors = here("training", "pretrain", str(path))
    _fails(code, errors, Path(data.shards[1].name).name)


@pytest.mark.slow
def test_pretrain__a_checkpoint_of_other_data(here: Run, tmp_path: Path, data: Manifest, write_crops: Write) -> None:
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    assert here("training", "pretrain", str(path))[0] == 0
    write_crops(tmp_path / "others", 30, seed=9)
    other = shards(tmp_path / "others", str(tmp_path / "shards"))
    for module in ("training", "cluster"):
        code, _, errors = here(module, "pretrain", str(path), "--stream.manifest", other.url)
        _fails(code, errors, "other data", data.id[:12], other.id[:12])


@pytest.mark.slow
def test_pretrain__other_settings_in_the_same_folder(here: Run, tmp_path: Path, data: Manifest) -> None:
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    assert here("training", "pretrain", str(path))[0] == 0
    code, _, errors = here("training", "pretrain", str(path), "--optimisation.lr", "0.5")
    _fails(code, errors, "optimisation.lr: 0.002 -> 0.5", "--out")


@pytest.mark.slow
def test_pretrain__a_wrong_bucket(here: Run, tmp_path: Path, s3: S3Server) -> None:
    path = recipe(tmp_path, "s3://no-such-bucket/shards", str(tmp_path / "run"))
    flags = ("--storage.endpoint-url", s3.endpoint)
    code, _, errors = here("training", "pretrain", str(path), *flags)
    _fails(code, errors, "no-such-bucket")


@pytest.mark.slow
def test_pretrain__an_impossible_loss_stops_with_the_run_resumable(here: Run, tmp_path: Path, data: Manifest) -> None:
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    flags = ("--optimisation.lr", "1e30", "--optimisation.epochs", "6")
    code, _, errors = here("training", "pretrain", str(path), *flags)
    _fails(code, errors, "had to be skipped", "optimisation.lr")


@pytest.mark.slow
def test_evaluate_export_report__no_run(here: Run, tmp_path: Path) -> None:
    for words in (("evaluate", "--data", str(tmp_path)), ("export",), ("checkpoints",)):
        code, _, errors = here("training", *words, str(tmp_path))
        _fails(code, errors, str(tmp_path))


def test_commands__a_misspelt_one_is_a_usage_error() -> None:
    code, _, errors = finished(command("datapipe", "shrad"))
    assert code == 2 and "did you mean `shard`?" in errors


@pytest.mark.parametrize(
    "words",
    [
        ("datapipe", "verify", "{}/sards"),
        ("training", "report", "{}/runs/frist"),
        ("cluster", "status", "{}/runs/frist"),
        ("training", "checkpoints", "{}/runs/frist"),
        ("training", "evaluate", "{}/runs/frist", "--data", "."),
    ],
)
def test_a_misspelt_path__the_nearest_one_is_named(tmp_path: Path, words: tuple[str, ...]) -> None:
    for name in ("shards", "runs/first", "runs/second"):
        (tmp_path / name).mkdir(parents=True)
    package, *rest = words
    code, _, errors = finished(command(package, *(word.format(tmp_path) for word in rest)))
    meant = f"{tmp_path}/shards" if package == "datapipe" else f"{tmp_path}/runs/first"
    assert code == 1 and f"did you mean `{meant}" in errors, errors


@pytest.mark.parametrize("module", ["training", "cluster"])
def test_pretrain__a_run_folder_that_cannot_be_written(data: Manifest, tmp_path: Path, here: Run, module: str) -> None:
    (tmp_path / "file").touch()
    for place, out in ((tmp_path / "file", tmp_path / "file" / "run"), (Path("/proc"), Path("/proc/run"))):
        code, _, errors = here(module, "pretrain", str(recipe(tmp_path, data.url, str(out))))
        _fails(code, errors, "the operating system refused", f"where: {place}")


def test_pretrain__no_cluster_at_the_address(data: Manifest, tmp_path: Path, here: Run) -> None:
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    address = f"127.0.0.1:{free_port()}"
    code, _, errors = here("cluster", "pretrain", str(path), "--address", address)
    _fails(code, errors, f"nobody answers at {address}")
    code, _, errors = here("cluster", "pretrain", str(path), "--address", f"http://{address}")
    _fails(code, errors, "address of a dashboard", "submit")
    assert not (tmp_path / "run").exists()


def test_pretrain__no_compiler_for_compiled_blocks(
    data: Manifest, tmp_path: Path, here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    path = recipe(tmp_path, data.url, str(tmp_path / "run"))
    code, _, errors = here("training", "pretrain", str(path), "--backbone.compile-blocks", "True")
    _fails(code, errors, "there is none: g++", "compile_blocks")
    assert not (tmp_path / "run").exists()
