"""Scores of shards by two networks, the sorted list, what it notes, and how far the note is carried."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from datapipe.__main__ import main as data
from datapipe.core.config import RemoveConfig, ReshardConfig, SelectConfig, StorageConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.core.parallel import Workers
from datapipe.dataset.manifest import Manifest
from datapipe.maintain.remove import remove
from datapipe.maintain.reshard import reshard
from datapipe.maintain.select import select
from datapipe.storage import open_store
from tests.end_to_end.tiny import generated, recipe
from training.__main__ import main
from training.evaluation import forgetting, image_pieces
from training.evaluation.forgetting import METADATA, ForgettingRequest, forgetting_scores, score_piece
from training.nn.vision_transformer import BackboneConfig
from training.reid.embed import EmbedConfig, embed
from training.weights.export import Provenance, export, load_backbone, unfilled

STORAGE = StorageConfig()
NOTE = ("selected with labelled data: by catastrophic forgetting scores of a network fine-tuned on market1501; what is "
        "trained on it is not self-supervised alone")  # fmt: skip


def network(folder: Path, name: str, seed: int, *, width: int = 16, origin: dict[str, Any] | None = None) -> str:
    """An export of a tiny ViT."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = unfilled(BackboneConfig(arch="custom", size=(32, 16), patch=8, width=width, depth=1, heads=2), 0)
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    export(backbone, open_store(str(folder / name)), Provenance(method="dino", origin=origin or {}))
    return str(folder / name)


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ForgettingRequest:
    """Two networks and 18 crops in shards of 17, in pieces of four."""
    monkeypatch.setattr(image_pieces, "PIECE_IMAGES", 4)
    source, target = network(tmp_path, "source", 0), network(tmp_path, "target", 1)
    return ForgettingRequest(source=source, target=target, data=generated(tmp_path), storage=STORAGE, batch=4)


def scored(request: ForgettingRequest, out: Path, work: Any = score_piece) -> pyarrow.Table:
    plan = forgetting.plan(request, str(out), tuned_on="market1501")
    assert plan is not None
    assert forgetting.carry_out(plan, Workers(1), work, "cpu") == (18, (NOTE,))
    return pyarrow.parquet.read_table(out / "scores.cfs.parquet")


def test_scores__are_cosines_of_what_both_networks_see_best_first(request_: ForgettingRequest, tmp_path: Path) -> None:
    table = scored(request_, tmp_path / "out")
    index = Manifest.load(request_.data).table(["key", "name"])
    crops = tmp_path / "in"
    names = index["name"].to_pylist()
    seen = [
        embed(load_backbone(weights), names, lambda name: (crops / name).read_bytes(), size=(32, 16),
              config=EmbedConfig(mean=mean, std=std))["cls"]
        for weights, mean, std in (
            (request_.source, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (request_.target, (0.5,) * 3, (0.5,) * 3)
        )
    ]  # fmt: skip
    expected = dict(zip(index["key"].to_pylist(), forgetting_scores(*seen), strict=True))
    ours = table["score"].to_numpy()
    assert ours == pytest.approx([expected[key] for key in table["key"].to_pylist()], abs=1e-5)
    assert (np.diff(ours) <= 0).all() and len(set(table["name"].to_pylist())) == 18
    assert (tmp_path / "out" / "names.txt").read_text().splitlines() == table["name"].to_pylist()
    said = json.loads(table.schema.metadata[METADATA])
    assert said["source"]["mean"] == [0.485, 0.456, 0.406] and said["target"]["std"] == [0.5] * 3
    assert (said["tuned_on"], said["feature"], said["source"]["size"]) == ("market1501", "cls", [32, 16])
    assert said["data"]["manifest"] == Manifest.load(request_.data).id
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "names.txt", "names.txt.notes.json", "scores.cfs.parquet"
    ]  # fmt: skip


def test_scores__interrupted_go_on_with_the_pieces_that_are_missing(
    request_: ForgettingRequest, tmp_path: Path
) -> None:
    done: list[int] = []

    def interrupted(task: Any, device: Any) -> int:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.piece.number)
        return score_piece(task, device)

    with pytest.raises(KeyboardInterrupt):
        scored(request_, tmp_path / "out", interrupted)
    assert not (tmp_path / "out" / "scores.cfs.parquet").exists() and not (tmp_path / "out" / "names.txt").exists()
    again: list[int] = []
    table = scored(request_, tmp_path / "out", lambda task, device: again.append(task.piece.number) or
                   score_piece(task, device))  # fmt: skip
    assert sorted(done + again) == list(range(6)) and table.equals(scored(request_, tmp_path / "anew"))
    assert forgetting.plan(request_, str(tmp_path / "out"), tuned_on="market1501") is None
    with pytest.raises(DataError, match="other scores are already there"):
        forgetting.plan(request_, str(tmp_path / "out"), tuned_on="msmt17")


