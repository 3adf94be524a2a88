"""Images per second, waiting share, and when the run will end."""

import time
from collections import deque
from typing import Literal

import torch


class Speed:
    """Rates over the most recent steps."""

    def __init__(self, window: int = 50) -> None:
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=window)
        self._last = time.perf_counter()

    def step(self, images: int, waited_s: float) -> tuple[float, float]:
        """Note one step; (images per second of the whole run, share of the time spent waiting for data)."""
        now = time.perf_counter()
        self._steps.append((now - self._last, images, waited_s))
        self._last = now
        seconds = sum(step[0] for step in self._steps)
        return sum(step[1] for step in self._steps) / seconds, sum(step[2] for step in self._steps) / seconds

    def pause(self) -> None:
        """Forget the time since the last step: a save or a rehearsal is not training speed."""
        self._last = time.perf_counter()

    def remaining_s(self, images_left: int) -> float:
        """Seconds until the end at the present rate."""
        images = sum(step[1] for step in self._steps)
        return images_left * sum(step[0] for step in self._steps) / images if images else float("nan")


def duration(seconds: float) -> str:
    """`85 s`, `12 min`, `14 h 20`, `3 d 4 h`."""
    if seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7_200:
        return f"{whole // 60} min"
    if whole < 172_800:
        return f"{whole // 3600} h {whole % 3600 // 60:02d}"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def faster_precision(seconds: float = 0.3) -> Literal["fp32", "bf16"]:
    """Which of the two this machine multiplies faster, measured: CPUs differ, GPUs that matter prefer bf16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        return "bf16"
    inputs, layer = torch.randn(2_048, 192), torch.nn.Linear(192, 768)
    counts: dict[Literal["fp32", "bf16"], int] = {}
    for name in ("fp32", "bf16"):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "bf16"):
            layer(inputs)
            end, count = time.perf_counter() + seconds, 0
            while time.perf_counter() < end:
                layer(inputs)
                count += 1
        counts[name] = count
    return "bf16" if counts["bf16"] > counts["fp32"] else "fp32"
