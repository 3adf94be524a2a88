"""Ray Train's trainer for a driver that sees itself to what a dead controller leaves behind."""

from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group


class Trainer(TorchTrainer):
    """Without the detached actor that gives back the room of a controller which died: it asks Ray's dashboard, and
    where there is none it does nothing for ever, whatever becomes of driver and cluster. The driver calls `give_back`;
    when it dies itself, Ray gives back all that its job holds."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # it sees the first version
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]


def give_back() -> None:
    """Remove the placement groups of this job, and with them what runs there."""
    job = ray.get_runtime_context().get_job_id()
    for identity, group in placement_group_table().items():
        if identity.endswith(job) and group["state"] != "REMOVED":  # an id ends with that of its job
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))
