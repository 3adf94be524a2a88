"""From what is asked for to cells: weights become exports, data sets are opened and checked, and every cell that
trains has its whole recipe before any of them starts.

    OUT/grid.json           what the addresses of weights stood for when the grid began
    OUT/init/<checksum>/    weights as exports        OUT/data/<name>/   training parts as shards
    OUT/cells/<weights>/<data set>/<task>/            a run folder, or one of scores
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from datapipe.core.config import StorageConfig
from datapipe.core.errors import ConfigError, DataError, NotFoundError
from datapipe.storage import full_url, open_store
from training import checkpoint, methods
from training.config.recipe_toml import PRETRAIN
from training.config.run_config import RunConfig
from training.core.run_folder.run_folder import RunFolder
from training.evaluation import evaluation, fine_tune
from training.grid.cells import Cell, GridData, GridWeights, folder_of
from training.grid.request import FROM_SOURCE, TRAINED, WITH_LABELS, GridTask, NamedAddress, TaskKind
from training.preflight.checks import check
from training.reid.datasets.benchmarks import PUBLISHED
from training.reid.datasets.training_shards import shard_training_part
from training.reid.settings import RANDOM, ScoringConfig
from training.weights import export as exports
from training.weights.export import CARD
from training.weights.safe_load import FILES, is_weights_file

PLAN = "grid.json"
SOURCE_TASK = GridTask(WITH_LABELS)
_UNFIT = re.compile(r"[^A-Za-z0-9_.@-]+")
_ENDINGS = tuple(sorted(FILES, key=len, reverse=True))


@dataclass(frozen=True)
class GridRequest:
    """What is asked for."""

    weights: tuple[NamedAddress, ...]
    data: tuple[NamedAddress, ...]
    tasks: tuple[GridTask, ...]
    out: str
    every_checkpoint: bool = False
    """Every complete checkpoint of runs, not the newest alone."""
    recipes: tuple[tuple[TaskKind, str], ...] = ()
    flags: tuple[tuple[TaskKind, tuple[str, ...]], ...] = ()
    """Flags of recipes, by kind of task."""
    scoring: ScoringConfig = ScoringConfig()
    storage: StorageConfig = StorageConfig()
    prog: str = PRETRAIN


@dataclass(frozen=True)
class LeftOut:
    """A cell that there cannot be, and why."""

    task: str
    weights: str
    data: str
    why: str

    @property
    def what(self) -> str:
        """In words."""
        return f"{self.task} of {self.weights} on {self.data}"


def open_sets(request: GridRequest, *, shard: bool = True) -> list[GridData]:
    """Every data set, opened and checked, its training part in shards where a task trains on it. `shard`: False writes
    nothing.

    Raises DataError as `open_reid` does, ConfigError for names that do not tell data sets apart, and for a source that
    is none of them.
    """
    if len(request.data) > 1 and request.scoring.data_name:
        raise ConfigError("one name for several data sets", where="--data-name",
                          hint="--data market1501=FOLDER --data msmt17=FOLDER")  # fmt: skip
    sets: list[GridData] = []
    sources = {task.source for task in request.tasks if task.source}
    trains = any(task.kind in TRAINED for task in request.tasks)
    for name, url in request.data:
        url = full_url(url)
        kind = name if name in PUBLISHED or name == "own" else request.scoring.data_name
        scoring = replace(request.scoring, data_name=kind)
        print(f"reads the data set {url}", flush=True)
        reid = evaluation.open_data(url, request.storage, scoring)
        name = name or reid.name
        if name in {one.name for one in sets}:
            raise ConfigError(f"two data sets are called {name}", where="--data",
                              hint="a name each: --data FIRST=FOLDER --data SECOND=FOLDER")  # fmt: skip
        manifest = ""
        if shard and reid.train is not None and (trains or name in sources):
            out = open_store(request.out, request.storage).address(f"data/{name}")
            manifest = shard_training_part(reid, out, request.storage).url
        sets.append(GridData(name, url, reid.name, repr(reid.about()["counts"]), scoring, manifest,
                             reid.train is not None))  # fmt: skip
    names = [one.name for one in sets]
    for source in sorted(sources):
        if source not in names:
            raise ConfigError(f"no data set is called {source}", where="--tasks",
                              hint=f"given are {', '.join(names)}; --data {source}=FOLDER")  # fmt: skip
        if not sets[names.index(source)].trainable:
            raise DataError(f"{source} has no images to train on, so nothing can begin there",
                            where=sets[names.index(source)].url, hint="another source")  # fmt: skip
    return sets


class WeightsList:
    """The weights of a grid, as exports: what an address stands for is settled when it is first looked at."""

    def __init__(self, request: GridRequest, show_line: Callable[[str], None] = print, *, exports_in: str = "") -> None:
        """`exports_in`: folder for exports that are not there yet; then nothing is written to the grid's own."""
        self._request, self._show_line = request, show_line
        self._store = open_store(request.out, request.storage) if request.out else None
        self._exports_in, self._keeps = exports_in or request.out, not exports_in
        self._known = self._read()
        self._looked_at: set[str] = set()

    def all(self) -> list[GridWeights]:
        """What there is to evaluate now; later calls have new checkpoints too where every one is wanted."""
        chosen = [one for number, given in enumerate(self._request.weights) for one in self._of(number, given)]
        names = [one.name for one in chosen]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"several weights are called {', '.join(sorted(doubled))}", where="WEIGHTS",
                              hint="a name each: FIRST=ADDRESS SECOND=ADDRESS")  # fmt: skip
        return chosen

    def _of(self, number: int, given: NamedAddress) -> list[GridWeights]:
        name, address = given
        if address == RANDOM:
            return [GridWeights(name or RANDOM, RANDOM, "")]
        address, storage = full_url(address), self._request.storage
        run, of_run = evaluation.checkpoint_of(address)
        if is_weights_file(address) or open_store(address, storage).exists(CARD):
            return [self._export(name or _short(address), address, address)]
        names = self._checkpoints(run)
        if not names:
            raise DataError("the run has no complete checkpoint", where=run, hint="let it reach its first save")
        every = self._request.every_checkpoint
        if of_run:
            wanted = [of_run]
        elif every:  # those too that were pruned since they were copied
            wanted = sorted({*names, *(one.checkpoint for one in self._copied(address))})
        else:
            wanted = [self._newest(name, address, names)]
        made = []
        for one in wanted:
            try:
                made.append(self._export(f"{name or _short(run)}@{one}", address, f"{run}/checkpoints/{one}", one))
            except (DataError, NotFoundError):
                if of_run or one in self._checkpoints(run):
                    raise
                self._show_line(f"{one} of {run} was pruned before it could be copied")
        if not (made or every):
            return self._of(number, given)  # there is a newer one by now
        return made

    def _newest(self, name: str, address: str, names: Sequence[str]) -> str:
        """The newest checkpoint when the grid began: a grid that goes on does so with the same weights."""
        before = self._copied(address)
        chosen = before[-1].checkpoint if before else names[-1]
        if chosen != names[-1]:
            self._show_line(f"{name or address}: {chosen}, the newest when this grid began; {names[-1]} is there by "
                            "now: name it, or --every-checkpoint")  # fmt: skip
        return chosen

    def _copied(self, address: str) -> list[GridWeights]:
        """Checkpoints of a run that are exports here."""
        return [one for one in self._known.values() if one.given == address and one.checkpoint]

    def _checkpoints(self, run: str) -> list[str]:
        folder, _ = evaluation.open_run(run, self._request.storage)
        return checkpoint.complete(folder.at("checkpoints"))

    def _export(self, name: str, given: str, address: str, chosen: str = "") -> GridWeights:
        """These weights as an export, made now unless it was made before."""
        name = _UNFIT.sub("-", name)
        storage = self._request.storage
        if (known := self._known.get(name)) and known.given == given:
            if name in self._looked_at:
                return known
            self._looked_at.add(name)
            card = exports.load_card(open_store(known.start, storage))
            if card["file"]["sha256"] != known.sha256:
                raise DataError(f"{name} holds other weights than when this grid began", where=address,
                                hint="give the grid of the new weights a folder of its own with --out")  # fmt: skip
            return known
        self._show_line(f"reads {address}")
        start = fine_tune.as_export(address, self._exports_in, storage)
        card = exports.load_card(open_store(start, storage))
        rows = _rows(evaluation.checkpoint_of(address)[0], storage) if chosen else None
        made = GridWeights(name, given, start, card["file"]["sha256"], chosen, card.get("step") or None,
                           card.get("samples") or None, rows)  # fmt: skip
        self._known[name] = made
        self._looked_at.add(name)
        if self._keeps:
            self._write()
        return made

    def _read(self) -> dict[str, GridWeights]:
        if self._store is None:
            return {}
        try:
            tree = self._store.read_record(PLAN, what="the list of the grid's weights")
        except NotFoundError:
            return {}
        try:
            return {one["name"]: GridWeights(**one) for one in tree["weights"]}
        except (KeyError, TypeError) as error:
            raise DataError(f"the list of the grid's weights is damaged: {error!r}", where=self._store.address(PLAN),
                            hint="delete it: the weights are looked up anew") from error  # fmt: skip

    def _write(self) -> None:
        assert self._store is not None  # who keeps exports has a folder for them
        tree = {"weights": [asdict(one) for one in self._known.values()]}
        self._store.replace(PLAN, (json.dumps(tree, indent=1) + "\n").encode())


