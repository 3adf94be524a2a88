"""What a data set holds: counts, sizes, duplicates and the price of excluding them, per source; from indexes alone."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.core.config import StorageConfig
from datapipe.dataset.index import MARKS, whole_column
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.packed_index import packed_entries
from datapipe.dataset.quarantine import NAME as QUARANTINE
from datapipe.dataset.quarantine import read_quarantine, read_remarks
from datapipe.dataset.remarks import Remarks
from datapipe.storage import Store, open_store

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
COLUMNS = ("key", "size", "height", "width", "source", "pid", "camera", "video", "track", *MARKS, "removed")
COUNTED = {"people": ("source", "pid"), "cameras": ("source", "camera"), "tracks": ("source", "video", "track")}
"""What tells them apart; the last column is -1 where unknown. Sources number their people independently."""
KINDS = dict(zip(("exact", "near"), MARKS, strict=True))

Facts = dict[str, Any]


def statistics(url: str, storage: StorageConfig) -> Facts:
    """Everything that `stats --json` prints. Removed crops do not count. Raises as Manifest.load and table do."""
    manifest = Manifest.load(url, storage)
    table = manifest.table(COLUMNS, storage)
    table = table.filter(pyarrow.compute.invert(table["removed"])).combine_chunks()
    about = {name: getattr(manifest, name) for name in ("id", "file", "name", "version", "derived_by", "licence")}
    return {
        **about,
        "notes": list(manifest.notes),
        "shards": len(manifest.shards),
        "tar_bytes": manifest.bytes,
        "packed_bytes": sum(entry.size for entry in packed_entries(open_store(manifest.url, storage), manifest)),
        "removed": manifest.removed,
        "stored_crops": manifest.stored_rows - manifest.removed,
        **_facts(table),
        **_percentiles(table),
        "price": {kind: _price(table, mark) for kind, mark in KINDS.items()},
        "sources": {source: _facts(part) for source, part in _by_source(table.drop_columns("key"))},
        "quarantine": _quarantine(open_store(manifest.url, storage)),
        "remarks": json.loads(read_remarks(open_store(manifest.url, storage)).to_json()),
    }


def as_text(facts: Facts) -> str:
    """Format the facts of `statistics` as text for a terminal."""
    selected = f" of {facts['stored_crops']:,} stored" if facts["crops"] != facts["stored_crops"] else ""
    lines = [
        f"{facts['file']}  id {facts['id'][:12]}" + (f"  licence: {facts['licence']}" if facts["licence"] else ""),
        f"{facts['crops']:,} crops{selected}, {facts['bytes'] / 1e6:,.1f} MB of JPEG; {facts['shards']:,} shards, "
        f"{facts['tar_bytes'] / 1e6:,.1f} MB; {facts['removed']:,} removed; "
        + (f"packed index {facts['packed_bytes'] / 1e6:,.1f} MB" if facts["packed_bytes"] else "no packed index yet"),
        *(f"note: {note}" for note in facts["notes"]),
        "",
        *_aligned(
            [
                ["", *(f"{share} %" for share in PERCENTILES)],
                *([name, *(f"{value:,.4g}" for value in facts[name].values())] for name in _MEASURES),
            ]
        ),
        "",
        *_aligned(
            [
                ["source", "crops", *COUNTED, *KINDS, "MB", "height x width"],
                *(_source_line(name, one) for name, one in facts["sources"].items()),
            ]
        ),
        "",
        *(_price_line(kind, facts[kind], price) for kind, price in facts["price"].items()),
    ]
    if facts["quarantine"]:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in facts["quarantine"].items())
        lines.append(f"left out of the sources: {listed}; see {QUARANTINE}")
    lines += Remarks.from_json(json.dumps(facts["remarks"])).lines()
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ counting

_MEASURES = ("height", "width", "aspect", "size")


def _facts(table: pyarrow.Table) -> Facts:
    """Counts of some crops, and the size of the middle one."""
    size = [float(np.median(table[name].to_numpy())) if len(table) else 0.0 for name in ("height", "width")]
    return {
        "crops": len(table),
        "bytes": pyarrow.compute.sum(table["size"].cast(pyarrow.int64())).as_py() or 0,
        **{name: _distinct(table, columns) for name, columns in COUNTED.items()},
        **{kind: len(table) - table[mark].null_count for kind, mark in KINDS.items()},
        "median_size": size,
    }


def _distinct(table: pyarrow.Table, columns: tuple[str, ...]) -> int:
    known = table.filter(pyarrow.compute.greater_equal(table[columns[-1]], 0))
    return known.group_by(list(columns)).aggregate([]).num_rows


def _percentiles(table: pyarrow.Table) -> Facts:
    """Height, width, height / width and bytes of the JPEG at PERCENTILES."""
    height, width, size = (table[name].to_numpy().astype(float) for name in ("height", "width", "size"))
    measured = dict(zip(_MEASURES, (height, width, height / np.maximum(width, 1), size), strict=True))
    return {
        name: {str(share): float(np.percentile(values, share)) if len(values) else 0.0 for share in PERCENTILES}
        for name, values in measured.items()
    }


def _price(table: pyarrow.Table, mark: str) -> Facts:
    """How often a marked crop shows another person than its original: what excluding it would lose.

    Of the pairs in one source whose two people are both known.
    """
    marked = np.flatnonzero(table[mark].is_valid().to_numpy())
    originals = pyarrow.compute.index_in(whole_column(table, mark).take(marked), value_set=whole_column(table, "key"))
    here = originals.is_valid().to_numpy(zero_copy_only=False)
    marked, originals = marked[here], originals.drop_null().to_numpy()
    pid, source = table["pid"].to_numpy(), whole_column(table, "source").dictionary_encode().indices.to_numpy()
    labelled = (pid[marked] >= 0) & (pid[originals] >= 0) & (source[marked] == source[originals])
    different = int((pid[marked] != pid[originals])[labelled].sum())
    pairs = int(labelled.sum())
    return {"labelled_pairs": pairs, "different_people": different, "share": different / pairs if pairs else None}


def _by_source(table: pyarrow.Table) -> list[tuple[str, pyarrow.Table]]:
    encoded = whole_column(table, "source").dictionary_encode()
    order = np.argsort(encoded.indices.to_numpy(), kind="stable")
    ends = np.cumsum(np.bincount(encoded.indices.to_numpy(), minlength=len(encoded.dictionary)))
    parts = np.split(order, ends[:-1])
    named = zip(encoded.dictionary.to_pylist(), parts, strict=True) if len(table) else ()
    return sorted(((name, table.take(rows)) for name, rows in named), key=lambda item: item[0])


def _quarantine(store: Store) -> dict[str, int]:
    table = read_quarantine(store)
    if table is None:
        return {}
    counted = pyarrow.compute.value_counts(table["reason"].drop_null()).to_pylist()
    return dict(sorted((entry["values"], entry["counts"]) for entry in counted))


# ------------------------------------------------------------------------------------------------------------- writing


def _source_line(name: str, facts: Mapping[str, Any]) -> list[str]:
    counts = [f"{facts[column]:,}" for column in ("crops", *COUNTED, *KINDS)]
    height, width = facts["median_size"]
    return [name, *counts, f"{facts['bytes'] / 1e6:,.1f}", f"{height:.0f} x {width:.0f}"]


def _price_line(kind: str, count: int, price: Mapping[str, Any]) -> str:
    line = f"{count:,} {'exact' if kind == 'exact' else 'near'} duplicates are marked"
    if not price["labelled_pairs"]:
        return line + "; no pair of them is labelled"
    return (
        line + f"; of {price['labelled_pairs']:,} labelled pairs, {price['different_people']:,} "
        f"({price['share']:.1%}) are different people: what --exclude {kind} would lose"
    )


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    ]
