"""python -m training export | import: weights of a run, and those published by others, as a backbone for timm."""

from collections import Counter
from typing import Annotated

import tyro

from datapipe.core import cli
from datapipe.core.config import Size, Statistics, StorageConfig
from datapipe.core.settings import settings
from datapipe.storage import open_store
from training.commands.checkpoints import newest
from training.evaluation import evaluation
from training.nn.image_statistics import MEAN_STD
from training.reid.zero_shot import Weights
from training.weights.export import Provenance, create_model_call
from training.weights.export import export as export_backbone
from training.weights.published import Network, Stated, read_published
from training.weights.resize_positions import Interpolation, resized, resizing


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
    return cli.COMPLETE


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
    return cli.COMPLETE
