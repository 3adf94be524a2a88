"""What follows the name of each command of `python -m training`: read before anything that takes long to load.

Settings, help and mistakes need no PyTorch, but for the flags of a recipe. Work is in the modules beside this one.
"""

from typing import Annotated, Literal

from pydantic import Field

from datapipe.core import cli
from datapipe.core.cli import INLINE, POSITIONAL, Arg, page_of, parse, read_some, show_help
from datapipe.core.config import Size, Statistics, StorageConfig
from datapipe.core.errors import UsageError
from datapipe.core.settings import settings
from training.reid.settings import ScoringConfig


@settings
class EvaluateCommand:
    weights: Annotated[str, POSITIONAL]
    """Run folder, folder of an export or import, or a file of published weights, local or s3://bucket/prefix;
    "random" with --task supervised: none."""
    data: str
    """Labelled data set: a folder or s3://bucket/prefix with its files, or its shards."""
    task: Literal["zero-shot", "supervised"] = "zero-shot"
    """"zero-shot": retrieval with the features as they are. "supervised": fine-tune on the training part first; all
    flags of a recipe may follow, such as --optimisation.epochs 60."""
    out: str = ""
    """Folder for the scores; for --task supervised the run folder. Empty: that of the weights."""
    recipe: str = ""
    """Of fine-tuning: a TOML file, or supervised, supervised_384, supervised_pass, supervised_mae. Empty: the one that
    suits the weights."""
    label_fraction: float = 1.0
    """Share of the training identities that fine-tuning may use."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Arg(aliases=("--engine.device",))] = "auto"
    """"auto": a GPU where there is one; "cuda": an error where there is none."""
    scoring: Annotated[ScoringConfig, INLINE] = ScoringConfig()
    """How the data set is taken and scored."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def evaluate(arguments: list[str]) -> int:
    """Score weights by retrieval: a run's checkpoints beside baselines, an export, a file; or after fine-tuning."""
    page = page_of(evaluate, "runs/first --data data/market1501", more=(FINE_TUNING,))
    show_help(cli.flags_of(EvaluateCommand), arguments, page)
    chosen, flags = read_some(EvaluateCommand, arguments, prog=page.prog)
    check_zero_shot(chosen, flags, prog=page.prog)
    from training.commands.evaluate import run

    return run(chosen, flags)


FINE_TUNING = ("With --task supervised, flags of a recipe may follow, such as --optimisation.epochs 60; "
               "`python -m training pretrain supervised --help-all` has them.")  # fmt: skip


def check_zero_shot(chosen: EvaluateCommand, flags: list[str], *, prog: str) -> None:
    """Raise UsageError for flags of a recipe where there is none."""
    if flags and chosen.task == "zero-shot":
        raise cli.unknown(flags, cli.flags_of(type(chosen)), prog)


@settings
class ReproduceCommand:
    row: Annotated[str, POSITIONAL] = ""
    """Name of a published row, or a TOML file with a row of your own."""
    list: bool = False
    """Print every row: name, mAP, Rank-1, what its authors' code gave them again, tolerance, source."""
    weights: str = ""
    """File of published weights, folder of an export or import, or run folder, local or s3://bucket/prefix. Weights
    that are fine-tuned already are scored as they are; others are fine-tuned first, as the row says."""
    data: str = ""
    """The row's data set: a folder or s3://bucket/prefix with its files, or its shards."""
    out: str = ""
    """Folder for scores, report and, where it takes one, the run. Started again with the same folder, it goes on.
    Empty: reproductions/ROW."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def reproduce(arguments: list[str]) -> int:
    """Carry out a published evaluation and hold ours against it: exit code 0 within the tolerance, 1 outside."""
    page = page_of(reproduce, "pass-vits-market1501 --weights pass_vit_small_full.pth --data data/market1501")
    chosen = parse(ReproduceCommand, arguments, page)
    missing = [name for name in ("row", "weights", "data") if not getattr(chosen, name)]
    if missing and not chosen.list:
        raise UsageError(f"not given: {', '.join(missing)}", where=page.prog,
                         hint="reproduce ROW --weights FILE --data FOLDER; `--list` has all rows")  # fmt: skip
    from training.commands.reproduce import run

    return run(chosen)


@settings
class ExportCommand:
    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    checkpoint: str = ""
    """Which one, e.g. step_0012000. Empty: the newest that verifies."""
    out: str = ""
    """Folder for backbone.safetensors and card.json. Empty: exports/ of the run."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def export(arguments: list[str]) -> int:
    """Write a checkpoint's backbone for timm, with a card that says what it is."""
    chosen = parse(ExportCommand, arguments, page_of(export, "runs/first"))
    from training.commands.weights import export as run

    return run(chosen)


