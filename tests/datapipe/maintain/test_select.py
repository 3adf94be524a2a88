"""A selection holds exactly the crops that meet the criteria, reads as such, and touches no tar."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from datapipe.core.config import SelectConfig, ShardConfig, StorageConfig, StreamConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.dataset.index import INDEX
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.packed_index import packed_entries
from datapipe.dataset.where_clause import Expression
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.select import first_of_each, select
from datapipe.storage import open_store
from datapipe.stream.stream import Stream
from tests.conftest import S3Server

STORAGE = StorageConfig()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_crops: Callable[..., dict[str, bytes]]) -> Path:
    """60 crops of two sources in five shards: the same file names in both, other pictures."""
    folder = tmp_path_factory.mktemp("select")
    write_crops(folder / "a", 40)
    write_crops(folder / "b", 20, seed=1)
    ingest([f"{folder}/a", f"{folder}/b"], f"{folder}/set", ShardConfig(samples_per_shard=13, workers=1), STORAGE)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of that data set, with links to its tars."""
    for path in (made / "set").rglob("*"):
        if path.is_file():
            copy = tmp_path / "set" / path.relative_to(made / "set")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.hardlink_to(path)
    return tmp_path / "set"


def rows_of(manifest: Manifest) -> list[dict[str, Any]]:
    return manifest.table([*INDEX.names, "shard"]).to_pylist()


def chosen(folder: Path, **criteria: Any) -> list[dict[str, Any]]:
    return rows_of(select(str(folder), SelectConfig(**criteria), STORAGE).manifest)


def test_select__where__gives_these_crops_in_the_order_of_the_set(folder: Path) -> None:
    everything = rows_of(Manifest.load(str(folder)))
    found = chosen(folder, where='height >= 100 and source == "a"')
    assert found == [row for row in everything if row["height"] >= 100 and row["source"] == "a"]
    assert 0 < len(found) < 40 and {row["shard"] for row in found} == set(range(5))


def test_select__is_a_new_version_and_no_tar_changes(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    first = Manifest.load(str(folder))
    made = select(str(folder), SelectConfig(fraction=0.25), STORAGE).manifest
    assert (made.rows, made.stored_rows, made.version, made.parent, made.derived_by) == (15, 60, 2, first.id, "select")
    assert made.shards == first.shards and made.replaces == () and made.id[:8] in made.file
    new = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path not in before)
    (packed,) = (entry.name for entry in packed_entries(open_store(str(folder)), made))
    assert new == sorted([made.file, made.selection.file, packed])  # type: ignore[union-attr]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert Manifest.load(str(folder)) == made and Manifest.load(f"{folder}/{first.file}") == first


def test_select__again_makes_no_other_version(folder: Path) -> None:
    one = select(str(folder), SelectConfig(fraction=0.25), STORAGE).manifest
    other = select(str(folder), SelectConfig(fraction=0.5), STORAGE).manifest
    assert select(str(folder), SelectConfig(fraction=0.25), STORAGE).manifest == one
    assert (one.version, other.version, len(list(Manifest.versions(open_store(str(folder)))))) == (2, 3, 3)


@pytest.mark.parametrize("seed", [0, 5])
def test_select__a_smaller_fraction_is_part_of_a_larger_one(folder: Path, seed: int) -> None:
    sets = [{row["key"] for row in chosen(folder, fraction=share, seed=seed)} for share in (0.05, 0.3, 0.5, 0.9)]
    assert [len(found) for found in sets] == [3, 18, 30, 54]
    assert sets[0] < sets[1] < sets[2] < sets[3]


def test_select__a_fraction_with_the_seed_of_the_set_is_its_first_shards(folder: Path) -> None:
    everything = rows_of(Manifest.load(str(folder)))
    assert chosen(folder, fraction=0.3) == everything[:18]
    assert chosen(folder, fraction=0.3, seed=5) != everything[:18]


