"""Every crop exactly once per epoch, whoever is killed and however many ranks go on: by what reached `forward`."""

import json
import os
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessExitedException

from datapipe.core.config import StorageConfig
from tests.end_to_end.tiny import recipe, seen_in_forward, shards
from tests.support.ranks import run_ranks
from training.config import recipe_toml as recipes
from training.core.host import LocalHost
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.report.run_files import RunFiles
from training.trainer.pretrain import pretrain

CROPS, BATCH, STEPS = 26, 7, 10
"""Two epochs of 26 and a bit; the batch divides neither the epoch nor by any world but one."""


class Doomed(LocalHost):
    """A host that loses one of its ranks, without warning, before its n-th question after a step; 0: never."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def preempted(self) -> bool:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def _rank(world: World, path: str, out: str, at: int) -> None:
    flags = ["--out", out, "--optimisation.batch", str(BATCH), "--stream.threads", str(world.size)]
    pretrain(recipes.load(path, flags), world=world, host=Doomed(at if world.rank == world.size - 1 else 0))


def _members(folder: Path) -> list[bytes]:
    """All crops of the data set, sample id by sample id: the members of the tars, as the manifest lists these."""
    (manifest,) = folder.glob("manifest-v*.json")
    found = []
    for shard in json.loads(manifest.read_text())["shards"]:
        with tarfile.open(folder / shard["name"]) as tar:
            found += [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
    return found


@pytest.mark.slow
def test_audit__every_crop_once_per_epoch_over_kills_and_changes_of_world(
    tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    crops = write_crops(tmp_path / "crops", CROPS)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"), each=9)
    members = _members(tmp_path / "shards")
    assert sorted(members) == sorted(crops.values())

    path, run = str(recipe(tmp_path, data.url, "unused", epochs=(STEPS * BATCH + 0.5) / CROPS)), tmp_path / "run"
    for world, killed_after in ((2, 5), (3, 4)):  # saved after 3 steps; after 6
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            run_ranks(world, _rank, path, str(run), killed_after)
    run_ranks(1, _rank, path, str(run), 0)

    seen = seen_in_forward(run)
    assert sorted(seen) == list(range(1, STEPS + 1))
    for step, pairs in seen.items():
        assert sorted(position for position, _ in pairs) == list(range((step - 1) * BATCH, step * BATCH))
    by_position = dict(pair for pairs in seen.values() for pair in pairs)
    for epoch in range(STEPS * BATCH // CROPS):
        times = Counter(members[by_position[place]] for place in range(epoch * CROPS, (epoch + 1) * CROPS))
        assert times == Counter(crops.values())

    worlds = [json.loads(line)["world"] for line in (run / "ranks" / "audit_00.jsonl").read_text().splitlines()]
    assert set(worlds) == {1, 2, 3} and len(worlds) > STEPS  # all took part, and some steps were made again
    attempts = RunFiles(RunFolder(str(run), StorageConfig())).attempts
    assert [attempt.header["world"] for attempt in attempts] == [2, 3, 1]
    for attempt in attempts[:2]:  # a rank's figures arrive a step late, those of all ranks together
        assert attempt.records[-1]["bytes_fetched"] >= sum(map(len, crops.values()))
        assert attempt.records[-1]["bottleneck"] in ("training", "reading", "views")
