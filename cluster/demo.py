"""The main job on one machine: crops, shards, pre-training that survives a kill, scores, a report.

Every step is a command that a user has; this file only calls them in order, kills a worker in plain sight, and judges.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datapipe.core.cli import COMPLETE, FAILED, INTERRUPTED, STOPPED
from datapipe.core.config import StorageConfig
from datapipe.core.errors import ClusterError, DataError
from datapipe.core.progress import counted, duration
from datapipe.core.stop_signals import current, exit_code, receiving
from datapipe.dataset.manifest import Manifest
from training.config import recipe_toml as recipes
from training.config.run_plan import clock_of
from training.core.devices import Device, choose_device
from training.core.run_folder.lease import refuse_held
from training.recipes import SHIPPED
from training.reid.settings import RANDOM
from training.reid.zero_shot import COLOUR_HISTOGRAM
from training.trainer.monitoring.throughput import faster_precision

RECIPE = SHIPPED / "demo.toml"
DEMO_STEPS = 360
"""Steps of the demo's recipe on the rendered crops; crops of your own get as many."""
LIMIT = 3.0
"""Times the mAP of random weights that the last checkpoint must reach."""
POLL_S = 0.5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Demo:
    """What one demo works on."""

    out: Path
    crops: Path
    """Where the crops lie: rendered ones below `out`, or the user's own."""
    own: bool
    """True: the user's crops. Then the margin is reported, not demanded."""
    seed: int
    steps: int
    """Optimizer steps; 0: those of the recipe, or as many on crops of your own."""
    device: torch.device = CPU
    """Expected device, as far as can be seen before Ray starts."""
    asked: Device = "auto"

    @property
    def workers(self) -> int:
        """As the recipe has it, but one where there is one GPU: a second worker would wait for another."""
        wanted = recipes.load(RECIPE).cluster.max_workers
        return min(wanted, torch.cuda.device_count()) if self.device.type == "cuda" else wanted

    @property
    def run(self) -> Path:
        return self.out / "run"

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    @property
    def training_crops(self) -> Path:
        """The part of a Market-style folder that is trained on; any other folder as a whole."""
        train = self.crops / "bounding_box_train"
        return train if train.is_dir() or not self.own else self.crops

    @property
    def scored(self) -> bool:
        """Are there queries and a gallery to score on?"""
        return not self.own or all((self.crops / name).is_dir() for name in ("query", "bounding_box_test"))


def run(out: Path, *, crops: Path | None, seed: int, steps: int, device: Device = "auto") -> int:
    """All five steps; the exit code says whether pre-training learnt what it must. Started again, it goes on."""
    began = time.monotonic()
    demo = Demo(out, crops or out / "crops", crops is not None, seed, steps, choose_device(device), device)
    refuse_held(str(demo.run), StorageConfig())
    if demo.own and not demo.crops.is_dir():
        raise DataError("no such folder of crops", where=str(demo.crops), hint="make demo CROPS=<folder of images>")
    _make_data(demo, began)
    _heading(3, f"pre-train PASS with {_workers(demo)}", began)
    _pretrain(demo)
    verdict = COMPLETE
    if demo.scored:
        _heading(4, "score random weights and every kept checkpoint on people never seen", began)
        _command("cluster", "evaluate", str(demo.run), "--data", str(demo.crops), "--device", demo.asked)
        verdict = _judge(demo)
    else:
        _heading(4, "no query and bounding_box_test folders: nothing to score", began)
    _heading(5, "write the report", began)
    _command("training", "report", str(demo.run))
    print(f"\ndemo {'complete' if verdict == COMPLETE else 'FAILED'} in {duration(time.monotonic() - began)}")
    print((demo.run / "report.html").resolve(), flush=True)
    return verdict


def _workers(demo: Demo) -> str:
    if demo.device.type == "cpu":
        return counted(demo.workers, "worker")
    return f"{demo.workers} workers, a GPU each" if demo.workers > 1 else "one worker, as this machine has one GPU"


def _make_data(demo: Demo, began: float) -> None:
    if demo.own:
        _heading(1, f"crops: {demo.crops}", began)
    else:
        _heading(1, "render labelled pedestrians", began)
        _command("datapipe", "synth", "--out", str(demo.crops))
    _heading(2, "shard the training crops, verify, look at them", began)
    _command("datapipe", "shard", str(demo.training_crops), "--out", str(demo.shards))
    _command("datapipe", "verify", str(demo.shards))
    views = demo.out / "views.json"
    _command("training", "views", *_recipe(demo), to=views)
    _command("datapipe", "preview", str(demo.shards), "--views", str(views), "--out", str(demo.out / "preview.jpg"))


def _pretrain(demo: Demo) -> None:
    arguments = [*_recipe(demo), "--engine.device", demo.asked]
    killer = threading.Thread(target=_kill_halfway, args=(demo,), daemon=True)
    killer.start()
    _command("cluster", "pretrain", *arguments)


