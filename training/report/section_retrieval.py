"""What the weights of a run are worth: scores, ranked lists, distances, cameras."""

from collections.abc import Sequence
from typing import Any

from datapipe.core.progress import counted
from training.report.curves import grid, wide
from training.report.html_page import Pictures, TableRow, count, details, escape, facts, missing, percent, soft, table
from training.report.run_files import BASELINES, RunFiles, Score, TestSet
from training.report.svg_plots import Curve, Plot

METRICS = (("mAP", "mAP"), ("rank1", "Rank-1"), ("rank5", "Rank-5"), ("rank10", "Rank-10"), ("mINP", "mINP"))
_NAMES = {"random": "random weights", "colour_histogram": "colour histogram"}
_NUMBERS = (1, 2, 4, 5, 6, 7, 8)
"""Columns of the tables of scores that are aligned to the right."""
_COUNTS = (("queries", "queries"), ("gallery", "gallery images"), ("skipped", "queries without a match, left out"))
_PAIRS = {"matching": "one person, two cameras", "others": "two people"}


def verdict(files: RunFiles) -> str:
    """The scores in one line for each test set, against what needs no training."""
    lines = [_verdict_on(test_set, test_set.last) for test_set in files.test_sets if test_set.last]
    if lines:
        return "\n".join(lines)
    if files.test_sets:
        return '<p class="verdict">Only baselines have been scored: no checkpoint of this run yet.</p>'
    return '<p class="verdict">No scores: none of this run\'s weights has been evaluated.</p>'


def _verdict_on(test_set: TestSet, last: Score) -> str:
    ours = last.value("mAP") or 0.0
    against, above = [], []
    for name in BASELINES[::-1]:
        baseline = test_set.baseline(name)
        theirs = baseline.value("mAP") if baseline else None
        if theirs is None:
            against.append(f"{_NAMES[name]} not scored")
            continue
        above.append(ours > theirs)
        times = f"{ours / theirs:.1f} × " if theirs > 0 else "against "
        against.append(f"{times}{_NAMES[name]} ({percent(theirs)})")
    kind = "" if not above else " good" if all(above) else " bad"
    return (
        f'<p class="verdict{kind}"><strong>mAP {percent(ours)}</strong> on {escape(test_set.name)} {_trained(last)}: '
        f"{escape('; '.join(against))}.</p>"
    )


def _trained(score: Score) -> str:
    if not score.step:
        return "by imported weights"
    samples = score.content.get("samples")
    return f"after {counted(score.step, 'step')}" + (f", {counted(samples, 'image')}" if samples else "")


def scores_section(files: RunFiles) -> str:
    """Tables of all scores, and their course over training."""
    if not files.test_sets:
        return missing("evaluation/")
    return "\n".join(_scores_of(test_set) for test_set in files.test_sets)


def _scores_of(test_set: TestSet) -> str:
    baselines = [score for score in map(test_set.baseline, BASELINES) if score]
    scores = [*baselines, *test_set.checkpoints]
    about = scores[-1].content if scores else {}
    head = ("weights", "steps", "images", "feature", *(label for _, label in METRICS))
    rows = [_score_row(score, score.headline, main=score is test_set.last) for score in scores]
    others = [_score_row(score, name) for score in scores for name in score.features if name != score.headline]
    counted = " · ".join(f"{about[key]:,} {name}" for key, name in _COUNTS if about.get(key) is not None)
    parts = [f"<h3>{escape(test_set.name)}</h3>", soft(f"{counted}. Scores in percent.")]
    parts += [soft(f"Note: {remark}.") for remark in _remarks(about)]
    if len(test_set.checkpoints) > 1:
        parts.append(wide(_map_plot(test_set)))
    parts.append(table(head, rows, numbers=_NUMBERS))
    if others:
        parts.append(details("Other features", table(head, others, numbers=_NUMBERS)))
    if "settings" in about:
        parts.append(details("What was scored, and how", facts(_how(about))))
    return "\n".join(parts)


