"""What `python -m cluster` does: demo | shard | pretrain | evaluate | embed | score-cfs | submit | status."""

import json

from cluster.core.arguments import (
    DemoCommand,
    EmbedJob,
    EvaluateJob,
    PretrainJob,
    ScoreCfsJob,
    ShardJob,
    StatusCommand,
    SubmitCommand,
)
from datapipe.core import cli
from datapipe.core.cli import page_of, parse, read, show_help
from training.commands.entry_points import FINE_TUNING, check_dry_run, read_evaluate


def demo(arguments: list[str]) -> int:
    """Crops to report on one machine, with a worker killed on the way."""
    chosen = parse(DemoCommand, arguments, page_of(demo, "--out demo"))
    from cluster.demo import run

    return run(chosen.out, crops=chosen.crops, seed=chosen.seed, steps=chosen.steps, device=chosen.device)


def shard(arguments: list[str]) -> int:
    """Turn crops into shards as `python -m datapipe shard` does, to the same bytes, with all machines of a cluster."""
    chosen = parse(ShardJob, arguments, page_of(shard, "crops/ --out s3://reid/lup --address auto"))
    from cluster.jobs.shard import run

    return run(chosen)


def pretrain(arguments: list[str]) -> int:
    """Train a recipe with Ray Train and DeepSpeed; crashed workers are restarted from the last checkpoint."""
    from training.commands.recipe import read_with_recipe

    page = page_of(pretrain, "pass_vits --stream.manifest s3://reid/lup --out s3://reid/first --address auto")
    chosen, config = read_with_recipe(PretrainJob, arguments, page)
    check_dry_run(chosen, prog=page.prog)
    if chosen.dry_run:
        from training.commands.pretrain import dry_run

        return dry_run(chosen, config)
    from cluster.core.session import chosen_address
    from cluster.jobs.pretrain import run

    return run(config, address=chosen_address(chosen.address or ""))


def evaluate(arguments: list[str]) -> int:
    """Score weights by retrieval, as they are or after fine-tuning; killed and started again it goes on."""
    page = page_of(evaluate, "s3://reid/first --data s3://reid/market1501 --address auto", more=(FINE_TUNING,))
    chosen, flags = read_evaluate(EvaluateJob, arguments, page)
    from cluster.jobs.evaluate import evaluate as run

    return run(chosen, flags)


def embed(arguments: list[str]) -> int:
    """Write the feature of every image of a data set into one parquet file, with all devices of a cluster; killed, it
    goes on."""
    page = page_of(embed, "s3://reid/first --data s3://reid/lup --out s3://reid/lup.parquet --address auto")
    chosen = parse(EmbedJob, arguments, page)
    from cluster.jobs.embed import embed as run

    return run(chosen)


def score_cfs(arguments: list[str]) -> int:
    """Score crops by how little of their features a network forgets when it is fine-tuned (CFS), and list them best
    first for `python -m datapipe select --names`; killed, it goes on."""
    page = page_of(score_cfs, "s3://reid/first s3://reid/tuned --data s3://reid/lup --out s3://reid/cfs --address auto",
                   name="score-cfs")  # fmt: skip
    chosen = parse(ScoreCfsJob, arguments, page)
    from cluster.jobs.score_cfs import score_cfs as run

    return run(chosen)


def status(arguments: list[str]) -> int:
    """Show runs: state, last step, age, workers, restarts, checkpoints. Reads files alone."""
    chosen = parse(StatusCommand, arguments, page_of(status, "runs"))
    from cluster.status import statuses, table

    listed = statuses(chosen.place, chosen.storage)
    print(json.dumps([one._asdict() for one in listed], indent=1) if chosen.json else table(listed))
    return cli.COMPLETE


def submit(arguments: list[str]) -> int:
    """Hand in pretrain, shard, evaluate, embed or score-cfs as a Ray job; prints how to follow, stop and resume it."""
    page = page_of(submit, "pretrain pass_vits --stream.manifest s3://reid/lup --out s3://reid/first")
    own, rest = _until_command(arguments)
    show_help(cli.flags_of(SubmitCommand), own, page)
    chosen = read(SubmitCommand, own, prog=page.prog)
    from cluster.submit import submit as run

    return run(chosen, rest)


def _until_command(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the words up to the command that is handed in, those after it)."""
    with_value = {flag.name for flag in cli.flags_of(SubmitCommand) if flag.kind is not bool}
    words = iter(enumerate(arguments))
    for place, word in words:
        if word in with_value:
            next(words, None)
        elif not word.startswith("-"):
            return arguments[: place + 1], arguments[place + 1 :]
    return arguments, []
