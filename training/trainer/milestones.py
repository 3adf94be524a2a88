"""Scores of a run's own weights at milestones while it trains: each is the end of a segment, with a checkpoint of its
own, so that a run that was stopped there makes up for what is missing.

    evaluation/<set>/step_0001200/     scores, pictures
    evaluation/milestones.json         the last and the best of all milestones, and which of them is quoted
    exports/last, exports/best         their backbones, and what else the method exports (`Method.extra_exports`)

What scores is imported by the first of them: a worker that starts need not wait for it.
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import safetensors.torch

from datapipe.core.errors import NotFoundError
from datapipe.core.progress import lines_sent_to
from training import checkpoint
from training.config.run_config import RunConfig
from training.config.run_plan import milestone_ends
from training.core.host import Host, run_lines
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.engine.clock import Clock
from training.trainer.alive import alive
from training.trainer.monitoring.observer import Observer

if TYPE_CHECKING:
    from training.reid.zero_shot import Weights

SUMMARY = "evaluation/milestones.json"
RULES = {
    "last": "the last weights, whatever their score",
    "best": "the best of all milestones by mAP on this very test set: chosen on the test set",
}


class Milestones:
    """Where segments end, and what is done there. Every rank calls every method."""

    def __init__(self, config: RunConfig, clock: Clock, folder: RunFolder, world: World, host: Host) -> None:
        self.config, self.clock, self.folder, self.world, self.host = config, clock, folder, world, host

    def ends(self) -> list[int]:
        """Samples seen at each milestone."""
        return milestone_ends(self.config.evaluation, self.clock)

    def score(self, position: int, observers: Sequence[Observer] = ()) -> None:
        """Score the checkpoint that was saved here, unless that was done before; return when all is written."""
        if not self.config.evaluation.data:
            return
        step = position // self.clock.batch
        with alive(self.host, step):
            if self.world.is_leader:
                from training.reid.zero_shot import Weights

                where, scores = self._score(Weights(checkpoint.name_of(step), step, position))
                for observer in observers:
                    observer.scored(step, where, scores)
            self.world.meet()  # scoring may take longer than any collective may

    def _score(self, weights: "Weights") -> tuple[str, dict[str, float]]:
        """(name of the test set, scores)."""
        from training.evaluation import evaluation
        from training.evaluation.evaluation import ScoringTask

        task = ScoringTask(self.config.out, self.config.evaluation.data, weights, self.config.storage,
                    self.config.evaluation.scoring)  # fmt: skip
        self.host.show_line(f"scores {weights.name}")
        with lines_sent_to(self.host.show_line):
            metrics = evaluation.score(task, device=self.world.device, out=self.folder.store)
        ours = {checkpoint.name_of(end // self.clock.batch) for end in self.ends()}
        scores = scored(self.folder, metrics["set"], ours)
        chosen = summary(scores, self.config.evaluation.quote)
        for which in ("last", "best"):
            if chosen[which]["weights"] == weights.name:
                self._export(weights, which)
        self.folder.write_json(SUMMARY, {"set": metrics["set"], **chosen})
        now, best = (evaluation.headline(one) for one in (metrics, chosen["best"]))
        where = metrics["set"]
        run_lines.info(f"step {weights.step:,}: mAP {100 * now['mAP']:.1f}, Rank-1 {100 * now['rank1']:.1f} on "
                       f"{where} (best: {100 * best['mAP']:.1f} at step {chosen['best']['step']:,})")  # fmt: skip
        return where, now

    def _export(self, weights: "Weights", which: str) -> None:
        from training.evaluation import evaluation
        from training.weights import export as exports

        method = evaluation.load_method(weights, self.folder, self.config)
        out = self.folder.at("exports", which)
        exports.export(method.backbone(), out, evaluation.provenance(weights, self.folder, self.config), method.necks())
        for name, tensors in method.extra_exports().items():
            out.replace(name, safetensors.torch.save(tensors))


def scored(folder: RunFolder, name: str, milestones: set[str]) -> list[dict[str, Any]]:
    """The scores of the milestones reached so far, oldest first."""
    rows = []
    for weights in sorted(milestones, key=lambda weights: checkpoint.step_of(weights) or 0):
        with contextlib.suppress(NotFoundError):
            rows.append(folder.store.read_record(f"evaluation/{name}/{weights}/metrics.json", what="a score"))
    return rows


def summary(scores: list[dict[str, Any]], quote: str) -> dict[str, Any]:
    """The last and the best milestone, and which one is the run's result by the rule that was set beforehand. All are
    compared by the feature that is quoted of the last one, as earlier versions quoted another (of PASS, CLS)."""
    from training.evaluation import evaluation

    quoted = scores[-1]["headline"]
    by_feature = [score["features"].get(quoted) or evaluation.headline(score) for score in scores]
    best = max(range(len(scores)), key=lambda place: by_feature[place]["mAP"])  # of equals the earliest
    chosen = {"last": scores[-1], "best": scores[best]}
    course = [{"step": score["step"], **values} for score, values in zip(scores, by_feature, strict=True)]
    return {"quoted": quote, "rule": RULES[quote], "result": chosen[quote], **chosen, "milestones": course}
