"""The report's section on health: signs of collapse and what they were seen in, then all else that is watched."""

from collections.abc import Sequence

from training.report.curves import curve, grid, keys, restarts
from training.report.html_page import TableRow, count, missing, soft, table
from training.report.run_files import Record, RunFiles
from training.report.section_speed import SPEED_KEYS
from training.report.svg_plots import Curve, Plot
from training.trainer.monitoring import collapse
from training.trainer.monitoring.collapse import Rule, Sign

_ELSEWHERE = (
    frozenset(
        ("attempt", "step", "samples", "epoch", "done", "time", "lr", "weight_decay", "momentum")
        + (
            "loss",
            "images_compared",
            "uniform_entropy",
            "uniform_entropy_patch",
            "uniform_entropy_identity",
            "uniform_entropy_cluster",
        )
    )
    | SPEED_KEYS
)
"""Numbers of a record that have a place of their own, or that others are judged by."""


def health_section(files: RunFiles) -> str:
    """Signs of collapse, then the curves of what the method watches."""
    watched = [key for key in keys(files.records) if key not in _ELSEWHERE and not key.startswith("loss_")]
    watched = [key for key in watched if any(record.get(key) for record in files.records)]  # counters that stayed zero
    if not watched:
        return missing("metrics/attempt_001.jsonl")
    plots = [_watched(files, key) for key in watched]
    return _signs(files) + grid(plots)


def _signs(files: RunFiles) -> str:
    seen = collapse.signs(files.records)
    if not seen:
        return soft(f"No sign of collapse in {len(files.records):,} steps.")
    head = ("sign", "from step", "to step", "what it means", "what to try")
    rows = [
        TableRow([s.rule.name, count(s.since), _end(s), s.rule.what, s.rule.hint], main=s.until is None) for s in seen
    ]
    rules = {sign.rule.name: sign.rule for sign in seen}
    return table(head, rows, numbers=(1, 2)) + grid([_judged(files, rule) for rule in rules.values()])


def _end(sign: Sign) -> str:
    return "lasts" if sign.until is None else count(sign.until)


def _judged(files: RunFiles, rule: Rule) -> Plot:
    """The value that a rule looks at, with its threshold."""
    points = [(record["step"], value) for record in files.records if (value := rule.value(record)) is not None]
    line = Curve(rule.name, [step for step, _ in points], [value for _, value in points])
    side = "below" if rule.below else "above"
    return Plot(f"{rule.name}: seen {side} {rule.threshold:g}", [line], marks=restarts(files),
                levels=[("threshold", rule.threshold)])  # fmt: skip


def _watched(files: RunFiles, key: str) -> Plot:
    title = key.replace("_", " ").capitalize()
    return Plot(title, [curve(files.records, key)], marks=restarts(files), levels=_ceiling(files.records, key))


def _ceiling(records: Sequence[Record], key: str) -> list[tuple[str, float]]:
    """ln K, where the curve is an entropy of targets."""
    if not key.startswith("target_entropy"):
        return []
    name = key.replace("target", "uniform")
    entropy = records[-1].get(name, records[-1].get("uniform_entropy"))
    return [] if entropy is None else [("ln K", entropy)]
