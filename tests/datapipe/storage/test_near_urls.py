"""Slips in an address are refused: nothing is written to a local folder called "s3:"."""

from pathlib import Path

import pytest

from datapipe.core.errors import StorageError
from datapipe.storage import full_url, open_store

SLIPS = {
    "s3:/b/x": "s3://b/x", "s3:b/x": "s3://b/x", "s3//b/x": "s3://b/x", "S3://b/x": "s3://b/x", " s3://b/x": "s3://b/x",
    "s3://b/x ": "s3://b/x", "s3:// b/x": "s3://b/x", "s3 ://b/x": "s3://b/x", "s3;//b/x": "s3://b/x",
    "s3.//b/x": "s3://b/x", "s3:\\\\b/x": "s3://b/x", "s3:///b/x": "s3://b/x", "s3://": "s3://bucket/prefix",
    "s3a://b/x": "s3://b/x", "S3A://b/x": "s3a://b/x", "arn:aws:s3:::b/x": "s3://b/x", "gs:/b/x": "gs://b/x",
    "GS://b/x": "gs://b/x", "gs//b/x": "gs://b/x", "https:/h/x": "https://h/x", "HTTP://h/x": "http://h/x",
    "hdfs:/h/x": "hdfs://h/x", "abc:/h/x": "abc://h/x", "file:/x": "file:///x", "://b/x": "s3://b/x",
    "'s3://b/x": "s3://b/x", "C:\\sets\\x": "as this machine sees", "C:/sets/x": "as this machine sees",
}  # fmt: skip


@pytest.mark.parametrize("url", SLIPS)
def test_near_url__is_refused_with_what_was_meant(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for refuses in (full_url, open_store):
        with pytest.raises(StorageError) as raised:
            refuses(url)
        assert raised.value.hint.startswith(SLIPS[url]) or SLIPS[url] in raised.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["s3", "./s3:/x", "s3/x", "/y/s3:/x", "a:b", "s3.local", "gs/x", "file:///x", "~/x",
                                 "x y/z", "file.txt", "s3_data/x", "s3://b/x", "s3://b//x", "memory://x"])  # fmt: skip
def test_plain_url__is_not(url: str) -> None:
    assert full_url(url)
