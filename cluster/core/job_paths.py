"""Paths of a Ray job, which must not be relative. Imports next to nothing, as workers of any kind import it, too."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from datapipe.core.errors import ConfigError
from datapipe.storage import is_remote

if TYPE_CHECKING:
    from training.config.run_config import RunConfig

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the command of a job, and for nothing else."""


def refuse_relative(paths: Mapping[str, str], *, job: bool | None = None) -> None:
    """Raises ConfigError for relative paths where this process is a Ray job, or for a `job` that will be one: there the
    working directory is Ray's temporary copy, on one machine, removed afterwards."""
    relative = [name for name, path in paths.items() if path and not is_remote(path) and not os.path.isabs(path)]
    if relative and (IN_JOB in os.environ if job is None else job):
        listed = ", ".join(f"{name} = {paths[name]}" for name in relative)
        raise ConfigError(
            "relative paths in a Ray job: they would lie in Ray's temporary copy of the working tree", where=listed,
            hint="s3://bucket/prefix, or an absolute path that all machines share",
        )  # fmt: skip


def paths_of(config: "RunConfig") -> dict[str, str]:
    """Every place that a run reads from or writes to."""
    mix = {f"stream.mix[{number}]": address for number, address in enumerate(config.stream.mix)}
    return {"out": config.out, "stream.manifest": config.stream.manifest, **mix, "init.weights": config.init.weights}
