"""A rank's file is written once all that a GPU copies into it has arrived."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from datapipe.storage import open_store
from training.checkpoint.async_save import write_part
from training.checkpoint.snapshot import Snapshots
from training.engine.state_fragments import whole


def test_part__is_read_when_its_copies_have_arrived(tmp_path: Path) -> None:
    values = torch.arange(1_000.0)
    snapshot = Snapshots(torch.device("cpu")).take([whole("model/w", torch.zeros(1_000))])
    (place,) = snapshot.places

    class Late:
        """An event behind a copy that takes its time."""

        def synchronize(self) -> None:
            snapshot.content[place.offset : place.offset + place.bytes] = memoryview(values.numpy()).cast("B")

    late: Any = Late()
    written = write_part(open_store(str(tmp_path)), "step_0000001", 0, "a", replace(snapshot, arrived=late))
    data = (tmp_path / "step_0000001" / written.file.name).read_bytes()
    assert torch.equal(safetensors.torch.load(data)["model/w"], values)
    assert written.file.sha256 == hashlib.sha256(data).hexdigest()
