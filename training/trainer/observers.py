"""All who follow a run step by step, made in one place and told in this order."""

from collections.abc import Mapping
from typing import Any

from datapipe.stream.loader import Loader
from training.checkpoint import Checkpoints
from training.config.run_plan import RunPlan
from training.core.exchange import Exchange
from training.core.host import Host
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.methods.base import Method
from training.trainer.dataset_renewal import DatasetRenewal
from training.trainer.monitoring.heartbeat import Heartbeat
from training.trainer.monitoring.observer import Observer
from training.trainer.monitoring.recorder import Recorder
from training.trainer.monitoring.sample_audit import Audit
from training.trainer.monitoring.stragglers import StragglerMonitor


def make_observers(
    plan: RunPlan,
    method: Method,
    folder: RunFolder,
    world: World,
    host: Host,
    *,
    exchange: Exchange,
    loader: Loader,
    checkpoints: Checkpoints,
    about: Mapping[str, Any],
) -> list[Observer]:
    """Make the observers of this rank. `about`: what the record of the attempt begins with."""
    followers: list[Observer] = (
        [Recorder(folder, about=about, total_steps=plan.clock.total_steps)] if world.is_leader else []
    )
    followers += [Heartbeat(folder, world, plan.config), StragglerMonitor(method, host, world, folder, exchange)]
    if plan.config.engine.audit:
        followers.append(Audit(method, folder, world))
    return [*followers, DatasetRenewal(loader, plan.data, checkpoints, folder, world)]
