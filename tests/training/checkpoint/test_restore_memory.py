"""Restoring needs the memory of training and about one tensor more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.golden import ROOT

MEASURE = """
import re, sys, torch
from pathlib import Path
from datapipe.storage import open_store
from tests.training.checkpoint.toy import make_checkpoints, make_step, make_stepper, save
from training.nn.vision_transformer import BackboneConfig
from training.checkpoint.reader import BLOCK
from training.nn.heads import HeadConfig
from training.methods.pass_reid import Pass, PassConfig

def held(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
backbone = BackboneConfig(arch="custom", size=(16, 8), patch=8, width=384, depth=1, heads=8)
method = Pass(PassConfig(local_size=(8, 8), head=HeadConfig(out_dim=4_096, hidden=256, bottleneck=256)), backbone)
stepper = make_stepper(method)
make_step(stepper)
stepper.optimizer.zero_grad(set_to_none=True)
store = open_store(sys.argv[1])
save(make_checkpoints(store), 10, stepper)
make_checkpoints(store).restore(stepper)
total = sum(piece.bytes for piece in stepper.pieces(stepper.steps()))
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
assert make_checkpoints(store).restore(stepper) == (40, "step_0000010")
print(held("VmHWM") - before, BLOCK, total)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no way to measure a peak of memory")
def test_restore__takes_about_one_tensor_of_memory(tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    extra, block, total = map(int, done.stdout.split())
    assert total > 10 * block, "large enough to tell"
    assert extra < 2 * block, f"{extra / 1e6:.1f} MB beside {total / 1e6:.1f} MB of state"
