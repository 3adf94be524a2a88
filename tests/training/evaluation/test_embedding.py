"""Features of a data set in a parquet file, read by pyarrow alone, and scored as the weights are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from datapipe.core.config import SelectConfig, ShardConfig, StorageConfig
from datapipe.core.errors import ConfigError, DataError, UsageError
from datapipe.dataset.manifest import Manifest
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.select import select
from datapipe.storage import open_store
from tests.conftest import S3Server
from tests.training.reid.people import market
from training.__main__ import main
from training.evaluation import embedding, image_pieces
from training.evaluation.feature_file import METADATA
from training.nn.identity.necks import NeckedBackbone, TokenNecks
from training.nn.vision_transformer import BackboneConfig
from training.reid.datasets.open_dataset import open_reid
from training.reid.embed import embed
from training.weights.export import Provenance, export, load_backbone, unfilled

STORAGE = StorageConfig()
PARTS = 3


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An export of a tiny ViT with part tokens."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BackboneConfig(arch="custom", size=(32, 16), patch=8, width=16, depth=1, heads=2)
        backbone = unfilled(config, PARTS)
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    export(backbone, open_store(str(folder)), Provenance(method="pass", step=7, samples=70))
    return str(folder)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return market(tmp_path_factory.mktemp("data") / "people")


@pytest.fixture(scope="module")
def sharded(people: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same people in shards of twenty crops."""
    out = str(tmp_path_factory.mktemp("data") / "shards")
    config = ShardConfig(samples_per_shard=20, workers=1)
    return ingest([str(people)], out, config, STORAGE).manifest.url


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_pieces, "PIECE_IMAGES", 8)


def made(weights: str, data: object, out: object, *flags: str) -> pyarrow.Table:
    """The file that the command makes, as another program reads it."""
    assert main(["embed", weights, "--data", str(data), "--out", str(out), *flags]) == 0
    return pyarrow.parquet.read_table(str(out))


def matrix(table: pyarrow.Table) -> np.ndarray:
    """[N, C] of the column `feature`."""
    column = table["feature"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), -1)


def header(table: pyarrow.Table) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(table.schema.metadata[METADATA])
    return said


def test_embed__is_what_embed_gives_in_memory_bit_for_bit(
    weights_folder: str, people: Path, tmp_path: Path, small_pieces: None
) -> None:
    table = made(weights_folder, people, tmp_path / "F.parquet", "--feature", "cls+parts", "--embed-batch", "4")
    reid, backbone = open_reid(str(people), STORAGE), load_backbone(weights_folder)
    config = embedding.EmbedConfig(batch=4)
    expected = [embed(backbone, part.paths.tolist(), reid.read, size=(32, 16), config=config)["cls+parts"]
                for part in reid.parts.values()]  # fmt: skip
    assert np.array_equal(matrix(table), np.concatenate(expected))
    assert table.schema.field("feature").type == pyarrow.list_(
        pyarrow.field("element", pyarrow.float32(), nullable=False), 32
    )
    for column, values in {
        "name": [part.paths for part in reid.parts.values()],
        "pid": [part.pids for part in reid.parts.values()],
        "camera": [part.cameras + 1 for part in reid.parts.values()],
        "part": [[name] * len(part) for name, part in reid.parts.items()],
    }.items():
        assert table[column].to_pylist() == np.concatenate(values).tolist(), column
    assert table["key"] == table["name"]
    assert pyarrow.parquet.ParquetFile(tmp_path / "F.parquet").num_row_groups == 11  # 18, 37 and 18 images by eights
    assert [path.name for path in tmp_path.iterdir()] == ["F.parquet"]


def test_embed__the_file_says_what_its_features_are_of(weights_folder: str, people: Path, tmp_path: Path) -> None:
    said = header(made(weights_folder, people, tmp_path / "F.parquet", "--feature", "each_part"))
    assert (said["feature"], said["channels"], said["dtype"], said["normalised"]) == ("each_part", 48, "float32", False)
    assert said["size"] == [32, 16] and said["interpolation"] == "bilinear" and said["mean"] == [0.485, 0.456, 0.406]
    origin = said["weights"]
    assert (origin["family"], origin["step"], origin["parts"], len(origin["sha256"])) == ("pass", 7, PARTS, 64)
    assert said["data"]["name"] == "people" and said["data"]["counts"]["query"]["images"] == 18


