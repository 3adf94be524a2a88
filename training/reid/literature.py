"""What publications report on labelled data sets: one row for every number that a run of one's own can be held against.

A row is a fact with its source, and the settings of the evaluation that it came from. Where a publication and its
authors' released code give two pairs of numbers, the row has the publication's, and the other as `again`.
"""

from typing import Any, Literal

from pydantic import Field

from datapipe.core.config import Size
from datapipe.core.settings import settings

Task = Literal["zero-shot", "supervised", "uda", "usl"]

TASKS: dict[Task, str] = {
    "zero-shot": "retrieval with the features as they are",
    "supervised": "fine-tuned on the training identities of the same data set",
    "uda": "domain adaptation: fine-tuned on another data set, then on this one's images without their labels",
    "usl": "fine-tuned on this data set's images without their labels",
}

ANEW, CLUSTERED = 0.5, 1.0
"""Tolerances in points, of mAP as of Rank-1. Fine-tuning the same weights again gave their authors up to .2 another
score, and somebody else .4; with clustered labels the authors' own repetitions are up to .4 apart."""


@settings
class LiteratureRow:
    """Published scores of one model on one data set. The same keys make up the TOML file of a row of one's own."""

    name: str
    """What `reproduce` calls it; small letters, digits, "-", "_" and "."."""
    method: str
    """How the weights were pre-trained, as their authors write it."""
    data: str
    """Data set that is scored: market1501, dukemtmc, occluded_duke, msmt17, ...; "own" for images of one's own in the
    layout of Market-1501."""
    mAP: float = Field(gt=0, le=100)  # noqa: N815 - the field's own spelling
    """Percent, by the mean of the precision at each match."""
    rank1: float | None = Field(default=None, gt=0, le=100)
    """Percent; None: not reported."""
    source: str
    """Paper and table that report the scores."""
    family: str = ""
    """`method` as the recipes here write it: dino, pass, personvit, personmae; empty: none of them."""
    task: Task = "supervised"
    """What was done with the pre-trained weights."""
    arch: str = ""
    """Shape of the backbone: vit_small, vit_base, ... Empty: any."""
    stem: Literal["patch", "ics"] = "patch"
    """What cuts images into patches."""
    parts: int = Field(default=0, ge=0)
    """Part tokens of the backbone."""
    fusion: Literal["", "cat", "mean"] = ""
    """How CLS and part tokens are put together in the feature that is scored, as `method.fusion`. Empty: either way."""
    size: Size = (256, 128)
    """Size of the images (height, width), pixels."""
    tolerance: float = Field(default=ANEW, ge=0)
    """Points by which mAP and Rank-1 may differ, up or down."""
    again: tuple[float, float] | None = None
    """(mAP, Rank-1) that the authors' released code gave them."""
    origin: str = ""
    """Source domain of domain adaptation: the data set that is trained on first."""
    origin_recipe: str = ""
    """Recipe of fine-tuning there; empty: the one that suits the weights."""
    recipe: str = "supervised"
    """Recipe of fine-tuning: one that comes along, or a TOML file."""
    flags: tuple[str, ...] = ()
    """Flags of that recipe, such as "--optimisation.epochs", "60"."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How test images are resized."""
    reranking: bool = False
    """Whether the scores are those of k-reciprocal re-ranking."""
    remark: str = ""
    """What is not certain about it."""
    impossible: str = ""
    """Why it cannot be run here; empty: it can."""


SETS = {"market": "market1501", "msmt": "msmt17", "duke": "dukemtmc", "occluded": "occluded_duke"}
RECIPE_NAMES = {"market": "market", "msmt": "msmt17"}
"""How the names of recipes without labels end."""
UNLABELLED_FUSION: dict[str, Literal["cat", "mean"]] = {"market": "cat", "msmt": "mean"}
"""Data set -> how PASS puts CLS and part tokens together when it trains on it without labels."""
SHORT = {"vit_small": "vits", "vit_base": "vitb", "swin_base": "swinb"}
FAMILIES = ("dino", "pass", "personvit", "personmae")
README = {
    "dino": "PersonViT README",
    "transreid-ssl": "TransReID-SSL README",
    "pass": "PASS README",
    "personvit": "PersonViT README (picture)",
    "hap": "HAP README",
    "solider": "SOLIDER README",
}
Scores = tuple[float, ...]
"""mAP, Rank-1, or mAP alone; then, where there are four, both as the released code gives them."""


