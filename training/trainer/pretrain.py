"""One rank of a training run, from the last good checkpoint to its end or a stop."""

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from datapipe.core.config import StreamConfig, ViewConfig
from datapipe.core.errors import ConfigError, UserError
from datapipe.core.process_setup import numbers_in_environment
from datapipe.core.progress import counted
from datapipe.core.resource_limits import available_cores
from training.checkpoint import Checkpoints
from training.config.build import allows_tf32, fake_batch, initial_method, make_stepper
from training.config.continuation import BegunRules, ran_on
from training.config.run_config import RunConfig
from training.config.run_plan import RunPlan, clustered, make_loader, plan_run
from training.core.devices import Device, slow_precision, unused_gpus
from training.core.exchange import Exchange
from training.core.host import Host, lines_to, run_lines
from training.core.precision import tf32_products
from training.core.run_folder import crash_log, starting
from training.core.run_folder.lease import Follower, Lease, lease_on
from training.core.run_folder.run_folder import RunFolder
from training.core.run_folder.write_guard import Ticket, WriteGuard
from training.core.world import World, alone
from training.engine.clock import Clock
from training.engine.loss_scaling import first_scale
from training.engine.state_fragments import Piece
from training.engine.stepper import Stepper
from training.methods.base import Method
from training.nn.vision_transformer import parameter_count
from training.preflight import cpu_forecast
from training.preflight.checks import check, refuse_split, refuse_unsuited
from training.preflight.compiler import refuse_without_compiler, settle_compiled, share_cores
from training.preflight.memory_advice import training_memory
from training.trainer.batch_to_device import BatchToDevice
from training.trainer.determinism import deterministic, guarantee
from training.trainer.loop import Segment, TrainingRun, rehearse, train
from training.trainer.milestones import Milestones
from training.trainer.monitoring.heartbeat import Startup
from training.trainer.monitoring.rank_log import rank_log
from training.trainer.monitoring.recorder import LEGEND, log_file
from training.trainer.monitoring.utilisation import yardstick
from training.trainer.nonfinite import Faults, Rewind
from training.trainer.observers import make_observers
from training.trainer.provenance import about, describe, resume_command, show_first_batch
from training.weights.initialise import in_words

if TYPE_CHECKING:
    from datapipe.stream.loader import Loader
    from training.trainer.pseudo_labels import PseudoLabels


class Ending(NamedTuple):
    """How a call of `pretrain` ended."""

    step: int
    complete: bool
    """False: it was told to stop, saved, and goes on when started again."""


def pretrain(
    config: RunConfig, *, world: World, host: Host, reason: str = "started", guard: WriteGuard | None = None
) -> Ending:
    """Run the recipe in this process as one rank of `world`, from the last good checkpoint to the end or a stop.

    Every rank calls this with the same `config`. Returns the same Ending on all ranks. `guard`: of the run folder,
    where the caller holds its lease; else the leading rank takes it for as long as this lasts. Raises LeaseError where
    another process has it, or takes it over.
    """
    startup = Startup()
    refuse_unsuited(config, world.device)  # and what `check` refuses: nothing has been written by then
    if config.backbone.compile_blocks is True:
        refuse_without_compiler(world.device)
        share_cores(world)
    with (
        lines_to(host.show_line) if world.is_leader else contextlib.nullcontext(),
        numbers_in_environment(),
        _writing(config, world, host, guard) as guard,
        training_memory(config, world),
        deterministic(config.engine.deterministic),
        tf32_products(allows_tf32(config)),
    ):
        _use_threads(config, world)
        run_lines.info(f"reads the data set {' + '.join(config.stream.mix) or config.stream.manifest}")
        plan = _plan(config, world)
        if reason == "started":  # later on memory of workers that were ended may not be free yet
            cpu_forecast.refuse_want_of_memory(config, world, place=host.place())
        folder = RunFolder(config.out, config.storage, guard)
        if world.is_leader:
            refuse_slower(config, folder, world)
        with rank_log(folder, world, host), _noted(folder, startup) if world.is_leader else contextlib.nullcontext():
            return _pretrain(plan, folder, world, host, reason, startup)


