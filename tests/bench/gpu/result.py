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

from tests.bench.gpu.checks import FIRST, GB, LATER, LOWERED, RESUMED_LOSS, RESUMED_WEIGHTS, Check
from tests.bench.gpu.datasheet import GPUS
from tests.bench.gpu.parts import ABSENT, PARTS
from tests.bench.gpu.plan import KINDS, Slot
from tests.bench.gpu.speed import ABOVE, BELOW

VERSION = 3
"""Of the JSON's form."""
CHECKED = ("fp32", "bf16", "fp16", "resume")
RUNS = {"speed": "off", "compiled": "on"}
"""Check -> torch.compile."""
HEAD = ("recipe", "fp32, off the CPU's", "bf16 off", "fp16 off", "resumed", "all passed")
SPEED = ("recipe", "compile", "precision", "images", "images/s", "GFLOP an image", "MFU", "of a product", "x published",
         "ms a step", "calculated", *PARTS, f"reduce of {GPUS}", "operations", "kernels", "kernels' ms", "waits",
         "peak GB", "calculated", "data wait", "loader cores")  # fmt: skip
CROPS = ("recipe", "precision", "images", "steps", "images/s", "ms a step", "data wait", "data wait ms",
         "loader threads", "decoder", "scored by", "mAP before", "after", "rank-1 before", "after")  # fmt: skip
ON_CROPS = "crops"
"""What real crops are called where recipes have their names."""
BOUNDS = (
    f"Bounds, as shares: losses {FIRST:.0e} off the CPU's (first step), {LATER:.0e} (later ones), {LOWERED:g} in "
    f"lowered precision and between ours and the published step; after a resume {RESUMED_LOSS:.0e}, the weights "
    f"{RESUMED_WEIGHTS:.0e}; memory {ABOVE:g} above and {BELOW:g} below the calculated."
)
MEANING = (
    "Times are medians between CUDA events, parts means of other steps, in ms; images: of a micro-batch, one a step, "
    "in one process, batches of noise. MFU: operations of the model over what the datasheet promises of this precision "
    "(training/preflight/calculated/gpus.py); of a product: over what a large matrix product reaches here. "
    "x published: how much longer the published step takes, written plainly (tests/bench/published_step.py). "
    "calculated: milliseconds by the datasheet (training/preflight/calculated/step_time.py), memory by the recipe. "
    f"{'; '.join(f'{part}: {why}' for part, why in ABSENT.items())}. reduce of {GPUS}: what a step would wait for the "
    f"sum of gradients with {GPUS} such GPUs in one machine, beyond what goes beside the backward pass, calculated. "
    "operations: of torch's dispatcher, without views and allocations. kernels, and how long at least one of them "
    "runs: torch.profiler. waits: those that torch.cuda.set_sync_debug_mode notices. loader cores: that decode and "
    "crop at this rate, calculated."
)


