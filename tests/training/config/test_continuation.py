"""What a start asks of the run folder, on an object store: once, by one rank, and side by side."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.storage import open_store
from tests.conftest import S3Server
from tests.support.faulty_proxy import FaultyProxy
from tests.support.watched_requests import WatchedRequests
from tests.training.checkpoint.toy import ABOUT, saved
from training.config import recipe_toml as recipes
from training.config.continuation import as_begun, look, refuse_changed_data, refuse_changed_settings
from training.config.run_config import RunConfig
from training.core.run_folder.run_folder import RunFolder

CHECKPOINTS = (10, 20, 30)


@pytest.fixture
def config(s3: S3Server) -> RunConfig:
    """Of a run with checkpoints, whose views are cut by the first rule."""
    config = recipes.load("pass_vits", ["--out", f"s3://{s3.bucket()}/run"])
    store = open_store(config.out, s3.storage)
    saved(store.at("checkpoints"), *CHECKPOINTS)
    begun = replace(config, views=replace(config.views, version=1))
    store.replace("config.toml", recipes.to_toml(begun).encode())
    return config


def _data(**changes: Any) -> Any:
    known = {"id": ABOUT["manifest"], "rows": ABOUT["manifest_rows"], "replaces": ()}
    return SimpleNamespace(**known | changes)


def test_look__asks_once_for_all_that_is_checked(s3: S3Server, config: RunConfig) -> None:
    """Listing and recipe together, then the beginnings of the markers, the newest whole."""
    watch = WatchedRequests()
    watch.meet("GET .*(config.toml|list-type)", 2)
    with FaultyProxy(s3.endpoint, before=watch) as proxy:
        before = look(RunFolder(config.out, StorageConfig(endpoint_url=proxy.endpoint, attempts=1)))
        asked = len(watch.made)
        began = as_begun(config, before)
        refuse_changed_settings(began, before)
        refuse_changed_data(before, _data())
        with pytest.raises(ConfigError, match="seed"):
            refuse_changed_settings(replace(began, seed=99), before)
        with pytest.raises(DataError, match="other data"):
            refuse_changed_data(before, _data(id="b" * 64))
        assert len(watch.made) == asked, "what has been read is not read again"
    kept = len(before.names)
    assert began.views.version == 1 and began.stream.assignment_version == config.stream.assignment_version
    assert before.names[-1] == "step_0000030" and kept > 1
    assert watch.count("GET", "list-type") == watch.count("GET", "config.toml") == 1
    assert asked == 2 + kept and watch.most_in_flight >= 2


def test_look__a_damaged_newest_checkpoint_is_left_to_its_reader(s3: S3Server, config: RunConfig) -> None:
    store = open_store(config.out, s3.storage)
    store.replace("checkpoints/step_0000030/checkpoint.json", b'{"step": 30, "broken": ')
    before = look(RunFolder(config.out, s3.storage))
    assert before.names[-1] == "step_0000030"
    refuse_changed_data(before, _data())
    with pytest.raises(DataError, match="other data"):
        refuse_changed_data(before, _data(id="b" * 64))


def test_look__an_empty_folder_has_nothing_to_go_on_with(s3: S3Server) -> None:
    config = recipes.load("pass_vits", ["--out", f"s3://{s3.bucket()}/run"])
    before = look(RunFolder(config.out, s3.storage))
    assert before.names == [] and before.config is None and as_begun(config, before) == config
    refuse_changed_settings(config, before)
    refuse_changed_data(before, _data())