def pretrain_alone(
    config: RunConfig, host: Host, *, guard: WriteGuard | None = None, device: Device | None = None, index: int = 0
) -> Ending:
    """Run the recipe in this process as the only rank; an error is left in the run folder.

    `device`: in place of the recipe's, with `index`, of its GPU among those that this process sees. `guard` as in
    `pretrain`.
    """
    with (
        crash_log.kept(config.out, config.storage, 0, log=True),
        alone(device or config.engine.device, index=index, group=config.engine.stepper == "deepspeed") as world,
    ):
        return pretrain(config, world=world, host=host, guard=guard)


def _noted(folder: RunFolder, startup: Startup) -> contextlib.AbstractContextManager[None]:
    """Lines of the start are noted in the run folder, until steps begin."""
    return lines_to(lambda line: None if startup.over else starting.note(folder, line))


def _plan(config: RunConfig, world: World) -> RunPlan:
    """The leading rank looks into the run folder and the data set for all and refuses what can be refused, which all
    raise."""
    machines = len(set(world.nodes()))
    found: RunPlan | UserError | None = None
    if world.is_leader:
        try:
            found = check(config, world.size, machines)
        except UserError as error:
            found = error
    word: Any = world.broadcast((BegunRules.of(found.config), found.data) if isinstance(found, RunPlan) else found)
    if isinstance(word, UserError):
        raise word
    if isinstance(found, RunPlan):
        return found
    rules, data = word
    return plan_run(rules.set_in(config), data, world.size, machines)


@contextlib.contextmanager
def _writing(config: RunConfig, world: World, host: Host, guard: WriteGuard | None) -> Iterator[WriteGuard]:
    """The rank's guard of the run folder. What the leading rank meets in place of a lease all raise."""
    if guard is not None:
        guard.settle()
        yield guard
        return
    lease: Lease | None = None
    outcome: Ticket | UserError | None = None
    if world.is_leader:
        try:
            lease = lease_on(config.out, config.storage, config.cluster.lease_s, has_workers=world.size > 1,
                             show_line=host.show_line)  # fmt: skip
            lease.settle()
            outcome = lease.ticket
        except UserError as error:
            outcome = error
    outcome_of_leader = world.broadcast(outcome)
    if isinstance(outcome_of_leader, UserError):
        raise outcome_of_leader
    with lease or Follower(config.out, config.storage, outcome_of_leader) as guard:
        yield guard


def refuse_slower(config: RunConfig, folder: RunFolder, world: World) -> None:
    """Raises ConfigError where a run that was on GPUs would go on on CPUs though nobody said so."""
    if config.engine.device == "auto" and world.device.type == "cpu" and ran_on(folder) == "cuda":
        raise ConfigError("this run was trained on GPUs so far, and there is none here", where=folder.url,
                          hint="--engine.device cpu goes on with it on CPUs")  # fmt: skip


