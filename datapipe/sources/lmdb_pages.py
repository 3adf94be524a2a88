"""The file of an LMDB, read page by page with every number in it checked: what is cut or damaged is an error.

LMDB's own library maps the file into memory and trusts it. A page that is not there ends the process by SIGBUS, a wrong
pointer by SIGSEGV, and a file that is cut while it is read does so, too. Reading by position can do neither. It also
needs no lock file, no right to write and no address space of the map's size.

Layout (data version 1 of LMDB 0.9, 64 bits): two meta pages, of which the one with the higher transaction holds; from
there the root of a B+ tree. A value too large for a leaf lies by itself on overflow pages.

    page     number u64, pad u16, flags u16, end of the pointers u16, start of the nodes u16 (overflow: pages u32)
    node     lo u16, hi u16, flags u16, bytes of the key u16, key, then data of lo + hi * 2^16 bytes, or its page u64
             in branches the child is page lo + hi * 2^16 + flags * 2^32
"""

import os
import struct
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from datapipe.core.errors import DataError, NotFoundError, RefusedError
from datapipe.formats.file_kinds import EMPTY, LOOKED_AT, kind_of_bytes

HEAD, NODE = struct.Struct("<QHHHH"), struct.Struct("<4H")
OVERFLOW_HEAD = struct.Struct("<QHHI")
META = struct.Struct("<QHHIIIQQ")
"""Head of a page, then magic number, version, address, bytes of the map."""
TREE = struct.Struct("<IHHQQQQQ")
"""Page size or pad, flags, depth, branch, leaf and overflow pages, entries, root."""
TAIL = struct.Struct("<QQ")
"""Last page, transaction."""
META_BYTES = META.size + 2 * TREE.size + TAIL.size
MAGIC, VERSION, NO_ROOT = 0xBEEFC0DE, 1, (1 << 64) - 1
BRANCH, LEAF, OVERFLOW, META_PAGE, LEAF2 = 0x01, 0x02, 0x04, 0x08, 0x20
ELSEWHERE, TREE_INSIDE, SEVERAL = 0x01, 0x02, 0x04
"""Flags of a node: its value lies on overflow pages; it is a named database; it is several values."""
REVERSED_KEYS, SEVERAL_VALUES, WHOLE_NUMBERS = 0x02, 0x04, 0x08
"""Flags of a tree."""
DEEPEST = 32
CACHED_PAGES = 512
MOST_PAGE_BYTES = 1 << 16


class Value(NamedTuple):
    """Where a value is; it is not read yet."""

    size: int
    page: int
    """The value's first overflow page; 0 where `inside` holds the value."""
    inside: bytes
    problem: str
    """Why it is no plain value; empty where it is one."""


class _Page(NamedTuple):
    ranks: list[Any]
    """The keys as they are ordered."""
    keys: list[bytes]
    values: list[Value]
    """The values of a leaf page, in the order of its keys."""
    children: list[int]
    """Page numbers of the children of a branch page."""


