"""A removed crop leaves the copies in run folders and caches as well; what may still name it is listed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datapipe.commands.maintain import remove as command
from datapipe.core.config import RemoveConfig, ShardConfig, StorageConfig, StreamConfig
from datapipe.core.errors import DataError, StorageError
from datapipe.dataset.manifest import Manifest
from datapipe.ingest.pipeline import ingest
from datapipe.maintain import remove as removal
from datapipe.maintain.remove import remove
from datapipe.storage import open_store
from datapipe.storage.local import LocalStore
from datapipe.stream.disk_cache import DiskCache
from datapipe.stream.stream import Stream
from tests.conftest import S3Server

STORAGE = StorageConfig()
PIXELS = (
    "first_batch.jpg",
    "report.html",
    "faults/step_0000007_rank_00.npz",
    "evaluation/market/step_0000007/ranked_best.jpg",
    "evaluation/market/step_0000007/ranked_mistake_1.jpg",
)
STAYING = {
    "config.toml": "x = 1\n",
    "log.txt": "all is well\n",
    "faults/steps.jsonl": '{"step": 7}\n',
    "checkpoints/step_0000007/rank_00000.x.safetensors": "weights",
    "metrics/attempt_001.jsonl": '{"attempt": 1}\n',
}


@pytest.fixture
def folder(tmp_path: Path, write_crops: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 12 crops in three shards, on a machine whose cache is its own."""
    write_crops(tmp_path / "crops", 12)
    ingest([f"{tmp_path}/crops"], f"{tmp_path}/set", ShardConfig(samples_per_shard=4, workers=1), STORAGE)
    monkeypatch.setattr(removal, "default_folder", lambda: f"{tmp_path}/own-cache")
    return tmp_path / "set"