def _pretrain(plan: RunPlan, folder: RunFolder, world: World, host: Host, reason: str, startup: Startup) -> Ending:
    config, clock, split = plan.config, plan.clock, plan.split
    if world.is_leader and reason == "started" and (warning := cpu_forecast.warning(config, clock, world)):
        run_lines.info(warning)
    run_lines.info(f"builds {config.method.name} with {config.backbone.arch}" + (
        f" from {config.init.weights}" if config.init.weights else ""))  # fmt: skip
    method, origin = initial_method(config)
    refuse_split(config, split, couples=method.couples_batch())
    if world.is_leader:
        describe(plan, folder, world)
    method = method.to(world.device)
    run_lines.info(f"starts the engine ({config.engine.stepper}, {counted(world.size, 'rank')}, {world.device.type})")
    stepper = make_stepper(config, method, world, split)
    world.expect_within(config.cluster.start_timeout_s + config.cluster.collective_timeout_s)  # DeepSpeed's groups, too
    checkpoints = Checkpoints(
        folder.at("checkpoints"),
        config.checkpoints,
        world,
        about=about(plan, world, origin),
        replaces=plan.data.replaces,
        epoch_steps=clock.epoch_steps,
        guard=folder.guard,
    )
    startup.reached("engine")
    run_lines.info("looks for a checkpoint")
    position, resumed = checkpoints.restore(stepper)
    if checkpoints.spoiled:
        _begin_anew(stepper, config)
    startup.reached("restored")
    if world.is_leader and (reason == "started" or resumed is None):
        show_first_batch(plan, folder)  # what a start of this command before has shown stays
    if resumed is not None:
        host.saved(position // clock.batch)  # whoever was to tell may have died before
    exchange, measure = Exchange(world), yardstick(config, world)
    with make_loader(plan, world) as loader:
        observers = make_observers(
            plan, method, folder, world, host, exchange=exchange, loader=loader, checkpoints=checkpoints, about={
                "world": world.size, "resumed_from": resumed, "step": position // clock.batch, "reason": reason,
                "startup": startup.times,
            }, measure=measure)  # fmt: skip
        place = BatchToDevice(world.device, config.views.statistics)
        run = TrainingRun(
            method=method, stepper=stepper, loader=loader, clock=clock,
            place=place, copies=place if world.device.type == "cuda" else None,
            optimisation=config.optimisation, micro_batch=split.micro_batch, checkpoints=checkpoints, host=host,
            faults=Faults(folder, world), exchange=exchange, observers=observers, flush=folder.flush,
        )  # fmt: skip
        milestones = Milestones(config, clock, folder, world, host)
        labels = _pseudo_labels(plan, method, loader, world, host, folder)
        if position >= clock.end:
            milestones.score(position)
            run_lines.info(f"complete: {counted(clock.total_steps, 'step')}, done before; {config.out}")
            run_lines.info(f"next: python -m training {_next(config)}")
            return Ending(clock.total_steps, True)
        steps = clock.total_steps - position // clock.batch
        settle_compiled(config, method, world, micro_batch=split.micro_batch, steps=steps)
        run_lines.info("rehearses one micro-batch" + (", compiles" if config.backbone.compile_blocks is True else ""))
        rehearse(run, fake_batch(plan.spec, split, config))
        for observer in observers:
            observer.begin()
        with log_file(folder) if world.is_leader else contextlib.nullcontext():
            for line in (*_first_lines(plan, world, method, origin, resumed, reason), measure.in_words(), *LEGEND):
                run_lines.info(line)
            run_lines.info("reads the first batch")
            startup.over = True
            if world.is_leader:
                starting.note(folder, "")
            position, done = _train(run, checkpoints, config, milestones, labels, position)
            for line in _closing(config, position // clock.batch, clock, done):
                run_lines.info(line)
    for observer in observers:
        observer.close()
    return Ending(position // clock.batch, done)


def _train(
    run: TrainingRun, checkpoints: Checkpoints, config: RunConfig, milestones: Milestones,
    labels: "PseudoLabels | None", position: int,
) -> tuple[int, bool]:  # fmt: skip
    """Segment after segment: each ends with a checkpoint, milestones are scored; an epoch of pseudo labels begins with
    its labels. (samples seen, whether all of the run is done)."""
    scored = milestones.ends()
    ends = sorted({*scored, *(labels.ends() if labels else ())})
    if position in scored:  # stopped before it was scored
        milestones.score(position, run.observers)
    while position < ends[-1]:
        end = next(end for end in ends if end > position)
        try:
            if labels is not None and labels.begin(position):
                for observer in run.observers:
                    observer.labelled()
            position, done = train(run, Segment(end), position=position)
        except Rewind:
            position, name = checkpoints.restore(run.stepper)
            if name is None:
                _begin_anew(run.stepper, config)
            for observer in run.observers:
                observer.began_anew()
            continue
        last = position >= ends[-1]
        if not done or (
            run.stop.reached and (not last or config.evaluation.data)
        ):  # the rest can wait for the next start
            return position, False
        if end in scored:
            milestones.score(position, run.observers)
        for observer in run.observers:
            observer.began_anew()
    return position, True


def _pseudo_labels(
    plan: RunPlan, method: Method, loader: "Loader", world: World, host: Host, folder: RunFolder
) -> "PseudoLabels | None":
    """Pseudo labels of a run that learns from clusters. Other runs import nothing of what makes them."""
    if clustered(plan.config) is None:
        return None
    from training.trainer.pseudo_labels import make_pseudo_labels

    return make_pseudo_labels(plan, method, loader, world=world, host=host, folder=folder)


def _begin_anew(stepper: Stepper, config: RunConfig) -> None:
    """The state before the first step: initial weights, no moments."""
    state = initial_method(config)[0].state_dict()
    stepper.method.adopt_shapes({name: tuple(value.shape) for name, value in state.items()})
    initial = {f"model/{name}": value.view(-1) for name, value in state.items()}

    def fill(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            piece.values.copy_(initial[piece.key][piece.start : piece.end])

    with torch.no_grad():
        stepper.restore({}, fill)
    stepper.scale = first_scale(config.optimisation.precision)


def _use_threads(config: RunConfig, world: World) -> None:
    torch.set_num_threads(config.engine.threads or max(1, available_cores() // world.local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)


def _first_lines(
    plan: RunPlan, world: World, method: Method, origin: Mapping[str, Any], resumed: str | None, reason: str
) -> Iterator[str]:
    """What a record begins with: why and how it starts, what is slower than it could be, what is guaranteed."""
    config = plan.config
    if reason != "started":
        yield reason
    yield _opening(plan, resumed, method)
    slow = slow_precision(config.optimisation.precision, world.device)
    yield from filter(None, (slow, unused_gpus(world.device, config.engine.device)))
    if config.views.version != ViewConfig().version:
        yield f"views are cut and resized by version {config.views.version} of the rules (views.version)"
    if plan.machines > 1 and config.stream.assignment_version != StreamConfig().assignment_version:
        yield (f"crops are shared among machines by version {config.stream.assignment_version} of the rule "
               "(stream.assignment_version)")  # fmt: skip
    yield f"stopped and resumed: {guarantee(config, world)}"
    if origin and resumed is None:
        yield in_words(origin)


def _opening(plan: RunPlan, resumed: str | None, method: Method) -> str:
    config, clock = plan.config, plan.clock
    trained = parameter_count(method, trained=True)
    start = f"goes on from {resumed}" if resumed else "starts"
    size = f"{trained / 1e6:.1f} M" if trained >= 1e5 else f"{trained / 1e3:.1f} k"
    return (
        f"{config.method.name} {start}: {counted(plan.data.rows, 'crop')}, {counted(clock.total_steps, 'step')} of "
        f"{clock.batch}; {size} parameters, {config.optimisation.precision}, {config.engine.stepper}"
    )


def _closing(config: RunConfig, step: int, clock: Clock, done: bool) -> Iterator[str]:
    if done:
        yield f"complete: {counted(step, 'step')}; {config.out}"
        yield f"next: python -m training {_next(config)}"
    else:
        yield f"stopped after step {step:,} of {clock.total_steps:,}; go on with: {shlex.join(resume_command(config))}"


def _next(config: RunConfig) -> str:
    """What is done with a complete run: its report, where it has scored itself, else its scores."""
    out = shlex.quote(config.out)
    return f"report {out}" if config.evaluation.data else f"evaluate {out} --data FOLDER_OF_A_TEST_SET"
