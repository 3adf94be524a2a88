"""What is read as an image, by its content: the one list for all decoders."""

import re

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may try. Others (PostScript, icons, fonts ...) run foreign programs or are no photographs."""
STARTS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM|GIF8[79]a|II[*+]\x00|MM\x00[*+]|P[1-6][\s#]", re.DOTALL
)
"""First bytes of files in these formats."""


def is_known(data: bytes) -> bool:
    """Whether the bytes begin as those of an image in FORMATS do: for decoders that cannot be told what to try."""
    return STARTS.match(data) is not None
