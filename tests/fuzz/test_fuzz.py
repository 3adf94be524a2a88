"""A short round of every reader: sound inputs are read, hostile ones and changed ones end in one clear error or none.

`make fuzz ROUNDS=200 SEED=7` goes on from there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.mutate import mutated, mutated_json
from tests.fuzz.readers import MODULES
from tests.fuzz.rounds import Rounds, faults

ROUNDS, HOSTILE = 1, 2
"""Changed inputs of each reader, and hostile ones."""
FOR_LONG_ROUNDS = ("restarts",)
"""Each of its inputs is a whole report, seconds of plots, as those of "metrics" are."""
SLOW_TO_MAKE = {
    "tar_gz": ("long link", "long pax header", "long global header", "zeros after the end", "a large member",
               "one sample of 800 images"),
    "tar_bz2": ("zeros after the end", "a large member"), "tar_xz": ("a large member",),
    "zip": ("bzip2", "lzma", "deflate, honest"),
    "images": ("png of 39e6 pixels", "png of 39e6 pixels of 16 bits", "png with 100 MB of text"),
    "boxes": ("60e6 rows",), "parquet": ("30e6 empty rows", "large page"), "selection": ("200e6 rows",),
    "pickles": ("xz", "bzip2", "many dictionaries"), "lmdb": ("many sets",), "pth": ("packed",), "features": ("long",),
    "restarts": ("arrays of 1.5 GB",),
}  # fmt: skip
"""Reader -> hostile inputs that `make fuzz` alone tries: making them, or reading them with care, takes seconds."""


def _round(names: Sequence[str]) -> None:
    with Rounds(names, seed=0, leave_out=SLOW_TO_MAKE) as rounds:
        rounds.sound()
        rounds.hostile(HOSTILE)
        rounds.changed(ROUNDS)
        found = {name: tally.faults for name, tally in rounds.tallies.items() if tally.faults}
        assert not found
        assert all(tally.good and tally.inputs == tally.good + tally.refused for tally in rounds.tallies.values())


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_readers__end_in_one_clear_error_or_none(module: str) -> None:
    _round([name for name in MODULES[module] if name not in FOR_LONG_ROUNDS])


def test_faults__are_found() -> None:
    """What the rounds would say of a reader that does everything wrong."""
    fine = {"code": 0, "said": "good", "trace": "", "growth": 3, "outside": []}
    assert list(faults(fine)) == [] == list(faults(fine | {"code": 1, "said": "error: damaged"}))
    wrong = [
        {"trace": "Traceback\nKeyError: 'x'"}, {"said": "Traceback (most recent call last):"}, {"code": 2},
        {"code": 1, "said": ""}, {"growth": 1_001}, {"outside": ["open /etc/x"]}, {"said": "a\x1b[31m"},
    ]  # fmt: skip
    assert all(len(list(faults(fine | change))) == 1 for change in wrong)
    assert list(faults(fine, may_pass=False)) == ["exit code 0 for what must be refused"]


def test_mutations__follow_from_the_seed() -> None:
    data = bytes(range(256)) * 4
    tree = json.dumps({"shards": [{"rows": 3, "name": "a"}], "id": "x", "notes": ["y"]}).encode()
    for change in (lambda random: mutated(data, [data], random), lambda random: mutated_json(tree, random)):
        made = [change(Random(seed)) for seed in range(50)]
        assert made == [change(Random(seed)) for seed in range(50)] and len(set(made)) > 40


def test_faulty_inputs__are_kept(tmp_path: Path) -> None:
    with Rounds(["toml"], seed=0, kept=tmp_path) as rounds:
        rounds.judge("toml", "no recipe", lambda folder: (folder / "x.toml").write_text("a = 1"), may_pass=False)
        rounds.judge("toml", "none", lambda folder: None)
        assert not rounds.tallies["toml"].faults
        rounds.judge("toml", "good", lambda folder: rounds.copy("toml", folder), may_pass=False)
    assert [path.name for path in tmp_path.glob("toml/*")] == ["good"]
    assert (tmp_path / "toml" / "good" / "in" / "x.toml").exists()
