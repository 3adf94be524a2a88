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
from training.engine.stepper import MOMENTS, AdamState, Stepper, load_adam
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
    # Stages 1, 2 keep the moments of a group in one flat partition per rank. They are reached through the fragment's
    # address in it: DeepSpeed's own links (`get_full_hp_param("exp_avg")`) cover the first group only (0.19.8).

    def optimizer_state(self) -> dict[str, AdamState]:
        steps = self._steps()
        found: dict[str, AdamState] = {}
        for index, group in enumerate(self.groups):
            for name in group.names:
                moments = [self._whole(index, name, key).detach().cpu() for key in MOMENTS]
                if self.world.leads:
                    found[name] = AdamState(moments[0], moments[1], 0.0 if name in self._frozen else steps[name])
        return found

    def _whole(self, index: int, name: str, key: str) -> Tensor:
        """One moment of a parameter, whole; zeros before the first step. Stages 1, 2: a collective."""
        parameter = self.parameters[name]
        if self.stage == 0:
            state = self._adam.state.get(parameter, {})
            return state[key].clone() if key in state else torch.zeros_like(parameter)
        whole = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        state = self._adam.state.get(self._flat(index), {})
        if mapping is not None and key in state:
            address = mapping.lp_fragment_address
            whole.narrow(0, address.start, address.numel).copy_(self._held(mapping, state[key]))
        return self.world.add(whole).view_as(parameter)

    def _flat(self, index: int) -> Tensor:
        """This rank's flat partition of a group (stages 1, 2)."""
        (flat,) = self._adam.param_groups[index]["params"]
        return flat

    @staticmethod
    def _held(mapping: Any, flat: Tensor) -> Tensor:
        """A parameter's fragment of a flat partition, or of a moment in the same layout."""
        address = mapping.hp_fragment_address
        return flat.narrow(0, address.start, address.numel)

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
        if self.stage == 0:
            load_adam(self._adam, self.parameters, state)
            return
        fresh = all(saved.step == 0 for saved in state.values())
        for index, group in enumerate(self.groups):
            flat = self._flat(index)
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            for name in group.names:
                self._fill(self.parameters[name], flat, moments, state[name])
            if not fresh:
                step = torch.tensor(state[group.names[0]].step, dtype=torch.float32)
                self._adam.state[flat] = {"step": step, **moments}

    def _fill(self, parameter: Tensor, flat: Tensor, moments: Mapping[str, Tensor], saved: AdamState) -> None:
        """Copy one parameter, already in the module, and its moments into this rank's partition."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return
        address = mapping.lp_fragment_address
        wholes = [(flat.data, parameter.detach()), *((moments[key], getattr(saved, key)) for key in MOMENTS)]
        for target, whole in wholes:
            part = whole.reshape(-1).narrow(0, address.start, address.numel)
            self._held(mapping, target).copy_(part)
