"""What a file is by its first bytes, in words: for messages about files that are not what their names say."""

import re

KINDS: tuple[tuple[bytes, str], ...] = (
    (rb"\xff\xd8\xff", "a JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "a PNG"),
    (rb"GIF8[79]a", "a GIF"),
    (rb"RIFF....WEBP", "a WebP image"),
    (rb"RIFF....AVI ", "an AVI video"),
    (rb"....ftypavi[fs]", "an AVIF image"),
    (rb"....ftyp(?:hei[cxms]|hev[cmxs]|mif[12]|msf1)", "a HEIC image"),
    (rb"....ftypcrx ", "a raw image of a camera (CR3)"),
    (rb"....ftyp", "a video (MP4, QuickTime)"),
    (rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image"),
    (rb"II\*\x00....CR|IIRO|IIU\x00|FUJIFILMCCD-RAW", "a raw image of a camera"),
    (rb"8BPS", "a Photoshop file"),
    (rb"\x00\x00[\x01\x02]\x00[\x01-\x40]\x00", "an icon"),
    (rb"qoif", "a QOI image"),
    (rb"\x76\x2f\x31\x01", "an OpenEXR image"),
    (rb"#\?(?:RADIANCE|RGBE)", "a Radiance HDR image"),
    (rb"DDS ", "a DirectDraw surface"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"%PDF", "a PDF"),
    (rb"\x1a\x45\xdf\xa3", "a video (Matroska, WebM)"),
    (rb"PK\x03\x04|PK\x05\x06|PK\x07\x08", "a zip"),
    (rb"\x1f\x8b", "compressed by gzip"),
    (rb"BZh[1-9]", "compressed by bzip2"),
    (rb"\xfd7zXZ\x00", "compressed by xz"),
    (rb"\x5d\x00\x00", "compressed by LZMA"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "compressed by zstd"),
    (rb"\x04\x22\x4d\x18", "compressed by LZ4"),
    (rb"\x1f[\x9d\xa0]", "compressed by compress (.Z)"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!\x1a\x07", "a RAR archive"),
    (rb"PAR1", "a parquet file"),
    (rb"ARROW1", "an Arrow file"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"MATLAB 5\.0", "a Matlab file"),
    (rb"SQLite format 3\x00", "an SQLite database"),
    (rb"\xd0\xcf\x11\xe0", "an old spreadsheet or document of Microsoft Office"),
    (rb"version https://git-lfs\.github\.com", "a Git LFS pointer in place of the file"),
    (rb"\x00\x05\x16[\x00\x07]", "macOS's metadata of a file (AppleDouble)"),
    (rb"\x80[\x02-\x05][\x00-\xff]", "a Python pickle"),
)  # fmt: skip
"""Beginning of a file (a regular expression, "." any byte) -> what it is. The first that fits counts."""
_KINDS = tuple((re.compile(start, re.DOTALL), what) for start, what in KINDS)
_TEXTS = (
    (re.compile(r"<(?:!doctype html|html|head|body|script|meta)", re.IGNORECASE), "an HTML page"),
    (re.compile(r"<svg|<\?xml[^>]*>\s*(?:<!--.*?-->\s*)*<(?:!DOCTYPE )?svg", re.DOTALL), "an SVG drawing"),
    (re.compile(r"<Error>|<\?xml[^>]*>\s*<Error"), "the error message of an object store"),
    (re.compile(r"<\?xml|<[A-Za-z]"), "XML"),
    (re.compile(r"[{\[]"), "JSON"),
)
TAR, GZIP, ZIP, PARQUET, TEXT = "a tar", "compressed by gzip", "a zip", "a parquet file", "a text"
EMPTY = ("an empty file", "nothing but zeros")
"""What damage leaves of any kind of file."""
LOOKED_AT = 1024
"""Bytes at the beginning of a file that tell what it is."""
TAR_MAGIC, TAR_PLACE = b"ustar", 257
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def kind_of_bytes(start: bytes) -> str:
    """What a file is that begins with these bytes: "an HTML page", "compressed by zstd"; empty where it is not known.

    At least the first 512 bytes are needed to tell a tar, the first LOOKED_AT to tell a text.
    """
    if not start:
        return EMPTY[0]
    start = start[:LOOKED_AT]
    if start[TAR_PLACE : TAR_PLACE + len(TAR_MAGIC)] == TAR_MAGIC:
        return TAR
    for pattern, what in _KINDS:
        if pattern.match(start):
            return what
    if not start.strip(b"\0"):
        return EMPTY[1]
    return _text_kind(start)


def _text_kind(start: bytes) -> str:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = start[: len(start) // 2 * 2].decode("utf-16", "replace")
    elif _BINARY.search(start):
        return ""
    else:
        text = start.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
        if text.count("\ufffd") > 1 + len(text) // 20:
            return ""
    text = text.lstrip("\ufeff \t\r\n")
    return next((what for pattern, what in _TEXTS if pattern.match(text)), TEXT)


def other_hint(kind: str) -> str:
    """What to try with a file that is of another kind than its name says."""
    if kind == ZIP:
        return "give it an ending that says so: .zip"
    if kind == GZIP or kind.startswith("compressed by"):
        return "unpack it once, or pack it with gzip: .tar.gz"
    if "page" in kind or "message" in kind or "pointer" in kind or kind == TEXT:
        return "look into it: the server sent this in place of the archive; fetch it by another way"
    return "look what it is, and give it the ending of that"
