"""Files of runs and weights, sound and hostile: recipes, cards, checkpoints, metrics, restarts, weights, features."""

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch

from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.storage import open_store
from tests.end_to_end.tiny import RECIPE
from tests.fuzz.reader import Make, Reader, together
from tests.fuzz.sources import written
from tests.training.checkpoint.toy import make_method, saved
from tests.training.report.fake_run import fake_run
from training.__main__ import main
from training.checkpoint.lineage import complete
from training.checkpoint.reader import Reader as CheckpointReader
from training.checkpoint.reader import load_model, newest_good
from training.config import recipe_toml
from training.evaluation.feature_file import read_features
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.weights.export import Provenance, export, load_embedder

STORAGE = StorageConfig()


def called(function: Callable[[], object]) -> int:
    """The exit code of a command that does this."""

    def command(_: list[str]) -> int:
        function()
        return 0

    return cli.run(command, [])


# ------------------------------------------------------------------------------------------------------------- recipes


def make_recipe(folder: Path) -> None:
    (folder / "x.toml").write_text(RECIPE.format(out="run", manifest="set", epochs=1))


def look_recipe(folder: Path, out: Path) -> int:
    return called(lambda: recipe_toml.to_toml(recipe_toml.load(folder / "x.toml")))


def recipe(text: Callable[[], str]) -> Make:
    return lambda folder: (folder / "x.toml").write_text(text(), errors="surrogatepass") and None


def with_line(line: str) -> Make:
    return recipe(lambda: RECIPE.format(out="run", manifest="set", epochs=1).replace("depth = 2", line))


