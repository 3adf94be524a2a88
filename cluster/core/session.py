"""Starting and joining Ray. The only file that calls `ray.init`."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from cluster.core.addresses import JOIN, head_of
from cluster.core.ray_internals import embedded_options, keeping_address, leaving_sigterm, refuses_token
from cluster.core.ray_token import private_token, refuse_mode_without_token, refused, show_token
from cluster.core.scratch import scratch_folder
from datapipe.core import stop_signals
from datapipe.core.errors import ClusterError, UserError
from datapipe.core.process_setup import misread, unread
from training.core.launchers import stay_on_loopback

OBJECT_STORE_BYTES = 200_000_000
"""Shared memory of an embedded Ray. Samples never pass through it; Ray's default of 30 % of memory is not needed."""

LOOPBACK = "127.0.0.1"
LOCAL = "local"
"""The address of an embedded Ray, which lives as long as this process."""


def prepare() -> None:
    """Settings that Ray reads from the environment. Before the first import of ray."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
    binaries = os.path.dirname(sys.executable)
    if binaries not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = binaries + os.pathsep + os.environ.get("PATH", "")


def chosen_address(given: str) -> str:
    """The cluster to use: the one given, else the one that this process is a job of (RAY_ADDRESS), else a local one."""
    return given.strip() or os.environ.get("RAY_ADDRESS", "").strip() or LOCAL


@contextlib.contextmanager
def ray_session(address: str, *, cpus: int) -> Iterator[str]:
    """An initialised Ray; yields a folder for its scratch files.

    `address` "local" starts an embedded Ray with its own temporary folder, token, ports and no dashboard, and ends it
    afterwards; anything else joins a running cluster. Raises ClusterError when it cannot be reached.
    """
    prepare()
    head = "" if address == LOCAL else head_of(address)
    print(f"joins the Ray cluster at {head}" if head else "starts Ray", flush=True)
    import ray

    with scratch_folder() as scratch, contextlib.nullcontext() if head else private_token(scratch):
        try:
            with _own_signals():
                if head:
                    _join(head)
                else:
                    _embed(scratch, cpus)
            yield scratch
        finally:
            ray.shutdown()


def _embed(scratch: str, cpus: int) -> None:
    import ray

    try:
        stay_on_loopback()
        with keeping_address():
            ray.init(
                address=LOCAL,
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **embedded_options(scratch, LOOPBACK),
            )
    except Exception as error:  # of a dozen kinds, of its own and of Python's
        if names := misread(error):
            raise unread(names, error) from error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ClusterError(f"Ray does not start inside this process: {reason}", where=scratch,
                           hint="room for processes (ulimit -u), open files (ulimit -n), memory and /dev/shm; --debug "
                                "shows the whole trace") from error  # fmt: skip


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray does not take SIGTERM from us, and signals for the whole of a process group do not reach its processes, which
    a save still needs."""
    try:
        with leaving_sigterm(), stop_signals.sheltered(), stop_signals.keeping(signal.SIGTERM):
            yield
    finally:
        stop_signals.take_again()


def _join(address: str) -> None:
    import ray

    refuse_mode_without_token()
    if refuses_token(address) and (not show_token() or refuses_token(address)):
        raise refused(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster answers: {error}",
            where=address,
            hint=JOIN,
        ) from error


def result(reference: Any) -> Any:
    """What a task returned. A task's clear error is raised as it was, without Ray's wrapping.

    Raises ClusterError where its workers died, however often it was tried again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):
            raise error.cause from None
        raise
    except RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ClusterError(
            f"a task lost its worker again and again: {lines[0]}",
            hint="probably memory: give Ray fewer CPUs per machine; run again, it goes on where it stopped",
        ) from error
