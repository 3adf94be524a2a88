import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.storage import open_store
from tests.support.golden import difference, golden, tolerance
from tests.training.reid.people import market
from tests.training.weights import published_files as files
from tests.training.weights.published_files import State, backbone_state, head_state, save
from training.__main__ import main
from training.nn.vision_transformer import ARCHITECTURES, BackboneConfig, Shape, VisionTransformer
from training.weights.export import load_backbone, load_card, unfilled
from training.weights.published import LAYOUTS, SHAPES, Stated, read_published
from training.weights.safe_load import is_weights_file

PASS, SSL, ICS, IBOT = "pass_backbone", "transreid_ssl_backbone", "transreid_ssl_ics_backbone", "ibot_backbone"
OUTPUTS = {PASS: ("global_input", "global_cls_stored_pos"), SSL: ("global_input", "global_cls"),
           ICS: ("global_input", "global_cls")}  # fmt: skip
BESIDE = {"student", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler"}


def _without_mask(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "masked_embed"}


def named(value: object) -> str:
    """A test's name that is the same in every process: no addresses, no order of sets."""
    return value[:30] if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


PUBLISHED: list[tuple[str, str, Callable[[State], Any], set[str]]] = [
    ("pass", PASS, lambda state: state, set()),
    ("pass", PASS, lambda state: files.prefixed(state, "module."), set()),
    ("pass_checkpoint", PASS, lambda state: files.training_checkpoint(state, head_state("pass")),
     BESIDE | {f"head.{name}" for name in ("mlp_pt3.4.bias", "last_layer_cls.weight_g")}),
    ("pass_fine_tuned", PASS, lambda state: files.fine_tuned(state, necks=4),
     {"base.fc.weight", "bottleneck_3.running_var", "classifier.weight"}),
    ("vit", SSL, lambda state: state, set()),
    ("vit", SSL, lambda state: {"state_dict": files.prefixed(state, "module."), "epoch": 3}, {"epoch"}),
    ("vit", SSL, files.classified, {"head.weight", "head.bias"}),
    ("vit", SSL, lambda state: {"model": state}, set()),
    ("mae", SSL, files.mae, {"mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "optimizer", "args"}),
    ("dino_checkpoint", SSL, lambda state: files.training_checkpoint(state, head_state("ssl_norm_last_true")),
     BESIDE | {"head.last_layer.weight_v"}),
    ("personvit_checkpoint", SSL,
     lambda state: files.training_checkpoint(state, head_state("ibot_shared"), loss="ibot_loss",
                                             extra={"masked_embed": torch.ones(1, state["cls_token"].shape[-1])}),
     BESIDE - {"dino_loss"} | {"ibot_loss", "head.last_layer2.weight_v"}),
    ("fine_tuned", SSL, files.fine_tuned, {"base.fc.bias", "bottleneck.weight", "classifier.weight"}),
    ("ics", ICS, lambda state: state, set()),
    ("ics", ICS, lambda state: {**state, "fc.weight": torch.ones(4, 2), "fc.bias": torch.ones(4)}, {"fc.bias"}),
    ("ics_checkpoint", ICS,
     lambda state: files.training_checkpoint(state, head_state("ssl_norm_last_true"), wrapped=True), BESIDE),
    ("ics_fine_tuned", ICS, files.fine_tuned, {"bottleneck.num_batches_tracked"}),
    ("pass_usl", PASS, lambda state: files.without_labels(state, necks=4), {"bottleneck_pt3.weight", "best_mAP"}),
    ("pass_usl", PASS, lambda state: files.without_labels(state, wide=True), {"bottleneck.running_var", "epoch"}),
    ("usl", SSL, files.without_labels, {"bottleneck.weight"}),
    ("ics_usl", ICS, files.without_labels, {"bottleneck.weight"}),
    *((layout, item, lambda state: files.prefixed(state, "backbone.") | {"head.mlp.0.weight": torch.ones(4, 4)},
       {"head.mlp.0.weight"})
      for layout, item in (("pass_network", PASS), ("ics_network", ICS), ("dino_network", SSL))),
    ("distilled", SSL, files.distilled, {"dist_token", "head.weight", "head_dist.bias"}),
    ("vit", SSL, lambda state: {**state, "mask_token": torch.zeros(1, state["cls_token"].shape[-1])}, {"mask_token"}),
    *(("vit", SSL, lambda state, prefix=prefix: files.prefixed(state, prefix), set())
      for prefix in ("_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "encoder.",
                     "module.model.", "net.")),
    ("vit", SSL, lambda state: {"state_dict": files.prefixed(state, "model."), "pytorch-lightning_version": ""}, set()),
    ("fine_tuned", SSL, lambda state: files.prefixed(files.fine_tuned(state), "_orig_mod."), {"bottleneck.weight"}),
    ("dino_checkpoint", SSL, lambda state: {"teacher": files.prefixed(state, "_orig_mod.backbone.")}, set()),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "item", "build", "left_out"), PUBLISHED, ids=named)
@torch.no_grad()
def test_import__says_what_the_reference_says(
    layout: str, item: str, build: Callable[[State], Any], left_out: set[str], tmp_path: Path
) -> None:
    about, tensors = golden(item)
    state = backbone_state(item)
    path = save(build(state), tmp_path / "published.pth")
    assert main(["import", path, "--out", str(tmp_path / "out"), *_flags(item), "--as", layout]) == 0
    backbone, card = load_backbone(str(tmp_path / "out")), load_card(open_store(str(tmp_path / "out")))
    given, expected = OUTPUTS[item]
    cls = backbone.features(tensors[given]).cls
    assert difference(cls, tensors[expected]) < tolerance(about, "output")
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    origin = card["origin"]
    assert (origin["file"], origin["layout"], origin["tensors"]) == ("published.pth", layout, len(state))
    assert left_out <= origin["left_out"].keys() and all(origin["left_out"].values())
    assert card["input"]["mean"][0] == (0.5 if layout.endswith(("fine_tuned", "usl")) else 0.485)
    assert ("necks" in card) == layout.endswith("usl")
    assert (card["timm"] is None) == (item == ICS)


def test_layouts__every_one_is_tested() -> None:
    assert {layout.name for layout in LAYOUTS} == {case[0] for case in PUBLISHED} | {"ibot"}


def test_read__a_bare_student_of_ibot_leaves_its_mask_token_aside(tmp_path: Path) -> None:
    about, tensors = golden(IBOT)
    path = save(backbone_state(IBOT), tmp_path / "x.pth")
    found = read_published(path, StorageConfig(), _stated(IBOT))
    assert found.origin["layout"] == "ibot" and list(found.aside) == ["masked_embed"]
    with torch.no_grad():
        cls = found.backbone.features(tensors["input"]).cls
    assert difference(cls, tensors["tokens_unmasked"][:, 0]) < tolerance(about, "output")


def test_read__student_and_settings_of_a_training_checkpoint(tmp_path: Path) -> None:
    state = backbone_state(SSL)
    mask = {"masked_embed": torch.ones(1, state["cls_token"].shape[-1])}
    content = files.training_checkpoint(state, head_state("ibot_shared"), loss="ibot_loss", extra=mask)
    found = read_published(save(content, tmp_path / "x.pth"), StorageConfig(), _stated(SSL, network="student"))
    assert torch.equal(found.backbone.cls_token, state["cls_token"] + 1) and found.origin["network"] == "student"
    assert "backbone.masked_embed" in found.aside and "teacher" in found.origin["left_out"]
    assert found.origin["arguments"] == {"arch": "vit_small", "patch_size": 16, "lr": 5e-4}
    json.dumps(found.origin)


@pytest.mark.parametrize("square", [True, False])
@torch.no_grad()
def test_import__weights_of_timm(square: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    size = (64, 64) if square else (96, 32)
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=size, num_classes=5).eval()
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(model.state_dict()))
    assert main(["import", str(path), "--out", str(tmp_path), "--depth", "2", "--statistics", "half"]) == 0
    said = capsys.readouterr().out
    assert "left out: 2 of classifier of ImageNet's classes" in said and "timm.create_model(" in said
    backbone = load_backbone(str(tmp_path))
    images = torch.randn(2, 3, *size)
    theirs = model.forward_features(images)[:, 0]
    torch.testing.assert_close(backbone.features(images).cls, theirs, rtol=1e-4, atol=1e-5)
    assert backbone.config.size == size and load_card(open_store(str(tmp_path)))["input"]["std"] == [0.5] * 3


def test_read__a_published_size_needs_nothing_stated(tmp_path: Path) -> None:
    state = _zeros(BackboneConfig(arch="vit_tiny"), parts=3)
    found = read_published(save(state, tmp_path / "x.pth"), StorageConfig(), Stated())
    assert found.backbone.config == BackboneConfig(arch="vit_tiny") and found.backbone.parts == 3
    assert len({shape.width for shape in ARCHITECTURES.values()}) == len(ARCHITECTURES)
    assert SHAPES[384] == Shape(384, 12, 6, 4.0)


@pytest.mark.parametrize(("parts", "stem", "backbone", "tuned"), [(3, "patch", 157, 180), (0, "patch", 150, 158),
                                                                  (0, "ics", 172, 180)])  # fmt: skip
def test_key_counts__are_the_published_ones_of_vit_small(parts: int, stem: Any, backbone: int, tuned: int) -> None:
    with torch.device("meta"):
        state = VisionTransformer(BackboneConfig(stem=stem), parts=parts).state_dict()
    assert (len(state), len(files.fine_tuned(state, necks=parts + 1))) == (backbone, tuned)


def _zeros(config: BackboneConfig, parts: int = 0) -> State:
    """The state of an untrained backbone of a published size, without the time that drawing its weights takes."""
    return {name: torch.zeros_like(tensor) for name, tensor in unfilled(config, parts).state_dict().items()}


def _lose(*names: str) -> Callable[[State], Any]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def _put(name: str, tensor: Callable[[int], Tensor]) -> Callable[[State], Any]:
    """With another tensor, which is made for the backbone's width."""
    return lambda state: {**state, name: tensor(state["cls_token"].shape[-1])}


def _stated(item: str = PASS, **more: Any) -> Stated:
    setting = golden(item)[0]["hyper_parameters"]
    return Stated(heads=setting["num_heads"], size=tuple(setting["img_size"]), **more)


def _flags(item: str) -> list[str]:
    stated = _stated(item)
    assert stated.size is not None
    return ["--heads", str(stated.heads), "--native", *map(str, stated.size)]


@pytest.mark.parametrize(("change", "told"), [
    (_lose("blocks.1.norm2.bias", "norm.weight"), r"missing: blocks\.1\.norm2\.bias, norm\.weight"),
    (_lose("pos_embed"), "not whole; missing: pos_embed"),
    (_lose("part_token2"), r"missing: part3_pos|missing: part_token2"),
    (_put("norm.bias", lambda _: torch.ones(7)), r"of another shape: norm\.bias \(7,\) for"),
    (_put("cls_token", lambda width: torch.ones(1, 1, 2 * width)), "of another shape: blocks.*in all"),
    (_put("cls_token", torch.ones), "not the shape of a ViT's: cls_token"),
    (_put("sie_embed", lambda width: torch.ones(6, 1, width)), "camera or view embeddings"),
    (_put("head.weight", lambda width: torch.ones(6, width)), r"left over: head\.weight"),
    (_put("blocks.9.norm1.bias", torch.ones), r"missing: blocks\.\d.*in all"),
    (_put("pos_embed", lambda width: torch.ones(1, 127, width)),
     "127 patches fits no image of height : width 1 : 1, 2 : 1, 3 : 1"),
    (_put("norm.bias", lambda width: torch.full((width,), torch.nan)), r"NaN or infinity: norm\.bias"),
    (lambda state: {**state, "norm.bias": 3}, r"no tensors: norm\.bias"),
    (lambda state: {"weights": state}, "none of the known layouts; it holds weights"),
    (lambda state: files.prefixed(state, "tower."), r"none of the known layouts; it holds tower\..*in all"),
    (lambda state: {"student": files.prefixed(state, "module.backbone.")}, "known layouts; it holds student"),
], ids=named)  # fmt: skip
def test_read__wrong_and_partial_files_name_their_keys(
    change: Callable[[State], Any], told: str, tmp_path: Path
) -> None:
    path = save(change(backbone_state(PASS)), tmp_path / "x.pth")
    with pytest.raises(DataError, match=told) as error:
        read_published(path, StorageConfig(), _stated())
    assert path in str(error.value)


def test_read__a_file_without_its_last_blocks_is_partial(tmp_path: Path) -> None:
    state = _zeros(BackboneConfig(arch="vit_tiny"))
    short = {name: tensor for name, tensor in state.items() if not name.startswith(("blocks.10.", "blocks.11."))}
    path = save(short, tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"missing: blocks\.10\..*\(24 in all\)"):
        read_published(path, StorageConfig(), Stated())
    assert read_published(path, StorageConfig(), Stated(depth=10)).backbone.config.shape.depth == 10


def test_read__an_unusual_image_size_is_taken_as_stated(tmp_path: Path) -> None:
    config = BackboneConfig(arch="vit_tiny", size=(176, 80))
    path = save(_zeros(config), tmp_path / "x.pth")
    with pytest.raises(DataError, match="55 patches fits no image"):
        read_published(path, StorageConfig(), Stated())
    assert read_published(path, StorageConfig(), Stated(size=(176, 80))).backbone.config == config


def test_read__from_any_store() -> None:
    open_store("memory://weights").replace("x.pth", files.saved(backbone_state(PASS)))
    found = read_published("memory://weights/x.pth", StorageConfig(), _stated())
    assert found.origin["file"] == "x.pth"


FUSED: list[tuple[Callable[[State], Any], str, str | None]] = [
    (lambda state: classified_by(state, 2), "", "cat"),
    (lambda state: classified_by(state, 1), "", "mean"),
    (lambda state: classified_by(state, 4), "mean", "mean"),  # a way that no one knows
    (lambda state: files.fine_tuned(state, necks=1), "", "mean"),
    (lambda state: without_classifier(files.fine_tuned(state, necks=1)), "", "mean"),
    (lambda state: without_classifier(files.fine_tuned(state, necks=4)), "", "cat"),
    (lambda state: without_classifier(files.fine_tuned(state, necks=4)), "mean", "mean"),
    (lambda state: files.without_labels(state, wide=True), "", "cat"),
    (files.without_labels, "", "mean"),
    (lambda state: files.without_labels(state, necks=4), "", "cat"),
    (lambda state: files.without_labels(state, necks=4), "mean", "mean"),
    (lambda state: state, "", None),
]


def classified_by(state: State, tokens: int) -> State:
    """Fine-tuned with a neck for each token, and a classifier of a feature as long as so many of them."""
    width = state["cls_token"].shape[-1]
    return files.fine_tuned(state, necks=4) | {"classifier.weight": torch.ones(11, tokens * width)}


def without_classifier(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "classifier.weight"}


@pytest.mark.parametrize(("build", "stated", "fusion"), FUSED, ids=range(len(FUSED)))
def test_read__how_cls_and_parts_are_put_together(
    build: Callable[[State], Any], stated: Any, fusion: str | None, tmp_path: Path
) -> None:
    path = save(build(backbone_state(PASS)), tmp_path / "x.pth")
    found = read_published(path, StorageConfig(), _stated(fusion=stated))
    assert found.origin.get("fusion") == fusion
    assert found.necks is None or found.necks.fusion == fusion


@pytest.mark.parametrize(("item", "build", "stated", "said"), [
    (PASS, lambda state: classified_by(state, 2), "mean", "by 'cat', not by 'mean'"),
    (PASS, files.without_labels, "cat", "by 'mean', not by 'cat'"),
    (PASS, lambda state: state, "cat", "no neck and no classifier: nothing is put together"),
    (SSL, files.fine_tuned, "mean", "no part tokens: nothing is put together"),
], ids=["classifier", "neck", "pre-trained", "no-parts"])  # fmt: skip
def test_read__a_way_that_a_file_cannot_be_of_is_refused(
    item: str, build: Callable[[State], Any], stated: Any, said: str, tmp_path: Path
) -> None:
    path = save(build(backbone_state(item)), tmp_path / "x.pth")
    with pytest.raises(DataError, match=said) as caught:
        read_published(path, StorageConfig(), _stated(item, fusion=stated))
    assert "--fusion" in str(caught.value.hint)


def test_import__refusals_of_the_command(tmp_path: Path) -> None:
    path = save(backbone_state(PASS), tmp_path / "x.pth")
    out, flags = ["--out", str(tmp_path / "out")], _flags(PASS)
    with pytest.raises(DataError, match="laid out as pass .*not as vit"):
        main(["import", path, *out, *flags, "--as", "vit"])
    with pytest.raises(DataError, match="how many attention heads"):
        main(["import", path, *out, *flags[2:]])
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged"):
        main(["import", path, *out, *flags])
    assert not (tmp_path / "out").exists()


def test_evaluate__scores_an_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people, out = market(tmp_path / "people"), str(tmp_path / "out")
    path = save(backbone_state(PASS), tmp_path / "x.pth")
    patch = golden(PASS)[0]["hyper_parameters"]["patch_size"]
    size = [4 * patch, 2 * patch]
    assert main(["import", path, "--out", out, *_flags(PASS), "--size", *map(str, size)]) == 0
    assert load_card(open_store(out))["origin"]["positions"]["interpolation"] == "bilinear"
    assert main(["evaluate", out, "--data", str(people)]) == 0
    assert "exported" in capsys.readouterr().out
    scores = json.loads(next((tmp_path / "out" / "evaluation").rglob("metrics.json")).read_text())
    assert scores["settings"]["size"] == size and 0 < scores["features"][scores["headline"]]["mAP"] <= 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("base.sie_embed", "camera or view embeddings"),
        ("b1.0.norm1.weight", "jigsaw branches"),
        ("register_tokens", "DINOv2 with registers"),
        ("blocks.0.gamma_1", "BEiT"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
    ],
)
def test_read__networks_of_another_kind_are_named(name: str, told: str, tmp_path: Path) -> None:
    state = backbone_state(SSL)
    content = files.fine_tuned(state) if name.startswith("b") and "blocks" not in name else state
    path = save({**content, name: torch.ones(6, 1, 4)}, tmp_path / "x.pth")
    with pytest.raises(DataError, match=told) as error:
        read_published(path, StorageConfig(), _stated(SSL))
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["a.pth", "a.PTH", "a.pt", "a.bin", "a.ckpt", "model_best.pth.tar", "model.pth.tar-60",
                                  "a.safetensors"])  # fmt: skip
def test_files_of_weights__are_told_by_their_endings(name: str) -> None:
    assert is_weights_file(name) and is_weights_file(f"s3://bucket/{name}")
    assert not is_weights_file(f"runs/{name}/checkpoints")
