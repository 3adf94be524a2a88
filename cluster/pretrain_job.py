"""Pre-training as a Ray Train job: workers that are started anew from the last checkpoint until the run is complete."""

import dataclasses
import json
import math
import os
import threading
import time
import uuid
from typing import Any

import torch

from cluster.devices import Choice, decide, hidden, offered, own_device
from cluster.in_job import refuse_relative
from cluster.jobs import paths_of
from cluster.restarts import END, HISTORY, Failure, Restarts
from cluster.session import LOCAL, prepare, ray_session
from cluster.vigil import Hung, accusation, end_process, hung
from datapipe.command import COMPLETE, STOPPED
from datapipe.errors import ClusterError, ConfigError, DataError, LeaseError, UserError
from datapipe.resource_limits import available_cores
from datapipe.stopping import at_end
from datapipe.storage import is_remote
from training import checkpoint, outlook
from training import config as recipes
from training.assembly import check, clock_of, refuse_unsuited, resolved
from training.config import RunConfig
from training.engine.devices import choose_device
from training.engine.host import LocalHost, exit_code
from training.engine.world import World
from training.guard import Ticket
from training.lease import Follower, Lease, lease_on
from training.pretrain import pretrain, ran_on
from training.run_folder import RunFolder
from training.speed import duration

POLL_S = 0.3
WAITING_S = 30.0
"""Seconds between lines that say why there are no workers yet."""
IDLE_S = 5.0
"""Seconds without workers after which a stop needs no save."""
FAREWELL_S = 10.0
"""For Ray Train to end by itself: a process that shuts Ray down under its thread may die of a segmentation fault."""
PLACEMENT_S = 20.0
"""Seconds after which room that was counted, but is not there, is counted again."""


def run(config: RunConfig, *, address: str = LOCAL, lease: Lease | None = None) -> int:
    """Train until complete, stopped or failed; the exit code says which. Raises UserError on a clear mistake.

    The first signal (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP) lets the workers finish their step and save; before they have
    begun with one, and at a second signal, everything ends at once.
    `lease`: on the run folder, where the caller holds it. Raises LeaseError where another process does, or takes over.
    """
    refuse_relative(paths_of(config))
    config = _absolute(config)
    if address == LOCAL:
        device = choose_device(config.engine.device)
        refuse_unsuited(config, device)
        outlook.refuse_on_this_machine(config, config.cluster.least_workers, device)
    if lease is not None:
        return _run(config, address, lease)
    with lease_on(config.out, config.storage, config.cluster.lease_s, has_workers=True) as lease:
        return _run(config, address, lease)


def _run(config: RunConfig, address: str, lease: Lease) -> int:
    print(f"reads the data set {' + '.join(config.stream.mix) or config.stream.manifest}", flush=True)
    data = check(config)
    clock = clock_of(resolved(config, data), data.rows)
    machine = config.cluster
    workers = f"{machine.least_workers} to {machine.max_workers}" if _elastic(config) else str(machine.max_workers)
    print(f"pretrain: {config.method.name}, {data.rows:,} crops, {clock.total_steps:,} steps, "
          f"{workers} workers; run folder {config.out}", flush=True)  # fmt: skip
    with LocalHost(starting=True) as signals, ray_session(address, cpus=_cpus(config)) as scratch:
        lease.settle()  # as a rule Ray's start took longer
        driver = Driver(config, signals, scratch, lease, embedded=address == LOCAL)
        complete = driver.train()
    if complete:
        return COMPLETE
    return STOPPED if signals.received is None else exit_code(signals.received)


def _elastic(config: RunConfig) -> bool:
    return config.cluster.least_workers < config.cluster.max_workers


def _cpus(config: RunConfig) -> int:
    """Cores that an embedded Ray may hand out: at least what its workers ask for."""
    return max(available_cores(), math.ceil(config.cluster.max_workers * config.cluster.cpus_per_worker))


def _absolute(config: RunConfig) -> RunConfig:
    """Workers run in other folders: local paths are made absolute here."""
    mix = tuple(_absolute_address(address) for address in config.stream.mix)
    stream = dataclasses.replace(config.stream, manifest=_absolute_address(config.stream.manifest), mix=mix)
    return dataclasses.replace(config, out=_absolute_address(config.out), stream=stream)