def test_select__of_a_folder_starts_with_all_crops_and_of_a_file_with_those(folder: Path) -> None:
    half = select(str(folder), SelectConfig(where='source == "a"'), STORAGE).manifest
    assert len(chosen(folder, where="camera == 1")) == 30
    within = select(f"{folder}/{half.file}", SelectConfig(where="camera == 1"), STORAGE).manifest
    assert within.parent == half.id
    assert [(row["source"], row["camera"]) for row in rows_of(within)] == [("a", 1)] * 20


@pytest.mark.slow
def test_select__stream_gives_the_bytes_of_the_selected_crops(folder: Path, made: Path, s3: S3Server) -> None:
    bucket = s3.bucket()
    for path in folder.rglob("*"):
        if path.is_file():
            s3.client.upload_file(str(path), bucket, f"set/{path.relative_to(folder)}")
    for url in (str(folder), f"s3://{bucket}/set"):
        selected = select(url, SelectConfig(where="height < 90"), s3.storage).manifest
        for config in (StreamConfig(block=4), StreamConfig(cache_mb=0, cache_gb=0)):
            stream = Stream(Manifest.load(url, s3.storage), s3.storage, config)
            assert stream.rows == selected.rows and 10 < stream.rows < 50
            data = stream.fetch(np.arange(stream.rows)).data
            stream.close()
            rows = selected.table(["source", "name", "pid"], s3.storage).to_pylist()
            assert data == [(made / row["source"] / row["name"]).read_bytes() for row in rows]
            assert stream.pid.tolist() == [row["pid"] for row in rows] and stream.replaced == 0


def test_select__by_keys__as_text_and_as_parquet(folder: Path, tmp_path: Path) -> None:
    keys = [row["key"] for row in rows_of(Manifest.load(str(folder)))][5:50:7]
    (tmp_path / "keys.txt").write_text("\r\n".join(reversed(keys)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"key": keys}), tmp_path / "keys.parquet")
    for file in ("keys.txt", "keys.parquet"):
        assert [row["key"] for row in chosen(folder, keys=str(tmp_path / file))] == keys


def test_select__ranking__keeps_the_best_of_a_pickled_list(folder: Path, tmp_path: Path) -> None:
    """As TransReID-SSL has it: names relative to the folder of images, best first, the first share of the list."""
    ranking = sorted(
        (row["name"] for row in rows_of(Manifest.load(str(folder))) if row["source"] == "a"),
        key=lambda name: name[::-1],
    )
    (tmp_path / "CFS_list.pkl").write_bytes(pickle.dumps(ranking))
    (tmp_path / "list.txt").write_text("\n".join(f"images/{name.removesuffix('.jpg')}.png" for name in ranking))
    for file in ("CFS_list.pkl", "list.txt"):
        found = chosen(folder, names=str(tmp_path / file), keep=0.6, where='source == "a"')
        assert {row["name"] for row in found} == set(ranking[:24])
    with pytest.raises(DataError, match=r"\d+ listed names fit more than one crop"):
        chosen(folder, names=str(tmp_path / "CFS_list.pkl"))


def test_select__ranking__counts_what_is_missing_and_refuses_too_much(folder: Path, tmp_path: Path) -> None:
    names = [row["name"] for row in rows_of(Manifest.load(str(folder))) if row["source"] == "a"]
    (tmp_path / "list.txt").write_text("\n".join([*names, "gone/1.jpg", "gone/2.jpg"]))
    criteria = {"names": str(tmp_path / "list.txt"), "where": 'source == "a"'}
    with pytest.raises(DataError, match=r"2 of the 42 listed crops are not in the data set, for example gone/1.jpg"):
        chosen(folder, **criteria)
    made = select(str(folder), SelectConfig(**criteria, max_missing=0.05), STORAGE)
    assert (made.missing, made.manifest.rows) == (2, 40)
    assert made.steps == (("crops", 60), ("--where", 40), ("--names", 40))


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_select__a_pickle_that_would_run_something_is_refused(folder: Path, tmp_path: Path) -> None:
    for number, bad in enumerate((_Trap(tmp_path / "ran"), ["a", _Trap(tmp_path / "ran")], {"a": 1}, [1, 2], "text")):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(bad))
        with pytest.raises(DataError, match="no plain list of names"):
            chosen(folder, names=str(path))
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(["a"])[:-3])
    with pytest.raises(DataError, match="no plain list of names"):
        chosen(folder, names=str(tmp_path / "cut.pkl"))
    assert not (tmp_path / "ran").exists()


