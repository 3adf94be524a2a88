"""Copies of crops that were made of a data set and lie elsewhere: in run folders, and in the caches of nodes.

    first_batch.jpg, report.html, faults/*.npz           pixels of training crops, in a run folder
    evaluation/<set>/<weights>/ranked_*.jpg              pixels of test images
    <sha256 of a shard>-<hash of the ranges>             blocks of a cache
    indexes/packed-v1-<manifest id>-<sha256>.index       packed indexes of versions that were replaced, there too
    *.parquet with features, scores or pseudo labels     rows about crops, see row_copies.py

They are deleted, whoever is on them where that cannot be told; a report and the first batch are made anew when they are
asked for. Of rows about crops those of the removed ones go. What else may hold a crop or its name is listed. Weights
stay: what they were trained on cannot be taken out.
"""

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow

from datapipe.core.bounds.text_trees import parse_toml
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError, StorageError
from datapipe.core.progress import counted
from datapipe.dataset.packed_index import of_version
from datapipe.maintain.row_copies import ENDING, RemovedCrops, RowsFound, take_out
from datapipe.storage import Store, is_remote, open_store
from datapipe.storage.store import TEMPORARY

COPY = re.compile(
    r"(?P<root>(?:.*/)?)(?:first_batch\.jpg|report\.html|faults/[^/]+\.npz|evaluation/[^/]+/[^/]+/ranked_[^/]+\.jpg)"
)
RUN = re.compile(
    r"(?P<root>(?:.*/)?)(?:config\.toml|command\.txt|environment\.json|metrics/attempt_\d+\.jsonl"
    r"|evaluation/[^/]+/[^/]+/metrics\.json)"
)
"""Files that make a folder one of a run, or of scores."""
WEIGHTS = re.compile(r"(?P<root>(?:.*/)?)(?:checkpoints|exports)/.+\.safetensors")
BLOCK = re.compile(r"(?:.*/)?(?P<shard>[0-9a-f]{64})-[0-9a-f]{16}(?:\.part)?")
ROWS = re.compile(r"(?!(?:.*/)?(?:(?:shards|selections)/|quarantine\.parquet$)).+\.parquet")
"""Tables that are no part of a data set in shards."""
SERVICE = re.compile(r"(?:.*/)?(?:lock|(?:turns|indexes)/[^/]+)")
"""What a cache without blocks holds."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npz", ".npy", ".pkl", ".pdf", ".html",
            ".mp4", ".tar", ".zip")  # fmt: skip
TEXTS = (".txt", ".json", ".jsonl", ".csv", ".toml", ".log", ".md", ".out", ".err")
MOST_TEXT = 256 << 20
"""Bytes of a text that is searched for names."""
TOKEN = re.compile(r"""[^\s"',;<>()\[\]{}=|]+""")
FEWEST_LETTERS = 4
"""A shorter last part of a name would be found everywhere."""


@dataclass
class Cleared:
    """What became of the copies."""

    deleted: list[str] = field(default_factory=list)
    """Addresses of pictures, dumps and reports that were deleted, and of tables of which no row was left."""
    shortened: list[str] = field(default_factory=list)
    """Tables that lost rows: how many, and address."""
    blocks: int = 0
    """Blocks that were dropped from caches."""
    remaining: list[str] = field(default_factory=list)
    """What may still hold a crop or its name: address and why."""
    failed: list[str] = field(default_factory=list)
    """What should have been deleted and could not be: address and why."""
    weights: list[str] = field(default_factory=list)
    """Runs that have weights."""

    def lines(self) -> Iterator[str]:
        """For people."""
        yield from (f"deleted {address}" for address in self.deleted)
        yield from (f"deleted {what}" for what in self.shortened)
        if self.blocks:
            yield f"dropped {self.blocks:,} blocks from caches"
        yield from (f"remains: {what}" for what in self.remaining)
        yield from (f"could not be deleted: {what}" for what in self.failed)
        if self.weights:
            yield f"weights were trained and cannot forget what they saw: {', '.join(self.weights)}"


@dataclass(frozen=True)
class CopyLocation:
    """A run folder, a folder of them, a cache, or a folder of caches."""

    store: Store
    names: tuple[str, ...]


def look(urls: Sequence[str], storage: StorageConfig) -> list[CopyLocation]:
    """What is at these addresses, and the caches on this machine that runs among them name. Raises DataError where
    nothing is, or nothing that this project makes."""
    places = [_look(url, storage) for url in urls]
    named = {cache for place in places for cache in _caches(place) if os.path.isdir(cache)}
    return [*places, *(_look(cache, storage) for cache in sorted(named - set(urls)))]


def clear(
    places: Iterable[CopyLocation], shards: Collection[str], words: Collection[str], keys_sha256: Collection[str] = (),
    versions: Collection[str] = (),
) -> Cleared:  # fmt: skip
    """Delete the copies in these places. shards: sha256 of tars that lost crops; words: keys and names of the crops;
    keys_sha256: SHA-256 (hex) of the keys of crops that were removed before; versions: ids of manifests that others
    took the place of.

    Done again it does what is left; a file that cannot be deleted does not keep others from it.
    """
    cleared, search, removed = Cleared(), _Search(words), RemovedCrops(words, keys_sha256)
    for place in places:
        cleared.remaining += [
            f"{cache}: blocks on other machines, if the run had any; give the folder with --runs there"
            for cache in sorted(_caches(place))
            if not os.path.isdir(cache)
        ]
        old = {name for name in place.names for version in versions if of_version(name, version)}
        cleared.deleted += [place.store.address(name) for name in sorted(old) if _deleted(place.store, name, cleared)]
        roots = {"", *(match["root"] for match in map(RUN.fullmatch, place.names) if match)}
        for name in (name for name in place.names if name not in old):
            if name.lower().endswith(ENDING):
                _shorten(place.store, name, removed, cleared)
            else:
                _judge(place.store, name, roots, shards, search, cleared)
    cleared.weights = sorted(set(cleared.weights))
    return cleared