@settings
class ImportCommand:
    file: Annotated[str, POSITIONAL]
    """Published weights: .pth, .pt or .safetensors, local or s3://bucket/prefix/name. Nothing in it is run."""
    out: str
    """Folder for backbone.safetensors and card.json."""
    layout: Annotated[str, Arg(name="as")] = ""
    """What the file must be, e.g. pass, personvit_checkpoint or vit; a file of another layout is refused with the
    list of all. Empty: its keys tell."""
    network: Literal["teacher", "student"] = "teacher"
    """Which network of a training checkpoint. The published backbones are teachers."""
    size: Size | None = None
    """Image size (height, width) to resize the position table for. None: that of the file."""
    native: Size | None = None
    """Image size that the file's position table was made for. None: as its length tells, for images twice or three
    times as high as wide and for squares."""
    positions: Literal["bicubic", "bilinear"] = "bilinear"
    """How positions are resized: "bilinear" for evaluation and fine-tuning, "bicubic" for going on with pre-training,
    both as the references do."""
    statistics: Statistics | None = None
    """What images are normalised with: "imagenet" or "half" (.5, .5), which some weights of timm want. None: as the
    layout's family does."""
    heads: int = 0
    """Attention heads. 0: those of the published transformer of that width."""
    depth: int = 0
    """Number of blocks. 0: those of the published transformer of that width."""
    licence: str = ""
    """Licence of the weights and their data, for the card."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def import_published(arguments: list[str]) -> int:
    """Read weights published by others and write their backbone as an export, with a card that says where from."""
    page = page_of(import_published, "pass_vit_small_full.pth --out weights/pass", name="import")
    chosen = parse(ImportCommand, arguments, page)
    from training.commands.weights import import_published as run

    return run(chosen)


@settings
class ReportCommand:
    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def report(arguments: list[str]) -> int:
    """Write report.html, one self-contained file, from what the run folder holds."""
    chosen = parse(ReportCommand, arguments, page_of(report, "runs/first"))
    from training.report.report import write_report

    print(write_report(chosen.run, chosen.storage))
    return cli.COMPLETE


@settings
class ListCommand:
    """List a run's checkpoints; RUN verify reads them, RUN compare A B tells how two differ, RUN prune deletes old
    ones."""

    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class VerifyCommand:
    """Read checkpoints and compare them with their checksums."""

    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    names: Annotated[tuple[str, ...], POSITIONAL] = ()
    """Which ones, e.g. step_0012000. None: all."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class CompareCommand:
    """Tell how two checkpoints differ; the exit code is 0 where training would go on alike from both."""

    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    a: Annotated[str, POSITIONAL]
    """A checkpoint of the run (step_0012000), another run's folder (its newest), or the folder of a checkpoint."""
    b: Annotated[str, POSITIONAL]
    """The same."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class PruneCommand:
    """Delete all but the newest good checkpoints, and what crashed attempts left behind them."""

    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    keep_last: Annotated[int, Field(ge=1)]
    """So many of the newest that verify stay."""
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """Those at multiples of this stay too. 0: none."""
    dry_run: bool = False
    """Only say what would be deleted."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def checkpoints(arguments: list[str]) -> int:
    """List, verify, compare or prune a run's checkpoints."""
    action = arguments[1] if len(arguments) > 1 else ""
    if action not in ACTIONS:
        page = page_of(checkpoints, "runs/first", more=tuple(
            f"RUN {name}: {' '.join((kind.__doc__ or '').split())}" for name, kind in ACTIONS.items()))  # fmt: skip
        chosen: object = parse(ListCommand, arguments, page)
    else:
        page = page_of(checkpoints, name=f"checkpoints RUN {action}")
        chosen = parse(ACTIONS[action], [arguments[0], *arguments[2:]], page)
    from training.commands import checkpoints as work

    return getattr(work, action or "listing")(chosen)


ACTIONS: dict[str, type] = {"verify": VerifyCommand, "compare": CompareCommand, "prune": PruneCommand}


@settings
class NoFlags:
    """A command without any."""


def warm(arguments: list[str]) -> int:
    """Start DeepSpeed once, with a tiny module, to see that it works here."""
    parse(NoFlags, arguments, page_of(warm))
    from training.commands.pretrain import warm as run

    return run()


@settings
class RecipeCommand:
    recipe: Annotated[str, POSITIONAL]
    """A TOML file, or one of the recipes above."""


@settings
class PretrainCommand(RecipeCommand):
    dry_run: bool = False
    """Say whether it fits, what to change, steps, time and memory; start nothing. Needs no data set and no GPU."""
    full: bool = False
    """With --dry-run: also the resolved recipe, networks, memory in parts, and what differs from the publication."""
    json: bool = False
    """With --dry-run: all of it, for programs; memory in bytes."""
    rows: Annotated[int, Field(gt=0)] | None = None
    """With --dry-run: images of a data set that is not at hand. None: LUPerson's."""
    gpu_memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """With --dry-run: memory of a GPU, 10^9 bytes. None: that of this machine's, if any."""


def check_dry_run(chosen: PretrainCommand, *, prog: str) -> None:
    """Raise UsageError for flags of a dry run where none is asked for."""
    given = [name for name in ("full", "json", "rows", "gpu_memory_gb") if getattr(chosen, name)]
    if given and not chosen.dry_run:
        names = ", ".join(f"`--{name.replace('_', '-')}`" for name in given)
        raise UsageError(f"{names} goes with `--dry-run`", where=prog, hint="add --dry-run, or leave it out")


def pretrain(arguments: list[str]) -> int:
    """Train a recipe in this one process, without Ray; `--dry-run` says what it would be and needs."""
    from training.commands.recipe import read_with_recipe

    page = page_of(pretrain, "pass_vits --stream.manifest data/shards --dry-run")
    chosen, config = read_with_recipe(PretrainCommand, arguments, page)
    check_dry_run(chosen, prog=page.prog)
    from training.commands import pretrain as work

    return work.dry_run(chosen, config) if chosen.dry_run else work.run(config)


def views(arguments: list[str]) -> int:
    """Print the views that a recipe trains on, as JSON for `python -m datapipe preview --views FILE`."""
    from training.commands.recipe import read_with_recipe

    _, config = read_with_recipe(RecipeCommand, arguments, page_of(views, "pass_vits > views.json"))
    from training.config.build import training_views

    print(training_views(config).to_json())
    return cli.COMPLETE
