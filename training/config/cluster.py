"""What a recipe says of machines: how many workers, where, how long to wait for them, and when to give up."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from datapipe.core.errors import ConfigError
from datapipe.core.settings import settings

_SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE", re.IGNORECASE)


def _variable(text: str) -> str:
    """Raises ConfigError, which unlike a ValueError does not repeat what may be a secret."""
    name, equals, _ = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError("not NAME=VALUE", where="cluster.environment", hint="NCCL_SOCKET_IFNAME=eth0")
    if _SECRET.search(name):
        raise ConfigError(f"{name} looks like a secret, and recipes are saved and shown", where="cluster.environment",
                          hint="set it in the environment of the machines themselves")  # fmt: skip
    return text


Variable = Annotated[str, AfterValidator(_variable)]


@settings
class ClusterConfig:
    max_workers: int = Field(default=0, ge=0)
    """Processes, one per GPU (or per CPU share): as many as there is room for, up to this. 0: as many as the cluster
    has room for, or its autoscaler can bring, up to one for each image of the batch."""
    min_workers: int = Field(default=0, ge=0)
    """Fewest to run with. With machines gone the run goes on with fewer, with machines back with more; the global
    batch stays. 0: whatever is left. As many as max_workers: a fixed group, which waits until all have room."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPU cores that Ray sets aside for each."""
    workers_per_node: int = Field(default=0, ge=0)
    """Most workers on one machine: each is given that part of the smallest machine's cores. 0: as many as fit."""
    placement: Literal["pack", "spread"] = "pack"
    """"pack": on as few machines as possible, for the shortest way between them; "spread": on as many."""
    environment: tuple[Variable, ...] = ()
    """NAME=VALUE set for workers, such as NCCL_SOCKET_IFNAME=eth0. Never for secrets: machines have their own."""
    standby: bool = True
    """Have one process on each machine import what workers need and fork them, and as many wait as the machine has
    workers, so that a restart need not import: half a gigabyte a machine, and a tenth for each that waits, taken only
    where it is free. False: each process imports anew."""
    resize_every_s: float = Field(default=60.0, gt=0)
    """Seconds between looks for room for more workers. Each change of size saves and starts all workers anew."""
    max_failures: int = Field(default=8, ge=0)
    """Failures in a row, without a new checkpoint between them, after which the run gives up; it stays resumable. Three
    in a row on the same machine of several are enough."""
    restart_delay_s: float = Field(default=2.0, ge=0)
    """Seconds before the second restart in a row, doubled for each that follows, up to 120. The first comes at once."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds for room to be found, and seconds that workers may stand still before their first step: without importing
    or reading anything more, as in a first compilation. A start that is slow may take as long as it takes; one for
    which no machine could ever have room, or whose workers do not reach each other, ends or is told in a minute."""
    hang_timeout_s: float = Field(default=180.0, gt=0)
    """Seconds after the first step without a next one on any worker, after which those that are furthest behind count
    as hung and are killed; all of them, and no machine is blamed, where they stand at the same place. Longer than the
    longest save and than an outage of the storage that is to be survived. Scoring at a milestone may take longer."""
    silence_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after the first step without a sign of life from a worker's process (it gives one twice a second, also
    while it waits for data or storage) after which it counts as hung, as long as others do give signs."""
    collective_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after the first step after which a worker no longer waits for its peers in a collective, in any process
    group; the last resort. Before it start_timeout_s is added. What one worker does alone while the others wait
    (scores, the end of a save) is not bound by it."""
    lease_s: float = Field(default=12.0, ge=0.5, le=20)
    """Seconds without a sign of life from the writer of a run folder after which a command on another machine may take
    it over. A writer that was stopped or cut off for as long asks whether it was taken over before it writes on."""
    notice: str = ""
    """File or http(s) address that says when this machine will be taken away: looked at every notice_every_s by each
    machine; the file's being there, or an answer other than 404, false or none, is the notice. On AWS
    http://169.254.169.254/latest/meta-data/spot/instance-action, on Google Cloud
    http://metadata.google.internal/computeMetadata/v1/instance/preempted."""
    notice_every_s: float = Field(default=5.0, gt=0)
    """Seconds between looks."""

    @model_validator(mode="after")
    def _ordered(self) -> "ClusterConfig":
        if self.max_workers and self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than max_workers {self.max_workers}")
        return self

    @property
    def least_workers(self) -> int:
        """Fewest workers that the run goes on with."""
        return self.min_workers or 1
