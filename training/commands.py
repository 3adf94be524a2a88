"""What `python -m training` does: pretrain | views | export | import | report | warm."""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Annotated

import tyro

from datapipe import command
from datapipe.config import Size, Statistics, StorageConfig
from datapipe.settings import settings
from datapipe.storage import open_store
from training import dry_run_page, evaluation, last_words
from training import recipe_toml as recipes
from training.assembly import training_views
from training.checkpoint.command import newest
from training.dry_run import dry_run
from training.engine.host import LocalHost, exit_code
from training.engine.notice import Notice
from training.engine.world import alone
from training.image_statistics import MEAN_STD
from training.pretrain import pretrain as run_recipe
from training.published import Network, Stated, read_published
from training.reid.zero_shot import Weights
from training.resizing import Interpolation, resized, resizing
from training.run_config import RunConfig
from training.weights import Provenance, create_model_call
from training.weights import export as export_backbone


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
        last_words.kept(config.out, config.storage, 0, log=True),
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
    print(json.dumps(dry_run_page.to_tree(found), indent=2) if asked.json else dry_run_page.page(found))
    return command.COMPLETE


def read_recipe(arguments: list[str], *, prog: str) -> RunConfig:
    """`RECIPE [--dotted.flag value ...]` as a resolved configuration. `--help` alone documents every key."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return recipes.override(RunConfig(), arguments or ["--help"], prog=prog)
    return recipes.load(arguments[0], arguments[1:], prog=prog)


def views(arguments: list[str]) -> int:
    """Print the views that a recipe trains on, as JSON for `python -m datapipe preview --views FILE`."""
    print(training_views(read_recipe(arguments, prog="python -m training views RECIPE")).to_json())
    return command.COMPLETE


@settings
class ExportCommand:
    run: tyro.conf.Positional[str]
    """Run folder, local or s3://bucket/prefix."""
    checkpoint: str = ""
    """Which one, e.g. step_0012000. Empty: the newest that verifies."""
    out: str = ""
    """Folder for backbone.safetensors and card.json. Empty: exports/ of the run."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def export(arguments: list[str]) -> int:
    """Write a checkpoint's backbone for timm, with a card that says what it is."""
    chosen = tyro.cli(ExportCommand, args=arguments, prog="python -m training export")
    folder, config = evaluation.open_run(chosen.run, chosen.storage)
    store = folder.at("checkpoints")
    name = chosen.checkpoint or newest(store)
    weights = Weights(name)
    backbone = evaluation.load_backbone(weights, folder, config)
    out = open_store(chosen.out, chosen.storage) if chosen.out else folder.at("exports")
    card = export_backbone(backbone, out, evaluation.provenance(weights, folder, config))
    print(f"exported {name} to {out.url}")
    print(create_model_call(card))
    return command.COMPLETE


@settings
class ImportCommand:
    file: tyro.conf.Positional[str]
    """Published weights: .pth, .pt or .safetensors, local or s3://bucket/prefix/name. Nothing in it is run."""
    out: str
    """Folder for backbone.safetensors and card.json."""
    layout: Annotated[str, tyro.conf.arg(name="as")] = ""
    """What the file must be, e.g. pass, personvit_checkpoint or vit; a file of another layout is refused with the
    list of all. Empty: its keys tell."""
    network: Network = "teacher"
    """Which network of a training checkpoint. The published backbones are teachers."""
    size: Size | None = None
    """Image size (height, width) to resize the position table for. None: that of the file."""
    native: Size | None = None
    """Image size that the file's position table was made for. None: as its length tells, for images twice or three
    times as high as wide and for squares."""
    positions: Interpolation = "bilinear"
    """How positions are resized: "bilinear" for evaluation and fine-tuning, "bicubic" for going on with pre-training,
    both as the references do."""
    statistics: Statistics | None = None
    """What images are normalised with: "imagenet" or "half" (.5, .5), which some weights of timm want. None: as the
    layout's family does."""
    heads: int = 0
    """Attention heads. 0: those of the published transformer of that width."""
    depth: int = 0
    """Number of blocks. 0: those of the published transformer of that width."""
    licence: str = ""
    """Licence of the weights and their data, for the card."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def import_published(arguments: list[str]) -> int:
    """Read weights published by others and write their backbone as an export, with a card that says where from."""
    chosen = tyro.cli(ImportCommand, args=arguments, prog="python -m training import")
    stated = Stated(layout=chosen.layout, network=chosen.network, heads=chosen.heads, depth=chosen.depth,
                    size=chosen.native or chosen.size)  # fmt: skip
    published = read_published(chosen.file, chosen.storage, stated)
    before = published.backbone.config.size
    after = chosen.size or before
    origin = {**published.origin, **resizing(before, after, chosen.positions)}
    mean, std = MEAN_STD[chosen.statistics or published.statistics]
    provenance = Provenance(origin=origin, licence=chosen.licence, mean=mean, std=std)
    out = open_store(chosen.out, chosen.storage)
    card = export_backbone(resized(published.backbone, after, chosen.positions), out, provenance)
    print(f"imported {origin['tensors']} tensors of {origin['file']} ({origin['about']}) to {out.url}")
    for why, count in Counter(origin["left_out"].values()).items():
        print(f"left out: {count} of {why}")
    print(create_model_call(card))
    return command.COMPLETE


@settings
class ReportCommand:
    run: tyro.conf.Positional[str]
    """Run folder, local or s3://bucket/prefix."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def report(arguments: list[str]) -> int:
    """Write report.html, one self-contained file, from what the run folder holds."""
    from training.report import write_report

    chosen = tyro.cli(ReportCommand, args=arguments, prog="python -m training report")
    print(write_report(chosen.run, chosen.storage))
    return command.COMPLETE


def warm(arguments: list[str]) -> int:
    """Start DeepSpeed once, with a tiny module, to see that it works here."""
    tyro.cli(WarmCommand, args=arguments, prog="python -m training warm")
    from training.engine.deepspeed import warm_up

    began = time.monotonic()
    with alone("cpu", group=True) as world:
        warm_up(world)
    print(f"DeepSpeed is ready ({time.monotonic() - began:.0f} s)")
    return command.COMPLETE


@settings
class WarmCommand:
    pass