def _absolute_address(address: str) -> str:
    return os.path.abspath(address) if address and not is_remote(address) else address


class Driver:
    """Starts the workers, passes on their lines and our stop word, ends those that hang, keeps the history."""

    def __init__(self, config: RunConfig, signals: LocalHost, scratch: str, lease: Lease, *, embedded: bool) -> None:
        from cluster.bulletin import open_board

        self.config, self.signals, self.scratch, self.embedded = config, signals, scratch, embedded
        self.lease = lease
        self.folder = RunFolder(config.out, config.storage, lease)
        self.choice = self._choose()
        self._name, self._board = open_board(self._begin(), Restarts(config.cluster, config.out))
        self._trainer = self._make_trainer()
        self._error: BaseException | None = None
        self._leaving = threading.Event()
        self._told, self._spoke = False, 0.0
        self._ended: set[int] = set()

    def _choose(self) -> Choice:
        """GPUs or CPUs, for as long as this command lasts. Raises ConfigError."""
        asked, offer = self.config.engine.device, offered(embedded=self.embedded)
        choice = decide(asked, offer, before=ran_on(self.folder))
        print(f"device: {choice.kind} ({choice.why})", flush=True)
        if unused := hidden(choice, asked):
            print(unused, flush=True)
        least = self.config.cluster.least_workers
        if self.embedded and choice.kind == "cuda" and offer.now < least:
            raise ConfigError(f"{least} workers are asked for, a GPU each, and this machine has {offer.now:g}",
                              where="cluster.max_workers, cluster.min_workers",
                              hint=f"--cluster.max-workers {offer.now:g}, or --engine.device cpu")  # fmt: skip
        refuse_unsuited(self.config, torch.device(choice.kind))
        return choice

    def _make_trainer(self) -> Any:
        return _trainer(self.config, self._name, self.scratch, self.choice, self.lease.ticket,
                        embedded=self.embedded)

    def train(self) -> bool:
        """True: complete; False: stopped, and resumable. Raises UserError."""
        ending = "failed"
        stopped = {"time": time.time(), "kind": END, "reason": "stopped"}
        try:
            with at_end(lambda: self._record(stopped)):
                complete = self._train()
            ending = "complete" if complete else "stopped"
        finally:
            if not self.lease.lost:
                self._record({"time": time.time(), "kind": END, "reason": ending})
        return complete

    def _train(self) -> bool:
        print("starts the workers", flush=True)
        self._start_controller()
        try:
            return self._accompany()
        finally:
            self._leaving.set()
            self._fitting.join(FAREWELL_S)

    def _start_controller(self, delay_s: float = 0.0) -> None:
        """Off the main thread Ray Train leaves our signal handlers alone."""
        self._error = None
        self._fitting = threading.Thread(target=self._fit, args=(delay_s,), name="ray train", daemon=True)
        self._fitting.start()

    def _accompany(self) -> bool:
        """What `train` returns and raises, once it is clear."""
        import ray

        while True:
            if self.lease.lost:
                raise self.lease.lost
            alive = self._fitting.is_alive()
            try:
                notes = ray.get(self._board.take.remote())
            except ray.exceptions.RayError as error:
                raise self._lost(error) from error
            self._tell(notes)
            if notes.failure is not None:
                raise notes.failure
            if not alive:
                if not self._orphaned(notes):
                    return self._ending(notes)
                self._replace_controller()
            if self._told and notes.waiting_s > IDLE_S:
                print("stopped while no workers were there; the last checkpoint stays", flush=True)
                return False
            self._guard(notes)
            time.sleep(POLL_S)

    def _fit(self, delay_s: float) -> None:
        if self._leaving.wait(delay_s):
            return
        try:
            self._trainer.fit()
        except BaseException as error:  # noqa: BLE001  (judged in the main thread)
            self._error = error

    def _orphaned(self, notes: Any) -> bool:
        """Has Ray Train's controller died, and is there work left?"""
        from ray.exceptions import RayActorError

        complete = notes.ending is not None and notes.ending[1]
        return isinstance(self._error, RayActorError) and not complete and not self._told

    def _replace_controller(self) -> None:
        """Have the workers of the dead one end, if Ray has not yet seen to it, and start another one with its own."""
        import ray

        from cluster.trainer import give_back

        give_back()
        ray.get(self._board.abandon.remote())
        decision = ray.get(self._board.follow.remote(Failure("controller", "Ray Train's controller died")))
        if decision.give_up is None:
            self._trainer = self._make_trainer()
            self._start_controller(decision.delay_s)

    def _begin(self) -> int:
        """The step of the newest checkpoint; a run that goes on has the new start in its history."""
        names = checkpoint.complete(self.folder.at("checkpoints"))
        saved = checkpoint.step_of(names[-1]) or 0 if names else 0
        if any(self.folder.names("metrics/")):
            self._record({"time": time.time(), "kind": "driver", "reason": "the command was run again",
                          "step": saved, "saved": saved})  # fmt: skip
        return saved

    def _tell(self, notes: Any) -> None:
        """Pass on what was noted: lines to the terminal, restarts to the history, the stop word to the workers."""
        self.signals.starting = not notes.stepping
        for line in notes.lines:
            self.signals.say(line)
        for restart in notes.restarts:
            self._record(restart)
            self._ended.clear()
            then = "giving up" if restart["gave_up"] else f"again in {restart['delay_s']:.0f} s" if restart[
                "delay_s"] else "again at once"  # fmt: skip
            print(f"workers ended after step {restart['step']:,} ({restart['kind']}): {restart['reason']}; {then} from "
                  f"step {restart['saved']:,}", flush=True)  # fmt: skip
        if notes.stop and self.signals.received is None:
            self.signals.notice(notes.stop)
        if self.signals.received is not None and not self._told:
            self._told = True
            self._board.stop.remote()

    def _record(self, restart: dict[str, Any]) -> None:
        self.folder.append(HISTORY, json.dumps(restart))
        self.folder.flush()

    def _guard(self, notes: Any) -> None:
        """End workers that hang; say what is waited for, and not for ever."""
        machine = self.config.cluster
        found = hung(notes.pulses, start_s=machine.start_timeout_s, hang_s=machine.hang_timeout_s,
                     silence_s=machine.silence_timeout_s)  # fmt: skip
        meant = [one for one in found if one.rank in notes.places and notes.places[one.rank].pid not in self._ended]
        if meant:
            self._end(meant, notes.places)
        if notes.waiting_s > machine.start_timeout_s:
            raise ClusterError(f"no room for workers in {duration(notes.waiting_s)}: {self._shortage()}",
                               where=self.config.out, hint="start again when there is; the run goes on")  # fmt: skip
        if notes.waiting_s > WAITING_S and time.monotonic() - self._spoke > WAITING_S:
            self._spoke = time.monotonic()
            print(f"workers are not up yet: {self._shortage()}", flush=True)

    def _end(self, meant: list[Hung], places: dict[int, Any]) -> None:
        import ray

        failure = accusation(meant, places)
        ray.get(self._board.blame.remote(failure))
        pids = [places[one.rank].pid for one in meant]
        listed = f"process {pids[0]}" if len(pids) == 1 else f"processes {', '.join(map(str, pids))}"
        print(f"hung: {failure.reason}; SIGKILL to {listed}", flush=True)
        for one in meant:
            self._ended.add(places[one.rank].pid)
            end_process(places[one.rank].node, places[one.rank].pid)

    def _shortage(self) -> str:
        import ray

        config, has, wanted = self.config, ray.cluster_resources(), _resources(self.config, self.choice)
        each = ", ".join(f"{value:g} {name}" for name, value in wanted.items())
        there = ", ".join(f"{has.get(name, 0):g} {name}" for name in wanted)
        return (f"at least {config.cluster.least_workers} of {each} each are needed; the cluster has {there} "
                f"on {sum(node['Alive'] for node in ray.nodes())} machines")  # fmt: skip

    def _ending(self, notes: Any) -> bool:
        if notes.ending is not None and (notes.ending[1] or self._told):
            return bool(notes.ending[1])
        if self._told:
            return False  # told to stop between two groups of workers
        raise self._lost(self._error) from self._error

    def _lost(self, error: BaseException | None) -> UserError:
        last = [line for line in str(error or "").splitlines() if line.strip()][-1:] or ["it did not say why"]
        return ClusterError(f"Ray Train ended by itself: {last[0]}", where=self.config.out,
                            hint="--debug shows the whole trace; started again, the run goes on")  # fmt: skip


