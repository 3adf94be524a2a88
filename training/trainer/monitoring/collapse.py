"""Signs of collapse in the course of a run: pure functions of its metrics.

A collapsed run says the same of every image. It may say so with one prototype (no centring) or with all of them alike
(too much of it), so neither a low nor a high entropy tells; what tells is how much the targets say of the image. A
young run is no collapsed one: its loss is ln K and its features are alike, but its targets differ from image to image.
So a sign that is natural at the start is not looked for before both SETTLED_STEPS and the first epoch are over.

A sign appears when more than half of the last WINDOW steps that record its value are beyond its threshold, and goes
when none of them is. So a collapse is told WINDOW steps after it began at the latest, and one that was there from the
beginning at step WINDOW by `constant_targets*`, at step SETTLED_STEPS + WINDOW (or WINDOW after the first epoch) by the
others. Where targets are looked at in every fourth step (method.health_every), signs that they show take WINDOW looks.

What is looked at, by method: dino, pass and personvit all signs. PersonMAE has no prototypes: only `alike_images`,
`one_direction` and `views_as_images`, of the features that its decoder predicts. Its pixel loss keeps them alive: with
a teacher momentum of 0 it was seen to learn on, where the others collapse.

Fine-tuning on identities has a sign of its own in place of `alike_images`: its features may lie close together, as the
batch norm behind them takes out what they share, and yet tell identities apart. Where its classifier knows identities
no better than chance once the warm-up is over, the triplet loss is all that teaches, or nothing does.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Record = Mapping[str, Any]
"""The numbers of one step, as a line of metrics has them; "step" counts from 1, "epoch" is the epochs done."""

WINDOW = 20
"""Steps that are looked at together."""
SETTLED_STEPS = 200
"""Steps before which a run is too young for some signs."""
WARM_UP = 0.25
"""Share of a fine-tuning run in which its classifier may know nothing yet."""
LEAST_IMAGES = 8
"""Images of a micro-batch below which comparing its images tells nothing."""


@dataclass(frozen=True)
class Rule:
    """What is a sign of collapse: a value of a step beyond a threshold."""

    name: str
    what: str
    """In words, as a clause."""
    value: Callable[[Record], float | None]
    """None where the method does not record it."""
    threshold: float
    below: bool
    """Is it the low values that are a sign?"""
    hint: str
    young: bool = False
    """Is it looked for from the first step on?"""

    def broken(self, record: Record) -> bool | None:
        """Is this step beyond the threshold? None where it cannot be told."""
        if not self.young and (record["step"] <= SETTLED_STEPS or record.get("epoch", 1) <= 1):
            return None
        value = self.value(record)
        if value is None or value != value:
            return None
        return value < self.threshold if self.below else value > self.threshold


@dataclass(frozen=True)
class Sign:
    """A sign of collapse that was seen."""

    rule: Rule
    since: int
    """Step at which it appeared."""
    until: int | None = None
    """Step at which it had gone; None while it lasts."""

    def __str__(self) -> str:
        if self.until is not None:
            return f"sign of collapse gone: {self.rule.name}, seen from step {self.since:,} to {self.until:,}"
        return f"warning: sign of collapse: {self.rule.what} ({self.rule.name}); try {self.rule.hint}"


class CollapseMonitor:
    """Follows a run step by step."""

    def __init__(self) -> None:
        self.standing: dict[str, Sign] = {}
        """By name, those that last."""
        self._seen: dict[str, deque[bool]] = {rule.name: deque(maxlen=WINDOW) for rule in RULES}

    def see(self, record: Record) -> list[Sign]:
        """Take in the next step; the signs that appear or go with it."""
        changes = (self._judge(rule, record) for rule in RULES)
        return [sign for sign in changes if sign is not None]

    def _judge(self, rule: Rule, record: Record) -> Sign | None:
        broken = rule.broken(record)
        if broken is None:
            return None
        seen = self._seen[rule.name]
        seen.append(broken)
        if len(seen) < WINDOW:
            return None
        if rule.name not in self.standing and 2 * sum(seen) > WINDOW:
            self.standing[rule.name] = Sign(rule, record["step"])
            return self.standing[rule.name]
        if rule.name in self.standing and not any(seen):
            return replace(self.standing.pop(rule.name), until=record["step"])
        return None


def signs(records: Iterable[Record]) -> list[Sign]:
    """All signs in a run's records, which are in the order of their steps; in the order of their appearance."""
    course, gone = CollapseMonitor(), []
    for record in records:
        gone += [sign for sign in course.see(record) if sign.until is not None]
    return sorted([*gone, *course.standing.values()], key=lambda sign: (sign.since, sign.rule.name))


