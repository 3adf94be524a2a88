"""The null GPU made to compute: every operation on CUDA tensors is done again by the CPU, in the same memory."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

APART = ("c10d", "profiler", "_c10d_functional")
"""Namespaces of operations that `null.c` carries out."""
ALLOCATING = {
    "aten::item", "aten::_local_scalar_dense", "aten::is_pinned", "aten::_pin_memory", "aten::record_stream",
    "aten::set_", "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty",
    "aten::new_empty_strided", "aten::resize_", "aten::detach", "aten::lift_fresh", "aten::alias",
}  # fmt: skip
"""Operations without a kernel: nothing is to be done again."""
COUNTED = {
    "aten::nonzero", "aten::masked_select", "aten::masked_scatter_backward", "aten::_unique", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount",
}  # fmt: skip
"""Operations that ask a kernel for the size of their result: the CPU answers alone."""
PUTS = {"aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index_put"}


class Computed(TorchDispatchMode):
    """See the module; `with Computed(): ...` around whatever uses CUDA tensors."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name.partition("::")[0] in APART or name in ALLOCATING:
            return func(*args, **kwargs)
        on_gpu = bool(args) and isinstance(args[0], Tensor) and args[0].is_cuda
        if on_gpu and name in COUNTED:
            return _to_gpu(func(*tree_map(_host, args), **tree_map(_host, kwargs)))
        if on_gpu and name == "aten::index" and any(map(_is_mask, args[1])):
            return _to_gpu(func(*tree_map(_host, args)))
        if on_gpu and name in PUTS:
            args = (args[0], _numbered(args[1]), *args[2:])
        return _done_again(func, args, kwargs)


@contextmanager
def computed() -> Iterator[None]:
    """`Computed`, with only those kernels that the CPU has, too: no cuDNN, attention by plain products."""
    torch.backends.cudnn.enabled = False
    for kernel in ("cudnn", "flash", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
    with Computed():
        yield


def _done_again(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation as CUDA carries it out, its results filled in with what the CPU makes of it."""
    before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    found = func(*args, **kwargs)
    after = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
    if not any(leaf.is_cuda for leaf in before + after):
        return found
    host_args, host_kwargs = tree_map(_host, (args, kwargs))
    host_kwargs.pop("pin_memory", None)
    twins = [leaf for leaf in tree_leaves(func(*host_args, **host_kwargs)) if isinstance(leaf, Tensor)]
    held = {leaf.untyped_storage().data_ptr() for leaf in before}
    for one, twin in zip(after, twins, strict=True):
        if one.numel() and one.untyped_storage().data_ptr() not in held:  # what is held was changed in place
            if one.shape != twin.shape:
                raise RuntimeError(f"{func}: {tuple(one.shape)} on the GPU, {tuple(twin.shape)} on the CPU")
            _host(one).copy_(twin)
    return found


def _host(leaf: Any) -> Any:
    """A tensor in host memory that is the very memory of this one on the GPU; devices likewise; all else as it is."""
    if isinstance(leaf, torch.device) and leaf.type == "cuda":
        return torch.device("cpu")
    if not isinstance(leaf, Tensor) or not leaf.is_cuda:
        return leaf
    storage = leaf.untyped_storage()
    if not storage.nbytes() or not leaf.numel():
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=leaf.dtype).set_(raw, leaf.storage_offset(), leaf.shape, leaf.stride())


def _to_gpu(found: Any) -> Any:
    return tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, Tensor) else leaf, found)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _numbered(indices: Sequence[Any]) -> list[Any]:
    """Boolean indices as numbers: a kernel that counts the true ones counts nothing here."""
    found: list[Any] = []
    for index in indices:
        found += [_to_gpu(axis) for axis in _host(index).nonzero(as_tuple=True)] if _is_mask(index) else [index]
    return found
