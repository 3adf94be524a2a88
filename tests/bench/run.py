"""One bench by its name, here or in a process of its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

from tests.bench.scale import Scale
from tests.bench.table import Table

BENCHES = ("views", "loader", "streaming", "opening", "order", "ingest", "ingest_peers", "retrieval", "clustering",
           "usl_epoch", "step")  # fmt: skip
"""Each is a module here with a function of the same name."""


def measured(name: str, scale: Scale) -> Table:
    """The table of one bench; imports only what that one needs."""
    bench = import_module(f"tests.bench.{name}")
    table: Table = getattr(bench, name)(scale)
    return table


def measured_alone(name: str, scale: Scale) -> Table:
    """One bench in a fresh process.

    Whether glibc gives freed memory back depends on the largest block that was freed before; after other benches the
    loader's rate on large crops is a quarter higher than in a process that only loads.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, name, scale).result()
