"""What is asked of an evaluation: named weights, named data sets, and tasks; read from words, without PyTorch."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from datapipe.core.errors import ConfigError

TaskKind = Literal["zero-shot", "supervised", "usl", "uda", "transfer"]
WITH_LABELS: TaskKind = "supervised"
TRAINED: tuple[TaskKind, ...] = ("supervised", "usl", "uda")
"""Kinds of tasks that train before they score."""
FROM_SOURCE: tuple[TaskKind, ...] = ("uda", "transfer")
"""Kinds of tasks that begin with weights fine-tuned on another data set."""
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.@-]*)=(.+)", re.DOTALL)
_HINT = ("a list such as zero-shot,supervised,usl,uda:SOURCE,transfer:SOURCE, where SOURCE is the name of another data "
         "set")  # fmt: skip


class GridTask(NamedTuple):
    """One task of an evaluation."""

    kind: TaskKind
    source: str = ""
    """Name of the data set that is trained on with labels first; of `FROM_SOURCE` alone."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.source}" if self.source else self.kind

    @property
    def folder(self) -> str:
        """As a part of a path."""
        return f"{self.kind}-from-{self.source}" if self.source else self.kind


class NamedAddress(NamedTuple):
    """Weights or a data set, and what the table calls them."""

    name: str
    """Empty: not given."""
    address: str

    def __str__(self) -> str:
        return f"{self.name}={self.address}" if self.name else self.address


def read_tasks(text: str) -> tuple[GridTask, ...]:
    """Tasks of a list with commas, in its order. Raises ConfigError for what is none, and for one that comes twice."""
    tasks: list[GridTask] = []
    for word in filter(None, (one.strip() for one in text.split(","))):
        name, colon, source = word.partition(":")
        kind = next((one for one in get_args(TaskKind) if one == name), None)
        if kind is None:
            raise ConfigError(f"no task is called {name!r}", where="--tasks", hint=_HINT)
        if (kind in FROM_SOURCE) != bool(source) or (colon and not source):
            needs = "needs the data set that is trained on first" if kind in FROM_SOURCE else "has no source"
            raise ConfigError(f"{word!r}: {kind} {needs}", where="--tasks", hint=_HINT)
        tasks.append(GridTask(kind, source))
    if not tasks:
        raise ConfigError("no task is given", where="--tasks", hint=_HINT)
    if doubled := {str(task) for task in tasks if tasks.count(task) > 1}:
        raise ConfigError(f"given twice: {', '.join(sorted(doubled))}", where="--tasks", hint="once each")
    return tuple(tasks)


def read_address(word: str) -> NamedAddress:
    """`NAME=ADDRESS`, or an address alone; one with an equals sign in its first part is written ./a=b."""
    match = _NAMED.fullmatch(word)
    return NamedAddress(match[1], match[2]) if match else NamedAddress("", word)


def is_grid(weights: Sequence[str], data: Sequence[str], tasks: Sequence[GridTask]) -> bool:
    """Is it more than one evaluation, or one that has others before it?"""
    return len(weights) > 1 or len(data) > 1 or len(tasks) > 1 or any(task.source for task in tasks)


def read_recipes(words: Sequence[str], tasks: Sequence[GridTask]) -> dict[TaskKind, str]:
    """Recipe of each kind of trained task that has one of its own: of `KIND=RECIPE`, or of a recipe alone where there
    is one such kind. Raises ConfigError for what fits no task."""
    kinds = trained_kinds(tasks)
    recipes: dict[TaskKind, str] = {}
    for word in words:
        name, equals, recipe = word.partition("=")
        kind = next((one for one in kinds if one == name), None) if equals else None
        if kind is None and equals and name in TRAINED:
            raise ConfigError(f"a recipe is given for {name}, and no task is {name}", where="--recipe",
                              hint=f"--tasks with {name} in it, or without this recipe")  # fmt: skip
        if kind is None and len(kinds) != 1:
            raise ConfigError(f"{word!r}: which task is this recipe for?", where="--recipe",
                              hint=", or ".join(f"{one}={word}" for one in kinds) or "no task here trains")  # fmt: skip
        recipes[kind or kinds[0]] = recipe if kind else word
    return recipes


def trained_kinds(tasks: Sequence[GridTask]) -> list[TaskKind]:
    """Kinds of training that tasks take; of those with a source, that of the source too."""
    kinds = {task.kind for task in tasks if task.kind in TRAINED}
    if any(task.kind in FROM_SOURCE for task in tasks):
        kinds.add(WITH_LABELS)
    return [kind for kind in TRAINED if kind in kinds]


def split_flags(flags: Sequence[str]) -> dict[TaskKind, list[str]]:
    """Flags of recipes by the kind of task they are for: `--uda.method.iterations 4` for that alone, others for all
    that train."""
    own: dict[TaskKind, list[str]] = {kind: [] for kind in TRAINED}
    common: dict[TaskKind, list[str]] = {kind: [] for kind in TRAINED}
    targets = [common[kind] for kind in TRAINED]
    for word in flags:
        if word.startswith("--"):
            name, _, rest = word[2:].partition(".")
            kind = next((one for one in TRAINED if one == name), None)
            targets = [own[kind]] if kind else [common[one] for one in TRAINED]
            word = f"--{rest}" if kind else word
        for target in targets:
            target.append(word)
    return {kind: [*common[kind], *own[kind]] for kind in TRAINED}
