"""What `python -m cluster` does: demo | shard | pretrain | evaluate | submit | status."""

from pathlib import Path
from typing import Literal

import tyro

from cluster.core.session import chosen_address
from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError
from datapipe.core.settings import settings


@settings
class DemoCommand:
    out: Path = Path("demo")
    """Folder for crops, shards, run and report."""
    crops: Path | None = None
    """Your own crops: a Market-style folder (scored if it has query and bounding_box_test) or any folder of images."""
    seed: int = 1
    """Of the sample order and of the initial weights."""
    steps: int = 0
    """Optimizer steps; 0: those of the recipe. For a quick look at the path; it learns nothing in a few."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": GPUs where there are any, one worker where there is one; "cpu": none, whatever there is."""


def demo(arguments: list[str]) -> int:
    """Crops to report on one machine, with a worker killed on the way."""
    from cluster.demo import run

    chosen = tyro.cli(DemoCommand, args=arguments, prog="python -m cluster demo")
    return run(chosen.out, crops=chosen.crops, seed=chosen.seed, steps=chosen.steps, device=chosen.device)


def shard(arguments: list[str]) -> int:
    """Turn crops into shards as `python -m datapipe shard` does, to the same bytes, with all machines of a cluster."""
    from cluster.jobs.shard import ClusterShardCommand, run
    from datapipe.core.cli import parse

    return run(parse(ClusterShardCommand, arguments, "shard", program="python -m cluster"))


def pretrain(arguments: list[str]) -> int:
    """Train a recipe with Ray Train and DeepSpeed; crashed workers are restarted from the last checkpoint."""
    from cluster.jobs.pretrain import run
    from training.commands.pretrain import read_recipe

    address, rest = _address(arguments)
    config = read_recipe(rest, prog="python -m cluster pretrain RECIPE [--address ADDRESS]")
    return run(config, address=address)


def _address(arguments: list[str]) -> tuple[str, list[str]]:
    """Take `--address ADDRESS`, or `--address=ADDRESS`, out of the line; the rest is recipe and overrides."""
    given, rest, words = "", [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--address":
            rest.append(word)
        elif not (given := value if equals else next(words, "")):
            raise ConfigError("no address is given", where="--address",
                              hint="--address auto, or host:port of a running cluster's head")  # fmt: skip
    return chosen_address(given), rest


def evaluate(arguments: list[str]) -> int:
    """Score weights by retrieval, as they are or after fine-tuning; killed and started again it goes on."""
    from cluster.jobs.evaluate import evaluate as run

    return run(arguments)


@settings
class StatusCommand:
    place: tyro.conf.Positional[str] = "runs"
    """Run folder, or a folder of runs, local or s3://bucket/prefix."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def status(arguments: list[str]) -> int:
    """Show runs: state, last step, age, workers, restarts, checkpoints. Reads files alone."""
    from cluster.status import statuses, table

    chosen = tyro.cli(StatusCommand, args=arguments, prog="python -m cluster status")
    print(table(statuses(chosen.place, chosen.storage)))
    return cli.COMPLETE


def submit(arguments: list[str]) -> int:
    """Hand in pretrain, shard or evaluate as a Ray job; prints how to follow, stop and resume it."""
    from cluster.submit import submit as hand_in

    return hand_in(arguments)
