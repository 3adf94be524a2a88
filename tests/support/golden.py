"""The golden vectors: numbers made by running the reference implementations. GOLDEN names their folder.

Another set with the same names and other shapes may take their place, so tests read every shape and setting from it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
ABSENT = "golden vectors absent"
"""How the reason of every skipped check begins, so that they can be counted."""


def golden_folder() -> Path:
    return Path(os.environ.get("GOLDEN") or ROOT.parent / "shared" / "golden")


def golden(item: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description, tensors) of one item; the test is skipped, and counted as left out, without its files."""
    path = golden_folder() / f"{item}.json"
    if not path.exists():
        pytest.skip(f"{ABSENT}: {item}")
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def tolerance(about: dict[str, Any], kind: str) -> float:
    """The number at the head of a stated tolerance such as "1e-5 of the largest entry"."""
    match = re.match(r"[\d.]+(e-?\d+)?", about["tolerance"][kind])
    assert match, about["tolerance"]
    return float(match.group())


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest entry of theirs."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max())
