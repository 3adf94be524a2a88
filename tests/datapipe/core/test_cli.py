"""The commands as a user runs them: what they print, how they end, and what a killed one leaves behind."""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from datapipe.__main__ import main
from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.verify import verify
from tests.conftest import CREDENTIALS, S3Server
from tests.support.golden import ROOT

WriteCrops = Callable[..., dict[str, bytes]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*words: object) -> int:
    return cli.run(main, [str(word) for word in words])


def start(*words: object) -> "subprocess.Popen[str]":
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "datapipe", *map(str, words)],
        cwd=ROOT,
        text=True,
        env={**os.environ, **CREDENTIALS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_shard__says_what_it_did_and_then_that_nothing_is_left(
    tmp_path: Path, write_crops: WriteCrops, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crops(tmp_path / "crops", 30)
    words = (
        "shard",
        tmp_path / "crops",
        "--out",
        tmp_path / "out",
        "--samples-per-shard",
        16,
        "--workers",
        1,
        "--licence",
        "research only",
    )
    assert run(*words) == 0
    first = capsys.readouterr()
    assert "scan: 100%, 30 crops, 0 quarantined" in first.err and "write: 100%, 2 of 2 shards" in first.err
    assert "\r" not in first.err and "30 crops in 2 shards" in first.out
    assert first.out.splitlines()[-1] == f"{tmp_path}/out/manifest-v0001.json"
    assert Manifest.load(str(tmp_path / "out")).licence == "research only"
    before = contents(tmp_path / "out")
    assert not any(name.startswith(".") for name in before)
    assert run(*words) == 0
    second = capsys.readouterr()
    assert "already complete" in second.out and second.err == ""
    assert contents(tmp_path / "out") == before
    assert run("verify", tmp_path / "out", "--decode", "all", "--workers", 1) == 0
    assert "good: 0 findings in 30 crops of 2 shards, 30 decoded" in capsys.readouterr().out


def test_counts__are_of_the_whole_data_set_though_its_newest_version_is_a_selection(
    tmp_path: Path, write_crops: WriteCrops, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crops(tmp_path / "crops", 20)
    out = tmp_path / "out"
    words = ("shard", tmp_path / "crops", "--out", out, "--workers", 1)
    assert run(*words) == 0 and run("select", out, "--fraction", 0.5) == 0
    capsys.readouterr()
    assert run(*words) == 0 and "20 crops in 1 shard" in capsys.readouterr().out
    assert run("reshard", out, "--out", tmp_path / "half", "--workers", 1) == 0
    assert "10 of 20 crops are taken, as manifest-v0002-" in capsys.readouterr().out
    (tmp_path / "keys.txt").write_text(Manifest.load(str(out)).table(["key"])["key"][0].as_py())
    assert run("remove", out, "--keys", tmp_path / "keys.txt", "--workers", 1) == 0
    capsys.readouterr()
    assert run("verify", out, "--workers", 1) == 0 and "0 findings in 19 crops" in capsys.readouterr().out
    assert run(*words) == 0 and "19 crops in 1 shard" in capsys.readouterr().out


def test_shard__refuses_a_folder_of_another_data_set(
    tmp_path: Path, write_crops: WriteCrops, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crops(tmp_path / "crops", 10)
    assert run("shard", tmp_path / "crops", "--out", tmp_path / "out", "--workers", 1) == 0
    before = contents(tmp_path / "out")
    assert run("shard", tmp_path / "crops", "--out", tmp_path / "out", "--seed", 5, "--workers", 1) == 1
    assert "--out belongs to another data set: seed is 0 there and 5 here" in capsys.readouterr().err
    write_crops(tmp_path / "crops", 12)
    assert run("shard", tmp_path / "crops", "--out", tmp_path / "out", "--workers", 1) == 1
    assert "other files in them: crops" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert run("shard", tmp_path / "crops", "--out", tmp_path / "crops" / "out") == 1
    assert "lies inside a source" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out" / "requests")
    assert run("shard", tmp_path / "crops", "--out", tmp_path / "out", "--workers", 1) == 1
    assert "another data set is already there" in capsys.readouterr().err


def test_shard__quarantines_with_a_reason(
    tmp_path: Path, write_crops: WriteCrops, capsys: pytest.CaptureFixture[str]
) -> None:
    crops = write_crops(tmp_path / "crops", 20)
    one, two, three = list(crops)[:3]
    (tmp_path / "crops" / one).write_bytes(crops[one][:-50])
    (tmp_path / "crops" / two).write_bytes(b"gone")
    Image.open(BytesIO(crops[three])).save(tmp_path / "crops" / three, "PNG")
    words = ("shard", tmp_path / "crops", "--out", tmp_path / "out", "--workers", 1)
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert "2 of 20 crops (10.0%) are unusable" in error and "1 cut, 1 not an image" in error
    assert f"{tmp_path}/out/quarantine.parquet" in error
    assert not (tmp_path / "out" / "shards").exists() and not (tmp_path / "out" / "manifest-v0001.json").exists()
    assert run(*words, "--max-bad", 0.1) == 0
    assert "18 crops in 1 shard" in (out := capsys.readouterr().out) and "2 quarantined" in out
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [(row["source"], row["name"], row["reason"]) for row in rows] == [
        ("crops", one, "cut"),
        ("crops", two, "not an image"),
    ]
    with tarfile.open(tmp_path / "out" / Manifest.load(str(tmp_path / "out")).shards[0].name) as tar:
        images = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
    assert set(images) >= set(crops.values()) - {crops[one], crops[two], crops[three]} and len(images) == 18
    assert all(Image.open(BytesIO(image)).format == "JPEG" for image in images)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("shard", "{}/missing", "--out", "{}/out"), "{}/missing"),
        (("shard", "{}/empty", "--out", "{}/out"), "no images"),
        (("shard", "{}/cut.tar", "--out", "{}/out"), "cut"),
        (("shard", "{}/crops", "--out", "s3://no-such-bucket/x"), "bucket 'no-such-bucket' does not exist"),
        (("shard", "s3://no-such-bucket/x", "--out", "{}/out"), "bucket 'no-such-bucket' does not exist"),
        (
            ("shard", "{}/crops", "--out", "{}/out", "--samples-per-shard", "0"),
            "`--samples-per-shard`: input should be",
        ),
        (("verify", "{}/missing"), "does not exist"),
        (("verify", "{}/crops"), "no data set here"),
    ],
)
def test_errors__are_one_clear_message(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    write_crops: WriteCrops,
    s3: S3Server,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_crops(tmp_path / "crops", 4)
    (tmp_path / "empty").mkdir()
    subprocess.run(["tar", "-cf", str(tmp_path / "cut.tar"), "-C", str(tmp_path), "crops"], check=True)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:2000])
    line = [word.replace("{}", str(tmp_path)) for word in words] + ["--storage.endpoint-url", s3.endpoint]
    assert run(*line) == (cli.USAGE if message.startswith("`--") else cli.FAILED)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.replace("{}", str(tmp_path)) in error and "try:" in error
    assert "Traceback" not in error and not (tmp_path / "out" / "manifest-v0001.json").exists()