def run_folder(folder: Path, **more: str) -> Path:
    for name, text in {**dict.fromkeys(PIXELS, "pixels"), **STAYING, **more}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def first(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = Manifest.load(str(folder)).table(["key", "name"]).slice(0, 1).to_pylist()[0]
    return row


def take_out(folder: Path, *runs: str, name: str = "", storage: StorageConfig = STORAGE) -> removal.Removed:
    (folder.parent / "list").write_text(f"{name or first(folder)['name']}\n")
    return remove(str(folder), RemoveConfig(names=f"{folder.parent}/list", runs=runs, workers=1), storage)


@pytest.mark.parametrize("place", ["", "runs", "runs/deep/er"], ids=["a run", "a folder of runs", "a tree"])
def test_runs__lose_every_picture_and_keep_everything_else(folder: Path, tmp_path: Path, place: str) -> None:
    root = tmp_path / (place or "run")
    run = run_folder(root / "one" if place else root)
    pointed = tmp_path / (place.split("/")[0] or "run")
    done = take_out(folder, str(pointed))
    assert files(run) == set(STAYING)
    assert done.cleared.deleted == sorted(str(run / name) for name in PIXELS)
    assert done.cleared.weights == [str(run)] and not done.cleared.failed and not done.cleared.remaining


@pytest.mark.slow
def test_runs__on_an_object_store(folder: Path, tmp_path: Path, s3: S3Server) -> None:
    bucket, run = s3.bucket(), run_folder(tmp_path / "run")
    for name in files(run):
        s3.client.upload_file(str(run / name), bucket, f"runs/one/{name}")
    done = take_out(folder, f"s3://{bucket}/runs", storage=s3.storage)
    assert set(s3.objects(bucket)) == {f"runs/one/{name}" for name in STAYING}
    assert len(done.cleared.deleted) == len(PIXELS)


def test_runs__what_names_a_removed_crop_is_listed(folder: Path, tmp_path: Path) -> None:
    gone = first(folder)
    run = run_folder(tmp_path / "run", **{
        "log.txt": f"one\nlooked at /data/{gone['name']}, then went on\n",
        "evaluation/market/step_0000007/queries.csv": f"query,AP\n{gone['name']},.5\n",
        "evaluation/market/step_0000007/metrics.json": json.dumps({"ranked": {"best": {"query": f"q/{gone['name']}"}}}),
        "ranks/rank_00.json": json.dumps({"key": gone["key"]}),
        "mine.png": "a picture",
    })  # fmt: skip
    remaining = take_out(folder, str(run)).cleared.remaining
    assert remaining == [
        f"{run}/evaluation/market/step_0000007/metrics.json: line 1 names a removed crop",
        f"{run}/evaluation/market/step_0000007/queries.csv: line 2 names a removed crop",
        f"{run}/log.txt: line 2 names a removed crop",
        f"{run}/mine.png: no command of this project is known to have made it; look into it",
        f"{run}/ranks/rank_00.json: line 1 names a removed crop",
    ]


@pytest.mark.slow
def test_cache__loses_the_blocks_of_shards_that_lost_crops_and_no_others(
    folder: Path, tmp_path: Path, s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = s3.bucket()
    for path in folder.rglob("*.*"):
        s3.client.upload_file(str(path), bucket, f"set/{path.relative_to(folder)}")
    url, node, own = f"s3://{bucket}/set", tmp_path / "node", tmp_path / "own-cache"
    manifest = Manifest.load(url, s3.storage)
    for place in (node, own):
        stream = Stream(manifest, s3.storage, StreamConfig(cache_mb=0, cache_dir=str(place), block=2))
        stream.fetch(np.arange(stream.rows))
        stream.close()
    changed = manifest.shards[0].sha256
    half = node / f"{changed}-0123456789abcdef.part"
    half.write_bytes(b"half a block")
    blocks = {path.name for path in node.iterdir() if "-" in path.name}
    assert len([name for name in blocks if name.startswith(changed)]) == 3
    (tmp_path / "list").write_text(manifest.table(["key"], s3.storage)["key"][0].as_py())
    words = [url, "--keys", str(tmp_path / "list"), "--runs", str(node), "--workers", "1"]
    assert command([*words, "--storage.endpoint-url", s3.storage.endpoint_url]) == 0
    for place in (node, own):
        left = {path.name for path in place.iterdir() if "-" in path.name}
        assert left == {name for name in blocks if not name.startswith(changed)}
    assert "dropped 5 blocks from caches" in capsys.readouterr().out
    DiskCache(str(node), 10**9).drop([])


def test_runs__name_caches_that_are_cleared_too_or_listed(folder: Path, tmp_path: Path) -> None:
    changed = Manifest.load(str(folder)).shards[0].sha256
    block = tmp_path / "cache" / f"{changed}-0123456789abcdef"
    block.parent.mkdir()
    block.write_bytes(b"block")
    recipe = '[stream]\ncache_dir = "{}"\n'
    run_folder(tmp_path / "runs" / "one", **{"config.toml": recipe.format(block.parent)})
    run_folder(tmp_path / "runs" / "two", **{"config.toml": recipe.format("/nowhere/here")})
    cleared = take_out(folder, str(tmp_path / "runs")).cleared
    assert not block.exists() and cleared.blocks == 1
    assert cleared.remaining == [
        "/nowhere/here: blocks on other machines, if the run had any; give the folder with --runs there"
    ]


def test_runs__given_again_or_later_are_cleared_too(folder: Path, tmp_path: Path) -> None:
    """A removal that has ended, with the same list, and with a list of crops that were all removed before."""
    row = first(folder)
    assert take_out(folder).crops == 1
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two", **{"log.txt": f"{row['name']}\n"})
    done = take_out(folder, str(one), name=row["name"])
    assert done.found_complete and files(one) == set(STAYING)
    (tmp_path / "keys").write_text(f"{row['key']}\n")
    again = remove(str(folder), RemoveConfig(keys=f"{tmp_path}/keys", runs=(str(two),), workers=1), STORAGE)
    assert again.found_complete and (again.crops, again.lists.before) == (0, 1) and files(two) == set(STAYING)
    assert take_out(folder, str(two), name=row["name"]).cleared.remaining == [
        f"{two}/log.txt: line 1 names a removed crop"
    ]
    assert Manifest.load(str(folder)).version == 2


def test_runs__killed_in_between__the_same_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, name = run_folder(tmp_path / "run"), first(folder)["name"]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(removal, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            take_out(folder, str(run), name=name)
    run_folder(run)
    done = take_out(folder, str(run), name=name)
    assert (done.crops, done.found_complete) == (1, False) and files(run) == set(STAYING)


def test_runs__that_cannot_be_cleared__are_told_and_the_others_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, delete = run_folder(tmp_path / "run"), LocalStore.delete

    def refused(self: LocalStore, name: str) -> None:
        if name == "first_batch.jpg":
            raise StorageError("the file system refused: no")
        delete(self, name)

    monkeypatch.setattr(LocalStore, "delete", refused)
    (tmp_path / "list").write_text(first(folder)["name"])
    words = [str(folder), "--names", f"{tmp_path}/list", "--runs", str(run), "--workers", "1"]
    assert command(words) == 1
    assert f"could not be deleted: {run}/first_batch.jpg: the file system refused: no" in capsys.readouterr().out
    assert files(run) == {*STAYING, "first_batch.jpg"}


def test_runs__that_are_none_are_refused_before_anything_is_removed(folder: Path, tmp_path: Path, s3: S3Server) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.pdf").write_text("mine")
    for url in (str(tmp_path / "misspelt"), str(tmp_path / "other"), f"s3://{s3.bucket()}/nothing"):
        with pytest.raises(DataError, match="nothing to clear|no run folder") as caught:
            take_out(folder, url, storage=s3.storage)
        assert caught.value.where == url
    assert Manifest.load(str(folder)).version == 1 and not (folder / "removals").exists()


def test_runs__pictures_outside_of_run_folders_stay(folder: Path, tmp_path: Path) -> None:
    """`--runs` may point at a folder that holds more than runs."""
    home = tmp_path / "home"
    run_folder(home / "run")
    (home / "paper").mkdir()
    (home / "paper" / "report.html").write_text("mine")
    (home / "paper" / "first_batch.jpg").write_text("mine")
    done = take_out(folder, str(home))
    assert files(home / "paper") == {"report.html", "first_batch.jpg"}
    assert [what.partition(": ")[0] for what in done.cleared.remaining] == [
        f"{home}/paper/first_batch.jpg", f"{home}/paper/report.html"
    ]  # fmt: skip


def test_remove__lists_leftovers_of_killed_commands(folder: Path) -> None:
    (folder / ".spool").mkdir()
    (folder / ".spool" / "x-000.crops").write_bytes(b"crops")
    (folder / "shards" / ".x.tar.0123.part").write_bytes(b"half a tar")
    remaining = take_out(folder).cleared.remaining
    assert remaining == [
        f"{folder}/.spool: 1 files of a `shard` that has not ended",
        f"{folder}/shards/.x.tar.0123.part: half-written by a command that was killed",
    ]


def test_remove__quarantine_forgets_removed_crops(tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]) -> None:
    write_crops(tmp_path / "a", 8)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "a" / "other.jpg").write_bytes(b"no image")
    config = ShardConfig(exclude="exact", max_bad=1, workers=1)
    ingest([f"{tmp_path}/a", f"{tmp_path}/b"], f"{tmp_path}/set", config, STORAGE)
    store = open_store(f"{tmp_path}/set")
    before = removal._quarantined(store, "").to_pylist()
    assert len(before) == 10
    row = Manifest.load(store.url).table(["key", "name", "source"]).to_pylist()[0]
    (tmp_path / "list").write_text(f"{row['name']}\nbroken.jpg\n")
    done = remove(store.url, RemoveConfig(names=f"{tmp_path}/list", workers=1), STORAGE)
    assert (done.crops, done.lists.before, done.lists.missing_count) == (1, 1, 0)
    left = [entry for entry in before if entry["detail"] != row["key"] and entry["name"] != "broken.jpg"]
    assert removal._quarantined(store, "").to_pylist() == left and len(left) == 8
