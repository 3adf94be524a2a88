"""What is removed is gone from the stream and from every stored byte; everything else stays where it was."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from datapipe.core.config import RemoveConfig, SelectConfig, ShardConfig, StorageConfig, StreamConfig
from datapipe.core.errors import ConfigError, DataError, StorageError
from datapipe.dataset.index import INDEX
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.verify import verify
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.relink_duplicates import relink_duplicates
from datapipe.maintain.remove import remove
from datapipe.maintain.select import select
from datapipe.storage import open_store
from datapipe.stream.stream import Stream
from tests.conftest import S3Server

STORAGE = StorageConfig()
WriteCrops = Callable[..., dict[str, bytes]]
Made = tuple[Path, dict[tuple[str, str], bytes]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_crops: WriteCrops) -> Made:
    """45 crops of three sources in five shards; "b" repeats ten pictures of "a". And the bytes by (source, name)."""
    folder = tmp_path_factory.mktemp("remove")
    write_crops(folder / "a", 25)
    write_crops(folder / "b", 10)
    write_crops(folder / "c", 10, seed=1)
    sources = [f"{folder}/{name}" for name in "abc"]
    ingest(sources, f"{folder}/set", ShardConfig(samples_per_shard=10, workers=1), STORAGE)
    crops = {(path.parent.name, path.name): path.read_bytes() for source in sources for path in Path(source).iterdir()}
    return folder / "set", crops


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    """A copy of that data set."""
    return Path(shutil.copytree(made[0], tmp_path / "set"))


def everything(url: str, storage: StorageConfig = STORAGE) -> list[dict[str, Any]]:
    return Manifest.load(url, storage).table([*INDEX.names, "shard"], storage).to_pylist()


def listed(tmp_path: Path, values: list[str]) -> str:
    (tmp_path / "list.txt").write_text("\n".join(values))
    return str(tmp_path / "list.txt")


def stored(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def fetched(url: str, storage: StorageConfig = STORAGE) -> list[bytes]:
    stream = Stream(Manifest.load(url, storage), storage, StreamConfig(block=4))
    try:
        return stream.fetch(np.arange(stream.rows)).data
    finally:
        stream.close()


@pytest.mark.parametrize("remote", [False, True], ids=["local", "s3"])
def test_remove__takes_the_bytes_and_leaves_the_rows(
    made: Made, folder: Path, tmp_path: Path, s3: S3Server, remote: bool
) -> None:
    url = str(folder)
    bucket = s3.bucket()
    if remote:
        url = f"s3://{bucket}/set"
        for path in folder.rglob("*"):
            if path.is_file():
                s3.client.upload_file(str(path), bucket, f"set/{path.relative_to(folder)}")
    before, old = everything(url, s3.storage), Manifest.load(url, s3.storage)
    gone = [before[row]["key"] for row in (0, 3, 4, 19, 44)]
    done = remove(url, RemoveConfig(keys=listed(tmp_path, gone), reason="asked for", workers=1), s3.storage)
    new = Manifest.load(url, s3.storage)
    replaced = {shard.index for shard in old.shards} - {shard.index for shard in new.shards}
    tars = {shard.name for shard in old.shards} - {shard.name for shard in new.shards}
    assert (done.crops, done.lists.missing, done.found_complete) == (5, [], False)
    assert (
        len(tars) == 3 and done.deleted == len(tars) + len(replaced) + 1 and len(replaced) >= 3
    )  # and what was packed
    after = everything(url, s3.storage)
    assert [row["removed"] for row in after] == [row["key"] in gone for row in before]
    stand_ins = {0: 1, 3: 5, 4: 5, 19: 10, 44: 40}  # the next one of the shard that stays
    moved = ("offset", "removed", "shard", "duplicate_of", "near_of")
    for row, old in enumerate(before):
        expected, found = before[stand_ins.get(row, row)], after[row]
        assert {name: found[name] for name in found if name not in moved} == {
            name: expected[name] for name in expected if name not in moved
        }
        assert found["shard"] == old["shard"]
    data = fetched(url, s3.storage)
    assert data == [made[1][row["source"], row["name"]] for row in after]
    objects = b"".join(s3.objects(bucket).values()) if remote else stored(folder)
    staying = {row["key"] for row in before} - set(gone)
    kept = {made[1][row["source"], row["name"]] for row in before if row["key"] in staying}
    lost = {made[1][row["source"], row["name"]] for row in before} - kept
    assert len(lost) >= 2 and all(data in objects for data in kept) and not any(data in objects for data in lost)
    assert all(key.encode() in objects for key in staying) and not any(key.encode() in objects for key in gone)
    assert verify(url, "all", s3.storage, workers=1).findings == []


def test_remove__leaves_a_record_without_names(folder: Path, tmp_path: Path) -> None:
    rows = everything(str(folder))
    old = Manifest.load(str(folder))
    keys = sorted(row["key"] for row in rows[7:9])
    config = RemoveConfig(keys=listed(tmp_path, keys), reason="case 7", date="2026-11-21", workers=1)
    remove(str(folder), config, STORAGE)
    [path] = (folder / "removals").iterdir()
    record = json.loads(path.read_text())
    new = Manifest.load(str(folder))
    assert (record["count"], record["reason"], record["date"]) == (2, "case 7", "2026-11-21")
    assert record["keys_sha256"] == [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    assert record["replaced"] == {old.id: new.file} and old.shards[0].name in record["deleted"]
    assert not any(word in path.read_text() for row in rows[7:9] for word in (row["key"], row["name"]))
    assert (new.removed, new.rows, new.derived_by, new.replaces, new.version) == (2, 45, "remove", (old.id,), 2)


def test_remove__every_version_in_use_gets_a_successor(folder: Path, tmp_path: Path) -> None:
    first = Manifest.load(str(folder))
    chosen = select(str(folder), SelectConfig(where='source == "a"'), STORAGE).manifest
    key = next(row["key"] for row in everything(str(folder)))
    done = remove(str(folder), RemoveConfig(keys=listed(tmp_path, [key]), workers=1), STORAGE)
    whole, part = (Manifest.load(f"{folder}/{file}") for file in done.versions)
    assert (whole.parent, part.parent) == (first.id, chosen.id) and (whole.version, part.version) == (3, 4)
    assert part.selection == chosen.selection and part.shards == whole.shards and Manifest.load(str(folder)) == part
    assert key not in part.table(["key"])["key"].to_pylist()
    for old, new in ((first, whole), (chosen, part)):
        with pytest.raises(DataError, match=f"removed from this version: {new.file} takes its place"):
            Manifest.load(f"{folder}/{old.file}")
        assert Manifest.read(open_store(str(folder)), old.file).id == old.id
    again = everything(str(folder))[0]["key"]
    remove(str(folder), RemoveConfig(keys=listed(tmp_path, [again]), workers=1), STORAGE)
    newest = Manifest.load(str(folder))
    assert newest.replaces == (chosen.id, part.id) and newest.removed == 2
    with pytest.raises(DataError, match=newest.file):
        Manifest.load(f"{folder}/{chosen.file}")


def test_remove__the_same_again_says_so_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    config = RemoveConfig(keys=listed(tmp_path, [everything(str(folder))[0]["key"]]), workers=1)
    remove(str(folder), config, STORAGE)
    before = stored(folder)
    done = remove(str(folder), config, STORAGE)
    assert done.found_complete and done.deleted == 0 and stored(folder) == before


def test_remove__a_source__also_whole_shards_of_it(tmp_path: Path, write_crops: WriteCrops) -> None:
    write_crops(tmp_path / "a", 6)
    crops = write_crops(tmp_path / "b", 2, seed=1)
    url = f"{tmp_path}/set"
    ingest([f"{tmp_path}/a", f"{tmp_path}/b"], url, ShardConfig(samples_per_shard=1, workers=1), STORAGE)
    order = [row["source"] for row in everything(url)]
    assert remove(url, RemoveConfig(source="a", workers=1), STORAGE).crops == 6
    rows, manifest = everything(url), Manifest.load(url)
    assert [row["removed"] for row in rows] == [source == "a" for source in order]
    assert {row["source"] for row in rows} == {"b"} and set(fetched(url)) == set(crops.values())
    assert len({shard.name for shard in manifest.shards}) == 2 and len(manifest.shards) == 8
    assert sorted(path.name for path in (tmp_path / "set" / "shards").glob("*.tar")) == sorted(
        {Path(shard.name).name for shard in manifest.shards}
    )
    assert verify(url, "all", STORAGE, workers=1).findings == []
    last = next(row["key"] for row in rows if not row["removed"])
    remove(url, RemoveConfig(keys=listed(tmp_path, [last]), workers=1), STORAGE)
    assert len(set(fetched(url))) == 1 and verify(url, "all", STORAGE, workers=1).findings == []
    with pytest.raises(DataError, match="no crop would be left"):
        remove(url, RemoveConfig(source="b", workers=1), STORAGE)
    assert not list((tmp_path / "set" / "removals").glob("begun-*"))


def test_remove__by_names__within_a_source(folder: Path, tmp_path: Path) -> None:
    names = [row["name"] for row in everything(str(folder)) if row["source"] == "b"][:3]
    file = listed(tmp_path, [*names, "never/there.jpg"])
    with pytest.raises(DataError, match="3 listed names fit more than one crop"):
        remove(str(folder), RemoveConfig(names=file, workers=1), STORAGE)
    with pytest.raises(DataError, match="1 of the 4 listed crops are not in the data set, for example never/there.jpg"):
        remove(str(folder), RemoveConfig(names=file, source="b", workers=1), STORAGE)
    done = remove(str(folder), RemoveConfig(names=file, source="b", max_missing=0.25, workers=1), STORAGE)
    lists = done.lists
    assert (done.crops, lists.missing, lists.missing_count, lists.copies) == (3, ["never/there.jpg"], 1, 3)
    left = [row for row in everything(str(folder)) if not row["removed"]]
    assert sum(row["source"] == "b" for row in left) == 7 and sum(row["source"] == "a" for row in left) == 25


def test_remove__with_duplicates__takes_the_copies_too(made: Made, folder: Path, tmp_path: Path) -> None:
    key = next(row["key"] for row in everything(str(folder)) if row["source"] == "b")
    data = made[1]["b", next(row["name"] for row in everything(str(folder)) if row["key"] == key)]
    done = remove(str(folder), RemoveConfig(keys=listed(tmp_path, [key]), duplicates=True, workers=1), STORAGE)
    assert (done.crops, done.lists.copies) == (2, 0) and data not in stored(folder)


def test_remove__marks_pass_to_the_next_copy(folder: Path, tmp_path: Path) -> None:
    rows = everything(str(folder))
    copy = next(row for row in rows if row["duplicate_of"])
    original = next(row for row in rows if row["key"] == copy["duplicate_of"])
    remove(str(folder), RemoveConfig(keys=listed(tmp_path, [original["key"]]), workers=1), STORAGE)
    heir = next(row for row in everything(str(folder)) if row["key"] == copy["key"] and not row["removed"])
    assert heir["duplicate_of"] is None
    assert verify(str(folder), "all", STORAGE, workers=1).findings == []


def test_relink_duplicates__first_that_is_left_and_who_is_near_to_it() -> None:
    table = pyarrow.table(
        {
            "key": list("abcdefgh"),
            "dhash": pyarrow.array([0, 1, 2, 0b1100, 0b1110, 5, 6, 0], pyarrow.uint64()),
            "duplicate_of": [None, "a", None, "a", None, "c", "a", None],
            "near_of": [None, "a", "a", "a", "a", None, None, None],
        }
    )
    live = np.array([False, True, True, True, True, True, False, True])
    assert relink_duplicates(table, live, pyarrow.array(["a", "g"])) == {
        1: (None, None),  # the first copy of a; near to nothing that is left before it
        2: (None, "b"),  # 01 and 10: two bits
        3: ("b", None),  # 0001 and 1100: three bits, so it is kept
        4: (None, "d"),
    }
    assert relink_duplicates(table, live, pyarrow.array(["h"])) == {}


def test_remove__keeps_sidecars_with_their_crops(tmp_path: Path, write_crops: WriteCrops) -> None:
    write_crops(tmp_path / "a", 6)
    url = f"{tmp_path}/set"
    ingest([f"{tmp_path}/a"], url, ShardConfig(sidecars="json", workers=1), STORAGE)
    keys = [row["key"] for row in everything(url)]
    remove(url, RemoveConfig(keys=listed(tmp_path, [keys[0], keys[3], keys[5]]), workers=1), STORAGE)
    with tarfile.open(f"{url}/{Manifest.load(url).shards[0].name}") as tar:
        assert tar.getnames() == [f"{keys[row]}.{kind}" for row in (1, 2, 4) for kind in ("jpg", "json")]
        assert json.load(tar.extractfile(f"{keys[2]}.json"))["source"] == "a"  # type: ignore[arg-type]
    assert verify(url, "all", STORAGE, workers=1).findings == []


def test_remove__says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing says"):
        remove(str(folder), RemoveConfig(reason="x"), STORAGE)
    with pytest.raises(ConfigError, match="from all versions"):
        remove(f"{folder}/manifest-v0001.json", RemoveConfig(source="a"), STORAGE)
    with pytest.raises(DataError, match="no crop of the data set is meant"):
        remove(str(folder), RemoveConfig(source="d"), STORAGE)
    tar = folder / Manifest.load(str(folder)).shards[2].name
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="not the one that was written") as caught:
        remove(str(folder), RemoveConfig(source="c", workers=1), STORAGE)
    assert caught.value.where == str(tar)
    assert len(list(folder.glob("manifest-*"))) == 1 and not list(folder.glob("removals/*"))


def test_remove__keeps_another_removal_away_until_it_has_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("datapipe.maintain.remove.write_record", broken)
        with pytest.raises(StorageError, match="full"):
            remove(str(folder), RemoveConfig(source="c", workers=1), STORAGE)
    with pytest.raises(DataError, match="another removal or repair was begun"):
        remove(str(folder), RemoveConfig(source="b", workers=1), STORAGE)
    assert remove(str(folder), RemoveConfig(source="c", workers=1), STORAGE).crops == 10
    assert remove(str(folder), RemoveConfig(source="b", workers=1), STORAGE).crops == 10
    assert {row["source"] for row in everything(str(folder))} == {"a"}
