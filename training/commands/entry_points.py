"""The commands of `python -m training`: each reads its words, and only then loads what its work needs.

Help and mistakes need no PyTorch, but for the flags of a recipe.
"""

from typing import TypeVar

from datapipe.core import cli
from datapipe.core.cli import page_of, parse, read_some, show_help
from datapipe.core.errors import UsageError
from training.commands.arguments import (
    CompareCommand,
    EmbedCommand,
    EvaluateCommand,
    ExportCommand,
    ImportCommand,
    ListCommand,
    NoFlags,
    PretrainCommand,
    PruneCommand,
    RecipeCommand,
    ReportCommand,
    ReproduceCommand,
    VerifyRunCommand,
)
from training.grid.request import WITH_LABELS, read_recipes, trained_kinds


def evaluate(arguments: list[str]) -> int:
    """Score weights by retrieval: a run's checkpoints beside baselines, an export, a file; or after fine-tuning. Or
    features that another tool has made."""
    page = page_of(evaluate, "runs/first --data data/market1501", more=(FINE_TUNING,))
    chosen, flags = read_evaluate(EvaluateCommand, arguments, page)
    from training.commands.evaluate import run

    return run(chosen, flags)


FINE_TUNING = ("With tasks that train, flags of a recipe may follow, such as --optimisation.epochs 60; "
               "`python -m training pretrain supervised --help-all` has them. Several weights, data sets or tasks make "
               "a grid: one table of all, in --out.")  # fmt: skip


E = TypeVar("E", bound=EvaluateCommand)


def read_evaluate(kind: type[E], words: list[str], page: cli.Page) -> tuple[E, list[str]]:
    """The settings of an evaluation, and the flags of a recipe that followed. Raises UsageError for flags of a recipe
    where nothing trains, and for what does not go together."""
    show_help(cli.flags_of(kind), words, page)
    chosen, flags = read_some(kind, words, prog=page.prog)
    if not chosen.features and not chosen.weights:
        raise UsageError("neither weights nor features are given", where=page.prog,
                         hint="WEIGHTS --data FOLDER, or --features FILE.parquet --data FOLDER --out FOLDER"
                         )  # fmt: skip
    trained = trained_kinds(chosen.chosen_tasks)
    if chosen.features and (chosen.weights or trained or chosen.is_grid):
        raise UsageError("--features is given in place of weights, and is scored as it is", where=page.prog,
                         hint="leave out WEIGHTS and --tasks, and give one data set")  # fmt: skip
    if flags and not trained:
        raise cli.unknown(flags, cli.flags_of(kind), page.prog)
    if chosen.follow and not chosen.every_checkpoint:
        raise UsageError("--follow is for --every-checkpoint", where=page.prog, hint="--every-checkpoint --follow")
    if chosen.is_grid and not chosen.out:
        raise UsageError("several evaluations need a folder", where=page.prog, hint="--out grids/first")
    if chosen.label_fraction < 1 and WITH_LABELS not in trained:
        raise UsageError("only fine-tuning with labels takes a share of them", where=f"{page.prog}, --label-fraction",
                         hint="leave it out, or --tasks supervised")  # fmt: skip
    read_recipes(chosen.recipe, chosen.chosen_tasks)
    return chosen, flags


def embed(arguments: list[str]) -> int:
    """Write the feature of every image of a data set into one parquet file for other tools; killed, it goes on."""
    page = page_of(embed, "weights/pass --data data/market1501 --out features/market1501.parquet")
    chosen = parse(EmbedCommand, arguments, page)
    from training.commands.embed import run

    return run(chosen)


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


def export(arguments: list[str]) -> int:
    """Write a checkpoint's backbone for timm, with a card that says what it is."""
    chosen = parse(ExportCommand, arguments, page_of(export, "runs/first"))
    from training.commands.weights import export as run

    return run(chosen)


def import_published(arguments: list[str]) -> int:
    """Read weights published by others and write their backbone as an export, with a card that says where from."""
    page = page_of(import_published, "pass_vit_small_full.pth --out weights/pass", name="import")
    chosen = parse(ImportCommand, arguments, page)
    from training.commands.weights import import_published as run

    return run(chosen)


def report(arguments: list[str]) -> int:
    """Write report.html, one self-contained file, from what the run folder holds."""
    chosen = parse(ReportCommand, arguments, page_of(report, "runs/first"))
    from training.report.report import write_report

    print(write_report(chosen.run, chosen.storage))
    return cli.COMPLETE


def checkpoints(arguments: list[str]) -> int:
    """List, verify, compare or prune a run's checkpoints."""
    action = arguments[1] if arguments[1:2] and arguments[1] in ACTIONS else ""
    if not action:
        page = page_of(checkpoints, "runs/first", more=tuple(
            f"RUN {name}: {' '.join((kind.__doc__ or '').split())}" for name, kind in ACTIONS.items()))  # fmt: skip
        chosen: object = parse(ListCommand, arguments, page)
    else:
        page = page_of(checkpoints, name=f"checkpoints RUN {action}")
        chosen = parse(ACTIONS[action], [arguments[0], *arguments[2:]], page)
    from training.commands import checkpoints as work

    return getattr(work, action or "listing")(chosen)


ACTIONS: dict[str, type] = {"verify": VerifyRunCommand, "compare": CompareCommand, "prune": PruneCommand}


def warm(arguments: list[str]) -> int:
    """Start DeepSpeed once, with a tiny module, to see that it works here."""
    parse(NoFlags, arguments, page_of(warm))
    from training.commands.pretrain import warm as run

    return run()


def check_dry_run(chosen: PretrainCommand, *, prog: str) -> None:
    """Raise UsageError for flags of a dry run where none is asked for."""
    given = [name for name in ("full", "json", "rows", "gpu", "gpu_memory_gb") if getattr(chosen, name)]
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
