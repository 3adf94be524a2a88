"""The report's section on pseudo labels: clusters and outliers of every epoch, beside true identities."""

from typing import Any

from training.report.curves import grid
from training.report.html_page import TableRow, count, percent, soft, table
from training.report.run_files import RunFiles
from training.report.svg_plots import Curve, Plot
from training.trainer.pseudo_labels import HISTORY

MOST_ROWS = 12
"""Epochs in the table: the last ones."""


def pseudo_labels_section(files: RunFiles) -> str:
    """Plots over epochs and a table of the last ones; empty for a run that makes no pseudo labels."""
    epochs = {one["epoch"]: one for one in files.lines(HISTORY)}  # made again after a stop: the later one counts
    records = [epochs[number] for number in sorted(epochs)]
    if not records:
        return ""
    plots = [_clusters(records), _course(records, "outliers", "Images outside all clusters")]
    if any("ari" in one for one in records):
        known = [one for one in records if "ari" in one]
        curves = [_curve(known, key, label) for key, label in (("ari", "ARI"), ("nmi", "NMI"))]
        plots.append(Plot("Agreement of clustered images with their identities", curves, xlabel="epoch"))
    head = ("epoch", "clusters", "largest", "outside", "ARI", "NMI", "features", "clustering")
    rows = [TableRow(_cells(one)) for one in records[-MOST_ROWS:]]
    note = ("ARI (adjusted Rand index) and NMI (normalised mutual information) compare the clusters with the "
            "identities that the data set has; training does not use them.")  # fmt: skip
    return grid(plots) + table(head, rows, numbers=tuple(range(len(head)))) + soft(note)


def _clusters(records: list[dict[str, Any]]) -> Plot:
    people = next((one["identities"] for one in reversed(records) if "identities" in one), None)
    levels = [] if people is None else [("identities", float(people))]
    return Plot("Clusters", [_curve(records, "clusters", "clusters")], xlabel="epoch", levels=levels, zero=True)


def _course(records: list[dict[str, Any]], key: str, title: str) -> Plot:
    return Plot(title, [_curve(records, key, key)], xlabel="epoch", zero=True)


def _curve(records: list[dict[str, Any]], key: str, label: str) -> Curve:
    return Curve(label, [one["epoch"] + 1 for one in records], [one[key] for one in records])


def _cells(one: dict[str, Any]) -> list[str]:
    agreement = [percent(one[key]) if key in one else "" for key in ("ari", "nmi")]
    seconds = [f"{one[key]:.1f} s" for key in ("embed_s", "cluster_s")]
    return [count(one["epoch"] + 1), count(one["clusters"]), count(one["largest"]), count(one["outliers"]), *agreement,
            *seconds]  # fmt: skip
