"""The tests of the cluster on other versions of Ray: `make test-ray-versions`, for every night.

Each version lies in a folder of its own, which comes before the environment's Ray: all else is what it is. A version
that is not published yet is said to be so, and fails nothing. Exit code 1 where a test fails on any.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import NamedTuple

from tests.support.golden import ROOT

VERSIONS = ("2.59", "2.60", "2.61")
TESTS = ("tests/cluster", "tests/architecture/test_ray_internals.py")
"""What is run on each, unless the line says otherwise."""


class Result(NamedTuple):
    """What one version came to."""

    version: str
    """The minor version that was asked for."""
    found: str
    """The release that was tested; empty: none is published."""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


def installed(version: str, folder: Path) -> str:
    """The newest release of a minor version, installed into `folder`; empty: there is none."""
    if not folder.is_dir():
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                "--target", str(folder), f"ray=={version}.*"]  # fmt: skip
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            assert "No matching distribution" in done.stderr, done.stderr
            return ""
    look = "import ray; print(ray.__version__, ray.__file__)"
    said = subprocess.run([sys.executable, "-c", look], env=environment(folder), text=True, check=True,
                          capture_output=True).stdout.split()  # fmt: skip
    assert said[0].startswith(f"{version}.") and Path(said[1]).is_relative_to(folder), said
    return said[0]


def environment(folder: Path) -> dict[str, str]:
    """The environment in which Ray is the one in this folder."""
    paths = (str(folder), str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def run(version: str, folder: Path, tests: list[str]) -> Result:
    """Install a version where it is absent, and run the tests on it."""
    found = installed(version, folder)
    if not found:
        return Result(version, "")
    report, began = folder.with_suffix(".xml"), time.monotonic()
    line = [sys.executable, "-m", "pytest", "-q", "-m", "not soak", f"--junitxml={report}", *tests]
    code = subprocess.run(line, cwd=ROOT, env=environment(folder)).returncode
    (suite,) = xml.parse(report).getroot().iter("testsuite")
    cases = list(suite.iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [str(case.get("name")) for case in bad]
    if code not in (0, 1):  # interrupted, or not what was to be run
        names.append(f"pytest itself, which ended with {code}")
    return Result(version, found, len(cases) - len(bad) - skipped, len(names), skipped, time.monotonic() - began,
                  tuple(names))  # fmt: skip


def main(words: list[str]) -> int:
    """The table of all versions; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.ray_versions", description=__doc__)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), help="minor versions, such as 2.59")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "ray_versions", help="where they are installed")
    parser.add_argument("--out", type=Path, help="the table as JSON, too")
    parser.add_argument("tests", nargs="*", default=list(TESTS), help="files, folders and flags of pytest (after --)")
    chosen = parser.parse_args(words)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    folders = {version: chosen.folder.resolve() / f"ray_{version.replace('.', '_')}" for version in chosen.versions}
    results = [run(version, folder, chosen.tests) for version, folder in folders.items()]
    for one in results:
        counts = f"{one.passed} passed, {one.failed} failed, {one.skipped} left out in {one.seconds:.0f} s"
        print(f"Ray {one.found}: {counts}" if one.found else f"Ray {one.version}: not published")
        for name in one.failures:
            print(f"  failed: {name}")
    if chosen.out:
        chosen.out.write_text(json.dumps([one._asdict() for one in results], indent=1) + "\n")
    return int(any(one.failed for one in results) or not any(one.passed for one in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
