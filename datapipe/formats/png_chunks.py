"""PNGs less what viewers pass over: texts of any length, and what stands beside the pixels under a wrong checksum."""

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT = (b"tRNS", b"eXIf", b"acTL", b"sBIT")
"""Chunks beside the pixels that say how these are to be seen, or that there are several images."""
TEXTS = (b"iTXt", b"tEXt", b"zTXt")
METADATA = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Texts that may tell how the image is to be turned."""
MOST_METADATA = 1 << 19
"""Bytes of such a text that are still looked at."""
NEEDED = 0x20
"""Bit of the first letter of a chunk's name; where it is not set, the chunk is needed to make the pixels."""


def essential(data: bytes) -> bytes:
    """The PNG with the chunks that are needed to show it, byte by byte as they are."""
    return SIGNATURE + b"".join(chunk for kind, chunk in _chunks(data) if _is_kept(kind, chunk))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, whole chunk) of each; the last may be cut."""
    place = len(SIGNATURE)
    while place + 8 <= len(data):
        (size,) = struct.unpack_from(">L", data, place)
        yield data[place + 4 : place + 8], data[place : place + 12 + size]
        place += 12 + size


def _is_kept(kind: bytes, chunk: bytes) -> bool:
    if not kind[0] & NEEDED:
        return True
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    return kind in KEPT or (kind in TEXTS and chunk[8:].startswith(METADATA) and len(chunk) < MOST_METADATA)
