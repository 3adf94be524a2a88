"""What a run folder says, read for the report: nothing here writes, and every file may be missing, or damaged."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datapipe.core.bounds.text_trees import parse_json, parse_toml
from datapipe.core.errors import UserError
from training.core.run_folder.run_folder import RunFolder

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""One line of metrics: a step (1-based: steps done) and its numbers."""

_ATTEMPT = re.compile(r"metrics/attempt_(\d+)\.jsonl")
_METRICS = re.compile(r"evaluation/([^/]+)/([^/]+)/metrics\.json")
MOST_TEXT_BYTES = 4 << 30
"""Of a file of text; a run of a million steps leaves 0.5 GB of metrics."""
MOST_FILE_BYTES = 1 << 30
MOST_NUMBER = 1e15
"""Steps and images beyond any run: a damaged line."""
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
        """A file's text; bytes that are no UTF-8 show as \\xNN. None where it is not there, or cannot be read."""
        data = self._read(name, MOST_TEXT_BYTES)
        return None if data is None else data.decode("utf-8", "backslashreplace")

    def lines(self, name: str) -> list[Record]:
        """The records of a file of JSON lines, but for lines that are none: a kill cuts the last one."""
        return self._records(name)[0]

    def _read(self, name: str, most: int) -> bytes | None:
        if name not in self.names:
            return None
        try:
            return self.folder.store.read_small(name, most)
        except UserError as error:
            log.warning("the report is without %s: %s", name, error.what)
            return None

    def bytes(self, name: str) -> bytes | None:
        """A file's bytes; None where it is not there, or cannot be read."""
        return self._read(name, MOST_FILE_BYTES)

    def _records(self, name: str) -> tuple[list[Record], int]:
        """(records, how many lines are none)."""
        records, cut = [], 0
        for line in (self.text(name) or "").splitlines():
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and _is_sound(record):
                records.append(record)
            else:
                cut += 1
        return records, cut

    @cached_property
    def grid(self) -> list[Record]:
        """Rows of the table of a grid of evaluations; empty: it is none."""
        rows = self._parsed("table.json", parse_json).get("rows", [])
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    @property
    def trained(self) -> bool:
        """Is it the folder of a run? Else it may be one of scores alone."""
        return bool(self.names & {"config.toml", "command.txt", "environment.json"} or self.attempts)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as nested tables."""
        tables = self._parsed("config.toml", parse_toml)
        return {key: value for key, value in tables.items() if isinstance(value, dict) or key not in TABLES}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, devices, git, manifest."""
        return self._parsed("environment.json", parse_json)

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
            content = self._parsed(match[0], parse_json)
            features = content.get("features", {})
            if content and isinstance(features, dict) and all(isinstance(one, dict) for one in features.values()):
                yield Score(match[1], match[2], content)

    def _parsed(self, name: str, parse: Callable[[str], Any]) -> Record:
        """A file's content, empty where the file is missing, or damaged, which is said."""
        text = self.text(name)
        try:
            content = parse(text) if text else {}
            if not isinstance(content, dict):
                raise ValueError(f"it is of type {type(content).__name__}")
            return content
        except ValueError as error:
            log.warning("the report is without %s, which is damaged: %s", name, error)
            return {}

    def _attempt(self, number: int, name: str) -> Attempt:
        lines, cut = self._records(name)
        header: Record = next((line for line in lines if "attempt" in line), {})
        records = {line["step"]: line for line in lines if "attempt" not in line and "step" in line}
        saves = tuple(line for line in lines if "checkpoint" in line and all(key in line for key in SAVE))
        return Attempt(number, header, tuple(records[step] for step in sorted(records)), cut, saves)


TABLES = ("backbone", "optimisation", "stream", "storage", "engine")
"""Keys of a recipe that are tables."""
SAVE = ("save_stood_s", "save_took_s", "save_share")
WHOLE = ("step", "samples", "world", "checkpoint")
"""Keys of a record whose values are whole numbers."""
NUMBERS = (*SAVE, "time", "epoch", "bytes_fetched")
"""Keys of a record whose values are numbers; `time` may be text as well, in a header."""


def _is_sound(record: Record) -> bool:
    """Whether what plots and tables are made of is of its kind."""
    header = "attempt" in record
    for key, value in record.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, int) and abs(value) > MOST_NUMBER:
            return False
        if key in WHOLE and not (type(value) is int and value >= 0):
            return False
        if key in NUMBERS and not (number and math.isfinite(value)) and not (header and isinstance(value, str)):
            return False
    return True
