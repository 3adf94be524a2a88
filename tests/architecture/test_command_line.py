"""Every command: help at 80 columns, usage without words, one face of mistakes, and what may be imported for that."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import cluster.__main__
import cluster.commands
import datapipe.__main__
import training.__main__
from datapipe.core import cli
from datapipe.core.errors import UsageError
from tests.support.golden import ROOT
from training.commands import entry_points, recipe
from training.config import recipe_toml as recipes
from training.config.run_config import RunConfig

PROGRAMS = {"datapipe": datapipe.__main__, "training": training.__main__, "cluster": cluster.__main__}
COMMANDS = [(package, name) for package, program in PROGRAMS.items() for name in program.COMMANDS]
OF_RECIPES = {("training", "pretrain"), ("training", "views"), ("cluster", "pretrain")}
"""Their flags are a recipe's, which need PyTorch."""
ALONE = {("training", "warm"), ("cluster", "demo"), ("cluster", "status"), ("training", "reproduce")}
"""They do something, or say what is missing, without a word."""
LIBRARIES = {"torch", "timm", "torchvision", "ray", "deepspeed", "pyarrow", "cv2", "boto3", "botocore", "fsspec", "PIL",
             "numpy", "webdataset", "matplotlib", "scipy", "sklearn", "sympy", "av"}  # fmt: skip
WITH_PYTORCH = {"torch", "numpy", "sympy"}
"""What `import torch` brings."""


def called(package: str, *words: str) -> int:
    try:
        return cli.run(PROGRAMS[package].main, words)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize(("package", "name"), COMMANDS)
def test_help__fits_80_columns(package: str, name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(package, name, flag) == cli.COMPLETE
    text, errors = capsys.readouterr()
    assert not errors and max(map(len, text.splitlines())) <= 80
    assert text.startswith(f"usage: python -m {package} {name}")
    if flag == "--help":
        assert len(text.splitlines()) <= 120
        assert "example: " in text or name == "warm"


def test_help__lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for package, program in PROGRAMS.items():
        assert called(package, "--help") == cli.COMPLETE
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80 and all(f"  {name}" in text for name in program.COMMANDS)
        assert called(package) == cli.USAGE and capsys.readouterr() == ("", text)


def test_help__of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """Common flags first, the rest in a line a group, or a group by its name; values are the recipe's."""
    assert called("training", "pretrain", "personmae_vitb", "--help") == cli.COMPLETE
    text = capsys.readouterr().out
    assert "[vit_base]" in text and "pass_vits, personmae_vitb" in " ".join(text.split())
    assert text.index("--stream.manifest") < text.index("\nstorage: endpoint-url")
    assert called("training", "pretrain", "--help", "storage") == cli.COMPLETE
    group = capsys.readouterr().out
    assert "--storage.endpoint-url" in group and "--stream.manifest" not in group.partition("recipes:")[2]
    assert called("cluster", "pretrain", "--help-all") == cli.COMPLETE
    text = capsys.readouterr().out
    for key, _ in recipes.leaves((), recipes.to_tree(RunConfig())):
        assert f"--{key.replace('_', '-')} " in text or f"--{key.replace('_', '-')}\n" in text, key


@pytest.mark.parametrize(("package", "name"), COMMANDS)
def test_mistakes__have_one_face(package: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pass_vits"] if (package, name) in OF_RECIPES else []
    assert called(package, name, *words, "--no-such-flag", "1") == cli.USAGE
    output, errors = capsys.readouterr()
    errors = errors.removeprefix(f"{name}: starting, loads PyTorch\n")
    lines = [line for line in errors.splitlines() if not line.startswith(f"{name}: ")]
    assert lines[0].startswith("error: ") and "no flag `--no-such-flag`" in errors
    assert lines[-2] == f"  where: python -m {package} {name}" and lines[-1].startswith("  try: ")


@pytest.mark.parametrize(("package", "name"), [command for command in COMMANDS if command not in ALONE])
def test_usage__is_short_without_words(package: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(package, name) == cli.USAGE
    output, errors = capsys.readouterr()
    assert not output and errors.startswith(f"usage: python -m {package} {name}") and len(errors.splitlines()) <= 5


class Understood(Exception):
    """A command has read its words, and would set to work."""


def stop_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every command end by `Understood` once its own parser has taken all of its words."""

    def ended(real: Callable[..., Any], *given: Any, **named: Any) -> None:
        raise Understood(real(*given, **named))

    for module, name in (
        (sys.modules[cli.parse.__module__], "read"),
        (cluster.commands, "read"),
        (entry_points, "read_evaluate"),
        (cluster.commands, "read_evaluate"),
        (recipe, "read_with_recipe"),
    ):
        monkeypatch.setattr(module, name, partial(ended, getattr(module, name)))


def in_a_shell(line: str, folder: Path) -> list[str]:
    """The words that a shell hands to `python`, given this line in a folder."""
    code = f'python() {{ printf "%s\\0" "$@" >&2; }}; {line}'
    return subprocess.run(["sh", "-c", code], cwd=folder, check=True, stderr=subprocess.PIPE, text=True).stderr.split(
        "\0"
    )[:-1]


@pytest.mark.parametrize(("package", "name"), [command for command in COMMANDS if command != ("training", "warm")])
def test_example__is_read_by_the_command_s_own_parser(
    package: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert called(package, name, "--help") == cli.COMPLETE
    printed = capsys.readouterr().out.partition("\nexample: ")[2]
    words = in_a_shell(printed[: re.search(r"(?<!\\)\n", printed).start()], tmp_path)  # type: ignore[union-attr]
    assert words[:3] == ["-m", package, name] and not any("\n" in word for word in words)
    words = words[3:]
    stop_when_read(monkeypatch)
    with pytest.raises(Understood):
        PROGRAMS[package].main([name, *words])
    if name == "submit":  # it hands in a command with its words, which that reads
        name, *words = words
        with pytest.raises(Understood):
            PROGRAMS[package].main([name, *words])
    with pytest.raises(UsageError, match="no flag `--no-such-flag`"):
        PROGRAMS[package].main([name, *words, "--no-such-flag", "1"])


LOOK = """
import json, sys
from datapipe.core import cli
from {package}.__main__ import main
for line in {lines!r}:
    try:
        cli.run(main, line)
    except SystemExit:
        pass
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})), file=sys.__stderr__)
"""


def imported(package: str, lines: list[list[str]]) -> set[str]:
    """Top-level modules of a process that has gone through these command lines."""
    code = LOOK.format(package=package, lines=lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("package", PROGRAMS)
def test_imports__help_and_mistakes_need_no_library(package: str) -> None:
    names = [name for own, name in COMMANDS if own == package and (own, name) not in OF_RECIPES]
    found = imported(package, [line for name in names for line in ([name, "--help"], [name, "x", "--mistake"])])
    assert not found & LIBRARIES


@pytest.mark.slow
@pytest.mark.parametrize("package", ["training", "cluster"])
def test_imports__those_of_recipes_need_pytorch_alone(package: str) -> None:
    found = imported(package, [["pretrain", "--help"], ["pretrain", "pass_vits", "--optimisation.lrr", "1"]])
    assert "torch" in found and not found & (LIBRARIES - WITH_PYTORCH)
