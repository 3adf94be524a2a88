"""A folder belongs to one request, also where two come at the same moment."""

import json
from pathlib import Path

import pytest

from datapipe.core.errors import DataError
from datapipe.ingest.ownership import claim_output, is_written, owns_output
from datapipe.storage import Data, open_store
from datapipe.storage.local import LocalStore

REQUESTS = [b'{"settings": {"seed": %d}, "sources": {"a": "1"}, "licence": ""}' % seed for seed in range(2)]


class Raced(LocalStore):
    """Somebody else's claim arrives between the look and the write."""

    def create(self, name: str, data: Data) -> bool:
        claim_output(open_store(self.url), REQUESTS[1])
        return super().create(name, data)


class Twin(LocalStore):
    """A run of the same request, and then one of another, arrive between the look and the write."""

    def create(self, name: str, data: Data) -> bool:
        super().create(name, REQUESTS[0])
        super().create("requests/0123456789abcdef.json", REQUESTS[1])
        return super().create(name, data)


def test_claim__is_kept_for_all_runs_of_a_request(tmp_path: Path) -> None:
    store = open_store(f"{tmp_path}/out")
    assert not owns_output(store, REQUESTS[0])
    for _ in range(2):
        claim_output(store, REQUESTS[0])
        assert owns_output(store, REQUESTS[0])
    with pytest.raises(DataError, match="seed is 0 there and 1 here"):
        claim_output(store, REQUESTS[1])
    assert len(list(store.list("requests/"))) == 1


def test_claim__withdraws_where_another_came_at_the_same_moment(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="seed is 1 there and 0 here"):
        claim_output(Raced(f"{tmp_path}/out"), REQUESTS[0])
    assert owns_output(open_store(f"{tmp_path}/out"), REQUESTS[1])


def test_claim__of_another_run_of_the_same_request_stays(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="seed is 1 there and 0 here"):
        claim_output(Twin(f"{tmp_path}/out"), REQUESTS[0])
    assert len(list(open_store(f"{tmp_path}/out").list("requests/"))) == 2


def test_claim__refuses_a_folder_with_a_manifest_of_nobody(tmp_path: Path) -> None:
    (tmp_path / "manifest-v0001.json").write_text("{}")
    with pytest.raises(DataError, match="another data set is already there"):
        owns_output(open_store(str(tmp_path)), REQUESTS[0])


def test_claim__that_cannot_be_read_is_anothers(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.replace("requests/0123456789abcdef.json", b"cut")
    with pytest.raises(DataError, match="cannot be read"):
        owns_output(store, REQUESTS[0])


def of_rules(version: int | None) -> bytes:
    settings = {"seed": 0} | ({"screening_rules": version} if version else {})
    return json.dumps({"settings": settings, "sources": {"a": "1"}, "licence": ""}).encode()


@pytest.mark.parametrize("before", [None, 1])
def test_claim__of_other_screening_rules_is_refused_until_it_is_finished(
    tmp_path: Path, before: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(f"{tmp_path}/out")
    claim_output(store, of_rules(before))
    with pytest.raises(DataError, match="screening_rules is 1 there and 2 here"):
        is_written(store, of_rules(2), store.url)
    (tmp_path / "out" / "manifest-v0001.json").write_text("{}")
    assert is_written(store, of_rules(2), store.url)
    assert "version 1 of the screening rules, this is version 2" in caplog.text
    with pytest.raises(DataError, match="seed is 0 there and 1 here"):
        is_written(store, of_rules(2).replace(b'"seed": 0', b'"seed": 1'), store.url)
