"""Published scores: every row has a name, is refused or carried out, and its verdict follows the tolerance."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from datapipe.core.errors import ConfigError, DataError
from tests.training.reid.people import market
from tests.training.weights import published_files as files
from training.__main__ import main
from training.commands.reproduce import Agreement, Reproduction, agreements, read_row
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.recipes import SHIPPED
from training.reid.datasets.benchmarks import PUBLISHED
from training.reid.literature import BY_NAME, ROWS, TASKS, LiteratureRow

SIZE = (64, 32)
PEOPLE = 6
RECIPE = """
[views]
statistics = "half"
[method]
name = "supervised"
instances = 2
pad = 2
[optimisation]
optimizer = "sgd"
schedule = "epoch"
epochs = 2.0
batch = 8
micro_batch = 8
lr = 1e-3
warmup_epochs = 0.0
clip = "none"
precision = "fp32"
[engine]
stepper = "plain"
device = "cpu"
threads = 1
"""
CLUSTERS = (
    RECIPE.replace('"supervised"', '"cluster_contrast"')
    .replace("pad = 2", "pad = 2\niterations = 2\nnorm_group = 4\n[method.clustering]\nk1 = 4\nk2 = 1\nmin_samples = 1")
    .replace('"epoch"', '"staircase"')
)
"""The same without labels."""


def weights(folder: Path, *, identities: int = 0, parts: int = 0, fusion: str = "cat") -> str:
    """A stand-in file in the layouts that are published: a backbone alone, or fine-tuned on so many identities."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        backbone = VisionTransformer(BackboneConfig(arch="vit_tiny", size=SIZE), parts=parts)
    state = backbone.state_dict()
    if identities:
        state = files.fine_tuned(state, necks=1 + parts)
        state["classifier.weight"] = torch.ones(identities, 192 * (2 if parts and fusion == "cat" else 1))
    return files.save(state, folder / "weights.pth")


def own_row(path: Path, **changes: object) -> str:
    """A row of one's own as a TOML file."""
    keys = {"name": "ours", "method": "stand-in", "data": "own", "mAP": 50.0, "source": "a test", "arch": "vit_tiny",
            "size": list(SIZE), "tolerance": 0.5} | changes  # fmt: skip
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    return str(path)


def result(out: Path) -> dict[str, dict[str, float]]:
    found = json.loads((out / "reproduction.json").read_text())
    return found["agreements"]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(market(tmp_path_factory.mktemp("data") / "people", identities=PEOPLE))


def test_rows__are_named_once_and_know_data_task_and_recipe() -> None:
    assert len(BY_NAME) == len(ROWS)
    assert Counter(row.task for row in ROWS) == {"supervised": 42, "uda": 6, "usl": 6}
    recipes = {path.stem for path in SHIPPED.glob("*.toml")}
    for row in ROWS:
        assert row.data in PUBLISHED and row.source, row.name
        assert row.recipe in recipes, row.name
        assert row.rank1 is None or row.rank1 > row.mAP, row.name
        assert row.again is None or max(abs(row.again[0] - row.mAP), abs(row.again[1] - row.rank1)) <= row.tolerance


@pytest.mark.parametrize(("model", "parts", "published"), [
    ("transreid-ssl", 0, "88.2/94.2 40.9/66.4 89.4/95.4 47.4/70.8 88.4/94.6 40.9/66.4 89.2/95.3 47.7/71.2"),
    ("transreid-ssl-ics", 0, "89.6/95.3 50.6/75.0 89.9/95.5 57.8/79.5 89.5/95.3 50.6/75.0 89.9/95.4 57.8/79.4"),
    ("pass", 3, "88.5/95.0 41.0/67.0 90.2/95.8 49.1/72.7 88.7/95.0"),
])  # fmt: skip
def test_rows__without_labels_are_those_of_the_tables_and_have_recipes_of_their_own(
    model: str, parts: int, published: str
) -> None:
    """Tables of TransReID-SSL's README ("Paper", then "Reproduce") and PASS's, written down a second time; PASS on
    Market-1501 as the abstract of its paper has it, then as its README does."""
    ways = {"usl-market1501": "market", "usl-msmt17": "msmt17", "uda-msmt17-to-market1501": "market",
            "uda-market1501-to-msmt17": "msmt17"}  # fmt: skip
    rows = {way: BY_NAME[f"{model}-vits-{way}"] for way in ways}
    found = [f"{row.mAP}/{row.rank1}" for row in rows.values()]
    found += ["{}/{}".format(*row.again) for row in rows.values() if row.again]
    assert " ".join(found) == published
    for way, row in rows.items():
        script = f"{way[:3]}_pass" if parts else "usl"
        assert row.parts == parts and row.recipe == f"{script}_{ways[way]}" and way.startswith(row.task)
        assert (SHIPPED / f"{row.recipe}.toml").is_file()
    if model == "pass":
        row = rows["usl-market1501"]
        assert "abstract" in row.source and "PASS README" in row.source and "88.7" in row.remark


