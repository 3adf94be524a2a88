"""A run whose disk is full on a Ray cluster: restarts end, a clear error is said, and it goes on once there is room."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from datapipe.storage import open_store
from tests.chaos import chaos, poison
from tests.chaos.judge import wrong_samples
from tests.chaos.kinds import BATCH, slow_worker
from tests.chaos.scene import Scene, machines
from tests.end_to_end.tiny import generated, recipe
from tests.support.ranks import run_ranks
from training.checkpoint import Reader, name_of

STEPS, KEPT, POISONED = 160, 120, 150
"""Steps of the run on a small disk, after which of them a checkpoint stays, and which one meets a NaN twice."""
DISK_KB = 1_330
"""Two checkpoints of the tiny model and what else is in a run folder, but not a third one."""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """A file system of DISK_KB at `folder`, as long as the context lasts; yields what makes it large."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KB}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)  # type: ignore
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_disk__a_full_one_ends_a_run_that_goes_on_once_there_is_room(tmp_path: Path) -> None:
    """Restarts do not help, so they end with a clear error. Then a straggler, and a NaN that comes again."""
    path = recipe(tmp_path, generated(tmp_path, chaos.CROPS), "unused", epochs=STEPS * BATCH / chaos.CROPS)
    kept = ("--checkpoints.keep-every-steps", str(KEPT))
    run_ranks(2, chaos.reference, str(path), str(tmp_path / "undisturbed"), "plain", *kept)
    run = tmp_path / "disk" / "run"
    with small_disk(run.parent) as grow, machines(2) as cluster:
        scene = Scene(cluster, tmp_path, path, str(run), flags=(*chaos.flags("plain"), *kept,
                      "--cluster.max-failures", "1", "--cluster.lease-s", "20"), random=Random(0))  # fmt: skip
        scene.start()
        code, output, errors = scene.run.end()
        assert code == 1 and "Traceback" not in errors, output + errors
        assert "the workers failed 2 times in a row without a new checkpoint" in errors
        assert "No space left on device" in errors and "goes on from the last checkpoint" in errors
        assert [restart["gave_up"] for restart in scene.restarts()] == [False, True]

        grow()
        poison.write(scene.poison, BATCH * (POISONED - 1), 2)
        scene.start()
        slow_worker(scene)
        code, output, errors = scene.run.end()
        assert code == 0, output + errors
        actions = [(record["step"], record["action"]) for record in scene.lines("faults/steps.jsonl")]
        assert actions == [(POISONED, "rewound"), (POISONED, "skipped")]
        assert set(wrong_samples(run, chaos.CROPS, STEPS)) == {POISONED}
        after, before = (Reader(open_store(str(where / "checkpoints")), name_of(KEPT))
                         for where in (run, tmp_path / "undisturbed"))  # fmt: skip
        assert before.marker.tensors
        assert all(torch.equal(before.whole(key), after.whole(key)) for key in before.marker.tensors)
