"""Compressed bytes that are unpacked piece by piece, never to more than was asked for."""

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol, cast

READ_BYTES = 1 << 20
"""Packed bytes read, and plain ones made, at a time."""
FREE_BYTES, MOST_TIMES = 1 << 32, 200
"""Plain bytes that a compressed stream may hold: so many, and beyond these so many times its own size. Images hardly
pack at all."""
ERRORS = (zlib.error, lzma.LZMAError, EOFError, ValueError, OSError, struct.error)
"""What damaged bytes end in."""


class TooMuchError(ValueError):
    """There is more than was allowed, or stated."""


class _Unpacker(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def unpack(self, data: bytes, most: int) -> bytes: ...
    def hungry(self) -> bool: ...


class _Zlib:
    def __init__(self, window: int) -> None:
        self._inner = zlib.decompressobj(window)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def unpack(self, data: bytes, most: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, most)

    def hungry(self) -> bool:
        return not self._inner.unconsumed_tail


class _Other:
    """bz2's and lzma's, which keep what they did not come to by themselves."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def eof(self) -> bool:
        return cast(bool, self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return cast(bytes, self._inner.unused_data)

    def unpack(self, data: bytes, most: int) -> bytes:
        return cast(bytes, self._inner.decompress(data, most))

    def hungry(self) -> bool:
        return cast(bool, self._inner.needs_input)


Unpackers = Callable[[], _Unpacker]
"""Makes what unpacks one stream of a compressed file."""


def gzip_parts() -> _Unpacker:
    """One member of a gzip file."""
    return _Zlib(16 + zlib.MAX_WBITS)


def bzip2_parts() -> _Unpacker:
    """One stream of a bzip2 file."""
    return _Other(bz2.BZ2Decompressor())


def xz_parts() -> _Unpacker:
    """One stream of an xz file."""
    return _Other(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_XZ_BYTES))


MOST_XZ_BYTES = 256 << 20
"""Memory for an xz stream: its strongest setting takes 65 MB."""
PACKED = {b"\x1f\x8b": gzip_parts, b"BZh": bzip2_parts, b"\xfd7zXZ\0": xz_parts}
"""First bytes of compressed files -> what unpacks them."""


def unpacker_of(start: bytes) -> Unpackers | None:
    """What unpacks a file that begins with these bytes; None where it is not compressed, or in another way."""
    return next((make for first, make in PACKED.items() if start.startswith(first)), None)


def pieces(read: Callable[[int], bytes], make: Unpackers) -> Iterator[bytes]:
    """The plain bytes of one stream after the other, READ_BYTES at a time; zeros behind the last one are padding.

    Raises EOFError where a stream is cut, TooMuchError where they expand beyond FREE_BYTES and MOST_TIMES, and what the
    libraries raise (ERRORS).
    """
    taken = given = 0
    data = b""
    while True:
        unpacker = make()
        while not unpacker.eof:
            if unpacker.hungry() and not data:
                data = read(READ_BYTES)
                taken += len(data)
                if not data:
                    raise EOFError("it ends within a compressed stream")
            piece = unpacker.unpack(data, READ_BYTES)
            data = b""
            given += len(piece)
            if given > FREE_BYTES + MOST_TIMES * taken:
                raise TooMuchError(f"{taken:,} bytes unpack to more than {given:,}: no set of images does that")
            if piece:
                yield piece
        data = unpacker.unused_data
        while not data.strip(b"\0"):
            data = read(READ_BYTES)
            taken += len(data)
            if not data:
                return


def unpack(data: bytes, make: Unpackers, most: int) -> bytes:
    """A whole compressed file; raises TooMuchError where it holds more than `most` bytes."""
    view, place = memoryview(data), 0

    def read(size: int) -> bytes:
        nonlocal place
        place += size
        return bytes(view[place - size : place])

    parts, total = [], 0
    for part in pieces(read, make):
        total += len(part)
        if total > most:
            raise TooMuchError(f"it unpacks to more than {most:,} bytes")
        parts.append(part)
    return b"".join(parts)


def unpack_member(stream: BinaryIO, unpacker: _Unpacker, packed: int, size: int) -> bytes:
    """The `size` plain bytes that `packed` bytes of a stream hold. Raises TooMuchError where they hold more, EOFError
    where fewer."""
    parts, total = [], 0
    while not unpacker.eof:
        data = stream.read(min(READ_BYTES, packed)) if unpacker.hungry() and packed else b""
        packed -= len(data)
        part = unpacker.unpack(data, min(READ_BYTES, size + 1 - total))
        if not part and not data and not unpacker.eof and unpacker.hungry():
            break
        parts.append(part)
        total += len(part)
        if total > size:
            raise TooMuchError("it holds more than the archive says")
    if total < size:
        raise EOFError("bytes are missing")
    return b"".join(parts)


def deflate_member() -> _Unpacker:
    """A member of a zip that was packed by deflate."""
    return _Zlib(-zlib.MAX_WBITS)


def lzma_member(head: bytes, size: int) -> _Unpacker:
    """A member of a zip that was packed by LZMA; `head`: its properties, 5 bytes; `size`: of the plain bytes, beyond
    which no dictionary is needed, whatever is said of it."""
    settings, dictionary = struct.unpack("<BL", head)
    if settings >= 9 * 5 * 5:
        raise ValueError("its LZMA properties are none")
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": max(4096, min(dictionary, size)), "lc": settings % 9,
                "lp": settings // 9 % 5, "pb": settings // 45}]  # fmt: skip
    return _Other(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters))
