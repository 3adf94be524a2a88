"""python -m training reproduce: carry out the evaluation behind a published score, or behind one of the user's own,
and hold ours against it.

    OUT/reproduction.json     the row, our scores, and whether they agree
    OUT/evaluation/, ...      what `evaluate` writes; for fine-tuning a whole run folder
"""

import difflib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.storage import open_store
from training.commands.arguments import ReproduceCommand
from training.config import recipe_toml as recipes
from training.core.devices import choose_device
from training.core.host import Host, LocalHost, exit_code
from training.core.run_folder.lease import lease_on
from training.core.run_folder.write_guard import GuardedStore, WriteGuard
from training.evaluation import evaluation, fine_tune
from training.evaluation.weights_origin import WeightsOrigin, is_fine_tuned, of_card
from training.reid.datasets.benchmarks import PUBLISHED
from training.reid.datasets.open_dataset import ReIDSet
from training.reid.literature import BY_NAME, TASKS, LiteratureRow
from training.reid.settings import ScoringConfig
from training.report.report import write_report
from training.trainer.milestones import SUMMARY
from training.trainer.pretrain import pretrain_alone
from training.weights import export as exports

PROG = "python -m training reproduce"
RESULT = "reproduction.json"
LIST = "`python -m training reproduce --list` has all rows"
_METRICS = {"mAP": "mAP", "rank1": "Rank-1"}


def run(chosen: ReproduceCommand) -> int:
    """Carry out a published evaluation and hold ours against it: exit code 0 within the tolerance, 1 outside."""
    if chosen.list:
        print(listing())
        return cli.COMPLETE
    row = read_row(chosen.row)
    out = chosen.out or f"reproductions/{row.name}"
    with LocalHost(starting=True) as host:
        done = carry_out(row, chosen.weights, chosen.data, out, chosen.storage, host, source=chosen.source)
        if done is None:
            return exit_code(host.received)
    print(page(done))
    print(write_report(out, chosen.storage))
    return cli.COMPLETE if done.within else cli.FAILED


class Agreement(NamedTuple):
    """One score of ours beside the published one, both in percent."""

    metric: str
    ours: float
    published: float
    tolerance: float

    @property
    def difference(self) -> float:
        """Points; above 0: ours is better."""
        return self.ours - self.published

    @property
    def within(self) -> bool:
        """Not further apart than the tolerance. Scores are printed with one digit: half of the last one is nothing."""
        return abs(self.difference) < self.tolerance + 0.05


class Reproduction(NamedTuple):
    """What came of it."""

    row: LiteratureRow
    scores: dict[str, Any]
    """The content of metrics.json."""
    agreements: tuple[Agreement, ...]

    @property
    def within(self) -> bool:
        """Do all scores agree?"""
        return all(one.within for one in self.agreements)

    def to_tree(self) -> dict[str, Any]:
        """Plain values, for the file."""
        scores = {one.metric: {**one._asdict(), "difference": one.difference, "within": one.within}
                  for one in self.agreements}  # fmt: skip
        return {"reproduced": self.within, "agreements": scores, "row": asdict(self.row), "scores": self.scores}