class LmdbFile:
    """The main database of an LMDB: `with LmdbFile(path, where=url) as file`. Every fault is a DataError at `where`."""

    def __init__(self, path: str, *, where: str) -> None:
        self.where = where
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise NotFoundError("the file does not exist", where=where, hint="check for a typing mistake") from error
        except OSError as error:
            raise RefusedError(f"the file system refused: {error.strerror}", where=where,
                               hint="check the permissions there") from error  # fmt: skip
        self._cache: OrderedDict[int, _Page] = OrderedDict()
        try:
            self._begin()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "LmdbFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def find(self, key: bytes) -> Value | None:
        """The value of a key; None where there is none."""
        if self._root == NO_ROOT:
            return None
        rank, number = self._rank(key), self._root
        for _ in range(DEEPEST):
            page = self._page(number)
            if not page.children:
                place = bisect_left(page.ranks, rank)
                present = place < len(page.ranks) and page.ranks[place] == rank
                return self._checked(page.values[place]) if present else None
            number = page.children[bisect_right(page.ranks, rank, lo=1) - 1]
        raise self._damaged("its tree has no end")

    def items(self) -> Iterator[tuple[bytes, Value]]:
        """All keys in their order. Raises DataError where there are not as many as the LMDB says."""
        last, count = None, 0
        for page in self._leaves():
            for rank, key, value in zip(page.ranks, page.keys, page.values, strict=True):
                if last is not None and not last < rank:
                    raise self._damaged("its keys are not in order")
                last, count = rank, count + 1
                yield key, self._checked(value)
        if count != self.entries and not self._flags & SEVERAL_VALUES:
            raise self._damaged(f"it has {count:,} keys and should have {self.entries:,}")

    @property
    def total(self) -> int:
        """Bytes of the file: values do not overlap, so there are no more in all of them."""
        return os.fstat(self._file).st_size

    def read(self, value: Value) -> bytes:
        """The bytes of a value."""
        if not value.page:
            return value.inside
        start = value.page * self._page_size
        number, _, flags, pages = OVERFLOW_HEAD.unpack(self._bytes(start, HEAD.size))
        if number != value.page or not flags & OVERFLOW or pages * self._page_size < HEAD.size + value.size:
            raise self._damaged(f"page {value.page:,} is not the value that it should be")
        return self._bytes(start + HEAD.size, value.size)

    def _begin(self) -> None:
        """The newer one of the meta pages."""
        metas = [self._meta(0)]
        self._page_size = metas[0][0]
        metas.append(self._meta(self._page_size))
        if metas[1][0] != self._page_size:
            raise self._damaged("its two meta pages do not agree")
        _, tree, _ = max(metas, key=lambda meta: meta[2])
        _, self._flags, _, _, _, _, self.entries, self._root = tree
        self._rank: Callable[[bytes], Any] = bytes
        if self._flags & REVERSED_KEYS:
            self._rank = _reversed
        if self._flags & WHOLE_NUMBERS:
            self._rank = _number

    def _meta(self, start: int) -> tuple[int, tuple[int, ...], int]:
        """(bytes of a page, the main tree, transaction) of the meta page that starts here."""
        try:
            data = os.pread(self._file, META_BYTES, start)
        except OSError as error:  # a folder, for one
            raise self._damaged(str(error.strerror)) from error
        if len(data) < META_BYTES:
            raise self._damaged("it is too short for one")
        _, _, flags, _, magic, version, _, _ = META.unpack_from(data)
        if magic != MAGIC and (MAGIC.to_bytes(4, "little") in data[:24] or MAGIC.to_bytes(4, "big") in data[:24]):
            raise DataError("the LMDB cannot be read: it is one of a machine of 32 bits, or of the other byte order",
                            where=self.where, hint="mdb_dump there and mdb_load here")  # fmt: skip
        kind = kind_of_bytes(os.pread(self._file, LOOKED_AT, 0)) if magic != MAGIC and not start else ""
        if kind and kind not in EMPTY:
            raise DataError(f"this is no LMDB: {kind}", where=self.where,
                            hint="look what it is, and give it the ending of that")  # fmt: skip
        if magic != MAGIC or not flags & META_PAGE:
            raise self._damaged("this is no LMDB" if not start else "its second meta page is none")
        if version != VERSION:
            raise DataError(f"the LMDB cannot be read: it has data version {version}, known is {VERSION}",
                            where=self.where, hint="mdb_dump and mdb_load of LMDB 0.9 rewrite it")  # fmt: skip
        free, main = (TREE.unpack_from(data, META.size + number * TREE.size) for number in (0, 1))
        _, transaction = TAIL.unpack_from(data, META.size + 2 * TREE.size)
        if not 256 <= free[0] <= MOST_PAGE_BYTES or free[0] & (free[0] - 1):
            raise self._damaged(f"its pages would have {free[0]:,} bytes")
        return free[0], main, transaction

    def _leaves(self) -> Iterator[_Page]:
        waiting = [] if self._root == NO_ROOT else [(self._root, 1)]
        visits, pages = 0, os.fstat(self._file).st_size // self._page_size
        while waiting:
            number, depth = waiting.pop()
            visits += 1
            if depth > DEEPEST or visits > pages:  # each page is in one place of a tree
                raise self._damaged("its tree has no end")
            page = self._page(number)
            waiting += [(child, depth + 1) for child in reversed(page.children)]
            if not page.children:
                yield page

    def _page(self, number: int) -> _Page:
        page = self._cache.get(number)
        if page is None:
            page = self._parsed(number)
            if len(self._cache) >= CACHED_PAGES:
                self._cache.popitem(last=False)
            self._cache[number] = page
        else:
            self._cache.move_to_end(number)
        return page

    def _parsed(self, number: int) -> _Page:
        if number < 2:
            raise self._damaged(f"page {number:,} is no part of its tree")
        data = self._bytes(number * self._page_size, self._page_size)
        stored_number, _, flags, low, high = HEAD.unpack_from(data)
        is_leaf = bool(flags & LEAF)
        if stored_number != number or is_leaf == bool(flags & BRANCH) or flags & (OVERFLOW | META_PAGE | LEAF2):
            raise self._damaged(f"page {number:,} is no part of its tree")
        if not HEAD.size <= low <= high <= self._page_size or low % 2:
            raise self._damaged(f"page {number:,} has no sense")
        starts = struct.unpack_from(f"<{(low - HEAD.size) // 2}H", data, HEAD.size)
        if not starts and not is_leaf:
            raise self._damaged(f"page {number:,} has no sense")
        nodes = [self._node(data, start, number, is_leaf=is_leaf) for start in starts]
        keys = [key for key, _, _ in nodes]
        ranks = [self._rank(key) if is_leaf or place else None for place, key in enumerate(keys)]
        values = [value for _, value, _ in nodes if value is not None]
        return _Page(ranks, keys, values, [] if is_leaf else [child for _, _, child in nodes])

    def _node(self, data: bytes, start: int, number: int, *, is_leaf: bool) -> tuple[bytes, Value | None, int]:
        """(key, value of a leaf, child of a branch)."""
        if not HEAD.size <= start <= len(data) - NODE.size:
            raise self._damaged(f"page {number:,} has no sense")
        low, high, flags, length = NODE.unpack_from(data, start)
        begin = start + NODE.size + length
        key, size = data[start + NODE.size : begin], low | high << 16
        if not is_leaf:
            value, end = None, begin
        elif flags & ELSEWHERE:
            end = begin + 8
            value = Value(size, int.from_bytes(data[begin:end], "little"), b"", "")
            if value.page < 2:
                raise self._damaged(f"page {value.page:,} is not the value that it should be")
        else:
            end = begin + size
            problem = "a named database" if flags & TREE_INSIDE else "several values of one key" * bool(flags & SEVERAL)
            value = Value(size, 0, b"" if problem else data[begin:end], problem)
        if end > len(data):
            raise self._damaged(f"page {number:,} has no sense")
        return key, value, size | flags << 32

    def _checked(self, value: Value) -> Value:
        """Check a value's overflow pages: they must lie within the file."""
        if value.page:
            self._refuse_cut(value.page * self._page_size + HEAD.size + value.size)
        return value

    def _bytes(self, start: int, size: int) -> bytes:
        self._refuse_cut(start + size)
        try:
            data = os.pread(self._file, size, start)
        except OSError as error:
            raise self._damaged(str(error.strerror)) from error
        if len(data) < size:
            self._refuse_cut(start + size)
            raise self._damaged("it was cut while it was read")
        return data

    def _refuse_cut(self, end: int) -> None:
        size = os.fstat(self._file).st_size
        if end > size:
            raise self._damaged(f"it is cut: it has {size:,} bytes and refers to byte {end:,}")

    def _damaged(self, why: str) -> DataError:
        return DataError(f"the LMDB cannot be read: {why}", where=self.where,
                         hint="it was cut or damaged: copy it again")  # fmt: skip


def _reversed(key: bytes) -> bytes:
    return key[::-1]


def _number(key: bytes) -> int:
    return int.from_bytes(key, "little")
