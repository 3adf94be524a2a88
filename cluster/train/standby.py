"""Workers that stand by: processes which Ray has started ahead of need, on the machines of a run, their imports done.

A restart tears all workers down and starts new processes, and most of what that takes is imports. So once a group of
workers has made its first step, each machine has as many processes started as it has workers; they import what a worker
needs, and wait. Ray gives them to the workers of the next group. Where there is none, or one is not done yet, a restart
takes as long as it would without. Ray ends them with the job, and first of all where memory runs short.

They import nothing that looks at a GPU: which one a worker has is not known before it begins.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Collection, Mapping
from importlib import import_module

import psutil

from cluster.core.devices import Kind
from cluster.core.ray_prestart import SETUP_HOOK, entitle, run_hook, start_ahead
from datapipe.core.resource_limits import memory_left
from training.config.run_config import RunConfig

log = logging.getLogger(__name__)

MODULES = (
    "ray.train.v2._internal.execution.worker_group.worker", "cluster.train.rendezvous", "cluster.train.worker",
    "cluster.train.worker_host", "datapipe.stream.loader", "training.trainer.pretrain",
)  # fmt: skip
"""What a worker imports before its engine is up: Ray Train's part, and ours."""
TITLE = "ray::STANDBY"
"""What the name of a process begins with until it has work; the ids of its machine, as Ray has it, and job follow."""
BYTES = 1_000_000_000
"""Memory that has to be free for each: what it has imported takes about half of that."""
KEEP_S = 7 * 24 * 3_600
"""Seconds that one waits for work at the longest."""
NEEDS, CORES, GIVEN = "REID_STANDBY_NEEDS", "REID_STANDBY_CORES", "REID_STANDBY_HOOK"
"""Variables for `prepare`: what else to import, the worker's cores, and the run's own set-up hook."""


def environment(given: Mapping[str, str], config: RunConfig, *, kind: Kind, cpus: float) -> dict[str, str]:
    """The variables of workers so that their processes begin with `prepare`. `given`: those that they have anyway."""
    needs = ["deepspeed"] if config.engine.stepper == "deepspeed" and kind == "cpu" else []  # it looks for GPUs
    needs += ["s3"] if config.out.startswith("s3://") else []
    found = {**given, SETUP_HOOK: f"{__name__}.{prepare.__name__}", NEEDS: " ".join(needs),
             CORES: str(max(1, int(cpus)))}  # fmt: skip
    if SETUP_HOOK in given:
        found[GIVEN] = given[SETUP_HOOK]
    return found


def prepare() -> None:
    """In a new process, before it has work: import what a worker needs until its first step. Raises what the run's own
    set-up hook raises."""
    os.environ.setdefault("OMP_NUM_THREADS", os.environ[CORES])  # as Ray does later, when libraries have read it
    for ahead in (lambda: entitle(_title()), lambda: load(os.environ[NEEDS].split())):
        try:
            ahead()
        except Exception:  # noqa: BLE001  (what fails here fails in the worker again, which tells it)
            log.debug("imports ahead of work failed", exc_info=True)
    if given := os.environ.get(GIVEN):
        run_hook(given)


def load(needs: Collection[str] = ()) -> None:
    """The imports. `needs`: "deepspeed", "s3", where the run is to use them."""
    for module in (*MODULES, *(["datapipe.storage.s3"] if "s3" in needs else [])):
        import_module(module)
    with contextlib.suppress(ImportError):
        import torch.utils.tensorboard  # noqa: F401  (a run does without it)
    if "deepspeed" in needs:
        from training.engine import deepspeed

        deepspeed.load()


def replenish(count: int) -> None:
    """In a worker: in the background, see to it that `count` processes stand by on this machine, as far as its memory
    goes. Failing that restarts take longer, and nothing else."""
    threading.Thread(target=_replenish, args=(count,), name="workers that stand by", daemon=True).start()


def _replenish(count: int) -> None:
    import grpc

    try:
        wanted = missing(count, standing_by(_title()), _free())
        if wanted:
            start_ahead(wanted, keep_s=KEEP_S)
    except (grpc.RpcError, ImportError, AttributeError, ValueError, TypeError, psutil.Error) as error:
        log.warning("no workers stand by on this machine: %s", error)


def missing(count: int, standing: int, free: int) -> int:
    """Processes to be started so that `count` stand by, of which `standing` do, in so many free bytes."""
    return max(0, min(count - standing, free // BYTES))


def standing_by(title: str) -> int:
    """Processes of this machine that are called so."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += process.cmdline()[:1] == [title]
    return found


def _title() -> str:
    import ray

    context = ray.get_runtime_context()
    return f"{TITLE} {context.get_node_id()[:12]} {context.get_job_id()}"


def _free() -> int:
    """Bytes that processes of this machine, and of its control group, can still get."""
    free, left = psutil.virtual_memory().available, memory_left()
    return free if left is None else min(free, left)
