"""Which methods there are: those of the modules of this package, and those that other packages have entry points for.

Looked for when first asked, not when this is imported: a module of another package may import `training.methods.base`
and be imported before that.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from datapipe.core.errors import ConfigError
from training.methods.base import Method, MethodSettings
from training.nn.identity.fusion import Fusion
from training.nn.vision_transformer import BackboneConfig

GROUP = "reid_pretraining.methods"
"""Group of the entry points of other packages, each of which is a subclass of `Method`."""
PACKAGE = __name__.rpartition(".")[0]
DEFAULT = "pass"
"""The method of a recipe that names none."""


class _Registered(NamedTuple):
    """A method, and where it is from."""

    kind: type[Method[Any]]
    point: EntryPoint | None
    """Entry point of another package; None: a module of ours."""

    @property
    def place(self) -> str:
        """In words."""
        return self.kind.__module__ if self.point is None else _place(self.point)


@cache
def _found() -> dict[str, _Registered]:
    """Name -> method. Raises ConfigError for an entry point that is none."""
    registered: dict[str, _Registered] = {}
    for one in [*(_Registered(kind, None) for kind in _own()), *_of_others()]:
        name = _name(one)
        if name in registered:
            raise ConfigError(f"two methods are called {name!r}: of {registered[name].place} and of {one.place}",
                              where=f"entry points {GROUP}", hint="uninstall one of them, or give it another name"
                              )  # fmt: skip
        registered[name] = one
    return registered


def _own() -> Iterator[type[Method[Any]]]:
    """The methods that the modules of this package define; base classes are abstract."""
    package = importlib.import_module(PACKAGE)
    for module in pkgutil.iter_modules(package.__path__, f"{PACKAGE}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if _is_method(kind) and kind.__module__ == module.name:
                yield kind


def _of_others() -> Iterator[_Registered]:
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        place = _place(point)
        try:
            kind = point.load()
        except Exception as error:  # whatever the import of another package raises
            raise ConfigError(
                f"the method {point.name!r} of {place} cannot be imported: {type(error).__name__}: {error}",
                where=f"entry points {GROUP}",
                hint="repair that package, or uninstall it",
            ) from error
        if not _is_method(kind):
            abstract = sorted(getattr(kind, "__abstractmethods__", ()))
            lacks = f"; it lacks {', '.join(abstract)}" if abstract else ""
            raise ConfigError(
                f"{point.name!r} of {place} is no method{lacks}",
                where=f"entry points {GROUP}",
                hint="an entry point is a class that derives from training.methods.base.Method",
            )
        yield _Registered(kind, point)


def _is_method(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Method) and not inspect.isabstract(kind)


def _name(one: _Registered) -> str:
    """The name that the settings of a method give it. Raises ConfigError where they do not."""
    try:
        kind = one.kind.settings_type()
    except TypeError as error:
        raise _nameless(one, str(error)) from error
    (field,) = [field for field in dataclasses.fields(kind) if field.name == "name"]
    hint = get_type_hints(kind)["name"]
    if get_origin(hint) is not Literal or get_args(hint) != (field.default,):
        raise _nameless(one, f"{kind.__name__} does not give it a name")
    return str(field.default)


def _nameless(one: _Registered, why: str) -> ConfigError:
    return ConfigError(f"the method {one.kind.__name__} of {one.place} has no name: {why}",
                       where=f"entry points {GROUP}",
                       hint='class ITS_SETTINGS(MethodSettings) with @settings and name: Literal["toy"] = "toy"; class '
                       "ITS_METHOD(Method[ITS_SETTINGS])")  # fmt: skip


def _place(point: EntryPoint) -> str:
    """What an entry point stands for, and the package that has it, in words."""
    package = "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return f"{package} ({point.value})"


# ------------------------------------------------------------------------------------------------ what others ask for


def known() -> Mapping[str, type[Method[Any]]]:
    """Name in a recipe -> class. Raises ConfigError for an entry point of another package that is no method."""
    return {name: one.kind for name, one in _found().items()}


def named(name: str, *, where: str = "") -> type[Method[Any]]:
    """The method of this name. Raises ConfigError where none is installed."""
    if name not in _found():
        raise ConfigError(f"there is no method {name!r} here; known are {', '.join(_found())}", where=where,
                          hint=absent_hint())  # fmt: skip
    return _found()[name].kind


def absent_hint() -> str:
    """What to try where a method is not there."""
    return f"a method of another package needs that installed, with an entry point of the group {GROUP}"


def of(config: MethodSettings) -> type[Method[Any]]:
    """The method that these settings are of."""
    return named(config.name)


def fusion(config: MethodSettings) -> Fusion | Literal[""]:
    """How CLS and part tokens are put together in the feature whose scores are quoted; empty: there are no parts."""
    kind = of(config)
    return kind.fusion(config) if kind.parts(config) else ""


def quoted_feature(config: MethodSettings) -> str:
    """The feature whose scores are quoted, of a network that is trained with these settings."""
    kind = of(config)
    return kind.quoted_feature(kind.parts(config), kind.fusion(config))


def build(config: MethodSettings, backbone: BackboneConfig) -> Method[Any]:
    """The method a recipe asks for, freshly initialised (from PyTorch's global generator: seed it first)."""
    kind = of(config)
    made = kind(config, backbone)
    if made.backbone().parts != kind.parts(config):
        raise AssertionError(f"{kind.__name__}.parts() says {kind.parts(config)}, its backbone has "
                             f"{made.backbone().parts} part tokens")  # fmt: skip
    return made


def entry_point_of(name: str) -> EntryPoint | None:
    """The entry point of the package that a method is from; None for a method of this package."""
    return _found()[name].point if name in _found() else None


def package_of(name: str) -> dict[str, str]:
    """Name and version of the package that a method is from; nothing for our own."""
    point = entry_point_of(name)
    return {point.dist.name: point.dist.version} if point is not None and point.dist is not None else {}


def settings_union() -> Any:
    """The type of the settings of any method: a union told apart by `name`."""
    kinds = tuple(kind.settings_type() for kind in known().values())
    return Annotated[Union[kinds], Field(discriminator="name")]  # noqa: UP007  (made of a tuple)


def default_settings() -> MethodSettings:
    """The settings of the method of a recipe that names none."""
    return named(DEFAULT).settings_type()()


def read_settings(name: str, tree: Mapping[str, Any], *, where: str) -> MethodSettings:
    """The settings of a method as a card of exported weights has them. Raises ConfigError where it is not here, or they
    are not its own."""
    kind = named(name, where=where).settings_type()
    try:
        return TypeAdapter(kind).validate_python({**tree, "name": name})
    except ValidationError as error:
        raise ConfigError(f"these are no settings of {name}: {error}", where=where,
                          hint="read them with the version that wrote them") from error  # fmt: skip