TOML = Reader(
    "toml", make_recipe, ("x.toml",), look_recipe,
    hostile={
        "deep arrays": recipe(lambda: "a = " + "[" * 100_000),
        "deep tables": recipe(lambda: "a = " + "{a=" * 50_000),
        "deep keys": recipe(lambda: ".".join("a" * 200_000) + " = 1"),
        "deep headers": recipe(lambda: "[" + ".".join("a" * 200_000) + "]"),
        "deep keys in tables": recipe(lambda: "x = {" + ".".join("a" * 200_000) + " = 1}"),
        "many digits": with_line(f"depth = {'9' * 6_000}"),
        "depth without end": with_line("depth = 1000000000"),
        "width without end": with_line("depth = 2\nmlp_ratio = 1e300"),
        "infinite": with_line("depth = 2\ndrop_path = inf"),
        "control characters": recipe(lambda: 'out = "\\u001b[31m\\u0007"\n"\\u001b]0;x\\u0007" = 1\n'),
        "20 MB": recipe(lambda: "#" * 20_000_000),
        "holes": together(make_recipe, lambda folder: os.truncate(folder / "x.toml", 20 << 30)),
    },
    refused=frozenset({"deep arrays", "deep tables", "deep keys", "many digits", "depth without end", "holes"}),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- cards


@cache
def _backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(BackboneConfig(arch="custom", size=(32, 16), patch=8, width=24, depth=2, heads=2)).eval()


def make_export(folder: Path) -> None:
    export(_backbone(), open_store(str(folder)), Provenance(method="dino"))


def look_export(folder: Path, out: Path) -> int:
    return called(lambda: load_embedder(open_store(str(folder))))


def reseal_export(folder: Path) -> None:
    """The card with the checksum of the weights that are there."""
    try:
        card = json.loads((folder / "card.json").read_bytes())
        card["file"]["sha256"] = hashlib.sha256((folder / "backbone.safetensors").read_bytes()).hexdigest()
        (folder / "card.json").write_text(json.dumps(card))
    except (ValueError, TypeError, KeyError, AttributeError):
        return


def card(**backbone: Any) -> Make:
    def make(folder: Path) -> None:
        make_export(folder)
        content = json.loads((folder / "card.json").read_text())
        content["backbone"] |= backbone
        (folder / "card.json").write_text(json.dumps(content))

    return make


def card_entry(**entries: Any) -> Make:
    def make(folder: Path) -> None:
        make_export(folder)
        content = json.loads((folder / "card.json").read_text()) | entries
        (folder / "card.json").write_text(json.dumps(content))

    return make


CARD = Reader(
    "card", make_export, ("card.json", "backbone.safetensors"), look_export, reseal_export,
    hostile={
        "depth": card(depth=10**9), "width": card(width=2_000_000, heads=2), "patch": card(patch=1, size=[10**6] * 2),
        "mlp": card(mlp_ratio=1e9), "parts": card_entry(parts=10**9), "negative parts": card_entry(parts=-1),
        "a list": written("card.json", b"[]"), "null": written("card.json", b"null"),
        "deep": written("card.json", b"[" * 100_000),
        "necks": card_entry(necks=[1]), "necks elsewhere": card_entry(
            necks={"file": "../../../etc/passwd", "sha256": "0", "fusion": "cat", "neck": "one"}),
    },
    refused=frozenset({"depth", "width", "patch", "mlp", "parts", "negative parts", "a list", "null", "deep", "necks",
                       "necks elsewhere"}),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- checkpoints


def make_checkpoint(folder: Path) -> None:
    saved(open_store(str(folder / "checkpoints")), 10, 20)
    (folder / "config.toml").write_text(RECIPE.format(out=str(folder), manifest="set", epochs=1))


def look_checkpoint(folder: Path, out: Path) -> int:
    codes = [cli.run(main, ["checkpoints", str(folder)]), cli.run(main, ["checkpoints", str(folder), "verify"])]
    store = open_store(str(folder / "checkpoints"))

    def whole() -> None:
        for name in complete(store, lambda line: None):
            reader = CheckpointReader(store, name)
            for key in reader.marker.tensors:
                reader.whole(key)
            load_model(store, name, make_method())

    codes += [called(whole), called(lambda: newest_good(store, print))]
    return max(codes)


def reseal_checkpoint(folder: Path) -> None:
    """The markers with the right checksum of themselves."""
    for path in folder.glob("checkpoints/*/checkpoint.json"):
        try:
            content = json.loads(path.read_bytes())
            content.pop("sha256", None)
            plain = {key: value for key, value in content.items() if key != "term" or value}
            content["sha256"] = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
            path.write_text(json.dumps(content))
        except (ValueError, TypeError, AttributeError):
            continue


def marker(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(folder: Path) -> None:
        make_checkpoint(folder)
        for path in folder.glob("checkpoints/*/checkpoint.json"):
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        reseal_checkpoint(folder)

    return make


def first_tensor(content: dict[str, Any], form: Any) -> None:
    content["tensors"][next(iter(content["tensors"]))] = form


def huge_fragment(content: dict[str, Any]) -> None:
    """A tensor of 4 TB, whole by what the marker says."""
    key = next(iter(content["tensors"]))
    content["tensors"][key] = [[10**12], "F32"]
    for file in content["files"]:
        file["fragments"] = [row for row in file["fragments"] if row[0] != key]
    content["files"][0]["fragments"].append([key, 0, 10**12, 0, "0" * 32])


TERMS = "checkpoints/term_0000007.json"


def on_markers(change: Callable[[Path], object]) -> Make:
    def make(folder: Path) -> None:
        for path in folder.glob("checkpoints/*/checkpoint.json"):
            change(path)

    return make


MARKER = Reader(
    "marker", make_checkpoint, ("checkpoints/*/checkpoint.json", "checkpoints/*/rank*", "checkpoints/term_*"),
    look_checkpoint, reseal_checkpoint,
    hostile={
        "tensor of 4 TB": marker(huge_fragment),
        "bytes of a file": marker(lambda content: content["files"][0].update(bytes=10**15)),
        "unknown type": marker(lambda content: first_tensor(content, [[1], "F7"])),
        "negative shape": marker(lambda content: first_tensor(content, [[-1, -8], "F32"])),
        "time beyond all": marker(lambda content: content.update(time=1e300)),
        "samples of text": marker(lambda content: content.update(samples="\x1b[31m")),
        "step of text": marker(lambda content: content.update(step="10")),
        "deep": together(make_checkpoint, on_markers(lambda path: path.write_text("[" * 100_000))),
        "deep terms": together(make_checkpoint, written(TERMS, b"[" * 100_000)),
        "terms of text": together(make_checkpoint, written(TERMS, b'{"terms": [["a", null]]}')),
        "holes": together(make_checkpoint, on_markers(lambda path: os.truncate(path, 20 << 30))),
    },
    refused=frozenset({"tensor of 4 TB", "bytes of a file", "unknown type", "negative shape", "samples of text",
                       "step of text", "deep", "holes"}),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- reports


def make_run(folder: Path) -> None:
    """All that a report is made of; few steps."""
    fake_run(folder)
    for path in folder.glob("metrics/*.jsonl"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:6], *lines[-2:]]) + "\n")
    restart = {"time": 1.7e9, "kind": "restart", "reason": "killed", "workers": 2, "step": 3, "saved": 2, "in_a_row": 1,
               "delay_s": 0.5}  # fmt: skip
    pace = {"step": 5, "own_s": [0.1, 0.2], "wait_share": [0.0, 0.1]}
    epoch = {"epoch": 0, "clusters": 5, "largest": 4, "outliers": 3, "ari": 0.5, "nmi": 0.6, "identities": 7,
             "embed_s": 1.0, "cluster_s": 2.0}  # fmt: skip
    for name, line in (("restarts.jsonl", restart), ("ranks/pace.jsonl", pace), ("pseudo_labels/epochs.jsonl", epoch)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text((json.dumps(line) + "\n") * 3)
    (folder / "faults").mkdir(exist_ok=True)
    fault = {"step": 5, "action": "skipped", "what": "loss"}
    (folder / "faults" / "steps.jsonl").write_text((json.dumps(fault) + "\n") * 2)
    views = np.random.default_rng(0).integers(0, 255, (1, 2, 16, 8, 3)).astype(np.uint8)
    np.savez_compressed(folder / "faults" / "step_0000005_rank_00.npz", weight=np.ones(2), sample=np.arange(2),
                        position=np.arange(2), **{"views/global": views})  # fmt: skip
    row = {"weights": "a", "task": "zero-shot", "data": "market1501", "state": "complete", "mAP": 10.0, "rank1": 20.0,
           "rank5": 30.0, "rank10": 40.0, "mINP": 5.0, "feature": "cls", "remark": "", "why": "", "best_mAP": None,
           "notes": "", "published_mAP": 11.0, "published_rank1": 21.0, "comparable": True, "not_comparable": "",
           "published_method": "m", "published_source": "s", "series": "a", "epochs": 1.0, "step": 5}  # fmt: skip
    (folder / "table.json").write_text(json.dumps({"rows": [row, row | {"weights": "b", "step": 9, "epochs": 2.0}]}))


def look_report(folder: Path, out: Path) -> int:
    """A report is made of any run folder."""
    code = cli.run(main, ["report", str(folder)])
    if code != 0 or not (folder / "report.html").stat().st_size:
        raise AssertionError("there is no report of this run folder")
    return code


def in_run(name: str, data: Callable[[], bytes]) -> Make:
    """A run with other content of a file."""

    def make(folder: Path) -> None:
        make_run(folder)
        (folder / name).write_bytes(data())

    return make


def lines(*values: Any) -> Callable[[], bytes]:
    return lambda: "\n".join(json.dumps(value) for value in values).encode()


def large_array() -> bytes:
    """An .npz of a few kB whose array takes 1.5 GB."""
    sink = io.BytesIO()
    head = np.lib.format.magic(1, 0)
    text = str({"descr": "|u1", "fortran_order": False, "shape": (1, 2, 15_000, 16_000, 3)}).encode()
    text = text.ljust(128 - len(head) - 3) + b"\n"
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in (("weight", np.ones(2)), ("sample", np.arange(2)), ("position", np.arange(2))):
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)  # type: ignore[arg-type]
        with file.open("views/global.npy", "w", force_zip64=True) as member:
            member.write(head + struct.pack("<H", len(text)) + text)
            for _ in range(24):
                member.write(bytes(60_000_000))
    return sink.getvalue()


METRICS_FILE = "metrics/attempt_001.jsonl"
STRANGE: tuple[Any, ...] = (
    [], None, 7, "x", {"step": "a"}, {"step": None, "loss": 1}, {"step": 1, "loss": {}}, {"step": 2, "loss": 10**400},
    {"step": -3, "loss": [1]}, {"step": 2**70, "loss": 1}, {"step": 1.5, "loss": float("nan")},
    {"attempt": []}, {"checkpoint": 1}, {"checkpoint": 1, "save_stood_s": "x", "save_share": 0, "save_took_s": None},
    {"step": 9, "time": "x", "samples": "x", "epoch": None, "bottleneck": [], "bytes_fetched": {}},
)  # fmt: skip
METRICS = Reader(
    "metrics", make_run, ("metrics/*.jsonl", "evaluation/*/*/metrics.json", "table.json"), look_report, writes=True,
    hostile={
        "strange lines": in_run(METRICS_FILE, lines(*STRANGE)),
        "one strange line": in_run(METRICS_FILE, lines({"attempt": 1, "time": 5, "reason": []}, *STRANGE)),
        "no text": in_run(METRICS_FILE, lambda: bytes(range(256)) * 9),
        "deep": in_run(METRICS_FILE, lambda: b"[" * 100_000),
        "many lists": in_run(METRICS_FILE, lambda: b"[" + b"[]," * 20_000_000 + b"[]]"),
        "names": in_run(METRICS_FILE, lines({"step": 1, "loss_\x1b[31m<script>": 1.0, "$x^{": 2.0, "y" * 5_000: 3.0})),
        "score without features": in_run("evaluation/people/random/metrics.json", lambda: b'{"features": []}'),
        "score that is a list": in_run("evaluation/people/random/metrics.json", lambda: b"[1]"),
        "table of text": in_run("table.json", lambda: b'{"rows": "x"}'),
        "table of rows": in_run("table.json", lambda: b'{"rows": [1, {}, null]}'),
    },
)  # fmt: skip
RESTARTS = Reader(
    "restarts", make_run,
    ("restarts.jsonl", "ranks/pace.jsonl", "pseudo_labels/epochs.jsonl", "faults/*", "config.toml", "environment.json",
     "command.txt", "first_batch.jpg", "evaluation/*/*/*.jpg"),
    look_report, writes=True,
    hostile={
        "strange lines": in_run("restarts.jsonl", lines(*STRANGE, {"time": 1e300, "kind": 1, "reason": None})),
        "strange pace": in_run("ranks/pace.jsonl", lines(*STRANGE, {"own_s": 3}, {"own_s": ["x"], "wait_share": []})),
        "strange epochs": in_run("pseudo_labels/epochs.jsonl", lines(*STRANGE, {"epoch": "x"}, {"epoch": []})),
        "strange faults": in_run("faults/steps.jsonl", lines(*STRANGE, {"step": {}, "action": 1, "what": []})),
        "environment of lists": in_run("environment.json", lambda: b'[{"manifest": []}]'),
        "environment of text": in_run("environment.json", lambda: b'{"manifest": {"rows": "x", "notes": 5}}'),
        "recipe that is none": in_run("config.toml", lambda: b'method = 3\nbackbone = "x"\nstream = []\nseed = []'),
        "recipe of bytes": in_run("config.toml", lambda: bytes(range(256))),
        "arrays of 1.5 GB": in_run("faults/step_0000005_rank_00.npz", large_array),
        "picture of 4e9 pixels": in_run("first_batch.jpg", lambda: b"\xff\xd8\xff" + bytes(2_000_000)),
    },
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- weights


def small_state(blocks: int = 2, width: int = 24) -> dict[str, torch.Tensor]:
    """A bare ViT, as a repository would save it."""
    config = BackboneConfig(arch="custom", size=(256, 128), patch=16, width=width, depth=blocks, heads=2)
    return dict(VisionTransformer(config).state_dict())


def make_weights(folder: Path) -> None:
    torch.save({"model": small_state()}, folder / "x.pth")


def make_old_weights(folder: Path) -> None:
    torch.save({"model": small_state()}, folder / "x.pth", _use_new_zipfile_serialization=False)


def make_safetensors(folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(safetensors.torch.save(small_state()))


def look_weights(folder: Path, out: Path) -> int:
    path = next(folder.iterdir())
    return cli.run(main, ["import", str(path), "--out", str(out / "export"), "--heads", "2"])


def weights_of(content: Callable[[], Any]) -> Make:
    return lambda folder: torch.save(content(), folder / "x.pth")


def with_tensor(name: str, value: Callable[[], torch.Tensor]) -> Make:
    return weights_of(lambda: small_state() | {name: value()})


def repacked(folder: Path) -> None:
    """Tensors of zeros, packed a thousand times smaller."""
    make_weights(folder)
    with zipfile.ZipFile(folder / "x.pth") as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    large = next(name for name in members if name.endswith("data/0"))
    with zipfile.ZipFile(folder / "x.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name, data in members.items():
            new.writestr(name, bytes(1_200_000_000) if name == large else data)


def many_views() -> dict[str, torch.Tensor]:
    base = torch.zeros(5_000_000)
    return small_state() | {f"blocks.0.x{number}": base[:] for number in range(2_000)}


def old_claims(folder: Path) -> None:
    """A file of before torch 1.6 whose storage is said to have 10^11 numbers."""
    make_old_weights(folder)
    data = (folder / "x.pth").read_bytes()
    place = data.index(b"storage")
    (folder / "x.pth").write_bytes(data[:place] + data[place:].replace(b"K\x18", b"\x8a\x05\0\xe8\x76\x48\x17", 3))


PTH = Reader(
    "pth", make_weights, ("x.pth",), look_weights,
    hostile={
        "expanded": with_tensor("blocks.0.norm1.weight", lambda: torch.zeros(1).expand(10**6, 10**6)),
        "many views": weights_of(many_views),
        "meta": with_tensor("blocks.0.norm1.weight", lambda: torch.empty(10**6, 10**6, device="meta")),
        "sparse": with_tensor("blocks.0.norm1.weight", lambda: torch.sparse_coo_tensor(
            torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**6))),
        "complex": with_tensor("blocks.0.norm1.weight", lambda: torch.zeros(24, dtype=torch.complex64)),
        "whole numbers": with_tensor("blocks.0.norm1.weight", lambda: torch.zeros(24, dtype=torch.int8)),
        "depth": with_tensor("blocks.99999999999.mlp.fc1.weight", lambda: torch.zeros(1)),
        "depth of digits": with_tensor(f"blocks.{'9' * 5_000}.mlp.fc1.weight", lambda: torch.zeros(1)),
        "parts": weights_of(lambda: small_state() | {f"part_token{number}": torch.zeros(1, 1, 24)
                                                     for number in range(1, 20_000)}),
        "no numbers": with_tensor("pos_embed", lambda: torch.zeros(1, 0, 24)),
        "flat": with_tensor("patch_embed.proj.weight", lambda: torch.zeros(24, 3, 16, 0)),
        "width of nothing": with_tensor("cls_token", lambda: torch.zeros(1, 1, 0)),
        "in itself": weights_of(lambda: [loop := dict(small_state()), loop.update(model=loop)][0]),
        "packed": repacked,
        "old, of 10^11 numbers": old_claims,
        "names": weights_of(lambda: {"\x1b[31m\x07": torch.zeros(1), "a\nerror: x": torch.zeros(1)}),
        "memo": written("x.pth", b"\x80\x02]r" + (2**31 - 9).to_bytes(4, "little") + b"."),
        "long": written("x.pth", pickle.dumps([None] * 1_000_000, 2)),
    },
    refused=frozenset({"expanded", "many views", "meta", "sparse", "depth", "depth of digits", "no numbers", "flat",
                       "width of nothing", "packed", "names", "memo", "long"}),
)  # fmt: skip
OLD_PTH = Reader("old_pth", make_old_weights, ("x.pth",), look_weights)
SAFETENSORS = Reader("safetensors", make_safetensors, ("x.safetensors",), look_weights)


# ------------------------------------------------------------------------------------------------------------ features


def make_features(folder: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    column = pyarrow.FixedSizeListArray.from_arrays(values.reshape(-1), 6)
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a", "b", "c", "d"], "feature": column}), folder / "x.parquet")


def look_features(folder: Path, out: Path) -> int:
    names = ["a", "b", "c", "d"]
    return called(lambda: read_features(str(folder / "x.parquet"), STORAGE, keys=names, names=names))


def long_feature(folder: Path) -> None:
    zeros = pyarrow.array(np.zeros(150_000_000))
    column = pyarrow.FixedSizeListArray.from_arrays(zeros, len(zeros))
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a"], "feature": column}), folder / "x.parquet",
                                compression="zstd")  # fmt: skip


FEATURES = Reader("features", make_features, ("x.parquet",), look_features, hostile={"long": long_feature},
                  refused=frozenset({"long"}))  # fmt: skip

ALL = (TOML, CARD, MARKER, METRICS, RESTARTS, PTH, OLD_PTH, SAFETENSORS, FEATURES)
