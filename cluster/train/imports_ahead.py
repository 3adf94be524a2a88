"""What the process of a worker imports ahead of its work, where it was started to stand by.

It imports nothing that looks at a GPU: which one a worker has is not known before it begins.
"""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster import forking
from cluster.core.devices import Kind
from cluster.core.ray_internals import SETUP_HOOK, entitle, import_worker, random_ids_for_forks, run_hook
from cluster.forking.server import LOAD
from cluster.train.standby import title
from training.config.run_config import RunConfig

log = logging.getLogger(__name__)

MODULES = ("cluster.train.rendezvous", "cluster.train.worker", "cluster.train.worker_host", "datapipe.stream.loader",
           "training.trainer.pretrain")  # fmt: skip
"""What a worker imports before its engine is up; the first brings Ray Train's part."""
RAYS_OWN = "tr '\\0' '\\n' < /proc/$PPID/cmdline | sed -n 's/^--python_worker_command=//p' | cut -d' ' -f1 | grep ."
"""Words of a shell that a raylet starts: say with which Python that raylet calls its workers, or fail."""
OWN_PYTHON = {"py_executable", "conda", "pip", "uv", "container", "image_uri", "nsight", "_nsight", "rocprof_sys"}
"""Keys of a runtime environment that say how workers' Python is called."""
NEEDS, CORES, GIVEN = "REID_STANDBY_NEEDS", "REID_STANDBY_CORES", "REID_STANDBY_HOOK"
"""Variables for `prepare`: what else to import, the worker's cores, and the run's own set-up hook."""


def environment(given: Mapping[str, str], config: RunConfig, *, kind: Kind, cpus: float) -> dict[str, str]:
    """The variables of workers so that their processes begin with `prepare`. `given`: those that they have anyway."""
    needs = ["deepspeed"] if config.engine.stepper == "deepspeed" and kind == "cpu" else []  # it looks for GPUs
    needs += ["s3"] if config.out.startswith("s3://") else []
    found = {**given, SETUP_HOOK: f"{__name__}.{prepare.__name__}", NEEDS: " ".join(needs),
             CORES: str(max(1, int(cpus))), LOAD: f"{__name__}.{load_for_ray.__name__}"}  # fmt: skip
    if SETUP_HOOK in given:
        found[GIVEN] = given[SETUP_HOOK]
    return found


def interpreter(job: Mapping[str, Any]) -> str:
    """What is to be called in place of Python for workers, as words of a shell: a client of the server that forks them
    where this machine's Python and this project lie in the same place there, else Ray's own Python. Empty where
    the job's own runtime environment says what Python it wants, or a path has blanks."""
    python, client = sys.executable, str(Path(forking.__file__).with_name("client.py"))
    if not OWN_PYTHON.isdisjoint(job) or shlex.quote(python) != python or shlex.quote(client) != client:
        return ""
    return f"$(test -x {python} -a -r {client} && echo {python} -ISE {client} {python} || {RAYS_OWN} || echo python3)"


def prepare() -> None:
    """In a new process, before it has work: import what a worker needs until its first step. Raises what the run's own
    set-up hook raises."""
    os.environ.setdefault("OMP_NUM_THREADS", os.environ[CORES])  # as Ray does later, when libraries have read it
    for ahead in (lambda: entitle(title()), lambda: load(os.environ[NEEDS].split())):
        try:
            ahead()
        except Exception:  # noqa: BLE001  (what fails here fails in the worker again, which tells it)
            log.debug("imports ahead of work failed", exc_info=True)
    if given := os.environ.get(GIVEN):
        run_hook(given)


def load_for_ray() -> None:
    """In the server that forks workers: what their processes import until they have work, and then by `prepare`."""
    os.environ.setdefault("OMP_NUM_THREADS", os.environ[CORES])
    with random_ids_for_forks():
        import_worker()
        load(os.environ[NEEDS].split())


def load(needs: Collection[str] = ()) -> None:
    """The imports. `needs`: "deepspeed", "s3", where the run is to use them."""
    for module in (*MODULES, *(["datapipe.storage.s3"] if "s3" in needs else [])):
        import_module(module)
    with contextlib.suppress(ImportError):
        import torch.utils.tensorboard  # noqa: F401  (a run does without it)
    if "deepspeed" in needs:
        from training.engine import deepspeed

        deepspeed.load()
