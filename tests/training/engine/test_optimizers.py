"""AdamW by fused kernels: PyTorch's numbers, and the same bits however parameters are cut."""

import torch
from torch import Tensor

from training.engine.optimizers import FusedAdamW, has_state, step_count
from training.engine.settings import OptimisationConfig


def _stepped(kind: type[torch.optim.AdamW], parts: list[Tensor], gradients: list[Tensor], **options: bool) -> Tensor:
    """All numbers after four steps."""
    parameters = [torch.nn.Parameter(part.clone()) for part in parts]
    optimizer = kind(parameters, lr=3e-3, weight_decay=0.04, **options)
    for step in range(4):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * (1 + 0.37 * step)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def test_fused__same_bits_however_parameters_are_cut() -> None:
    torch.manual_seed(0)
    values, gradients = 0.02 * torch.randn(20_000), torch.randn(20_000) * torch.logspace(-6, 1, 20_000)
    whole = _stepped(FusedAdamW, [values], [gradients], fused=True)
    for size in (1_003, 257, 113):
        assert torch.equal(
            whole, _stepped(FusedAdamW, list(values.split(size)), list(gradients.split(size)), fused=True)
        )


def test_fused__numbers_of_the_plain_loop() -> None:
    torch.manual_seed(0)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        values = [torch.randn(3, 43, dtype=dtype), torch.randn(64, dtype=dtype), torch.randn((), dtype=dtype)]
        gradients = [torch.randn_like(value) for value in values]
        loop = _stepped(torch.optim.AdamW, values, gradients, fused=False, foreach=False)
        assert (_stepped(FusedAdamW, values, gradients, fused=True) - loop).abs().max() < bound


def test_fused__leaves_what_has_no_gradient() -> None:
    still, moving = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    optimizer = FusedAdamW([still, moving], lr=OptimisationConfig().lr, fused=True)
    for _ in range(2):
        moving.grad = torch.ones(5)
        optimizer.step()
    assert torch.equal(still, torch.ones(5)) and not has_state(optimizer, still)
    assert has_state(optimizer, moving) and step_count(optimizer, moving) == 2
