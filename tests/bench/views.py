"""PASS's 11 views of one image, in one thread, against the reference recipe."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from datapipe.views.normalisation import IMAGENET_MEAN, IMAGENET_STD
from datapipe.views.render import make_views
from datapipe.views.spec import ViewSpec
from tests.bench.crops import ABOUT, KINDS, crops
from tests.bench.measure import Rates, Work, rates
from tests.bench.reference import PassRecipe
from tests.bench.scale import Scale
from tests.bench.specs import Interpolation, pass_views
from tests.bench.table import Row, Table, Target, compare
from training.config import bicubic

REPEATS = 2
"""Ours gets the same images so many times, to take about as long as the reference."""
GEOMETRY, GEOMETRY_TENSORS = "PIL + torchvision: geometry", "PIL + torchvision: geometry, ToTensor, Normalize"
PILLOWS = "bicubic by Pillow (version 2)"
WHOLE, WHOLE_TENSORS = "PIL + torchvision: whole", "PIL + torchvision: whole, ToTensor, Normalize"


def views(scale: Scale) -> Table:
    """Geometry alone and the whole recipe; ours in uint8 and normalised on the CPU; linear and bicubic."""
    rows = [row for kind in KINDS for row in _rows(kind, _measured(crops(kind, scale).jpegs[: scale.images], scale))]
    notes = (
        ABOUT,
        "11 views: 2 x 256x128 of the image, 9 x 128x64 of its thirds; decoding included on both sides",
        "whole: jitter, grey, blur and solarising too; the reference's interpolation is bicubic throughout",
    )
    return Table("views", "PASS's 11 views of an image", "img/s per CPU-second", tuple(rows), notes)


def _measured(jpegs: list[bytes], scale: Scale) -> Rates:
    torch.set_num_threads(1)
    works: dict[str, Work] = {
        GEOMETRY: _reference(jpegs, colours=False, tensors=False),
        GEOMETRY_TENSORS: _reference(jpegs, colours=False, tensors=True),
        WHOLE: _reference(jpegs, colours=True, tensors=False),
        WHOLE_TENSORS: _reference(jpegs, colours=True, tensors=True),
    }
    kinds: dict[str, tuple[Interpolation, Literal[2, 3]]] = {
        "linear": ("linear", 3), "bicubic": ("bicubic", 3), PILLOWS: ("bicubic", 2),
    }  # fmt: skip
    for name, (interpolation, version) in kinds.items():
        for colours, part in ((False, "geometry"), (True, "whole")):
            spec = replace(pass_views(interpolation, colours=colours), version=version)
            works[f"{part}, {name}"] = _ours(jpegs, spec)
    works["whole, linear, normalised"] = _ours(jpegs, pass_views("linear", colours=True), _normalise)
    return rates(works, scale.rounds)


def _rows(kind: str, found: Rates) -> list[Row]:
    def row(ours: str, against: str, target: Target | None = None) -> Row:
        return compare(found, f"{kind}: {ours}", ours, against, target)

    return [
        row("geometry, linear", GEOMETRY, Target(5)),
        row("geometry, linear", GEOMETRY_TENSORS),
        row("geometry, bicubic", GEOMETRY, Target(3)),
        row("geometry, bicubic", f"geometry, {PILLOWS}"),
        row("whole, linear", WHOLE_TENSORS, Target(5)),
        row("whole, linear", WHOLE),
        row("whole, linear, normalised", WHOLE_TENSORS, Target(2)),
        row("whole, bicubic", WHOLE_TENSORS),
        row("whole, bicubic", WHOLE),
        row("whole, bicubic", f"whole, {PILLOWS}", Target(1.7)),
    ]


def _reference(jpegs: list[bytes], *, colours: bool, tensors: bool) -> Work:
    recipe = PassRecipe(colours=colours, tensors=tensors)

    def work() -> int:
        for data in jpegs:
            recipe(data)
        return len(jpegs)

    return work


def _ours(jpegs: list[bytes], spec: ViewSpec, then: Callable[[np.ndarray], object] | None = None) -> Work:
    out = {group.name: np.empty(spec.shape(group, len(jpegs)), np.uint8) for group in spec.groups}

    def work() -> int:
        for repeat in range(REPEATS):
            make_views(jpegs, spec, repeat, np.arange(len(jpegs)), out, resize=bicubic.fastest())
            if then is not None:
                for stack in out.values():
                    then(stack)
        return REPEATS * len(jpegs)

    return work


def _normalise(stack: np.ndarray) -> None:
    """uint8 [V, B, H, W, 3] -> normalised float32 [V, B, 3, H, W]; on a device done by
    `training.trainer.batch_to_device`."""
    scale = 255 * torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    shift = -255 * torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1) / scale
    moved = torch.from_numpy(stack).permute(0, 1, 4, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    torch.addcmul(shift, moved, 1 / scale)
