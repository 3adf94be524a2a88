"""GPUs or CPUs, and which GPU: decisions from what is known, without a GPU."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.core.devices import Offer, _of_autoscaler, decide, index_of, most_of
from datapipe.core.errors import ConfigError
from tests.support.golden import ROOT

HERE = Offer(0, 0.0, embedded=True)
CLUSTER = Offer(0, 0.0, embedded=False)
FROM_ZERO = Offer(0, 8.0, embedded=False)
UNKNOWN = Offer(0, None, embedded=False)


def _visible(given: Sequence[str]) -> str:
    """As Ray Train sets it for all of its workers on a machine."""
    return ",".join(sorted(given))


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (4, 8), (8, 7), (12, 3)])
def test_index__of_unequal_machines_is_each_workers_own_gpu(counts: tuple[int, ...]) -> None:
    for count in counts:
        given = [str(number) for number in range(count)]
        found = [index_of([one], _visible(given)) for one in given]
        assert sorted(found) == list(range(count))
        assert [_visible(given).split(",")[index] for index in found] == given


@pytest.mark.parametrize(
    ("given", "visible", "index"),
    [(["3"], "3", 0), (["3"], "2,3", 1), (["5"], None, 5), (["GPU-8f2c"], "GPU-1a,GPU-8f2c", 1), (["10"], "10,9", 0)],
)
def test_index__is_a_place_among_the_visible(given: list[str], visible: str | None, index: int) -> None:
    assert index_of(given, visible) == index


@pytest.mark.parametrize(("given", "visible"), [([], "0"), (["2"], "0,1"), (["2"], "")])
def test_index__a_gpu_that_is_not_visible(given: list[str], visible: str) -> None:
    with pytest.raises(ConfigError):
        index_of(given, visible)


@pytest.mark.parametrize(("asked", "offer", "before", "kind"), [
    ("auto", Offer(2, 0.0, True), "", "cuda"),
    ("auto", HERE, "", "cpu"),
    ("auto", CLUSTER, "", "cpu"),
    ("auto", FROM_ZERO, "", "cuda"),  # it had no GPU at the first look
    ("cuda", FROM_ZERO, "", "cuda"),
    ("cpu", FROM_ZERO, "cuda", "cpu"),
    ("cpu", Offer(2, 0.0, False), "", "cpu"),
    ("auto", CLUSTER, "cuda", "cuda"),  # it waits for machines to come back
    ("auto", CLUSTER, "cpu", "cpu"),
    ("cuda", UNKNOWN, "", "cuda"),
    ("auto", UNKNOWN, "cuda", "cuda"),
])  # fmt: skip
def test_decide__what_workers_compute_on(asked: Any, offer: Offer, before: str, kind: str) -> None:
    choice = decide(asked, offer, before=before)
    assert choice.kind == kind and choice.why


@pytest.mark.parametrize(
    ("asked", "offer", "before", "said"),
    [
        ("cuda", HERE, "", "this machine offers Ray no GPU"),
        ("cuda", CLUSTER, "", "no autoscaler"),
        ("auto", HERE, "cuda", "was trained on GPUs so far"),
        ("auto", UNKNOWN, "", "does not say whether"),
    ],
)
def test_decide__refuses_what_cannot_be_or_is_not_known(asked: Any, offer: Offer, before: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as found:
        decide(asked, offer, before=before)
    assert "--engine.device" in found.value.hint


SETTINGS = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 9},
        "large": {"resources": {"CPU": 8, "GPU": 4}, "min_workers": 0, "max_workers": 2},
        "small": {"resources": {"CPU": 8, "GPU": 1}},
        "cpus": {"resources": {"CPU": 64}, "max_workers": 10},
    },
}


def test_autoscaler__the_gpus_that_its_settings_allow() -> None:
    assert most_of(SETTINGS) == 2 * 4 + 3 * 1 and most_of(SETTINGS, "CPU") == 2 * 8 + 3 * 8 + 10 * 64
    assert most_of({}) == most_of({"available_node_types": {"cpus": {"resources": {"CPU": 4}, "max_workers": 9}}}) == 0


def test_autoscaler__is_found_by_its_process(tmp_path: Path) -> None:
    """A process that is called as Ray calls its own; one without settings starts nothing; none at all tells nothing."""
    (tmp_path / "cluster.yaml").write_text(json.dumps(SETTINGS))
    name = "ray/autoscaler/v2/monitor.py"
    with_settings = (name, "--gcs-address=10.0.0.1:7001", f"--autoscaling-config={tmp_path / 'cluster.yaml'}")
    started = [subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE, cwd=ROOT)
               for words in (with_settings, (name, "--gcs-address=10.0.0.1:7002"))]  # fmt: skip
    try:
        assert [_of_autoscaler(f"10.0.0.1:{port}", "GPU") for port in (7001, 7002, 7003)] == [11.0, 0.0, None]
    finally:
        for process in started:
            process.kill()
            process.communicate()
