"""What must hold after any faults: the samples, the weights and the losses of the run that nobody disturbed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datapipe.sampling.epoch_order import Order
from tests.chaos.kinds import BATCH
from tests.chaos.scene import Scene
from tests.end_to_end.tiny import audited, final_state

SEED, BLOCK, WINDOW = 3, 4, 3
"""Of the tiny recipe."""


def fetch(scene: Scene, folder: Path) -> Path:
    """The files of a run folder on object storage, below `folder`; no retries, no cache of ours."""
    assert scene.objects is not None
    bucket, _, prefix = scene.url.removeprefix("s3://").partition("/")
    pages = scene.objects.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    for key in (item["Key"] for page in pages for item in page.get("Contents", ())):
        path = folder / key.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(scene.objects.client.get_object(Bucket=bucket, Key=key)["Body"].read())
    return folder


def wrong_samples(run: Path, rows: int, steps: int) -> dict[int, Any]:
    """The steps whose samples are not those of the order; empty: none was lost or doubled."""
    wanted = Order(rows, SEED, BLOCK, WINDOW).samples(np.arange(steps * BATCH)).reshape(steps, BATCH)
    found = {step: sorted(samples) for step, samples in audited(run).items()}
    enumerated = {step + 1: sorted(row) for step, row in enumerate(wanted.tolist())}
    return {step: (found.get(step), enumerated.get(step)) for step in found.keys() | enumerated.keys()
            if found.get(step) != enumerated.get(step)}  # fmt: skip


def other_weights(run: Path, undisturbed: Path) -> list[str]:
    """Names of the tensors that are not those of the undisturbed run, bit by bit."""
    after, before = final_state(run), final_state(undisturbed)
    same = {name for name in after.keys() & before.keys() if torch.equal(after[name], before[name])}
    return sorted((after.keys() | before.keys()) - same)


def losses(run: Path) -> dict[int, float]:
    """Loss by step: the last record of each."""
    found: dict[int, float] = {}
    for log in sorted((run / "metrics").glob("attempt_*.jsonl")):
        for line in log.read_text().splitlines()[1:]:
            record = json.loads(line)
            found[record["step"]] = record["loss"]
    return found
