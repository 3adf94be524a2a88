"""Recipe after recipe through all that is planned, as long as there is time."""

import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import torch

from tests.bench.gpu import checks, crops, speed
from tests.bench.gpu.checks import GPU, Check, Finished, Subject
from tests.bench.gpu.datasheet import SIDE, product_rate
from tests.bench.gpu.plan import Machine, Slot, planned
from tests.bench.gpu.result import Report, machine
from tests.bench.gpu.settings import smallest_first

UNPLANNED = "no time was planned for it"


class Session:
    """Asks for checks while there is time for them, and goes by what the one before of the same kind took."""

    def __init__(self, minutes: float) -> None:
        self._end = monotonic() + 60 * minutes
        self._rates: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - monotonic()

    def ask(self, kind: str, seconds: float, check: Callable[[], Check]) -> Check:
        """Its result; failed where it raises. `seconds`: what it is planned with."""
        began = monotonic()
        if began + self._rates.get(kind, 1.0) * seconds > self._end:
            return Check(None, "no time left for it")
        try:
            return check()
        except Exception as error:
            traceback.print_exc()
            return Check(False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        finally:
            checks.forget()
            self._rates[kind] = (monotonic() - began) / seconds


def tried(
    names: Sequence[str], kinds: Sequence[str], *, minutes: float, tiny: bool, out: Path,
    request: crops.Request | None = None,
) -> Report:  # fmt: skip
    """What is planned of all recipes, after the real crops that are asked for. `out` is written after each recipe.
    Raises UserError where the crops are not what they should be."""
    session = Session(minutes)
    on_crops = _on_crops(request, session, tiny=tiny)
    subjects = [Subject(*given, tiny=tiny) for given in smallest_first(names, tiny=tiny)]
    fastest = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    rate = product_rate(fastest, GPU, speed.TINY_SIDE if tiny else SIDE)
    memory, threads = torch.cuda.get_device_properties(GPU).total_memory, torch.get_num_threads()
    slots = planned(subjects, kinds, Machine(rate, memory, threads), seconds=session.left)
    report = Report(machine(threads), slots, on_crops)
    report.write(out)
    print(report.plan(), flush=True)
    with TemporaryDirectory(prefix="bench_gpu_") as scratch:
        for subject in subjects:
            began = monotonic()
            own = {slot.kind: slot for slot in slots if slot.recipe == subject.name}
            found = _tried_one(subject, own, Path(scratch) / str(len(report.recipes)), session)
            report.recipes[subject.name] = found
            report.write(out)
            verdicts = ", ".join(f"{kind} {_word(check)}" for kind, check in found.items())
            print(f"{subject.name}: {verdicts} ({monotonic() - began:.0f} s)", flush=True)
    return report


def _on_crops(request: crops.Request | None, session: Session, *, tiny: bool) -> Check:
    """Comes first: what is wrong with the crops is said at once."""
    if request is None:
        return Check(None, crops.NO_CROPS)
    if not request.recipe:
        return Check(None, "none of these recipes pre-trains without labels")
    if lacking := crops.missing():
        return Check(None, f"not installed: {lacking}")
    with TemporaryDirectory(prefix="bench_gpu_crops_") as folder:
        sets = crops.prepare(request, Path(folder))
        run = Path(folder, "run")
        return session.ask("crops", crops.LATE * request.seconds,
                           lambda: crops.pretrained(request, sets, run, GPU, tiny=tiny))  # fmt: skip


def _tried_one(of: Subject, slots: dict[str, Slot], folder: Path, session: Session) -> dict[str, Check]:
    """Check -> its result."""

    def asked(kind: str, check: Callable[[], Check]) -> dict[str, Check]:
        if kind not in slots:
            return {}
        if not slots[kind].seconds:  # costs nothing, and says why
            return {kind: check()}
        return {kind: session.ask(kind, slots[kind].seconds, check) if slots[kind].planned else Check(None, UNPLANNED)}

    found = asked("speed", lambda: speed.speed(of))
    found |= asked("transcription", lambda: speed.beside_transcription(of))
    if "checks" in slots:
        found |= _checked(of, slots["checks"], folder, session)
    found |= asked("compiled", lambda: speed.speed(of, compiled=True))
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _checked(of: Subject, slot: Slot, folder: Path, session: Session) -> dict[str, Check]:
    """float32 beside the CPU, lower precisions, and a resume: about as long each."""
    held: list[Finished] = []

    def first() -> Check:
        check, finished = checks.beside_the_cpu(of, folder)
        held.append(finished)
        return check

    def lower(precision: checks.Precision) -> Check:
        return checks.lowered(of, precision, held[0].losses[0])

    later: dict[str, Callable[[], Check]] = {
        "bf16": lambda: lower("bf16"), "fp16": lambda: lower("fp16"), "resume": lambda: checks.resumed(of, held[0]),
    }  # fmt: skip
    part = slot.seconds / (1 + len(later))
    found = {"fp32": session.ask("fp32", slot.seconds, first) if slot.planned else Check(None, UNPLANNED)}
    if found["fp32"].passed is None:
        return found | dict.fromkeys(later, found["fp32"])
    without = Check(None, "there are no float32 losses")
    return found | {kind: session.ask(kind, part, check) if held else without for kind, check in later.items()}


def _word(check: Check) -> str:
    return {True: "passed", False: "FAILED", None: "left out"}[check.passed]
