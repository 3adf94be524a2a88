"""What the publications say of each recipe's settings, key by key, so that a run can be compared with them.

A key that is in no table here was not published; the comment behind its value in the recipe says why it has that value.
Files are those of the reference repositories; a value that only the paper states has the paper as its source.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Published(NamedTuple):
    """A setting as published."""

    value: Any
    """As a recipe would write it."""
    source: str


Table = Mapping[str, Published]


def _by(source: str, values: Mapping[str, Any]) -> dict[str, Published]:
    return {key: Published(value, source) for key, value in values.items()}


SQUARE = [3 / 4, 4 / 3]
"""torchvision's default ratio of a random resized crop."""

COLOURS = {
    "views.flip": 0.5,
    "views.grey": 0.2,
    "views.blur": [1.0, 0.1, 0.5],
    "views.blur_sigma": [0.1, 2.0],
    "views.solarise": [0.0, 0.2, 0.0],
    "views.erase": [0.0, 0.0, 0.0],
    "views.interpolation": "bicubic",
    "views.jitter.probability": 0.8,
    "views.jitter.brightness": 0.4,
    "views.jitter.contrast": 0.4,
    "views.jitter.saturation": 0.2,
    "views.jitter.hue": 0.1,
    "views.jitter.white_balance": 0.0,
}
"""The augmentation of DINO, TransReID-SSL, PASS and iBOT."""

FAMILY = {
    "views.global_scale": [0.4, 1.0],
    "views.global_ratio": SQUARE,
    "views.local_ratio": SQUARE,
    "backbone.size": [256, 128],
    "backbone.patch": 16,
    "backbone.drop_path": 0.1,
    "backbone.init_std": 0.02,
    "init.weights": "",
    "method.local_size": [128, 64],
    "method.student_temp": 0.1,
    "method.warmup_teacher_temp": 0.04,
    "method.teacher_temp": 0.04,
    "method.teacher_temp_warmup_epochs": 0,
    "method.targets": "centring",
    "method.centre_momentum": 0.9,
    "method.freeze_last_layer_epochs": 1,
    "method.head.out_dim": 65_536,
    "method.head.hidden": 2_048,
    "method.head.bottleneck": 256,
    "method.head.layers": 3,
    "method.head.norm_last_layer": True,
    "method.head.init_std": 0.02,
    "optimisation.epochs": 100.0,
    "optimisation.final_lr": 1e-6,
    "optimisation.warmup_epochs": 10.0,
    "optimisation.betas": [0.9, 0.999],
    "optimisation.eps": 1e-8,
    "optimisation.weight_decay": 0.04,
    "optimisation.final_weight_decay": 0.4,
    "optimisation.layer_decay": 1.0,
    "optimisation.clip": "tensor",
    "optimisation.clip_norm": 3.0,
    "optimisation.ema": 0.996,
    "optimisation.final_ema": 1.0,
    "optimisation.ema_points": [],
    "optimisation.precision": "fp16",
}
"""What TransReID-SSL and PASS have in common."""

DINO = _by("TransReID-SSL dino/main_dino.py", {
    **COLOURS, **FAMILY, "method.name": "dino", "method.locals": 8, "views.local_scale": [0.05, 0.4],
})  # fmt: skip

DINO_BATCH = _by("TransReID-SSL dino/script", {"optimisation.batch": 512, "optimisation.lr": 1e-3})

PASS = _by("PASS main_pass.py", {
    **COLOURS, **FAMILY, "method.name": "pass", "method.parts": 3, "method.part_overlap": 0.5,
    "backbone.stem": "patch",
}) | _by("PASS scripts", {"method.locals_per_part": 3, "views.local_scale": [0.1, 0.8]})  # fmt: skip

PERSONVIT = (
    _by("PersonViT README", {
        "method.name": "personvit", "backbone.size": [256, 128], "backbone.patch": 16, "backbone.stem": "patch",
    })
    | _by("PersonViT run_epochs_300.sh", {"optimisation.epochs": 300.0})
    | _by("name of the released weights: wopt, ar.375", {
        "views.global_ratio": [0.375, 0.667], "init.weights": "",
    })
    | _by("iBOT main_ibot.py; PersonViT's own is not public", {"optimisation.precision": "fp16"})
)  # fmt: skip

PERSONMAE = _by("abstract (Hu et al., 2023)", {
    "method.name": "personmae", "method.regions": "pair", "method.mask_kind": "block", "method.loss_on": "all",
}) | _by("MAE main_pretrain.py; PersonMAE's own is not public", {"optimisation.precision": "fp16"})  # fmt: skip

FINE_TUNING = {
    "views.flip": 0.5,
    "views.interpolation": "bicubic",
    "backbone.drop_path": 0.1,
    "method.name": "supervised",
    "method.label_fraction": 1.0,
    "method.margin": 0.0,
    "method.smoothing": 0.0,
    "method.pad": 10,
    "method.erase": 0.5,
    "optimisation.batch": 64,
    "optimisation.clip": "none",
    "optimisation.precision": "fp16",
}
"""What TransReID's family and HAP have in common."""

