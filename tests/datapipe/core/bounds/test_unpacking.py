"""What was packed comes out whole, in pieces; what would expand beyond what was asked for does not."""

import bz2
import gzip
import io
import lzma
import random
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from datapipe.core.bounds import unpacking
from datapipe.core.bounds.unpacking import (
    READ_BYTES,
    TooMuchError,
    bzip2_parts,
    deflate_member,
    gzip_parts,
    lzma_member,
    pieces,
    unpack,
    unpack_member,
    xz_parts,
)

PACKERS: dict[Callable[[], Any], Callable[[bytes], bytes]] = {
    gzip_parts: gzip.compress, bzip2_parts: bz2.compress, xz_parts: lzma.compress,
}  # fmt: skip
DATA = random.Random(0).randbytes(200_000) + bytes(3 * READ_BYTES) + b"end"


@pytest.mark.parametrize("make", PACKERS)
def test_unpack__gives_back_what_was_packed(make: Callable[[], Any]) -> None:
    pack = PACKERS[make]
    assert unpack(pack(DATA), make, len(DATA)) == DATA
    assert unpack(pack(b"a") + pack(DATA) + pack(b"") + pack(b"b") + bytes(512), make, 1 << 30) == b"a" + DATA + b"b"
    assert all(len(piece) <= READ_BYTES for piece in pieces(io.BytesIO(pack(DATA)).read, make))


@pytest.mark.parametrize("make", PACKERS)
def test_unpack__refuses_more_than_was_asked_for(make: Callable[[], Any]) -> None:
    with pytest.raises(TooMuchError):
        unpack(PACKERS[make](DATA), make, len(DATA) - 1)


@pytest.mark.parametrize("make", PACKERS)
@pytest.mark.parametrize("keep", [0.1, 0.6, 0.99])
def test_unpack__of_a_cut_file_ends_in_an_error(make: Callable[[], Any], keep: float) -> None:
    packed = PACKERS[make](DATA[:300_000])
    with pytest.raises(unpacking.ERRORS):
        unpack(packed[: int(len(packed) * keep)], make, 1 << 30)


def test_pieces__of_a_stream_that_expands_without_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "FREE_BYTES", 1 << 20)
    packed = gzip.compress(bytes(8 << 20))
    with pytest.raises(TooMuchError, match="no set of images"):
        list(pieces(io.BytesIO(packed).read, gzip_parts))
    assert sum(map(len, pieces(io.BytesIO(gzip.compress(DATA[:200_000] * 9)).read, gzip_parts))) == 1_800_000


@pytest.mark.parametrize("kind", ["deflate", "bzip2", "lzma"])
def test_member__is_as_long_as_it_is_said_to_be(kind: str) -> None:
    data = DATA[:500_000]
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20}]
    packed, make = {
        "deflate": (packer.compress(data) + packer.flush(), deflate_member),
        "bzip2": (bz2.compress(data), bzip2_parts),
        "lzma": (lzma.compress(data, lzma.FORMAT_RAW, filters=filters),
                 lambda: lzma_member(b"\x5d\xff\xff\xff\xff", len(data))),
    }[kind]  # fmt: skip
    stream = io.BytesIO(packed + b"what follows")
    assert unpack_member(stream, make(), len(packed), len(data)) == data
    for size, error in ((len(data) - 1, TooMuchError), (len(data) + 1, EOFError)):
        with pytest.raises(error):
            unpack_member(io.BytesIO(packed), make(), len(packed), size)
