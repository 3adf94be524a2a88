"""A cluster whose head is lost with all that was on it; another one comes up in its place."""

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.status import status
from datapipe.core.config import StorageConfig
from tests.cluster.local_nodes import Watched
from tests.cluster.ray_head import PATIENCE_S, ray_head, ray_words, without_ray
from tests.end_to_end.tiny import command, finished, recipe, shards
from tests.support.golden import ROOT
from tests.support.ports import free_port
from tests.support.warm_python import descendants
from training.checkpoint import MARKER


def lose(pid: int) -> None:
    """End a head and all processes of its machine at once, as the machine's end does."""
    tree = [psutil.Process(pid), *descendants(pid)]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # first all stand still: none notices that another is gone
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):  # it had just ended by itself
                process.send_signal(number)
    psutil.wait_procs(tree, timeout=PATIENCE_S)


@pytest.mark.slow
def test_submit__goes_on_on_a_new_cluster_when_the_head_is_lost(
    tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]
) -> None:
    """Head, driver and workers are killed together after a checkpoint, and nothing of the cluster's own state is kept:
    what waits hands the job in to the next cluster at the same address, and that goes on from the checkpoint."""
    write_crops(tmp_path / "crops", 24)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    run, path = tmp_path / "run", recipe(tmp_path, data.url, str(tmp_path / "run"), epochs=1e6)
    shell, port = without_ray(OMP_NUM_THREADS="1", RAY_AUTH_MODE="disabled"), free_port()
    line = ("submit", "--address", f"http://127.0.0.1:{port}", "--wait", "pretrain", str(path),
            "--checkpoints.every-steps", "20", "--cluster.max-workers", "1")  # fmt: skip
    with ray_head(shell, dashboard=port) as head:
        waiting = Watched(command("cluster", *line))
        waiting.until(lambda: list(run.glob(f"checkpoints/step_*/{MARKER}")))
        lose(head.pid)
    before = status(str(run), StorageConfig()).step
    with ray_head(shell, dashboard=port) as head:
        found = waiting.until(lambda: re.findall(r"handed in again as (\S+) \(1 of 3\)", "\n".join(waiting.lines)))
        logs = Watched(subprocess.Popen([*ray_words(), "job", "logs", "--address", head.dashboard, "-f", *found],
                                        cwd=ROOT, env=shell, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE))  # fmt: skip
        logs.until(lambda: any(line.startswith("pass goes on from step_") for line in logs.lines))
        logs.until(lambda: any(line.startswith("step ") for line in logs.lines))
        words = [*ray_words(), "job", "stop", "--address", head.dashboard, *found]
        finished(subprocess.Popen(words, cwd=ROOT, env=shell, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE), timeout_s=PATIENCE_S)  # fmt: skip
        code, output, errors = waiting.end()
    assert code == 75, output + errors
    assert "the head does not answer; it is waited for" in output and "was lost (" in output
    after = status(str(run), StorageConfig())
    assert after.state == "stopped" and after.step > before > 0
    kinds = [json.loads(line)["kind"] for line in (run / "restarts.jsonl").read_text().splitlines()]
    assert "driver" in kinds
