"""What ranks ask of the data set when they start: the leading one alone reads it, and all have what it read."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.datapipe import crop_set
from tests.end_to_end.tiny import recipe
from tests.support.faulty_proxy import FaultyProxy
from tests.support.ranks import run_ranks
from training.config import recipe_toml as recipes
from training.config.run_config import RunConfig
from training.core.world import World
from training.trainer.pretrain import _plan


def _found(world: World, config: RunConfig) -> tuple[str, str, int]:
    data = _plan(config, world).data
    return data.id, data.sets[0].url, data.rows


@pytest.mark.slow
def test_plan__one_rank_reads_the_data_set_for_all(tmp_path: Path, s3: S3Server) -> None:
    crops, bucket = crop_set.write(tmp_path / "set", 24), s3.bucket()
    for path in crops.folder.iterdir():
        s3.client.upload_file(str(path), bucket, f"set/{path.name}")
    config = recipes.load(str(recipe(tmp_path, "", str(tmp_path / "run"), epochs=1)))
    with FaultyProxy(s3.endpoint) as proxy:
        storage = replace(s3.storage, endpoint_url=proxy.endpoint)
        config = replace(config, storage=storage, stream=replace(config.stream, manifest=f"s3://{bucket}/set"))
        found = run_ranks(3, _found, config)
        assert found == [(crops.manifest.id, f"s3://{bucket}/set", 24)] * 3
        assert sum(count for request, count in proxy.seen.items() if "manifest" in request) == 2  # listed and read
