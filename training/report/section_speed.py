"""The report's section on speed: images per second, who waited for whom, and what came from the storage."""

from collections import Counter
from statistics import median

from datapipe.core.progress import counted
from training.report.curves import curve, grid, restarts
from training.report.html_page import missing, percent, soft
from training.report.run_files import RunFiles
from training.report.svg_plots import Plot

_PLOTS = (
    ("images_per_s", "Images per second", 1),
    ("mfu", "Model FLOPs utilisation (MFU), % of what the GPUs have by datasheet", 100),
    ("model_tflops", "Model TFLOP/s of a rank", 1),
    ("wait_share", "Waiting for data, % of the time of the rank that waits most", 100),
    ("fetched_mb_per_s", "Fetched from the storage, MB/s", 1),
    ("cache_hits", "Crops from the cache, %", 100),
    ("reading_share", "Reading, % of the work of the loaders' threads", 100),
)
"""Key of a record, title, factor."""
SPEED_KEYS = frozenset(key for key, _, _ in _PLOTS) | {"bytes_fetched"}
"""Numbers of a record that this section shows."""
_MEANING = {
    "training": "the steps themselves: data kept up with them.",
    "reading": "bytes came too slowly: raise stream.reads (and stream.requests_per_s) or the cache (stream.cache_mb, "
               "stream.cache_gb), or bring the data set closer.",
    "views": "views were made too slowly: more cores (stream.threads, stream.processes), or "
             "views.interpolation = \"linear\".",
}  # fmt: skip


def speed_section(files: RunFiles) -> str:
    """What limited the run, then the curves."""
    plots = [
        Plot(title, [curve(files.records, key, factor=factor)], marks=restarts(files), zero=True)
        for key, title, factor in _PLOTS
        if any(key in record for record in files.records)
    ]
    if not plots:
        return missing("metrics/attempt_001.jsonl")
    notes = soft(f"Vertical lines: restarts. {_fetched(files)}{_saves(files)}")
    return _limits(files) + _measured(files) + notes + grid(plots)


def _measured(files: RunFiles) -> str:
    """Operations of an image, and the median utilisation of each kind of machine that attempts ran on."""
    lines: dict[str, list[float]] = {}
    for attempt in files.attempts:
        about = attempt.header.get("utilisation")
        if isinstance(about, dict) and about.get("flops_of_image"):
            words = f"{about['flops_of_image'] / 1e9:,.1f} GFLOP an image"
            key = "; ".join(filter(None, (words, str(about.get("about") or ""))))
            lines.setdefault(key, []).extend(record["mfu"] for record in attempt.records if "mfu" in record)
    parts = (f"{words}{f': {percent(median(shares))} at the median' if shares else ''}."
             for words, shares in lines.items())  # fmt: skip
    return soft(" ".join(parts)) if lines else ""


def _saves(files: RunFiles) -> str:
    """What checkpoints cost: of each save the time that the loop stood still, over that since the save before."""
    saves = [save for attempt in files.attempts for save in attempt.saves]
    if not saves:
        return ""
    stood = [save["save_stood_s"] for save in saves]
    between = sum(save["save_stood_s"] / save["save_share"] for save in saves if save["save_share"])
    took = median(save["save_took_s"] for save in saves)
    share = f", {100 * sum(stood) / between:.2f} % of the time" if between else ""
    return (f" {counted(len(saves), 'checkpoint')}: the loop stood still for {sum(stood):.2f} s in all{share}, for "
            f"{max(stood):.2f} s at most; half of them existed within {took:.1f} s.")  # fmt: skip


def _limits(files: RunFiles) -> str:
    """For each thing that limited the run in some of its steps, in how many, and what to do about it."""
    steps_of_limit = Counter(str(record["bottleneck"]) for record in files.records if "bottleneck" in record)
    parts = (f"in {percent(steps / steps_of_limit.total())} of the steps: {name}, {_MEANING.get(name, '')}"
             for name, steps in steps_of_limit.most_common())  # fmt: skip
    return soft(f"What limited the run, {' '.join(parts)}") if steps_of_limit else ""


def _fetched(files: RunFiles) -> str:
    """The bytes of all attempts; each one's last record has its sum."""
    last = (attempt.records[-1].get("bytes_fetched", 0) for attempt in files.attempts if attempt.records)
    total = sum(last)
    return f"{total / 1e6:,.1f} MB were fetched in all." if total else ""
