"""`python -m training evaluate` on data and weights that are not what they should be: refused before any work."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datapipe.core.errors import ConfigError, DataError
from datapipe.storage import open_store
from tests.training.reid.people import crop, market
from training.__main__ import main
from training.nn.vision_transformer import BackboneConfig
from training.reid import embed
from training.weights.export import CARD, Provenance, export, unfilled

Evaluate = Callable[..., dict]


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """evaluate(data, *flags): the scores of a small ViT with random weights; `embedded` counts its forward passes."""
    folder = tmp_path / "export"
    torch.manual_seed(0)
    backbone = unfilled(BackboneConfig(arch="custom", size=(32, 16), patch=8, width=16, depth=1, heads=2), 0)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    export(backbone, open_store(str(folder)), Provenance(method="dino"))

    def run(data: Path, *flags: str) -> dict:
        assert main(["evaluate", str(folder), "--data", str(data), *flags]) == 0
        return json.loads(next((folder / "evaluation").rglob("metrics.json")).read_text())

    return run


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an image is embedded."""

    def features_of(*_: object) -> None:
        raise AssertionError("work has started")

    monkeypatch.setattr(embed, "features_of", features_of)


def test_evaluate__scores_by_every_way_that_is_asked_for(
    tmp_path: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(market(tmp_path / "people"), "--rerank", "--reranking.k1", "5", "--trapezoid")
    assert set(found["features"]) == {"cls", "cls re-ranked", "mean", "mean re-ranked"}
    assert found["features"]["cls"]["trapezoid_mAP"] < found["features"]["cls"]["mAP"]
    assert found["settings"]["reranking"]["k1"] == 5
    assert found["data"]["official"] == "" and found["data"]["counts"]["query"]["images"] == 18
    printed = capsys.readouterr().out
    assert "cls re-ranked" in printed and "trapezoid mAP" in printed and "mINP" in printed


@pytest.mark.slow
def test_evaluate__a_part_of_a_published_set_is_refused_or_marked(
    tmp_path: Path, evaluate: Evaluate, caplog: pytest.LogCaptureFixture
) -> None:
    data = market(tmp_path / "Market-1501-v15.09.15")
    with pytest.raises(DataError, match="this is not Market-1501 as it was published: query has 18 of 3,368 images"):
        evaluate(data)
    with caplog.at_level(logging.WARNING):
        found = evaluate(data, "--allow-partial")
    assert found["set"] == "market1501" and len(found["data"]["differences"]) == 3
    assert "gallery has 37 of 15,913 images and 7 of 751 identities" in caplog.text
    assert evaluate(data, "--data-name", "own")["data"]["differences"] == []


def test_evaluate__refuses_before_any_image_is_embedded(tmp_path: Path, evaluate: Evaluate, no_work: None) -> None:
    data = market(tmp_path / "people")
    with pytest.raises(DataError, match="this is not MSMT17 as it was published"):
        evaluate(data, "--data-name", "msmt17")
    with pytest.raises(ConfigError, match="no data set is called market"):
        evaluate(data, "--data-name", "market")
    train = data / "bounding_box_train" / "0101_c1s1_000000_00.jpg"
    train.write_bytes((data / "query" / "0001_c1s1_000000_00.jpg").read_bytes())
    with pytest.raises(DataError, match="1 images of query are also in train, byte for byte"):
        evaluate(data)
    train.rename(train.with_name("0001_c1s1_000000_00.jpg"))
    with pytest.raises(DataError, match="1 identities are both in train and in query or gallery: 1"):
        evaluate(data)


def test_evaluate__weights_of_another_width_are_refused(tmp_path: Path, evaluate: Evaluate, no_work: None) -> None:
    path = tmp_path / "export" / CARD
    card = json.loads(path.read_text())
    card["backbone"]["width"] = 32
    path.write_text(json.dumps(card))
    with pytest.raises(DataError, match=r"the weights do not fit .* of another shape: .* \(16,\) for \(32,\)"):
        evaluate(market(tmp_path / "people"))


def test_evaluate__features_with_nan_are_refused(tmp_path: Path, evaluate: Evaluate) -> None:
    data = market(tmp_path / "people")
    store = open_store(str(tmp_path / "export"))
    backbone = unfilled(BackboneConfig(arch="custom", size=(32, 16), patch=8, width=16, depth=1, heads=2), 0)
    for parameter in backbone.parameters():
        torch.nn.init.constant_(parameter, np.nan)
    export(backbone, store, Provenance(method="dino"))
    with pytest.raises(DataError, match="18 of 18 query features are not finite"):
        evaluate(data)


def test_evaluate__training_images_that_leak_are_kept_in_mind(tmp_path: Path, evaluate: Evaluate) -> None:
    data = market(tmp_path / "people")
    (data / "bounding_box_test" / "0003_c1s1_000077_00.jpg").write_bytes(crop(102, 1, 0))
    (warning,) = evaluate(data, "--allow-partial")["data"]["warnings"]
    assert "1 images of gallery are also in train" in warning
