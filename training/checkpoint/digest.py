"""The checksum of a fragment: XXH3 by xxhash, or BLAKE2b where that package is not installed.

XXH3's is 32 hexadecimal digits, as in every checkpoint so far; BLAKE2b's has its name in front, so that either reader
knows which it is. Whole files have a SHA-256 in any case.
"""

import hashlib

from datapipe.core.errors import DataError

try:
    import xxhash
except ModuleNotFoundError:  # the loop needs no more than PyTorch and timm
    xxhash = None  # type: ignore[assignment]

BLAKE = "blake2b:"
DIGEST_BYTES = 16


def digest_of(data: memoryview) -> str:
    """The checksum as the marker has it."""
    return _blake(data) if xxhash is None else xxhash.xxh3_128_hexdigest(data)


def matches(data: memoryview, stated: str) -> bool:
    """Is this the checksum of the data? Raises DataError where it takes a package that is not installed."""
    if stated.startswith(BLAKE):
        return stated == _blake(data)
    if xxhash is None:
        raise DataError("the checkpoint's checksums are XXH3, and xxhash is not installed", hint="pip install xxhash")
    return bool(stated == xxhash.xxh3_128_hexdigest(data))


def _blake(data: memoryview) -> str:
    return BLAKE + hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()