@pytest.mark.parametrize(
    "words", [("preview", "x", "--count", "0"), ("verify", "x", "--workers", "-1")], ids=["count", "workers"]
)
def test_usage__out_of_range_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(*words) == cli.USAGE
        and f"`{words[2]}`: input should be greater than or equal to" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_errors__end_the_process_with_one_and_show_a_trace_on_request(tmp_path: Path) -> None:
    words = ("shard", tmp_path / "missing", "--out", tmp_path / "out")
    for process, traced in [(start(*words), False), (start(*words, "--debug"), True)]:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 1 and ("Traceback" in error) == traced and "does not exist" in error


def test_help__documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("shard", "--help-all")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(flag in text for flag in ("--out", "--max-bad", "--shard-mb", "--spool", "--storage.endpoint-url"))
    assert run("shart") == 2 and "did you mean `shard`" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ kill -9


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, write_crops: WriteCrops) -> tuple[Path, dict[str, bytes]]:
    """(folder of two sources, what an undisturbed run makes of them)."""
    folder = tmp_path_factory.mktemp("many")
    write_crops(folder / "one", 80)
    write_crops(folder / "two", 40, seed=1)
    assert run(*shard_words(folder, folder / "out")) == 0
    return folder, contents(folder / "out")


def shard_words(folder: Path, out: object, *more: object) -> list[object]:
    return ["shard", folder / "one", folder / "two", "--out", out, "--samples-per-shard", 2, "--workers", 1, *more]


KILLED = """
import os, signal, sys
from datapipe.core import cli as command
from datapipe.__main__ import main
from datapipe.ingest.shard_writer import write_shard
from datapipe.core.parallel import Workers

def run(self, function, tasks, *, count, run=Workers.run):
    for done, result in enumerate(run(self, function, tasks, count=count), 1):
        if function is write_shard and done == last:
            pid = os.getpid()
            with open(f"/proc/{pid}/task/{pid}/children") as children:
                print(children.read(), flush=True)
            os.kill(pid, signal.SIGKILL)
        yield result

last, Workers.run = int(sys.argv[1]), run
command.run(main, sys.argv[2:])
"""


def killed(shards: int, *words: object) -> list[int]:
    """The command, whose process kills itself once so many shards are written. Its children at that moment."""
    process = subprocess.run([sys.executable, "-c", KILLED, str(shards), *map(str, words)], cwd=ROOT, text=True,
                             env={**os.environ, **CREDENTIALS}, capture_output=True, check=False)  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr
    return [int(word) for word in process.stdout.splitlines()[-1].split()]


@pytest.mark.slow
def test_shard__killed_goes_on_where_it_was(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is complete is not done again: no crop is decoded, no shard that has an index is written."""
    folder, undisturbed = many
    out = tmp_path / "out"
    killed(30, *shard_words(folder, out))
    assert not (out / "manifest-v0001.json").exists()
    written = {path: path.stat().st_mtime_ns for path in out.glob("shards/*.parquet")}
    assert len(written) == 30
    monkeypatch.delattr("datapipe.ingest.scan.screen")
    assert run(*shard_words(folder, out)) == 0
    assert {name: data for name, data in contents(out).items() if not name.endswith(".part")} == undisturbed
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.slow
def test_shard__workers_die_with_a_killed_parent(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, undisturbed = many
    words = [word if word != 1 else 2 for word in shard_words(folder, tmp_path / "out")]
    children = killed(1, *words)
    assert children
    for child in children:  # a descriptor of a process becomes readable when it ends
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(child)
            assert select_readable(handle)
    assert run(*words) == 0
    finished = {name: data for name, data in contents(tmp_path / "out").items() if not name.endswith(".part")}
    assert finished == undisturbed


def select_readable(handle: int) -> bool:
    readable, _, _ = select.select([handle], [], [], 300)
    os.close(handle)
    return bool(readable)


@pytest.mark.slow
def test_shard__of_real_crops_is_good(real_crops: Path, tmp_path: Path) -> None:
    assert run("shard", real_crops / "query", "--out", tmp_path / "out", "--workers", 1) == 0
    checked = verify(str(tmp_path / "out"), "all", StorageConfig(), workers=1)
    assert checked.findings == [] and checked.decoded == len(list((real_crops / "query").glob("*.jpg")))
