"""What a run folder says, read for the report: nothing here writes, and every file may be missing."""

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datapipe.core.errors import DataError
from training.core.run_folder.run_folder import RunFolder

Record = dict[str, Any]
"""One line of metrics: a step (1-based: steps done) and its numbers."""

_ATTEMPT = re.compile(r"metrics/attempt_(\d+)\.jsonl")
_METRICS = re.compile(r"evaluation/([^/]+)/([^/]+)/metrics\.json")
BASELINES = ("colour_histogram", "random")


@dataclass(frozen=True)
class Attempt:
    """One uninterrupted stretch of training, from a start or a restart to its end."""

    number: int
    header: Record
    records: tuple[Record, ...]
    cut_lines: int
    """Lines that a kill left unfinished."""
    saves: tuple[Record, ...] = ()
    """The checkpoints that came to exist: how long the loop stood still, and how long it took."""

    @property
    def first(self) -> int | None:
        """The first step it made."""
        return self.records[0]["step"] if self.records else None

    @property
    def last(self) -> int | None:
        """The last step it made."""
        return self.records[-1]["step"] if self.records else None

    @property
    def seconds(self) -> float:
        """From its first to its last record."""
        times = [record["time"] for record in self.records if "time" in record]
        return max(times) - min(times) if times else 0.0


@dataclass(frozen=True)
class Score:
    """One metrics.json."""

    set_name: str
    weights: str
    content: Record

    @property
    def step(self) -> int | None:
        """Steps done; None for the baselines."""
        return None if self.weights in BASELINES else self.content.get("step")

    @property
    def features(self) -> dict[str, dict[str, float]]:
        """Scores (0..1) by feature."""
        return self.content.get("features", {})

    @property
    def headline(self) -> str:
        """The feature that is quoted."""
        return self.content.get("headline") or next(iter(self.features), "")

    def value(self, metric: str) -> float | None:
        """A score (0..1) of the headline feature."""
        return self.features.get(self.headline, {}).get(metric)


@dataclass(frozen=True)
class TestSet:
    """All scores on one test set."""

    name: str
    scores: tuple[Score, ...]

    @property
    def checkpoints(self) -> list[Score]:
        """Scores along training, by step; of imported weights too."""
        scores_of_step = [
            (score.step or 0, score) for score in self.scores if score.weights not in BASELINES and score.features
        ]
        return [score for _, score in sorted(scores_of_step, key=lambda pair: pair[0])]

    @property
    def last(self) -> Score | None:
        """The score of the last checkpoint."""
        return self.checkpoints[-1] if self.checkpoints else None

    def baseline(self, weights: str) -> Score | None:
        """The score of "random" or "colour_histogram", if it was taken."""
        return next((score for score in self.scores if score.weights == weights and score.features), None)


class RunFiles:
    """A run folder, read lazily; whatever is missing is None or empty."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    @cached_property
    def names(self) -> frozenset[str]:
        """Every file that the report may use."""
        parts = ("command.txt", "config.toml", "deepspeed.json", "environment.json", "first_batch.jpg", "checkpoints/",
                 "table.json")  # fmt: skip
        grown = ("restarts.jsonl", "ranks/pace.jsonl", "pseudo_labels/epochs.jsonl")
        prefixes = (*parts, *grown, "metrics/", "evaluation/", "exports/", "faults/")
        return frozenset(name for prefix in prefixes for name in self.folder.names(prefix))

    def text(self, name: str) -> str | None:
        """A file's text."""
        return self.folder.read_text(name) if name in self.names else None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a file of JSON lines, but for a line that a kill cut."""
        records = []
        for line in (self.text(name) or "").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def bytes(self, name: str) -> bytes | None:
        """A file's bytes."""
        return self.folder.store.read(name) if name in self.names else None

    @cached_property
    def grid(self) -> list[Record]:
        """Rows of the table of a grid of evaluations; empty: it is none."""
        rows: list[Record] = self._parsed("table.json", json.loads).get("rows", [])
        return rows

    @property
    def trained(self) -> bool:
        """Is it the folder of a run? Else it may be one of scores alone."""
        return bool(self.names & {"config.toml", "command.txt", "environment.json"} or self.attempts)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as nested tables."""
        return self._parsed("config.toml", tomllib.loads)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, devices, git, manifest."""
        return self._parsed("environment.json", json.loads)

    @cached_property
    def attempts(self) -> tuple[Attempt, ...]:
        """In the order in which they were made."""
        numbered = sorted((int(match[1]), match[0]) for match in map(_ATTEMPT.fullmatch, self.names) if match)
        return tuple(self._attempt(number, name) for number, name in numbered)

    @cached_property
    def records(self) -> list[Record]:
        """One record a step, by step: the last attempt's, where several made the same step."""
        steps = {record["step"]: record for attempt in self.attempts for record in attempt.records}
        return [steps[step] for step in sorted(steps)]

    @cached_property
    def test_sets(self) -> tuple[TestSet, ...]:
        """By name."""
        by_set: dict[str, list[Score]] = {}
        for score in self._scores():
            by_set.setdefault(score.set_name, []).append(score)
        return tuple(TestSet(name, tuple(scores)) for name, scores in sorted(by_set.items()))

    def _scores(self) -> Iterator[Score]:
        for match in filter(None, map(_METRICS.fullmatch, sorted(self.names))):
            yield Score(match[1], match[2], self._parsed(match[0], json.loads))

    def _parsed(self, name: str, parse: Callable[[str], Record]) -> Record:
        """A file's content, empty where the file is missing. Raises DataError for one that is damaged."""
        text = self.text(name)
        try:
            return parse(text) if text else {}
        except ValueError as error:
            raise DataError(
                f"a file of the run is damaged: {error}",
                where=self.folder.store.address(name),
                hint="remove it to have the report without it",
            ) from error

    def _attempt(self, number: int, name: str) -> Attempt:
        lines, cut = [], 0
        for text in (self.text(name) or "").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the process was killed while it wrote this line
                cut += 1
        header: Record = next((line for line in lines if "attempt" in line), {})
        records = {line["step"]: line for line in lines if "attempt" not in line and "step" in line}
        saves = tuple(line for line in lines if "checkpoint" in line)
        return Attempt(number, header, tuple(records[step] for step in sorted(records)), cut, saves)
