"""DeepSpeed carries out the same steps as `plain.py`: ZeRO 0 to 3 in float32, clipping and freezing by the recipe.

DeepSpeed is configured for fp32 and lower precision is autocast inside the method (parameters and teacher stay fp32);
its own clipping is switched off (it is on at 1.0 unless set to 0); accumulation boundaries are set by hand. Gradients
are reached where each stage keeps them (`training/engine/zero_layouts.py`).
"""

import contextlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training.core.collectives import all_reduce
from training.core.world import World
from training.engine.optimizers import make_optimizer
from training.engine.overlapped_reduction import OverlappedReduction, overlaps
from training.engine.param_groups import ParameterGroup, StepSettings
from training.engine.reduction import OWNERS, Reduction, scatter_in
from training.engine.settings import EngineConfig, OptimisationConfig
from training.engine.state_fragments import Piece
from training.engine.stepper import Stepper
from training.engine.zero_layouts import LAYOUTS
from training.methods.base import Method, Outcome, TrainingProgress, Views

CPU = torch.device("cpu")
PERSISTENT = 100_000
"""Trained parameters of at most so many numbers, such as biases and norms, stay whole in stage 3: to gather one takes
about as long as a matrix."""


def derive_json(
    engine: EngineConfig, *, rows: int, micro: int, world: int, reduction: Reduction = "fp32", cuda: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration, complete.

    `rows`: images of one rank in a global batch, padding included; `micro`: images of one micro-batch; `cuda`: of GPUs,
    which have streams to communicate on (in stages 1 and 2 by `training/engine/overlapped_reduction.py`).
    """
    return {
        "train_batch_size": rows * world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows // micro,
        "gradient_clipping": 0.0,
        "communication_data_type": reduction,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "allgather_bucket_size": engine.bucket,
            "reduce_bucket_size": engine.bucket,
            "reduce_scatter": True,
            "use_multi_rank_bucket_allreduce": world > OWNERS,
            "overlap_comm": cuda and engine.zero_stage == 3,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_prefetch_bucket_size": engine.bucket,
            "memory_efficient_linear": False,
            # the stepper has the norms already; stages 0 and 3 know no such switch
            **({"compute_grad_norm": False} if engine.zero_stage in (1, 2) else {}),
        },
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU, twice a micro-batch
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


@contextlib.contextmanager
def _as_told(device: torch.device) -> Iterator[None]:
    """DeepSpeed goes by the GPUs that it finds; here by the run's device. It also warns about a missing CUDA toolkit
    and logs every setting; real errors still come through."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = device.type
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("DS_ACCELERATOR", None)
        else:
            os.environ["DS_ACCELERATOR"] = before


def _import(device: torch.device = CPU) -> Any:
    """The package, set to a kind of device, and beforehand its Muon, which `initialize` imports whatever the optimizer
    is: decorated with torch.compile, that would load a compiler for seconds at every start.

    The package is not to build its shared-memory op, nor to look for compilers to do so: that serves inference alone.
    """
    import deepspeed

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    compiled, torch.compile = torch.compile, _as_it_is
    try:
        with contextlib.suppress(ImportError):
            import deepspeed.runtime.zero.muon.original_muon
    finally:
        torch.compile = compiled
    _choose_accelerator(device)
    return deepspeed


def _choose_accelerator(device: torch.device) -> None:
    """Make DeepSpeed choose its accelerator again: it remembers that of its first import, maybe for another device."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    if get_accelerator().device_name() != device.type:
        set_accelerator(CUDA_Accelerator() if device.type == "cuda" else CPU_Accelerator())


def _as_it_is(*_: Any, **__: Any) -> Any:
    """A decorator that changes nothing."""
    return lambda function: function


def prepare_environment(world: World) -> None:
    """Let DeepSpeed find its rank, which is how it numbers devices, and which it also looks for where MPI would have
    put it."""
    for name in [name for name in os.environ if name.startswith("OMPI_")]:
        del os.environ[name]
    os.environ["LOCAL_RANK"] = str(world.local_rank if world.device.index is None else world.device.index)


def load() -> None:
    """Import the package, set to CPUs, ahead of need; an engine on a GPU sets it anew."""
    with _as_told(CPU):
        _import(CPU)


def warm_up(world: World) -> None:
    """Make one engine of a tiny module, which shows that DeepSpeed works here. Needs a process group."""
    prepare_environment(world)
    with _as_told(world.device):
        deepspeed = _import(world.device)
        module = torch.nn.Linear(2, 2)
        settings = derive_json(EngineConfig(), rows=1, micro=1, world=world.size)
        optimizer = torch.optim.AdamW(module.parameters())
        deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)


class DeepSpeedStepper(Stepper):
    """One engine around the whole method: student, teacher and buffers. Needs an open process group."""

    def __init__(
        self,
        method: Method,
        groups: Sequence[ParameterGroup],
        config: OptimisationConfig,
        world: World,
        *,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(method, groups, config, world)
        prepare_environment(world)
        with _as_told(world.device):
            deepspeed = _import(world.device)
            optimizer = make_optimizer(config, self.grouped())
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=method, optimizer=optimizer, config=settings, dist_init_required=False
            )
        stage = int(settings["zero_optimization"]["stage"])
        bucket = settings["zero_optimization"]["reduce_bucket_size"]
        self._overlapped: OverlappedReduction | None = None
        if overlaps(world, stage):
            values = list(self.parameters.values())
            self._overlapped = OverlappedReduction(
                self.engine.optimizer, values, config.reduction, world, bucket=bucket
            )  # fmt: skip
        elif stage == 1 and world.size > 1:
            scatter_in(self.engine.optimizer, config.reduction, rank=world.rank, world=world.size, bucket=bucket)
        self._layout = LAYOUTS[stage](self.engine, method, self.parameters, self.groups, world)
        self._whole_gradients = stage == 0
        self._released: set[int] = set()

    # -- a step --------------------------------------------------------------------------------------------------

    def apply(self, now: StepSettings, progress: TrainingProgress) -> None:
        super().apply(now, progress)
        for index, group in enumerate(self.groups):
            if group.release_epoch and not group.frozen(progress) and index not in self._released:
                self._layout.forget(index)
                self._released.add(index)

    def _call(self, views: Views, progress: TrainingProgress) -> Outcome:
        return self.engine(views, progress)

    def backward(self, outcome: Outcome, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        if self._overlapped is not None:
            self._overlapped.arm(last=last)
        # DeepSpeed averages over ranks; the loss is already this rank's share of the global batch.
        self.engine.backward(outcome.loss * (self.world.size * self._multiplier), scale_wrt_gas=False)

    def _optimizer_groups(self) -> list[dict]:
        return self._layout.optimizer.param_groups

    def _norms(self) -> Tensor:
        held = dict(self._layout.gradients())
        norms = torch._foreach_norm(list(held.values()), dtype=torch.float64) if held else []
        found = dict(zip(held, norms, strict=True))
        nothing = torch.zeros((), dtype=torch.float64, device=self.world.device)
        squares = torch.stack([found.get(name, nothing) for name in self.names]).square()
        return (squares if self._whole_gradients else all_reduce(squares)).sqrt()

    def _multiply(self, factors: Mapping[str, float]) -> None:
        wanted = {name: 0.0 for name in self._frozen} | {n: f for n, f in factors.items() if n not in self._frozen}
        held = {name: fragment for name, fragment in self._layout.gradients() if name in wanted}
        if held:
            torch._foreach_mul_(list(held.values()), [wanted[name] for name in held])

    def _advance(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()

    def _discard(self) -> None:
        self._layout.discard()

    # -- state ---------------------------------------------------------------------------------------------------

    def _counts(self) -> dict[str, float]:
        return self._layout.counts()

    def _model_pieces(self) -> list[Piece]:
        return self._layout.model_pieces()

    def _state_pieces(self, names: Collection[str]) -> list[Piece]:
        return self._layout.state_pieces(names)

    def _begin(self, steps: Mapping[str, float]) -> None:
        # what was released before has moments and a step count, which must stay
        self._released = {index for index, group in enumerate(self.groups) if group.names[0] in steps}
        self._layout.begin(steps)

    def held(self, network: torch.nn.Module) -> dict[str, Tensor]:
        return self._layout.held(network)