def _recipe(demo: Demo) -> list[str]:
    """The run's own recipe where it has begun, else the demo's, with this machine's settings."""
    own = demo.run / "config.toml"
    flags = ["--cluster.max-workers", str(demo.workers)]
    if own.is_file():
        return [str(own), *flags]
    flags += ["--out", str(demo.run), "--stream.manifest", str(demo.shards), "--seed", str(demo.seed)]
    flags += ["--optimisation.precision", faster_precision(demo.device)]
    if demo.own or demo.steps:
        flags += _so_many_steps(demo)
    return [str(RECIPE), *flags]


def _so_many_steps(demo: Demo) -> list[str]:
    """Epochs that give the wanted number of steps on any number of crops, with batches no larger than the set."""
    recipe = recipes.load(RECIPE)
    rows = Manifest.load(str(demo.shards)).rows
    batch = min(recipe.optimisation.batch, rows)
    steps = demo.steps or DEMO_STEPS
    epochs = steps * batch / rows
    warmup = epochs * recipe.optimisation.warmup_epochs / recipe.optimisation.epochs
    return ["--optimisation.epochs", repr(epochs), "--optimisation.warmup-epochs", repr(warmup),
            "--optimisation.batch", str(batch), "--checkpoints.every-steps", str(max(1, steps // 8)),
            "--checkpoints.keep-every-steps", str(max(1, steps // 4))]  # fmt: skip


def _kill_halfway(demo: Demo) -> None:
    """SIGKILL the last worker once half of the steps are done. At most once in a run's life."""
    done, last = demo.out / "killed.json", demo.workers - 1
    while not done.exists():
        time.sleep(POLL_S)
        half, life = _half(demo), _json(demo.run / "ranks" / f"rank_{last:02d}.json")
        if half is None or life is None or life["step"] < half:
            continue
        print(f"== kill -9 {life['pid']} (worker {last}, step {life['step']}): training will go on ==", flush=True)
        try:
            os.kill(life["pid"], signal.SIGKILL)
        except ProcessLookupError:
            return  # of an earlier attempt; this one is already over
        done.write_text(json.dumps(life))


def _half(demo: Demo) -> int | None:
    """Half the steps of the run; None before it has begun."""
    if not (demo.run / "config.toml").is_file():
        return None
    config = recipes.load(demo.run / "config.toml")
    return clock_of(config, Manifest.load(str(demo.shards)).rows).total_steps // 2


def _judge(demo: Demo) -> int:
    """Compare the last checkpoint with random weights and the colour histogram; say it, and demand it of our crops."""
    metrics = {path.parent.name: json.loads(path.read_text()) for path in demo.run.glob("evaluation/*/*/metrics.json")}
    trained = [row for row in metrics.values() if row["step"]]
    scores = {row["weights"]: row["features"][row["headline"]]["mAP"] for row in metrics.values()}
    last = max(trained, key=lambda row: row["step"])["weights"]
    reached, random, colour = scores[last], scores[RANDOM], scores[COLOUR_HISTOGRAM]
    good = reached >= LIMIT * random and reached > colour
    print(f"\n{last}: mAP {100 * reached:.1f}; random weights {100 * random:.1f} (x {reached / random:.1f}), "
          f"colour histogram {100 * colour:.1f}")  # fmt: skip
    if demo.own:
        print("on crops of your own the margin is reported, not demanded")
        return COMPLETE
    demand = f"at least {LIMIT:g} times random weights, and more than the colour histogram"
    print(f"{'reached' if good else 'NOT REACHED'}: {demand}", flush=True)
    return COMPLETE if good else FAILED


def _command(module: str, *arguments: str, to: Path | None = None) -> None:
    """Run one of our commands as a user would, its output on the terminal or in a file; its failure is ours."""
    line: Sequence[str] = [sys.executable, "-m", module, *arguments]
    print(f"$ python -m {module} {shlex.join(arguments)}{f' > {to}' if to else ''}", flush=True)
    signals: list[int] = []
    with (
        to.open("w") if to else contextlib.nullcontext() as file,
        # in a group of its own: a signal for all of the group reaches it once, from here
        subprocess.Popen(line, stdout=file, process_group=0) as process,
    ):

        def pass_on(number: int) -> None:
            signals.append(number)
            process.send_signal(number)

        with receiving(pass_on):
            code = process.wait()
    if signals and code in (STOPPED, INTERRUPTED):  # it has said so itself
        sys.exit(exit_code(signals[0]))
    if signals and (listener := current()):  # killed by the signal before it heard any, or ended otherwise
        listener.end(signals[0])
    if code != COMPLETE:
        raise ClusterError(
            f"`python -m {module} {arguments[0]}` ended with {code}",
            hint="its message is above; `make demo` again goes on from there, `make demo-clean` starts over",
        )


def _heading(number: int, text: str, began: float) -> None:
    print(f"\n== {number}/5 {text} ({duration(time.monotonic() - began)}) ==", flush=True)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
