"""What Ray Train is told of a run: its workers, their resources and meeting place, callbacks, patience."""

import dataclasses
import math
import os
import uuid
from typing import Any

from cluster.core.devices import DeviceChoice
from cluster.core.job_paths import IN_JOB
from cluster.core.ray_internals import lean_trainer, watch_nccl
from cluster.train import imports_ahead
from cluster.train.group_size import GroupSize
from cluster.train.worker import work
from training.config import recipe_toml as recipes
from training.config.run_config import RunConfig
from training.core.run_folder.write_guard import Ticket

SHARES = 16
"""Parts of a core that a worker's share is rounded down to: exact in binary and in Ray's four decimals, else the sum of
shares over one of them, by which Ray counts the workers that fit, may be just below a whole number."""
PLACEMENT_S = 20.0
"""Seconds after which room that was counted, but is not there, is counted again."""
SURVIVORS_S = 20.0
"""Seconds that workers may still save after the deadline of another one's machine."""


def make_trainer(
    config: RunConfig,
    coordinator: str,
    scratch: str,
    choice: DeviceChoice,
    size: GroupSize,
    ticket: Ticket,
    *,
    embedded: bool,
) -> Any:
    """A run of Ray Train. Its name is new each time, as Ray Train goes by what it finds under a name it has had."""
    machine = config.cluster
    patience = PLACEMENT_S if size.elastic else machine.start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(machine.start_timeout_s + machine.hang_timeout_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    import ray
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig

    from cluster.train.controller_callbacks import RestartPolicy
    from cluster.train.rendezvous import MeetingConfig

    gpus = choice.kind == "cuda"
    if gpus:
        watch_nccl(machine.hang_timeout_s / 2)
    variables = dict(variable.split("=", 1) for variable in machine.environment)
    resources = worker_resources(config, choice)
    environment: dict[str, Any] = {}
    if machine.standby:
        variables = imports_ahead.environment(variables, config, kind=choice.kind, cpus=resources["CPU"])
        if client := imports_ahead.interpreter(ray.get_runtime_context().runtime_env):
            environment["py_executable"] = client
    if variables:
        environment["env_vars"] = variables
    workers: Any = (size.least, size.most) if size.elastic else size.most
    callbacks: list[Any] = [RestartPolicy(coordinator, config)]
    return lean_trainer()(
        work,
        train_loop_config={
            "config": recipes.to_tree(config),
            "coordinator": coordinator,
            "embedded": embedded,
            "in_job": IN_JOB in os.environ,
            "kind": choice.kind,
            "ticket": ticket,
        },
        torch_config=MeetingConfig(
            backend="nccl" if gpus else "gloo",
            timeout_s=round(machine.start_timeout_s + machine.collective_timeout_s),
            kind=choice.kind,
            coordinator=coordinator,
            out=config.out,
            storage=config.storage,
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker=resources,
            placement_strategy=machine.placement.upper(),
            elastic_resize_monitor_interval_s=machine.resize_every_s,  # type: ignore[call-arg]
        ),
        run_config=RayRunConfig(
            name=f"run-{uuid.uuid4().hex[:12]}",
            storage_path=scratch,
            callbacks=callbacks,
            failure_config=_without_end(),
            worker_runtime_env=environment or None,  # type: ignore[call-arg]
        ),
    )


def _without_end() -> Any:
    """Ray Train starts workers again without end, as `RestartPolicy` counts; after the deadline of a machine that is
    taken away the others have time to save."""
    from ray.train import FailureConfig

    # the grace is known from Ray 2.60 on
    fields = {field.name for field in dataclasses.fields(FailureConfig)}
    grace: dict[str, Any] = {"preemption_grace_s": SURVIVORS_S} if "preemption_grace_s" in fields else {}
    return FailureConfig(max_failures=-1, controller_failure_limit=-1, **grace)  # type: ignore[call-arg]


def worker_resources(config: RunConfig, choice: DeviceChoice) -> dict[str, float]:
    """What Ray sets aside for a worker: its cores, and a GPU where the run is on GPUs."""
    import ray

    machine = config.cluster
    cpus = machine.cpus_per_worker
    if machine.workers_per_node:
        cores = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        smallest = min(filter(None, cores), default=0)
        spare = choice.kind == "cuda" and smallest > machine.workers_per_node + 1  # a core for commands of jobs
        shared = smallest - 1 if spare else smallest
        cpus = max(cpus, share_of(shared, machine.workers_per_node))
    return {"CPU": cpus, **({"GPU": 1} if choice.kind == "cuda" else {})}


def share_of(cores: float, workers: int) -> float:
    """Cores for each of so many workers of a machine."""
    return math.floor(SHARES * cores / workers) / SHARES
