"""Workers that stand by: processes which Ray has started ahead of need, on the machines of a run, their imports done.

A restart tears all workers down and starts new processes, and most of what that takes is imports. So once a group of
workers has made its first step, each machine has as many processes started as it has workers; they import what a worker
needs, and wait. Ray gives them to the workers of the next group. Where there is none, or one is not done yet, a restart
takes as long as it would without. Ray ends them with the job, and first of all where memory runs short.

They import nothing that looks at a GPU: which one a worker has is not known before it begins.
"""

import contextlib
import logging
import threading
import time

import psutil

from cluster.core.ray_internals import start_ahead
from datapipe.core.resource_limits import memory_left

log = logging.getLogger(__name__)

TITLE = "ray::STANDBY"
"""What the name of a process begins with until it has work; the ids of its machine, as Ray has it, and job follow."""
BYTES = 1_000_000_000
"""Memory that has to be free for each: what it has imported takes about half of that."""
KEEP_S = 7 * 24 * 3_600
"""Seconds that one waits for work at the longest."""
LOOKS_S = (0.0, 20.0, 40.0)
"""Seconds before each look whether all stand by. One is not enough: Ray passes over a request without a word while it
starts as many processes as the machine has cores, and one that is counted may be about to be given work."""


def replenish(count: int) -> None:
    """In a worker: in the background, see to it for a minute that `count` processes stand by on this machine, as far as
    its memory goes. Failing that restarts take longer, and nothing else."""
    threading.Thread(target=_replenish, args=(count,), name="workers that stand by", daemon=True).start()


def _replenish(count: int) -> None:
    import grpc

    try:
        for pause_s in LOOKS_S:
            time.sleep(pause_s)
            if wanted := missing(count, standing_by(title()), _free()):
                start_ahead(wanted, keep_s=KEEP_S)
    except (grpc.RpcError, ImportError, AttributeError, ValueError, TypeError, psutil.Error) as error:
        log.warning("no workers stand by on this machine: %s", error)


def missing(count: int, standing: int, free: int) -> int:
    """Processes to be started so that `count` stand by, of which `standing` do, in so many free bytes."""
    return max(0, min(count - standing, free // BYTES))


def standing_by(name: str) -> int:
    """Processes of this machine that are called so."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += process.cmdline()[:1] == [name]
    return found


def title() -> str:
    """What a process that stands by for this job on this machine is called."""
    import ray

    context = ray.get_runtime_context()
    return f"{TITLE} {context.get_node_id()[:12]} {context.get_job_id()}"


def _free() -> int:
    """Bytes that processes of this machine, and of its control group, can still get."""
    free, left = psutil.virtual_memory().available, memory_left()
    return free if left is None else min(free, left)
