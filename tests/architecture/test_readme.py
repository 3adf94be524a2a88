"""README.md and its pages as they are written: every block of commands is run, in order, in a folder that looks like a
fresh clone.

BLOCKS names each block by its first command, with what is put in the place of parts of it, so that it takes seconds:
small flags, this test's servers, and what `...` and RECIPE stand for. A block without an entry fails, and so does an
entry that no longer finds its text.
"""

import os
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch

from datapipe.core.config import ShardConfig
from datapipe.ingest.pipeline import ingest
from datapipe.ingest.shard_plan import sample_key
from tests.cluster.ray_head import Head, ray_head, without_ray
from tests.conftest import S3Server
from tests.datapipe.crop_set import jpegs
from tests.datapipe.sources.test_lmdb import convert
from tests.datapipe.sources.test_parquet import write
from tests.support.golden import ROOT
from tests.support.warm_python import python
from tests.training.commands.test_reproduce import own_row
from tests.training.reid.people import market
from tests.training.weights import published_files
from training.config.recipe_toml import load, to_toml
from training.nn.vision_transformer import BackboneConfig, VisionTransformer

WriteCrops = Callable[..., dict[str, bytes]]
SOURCES = 'lup_lmdb crops/ "hf/train-*.parquet" mot/videos'
STEPS = "--optimisation.batch 8 --optimisation.epochs 0.5 --optimisation.warmup-epochs 0.1"
"""A few steps of pre-training in place of hundreds."""
TINY = "--backbone.arch vit_tiny --backbone.size 64 32 --method.local-size 32 16 --method.head.out-dim 64"
FINE = ("--backbone.size 64 32 --optimisation.batch 8 --optimisation.micro-batch 8 --optimisation.epochs 1 "
        "--optimisation.warmup-epochs 0 --method.instances 2 --optimisation.precision fp32")  # fmt: skip
CLUSTERS = ("--backbone.size 64 32 --optimisation.batch 4 --optimisation.micro-batch 4 --optimisation.epochs 1 "
            "--method.iterations 1 --method.instances 2 --method.norm-group 4 --method.clustering.k1 4 "
            "--method.clustering.k2 2 --method.clustering.min-samples 2")  # fmt: skip
