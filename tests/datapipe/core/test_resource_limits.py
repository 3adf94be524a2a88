"""Cores and memory that a process may use: its affinity, and limits of control groups of both versions."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from datapipe.core import resource_limits
from datapipe.core.parallel import Workers
from datapipe.core.resource_limits import available_cores, cpu_quota, memory_left, memory_limit
from tests.support.golden import ROOT


def _proc(folder: Path, cgroup: str, mountinfo: str) -> Path:
    """A stand-in for /proc/self; {} in the mounts is the folder in which the hierarchies are."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mountinfo.replace("{}", str(folder)))
    return proc


def _files(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


V2 = "29 23 0:26 / {}/cg rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(("own", "above", "quota"), [
    ("150000 100000\n", "max 100000\n", 1.5), ("max 100000\n", "200000 100000\n", 2.0),
    ("400000 100000\n", "50000 50000\n", 1.0), ("max 100000\n", "max 100000\n", None),
])  # fmt: skip
def test_quota__version_2_is_the_least_of_all_groups_above(
    tmp_path: Path, own: str, above: str, quota: float | None
) -> None:
    _files(tmp_path / "cg" / "pod", cpu__max=above)
    _files(tmp_path / "cg" / "pod" / "job", cpu__max=own)
    assert cpu_quota(_proc(tmp_path, "0::/pod/job\n", V2)) == quota


def test_quota__version_1_with_its_controller_among_others(tmp_path: Path) -> None:
    mounts = "32 31 0:29 / {}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n33 31 0:30 / {}/x rw - cgroup c cpuset\n"
    _files(tmp_path / "cpu,cpuacct" / "slurm" / "job", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    _files(tmp_path / "cpu,cpuacct" / "slurm", cpu__cfs_quota_us="300000\n", cpu__cfs_period_us="100000\n")
    proc = _proc(tmp_path, "5:cpuset:/slurm/job\n4:cpu,cpuacct:/slurm/job\n0::/slurm/job\n", mounts)
    assert cpu_quota(proc) == 3.0


@pytest.mark.parametrize("group", ["/docker/0123", "/../../docker/0123", "/elsewhere"])
def test_quota__a_container_sees_its_own_group_as_the_top(tmp_path: Path, group: str) -> None:
    _files(tmp_path / "a folder", cpu__max="250000 100000\n")
    mounts = "29 23 0:26 /docker/0123 {}/a\\040folder rw - cgroup2 cgroup2 rw\n"
    assert cpu_quota(_proc(tmp_path, f"0::{group}\n", mounts)) == 2.5


@pytest.mark.parametrize("text", ["", "max\n", "0 100000\n", "word\n"])
def test_quota__nothing_that_can_be_read_is_no_limit(tmp_path: Path, text: str) -> None:
    _files(tmp_path / "cg", cpu__max=text)
    assert cpu_quota(_proc(tmp_path, "0::/\n", V2)) is None
    assert cpu_quota(tmp_path / "absent") is None


def test_memory__version_2_is_the_least_of_all_groups_above(tmp_path: Path) -> None:
    job, step = tmp_path / "cg" / "job", tmp_path / "cg" / "job" / "step"
    _files(job, memory__max="5000\n", memory__current="3000\n", memory__stat="anon 1\ninactive_file 500\n")
    _files(step, memory__max="max\n", memory__current="3000\n", memory__stat="inactive_file 500\n")
    proc = _proc(tmp_path, "0::/job/step\n", V2)
    assert (memory_limit(proc), memory_left(proc)) == (5_000, 2_500)
    _files(step, memory__max="4000\n")
    assert (memory_limit(proc), memory_left(proc)) == (4_000, 1_500)


def test_memory__version_1_with_its_own_hierarchy(tmp_path: Path) -> None:
    mounts = "32 31 0:29 / {}/cpu rw - cgroup cgroup rw,cpu\n33 31 0:30 / {}/memory rw - cgroup cgroup rw,memory\n"
    proc = _proc(tmp_path, "9:cpu,cpuacct:/a\n5:memory:/a\n", mounts)
    _files(tmp_path / "memory", memory__limit_in_bytes=f"{(1 << 63) - 4096}\n", memory__usage_in_bytes="9000\n")
    assert (memory_limit(proc), memory_left(proc)) == (None, None)
    _files(tmp_path / "memory" / "a", memory__limit_in_bytes="800\n", memory__usage_in_bytes="300\n",
           memory__stat="total_inactive_file 100\n")  # fmt: skip
    assert (memory_limit(proc), memory_left(proc)) == (800, 600)


def test_memory__nothing_that_can_be_read_is_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path / "absent") is None and memory_left(tmp_path / "absent") is None


@pytest.mark.parametrize(("quota", "affinity", "found"), [(1.5, 8, 1), (0.3, 8, 1), (2.0, 8, 2), (64.0, 3, 3),
                                                           (None, 5, 5)])  # fmt: skip
def test_cores__a_part_of_one_counts_for_nothing_but_one_there_is(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, affinity: int, found: int
) -> None:
    monkeypatch.setattr(resource_limits, "cpu_quota", lambda: quota)
    monkeypatch.setattr(resource_limits, "_by_affinity", lambda: affinity)
    assert available_cores() == found and Workers().limit == found


@contextmanager
def _group(limit_us: int) -> Iterator[Path]:
    """A real control group with a quota, and one in it, which this yields."""
    version_1 = Path("/sys/fs/cgroup/cpu")
    root = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    outer = root / f"test-{uuid4().hex}"
    try:
        (outer / "inner").mkdir(parents=True)
        if version_1.is_dir():
            (outer / "cpu.cfs_quota_us").write_text(str(limit_us))
        else:
            (outer / "cpu.max").write_text(f"{limit_us} 100000")
    except OSError as error:
        for folder in (outer / "inner", outer):
            if folder.is_dir():
                folder.rmdir()
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        yield outer / "inner"
    finally:
        (outer / "inner").rmdir()
        outer.rmdir()


ASK = "from datapipe.core.resource_limits import available_cores; print(available_cores())"


def _asked(program: str, *, group: Path | None = None) -> int:
    """What the program prints, in a process of its own that has moved into the group."""
    move = f"echo $$ > {group}/cgroup.procs && " if group else ""
    done = subprocess.run(["sh", "-c", f"{move}exec {sys.executable} -c '{program}'"], cwd=ROOT, check=True,
                          capture_output=True, timeout=120)  # fmt: skip
    return int(done.stdout)


def test_cores__of_a_real_control_group_inside_a_limited_one() -> None:
    with _group(100_000) as group:
        assert _asked(ASK, group=group) == 1


def test_cores__of_a_process_that_is_bound_to_one() -> None:
    assert _asked(f"import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); {ASK}") == 1
