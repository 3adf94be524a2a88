"""What the process of a worker imports ahead of its work, where it was started to stand by.

It imports nothing that looks at a GPU: which one a worker has is not known before it begins.
"""

import contextlib
import logging
import os
from collections.abc import Collection, Mapping
from importlib import import_module

from cluster.core.devices import Kind
from cluster.core.ray_internals import SETUP_HOOK, entitle, run_hook
from cluster.train.standby import title
from training.config.run_config import RunConfig

log = logging.getLogger(__name__)

MODULES = ("cluster.train.rendezvous", "cluster.train.worker", "cluster.train.worker_host", "datapipe.stream.loader",
           "training.trainer.pretrain")  # fmt: skip
"""What a worker imports before its engine is up; the first brings Ray Train's part."""
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
    for ahead in (lambda: entitle(title()), lambda: load(os.environ[NEEDS].split())):
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
