"""Two runs on one folder: the second is refused, or takes over, and then the first one writes no more."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from datapipe.core import cli as ends
from datapipe.core.errors import LeaseError
from datapipe.storage import Store, open_store
from tests.conftest import S3Server
from tests.end_to_end.tiny import StoppingHost, generated, recipe
from tests.support.forked import call, forkserver
from training.__main__ import main
from training.checkpoint import complete, name_of, read_marker
from training.config import recipe_toml as recipes
from training.config.run_config import RunConfig
from training.core.host import LocalHost
from training.core.run_folder.lease import refuse_held
from training.core.world import World
from training.trainer.pretrain import Ending, pretrain

LEASE_S = 1.0
STEP_S = 0.5
"""Of a process that is to stop: so that a checkpoint is written before the next one is due, also to S3."""
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return generated(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=["local", "s3"])
def config(request: pytest.FixtureRequest, manifest: str, tmp_path: Path) -> RunConfig:
    """Of a run without end."""
    out, flags = (
        str(tmp_path / "run"),
        ["--cluster.lease-s", str(LEASE_S), "--optimisation.epochs", "100000", "--checkpoints.every-steps", "20"],
    )
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        out = f"s3://{server.bucket()}/run"
        flags += ["--storage.endpoint-url", server.endpoint]
    return recipes.load(str(recipe(tmp_path, manifest, out)), flags)


class SelfStopping(LocalHost):
    """Stops its process, as SIGSTOP from elsewhere would, once it is told to and no checkpoint is being written."""

    def __init__(self, told: Path, every_steps: int) -> None:
        super().__init__()
        self.told, self.every_steps, self.step, self.last = told, every_steps, 0, 0

    def saved(self, step: int) -> None:
        self.last = step

    def preempted(self) -> bool:
        begun = self.step // self.every_steps * self.every_steps
        self.step += 1  # of this one nothing is saved yet
        if self.told.exists():
            if begun == self.last:
                self.told.unlink()
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                time.sleep(STEP_S)
        return False


def _run(config: RunConfig, told: str) -> None:
    """In a process of its own, as the command does it; what ends it goes into `told`."""
    try:
        pretrain(config, world=World(), host=SelfStopping(Path(f"{told}.stop"), config.checkpoints.every_steps))
    except LeaseError as error:
        Path(told).write_text(str(error))
        os._exit(ends.FAILED)


def _started(config: RunConfig, told: Path) -> BaseProcess:
    process = forkserver().Process(target=call, args=(dict(os.environ), _run, config, str(told)))
    process.start()
    return process


def _until(process: BaseProcess, holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


def _free(config: RunConfig) -> bool:
    try:
        refuse_held(config.out, config.storage)
    except LeaseError:
        return False
    return True


def _content(store: Store) -> dict[str, bytes]:
    """Of all files but two of the first holder's own: its sign of life, which may have been on its way when it was
    stopped, and TensorBoard's, one for each process, which writes its buffer at the end."""
    aside = ("lease/0000001.renewed.json", "tensorboard/")
    return {entry.name: store.read(entry.name) for entry in store.list() if not entry.name.startswith(aside)}


@pytest.mark.slow
def test_one_writer__the_second_is_refused_a_stopped_one_is_replaced_and_ends(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, told = open_store(config.out, config.storage), tmp_path / "told"
    first = _started(config, told)
    _until(first, lambda: complete(store.at("checkpoints")))
    flags = ["--storage.endpoint-url", config.storage.endpoint_url] if config.storage.endpoint_url else []
    assert ends.run(main, ["pretrain", str(tmp_path / "tiny.toml"), *flags]) == ends.FAILED
    refused = capsys.readouterr().err
    assert f"error: another process writes to this run folder: process {first.pid} on " in refused
    assert ", since 20" in refused and "Traceback" not in refused

    stop = Path(f"{told}.stop")
    stop.touch()
    _until(first, lambda: not stop.exists() and _free(config))
    done = pretrain(config, world=World(), host=StoppingHost(4))
    assert not done.complete
    newest = complete(store.at("checkpoints"))[-1]
    assert newest == name_of(done.step) and read_marker(store.at("checkpoints"), newest).term == 2
    before = _content(store)
    os.kill(first.pid or 0, signal.SIGCONT)
    first.join(PATIENCE_S)
    assert first.exitcode == ends.FAILED and "taken over while this process was stopped" in told.read_text()
    assert _content(store) == before
    assert pretrain(config, world=World(), host=StoppingHost(1)) == Ending(done.step + 1, False)


@pytest.mark.slow
def test_one_writer__killed_the_next_goes_on_at_once_and_no_copy_is_taken_for_the_newest(
    manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe(tmp_path, manifest, str(tmp_path / "run"), epochs=100_000))
    config = recipes.load(path, ["--cluster.lease-s", "20"])
    store = open_store(f"{config.out}/checkpoints")
    first = _started(config, tmp_path / "told")
    _until(first, lambda: complete(store))
    first.kill()
    first.join(PATIENCE_S)
    newest = complete(store)[-1]
    shutil.copytree(tmp_path / "run" / "checkpoints" / newest, tmp_path / "run" / "checkpoints" / "step_9999999")
    ending = pretrain(config, world=World(), host=StoppingHost(2))
    said = capsys.readouterr().out
    assert "waiting" not in said and f"goes on from {newest}" in said
    assert "checkpoint step_9999999 is passed over: it is a copy or was renamed" in said
    assert complete(store, lambda _: None)[-1] == name_of(ending.step)
    assert (tmp_path / "run" / "checkpoints" / "step_9999999" / "checkpoint.json").exists()
