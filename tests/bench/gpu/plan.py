"""Which recipe is asked what, and for how many seconds: planned ahead, so that the time is spent on what says most."""

from collections.abc import Sequence
from typing import NamedTuple

from tests.bench.gpu.checks import STEPS, Subject
from tests.bench.gpu.settings import full, small
from tests.bench.gpu.speed import BY_PART, COUNTED, TIMED, WARM_UP, untranscribed
from training.preflight.calculated.memory import FULL
from training.preflight.calculated.operations import flops_of_image

KINDS = ("speed", "transcription", "checks", "compiled")
"""Speed comes first, of all recipes, the small ones first; then one kind after the other of a recipe of each method,
then of the others. "checks": float32 beside the CPU, lower precisions, a checkpoint."""
REACHED = 0.25
"""Share of a large product's rate that a step is planned with."""
CPU_RATE = 15e9
"""Operations a second of one of the CPU's threads, planned likewise."""
BUILT, COPIED = 4e7, 3e8
"""Numbers a second that a method is made of on the CPU, and bytes a second to and from a checkpoint."""
START_S, COMPILE_S = 2.0, 60.0
"""What each kind takes whatever the recipe, and a compiler beside it."""


class Slot(NamedTuple):
    """A kind of question to one recipe."""

    recipe: str
    kind: str
    seconds: float
    """What it is thought to take."""
    planned: bool
    """False: it is left out, as time is too short for it and all before it."""


class Machine(NamedTuple):
    """What is known of it before anything is asked."""

    rate: float
    """Operations a second in a large product, in the precision of most recipes."""
    memory: int
    """Bytes of its GPU."""
    threads: int


def planned(subjects: Sequence[Subject], kinds: Sequence[str], machine: Machine, *, seconds: float) -> list[Slot]:
    """All slots, in the order in which time is given out. `subjects`: small ones first."""
    first = _of_each_method(subjects)
    others = [subject for subject in subjects if subject not in first]
    turns = [(subjects, KINDS[:1]), (first, KINDS[1:]), (others, KINDS[1:])]
    known = {subject.name: estimates(subject, machine) for subject in subjects}
    slots, left = [], seconds
    for kind, subject in [(kind, one) for some, own in turns for kind in own for one in some if kind in kinds]:
        takes = known[subject.name][kind]
        fits = 0 < takes <= left
        left -= takes if fits else 0.0
        slots.append(Slot(subject.name, kind, takes, fits))
    return slots


def _of_each_method(subjects: Sequence[Subject]) -> list[Subject]:
    """The smallest with a published size, or where there is none the smallest."""
    found: dict[str, Subject] = {}
    for subject in sorted(subjects, key=lambda one: one.config.backbone.arch == "custom"):
        found.setdefault(subject.config.method.name, subject)
    return list(found.values())


def estimates(of: Subject, machine: Machine) -> dict[str, float]:
    """Kind -> seconds; 0: there is no such thing for this recipe."""
    config = full(of.name, of.config, of.sizes, machine.memory)
    step = flops_of_image(config) * config.optimisation.batch / (REACHED * machine.rate)
    few = small(of.config)
    cpu = STEPS * flops_of_image(few) * few.optimisation.batch / (CPU_RATE * machine.threads)
    start = START_S + of.sizes.parameters / BUILT
    steps = WARM_UP + TIMED
    measured = start + (steps + BY_PART + COUNTED + 2) * step
    state = 2 * FULL * (of.sizes.parameters + 2 * of.sizes.trained) / COPIED
    return {
        "speed": measured,
        "transcription": 0.0 if untranscribed(config) else start + 2.5 * steps * step,
        "checks": 4 * start + cpu + state,
        "compiled": COMPILE_S + measured,
    }
