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
from functools import partial
from typing import Any, NamedTuple

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.errors import DataError, NotFoundError
from datapipe.core.parallel import in_order
from datapipe.core.warn_once import warn_once
from datapipe.storage import Store, is_remote
from training.checkpoint.metadata import MARKER, completed, in_steps, read_bytes, step_of

log = logging.getLogger(__name__)

HEAD_BYTES = 96
MOST_TERMS_BYTES = 1 << 20
IN_FLIGHT = 16
"""Heads read at a time from remote stores."""
_HEAD = re.compile(rb'\{"step": ?(\d+),(?: ?"term": ?(\d+),)?')
_TERM = re.compile(r"term_(\d{7,})\.json")
_PART_OF = re.compile(r"/rank_\d+\.t(\d+)-")


class Head(NamedTuple):
    """What a marker begins with."""

    step: int
    term: int
    """Term of the lease under which the checkpoint was written; 0: before there were leases."""


DAMAGED = Head(-1, -1)
"""Of a marker that cannot be read."""


class Beginning(NamedTuple):
    """A term of the lease, and the step of the checkpoint that it began with."""

    term: int
    step: int


class Survey(NamedTuple):
    """What there is of checkpoints."""

    names: list[str]
    """The run's own that have their marker, oldest first."""
    passed_over: dict[str, str]
    """Folders that look like checkpoints and are none of this run, with the reason."""
    folders: list[str]
    """All that are called as checkpoints are, oldest first."""
    beginnings: list[Beginning]
    """Of the terms of the run's lease that matter."""
    terms: list[str]
    """Files that tell of terms."""
    markers: dict[str, bytes]
    """Of the last folder, where it was asked for."""

    @property
    def marked(self) -> list[str]:
        """All that have their marker."""
        return [*self.names, *self.passed_over]


_warn = partial(warn_once, log)


def complete(store: Store, warn: Callable[[str], None] = _warn) -> list[str]:
    """Names of the run's checkpoints that have their marker, oldest first; `warn` tells of those that are passed over.
    `store`: the run's `checkpoints` folder."""
    surveyed = look(store)
    tell(store, surveyed, warn)
    return surveyed.names


def tell(store: Store, surveyed: Survey, warn: Callable[[str], None] = _warn) -> None:
    """Warn of the checkpoints that are passed over."""
    for name, why in surveyed.passed_over.items():
        warn(f"warning: checkpoint {name} is passed over: {why} ({store.address(name)})")


def look(store: Store, heads: dict[str, Head] | None = None, *, ahead: bool = False) -> Survey:
    """Find the run's checkpoints: one request for the folders, and one, side by side, for the beginning of each marker
    and for the terms. `heads`: those known already; it takes up the others. `ahead`: the newest marker is read whole,
    as it is wanted next."""
    try:
        folders, files = store.children()
    except NotFoundError:  # no checkpoint yet, nor their folder
        folders, files = [], []
    return _surveyed(store, in_steps(folders), files, {} if heads is None else heads, ahead=ahead)


def survey(store: Store, files: Iterable[str]) -> Survey:
    """Find the run's checkpoints as `look` does, from the names of all files."""
    files = list(files)
    return _surveyed(store, completed(files), files, {}, ahead=False)


def _surveyed(store: Store, folders: list[str], files: Iterable[str], heads: dict[str, Head], *, ahead: bool) -> Survey:
    terms, whole = [file for file in files if _TERM.fullmatch(file)], dict[str, bytes]()

    def read_head(name: str) -> Head | None:
        if not ahead or name != folders[-1]:
            return _head(store, name)
        try:
            whole[name] = read_bytes(store, name)
        except NotFoundError:
            return None
        except DataError:
            return DAMAGED
        return _of_beginning(whole[name]) or _parsed(whole[name])

    unread = [name for name in folders if name not in heads]
    questions: list[Callable[[], Any]] = [
        partial(_beginnings, store, terms),
        *(partial(read_head, name) for name in unread),
    ]
    beginnings, *answers = in_order(lambda ask: ask(), questions, threads=IN_FLIGHT if is_remote(store.url) else 0)
    found: dict[str, Head | None] = dict(zip(unread, answers, strict=True))
    heads.update({name: head for name, head in found.items() if head is not None and head != DAMAGED})
    marked = [name for name in folders if name in heads or found[name] is not None]
    reasons = {name: _foreign(name, heads[name], beginnings) if name in heads else "" for name in marked}
    names, passed_over = (
        [name for name in marked if not reasons[name]],
        {name: why for name, why in reasons.items() if why},
    )
    return Survey(names, passed_over, folders, beginnings, terms, whole)


def begin(store: Store, term: int, step: int, *, known: Survey | None = None, anew: bool = False) -> bool:
    """Note that a term begins with the checkpoint of this step, 0 for none; has it been noted? What it noted first
    stays, unless it is noted `anew`. `known`: what there is of other terms, whose notes are of no use from now on."""
    known = known or look(store)
    earlier = [one for one in known.beginnings if one.term < term and one.step < step]  # others do not matter
    content = json.dumps({"terms": [*earlier, Beginning(term, step)]}).encode()
    if anew:
        store.replace(_name(term), content)
        return True
    return term not in _terms(known.terms) and store.put_if_absent(_name(term), content)


def before(surveyed: Survey, term: int) -> list[str]:
    """Files of the terms before this one: it has noted what matters of them."""
    return [_name(old) for old in _terms(surveyed.terms) if old < term]


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
    """None where there is no marker; DAMAGED for one that is, which its reader tells."""
    try:
        beginning = store.read(f"{name}/{MARKER}", start=0, size=HEAD_BYTES)
        return _of_beginning(beginning) or _parsed(read_bytes(store, name))
    except NotFoundError:
        return None
    except DataError:
        return DAMAGED


def _of_beginning(data: bytes) -> Head | None:
    match = _HEAD.match(data)
    return Head(int(match[1]), int(match[2] or 0)) if match else None


def _parsed(data: bytes) -> Head:
    """The head of a whole marker."""
    try:
        content = parse_record(data)
        return Head(int(content["step"]), int(content.get("term", 0)))
    except (ValueError, TypeError, KeyError, OverflowError):
        return DAMAGED


def _beginnings(store: Store, files: list[str]) -> list[Beginning]:
    """The beginnings of all terms that matter, as the newest noted them. Steps rise with terms."""
    newest = max(_terms(files), default=0)
    if not newest:
        return []
    try:
        terms = parse_record(store.read_small(_name(newest), MOST_TERMS_BYTES, what="the terms of the run"))["terms"]
        return [Beginning(int(term), int(step)) for term, step in terms]
    except NotFoundError:  # a later term has just begun
        later = _term_files(store)
        return _beginnings(store, later) if max(_terms(later), default=0) > newest else []
    except (ValueError, TypeError, KeyError, OverflowError, DataError) as error:
        _warn(f"warning: the terms of the run cannot be read: {error} ({store.address(_name(newest))})")
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
