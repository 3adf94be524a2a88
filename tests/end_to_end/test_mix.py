"""A run on a mix of data sets is killed and goes on with the samples that an enumeration by hand expects."""

import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.errors import ConfigError, DataError
from datapipe.core.randomness import words
from datapipe.sampling.epoch_order import Order
from tests.datapipe import crop_set
from tests.end_to_end.pause import Pause
from tests.end_to_end.tiny import audited, command, recipe
from training.config import recipe_toml as recipes
from training.config.run_config import RunConfig
from training.core.host import LocalHost
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.report.run_files import RunFiles
from training.trainer.pretrain import pretrain

ROWS, WEIGHTS = (14, 25), (3, 1)
BATCH, STEPS = 6, 13
"""Two epochs of the 39 crops: almost six of the first data set."""


def enumerated(config: RunConfig) -> dict[int, list[int]]:
    """Step -> samples: each data set's own order, dealt out as 3 : 1 asks, by counting one place after the other."""
    seeds = words(config.seed, "mix", np.arange(2), 1)[:, 0].tolist()
    orders = [Order(rows, seed, 4, 3) for rows, seed in zip(ROWS, seeds, strict=True)]
    samples, drawn = [], [0, 0]
    for place in range(BATCH * STEPS):
        share = (3 * (place + 1) + 2) // 4  # of the first after this place, rounded
        chosen = 0 if share > drawn[0] else 1
        row = int(orders[chosen].samples(np.array([drawn[chosen]]))[0])
        samples.append(row + (0, ROWS[0])[chosen])
        drawn[chosen] += 1
    return {step + 1: samples[step * BATCH : (step + 1) * BATCH] for step in range(STEPS)}


@pytest.mark.slow
def test_mix__a_killed_run_sees_every_sample_it_should(tmp_path: Path) -> None:
    sets = [crop_set.write(tmp_path / name, rows, seed=rows) for name, rows in zip("ab", ROWS, strict=True)]
    path = recipe(tmp_path, "", str(tmp_path / "run"), epochs=2.0)
    mix = ["--stream.mix", *(str(part.folder) for part in sets), "--stream.weights", "3", "1"]
    pause = Pause(tmp_path, 5)
    killed = command("tests.end_to_end.pause", "training", "pretrain", str(path), *mix, **pause.environment)
    pause.reached(killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    config = recipes.load(tmp_path / "run" / "config.toml")
    assert config == recipes.load(path, mix)
    ending = pretrain(config, world=World(), host=LocalHost())
    assert (ending.step, ending.complete) == (STEPS, True)
    found = audited(tmp_path / "run")
    assert found == enumerated(config)
    seen = Counter(sample for samples in found.values() for sample in samples)
    assert abs(sum(seen[row] for row in range(14)) - BATCH * STEPS * 3 / 4) <= 0.5

    manifest = RunFiles(RunFolder(config.out, config.storage)).environment["manifest"]
    assert manifest["id"] == "+".join(part.manifest.id for part in sets)
    assert [part["weight"] for part in manifest["sets"]] == [3, 1] and manifest["rows"] == 39
    other = replace(config, stream=replace(config.stream, weights=(1.0, 3.0)))
    with pytest.raises(ConfigError, match="stream.weights"):
        pretrain(other, world=World(), host=LocalHost())
    swapped = replace(config, stream=replace(config.stream, mix=config.stream.mix[::-1]))
    with pytest.raises(DataError, match=r"trained on other data: manifest \w{12} \+ \w{12}"):
        pretrain(swapped, world=World(), host=LocalHost())
