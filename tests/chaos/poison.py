"""A NaN on one rank, as a failing device would make it. Ray runs `install` in each worker before it trains.

    --cluster.environment FAULTS_POISON=FILE __RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR=tests.chaos.poison.install

FILE says {"position": 126, "times": 1}: the view of the sample at that place in the stream becomes NaN, so many times.
One rank has it. The file outlives the process, as the moment to fail does.
"""

import json
import os
from pathlib import Path

import training.trainer.batch_to_device
from datapipe.stream.batch import Batch
from tests.end_to_end.pause import HOOK
from training.methods.base import Views

VARIABLE = "FAULTS_POISON"


def write(file: Path, position: int, times: int) -> None:
    """Order a NaN."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"position": position, "times": times}))
    os.replace(part, file)


def environment(file: Path) -> tuple[str, ...]:
    """What `cluster.environment` needs."""
    return (f"{VARIABLE}={file}", f"{HOOK}=tests.chaos.poison.install")


def install() -> None:
    """Let the `Place` of this process spoil one view when its time has come."""
    place = training.trainer.batch_to_device.BatchToDevice.__call__

    def poisoned(self: training.trainer.batch_to_device.BatchToDevice, batch: Batch) -> Views:
        views = place(self, batch)
        file = Path(os.environ[VARIABLE])
        order = json.loads(file.read_text()) if file.exists() else {"times": 0}
        if order["times"] and order["position"] in batch.position:
            write(file, order["position"], order["times"] - 1)
            row = batch.position.tolist().index(order["position"])
            views["global"][0, row] = float("nan")
        return views

    training.trainer.batch_to_device.BatchToDevice.__call__ = poisoned  # type: ignore[method-assign]
