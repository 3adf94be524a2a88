"""What a step sends between machines, and the seconds that a network takes for it. Pure.

Of N numbers, b bytes each, in a ring of W ranks that passes through every machine once, a machine sends

    all-reduce                    2 (W - 1) / W  N b
    reduce-scatter, all-gather      (W - 1) / W  N b    each

(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009), and receives as much at the same time. Several
rings share the numbers, not the sum. What the ranks of a machine tell each other is faster by far and not counted.

    plain, ZeRO 0   all-reduce of gradients, once a step
    ZeRO 1          reduce-scatter of gradients, all-gather of parameters, once a step
    ZeRO 2          gradients at every micro-batch, to their owners (all-reduced where ranks are many), parameters once
    ZeRO 3          reduce-scatter of gradients and all-gather of parameters, the teacher's too, at every micro-batch

On GPUs gradients of ZeRO 1 to 3, and what 3 gathers, go beside the computation; on CPUs nothing does, nor do gradients
of ZeRO 1 with more ranks than `OWNERS`.
"""

from typing import NamedTuple

from training.engine.reduction import BYTES, OWNERS, Reduction

FULL = 4
"""Bytes of a parameter."""
GBIT_S = 100.0
"""Of the network between machines, in each direction, where nothing else is said."""


class Traffic(NamedTuple):
    """Bytes that a machine sends in one step; it receives as many."""

    gradients: int
    parameters: int

    @property
    def total(self) -> int:
        return self.gradients + self.parameters

    def seconds(self, gbit_s: float = GBIT_S) -> float:
        """How long a network of so many Gb/s in each direction takes, at its full rate."""
        return self.total * 8 / (gbit_s * 1e9)


def traffic(
    *,
    trained: int,
    parameters: int,
    stage: int | None,
    reduction: Reduction,
    ranks: int,
    machines: int,
    micro_batches: int = 1,
) -> Traffic:
    """`trained`: numbers that have gradients; `parameters`: all, the teacher's too; `stage`: of ZeRO, None for the
    plain stepper; `micro_batches`: of one rank in a step. On one machine nothing is sent between machines."""
    if machines < 2:
        return Traffic(0, 0)
    share = (ranks - 1) / ranks
    gradients, whole = share * trained * BYTES[reduction], share * FULL
    if not stage:
        return Traffic(round(2 * gradients), 0)
    if stage == 1:
        return Traffic(round(gradients), round(whole * trained))
    if stage == 2:
        times = 1 if ranks <= OWNERS else 2
        return Traffic(round(times * micro_batches * gradients), round(whole * trained))
    return Traffic(round(micro_batches * gradients), round(micro_batches * whole * parameters))
