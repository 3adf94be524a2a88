"""python -m training pretrain | views | warm: train a recipe in this one process, or look at it first."""

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import closing

import tyro

from datapipe.core import cli
from datapipe.core.settings import settings
from training.config import recipe_toml as recipes
from training.config.build import training_views
from training.config.run_config import RunConfig
from training.core.host import LocalHost, exit_code
from training.core.preemption_notice import Notice
from training.core.run_folder import crash_log
from training.core.world import alone
from training.preflight import dry_run_text
from training.preflight.dry_run import dry_run
from training.trainer.pretrain import pretrain as run_recipe


def pretrain(arguments: list[str]) -> int:
    """Train a recipe in this one process, without Ray; `--dry-run` says what it would be and needs."""
    parser = _dry_run_flags()
    asked, words = parser.parse_known_args(arguments)
    if words in ([], ["-h"], ["--help"]):
        print(parser.format_help())
    config = read_recipe(words, prog="python -m training pretrain RECIPE")
    if asked.dry_run:
        return _dry_run(config, asked)
    if asked.json or asked.rows or asked.gpu_memory_gb:
        parser.error("--json, --rows and --gpu-memory-gb go with --dry-run")
    machine = config.cluster
    with (
        LocalHost(starting=True) as host,
        closing(Notice(machine.notice, every_s=machine.notice_every_s, heard=host.notice)),
        crash_log.kept(config.out, config.storage, 0, log=True),
        alone(config.engine.device, group=config.engine.stepper == "deepspeed") as world,
    ):
        ending = run_recipe(config, world=world, host=host)
    return exit_code(None if ending.complete else host.received)


def _dry_run_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training pretrain RECIPE", add_help=False, allow_abbrev=False,
                                     usage="%(prog)s [--dry-run [...]] [--dotted.flag value ...]")  # fmt: skip
    group = parser.add_argument_group("what a run would be")
    group.add_argument("--dry-run", action="store_true", help="Print the resolved recipe, sizes, steps, calculated "
                       "memory and what differs from the publication; start nothing. Needs no data set.")  # fmt: skip
    group.add_argument("--json", action="store_true", help="The same for programs; memory in bytes.")
    group.add_argument("--rows", type=_above(int), default=0, metavar="N",
                       help="Images of a data set that is not at hand. Left out: LUPerson's.")  # fmt: skip
    group.add_argument("--gpu-memory-gb", type=_above(float), default=0.0, metavar="GB",
                       help="Memory of a GPU, 10^9 bytes. Left out: that of this machine's, if any.")  # fmt: skip
    return parser


def _above(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Parse a finite number above zero."""

    def number(word: str) -> float:
        value = kind(word)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{word} is no finite number above zero")
        return value

    return number


def _dry_run(config: RunConfig, asked: argparse.Namespace) -> int:
    found = dry_run(config, rows=asked.rows, gpu_memory_gb=asked.gpu_memory_gb)
    print(json.dumps(dry_run_text.to_tree(found), indent=2) if asked.json else dry_run_text.page(found))
    return cli.COMPLETE


def read_recipe(arguments: list[str], *, prog: str) -> RunConfig:
    """`RECIPE [--dotted.flag value ...]` as a resolved configuration. `--help` alone documents every key."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return recipes.override(RunConfig(), arguments or ["--help"], prog=prog)
    return recipes.load(arguments[0], arguments[1:], prog=prog)


def views(arguments: list[str]) -> int:
    """Print the views that a recipe trains on, as JSON for `python -m datapipe preview --views FILE`."""
    print(training_views(read_recipe(arguments, prog="python -m training views RECIPE")).to_json())
    return cli.COMPLETE


def warm(arguments: list[str]) -> int:
    """Start DeepSpeed once, with a tiny module, to see that it works here."""
    tyro.cli(WarmCommand, args=arguments, prog="python -m training warm")
    from training.engine.deepspeed import warm_up

    began = time.monotonic()
    with alone("cpu", group=True) as world:
        warm_up(world)
    print(f"DeepSpeed is ready ({time.monotonic() - began:.0f} s)")
    return cli.COMPLETE


@settings
class WarmCommand:
    pass
