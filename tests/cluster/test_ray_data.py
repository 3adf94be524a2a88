"""Ray Data's own reader takes our tars: the same keys and bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.core.session import LOCAL, ray_session
from tests.end_to_end.tiny import shards


@pytest.mark.slow
def test_ray_data__reads_our_tars(tmp_path: Path, write_crops: Callable[..., dict[str, bytes]]) -> None:
    crops = write_crops(tmp_path / "crops", 40)
    made = shards(tmp_path / "crops", str(tmp_path / "set"))
    tars = [str(tmp_path / "set" / shard.name) for shard in made.shards]
    keys = made.table(["key"])["key"].to_pylist()
    with ray_session(LOCAL, cpus=1):
        import ray.data

        found = ray.data.read_webdataset(tars, decoder=None).take_all()
    assert [sample["__key__"] for sample in found] == keys
    assert sorted(sample["jpg"] for sample in found) == sorted(crops.values())