def test_rows__agree_with_what_the_recipes_expect() -> None:
    """The comments above the recipes and the table were written down separately."""
    expected = (SHIPPED / "supervised_pass.toml").read_text().replace("\n#", "").replace("            ", " ")
    for row in ROWS:
        if row.method == "PASS" and row.task == "supervised" and row.data in ("market1501", "msmt17"):
            assert f"{row.mAP} / {row.rank1}" in " ".join(expected.split()), row.name


def test_list__has_every_row_and_says_what_is_not_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {row.name for row in ROWS} < lines.keys()
    for row in ROWS:
        assert ("NOT HERE" in lines[row.name]) == (row.arch == "swin_base")
    assert "88.7/95.0" in lines["pass-vits-usl-market1501"] and "abstract" in lines["pass-vits-usl-market1501"]
    assert "92.2    96.3" in lines["pass-vits-market1501"] and "91.2/95.8" in lines["transreid-ssl-vits-market1501"]


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.impossible])
def test_reproduce__refuses_what_is_not_built_before_it_looks(name: str) -> None:
    with pytest.raises(ConfigError, match="Swin"):
        main(["reproduce", name, "--weights", "nowhere.pth", "--data", "nowhere"])


def test_reproduce__names_the_nearest_row_and_what_is_not_given() -> None:
    with pytest.raises(ConfigError, match="did you mean pass-vits-market1501"):
        main(["reproduce", "pass-vits-market", "--weights", "x", "--data", "y"])
    with pytest.raises(ConfigError, match="not given: weights, data"):
        main(["reproduce", "pass-vits-market1501"])


