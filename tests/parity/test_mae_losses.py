"""MAE's and BootMAE's targets, losses and tiny model, against the golden vectors.

Not covered, because our structure has no counterpart: the random roll of the index by up to three places, which moves
patches across the border of a mask (our masks are used as they are drawn; the rolled ones are inputs here).
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.golden import difference, golden, group, tolerance
from training.core.schedules import along, grown
from training.engine.param_groups import settings_at
from training.engine.settings import OptimisationConfig
from training.methods.base import Outcome, TrainingProgress, Views
from training.methods.personmae import DecoderQueries, PersonMae, PersonMaeConfig, Predictions
from training.nn import positions, reconstruction
from training.nn.vision_transformer import BackboneConfig
from training.weights.counted_keys import load_counted


@pytest.mark.parametrize("kind", ["raw_pix", "norm_pix"])
def test_mae_pixel_loss__loss_and_gradient(kind: str) -> None:
    about, tensors = golden("mae_pixel_loss")
    images, mask_BN = tensors["images"], tensors["mask"]
    patch = about["hyper_parameters"]["patch"]
    assert torch.equal(reconstruction.patchify(images, patch), tensors["patchified"])
    predicted = tensors["pred"].clone().requires_grad_()
    target_BNV = reconstruction.pixel_target(images, patch, "none" if kind == "raw_pix" else "mae")
    errors_BN = reconstruction.pixel_errors(predicted, target_BNV)
    loss = reconstruction.over_patches(errors_BN, mask_BN, mask_BN.sum() / len(mask_BN)).mean()
    loss.backward()
    assert predicted.grad is not None
    assert difference(loss[None], tensors[f"{kind}/loss"][None]) < tolerance(about, "loss")
    assert difference(predicted.grad, tensors[f"{kind}/grad_pred"]) < tolerance(about, "gradient")


def test_bootmae__pixel_target() -> None:
    about, tensors = golden("bootmae_losses")
    patch = about["hyper_parameters"]["patch"]
    found = reconstruction.pixel_target(tensors["images"], patch, "bootmae")
    wanted = reconstruction.patchify(tensors["pixel_target"], patch)
    assert float((found - wanted).abs().max()) < tolerance(about, "pixel_target")


@pytest.mark.parametrize("case", ["weighted", "plain"])
def test_bootmae__losses_and_gradients_of_given_predictions(case: str) -> None:
    about, tensors = golden("bootmae_losses")
    setting = about["hyper_parameters"]
    pixels = tensors["pixel_pred"].clone().requires_grad_()
    features = tensors["feature_pred"].clone().requires_grad_()
    mask_BRG = tensors["loss_mask"][:, 0]
    weight_BRG = reconstruction.centre_weights(mask_BRG) if setting[case]["weight_mask"] else mask_BRG
    weight_BN, count = weight_BRG.flatten(1), mask_BRG.sum() / len(mask_BRG)
    assert difference(weight_BN[..., None], tensors[f"{case}/patch_weight"]) < 1e-6

    target_BNV = reconstruction.patchify(tensors["pixel_target"], setting["patch"])
    pixel_BN = reconstruction.pixel_errors(reconstruction.patchify(pixels, setting["patch"]), target_BNV)
    feature_BN = reconstruction.feature_errors(features, tensors["feature_target"])
    pixel = reconstruction.over_patches(pixel_BN, weight_BN, count).mean()
    feature = reconstruction.over_patches(feature_BN, weight_BN, count).mean()
    loss = pixel + _factor(setting[case]) * feature
    loss.backward()
    for found, name in ((pixel, "pixel_loss"), (feature, "feature_loss"), (loss, "loss")):
        assert difference(found[None], tensors[f"{case}/{name}"][None]) < tolerance(about, "loss"), name
    assert pixels.grad is not None and features.grad is not None
    assert difference(pixels.grad, tensors[f"{case}/grad_pixel_pred"]) < tolerance(about, "gradient")
    assert difference(features.grad, tensors[f"{case}/grad_feature_pred"]) < tolerance(about, "gradient")


def _factor(case: dict[str, Any]) -> float:
    return case["feature_weight"] * grown(case["epoch"], epochs=0.25 * case["epochs"])


def test_bootmae__feature_factor_and_average_over_the_epochs() -> None:
    about, tensors = golden("bootmae_losses")
    for case in ("weighted", "plain"):
        setting = about["hyper_parameters"][case]
        assert _factor(setting) == pytest.approx(float(tensors[f"{case}/feature_factor"]), rel=1e-12)
        assert along(BOOTMAE_EMA, setting["epoch"]) == pytest.approx(setting["ema_decay"], rel=1e-12)
    factors = tensors["feature_factor_schedule"].tolist()
    assert [grown(epoch, epochs=0.25 * len(factors)) for epoch in range(len(factors))] == pytest.approx(factors)
    for points, name in ((BOOTMAE_EMA, "dynamic"), (BOOTMAE_EMA[:2], "static")):
        for epoch, decay in enumerate(tensors[f"ema_decay_{name}"].tolist()):
            assert along(points, epoch) == pytest.approx(decay, rel=1e-12)
            config = OptimisationConfig(ema_points=points)
            progress = TrainingProgress(0, 40 * epoch + 7, epoch, 0.0, 40 * 800, 40.0, 0)
            assert settings_at(config, progress).ema == pytest.approx(decay, rel=1e-12)


BOOTMAE_EMA = ((0.0, 0.999), (100.0, 0.9999), (400.0, 0.99999))
"""BootMAE `utils.py` adjust_ema_momentum (per epoch); without its option "dynamic" the last stretch is left out."""


def test_bootmae__position_tables() -> None:
    about, tensors = golden("bootmae_losses")
    places_N2 = positions.grid(*about["hyper_parameters"]["grid"])
    for name in ("pos_embed", "de_pos_embed"):
        table = tensors[f"state/{name}"][0]
        found = positions.sincos(places_N2, table.shape[1])
        assert float((found - table[1:].double()).abs().max()) < 1e-5  # theirs was computed in float32
        assert not table[0].any()


def tiny(about: dict[str, Any], tensors: dict[str, Tensor], **changes: Any) -> PersonMae:
    """The golden tiny model as a method of ours: its weights under our names, the teacher its averaged encoder."""
    setting = about["hyper_parameters"]
    model = setting["model"]
    backbone = BackboneConfig(
        arch="custom", size=tuple(setting["image"]), patch=setting["patch"], width=model["embed_dim"],
        depth=model["depth"], heads=model["num_heads"], mlp_ratio=setting["mlp_ratio"],
    )  # fmt: skip
    config = PersonMaeConfig(**{
        "regions": "same", "loss_on": "masked", "pixel_norm": "bootmae",
        "mask_ratio": setting["masked_patches"] / math.prod(setting["grid"]),
        "pixel_width": model["decode_dim"], "decoder_depth": model["decoder_depth"],
        "pixel_memory": model["fea_list"][0], "feature_memory": model["fea_list"][-1], **changes,
    })  # fmt: skip
    method = PersonMae(config, backbone)
    state = group(tensors, "state/")
    patches = setting["patch"] ** 2
    load_counted(method.student.backbone, encoder_state(state), where="golden encoder")
    load_counted(method.student.head.pixel, decoder_state(state, "", patches), where="golden pixel decoder")
    load_counted(method.student.head.feature, decoder_state(state, "_1", patches), where="golden feature decoder")
    averaged = encoder_state(group(tensors, "ema_state/"))
    unused = {name: value for name, value in method.teacher.backbone.state_dict().items() if name.startswith("norm.")}
    load_counted(method.teacher.backbone, {**averaged, **unused}, where="golden averaged encoder")
    return method


def encoder_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their encoder under our names: query and value have a bias of their own, the key has none."""
    ours = {}
    for name, value in theirs.items():
        if name.endswith("q_bias") and name.startswith("blocks."):
            other = theirs[name.replace("q_bias", "v_bias")]
            ours[name.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), other])
        elif name.startswith(("blocks.", "patch_embed.", "norm.", "cls_", "pos_")) and not name.endswith("v_bias"):
            ours[name] = value
    return ours