def _model(model: str, arch: str, title: str, height: int = 256, **facts: Any) -> list[LiteratureRow]:
    """The rows of one model; scores by the keys of SETS, all else as in `LiteratureRow`."""
    scores: dict[str, Scores] = {SETS[key]: facts.pop(key) for key in SETS if key in facts}
    sources = facts.pop("sources", {})
    large = "" if height == 256 else f"-{height}"
    family = _family(model)
    facts = {"source": README.get(model.partition("-ics")[0], ""), **facts}
    return [
        LiteratureRow(
            name=f"{model}-{SHORT[arch]}{large}-{data}", method=title, family=family, data=data, arch=arch,
            size=(height, 128), mAP=numbers[0], rank1=numbers[1] if len(numbers) > 1 else None,
            again=(numbers[2], numbers[3]) if len(numbers) > 2 else None,
            **{**facts, **({"source": sources[data]} if data in sources else {})},
        )
        for data, numbers in scores.items()
    ]  # fmt: skip


def _family(model: str) -> str:
    """TransReID-SSL pre-trains by DINO."""
    first = "dino" if model.startswith("transreid-ssl") else model.partition("-")[0]
    return first if first in FAMILIES else ""


def _unlabelled(model: str, title: str, **facts: Any) -> list[LiteratureRow]:
    """Rows of ViT-S without labels of the data set: `usl_*`, and `uda_*` for adaptation to it from the other one.

    Recipes are as the references' scripts: usl_market, usl_pass_msmt17, uda_pass_market, ...; TransReID-SSL adapts with
    the settings it learns without labels with. `sources` and `remarks` are by the same keys as the scores."""
    rows = []
    sources, remarks = facts.get("sources", {}), facts.get("remarks", {})
    ways: list[tuple[Task, str]] = [("uda", "market"), ("uda", "msmt"), ("usl", "market"), ("usl", "msmt")]
    for task, key in ways:
        mean, first, *again = facts[f"{task}_{key}"]
        origin = {"market": "msmt", "msmt": "market"}[key] if task == "uda" else ""
        way = f"{task}-{SETS[origin]}-to" if origin else task
        script = [task, "pass"] if facts.get("parts") else ["usl"]
        recipe = "_".join([*script, RECIPE_NAMES[key]])
        rows.append(
            LiteratureRow(
                name=f"{model}-vits-{way}-{SETS[key]}", method=title, family=_family(model), data=SETS[key],
                arch="vit_small", stem=facts.get("stem", "patch"), parts=facts.get("parts", 0),
                fusion=UNLABELLED_FUSION[key] if facts.get("parts") else "", task=task,
                origin=SETS.get(origin, ""), mAP=mean, rank1=first, again=(again[0], again[1]) if again else None,
                tolerance=CLUSTERED, interpolation="bicubic", recipe=recipe,
                source=sources.get(f"{task}_{key}", README[model.partition("-ics")[0]]),
                remark=remarks.get(f"{task}_{key}", ""),
            )
        )  # fmt: skip
    return rows


PASS: dict[str, Any] = {"parts": 3, "fusion": "cat", "recipe": "supervised_pass"}
BY_OTHERS = {"dukemtmc": README["personvit"], "occluded_duke": README["personvit"]}
"""Scores of PASS that its own README does not have."""
MAE: dict[str, Any] = {"recipe": "supervised_mae"}
NOT_PUBLIC = "the fine-tuning is not public: HAP's is used; the size is inferred from the scores it is compared with"
ABSTRACT = "abstract of PersonMAE (Hu et al., 2023)"

