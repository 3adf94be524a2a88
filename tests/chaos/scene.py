"""Where faults happen: machines, an object store that may die and misbehave, and one pre-training run on them."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import boto3
import psutil
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from datapipe.core.config import StorageConfig
from datapipe.core.errors import StorageError
from tests.chaos.gate import Gate
from tests.chaos.poison import environment
from tests.cluster.local_nodes import PATIENCE_S, Watched, local_nodes
from tests.conftest import CREDENTIALS
from tests.end_to_end.tiny import command
from tests.support.faulty_proxy import Faults, FaultyProxy
from tests.support.golden import ROOT
from tests.support.ports import free_port
from tests.support.warm_python import ancestors, descendants, python
from training.core.run_folder.run_folder import RunFolder

BUCKET = "bucket-faults"
CPUS = 2
"""Of each machine: one is enough for both workers."""
NO_FAULTS = Faults()
CONTROLLER, CLEANER = "ray::TrainController", "ray::PlacementGroupCleaner"
"""How processes of Ray Train are called."""
GROUPS = """
import ray, sys
from ray.util.placement_group import placement_group_table
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(sum(group["state"] != "REMOVED" for group in placement_group_table().values()))
"""


class Objects:
    """An S3-compatible server in a process of its own, behind a proxy that misbehaves when told to."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.direct = StorageConfig(endpoint_url=f"http://127.0.0.1:{self._port}", attempts=3, timeout_s=20)
        self.client = boto3.client("s3", endpoint_url=self.direct.endpoint_url)
        self.gate = Gate()
        self.proxy = FaultyProxy(self.direct.endpoint_url, before=self.gate)
        self.start()
        self.client.create_bucket(Bucket=BUCKET)

    def start(self) -> None:
        """Start the server, with all that it held before; returns when it answers."""
        words = [python(), "-m", "tests.chaos.s3_server", str(self._port), str(self._folder)]
        self._process = subprocess.Popen(words, cwd=ROOT)
        end = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(BotoCoreError, ClientError):
                self.client.list_buckets()
                return
            assert time.monotonic() < end and self._process.poll() is None, "the S3 server does not come up"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL the server."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[Objects]:
    """The server and its proxy; what is started meanwhile has its keys."""
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)
    objects = Objects(folder)
    try:
        with objects.proxy:
            yield objects
    finally:
        objects.kill()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def machines(count: int) -> Iterator[Any]:
    """A cluster whose head does no work, and `count` machines on each of which all workers have room."""
    with pytest.MonkeyPatch.context() as patch, local_nodes(0) as cluster:
        patch.setenv("PYTHONPATH", str(ROOT))  # for what is put into workers
        for _ in range(count):
            cluster.add_node(num_cpus=CPUS)
        yield cluster


@dataclass
class Scene:
    """One run and all that it stands on."""

    cluster: Any
    folder: Path
    """For the recipe and the notes to the workers."""
    recipe: Path
    url: str
    """The run folder."""
    storage: StorageConfig = StorageConfig()
    """How the run reaches it."""
    objects: Objects | None = None
    """The store that the run folder is in."""
    flags: Sequence[str] = ()
    random: Random = field(default_factory=Random)
    runs: list[Watched] = field(default_factory=list)
    """The commands, each the one before over again."""

    def __post_init__(self) -> None:
        direct = self.objects.direct if self.objects else StorageConfig()
        self._run_folder = RunFolder(self.url, direct)
        self.poison = self.folder / "poison.json"
        self._started = 0.0

    def start(self, *more: str) -> None:
        """`python -m cluster pretrain`, for the first time or again. `more`: flags of this time only."""
        words = ["pretrain", str(self.recipe), "--address", self.cluster.address, "--out", self.url,
                 "--cluster.placement", "spread", "--cluster.environment", *environment(self.poison), *self.flags,
                 *more]  # fmt: skip
        if self.objects:
            words += ["--storage.endpoint-url", self.objects.proxy.endpoint]
        self._started = time.time()
        self.runs.append(Watched(command("cluster", *words)))

    @property
    def run(self) -> Watched:
        return self.runs[-1]

    def running(self) -> bool:
        return self.run.process.poll() is None

    # ------------------------------------------------------------------------------------ what the run folder says

    def read(self, name: str) -> str:
        """A file of the run folder as far as it has whole lines; empty where there is none, or nobody answers."""
        with contextlib.suppress(StorageError):
            text = self._run_folder.read_text(name) or ""
            return text[: text.rfind("\n") + 1]
        return ""

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.read(name).splitlines()]

    def names(self, prefix: str) -> list[str]:
        with contextlib.suppress(StorageError):
            return sorted(self._run_folder.names(prefix))
        return []

    def restarts(self) -> list[dict[str, Any]]:
        """Why workers were started anew, and no more."""
        return [record for record in self.lines("restarts.jsonl") if record["kind"] != "end"]

    def attempts(self) -> list[str]:
        return self.names("metrics/attempt_")

    def pid(self, rank: int) -> int | None:
        """The live worker process of a rank, started by the present command."""
        text = self.read(f"ranks/rank_{rank:02d}.json")
        life = json.loads(text) if text else {"time": 0.0}
        if life["time"] < self._started:
            return None
        return life["pid"] if _called(life["pid"], "ray::") else None

    # ----------------------------------------------------------------------------------------------------- blows

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process of the cluster; one that has just ended needs none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def machine_of(self, pid: int) -> Any:
        """The machine that a worker process is on; None for a process that has just ended."""
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in self.cluster.worker_nodes}
        with contextlib.suppress(psutil.NoSuchProcess):
            return next((raylets[parent] for parent in ancestors(pid) if parent in raylets), None)
        return None

    def kill_machine(self, node: Any) -> None:
        """SIGKILL a machine's raylet and everything below it."""
        raylet = node.all_processes["raylet"][0].process.pid
        for process in (psutil.Process(raylet), *descendants(raylet)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def add_machine(self) -> None:
        self.cluster.add_node(num_cpus=CPUS)

    def controller(self) -> int | None:
        """The process of Ray Train's controller; None while there is none, or one that is ending beside another."""
        found = self.on_head(CONTROLLER)
        return found[0] if len(found) == 1 else None

    def on_head(self, name: str) -> list[int]:
        """The processes of the machine without workers that are called so."""
        head = self.cluster.head_node.all_processes["raylet"][0].process.pid
        return [child.pid for child in descendants(head) if _called(child.pid, name)]

    def groups(self) -> int:
        """Placement groups that hold room for workers."""
        done = subprocess.run([python(), "-c", GROUPS, self.cluster.address], stdout=subprocess.PIPE,
                              text=True, check=True)  # fmt: skip
        return int(done.stdout)


def _called(pid: int, name: str) -> bool:
    """Whether there is such a process, whose command begins so. One that is ending has none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return "".join(psutil.Process(pid).cmdline()[:1]).startswith(name)
    return False
