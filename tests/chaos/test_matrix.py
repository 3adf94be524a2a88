"""A run on a Ray cluster with a fault of each kind, in `make soak` after a storm: nothing tells afterwards.
What needs no object store is in `test_disk.py`: a full disk, a straggler, a NaN that comes again."""

from operator import itemgetter
from pathlib import Path
from random import Random

import pytest

from tests.chaos import chaos
from tests.chaos.judge import fetch, other_weights, wrong_samples
from tests.chaos.kinds import BATCH, KINDS, Event, Moment, arm_first_save, inflict, storm
from tests.chaos.scene import BUCKET, CLEANER, Scene, machines, object_store
from tests.end_to_end.tiny import generated, recipe
from tests.support.ranks import run_ranks

SEED = 7
Faults = tuple[tuple[str, Moment, str], ...]
FAULTS: Faults = (
    ("worker killed", "before the first save", ""),
    ("NaN once", "in a save", ""),
    ("checkpoint bit-flipped", "in a save", ""),
    ("storage errors in a save", "in a save", ""),
    ("machine killed", "before the marker", "storage errors in a load"),
    ("S3 server killed", "in a save", ""),
    ("controller killed", "in a save", "slow storage in a load"),
    ("checkpoint truncated", "before the marker", ""),
    ("worker hangs", "between saves", ""),
    ("slow storage in a save", "in a save", ""),
    ("driver killed", "before the marker", ""),
)
"""What happens, when, and what the storage does while the run recovers from it: each recovery takes long."""
OFTEN: Faults = tuple(fault for fault in FAULTS if fault[0] in (
    "worker killed", "NaN once", "checkpoint bit-flipped", "machine killed", "controller killed",
    "driver killed"))  # fmt: skip
"""Those that `make test` inflicts: the death of each process, a NaN, a damaged file; `make soak` inflicts all. The NaN
is also what sees to it that there is a whole checkpoint to be damaged next."""
MOST_FAILURES = 2
"""That the storm exceeds."""
ELSEWHERE = {"straggler"}


@pytest.mark.slow
def test_matrix__each_death_changes_nothing(tmp_path: Path) -> None:
    go_through(tmp_path, OFTEN, stormy=False)


@pytest.mark.soak
def test_matrix__a_storm_and_one_fault_of_each_kind_change_nothing(tmp_path: Path) -> None:
    assert {*map(itemgetter(0), FAULTS), *map(itemgetter(2), FAULTS)} - {""} == {*KINDS} - ELSEWHERE
    events = go_through(tmp_path, FAULTS, stormy=True)
    assert events["worker hangs"].stages["detected"] < chaos.HANG_S  # by its silence


def go_through(tmp_path: Path, faults: Faults, stormy: bool) -> dict[str, Event]:
    """A run with these faults, compared with one that had none. A storm ends its first command and is no part of it."""
    steps = chaos.STEPS_PER_FAULT * (len(faults) + 1)
    path = recipe(tmp_path, generated(tmp_path, chaos.CROPS), "unused", epochs=steps * BATCH / chaos.CROPS)
    run_ranks(2, chaos.reference, str(path), str(tmp_path / "undisturbed"), "deepspeed")
    with object_store(tmp_path / "s3") as objects, machines(2) as cluster:
        scene = Scene(cluster, tmp_path, path, f"s3://{BUCKET}/run", objects=objects, flags=chaos.flags("deepspeed"),
                      random=Random(SEED))  # fmt: skip
        if stormy:
            give_up(scene)
        arm_first_save(scene)
        scene.start()
        events = {name: inflict(scene, name, moment, load) for name, moment, load in faults}
        assert scene.groups() == 1 and not scene.on_head(CLEANER)  # a dead controller's room was given back
        code, output, errors = scene.run.end()
        assert code == 0, output + errors
        run = fetch(scene, tmp_path / "run")

    assert events["worker killed"].attempt[0]["resumed_from"] is None
    for damaged in (event for name, event in events.items() if name.startswith("checkpoint ")):
        assert damaged.attempt[0]["resumed_from"] < damaged.note.partition("/")[0]
    assert objects.proxy.met.total() > objects.proxy.met[""]
    assert wrong_samples(run, chaos.CROPS, steps) == {}
    assert other_weights(run, tmp_path / "undisturbed") == []
    return events


def give_up(scene: Scene) -> None:
    """One failure more in a row than the command puts up with."""
    scene.start("--cluster.max-failures", str(MOST_FAILURES))
    storm(scene, MOST_FAILURES + 1)
    code, output, errors = scene.run.end()
    assert code == 1 and "Traceback" not in errors, output + errors
    assert f"the workers failed {MOST_FAILURES + 1} times in a row without a new checkpoint" in errors
    assert [(restart["kind"], restart["gave_up"]) for restart in scene.restarts()] == [
        ("crash", False), ("controller", False), ("crash", True)]  # fmt: skip
