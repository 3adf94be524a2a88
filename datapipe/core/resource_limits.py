"""Cores and memory that this process may use, by its affinity and by control groups (cgroups), version 1 and 2.

Groups lie inside one another, and each may have a limit: the least of a process's own group and of all above it counts.
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

PROC = Path("/proc/self")
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""cgroup 2 and 1: the files with a group's limit and with what it holds, and the line of memory.stat with the bytes
of files that the kernel drops from memory when it needs them."""
UNLIMITED = 1 << 62
"""Version 1 gives a number near 2^63 where there is no limit, version 2 the word "max"."""
Number = TypeVar("Number", int, float)


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
    """Cores that the scheduler grants to the control group of the process that `proc` describes, or to one above it if
    that grants less; None: no limit.

    Version 2 (`cpu.max`) and 1 (`cpu.cfs_quota_us`, `cpu.cfs_period_us`), or both side by side.
    """
    return _least(_quota_of(folder) for folder in _group_folders(proc, "cpu"))


def memory_limit(proc: Path = PROC) -> int | None:
    """Bytes that the control group of the process that `proc` describes may hold, or one above it if that may hold
    less; None: no limit."""
    return _least(_memory_limit_of(folder) for folder in _group_folders(proc, "memory"))


def memory_left(proc: Path = PROC) -> int | None:
    """Bytes that the process can still get before its control group, or one above it, is full; cached files count as
    free. None: no limit."""
    return _least(_memory_left_in(folder) for folder in _group_folders(proc, "memory"))


def _least(limits: Iterable[Number | None]) -> Number | None:
    return min((number for number in limits if number is not None), default=None)


class _Hierarchy(NamedTuple):
    """Where control groups of one kind are mounted."""

    root: str
    """The group that the mount shows as its top."""
    place: Path
    controllers: frozenset[str] | None
    """Names of the controllers in cgroup version 1; None: version 2."""


def _group_folders(proc: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups that the process is in, from its own up to the top that it can see. `controller`: "cpu"
    or "memory"."""
    hierarchies = list(_hierarchies(proc))
    for line in _lines(proc / "cgroup"):
        number, names, group = line.split(":", 2)
        for hierarchy in hierarchies:
            of_kind = number == "0" if hierarchy.controllers is None else controller in names.split(",")
            if of_kind and (hierarchy.controllers is None or controller in hierarchy.controllers):
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


def _memory_limit_of(folder: Path) -> int | None:
    limits = (_whole_number(folder / limit) for limit, _, _ in MEMORY_FILES)
    return next((limit for limit in limits if limit is not None and limit < UNLIMITED), None)


def _memory_left_in(folder: Path) -> int | None:
    limit = _memory_limit_of(folder)
    facts = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    for _, used_name, cached in MEMORY_FILES:
        used = _whole_number(folder / used_name)
        if limit is not None and used is not None:
            return max(0, limit - used + int(facts.get(cached, 0)))
    return None


def _whole_number(file: Path) -> int | None:
    try:
        return int("".join(_lines(file)))
    except ValueError:
        return None


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