@pytest.mark.parametrize(("feature", "channels"), [("", 16), ("neck", 16), ("cls", 16), ("cls+parts", 32)])
def test_embed__weights_with_necks_have_the_features_behind_and_before_them(
    weights_folder: str, people: Path, tmp_path: Path, feature: str, channels: int
) -> None:
    necks = TokenNecks(16, PARTS, fusion="mean", neck="each", group=0).eval()
    backbone, folder = load_backbone(weights_folder), str(tmp_path / "weights")
    export(backbone, open_store(folder), Provenance(method="cluster_contrast"), necks)
    table = made(folder, people, tmp_path / "F.parquet", "--feature", feature)
    assert (header(table)["feature"], header(table)["channels"]) == (feature or "neck", channels)
    reid = open_reid(str(people), STORAGE)
    expected = [embed(NeckedBackbone(backbone, necks), part.paths.tolist(), reid.read, size=(32, 16))
                for part in reid.parts.values()]  # fmt: skip
    assert np.array_equal(matrix(table), np.concatenate([one[feature or "neck"] for one in expected]))
    with pytest.raises(ConfigError, match="no feature mean") as caught:
        made(folder, people, tmp_path / "M.parquet", "--feature", "mean")
    assert caught.value.hint == "they have neck, cls, cls+parts"


def test_embed__half_precision_is_the_nearest_float16(weights_folder: str, people: Path, tmp_path: Path) -> None:
    whole = made(weights_folder, people, tmp_path / "F.parquet", "--feature", "cls")
    half = made(weights_folder, people, tmp_path / "H.parquet", "--feature", "cls", "--dtype", "float16")
    assert half.schema.field("feature").type.value_type == pyarrow.float16()
    assert np.array_equal(matrix(half), matrix(whole).astype(np.float16))


def test_embed__shards_give_a_row_for_each_crop_in_their_order(
    weights_folder: str, people: Path, sharded: str, tmp_path: Path, small_pieces: None
) -> None:
    table = made(weights_folder, sharded, tmp_path / "F.parquet", "--feature", "cls", "--embed-batch", "4")
    index = Manifest.load(sharded).table(["key", "name", "pid", "camera"])
    assert table.select(index.column_names).equals(index.cast(table.select(index.column_names).schema))
    assert header(table)["data"]["manifest"] == Manifest.load(sharded).id
    loose = made(weights_folder, people, tmp_path / "L.parquet", "--feature", "cls")
    expected = dict(zip(loose["name"].to_pylist(), matrix(loose), strict=True))
    part = dict(zip(loose["name"].to_pylist(), loose["part"].to_pylist(), strict=True))
    for name, feature, own in zip(table["name"].to_pylist(), matrix(table), table["part"].to_pylist(), strict=True):
        if name in expected:  # junk is in the shards alone
            assert np.abs(feature - expected[name]).max() < 1e-5 and own == part[name]


def test_embed__of_a_selection_is_of_its_crops(weights_folder: str, sharded: str, tmp_path: Path) -> None:
    folder = str(shutil.copytree(sharded, tmp_path / "set"))
    chosen = select(folder, SelectConfig(where="camera == 2"), STORAGE).manifest
    table = made(weights_folder, f"{folder}/{chosen.file}", tmp_path / "F.parquet")
    assert len(table) == chosen.rows and set(table["camera"].to_pylist()) == {2}


