"""Which operations torch's dispatcher carries out: about one kernel each on a GPU, and what a host reads of tensors."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = frozenset(
    ("view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "detach",
     "alias", "split", "split_with_sizes", "unbind", "as_strided", "chunk", "lift_fresh", "_reshape_alias", "unfold",
     "diagonal", "narrow", "is_same_size")
)  # fmt: skip
"""Operations that only look at memory in another way."""
ALLOCATIONS = ("empty", "new_empty", "sym_")
"""How the names of those begin that only reserve memory."""
READS = frozenset(
    ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero", "equal",
     "masked_select", "unique")
)  # fmt: skip
"""Functions whose result the host has to wait for."""


class Operations(TorchDispatchMode):
    """Counts operations while it is active: name -> how often, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in VIEWS and not name.startswith(ALLOCATIONS):
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Counts, while it is active, what the host reads of tensors that would be a device's: of all but those that
    `torch.tensor` made of the host's numbers, and what is computed of such alone."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_host = bool(given) and all(hasattr(value, "_on_host") for value in given)
        if func is torch.tensor or on_host:
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    value._on_host = True  # type: ignore[attr-defined]
        elif func.__name__ in READS:
            self.reads[func.__name__] += 1
        return result


class Products(TorchDispatchMode):
    """Notes the matrix products and convolutions while it is active, and does them again by themselves."""

    NAMES = frozenset(("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"))

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()
        self._functions: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in self.NAMES:
            self._functions[name] = func
            self.found[(name, *(_described(argument) for argument in args))] += 1
        return func(*args, **(kwargs or {}))

    def again(self) -> "list[tuple[Any, tuple[Any, ...], int]]":
        """(function, arguments of the same shapes, how often) of each that differs from the others."""
        return [
            (self._functions[key[0]], tuple(_made(argument) for argument in key[1:]), count)
            for key, count in self.found.items()
        ]


def _described(argument: Any) -> Any:
    """Something hashable from which an argument like it can be made."""
    if isinstance(argument, Tensor):
        return ("tensor", tuple(argument.shape), argument.stride(), argument.dtype)
    return ("value", tuple(argument) if isinstance(argument, list) else argument)


def _made(described: Any) -> Any:
    if described[0] == "value":
        return list(described[1]) if isinstance(described[1], tuple) else described[1]
    _, shape, stride, dtype = described
    numbers = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    return (0.1 * torch.randn(numbers)).to(dtype).as_strided(shape, stride)