def test_plan__refuses_what_cannot_be_compared_before_any_work(request_: ForgettingRequest, tmp_path: Path) -> None:
    other = replace(request_, target=network(tmp_path, "wide", 2, width=32), data="/nowhere")
    with pytest.raises(ConfigError, match="of different architectures: width 16 and 32"):
        forgetting.plan(other, str(tmp_path / "out"), tuned_on="market1501")
    with pytest.raises(ConfigError, match="nothing says which labelled data the target was fine-tuned on"):
        forgetting.plan(request_, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"no feature cls\+parts"):
        forgetting.plan(replace(request_, feature="cls+parts"), str(tmp_path / "out"), tuned_on="market1501")
    assert not (tmp_path / "out").exists()


def test_scores__that_are_no_numbers_are_refused(request_: ForgettingRequest, tmp_path: Path) -> None:
    zero = np.zeros((1, 4), np.float32)
    assert np.isnan(forgetting_scores(zero, zero + 1)).all()
    backbone = load_backbone(request_.target)
    for parameter in backbone.parameters():
        torch.nn.init.constant_(parameter, np.nan)
    export(backbone, open_store(request_.target), Provenance(method="dino"))
    with pytest.raises(DataError, match="4 of 4 scores are not finite, of the crops [0-9a-f]{32}, "):
        scored(request_, tmp_path / "out")


@pytest.mark.parametrize("name", ["scores.cfs.parquet", "names.txt"])
def test_list__selects_the_first_part_and_the_note_goes_with_it(
    request_: ForgettingRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    first = Manifest.load(request_.data)
    names = scored(request_, tmp_path / "out")["name"].to_pylist()
    assert data(["select", request_.data, "--names", str(tmp_path / "out" / name), "--keep", "0.6"]) == 0
    assert f"note: {NOTE}" in capsys.readouterr().out
    chosen = Manifest.load(request_.data)
    assert chosen.notes == (NOTE,) and not first.notes
    assert sorted(chosen.table(["name"])["name"].to_pylist()) == sorted(names[: round(0.6 * 18)])
    tall = select(f"{request_.data}/{chosen.file}", SelectConfig(where="height >= 1"), STORAGE).manifest
    whole = select(request_.data, SelectConfig(where="height >= 1"), STORAGE).manifest
    assert tall.notes == (NOTE,) and not whole.notes  # of the selection, and of all crops
    cut = reshard([f"{request_.data}/{chosen.file}"], str(tmp_path / "cut"), ReshardConfig(workers=1), STORAGE).manifest
    assert cut.notes == (NOTE,) and Manifest.load(cut.url).notes == (NOTE,)
    assert data(["stats", cut.url]) == 0 and f"note: {NOTE}" in capsys.readouterr().out


def test_list__loses_removed_crops(request_: ForgettingRequest, tmp_path: Path) -> None:
    table = scored(request_, tmp_path / "out")
    (tmp_path / "list").write_text(f"{table['name'][0].as_py()}\n")
    config = RemoveConfig(names=f"{tmp_path}/list", runs=(f"{tmp_path}/out",), workers=1)
    cleared = remove(request_.data, config, STORAGE).cleared
    assert pyarrow.parquet.read_table(tmp_path / "out" / "scores.cfs.parquet").equals(table.slice(1))
    assert cleared.remaining == [f"{tmp_path}/out/names.txt: line 1 names a removed crop"]


@pytest.mark.slow
def test_note__reaches_the_run_and_the_card_of_what_is_trained_on_it(
    request_: ForgettingRequest, tmp_path: Path
) -> None:
    scored(request_, tmp_path / "out")
    chosen = select(request_.data, SelectConfig(names=f"{tmp_path}/out/scores.cfs.parquet", keep=0.6), STORAGE).manifest
    run = tmp_path / "run"
    assert main(["pretrain", str(recipe(tmp_path, f"{chosen.url}/{chosen.file}", str(run)))]) == 0
    assert json.loads((run / "environment.json").read_text())["manifest"]["notes"] == [NOTE]
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    assert json.loads((tmp_path / "export" / "card.json").read_text())["notes"] == [NOTE]
    assert main(["report", str(run)]) == 0
    assert NOTE in (run / "report.html").read_text()
