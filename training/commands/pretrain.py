"""python -m training pretrain | views | warm: train a recipe in this one process, or look at it first."""

import json
import time
from contextlib import closing

from datapipe.core import cli
from training.commands.arguments import PretrainCommand
from training.config.run_config import RunConfig
from training.core.host import LocalHost, exit_code
from training.core.preemption_notice import Notice
from training.core.world import alone
from training.preflight import dry_run_text
from training.preflight.dry_run import dry_run as calculate
from training.trainer.pretrain import pretrain_alone


def run(config: RunConfig) -> int:
    """Train; the exit code says how it ended."""
    machine = config.cluster
    with (
        LocalHost(starting=True) as host,
        closing(Notice(machine.notice, every_s=machine.notice_every_s, callback=host.notice)),
    ):
        ending = pretrain_alone(config, host)
    return exit_code(None if ending.complete else host.received)


def dry_run(chosen: PretrainCommand, config: RunConfig) -> int:
    """Print what a run would be and needs."""
    calculated = calculate(
        config, rows=chosen.rows or 0, gpu=chosen.gpu or "", gpu_memory_gb=chosen.gpu_memory_gb or 0.0
    )
    print(
        json.dumps(dry_run_text.to_tree(calculated), indent=2)
        if chosen.json
        else dry_run_text.page(calculated, full=chosen.full)
    )
    return cli.COMPLETE


def warm() -> int:
    """Start DeepSpeed once, with a tiny module, to see that it works here."""
    from training.engine.deepspeed import warm_up

    began = time.monotonic()
    with alone("cpu", group=True) as world:
        warm_up(world)
    print(f"DeepSpeed is ready ({time.monotonic() - began:.0f} s)")
    return cli.COMPLETE