def test_embed__interrupted_leaves_no_file_and_goes_on(
    weights_folder: str, people: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work, done = tmp_path / "F.parquet", embedding.embed_piece, []

    def interrupted(task: Any, device: Any) -> int:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(task.piece.number)
        return work(task, device)

    flags = ("--embed-batch", "4")
    with monkeypatch.context() as patch:
        patch.setattr("training.commands.embed.embed_piece", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(weights_folder, people, out, *flags)
    (pieces,) = tmp_path.iterdir()
    assert pieces.name.startswith("F.parquet.pieces-") and len(list(pieces.iterdir())) == 4
    again: list[int] = []
    monkeypatch.setattr("training.commands.embed.embed_piece",
                        lambda task, device: again.append(task.piece.number) or work(task, device))  # fmt: skip
    table = made(weights_folder, people, out, *flags)
    assert len(again) == 7 and not {*again} & {*done}
    assert table.equals(made(weights_folder, people, tmp_path / "G.parquet", *flags))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["F.parquet", "G.parquet"]


def test_embed__killed_while_the_file_is_put_together(
    weights_folder: str, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "F.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("training.evaluation.feature_file._publish", full)
        with pytest.raises(OSError, match="No space"):
            made(weights_folder, people, out)
    assert not out.exists() and len(made(weights_folder, people, out)) == 73


def test_embed__another_file_is_not_overwritten(
    weights_folder: str, people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "F.parquet"
    made(weights_folder, people, out)
    written = out.stat().st_mtime_ns
    made(weights_folder, people, out)
    assert "already complete" in capsys.readouterr().out and out.stat().st_mtime_ns == written
    with pytest.raises(DataError, match="another file is already there"):
        made(weights_folder, people, out, "--dtype", "float16")
    with pytest.raises(ConfigError, match="these weights have no feature histogram"):
        made(weights_folder, people, tmp_path / "G.parquet", "--feature", "histogram")


@pytest.mark.slow
def test_embed__on_object_storage(weights_folder: str, sharded: str, tmp_path: Path, s3: S3Server) -> None:
    bucket = s3.bucket()
    for path in Path(sharded).rglob("*.*"):
        s3.client.upload_file(str(path), bucket, f"set/{path.relative_to(sharded)}")
    words = ["embed", weights_folder, "--data", f"s3://{bucket}/set", "--out", f"s3://{bucket}/out/F.parquet",
             "--storage.endpoint-url", s3.endpoint]  # fmt: skip
    assert main(words) == 0
    objects = s3.objects(bucket)
    assert [name for name in objects if name.startswith("out/")] == ["out/F.parquet"]
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(objects["out/F.parquet"]))
    local = made(weights_folder, sharded, tmp_path / "F.parquet")
    assert table.equals(local)


# -------------------------------------------------------------------------------------------------- scores of a file


def scored(file: object, data: object, out: Path, *flags: str) -> dict[str, Any]:
    assert main(["evaluate", "--features", str(file), "--data", str(data), "--out", str(out), *flags]) == 0
    found: dict[str, Any] = json.loads(next(out.rglob("metrics.json")).read_text())
    return found


@pytest.fixture(scope="module")
def features(weights_folder: str, people: Path, tmp_path_factory: pytest.TempPathFactory) -> pyarrow.Table:
    """Of all images."""
    return made(weights_folder, people, tmp_path_factory.mktemp("features") / "F.parquet")


Write = Callable[[pyarrow.Table], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(table: pyarrow.Table) -> Path:
        path = tmp_path / "theirs.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=10)
        return path

    return write


def plain(table: pyarrow.Table, **columns: object) -> pyarrow.Table:
    """As somebody else may write it: names, lists of any length, no metadata."""
    rows = {"name": table["name"].to_pylist(), "feature": matrix(table).astype(np.float64).tolist()}
    return pyarrow.table({**rows, **columns})


def test_evaluate__scores_of_the_file_are_those_of_the_weights(
    weights_folder: str, people: Path, sharded: str, features: pyarrow.Table, write: Write, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["evaluate", weights_folder, "--data", str(people), "--out", str(tmp_path / "weights")]) == 0
    expected = json.loads(next((tmp_path / "weights").rglob("metrics.json")).read_text())
    ours = scored(write(features), people, tmp_path / "ours", "--rerank")
    assert ours["features"]["cls+parts"] == expected["features"]["cls+parts"]
    assert "cls+parts re-ranked" in ours["features"] and ours["settings"]["model"] == expected["settings"]["model"]
    for key in ("weights", "step", "queries", "gallery", "skipped", "per_camera", "distances", "ranked", "data"):
        assert ours[key] == expected[key], key
    names = {path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*.*")}
    assert names == {path.relative_to(tmp_path / "weights") for path in (tmp_path / "weights").rglob("*.*")}
    assert "18 rows of other images, not looked at" in capsys.readouterr().out
    in_shards = scored(tmp_path / "theirs.parquet", sharded, tmp_path / "shards")  # by names: their keys are others
    assert in_shards["features"] == {"cls+parts": expected["features"]["cls+parts"]}


def test_evaluate__features_of_shards_are_found_by_key_and_by_name(
    weights_folder: str, people: Path, sharded: str, tmp_path: Path
) -> None:
    made(weights_folder, sharded, tmp_path / "S.parquet")
    by_key = scored(tmp_path / "S.parquet", sharded, tmp_path / "a")
    by_name = scored(tmp_path / "S.parquet", people, tmp_path / "b")
    assert by_key["features"] == by_name["features"] and by_key["settings"]["rows"] == 74


def test_evaluate__features_of_others_need_names_and_numbers_alone(
    people: Path, features: pyarrow.Table, write: Write, tmp_path: Path
) -> None:
    order = np.random.default_rng(0).permutation(len(features))
    names = [Path(name).stem for name in features["name"].to_pylist()]
    theirs = scored(write(plain(features, name=names).take(order)), people, tmp_path / "theirs")
    ours = scored(write(features), people, tmp_path / "ours")
    assert theirs["weights"] == "theirs" and list(theirs["features"]) == ["feature"]
    assert theirs["features"]["feature"] == pytest.approx(ours["features"]["cls+parts"])
    assert "model" not in theirs["settings"] and (tmp_path / "theirs" / "report.html").is_file()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.slice(2), r"2 of the 55 images have no row: query/0001_c1s1_000000_00.jpg, query/0001_c2s1_0000"),
        (lambda t: pyarrow.concat_tables([t, t.slice(3, 1)]), "1 of the 55 images have several rows: query/0002_c1s1"),
        (lambda t: changed(t, 5, [1.0] * 31), "1 of the 55 features have not 32 numbers as the others have: query"),
        (lambda t: changed(t, 6, None), "1 of the 55 features have not 32 numbers"),
        (lambda t: changed(t, 7, [float("nan")] * 32), "1 of the 55 features are not finite: query/0003_c2s1"),
        (lambda t: changed(t, 8, [None] * 32), "1 of the 55 features are not finite: query/0003_c3s1"),
        (lambda t: t.rename_columns(["file", "feature"]), "the file has the columns file, feature"),
        (lambda t: t.set_column(1, "feature", t["name"]), "the column `feature` is of type string"),
    ],
    ids=["missing", "twice", "short", "null", "nan", "null numbers", "no name", "no list"],
)  # fmt: skip
def test_evaluate__features_that_are_of_no_use_are_refused(
    people: Path, features: pyarrow.Table, write: Write, tmp_path: Path, spoil: Callable[..., pyarrow.Table], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        scored(write(spoil(plain(features))), people, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def changed(table: pyarrow.Table, row: int, feature: list[float | None] | None) -> pyarrow.Table:
    rows = table["feature"].to_pylist()
    return table.set_column(1, "feature", pyarrow.array([*rows[:row], feature, *rows[row + 1 :]]))


def test_evaluate__what_is_no_parquet_file_and_half_a_command(people: Path, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(DataError, match="this is no parquet file"):
        scored(tmp_path / "x.parquet", people, tmp_path / "scores")
    with pytest.raises(ConfigError, match="scores of a file need a folder"):
        main(["evaluate", "--features", str(tmp_path / "x.parquet"), "--data", str(people)])
    with pytest.raises(UsageError, match="neither weights nor features"):
        main(["evaluate", "--data", str(people)])
    with pytest.raises(UsageError, match="in place of weights"):
        main(["evaluate", "runs/x", "--features", "x.parquet", "--data", str(people)])
