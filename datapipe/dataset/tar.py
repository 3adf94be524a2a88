"""The bytes of a USTAR archive around its members: made for a whole shard at once, equal whoever makes them."""

import tarfile
from collections.abc import Sequence

import numpy as np

BLOCK = tarfile.BLOCKSIZE
END_BYTES = 2 * BLOCK
"""Two blocks of zeros end a tar."""
NAME_BYTES = 100
_SIZE = slice(124, 135)
_CHECKSUM = slice(148, 154)


def header(key: str, size: int) -> bytes:
    """The header of a crop's JPEG: 512 bytes that depend on nothing else."""
    return headers([f"{key}.jpg"], np.array([size]))[0].tobytes()


def headers(names: Sequence[str], sizes: np.ndarray) -> np.ndarray:
    """Headers uint8[n, 512] of plain files, mode 644; time, owner and group are 0. Names: ASCII, 100 bytes at most."""
    made = np.tile(_template(), (len(names), 1))
    made[:, :NAME_BYTES] = np.array(names, f"S{NAME_BYTES}").view(np.uint8).reshape(-1, NAME_BYTES)
    made[:, _SIZE] = _octal(sizes, 11)
    made[:, _CHECKSUM] = _octal(made.sum(axis=1, dtype=np.int64), 6)
    made[:, 154:156] = 0, ord(" ")
    return made


def member_bytes(sizes: np.ndarray) -> np.ndarray:
    """Bytes int64[n] that files of these sizes take in a tar: a header, and the data in whole blocks."""
    return BLOCK + (sizes.astype(np.int64) + BLOCK - 1) // BLOCK * BLOCK


def layout(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """(offset int64[n] of each file's first byte in the tar, bytes of the tar)."""
    taken = member_bytes(sizes)
    ends = np.cumsum(taken)
    return ends - taken + BLOCK, int(ends[-1]) + END_BYTES


def _template() -> np.ndarray:
    """The standard library's header of an empty, nameless file; its checksum blank, as it is when it is summed up."""
    member = tarfile.TarInfo("")
    member.mode = 0o644
    made = np.frombuffer(member.tobuf(tarfile.USTAR_FORMAT), np.uint8).copy()
    made[148:156] = ord(" ")
    return made


def _octal(numbers: np.ndarray, digits: int) -> np.ndarray:
    shifts = 3 * np.arange(digits - 1, -1, -1)
    return (numbers.astype(np.int64)[:, None] >> shifts & 7) + ord("0")
