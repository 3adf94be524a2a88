"""What a run is on where Ray and torch do not agree about GPUs, and where there is none yet."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.core.session import prepare
from tests.cluster.local_nodes import Watched, local_nodes
from tests.cluster.ray_head import Head, ray_head, without_ray
from tests.end_to_end.test_grid import SETTINGS, words
from tests.end_to_end.tiny import command, finished, generated, recipe, step_records
from tests.null_gpu.build import environment, missing
from tests.null_gpu.test_null_gpu import device_of, under_ray
from tests.support.golden import ROOT
from tests.support.ports import free_port
from tests.training.reid.people import market

Write = Callable[..., dict[str, bytes]]

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe of three steps."""
    return recipe(tmp_path, generated(tmp_path), str(tmp_path / "run"))


@pytest.mark.soak
def test_run__where_ray_has_no_gpu_and_torch_sees_one_is_on_cpus_and_says_so(tiny: Path) -> None:
    """A Ray of its own, which counts GPUs with NVML."""
    variables = {**environment(), "PYTHONPATH": str(ROOT)}
    code, output, errors = finished(command("cluster", "pretrain", str(tiny), **variables))
    assert code == 0, output + errors
    assert "device: cpu (this machine offers Ray no GPU)" in output
    assert "torch sees 1 GPUs on this machine that Ray does not offer: the run is on CPUs" in output
    assert device_of(tiny.parent / "run") != "Null H100"
    assert len(step_records(tiny.parent / "run")) == 3


@pytest.mark.soak
def test_run__on_a_cluster_started_without_gpus_is_on_cpus_and_says_so(tiny: Path) -> None:
    """`ray start --num-gpus 0` on a machine with one."""
    variables = {**without_ray(), **environment(), "PYTHONPATH": str(ROOT)}
    with ray_head(variables, more=["--num-gpus=0"]) as head:
        words = ("cluster", "pretrain", str(tiny), "--address", head.address)
        code, output, errors = finished(command(*words, "--engine.device", "cuda", **variables))
        assert code == 1 and "Traceback" not in errors, output + errors
        assert "a GPU is asked for, and no machine of the cluster offers a GPU" in errors
        code, output, errors = finished(command(*words, **variables))
        assert code == 0, output + errors
    assert "device: cpu (no machine of the cluster offers a GPU, and no autoscaler could start one)" in output
    assert "(`ray start --num-gpus N` offers them)" in output
    assert device_of(tiny.parent / "run") != "Null H100"


@pytest.mark.soak
def test_run__whose_worker_has_a_gpu_without_kernels_is_one_error(tiny: Path, tmp_path: Path) -> None:
    """A Volta in the cluster; the command's own machine has no GPU, and cannot know."""
    volta = {**under_ray(tmp_path / "nccl.log", devices=1), "NULLCUDA_MAJOR": "7"}
    with local_nodes(0) as cluster:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in volta.items():
                patch.setenv(name, value)
            cluster.add_node(num_cpus=1, num_gpus=1)
        code, output, errors = finished(command("cluster", "pretrain", str(tiny), "--address", cluster.address))
    assert code == 1 and "Traceback" not in errors, output + errors
    assert "device: cuda (Ray offers 1 GPUs)" in output
    assert "has no kernels for Null H100 (compute capability 7.0, sm_70)" in errors
    assert errors.count("error:") == 1 and "--engine.device cpu" in errors
    assert "again" not in output  # no restart mends it


