"""Crops are removed from the data set while a run is stopped, and again while it is under way."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.config import RemoveConfig, StorageConfig
from datapipe.dataset.manifest import Manifest
from datapipe.maintain.remove import remove
from datapipe.sampling.epoch_order import Order
from tests.end_to_end.tiny import audited, recipe, shards
from training.config import recipe_toml as recipes
from training.core.host import LocalHost
from training.core.world import World
from training.report.report import write_report
from training.trainer.pretrain import Ending, pretrain

CROPS, BATCH, STEPS = 24, 6, 16


class Visited(LocalHost):
    """A host on which something happens after some step."""

    def __init__(self, step: int, happens: Callable[[], bool]) -> None:
        super().__init__()
        self.left, self.happens = step, happens

    def preempted(self) -> bool:
        self.left -= 1
        return self.left == 0 and self.happens()


def _take_out(data: Path, row: int) -> None:
    """The crop that is at this row of the newest version."""
    key = Manifest.load(str(data)).table(["key"])["key"][row].as_py()
    (data.parent / "keys").write_text(f"{key}\n")
    remove(str(data), RemoveConfig(keys=str(data.parent / "keys"), workers=1), StorageConfig())


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_removal__the_run_goes_on_in_the_same_order_and_names_what_it_reads(
    tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    write_crops(tmp_path / "crops", CROPS)
    data, run = tmp_path / "shards", tmp_path / "run"
    first = shards(tmp_path / "crops", str(data), each=9)
    path = recipe(tmp_path, str(data), str(run), epochs=STEPS * BATCH / CROPS)
    config = recipes.load(path, ["--stream.cache-mb", "0"])

    def train(host: Visited) -> Ending:
        return pretrain(config, world=World(), host=host)

    assert train(Visited(4, lambda: True)) == (4, False)
    _take_out(data, 3)
    second = Manifest.load(str(data))
    assert train(Visited(3, lambda: bool(_take_out(data, 20)))) == (STEPS, True)
    third = Manifest.load(str(data))

    order = Order(CROPS, config.seed, config.stream.block, config.stream.window)
    expected = order.samples(np.arange(STEPS * BATCH)).reshape(STEPS, BATCH).tolist()
    assert audited(run) == dict(enumerate(expected, 1))
    markers = {path.parent.name: json.loads(path.read_text()) for path in run.glob("checkpoints/*/checkpoint.json")}
    assert markers[max(markers)]["manifest"] == third.id
    assert json.loads((run / "environment.json").read_text())["manifest"]["id"] == third.id
    assert f"{third.file} is read from now on" in (run / "log.txt").read_text()
    assert set(third.replaces) == {first.id, second.id}

    write_report(str(run))
    before, pictures = _files(run), {"first_batch.jpg", "report.html"}
    (tmp_path / "key").write_text(third.table(["key"])["key"][7].as_py())
    done = remove(str(data), RemoveConfig(keys=f"{tmp_path}/key", runs=(str(run),), workers=1), StorageConfig())
    assert _files(run) == before - pictures and done.cleared.weights == [str(run)]
    assert {Path(address).name for address in done.cleared.deleted} == pictures
    assert not [name for name in _files(run) if Path(name).suffix in (".jpg", ".png", ".npz", ".html")]
    write_report(str(run))
    assert b"data:image/jpeg" not in (run / "report.html").read_bytes()