BLOCKS: dict[str, dict[str, str]] = {
    # Both are run whole elsewhere: the demo by tests/cluster/test_demo.py, the tests by whoever reads this.
    "make demo": {"make demo": "make -n demo", "make test": "make -n test"},
    "source .venv/bin/activate": {
        "source .venv/bin/activate": "python --version",  # the environment of this test
        "synth --out data/people": "synth --out data/people --train-identities 8 --test-identities 3 --cameras 2 "
                                   "--images 2",
        "--out runs/first\n": f"--out runs/first {STEPS}\n",
    },
    "python -m datapipe shard lup_lmdb": {
        "cluster shard ... --address auto": f"cluster shard {SOURCES} --out s3://reid/lup --address $HEAD_ADDRESS",
        "height >= 128": "height >= 50",
    },
    "python -m training import": {
        "weights/pass ...": f"weights/pass --stream.manifest data/shards --out runs/continued {STEPS} {TINY} "
                            "--cluster.max-workers 1 --engine.stepper plain",
    },
    "python -m training evaluate": {
        "--data data/market1501   ": "--data data/market1501 --allow-partial ",
        "--out runs/ft ": f"--out runs/ft --allow-partial {FINE} ",
        "--out runs/usl ": f"--out runs/usl --allow-partial {CLUSTERS} ",
        "--data data/duke": "--data data/duke --allow-partial",
        "reproduce pass-vits-market1501": "reproduce row.toml",  # of this test's people, with a wide tolerance
        "--weights pass_vit_small_full.pth --data data/market1501": "--weights pass_vit_small_full.pth --data data/own",
        "cluster evaluate ...": "cluster evaluate weights/pass --data data/market1501 --allow-partial",
    },
    "python -m cluster evaluate weights/pass": {
        "--tasks zero-shot,supervised,usl,uda:duke,transfer:duke": "--tasks zero-shot,transfer:duke --allow-partial "
                                                                  f"{FINE}",
        "--every-checkpoint": "--every-checkpoint --allow-partial",
    },
    "python -m training embed": {
        "--data data/market1501": "--data data/market1501 --allow-partial",
    },
    "python -m cluster score-cfs": {"score-cfs runs/first runs/ft": "score-cfs weights/pass runs/ft"},
    "python -m datapipe shard data/people": {
        "--storage.endpoint-url http://127.0.0.1:9000\n": "--storage.endpoint-url $AWS_ENDPOINT_URL\n",
        "    --storage.endpoint-url $AWS_ENDPOINT_URL": f"    --storage.endpoint-url $AWS_ENDPOINT_URL {STEPS}",
    },
    "ray start --head": {
        "ray start --head ": "true  # by this test, on ports of its own: ray start --head ",
        "RECIPE": "training/recipes/demo.toml",
        "--stream.manifest s3://reid/lup": "--stream.manifest s3://reid/people",
        "--cluster.min-workers 8 --cluster.max-workers 16": f"--cluster.min-workers 1 --cluster.max-workers 2 {STEPS}",
    },
}  # fmt: skip
SAID = {
    "make demo": ["-m cluster demo", "-m pytest"],
    "source .venv/bin/activate": ["complete: 2 steps", "step_0000002", "timm.create_model(", "report.html"],
    "python -m datapipe shard lup_lmdb": ["already complete", "1 crop removed"],
    "python -m training import": ["imported ", "complete: 2 steps"],
    "python -m training evaluate": ["result: ", "pass-vits-market1501: reproduced"],
    "python -m cluster evaluate weights/pass": ["grids/first/table.md", "transfer:duke", "first@step_0000002"],
    "python -m training embed": ["features/market1501.parquet", "scores/theirs/report.html", "features/people.parquet"],
    "python -m cluster score-cfs": ["note: selected with labelled data", "--names: "],
    "python -m datapipe shard data/people": ["complete: 2 steps"],
    "ray start --head": ["submitted ", "follow:", "complete"],
}
"""What a block must have said, in any order."""


DOCS = ROOT / "cluster" / "docs"
PAGES = (ROOT / "README.md", *(DOCS / f"{name}.md" for name in (
    "data_sets", "pre_train", "evaluate", "object_storage", "run_on_a_cluster", "machines", "guarantees")))  # fmt: skip
"""In the order in which their commands build upon each other."""


def blocks() -> list[str]:
    """The text of every block of shell commands."""
    fenced = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.M | re.S)
    return [block for page in PAGES for block in fenced.findall(page.read_text())]


def small(block: str) -> tuple[str, str]:
    """(first command of a block, the block with everything put in place)."""
    first = next((name for name in BLOCKS if block.startswith(name) or f"\n{name}" in block.partition("\n\n")[0]), None)
    assert first is not None, f"BLOCKS has no entry for this block of the README:\n{block}"
    for text, instead in BLOCKS[first].items():
        assert text in block, f"the block of `{first}` no longer says `{text}`"
        block = block.replace(text, instead)
    code = re.sub(r"(^|\s)#.*", "", block, flags=re.M)
    assert "..." not in code and "RECIPE" not in code, f"left over in the block of `{first}`:\n{block}"
    return first, block


def test_readme__is_short_and_leads_to_every_page() -> None:
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 150 and {*DOCS.glob("*.md")} == {*PAGES[1:]}
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), link
    assert all(f"({page.relative_to(ROOT)})" in text for page in PAGES[1:])
    assert all(page.read_text().startswith(("# I ", "# My ")) for page in PAGES[1:])


def test_readme__every_block_is_handled() -> None:
    assert [small(block)[0] for block in blocks()] == list(BLOCKS) == list(SAID)


