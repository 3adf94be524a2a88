"""Sharding on real Ray: processes, nodes and drivers are killed, and the bytes are those of an undisturbed run."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from cluster.core.arguments import ShardJob
from cluster.core.ray_workers import RayWorkers
from cluster.core.session import prepare
from cluster.core.shared_paths import MARK, marked, unseen, witnesses
from cluster.jobs.shard import _anywhere
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.ingest.work_units import PART_BYTES
from datapipe.sources import open_sources
from tests.cluster import tasks
from tests.cluster.tasks import PATIENCE_S
from tests.conftest import S3Server
from tests.end_to_end.tiny import command, finished
from tests.support.warm_python import descendants

SOURCES, EACH = 12, 12
FLAGS = ("--samples-per-shard", "11")
AT_WORK = "ray::_perform"
"""Title that Ray gives a process while it is at one of our tasks."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of one large picture under many names: each is a part of the work and takes a moment to encode anew."""
    root, random = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    coarse = random.integers(0, 256, (16, 8, 3), dtype=np.uint8)
    bitmap = cv2.imencode(".bmp", cv2.resize(coarse, (1000, 2000), interpolation=cv2.INTER_CUBIC))[1].tobytes()
    for number in range(SOURCES):
        folder = root / f"camera{number:02d}"
        folder.mkdir()
        (folder / "0000.bmp").write_bytes(bitmap)
        for row in range(1, EACH):
            os.link(folder / "0000.bmp", folder / f"{row:04d}.bmp")
    assert EACH * len(bitmap) > PART_BYTES
    return sorted(map(str, root.iterdir()))


