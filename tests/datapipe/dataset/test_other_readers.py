"""Our tars are plain WebDataset: Hugging Face's `datasets` streams the same keys and bytes from them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before datasets is imported: nothing is wanted of the network

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.tiny import shards


@pytest.mark.slow
def test_huggingface__streams_our_tars(
    tmp_path: Path, write_crops: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    crops = write_crops(tmp_path / "crops", 40)
    made = shards(tmp_path / "crops", str(tmp_path / "set"))
    tars = [str(tmp_path / "set" / shard.name) for shard in made.shards]
    read = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    read = read.cast_column("jpg", datasets.Image(decode=False))
    found = {sample["__key__"]: sample["jpg"]["bytes"] for sample in read}
    index = made.table(["key", "name"]).to_pydict()
    assert list(found) == index["key"]
    assert dict(zip(index["name"], found.values(), strict=True)) == crops
    pictures = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    assert next(iter(pictures))["jpg"].mode == "RGB"
