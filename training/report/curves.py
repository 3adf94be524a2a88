"""Plots of a run's records, as the sections of the report share them."""

from collections.abc import Iterable, Sequence

from training.report.run_files import Record, RunFiles
from training.report.svg_plots import Curve, Plot, to_svg


def grid(plots: Iterable[Plot]) -> str:
    """Small plots beside each other."""
    return f'<div class="plots">{"".join(f"<figure>{to_svg(plot)}</figure>" for plot in plots)}</div>'


def wide(plot: Plot) -> str:
    """One plot over the whole width."""
    return f'<figure class="scroll wide">{to_svg(plot)}</figure>'


def curve(records: Sequence[Record], key: str, *, strong: bool = False, factor: float = 1) -> Curve:
    """What the records have under `key`, over their steps."""
    points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    return Curve(key, [step for step, _ in points], [factor * value for _, value in points], strong=strong)


def restarts(files: RunFiles) -> list[float]:
    """Steps after which training went on anew."""
    return [attempt.first - 0.5 for attempt in files.attempts[1:] if attempt.first is not None]


def keys(records: Sequence[Record]) -> list[str]:
    """Every number that any record has, in the order of first appearance."""
    return list({key: None for record in records for key in record if isinstance(record[key], int | float)})
