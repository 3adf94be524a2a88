"""What one rank of a machine has, and how much of datasheets is reached."""

from collections.abc import Mapping
from typing import NamedTuple

from training.preflight.calculated.communication import GBIT_S
from training.preflight.calculated.gpus import GIGA, Format, Gpu


class Machine(NamedTuple):
    """What one rank has, as far as it is reached."""

    name: str
    products: Mapping[Format, float]
    """Operations a second in large matrix products."""
    attention: float
    """Share of that in attention's products, which are small."""
    memory: float
    """Bytes a second that norms, sums, softmax and activations move."""
    stream: float
    """Bytes a second that an optimizer moves through its long vectors."""
    launch_s: float
    """Seconds of the host for an operation; 0: the host is the device."""
    link: float
    """Bytes a second that a rank sends to others of its machine."""
    network: float
    """Gb/s that a machine sends to others."""
    host: float
    """Bytes a second from the host's memory; infinite: nothing is copied."""
    fused: bool = True
    """Does a fused kernel do attention?"""

    @property
    def streams(self) -> bool:
        """Can it communicate beside its computation, as a GPU can?"""
        return self.launch_s > 0


class Reached(NamedTuple):
    """How much of datasheets is reached, and what datasheets do not say."""

    products: float
    attention: float
    memory: float
    link: float
    host: float
    launch_s: float
    network: float


USUAL = Reached(0.78, 0.5, 0.88, 0.75, 0.8, 10e-6, GBIT_S)
GOOD = Reached(1.0, 0.8, 0.97, 0.85, 0.9, 6e-6, 4 * GBIT_S)
BAD = Reached(0.55, 0.3, 0.7, 0.5, 0.6, 17e-6, GBIT_S / 2)
"""Large products reach 0.7 to 0.8 of a dense datasheet rate (A100 0.79, B200 0.75, V100 0.86 in float32, published
measurements), streams 0.9 (H100), collectives 0.7 to 0.8 of links. An operation takes the host 6 to 17 microseconds:
13 to 14 for ours, measured with kernels that take no time. The network is not of the GPU. Time with GOOD and with BAD
is the range that is told."""


def machine_of(gpu: Gpu, reached: Reached = USUAL) -> Machine:
    """A rank with this GPU. Formats that it has no units for go by float32."""
    formats: tuple[Format, ...] = ("fp32", "tf32", "bf16", "fp16")
    rates = {one: reached.products * (gpu.peak(one) or gpu.peak("fp32")) for one in formats}
    return Machine(
        name=gpu.name, products=rates, attention=reached.attention, memory=reached.memory * gpu.memory * GIGA,
        stream=reached.memory * gpu.memory * GIGA, launch_s=reached.launch_s, link=reached.link * gpu.link * GIGA,
        network=reached.network, host=reached.host * gpu.host * GIGA,
    )  # fmt: skip
