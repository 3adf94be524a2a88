"""Where each ZeRO stage keeps parameters, gradients and optimizer state, and how they are reached, whole and in part.

    stage 0     everything whole on every rank, gradients in `grad`
    stages 1, 2 parameters whole; gradients and state of a group in one flat partition per rank
    stage 3     parameters too are shards, of equal size on all ranks, the last one padded

DeepSpeed's own helpers cost a collective per parameter, or cover the first group only (0.19.8), so fragments are
reached by their addresses. Frozen parameters (the teacher's) follow the parameters' layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.engine.optimisation import ParameterGroup
from training.engine.optimizers import (
    ParameterState,
    load_whole,
    set_state,
    state_tensors,
    step_count,
    whole_state,
)
from training.engine.world import World
from training.methods.base import Method
from training.weights import check_counted


class Layout(ABC):
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
        """This rank's part of every gradient of the global batch."""

    def put_gradient(self, name: str, fragment: Tensor) -> None:
        """Write back a changed part. Nothing to do where `gradients` gave the thing itself, in stages 0 to 2."""
        del name, fragment

    @abstractmethod
    def discard(self) -> None:
        """Forget all gradients."""

    def tensors(self, index: int) -> list[Tensor]:
        """The tensors that the optimizer steps for a group: parameters (stage 0), or the rank's flat partitions."""
        return self.optimizer.param_groups[index]["params"]

    def forget(self, index: int) -> None:
        """Fresh moments and a step count of zero for a group."""
        for tensor in self.tensors(index):
            for value in self.optimizer.state.get(tensor, {}).values():
                if torch.is_tensor(value):
                    value.zero_()

    def state(self, index: int, name: str) -> ParameterState:
        """What the optimizer keeps of a parameter of a group. A collective in stages 1 to 3."""
        first = self.tensors(index)[0]
        begun = self.optimizer.state.get(first, {})
        names = [key for key in state_tensors(self.optimizer) if begun.get(key) is not None]
        return ParameterState({key: self.whole(index, name, key).cpu() for key in names},
                              step_count(self.optimizer, first))  # fmt: skip

    @abstractmethod
    def whole(self, index: int, name: str, key: str) -> Tensor:
        """One state tensor of a parameter of a group, whole."""

    @abstractmethod
    def load(self, state: Mapping[str, ParameterState]) -> None:
        """Take over parameters, already in the module, and optimizer state."""

    def held(self, network: torch.nn.Module) -> dict[str, Tensor]:
        """The part of each parameter of a submodule that this rank changes: for the moving average."""
        return dict(network.named_parameters())

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the method, whole. A collective in stage 3."""
        return dict(self.method.state_dict())

    def load_model_state(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """Fill parameters and buffers. Raises DataError for tensors that do not fit."""
        own = self.method.state_dict()
        check_counted({name: value.shape for name, value in own.items()}, state, where=where)
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])


class WholeLayout(Layout):
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

    def state(self, index: int, name: str) -> ParameterState:
        return whole_state(self.optimizer, self.parameters[name])

    def whole(self, index: int, name: str, key: str) -> Tensor:
        found: Tensor = self.optimizer.state[self.parameters[name]][key]
        return found

    def load(self, state: Mapping[str, ParameterState]) -> None:
        load_whole(self.optimizer, self.parameters, state)


class FlatLayout(Layout):
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

    def whole(self, index: int, name: str, key: str) -> Tensor:
        parameter = self.parameters[name]
        whole = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            self._of(mapping, whole).copy_(self._in(mapping, self.optimizer.state[self.tensors(index)[0]][key]))
        return self.world.add(whole).view_as(parameter)

    @staticmethod
    def _of(mapping: Any, whole: Tensor) -> Tensor:
        """The part of a whole tensor that this rank holds."""
        address = mapping.lp_fragment_address
        return whole.reshape(-1).narrow(0, address.start, address.numel)

    @staticmethod
    def _in(mapping: Any, flat: Tensor) -> Tensor:
        """The same part in a flat partition, or in a state tensor of that layout."""
        address = mapping.hp_fragment_address
        return flat.narrow(0, address.start, address.numel)

    def load(self, state: Mapping[str, ParameterState]) -> None:
        self.optimizer.state.clear()
        for index, group in enumerate(self.groups):
            flat, first = self.tensors(index)[0], state[group.names[0]]
            held = {key: torch.zeros_like(flat) for key in first.tensors}
            for name in group.names:
                self._fill(self.parameters[name], flat, held, state[name])
            if held:
                set_state(self.optimizer, flat, held, first.step)

    def _fill(self, parameter: Tensor, flat: Tensor, held: Mapping[str, Tensor], saved: ParameterState) -> None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return
        wholes = [(flat.data, parameter.detach()), *((held[key], value) for key, value in saved.tensors.items())]
        for target, whole in wholes:
            self._in(mapping, target).copy_(self._of(mapping, whole))


class ShardLayout(Layout):
    """Stage 3: every parameter is cut into equal shards (`ds_tensor`), one per rank, the last one padded."""

    def tensors(self, index: int) -> list[Tensor]:
        """The rank's flat partitions of a group: one for each of DeepSpeed's sub-groups."""
        parts = enumerate(self.zero.fp32_partitioned_groups_flat)
        return [flat for place, flat in parts if self.zero.sub_group_to_group_id[place] == index]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, self.zero.get_local_fp32_grad_for_param(parameter)

    def put_gradient(self, name: str, fragment: Tensor) -> None:
        self.zero.set_local_grad_for_param(fragment, self.parameters[name])

    def discard(self) -> None:
        self.engine.zero_grad()
        self.zero.zero_grad(set_to_none=True)
        self.zero.averaged_gradients = {}

    def _place(self, name: str) -> tuple[Tensor, int, int]:
        """(flat partition, offset, size) of this rank's shard of a parameter."""
        parameter = self.parameters[name]
        part, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[part], int(offset), int(size)

    def whole(self, index: int, name: str, key: str) -> Tensor:
        flat, offset, size = self._place(name)
        return self._whole(self.parameters[name], self.optimizer.state[flat][key].narrow(0, offset, size))

    def _whole(self, parameter: Any, shard: Tensor) -> Tensor:
        """All ranks' shards put together. A collective."""
        parts = [torch.empty_like(shard) for _ in range(self.world.size)]
        dist.all_gather(parts, shard.detach().contiguous())
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    def _shard(self, parameter: Any, whole: Tensor) -> Tensor:
        """This rank's shard of a whole tensor, padded with zeros."""
        size = parameter.ds_tensor.numel()
        padded = whole.new_zeros(size * self.world.size)
        padded[: whole.numel()] = whole.reshape(-1)
        return padded.narrow(0, self.world.rank * size, size)

    def load(self, state: Mapping[str, ParameterState]) -> None:
        self.optimizer.state.clear()
        for index, group in enumerate(self.groups):
            first = state[group.names[0]]
            for flat in self.tensors(index):
                if first.tensors:
                    held = {key: torch.zeros_like(flat) for key in first.tensors}
                    set_state(self.optimizer, flat, held, first.step)
            for name in group.names:
                self._fill(name, state[name])

    def _fill(self, name: str, saved: ParameterState) -> None:
        parameter: Any = self.parameters[name]
        flat, offset, size = self._place(name)
        flat.data.narrow(0, offset, size).copy_(parameter.ds_tensor.reshape(-1))
        for key, value in saved.tensors.items():
            shard = self._shard(parameter, value)
            self.optimizer.state[flat][key].narrow(0, offset, size).copy_(shard)

    def held(self, network: torch.nn.Module) -> dict[str, Tensor]:
        parameters: dict[str, Any] = dict(network.named_parameters())
        return {name: parameter.ds_tensor for name, parameter in parameters.items()}

    def model_state(self) -> dict[str, Tensor]:
        state = {name: value for name, value in self.method.named_buffers()}
        for name, parameter in self.method.named_parameters():
            state[name] = self._whole(parameter, parameter.ds_tensor.reshape(-1))  # type: ignore[attr-defined]
        return state

    def load_model_state(self, state: Mapping[str, Tensor], *, where: str) -> None:
        buffers: dict[str, Tensor] = dict(self.method.named_buffers())
        parameters: dict[str, Any] = dict(self.method.named_parameters())
        shapes = {name: value.shape for name, value in buffers.items()}
        shapes |= {name: value.ds_shape for name, value in parameters.items()}
        check_counted(shapes, state, where=where)
        with torch.no_grad():
            for name, value in buffers.items():
                value.copy_(state[name])
            for name, parameter in parameters.items():
                shard = self._shard(parameter, state[name].to(parameter.ds_tensor))
                parameter.ds_tensor.data.copy_(shard.view_as(parameter.ds_tensor))


LAYOUTS: dict[int, type[Layout]] = {0: WholeLayout, 1: FlatLayout, 2: FlatLayout, 3: ShardLayout}
"""ZeRO stage -> where things are."""
