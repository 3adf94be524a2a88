"""Processes of tests, forked from one that has imported the slow modules already: those take a fresh one seconds."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any


def forkserver() -> multiprocessing.context.ForkServerContext:
    """The fork server of this process. All tests use this one, as there is only one, with one list of modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded"])
    return context


def call(environment: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` with this environment; the fork server's own may be that of an earlier test."""
    os.environ.clear()
    os.environ.update(environment)
    return function(*arguments)
