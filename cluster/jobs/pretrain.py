"""Pre-training as a Ray Train job: workers that are started anew from the last checkpoint until the run is complete."""

import dataclasses
import math

from cluster.core.job_paths import paths_of, refuse_relative
from cluster.core.session import LOCAL, ray_session
from cluster.train.driver import Driver
from datapipe.core.cli import COMPLETE, STOPPED
from datapipe.core.progress import counted
from datapipe.core.resource_limits import available_cores
from datapipe.storage import full_url
from training.config.batch_split import expected_workers, most_useful
from training.config.run_config import RunConfig
from training.core.devices import choose_device
from training.core.host import LocalHost, exit_code
from training.core.run_folder.lease import Lease, lease_on
from training.preflight import cpu_forecast
from training.preflight.checks import check, refuse_unsuited


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
        cpu_forecast.refuse_on_this_machine(config, _local_workers(config), device)
    if lease is not None:
        return _run(config, address, lease)
    with lease_on(config.out, config.storage, config.cluster.lease_s, has_workers=True) as lease:
        return _run(config, address, lease)


def _run(config: RunConfig, address: str, lease: Lease) -> int:
    print(f"reads the data set {' + '.join(config.stream.mix) or config.stream.manifest}", flush=True)
    plan = check(config, expected_workers(config))
    size = f"{counted(plan.data.rows, 'crop')}, {counted(plan.clock.total_steps, 'step')}"
    print(f"pretrain: {config.method.name}, {size}; run folder {config.out}", flush=True)
    with LocalHost(starting=True) as signals, ray_session(address, cpus=_cpus(config)) as scratch:
        lease.settle()  # as a rule Ray's start took longer
        driver = Driver(config, signals, scratch, lease, embedded=address == LOCAL)
        complete = driver.train()
    if complete:
        return COMPLETE
    return STOPPED if signals.received is None else exit_code(signals.received)


def _local_workers(config: RunConfig) -> int:
    """Number of workers of an embedded Ray on CPUs."""
    return config.cluster.max_workers or min(most_useful(config), int(_cpus(config) // config.cluster.cpus_per_worker))


def _cpus(config: RunConfig) -> int:
    """Cores that an embedded Ray may hand out: at least what its workers ask for."""
    machine = config.cluster
    return max(available_cores(), math.ceil(max(machine.least_workers, machine.max_workers) * machine.cpus_per_worker))


def _absolute(config: RunConfig) -> RunConfig:
    """Workers run in other folders: local paths are made absolute here."""
    stream = dataclasses.replace(config.stream, manifest=full_url(config.stream.manifest),
                                 mix=tuple(map(full_url, config.stream.mix)))  # fmt: skip
    return dataclasses.replace(config, out=full_url(config.out), stream=stream)
