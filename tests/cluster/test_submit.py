"""Ray jobs as a user hands them in: on a cluster made by `ray start --head`, from a working tree full of other things.

One run on object storage with a secret of its own serves several tests.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from uuid import uuid4

import psutil
import pytest

from cluster.commands import submit
from cluster.status import status
from cluster.submit import PACKAGES, RECIPE
from datapipe.core.errors import ClusterError, ConfigError
from datapipe.storage import open_store
from tests.cluster.local_nodes import Watched
from tests.cluster.ray_head import PATIENCE_S, ray_head, ray_words
from tests.conftest import S3Server
from tests.end_to_end.tiny import command, finished, recipe, shards
from tests.support.golden import ROOT
from tests.support.warm_python import descendants, python

CLUTTER = (".venv/lib/large.bin", "runs/old/large.bin", "data/large.bin", "crops/large.bin", "notes.txt")


class Authorised(NamedTuple):
    """A running cluster with a token and a secret of its own."""

    dashboard: str
    address: str
    pid: int
    session: Path
    secrets: tuple[str, ...]
    keys: dict[str, str]
    """What whoever hands in jobs has in the environment: Ray's token, and that it is to be used."""


@pytest.fixture(scope="module")
def head(s3: S3Server) -> Iterator[Authorised]:
    """A cluster of one machine with dashboard; its secret is in the environment of its machine, and nowhere else."""
    secret, token = uuid4().hex, uuid4().hex
    with TemporaryDirectory(prefix="token_") as keys:
        (Path(keys) / "token").write_text(token)
        authorised = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{keys}/token"}
        environment = {**os.environ, **authorised, "AWS_SECRET_ACCESS_KEY": secret, "OMP_NUM_THREADS": "1",
                       "RAY_JOB_STOP_WAIT_TIME_S": "120", "AWS_ENDPOINT_URL": s3.endpoint}  # fmt: skip
        with ray_head(environment, more=["--memory=5000000000"]) as started:
            yield Authorised(*started, (secret, token), authorised)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working tree with our code, and files of 300 MB that must not travel."""
    root = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".rayignore", root)
    for name in CLUTTER:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("wb") as file:
            file.truncate(300_000_000)
    return root


class Done(NamedTuple):
    """A job that has ended."""

    code: int
    output: str
    url: str
    bucket: str
    commands: set[bytes]
    """Command lines of all processes that were seen on the way."""


@pytest.fixture(scope="module")
def done(head: Authorised, tree: Path, s3: S3Server, write_crops: Callable[..., dict[str, bytes]]) -> Done:
    """`ray job submit --working-dir . -- python -m cluster pretrain RECIPE`, as it is written."""
    bucket = s3.bucket()
    write_crops(tree / "crops" / "few", 24)
    data = shards(tree / "crops" / "few", f"s3://{bucket}/set", s3.storage)
    recipe(tree, data.url, f"s3://{bucket}/run", epochs=2.0)
    process = _ray(head, tree, "submit", "--working-dir", ".", "--", "python", "-m", "cluster", "pretrain", "tiny.toml",
                   "--cluster.max-workers", "2", "--storage.endpoint-url", s3.endpoint)  # fmt: skip
    commands: set[bytes] = set()
    watching = threading.Thread(target=_collect, args=(process, commands))
    watching.start()
    code, output, errors = finished(process, timeout_s=PATIENCE_S)
    watching.join()
    return Done(code, output + errors, f"s3://{bucket}/run", bucket, commands)


def _ray(head: Authorised, tree: Path, word: str, *words: str) -> subprocess.Popen[str]:
    line = [*ray_words(), "job", word, "--address", head.dashboard, *words]
    return subprocess.Popen(line, cwd=tree, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **head.keys, "PYTHONUNBUFFERED": "1"})  # fmt: skip


def _collect(process: subprocess.Popen[str], commands: set[bytes]) -> None:
    while process.poll() is None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                commands.add(entry.read_bytes())
            except OSError:
                continue
        time.sleep(0.2)


@pytest.mark.slow
def test_job__trains_on_the_cluster_that_it_was_handed_to(done: Done, head: Authorised, s3: S3Server) -> None:
    assert done.code == 0, done.output
    assert "complete: 8 steps" in done.output and "succeeded" in done.output
    ask = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(ray.nodes()[0]['NodeID'])"
    node = subprocess.run([python(), "-c", ask, head.address], capture_output=True, text=True, check=True,
                          env={**os.environ, **head.keys})  # fmt: skip
    for rank in (0, 1):
        said = open_store(done.url, s3.storage).read(f"ranks/rank_{rank:02d}.log").decode()
        assert f"(node {node.stdout.strip()[:8]})" in said


@pytest.mark.slow
def test_job__uploads_our_code_and_nothing_else(done: Done, head: Authorised) -> None:
    (copy,) = head.session.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/cluster")
    names = {path.name for path in copy.parent.iterdir()}
    assert names == {*PACKAGES, "tiny.toml"}
    assert sum(path.stat().st_size for path in copy.parent.rglob("*") if path.is_file()) < 20e6


@pytest.mark.slow
def test_secrets__are_in_no_log_run_folder_or_process_list(done: Done, head: Authorised, s3: S3Server) -> None:
    assert done.code == 0, done.output
    assert any(b"ray::" in line for line in done.commands)
    kept = s3.objects(done.bucket)
    assert any("checkpoints/step_" in name for name in kept)
    logs = [path for path in head.session.rglob("*") if path.is_file()]
    assert any("job-driver" in path.name for path in logs)
    for secret in map(str.encode, head.secrets):
        assert secret not in done.output.encode()
        assert not [line for line in done.commands if secret in line]
        assert not [name for name, content in kept.items() if secret in content]
        assert not [path for path in logs if secret in path.read_bytes()]


@pytest.mark.slow
def test_job__relative_paths_are_refused(done: Done, head: Authorised, tree: Path) -> None:
    process = _ray(head, tree, "submit", "--working-dir", ".", "--", "python", "-m", "cluster", "pretrain", "tiny.toml",
                   "--out", "runs/here")  # fmt: skip
    code, output, errors = finished(process, timeout_s=PATIENCE_S)
    assert code == 1, output + errors
    assert "relative paths in a Ray job" in output + errors and "out = runs/here" in output + errors


@pytest.mark.slow
def test_submit__goes_on_when_what_carries_it_is_killed_and_stops_after_a_save(
    done: Done, head: Authorised, tree: Path, s3: S3Server
) -> None:
    """One job: its driver is killed, as for want of memory, then what Ray watches it with, as with its machine. Another
    job finds no room meanwhile, and waits."""
    url, away = f"s3://{done.bucket}/long", ("--storage.endpoint-url", s3.endpoint)
    line = ("submit", "--address", head.dashboard, "--wait", "pretrain", str(tree / "tiny.toml"), "--out", url,
            "--optimisation.epochs", "1e6", "--checkpoints.every-steps", "20", *away)  # fmt: skip
    waiting = Watched(command("cluster", *line, **head.keys))
    job = waiting.until(lambda: _words(waiting, "submitted "))[1]
    logs = Watched(_ray(head, tree, "logs", "-f", job))
    logs.until(lambda: _words(logs, "step "))
    assert all(f"  {word}:" in "\n".join(waiting.lines) for word in ("follow", "state", "stop", "resume"))

    other = ("submit", "--address", head.dashboard, "--driver-memory-gb", "4", "shard", str(tree / "crops" / "few"))
    code, output, errors = finished(
        command("cluster", *other, "--out", f"s3://{done.bucket}/other", *away, **head.keys)
    )
    assert code == 0 and "no machine of the cluster" not in output, errors
    second = output.split()[1]

    keeper, driver = _carried_by(head, "cluster.keep_alive"), _carried_by(head, "cluster", "pretrain")
    driver.kill()
    logs.until(lambda: _words(logs, "the driver was killed by SIGKILL; started again"))
    logs.until(lambda: any(line.startswith("pass goes on from step_") for line in logs.lines))
    assert "PENDING" in _state(head, tree, second)

    next(one for one in keeper.parents() if one.cmdline()[0].startswith("ray::")).kill()
    waiting.until(lambda: _words(waiting, f"{job} was lost ("))
    (job,) = re.findall(r"handed in again as (\S+) \(1 of 3\)", "\n".join(waiting.lines))
    logs = Watched(_ray(head, tree, "logs", "-f", job))
    logs.until(lambda: _words(logs, "step "))
    assert "was stopped" in "".join(finished(_ray(head, tree, "stop", job), timeout_s=PATIENCE_S)[1:])
    assert f"go on with: python -m cluster submit pretrain {url}/config.toml" in logs.end()[1]
    code, output, errors = waiting.end()
    assert code == 75, output + errors
    found = status(url, s3.storage)
    assert found.state == "stopped" and found.checkpoints and found.step > 20
    kinds = [json.loads(line)["kind"] for line in open_store(url, s3.storage).read("restarts.jsonl").splitlines()]
    assert kinds.count("driver") == 2
    finished(_ray(head, tree, "logs", "-f", second), timeout_s=PATIENCE_S)
    assert "SUCCEEDED" in _state(head, tree, second)


def _words(process: Watched, beginning: str) -> list[str]:
    """The first line that begins so, in words; none yet."""
    return next((line.split() for line in process.lines if line.startswith(beginning)), [])


def _state(head: Authorised, tree: Path, job: str) -> str:
    """What `ray job status` says of a job."""
    return "".join(finished(_ray(head, tree, "status", job), timeout_s=PATIENCE_S)[1:]).upper()


def _carried_by(head: Authorised, *words: str) -> psutil.Process:
    """The process of a job of this cluster that runs `python -m` with these words."""
    for process in descendants(head.pid):
        line: list[str] = []
        with contextlib.suppress(psutil.Error):  # it has just ended
            line = process.cmdline()
        if line[1:3] == ["-m", words[0]] and all(word in line for word in words) and RECIPE in line:
            return process
    raise AssertionError(f"no process of {words}")


@pytest.mark.slow
def test_submit__says_where_no_machine_has_room_for_the_command(head: Authorised, tree: Path) -> None:
    line = ("submit", "--address", head.dashboard, "--driver-cpus", "64", "shard", str(tree), "--out", str(tree / "x"))
    code, output, errors = finished(command("cluster", *line, **head.keys))
    assert code == 0, errors
    assert "no machine of the cluster has 64 CPU and 2 GB of memory for the command itself" in output
    finished(_ray(head, tree, "stop", "--no-wait", output.split()[1]), timeout_s=PATIENCE_S)


@pytest.mark.parametrize("words", [
    ["pretrain", "demo", "--out", "runs/here", "--stream.manifest", "/data"],
    ["shard", "s3://bucket/crops", "--out", "here"],
    ["evaluate", "s3://bucket/run", "--data", "here"],
    ["embed", "s3://bucket/run", "--data", "s3://bucket/set", "--out", "here.parquet"],
    ["score-cfs", "s3://bucket/run", "runs/here", "--data", "s3://bucket/set", "--out", "s3://bucket/cfs"],
])  # fmt: skip
def test_submit__refuses_relative_paths_before_anything_travels(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="relative paths in a Ray job"):
        submit(words)


def test_submit__no_cluster() -> None:
    words = ["--address", "http://127.0.0.1:1", "shard", "s3://bucket/crops", "--out", "s3://bucket/out"]
    with pytest.raises(ClusterError, match="no Ray cluster is reached: nobody answers at 127.0.0.1:1"):
        submit(words)
