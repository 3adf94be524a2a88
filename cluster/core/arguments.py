"""What follows the name of each command of `python -m cluster`: read before anything that takes long to load."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from datapipe.commands import ingest
from datapipe.core.cli import POSITIONAL, Arg
from datapipe.core.config import Size, Statistics, StorageConfig
from datapipe.core.settings import settings
from training.commands import arguments as training
from training.reid.settings import RANDOM

Address = Annotated[str, Field(min_length=1)] | None


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
        weights = [one.address for one in self.named_weights if one.address != RANDOM]
        given = {**_numbered("weights", weights), "features": self.features,
                 **_numbered("data", [one.address for one in self.named_data]), "out": self.out}  # fmt: skip
        return {name: place for name, place in given.items() if place}


def _numbered(name: str, places: list[str]) -> dict[str, str]:
    """Places of one flag; each with its number where there are several."""
    return {name if len(places) == 1 else f"{name} {number}": place for number, place in enumerate(places, start=1)}


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
class ScoreCfsJob:
    source: Annotated[str, POSITIONAL]
    """Weights as pre-training left them: run folder (its newest checkpoint), checkpoint, folder of an export or import,
    or a file of published weights, local or s3://bucket/prefix."""
    target: Annotated[str, POSITIONAL]
    """The same network after fine-tuning on labelled images, likewise."""
    data: str
    """Shards to score: their folder or one manifest."""
    out: str
    """Folder for scores.cfs.parquet (key, name, score, best first) and names.txt."""
    tuned_on: str = ""
    """Labelled data that the target was fine-tuned on, for the note that the list carries. Empty: as its weights
    say."""
    feature: str = "cls"
    """"cls", "mean" (of the patches); of weights with part tokens also "cls+parts", "cls_parts_mean", "parts" and
    "each_part". Which one the authors of the score took is not published, nor are size, normalisation and target
    set."""
    size: Size | None = None
    """(height, width) that crops are resized to for both. None: each network's own."""
    source_statistics: Statistics = "imagenet"
    """What crops are normalised with for the source: "imagenet" or "half" (.5, .5)."""
    target_statistics: Statistics = "half"
    """What crops are normalised with for the target."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resized."""
    embed_batch: int = Field(default=64, ge=1)
    """Crops embedded at once. Lower it when memory runs out; scores stay the same up to rounding."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the forward passes."""
    threads: int = Field(default=2, ge=1)
    """Threads that read, decode and resize, for each device at work. More of them keep a fast GPU busy."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Arg(aliases=("--engine.device",))] = "auto"
    """"auto": GPUs where there are any; "cuda": an error where there is none."""
    address: Address = None
    """Address of a running cluster. None: the one that this process is a job of (RAY_ADDRESS), else a Ray inside this
    process. "local": always the latter."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""

    @property
    def places(self) -> dict[str, str]:
        """Every place that is read from or written to, by its flag."""
        return {"source": self.source, "target": self.target, "data": self.data, "out": self.out}


@settings
class PretrainJob(training.PretrainCommand):
    address: Address = None
    """Address of a running cluster: auto, or host:port of its head. None: the one that this process is a job of
    (RAY_ADDRESS), else a Ray inside this process. "local": always the latter."""


@settings
class SubmitCommand:
    command: Annotated[Literal["pretrain", "shard", "evaluate", "embed", "score-cfs"], POSITIONAL]
    """What is handed in; its own words follow, as for `python -m cluster COMMAND`."""
    address: Address = None
    """Dashboard, such as http://127.0.0.1:8265, before COMMAND. None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or
    that of a cluster on this machine."""
    driver_cpus: float | None = Field(default=None, ge=0)
    """CPU cores set aside for the command itself, on whichever machine has them; jobs for which there is no room wait.
    None: 1 where the cluster has GPUs, else none: workers are counted by cores there, and commands that hold them all
    would wait for each other's."""
    driver_memory_gb: float = Field(default=2.0, ge=0)
    """Memory in 10^9 bytes set aside for the command itself, its coordinator and Ray Train's controller, likewise. With
    no cores and 0 here it runs on the head, beside all others."""
    retries: int = Field(default=3, ge=0)
    """Times in a row that the command is started again where it is killed (by want of memory, or a fault in a library),
    and that --wait hands the job in again. A run goes on from its last checkpoint."""
    wait: bool = False
    """Stay until the job has ended, end with its exit code, and hand it in again where its machine or the head was
    lost. Ray itself starts no job again."""


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
