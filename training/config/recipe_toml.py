"""Recipes as text: read from one TOML file, overridden by dotted flags, compared, saved resolved."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from datapipe.core import cli
from datapipe.core.bounds import text_trees
from datapipe.core.bounds.text_trees import MOST_TOML_BYTES
from datapipe.core.errors import ConfigError
from datapipe.formats.text import NoText, decode_text
from training import methods
from training.config.run_config import RunConfig
from training.recipes import SHIPPED

PRETRAIN = "python -m training pretrain"
_SCHEMA: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def load(
    path: str | Path, overrides: Sequence[str] = (), *, prog: str = PRETRAIN, also: Sequence[cli.Flag] = ()
) -> RunConfig:
    """Read a recipe and apply dotted flags such as `--optimisation.lr 1e-3`. One that comes along may be named without
    its folder: `pass_vits`. `also`: flags beside those of a recipe that a misspelt one may mean.

    All mistakes of the file are reported at once; a misspelt key is refused with the nearest right one.

    Raises:
        ConfigError: no such file, no TOML, or wrong keys or values.
        UsageError: a flag is wrong.
    """
    known = {file.stem: file for file in sorted(SHIPPED.glob("*.toml"))}
    recipe = Path(path)
    recipe = recipe if recipe.is_file() else known.get(str(path), recipe)
    if not recipe.is_file():
        near = difflib.get_close_matches(str(path), [*known, *map(str, recipe.parent.glob("*.toml"))], n=1)
        suggestion = f"did you mean `{near[0]}`? " if near else ""
        hint = f"{suggestion}a TOML file; recipes that come along: {', '.join(known)}"
        raise ConfigError("no such recipe", where=str(path), hint=hint)
    if recipe.stat().st_size > MOST_TOML_BYTES:
        raise ConfigError(f"not a TOML file of a recipe: it has more than {MOST_TOML_BYTES:,} bytes", where=str(path),
                          hint="give the recipe itself")  # fmt: skip
    tree = parse_toml(recipe.read_bytes(), where=str(path))
    return override(validate(tree, where=str(path)), overrides, prog=prog, also=also)


def parse_toml(data: bytes, *, where: str) -> dict[str, Any]:
    """The tables of a TOML file, also of one that an editor began with a byte order mark or wrote in UTF-16. Raises
    ConfigError that says what is wrong with it."""
    try:
        text = decode_text(data)
    except NoText as error:
        raise ConfigError(f"not a TOML file: it {error}", where=where,
                          hint="save it as plain text in the encoding UTF-8") from error  # fmt: skip
    try:
        return text_trees.parse_toml(text.replace("\r\n", "\n"))
    except ValueError as error:
        raise ConfigError(f"not a TOML file: {error}", where=where, hint="check quotes and brackets") from error


def validate(tree: Mapping[str, Any], *, where: str) -> RunConfig:
    """Turn a nested mapping into a checked RunConfig. Raises ConfigError with every mistake in `tree`."""
    try:
        return _SCHEMA.validate_python(tree)
    except ValidationError as error:
        mistakes = [_mistake(item) for item in error.errors()]
        noun = "mistake" if len(mistakes) == 1 else "mistakes"
        raise ConfigError(
            f"{len(mistakes)} {noun} in the recipe:\n" + "\n".join(f"    {line}" for line in mistakes),
            where=where,
            hint="`python -m training pretrain RECIPE --help-all` documents every key",
        ) from None


def override(
    config: RunConfig, flags: Sequence[str], *, prog: str = PRETRAIN, also: Sequence[cli.Flag] = ()
) -> RunConfig:
    """The configuration with dotted flags applied. Raises UsageError with every mistake in them."""
    return cli.read(RunConfig, flags, prog=prog, default=config, also=also)


def to_tree(config: Any) -> dict[str, Any]:
    """The settings as nested plain values, ready for TOML or JSON."""
    return _SCHEMA.dump_python(config, mode="json")


def to_toml(config: RunConfig) -> str:
    """The resolved recipe, complete: reading it back gives an equal RunConfig."""
    lines: list[str] = []
    _write_table(lines, (), to_tree(config))
    return "\n".join(lines).lstrip("\n") + "\n"


def differences(old: RunConfig, new: RunConfig, *, ignore: Sequence[str] = ()) -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`, but for keys that start with a name in `ignore`."""
    before, after = dict(leaves((), to_tree(old))), dict(leaves((), to_tree(new)))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if not key.startswith(tuple(ignore))]


def _mistake(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    name = ".".join(location)
    if item["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(location[-1], _keys_at(location[:-1]), n=1, cutoff=0.5)
        known = f"; did you mean `{near[0]}`?" if near else ""
        return f"unknown key `{_without_tag(location)}`{known}"
    if item["type"].startswith("union_tag"):
        given_name = item["input"].get("name") if isinstance(item["input"], Mapping) else None
        absent = "" if given_name is None else f", not {given_name!r}; {methods.absent_hint()}"
        return f"`{name}.name` must be one of {', '.join(methods.known())}{absent}"
    return f"`{_without_tag(location)}` = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _without_tag(location: Sequence[str]) -> str:
    """`method.pass.part` -> `method.part`: the union's tag is no key of the file."""
    parts = list(location)
    if len(parts) >= 2 and parts[0] == "method" and parts[1] in methods.known():
        del parts[1]
    return ".".join(parts)


def _keys_at(location: Sequence[str]) -> list[str]:
    """The keys of the settings class at this place of the tree."""
    kind: Any = RunConfig
    for part in location:
        if dataclasses.is_dataclass(kind):
            kind = {field.name: field.type for field in dataclasses.fields(kind)}.get(part, kind)
        kind = next((choice for choice in _choices(kind) if getattr(choice, "name", None) == part), kind)
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _choices(kind: Any) -> list[Any]:
    """The settings classes of a union told apart by `name`; none for anything else."""
    union = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return [member for member in get_args(union) if dataclasses.is_dataclass(member)]


def leaves(path: tuple[str, ...], node: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in nested tables below `path`."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves((*path, key), value)
    else:
        yield ".".join(path), node


def _write_table(lines: list[str], path: tuple[str, ...], table: Mapping[str, Any]) -> None:
    if path:
        lines.append(f"\n[{'.'.join(path)}]")
    nested = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines.extend(f"{key} = {_toml_value(value)}" for key, value in table.items() if key not in nested)
    for key, value in nested.items():
        _write_table(lines, (*path, key), value)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
