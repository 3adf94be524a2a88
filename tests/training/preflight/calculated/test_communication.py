"""Bytes between machines: beside a simulation of the rings, and known figures."""

import pytest

from tests.support.golden import ROOT
from training.config.recipe_toml import load
from training.engine.reduction import BYTES
from training.preflight.calculated.communication import FULL, Traffic, traffic
from training.preflight.calculated.memory import census
from training.preflight.calculated.operations import computed_of_image
from training.preflight.dry_run_text import GPU_FLOPS

VITL = 330_000_000


def ring(numbers: int, ranks: int, machine: int, steps: int) -> float:
    """Numbers that leave a machine of so many neighbouring ranks, when each rank hands a piece of 1 / ranks of them to
    its right in each of so many steps."""
    leaving = 0.0
    for _ in range(steps):
        for rank in range(ranks):
            if rank // machine == 0 and (rank + 1) % ranks // machine != 0:
                leaving += numbers / ranks
    return leaving


@pytest.mark.parametrize(("ranks", "machine"), [(16, 8), (512, 8), (12, 4), (3, 1)])
@pytest.mark.parametrize("reduction", ["fp32", "bf16"])
def test_traffic__is_that_of_rings(ranks: int, machine: int, reduction: str) -> None:
    width, machines = BYTES[reduction], ranks // machine  # type: ignore[index]
    half = ring(VITL, ranks, machine, ranks - 1)
    given = {"trained": VITL, "parameters": 2 * VITL, "ranks": ranks, "machines": machines, "reduction": reduction}
    found = {stage: traffic(stage=stage, **given) for stage in (None, 0, 1, 2, 3)}  # type: ignore[arg-type]
    assert found[None] == found[0] == Traffic(round(2 * half * width), 0)
    assert found[1].gradients == pytest.approx(half * width) and found[1].parameters == pytest.approx(half * FULL)
    assert found[2].gradients == pytest.approx((2 if ranks > 64 else 1) * half * width)
    assert found[3].parameters == pytest.approx(2 * half * FULL)
    again = traffic(stage=3, micro_batches=2, **given)  # type: ignore[arg-type]
    assert again.total == pytest.approx(2 * found[3].total)
    assert traffic(stage=1, micro_batches=2, **given) == found[1], "summed on the rank first"  # type: ignore[arg-type]


def test_traffic__of_one_machine_is_none() -> None:
    assert traffic(trained=VITL, parameters=VITL, stage=1, reduction="fp32", ranks=8, machines=1) == (0, 0)


def test_seconds__of_a_network_of_100_gb_s() -> None:
    assert Traffic(12_500_000_000, 0).seconds() == 1.0 and Traffic(1_000, 250).seconds(0.01) == pytest.approx(1e-3)


def documented() -> list[str]:
    """The rows of the table in the page on clusters: bytes that a machine sends in a step, and the time that takes."""
    rows = []
    for size in ("s", "b", "l"):
        config = load(f"pass_vit{size}")
        sizes = census(config)
        for machines in (8, 16, 32, 64):
            sent = [
                traffic(trained=sizes.trained, parameters=sizes.parameters, stage=stage, reduction=reduction,
                        ranks=8 * machines, machines=machines)
                for stage, reduction in ((1, "fp32"), (1, "bf16"), (0, "bf16"))
            ]  # fmt: skip
            seconds = 4096 * computed_of_image(config) / (8 * machines * GPU_FLOPS)
            cells = [f"{one.total / 1e9:.2f} GB, {one.seconds():.3f} s" for one in sent]
            name = f"ViT-{size.upper()} ({sizes.trained / 1e6:.0f} M)"
            rows.append(f"| {name} | {machines} | {seconds:.3f} s | {' | '.join(cells)} |")
    return rows


def test_page__has_what_is_calculated() -> None:
    page = (ROOT / "cluster" / "docs" / "run_on_a_cluster.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| ViT-")] == documented()