ROWS: tuple[LiteratureRow, ...] = (
    *_model("dino", "vit_small", "DINO on all of LUPerson", market=(90.3, 95.4), msmt=(64.2, 83.4)),
    *_model("moby", "vit_small", "MoBY", source="PersonViT README", market=(84.0, 92.9), msmt=(50.0, 73.2)),
    *_model("transreid-ssl", "vit_small", "TransReID-SSL with CFS",
            market=(91.0, 96.0, 91.2, 95.8), msmt=(66.1, 84.6, 66.3, 84.8)),
    *_model("transreid-ssl-ics", "vit_small", "TransReID-SSL with ICS and CFS", stem="ics",
            market=(91.3, 96.2, 91.4, 96.2), msmt=(68.1, 86.1, 68.3, 86.2)),
    *_model("transreid-ssl-ics", "vit_base", "TransReID-SSL with ICS and CFS", 384, stem="ics",
            recipe="supervised_384", market=(93.2, 96.7, 93.1, 96.6), msmt=(75.0, 89.6, 75.1, 89.6)),
    *_model("pass", "vit_small", "PASS", **PASS, sources=BY_OTHERS,
            market=(92.2, 96.3), msmt=(69.1, 86.5), duke=(82.5, 90.7), occluded=(60.2, 70.4)),
    *_model("pass", "vit_small", "PASS", 384, **PASS, market=(92.6, 96.8), msmt=(71.7, 87.9)),
    *_model("pass", "vit_base", "PASS", **PASS, sources=BY_OTHERS,
            market=(93.0, 96.8), msmt=(71.8, 88.2), duke=(84.7, 92.5), occluded=(64.3, 74.0)),
    *_model("pass", "vit_base", "PASS", 384, **PASS, market=(93.3, 96.9), msmt=(74.3, 89.7)),
    *_model("personvit-star", "vit_small", "PersonViT*", source=README["personvit"],
            remark="what the star means is not stated",
            market=(92.1, 96.4), msmt=(70.9, 87.3), duke=(83.6, 91.6), occluded=(61.5, 70.8)),
    *_model("personvit", "vit_small", "PersonViT",
            market=(92.9, 96.8), msmt=(74.3, 89.2), duke=(84.7, 91.9), occluded=(65.2, 73.2)),
    *_model("personvit", "vit_base", "PersonViT",
            market=(95.0, 97.6), msmt=(80.8, 92.0), duke=(88.1, 93.8), occluded=(72.2, 79.8)),
    *_model("personmae", "vit_base", "PersonMAE", source=ABSTRACT, remark=NOT_PUBLIC, interpolation="bicubic", **MAE,
            msmt=(79.8,), occluded=(69.5,)),
    *_model("hap", "vit_base", "HAP", interpolation="bicubic", **MAE, market=(91.7,), msmt=(76.4,)),
    *_model("hap", "vit_base", "HAP", 384, interpolation="bicubic", **MAE, market=(91.9,), msmt=(76.8,)),
    *_model("solider", "swin_base", "SOLIDER", impossible="its backbone is a Swin transformer, the ones here are ViTs",
            remark="the size of the images is not stated", market=(93.9, 96.9), msmt=(77.1, 90.7)),
    *_unlabelled("transreid-ssl", "TransReID-SSL with CFS",
                 uda_market=(89.4, 95.4, 89.2, 95.3), uda_msmt=(47.4, 70.8, 47.7, 71.2),
                 usl_market=(88.2, 94.2, 88.4, 94.6), usl_msmt=(40.9, 66.4, 40.9, 66.4)),
    *_unlabelled("transreid-ssl-ics", "TransReID-SSL with ICS and CFS", stem="ics",
                 uda_market=(89.9, 95.5, 89.9, 95.4), uda_msmt=(57.8, 79.5, 57.8, 79.4),
                 usl_market=(89.6, 95.3, 89.5, 95.3), usl_msmt=(50.6, 75.0, 50.6, 75.0)),
    *_unlabelled("pass", "PASS", parts=3, uda_market=(90.2, 95.8), uda_msmt=(49.1, 72.7),
                 usl_market=(88.5, 95.0, 88.7, 95.0), usl_msmt=(41.0, 67.0),
                 sources={"usl_market": "mAP: abstract of PASS (Zhu et al., ECCV 2022); Rank-1: PASS README"},
                 remarks={"usl_market": "the abstract has 88.5 mAP and no Rank-1; the README, with the released code, "
                                        "88.7 / 95.0"}),
)  # fmt: skip
"""Supervised, then without labels. All that the tables of these publications hold for pre-trained person backbones."""

BY_NAME = {row.name: row for row in ROWS}
