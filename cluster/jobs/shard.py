"""Sharding as Ray tasks: the same code as on one machine, on as many machines as the cluster has.

A killed worker or node costs the tasks it was at, which start again elsewhere; a killed driver costs nothing that was
complete.
"""

import dataclasses

from cluster.core.arguments import ShardJob
from cluster.core.job_paths import refuse_relative
from cluster.core.ray_workers import RayWorkers, check_nodes
from cluster.core.session import LOCAL, chosen_address, ray_session
from cluster.core.shared_paths import marked, witnesses
from datapipe.commands.ingest import run_shard
from datapipe.core.resource_limits import available_cores
from datapipe.core.stop_signals import GOES_ON, unwinding
from datapipe.ingest.spool import FOLDER as SPOOL
from datapipe.storage import full_url, is_remote


def run(command: ShardJob) -> int:
    """Do the same as `python -m datapipe shard` with all CPUs of a cluster; the exit code says how it ended."""
    refuse_relative(command.places)
    address = chosen_address(command.address or "")
    command = _anywhere(command, joined=address != LOCAL)
    with (
        ray_session(address, cpus=command.config.workers or available_cores()),
        unwinding(GOES_ON),  # a KeyboardInterrupt is the one exception that Ray's calls pass on from a signal handler
    ):
        return _run(command, joined=address != LOCAL)


def _run(command: ShardJob, *, joined: bool) -> int:
    if not joined:
        return run_shard(command, RayWorkers(command.config.workers))
    places = [place for place in (command.out, command.config.spool) if place and not is_remote(place)]
    with marked(places) as marks:
        seen = (*marks, *witnesses(command.sources))
        check_nodes(seen)
        return run_shard(command, RayWorkers(command.config.workers, seen))


def _anywhere(command: ShardJob, *, joined: bool) -> ShardJob:
    """The command with paths that mean the same to workers in other folders and on other machines."""
    out, spool = full_url(command.out), command.config.spool and full_url(command.config.spool)
    if joined and is_remote(out) and not spool:
        spool = f"{out}/{SPOOL}"  # the default, this machine's temporary folder, no other machine sees
    return dataclasses.replace(command, sources=tuple(map(full_url, command.sources)), out=out,
                               config=dataclasses.replace(command.config, spool=spool))  # fmt: skip
