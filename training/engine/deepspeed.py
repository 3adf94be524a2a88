"""DeepSpeed carries out the same steps as `plain.py`: ZeRO 0, 1, 2 in float32, clipping and freezing by the recipe.

DeepSpeed is configured for fp32 and lower precision is autocast inside the method (parameters and teacher stay fp32);
its own clipping is switched off (it is on at 1.0 unless set to 0); accumulation boundaries are set by hand. Gradients
are reached where each stage keeps them: whole in `grad` (0), or as the rank's fragment of the flat partition (1, 2).
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training.config import EngineConfig, OptimisationConfig
from training.engine.optimisation import ParameterGroup, StepSettings
from training.engine.stepper import MOMENTS, AdamState, Stepper
from training.engine.world import World
from training.methods.base import Method, Outcome, Progress, Views


def derive_json(engine: EngineConfig, *, rows: int, micro: int, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration, complete.

    `rows`: images of one rank in a global batch, padding included; `micro`: images of one micro-batch.
    """
    return {
        "train_batch_size": rows * world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows // micro,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "allgather_bucket_size": engine.bucket,
            "reduce_bucket_size": engine.bucket,
            "overlap_comm": False,
        },
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed warns about a missing CUDA toolkit and logs every setting; real errors still come through."""
    before = os.environ.get("DS_ACCELERATOR")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("DS_ACCELERATOR", None)


def prepare_environment(world: World) -> None:
    """Let DeepSpeed find ninja, its compiled op (built by `make setup` in the virtual environment), and its rank."""
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    binaries = os.path.dirname(sys.executable)
    if binaries not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = binaries + os.pathsep + os.environ.get("PATH", "")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))


def warm_up(world: World) -> None:
    """Make one engine of a tiny module, so that DeepSpeed compiles its communication op. Needs a process group."""
    prepare_environment(world)
    with _quiet():
        import deepspeed

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
        with _quiet():
            import deepspeed

            client = torch.optim.AdamW(
                [{"params": [self.parameters[name] for name in group.names]} for group in self.groups],
                betas=config.betas,
                eps=config.eps,
            )
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=method, optimizer=client, config=settings, dist_init_required=False
            )
        self.stage = int(settings["zero_optimization"]["stage"])
        self._released: set[int] = set()

    # -- a step --------------------------------------------------------------------------------------------------

    def apply(self, now: StepSettings, progress: Progress) -> None:
        super().apply(now, progress)
        for index, group in enumerate(self.groups):
            if group.release_epoch and not group.frozen(progress) and index not in self._released:
                self._forget(index)
                self._released.add(index)

    def _call(self, views: Views, progress: Progress) -> Outcome:
        return self.engine(views, progress)

    def backward(self, outcome: Outcome, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; the loss is already this rank's share of the global batch.
        self.engine.backward(outcome.loss * self.world.size, scale_wrt_gas=False)

    def _optimizer_groups(self) -> list[dict]:
        return self._adam.param_groups

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """PyTorch's AdamW inside: over the parameters (stage 0) or over one flat partition per group (1, 2)."""
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def _fragments(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of every gradient of the global batch, modifiable in place."""
        for name, parameter in self.parameters.items():
            if self.stage == 0:
                if parameter.grad is not None:
                    yield name, parameter.grad
            elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
                mapping, index = parameter._hp_mapping, parameter._index_in_param_group  # type: ignore[attr-defined]
                yield name, mapping.get_lp_grad_fragment(index)

    def _norms(self) -> Tensor:
        index = {name: place for place, name in enumerate(self.names)}
        squares = torch.zeros(len(self.names), dtype=torch.float64, device=self.world.device)
        for name, fragment in self._fragments():
            squares[index[name]] = fragment.to(torch.float64).square().sum()
        return (squares if self.stage == 0 else self.world.add(squares)).sqrt()

    def _scale(self, factors: Mapping[str, Tensor | float]) -> None:
        for name, fragment in self._fragments():
            if name in self._frozen:
                fragment.zero_()
            elif name in factors:
                factor = factors[name]
                fragment.mul_(factor.to(fragment.dtype) if isinstance(factor, Tensor) else factor)

    def _advance(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()

    def _discard(self) -> None:
        self.engine.zero_grad()
        if self.stage == 0:
            return
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        for index in self.optimizer.averaged_gradients:
            self.optimizer.averaged_gradients[index] = None
            self.optimizer.all_grad_tensors[index] = None

    def _forget(self, index: int) -> None:
        """At its release a frozen group starts with fresh moments and a step count of zero."""
        for parameter in self._adam.param_groups[index]["params"]:
            for value in self._adam.state.get(parameter, {}).values():
                if torch.is_tensor(value):
                    value.zero_()

    # -- state ---------------------------------------------------------------------------------------------------

    def optimizer_state(self) -> dict[str, AdamState]:
        steps = self._steps()
        found: dict[str, AdamState] = {}
        for group in self.groups:
            for name in group.names:
                state = self._whole(name, 0.0 if name in self._frozen else steps[name])
                if self.world.leads:
                    found[name] = state
        return found

    def _whole(self, name: str, step: float) -> AdamState:
        """One parameter's moments. Stages 1, 2: a collective; before the first step there are none anywhere."""
        parameter = self.parameters[name]
        moments = []
        for key in MOMENTS:
            if self.stage == 0:
                state = self._adam.state.get(parameter, {})
                moment = state[key] if key in state else torch.zeros_like(parameter)
            elif not self._adam.state:
                moment = torch.zeros_like(parameter)
            else:
                moment = parameter.get_full_hp_param(key)  # type: ignore[attr-defined]
            moments.append(moment.detach().cpu().clone())
        return AdamState(moments[0], moments[1], step)

    def _steps(self) -> dict[str, float]:
        """AdamW's step count of every parameter: one per parameter (stage 0), one per flat group (1, 2)."""
        counts: dict[str, float] = {}
        for group, target in zip(self.groups, self._adam.param_groups, strict=True):
            states = [self._adam.state.get(parameter, {}) for parameter in target["params"]]
            values = [float(state["step"]) if "step" in state else 0.0 for state in states]
            for place, name in enumerate(group.names):
                counts[name] = values[place if self.stage == 0 else 0]
        return counts

    def load_optimizer_state(self, state: Mapping[str, AdamState]) -> None:
        self._adam.state.clear()
        self._released.clear()
        if self.stage > 0:
            self._load_masters()
        if all(saved.step == 0 for saved in state.values()):
            return
        if self.stage == 0:
            self._load_whole(state)
        else:
            self._load_partitions(state)

    def _load_whole(self, state: Mapping[str, AdamState]) -> None:
        for name, parameter in self.parameters.items():
            saved = state[name]
            if saved.step:
                self._adam.state[parameter] = {
                    "step": torch.tensor(saved.step, dtype=torch.float32),
                    "exp_avg": saved.exp_avg.to(parameter),
                    "exp_avg_sq": saved.exp_avg_sq.to(parameter),
                }

    def _load_masters(self) -> None:
        """The partitions hold copies of the parameters: refresh them from the module's own."""
        for parameter in self.parameters.values():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                mapping.get_hp_fragment().data.copy_(self._slice(mapping, parameter.detach()))

    @staticmethod
    def _slice(mapping: Any, whole: Tensor) -> Tensor:
        address = mapping.lp_fragment_address
        return whole.reshape(-1).narrow(0, address.start, address.numel)

    def _load_partitions(self, state: Mapping[str, AdamState]) -> None:
        for group, target in zip(self.groups, self._adam.param_groups, strict=True):
            (flat,) = target["params"]
            self._adam.state[flat] = {
                "step": torch.tensor(state[group.names[0]].step, dtype=torch.float32),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            for key in MOMENTS:
                whole: Tensor = getattr(state[name], key)
                mapping.get_hp_fragment(optim_state_key=key).data.copy_(self._slice(mapping, whole))
