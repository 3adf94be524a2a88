"""Whether torch.compile can work on this machine, and whether blocks are faster with it, found out before the first
step."""

import copy
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datapipe.core.errors import ConfigError
from datapipe.core.resource_limits import available_cores
from training.config.build import why_uncompiled, workload
from training.config.run_config import RunConfig
from training.core.host import run_lines
from training.core.precision import Precision, autocast_region, casts_kept
from training.core.world import World
from training.methods.base import Method
from training.nn.drop_path import BlockPaths, draw_path_masks, on_device
from training.nn.vision_transformer import Runner, VisionTransformer, compiled_run, run_block
from training.nn.workload import Stack

WHERE = "backbone.compile_blocks"
WITHOUT = "or backbone.compile_blocks = false"
LEAST_STEPS = 2_000
"""Steps that are to come, at least, for a minute of compiling to be worth it."""
ROUNDS = 5
"""How often a block is timed each way, in turn; the fastest counts."""
APART: dict[Precision, float] = {"fp32": 0.01, "fp16": 0.05, "bf16": 0.05}
"""How far the results of a compiled block may be from those of the block, as a share of their norm: TF32 and other
places of rounding, no more."""


class BlockTrial(NamedTuple):
    """A block as it is and compiled."""

    fault: str = ""
    """Why it cannot be compiled; empty: it can."""
    plain_s: float = 0.0
    """Seconds of its forward and backward pass."""
    compiled_s: float = 0.0


def settle_compiled(config: RunConfig, method: Method, world: World, *, micro_batch: int, steps: int) -> None:
    """Decide on all ranks alike whether the backbones of a method run compiled blocks, where the recipe leaves it open
    (`compile_blocks = "auto"`), and say so: a block of its own is tried at the size of the run's.

    All ranks ask together. `micro_batch`: images of a rank at once; `steps`: that the run has yet to do.
    """
    backbones = [module for module in method.modules() if isinstance(module, VisionTransformer)]
    trained = [one for one in backbones if any(parameter.requires_grad for parameter in one.blocks.parameters())]
    if config.backbone.compile_blocks != "auto" or world.device.type != "cuda" or not trained:
        return
    why = why_uncompiled(config, cuda=True)
    if not why and steps < LEAST_STEPS:
        why = f"{steps:,} steps are fewer than the {LEAST_STEPS:,} that make up for compiling"
    if not why:
        run_lines.info("compiles a block and tries it")
        stack = max(workload(config, micro_batch).student, key=lambda one: one.rows * one.tokens)
        trials = together(world, lambda: tried(trained[0], stack, config.optimisation.precision, world))
        why = verdict(trials)
    for backbone in backbones:
        backbone.compiled = not why
    if why:
        run_lines.info(f"blocks are not compiled: {why}")
    else:
        run_lines.info(f"blocks are compiled: {in_words(trials)}")


def together(world: World, trial: Callable[[], BlockTrial]) -> list[BlockTrial]:
    """The trials of all ranks, on every rank. One rank of each machine compiles; the others find it in the cache."""
    first = trial() if world.local_rank == 0 else None
    world.meet()
    return world.all_gather(first or trial())


def verdict(trials: list[BlockTrial]) -> str:
    """Why blocks are better left as they are, of the trials of all ranks; empty: they are better compiled."""
    if faults := [one.fault for one in trials if one.fault]:
        return faults[0]
    if sum(one.compiled_s for one in trials) >= sum(one.plain_s for one in trials):
        return f"they are no faster so, {in_words(trials)}"
    return ""


def in_words(trials: list[BlockTrial]) -> str:
    """What a block takes, on average over the ranks."""
    plain, compiled = (1e3 * sum(times) / len(trials) for times in zip(*(one[1:] for one in trials), strict=True))
    return f"{compiled:.2f} ms for one instead of {plain:.2f}"


def tried(backbone: VisionTransformer, stack: Stack, precision: Precision, world: World) -> BlockTrial:
    """Compile a copy of a block, compare what comes out of it, and time it; nothing of the backbone is changed.
    `stack`: what goes through it; half of the backbone's highest drop path is in force."""
    try:
        refuse_without_compiler(world.device)
        share_cores(world)
        return _compared(backbone, stack, precision, world.device)
    except Exception as error:  # of any type: compilers, their caches and drivers fail in ways of their own
        return BlockTrial(f"{type(error).__name__}: {(str(error).strip().splitlines() or ['of no text'])[0]}")


