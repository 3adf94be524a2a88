"""One frozen tree configures a run: read from one TOML recipe, overridden by dotted flags, saved resolved."""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from datapipe.config import StorageConfig, StreamConfig, ViewConfig
from datapipe.errors import ConfigError
from datapipe.settings import settings
from training.backbone import BackboneConfig
from training.checkpoint.settings import CheckpointConfig
from training.cluster_config import ClusterConfig
from training.engine.settings import EngineConfig, OptimisationConfig
from training.initial_weights import InitConfig
from training.methods import METHODS, MethodConfig
from training.methods.pass_reid import PassConfig
from training.reid.scoring import EvaluationConfig


@settings
class RunConfig:
    out: str = "runs/pretraining"
    """Run folder, local or s3://bucket/prefix. Started again with the same folder, a run goes on."""
    seed: int = Field(default=0, ge=0)
    """Fixes initial weights, sample order, crops, colours and dropped paths."""
    samples_per_epoch: int = Field(default=0, ge=0)
    """Length of an epoch in samples; schedules hang on it. 0: the rows of the data set."""
    stream: StreamConfig = StreamConfig()
    """Where samples come from."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""
    views: ViewConfig = ViewConfig()
    """How views are cut and coloured."""
    backbone: BackboneConfig = BackboneConfig()
    """The vision transformer."""
    init: InitConfig = InitConfig()
    """Pretrained weights to start from."""
    method: MethodConfig = Field(default=PassConfig(), discriminator="name")
    """The objective and its own settings; `name` chooses it."""
    optimisation: OptimisationConfig = OptimisationConfig()
    """Optimizer, schedules, precision."""
    engine: EngineConfig = EngineConfig()
    """How a step is carried out."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """What is saved, when, and how long it stays."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is scored while the run goes on."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers and restarts under Ray."""


_SCHEMA: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)

SHIPPED = Path(__file__).parent / "recipes"
"""Where the recipes are that come along."""


def load(path: str | Path, overrides: Sequence[str] = (), *, prog: str | None = None) -> RunConfig:
    """Read a recipe and apply dotted flags such as `--optimisation.lr 1e-3`. One that comes along may be named without
    its folder: `pass_vits`.

    All mistakes of the file are reported at once; a misspelt key is refused with the nearest right one.

    Raises:
        ConfigError: no such file, no TOML, or wrong keys or values.
        SystemExit: a flag is wrong (exit code 2, with a suggestion) or asks for help.
    """
    known = {file.stem: file for file in sorted(SHIPPED.glob("*.toml"))}
    recipe = Path(path)
    recipe = recipe if recipe.is_file() else known.get(str(path), recipe)
    if not recipe.is_file():
        hint = f"a TOML file; recipes that come along: {', '.join(known)}"
        raise ConfigError("no such recipe", where=str(path), hint=hint)
    try:
        tree = tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not a TOML file: {error}", where=str(path), hint="check quotes and brackets") from error
    return override(validate(tree, where=str(path)), overrides, prog=prog)


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
            hint="`python -m training pretrain RECIPE --help` documents every key",
        ) from None


def override(config: RunConfig, flags: Sequence[str], *, prog: str | None = None) -> RunConfig:
    """Apply dotted flags with help, types and suggestions from the tree itself."""
    return tyro.cli(
        RunConfig,
        default=config,
        args=list(flags),
        prog=prog,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )


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
        return f"`{name}.name` must be one of {', '.join(METHODS)}"
    return f"`{_without_tag(location)}` = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _without_tag(location: Sequence[str]) -> str:
    """`method.pass.part` -> `method.part`: the union's tag is no key of the file."""
    parts = list(location)
    if len(parts) >= 2 and parts[0] == "method" and parts[1] in METHODS:
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
