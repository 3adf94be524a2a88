"""Bytes of a text file, whatever editor, spreadsheet or shell wrote it -> text.

UTF-8, or UTF-16 and UTF-32 with a byte order mark (or UTF-16 that shows by the zeros of its plain letters).
"""

import codecs
import re

from datapipe.formats.file_kinds import kind_of_bytes

MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
"""Byte order marks, the longer before those that they begin with."""
MARK = "\ufeff"
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")


class NoText(ValueError):
    """Why bytes are no text, to be put after "it" or "the file"."""


def decode_text(data: bytes, *, errors: str = "strict") -> str:
    """The text less its byte order mark; line ends stay as they are. `errors`: what is done about bytes that are no
    UTF-8, as `bytes.decode` has it.

    Raises NoText for files of other kinds, for control characters, and for bytes that are not of the encoding.
    """
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "") or _by_zeros(data)
    if not encoding and data and not _is_texts_kind(kind := kind_of_bytes(data)):
        raise NoText(f"is {kind}" + " or a spreadsheet" * (kind == "a zip"))
    try:
        text = data.decode(encoding or "utf-8", errors if encoding in ("", "utf-8") else "strict")
    except UnicodeDecodeError as error:
        whole = f"is not in UTF-8: {error.reason} at byte {error.start}" if encoding in ("", "utf-8") else \
            f"is no whole {encoding.upper()}"  # fmt: skip
        raise NoText(whole) from error
    text = text.removeprefix(MARK)
    if control := CONTROL.search(text):
        raise NoText(f"holds the control character {control[0]!r}")
    return text


def _is_texts_kind(kind: str) -> bool:
    return kind in ("", "a text", "JSON", "XML", "an HTML page", "an SVG drawing", "nothing but zeros")


def _by_zeros(data: bytes) -> str:
    """UTF-16 that has lost its mark shows by the zeros of its plain letters: after them, or before them."""
    start = data[:1024]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if len(data) % 2 or not start or max(even, odd) < max(1, len(start) // 8):
        return ""
    return "utf-16-le" if odd > 4 * even else "utf-16-be" if even > 4 * odd else ""
