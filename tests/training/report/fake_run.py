"""A run folder as training leaves it, made up: two restarts, one of them by a kill in the middle of a line."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from datapipe.storage import open_store
from training.reid.ranked_lists import Tile, ranked_list, to_jpeg

RECIPE = """out = "runs/demo"
seed = 3
[stream]
manifest = "demo/shards"
[storage]
endpoint_url = "http://10.0.0.5:9000"
[backbone]
arch = "custom"
size = [128, 64]
[method]
name = "pass"
[optimisation]
batch = 64
precision = "fp32"
"""
ENVIRONMENT = {
    "versions": {"torch": "2.15.0", "ray": "2.60.0"},
    "git": "0123abcd-dirty",
    "world": 2,
    "device": "cpu <b>",
    "manifest": {"id": "9f3c11", "rows": 2_400, "url": "demo/shards", "licence": "rendered", "shards": 4},
}
ATTEMPTS = ((1, 1, 180, None, "start"), (2, 101, 260, "step_0000100", "worker 1 died (SIGKILL)"))
ATTEMPTS += ((3, 201, 350, "step_0000200", "stopped by SIGTERM"),)

RANKED = ("best", "median", "worst", "mistake_1")
DATA = {"official": "", "counts": {"query": {"images": 240, "cameras": 6}},
        "differences": [], "warnings": ["2 of 240 queries are odd <u>"]}  # fmt: skip
MODEL = {"family": "pass", "arch": "vit_small", "stem": "patch", "parts": 3, "task": "supervised", "trained_on": "",
         "label_fraction": 1.0, "sha256": "0f" * 32}  # fmt: skip
DISTANCES = {"edges": [0.0, 1.0, 2.0], "matching": [0.75, 0.25], "others": [0.5, 0.5]}


def record(step: int, attempt: int) -> dict[str, Any]:
    """The line of one step; the loss tells which attempt wrote it."""
    noise = math.sin(step * 12.9898) * 0.08
    loss = 4 + 2.2 * math.exp(-step / 120) + noise + 1e-4 * attempt
    return {
        "step": step,
        "samples": 64 * step,
        "epoch": step / 37.5,
        "loss": loss,
        "loss_cls": loss - 0.2,
        "loss_part": loss + 0.2,
        "target_entropy": 5 - 2 * (1 - math.exp(-step / 100)),
        "feature_cosine": 0.3 + 0.5 * math.exp(-step / 60),
        "lr": 1e-3 * min(1, step / 50) * (1 + math.cos(math.pi * step / 350)) / 2,
        "weight_decay": 0.04,
        "momentum": 0.9 + 0.1 * step / 350,
        "grad_norm": 1 + noise,
        "replaced_samples": 0,
        "images_per_s": 250 + 40 * noise + (-150 if step in (1, 101, 201) else 0),
        "model_tflops": 21.5,
        "mfu": 0.32 + 0.04 * noise,
        "wait_share": 0.03 + 0.02 * abs(noise) + (0.2 if step > 315 else 0),
        "reading_share": 0.7,
        "fetched_mb_per_s": 2.5,
        "bytes_fetched": 10_000 * step,
        "bottleneck": "reading" if step > 315 else "training",
        "time": 1_795_000_000.0 + 400 * attempt + step * 0.26,
    }


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Noise that does not compress too well."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)


def write_metrics(root: Path) -> None:
    """Three attempts; the second begins at step 101 again after the first had come to 180, and ends within a line."""
    (root / "metrics").mkdir(parents=True, exist_ok=True)
    for number, first, last, resumed, reason in ATTEMPTS:
        header = {"attempt": number, "time": f"2026-11-21T08:0{number}:00+00:00", "world": 2, "resumed_from": resumed}
        header["utilisation"] = {"flops_of_image": 91.6e9, "peak_flops": 989.5e12, "about": "MFU by <b> datasheet"}
        lines = [header | {"step": first - 1, "reason": reason}]
        lines += [record(step, number) for step in range(first, last + 1)]
        lines += [{"checkpoint": last, "save_stood_s": number / 10, "save_took_s": number, "save_share": number / 500}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        cut = '{"step": 261, "lo' if number == 2 else ""
        (root / "metrics" / f"attempt_{number:03d}.jsonl").write_text(text + cut)


def write_scores(root: Path, set_name: str = "people") -> None:
    """Both baselines and three checkpoints; the last one beats them."""
    scored = [("colour_histogram", None, 0.209), ("random", 0, 0.045)]
    scored += [(f"step_{step:07d}", step, 0.1 + 0.0008 * step) for step in (100, 200, 350)]
    for weights, step, value in scored:
        features = ("histogram",) if step is None else ("cls", "mean", "cls+parts")
        folder = open_store(str(root / "evaluation" / set_name / weights))
        scores = {name: _scores(value + 0.02 * place) for place, name in enumerate(features)}
        content = {"weights": weights, "set": set_name, "step": step, "samples": 64 * step if step else step}
        content |= {"features": scores, "headline": features[0], "queries": 240, "gallery": 960, "skipped": 2}
        content["ranked"] = {which: {"average_precision": value} for which in RANKED}
        content |= {"data": DATA | {"name": set_name}, "settings": {"size": [256, 128], "model": MODEL}}
        content |= {"per_camera": {"c1": value, "c3": value / 2}, "distances": DISTANCES}
        folder.replace("metrics.json", json.dumps(content).encode())
        for seed, which in enumerate(RANKED):
            tiles = [Tile(picture(10 * seed + place, 40, 20), place % 3 == 0, f"id {place} c1") for place in range(10)]
            folder.replace(f"ranked_{which}.jpg", to_jpeg(ranked_list(picture(99, 40, 20), "query", tiles, which)))


def _scores(value: float) -> dict[str, float]:
    return {"mAP": value, "rank1": 1.6 * value, "rank5": 2 * value, "rank10": 2.1 * value, "mINP": value / 3}


def fake_run(root: Path) -> Path:
    """Everything that a run can leave."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "command.txt").write_text("python -m cluster pretrain training/recipes/demo.toml --seed 3\n")
    (root / "config.toml").write_text(RECIPE)
    (root / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}, indent=1))
    (root / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (root / "first_batch.jpg").write_bytes(to_jpeg(picture(0, 300, 900)))
    write_metrics(root)
    write_scores(root)
    return root
