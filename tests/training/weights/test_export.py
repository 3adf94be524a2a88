import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from datapipe.core.errors import DataError
from datapipe.storage import open_store
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.weights import export
from training.weights.counted_keys import load_counted

CONFIG = BackboneConfig(arch="custom", size=(32, 16), patch=8, width=24, depth=2, heads=3, mlp_ratio=2.0)


def scrambled(config: BackboneConfig = CONFIG, parts: int = 0) -> VisionTransformer:
    torch.manual_seed(0)
    backbone = VisionTransformer(config, parts=parts)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


@pytest.mark.parametrize(("config", "parts"), [
    (CONFIG, 0), (CONFIG, 3), (CONFIG, 1), (BackboneConfig(arch="vit_tiny", size=(48, 16)), 2),
])  # fmt: skip
def test_export__timm_loads_it_and_says_the_same(config: BackboneConfig, parts: int, tmp_path: Path) -> None:
    backbone = scrambled(config, parts)
    card = export.export(backbone, open_store(str(tmp_path)), export.Provenance(licence="research only"))
    assert json.loads((tmp_path / "card.json").read_text()) == json.loads(json.dumps(card))
    model: Any = timm.create_model(**card["timm"]).eval()
    report = model.load_state_dict(load_file(tmp_path / "backbone.safetensors"))
    assert not report.missing_keys and not report.unexpected_keys
    images = torch.randn(2, 3, *config.size)
    with torch.no_grad():
        theirs, ours = model.forward_features(images), backbone.features(images)
        torch.testing.assert_close(theirs[:, 0], ours.cls, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs[:, 1 : 1 + parts], ours.parts, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs[:, 1 + parts :], ours.patches, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(images), ours.cls, rtol=1e-4, atol=1e-5)


def test_export__the_printed_call_builds_the_same_model(tmp_path: Path) -> None:
    card = export.export(scrambled(parts=3), open_store(str(tmp_path)), export.Provenance())
    model = eval(export.create_model_call(card), {"timm": timm})
    model.load_state_dict(load_file(tmp_path / "backbone.safetensors"))


@pytest.mark.parametrize("parts", [0, 2])
def test_load_backbone__bit_for_bit(parts: int, tmp_path: Path) -> None:
    backbone = scrambled(parts=parts)
    provenance = export.Provenance(method="pass", manifest="abc", licence="research only", recipe={"a": 1}, step=7)
    export.export(backbone, open_store(str(tmp_path)), provenance)
    again = export.load_backbone(str(tmp_path))
    assert again.config == backbone.config and again.parts == parts and not again.training
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    card = export.load_card(open_store(str(tmp_path)))
    assert (card["manifest"], card["licence"], card["recipe"], card["step"]) == ("abc", "research only", {"a": 1}, 7)
    assert torch.__version__.startswith(card["versions"]["torch"])
    assert card["input"]["size"] == [32, 16] and len(card["input"]["mean"]) == 3


def test_export__float64_is_stored_as_float32(tmp_path: Path) -> None:
    export.export(scrambled().double(), open_store(str(tmp_path)), export.Provenance())
    assert export.load_backbone(str(tmp_path)).cls_token.dtype == torch.float32


def test_load_backbone__damage_is_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    export.export(scrambled(), store, export.Provenance())
    good = store.read("card.json")
    store.replace("card.json", b"{")
    with pytest.raises(DataError, match="not JSON"):
        export.load_backbone(store)
    store.replace("card.json", b'{"format": 1}')
    with pytest.raises(DataError, match="lacks.*backbone"):
        export.load_backbone(store)
    unknown = json.loads(good)
    unknown["backbone"]["wings"] = 2
    store.replace("card.json", json.dumps(unknown).encode())
    with pytest.raises(DataError, match="wings"):
        export.load_backbone(store)
    store.replace("card.json", good)
    store.replace("backbone.safetensors", store.read("backbone.safetensors")[:-4])
    with pytest.raises(DataError, match="not those the card describes"):
        export.load_backbone(store)


def test_load_counted__names_what_does_not_fit() -> None:
    backbone = scrambled()
    state = backbone.state_dict()
    assert load_counted(backbone, state) == len(state)
    wrong = {**state, "head.weight": torch.zeros(1), "norm.bias": torch.zeros(5)}
    del wrong["cls_token"]
    with pytest.raises(DataError) as error:
        load_counted(backbone, wrong)
    for told in ("missing: cls_token", "left over: head.weight", "norm.bias (5,) for (24,)"):
        assert told in str(error.value)
    extra = {**state, "head.weight": torch.zeros(1)}
    assert load_counted(backbone, extra, leave_out=["head.weight"]) == len(state)
    with pytest.raises(DataError, match="absent: fc.weight"):
        load_counted(backbone, state, leave_out=["fc.weight"])


def test_load_backbone__is_where_a_card_says_it_is() -> None:
    names = [name for text in export.LOADING.values() for name in re.findall(r"training\.[\w.]+", text)]
    assert len(names) == 2
    for name in names:
        module, _, function = name.rpartition(".")
        assert getattr(importlib.import_module(module), function) is export.load_backbone
