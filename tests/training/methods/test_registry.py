"""Which methods are found: our modules' and those of other packages; what an entry point must not be."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datapipe.core.errors import ConfigError
from tests.training.methods.foreign_package import DOCUMENT, METHOD, package
from training import methods
from training.methods import registry
from training.methods.cluster_contrast import ClusterContrast
from training.methods.dino import Dino
from training.methods.pass_reid import Pass, PassConfig
from training.methods.personmae import PersonMae
from training.methods.personvit import PersonVit
from training.methods.supervised import Supervised
from training.nn.vision_transformer import BackboneConfig

Found = Callable[..., dict[str, type]]


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Found]:
    """The methods that are known with another package, installed in a folder."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def look(content: str = METHOD, **options: str) -> dict[str, type]:
        package(tmp_path, content, **options)
        registry._found.cache_clear()
        return dict(methods.known())

    yield look
    registry._found.cache_clear()
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_known__are_the_concrete_classes_of_our_modules() -> None:
    ours = {"dino": Dino, "pass": Pass, "personvit": PersonVit, "personmae": PersonMae, "supervised": Supervised,
            "cluster_contrast": ClusterContrast}  # fmt: skip
    assert {name: kind for name, kind in methods.known().items() if not methods.package_of(name)} == ours
    assert methods.default_settings() == PassConfig() and methods.of(PassConfig()) is Pass


def test_document__registers_its_example_as_it_is_found() -> None:
    assert f'[project.entry-points."{methods.GROUP}"]\ncolours = "colours:Colours"\n' in DOCUMENT


def test_known__one_of_another_package(found: Found) -> None:
    kind = found()["colours"]
    assert methods.named("colours") is kind and methods.package_of("colours") == {"colours": "0.1"}
    config = methods.read_settings("colours", {"pad": 5}, where="card")
    method = methods.build(config, BackboneConfig(arch="custom", size=(16, 8), patch=8, width=8, depth=1, heads=1))
    assert isinstance(method, kind) and method.config.pad == 5 and method.networks().keys() == {"student"}
    assert method.extra_exports() == {} == method.centres() and kind.nearest_recipe({"backbone.arch": "vit_base"}) == ""


def test_known__a_subclass_of_ours_with_settings_of_its_own(found: Found) -> None:
    kinds = found(
        "from typing import Literal\nfrom datapipe.core.settings import settings\n"
        "from training.methods.base import Method\nfrom training.methods.pass_reid import Pass, PassConfig\n"
        "@settings\nclass OwnConfig(PassConfig):\n    name: Literal['own'] = 'own'\n"
        "class Own(Pass, Method[OwnConfig]):\n    pass\n",
        target="own:Own", name="own",
    )  # fmt: skip
    assert issubclass(kinds["own"], Pass) and kinds["own"].settings_type()().name == "own"  # type: ignore[attr-defined]


ABSTRACT = METHOD.replace("def roles(self)", "def other(self)")
SETTINGS = METHOD.replace('    name: Literal["colours"] = "colours"\n', '    name: str = "colours"\n')
TAKEN = METHOD.replace('Literal["colours"] = "colours"', 'Literal["dino"] = "dino"')


@pytest.mark.parametrize(("content", "target", "told"), [
    ("import no_such_library\n", "colours:Colours", "cannot be imported: ModuleNotFoundError: No module"),
    ("raise RuntimeError('no licence')\n", "colours:Colours", "cannot be imported: RuntimeError: no licence"),
    (METHOD, "colours:Colour", "cannot be imported: AttributeError"),
    (METHOD, "colours:Student", "is no method"),
    (METHOD, "colours", "is no method"),
    (ABSTRACT, "colours:Colours", "is no method; it lacks roles"),
    (SETTINGS, "colours:Colours", "has no name: ColoursConfig does not give it a name"),
    (METHOD.replace("Method[ColoursConfig]", "Method"), "colours:Colours", "does not say of which settings it is"),
    (TAKEN, "colours:Colours", "two methods are called 'dino': of training.methods.dino and of colours 0.1"),
], ids=["library", "raises", "attribute", "class", "module", "abstract", "literal", "settings", "taken"])  # fmt: skip
def test_known__an_entry_point_that_is_no_method(found: Found, content: str, target: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        found(content, target=target)
    error = str(caught.value)
    assert told in error and "colours 0.1" in error and methods.GROUP in error


def test_named__a_method_that_is_not_here() -> None:
    with pytest.raises(ConfigError) as caught:
        methods.named("gone", where="method, on a card")
    error = str(caught.value)
    assert "no method 'gone' here; known are cluster_contrast, dino, pass" in error and "method, on a card" in error
    assert methods.GROUP in error


def test_read_settings__that_are_none_of_this_version() -> None:
    with pytest.raises(ConfigError, match="no settings of pass"):
        methods.read_settings("pass", {"party": 3}, where="card")
