"""All readers that are fuzzed, by name; those of training are loaded when they are asked for, as PyTorch takes long."""

import importlib
from functools import cache

from tests.fuzz.reader import Reader

MODULES = {
    "image_files": ("images",),
    "archives": ("zip", "tar", "tar_gz", "tar_bz2", "tar_xz"),
    "tables": ("parquet", "lmdb", "mot", "boxes"),
    "data_sets": ("manifest", "index", "selection", "shards", "removals", "pickles"),
    "run_files": ("toml", "card", "marker", "metrics", "restarts", "pth", "old_pth", "safetensors", "features"),
}
"""Module of this folder -> its readers."""
NAMES = tuple(name for names in MODULES.values() for name in names)
WITH_TORCH = frozenset(MODULES["run_files"])


@cache
def reader(name: str) -> Reader:
    """The reader of this name."""
    module = next(module for module, names in MODULES.items() if name in names)
    found: tuple[Reader, ...] = importlib.import_module(f"tests.fuzz.{module}").ALL
    return {one.name: one for one in found}[name]
