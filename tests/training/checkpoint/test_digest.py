"""Checksums of fragments with and without xxhash: either reader finds damage, and knows what it cannot judge."""

from pathlib import Path

import pytest

from datapipe.core.errors import DataError
from datapipe.storage import open_store
from tests.training.checkpoint.toy import make_checkpoints, make_method, make_step, make_stepper, same, save, tensors
from training.checkpoint import Reader, complete, digest

DATA = memoryview(b"numbers of a tensor")


def test_digest__without_xxhash_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = digest.digest_of(DATA)
    monkeypatch.setattr(digest, "xxhash", None)
    other = digest.digest_of(DATA)
    assert other.startswith(digest.BLAKE) and not usual.startswith(digest.BLAKE)
    assert digest.matches(DATA, other) and not digest.matches(DATA[1:], other)
    with pytest.raises(DataError, match="xxhash is not installed"):
        digest.matches(DATA, usual)
    monkeypatch.undo()
    assert digest.matches(DATA, usual) and digest.matches(DATA, other)
    assert not digest.matches(DATA[1:], usual) and not digest.matches(DATA[1:], other)


def test_checkpoint__saved_without_xxhash_is_read_with_it_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    stepper = make_stepper(make_method(seed=1))
    make_step(stepper)
    monkeypatch.setattr(digest, "xxhash", None)
    save(make_checkpoints(store), 10, stepper)
    without = tensors(store)
    monkeypatch.undo()
    assert same(tensors(store), without)
    name = complete(store)[-1]
    (file,) = Reader(store, name).marker.files
    path = tmp_path / name / file.name
    content = bytearray(path.read_bytes())
    content[file.fragments[0].offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="checksum of .* is wrong"):
        tensors(store)
