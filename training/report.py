"""A run folder -> one self-contained report.html: what was run, how it went, what it is worth.

Reads the run folder only. No address is loaded, no script runs; pictures and curves are inside. Every section says
what is missing where a file is not there.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from datapipe.config import StorageConfig
from datapipe.errors import DataError
from training.report_curves import curve, grid, keys, restarts, wide
from training.report_data import Attempt, Record, RunFiles, Score, TestSet
from training.report_faults import faults_section
from training.report_health import health_section
from training.report_page import (
    Pictures,
    Row,
    count,
    details,
    duration,
    escape,
    facts,
    missing,
    page,
    percent,
    soft,
    table,
)
from training.report_plots import Curve, Plot
from training.report_speed import speed_section
from training.run_folder import RunFolder

NAME = "report.html"
MOST_ROWS = 200

_METRICS = (("mAP", "mAP"), ("rank1", "Rank-1"), ("rank5", "Rank-5"), ("rank10", "Rank-10"), ("mINP", "mINP"))
_NAMES = {"random": "random weights", "colour_histogram": "colour histogram"}


def write_report(run: str, storage: StorageConfig | None = None) -> str:
    """Write report.html into the run folder (local or s3://...) and return its path or URL.

    Raises DataError where there is no run folder.
    """
    folder = RunFolder(run, storage or StorageConfig())
    files = RunFiles(folder)
    if not files.names & {"config.toml", "command.txt", "environment.json"} and not files.attempts:
        raise DataError("this is no run folder: no config.toml and no metrics", where=run, hint="give the run's --out")
    folder.write(NAME, render(files))
    return folder.store.address(NAME)


def render(files: RunFiles) -> str:
    """The whole page."""
    pictures = Pictures(files.bytes)
    sections = [
        ("What was run", _what_was_run(files)),
        ("Retrieval", _scores(files)),
        ("Ranked lists", _ranked_lists(files, pictures)),
        ("Loss", _loss(files)),
        ("Speed", speed_section(files)),
        ("Attempts and restarts", _attempts(files)),
        ("Steps that were not finite", faults_section(files, pictures)),
        ("First batch", pictures.figure("first_batch.jpg", "What the network saw: crops and their views.")),
        ("Schedules", _schedules(files)),
        ("Health", health_section(files)),
        ("Environment", _environment(files)),
    ]
    title = f"{_method(files) or 'Run'}: {files.folder.url.rstrip('/').rpartition('/')[2]}"
    about = f"{files.folder.url} · report of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return page(title, about, _verdict(files), sections)


# ------------------------------------------------------------------------------------------------------- sections


def _verdict(files: RunFiles) -> str:
    lines = [_verdict_on(test_set, test_set.last) for test_set in files.test_sets if test_set.last]
    if lines:
        return "\n".join(lines)
    if files.test_sets:
        return '<p class="verdict">Only baselines have been scored: no checkpoint of this run yet.</p>'
    return '<p class="verdict">No scores: none of this run\'s weights has been evaluated.</p>'


def _verdict_on(test_set: TestSet, last: Score) -> str:
    ours = last.value("mAP") or 0.0
    against, above = [], []
    for name in ("random", "colour_histogram"):
        baseline = test_set.baseline(name)
        theirs = baseline.value("mAP") if baseline else None
        if theirs is None:
            against.append(f"{_NAMES[name]} not scored")
            continue
        above.append(ours > theirs)
        times = f"{ours / theirs:.1f} × " if theirs > 0 else "against "
        against.append(f"{times}{_NAMES[name]} ({percent(theirs)})")
    kind = "" if not above else " good" if all(above) else " bad"
    samples = last.content.get("samples")
    trained = f"{last.step:,} steps" + (f", {samples:,} images" if samples else "")
    return (
        f'<p class="verdict{kind}"><strong>mAP {percent(ours)}</strong> on {escape(test_set.name)} after {trained}: '
        f"{escape('; '.join(against))}.</p>"
    )


def _what_was_run(files: RunFiles) -> str:
    command = files.text("command.txt")
    parts = [f'<pre class="wrap">{escape(command.strip())}</pre>' if command else missing("command.txt")]
    parts.append(facts(_key_facts(files)))
    for name, title in (("config.toml", "The resolved recipe"), ("deepspeed.json", "DeepSpeed's configuration")):
        text = files.text(name)
        parts.append(details(f"{title} ({name})", f"<pre>{escape(text)}</pre>") if text else missing(name))
    return "\n".join(parts)


def _key_facts(files: RunFiles) -> list[tuple[str, str]]:
    recipe, manifest = files.recipe, files.environment.get("manifest", {})
    manifest = manifest if isinstance(manifest, dict) else {"id": manifest}
    backbone, optimisation = recipe.get("backbone", {}), recipe.get("optimisation", {})
    size = backbone.get("size")
    records = files.records
    hours = sum(attempt.seconds * (attempt.header.get("world") or 1) for attempt in files.attempts) / 3600
    known: list[tuple[str, Any]] = [
        ("method", _method(files)),
        ("backbone", backbone.get("arch")),
        ("input", f"{size[0]} × {size[1]} pixels (height × width)" if size else None),
        ("data", recipe.get("stream", {}).get("manifest") or manifest.get("url")),
        ("manifest", manifest.get("id")),
        ("crops", f"{manifest['rows']:,}" if "rows" in manifest else None),
        ("licence of the data", manifest.get("licence")),
        ("global batch", optimisation.get("batch")),
        ("precision", optimisation.get("precision")),
        ("seed", recipe.get("seed")),
        ("trained", _trained(records[-1]) if records else None),
        ("time in steps", duration(sum(attempt.seconds for attempt in files.attempts)) if records else None),
        ("workers × hours", f"{hours:.2f}" if records else None),
        ("export", "exports/backbone.safetensors" if "exports/backbone.safetensors" in files.names else "not exported"),
    ]
    return [(name, str(value)) for name, value in known if value not in (None, "")]


def _trained(record: Record) -> str:
    samples = f", {record['samples']:,} images" if "samples" in record else ""
    epochs = f", {record['epoch']:.2f} epochs" if "epoch" in record else ""
    return f"{record['step']:,} steps{samples}{epochs}"


def _scores(files: RunFiles) -> str:
    if not files.test_sets:
        return missing("evaluation/")
    return "\n".join(_scores_of(test_set) for test_set in files.test_sets)


def _scores_of(test_set: TestSet) -> str:
    baselines = [score for score in map(test_set.baseline, ("colour_histogram", "random")) if score]
    scores = [*baselines, *test_set.checkpoints]
    about = scores[-1].content if scores else {}
    head = ("weights", "steps", "images", "feature", *(label for _, label in _METRICS))
    rows = [_score_row(score, score.headline, main=score is test_set.last) for score in scores]
    others = [_score_row(score, name) for score in scores for name in score.features if name != score.headline]
    counted = " · ".join(f"{about[key]:,} {name}" for key, name in _COUNTS if about.get(key) is not None)
    parts = [f"<h3>{escape(test_set.name)}</h3>", soft(f"{counted}. Scores in percent.")]
    if test_set.checkpoints:
        parts.append(wide(_map_plot(test_set)))
    parts.append(table(head, rows, numbers=_NUMBERS))
    if others:
        parts.append(details("Other features", table(head, others, numbers=_NUMBERS)))
    return "\n".join(parts)


_NUMBERS = (1, 2, 4, 5, 6, 7, 8)
"""Columns of the tables of scores that are aligned to the right."""
_COUNTS = (("queries", "queries"), ("gallery", "gallery images"), ("skipped", "queries without a match, left out"))


def _score_row(score: Score, feature: str, *, main: bool = False) -> Row:
    step, samples = score.step, score.content.get("samples") if score.step is not None else None
    numbers = [score.features[feature].get(metric) for metric, _ in _METRICS]
    cells = [_NAMES.get(score.weights, score.weights), count(step), count(samples), feature]
    return Row([*cells, *("" if number is None else f"{100 * number:.1f}" for number in numbers)], main)


def _map_plot(test_set: TestSet) -> Plot:
    checkpoints = test_set.checkpoints
    headline = checkpoints[-1].headline
    others = {name for score in checkpoints for name in score.features} - {headline}
    curves = [_mapcurve(checkpoints, headline, strong=True)]
    curves += [_mapcurve(checkpoints, name) for name in sorted(others)]
    levels = [(_NAMES[name], score.value("mAP")) for name in _NAMES if (score := test_set.baseline(name))]
    heights = [(label, 100 * value) for label, value in levels if value is not None]
    return Plot(f"mAP over training on {test_set.name}, %", curves, levels=heights, zero=True, wide=True)


def _mapcurve(checkpoints: Sequence[Score], feature: str, *, strong: bool = False) -> Curve:
    scored = [score for score in checkpoints if feature in score.features]
    steps = [float(score.step or 0) for score in scored]
    return Curve(feature, steps, [100 * score.features[feature]["mAP"] for score in scored], strong=strong, dots=True)


def _ranked_lists(files: RunFiles, pictures: Pictures) -> str:
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
        for which in ("best", "median", "worst"):
            name = f"evaluation/{set_name}/{score.weights}/ranked_{which}.jpg"
            precision = score.content.get("ranked", {}).get(which, {}).get("average_precision")
            said = "" if precision is None else f": average precision {percent(precision)}"
            parts.append(pictures.figure(name, f"{which.capitalize()} query{said}", kind="list scroll"))
    return "\n".join(parts)


def _loss(files: RunFiles) -> str:
    terms = [key for key in keys(files.records) if key == "loss" or key.startswith("loss_")]
    if not terms:
        return missing("metrics/attempt_001.jsonl")
    curves = [curve(files.records, key, strong=key == "loss") for key in terms]
    return wide(Plot("Loss and its terms", curves, marks=restarts(files), wide=True))


def _attempts(files: RunFiles) -> str:
    if not files.attempts:
        return missing("metrics/attempt_001.jsonl")
    head = ("attempt", "began (UTC)", "workers", "went on from", "steps", "redone", "time", "images/s", "waits", "why")
    rows, done = [], 0
    for attempt in files.attempts:
        rows.append(_attempt_row(attempt, done))
        done = max(done, attempt.last or 0)
    cut = sum(attempt.cut_lines for attempt in files.attempts)
    note = soft(f"{cut} unfinished line{'s' if cut > 1 else ''} of metrics, left by a kill.") if cut else ""
    return table(head, rows, numbers=(0, 2, 5, 6, 7, 8)) + note


def _attempt_row(attempt: Attempt, done: int) -> Row:
    header, records = attempt.header, attempt.records
    redone = max(0, done - (attempt.first or done + 1) + 1)
    steps = f"{attempt.first:,} to {attempt.last:,}" if records else "none"
    return Row(
        [
            str(attempt.number),
            str(header.get("time", "")).replace("T", " ").removesuffix("+00:00").removesuffix("Z"),
            count(header.get("world")),
            str(header.get("resumed_from") or "the beginning"),
            steps,
            f"{redone:,}",
            duration(attempt.seconds),
            _middle(records, "images_per_s", "{:,.0f}", 1),
            _middle(records, "wait_share", "{:.1f} %", 100),
            str(header.get("reason") or ""),
        ]
    )


def _schedules(files: RunFiles) -> str:
    titles = {"lr": "Learning rate", "momentum": "Teacher momentum", "weight_decay": "Weight decay"}
    present = [key for key in titles if any(key in record for record in files.records)]
    if not present:
        return missing("metrics/attempt_001.jsonl")
    return grid([Plot(titles[key], [curve(files.records, key)], marks=restarts(files)) for key in present])


def _environment(files: RunFiles) -> str:
    if not files.environment:
        return missing("environment.json")
    return facts(list(_flat("", files.environment))[:MOST_ROWS])


# ---------------------------------------------------------------------------------------------------- their parts


def _middle(records: Sequence[Record], key: str, form: str, factor: float) -> str:
    values = [record[key] for record in records if isinstance(record.get(key), int | float)]
    return form.format(factor * statistics.median(values)) if values else ""


def _method(files: RunFiles) -> str:
    method = files.recipe.get("method", {})
    return str(method.get("name", "")) if isinstance(method, dict) else str(method)


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        yield prefix, ", ".join(str(item) for item in value)
    else:
        yield prefix, str(value)