@pytest.fixture(scope="module")
def expected(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process without Ray makes of them."""
    out = tmp_path_factory.mktemp("alone") / "out"
    code, output, errors = finished(command("datapipe", "shard", *sources, "--out", str(out), "--workers", "1", *FLAGS))
    assert code == 0, output + errors
    return _files(out)


@pytest.fixture(scope="module")
def cluster(s3: S3Server) -> Iterator[Any]:
    """A cluster of one machine with two CPUs, to which tests add others. After the S3 server, whose keys nodes need."""
    prepare()
    from ray.cluster_utils import Cluster

    with TemporaryDirectory(prefix="ray_") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False,
                                                                "temp_dir": f"{folder}/ray"})  # fmt: skip
        yield started
        started.shutdown()


@pytest.fixture(scope="module")
def ray_workers(cluster: Any) -> Iterator[RayWorkers]:
    """This process as the cluster's driver."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield RayWorkers()
    ray.shutdown()


def _files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def _shard(sources: list[str], out: str, *words: str) -> subprocess.Popen[str]:
    return command("cluster", "shard", *sources, "--out", out, *FLAGS, *words)


def _until(found: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """The first thing that is found; polled, as nobody tells. Fails when the process ends before."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        ended = process.poll() is not None  # before the look: what it left at its end is seen
        if something := found():
            return something
        assert not ended, finished(process)
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"not within {PATIENCE_S} s: {finished(process)}")


def _at_work(root: int) -> list[psutil.Process]:
    """Processes below `root` that are at one of our tasks."""
    found = []
    for process in descendants(root):
        try:
            if process.cmdline()[:1] == [AT_WORK]:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _spooled(out: Path) -> int:
    return len(list(out.glob(".spool/**/*.parquet")))


@pytest.mark.slow
def test_shard_job__killed_driver_then_killed_worker(
    tmp_path: Path, sources: list[str], expected: dict[str, bytes]
) -> None:
    first = _shard(sources, str(tmp_path / "out"))
    writing = _until(lambda: _spooled(tmp_path / "out") > 1 and _at_work(first.pid), first)
    rest = [child for child in descendants(first.pid) if child not in writing]
    first.kill()
    assert not psutil.wait_procs(writing, timeout=PATIENCE_S)[1]  # they end with the driver
    for process in rest:  # Ray's agents take a minute
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    finished(first)
    done = _spooled(tmp_path / "out")
    assert 0 < done < SOURCES and not list(tmp_path.glob("out/manifest*"))

    second = _shard(sources, str(tmp_path / "out"))
    killed = _until(lambda: _at_work(second.pid), second)[0]
    killed.kill()
    code, output, errors = finished(second)
    assert code == 0, output + errors
    assert _files(tmp_path / "out") == expected


@pytest.mark.slow
def test_shard_job__stopped_twice_on_a_running_cluster(
    tmp_path: Path, sources: list[str], expected: dict[str, bytes], cluster: Any
) -> None:
    out = tmp_path / "out"
    for stop, ending in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        before = _spooled(out)  # tasks that were at work at the stop before may have ended
        process = _shard(sources, str(out), "--address", cluster.address)
        _until(lambda seen=before: _spooled(out) > seen, process)
        process.send_signal(stop)
        code, output, errors = finished(process)
        assert code == ending and "Traceback" not in errors, output + errors
        assert not list(out.glob("manifest*")) and not list(out.glob(f"{MARK}*"))
    code, output, errors = finished(_shard(sources, str(out), "--address", cluster.address))
    assert code == 0, output + errors
    assert "cluster: 1 machine, 2 CPUs" in output
    assert _files(out) == expected


@pytest.mark.slow
def test_shard_job__a_killed_node_and_everything_on_s3(
    sources: list[str], expected: dict[str, bytes], cluster: Any, s3: S3Server
) -> None:
    bucket, node = s3.bucket(), cluster.add_node(num_cpus=1)
    raylet = node.all_processes["raylet"][0].process.pid
    process = _shard(sources, f"s3://{bucket}/crops", "--address", cluster.address,
                     "--storage.endpoint-url", s3.endpoint)  # fmt: skip

    def middle() -> bool:
        spooled = s3.client.list_objects_v2(Bucket=bucket, Prefix="crops/.spool/").get("KeyCount", 0)
        return spooled > 2 and bool(_at_work(raylet))

    _until(middle, process)
    cluster.remove_node(node, allow_graceful=False)
    code, output, errors = finished(process)
    assert code == 0, output + errors
    assert "cluster: 2 machines, 3 CPUs" in output
    assert {name.removeprefix("crops/"): data for name, data in s3.objects(bucket).items()} == expected


@pytest.mark.slow
def test_ray_workers__results_in_order_though_the_first_is_the_slowest(ray_workers: RayWorkers, tmp_path: Path) -> None:
    drawn = iter(range(200))
    results = ray_workers.run(tasks.gated, ((number, 25, tmp_path / "gate") for number in drawn), count=200)
    assert next(results) == 0
    skipped = next(drawn)
    assert 25 < skipped < 100
    assert list(results) == [number for number in range(1, 200) if number != skipped]


@pytest.mark.slow
def test_ray_workers__no_more_than_the_limit_at_a_time(ray_workers: RayWorkers, tmp_path: Path) -> None:
    assert list(RayWorkers(1).run(tasks.busy, ((number, tmp_path) for number in range(5)), count=5)) == [1] * 5


@pytest.mark.slow
def test_ray_workers__a_clear_error_arrives_as_it_was(ray_workers: RayWorkers) -> None:
    with pytest.raises(DataError) as caught:
        list(ray_workers.run(tasks.refuse, ((number,) for number in range(9)), count=9))
    assert type(caught.value) is DataError
    assert (caught.value.what, caught.value.where, caught.value.hint) == ("the crop is cut", "camera 3", "mend it")


@pytest.mark.slow
def test_ray_workers__need_neither_torch_nor_deepspeed(ray_workers: RayWorkers) -> None:
    (found,) = ray_workers.run(tasks.imported, [()], count=1)
    assert "ray" in found and not found & {"torch", "deepspeed"}


@pytest.mark.slow
def test_ray_workers__a_machine_that_does_not_see_the_folders(ray_workers: RayWorkers, tmp_path: Path) -> None:
    with marked([str(tmp_path / "out")]) as seen:
        pass
    blind = RayWorkers(seen=seen)
    with pytest.raises(DataError, match=str(tmp_path / "out")):
        list(blind.run(tasks.refuse, [(1,)], count=1))


def test_shard_job__places_that_workers_elsewhere_understand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "a.jpg").touch()
    monkeypatch.chdir(tmp_path / "crops")
    local = _anywhere(ShardJob(sources=(".", "s3://bucket/crops/"), out="../out"), joined=True)
    assert local.sources == (str(tmp_path / "crops"), "s3://bucket/crops")
    assert (local.out, local.config.spool) == (str(tmp_path / "out"), "")
    remote = ShardJob(sources=(".",), out="s3://bucket/out/")
    assert _anywhere(remote, joined=True).config.spool == "s3://bucket/out/.spool"
    assert _anywhere(remote, joined=False).config.spool == ""
    (here,), (there,) = open_sources(["."], StorageConfig()), open_sources([local.sources[0]], StorageConfig())
    assert here == there and here.label == "crops"


def test_shared_paths__what_another_machine_may_lack(tmp_path: Path) -> None:
    crops, tars = tmp_path / "crops" / "deep", tmp_path / "tars"
    for folder in (crops, tars):
        folder.mkdir(parents=True)
    (crops / "a.jpg").write_bytes(b"12345")
    (tars / "00.tar").write_bytes(b"123")
    out, places = str(tmp_path / "out"), [str(crops.parent), f"{tars}/{{00..01}}.tar", "s3://bucket/crops"]
    with marked([out]) as marks:
        seen = (*marks, *witnesses(places))
        assert [witness.place for witness in seen] == [out, *places[:2]]
        assert unseen(seen) == ()
        unseen.cache_clear()
        Path(marks[0].file).unlink()
        assert unseen(seen) == (out,)
        unseen.cache_clear()
        (crops / "a.jpg").write_bytes(b"1234")
        (tars / "00.tar").unlink()
        assert unseen(seen) == (out, *places[:2])
    assert os.listdir(out) == []


def test_shared_paths__a_killed_runs_mark_is_used_again(tmp_path: Path) -> None:
    left = tmp_path / f"{MARK}left"
    left.touch()
    with marked([str(tmp_path)]) as (mark,):
        assert Path(mark.file) == left
    assert not left.exists()
    assert witnesses([str(tmp_path), str(tmp_path / "absent")]) == ()