def _compared(backbone: VisionTransformer, stack: Stack, precision: Precision, device: torch.device) -> BlockTrial:
    """`tried`, where nothing fails."""
    block = copy.deepcopy(backbone.blocks[0]).requires_grad_()
    block.attn.fused_attn = backbone.fuses_attention(device)  # type: ignore[union-attr]
    rate, images = backbone.config.drop_path / 2, torch.arange(stack.rows)
    drawn = draw_path_masks([rate], seed=0, purpose="drop_path/trial", position=images, views=1)
    few, whole = (on_device([drawn], device, whole=one)[0] for one in (False, True))
    whole = whole.clone() if isinstance(whole, Tensor) else whole  # as a backbone hands it to its blocks
    kinds: tuple[tuple[Runner, BlockPaths], ...] = ((run_block, few), (compiled_run(), whole))  # type: ignore[assignment]
    generator, shape = torch.Generator().manual_seed(0), (stack.rows, stack.tokens, backbone.width)
    tokens, direction = (torch.randn(shape, generator=generator).to(device) for _ in range(2))

    def results(run: Runner, paths: BlockPaths) -> list[Tensor]:
        return _there_and_back(run, block, tokens, direction, paths, precision)

    plain, compiled = (results(*one) for one in kinds)
    if any(_apart(one, other) > APART[precision] for one, other in zip(compiled, plain, strict=True)):
        return BlockTrial("a compiled block gives other results")
    seconds = [[_seconds(lambda one=one: results(*one), device) for one in kinds] for _ in range(ROUNDS)]  # type: ignore[misc]
    return BlockTrial("", *(min(times) for times in zip(*seconds, strict=True)))


def _there_and_back(
    run: Runner, block: nn.Module, tokens: Tensor, direction: Tensor, paths: BlockPaths, precision: Precision
) -> list[Tensor]:
    """What comes out of a block, and the gradients of its input and parameters along a direction."""
    given = tokens.detach().requires_grad_()
    with casts_kept(tokens.device), autocast_region(precision, tokens.device):
        out = run(block, given, paths)
    return [out.detach(), *torch.autograd.grad(out, [given, *block.parameters()], direction.to(out.dtype))]


def _apart(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm; infinite where one of them is not finite."""
    share = float((one - other).norm() / other.norm().clamp_min(1e-30))
    return share if share == share else float("inf")


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    begun = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - begun


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def share_cores(world: World) -> None:
    """Let the ranks of a machine share its cores for compiling: each would take them all, up to 32."""
    import torch._inductor.config as inductor

    share = max(1, available_cores() // world.local_size)
    inductor.compile_threads = min(share, inductor.compile_threads or share)


def refuse_without_compiler(device: torch.device) -> None:
    """Raises ConfigError where a compiler, Python's headers, or a folder for what is compiled is missing: TorchInductor
    needs a C++ compiler for the CPU, Triton a C compiler for a GPU."""
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++", "clang++", "c++"))
    chosen = os.environ.get(variable, "")
    if not any(map(shutil.which, (chosen,) if chosen else names)):
        looked_for = chosen or ", ".join(names)
        raise ConfigError(f"torch.compile needs a compiler, and there is none: {looked_for}", where=WHERE,
                          hint=f"install g++ (Debian: build-essential), or set {variable}; {WITHOUT}")  # fmt: skip
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        raise ConfigError(f"torch.compile needs Python's headers, and there is no {headers}", where=WHERE,
                          hint=f"install them (Debian: python3-dev); {WITHOUT}")  # fmt: skip
    _refuse_folder()


def _refuse_folder() -> None:
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # makes the folder

        folder = cache_dir()
        with tempfile.TemporaryFile(dir=folder):
            problem = "programs in it may not be run" if os.statvfs(folder).f_flag & os.ST_NOEXEC else ""
    except OSError as error:
        folder, problem = given or str(error.filename or ""), error.strerror or str(error)
    if problem:
        raise ConfigError(f"torch.compile needs a folder for what it compiles: {problem}", where=folder,
                          hint=f"TORCHINDUCTOR_CACHE_DIR=/another/folder; {WITHOUT}")  # fmt: skip
