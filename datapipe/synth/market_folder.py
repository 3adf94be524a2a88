"""A Market-1501-style folder of rendered pedestrians: training identities, and others as queries and gallery.

`synth.unfinished.json` lies in the folder while it is being filled and gives way to `synth.json` when all images are
there; both hold the configuration, so that a folder is only ever continued with the one it was begun with.
"""

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2

from datapipe.core.config import StorageConfig, SynthConfig
from datapipe.core.errors import ConfigError, DataError, NotFoundError
from datapipe.core.parallel import Workers
from datapipe.core.progress import counted
from datapipe.core.resource_limits import available_cores
from datapipe.storage import Store, open_store
from datapipe.synth.scene import Shot, crop

TRAIN, GALLERY, QUERY = "bounding_box_train", "bounding_box_test", "query"
FINISHED, UNFINISHED = "synth.json", "synth.unfinished.json"
RENDERER = 1
"""Raise when the same configuration gives other images; folders made by another one are not continued."""
REPORT_EVERY_S = 5.0
IMAGES_PER_TASK = 16


def render(out: str | Path, config: SynthConfig, storage: StorageConfig = StorageConfig()) -> None:  # noqa: B008
    """Fill `out`, a folder or s3://bucket/prefix, or finish filling it; one that is complete is left as it is.

    Every image is a pure function of (seed, identity, camera, image): the same bytes every time, for any number of
    workers, in whatever pieces the work is done. DataError if `out` holds something else or another configuration.
    """
    _check_ranges(config)
    store = open_store(str(out), storage)
    present = _begin(store, config)
    wanted = {f"{folder}/{file_name(shot)}": shot for folder, shot in shots(config)}
    missing = {name: shot for name, shot in wanted.items() if name not in present}
    if not missing and FINISHED in present:
        print(f"synth: {out} is complete: {counted(len(wanted), 'image')}", flush=True)
        return
    _render_all(store, config, list(missing.items()), total=len(wanted))
    if FINISHED not in present:
        store.replace(FINISHED, store.read(UNFINISHED))
        store.delete(UNFINISHED)


def shots(config: SynthConfig) -> Iterator[tuple[str, Shot]]:
    """Every image with the folder it belongs to. Test identities come after the training ones."""
    train = config.train_identities
    for identity in range(1, train + config.test_identities + 1):
        for camera in range(1, config.cameras + 1):
            for index in range(config.images):
                held_out = QUERY if index == 0 else GALLERY
                yield TRAIN if identity <= train else held_out, Shot(identity, camera, index)


def file_name(shot: Shot) -> str:
    """As Market-1501 writes it: person, camera and sequence, frame, box."""
    return f"{shot.identity:04d}_c{shot.camera}s1_{shot.image:06d}_00.jpg"


def _check_ranges(config: SynthConfig) -> None:
    for name in ("height", "width", "quality"):
        low, high = getattr(config, name)
        if not 1 <= low <= high or (name == "quality" and high > 100):
            raise ConfigError(f"{name} = {(low, high)} is no range", hint="write the lowest value first, at least 1")


def _begin(store: Store, config: SynthConfig) -> frozenset[str]:
    """Mark the folder as being filled with this configuration, or see that it already is. Names of what is there."""
    record = {"renderer": RENDERER, **asdict(config)}
    del record["workers"]
    try:
        present = frozenset(entry.name for entry in store.list())
    except NotFoundError:
        present = frozenset()
    for marker in (FINISHED, UNFINISHED):
        if marker in present:
            _compare(store, marker, record)
            return present
    if present:
        raise DataError("not empty and not made by synth", where=store.url, hint="choose another folder")
    store.replace(UNFINISHED, json.dumps(record, indent=1).encode())
    return present


def _compare(store: Store, marker: str, record: dict[str, Any]) -> None:
    try:
        existing = json.loads(store.read(marker))
    except ValueError as error:
        hint = "delete the folder and render again"
        raise DataError("not readable as JSON", where=store.address(marker), hint=hint) from error
    wanted = json.loads(json.dumps(record))  # tuples become lists
    differing = [key for key in sorted({*existing, *wanted}) if existing.get(key) != wanted.get(key)]
    if differing:
        listed = ", ".join(f"{key}: {existing.get(key)} there, {wanted.get(key)} asked for" for key in differing)
        raise DataError(
            f"rendered with other settings ({listed})",
            where=store.url,
            hint="use these settings, another folder, or delete this one",
        )


def _render_all(store: Store, config: SynthConfig, work: list[tuple[str, Shot]], *, total: int) -> None:
    begin = reported = time.monotonic()
    workers = config.workers or available_cores()
    print(
        f"synth: rendering {len(work)} of {counted(total, 'image')} into {store.url} ({counted(workers, 'process')})",
        flush=True,
    )
    done = 0
    for written in _written(store, config, work, workers):
        done, now = done + written, time.monotonic()
        if now - reported >= REPORT_EVERY_S or done == len(work):
            reported = now
            print(f"synth: {done} of {counted(len(work), 'image')}, {done / (now - begin):.0f} images/s", flush=True)


def _written(store: Store, config: SynthConfig, work: list[tuple[str, Shot]], workers: int) -> Iterator[int]:
    """Yields numbers of images written."""
    size = 1 if workers == 1 else IMAGES_PER_TASK
    tasks = [(store, config, work[start : start + size]) for start in range(0, len(work), size)]
    with Workers(workers if len(work) >= 2 * workers else 1) as pool:
        yield from pool.run(_write_crops, tasks, count=len(tasks))


def _write_crops(store: Store, config: SynthConfig, work: Sequence[tuple[str, Shot]]) -> int:
    if multiprocessing.parent_process() is not None:
        cv2.setNumThreads(1)  # the processes are the parallelism
    for name, shot in work:
        store.replace(name, crop(config, shot))
    return len(work)
