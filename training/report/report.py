"""A run folder -> one self-contained report.html: what was run, how it went, what it is worth.

Reads the run folder only. No address is loaded, no script runs; pictures and curves are inside. Every section says
what is missing where a file is not there.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from PIL import Image

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.core.progress import duration
from training.core.run_folder.run_folder import RunFolder
from training.report.curves import curve, grid, keys, restarts, wide
from training.report.html_page import Pictures, TableRow, count, details, escape, facts, missing, page, soft, table
from training.report.run_files import Attempt, Record, RunFiles
from training.report.section_faults import faults_section
from training.report.section_grid import grid_sections, grid_verdict
from training.report.section_health import health_section
from training.report.section_pseudo_labels import pseudo_labels_section
from training.report.section_published import published_section
from training.report.section_restarts import restarts_section
from training.report.section_retrieval import distances_section, ranked_section, scores_section, verdict
from training.report.section_speed import speed_section
from training.report.svg_plots import Plot

log = logging.getLogger(__name__)
T = TypeVar("T")
NAME = "report.html"
MOST_ROWS = 200
OPTIONAL = ("Pseudo labels",)
"""Sections that are left out where they have nothing to show."""
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, Image.DecompressionBombError)
"""What computing with values of another kind than a run writes ends in."""
Section = tuple[str, Callable[[], str]]
"""A title, and what makes its content."""


def write_report(run: str, storage: StorageConfig | None = None) -> str:
    """Write report.html into the run folder (local or s3://...) and return its path or URL.

    Raises DataError where there is no run folder.
    """
    folder = RunFolder(run, storage or StorageConfig())
    files = RunFiles(folder)
    if next(folder.names(""), None) is None:
        raise DataError("there is nothing at this address", where=run, hint="check for a typing mistake")
    if not files.trained and not files.test_sets and not files.grid:
        raise DataError("this is no run folder: no config.toml, no metrics and no scores", where=run,
                        hint="give the --out of a run, of its scores, or of a grid of evaluations")  # fmt: skip
    folder.write(NAME, render(files))
    return folder.store.address(NAME)


def render(files: RunFiles) -> str:
    """The whole page."""
    pictures = Pictures(files.bytes)
    if files.grid and not files.trained:
        grids = _made("Scores", lambda: grid_sections(files), [("Scores", "")])
        return page(
            f"Evaluations: {_folder(files)}", _about(files), _made("verdict", lambda: grid_verdict(files)), grids
        )
    makers = [
        *([("What was run", lambda: _what_was_run(files))] if files.trained else ()),
        *_worth(files, pictures),
        *(_training(files, pictures) if files.trained else ()),
    ]
    sections = [(title, _made(title, make)) for title, make in makers]
    sections = [(title, content) for title, content in sections if content or title not in OPTIONAL]
    header = _made("verdict", lambda: verdict(files))
    return page(f"{_method(files) or 'Scores'}: {_folder(files)}", _about(files), header, sections)


def _made(title: str, make: Callable[[], T], otherwise: T | None = None) -> Any:
    """What a section shows; where the files that it is made of hold what no run writes, a line that says so: the other
    sections are none the worse for it."""
    try:
        return make()
    except DAMAGE as error:
        log.warning("the report's section %r is left out, a file that it is made of is damaged: %r", title, error)
        note = f'<p class="missing">{escape(title)}: not shown, a file that it is made of is damaged.</p>'
        return note if otherwise is None else otherwise


def _folder(files: RunFiles) -> str:
    return files.folder.url.rstrip("/").rpartition("/")[2]


def _about(files: RunFiles) -> str:
    return f"{files.folder.url} · report of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def _worth(files: RunFiles, pictures: Pictures) -> list[Section]:
    return [
        ("Retrieval", lambda: scores_section(files)),
        ("Beside published scores", lambda: published_section(files)),
        ("Ranked lists", lambda: ranked_section(files, pictures)),
        ("Distances and cameras", lambda: distances_section(files)),
    ]


def _training(files: RunFiles, pictures: Pictures) -> list[Section]:
    return [
        ("Loss", lambda: _loss(files)),
        ("Pseudo labels", lambda: pseudo_labels_section(files)),
        ("Speed", lambda: speed_section(files)),
        ("Attempts and restarts", lambda: _attempts(files) + _made("Restarts", lambda: restarts_section(files))),
        ("Steps that were not finite", lambda: faults_section(files, pictures)),
        ("First batch", lambda: pictures.figure("first_batch.jpg", "What the network saw: crops and their views.")),
        ("Schedules", lambda: _schedules(files)),
        ("Health", lambda: health_section(files)),
        ("Environment", lambda: _environment(files)),
    ]


# ------------------------------------------------------------------------------------------------------- sections


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
    size = size if isinstance(size, list) and len(size) == 2 else None
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
        ("notes on the data", "; ".join(manifest.get("notes") or ()) or None),
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


def _loss(files: RunFiles) -> str:
    terms = [key for key in keys(files.records) if key == "loss" or key.startswith("loss_")]
    if not terms:
        return missing("metrics/attempt_001.jsonl")
    curves = [curve(files.records, key, strong=key == "loss") for key in terms]
    return wide(Plot("Loss and its terms", curves, marks=restarts(files), wide=True))


def _attempts(files: RunFiles) -> str:
    if not files.attempts:
        return missing("metrics/attempt_001.jsonl")
    head = ("attempt", "began (UTC)", "workers", "went on from", "steps", "redone", "time", "images/s", "MFU", "waits",
            "why")  # fmt: skip
    rows, done = [], 0
    for attempt in files.attempts:
        rows.append(_attempt_row(attempt, done))
        done = max(done, attempt.last or 0)
    cut = sum(attempt.cut_lines for attempt in files.attempts)
    note = soft(f"{cut} unfinished line{'s' if cut > 1 else ''} of metrics, left by a kill.") if cut else ""
    return table(head, rows, numbers=(0, 2, 5, 6, 7, 8, 9)) + note


def _attempt_row(attempt: Attempt, done: int) -> TableRow:
    header, records = attempt.header, attempt.records
    redone = max(0, done - (attempt.first or done + 1) + 1)
    steps = f"{attempt.first:,} to {attempt.last:,}" if records else "none"
    return TableRow(
        [
            str(attempt.number),
            str(header.get("time", "")).replace("T", " ").removesuffix("+00:00").removesuffix("Z"),
            count(header.get("world")),
            str(header.get("resumed_from") or "the beginning"),
            steps,
            f"{redone:,}",
            duration(attempt.seconds),
            _middle(records, "images_per_s", "{:,.0f}", 1),
            _middle(records, "mfu", "{:.1f} %", 100),
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