@dataclass
class Report:
    """All recipes that were asked for, in the order in which they were tried."""

    about: dict[str, Any]
    slots: list[Slot]
    crops: Check
    """On real crops."""
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
        own = [f"{ON_CROPS}: {self.crops.why}"] if self.crops.passed is verdict else []
        return own + [f"{name}: {kind}: {check.why}" for name, checks in self.recipes.items()
                      for kind, check in checks.items() if check.passed is verdict]  # fmt: skip

    @property
    def lacking(self) -> list[str]:
        """recipe: check: figure: why it could not be had."""
        own = [f"{ON_CROPS}: {figure}: {why}" for figure, why in self.crops.lacks.items()]
        return own + [f"{name}: {kind}: {figure}: {why}" for name, checks in self.recipes.items()
                      for kind, check in checks.items() for figure, why in check.lacks.items()]  # fmt: skip

    def _lacking_by_reason(self) -> list[str]:
        """check: figure: why it could not be had: of which recipes."""
        recipes: dict[str, list[str]] = {}
        for line in self.lacking:
            recipe, rest = line.split(": ", 1)
            recipes.setdefault(rest, []).append(recipe)
        every = len(self.recipes)
        return [f"{rest} ({'all' if len(names) == every > 1 else ', '.join(names)})" for rest, names in recipes.items()]

    def plan(self) -> str:
        """What is going to be asked, in lines."""
        lines = []
        for kind in KINDS:
            own = [slot for slot in self.slots if slot.kind == kind and slot.seconds]
            out = [slot.recipe for slot in own if not slot.planned]
            seconds = sum(slot.seconds for slot in own if slot.planned)
            if own:
                left_out = f"; no time for {', '.join(out)}" if out else ""
                lines.append(f"plan: {kind} of {len(own) - len(out)} recipes, {seconds:.0f} s{left_out}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """As JSON; a run that is ended early leaves what it had until then."""
        checks = {name: {kind: asdict(check) for kind, check in found.items()} for name, found in self.recipes.items()}
        content = {
            "version": VERSION, "about": self.about, "plan": [slot._asdict() for slot in self.slots],
            "failed": self.failed, "left_out": self.left_out, "lacking": self.lacking, "crops": asdict(self.crops),
            "recipes": checks,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")

    def __str__(self) -> str:
        """Tables in Markdown, bounds, waits by line, and what failed or was left out, each by name."""
        speeds = [_speed(name, kind, checks) for name, checks in self.recipes.items()
                  for kind in RUNS if kind in checks and checks[kind].figures]  # fmt: skip
        verdicts = [_cells(name, checks) for name, checks in self.recipes.items()]
        facts = ", ".join(f"{key} {value}" for key, value in self.about.items())
        waits = [f"waits of a step: {name}: {line} {count:g}" for name, checks in self.recipes.items()
                 if "speed" in checks for line, count in checks["speed"].figures.get("waits", {}).items()]  # fmt: skip
        told = [f"FAILED {line}" for line in self.failed] + [f"left out: {line}" for line in self.left_out]
        told += [f"not had: {line}" for line in self._lacking_by_reason()]
        tables = [*_drawn(SPEED, speeds), "", MEANING, *waits, "", *_drawn(HEAD, verdicts), "", BOUNDS]
        if found := self.crops.figures:
            tables += ["", *_drawn(CROPS, [_crops(found)]), "", _of_crops(found)]
        return "\n".join([facts, "", *tables, *told])


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


def _drawn(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, tuple("-" * width for width in widths))
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def _cells(name: str, checks: dict[str, Check]) -> tuple[str, ...]:
    figures = {kind: checks[kind].figures if kind in checks else {} for kind in CHECKED}
    resume = figures["resume"]
    resumed = "-" if not resume else "identical" if resume["identical"] else f"{resume['weights_off']:.0e} off"
    passed = [check.passed for check in checks.values()]
    verdict = "NO" if False in passed else "not all tried" if None in passed else "yes"
    return (name, " ".join(f"{off:.0e}" for off in figures["fp32"].get("off", ())) or "-",
            *(_known(figures[kind].get("off"), "{:.0e}") for kind in ("bf16", "fp16")), resumed, verdict)  # fmt: skip


def _speed(name: str, kind: str, checks: dict[str, Check]) -> tuple[str, ...]:
    """A row of SPEED."""
    found = checks[kind].figures
    operations = sum(count or 0 for count in found["operations"].values()) if found["operations"] else None
    published = checks["transcription"].figures.get("ratio") if "transcription" in checks and kind == "speed" else None
    ones = ("{:,.0f}", "{:,.1f}", "{:.0%}", "{:.0%}", "{:.2f}", "{:.1f}", "{:.1f}")
    values = (found["images_per_s"], found["gflop_per_image"], found["mfu"], found["share_of_product"], published,
              found["ms"], found["calculated_ms"])  # fmt: skip
    return (
        name, RUNS[kind], found["precision"], str(found["images"]), *map(_known, values, ones),
        *(_known(found["parts_ms"][part], "{:.1f}") for part in PARTS),
        _known(found[f"reduce_ms_of_{GPUS}"], "{:.1f}"), _known(operations, "{:,}"),
        _known(found["kernels"], "{:,}"), _known(found["busy_ms"], "{:.1f}"), f"{sum(found['waits'].values()):g}",
        f"{found['peak'] / GB:.2f}", f"{found['calculated'] / GB:.2f}", _known(found["data_wait"], "{:.0%}"),
        f"{found['loader_cores']:.1f}",
    )  # fmt: skip


def _crops(found: dict[str, Any]) -> tuple[str, ...]:
    """A row of CROPS."""
    scores = (f"{100 * found[when][score]:.1f}" for score in ("mAP", "rank1") for when in ("before", "after"))
    return (
        found["recipe"],
        found["precision"],
        str(found["images"]),
        str(found["steps"]),
        f"{found['images_per_s']:,.0f}",
        f"{found['ms']:.1f}",
        f"{found['data_wait']:.1%}",
        f"{found['data_wait_ms']:.1f}",
        str(found["loader_threads"]),
        found["decoder"],
        found["headline"],
        *scores,
    )


def _of_crops(found: dict[str, Any]) -> str:
    """What the row means."""
    return (
        f"Pre-trained on {found['crops']:,} real crops, schedules over {found['planned_steps']} steps, and scored "
        f"without fine-tuning on {found['queries']} queries and {found['gallery']} gallery images of {found['set']} "
        "(percent), before with the initial weights. data wait: share of the steps' time in which they stood still for "
        "the loader, after the first ones; ms: the median step's. So short a run has no bound for what it learns."
    )


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
