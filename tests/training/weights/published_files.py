"""Files as others publish them, built from the reference's key lists in the golden vectors."""

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.golden import golden, group

State = dict[str, Tensor]


def backbone_state(item: str) -> State:
    """The backbone of a golden item, under the reference's names."""
    return group(golden(item)[1], "state/")


def head_state(kind: str) -> State:
    """The head of a kind: "pass", "ssl_norm_last_true", "ibot_shared"."""
    return group(golden("dino_head")[1], f"{kind}/state/")


def arguments() -> argparse.Namespace:
    """Settings as the training scripts keep them."""
    return argparse.Namespace(arch="vit_small", patch_size=16, use_fp16=True, global_crops_scale=(0.4, 1.0),
                              pred_ratio=[0.0, 0.3], dist_url="env://", gpu=0, lr=5e-4, resume=None)  # fmt: skip


def training_checkpoint(
    teacher: State,
    head: State,
    *,
    loss: str = "dino_loss",
    extra: State | None = None,
    wrapped: bool = False,
    centres: State | None = None,
) -> dict[str, Any]:
    """A dict as DINO, iBOT, TransReID-SSL and PASS save it. `extra`: what only the student's backbone has.

    The optimizer's learning rates are NumPy numbers, because they come out of the schedule's array. `wrapped`: the
    teacher is wrapped for several processes too, as with batch norm.
    """
    own = prefixed(teacher, "backbone.") | prefixed(head, "head.")
    student = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in own.items()}
    student |= prefixed(extra or {}, "backbone.")
    groups = [{"lr": np.float64(5e-4), "weight_decay": np.float64(0.04), "betas": (0.9, 0.999), "params": [0]}]
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    return {
        "student": prefixed(student, "module."),
        "teacher": prefixed(own, "module." if wrapped else ""),
        "optimizer": {"state": {0: moments}, "param_groups": groups},
        "epoch": 100,
        "args": arguments(),
        loss: {"center": torch.zeros(1, 4)} if centres is None else centres,
        "fp16_scaler": {"scale": 65_536.0, "growth_factor": 2.0, "_growth_tracker": 3},
    }


def fine_tuned(state: State, *, necks: int = 1) -> State:
    """A state dict as TransReID-style fine-tuning saves it: an unused classifier in the backbone, necks, classifier."""
    width = state["cls_token"].shape[-1]
    made = prefixed(state, "base.") | {"base.fc.weight": torch.ones(7, width), "base.fc.bias": torch.ones(7)}
    for neck in ("bottleneck", *(f"bottleneck_{number}" for number in range(1, necks)))[:necks]:
        made |= {f"{neck}.{name}": torch.ones(width) for name in ("weight", "bias", "running_mean", "running_var")}
        made[f"{neck}.num_batches_tracked"] = torch.tensor(5)
    return made | {"classifier.weight": torch.ones(11, width)}


def without_labels(state: State, *, necks: int = 1, wide: bool = False) -> dict[str, Any]:
    """What cluster contrast saves as model_best.pth.tar: backbone and necks behind `module.`, its best score a NumPy
    number. `wide`: the only neck takes CLS and the mean of the parts."""
    width = state["cls_token"].shape[-1] * (2 if wide else 1)
    made = dict(state)
    for neck in ("bottleneck", *(f"bottleneck_pt{number}" for number in range(1, necks))):
        made |= {f"{neck}.{name}": torch.ones(width) for name in ("weight", "bias", "running_mean", "running_var")}
        made[f"{neck}.num_batches_tracked"] = torch.tensor(5)
    return {"state_dict": prefixed(made, "module."), "epoch": 50, "best_mAP": np.float64(0.88)}


def mae(state: State) -> dict[str, Any]:
    """A training checkpoint of MAE: encoder and decoder under `model`."""
    width = state["cls_token"].shape[-1]
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": state["pos_embed"][..., :8],
               "decoder_embed.weight": torch.ones(8, width), "decoder_blocks.0.norm1.weight": torch.ones(8),
               "decoder_pred.bias": torch.ones(3)}  # fmt: skip
    return {"model": {**state, **decoder}, "optimizer": {}, "epoch": 799, "scaler": {}, "args": arguments()}


def classified(state: State) -> State:
    """An ImageNet state dict of timm with its classifier."""
    width = state["cls_token"].shape[-1]
    return {**state, "head.weight": torch.ones(9, width), "head.bias": torch.ones(9)}


def distilled(state: State) -> dict[str, Any]:
    """DeiT as its authors publish it: a second token with a position of its own, two classifiers, under `model`."""
    width, positions = state["cls_token"].shape[-1], state["pos_embed"]
    heads = {f"{name}.{part}": torch.ones(9, *tail) for name in ("head", "head_dist")
             for part, tail in (("weight", (width,)), ("bias", ()))}  # fmt: skip
    second = torch.full_like(positions[:, :1], 7.0)
    table = torch.cat([positions[:, :1], second, positions[:, 1:]], dim=1)
    return {"model": {**state, "pos_embed": table, "dist_token": torch.ones(1, 1, width), **heads}}


def prefixed(state: Mapping[str, Tensor], prefix: str) -> State:
    """All names behind a prefix."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def save(content: Any, path: Path) -> str:
    """Write as torch.save does; the path."""
    torch.save(content, path)
    return str(path)


def saved(content: Any, *, old: bool = False) -> bytes:
    """The same as bytes; `old`: the format before torch 1.6."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()
