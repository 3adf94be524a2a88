"""Cells of a grid: what begins with what, by which recipe, and what is remembered of weights."""

from dataclasses import replace
from pathlib import Path

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.storage import open_store
from tests.training.commands.test_reproduce import weights
from training.grid.cells import GridData
from training.grid.planning import GridRequest, Planner, WeightsList
from training.grid.request import GridTask, NamedAddress, read_tasks
from training.reid.settings import ScoringConfig
from training.weights import export as exports
from training.weights.export import Provenance
from training.weights.published import Stated, read_published

MARKET, MSMT = (
    GridData(name, f"/data/{name}", name, "", ScoringConfig(), "", True) for name in ("market1501", "msmt17")
)
WHOLE = GridData("occluded_reid", "/data/occluded", "occluded_reid", "", ScoringConfig(), "", False)


def request(folder: Path, tasks: str, *, parts: int = 3) -> GridRequest:
    (folder / "files").mkdir(exist_ok=True)
    file = NamedAddress("pass", weights(folder / "files", parts=parts))
    return GridRequest((file,), (), read_tasks(tasks), str(folder / "grid"))


def planned(asked: GridRequest, *sets: GridData) -> dict[str, tuple[str, str, str]]:
    """Cell -> (its recipe's method and fusion, the cell it begins with, the end of where it starts)."""
    (one,) = WeightsList(asked).all()
    cells, _ = Planner(asked, sets).cells(one)
    prefix = "cells/pass/"
    told = {}
    for cell in cells:
        method = cell.config.method if cell.config else None
        how = f"{method.name} {getattr(method, 'fusion', '')}" if method else ""
        told[cell.folder.removeprefix(prefix)] = (
            how,
            cell.source.removeprefix(prefix),
            cell.start.partition(prefix)[2],
        )
    return told


def test_cells__adaptation_begins_with_a_source_of_the_fusion_that_it_wants(tmp_path: Path) -> None:
    """As the scripts of PASS: from MSMT17 to Market-1501 [CLS ; mean P], the other way (CLS + mean P) / 2, each with a
    source fine-tuned so; one that somebody asks for anyway is trained once."""
    tasks = "supervised,uda:msmt17,transfer:msmt17,uda:market1501,transfer:market1501"
    cells = planned(request(tmp_path, tasks), MARKET, MSMT)
    mean = "market1501/supervised-fusion-mean"
    assert cells == {
        "market1501/supervised": ("supervised cat", "", ""),
        "msmt17/supervised": ("supervised cat", "", ""),
        "market1501/uda-from-msmt17": ("cluster_contrast cat", "msmt17/supervised", "msmt17/supervised/exports/last"),
        "market1501/transfer-from-msmt17": ("", "msmt17/supervised", "msmt17/supervised/exports/last"),
        mean: ("supervised mean", "", ""),
        "msmt17/uda-from-market1501": ("cluster_contrast mean", mean, f"{mean}/exports/last"),
        "msmt17/transfer-from-market1501": ("", mean, f"{mean}/exports/last"),
    }  # fmt: skip


def test_cells__one_source_serves_all_where_there_are_no_parts(tmp_path: Path) -> None:
    cells = planned(request(tmp_path, "uda:market1501,transfer:market1501", parts=0), MARKET, MSMT, WHOLE)
    assert [name for name in cells if name.startswith("market1501/")] == ["market1501/supervised"]
    assert cells["occluded_reid/transfer-from-market1501"][1] == "market1501/supervised"
    assert "occluded_reid/uda-from-market1501" not in cells  # it has no images to train on


def test_recipes__suit_weights_and_target(tmp_path: Path) -> None:
    asked = request(tmp_path, "supervised,usl,uda:market1501")
    (one,) = WeightsList(asked).all()
    cells, left_out = Planner(asked, [MARKET, MSMT]).cells(one)
    necks = {cell.folder.rpartition("pass/")[2]: cell.config.method.neck for cell in cells if cell.config}  # type: ignore[union-attr]
    assert necks["msmt17/usl"] == "one" and necks["msmt17/uda-from-market1501"] == "each"
    assert [(out.what, out.why) for out in left_out] == [("uda:market1501 of pass on market1501", "it is the source")]
    again = replace(asked, tasks=(GridTask("usl"),), flags=(("usl", ("--method.iterations", "7")),))
    cells, _ = Planner(again, [MARKET]).cells(one)
    assert cells[0].config is not None and cells[0].config.method.iterations == 7  # type: ignore[union-attr]


def test_weights__are_remembered_and_others_are_refused(tmp_path: Path) -> None:
    """An export that holds other weights than when the grid began is not mixed in."""
    asked = request(tmp_path, "zero-shot")
    folder = tmp_path / "standin" / "exports" / "last"

    def export(parts: int) -> None:
        published = read_published(weights(tmp_path / "files", parts=parts), StorageConfig(), Stated())
        exports.export(published.backbone, open_store(str(folder)), Provenance())

    export(3)
    asked = replace(asked, weights=(NamedAddress("", str(folder)),))
    (first,) = WeightsList(asked).all()
    assert first.name == "standin" and first.start == str(folder) and WeightsList(asked).all() == [first]
    export(0)
    with pytest.raises(DataError, match="standin holds other weights than when this grid began"):
        WeightsList(asked).all()