def decoder_state(theirs: dict[str, Tensor], which: str, patches: int) -> dict[str, Tensor]:
    """One of their decoders under our names. Pixels are theirs by a transposed convolution with a bias per channel."""
    ours = {"mask_token": theirs[f"mask_token{which}"]}
    for kind in ("weight", "bias"):
        ours[f"embed.{kind}"] = theirs[f"down{which}.{kind}"]
        ours[f"norm.{kind}"] = theirs[f"decode_norm{which}.{kind}"]
    if which:
        ours["predict.weight"], ours["predict.bias"] = theirs["lm_head_1.weight"], theirs["lm_head_1.bias"]
    else:
        ours["predict.weight"] = theirs["lm_head.proj.weight"].permute(2, 3, 1, 0).flatten(0, 2)
        ours["predict.bias"] = theirs["lm_head.proj.bias"].repeat(patches)
    for name, block in group(theirs, f"decode_blocks{which}.").items():
        number, _, rest = name.partition(".")
        for found, value in _block_entry(rest, block, group(theirs, f"decode_blocks{which}.{number}.")):
            ours[f"blocks.{number}.{found}"] = value
    return ours


def _block_entry(name: str, value: Tensor, block: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """One entry of their decoder block under our name(s); none for what another entry brings along."""
    renamed = {"norm2": "norm3", "norm3": "norm2", "norm4": "norm_memory"}
    head, _, rest = name.partition(".")
    if head in renamed:
        return [(f"{renamed[head]}.{rest}", value)]
    if head == "c_attn":
        no_key = torch.cat([torch.zeros_like(block["c_attn.v_bias"]), block["c_attn.v_bias"]])
        entries = {"q.weight": "query.weight", "kv.weight": "key_value.weight", "q_bias": "query.bias",
                   "proj.weight": "proj.weight", "proj.bias": "proj.bias"}  # fmt: skip
        if rest == "v_bias":
            return [("cross.key_value.bias", no_key)]
        return [(f"cross.{entries[rest]}", value)]
    if name == "attn.qkv.weight":
        query, key, other = value.chunk(3)
        return [("attn.query.weight", query), ("attn.key_value.weight", torch.cat([key, other]))]
    if name == "attn.v_bias":
        return [("attn.key_value.bias", torch.cat([torch.zeros_like(value), value]))]
    return [("attn.query.bias" if name == "attn.q_bias" else name, value)]


def batch(about: dict[str, Any], tensors: dict[str, Tensor]) -> Views:
    images = tensors["images"]
    return {
        "region_a": images[None],
        "mask": tensors["loss_mask"][:, 0][None].bool(),
        "weight": torch.full((len(images),), 1 / len(images)),
        "position": torch.arange(len(images)),
    }


@torch.no_grad()
def test_bootmae__tiny_model_outputs() -> None:
    """Every patch's prediction, hidden or visible, by our encoder and decoders with their weights."""
    about, tensors = golden("bootmae_losses")
    method, views = tiny(about, tensors, loss_on="all"), batch(about, tensors)
    order_BN = views["mask"][0].flatten(1).to(torch.int8).argsort(dim=1, stable=True)
    asked = method._queries(views, order_BN)
    said = method.student(views["region_a"][0], order_BN[:, : method.kept], asked, precision="fp32", path_masks=None)
    assert asked.patches_BQ is not None
    wanted_pixels = reconstruction.patchify(tensors["pixel_pred"], about["hyper_parameters"]["patch"])
    for found, wanted in ((said.pixels_BQV, wanted_pixels), (said.features_BQC, tensors["feature_pred"])):
        assert difference(found, _rows(wanted, asked)) < 1e-5
    taught = method.teacher(views["region_a"][0], precision="fp32")
    assert difference(taught, tensors["feature_target"]) < 1e-5


def _rows(values_BNX: Tensor, asked: DecoderQueries) -> Tensor:
    assert asked.patches_BQ is not None
    return torch.stack([values_X[patches] for values_X, patches in zip(values_BNX, asked.patches_BQ, strict=True)])


@pytest.mark.parametrize("case", ["weighted", "plain"])
def test_bootmae__the_method_itself_with_one_region_and_the_loss_on_masked_patches(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole forward on their weights and images, and the gradients that arrive at both predictions."""
    about, tensors = golden("bootmae_losses")
    setting = about["hyper_parameters"][case]
    method = tiny(about, tensors, weigh_centres=setting["weight_mask"], feature_weight=setting["feature_weight"])
    said: list[Predictions] = []
    heard = PersonMae._losses

    def listen(predictions: Predictions, wanted: Predictions, weight_BQ: Tensor) -> tuple[Tensor, Tensor]:
        for values in predictions:
            values.retain_grad()
        said.append(predictions)
        return heard(predictions, wanted, weight_BQ)

    monkeypatch.setattr(method, "_losses", listen)
    epochs, steps = setting["epochs"], 10
    progress = TrainingProgress(0, steps * setting["epoch"], setting["epoch"], 0.0, steps * epochs, float(steps), 0)
    views = batch(about, tensors)
    outcome: Outcome = method(views, progress)
    outcome.loss.backward()
    assert difference(outcome.loss[None], tensors[f"{case}/loss"][None]) < tolerance(about, "loss")
    for ours, theirs in (("loss_pixel", "pixel_loss"), ("loss_feature", "feature_loss")):
        assert difference(outcome.metrics[ours].mean()[None], tensors[f"{case}/{theirs}"][None]) < 1e-5
    order_BN = views["mask"][0].flatten(1).to(torch.int8).argsort(dim=1, stable=True)
    asked = method._queries(views, order_BN)
    pixels = reconstruction.patchify(tensors[f"{case}/grad_pixel_pred"], about["hyper_parameters"]["patch"])
    for values, wanted in zip(said[0], (pixels, tensors[f"{case}/grad_feature_pred"]), strict=True):
        assert values.grad is not None
        assert difference(values.grad, _rows(wanted, asked)) < tolerance(about, "gradient")