class Planner:
    """Cells of weights, for the data sets and tasks of a request."""

    def __init__(self, request: GridRequest, sets: Sequence[GridData]) -> None:
        self._request, self._sets = request, {one.name: one for one in sets}
        self._recipes, self._flags = dict(request.recipes), dict(request.flags)

    def cells(self, weights: GridWeights) -> tuple[list[Cell], list[LeftOut]]:
        """The cells of these weights, sources before what begins with them, and what is left out.

        Raises ConfigError or DataError where one of them could not run.
        """
        cells: dict[str, Cell] = {}
        left_out: list[LeftOut] = []
        for task in self._request.tasks:
            for data in self._sets.values():
                if why := self._refusal(weights, data, task):
                    left_out.append(LeftOut(str(task), weights.name, data.name, why))
                    continue
                for cell in self._cells(weights, data, task):
                    cells.setdefault(cell.folder, cell)
        for cell in cells.values():
            self._check(cell)
        return list(cells.values()), left_out

    def _refusal(self, weights: GridWeights, data: GridData, task: GridTask) -> str:
        """Why there can be no such cell; empty: there can."""
        if task.source == data.name:
            return "it is the source"
        if task.kind in TRAINED and not data.trainable:
            return "it has no images to train on"
        if not weights.start and task.kind == "zero-shot":
            return "random weights are scored beside the checkpoints of a run (`evaluate RUN`)"
        return ""

    def _cells(self, weights: GridWeights, data: GridData, task: GridTask) -> list[Cell]:
        """The cell, after the one that it begins with if any."""
        if task.kind == "zero-shot":
            return [self._cell(weights, data, task)]
        if task.kind not in FROM_SOURCE:
            return [self._cell(weights, data, task, config=self._config(weights, data, task))]
        target = self._config(weights, data, GridTask("uda", task.source)) if data.trainable else None
        source = self._source(weights, self._sets[task.source], target)
        assert source.config is not None
        start = f"{source.url}/exports/{source.config.evaluation.quote}"
        if task.kind == "transfer":
            return [source, self._cell(weights, data, task, start=start, source=source.folder, remark=source.remark)]
        assert target is not None
        config = replace(target, init=replace(target.init, weights=start))
        return [source, self._cell(weights, data, task, start=start, source=source.folder, config=config)]

    def _source(self, weights: GridWeights, data: GridData, target: RunConfig | None) -> Cell:
        """The cell of fine-tuning with labels that adaptation begins with: its feature is put together as adaptation
        does it, as in the references' scripts."""
        config = self._config(weights, data, SOURCE_TASK)
        fusion = methods.fusion(target.method) if target else ""
        if not fusion or fusion == methods.fusion(config.method):
            return self._cell(weights, data, SOURCE_TASK, config=config)
        config = self._config(weights, data, SOURCE_TASK, "--method.fusion", fusion)
        return self._cell(weights, data, SOURCE_TASK, config=config, remark=f"fusion {fusion}")

    def _cell(
        self, weights: GridWeights, data: GridData, task: GridTask, *, config: RunConfig | None = None, start: str = "",
        source: str = "", remark: str = "",
    ) -> Cell:  # fmt: skip
        name = task.folder + (f"-{_UNFIT.sub('-', remark)}" if remark and config else "")
        folder = folder_of(weights, data, name)
        out = full_url(self._request.out)
        cell = Cell(folder, weights, data, task, out, self._request.storage, start or weights.start, source, config,
                    remark)  # fmt: skip
        return replace(cell, config=replace(config, out=cell.url)) if config else cell

    def _config(self, weights: GridWeights, data: GridData, task: GridTask, *more: str) -> RunConfig:
        """The recipe of a cell that trains; of adaptation as if it began with the weights themselves."""
        card: dict[str, Any] = {}
        if weights.start:
            card = exports.load_card(open_store(weights.start, self._request.storage))
        kind = task.kind
        flags = [*self._flags.get(kind, ()), *more]
        if data.shards:
            flags += ["--stream.manifest", data.shards]
        return fine_tune.resolved(
            weights.start, card, data.set_name, data.url, "", task="usl" if kind == "uda" else kind,
            recipe=self._recipes.get(kind, ""), flags=flags, scoring=data.scoring, storage=self._request.storage,
            adapted=True if kind == "uda" else None, prog=self._request.prog,
        )  # fmt: skip

    def _check(self, cell: Cell) -> None:
        """Refuse what can be refused before anything starts."""
        config = cell.config
        if config is None or not cell.data.shards:
            return
        if cell.source and not open_store(cell.start, cell.storage).exists(CARD):
            config = replace(config, init=replace(config.init, weights=cell.weights.start))
        try:
            check(config, 1)
        except (ConfigError, DataError) as error:
            error.what = f"{cell.folder}: {error.what}"
            raise


def _short(address: str) -> str:
    """A name for weights: the last part of their address that says something."""
    parts = [part for part in re.split(r"[/\\]+", address.rstrip("/")) if part]
    while len(parts) > 1 and parts[-1] in ("last", "best", "exports", "export"):
        parts.pop()
    name = parts[-1]
    return next((name[: -len(ending)] for ending in _ENDINGS if name.endswith(ending)), name)


def _rows(run: str, storage: StorageConfig) -> int | None:
    manifest = RunFolder(run, storage).read_record("environment.json").get("manifest")
    rows = manifest.get("rows") if isinstance(manifest, dict) else None
    return rows if isinstance(rows, int) and rows > 0 else None
