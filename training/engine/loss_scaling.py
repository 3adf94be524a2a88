"""Loss scaling for float16 autocast: gradients too small for float16 survive when the loss is made larger.

Micikevicius et al., "Mixed Precision Training" (2018), with the numbers of PyTorch's GradScaler. A scale is a power of
two, so scaling the loss and unscaling the gradients rounds nothing.
"""

from dataclasses import dataclass

from training.core.precision import Precision

GROWTH_STEPS = 2_000
"""Steps without an overflow after which a larger scale is tried."""
SMALLEST, LARGEST = 1.0, 2.0**24
"""Between these the scale moves; larger ones say that gradients vanish for another reason."""


@dataclass(frozen=True)
class LossScale:
    """What the loss is multiplied by before the backward pass, and for how long that has gone well."""

    value: float = 2.0**16
    good: int = 0
    """Steps without an overflow since the value last changed."""

    @property
    def smallest(self) -> bool:
        """True where an overflow is no matter of the scale."""
        return self.value <= SMALLEST

    def after_step(self) -> "LossScale":
        """No gradient overflowed: twice as large after `GROWTH_STEPS` of these in a row."""
        if self.good + 1 < GROWTH_STEPS:
            return LossScale(self.value, self.good + 1)
        return LossScale(self.value if self.value >= LARGEST else 2 * self.value)

    def after_overflow(self) -> "LossScale":
        """A gradient overflowed: half as large."""
        return LossScale(max(self.value / 2, SMALLEST))


def first_scale(precision: Precision) -> LossScale | None:
    """What a run begins with; None where nothing is scaled. bfloat16 has the range of float32."""
    return LossScale() if precision == "fp16" else None
