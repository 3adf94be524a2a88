"""Pre-training as a Ray Train job: workers that are restarted from the last checkpoint until the run is complete."""

import dataclasses
import os
import threading
import time
from typing import Any

import torch

from cluster.session import prepare, ray_session
from datapipe.command import COMPLETE
from datapipe.errors import ClusterError, ConfigError, DataError, UserError
from datapipe.storage import is_remote
from training import config as recipes
from training.assembly import check, clock_of, refuse_unsuited
from training.config import RunConfig
from training.engine.host import LocalHost, exit_code
from training.engine.world import World, choose_device
from training.pretrain import pretrain

POLL_S = 0.3


def run(config: RunConfig, *, address: str = "local") -> int:
    """Train until complete, stopped or failed; the exit code says which. Raises UserError on a clear mistake.

    The first SIGTERM or Ctrl-C lets the workers finish their step and save; a second one ends everything at once.
    """
    config = _absolute(config)
    if address == "local":
        refuse_unsuited(config, choose_device(config.engine.device, 0))
    data = check(config)
    clock = clock_of(config, data.rows)
    print(f"pretrain: {config.method.name}, {data.rows:,} crops, {clock.total_steps:,} steps, "
          f"{config.cluster.max_workers} workers; run folder {config.out}", flush=True)  # fmt: skip
    with LocalHost() as signals, ray_session(address, cpus=_cpus(config)) as scratch:
        signals.listen()
        ending = _train(config, signals, scratch)
    if ending[1]:
        return COMPLETE
    return exit_code(signals.received)


def _cpus(config: RunConfig) -> int:
    """Cores that an embedded Ray may hand out: at least what its workers ask for."""
    return max(os.cpu_count() or 1, int(config.cluster.max_workers * config.cluster.cpus_per_worker))


def _absolute(config: RunConfig) -> RunConfig:
    """Workers run in other folders: local paths are made absolute here."""
    mix = tuple(_absolute_address(address) for address in config.stream.mix)
    stream = dataclasses.replace(config.stream, manifest=_absolute_address(config.stream.manifest), mix=mix)
    return dataclasses.replace(config, out=_absolute_address(config.out), stream=stream)


def _absolute_address(address: str) -> str:
    return os.path.abspath(address) if address and not is_remote(address) else address


def _train(config: RunConfig, signals: LocalHost, scratch: str) -> tuple[int, bool]:
    """Start the workers, pass on their lines and our stop word; (steps done, complete)."""
    import ray

    from cluster.bulletin import open_board

    name, board = open_board()
    outcome: dict[str, BaseException] = {}
    trainer = _trainer(config, name, scratch)

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  (carried to the main thread, judged there)
            outcome["error"] = error

    # Off the main thread Ray Train leaves our signal handlers alone.
    fitting = threading.Thread(target=fit, name="ray train", daemon=True)
    fitting.start()
    told = False
    while True:
        alive = fitting.is_alive()
        notes = ray.get(board.take.remote())
        for line in notes.lines:
            print(line, flush=True)
        if signals.received is not None and not told:
            board.stop.remote()
            told = True
        if not alive:
            break
        time.sleep(POLL_S)
    if notes.failure is not None:
        raise notes.failure
    if "error" in outcome and notes.ending is None:
        raise _broken(outcome["error"], config) from outcome["error"]
    if notes.ending is None:
        hint = "start again to go on; --debug and Ray's logs say more"
        raise ClusterError("the workers ended without saying how", where=config.out, hint=hint)
    return notes.ending


def _broken(error: BaseException, config: RunConfig) -> UserError:
    text = str(error).strip() or type(error).__name__
    last = [line for line in text.splitlines() if line.strip()][-1]
    return ClusterError(
        f"training failed {config.cluster.max_failures + 1} times in all or could not start: {last}",
        where=config.out,
        hint="--debug shows the whole trace; started again, the run goes on from its last checkpoint",
    )


def _trainer(config: RunConfig, board: str, scratch: str) -> Any:
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.cluster.start_timeout_s)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.cluster.hang_timeout_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = config.engine.device != "cpu" and _cluster_has_gpus()
    refuse_unsuited(config, torch.device("cuda" if gpus else "cpu"))
    return TorchTrainer(
        work,
        train_loop_config={"config": recipes.to_tree(config), "board": board},
        torch_config=TorchConfig(
            backend="nccl" if gpus else "gloo",
            timeout_s=round(config.cluster.start_timeout_s + config.cluster.collective_timeout_s),
        ),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.max_workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if gpus else {})},
        ),
        run_config=RayRunConfig(
            name=board,
            storage_path=scratch,
            failure_config=FailureConfig(  # mypy sees the fields of Ray Train's first version
                max_failures=config.cluster.max_failures,
                controller_failure_limit=config.cluster.max_failures,  # type: ignore[call-arg]
            ),
        ),
    )


def _cluster_has_gpus() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def work(settings: dict[str, Any]) -> None:
    """What each worker does, in every attempt."""
    prepare()
    os.environ["REID_ENTRY"] = "cluster"
    import ray
    from ray import train

    from cluster.bulletin import NAMESPACE, RayHost

    board = ray.get_actor(settings["board"], namespace=NAMESPACE)
    if ray.get(board.failed.remote()):
        return  # the attempt before met a mistake that a restart does not mend
    config = recipes.validate(settings["config"], where="the driver's recipe")
    context = train.get_context()
    rank = context.get_world_rank()
    local_rank = context.get_local_rank()
    world = World(
        rank=rank,
        size=context.get_world_size(),
        local_rank=local_rank,
        local_size=context.get_local_world_size(),
        device=choose_device(config.engine.device, local_rank),
    )
    reason = "started"
    if rank == 0:
        starts = ray.get(board.start.remote())
        reason = "started" if starts == 1 else "restarted after a failure of the workers"
    try:
        ending = pretrain(config, world=world, host=RayHost(board), reason=reason)
    except (ConfigError, DataError) as error:
        ray.get(board.fail.remote(error))
        raise
    if rank == 0:
        ray.get(board.end.remote(ending.step, ending.complete))
