"""Room on the cluster's machines that a controller of Ray Train which died, or failed to start workers, still holds."""

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group


def give_back() -> None:
    """Remove the placement groups of this job, and with them what runs there."""
    job = ray.get_runtime_context().get_job_id()
    for identity, group in placement_group_table().items():
        if identity.endswith(job) and group["state"] != "REMOVED":  # an id ends with that of its job
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))
