"""Kill -9 at any moment of an ingestion: started again it ends with the bytes of a run that nobody disturbed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.ingest import scan, work_units
from datapipe.ingest.pipeline import ingest
from tests.conftest import CREDENTIALS, S3Server
from tests.support.killing import FEW, Job, kill_evenly, local_objects, s3_objects

WriteCrops = Callable[..., dict[str, bytes]]
FIRST = "manifest-v0001.json"


def run(sources: list[str], out: str, config: ShardConfig, storage: StorageConfig) -> None:
    """In the process that is killed. Many parts, so that many moments lie within the scan."""
    os.environ.update(CREDENTIALS)
    work_units.PART_BYTES, scan.SEGMENT_BYTES = 16_000, 9_000
    ingest(sources, out, config, storage)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, write_crops: WriteCrops) -> list[str]:
    folder = tmp_path_factory.mktemp("sources")
    write_crops(folder / "one", 24)
    copies = write_crops(folder / "two", 8, seed=1)
    for name, data in list(copies.items())[:3]:
        (folder / "two" / f"again-{name}").write_bytes(data)
    (folder / "two" / "broken.jpg").write_bytes(b"no image")
    return [str(folder / "one"), str(folder / "two")]


@pytest.mark.slow
def test_ingest__killed_at_any_moment_ends_with_the_same_bytes(sources: list[str], tmp_path: Path) -> None:
    def make(name: str) -> Job:
        out = tmp_path / name
        config = ShardConfig(samples_per_shard=8, workers=1, max_bad=0.5, exclude="exact")
        return Job(
            run,
            (sources, str(out), config, StorageConfig()),
            lambda: local_objects(out, ".spool"),
            out.exists,
            (out / FIRST).exists,
        )

    kill_evenly(make)


@pytest.mark.slow
def test_ingest__killed_on_s3_ends_with_the_same_bytes(sources: list[str], tmp_path: Path, s3: S3Server) -> None:
    """The spool is there, too, as for many machines."""
    bucket = s3.bucket()

    def keys(prefix: str) -> bool:
        return bool(s3.client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("KeyCount"))

    def make(name: str) -> Job:
        out, spool = f"{name}/set", f"{name}/spool"
        config = ShardConfig(samples_per_shard=6, workers=1, max_bad=0.5, spool=f"s3://{bucket}/{spool}")
        return Job(
            run,
            (sources[1:], f"s3://{bucket}/{out}", config, s3.storage),
            lambda: s3_objects(s3, bucket, f"{out}/"),
            lambda: keys(f"{name}/"),
            lambda: keys(f"{out}/{FIRST}"),
        )

    kill_evenly(make, FEW)