def test_read_row__all_mistakes_at_once(tmp_path: Path) -> None:
    path = own_row(tmp_path / "row.toml", mAP=120.0, metod="x")
    with pytest.raises(ConfigError, match=r"metod(.|\n)*mAP: |mAP: (.|\n)*metod"):
        read_row(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_row(str(tmp_path / "none.toml"))


def row(**changes: object) -> LiteratureRow:
    return LiteratureRow(**{"name": "x", "method": "y", "data": "own", "mAP": 60.0, "source": "z", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("ours", "within"), [(60.0, True), (60.5, True), (59.5, True), (61.0, False), (59.0, False)])
def test_agreement__by_the_tolerance_in_both_directions(ours: float, within: bool) -> None:
    assert Agreement("mAP", ours, 60.0, 0.5).within == within


def test_agreements__of_every_score_that_is_published_and_of_the_ranking_that_is_meant() -> None:
    scores = {"headline": "cls", "features": {"cls": {"mAP": 0.6, "rank1": 0.7}, "cls re-ranked": {"mAP": 0.8}}}
    assert [one.metric for one in agreements(row(), scores)] == ["mAP"]
    both = agreements(row(rank1=75.0), scores)
    assert [one.within for one in both] == [True, False] and not Reproduction(row(), scores, both).within
    assert agreements(row(reranking=True), scores)[0].ours == 80.0


@pytest.mark.slow
@pytest.mark.parametrize("parts", [0, 3])
def test_reproduce__fine_tuned_weights_within_and_shifted_by_twice_the_tolerance(
    people: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], parts: int
) -> None:
    file, out = weights(tmp_path, identities=PEOPLE, parts=parts), tmp_path / "out"
    words = ["--weights", file, "--data", people, "--out", str(out)]
    main(["reproduce", own_row(tmp_path / "first.toml", parts=parts, tolerance=100.0), *words])
    ours = result(out)["mAP"]["ours"]
    assert 10 < ours < 100
    for shift, code in ((0.0, 0), (1.0, 1), (-1.0, 1)):
        path = own_row(tmp_path / "row.toml", parts=parts, mAP=ours + shift)
        assert main(["reproduce", path, *words]) == code, shift
        assert result(out)["mAP"] == {"metric": "mAP", "ours": ours, "published": ours + shift, "tolerance": 0.5,
                                      "difference": pytest.approx(-shift), "within": code == 0}  # fmt: skip
    said = capsys.readouterr().out
    assert "ours: reproduced" in said and "ours: NOT reproduced" in said and "OUTSIDE" in said
    assert "Beside published scores" in (out / "report.html").read_text()
    scored = json.loads((out / "reproduction.json").read_text())["scores"]
    assert scored["headline"] == ("cls+parts" if parts else "cls") and scored["settings"]["mean"] == [0.5] * 3
    assert scored["settings"]["model"]["task"] == "supervised" and scored["data"]["counts"]["query"]["images"] == 18


@pytest.mark.slow
def test_reproduce__weights_that_are_not_fine_tuned_are_fine_tuned_first(people: str, tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text(RECIPE)
    file, out = weights(tmp_path), tmp_path / "out"
    changes = {"recipe": "short.toml", "flags": ["--optimisation.epochs", "1"], "tolerance": 100.0}
    words = ["--weights", file, "--data", people, "--out", str(out)]
    assert main(["reproduce", own_row(tmp_path / "row.toml", **changes), *words]) == 0
    ours = result(out)["mAP"]["ours"]
    changes["tolerance"] = 0.5
    assert main(["reproduce", own_row(tmp_path / "row.toml", mAP=ours, **changes), *words]) == 0  # nothing to train
    assert main(["reproduce", own_row(tmp_path / "row.toml", mAP=ours - 1, **changes), *words]) == 1
    scored = json.loads((out / "reproduction.json").read_text())["scores"]
    assert scored["step"] > 0 and scored["settings"]["model"]["task"] == "supervised"


@pytest.mark.slow
def test_reproduce__adaptation_begins_on_the_source(people: str, tmp_path: Path) -> None:
    """Weights of pre-training are fine-tuned on the source first; those that were are adapted at once."""
    (tmp_path / "short.toml").write_text(RECIPE)
    (tmp_path / "usl.toml").write_text(CLUSTERS)
    changes = {"recipe": "usl.toml", "origin_recipe": "short.toml", "tolerance": 100.0, "task": "uda", "origin": "own"}
    path, source = own_row(tmp_path / "row.toml", **changes), str(market(tmp_path / "source", identities=PEOPLE))
    words = ["--data", people, "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="begins with weights fine-tuned on own, and these are not"):
        main(["reproduce", path, "--weights", weights(tmp_path), *words])
    assert main(["reproduce", path, "--weights", weights(tmp_path), *words, "--source", source]) == 0
    model = json.loads((tmp_path / "out" / "reproduction.json").read_text())["scores"]["settings"]["model"]
    assert (model["task"], model["source"]) == ("uda", "source")
    tuned = str(tmp_path / "out" / "source" / "exports" / "last")
    assert main(["reproduce", path, "--weights", tuned, "--data", people, "--out", str(tmp_path / "again")]) == 0
    scores = [result(tmp_path / out)["mAP"]["ours"] for out in ("out", "again")]
    assert scores[0] == scores[1] and not (tmp_path / "again" / "source").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": "vit_small"}, "they are vit_tiny, the row is vit_small"),
        ({"parts": 3}, "the row is vit_tiny with 3 part tokens"),
        ({"size": [128, 64]}, "images of 64 x 32, the row of 128 x 64"),
        ({"task": "zero-shot"}, "they are fine-tuned, the row is of features as pre-training leaves them"),
    ],
)
def test_reproduce__refuses_weights_of_another_row(
    people: str, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    file = weights(tmp_path, identities=PEOPLE)
    words = ["--weights", file, "--data", people, "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match=said):
        main(["reproduce", own_row(tmp_path / "row.toml", **changes), *words])


@pytest.mark.slow
def test_reproduce__refuses_weights_of_another_fusion(people: str, tmp_path: Path) -> None:
    file = weights(tmp_path, identities=PEOPLE, parts=3, fusion="mean")
    words = ["--weights", file, "--data", people, "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match="together by 'mean', the row's by 'cat'"):
        main(["reproduce", own_row(tmp_path / "row.toml", parts=3, fusion="cat"), *words])


def test_reproduce__refuses_weights_and_data_of_another_data_set(people: str, tmp_path: Path) -> None:
    words = ["--weights", weights(tmp_path, identities=751), "--data", people, "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match="fine-tuned on 751 identities, own has 6 to train on"):
        main(["reproduce", own_row(tmp_path / "row.toml"), *words])
    with pytest.raises(DataError, match="this is not Market-1501 as it was published: query has 18 of 3,368 images"):
        main(["reproduce", "pass-vits-market1501", *words])


def test_tasks__are_explained() -> None:
    assert {row.task for row in ROWS} | {"zero-shot"} == TASKS.keys()
