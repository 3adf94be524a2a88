"""How many cores this process may keep busy: what every count of workers and threads begins with."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PROC = Path("/proc/self")


def available_cores() -> int:
    """Cores of this machine that the process may use, at least 1.

    The smallest of: its affinity (taskset, Slurm's --cpus-per-task, docker's --cpuset-cpus), and the CPU quota of its
    control group and of all groups above that (docker's --cpus, a pod's limit, systemd's CPUQuota). A part of a core
    counts for nothing: of two threads on 1.5 cores that wait for each other, one is always held up.
    """
    cores = _by_affinity()
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.floor(quota + 1e-6)))


def _by_affinity() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13; obeys PYTHON_CPU_COUNT as well
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(proc: Path = PROC) -> float | None:
    """Cores that the scheduler grants to the control group of the process that `proc` describes; None: no limit.

    Version 2 (`cpu.max`) and 1 (`cpu.cfs_quota_us`, `cpu.cfs_period_us`), or both side by side.
    """
    found = [quota for folder in _group_folders(proc) if (quota := _quota_of(folder)) is not None]
    return min(found, default=None)


class _Hierarchy(NamedTuple):
    """Where control groups of one kind are mounted."""

    root: str
    """The group that the mount shows as its top."""
    place: Path
    controllers: frozenset[str] | None
    """Of version 1; None: version 2."""


def _group_folders(proc: Path) -> Iterator[Path]:
    """The folders of the groups that the process is in, from its own up to the top that it can see."""
    hierarchies = list(_hierarchies(proc))
    for line in _lines(proc / "cgroup"):
        number, names, group = line.split(":", 2)
        for hierarchy in hierarchies:
            of_kind = number == "0" if hierarchy.controllers is None else "cpu" in names.split(",")
            if of_kind and (hierarchy.controllers is None or "cpu" in hierarchy.controllers):
                yield from _upwards(hierarchy, group)


def _hierarchies(proc: Path) -> Iterator[_Hierarchy]:
    """From lines such as `32 31 0:29 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu`."""
    for line in _lines(proc / "mountinfo"):
        left, _, right = line.partition(" - ")
        mount, system = left.split(" "), right.split(" ")
        if len(mount) < 5 or len(system) < 3 or system[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = None if system[0] == "cgroup2" else frozenset(system[2].split(","))
        yield _Hierarchy(mount[3], Path(_unescaped(mount[4])), controllers)


def _upwards(hierarchy: _Hierarchy, group: str) -> Iterator[Path]:
    """A container sees its own group as the top, while the group's name may still be the host's: then only the top is
    looked at, as the groups between are not to be seen."""
    try:
        below = PurePosixPath(group).relative_to(hierarchy.root)
    except ValueError:
        below = PurePosixPath()
    if ".." in below.parts:
        below = PurePosixPath()
    for part in (below, *below.parents):
        yield hierarchy.place / part


def _quota_of(folder: Path) -> float | None:
    for line in _lines(folder / "cpu.max"):  # "150000 100000", or "max 100000"
        quota, _, period = line.partition(" ")
        return _ratio(quota, period or "100000")
    quotas, periods = _lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us")
    return _ratio(quotas[0], periods[0]) if quotas and periods else None


def _ratio(quota: str, period: str) -> float | None:
    """None for "max" and -1, which are no limit."""
    try:
        microseconds, every = int(quota), int(period)
    except ValueError:
        return None
    return microseconds / every if microseconds > 0 and every > 0 else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    """Blanks in mountinfo are written as octal numbers."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
