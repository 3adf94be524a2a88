"""python -m training export | import: weights of a run, and those published by others, as a backbone for timm."""

from collections import Counter

from datapipe.core import cli
from datapipe.storage import open_store
from datapipe.views.normalisation import MEAN_STD
from training.commands.arguments import ExportCommand, ImportCommand
from training.commands.checkpoints import newest
from training.evaluation import evaluation
from training.reid.zero_shot import Weights
from training.weights.export import Provenance, create_model_call
from training.weights.export import export as export_backbone
from training.weights.published import Stated, read_published
from training.weights.resize_positions import resized, resizing


def export(chosen: ExportCommand) -> int:
    """Write a checkpoint's backbone for timm, with a card that says what it is."""
    folder, config = evaluation.open_run(chosen.run, chosen.storage)
    store = folder.at("checkpoints")
    name = chosen.checkpoint or newest(store)
    weights = Weights(name)
    method = evaluation.load_method(weights, folder, config).eval()
    out = open_store(chosen.out, chosen.storage) if chosen.out else folder.at("exports")
    card = export_backbone(method.backbone(), out, evaluation.provenance(weights, folder, config), method.necks())
    print(f"exported {name} to {out.url}")
    print(create_model_call(card))
    return cli.COMPLETE


def import_published(chosen: ImportCommand) -> int:
    """Read weights published by others and write their backbone as an export."""
    stated = Stated(layout=chosen.layout, network=chosen.network, heads=chosen.heads, depth=chosen.depth,
                    size=chosen.native or chosen.size, fusion=chosen.fusion)  # fmt: skip
    published = read_published(chosen.file, chosen.storage, stated)
    before = published.backbone.config.size
    after = chosen.size or before
    origin = {**published.origin, **resizing(before, after, chosen.positions)}
    mean, std = MEAN_STD[chosen.statistics or published.statistics]
    provenance = Provenance(origin=origin, licence=chosen.licence, mean=mean, std=std)
    out = open_store(chosen.out, chosen.storage)
    card = export_backbone(resized(published.backbone, after, chosen.positions), out, provenance, published.necks)
    print(f"imported {origin['tensors']} tensors of {origin['file']} ({origin['about']}) to {out.url}")
    for why, count in Counter(origin["left_out"].values()).items():
        print(f"left out: {count} of {why}")
    print(create_model_call(card))
    return cli.COMPLETE
