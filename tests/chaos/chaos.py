"""python -m tests.chaos.chaos [--faults 20] [--seed 0]: one run, many faults, the weights it would have had.

Two workers on two machines of a local Ray cluster, the run folder on an S3-compatible server. Each fault comes at a
random moment of its kind, once the run is over the one before. Ends with a table and the judgement; exit code 1 where a
sample is lost or doubled or a weight differs from that of the run that nobody disturbed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.chaos.judge import fetch, other_weights, wrong_samples
from tests.chaos.kinds import BATCH, KINDS, Event, Moment, arm_first_save, inflict
from tests.chaos.scene import BUCKET, Scene, machines, object_store
from tests.end_to_end.tiny import generated, recipe
from tests.support.ranks import run_ranks
from training.config import recipe_toml as recipes
from training.core.host import LocalHost
from training.core.world import World
from training.trainer.pretrain import pretrain

CROPS, EVERY = 48, 20
STEPS_PER_FAULT = 60
"""A fault waits for its moment after a save; then the run must be over it and save once more."""
HANG_S = 40
"""Without a step. The object store is away for half of that: ranks that wait for it are no case of hanging."""
SILENCE_S = 10
"""After which, and a few seconds, a worker that is stopped is replaced."""
OURS_S, ALL_S = 5.0, 30.0
"""On a quiet machine: longest from restored weights to the first step, and of a whole recovery."""
STAGES = ("detected", "process", "imported", "engine", "restored", "first step")
WIDTHS = (25, 22, *(11 for _ in STAGES), 7, 8)


def flags(stepper: str) -> tuple[str, ...]:
    """What the tiny recipe is given on the command line."""
    return ("--cluster.max-workers", "2", "--cluster.min-workers", "2", "--cluster.standby", "True",
            "--cluster.hang-timeout-s", str(HANG_S), "--cluster.silence-timeout-s",
            str(SILENCE_S), "--cluster.restart-delay-s", "0.5", "--engine.stepper", stepper,
            "--checkpoints.every-steps", str(EVERY))  # fmt: skip


def plan(count: int, random: Random) -> list[tuple[str, Moment]]:
    """Faults and moments: one before the first save, then each kind in random order, then any."""
    names = [name for name in KINDS if name != "worker killed"]
    random.shuffle(names)
    names += random.choices(list(KINDS), k=count)
    later: list[tuple[str, Moment]] = [(name, random.choice(KINDS[name].moments)) for name in names[: count - 1]]
    return [("worker killed", "before the first save"), *later]


def disturbed(scene: Scene, faults: Sequence[tuple[str, Moment]]) -> list[Event]:
    """The run with these faults, one after the other, to its end. Prints the table as it grows."""
    print(line("fault", "when", *STAGES, "back", "redone", "what the run says"), flush=True)
    events = []
    arm_first_save(scene)
    scene.start()
    for name, moment in faults:
        events.append(inflict(scene, name, moment))
        print(row(events[-1]), flush=True)
    code, output, errors = scene.run.end()
    assert code == 0, output + errors
    return events


def line(*cells: str) -> str:
    *fixed, last = cells
    return "".join(f"{cell:<{width}}" for cell, width in zip(fixed, WIDTHS, strict=True)) + last


def row(event: Event) -> str:
    """A fault's line of the table; times in seconds."""
    spent = [f"{event.stages[stage]:.1f}" if event.stages else "-" for stage in STAGES]
    said = event.restart["reason"] if event.restart else event.note
    return line(event.kind, event.moment, *spent, f"{event.back - event.at:.1f}", str(event.redone), said)


def reference(world: World, path: str, out: str, stepper: str, *more: str) -> None:
    """One rank of the run that nobody disturbs."""
    given = ["--out", out, "--engine.stepper", stepper, "--checkpoints.every-steps", str(EVERY), *more]
    pretrain(recipes.load(path, given), world=world, host=LocalHost())


def verdict(events: Sequence[Event], samples: dict[int, object], weights: list[str]) -> int:
    """Say what came of it; the exit code."""
    recovered = [event for event in events if event.stages]
    ours = [event.stages["restored"] + event.stages["first step"] for event in recovered]
    whole = [event.back - event.at for event in recovered]
    print(f"\n{len(events)} faults, {len(recovered)} recoveries: median {statistics.median(whole):.1f} s, longest "
          f"{max(whole):.1f} s (at most {ALL_S:.0f} s on a quiet machine); of them from restore to first step median "
          f"{statistics.median(ours):.1f} s, longest {max(ours):.1f} s (at most {OURS_S:.0f} s)")  # fmt: skip
    print(f"samples lost or doubled: {len(samples)} steps {dict(list(samples.items())[:3]) if samples else ''}")
    print(f"weights and optimizer state other than undisturbed: {len(weights)} tensors {weights[:3] or ''}")
    return 1 if samples or weights else 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stepper", default="deepspeed", choices=("deepspeed", "plain"))
    chosen = parser.parse_args(arguments)
    random = Random(chosen.seed)
    faults = plan(chosen.faults, random)
    steps = STEPS_PER_FAULT * (len(faults) + 1)
    with TemporaryDirectory(prefix="chaos_") as name:
        folder = Path(name)
        path = recipe(folder, generated(folder, CROPS), "unused", epochs=steps * BATCH / CROPS)
        began = time.monotonic()
        run_ranks(2, reference, str(path), str(folder / "undisturbed"), chosen.stepper)
        print(f"chaos: {len(faults)} faults, seed {chosen.seed}; {steps} steps undisturbed took "
              f"{time.monotonic() - began:.0f} s; times in seconds\n", flush=True)  # fmt: skip
        with object_store(folder / "s3") as objects, machines(2) as cluster:
            scene = Scene(cluster, folder, path, f"s3://{BUCKET}/run", objects=objects, flags=flags(chosen.stepper),
                          random=random)  # fmt: skip
            events = disturbed(scene, faults)
            run = fetch(scene, folder / "run")
        samples, weights = wrong_samples(run, CROPS, steps), other_weights(run, folder / "undisturbed")
    return verdict(events, samples, weights)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
