"""Ray inside this process, in surroundings that would stop it."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.core import scratch
from cluster.core.scratch import BELOW, MOST_BYTES, places, scratch_folder, unfit
from datapipe.core.errors import StorageError
from datapipe.core.resource_limits import available_cores
from datapipe.dataset.manifest import Manifest
from tests.end_to_end.tiny import command, finished


def _temporary(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_scratch__is_in_the_temporary_folder_where_that_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        _temporary(monkeypatch, Path(short))
        with scratch_folder() as folder:
            assert Path(folder).parent == Path(short) and os.stat(folder).st_mode & 0o077 == 0
        assert os.listdir(short) == []


@pytest.mark.parametrize("below", ["slurm_job_1355700_" + "x" * 80, "absent/folder"])
def test_scratch__is_elsewhere_where_the_temporary_folder_will_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    if not below.startswith("absent"):
        (tmp_path / below).mkdir()
    _temporary(monkeypatch, tmp_path / below)
    with scratch_folder() as folder:
        assert len(f"{folder}/{BELOW}") <= MOST_BYTES and str(tmp_path) not in folder


def test_scratch__none_is_one_error_that_lists_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "places", lambda: [Path("/etc/passwd"), Path("/absent"), tmp_path / ("x" * 100)])
    with pytest.raises(StorageError, match="no temporary folder in which Ray can work") as refused, scratch_folder():
        pass
    first, second, third = refused.value.where.split("; ")
    assert (first, second) == ("/etc/passwd: Not a directory", "/absent: No such file or directory")
    assert third.endswith("its path is too long for the sockets of Ray")
    assert "TMPDIR=/tmp" in refused.value.hint


def test_scratch__a_full_place_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "ROOM_BYTES", 1 << 62)
    assert "MB are free" in unfit(Path("/tmp"))


def test_scratch__no_temporary_folder_at_all_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert Path("/dev/shm") in places()


@pytest.mark.slow
def test_session__in_a_slurm_job_with_a_long_temporary_folder_and_proxies(
    tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    """What a login shell of a cluster holds, all at once; one core of the machine's."""
    write_crops(tmp_path / "crops", 6)
    long = tmp_path / ("slurm_job_1355700_" + "x" * 80)
    long.mkdir()
    proxy = "http://127.0.0.1:9"
    shell = {"TMPDIR": str(long), "http_proxy": proxy, "https_proxy": proxy, "grpc_proxy": proxy, "no_proxy": "",
             "NO_PROXY": "", "GLOO_SOCKET_IFNAME": "ib0", "OMPI_COMM_WORLD_RANK": "3", "PMI_SIZE": "4",
             "RAY_ADDRESS": ""}  # fmt: skip
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert available_cores() == 1
        process = command("cluster", "shard", str(tmp_path / "crops"), "--out", str(tmp_path / "out"), **shell)
    finally:
        os.sched_setaffinity(0, allowed)
    code, output, errors = finished(process)
    assert code == 0, output + errors
    assert Manifest.load(str(tmp_path / "out")).rows == 6
