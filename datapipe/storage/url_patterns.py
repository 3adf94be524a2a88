"""Patterns of files: "hf/train-*.parquet", "s3://bucket/set/**/part-?.tar", "lup/cam[12]"; quoted, so that no shell
expands them, or where no shell can.

`*` and `?` stand for anything but a slash, `**` for any number of folders, `[ab]`, `[0-9]` and `[!x]` for a character;
braces may be among them. What is there under a name as it is written comes first: "photos [old]" is that folder. A
pattern that meets a folder means all that is below it.
"""

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from fsspec.utils import glob_translate

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.storage import Entry, is_remote, open_store, split_url

WILDCARD = re.compile(r"[*?\[]")
UNLISTED = ("http", "https")
"""Schemes whose servers do not say what they hold."""
LOOKED_AT, NAMED = 10_000, 3
"""Names that are looked through for one like a pattern that meets nothing, and how many are told."""


@dataclass(frozen=True)
class Pattern:
    """A folder, and which of its files are meant."""

    url: str
    """As it was given."""
    folder: str
    """Url of the folder that all of it is below."""
    choices: tuple[str, ...]
    """Patterns of names below the folder; several where there were braces."""

    def entries(self, storage: StorageConfig, relatives: Callable[[str], tuple[str, ...]]) -> Iterator[Entry]:
        """The files that the pattern means, sorted by name. `relatives` of a file: names by which it is meant as well,
        such as that of the archive of which it is a piece."""
        meets, enters = _either(self.choices, _meeting), _either(self.choices, _entering)
        for entry in open_store(self.folder, storage).list(self._prefix(), enter=enters):
            if any(map(meets, (entry.name, *relatives(entry.name)))):
                yield entry

    def _prefix(self) -> str:
        """What all of these files begin with, and those that belong to them."""
        if len(self.choices) > 1:
            return ""
        folder, slash, begin = WILDCARD.split(self.choices[0])[0].rpartition("/")
        return folder + slash + begin.partition(".")[0]


def find_pattern(url: str, storage: StorageConfig) -> Pattern | None:
    """The pattern that a url is; None where it has no wildcard, or is there as it is written.

    Raises DataError where the place cannot be listed.
    """
    scheme, separator, path = url.rpartition("://")
    if not WILDCARD.search(path) or (scheme in UNLISTED and not re.search(r"[*\[]", path)):  # "?" begins a query
        return None
    if scheme in UNLISTED:
        raise DataError("a pattern needs a list of files, which an http server does not give", where=url,
                        hint="name the files: {000..012} counts, {a,b} chooses")  # fmt: skip
    if is_remote(url) and WILDCARD.search(path.partition("/")[0]):
        raise DataError("a pattern begins after the bucket", where=url, hint="write the name of the bucket")
    if _is_there(url, storage):
        return None
    parted = [_parted(one, scheme + separator, storage) for one in without_braces(path)]
    common = os.path.commonprefix([fixed for fixed, _ in parted])
    choices = tuple("/".join([*map(glob.escape, fixed[len(common) :]), *rest]) for fixed, rest in parted)
    folder = "/".join(common) or ("/" if path.startswith("/") else ".")
    return Pattern(url, scheme + separator + folder, choices)


def without_braces(pattern: str) -> list[str]:
    """What the braces of a pattern stand for, one after the other: {000..012} counts, {a,b} chooses."""
    if "{" not in pattern:
        return [pattern]
    import braceexpand  # nothing else needs it

    return list(braceexpand.braceexpand(pattern))


def would_meet(url: str, path: str) -> bool:
    """Whether the pattern would mean a file of this path; both in full."""
    return bool(WILDCARD.search(url)) and any(_meeting(one)(path) for one in without_braces(url))


def nothing_meets(pattern: Pattern, storage: StorageConfig) -> DataError:
    """What to tell where a pattern means no file: what is there, the likest first."""
    what = "nothing matches the pattern"
    try:
        entries = islice(open_store(pattern.folder, storage).list(), LOOKED_AT)
        names = sorted({level for entry in entries for level in _levels(entry.name)})
    except NotFoundError as error:
        return DataError(f"{what}: {error.what}", where=pattern.url, hint=f"check {error.where} for a typing mistake")
    depth = max(choice.count("/") for choice in pattern.choices)
    same = [name for name in names if name.count("/") == depth] or names
    near = difflib.get_close_matches(pattern.choices[0], same, n=NAMED, cutoff=0.0)
    nearby = f"{', '.join(near)}{' ...' if len(same) > len(near) else ''}" if near else "nothing"
    return DataError(what, where=pattern.url, hint=f"below {pattern.folder} there is {nearby}")


def _parted(path: str, scheme: str, storage: StorageConfig) -> tuple[list[str], list[str]]:
    """The folders before the first wildcard, and the rest, at least the last part."""
    parts = path.split("/")
    for number, part in enumerate(parts[:-1]):
        if WILDCARD.search(part) and not _is_there(scheme + "/".join(parts[: number + 1]), storage):
            return parts[:number], parts[number:]
    return parts[:-1], parts[-1:]


def _is_there(url: str, storage: StorageConfig) -> bool:
    """A file, or a folder."""
    if not is_remote(url):
        return os.path.lexists(os.path.expanduser(url.removeprefix("file://")))
    folder, name = split_url(url)
    if "://" not in folder:  # a bucket
        return True
    try:
        store = open_store(folder, storage)
        return store.exists(name) or next(store.at(name).list(), None) is not None
    except NotFoundError:
        return False


def _levels(name: str) -> Iterator[str]:
    """A file and the folders above it: "a/b/c" -> "a/b/c", "a/b", "a"."""
    while name:
        yield name
        name = name.rpartition("/")[0]


def _either(choices: tuple[str, ...], kind: Callable[[str], Callable[[str], bool]]) -> Callable[[str], bool]:
    each = [kind(choice) for choice in choices]
    return lambda name: any(one(name) for one in each)


def _meeting(pattern: str) -> Callable[[str], bool]:
    """Tells whether a file's name, or that of a folder above it, is met."""
    whole = _compiled(pattern)
    return lambda name: any(whole.match(level) for level in _levels(name))


def _entering(pattern: str) -> Callable[[str], bool]:
    """Tells whether a folder may hold what is met: millions of files beside are then not listed."""
    parts = pattern.split("/")
    each = [_compiled(part) for part in parts[: parts.index("**") if "**" in parts else None]]
    return lambda folder: all(one.match(part) for one, part in zip(each, folder.strip("/").split("/"), strict=False))


def _compiled(pattern: str) -> re.Pattern[str]:
    """Two stars within a name mean no more than one."""
    parts = (part if part == "**" else re.sub(r"\*\*+", "*", part) for part in pattern.split("/"))
    return re.compile(glob_translate("/".join(parts)))
