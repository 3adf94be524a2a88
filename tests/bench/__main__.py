"""`python -m tests.bench [views loader ...] [--full] [--record]`: all benches where none is named."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from subprocess import CalledProcessError
from time import monotonic

from tests.bench.peers import NEEDED
from tests.bench.record import load_average, record
from tests.bench.run import BENCHES, measured_alone
from tests.bench.scale import Scale, full


def main() -> None:
    """Run benches one after the other; print each table as soon as it is there."""
    arguments = _arguments()
    if arguments.setup:
        for environment in NEEDED.values():
            environment.install()
        return
    benches = _possible(arguments.benches or BENCHES)
    scale = replace(full(Scale()) if arguments.full else Scale(), rounds=arguments.rounds)
    load, begin, tables = load_average(), monotonic(), []
    print(f"load average before: {load}; figures are per CPU-second, medians of {scale.rounds} interleaved rounds\n")
    for name in benches:
        tables.append(measured_alone(name, scale))
        print(f"{tables[-1]}\n", flush=True)
    print(f"{monotonic() - begin:.0f} s, load average after: {load_average()}")
    if arguments.record:
        record(tables, load, arguments.note)


def _possible(benches: Sequence[str]) -> list[str]:
    """All of them but ingest_peers, where other libraries cannot be installed; the loader bench says what it lacks."""
    lacking = set()
    for name in set(benches) & NEEDED.keys():
        try:
            NEEDED[name].install()
        except (OSError, CalledProcessError) as error:
            print(f"left out of {name}: {NEEDED[name].missing}: {error}\n")
            lacking.add(name)
    return [name for name in benches if name != "ingest_peers" or name not in lacking]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=f"{', '.join(BENCHES)}; all if none is named")
    parser.add_argument(
        "--full", action="store_true", help="retrieval and clustering at MSMT17's size: minutes, 1.5 GB"
    )
    parser.add_argument("--rounds", type=int, default=Scale.rounds, help="counted rounds (default %(default)s)")
    parser.add_argument("--setup", action="store_true", help="only install the libraries to compare with")
    parser.add_argument("--record", action="store_true", help="append the tables to tests/bench/BENCHMARKS.md")
    parser.add_argument("--note", default="", help="a sentence to record with them")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.benches if name not in BENCHES]:
        parser.error(f"no bench is called {unknown[0]}; there are {', '.join(BENCHES)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


if __name__ == "__main__":
    main()
