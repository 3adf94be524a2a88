"""What the bench found: a JSON file, and a table for a person."""

import json
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.bench.gpu.checks import ABOVE, BELOW, FIRST, GB, LATER, LOWERED, RESUMED_LOSS, RESUMED_WEIGHTS, Check

CHECKS = ("fp32", "bf16", "fp16", "speed", "resume")
HEAD = ("recipe", "fp32, off the CPU's", "bf16 off", "fp16 off", "images", "images/s", "GFLOP an image", "MFU",
        "ms a step", "calculated", "peak GB", "calculated", "resumed", "all passed")  # fmt: skip
BOUNDS = (
    f"Bounds, as shares: losses {FIRST:.0e} off the CPU's (first step), {LATER:.0e} (later ones), {LOWERED:g} in "
    f"lowered precision; after a resume {RESUMED_LOSS:.0e}, the weights {RESUMED_WEIGHTS:.0e}; memory {ABOVE:g} above "
    f"and {BELOW:g} below the calculated. Times are medians between CUDA events; images: of one micro-batch. "
    "MFU: operations of the model over what the datasheet promises of this precision (training/preflight/gpus.py); "
    "calculated: milliseconds from the datasheet (training/preflight/step_time.py), memory from the recipe."
)


@dataclass
class Report:
    """All recipes that were asked for, in the order in which they were tried."""

    about: dict[str, Any]
    recipes: dict[str, dict[str, Check]] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """recipe: check: why."""
        return self._those(False)

    @property
    def left_out(self) -> list[str]:
        """The same."""
        return self._those(None)

    def _those(self, verdict: bool | None) -> list[str]:
        return [f"{name}: {kind}: {check.why}" for name, checks in self.recipes.items()
                for kind, check in checks.items() if check.passed is verdict]  # fmt: skip

    def write(self, path: Path) -> None:
        """As JSON; a run that is ended early leaves what it had until then."""
        checks = {name: {kind: asdict(check) for kind, check in found.items()} for name, found in self.recipes.items()}
        content = {"about": self.about, "failed": self.failed, "left_out": self.left_out, "recipes": checks}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")

    def __str__(self) -> str:
        """A table in Markdown, bounds, and what failed or was left out, each by name."""
        lines = [HEAD, *(_cells(name, checks) for name, checks in self.recipes.items())]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
        lines.insert(1, tuple("-" * width for width in widths))
        drawn = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
        facts = ", ".join(f"{key} {value}" for key, value in self.about.items())
        told = [f"FAILED {line}" for line in self.failed] + [f"left out: {line}" for line in self.left_out]
        return "\n".join([facts, "", *drawn, "", BOUNDS, *told])


def machine(cpu_threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    device = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "gpu": device.name, "driver": _driver(),
        "gpu_memory_gb": round(device.total_memory / GB, 1), "capability": f"{device.major}.{device.minor}",
        "torch": torch.__version__, "cuda": torch.version.cuda, "timm": version("timm"),
        "python": platform.python_version(), "platform": platform.platform(), "cpu_threads": cpu_threads,
    }  # fmt: skip


def _driver() -> str:
    """Of the kernel, as nvidia-smi says."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return found[0] if found else "unknown"


def _cells(name: str, checks: dict[str, Check]) -> tuple[str, ...]:
    fp32, resume, speed = (checks[kind].figures for kind in ("fp32", "resume", "speed"))
    resumed = "-" if not resume else "identical" if resume["identical"] else f"{resume['weights_off']:.0e} off"
    rate = [f"{speed['images']}", f"{speed['images_per_s']:,.0f}", f"{speed['gflop_per_image']:,.1f}",
            _known(speed["mfu"], "{:.0%}"), f"{speed['ms']:.1f}", _known(speed["calculated_ms"], "{:.1f}"),
            f"{speed['peak'] / GB:.2f}", f"{speed['calculated'] / GB:.2f}"] if speed else ["-"] * 8  # fmt: skip
    passed = [check.passed for check in checks.values()]
    verdict = "NO" if False in passed else "not all tried" if None in passed else "yes"
    return (name, " ".join(f"{off:.0e}" for off in fp32.get("off", ())) or "-",
            *(_off(checks[kind]) for kind in ("bf16", "fp16")), *rate, resumed, verdict)  # fmt: skip


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _off(check: Check) -> str:
    return f"{check.figures['off']:.0e}" if check.figures else "-"