SUPERVISED = _by("TransReID-SSL, PASS, PersonViT transreid configs", {
    **FINE_TUNING,
    "views.statistics": "half",
    "init.positions": "bilinear",
    "evaluation.quote": "last",
    "evaluation.interpolation": "bilinear",
    "method.instances": 4,
    "method.neck": "one",
    "method.identity_weight": 1.0,
    "method.triplet_weight": 1.0,
    "method.decay": "all",
    "method.bias_lr_factor": 2.0,
    "optimisation.optimizer": "sgd",
    "optimisation.momentum": 0.9,
    "optimisation.schedule": "epoch",
    "optimisation.epochs": 120.0,
    "optimisation.lr": 4e-4,
    "optimisation.warmup_lr": 4e-6,
    "optimisation.final_lr": 8e-7,
    "optimisation.warmup_epochs": 20.0,
    "optimisation.weight_decay": 1e-4,
    "optimisation.final_weight_decay": 1e-4,
    "optimisation.layer_decay": 1.0,
})  # fmt: skip

SUPERVISED_MAE = _by("HAP downstream_tasks/person_reid; PersonMAE's own is not public", {
    **FINE_TUNING,
    "views.statistics": "imagenet",
    "backbone.size": [256, 128],
    "init.positions": "bicubic",
    "evaluation.interpolation": "bicubic",
    "method.instances": 8,
    "method.neck": "none",
    "method.identity_weight": 0.5,
    "method.triplet_weight": 0.5,
    "method.decay": "weights",
    "method.bias_lr_factor": 1.0,
    "optimisation.optimizer": "adamw",
    "optimisation.betas": [0.9, 0.999],
    "optimisation.schedule": "step",
    "optimisation.epochs": 100.0,
    "optimisation.lr": 8e-3,
    "optimisation.warmup_lr": 0.0,
    "optimisation.final_lr": 0.0,
    "optimisation.warmup_epochs": 5.0,
    "optimisation.weight_decay": 0.05,
    "optimisation.final_weight_decay": 0.05,
    "optimisation.layer_decay": 0.4,
})  # fmt: skip


def _size(height: int, width: int) -> dict[str, Published]:
    return _by("TransReID-SSL, PASS, PersonViT transreid configs", {"backbone.size": [height, width]})


def _arch(name: str, source: str) -> dict[str, Published]:
    return _by(source, {"backbone.arch": name})


PUBLISHED: Mapping[str, Table] = {
    "dino_vits": DINO | DINO_BATCH | _by("TransReID-SSL dino/script", {"backbone.stem": "patch"})
    | _arch("vit_small", "TransReID-SSL dino/script"),
    "dino_vitb": DINO | DINO_BATCH | _by("TransReID-SSL dino/script", {"backbone.stem": "ics"})
    | _arch("vit_base", "TransReID-SSL dino/script"),
    "dino_vitl": DINO | _by("TransReID-SSL dino/script, of ViT-S and ViT-B", {
        "optimisation.batch": 512, "optimisation.lr": 1e-3}),
    "pass_vits": PASS | _arch("vit_small", "PASS scripts")
    | _by("PASS scripts", {"optimisation.batch": 1_024, "optimisation.lr": 2e-3}),
    "pass_vitb": PASS | _arch("vit_base", "PASS scripts")
    | _by("PASS scripts", {"optimisation.batch": 512, "optimisation.lr": 1e-3}),
    "pass_vitl": PASS | _by("PASS scripts, of ViT-B", {"optimisation.batch": 512, "optimisation.lr": 1e-3}),
    "personvit_vits": PERSONVIT | _arch("vit_small", "PersonViT README"),
    "personvit_vitb": PERSONVIT | _arch("vit_base", "PersonViT README"),
    "personvit_vitl": PERSONVIT,
    "personmae_vits": PERSONMAE,
    "personmae_vitb": PERSONMAE | _arch("vit_base", "abstract (Hu et al., 2023)"),
    "personmae_vitl": PERSONMAE,
    "supervised": SUPERVISED | _size(256, 128),
    "supervised_384": SUPERVISED | _size(384, 128),
    "supervised_pass": SUPERVISED | _size(256, 128)
    | _by("PASS make_model.py, number of keys in its fine-tuned weights", {"method.parts": 3, "method.neck": "each"}),
    "supervised_mae": SUPERVISED_MAE,
}  # fmt: skip
"""Recipe -> key -> what was published. Nothing was for ViT-L, and nothing for PersonMAE's ViT-S: there, what the
smaller models, or the abstract, say."""

DATA: Mapping[str, str] = {
    "dino_vits": "2,508,146 images of LUPerson (60 %), chosen by CFS (TransReID-SSL dino/script)",
    "dino_vitb": "2,508,146 images of LUPerson (60 %), chosen by CFS (TransReID-SSL dino/script)",
    "pass_vits": "all 4,180,243 images of LUPerson (PASS scripts)",
    "pass_vitb": "all 4,180,243 images of LUPerson (PASS scripts)",
    "personvit_vits": "all 4,180,243 images of LUPerson (name of the released weights: lup)",
    "personvit_vitb": "all 4,180,243 images of LUPerson (name of the released weights: lup)",
    "personmae_vitb": "LUPerson; how much of it is not in the abstract",
}
"""Recipe -> what it was published on."""