def _settings(address: str) -> dict[str, Any]:
    """An autoscaler's, whose machines are processes of this one: at first there is none with a GPU, then up to one. It
    is Ray's own for tests."""
    machines = {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "gpus": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    }
    provider = {"type": "fake_multinode", "gcs_address": address, "use_node_id_as_ip": True,
                "disable_node_updaters": True, "disable_launch_config_check": True}  # fmt: skip
    return {
        "cluster_name": "from_zero", "max_workers": 1, "upscaling_speed": 1.0, "idle_timeout_minutes": 5,
        "provider": provider, "available_node_types": machines, "head_node_type": "ray.head.default", "auth": {},
        "docker": {}, "cluster_synced_files": [], "file_mounts": {}, "file_mounts_sync_continuously": False,
        "rsync_exclude": [], "rsync_filter": [], "initialization_commands": [], "setup_commands": [],
        "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip


@contextlib.contextmanager
def scaled_from_zero(folder: Path, variables: Mapping[str, str]) -> Iterator[Head]:
    """A cluster with two CPUs, whose autoscaler starts a machine with a GPU where one is wanted."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    settings = folder / "autoscaler.json"
    settings.write_text(json.dumps(_settings(address)))
    shell = {**variables, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    try:
        with ray_head(shell, port=port, more=["--num-gpus=0", f"--autoscaling-config={settings}"]) as head:
            yield head
    finally:
        for process in psutil.process_iter(["cmdline"]):  # the machines that it has started
            if any(word == f"--gcs-address={address}" for word in process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


@pytest.mark.soak
def test_run__on_a_cluster_scaled_up_from_zero_waits_for_gpus(tiny: Path, tmp_path: Path) -> None:
    """CPUs enough to train on are there all the time."""
    prepare()
    variables = {**without_ray(), **under_ray(tmp_path / "nccl.log", devices=1)}
    with scaled_from_zero(tmp_path, variables) as head:
        words = ("cluster", "pretrain", str(tiny), "--address", head.address)
        run = Watched(command(*words, **variables))
        run.until(lambda: any(line.startswith("device: ") for line in run.lines))
        code, output, errors = run.end()
    assert code == 0, output + errors
    assert "device: cuda (there is no GPU yet; the autoscaler may start up to 1, and is waited for)" in output
    assert device_of(tiny.parent / "run") == "Null H100"
    assert len(step_records(tiny.parent / "run")) == 3


def _market(folder: Path, write_crops: Write) -> Path:
    """Crops of 24 people, half of them to train on, in the layout of Market-1501."""
    write_crops(folder / "all", 96)
    for path in (folder / "all").iterdir():
        person, row = int(path.name[:4]), int(path.stem.split("_")[2])
        part = "bounding_box_train" if person <= 12 else "bounding_box_test" if row % 4 else "query"
        (folder / "crops" / part).mkdir(parents=True, exist_ok=True)
        path.rename(folder / "crops" / part / path.name)
    return folder / "crops"


@pytest.mark.soak
def test_demo__on_a_machine_with_one_gpu_takes_one_worker(tmp_path: Path, write_crops: Write) -> None:
    """A second one would wait for another GPU."""
    crops = _market(tmp_path, write_crops)
    words = ("demo", "--out", str(tmp_path / "demo"), "--crops", str(crops), "--steps", "6")
    code, output, errors = finished(
        command("cluster", *words, **under_ray(tmp_path / "nccl.log", devices=1)), timeout_s=600
    )
    assert code == 0, output + errors
    assert "pre-train PASS with one worker, as this machine has one GPU" in output
    assert output.count("device: cuda (Ray offers 1 GPUs)") == 2  # to train, and to score
    assert "demo complete" in output and (tmp_path / "demo" / "run" / "report.html").is_file()
    assert device_of(tmp_path / "demo" / "run") == "Null H100"


@pytest.mark.soak
def test_grid__gives_each_cell_a_gpu_of_its_own(tmp_path: Path) -> None:
    """Two GPUs, cells that train and cells that are scored."""
    sets = (
        str(market(tmp_path / "day", identities=16, images=1)),
        str(market(tmp_path / "night", identities=8, images=2)),
    )
    asked = [word for word in words(["drawn=random"], sets, "supervised,transfer:day", tmp_path / "grid", *SETTINGS)
             if word not in ("--device", "cpu")]  # fmt: skip
    code, output, errors = finished(
        command("cluster", *asked, **under_ray(tmp_path / "nccl.log", devices=2)), timeout_s=600
    )
    assert code == 0, output + errors
    assert "device: cuda (Ray offers 2 GPUs)" in output
    cells = tmp_path / "grid" / "cells" / "drawn"
    assert {device_of(cells / data / "supervised") for data in ("day", "night")} == {"Null H100"}
    assert (cells / "night" / "transfer-from-day" / "cell.json").is_file()
