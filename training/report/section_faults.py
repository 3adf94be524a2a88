"""The report's section on steps whose loss or gradients were not finite: what was seen, done, and in which images."""

import io
import re
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from datapipe.core.bounds.text_trees import parse_record
from datapipe.stream.preview import view_sheet
from training.report.html_page import Pictures, TableRow, count, escape, soft, table
from training.report.run_files import RunFiles
from training.trainer.nonfinite import RECORD

KEPT = re.compile(r"faults/step_(\d+)_rank_(\d+)\.npz")
DAMAGE = (ValueError, LookupError, OSError, EOFError, TypeError, RuntimeError, MemoryError, AttributeError, SyntaxError,
          zipfile.BadZipFile, zlib.error)  # fmt: skip
"""What reading arrays from damaged bytes ends in."""
MOST_UNPACKED_BYTES = 256 << 20
"""Of the arrays of a file; a larger one is said not to be readable."""
MOST_SHEETS, MOST_IMAGES, MOST_ROWS = 8, 6, 64
"""Pictures in the report, images in a picture, and sample rows below it."""


class KeptBatch(NamedTuple):
    """One rank's part of a batch that was kept, as views and places; padding left out."""

    views: dict[str, np.ndarray]
    """uint8 [V, B, H, W, 3] by name."""
    sample: np.ndarray
    position: np.ndarray


def faults_section(files: RunFiles, pictures: Pictures) -> str:
    """A table of the steps, then what each rank saw in the last of them."""
    kept = [(int(match[1]), int(match[2]), match[0]) for match in map(KEPT.fullmatch, sorted(files.names)) if match]
    steps, cut = _steps(files)
    if not steps and not kept:
        return soft("Every step was finite.")
    parts = [table(("step", "what was done", "what was not finite"), steps, numbers=(0,))] if steps else []
    if cut:
        parts.append(soft(f"{cut} unreadable line{'s' if cut > 1 else ''} in {RECORD}."))
    if len(kept) > MOST_SHEETS:
        parts.append(soft(f"The last {MOST_SHEETS} of {len(kept)} batches that were kept."))
    parts += [_sheet(files, pictures, *which) for which in kept[-MOST_SHEETS:]]
    return "\n".join(parts)


def _steps(files: RunFiles) -> tuple[list[TableRow], int]:
    """Rows of the table, and how many lines could not be read."""
    rows, cut = [], 0
    for line in (files.text(RECORD) or "").splitlines():
        try:
            record = parse_record(line)
            rows.append(TableRow([count(record["step"]), str(record["action"]), str(record["what"])]))
        except (ValueError, KeyError, TypeError):
            cut += 1
    return rows, cut


def _sheet(files: RunFiles, pictures: Pictures, step: int, rank: int, name: str) -> str:
    where = f"step {step:,}, rank {rank}"
    batch = _kept(files, name)
    if batch is None:
        return f'<p class="missing">{escape(name)} ({where}) cannot be read.</p>'
    if not batch.views or not len(batch.sample):
        return soft(f"{where}: only padding.")
    shown = min(MOST_IMAGES, len(batch.sample))
    rows = [f"row {sample}" for sample in batch.sample[:shown]]
    caption = f"{where}: views of the first {shown} of {len(batch.sample)} images that were in the step"
    picture = view_sheet(batch.views, count=shown, names=rows)
    return pictures.embed(picture, name, caption) + soft(_places(batch))


def _places(batch: KeptBatch) -> str:
    """Where the images stand in the data set and in the stream."""
    listed = ", ".join(str(row) for row in batch.sample[:MOST_ROWS])
    more = f" and {len(batch.sample) - MOST_ROWS} more" if len(batch.sample) > MOST_ROWS else ""
    low, high = int(batch.position.min()), int(batch.position.max())
    return f"Rows of the data set: {listed}{more}. Places in the stream: {low:,} to {high:,}."


def _kept(files: RunFiles, name: str) -> KeptBatch | None:
    """The batch in a file; None where it is gone or damaged."""
    data = files.bytes(name)
    if data is None:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
        plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if sum(one.file_size for one in members) > MOST_UNPACKED_BYTES or any(
            one.compress_type not in plain for one in members
        ):
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            real = arrays["weight"] > 0
            views = {
                key.removeprefix("views/"): arrays[key][:, real]
                for key in arrays.files
                if key.startswith("views/") and arrays[key].dtype == np.uint8 and arrays[key].ndim == 5
            }
            return KeptBatch(views, arrays["sample"][real], arrays["position"][real])
    except DAMAGE:
        return None