def _how(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table about the last weights: settings, what they are and where from, and the counts of the data."""
    counts = about.get("data", {}).get("counts", {})
    parts = [(f"data: {name}", ", ".join(f"{number:,} {what}" for what, number in part.items()))
             for name, part in counts.items()]  # fmt: skip
    model = about["settings"].get("model", {})
    settings = {key: value for key, value in about["settings"].items() if key not in ("model", "identity")}
    facts = {f"weights: {key}": value for key, value in model.items()} | settings
    return [*parts, *((name, str(value)) for name, value in facts.items() if value not in ("", None))]


def _remarks(about: dict[str, Any]) -> list[str]:
    """How the data set differs from the published one, and what else is odd about it."""
    data = about.get("data", {})
    return [*data.get("differences", ()), *data.get("warnings", ())]


def _score_row(score: Score, feature: str, *, main: bool = False) -> TableRow:
    step, samples = score.step, score.content.get("samples") if score.step is not None else None
    numbers = [score.features[feature].get(metric) for metric, _ in METRICS]
    cells = [_NAMES.get(score.weights, score.weights), count(step), count(samples), feature]
    return TableRow([*cells, *("" if number is None else f"{100 * number:.1f}" for number in numbers)], main)


def _map_plot(test_set: TestSet) -> Plot:
    checkpoints = test_set.checkpoints
    headline = checkpoints[-1].headline
    others = {name for score in checkpoints for name in score.features} - {headline}
    curves = [_map_curve(checkpoints, headline, strong=True)]
    curves += [_map_curve(checkpoints, name) for name in sorted(others)]
    levels = [(_NAMES[name], score.value("mAP")) for name in _NAMES if (score := test_set.baseline(name))]
    heights = [(label, 100 * value) for label, value in levels if value is not None]
    return Plot(f"mAP over training on {test_set.name}, %", curves, levels=heights, zero=True, wide=True)


def _map_curve(checkpoints: Sequence[Score], feature: str, *, strong: bool = False) -> Curve:
    scored = [score for score in checkpoints if feature in score.features]
    steps = [float(score.step or 0) for score in scored]
    return Curve(feature, steps, [100 * score.features[feature]["mAP"] for score in scored], strong=strong, dots=True)


def ranked_section(files: RunFiles, pictures: Pictures) -> str:
    """The best, the median and the worst query, then the most confident mistakes: wrong first places, the nearest
    first."""
    shown = [(test_set.name, test_set.last) for test_set in files.test_sets if test_set.last]
    if not shown:
        return missing("evaluation/<set>/<weights>/ranked_best.jpg")
    parts = [
        soft(
            "Of the last checkpoint: the query, then the gallery as it was ranked for the scores above, without the "
            "images of the query's own camera and identity. Green frame and tick: the same person."
        )
    ]
    for set_name, score in shown:
        parts.append(f"<h3>{escape(set_name)}, {escape(score.weights)}</h3>")
        ranked = score.content.get("ranked", {})
        for which in ("best", "median", "worst", *sorted(name for name in ranked if name.startswith("mistake"))):
            name = f"evaluation/{set_name}/{score.weights}/ranked_{which}.jpg"
            parts.append(pictures.figure(name, _caption(which, ranked.get(which, {})), kind="list scroll"))
    return "\n".join(parts)


def _caption(which: str, ranked: dict[str, float]) -> str:
    number = which.removeprefix("mistake_")
    query = f"Confident mistake {number}" if number != which else f"{which.capitalize()} query"
    precision = ranked.get("average_precision")
    return query + ("" if precision is None else f": average precision {percent(precision)}")


def distances_section(files: RunFiles) -> str:
    """How far apart features of one person and of two people are, and how well each camera's queries do."""
    figures = [_distances_of(test_set) for test_set in files.test_sets if test_set.last]
    return "\n".join(filter(None, figures)) or missing("the part of metrics.json about distances and cameras")


def _distances_of(test_set: TestSet) -> str:
    content = test_set.last.content if test_set.last else {}
    distances, cameras = content.get("distances"), content.get("per_camera")
    parts = [f"<h3>{escape(test_set.name)}</h3>"]
    if distances:
        common = sum(map(min, distances["matching"], distances["others"]))
        parts.append(grid([_histogram(test_set.name, distances)]))
        parts.append(
            soft(
                f"Pairs of a query and a gallery image, an even sample of them. {percent(common)} of the two areas is "
                "common to both: the less, the better a distance alone tells people apart."
            )
        )
    if cameras:
        rows = [TableRow([name, f"{100 * value:.1f}"]) for name, value in cameras.items()]
        parts.append(table(("camera of the query", "mAP, %"), rows, numbers=(1,)))
    return "\n".join(parts) if len(parts) > 1 else ""


def _histogram(set_name: str, distances: dict[str, list[float]]) -> Plot:
    edges = distances["edges"]
    middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    curves = [Curve(label, middles, [100 * share for share in distances[key]]) for key, label in _PAIRS.items()]
    return Plot(f"Distances on {set_name}, % of the pairs", curves, xlabel="distance", zero=True)
