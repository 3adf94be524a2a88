"""Which checkpoints are the run's own: those whose folder is named as their marker says, on the line of its terms.

    checkpoints/term_0000007.json    the steps that the terms of the run's lease began with, up to term 7

A term begins with a checkpoint of the terms before. What one of those saved beyond that, because it did not know yet
that it had been taken over, is no part of the run. Such checkpoints, and copies under another name, are passed over
with a warning, and left for a person to delete.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

from datapipe.core.errors import NotFoundError
from datapipe.core.parallel import in_order
from datapipe.storage import Store, is_remote
from training.checkpoint.metadata import MARKER, completed, step_of

log = logging.getLogger(__name__)

HEAD_BYTES = 96
IN_FLIGHT = 8
"""Heads read at a time from remote stores."""
_HEAD = re.compile(rb'\{"step": ?(\d+),(?: ?"term": ?(\d+),)?')
_TERM = re.compile(r"term_(\d{7,})\.json")
_PART_OF = re.compile(r"/rank_\d+\.t(\d+)-")


class Head(NamedTuple):
    """What a marker begins with."""

    step: int
    term: int
    """Term of the lease under which the checkpoint was written; 0: before there were leases."""


class Beginning(NamedTuple):
    """A term of the lease, and the step of the checkpoint that it began with."""

    term: int
    step: int


class Survey(NamedTuple):
    """All checkpoints that have their marker."""

    names: list[str]
    """The run's own, oldest first."""
    passed_over: dict[str, str]
    """Folders that look like checkpoints and are none of this run, with the reason."""


@cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)


def complete(store: Store, warn: Callable[[str], None] = _warn_once) -> list[str]:
    """Names of the run's checkpoints that have their marker, oldest first; `warn` tells of those that are passed over.
    `store`: the run's `checkpoints` folder."""
    try:
        surveyed = survey(store, [entry.name for entry in store.list()])
    except NotFoundError:
        return []
    for name, why in surveyed.passed_over.items():
        warn(f"warning: checkpoint {name} is passed over: {why} ({store.address(name)})")
    return surveyed.names


def survey(store: Store, files: Iterable[str], heads: dict[str, Head] | None = None) -> Survey:
    """Find the run's checkpoints from the names of all files. `heads`: those known already; it takes up the others."""
    files = list(files)
    heads = {} if heads is None else heads
    names = completed(files)
    beginnings = _beginnings(store, files)
    unread = [name for name in names if name not in heads]
    read_heads = in_order(lambda name: _head(store, name), unread, threads=IN_FLIGHT if is_remote(store.url) else 0)
    heads.update({name: head for name, head in zip(unread, read_heads, strict=True) if head is not None})
    reasons = {name: _foreign(name, heads[name], beginnings) if name in heads else "" for name in names}
    return Survey([name for name in names if not reasons[name]], {name: why for name, why in reasons.items() if why})


def begin(store: Store, term: int, step: int) -> None:
    """Note that a term begins with the checkpoint of this step, 0 for none. What it noted first stays."""
    files = _term_files(store)
    before = [one for one in _beginnings(store, files) if one.term < term and one.step < step]  # others do not matter
    content = json.dumps({"terms": [*before, Beginning(term, step)]}).encode()
    if term not in _terms(files) and store.put_if_absent(_name(term), content):
        for old in _terms(files):
            if old < term:
                store.delete(_name(old))


def term_of(file: str, heads: dict[str, Head]) -> int:
    """The term that a checkpoint's file was written under, as its name or, of a marker, its content has it."""
    match = _PART_OF.search(file)
    if match:
        return int(match[1])
    folder, _, name = file.partition("/")
    return heads[folder].term if name == MARKER and folder in heads else 0


def _foreign(name: str, head: Head, beginnings: list[Beginning]) -> str:
    """Why a checkpoint is none of the run's; empty where it is."""
    if head.step != step_of(name):
        return f"it is a copy or was renamed: its marker is that of step {head.step:,}"
    for later in beginnings:
        if later.term > head.term and head.step > later.step:
            return (f"it was saved under term {head.term} of the run's lease, which another process had taken over at "
                    f"step {later.step:,}")  # fmt: skip
    return ""


def _head(store: Store, name: str) -> Head | None:
    """None for a marker that is damaged or just gone, which its reader tells."""
    path = f"{name}/{MARKER}"
    try:
        match = _HEAD.match(store.read(path, start=0, size=HEAD_BYTES))
        if match:
            return Head(int(match[1]), int(match[2] or 0))
        content = json.loads(store.read(path))
        return Head(int(content["step"]), int(content.get("term", 0)))
    except (NotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _beginnings(store: Store, files: list[str]) -> list[Beginning]:
    """The beginnings of all terms that matter, as the newest noted them. Steps rise with terms."""
    newest = max(_terms(files), default=0)
    if not newest:
        return []
    try:
        terms = json.loads(store.read(_name(newest)))["terms"]
        return [Beginning(int(term), int(step)) for term, step in terms]
    except NotFoundError:  # a later term has just begun
        later = _term_files(store)
        return _beginnings(store, later) if max(_terms(later), default=0) > newest else []
    except (ValueError, TypeError, KeyError) as error:
        _warn_once(f"warning: the terms of the run cannot be read: {error} ({store.address(_name(newest))})")
        return []


def _term_files(store: Store) -> list[str]:
    try:
        return [entry.name for entry in store.list("term_")]
    except NotFoundError:  # no checkpoint yet, nor their folder
        return []


def _terms(files: Iterable[str]) -> list[int]:
    return [int(match[1]) for match in map(_TERM.fullmatch, files) if match]


def _name(term: int) -> str:
    return f"term_{term:07d}.json"
