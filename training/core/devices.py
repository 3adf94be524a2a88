"""Which device a process computes on, and whether torch can use it: decided once, at the start."""

import os
import re
import warnings
from collections.abc import Sequence
from typing import Literal

import torch

from datapipe.core.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
"""What is asked for; "auto": a GPU where there is one."""

BF16_FROM = (8, 0)
"""Compute capability from which a GPU multiplies bf16 itself (Ampere). Below it torch does so by way of fp32."""
OWN_KIND = ((10, 1),)
"""Runs no machine code but its own: it is of another family than its number says (torch `cuda/__init__.py`)."""
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


def choose_device(name: Device, index: int = 0) -> torch.device:
    """The device of a process; `index`: of its GPU among those that it sees.

    Raises ConfigError where a GPU is asked for and torch has none of that number, and for a GPU that torch has no
    kernels for, also where "auto" finds it: nobody who has a GPU wants to train without it unknowingly.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"a GPU is asked for, and torch {torch.__version__} finds none: {_why_none()}",
                          where="engine.device = cuda",
                          hint="--engine.device cpu or auto; `nvidia-smi` must list the GPU")  # fmt: skip
    if index >= torch.cuda.device_count():
        raise ConfigError(f"there is no GPU {index}: this process sees {torch.cuda.device_count()}",
                          where="CUDA_VISIBLE_DEVICES", hint="fewer workers on this machine")  # fmt: skip
    device = torch.device("cuda", index)
    refuse_without_kernels(device)
    return device


def bind(device: torch.device) -> None:
    """Make a GPU the one that this process uses where nothing else is said: for collectives, for DeepSpeed, for
    libraries that go by LOCAL_RANK. Before the process group is made."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)


def refuse_without_kernels(device: torch.device) -> None:
    """Raises ConfigError for a GPU that this build of torch was not compiled for."""
    built_for = torch.cuda.get_arch_list()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s)Found GPU", UserWarning)  # torch's own words for it, on many lines
        capability = torch.cuda.get_device_capability(device)
    if not runs_on(capability, built_for):
        major, minor = capability
        raise ConfigError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} (compute capability "
            f"{major}.{minor}, sm_{major}{minor}); it was built for {', '.join(built_for)}",
            where="engine.device",
            hint="--engine.device cpu, CUDA_VISIBLE_DEVICES with another GPU, or a build of torch >= 2.11 for this one "
            "(for Volta, sm_70: one with CUDA 12)",
        )  # fmt: skip


def runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Has a build kernels for GPUs of this compute capability? `built_for`: as `torch.cuda.get_arch_list` tells.

    Machine code ("sm_86") runs on the same major version from its minor one on; that of "sm_90a" on no other; PTX
    ("compute_90") is compiled for whatever came later (CUDA C++ Programming Guide, "Application Compatibility").
    Builds of another kind (ROCm: "gfx90a") are not judged.
    """
    known = [match for name in built_for if (match := _ARCHITECTURE.fullmatch(name))]
    if not known:
        return True
    for kind, major, minor, own in (match.groups() for match in known):
        built = int(major), int(minor)
        if own == "a" or built == capability:
            suits = built == capability
        elif kind == "compute":
            suits = built <= capability
        else:
            suits = built[0] == capability[0] and built <= capability and capability not in OWN_KIND
        if suits:
            return True
    return False


def slow_precision(precision: str, device: torch.device) -> str:
    """A warning where a GPU carries out a precision by a detour; empty where it does not."""
    if device.type != "cuda" or precision != "bf16" or torch.version.hip:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= BF16_FROM:
        return ""
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    return f"warning: {name} has no bf16 units, bf16 is slower than fp32 on it: --optimisation.precision fp16"


def unused_gpus(device: torch.device, wanted: Device) -> str:
    """A line for a run on the CPU on a machine with GPUs that nobody asked to leave alone; empty otherwise."""
    if device.type != "cpu" or wanted != "auto" or not torch.cuda.is_available():
        return ""
    return f"torch sees {torch.cuda.device_count()} GPUs here that this run does not use: Ray does not offer them"


def _why_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "it was built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides them all"
    return "no driver, or no GPU"
