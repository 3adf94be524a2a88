"""What is read as an image, by its content: the one list for all decoders."""

import re

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may try. Others (PostScript, icons, fonts ...) run foreign programs or are no photographs."""
STARTS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM|GIF8[79]a|II[*+]\x00|MM\x00[*+]|P[1-6][\s#]", re.DOTALL
)
"""First bytes of files in these formats."""


MOST_PIXELS = 80_000_000
"""Of a frame, or of an image that was not screened before: more are a decompression bomb, or no picture of a person."""
MOST_SCANS = 100
"""Scans of a JPEG: a progressive one has about ten, and each passes over the whole image when it is decoded."""
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""Restarts and stuffed zeros belong to a scan."""
_SOS, _EOI, _ALONE = 0xDA, 0xD9, (0x01, 0xD8)


def scans(data: bytes) -> int:
    """Number of scans of a JPEG. Where there seem to be many, those of a thumbnail or behind its end do not count."""
    if (most := data.count(b"\xff\xda")) <= MOST_SCANS:
        return most  # few enough, whichever of them count
    found, place = 0, 2
    while (match := _MARKER.search(data, place)) and match[1][0] != _EOI:
        place = match.end()
        if match[1][0] not in _ALONE:
            found += match[1][0] == _SOS
            place += int.from_bytes(data[place : place + 2], "big")
    return found


def is_known(data: bytes) -> bool:
    """Whether the bytes begin as those of an image in FORMATS do: for decoders that cannot be told what to try."""
    return STARTS.match(data) is not None
