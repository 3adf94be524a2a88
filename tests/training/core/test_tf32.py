"""TF32 is a matter of the recipe: for as long as a run lasts, and exact in float32."""

import pytest
import torch

from training.config.build import allows_tf32
from training.config.recipe_toml import load
from training.core.precision import tf32_products
from training.recipes import SHIPPED


def _allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("wanted", [True, False])
def test_tf32__is_set_for_products_and_convolutions_and_put_back(wanted: bool) -> None:
    before = _allowed()
    with pytest.raises(ZeroDivisionError), tf32_products(wanted):
        assert _allowed() == (wanted, wanted)
        _ = 1 / 0
    assert _allowed() == before


@pytest.mark.parametrize(("flags", "wanted"), [
    ((), True),
    (("--optimisation.precision", "fp32"), False),
    (("--optimisation.precision", "fp32", "--engine.tf32", "on"), True),
    (("--engine.tf32", "off"), False),
])  # fmt: skip
def test_tf32__goes_with_lowered_precision(flags: tuple[str, ...], wanted: bool) -> None:
    assert allows_tf32(load(SHIPPED / "pass_vits.toml", list(flags))) is wanted