class Scene(NamedTuple):
    """Where the commands run."""

    folder: Path
    environment: dict[str, str]

    def run(self, script: str) -> str:
        """What a script says that ends well."""
        done = subprocess.run(["bash", "-e", "-o", "pipefail", "-x", "-c", script], cwd=self.folder, text=True,
                              env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        assert done.returncode == 0, done.stdout
        warnings = [line for line in done.stdout.splitlines() if line.lower().startswith("warning")]
        assert len(warnings) == len(set(warnings)), "the same warning twice:\n" + "\n".join(warnings)
        return done.stdout


def clone(folder: Path) -> None:
    """What of a fresh clone the commands need."""
    for name in ("cluster", "datapipe", "training", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)


def own_files(folder: Path, s3: S3Server, write_crops: WriteCrops) -> None:
    """What a reader of the README has already: crops of all kinds, published weights, data sets, lists."""
    names = list(convert(folder, {"00_00_0000": 4}))
    crops = list(write_crops(folder / "crops", 4, seed=1))
    for number, data in enumerate(jpegs(2, 2)):
        write(folder / "hf" / f"train-{number}.parquet", {"image": [data]})
    (folder / "mot" / "videos").mkdir(parents=True)
    video(folder / "mot" / "videos" / "x.mkv")
    (folder / "mot" / "videos" / "x.txt").write_text("1,7,10,10,30,60,1,-1,-1,-1\n2,7,12,10,30,60,1,-1,-1,-1\n")
    with (folder / "CFS_list.pkl").open("wb") as file:
        pickle.dump([*names, *crops], file)
    (folder / "keys.txt").write_text(sample_key("crops", crops[0]) + "\n")
    (folder / "people.txt").write_text(crops[1] + "\n")
    s3.client.create_bucket(Bucket="reid")
    s3.client.put_object(Bucket="reid", Key="runs/earlier/config.toml", Body=to_toml(load("demo")).encode())
    write_crops(folder / "more", 4, seed=3)
    ingest([str(folder / "more")], "s3://reid/more", ShardConfig(workers=1), s3.storage)
    backbone = VisionTransformer(BackboneConfig(arch="vit_tiny", size=(64, 32)), parts=3)
    published_files.save(backbone.state_dict(), folder / "pass_vit_small_full.pth")
    for name in ("market1501", "duke", "own"):
        market(folder / "data" / name, identities=4, cameras=2)
    own_row(folder / "row.toml", name="pass-vits-market1501", tolerance=100.0, parts=3, recipe="supervised_pass",
            flags=FINE.split())  # fmt: skip


def video(path: Path) -> None:
    """Two frames of noise."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def scene(folder: Path, s3: S3Server, head: Head) -> Scene:
    """A shell as somebody has it who has just installed this, beside a store and a cluster."""
    scripts = str(Path(python()).parent)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Scene(folder, without_ray(
        HOME=str(folder / "home"), XDG_CACHE_HOME=cache, PATH=os.pathsep.join((scripts, os.environ["PATH"])),
        OMP_NUM_THREADS="1", AWS_ENDPOINT_URL=s3.endpoint, HEAD_ADDRESS=head.address,
        RAY_API_SERVER_ADDRESS=head.dashboard,
    ))  # fmt: skip


@pytest.mark.slow
def test_readme__every_block_runs_in_order(tmp_path: Path, s3: S3Server, write_crops: WriteCrops) -> None:
    clone(tmp_path)
    (tmp_path / "home").mkdir()
    with torch.random.fork_rng():
        own_files(tmp_path, s3, write_crops)
    environment = without_ray(HOME=str(tmp_path / "home"), AWS_ENDPOINT_URL=s3.endpoint, OMP_NUM_THREADS="1")
    with ray_head(environment) as head:
        shell = scene(tmp_path, s3, head)
        for block in blocks():
            first, commands = small(block)
            said = shell.run(commands)
            for expected in SAID[first]:
                assert expected in said, said
        follow = next(line.split(maxsplit=1)[1] for line in said.splitlines() if "follow:" in line)
        assert "complete: 2 steps" in shell.run(follow)
    assert not (tmp_path / "home" / ".ray").exists()