def read_row(name: str) -> LiteratureRow:
    """The row of this name, or that of a TOML file of the user's own; a recipe it names may lie beside the file.

    Raises ConfigError with every mistake of the file.
    """
    if not name.endswith(".toml"):
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, list(BY_NAME), n=1)
            raise ConfigError(f"no published score is called {name!r}", where="reproduce",
                              hint=f"{f'did you mean {near[0]}? ' if near else ''}{LIST}")  # fmt: skip
        return BY_NAME[name]
    path = Path(name)
    try:
        row = TypeAdapter(LiteratureRow).validate_python(recipes.parse_toml(path.read_bytes(), where=name))
    except OSError as error:
        raise ConfigError(f"the row cannot be read: {error.strerror}", where=name, hint=LIST) from error
    except ValidationError as error:
        keys = ", ".join(field.name for field in fields(LiteratureRow))
        mistakes = "\n".join(f"    {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"mistakes in the row:\n{mistakes}", where=name, hint=f"its keys are {keys}") from None
    except ValueError as error:  # that of pydantic is one, too, and was told above
        raise ConfigError(f"not a TOML file: {error}", where=name, hint="check quotes and brackets") from error
    beside: dict[str, Any] = {
        name: str(path.parent / recipe)
        for name in ("recipe", "origin_recipe")
        if (recipe := getattr(row, name)) and (path.parent / recipe).is_file()
    }
    return replace(row, **beside)


def carry_out(
    row: LiteratureRow, weights: str, data: str, out: str, storage: StorageConfig, host: Host, *, source: str = ""
) -> Reproduction | None:
    """Score `weights` on `data` as the row's publication does, fine-tuned first unless they are; None where the host
    was told to stop on the way. `source`: data set that domain adaptation trains on first, unless the weights were.

    Raises ConfigError or DataError, before any work, where task, data set or weights are not those of the row.
    """
    if row.impossible:
        raise ConfigError(f"{row.name} cannot be reproduced here: {row.impossible}", where="reproduce", hint=LIST)
    scoring = ScoringConfig(data_name=row.data, rerank=row.reranking)
    reid = evaluation.open_data(data, storage, scoring)
    with lease_on(out, storage, show_line=host.show_line) as lease:
        return _carry_out(row, weights, data, source, out, storage, host, reid, scoring, lease)


def _carry_out(
    row: LiteratureRow, weights: str, data: str, source: str, out: str, storage: StorageConfig, host: Host,
    reid: ReIDSet, scoring: ScoringConfig, guard: WriteGuard,
) -> Reproduction | None:  # fmt: skip
    """Reproduce the row while the lease on the folder is held."""
    export = fine_tune.as_export(weights, out, storage)
    card = exports.load_card(open_store(export, storage))
    origin = of_card(card, data)
    refuse_others(row, card, origin, reid, weights)
    if row.task == "uda" and not is_fine_tuned(card):
        tuned = _source(row, export, card, source, out, storage, host)
        if tuned is None:
            return None
        export = tuned
    if row.task != "zero-shot" and (not is_fine_tuned(card) or _begins(row, origin)):
        scores = _fine_tuned(row, export, data, out, scoring, storage, host, guard)
    else:
        scores = _scored(row, export, data, out, scoring, storage)
    if scores is None:
        return None
    done = Reproduction(row, scores, agreements(row, scores))
    content = json.dumps(done.to_tree(), indent=1) + "\n"
    GuardedStore(open_store(out, storage), guard).replace(RESULT, content.encode())
    return done


def refuse_others(row: LiteratureRow, card: dict[str, Any], origin: WeightsOrigin, reid: ReIDSet, where: str) -> None:
    """Raises DataError for weights that the row's score cannot be of."""
    tuned = is_fine_tuned(card)
    begins = _begins(row, origin)
    files_of_both = row.task == "uda" and origin.task == "usl" and not card.get("method")  # theirs do not tell
    trained_identities = (card.get("origin") or {}).get("identities")
    identities = reid.train.identities if reid.train is not None else trained_identities
    wrong = {
        f"they are {origin.family}, the row is {row.method}": bool(row.family and origin.family)
        and row.family != origin.family,
        f"they are {_backbone(origin.arch, origin.stem, origin.parts)}, the row is "
        f"{_backbone(row.arch, row.stem, row.parts)}": bool(row.arch)
        and (row.arch, row.stem, row.parts) != (origin.arch, origin.stem, origin.parts),
        f"their feature puts CLS and part tokens together by {origin.fusion!r}, the row's by {row.fusion!r}": tuned
        and bool(row.fusion and origin.fusion)
        and row.fusion != origin.fusion,
        "they are fine-tuned, the row is of features as pre-training leaves them": tuned and row.task == "zero-shot",
        f"they are of the task {origin.task}, the row of {row.task}": row.task != "zero-shot"
        and origin.task not in ("zero-shot", row.task)
        and not begins
        and not files_of_both,
        f"they were fine-tuned on {card.get('trained_on')}, the row's on {row.origin} first": begins
        and card.get("trained_on", "") in PUBLISHED.keys() - {row.origin},
        f"they were fine-tuned on {origin.trained_on}, not on {row.data}": tuned
        and bool(origin.trained_on)
        and not begins,
        f"they were fine-tuned on {trained_identities} identities, {row.data} has {identities} to train on": (
            origin.task == "supervised" and not begins and trained_identities != identities
        ),
        f"they are for images of {_size(card['input']['size'])}, the row of {_size(row.size)}": (
            tuned or row.task == "zero-shot"
        )
        and tuple(card["input"]["size"]) != tuple(row.size),
    }
    if reasons := [reason for reason, holds in wrong.items() if holds]:
        raise DataError(f"these are not weights for {row.name}: {'; '.join(reasons)}", where=where, hint=LIST)


def _begins(row: LiteratureRow, origin: WeightsOrigin) -> bool:
    """Are these the weights that domain adaptation begins with?"""
    return row.task == "uda" and origin.task == "supervised"


def agreements(row: LiteratureRow, scores: dict[str, Any]) -> tuple[Agreement, ...]:
    """Compare our scores with the row's, for every score that it has. `scores`: the content of metrics.json."""
    feature = scores["headline"] + (" re-ranked" if row.reranking else "")
    measured = scores["features"][feature]
    published = {"mAP": row.mAP, "rank1": row.rank1}
    return tuple(
        Agreement(title, 100 * measured[key], value, row.tolerance)
        for key, title in _METRICS.items()
        if (value := published[key]) is not None
    )


def page(done: Reproduction) -> str:
    """Format our scores beside the published ones as text."""
    row = done.row
    lines = [about(row), f"{'':<8}{'ours':>8}{'published':>11}{'difference':>12}{'tolerance':>11}"]
    for one in done.agreements:
        verdict = "within" if one.within else "OUTSIDE"
        lines.append(f"{one.metric:<8}{one.ours:>8.1f}{one.published:>11.1f}{one.difference:>+12.1f}"
                     f"{one.tolerance:>11.1f}  {verdict}")  # fmt: skip
    lines += [f"note: {row.remark}"] if row.remark else []
    return "\n".join([*lines, f"{row.name}: {'reproduced' if done.within else 'NOT reproduced'}"])


def about(row: LiteratureRow) -> str:
    """One line."""
    arch = f"{_backbone(row.arch, row.stem, row.parts)}, " if row.arch else ""
    return f"{row.method}, {arch}{_size(row.size)}, {row.data}, {TASKS[row.task]} ({row.source})"


def listing() -> str:
    """Every row by name."""
    head = f"{'name':<50}{'mAP':>6}{'Rank-1':>8}  {'again':<12}{'tolerance':>9}  {'height x width':<15}{'source'}"
    lines = []
    for row in BY_NAME.values():
        rank1 = "-" if row.rank1 is None else f"{row.rank1:.1f}"
        again = "" if row.again is None else "{:.1f}/{:.1f}".format(*row.again)
        notes = {"NOT HERE": row.impossible, "note": row.remark}
        note = "".join(f"   {title}: {text}" for title, text in notes.items() if text)
        lines.append(f"{row.name:<50}{row.mAP:>6.1f}{rank1:>8}  {again:<12}{row.tolerance:>9.1f}  "
                     f"{_size(row.size):<15}{row.source}{note}")  # fmt: skip
    return "\n".join([head, *lines])


def _source(
    row: LiteratureRow, export: str, card: dict[str, Any], source: str, out: str, storage: StorageConfig, host: Host
) -> str | None:
    """The export of these weights fine-tuned with labels on the data set that adaptation comes from, in a run of its
    own below `out`; None: told to stop."""
    if not source:
        raise ConfigError(
            f"{row.name} begins with weights fine-tuned on {row.origin}, and these are not", where="--source",
            hint=f"--source FOLDER of {row.origin}, or --weights that were fine-tuned there",
        )  # fmt: skip
    size = [str(side) for side in row.size]
    fusion = ["--method.fusion", row.fusion] if row.fusion else []
    folder = open_store(out, storage).address("source")
    flags = ["--backbone.size", *size, *fusion]
    config = fine_tune.prepare(export, source, folder, recipe=row.origin_recipe, flags=flags, storage=storage,
                               scoring=ScoringConfig(data_name=row.origin))  # fmt: skip
    if not pretrain_alone(config, host).complete:
        return None
    return open_store(folder, storage).address(f"exports/{config.evaluation.quote}")


def _fine_tuned(
    row: LiteratureRow, export: str, data: str, out: str, scoring: ScoringConfig, storage: StorageConfig, host: Host,
    guard: WriteGuard,
) -> dict[str, Any] | None:  # fmt: skip
    """The scores that the recipe quotes of the weights it ends with; None: told to stop."""
    size = [str(side) for side in row.size]
    flags = ["--backbone.size", *size, "--evaluation.interpolation", row.interpolation, *row.flags]
    task = "usl" if row.task == "uda" else row.task
    config = fine_tune.prepare(export, data, out, task=task, recipe=row.recipe, flags=flags, scoring=scoring,
                               storage=storage)  # fmt: skip
    if not pretrain_alone(config, host, guard=guard).complete:
        return None
    result: dict[str, Any] = open_store(out, storage).read_record(SUMMARY)["result"]
    return result


def _scored(
    row: LiteratureRow, export: str, data: str, out: str, scoring: ScoringConfig, storage: StorageConfig
) -> dict[str, Any]:
    """The scores of the weights as they are."""
    (task,) = evaluation.tasks(export, data, storage, scoring, out=out, interpolation=row.interpolation)
    return evaluation.score(task, device=choose_device("auto"))


def _backbone(arch: str, stem: str, parts: int) -> str:
    return f"{arch}{' with ICS stem' if stem == 'ics' else ''}{f' with {parts} part tokens' if parts else ''}"


def _size(size: Any) -> str:
    return f"{size[0]} x {size[1]}"
