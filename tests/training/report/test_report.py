"""The report: self-contained, small, true to the last record of every step, and content with missing files."""

import html.parser
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError
from datapipe.maintain.derived_copies import clear, look
from datapipe.storage import open_store
from tests.conftest import S3Server
from tests.training.report.fake_run import ATTEMPTS, MODEL, fake_run, picture, record, write_metrics, write_scores
from training.core.run_folder.run_folder import RunFolder
from training.reid.literature import BY_NAME
from training.reid.ranked_lists import to_jpeg
from training.report import html_page
from training.report.report import write_report
from training.report.run_files import RunFiles
from training.report.section_faults import MOST_IMAGES, MOST_SHEETS
from training.report.section_published import alike, not_comparable
from training.report.svg_plots import MOST_POINTS, Curve, Plot, thinned, to_svg
from training.trainer.monitoring import collapse


class Page(html.parser.HTMLParser):
    """What a browser would load, which elements stay open, and the text."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        addresses = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.loads += [value or "" for name, value in attrs if name in addresses]
        self.loads += [found for name, value in attrs for found in re.findall(r"url\(([^)]*)\)", value or "")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.loads += re.findall(r"url\(([^)]*)\)|@import", data)
        self.text.append(data)


def files_of(root: Path) -> RunFiles:
    return RunFiles(RunFolder(str(root), StorageConfig()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def report(run: Path) -> str:
    where = write_report(str(run))
    assert where == str(run / "report.html")
    return Path(where).read_text()


@pytest.mark.slow
def test_report__loads_nothing_from_anywhere(report: str) -> None:
    page = Page(report)
    assert page.loads and all(address.startswith(("data:image/", "#")) for address in page.loads)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in report and "url(http" not in report
    assert report.count("http") == report.count("http://10.0.0.5:9000")  # the recipe's own text, nothing else


def test_report__is_well_formed_and_small(report: str) -> None:
    page = Page(report)
    assert page.open == []
    assert len(report.encode()) < 20e6
    assert page.tags.count("img") == 5 and page.tags.count("svg") >= 9
    assert "data:image/jpeg;base64," in report


def test_report__says_what_was_run_and_what_it_is_worth(report: str) -> None:
    text = " ".join("".join(Page(report).text).split())
    for expected in (
        "mAP 38.0 % on people after 350 steps, 22,400 images: 8.4 × random weights (4.5 %); "
        "1.8 × colour histogram (20.9 %).",
        "python -m cluster pretrain training/recipes/demo.toml --seed 3",
        "pass",
        "128 × 64 pixels",
        "demo/shards",
        "9f3c11",
        "240 queries · 960 gallery images · 2 queries without a match, left out",
        "worker 1 died (SIGKILL)",
        "1 unfinished line of metrics",
        "in 90.0 % of the steps: training, the steps themselves: data kept up with them. "
        "in 10.0 % of the steps: reading, bytes came too slowly: raise stream.reads",
        "7.9 MB were fetched in all",
        "3 checkpoints: the loop stood still for 0.60 s in all, 0.40 % of the time, for 0.30 s at most",
        "half of them existed within 2.0 s",
        "cpu <b>",
    ):
        assert expected in text, expected
    assert "not in the run folder" not in text


def test_report__shows_mistakes_distances_and_cameras(report: str) -> None:
    text = " ".join(" ".join(Page(report).text).split())
    assert "Confident mistake 1: average precision 38.0 %" in text
    assert "75.0 % of the two areas is common to both" in text
    assert 'aria-label="Distances on people, % of the pairs"' in report
    assert re.search(r"c1 38\.0 c3 19\.0", text)
    assert "data: query 240 images, 6 cameras" in text and f"weights: sha256 {'0f' * 32}" in text
    assert "Note: 2 of 240 queries are odd <u>." in text


def published_rows(report: str) -> list[tuple[bool, list[str]]]:
    """(whether it is grey, cells) of every row of the table of published scores."""
    table = report[report.index("<h2>Beside published") : report.index("<h2>Ranked lists")]
    rows = re.findall(r"<tr([^>]*)>(.*?)</tr>", table, re.DOTALL)[1:]
    return [("grey" in kind, re.findall(r"<td[^>]*>([^<]*)</td>", row)) for kind, row in rows]


def test_report__greys_published_scores_that_are_not_comparable(report: str) -> None:
    ours, *theirs = published_rows(report)
    assert ours[1][:6] == ["ours (step_0000350, cls)", "vit_small", "256\u00a0×\u00a0128", "people", "38.0", "60.8"]
    assert len(theirs) == 16 and all(cells[0] == "PASS" and grey for grey, cells in theirs)
    assert all("another data set" in cells[-1] for _, cells in theirs)


@pytest.mark.slow
def test_report__sets_the_same_row_beside_ours(tmp_path: Path) -> None:
    write_scores(tmp_path, "market1501")
    text = Path(write_report(str(tmp_path))).read_text()
    ours, same, _, again, *others = published_rows(text)
    assert ours[1][3] == "market1501" and again == ours and [grey for grey, _ in others] == 15 * [True]
    assert not same[0] and same[1][:2] == ["PASS", "vit_small"]
    assert same[1][3:] == ["Market-1501", "92.2", "96.3", "PASS README", "yes"]
    assert "<details><summary>15 published scores that cannot be held against ours, and why</summary>" in text
    reasons = {cells[-1] for _, cells in others}
    assert "no: another size of images" in reasons and "no: another data set" in reasons


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task": "zero-shot"}, "theirs is fine-tuned, ours not fine-tuned"),
        ({"trained_on": "msmt17"}, "ours is fine-tuned on msmt17"),
        ({"label_fraction": 0.1}, "ours has fewer labels"),
        ({"parts": 0}, "another backbone"),
        ({"fusion": "mean"}, "another fusion of CLS and parts"),
    ],
)
def test_not_comparable__names_the_reason(change: dict[str, object], reason: str) -> None:
    data = {"name": "market1501", "differences": []}
    content = {"data": data, "settings": {"size": [256, 128], "model": MODEL | change}}
    assert not_comparable(BY_NAME["pass-vits-market1501"], content) == [reason]
    whole = content["settings"] | {"model": MODEL}
    short = {"data": data | {"differences": ["query has 3 of 3,368 images"]}, "settings": whole}
    assert not_comparable(BY_NAME["pass-vits-market1501"], short) == ["our data set is not whole"]


def test_alike__weights_of_no_published_method_are_set_beside_all_on_their_data() -> None:
    content = {"data": {"name": "msmt17"}, "settings": {"model": MODEL | {"family": ""}}}
    assert {row.data for row in alike(content)} == {"msmt17"} and len({row.method for row in alike(content)}) > 5
    assert alike(content | {"data": {"name": "people"}}) == []


@pytest.mark.slow
def test_report__of_scores_alone(tmp_path: Path) -> None:
    write_scores(tmp_path)
    page = Page(Path(write_report(str(tmp_path))).read_text())
    said = " ".join("".join(page.text).split())
    assert "mAP 38.0 %" in said and "Loss" not in said and "not in the run folder" not in said and page.open == []


def test_report__marks_restarts_and_counts_what_was_redone(report: str) -> None:
    table = report[report.index("<h2>Attempts") : report.index("<h2>First batch")]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr.*?</tr>", table)[1:]]
    assert [(row[3], row[4], row[5]) for row in rows] == [
        ("the beginning", "1 to 180", "0"),
        ("step_0000100", "101 to 260", "80"),
        ("step_0000200", "201 to 350", "60"),
    ]


def test_report__tells_utilisation(report: str) -> None:
    assert "91.6 GFLOP an image; MFU by &lt;b&gt; datasheet: 32.0 % at the median." in report
    assert "Model FLOPs utilisation (MFU)" in report and ">MFU</th>" in report


def test_records__keep_the_last_attempt_of_a_step(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    records = files_of(tmp_path).records
    assert [found["step"] for found in records] == list(range(1, 351))
    for step, attempt in ((100, 1), (150, 2), (230, 3), (350, 3)):
        assert attempt == max(number for number, first, last, *_ in ATTEMPTS if first <= step <= last)
        assert records[step - 1] == record(step, attempt)


@pytest.mark.slow
def test_report__without_scores(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    text = Path(write_report(str(tmp_path))).read_text()
    assert "No scores" in text and "Loss and its terms" in text
    for name in ("command.txt", "config.toml", "environment.json", "first_batch.jpg", "evaluation/"):
        assert f"{name} is not in the run folder" in text
    assert Page(text).open == []


@pytest.mark.slow
def test_report__without_metrics(tmp_path: Path) -> None:
    root = fake_run(tmp_path)
    shutil.rmtree(root / "metrics")
    page = Page(Path(write_report(str(root))).read_text())
    missing = [text for text in page.text if "not in the run folder" in text]
    assert len(missing) == 5 and all("metrics/attempt_001.jsonl" in text for text in missing)
    assert page.open == []


@pytest.mark.slow
def test_report__of_a_worse_run_says_so(tmp_path: Path) -> None:
    root = fake_run(tmp_path)
    path = root / "evaluation" / "people" / "colour_histogram" / "metrics.json"
    path.write_text(path.read_text().replace("0.209", "0.709"))
    assert 'class="verdict bad"' in Path(write_report(str(root))).read_text()


@pytest.mark.slow
def test_report__survives_numbers_that_are_not_finite(tmp_path: Path) -> None:
    root = fake_run(tmp_path)
    path = root / "metrics" / "attempt_003.jsonl"
    path.write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', path.read_text()))
    assert "Loss and its terms" in Path(write_report(str(root))).read_text()


@pytest.mark.slow
def test_report__can_be_written_again(run: Path, report: str) -> None:
    again = Path(write_report(str(run))).read_text()
    assert re.sub("report of .*? UTC", "", report) == re.sub("report of .*? UTC", "", again)


@pytest.mark.slow
def test_report__of_a_remote_run(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    local, remote = open_store(str(tmp_path)), open_store("memory://runs/demo")
    for name, _ in local.list():
        remote.replace(name, local.read(name))
    assert write_report("memory://runs/demo") == "memory://runs/demo/report.html"
    assert b"Loss and its terms" in remote.read("report.html")


def test_report__refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="no run folder|nothing at this address"):
            write_report(str(folder))


@pytest.mark.slow
def test_pictures__stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_page, "MOST_PICTURE_BYTES", 3_000_000)
    large = to_jpeg(picture(1, 1_000, 2_400), 100)
    assert len(large) > html_page.LARGE_PICTURE_BYTES
    pictures = html_page.Pictures({"large.jpg": large}.get)
    page = "".join(pictures.figure("large.jpg", "x") for _ in range(6))
    assert 0 < page.count("<img") < 6 and len(page) < 4.1e6
    assert "it would make this page too large" in page
    assert "absent.jpg is not in the run folder" in pictures.figure("absent.jpg", "x")


def test_thinned__keeps_the_mean_and_the_range() -> None:
    x, y = np.arange(10_007.0), np.random.default_rng(0).normal(size=10_007)
    thin, low, mean, high = thinned(x, y)
    assert len(thin) == MOST_POINTS
    assert low.min() == y.min() and high.max() == y.max()
    assert (low <= mean).all() and (mean <= high).all()
    assert abs(mean.mean() - y.mean()) < 1e-3
    assert len(thinned(np.arange(3.0), np.array([1, np.nan, 2]))[0]) == 2


def test_to_svg__is_inline_and_takes_the_colour_of_the_page() -> None:
    svg = to_svg(Plot("A & <title>", [Curve("loss", [1, 2], [3, 4])], marks=[1.5], levels=[("random", 2)]))
    assert svg.startswith('<svg viewBox="') and "currentColor" in svg and "http" not in svg
    assert "A &amp; &lt;title&gt;" in svg
    assert "<metadata" not in svg and "#123457" not in svg


def keep_batch(step: int, rank: int, images: int = 10, padding: int = 2, seed: int = 0) -> tuple[str, bytes]:
    """Name and content of a file as training keeps a batch that was not finite."""
    pixels = np.random.default_rng(seed).integers(0, 255, (2, images + padding, 32, 16, 3)).astype(np.uint8)
    weight = np.r_[np.full(images, 1 / max(images, 1)), np.zeros(padding)]
    sample = np.r_[np.arange(500, 500 + images), np.full(padding, -1)]
    data = io.BytesIO()
    np.savez_compressed(data, sample=sample, position=sample, weight=weight, **{"views/global": pixels})
    return f"faults/step_{step:07d}_rank_{rank:02d}.npz", data.getvalue()


def write_faults(write: Callable[[str, bytes], object]) -> None:
    """Steps 7 and 9 failed: one was gone back from, then skipped; of the other all sorts of files are left."""
    lines = [{"step": 7, "action": action, "what": "the loss is nan <i>"} for action in ("rewound", "skipped")]
    lines.append({"step": 9, "action": "rewound", "what": "the loss is inf"})
    write("faults/steps.jsonl", ("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "ac').encode())
    write(*keep_batch(7, 0))
    name, whole = keep_batch(9, 0)
    write(name, whole[: len(whole) // 2])
    write("faults/step_0000009_rank_01.npz", b"")
    write(*keep_batch(9, 2, images=0))
    data = io.BytesIO()
    np.savez_compressed(data, sample=np.arange(3))
    write("faults/step_0000009_rank_03.npz", data.getvalue())


def check_faults(text: str) -> None:
    said = " ".join(" ".join(Page(text).text).split())
    assert "rewound the loss is nan <i>" in said and "skipped the loss is nan <i>" in said
    assert "1 unreadable line in faults/steps.jsonl" in said
    assert f"step 7, rank 0: views of the first {MOST_IMAGES} of 10 images" in said
    assert "Rows of the data set: 500, 501, 502, 503, 504, 505, 506, 507, 508, 509. Places in the stream: 500" in said
    for rank in (0, 1, 3):
        assert f"(step 9, rank {rank}) cannot be read" in said
    assert "step 9, rank 2: only padding" in said


@pytest.mark.slow
def test_report__shows_the_images_of_steps_that_were_not_finite(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    write_faults(open_store(str(tmp_path)).replace)
    text = Path(write_report(str(tmp_path))).read_text()
    check_faults(text)
    assert text.count("data:image/jpeg") == 1
    for step in range(10, 10 + 2 * MOST_SHEETS):
        open_store(str(tmp_path)).replace(*keep_batch(step, 0, seed=step))
    many = Path(write_report(str(tmp_path))).read_text()
    assert many.count("data:image/jpeg") == MOST_SHEETS and f"The last {MOST_SHEETS} of " in many


def test_report__shows_faults_of_a_remote_run(s3: S3Server) -> None:
    folder = RunFolder(f"s3://{s3.bucket()}/runs/x", s3.storage)
    folder.write("command.txt", "x")
    write_faults(folder.write)
    write_report(folder.url, s3.storage)
    check_faults(folder.store.read("report.html").decode())


@pytest.mark.slow
def test_report__says_when_every_step_was_finite_and_no_sign_was_seen(run: Path) -> None:
    text = render_text(run)
    assert "Every step was finite." in text and "No sign of collapse in 350 steps." in text


def test_report__lists_signs_of_collapse_with_their_steps(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    alive = {"target_information": 0.5, "uniform_entropy": 5.0, "target_entropy": 2.0, "loss_cls": 3.0}
    records = [{"step": step, "loss": 3.0, "images_compared": 32.0, **alive} for step in range(1, 200)]
    for one in records[99:129]:
        one["target_information"] = 0.0
    lines = "".join(json.dumps(one) + "\n" for one in records)
    (tmp_path / "metrics" / "attempt_001.jsonl").write_text(lines)
    (sign,) = collapse.signs(records)
    text = render_text(tmp_path)
    assert f"constant_targets {sign.since} {sign.until} {sign.rule.what} {sign.rule.hint}" in text
    assert "No sign of collapse" not in text
    page = (tmp_path / "report.html").read_text()
    assert 'aria-label="constant_targets: seen below 0.01"' in page and 'aria-label="Target information"' in page


def render_text(run: Path) -> str:
    """The words of a run's report."""
    return " ".join(" ".join(Page(Path(write_report(str(run))).read_text()).text).split())


@pytest.mark.slow
def test_report__of_a_run_that_lost_its_pictures_to_a_removal(tmp_path: Path) -> None:
    """`python -m datapipe remove --runs` knows every file of a run that holds pixels, by its name."""
    root = fake_run(tmp_path / "run")
    (root / "faults").mkdir()
    np.savez(root / "faults" / "step_0000007_rank_01.npz", pixels=np.zeros(3))
    write_report(str(root))
    assert "<img" in (root / "report.html").read_text()
    cleared = clear(look([str(root)], StorageConfig()), (), ())
    assert not cleared.remaining and not cleared.failed
    assert {path.suffix for path in root.rglob("*") if path.is_file()} <= {".txt", ".toml", ".json", ".jsonl", ""}
    write_report(str(root))
    assert "<img" not in (root / "report.html").read_text()
