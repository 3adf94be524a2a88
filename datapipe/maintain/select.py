"""A new version of a data set that consists of some of its crops. No tar is written or read."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.compute

from datapipe.core.config import SelectConfig, StorageConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.dataset.index import INDEX, whole_column
from datapipe.dataset.manifest import Manifest, load_unselected
from datapipe.dataset.packed_index import ensure_packed
from datapipe.dataset.selection import write_selection
from datapipe.dataset.where_clause import Expression
from datapipe.ingest.shard_plan import rank
from datapipe.maintain.crop_lists import By, look_up, read_list, read_notes, refuse_ambiguous, refuse_missing
from datapipe.storage import open_store

FILTERED = tuple(name for name in INDEX.names if name not in ("offset", "sha256", "removed"))
"""Columns that conditions may speak of."""
CHUNK = 1 << 18
"""Keys that are Python objects at the same time."""


@dataclass(frozen=True)
class Selected:
    """The new version, and what was left after each criterion: (criterion, crops)."""

    manifest: Manifest
    steps: tuple[tuple[str, int], ...]
    missing: int
    """Listed crops that the data set does not have."""


def select(url: str, config: SelectConfig, storage: StorageConfig) -> Selected:
    """Save the version of a data set with the crops that meet all criteria. What the lists say binds whoever uses them
    is noted in it.

    A folder stands for its newest version with all crops, so that selections never narrow one another by accident;
    a manifest file for itself. Raises ConfigError without a criterion, DataError where no crop is left.
    """
    if config == SelectConfig(seed=config.seed, max_missing=config.max_missing, keep=config.keep):
        raise ConfigError("no criterion is given", hint="--where, --names, --keys, --fraction or --exclude")
    base = load_unselected(url, storage)
    choice = _Choice(base, config, storage)
    if not len(choice.rows):
        raise DataError(
            "no crop meets all criteria",
            where=base.url,
            hint="; ".join(f"{name}: {count:,}" for name, count in choice.steps),
        )
    store = open_store(base.url, storage)
    selection = write_selection(store, base.selected(storage)[choice.rows])
    lists = [url for url in (config.keys, config.names) if url]
    notes = tuple(dict.fromkeys([*base.notes, *(note for url in lists for note in read_notes(url, storage))]))
    derived = base.derive(store, "select", selection=selection, notes=notes)
    ensure_packed(derived, storage)
    return Selected(derived, tuple(choice.steps), choice.missing)


class _Choice:
    """Rows of a version (sorted, int64), narrowed by one criterion after the other."""

    def __init__(self, base: Manifest, config: SelectConfig, storage: StorageConfig) -> None:
        self.config, self.storage = config, storage
        self.missing = 0
        where = Expression(config.where, FILTERED) if config.where else None
        self.table = base.table(_columns(config, where), storage)
        live = pyarrow.compute.invert(self.table["removed"])
        self.rows = np.flatnonzero(live.to_numpy())
        self.steps = [("crops", len(self.rows))]
        if where:
            self._narrow("--where", lambda: self._that_hold(where))
        if config.keys:
            self._narrow("--keys", lambda: self._listed(config.keys, "key", 1.0))
        if config.names:
            self._narrow("--names", lambda: self._listed(config.names, "name", config.keep))
        if config.exclude != "none":
            self._narrow("--exclude", lambda: self._one_of_each(near=config.exclude == "near"))
        if config.fraction < 1:
            self._narrow("--fraction", self._first_ranked)

    def _narrow(self, criterion: str, step: Callable[[], np.ndarray]) -> None:
        self.rows = step()
        self.steps.append((criterion, len(self.rows)))

    def _that_hold(self, where: Expression) -> np.ndarray:
        return self.rows[where.holds(self.table).to_numpy()[self.rows]]

    def _listed(self, url: str, by: By, keep: float) -> np.ndarray:
        """Rows in the first part of a list."""
        listed = read_list(url, by, self.storage)
        listed = listed.slice(0, round(keep * len(listed)))
        lookup = look_up(listed, self.table, by)
        refuse_missing(lookup, len(listed), share=self.config.max_missing, where=url)
        self.missing += lookup.missing
        place = lookup.place[self.rows]
        within = np.full(len(self.table), -1)
        within[self.rows] = place
        refuse_ambiguous(within, listed, self.table, url)
        return self.rows[place >= 0]

    def _one_of_each(self, *, near: bool) -> np.ndarray:
        """Rows of which one is left of each group of equal crops (`near`: of nearly equal ones): the first that is
        selected, whether the others were marked with it or not."""
        rows = first_of_each(self.table, self.rows, "duplicate_of")
        return first_of_each(self.table, rows, "near_of") if near else rows

    def _first_ranked(self) -> np.ndarray:
        """The share with the lowest keyed hash. So a smaller share is part of every larger one; and with the seed of
        the data set, whose shards are in that order, it is a run of neighbours, read as fast as everything."""
        keys = whole_column(self.table, "key")
        parts = (keys.take(self.rows[start : start + CHUNK]) for start in range(0, len(self.rows), CHUNK))
        ranked = (rank(key, self.config.seed) for part in parts for key in part.to_pylist())
        ranks = np.fromiter(ranked, np.uint64, len(self.rows))
        first = np.argsort(ranks, kind="stable")[: round(self.config.fraction * len(ranks))]
        return self.rows[np.sort(first)]


def first_of_each(table: pyarrow.Table, rows: np.ndarray, mark: str) -> np.ndarray:
    """The first of these rows in each group of crops that the column `mark` puts together."""
    group = pyarrow.compute.coalesce(whole_column(table, mark), whole_column(table, "key")).take(rows)
    codes = group.dictionary_encode().indices.to_numpy()
    return rows[np.sort(np.unique(codes, return_index=True)[1])]


def _columns(config: SelectConfig, where: Expression | None) -> list[str]:
    columns = {"key", "removed", *(where.columns if where else ())}
    columns |= {"name", "source"} if config.names else set()
    columns |= {"duplicate_of", "near_of"} if config.exclude != "none" else set()
    return sorted(columns)
