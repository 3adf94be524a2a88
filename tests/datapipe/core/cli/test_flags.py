"""Words become settings, and every mistake is told with its flag, what is allowed and the nearest right one."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from datapipe.core.cli import INLINE, POSITIONAL, Arg, flags_of, read, read_some
from datapipe.core.errors import UsageError
from datapipe.core.settings import settings


@settings
class Inner:
    rate: float = Field(default=0.5, gt=0, le=1)
    kind: Literal["exact", "near"] = "near"
    stage: Literal[0, 1, 2] = 1
    fused: Literal["auto", True, False] = "auto"

    @model_validator(mode="after")
    def _fits(self) -> "Inner":
        if self.kind == "exact" and self.stage == 2:
            raise ValueError("stage 2 is never exact")
        return self


@settings
class Other(Inner):
    parts: int = 3


@settings
class Whole:
    sources: Annotated[tuple[str, ...], POSITIONAL]
    out: str
    size: tuple[int, int] = (256, 128)
    native: tuple[int, int] | None = None
    points: tuple[tuple[float, float], ...] = ()
    dry_run: bool = False
    audit: bool = True
    step: int | None = None
    folder: Path = Path("here")
    layout: Annotated[str, Arg(name="as", aliases=("--old.layout",))] = ""
    inner: Inner = Inner()
    more: Annotated[Other, INLINE] = Other()


def said(*words: str) -> Whole:
    return read(Whole, ["a", "--out", "o", *words], prog="tool")


@pytest.mark.parametrize(("words", "name", "value"), [
    ("--size 64 32", "size", (64, 32)),
    ("--native 64 32", "native", (64, 32)),
    ("--native None", "native", None),
    ("--points 1 2 3 4.5", "points", ((1.0, 2.0), (3.0, 4.5))),
    ("--points", "points", ()),
    ("--dry-run", "dry_run", True),
    ("--dry_run", "dry_run", True),
    ("--dry-run False", "dry_run", False),
    ("--no-audit", "audit", False),
    ("--audit=no", "audit", False),
    ("--step 3", "step", 3),
    ("--step -3", "step", -3),
    ("--folder=/a=b", "folder", Path("/a=b")),
    ("--as vit", "layout", "vit"),
    ("--old.layout vit", "layout", "vit"),
    ("--as=--vit", "layout", "--vit"),
    ("--step 3 --step 4", "step", 4),
])  # fmt: skip
def test_read__values_of_every_type(words: str, name: str, value: Any) -> None:
    found = getattr(said(*words.split()), name)
    assert found == value and type(found) is type(value)


def test_read__nested_and_inline_fields() -> None:
    found = said("--inner.rate", "1e-3", "--kind", "exact", "--parts", "5", "--inner.stage", "2")
    assert (found.inner.rate, found.inner.stage, found.more.kind, found.more.parts) == (1e-3, 2, "exact", 5)
    assert found.inner.kind == "near" and found.sources == ("a",)


@pytest.mark.parametrize(("words", "value"), [
    ("--inner.fused", True), ("--inner.fused --dry-run", True), ("--inner.fused=True", True),
    ("--inner.fused off", False), ("--no-inner.fused", False), ("--inner.fused auto", "auto"),
])  # fmt: skip
def test_read__a_switch_with_a_third_choice(words: str, value: Any) -> None:
    assert said(*words.split()).inner.fused is value


def test_read__words_between_flags_and_behind_two_hyphens() -> None:
    assert read(Whole, ["a", "--dry-run", "b", "--out", "o", "--", "--c"], prog="").sources == ("a", "b", "--c")


def test_read__the_default_says_which_class_is_meant() -> None:
    @settings
    class Root:
        one: Inner = Inner()

    found = read(Root, ["--one.parts", "7"], prog="", default=Root(one=Other()))
    assert found == Root(one=Other(parts=7))
    with pytest.raises(UsageError, match="no flag `--one.parts`"):
        read(Root, ["--one.parts", "7"], prog="")


@pytest.mark.parametrize(("words", "what"), [
    ("--sise 1 2", "no flag `--sise`; did you mean `--size`?"),
    ("--innr.rate 1", "no flag `--innr.rate`; did you mean `--inner.rate`?"),
    ("--rte 1", "no flag `--rte`; did you mean `--rate`?"),
    ("--zzz", "no flag `--zzz`"),
    ("--size 1", "`--size`: 2 values (an integer, an integer), not 1"),
    ("--size", "`--size`: 2 values (an integer, an integer) is missing"),
    ("--size x 2", "`--size`: an integer, not x"),
    ("--points 1 2 3", "`--points`: any number of: 2 values (a number, a number), not 1 2 3"),
    ("--step 1.5", "`--step`: an integer, not 1.5"),
    ("--inner.kind nere", "`--inner.kind`: one of exact, near, not nere; did you mean near?"),
    ("--inner.stage 7", "`--inner.stage`: one of 0, 1, 2, not 7"),
    ("--inner.fused=maybe", "`--inner.fused`: one of auto, True, False, not maybe"),
    ("--dry-run=maybe", "`--dry-run`: true or false, not maybe"),
    ("--inner.rate 2", "`--inner.rate`: input should be less than or equal to 1, not 2.0"),
    ("--kind exact --stage 2", "stage 2 is never exact"),
])  # fmt: skip
def test_read__a_mistake_is_told_with_what_is_right(words: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        said(*words.split())
    assert (caught.value.what, caught.value.where) == (what, "tool") and "tool --help" in caught.value.hint


def test_read__all_mistakes_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        said("--size", "1", "--step", "x", "--inner.stage", "9")
    assert caught.value.what.startswith("3 mistakes:\n    `--size`")
    with pytest.raises(UsageError) as caught:
        read(Whole, ["--ot", "x"], prog="")
    assert all(
        word in caught.value.what for word in ("did you mean `--out`", "SOURCES is missing", "`--out` is missing")
    )
    with pytest.raises(UsageError) as caught:
        said("--inner.rate", "2", "--rate", "3")
    assert "`--inner.rate`" in caught.value.what and "`--rate`" in caught.value.what


def test_read__a_word_too_many() -> None:
    @settings
    class One:
        run: Annotated[str, POSITIONAL]

    with pytest.raises(UsageError, match="`b` is one word too many"):
        read(One, ["a", "b"], prog="")


def test_read_some__hands_on_what_it_does_not_know() -> None:
    found, rest = read_some(Whole, ["a", "--lr", "1", "2", "--out", "o", "--b=c"], prog="")
    assert found.out == "o" and rest == ["--lr", "1", "2", "--b=c"]


def test_flags_of__names_and_groups() -> None:
    found = {flag.name: flag.group for flag in flags_of(Whole)}
    assert found["--inner.rate"] == "inner" and found["--rate"] == "" and found["SOURCES"] == ""
    assert "--as" in found and "--layout" not in found
