"""Kill a job at moments spread evenly over its work, start it again, and see that nothing tells it was ever killed."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.conftest import S3Server
from tests.support.forked import call, forkserver

MOMENTS, FEW = 20, 5
"""Trials; on a slow store, where the same code has been killed on a disk."""
LEAST = 0.75
"""Share of them that must fall between the first byte written and the end."""
TRIES = 4
"""For a moment at which the job happened to be through already: other work makes a shared machine faster or slower."""
TIMEOUT_S = 300.0
PROBE = ".probe-"
"""What a run writes to see what its store can do; a killed one may leave it."""


@dataclass(frozen=True)
class Job:
    """Something that writes into a place of its own."""

    function: Callable[..., None]
    """Importable by its name; its end is its success."""
    arguments: tuple[Any, ...]
    objects: Callable[[], dict[str, bytes]]
    """Everything under a final name in its place; what has not begun or is left between runs does not count."""
    begun: Callable[[], bool]
    """Whether the first byte is written."""
    ended: Callable[[], bool]
    """Whether the last one is: there is a manifest."""


def kill_evenly(make: Callable[[str], Job], moments: int = MOMENTS) -> int:
    """Run `make(name)` undisturbed, then killed at so many moments and each time finished by a second run.

    The moments divide the time between an undisturbed run's first byte and its end. Fails where a killed run leaves
    something else under a final name than the undisturbed one writes there, where the second run ends otherwise than
    that, or where fewer than LEAST of the trials hit. Returns how many did.
    """
    context = forkserver()
    undisturbed = make("undisturbed")
    duration = _duration(context, undisturbed)
    wanted = undisturbed.objects()
    hits = 0
    for moment in range(moments):
        share = (moment + 0.5) / moments
        for attempt in range(TRIES):
            job = make(f"moment-{moment}-{attempt}")
            hit, passed = _kill(context, job, share * duration)
            left = job.objects()
            assert {name: wanted.get(name) for name in left} == left, f"half or other objects at {share:.1%}"
            _finish(context, job)
            assert job.objects() == wanted, f"another end after a kill at {share:.1%}"
            if hit:
                break
            duration = min(duration, passed)
        hits += hit
    assert hits >= LEAST * moments, f"{hits} of {moments} kills hit between the first byte and the end"
    return hits


def local_objects(folder: Path, *aside: str) -> dict[str, bytes]:
    """Every file of a folder by its name; not those in the sub-folders `aside`, nor temporary ones and probes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path for path in files}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not name.startswith((PROBE, *(f"{part}/" for part in aside))) and not name.endswith(".part")
    }


def s3_objects(server: S3Server, bucket: str, prefix: str) -> dict[str, bytes]:
    """The same for a prefix of a bucket."""
    return {
        name.removeprefix(prefix): data
        for name, data in server.objects(bucket).items()
        if name.startswith(prefix) and not name.startswith(f"{prefix}{PROBE}")
    }


def _duration(context: Any, job: Job) -> float:
    """Seconds between the first byte and the end of a run that is left alone."""
    process = _start(context, job)
    begin = _wait(process, job.begun)
    end = _wait(process, job.ended)
    process.join()
    assert process.exitcode == 0, "the undisturbed run failed"
    return end - begin


def _kill(context: Any, job: Job, after_s: float) -> tuple[bool, float]:
    """(whether the run was killed before its end, seconds from its first byte to its death or end)."""
    process = _start(context, job)
    begin = _wait(process, job.begun)
    process.join(after_s)
    process.kill()  # passes over one that has just ended
    process.join()
    return process.exitcode == -signal.SIGKILL and not job.ended(), time.monotonic() - begin


def _finish(context: Any, job: Job) -> None:
    process = _start(context, job)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0, "the second run failed"


def _start(context: Any, job: Job) -> BaseProcess:
    process = context.Process(target=call, args=(dict(os.environ), job.function, *job.arguments))
    process.start()
    return process


def _wait(process: BaseProcess, condition: Callable[[], bool]) -> float:
    """When the condition began to hold, as precisely as looking again and again tells."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.is_alive() or condition(), "the run ended before it wrote"
        assert time.monotonic() < deadline, "the run does not get on"
        process.join(0.005)
    return time.monotonic()
