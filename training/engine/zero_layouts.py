"""Where each ZeRO stage keeps parameters, gradients and optimizer state, and how a rank reaches its part of them.

    stage 0     everything whole on every rank, gradients in `grad`
    stages 1, 2 parameters whole; gradients and state of a group in one flat partition per rank
    stage 3     parameters too are shards, of equal size on all ranks, the last one padded

DeepSpeed's own helpers cost a collective per parameter, or cover the first group only (0.19.8), so fragments are
reached by their addresses. Frozen parameters (the teacher's) follow the parameters' layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training.core.world import World
from training.engine.optimizers import has_state, state_tensors, step_count, whole_pieces, whole_steps, zero_state
from training.engine.param_groups import ParameterGroup
from training.engine.state_fragments import Piece, whole
from training.methods.base import Method


class ZeroLayout(ABC):
    """One stage's places. `optimizer` is PyTorch's inside; its parameter groups are in the order of `groups`."""

    def __init__(
        self,
        engine: Any,
        method: Method,
        parameters: Mapping[str, Tensor],
        groups: Sequence[ParameterGroup],
        world: World,
    ) -> None:
        self.engine, self.method, self.parameters = engine, method, parameters
        self.groups, self.world = groups, world

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer."""
        return self.engine.optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of every gradient of the global batch, in the memory that the optimizer reads."""

    @abstractmethod
    def discard(self) -> None:
        """Forget all gradients."""

    def tensors(self, index: int) -> list[Tensor]:
        """The tensors that the optimizer steps for a group: parameters (stage 0), or the rank's flat partitions."""
        return self.optimizer.param_groups[index]["params"]

    def forget(self, index: int) -> None:
        """State as before the first step for a group."""
        for tensor in self.tensors(index):
            zero_state(self.optimizer, tensor, None)

    def counts(self) -> dict[str, float]:
        """Step counts of the parameters that the optimizer has has_state with."""
        counts = {}
        for index, group in enumerate(self.groups):
            first = self.tensors(index)[0]
            if has_state(self.optimizer, first):
                counts.update(dict.fromkeys(group.names, step_count(self.optimizer, first)))
        return counts

    def model_pieces(self) -> list[Piece]:
        """Parameters and buffers as this rank holds them."""
        return [whole(f"model/{name}", value) for name, value in self.method.state_dict().items()]

    @abstractmethod
    def state_pieces(self, names: Collection[str]) -> list[Piece]:
        """What this rank's optimizer keeps of the parameters in `names`."""

    def begin(self, steps: Mapping[str, float]) -> None:
        """Take over the parameters that the module has now; state of zeros with these step counts."""
        for index, group in enumerate(self.groups):
            for tensor in self.tensors(index):
                zero_state(self.optimizer, tensor, steps.get(group.names[0]))

    def held(self, network: torch.nn.Module) -> dict[str, Tensor]:
        """The part of each parameter of a submodule that this rank changes: for the moving average."""
        return dict(network.named_parameters())


class WholeLayout(ZeroLayout):
    """Stage 0."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.zero

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def discard(self) -> None:
        self.engine.zero_grad()

    def counts(self) -> dict[str, float]:
        return whole_steps(self.optimizer, self.parameters)

    def state_pieces(self, names: Collection[str]) -> list[Piece]:
        return whole_pieces(self.optimizer, self.parameters, names)

    def begin(self, steps: Mapping[str, float]) -> None:
        for name, parameter in self.parameters.items():
            zero_state(self.optimizer, parameter, steps.get(name))


class FlatLayout(ZeroLayout):
    """Stages 1 and 2: `_hp_mapping` tells which part of a parameter lies where in the rank's flat partition."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:  # None: another rank holds all of it
                yield name, mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]

    def discard(self) -> None:
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        self.engine.zero_grad()
        self.zero.zero_grad(set_to_none=True)
        self.zero.micro_step_id = INITIAL_MICRO_STEP_ID
        for index in self.zero.averaged_gradients:
            self.zero.averaged_gradients[index] = None
            self.zero.all_grad_tensors[index] = None

    def _parts(self, name: str) -> Iterator[tuple[Any, Any]]:
        """(where it lies in the whole parameter, where in the flat partition) of the part that this rank steps, if any:
        each a `start` and a `numel`."""
        mapping = self.parameters[name]._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            yield mapping.lp_fragment_address, mapping.hp_fragment_address

    def state_pieces(self, names: Collection[str]) -> list[Piece]:
        pieces = []
        for index, group in enumerate(self.groups):
            state = self.optimizer.state.get(self.tensors(index)[0], {})
            for name in (name for name in group.names if name in names):
                for within, held in self._parts(name):
                    for key in state_tensors(self.optimizer):
                        values = state[key].narrow(0, held.start, held.numel)
                        pieces.append(Piece(f"{key}/{name}", tuple(self.parameters[name].shape), within.start, values,
                                           shared=False))  # fmt: skip
        return pieces

    def begin(self, steps: Mapping[str, float]) -> None:
        super().begin(steps)
        for index, group in enumerate(self.groups):
            flat = self.tensors(index)[0].data
            for name in group.names:
                for within, held in self._parts(name):
                    source = self.parameters[name].detach().view(-1).narrow(0, within.start, within.numel)
                    flat.narrow(0, held.start, held.numel).copy_(source)


