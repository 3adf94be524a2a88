"""A rank that has met no gap itself goes over to the version of the data set that another rank reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datapipe.core.config import RemoveConfig, StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.maintain.remove import remove
from datapipe.sampling.epoch_order import Order
from datapipe.storage import open_store
from datapipe.stream.batch import Batch, LoaderCounters
from datapipe.stream.loader import Loader
from datapipe.stream.training_data import load_data
from tests.bench.specs import one_view
from tests.end_to_end.tiny import shards
from tests.training.checkpoint.toy import ABOUT, make_checkpoints
from training.core.host import lines_to
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.methods.base import TrainingProgress
from training.trainer.dataset_renewal import DatasetRenewal
from training.trainer.monitoring.observer import StepDone
from training.trainer.monitoring.throughput import SpentByRank, TimeSpent

CROPS = 12
NOT_SEEN: Any = None


@pytest.mark.parametrize("rank", [0, 1])
def test_renewal__a_rank_follows_another(
    rank: int, tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    write_crops(tmp_path / "crops", CROPS)
    url = str(tmp_path / "shards")
    shards(tmp_path / "crops", url, each=6)
    config = StreamConfig(manifest=url, cache_mb=0)
    data = load_data(config, StorageConfig())
    key = data.sets[0].table(["key"])["key"][1].as_py()
    folder, said = RunFolder(str(tmp_path / "run"), StorageConfig()), list[str]()
    checkpoints = make_checkpoints(open_store(str(tmp_path / "run" / "checkpoints")), about={"manifest": data.id})
    stream = data.stream(StorageConfig(), config)
    order = Order(CROPS, 0, config.block, config.window)
    world = World(rank=rank)
    with Loader(stream, order, one_view(), seed=0, global_batch=4, rank=0, world=1, micro_batch=4,
                config=config) as loader, lines_to(said.append):  # fmt: skip
        renewal = DatasetRenewal(loader, data, checkpoints, folder, world)
        batch: Batch = next(loader.after(0, CROPS))

        def step(renewed: int) -> str:
            spent = [TimeSpent(0.0, loader.intake), TimeSpent(0.0, LoaderCounters(renewed=renewed))]
            told = SpentByRank.of(spent)
            renewal.step(StepDone(TrainingProgress(0, 0, 0, 0.0, 1, 1.0, 0), NOT_SEEN, batch, NOT_SEEN, told))
            return str(checkpoints.about["manifest"])

        assert step(0) == data.id and step(1) == data.id  # there is no other version
        renewal = DatasetRenewal(loader, data, checkpoints, folder, world)
        (tmp_path / "keys").write_text(f"{key}\n")
        remove(url, RemoveConfig(keys=str(tmp_path / "keys"), workers=1), StorageConfig())
        assert step(0) == data.id
        newer = Manifest.load(url)
        assert step(1) == newer.id and checkpoints.replaces == newer.replaces and stream.manifests[0].id == newer.id
        assert step(1) == newer.id and loader.intake.renewed == 1
    assert len(said) == (rank == 0) and ABOUT["manifest"] != newer.id
    assert (folder.read_text("environment.json") is not None) == (rank == 0)
