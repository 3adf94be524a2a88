"""Kill -9 at any moment of `reshard` and `remove`: run again they end with the bytes of a run that nobody disturbed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from datapipe.core.config import RemoveConfig, ReshardConfig, SelectConfig, ShardConfig, StorageConfig
from datapipe.dataset.manifest import Manifest
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.remove import remove
from datapipe.maintain.reshard import reshard
from datapipe.maintain.select import select
from tests.conftest import S3Server
from tests.support.killing import FEW, Job, kill_evenly, local_objects, s3_objects

FIRST = "manifest-v0001.json"
RESHARD = ReshardConfig(samples_per_shard=5, workers=1)
STORAGE = StorageConfig()

Objects = dict[str, bytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_crops: Callable[..., Objects]) -> Path:
    """Two data sets in 11 shards with ten pictures in both; the first has a selection. And a list of names: `gone`."""
    folder = tmp_path_factory.mktemp("killed")
    names = list(write_crops(folder / "a", 30))
    write_crops(folder / "b", 10)
    for name, each in (("a", 4), ("b", 4)):
        ingest([f"{folder}/{name}"], f"{folder}/{name}_set", ShardConfig(samples_per_shard=each, workers=1), STORAGE)
    select(f"{folder}/a_set", SelectConfig(where="camera == 1"), STORAGE)
    (folder / "gone").write_text("\n".join(names[::5]))
    return folder


def upload(s3: S3Server, bucket: str, folder: Path, prefix: str) -> None:
    for name, data in local_objects(folder).items():
        s3.client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)


@pytest.mark.slow
def test_reshard__killed_at_any_moment_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    def make(name: str) -> Job:
        out = tmp_path / name
        return Job(
            reshard,
            ([f"{folder}/a_set", f"{folder}/b_set"], str(out), RESHARD, STORAGE),
            lambda: local_objects(out, ".spool"),
            out.exists,
            (out / FIRST).exists,
        )

    kill_evenly(make)


@pytest.mark.slow
def test_reshard__killed_on_s3_ends_with_the_same_bytes(folder: Path, tmp_path: Path, s3: S3Server) -> None:
    bucket = s3.bucket()
    upload(s3, bucket, folder / "b_set", "b_set")

    def keys(prefix: str) -> bool:
        return bool(s3.client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("KeyCount"))

    def make(name: str) -> Job:
        config = ReshardConfig(samples_per_shard=3, workers=1, spool=f"{tmp_path}/{name}")
        return Job(
            reshard,
            ([f"s3://{bucket}/b_set"], f"s3://{bucket}/{name}", config, s3.storage),
            lambda: s3_objects(s3, bucket, f"{name}/"),
            lambda: keys(f"{name}/"),
            lambda: keys(f"{name}/{FIRST}"),
        )

    kill_evenly(make, FEW)


def without_what_is_to_go(found: Objects, before: Objects) -> Objects:
    """While a removal is under way: what it has made so far. The old objects are what they were or gone."""
    if not any(name.startswith("removals/begun-") for name in found):
        return found
    assert all(before[name] == data for name, data in found.items() if name in before)
    manifests = {name: data for name, data in before.items() if name.startswith("manifest-")}
    return {
        name: data for name, data in found.items() if name not in before and not name.startswith("removals/begun-")
    } | manifests


@pytest.mark.slow
def test_remove__killed_at_any_moment_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    before = local_objects(folder / "a_set")
    config = RemoveConfig(names=f"{folder}/gone", reason="asked for", workers=1)

    def make(name: str) -> Job:
        out = tmp_path / name
        shutil.copytree(folder / "a_set", out)
        removals = out / "removals"
        return Job(
            remove,
            (str(out), config, STORAGE),
            lambda: without_what_is_to_go(local_objects(out), before),
            lambda: any([*removals.glob("begun-*"), *removals.glob("*.json")]),  # the folder is there before
            lambda: [path.name[:5] for path in removals.glob("*.json")] != [] and not list(removals.glob("begun-*")),
        )

    assert kill_evenly(make)
    manifest = Manifest.load(str(tmp_path / "undisturbed"))
    assert manifest.removed == 6 and len(list((tmp_path / "undisturbed").glob("manifest-*"))) == 4


@pytest.mark.slow
def test_remove__killed_on_s3_ends_with_the_same_bytes(folder: Path, s3: S3Server) -> None:
    bucket = s3.bucket()
    before = local_objects(folder / "b_set")
    config = RemoveConfig(names=f"{folder}/gone", max_missing=0.7, reason="asked for", workers=1)  # 2 of 6 are in it

    def names(prefix: str) -> list[str]:
        found = s3.client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/removals/").get("Contents", ())
        return [item["Key"].rpartition("/")[2] for item in found]

    def make(name: str) -> Job:
        upload(s3, bucket, folder / "b_set", name)
        return Job(
            remove,
            (f"s3://{bucket}/{name}", config, s3.storage),
            lambda: without_what_is_to_go(s3_objects(s3, bucket, f"{name}/"), before),
            lambda: bool(names(name)),
            lambda: len(found := names(name)) == 1 and not found[0].startswith("begun-"),
        )

    kill_evenly(make, FEW)