def _judge(
    store: Store, name: str, roots: set[str], shards: Collection[str], search: "_Search", cleared: Cleared
) -> None:
    address = store.address(name)
    block, copy, weights = BLOCK.fullmatch(name), COPY.fullmatch(name), WEIGHTS.fullmatch(name)
    if block:
        if block["shard"] in shards and _deleted(store, name, cleared):
            cleared.blocks += 1
    elif copy and copy["root"] in roots:
        if _deleted(store, name, cleared):
            cleared.deleted.append(address)
    elif weights:
        cleared.weights.append(store.address(weights["root"].rstrip("/")))
    elif name.endswith(TEMPORARY):
        cleared.remaining.append(f"{address}: half-written by a command that was killed")
    elif name.lower().endswith(PICTURES):
        cleared.remaining.append(f"{address}: no command of this project is known to have made it; look into it")
    elif name.lower().endswith(TEXTS):
        _search(store, name, search, cleared)


def _shorten(store: Store, name: str, removed: RemovedCrops, cleared: Cleared) -> None:
    """Take rows of removed crops out of a table, or list it where that is not for us to do."""
    address = store.address(name)
    try:
        found = take_out(store, name, removed) or RowsFound(0, 0, True)
    except StorageError as error:
        cleared.failed.append(f"{address}: rows of removed crops: {error.what}")
    except (pyarrow.ArrowException, OSError) as error:
        cleared.remaining.append(f"{address}: it cannot be read as parquet ({error}); look into it")
    else:
        if found.rows and not found.known:
            cleared.remaining.append(f"{address}: {counted(found.rows, 'row')} of removed crops")
        elif found.rows and not found.left:
            cleared.deleted.append(address)
        elif found.rows:
            cleared.shortened.append(f"{counted(found.rows, 'row')} of {address}")


def _deleted(store: Store, name: str, cleared: Cleared) -> bool:
    try:
        store.delete(name)
    except StorageError as error:
        cleared.failed.append(f"{store.address(name)}: {error.what}")
        return False
    return True


def _search(store: Store, name: str, search: "_Search", cleared: Cleared) -> None:
    address = store.address(name)
    try:
        if store.size(name) > MOST_TEXT:
            cleared.remaining.append(f"{address}: too large to be searched for names")
            return
        text = store.read(name).decode("utf-8", "replace")
    except StorageError as error:
        cleared.failed.append(f"{address}: it cannot be searched for names: {error.what}")
        return
    line = search.line(text)
    if line:
        cleared.remaining.append(f"{address}: line {line} names a removed crop")


class _Search:
    """Looks for names of crops in text; a name with blanks or commas as a whole, others word by word."""

    def __init__(self, words: Collection[str]) -> None:
        spelt = {spelling for word in words if word for spelling in _spellings(word)}
        self.words = {word for word in spelt if TOKEN.fullmatch(word)}
        self.phrases = sorted(spelt - self.words)

    def line(self, text: str) -> int:
        """The first line (from 1) with a name; 0 where there is none."""
        for number, line in enumerate(unicodedata.normalize("NFC", text).splitlines(), start=1):
            if any(phrase in line for phrase in self.phrases):
                return number
            for token in TOKEN.findall(line) if self.words else ():
                token = token.rstrip(".:!?")
                if token in self.words or token.rpartition("/")[2] in self.words:
                    return number
        return 0


def _spellings(word: str) -> Iterator[str]:
    """A name in full and its last part, plain and as JSON spells it."""
    word = unicodedata.normalize("NFC", word)
    for name in {word, word.replace("\\", "/").rpartition("/")[2]}:
        if len(name) >= FEWEST_LETTERS:
            yield name
            if not name.isascii():
                yield name.encode("unicode_escape").decode()


def _caches(place: CopyLocation) -> set[str]:
    """Folders of blocks that the recipes of runs name."""
    folders = set()
    for name in place.names:
        if name.rpartition("/")[2] == "config.toml" and RUN.fullmatch(name):
            try:
                stream = parse_toml(place.store.read(name).decode()).get("stream", {})
                folders.add(os.path.expanduser(str(stream.get("cache_dir", ""))))
            except (StorageError, ValueError, AttributeError):
                continue  # no recipe of ours
    return folders - {""}


def _look(url: str, storage: StorageConfig) -> CopyLocation:
    store = open_store(url, storage)
    hint = "--runs takes run folders, folders of runs or of features, and folders of blocks (stream.cache_dir)"
    try:
        names = [entry.name for entry in store.list()]
    except NotFoundError as error:
        raise DataError(f"there is nothing to clear: {error.what}", where=url, hint=hint) from error
    if not is_remote(url):
        root = Path(store.url)
        names += [path.relative_to(root).as_posix() for path in sorted(root.rglob(f"*{TEMPORARY}"))]
    elif not names:
        raise DataError("there is nothing to clear: no object is there", where=url, hint=hint)
    known = (COPY, RUN, BLOCK, SERVICE, WEIGHTS, ROWS)
    if names and not any(kind.fullmatch(name) for name in names for kind in known):
        raise DataError("this is no run folder, no folder of runs and no cache", where=url, hint=hint)
    return CopyLocation(store, tuple(names))