class ShardLayout(ZeroLayout):
    """Stage 3: every parameter is cut into equal shards (`ds_tensor`), one per rank, the last one padded."""

    def tensors(self, index: int) -> list[Tensor]:
        """The rank's flat partitions of a group: one for each of DeepSpeed's sub-groups."""
        parts = enumerate(self.zero.fp32_partitioned_groups_flat)
        return [flat for place, flat in parts if self.zero.sub_group_to_group_id[place] == index]

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        # The teacher's change when DeepSpeed does not look: after its step, which gathers those that stay whole.
        for parameter in self.method.parameters():
            parameter.ds_persist = parameter.ds_persist and parameter.requires_grad  # type: ignore[attr-defined]
        kept = self.zero.persistent_parameters
        kept[:] = [parameter for parameter in kept if parameter.ds_persist]
        self._spare_waits()

    def _spare_waits(self) -> None:
        """Have no host wait for the GPU after a backward pass, where the GPU alone must, nor for norms in a step that
        the stepper has found finite."""
        self.zero._get_norm_groups = lambda: [torch.zeros(())]
        if (stream := self.zero.reduce_and_partition_stream) is not None:
            stream.synchronize = lambda: torch.cuda.current_stream(stream.device).wait_stream(stream)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        # DeepSpeed's function for one parameter has the host wait for the GPU
        for place, group in enumerate(self.zero.fp16_groups):
            for parameter, gradient in zip(group, self.zero.averaged_gradients[place], strict=True):
                yield self._names[id(parameter)], gradient

    def discard(self) -> None:
        self.engine.zero_grad()
        self.zero.zero_grad(set_to_none=True)
        self.zero.averaged_gradients = {}

    def _place(self, name: str) -> tuple[Tensor, int, int]:
        """(flat partition, offset, size) of this rank's shard of a parameter."""
        parameter = self.parameters[name]
        part, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[part], int(offset), int(size)

    def model_pieces(self) -> list[Piece]:
        parameters: dict[str, Any] = dict(self.method.named_parameters())
        buffers = {name: value for name, value in self.method.state_dict().items() if name not in parameters}
        shards = [self._piece(f"model/{name}", value, value.ds_tensor) for name, value in parameters.items()]
        return shards + [whole(f"model/{name}", value) for name, value in buffers.items()]

    def state_pieces(self, names: Collection[str]) -> list[Piece]:
        pieces = []
        for name in (name for group in self.groups for name in group.names if name in names):
            flat, offset, size = self._place(name)
            for key in state_tensors(self.optimizer):
                shard = self.optimizer.state[flat][key].narrow(0, offset, size)
                pieces.append(self._piece(f"{key}/{name}", self.parameters[name], shard))
        return pieces

    def _piece(self, key: str, parameter: Any, shard: Tensor) -> Piece:
        """The part of this rank's shard that is not padding."""
        start = min(self.world.rank * shard.numel(), parameter.ds_numel)
        real = min(shard.numel(), parameter.ds_numel - start)
        return Piece(key, tuple(parameter.ds_shape), start, shard.detach().view(-1)[:real], shared=False)

    def begin(self, steps: Mapping[str, float]) -> None:
        super().begin(steps)
        for name in self.parameters:
            flat, offset, size = self._place(name)
            shard = self.parameters[name].ds_tensor  # type: ignore[attr-defined]
            flat.data.narrow(0, offset, size).copy_(shard.view(-1))
        if whole := self.zero.persistent_parameters:
            whole[0].partition(whole)  # gathered again when they are used

    def held(self, network: torch.nn.Module) -> dict[str, Tensor]:
        parameters: dict[str, Any] = dict(network.named_parameters())
        return {name: parameter.ds_tensor for name, parameter in parameters.items()}


LAYOUTS: dict[int, type[ZeroLayout]] = {0: WholeLayout, 1: FlatLayout, 2: FlatLayout, 3: ShardLayout}
"""ZeRO stage -> where things are."""
