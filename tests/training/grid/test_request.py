"""What a grid is asked for in: lists of tasks, names, recipes, flags."""

import pytest

from datapipe.core.errors import ConfigError
from training.grid.request import (
    GridTask,
    NamedAddress,
    read_address,
    read_recipes,
    read_tasks,
    split_flags,
    trained_kinds,
)


def test_tasks__are_read_in_their_order() -> None:
    tasks = read_tasks("zero-shot, supervised,uda:msmt17,transfer:msmt17")
    assert [str(task) for task in tasks] == ["zero-shot", "supervised", "uda:msmt17", "transfer:msmt17"]
    assert tasks[2] == GridTask("uda", "msmt17") and tasks[2].folder == "uda-from-msmt17"
    assert trained_kinds(tasks) == ["supervised", "uda"]
    assert trained_kinds(read_tasks("zero-shot,transfer:msmt17")) == ["supervised"]  # the source is trained


@pytest.mark.parametrize(("text", "what"), [
    ("zeroshot", "no task is called 'zeroshot'"),
    ("uda", "uda needs the data set"),
    ("transfer:", "transfer needs the data set"),
    ("usl:market", "usl has no source"),
    ("usl:", "usl has no source"),
    ("usl,zero-shot,usl", "given twice: usl"),
    (" , ", "no task is given"),
])  # fmt: skip
def test_tasks__mistakes_are_named(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        read_tasks(text)


@pytest.mark.parametrize(("word", "read"), [
    ("market1501=s3://b/m", NamedAddress("market1501", "s3://b/m")),
    ("data/a=b", NamedAddress("", "data/a=b")),
    ("./a=b", NamedAddress("", "./a=b")),
    ("s3://b/x=y", NamedAddress("", "s3://b/x=y")),
    ("ours=runs/a=b", NamedAddress("ours", "runs/a=b")),
    ("plain", NamedAddress("", "plain")),
    ("=x", NamedAddress("", "=x")),
])  # fmt: skip
def test_address__has_a_name_or_none(word: str, read: NamedAddress) -> None:
    assert read_address(word) == read


def test_recipes__belong_to_tasks() -> None:
    tasks = read_tasks("supervised,usl")
    assert read_recipes(["usl=usl_market", "supervised=my=own.toml"], tasks) == {
        "usl": "usl_market", "supervised": "my=own.toml"
    }  # fmt: skip
    assert read_recipes(["a=b.toml"], read_tasks("usl")) == {"usl": "a=b.toml"}  # a file may be called so
    with pytest.raises(ConfigError, match="which task is this recipe for"):
        read_recipes(["usl_market"], tasks)
    with pytest.raises(ConfigError, match="no task is uda"):
        read_recipes(["uda=usl_market"], tasks)
    with pytest.raises(ConfigError, match="which task is this recipe for"):
        read_recipes(["usl_market"], read_tasks("zero-shot"))


def test_flags__are_for_all_that_train_or_for_one_kind() -> None:
    words = ["--seed", "3", "--usl.method.iterations", "4", "--backbone.size", "64", "32", "--uda.seed=5"]
    flags = split_flags(words)
    assert flags["supervised"] == ["--seed", "3", "--backbone.size", "64", "32"]
    assert flags["usl"] == ["--seed", "3", "--backbone.size", "64", "32", "--method.iterations", "4"]
    assert flags["uda"] == ["--seed", "3", "--backbone.size", "64", "32", "--seed=5"]
