"""What a url of the command line points at: a file, a pattern of files, or a folder and what lies in it."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.dataset.remarks import Remarks
from datapipe.storage import Entry, is_remote, open_store, split_url
from datapipe.storage.url_patterns import find_pattern, nothing_meets, without_braces

IMAGES, ARCHIVES, TABLES, VIDEOS = "images", "archives", "parquet files", "videos"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp",
                 ".bmp", ".dib", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")  # fmt: skip
"""Names with these endings, upper or lower case, are taken for images; what they really are, screening finds out."""
LEFTOVERS = frozenset(("Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini", "__MACOSX", "@eaDir", "$RECYCLE.BIN",
                       "lost+found", "System Volume Information"))  # fmt: skip
"""Files and folders that systems put beside those of their users."""
VIDEO_ENDINGS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".flv", ".wmv")
TABLE_ENDINGS = (".parquet", ".pq")
BOX_ENDINGS = (".txt", *TABLE_ENDINGS)
"""Boxes beside a video, under its name."""
ARCHIVE = re.compile(
    r"(?P<archive>.+\.(?:zip|tar\.gz|tgz|tar\.bz2|tbz2?|tar\.xz|txz|tar))"
    r"(?:\.(?:part[-_.]?)?(?P<part>\d{1,5}|(?!gz|xz|bz|lz|br|zst|idx|txt|csv|asc|sig|sha|tmp)[a-z]{2,3}))?"
    r"|(?P<spanned>.+)\.z(?P<volume>\d{2,5})",
    re.IGNORECASE,
)
"""An archive, a piece of one that was cut by bytes ("x.zip.001", "x.tar.ab"), a volume of a spanned zip ("x.z01")."""
PEEKED = 1_000
"""Names of a folder that are looked at to tell what it holds."""


class SourceFile(NamedTuple):
    """A file or object of a source."""

    folder: str
    """Url of the folder it was found through."""
    name: str
    """Below that folder."""
    size: int

    @property
    def url(self) -> str:
        """For messages."""
        return f"{self.folder.rstrip('/')}/{self.name}"


@dataclass(frozen=True)
class Location:
    """A url, and what is there as far as a short look tells."""

    url: str
    label: str
    storage: StorageConfig
    jpeg_quality: int
    """For crops that are cut from videos."""
    is_folder: bool
    """A folder, or a pattern with wildcards, which is listed like one."""
    folder: str
    """Url of that folder, or of the one that the pattern is below."""
    names: tuple[str, ...]
    """The url itself (brace patterns expanded); of a folder, the first names found below it, in no order."""

    @property
    def is_pattern(self) -> bool:
        """Only some files of the folder are meant."""
        return self.is_folder and self.folder != self.url

    @cached_property
    def kinds(self) -> set[str]:
        """Kinds of files among `names`."""
        return {kind_of(name) for name in self.names} - {""}


def find_place(url: str, label: str, storage: StorageConfig, jpeg_quality: int) -> Location:
    """Look there, without listing it all. Raises DataError where there is nothing."""
    pattern = find_pattern(url, storage)
    files = tuple(file_urls(url, storage))
    try:
        names = files or tuple(islice(_peek(url, storage), PEEKED))
        if pattern and not names:
            raise nothing_meets(pattern, storage)
    except NotFoundError as error:
        if pattern:
            raise nothing_meets(pattern, storage) from error
        raise DataError(
            f"the source cannot be opened: {error.what}", where=url, hint="check for a typing mistake"
        ) from error
    except OSError as error:
        raise DataError(
            f"the source cannot be looked through: {error.strerror}",
            where=str(error.filename or url),
            hint="check the permissions there, and links that point at themselves",
        ) from error
    return Location(url, label, storage, jpeg_quality, not files, pattern.folder if pattern else url, names)


def kind_of(name: str) -> str:
    """IMAGES, ARCHIVES, TABLES, VIDEOS, or "" for anything else; hidden files are something else."""
    lower = name.lower()
    if is_hidden(name):
        return ""
    for kind, endings in ((IMAGES, IMAGE_ENDINGS), (VIDEOS, VIDEO_ENDINGS), (TABLES, TABLE_ENDINGS)):
        if lower.endswith(endings):
            return kind
    return ARCHIVES if ARCHIVE.fullmatch(name) else ""


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image. Hidden files and folders are not."""
    return name.lower().endswith(IMAGE_ENDINGS) and not is_hidden(name)


def printable(name: str) -> str:
    """A name as an index can hold it: bytes that are no UTF-8 as \\xNN, halves of characters as \\uNNNN."""
    if name.isascii():
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # JSON can spell what no file name holds
        return name.encode("utf-8", "backslashreplace").decode()


def is_hidden(name: str) -> bool:
    """Whether the file or a folder below "." or ".." starts with a dot, or is what file managers leave: copies of
    metadata, work in progress."""
    return any((part.startswith(".") and part not in (".", "..")) or part in LEFTOVERS for part in name.split("/"))


