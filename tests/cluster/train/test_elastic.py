"""One run on a cluster that loses machines and gets them back: no sample lost or doubled, each restart with its reason.

All on one run, one event after the other, as each start of all workers costs many seconds of imports.
"""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datapipe.sampling.epoch_order import Order
from tests.cluster.local_nodes import Watched, local_nodes
from tests.end_to_end.tiny import audited, command, recipe, shards
from tests.support.golden import ROOT
from training.config.cluster import ClusterConfig

BATCH, CROPS = 16, 50
HANG_S = 20


class Elastic:
    """The run and its machines."""

    def __init__(self, folder: Path, manifest: str, cluster: Any) -> None:
        self.folder, self.cluster = folder / "run", cluster
        path = recipe(folder, manifest, str(self.folder), epochs=1e6)
        flags = ("--address", cluster.address, "--cluster.max-workers", "0",  # as many as the cluster has
                 "--cluster.resize-every-s", "4", "--cluster.hang-timeout-s", str(HANG_S), "--optimisation.batch",
                 str(BATCH), "--checkpoints.every-steps", "20", "--cluster.notice", str(folder / "going"),
                 "--cluster.notice-every-s", "0.2")  # fmt: skip
        self.run = Watched(command("cluster", "pretrain", str(path), *flags))

    def attempts(self) -> list[list[dict[str, Any]]]:
        """Header and steps of each attempt, whole lines only."""
        found = []
        for log in sorted((self.folder / "metrics").glob("attempt_*.jsonl")):
            text = log.read_text()
            lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
            found.append([line for line in lines if "checkpoint" not in line])
        return found

    def worlds(self) -> list[int]:
        return [attempt[0]["world"] for attempt in self.attempts() if attempt]

    def trained(self, *worlds: int, steps: int = 25) -> None:
        """Return once these worlds have been, and the last of them has made some steps."""
        self.run.until(lambda: self.worlds() == list(worlds) and len(self.attempts()[-1]) > steps)

    def restarts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "restarts.jsonl").read_text().splitlines()]

    def life(self, rank: int) -> dict[str, Any]:
        return json.loads((self.folder / "ranks" / f"rank_{rank:02d}.json").read_text())

    def node_of(self, rank: int) -> Any:
        """The machine of a rank, by the node id in its log."""
        name = re.findall(r"\(node (\w{8})\)", (self.folder / "ranks" / f"rank_{rank:02d}.log").read_text())[-1]
        return next(node for node in self.cluster.worker_nodes if node.node_id.startswith(name))


@pytest.mark.slow
def test_elastic__machines_go_and_come_back(tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]) -> None:
    write_crops(tmp_path / "crops", CROPS)
    data = shards(tmp_path / "crops", str(tmp_path / "shards"))
    with local_nodes(4) as cluster:
        one = Elastic(tmp_path, data.url, cluster)
        one.trained(4)

        lost = one.node_of(3)
        cluster.remove_node(lost, allow_graceful=False)
        one.trained(4, 3)

        drained = one.node_of(2)
        drain = [
            "ray",
            "drain-node",
            "--address",
            cluster.address,
            "--node-id",
            drained.node_id,
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "spot",
            "--deadline-remaining-seconds",
            "120",
        ]
        subprocess.run(drain, check=True, capture_output=True, cwd=ROOT)
        one.trained(4, 3, 2)

        stopped = one.life(1)["pid"]
        os.kill(stopped, signal.SIGSTOP)
        one.trained(4, 3, 2, 2)

        os.kill(one.life(1)["pid"], signal.SIGTERM)
        one.trained(4, 3, 2, 2, 2)

        cluster.remove_node(drained)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        one.run.until(lambda: one.worlds()[5:] in ([4], [3, 4]) and len(one.attempts()[-1]) > 25)
        one.run.process.send_signal(signal.SIGTERM)
        code, output, errors = one.run.end()
    assert code == 75, output + errors

    *restarts, ended = one.restarts()
    kinds, reasons = ([restart[key] for restart in restarts] for key in ("kind", "reason"))
    assert kinds[:5] == ["crash", "preemption", "hang", "preemption", "resize"], restarts
    assert kinds[5:] in ([], ["resize"]), restarts  # the two machines may be seen one by one
    assert (ended["kind"], ended["reason"]) == ("end", "stopped")
    assert lost.node_id[:8] in reasons[0] and "rank 3 on" in reasons[0]
    assert drained.node_id[:8] in reasons[1] and "will be taken away" in reasons[1]
    assert "rank 1 on" in reasons[2] and f"SIGKILL to process {stopped}" in output
    assert float(re.search(r"for (\d+) s", reasons[2])[1]) < ClusterConfig().start_timeout_s  # type: ignore[index]
    assert "rank 1 on" in reasons[3] and "SIGTERM" in reasons[3]
    assert "from 2 to " in reasons[4] and "to 4 workers" in reasons[-1]
    for before, restart, after in zip(one.attempts(), restarts, one.attempts()[1:], strict=False):
        if restart["kind"] in ("preemption", "resize"):  # saved first: nothing is done again
            assert after[0]["step"] == before[-1]["step"] == restart["saved"]
        assert restart["reason"] in after[0]["reason"]

    steps = audited(one.folder)
    order = Order(data.rows, 3, 4, 3)
    assert sorted(steps) == list(range(1, max(steps) + 1))
    samples = order.samples(np.arange(max(steps) * BATCH)).reshape(-1, BATCH)
    wrong = {step: found for step, found in steps.items() if sorted(found) != sorted(samples[step - 1].tolist())}
    assert not wrong
