"""A job on a cluster takes along the package that its method is from."""

from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

from cluster.submit import _stage_method
from tests.training.methods.foreign_package import METHOD, package
from training.methods import GROUP, registry


@pytest.fixture(params=["module", "package"])
def installed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A method of another package, in one module or within a package; where its class lies."""
    name = f"colours_{request.param}"
    place = tmp_path / "installed"
    place.mkdir()
    content = METHOD.replace('Literal["colours"] = "colours"', f'Literal["{name}"] = "{name}"')
    if request.param == "module":
        package(place, content, name=name, target=f"{name}:Colours")
    else:
        package(place, "", name=name, target=f"{name}.inner.method:Colours")
        (place / f"{name}.py").unlink()
        (place / name / "inner").mkdir(parents=True)
        for file, text in (("__init__.py", ""), ("inner/__init__.py", ""), ("inner/method.py", content)):
            (place / name / file).write_text(text)
    monkeypatch.syspath_prepend(str(place))
    registry._found.cache_clear()
    yield name
    registry._found.cache_clear()


def test_stage_method__of_another_package(installed: str, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    _stage_method(installed, folder)
    (found,) = distributions(path=[str(folder)])
    (point,) = found.entry_points
    assert (found.name, found.version, point.group, point.name) == (installed, "0.1", GROUP, installed)
    parts = point.module.split(".")
    assert (folder.joinpath(*parts).with_suffix(".py")).read_text().count("class Colours(Method") == 1


def test_stage_method__ours_is_there_anyway(tmp_path: Path) -> None:
    _stage_method("pass", tmp_path)
    assert not list(tmp_path.iterdir())
