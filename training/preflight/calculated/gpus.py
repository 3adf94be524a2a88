"""What GPUs can do by their makers' datasheets: operations a second by precision, memory and links.

Rates are dense: where a datasheet gives matrix rates "with sparsity", half of them. Which of them a run is measured
against follows from the precision of its matrix products:

    fp32   the FP32 units, as products are exact there: neither TF32 nor another shorter format
    tf32   what float32 products reach where TF32 is allowed
    bf16, fp16   matrix units with sums in float32, as PyTorch uses them; GeForce cards have half the rate then

Utilisation is that of Chowdhery et al. 2022 ("PaLM", appendix B): model FLOPs over what the datasheet promises.
"""

import re
from typing import Literal, NamedTuple

Format = Literal["fp32", "tf32", "bf16", "fp16"]
"""Numbers that a matrix product multiplies; it adds in float32."""
TERA, GIGA = 1e12, 1e9


class Gpu(NamedTuple):
    """A GPU as its datasheet has it."""

    name: str
    pattern: str
    """Regular expression for the whole name that the driver gives, without the maker's."""
    fp32: float
    """TFLOP/s, as the next two; 0: it has no units for that."""
    tf32: float
    bf16: float
    fp16: float
    memory: float
    """GB/s between the GPU and its memory."""
    memory_gb: float
    """Of the smallest with this name, 10^9 bytes."""
    link: float
    """GB/s that a GPU can send to others in its machine (one direction, all links): NVLink, Infinity Fabric or PCIe."""
    host: float
    """GB/s from the host's memory, one direction: PCIe."""
    source: str

    def peak(self, precision: Format) -> float:
        """Operations a second in matrix products of this precision; 0: it has no units for it."""
        rates: dict[Format, float] = {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16, "fp16": self.fp16}
        return rates[precision] * TERA


def _nvidia(
    name: str, pattern: str, rates: tuple[float, float, float], memory: tuple[float, float], link: float, host: float,
    source: str, *, fp16: float | None = None,
) -> Gpu:  # fmt: skip
    """`rates`: fp32, tf32, bf16; `memory`: GB/s, GB."""
    fp32, tf32, bf16 = rates
    return Gpu(name, pattern, fp32, tf32, bf16, bf16 if fp16 is None else fp16, *memory, link, host, source)


_PCIE3, _PCIE4, _PCIE5 = 16.0, 32.0, 64.0
"""GB/s of 16 lanes, one direction."""