def list_files(url: str, storage: StorageConfig, kind: str, remarks: Remarks | None = None) -> Iterator[SourceFile]:
    """The files of one kind at a url, sorted; those of a brace pattern in its order. Others that are no crops are
    counted in `remarks`, but for hidden ones.

    A parquet file beside an archive of the same name is its index, in our shards and in img2dataset's, and is passed
    over. Raises DataError where a folder holds files of another kind that are crops as well.
    """
    if files := file_urls(url, storage):
        for file in files:
            folder, name = split_url(file)
            yield SourceFile(folder, name, open_store(folder, storage).size(name))
        return
    indexes: dict[str, str] = {}  # stem -> table that may be the index of an archive of that name, listed after it
    above, entries = list_entries(url, storage)
    for entry in entries:
        file_kind = kind_of(entry.name)
        if file_kind == kind:
            indexes.pop(_stem(entry.name), None)
            yield SourceFile(above, entry.name, entry.size)
        elif file_kind == TABLES and kind == ARCHIVES:
            indexes[_stem(entry.name)] = entry.name
        elif file_kind:
            raise _mixed(above, entry.name, kind, file_kind)
        elif remarks is not None and not is_hidden(entry.name):
            remarks.pass_over(entry.name)
    for name in indexes.values():
        raise _mixed(above, name, kind, TABLES)


def list_entries(url: str, storage: StorageConfig) -> tuple[str, Iterator[Entry]]:
    """(url of the folder, all files below it that a folder or a pattern means, sorted by name)."""
    pattern = find_pattern(url, storage)
    if pattern is None:
        return url, open_store(url, storage).list()
    return pattern.folder, pattern.entries(storage, _relatives)


def _relatives(name: str) -> tuple[str, ...]:
    """Names that mean this file as well: of a piece of an archive the whole and the first piece, of boxes the video."""
    if name.lower().endswith(BOX_ENDINGS):
        stem = name.rpartition(".")[0]
        return tuple(f"{stem}{ending}" for lower in VIDEO_ENDINGS for ending in (lower, lower.upper()))
    match = ARCHIVE.fullmatch(name)
    if match and match["spanned"]:
        return (f"{match['spanned']}.zip", f"{match['spanned']}.ZIP")
    if match and (part := match["part"]):
        firsts = (f"{0:0{len(part)}d}", f"{1:0{len(part)}d}", "a" * len(part), "A" * len(part))
        return (match["archive"], *(name[: -len(part)] + first for first in firsts))
    return ()


def _stem(name: str) -> str:
    """The file's name without the ending that tells its kind: "a/0.tar" and its index "a/0.parquet" have the same."""
    match = ARCHIVE.fullmatch(name)
    return re.sub(r"\.[^./]+$", "", re.sub(r"\.(?:gz|bz2|xz)$", "", match["archive"] or name if match else name))


def _mixed(url: str, name: str, kind: str, other: str) -> DataError:
    return DataError(
        f"the folder holds both {kind} and {other}",
        where=f"{url}/{name}",
        hint="give them as separate sources, each in a folder of its own",
    )


def local_path(url: str) -> str:
    """The path behind a url that is not remote."""
    return os.path.expanduser(url.removeprefix("file://"))


def file_urls(url: str, storage: StorageConfig) -> list[str]:
    """Urls of the files that the url means; none where it is a folder, or a pattern with wildcards."""
    remote = is_remote(url)
    if (not remote and os.path.isdir(local_path(url))) or find_pattern(url, storage):
        return []
    if "{" in url and (remote or not os.path.exists(local_path(url))):
        return without_braces(url)
    folder, name = split_url(url)
    if "." not in name or (remote and "://" not in folder):
        return []
    return _pieces(folder, name, storage) or ([url] if open_store(folder, storage).exists(name) else [])


def _pieces(folder: str, name: str, storage: StorageConfig) -> list[str]:
    """ "x.zip" or "x.zip.001" may mean "x.zip.001", "x.zip.002" and so on; "x.zip" or "x.z01" the volumes of a spanned
    zip, "x.z01", "x.z02" ... "x.zip"."""
    match = ARCHIVE.fullmatch(name)
    if not match:
        return []
    stem = match["spanned"] or re.sub(r"\.zip$", "", match["archive"], flags=re.IGNORECASE)
    try:
        names = [piece.name for piece in open_store(folder, storage).list(f"{stem}.")]
    except NotFoundError:
        return []
    archives = [(piece, parts) for piece in names if (parts := ARCHIVE.fullmatch(piece))]
    if not match["part"] and any(parts["spanned"] == stem for _, parts in archives):
        last = (f"{stem}.zip".lower(), None)
        return [
            f"{folder}/{piece}"
            for piece, parts in archives
            if parts["spanned"] == stem or (piece.lower(), parts["part"]) == last
        ]
    if not match["part"] and name in names:
        return []
    return [f"{folder}/{piece}" for piece, parts in archives if parts["archive"] == match["archive"] and parts["part"]]


def _peek(url: str, storage: StorageConfig) -> Iterator[str]:
    """Names below a folder. Of a local one as the system gives them: sorting millions of names takes long."""
    if is_remote(url) or not os.path.isdir(local_path(url)):
        yield from (entry.name for entry in list_entries(url, storage)[1])
    else:
        yield from _walk(local_path(url), "", ())


def _walk(root: str, below: str, parents: tuple[str, ...]) -> Iterator[str]:
    real = os.path.realpath(os.path.join(root, below))
    if real in parents:  # a link to a folder above
        return
    folders = []
    with os.scandir(real) as entries:
        for item in entries:
            if item.is_dir():
                folders.append(item.name)
            else:
                yield f"{below}{item.name}"
    for folder in sorted(folders):
        yield from _walk(root, f"{below}{folder}/", (*parents, real))
