"""A run that starts from published weights: what it begins with, what it says of them, what it passes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datapipe.core.errors import NotFoundError
from tests.end_to_end.tiny import recipe, shards
from tests.training.weights.published_files import save, training_checkpoint
from training.__main__ import main
from training.config import recipe_toml as recipes
from training.config.build import build_method, initial_method
from training.nn.vision_transformer import VisionTransformer
from training.weights.export import load_backbone

Write = Callable[..., dict[str, bytes]]


@pytest.mark.slow
def test_continue__from_a_training_checkpoint(
    tmp_path: Path, write_crops: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_crops(tmp_path / "crops", 20)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    run = tmp_path / "run"
    path = str(recipe(tmp_path, data.url, str(run)))
    backbone = VisionTransformer(recipes.load(path).backbone)
    weights = save(training_checkpoint(backbone.state_dict(), {}), tmp_path / "published.pth")
    init = ["--init.weights", weights]

    with pytest.raises(NotFoundError, match="no weights to start from"):
        main(["pretrain", path, "--init.weights", weights + ".gone"])
    assert main(["pretrain", path, *init]) == 0
    assert "starts from published.pth (dino_checkpoint, sha256 " in capsys.readouterr().out
    assert main(["pretrain", str(run / "config.toml")]) == 0, "its own recipe goes on with it"
    assert "done before" in capsys.readouterr().out

    marker = json.loads(max(run.glob("checkpoints/step_*/checkpoint.json")).read_text())
    assert marker["origin"]["file"] == "published.pth" and "part_token1" in marker["origin"]["fresh"]
    assert main(["export", str(run)]) == 0
    card = json.loads((run / "exports" / "card.json").read_text())
    assert card["origin"] == marker["origin"]

    config = recipes.load(path, init)
    start, _ = initial_method(config)
    end, random = load_backbone(str(run / "exports")).state_dict(), build_method(config).backbone().state_dict()
    begun = start.backbone().state_dict()
    key = "blocks.1.mlp.fc1.weight"
    assert torch.equal(begun[key], backbone.state_dict()[key])
    assert 0 < (end[key] - begun[key]).abs().max() < 0.1 * (end[key] - random[key]).abs().max()
