"""Runs in an environment of its own: `python -m tests.bench.loader_peer_process PEER FILES OUT BATCH WORKERS`.

Writes the JPEGs below FILES into OUT in the library's format, once. Then each line on stdin asks for an epoch: all of
them shuffled, decoded and cut as everybody here does, in batches, by WORKERS processes that stay; a line with their
number is printed. No bytes are encoded anew.
"""

import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.cut import decoded_and_cut

Batches = Iterable[Any]


def litdata(files: list[str], out: str, batch: int, workers: int) -> Batches:
    """Chunks of 64 MB as by `litdata.optimize`, StreamingDataset and StreamingDataLoader."""
    os.environ.setdefault("DATA_OPTIMIZER_CACHE_FOLDER", f"{out}-cache")
    import litdata as library

    library.optimize(_read, files, out, chunk_bytes="64MB", num_workers=1)

    crops = library.StreamingDataset(out, shuffle=True, transform=decoded_and_cut)
    return library.StreamingDataLoader(crops, batch_size=batch, num_workers=workers, persistent_workers=workers > 0)


def mosaic(files: list[str], out: str, batch: int, workers: int) -> Batches:
    """MDS shards, and StreamingDataset below torch's DataLoader."""
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    with streaming.MDSWriter(out=out, columns={"jpg": "bytes"}) as writer:
        for path in files:
            writer.write({"jpg": _read(path)})

    class Crops(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> np.ndarray:
            return decoded_and_cut(super().__getitem__(index)["jpg"])

    return torch.utils.data.DataLoader(Crops(local=out, shuffle=True, batch_size=batch), batch_size=batch,
                                       num_workers=workers, persistent_workers=workers > 0)  # fmt: skip


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def main() -> None:
    """Answer until stdin ends. Answers go to the first stdout; what the libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    say = partial(print, file=answers, flush=True)
    torch.set_num_threads(1)
    peer, source, out, batch, workers = sys.argv[1:]
    files = sorted(map(str, Path(source).rglob("*.jpg")))
    batches = {"litdata": litdata, "mosaic": mosaic}[peer](files, out, int(batch), int(workers))
    say("ready")
    for _ in sys.stdin:
        say(sum(len(images) for images in batches))


if __name__ == "__main__":
    main()
