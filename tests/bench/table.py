"""What a bench reports: rows that compare ours with something else in the same run, as one plain table."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.measure import Rates, Spread, ratio


@dataclass(frozen=True)
class Target:
    """What an issue demands: of the ratio, or of the figure itself where there is nothing to compare it with."""

    bound: float
    at_least: bool = True

    def met(self, figure: float) -> bool:
        return figure >= self.bound if self.at_least else figure <= self.bound

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:.3g}"


@dataclass(frozen=True)
class Row:
    """One comparison; without `against` just a figure of ours."""

    what: str
    ours: Spread
    against: str = ""
    theirs: Spread | None = None
    ratio: Spread | None = None
    target: Target | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        judged = (self.ratio or self.ours).median
        met = "" if self.target is None else "yes" if self.target.met(judged) else "NO"
        return (
            self.what,
            _text(self.ours),
            self.against or "-",
            _text(self.theirs),
            _text(self.ratio),
            str(self.target or "-"),
            met or "-",
        )


@dataclass(frozen=True)
class Table:
    """All rows of a bench. `unit` is that of the columns "ours" and "theirs"."""

    name: str
    about: str
    unit: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Readable on a terminal, and a table in Markdown too."""
        head = ("what", f"ours: {self.unit}", "against", "theirs", "ratio", "target", "met")
        lines = [head, *(row.cells for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        lines.insert(1, tuple("-" * width for width in widths))
        drawn = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
        return "\n".join([f"### {self.name}: {self.about}", "", *drawn, *self._notes()])

    def _notes(self) -> Iterator[str]:
        if self.notes:
            yield ""
        yield from (f"- {note}" for note in self.notes)


def compare(found: Rates, what: str, ours: str, against: str, target: Target | None = None) -> Row:
    """Two contenders of one run."""
    mine, other = found[ours], found[against]
    return Row(what, Spread.of(mine), against, Spread.of(other), ratio(mine, other), target)


def _text(figures: Spread | None) -> str:
    if figures is None:
        return "-"
    return f"{_figure(figures.median)} ({_figure(figures.low)} to {_figure(figures.high)})"


def _figure(value: float) -> str:
    """Three or more digits that count, thousands apart."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"
