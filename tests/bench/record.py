"""Appends the tables of a run to tests/bench/BENCHMARKS.md, with what they depend on."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tests.bench.table import Table

FILE = Path(__file__).parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Made by `python -m tests.bench --record` (`make bench` prints the same without recording). Rates are per CPU-second:
work over the user and system time of the whole process tree. Each figure is the median of interleaved rounds, lowest
and highest in brackets; ratios are formed within each round. Compare ratios, not rates, between machines.
"""
LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "simplejpeg", "torch", "torchvision", "webdataset")


def record(tables: list[Table], load: str, note: str, file: Path = FILE) -> None:
    """One section per run; `load` is the load average before it, `note` whatever else a reader should know."""
    facts = [
        f"- {_processor()}, {os.cpu_count()} cores; load average {load} before the run, {load_average()} after it",
        f"- Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    ]
    if note:
        facts.append(f"- {note}")
    if not file.exists():
        file.write_text(HEAD)
    with open(file, "a") as sink:
        sink.write("\n".join([f"\n## {date.today().isoformat()}", "", *facts, ""]))
        sink.writelines(f"\n{table}\n" for table in tables)


def load_average() -> str:
    """Of the last 1, 5 and 15 minutes."""
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
