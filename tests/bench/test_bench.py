"""The benches run and report figures; how large those are is no test's business."""

from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest

from tests.bench.measure import Spread, cpu_s, rates, ratio
from tests.bench.peers import INGEST, LOADERS
from tests.bench.record import record
from tests.bench.run import BENCHES, measured
from tests.bench.scale import TOY, Scale
from tests.bench.table import Row, Table, Target


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    return replace(TOY, cache=tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_bench__reports_finite_figures(name: str, toy: Scale) -> None:
    if name == "ingest_peers" and not INGEST.ready():
        pytest.skip(INGEST.missing)
    table = measured(name, toy)
    assert table.name == name and table.rows
    for row in table.rows:
        figures = [spread for spread in (row.ours, row.theirs, row.ratio) if spread]
        assert len(figures) == (3 if row.against else 1)
        assert all(isfinite(spread.median) and 0 <= spread.low <= spread.median <= spread.high for spread in figures)
        assert row.what in str(table)
    figures_alone = ("order", "opening", "retrieval", "clustering", "usl_epoch", "step")
    assert name in figures_alone or all(row.ratio for row in table.rows)


@pytest.mark.slow
def test_loader__compares_with_libraries_in_an_environment_of_their_own(toy: Scale) -> None:
    if not LOADERS.ready():
        pytest.skip(LOADERS.missing)
    table = measured("loader", replace(toy, loader_peers=True))
    for name in ("litdata", "mosaic"):
        assert sum(name in row.against for row in table.rows) == 2


def test_rates__are_of_cpu_time_and_leave_the_first_round_out() -> None:
    calls = []

    def spin(tenths: int) -> int:
        calls.append(tenths)
        end = cpu_s() + tenths / 100
        while cpu_s() < end:
            pass
        return 1

    found = rates({"short": lambda: spin(1), "long": lambda: spin(4)}, rounds=2)
    assert calls == [1, 4, 4, 1, 1, 4]
    assert len(found["short"]) == len(found["long"]) == 2
    assert 2 < ratio(found["short"], found["long"]).median < 6


def test_table__says_which_targets_are_met(tmp_path: Path) -> None:
    two, five = Spread(2, 1, 3), Spread(1234.5, 1000, 2000)
    rows = (
        Row("enough", five, "other", five, two, Target(1.5)),
        Row("slow", five, "other", five, two, Target(3)),
        Row("small", two, target=Target(2, at_least=False)),
    )
    for _ in range(2):
        record([Table("name", "about", "unit", rows, ("a note",))], "1.0", "shared", tmp_path / "BENCHMARKS.md")
    text = (tmp_path / "BENCHMARKS.md").read_text()
    assert text.count("# Benchmarks") == 1 and text.count("### name: about") == 2 and "- shared" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    enough, slow, small = (next(line for line in lines if line[:1] == [row.what]) for row in rows)
    assert enough == [
        "enough",
        "1 234 (1 000 to 2 000)",
        "other",
        "1 234 (1 000 to 2 000)",
        "2.00 (1.00 to 3.00)",
        "at least 1.5",
        "yes",
    ]
    assert slow[-1] == "NO"
    assert small[2:] == ["-", "-", "-", "at most 2", "yes"]
