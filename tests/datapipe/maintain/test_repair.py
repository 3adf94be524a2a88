"""What is damaged is mended where the rest tells how, and named where it does not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datapipe.__main__ import main
from datapipe.core import cli
from datapipe.core.config import RemoveConfig, ShardConfig, StorageConfig
from datapipe.core.errors import ConfigError
from datapipe.dataset.index import INDEX
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.verify import verify
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.remove import remove
from datapipe.maintain.repair import Repaired, repair

STORAGE = StorageConfig()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_crops: Callable[..., dict[str, bytes]]) -> Path:
    """30 crops with ten pictures twice, in four shards; with and without sidecars."""
    folder = tmp_path_factory.mktemp("repair")
    write_crops(folder / "a", 20)
    write_crops(folder / "b", 10)
    for name, sidecars in (("plain", "none"), ("described", "json")):
        ingest(
            [f"{folder}/a", f"{folder}/b"],
            f"{folder}/{name}",
            ShardConfig(samples_per_shard=8, sidecars=sidecars, workers=1),
            STORAGE,
        )  # type: ignore[arg-type]
    return folder


@pytest.fixture(params=["plain", "described"])
def folder(made: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of either data set."""
    return Path(shutil.copytree(made / request.param, tmp_path / request.param))


def rows(folder: Path) -> list[dict[str, Any]]:
    return Manifest.load(str(folder)).table(INDEX.names).to_pylist()


def mended(folder: Path) -> Repaired:
    done = repair(str(folder), STORAGE, workers=1)
    assert not list(folder.glob("removals/begun-*"))
    return done


def is_good(folder: Path) -> bool:
    return not verify(str(folder), "all", STORAGE, workers=1).findings


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_repair__rebuilds_an_index_from_its_tar(folder: Path, damage: str) -> None:
    before, old = rows(folder), Manifest.load(str(folder))
    path = folder / old.shards[1].index
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(content[:100])
    done = mended(folder)
    assert is_good(folder) and not done.hopeless
    if folder.name == "described":  # every byte is known
        assert (done.rebuilt, done.unlabelled) == ([old.shards[1].index], []) and path.read_bytes() == content
        assert Manifest.load(str(folder)) == old
        return
    assert (done.rebuilt, done.unlabelled) == ([], [old.shards[1].index])
    new = Manifest.load(str(folder))
    assert (new.derived_by, new.replaces, new.removed) == ("repair", (old.id,), 0)
    unknown = {"source": "", "name": "", "pid": -1, "camera": -1, "near_of": None}
    assert rows(folder) == [{**row, **unknown} if 8 <= number < 16 else row for number, row in enumerate(before)]


def test_repair__takes_damaged_crops_out_and_keeps_the_others(folder: Path) -> None:
    before, old = rows(folder), Manifest.load(str(folder))
    tar = folder / old.shards[2].name
    data = bytearray(tar.read_bytes())
    data[before[17]["offset"] + 40] ^= 1  # a crop
    data[before[19]["offset"] - 512] ^= 1  # a header
    tar.write_bytes(data)
    cut = folder / old.shards[0].name
    cut.write_bytes(cut.read_bytes()[: before[6]["offset"] + 10])
    done = mended(folder)
    assert sorted(done.mended) == sorted([old.shards[0].name, old.shards[2].name]) and done.removed == 3
    assert is_good(folder) and not tar.exists() and not cut.exists()
    after, new = rows(folder), Manifest.load(str(folder))
    assert [number for number, row in enumerate(after) if row["removed"]] == [6, 7, 17]
    assert [row["key"] for row in after if not row["removed"]] == [
        row["key"] for number, row in enumerate(before) if number not in (6, 7, 17)
    ]
    assert (new.removed, new.replaces) == (3, (old.id,))
    assert mended(folder) == Repaired() and Manifest.load(str(folder)) == new


def test_repair__names_what_is_lost(folder: Path) -> None:
    old = Manifest.load(str(folder))
    (folder / old.shards[0].index).unlink()
    (folder / old.shards[0].name).write_bytes(b"short")
    (folder / old.shards[3].name).unlink()
    reason = "the tar it would be rebuilt from is not intact either"
    assert list(mended(folder).lines()) == [
        f"cannot be repaired: {old.shards[3].name} is missing",
        f"cannot be repaired: {old.shards[0].index}: {reason}",
    ]
    assert Manifest.load(str(folder)) == old


def test_repair__of_shards_that_lost_crops_before(folder: Path, tmp_path: Path) -> None:
    """An emptied shard is mended from the one it refers to; where single rows are gone, only the index knew which."""
    keys = [row["key"] for row in rows(folder)]
    (tmp_path / "keys.txt").write_text("\n".join([*keys[8:16], keys[17]]))
    remove(str(folder), RemoveConfig(keys=f"{tmp_path}/keys.txt", workers=1), STORAGE)
    before, old = rows(folder), Manifest.load(str(folder))
    (folder / old.shards[1].index).unlink()
    done = mended(folder)
    assert done.rebuilt == [old.shards[1].index] and rows(folder) == before and is_good(folder)
    (folder / old.shards[2].index).unlink()
    assert mended(folder).hopeless == [f"{old.shards[2].index}: only it knew which of its 8 rows had a crop removed"]


def test_verify__repair__says_what_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = Manifest.load(str(folder))
    (folder / old.shards[1].index).unlink()
    words = ["verify", str(folder), "--workers", "1"]
    assert cli.run(main, words) == cli.FAILED
    capsys.readouterr()
    assert cli.run(main, [*words, "--repair"]) == cli.COMPLETE
    printed = capsys.readouterr().out
    assert f"rebuilt {old.shards[1].index}" in printed and "good: 0 findings" in printed
    with pytest.raises(ConfigError, match="all versions"):
        repair(f"{folder}/{old.file}", STORAGE)