def _trainer(
    config: RunConfig, board: str, scratch: str, choice: Choice, ticket: Ticket, *, embedded: bool
) -> Any:
    """A run of Ray Train. Its name is new each time, as Ray Train goes by what it finds under a name it has had."""
    machine = config.cluster
    patience = PLACEMENT_S if _elastic(config) else machine.start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(machine.start_timeout_s + machine.hang_timeout_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig

    from cluster.guard import Guard
    from cluster.meeting import MeetingConfig
    from cluster.ray_host import TakeSigterm
    from cluster.trainer import Trainer

    gpus = choice.kind == "cuda"
    variables = dict(variable.split("=", 1) for variable in machine.environment)
    workers: Any = (machine.least_workers, machine.max_workers) if _elastic(config) else machine.max_workers
    callbacks: list[Any] = [Guard(board, config), TakeSigterm()]
    return Trainer(
        work,
        train_loop_config={"config": recipes.to_tree(config), "board": board, "embedded": embedded,
                           "kind": choice.kind, "ticket": ticket},
        torch_config=MeetingConfig(
            backend="nccl" if gpus else "gloo",
            timeout_s=round(machine.start_timeout_s + machine.collective_timeout_s),
            kind=choice.kind,
            board=board,
            out=config.out,
            storage=config.storage,
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker=_resources(config, choice),
            placement_strategy=machine.placement.upper(),
            elastic_resize_monitor_interval_s=machine.resize_every_s,  # type: ignore[call-arg]
        ),
        run_config=RayRunConfig(
            name=f"run-{uuid.uuid4().hex[:12]}",
            storage_path=scratch,
            callbacks=callbacks,
            failure_config=FailureConfig(  # Guard counts; mypy sees the fields of Ray Train's first version
                max_failures=-1,
                controller_failure_limit=-1,  # type: ignore[call-arg]
            ),
            worker_runtime_env={"env_vars": variables} if variables else None,
        ),
    )


def _resources(config: RunConfig, choice: Choice) -> dict[str, float]:
    """What Ray sets aside for a worker: its cores, and a GPU where the run is on GPUs."""
    import ray

    machine = config.cluster
    cpus = machine.cpus_per_worker
    if machine.workers_per_node:
        cores = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        smallest = min(filter(None, cores), default=0)
        cpus = max(cpus, math.floor(100 * smallest / machine.workers_per_node) / 100)
    return {"CPU": cpus, **({"GPU": 1} if choice.kind == "cuda" else {})}


def work(settings: dict[str, Any]) -> None:
    """What each worker does, in every group."""
    prepare()
    os.environ["REID_ENTRY"] = "cluster"
    import ray
    from ray import train

    from cluster.bulletin import Leaving, find_board
    from cluster.meeting import take_leave
    from cluster.ray_host import RayHost

    board = find_board(settings["board"])
    group, reason, wanted = ray.get(board.enter.remote())
    if not wanted:
        take_leave()
        return  # the group before met a mistake that a restart does not mend
    config = recipes.validate(settings["config"], where="the driver's recipe")
    context = train.get_context()
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_size=context.get_local_world_size(),
        device=own_device(settings["kind"]),
    )
    host = RayHost(board, group, world, config.cluster, embedded=settings["embedded"])
    try:
        with Follower(config.out, config.storage, settings["ticket"]) as guard:
            ending = pretrain(config, world=world, host=host, reason=reason, guard=guard)
        take_leave()
    except (ConfigError, DataError, LeaseError) as error:
        take_leave()
        ray.get(board.fail.remote(error))
        raise
    except Exception as error:
        said = f"rank {world.rank} on {host.place()}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ray.get(board.blame.remote(Failure("crash", said, host.where.node, world.rank)))
        raise
    finally:
        word = host.close()
    if world.leads:
        ray.get(board.end.remote(ending.step, ending.complete))
    if not ending.complete and word != "stop":
        raise Leaving(f"saved after step {ending.step}")
