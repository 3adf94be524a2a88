"""What each worker process of a run under Ray Train does: one rank, from the driver's recipe to its end.

The driver hands `work` on, and needs none of what it imports.
"""

import os
from typing import Any

from cluster.core.devices import own_device
from cluster.core.session import prepare
from cluster.train.watch.restart_policy import Failure
from datapipe.core.errors import ConfigError, DataError, LeaseError
from training.config import recipe_toml as recipes
from training.core.run_folder.lease import Follower
from training.core.world import World


def work(settings: dict[str, Any]) -> None:
    """What each worker does, in every group."""
    prepare()
    os.environ["REID_ENTRY"] = "cluster submit" if settings["in_job"] else "cluster"
    import ray
    from ray import train

    from cluster.train.coordinator import Leaving, find_coordinator
    from cluster.train.rendezvous import take_leave
    from cluster.train.worker_host import RayHost
    from training.trainer.pretrain import pretrain

    coordinator = find_coordinator(settings["coordinator"])
    group, reason, wanted = ray.get(coordinator.enter.remote())
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
    host = RayHost(coordinator, group, world, config.cluster, embedded=settings["embedded"])
    try:
        with Follower(config.out, config.storage, settings["ticket"]) as guard:
            ending = pretrain(config, world=world, host=host, reason=reason, guard=guard)
        take_leave()
    except (ConfigError, DataError, LeaseError) as error:
        take_leave()
        ray.get(coordinator.fail.remote(error))
        raise
    except Exception as error:
        what = f"rank {world.rank} on {host.place()}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ray.get(coordinator.blame.remote(Failure("crash", what, host.where.node, world.rank)))
        raise
    finally:
        word = host.close()
    if world.is_leader:
        ray.get(coordinator.end.remote(ending.step, ending.complete))
    if not ending.complete and word != "stop":
        raise Leaving(f"saved after step {ending.step}")
