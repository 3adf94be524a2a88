"""How many workers a run has: at least and at most, by the recipe and by what the cluster has or can get."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cluster.core.devices import autoscaled
from datapipe.core.errors import ConfigError
from datapipe.core.progress import counted
from training.config.cluster import ClusterConfig

LARGEST = 1_024
"""Workers that a cluster without an autoscaler may have while the command lasts, where the recipe leaves their number
to it: machines may join at any time. Ray looks for places for as many every 20 s, so not without bound."""


class GroupSize(NamedTuple):
    """Fewest and most workers of a group."""

    least: int
    most: int
    present: int
    """That there is room for now."""

    @property
    def elastic(self) -> bool:
        """May the number change during the run?"""
        return self.least < self.most

    def __str__(self) -> str:
        if not self.elastic:
            return f"{counted(self.most, 'worker')}, no more and no fewer"
        return f"{self.least} to {counted(self.most, 'worker')}, room for {self.present} now"


def group_size(machine: ClusterConfig, *, useful: int, present: int, later: float | None, embedded: bool) -> GroupSize:
    """`useful`: most workers that the batch has images for; `present`: that the cluster has room for now; `later`: all
    in all, with what its autoscaler can start: 0 where there is none, None where it does not say; `embedded`: Ray lives
    in this process, so that no machine comes or goes.

    Raises ConfigError where there is too little room for ever, or nothing says how many there could be.
    """
    least = machine.least_workers
    if embedded:
        most = min(machine.max_workers or useful, present)
        if most < least:
            raise ConfigError(f"{counted(least, 'worker')} at least, and this machine has room for {present}",
                              where="cluster.min_workers", hint=f"--cluster.min-workers {most or 1}")  # fmt: skip
        return GroupSize(most, most, present)
    if machine.max_workers:
        return GroupSize(least, machine.max_workers, present)
    if later is None:
        most = present
    else:
        most = max(present, int(later) or LARGEST)
    if not max(most, machine.min_workers):
        raise ConfigError("there is no room for a worker yet, and nothing says how much there can be",
                          where="cluster.max_workers = 0", hint="--cluster.max-workers N, or --cluster.min-workers N"
                          )  # fmt: skip
    return GroupSize(least, max(min(most, useful), least), present)


def room(nodes: Iterable[Mapping[str, Any]], wanted: Mapping[str, float]) -> int:
    """Workers with so much each that fit on Ray's machines, whatever else runs there."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(min(int(has.get(name, 0) / each + 1e-6) for name, each in wanted.items()) for has in alive)


def of_cluster(machine: ClusterConfig, wanted: Mapping[str, float], *, useful: int, embedded: bool) -> GroupSize:
    """`group_size` on the cluster that this process has joined. `wanted`: what Ray sets aside for a worker."""
    import ray

    later: float | None = 0.0
    if not embedded and not machine.max_workers:
        name = "GPU" if "GPU" in wanted else "CPU"
        units = autoscaled(name)
        later = None if units is None else units / wanted[name]
    return group_size(machine, useful=useful, present=room(ray.nodes(), wanted), later=later, embedded=embedded)