def test_select__says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no criterion"):
        chosen(folder, keep=0.5)
    with pytest.raises(DataError, match="no crop meets all criteria") as caught:
        chosen(folder, where="height > 1000")
    assert caught.value.hint == "crops: 60; --where: 0"
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="the list is empty"):
        chosen(folder, keys=str(tmp_path / "empty.txt"))
    assert len(list(folder.glob("manifest-*"))) == 1


def test_load__names_a_selection_that_changed(folder: Path) -> None:
    made = select(str(folder), SelectConfig(fraction=0.5), STORAGE).manifest
    assert made.selection
    path = folder / made.selection.file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="selection of this version is not the one that was written") as caught:
        made.table(["key"])
    assert caught.value.where == str(path)
    assert select(str(folder), SelectConfig(fraction=0.5), STORAGE).manifest == made
    assert made.table(["key"]).num_rows == 30
    path.unlink()
    with pytest.raises(DataError, match="selection of this version is missing"):
        made.table(["key"])


def test_first_of_each__keeps_the_first_that_is_left() -> None:
    table = pyarrow.table({"key": list("abcdef"), "duplicate_of": [None, "a", "a", None, "d", "a"]})
    assert first_of_each(table, np.arange(6), "duplicate_of").tolist() == [0, 3]
    assert first_of_each(table, np.array([2, 4, 5]), "duplicate_of").tolist() == [2, 4]


TABLE = pyarrow.table(
    {
        "height": pyarrow.array([100, 200, 300], pyarrow.int32()),
        "width": pyarrow.array([50, 60, 70], pyarrow.int32()),
        "source": ["a", "b", "c"],
        "near_of": ["x", None, None],
        "pid": pyarrow.array([-1, 2, 3], pyarrow.int32()),
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('height >= 128 and source == "b"', [1]),
        ("2 < height / width < 4", [1]),
        ("near_of == null", [1, 2]),
        ("near_of != null or pid in [3]", [0, 2]),
        ("not near_of == 'x'", [1, 2]),
        ("near_of != 'x'", []),
        ("pid not in (-1, 2)", [2]),
        ("pid == -1", [0]),
        ("height > width * 4 - 10", [2]),
        ("(pid > 0) == true", None),
    ],
    ids=str,
)
def test_where__means_what_it_says(text: str, rows: list[int] | None) -> None:
    if rows is None:
        with pytest.raises(ConfigError):
            Expression(text, TABLE.column_names).holds(TABLE)
    else:
        assert np.flatnonzero(Expression(text, TABLE.column_names).holds(TABLE)).tolist() == rows


@pytest.mark.parametrize(
    "text",
    [
        "height",
        "height + 1",
        "height >",
        "",
        "colour == 1",
        "__import__('os')",
        "source.upper() == 'A'",
        "height[0] == 1",
        "[row for row in source]",
        "lambda: height",
        "height in ['x']",
        "height in [width]",
        "'a' in source",
        "1 < 2",
        "height == source",
        "source == 1",
        "height ** 99 ** 99 == 1",
        f"{'(' * 500}height == 1{')' * 500}",
        "not " * 5_000 + "pid == 1",
        "height == 1; pid == 1",
        "f'{height}' == '1'",
        "(height := 1) == 1",
    ],
    ids=range(22),
)
def test_where__runs_nothing_and_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(ConfigError, match="the condition"):
        Expression(text, TABLE.column_names).holds(TABLE)