def _information(suffix: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        return record.get(f"target_information{suffix}") if _compares(record) else None

    return value


def _share_of_uniform(record: Record) -> float | None:
    """The lower of the CLS loss and the entropy of its targets, as a share of ln K."""
    if not {"target_entropy", "loss_cls"} <= record.keys() or not record.get("uniform_entropy"):
        return None
    return min(record["loss_cls"], record["target_entropy"]) / record["uniform_entropy"]


def _feature_cosine(record: Record) -> float | None:
    return record.get("feature_cosine") if _compares(record) and "loss_identity" not in record else None


def _identity_loss(record: Record) -> float | None:
    """As a share of that at chance, ln K."""
    if record.get("done", 0) <= WARM_UP or not record.get("uniform_entropy_identity") or "loss_identity" not in record:
        return None
    return record["loss_identity"] / record["uniform_entropy_identity"]


def _feature_rank(record: Record) -> float | None:
    return record.get("feature_rank") if _compares(record) else None


def _closer_views(record: Record) -> float | None:
    """How much more alike two views of one image are than two images, as a difference of cosines."""
    if not _compares(record) or "student_teacher_cosine" not in record:
        return None
    return record["student_teacher_cosine"] - record["feature_cosine"]


def _compares(record: Record) -> bool:
    return record.get("images_compared", 0) >= LEAST_IMAGES


_CENTRE = 'a higher optimisation.ema, method.targets = "sinkhorn" or a lower method.centre_momentum, or a lower lr'

RULES = (
    Rule("constant_targets", "the targets of CLS are nearly the same for all images (target_information)",
         _information(""), 0.01, True, _CENTRE, young=True),
    Rule("constant_targets_part", "the targets of the parts are nearly the same for all images "
         "(target_information_part)", _information("_part"), 0.01, True, _CENTRE, young=True),
    Rule("constant_targets_patch", "the targets of hidden patches are nearly the same for all patches "
         "(target_information_patch)", _information("_patch"), 0.01, True, _CENTRE, young=True),
    Rule("loss_at_ln_k", "loss_cls and target_entropy stay at ln K: all prototypes are used alike for every image",
         _share_of_uniform, 0.98, False, "a lower method.teacher_temp, a longer warm-up or a lower lr"),
    Rule("alike_images", "the features of different images are nearly the same (feature_cosine)",
         _feature_cosine, 0.99, False, "a higher optimisation.ema or a lower optimisation.lr"),
    Rule("identities_at_chance", "the classifier knows identities no better than chance (loss_identity is ln K)",
         _identity_loss, 0.98, False, "another optimisation.lr, larger batches, the views.statistics of the weights' "
         "own training, or a lower method.triplet_weight"),
    Rule("one_direction", "features differ in little more than one direction (feature_rank)",
         _feature_rank, 1.05, True, "a lower optimisation.lr, or more different crops"),
    Rule("views_as_images", "views of one image are hardly more alike than different images (student_teacher_cosine - "
         "feature_cosine)", _closer_views, 0.01, True, "a higher optimisation.ema or a lower optimisation.lr"),
)  # fmt: skip
"""All signs, with the thresholds beyond which they are seen. In healthy runs (the demo's recipe and smaller ones, four
methods) the medians of WINDOW steps stayed within: target_information above .12 nats, feature_cosine below .93,
feature_rank above 1.14 and, once settled, views closer than images by .2. In collapses that were brought about (no
centring, teacher momentum 0) target_information fell below .001 nats within 40 steps."""
