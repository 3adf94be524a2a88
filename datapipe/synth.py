"""A Market-1501-style folder of rendered pedestrians: training identities, and others as queries and gallery.

`synth.unfinished.json` lies in the folder while it is being filled and is renamed to `synth.json` when all images are
there; both hold the configuration, so that a folder is only ever continued with the one it was begun with.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2

from datapipe.config import SynthConfig
from datapipe.errors import ClusterError, ConfigError, DataError, StorageError
from datapipe.resource_limits import available_cores
from datapipe.stopping import sheltered
from datapipe.synth_scenes import Shot, crop

TRAIN, GALLERY, QUERY = "bounding_box_train", "bounding_box_test", "query"
FINISHED, UNFINISHED = "synth.json", "synth.unfinished.json"
RENDERER = 1
"""Raise when the same configuration gives other images; folders made by another one are not continued."""
REPORT_EVERY_S = 5.0


def render(out: Path, config: SynthConfig) -> None:
    """Fill `out`, or finish filling it; a folder that is complete is left as it is.

    Every image is a pure function of (seed, identity, camera, image): the same bytes every time, for any number of
    workers, in whatever pieces the work is done. DataError if `out` holds something else or another configuration.
    """
    _check_ranges(config)
    _begin(out, config)
    wanted = {f"{folder}/{file_name(shot)}": shot for folder, shot in shots(config)}
    missing = {name: shot for name, shot in wanted.items() if not (out / name).exists()}
    if not missing and (out / FINISHED).exists():
        print(f"synth: {out} is complete: {len(wanted)} images", flush=True)
        return
    _render_all(out, config, list(missing.items()), total=len(wanted))
    if (out / UNFINISHED).exists():
        os.replace(out / UNFINISHED, out / FINISHED)


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


def _begin(out: Path, config: SynthConfig) -> None:
    """Mark the folder as being filled with this configuration, or see that it already is."""
    record = {"renderer": RENDERER, **asdict(config)}
    del record["workers"]
    with _refusals_named(out):
        for marker in (out / FINISHED, out / UNFINISHED):
            if marker.exists():
                return _compare(marker, record)
        if out.exists() and any(out.iterdir()):
            raise DataError("not empty and not made by synth", where=str(out), hint="choose another folder")
        for folder in (TRAIN, GALLERY, QUERY):
            (out / folder).mkdir(parents=True, exist_ok=True)
        _write(out / UNFINISHED, json.dumps(record, indent=1).encode())


def _compare(marker: Path, record: dict[str, Any]) -> None:
    try:
        there = json.loads(marker.read_bytes())
    except ValueError as error:
        raise DataError("not readable as JSON", where=str(marker), hint="delete the folder and render again") from error
    wanted = json.loads(json.dumps(record))  # tuples become lists
    differing = [key for key in sorted({*there, *wanted}) if there.get(key) != wanted.get(key)]
    if differing:
        listed = ", ".join(f"{key}: {there.get(key)} there, {wanted.get(key)} asked for" for key in differing)
        raise DataError(
            f"rendered with other settings ({listed})",
            where=str(marker.parent),
            hint="use these settings, another folder, or delete this one",
        )


def _render_all(out: Path, config: SynthConfig, work: list[tuple[str, Shot]], *, total: int) -> None:
    begin = reported = time.monotonic()
    workers = config.workers or available_cores()
    print(f"synth: rendering {len(work)} of {total} images into {out} ({workers} processes)", flush=True)
    for done, _ in enumerate(_written(out, config, work, workers), start=1):
        now = time.monotonic()
        if now - reported >= REPORT_EVERY_S or done == len(work):
            reported = now
            print(f"synth: {done} of {len(work)} images, {done / (now - begin):.0f} images/s", flush=True)


def _written(out: Path, config: SynthConfig, work: list[tuple[str, Shot]], workers: int) -> Iterator[None]:
    """Yields once per image written."""
    write = partial(_write_crop, out, config)
    if workers == 1 or len(work) < 2 * workers:
        yield from map(write, work)
        return
    spawn = multiprocessing.get_context("spawn")  # never fork: the caller may have threads
    try:
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker) as pool:
            with sheltered():
                written = pool.map(write, work, chunksize=16)  # starts the processes
            yield from written
    except BrokenProcessPool as error:
        hint = "run it again: it goes on from there; use fewer workers if memory ran out"
        raise ClusterError("a rendering process was ended from outside", where=str(out), hint=hint) from error


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """The pool does not notice when the parent is killed: its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_crop(out: Path, config: SynthConfig, work: tuple[str, Shot]) -> None:
    name, shot = work
    with _refusals_named(out):
        _write(out / name, crop(config, shot))


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


@contextmanager
def _refusals_named(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write: {error}", where=str(out), hint="check the path, rights and space") from error
