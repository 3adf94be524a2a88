"""Recipe after recipe through all checks, as long as there is time."""

import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import torch

from tests.bench.gpu import checks
from tests.bench.gpu.checks import Check, Finished, Subject
from tests.bench.gpu.result import CHECKS, Report, machine
from tests.bench.gpu.settings import smallest_first, work


class Session:
    """Asks for checks while there is time for them, and goes by what the one before of the same kind took."""

    def __init__(self, minutes: float) -> None:
        self._end = monotonic() + 60 * minutes
        self._rates: dict[str, float] = {}

    def ask(self, kind: str, amount: float, check: Callable[[], Check]) -> Check:
        """Its result; failed where it raises. `amount`: of work, beside that of other recipes."""
        began = monotonic()
        if began + self._rates.get(kind, 0.0) * amount > self._end:
            return Check(None, "no time left for it")
        try:
            return check()
        except Exception as error:
            traceback.print_exc()
            return Check(False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        finally:
            checks.forget()
            self._rates[kind] = (monotonic() - began) / amount


def tried(names: Sequence[str], *, minutes: float, tiny: bool, out: Path) -> Report:
    """All checks of all recipes. `out` is written after each recipe."""
    session, report = Session(minutes), Report(machine(torch.get_num_threads()))
    with TemporaryDirectory(prefix="bench_gpu_") as scratch:
        for name, config, sizes in smallest_first(names, tiny=tiny):
            began = monotonic()
            found = _tried_one(Subject(name, config, sizes), Path(scratch) / name, session)
            report.recipes[name] = found
            report.write(out)
            verdicts = ", ".join(f"{kind} {_word(check)}" for kind, check in found.items())
            print(f"{name}: {verdicts} ({monotonic() - began:.0f} s)", flush=True)
    return report


def _tried_one(of: Subject, folder: Path, session: Session) -> dict[str, Check]:
    """Check -> its result, in the order of CHECKS."""
    amount = work(of.config, of.sizes)
    held: list[Finished] = []

    def first() -> Check:
        check, finished = checks.beside_the_cpu(of, folder)
        held.append(finished)
        return check

    def lower(precision: checks.Precision) -> Check:
        return checks.lowered(of, precision, held[0].losses[0])

    found = {"fp32": session.ask("fp32", amount, first)}
    if found["fp32"].passed is None:  # the other checks take about as long together
        return dict.fromkeys(CHECKS, found["fp32"])
    without = Check(None, "there are no float32 losses")
    found["bf16"] = session.ask("lower", amount, lambda: lower("bf16")) if held else without
    found["fp16"] = session.ask("lower", amount, lambda: lower("fp16")) if held else without
    found["speed"] = session.ask("speed", amount, lambda: checks.speed(of))
    found["resume"] = session.ask("resume", amount, lambda: checks.resumed(of, held[0])) if held else without
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _word(check: Check) -> str:
    return {True: "passed", False: "FAILED", None: "left out"}[check.passed]