GPUS = (
    _nvidia("GB200", r"GB200", (80, 1_250, 2_500), (8_000, 186), 900, 450, "NVIDIA GB200 NVL72 datasheet"),
    _nvidia("B200", r"B200", (80, 1_100, 2_250), (8_000, 180), 900, _PCIE5,
            "NVIDIA Blackwell architecture brief, HGX B200"),
    _nvidia("H200 NVL", r"H200 NVL", (60, 417.5, 835.5), (4_800, 141), 450, _PCIE5, "NVIDIA H200 datasheet"),
    _nvidia("H200", r"H200", (67, 494.5, 989.5), (4_800, 141), 450, _PCIE5, "NVIDIA H200 datasheet"),
    _nvidia("GH200", r"GH200 480GB", (67, 494.5, 989.5), (4_000, 96), 450, 450, "NVIDIA GH200 datasheet"),
    _nvidia("H100 SXM", r"H100( 80GB HBM3)?", (67, 494.5, 989.5), (3_350, 80), 450, _PCIE5,
            "NVIDIA H100 datasheet"),
    _nvidia("H100 NVL", r"H100 NVL", (60, 417.5, 835.5), (3_900, 94), 300, _PCIE5, "NVIDIA H100 datasheet"),
    _nvidia("H100 PCIe", r"H100 PCIe", (51, 378, 756), (2_000, 80), 300, _PCIE5, "NVIDIA H100 datasheet"),
    _nvidia("H800 SXM", r"H800", (67, 494.5, 989.5), (3_350, 80), 200, _PCIE5, "NVIDIA H800 datasheet"),
    _nvidia("H20", r"H20", (44, 74, 148), (4_000, 96), 450, _PCIE5, "NVIDIA H20 datasheet"),
    _nvidia("A100 SXM 80 GB", r"A100-SXM4-80GB|A100-SXM-80GB", (19.5, 156, 312), (2_039, 80), 300, _PCIE4,
            "NVIDIA A100 datasheet"),
    _nvidia("A100 SXM 40 GB", r"A100-SXM4-40GB", (19.5, 156, 312), (1_555, 40), 300, _PCIE4, "NVIDIA A100 datasheet"),
    _nvidia("A100 PCIe 80 GB", r"A100 80GB PCIe", (19.5, 156, 312), (1_935, 80), 300, _PCIE4, "NVIDIA A100 datasheet"),
    _nvidia("A100 PCIe 40 GB", r"A100-PCIE-40GB", (19.5, 156, 312), (1_555, 40), 300, _PCIE4, "NVIDIA A100 datasheet"),
    _nvidia("A800 SXM", r"A800-SXM4-80GB", (19.5, 156, 312), (2_039, 80), 200, _PCIE4, "NVIDIA A800 datasheet"),
    _nvidia("A800 PCIe", r"A800 80GB PCIe", (19.5, 156, 312), (1_935, 80), 200, _PCIE4, "NVIDIA A800 datasheet"),
    _nvidia("A30", r"A30", (10.3, 82, 165), (933, 24), 100, _PCIE4, "NVIDIA A30 datasheet"),
    _nvidia("A40", r"A40", (37.4, 74.8, 149.7), (696, 48), 56.25, _PCIE4, "NVIDIA A40 datasheet"),
    _nvidia("A10", r"A10", (31.2, 62.5, 125), (600, 24), _PCIE4, _PCIE4, "NVIDIA A10 datasheet"),
    _nvidia("A10G", r"A10G", (31.5, 35, 70), (600, 24), _PCIE4, _PCIE4, "NVIDIA A10G datasheet (AWS)"),
    _nvidia("RTX A6000", r"RTX A6000", (38.7, 77.4, 154.8), (768, 48), 56.25, _PCIE4, "NVIDIA RTX A6000 datasheet"),
    _nvidia("L40S", r"L40S", (91.6, 183, 362), (864, 48), _PCIE4, _PCIE4, "NVIDIA L40S datasheet"),
    _nvidia("L40", r"L40", (90.5, 90.5, 181), (864, 48), _PCIE4, _PCIE4, "NVIDIA L40 datasheet"),
    _nvidia("L4", r"L4", (30.3, 60, 121), (300, 24), _PCIE4, _PCIE4, "NVIDIA L4 datasheet"),
    _nvidia("RTX 6000 Ada", r"RTX 6000 Ada Generation", (91.1, 182.1, 364.2), (960, 48), _PCIE4, _PCIE4,
            "NVIDIA Ada GPU architecture white paper, professional edition"),
    _nvidia("GeForce RTX 5090", r"GeForce RTX 5090", (104.8, 104.8, 209.5), (1_792, 32), _PCIE5, _PCIE5,
            "NVIDIA RTX Blackwell GPU architecture white paper"),
    _nvidia("GeForce RTX 4090", r"GeForce RTX 4090", (82.6, 82.6, 165.2), (1_008, 24), _PCIE4, _PCIE4,
            "NVIDIA Ada GPU architecture white paper"),
    _nvidia("GeForce RTX 3090 Ti", r"GeForce RTX 3090 Ti", (40, 40, 80), (1_008, 24), 56.25, _PCIE4,
            "NVIDIA GA102 GPU architecture white paper"),
    _nvidia("GeForce RTX 3090", r"GeForce RTX 3090", (35.6, 35.6, 71), (936, 24), 56.25, _PCIE4,
            "NVIDIA GA102 GPU architecture white paper"),
    _nvidia("V100 SXM2", r"Tesla V100-SXM[23]-(16|32)GB(-LS)?", (15.7, 0, 0), (900, 16), 150, _PCIE3,
            "NVIDIA V100 datasheet", fp16=125),
    _nvidia("V100S PCIe", r"Tesla V100S-PCIE-32GB", (16.4, 0, 0), (1_134, 32), _PCIE3, _PCIE3,
            "NVIDIA V100 datasheet", fp16=130),
    _nvidia("V100 PCIe", r"Tesla V100-PCIE-(16|32)GB", (14, 0, 0), (900, 16), _PCIE3, _PCIE3,
            "NVIDIA V100 datasheet", fp16=112),
    _nvidia("T4", r"Tesla T4", (8.1, 0, 0), (320, 16), _PCIE3, _PCIE3, "NVIDIA T4 datasheet", fp16=65),
    Gpu("Instinct MI300X", r"Instinct MI300X", 163.4, 653.7, 1_307.4, 1_307.4, 5_300, 192, 448, _PCIE5,
        "AMD Instinct MI300X datasheet"),
    Gpu("Instinct MI250X, one of its two dies", r"Instinct MI250X", 47.9, 0, 191.5, 191.5, 1_638, 64, 200, _PCIE4,
        "AMD Instinct MI250X datasheet"),
)  # fmt: skip
"""Makers' figures. GPUs that are parts of one (MIG, vGPU), and those of laptops, have other names and none here."""


def known(device: str) -> Gpu | None:
    """The GPU of a name as the driver gives it (`torch.cuda.get_device_name`); None where it is not in the table."""
    bare = re.sub(r"^(NVIDIA|AMD) ", "", device.strip())
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, bare)), None)


def named(name: str) -> Gpu | None:
    """The GPU that a person means: its name in the table or the driver's, upper or lower case, spaces and dashes left
    out ("h100", "a100-sxm-80gb", "rtx 4090"). Where several begin so, the first of them."""
    wanted = _letters(name)
    if not wanted:
        return None
    exact = [gpu for gpu in GPUS if wanted == _letters(gpu.name)]
    first = [gpu for gpu in GPUS if _letters(gpu.name).startswith(wanted)]
    inside = [gpu for gpu in GPUS if len(wanted) > 2 and wanted in _letters(gpu.name)]
    return next(iter([*exact, *filter(None, [known(name)]), *first, *inside]), None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia").removeprefix("amd"))
