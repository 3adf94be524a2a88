"""All who follow a run step by step, made in one place and told in this order."""

from collections.abc import Mapping
from typing import Any

from datapipe.stream.loader import Loader
from training.checkpoint import Checkpoints, retention
from training.config.run_plan import RunPlan, clustered, milestone_ends
from training.core.exchange import Exchange
from training.core.host import Host
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.methods.base import Method
from training.trainer.dataset_renewal import DatasetRenewal
from training.trainer.monitoring.heartbeat import Heartbeat
from training.trainer.monitoring.observer import Observer
from training.trainer.monitoring.pauses import Pauses, pauses
from training.trainer.monitoring.recorder import Recorder
from training.trainer.monitoring.sample_audit import Audit
from training.trainer.monitoring.stragglers import StragglerMonitor
from training.trainer.monitoring.utilisation import Yardstick


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
    measure: Yardstick,
) -> list[Observer]:
    """Make the observers of this rank. `about`: what the record of the attempt begins with; `measure`: what its rates
    come to."""
    followers: list[Observer] = []
    if world.is_leader:
        begins = {**about, "utilisation": measure.to_json()}
        followers.append(
            Recorder(folder, about=begins, total_steps=plan.clock.total_steps, measure=measure, pauses=pauses_of(plan))
        )
    followers += [Heartbeat(folder, world, plan.config), StragglerMonitor(method, host, world, folder, exchange)]
    if plan.config.engine.audit:
        followers.append(Audit(method, folder, world))
    return [*followers, DatasetRenewal(loader, plan.data, checkpoints, folder, world)]


def pauses_of(plan: RunPlan) -> Pauses:
    """What a run stands still for, and after which steps."""
    config, clock = plan.config, plan.clock
    scored = [end // clock.batch for end in milestone_ends(config.evaluation, clock)]
    epochs = [end // clock.batch for end in clock.epoch_ends] if clustered(config) else []
    return pauses(
        retention.due_steps(config.checkpoints, clock.total_steps, clock.epoch_steps),
        segments={*scored, *epochs},
        scores=scored if config.evaluation.data else (),
        labels=epochs[:-1],
        save_every_s=60 * config.checkpoints.every_minutes,
    )
