"""One frozen tree configures a run: read from one TOML recipe, overridden by dotted flags, saved resolved."""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from datapipe.config import Range, StorageConfig, StreamConfig, ViewConfig
from datapipe.errors import ConfigError
from datapipe.settings import settings
from training.backbone import BackboneConfig
from training.cluster_config import ClusterConfig
from training.initial_weights import InitConfig
from training.methods import METHODS, MethodConfig
from training.methods.base import Precision
from training.methods.pass_reid import PassConfig
from training.reid.scoring import ScoringConfig


@settings
class OptimisationConfig:
    epochs: float = Field(default=100.0, gt=0)
    """Passes over the data set. The run is as many whole global batches as fit in."""
    batch: int = Field(default=512, ge=1)
    """Images in one optimizer step, over all ranks and micro-batches."""
    micro_batch: int = Field(default=64, ge=0)
    """Most images that one rank takes through forward and backward at once; the memory dial. Changes no result
    beyond rounding: gradients, centres and metrics are sums over the global batch. 0: all images of the rank,
    however many ranks there are, for methods that couple the images of a batch (Sinkhorn, batch norm in the stem)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """"sgd": with momentum, for the published fine-tuning; its weight decay is not decoupled."""
    schedule: Literal["step", "epoch"] = "step"
    """When the learning rate changes. "step": at every step, as in pre-training; "epoch": once an epoch, along the
    cosine of timm as TransReID's fine-tuning has it, which the warm-up does not delay."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate, for this very batch. The published recipes use 5e-4 * batch / 256."""
    final_lr: float = Field(default=1e-6, ge=0)
    """Learning rate that the cosine falls to."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    """Epochs in which the learning rate rises linearly."""
    warmup_lr: float = Field(default=0.0, ge=0)
    """Learning rate that it rises from."""
    betas: Range = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's decay of the velocity."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Decoupled weight decay at the start; the method says what is exempt, as a rule biases and norms."""
    final_weight_decay: float = Field(default=0.4, ge=0)
    """Weight decay at the end, along a cosine."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each depth over that of the next deeper one. 1: all learn alike, as in the published
    pre-training; .4 to .75 for fine-tuning masked autoencoders."""
    clip: Literal["tensor", "global", "none"] = "tensor"
    """"tensor": every parameter's gradient to norm clip_norm by itself, as the DINO family does; "global": all
    together; "none"."""
    clip_norm: float = Field(default=3.0, gt=0)
    """Largest gradient norm."""
    ema: float = Field(default=0.996, ge=0, le=1)
    """Teacher momentum at the start. Short runs need a shorter memory: .9 for a few hundred steps."""
    final_ema: float = Field(default=1.0, ge=0, le=1)
    """Teacher momentum at the end, along a half cosine."""
    ema_points: tuple[Range, ...] = ()
    """(epoch, teacher momentum) corners of a piecewise linear course in place of that cosine, one value per epoch, as
    BootMAE has it. Empty: the cosine."""
    precision: Precision = "bf16"
    """Autocast of the backbone; parameters, heads and losses are fp32 always, the teacher's too. "fp16" is for GPUs
    without bf16 units (Turing: T4, RTX 20) and scales the loss so that small gradients survive. On CPUs measure bf16
    first."""


@settings
class EngineConfig:
    stepper: Literal["deepspeed", "plain"] = "deepspeed"
    """"plain": PyTorch alone, gradients by one all-reduce; the yardstick, any precision, one process or a few."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters are split over the ranks
    (student and teacher). Results are the same; 1 is the fastest where the model fits."""
    bucket: int = Field(default=50_000_000, ge=1)
    """Parameters reduced together by DeepSpeed. Smaller saves memory. Changes the last bits of sums."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"cuda": a GPU for each rank, an error where there is none. "auto": GPUs where Ray offers any or its autoscaler
    can bring some (without Ray: where torch finds one), else CPUs; a run that was on GPUs does not go on on CPUs.
    Decided once, when the command starts."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of PyTorch per rank. 0: the cores divided by the ranks on this machine."""
    deterministic: bool = False
    """On a GPU: a run that is stopped and goes on, or is done again, has bit-identical weights, on the same number and
    kind of GPUs with the same versions; slower. On a CPU in fp32 that holds without it. README: what it does not cover.
    """
    audit: bool = False
    """Write the samples of every step and rank to ranks/audit_*.jsonl: proof that none is lost or doubled."""


@settings
class CheckpointConfig:
    every_steps: int = Field(default=1_000, ge=0)
    """Optimizer steps between checkpoints: at most this much is redone after a crash. 0: every_minutes alone tells."""
    every_minutes: float = Field(default=0.0, ge=0)
    """Minutes between checkpoints, whichever of the two comes first. 0: every_steps alone tells."""
    max_failed_saves: int = Field(default=3, ge=1)
    """Checkpoints in a row that may fail to be written (store away, disk full) until the run ends, resumable."""
    keep_last: int = Field(default=2, ge=2)
    """Newest checkpoints that stay. At least two: a damaged one falls back to the one before."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this are made and stay for evaluation. 0: none besides the newest."""
    keep_every_epochs: float = Field(default=0.0, ge=0)
    """The same by epochs: the first step at or after each multiple."""


@settings
class EvaluationConfig:
    """Scores of the run's own weights, by retrieval, while it goes on."""

    data: str = ""
    """Test set, as `python -m training evaluate --data` takes it. Empty: none."""
    every_epochs: float = Field(default=0.0, ge=0)
    """Epochs between scores; the end is always scored. 0: only the end."""
    quote: Literal["last", "best"] = "last"
    """Which score is the run's result. The best of several on a test set was chosen on the test set, and is reported
    as that."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How test images are resized. TransReID bilinear, HAP bicubic."""
    scoring: ScoringConfig = ScoringConfig()
    """What the test set is, and how features are scored on it."""


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
