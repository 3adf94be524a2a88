"""What follows the name of each command of `python -m cluster`: read before anything that takes long to load."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from datapipe.commands import ingest
from datapipe.core.cli import POSITIONAL
from datapipe.core.config import StorageConfig
from datapipe.core.settings import settings
from training.commands import arguments as training

Address = Annotated[str, Field(min_length=1)] | None
RANDOM = "random"
"""Weights that are no place."""


@settings
class ShardJob(ingest.ShardCommand):
    address: Address = None
    """Address of a running cluster. None: the one that this process is a job of (RAY_ADDRESS), else a Ray inside this
    process. "local": always the latter. On a running cluster --workers limits the tasks at work at the same time."""

    @property
    def places(self) -> dict[str, str]:
        """Every place that sharding reads from or writes to, by its flag."""
        sources = {f"source {number}": source for number, source in enumerate(self.sources, start=1)}
        return {**sources, "out": self.out, "spool": self.config.spool}


@settings
class EvaluateJob(training.EvaluateCommand):
    address: Address = None
    """Address of a running cluster. None: the one that this process is a job of (RAY_ADDRESS), else a Ray inside this
    process. "local": always the latter."""

    @property
    def places(self) -> dict[str, str]:
        """Every place that is read from or written to, by its flag."""
        given = {"weights": self.weights, "features": self.features, "data": self.data, "out": self.out}
        return {name: place for name, place in given.items() if place and (name, place) != ("weights", RANDOM)}


@settings
class EmbedJob(training.EmbedCommand):
    address: Address = None
    """Address of a running cluster. None: the one that this process is a job of (RAY_ADDRESS), else a Ray inside this
    process. "local": always the latter."""

    @property
    def places(self) -> dict[str, str]:
        """Every place that is read from or written to, by its flag."""
        return {"weights": self.weights, "data": self.data, "out": self.out}


@settings
class PretrainJob(training.PretrainCommand):
    address: Address = None
    """Address of a running cluster: auto, or host:port of its head. None: the one that this process is a job of
    (RAY_ADDRESS), else a Ray inside this process. "local": always the latter."""


@settings
class SubmitCommand:
    command: Annotated[Literal["pretrain", "shard", "evaluate", "embed"], POSITIONAL]
    """What is handed in; its own words follow, as for `python -m cluster COMMAND`."""
    address: Address = None
    """Dashboard, such as http://127.0.0.1:8265, before COMMAND. None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or
    that of a cluster on this machine."""


@settings
class DemoCommand:
    out: Path = Path("demo")
    """Folder for crops, shards, run and report."""
    crops: Path | None = None
    """Your own crops: a Market-style folder (scored if it has query and bounding_box_test) or any folder of images."""
    seed: int = 1
    """Seed of the sample order and of the initial weights."""
    steps: int = 0
    """Optimizer steps; 0: those of the recipe. For a quick look at the path; it learns nothing in a few."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": GPUs where there are any, one worker where there is one; "cpu": none, whatever there is."""


@settings
class StatusCommand:
    place: Annotated[str, POSITIONAL] = "runs"
    """Run folder, or a folder of runs, local or s3://bucket/prefix."""
    json: bool = False
    """Print a list of runs as JSON, for programs."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""
