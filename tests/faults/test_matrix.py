"""Runs on a Ray cluster with one fault of each kind: nothing tells afterwards that there were any."""

from pathlib import Path
from random import Random

import pytest

from tests.faults import chaos
from tests.faults.judge import fetch, other_weights, wrong_samples
from tests.faults.kinds import BATCH, Moment, inflict
from tests.faults.scene import BUCKET, Scene, machines, object_store
from tests.flow.tiny import generated, recipe
from tests.ranks import run_ranks

SEED = 7
FAULTS: tuple[tuple[str, Moment], ...] = (
    ("worker killed", "before the first save"),
    ("NaN once", "between saves"),
    ("checkpoint bit-flipped", "in a save"),
    ("storage errors in a save", "in a save"),
    ("machine killed", "before the marker"),
    ("S3 server killed", "in a save"),
    ("worker hangs", "between saves"),
    ("driver killed", "before the marker"),
)
STEPS = chaos.STEPS_PER_FAULT * (len(FAULTS) + 1)
REPLACED_S = chaos.HANG_S + 10
"""Within which a worker that stands still is found out, on a busy machine."""


@pytest.mark.slow
def test_matrix__one_fault_of_each_kind_changes_nothing(tmp_path: Path) -> None:
    path = recipe(tmp_path, generated(tmp_path, chaos.CROPS), "unused", epochs=STEPS * BATCH / chaos.CROPS)
    run_ranks(2, chaos.reference, str(path), str(tmp_path / "undisturbed"), "deepspeed")
    with object_store(tmp_path / "s3") as objects, machines(2) as cluster:
        scene = Scene(cluster, tmp_path, path, f"s3://{BUCKET}/run", objects=objects, flags=chaos.flags("deepspeed"),
                      random=Random(SEED))  # fmt: skip
        scene.start()
        events = {name: inflict(scene, name, moment) for name, moment in FAULTS}
        code, output, errors = scene.run.end()
        assert code == 0, output + errors
        run = fetch(scene, tmp_path / "run")

    assert events["worker killed"].attempt[0]["resumed_from"] is None
    damaged = events["checkpoint bit-flipped"]
    assert damaged.attempt[0]["resumed_from"] < damaged.note.partition("/")[0]
    assert events["worker hangs"].stages["detected"] < REPLACED_S
    assert objects.proxy.met.total() > objects.proxy.met[""]
    assert wrong_samples(run, chaos.CROPS, STEPS) == {}
    assert other_weights(run, tmp_path / "undisturbed") == []
