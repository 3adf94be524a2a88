"""What follows the name of each command of `python -m training`, as settings; needs no PyTorch."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from datapipe.core.cli import INLINE, POSITIONAL, REPEATED, Arg
from datapipe.core.config import Size, Statistics, StorageConfig
from datapipe.core.settings import settings
from training.grid.request import (
    WITH_LABELS,
    GridTask,
    NamedAddress,
    TaskKind,
    is_grid,
    read_address,
    read_tasks,
    split_flags,
)
from training.reid.settings import ScoringConfig


@settings
class EvaluateCommand:
    weights: Annotated[tuple[str, ...], POSITIONAL] = ()
    """Run folder, one of its checkpoints, folder of an export or import, or a file of published weights, local or
    s3://bucket/prefix; "random" with tasks that train: none. Several, or NAME=ADDRESS, for a grid."""
    data: Annotated[tuple[str, ...], REPEATED]
    """Labelled data set: a folder or s3://bucket/prefix with its files, or its shards. In a grid several of them;
    NAME=ADDRESS names one, and says what it is where the name is that of a published data set."""
    features: str = ""
    """In place of weights: a parquet file with a feature of every image of query and gallery, from `embed` or any other
    tool: a row each with `key` or `name`, and `feature`, a list of numbers."""
    tasks: str = "zero-shot"
    """A list with commas. "zero-shot": retrieval with the features as they are. "supervised": fine-tune on the training
    part first; "usl": train on it without its labels; "uda:SOURCE": the same after fine-tuning on the data set SOURCE;
    "transfer:SOURCE": score what was fine-tuned there as it is. All flags of a recipe may follow those that train, such
    as --optimisation.epochs 60; --usl.optimisation.epochs 60 is for that task alone."""
    out: str = ""
    """Folder for the scores; of a task that trains its run folder, of a grid that of all cells. Empty: that of the
    weights."""
    recipe: Annotated[tuple[str, ...], REPEATED] = ()
    """Training: a TOML file, or supervised, supervised_384, supervised_pass, supervised_mae, usl_market, usl_msmt17,
    usl_pass_market, usl_pass_msmt17, uda_pass_market, uda_pass_msmt17, demo_usl; with several tasks TASK=RECIPE.
    Empty: the one that suits weights and data."""
    every_checkpoint: bool = False
    """A grid of every complete checkpoint of the runs, not of the newest alone: scores over pre-training."""
    follow: bool = False
    """With --every-checkpoint: go on with checkpoints as they appear, as long as somebody trains there."""
    dry_run: bool = False
    """Say which cells there are, and of those that train sizes, memory, time, and what differs from the publication;
    train and score nothing."""
    label_fraction: float = 1.0
    """Share of the training identities that fine-tuning may use."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Arg(aliases=("--engine.device",))] = "auto"
    """"auto": a GPU where there is one; "cuda": an error where there is none."""
    scoring: Annotated[ScoringConfig, INLINE] = ScoringConfig()
    """How the data set is taken and scored."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""

    @property
    def chosen_tasks(self) -> tuple[GridTask, ...]:
        """The tasks, read. Raises ConfigError for what is none."""
        return read_tasks(self.tasks)

    @property
    def is_grid(self) -> bool:
        """Is it more than one evaluation?"""
        return self.every_checkpoint or is_grid(self.weights, self.data, self.chosen_tasks)

    @property
    def task(self) -> TaskKind:
        """The task, where there is one."""
        return self.chosen_tasks[0].kind

    def recipe_flags(self, flags: Sequence[str]) -> dict[TaskKind, list[str]]:
        """Flags of the recipes, by kind of training, those first that other flags of the command stand for."""
        fraction = ["--method.label-fraction", str(self.label_fraction)] if self.label_fraction < 1 else []
        device = ["--engine.device", self.device] if self.device != "auto" else []
        return {kind: [*(fraction if kind == WITH_LABELS else ()), *device, *own]
                for kind, own in split_flags(flags).items()}  # fmt: skip

    @property
    def named_weights(self) -> tuple[NamedAddress, ...]:
        """The weights, with the names that they were given."""
        return tuple(map(read_address, self.weights))

    @property
    def named_data(self) -> tuple[NamedAddress, ...]:
        """The data sets, with the names that they were given."""
        return tuple(map(read_address, self.data))

    @property
    def only_weights(self) -> str:
        """The address of the weights, where there is one set of them; empty: features are given."""
        return self.named_weights[0].address if self.weights else ""

    @property
    def only_data(self) -> str:
        """The address of the data set, where there is one."""
        return self.named_data[0].address


@settings
class EmbedCommand:
    weights: Annotated[str, POSITIONAL]
    """Run folder (its newest checkpoint), checkpoint, folder of an export or import, or a file of published weights,
    local or s3://bucket/prefix."""
    data: str
    """Shards of any size: their folder or one manifest; or a labelled data set as `evaluate` takes it."""
    out: str
    """The parquet file, local or s3://bucket/name.parquet. Beside it, NAME.parquet.pieces-* holds what is finished of
    one that is being made."""
    feature: str = ""
    """"cls", "mean" (of the patches); of weights with part tokens also "cls+parts" (one after the other),
    "cls_parts_mean", "parts" (their mean) and "each_part". Empty: the one that the method quotes."""
    dtype: Literal["float32", "float16"] = "float32"
    """Numbers in the file."""
    data_name: str = ""
    """What a labelled data set is, as for `evaluate`. Empty: it is recognised."""
    allow_partial: bool = False
    """Go on where images of a published data set are missing, or where train and test overlap."""
    embed_batch: int = Field(default=64, ge=1)
    """Images embedded at once. Lower it when memory runs out; features stay the same up to rounding."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the forward pass: bf16 or fp16 on a GPU with many images."""
    threads: int = Field(default=2, ge=1)
    """Threads that read, decode and resize, for each device at work. More of them keep a fast GPU busy."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Arg(aliases=("--engine.device",))] = "auto"
    """"auto": a GPU where there is one; "cuda": an error where there is none."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class ReproduceCommand:
    row: Annotated[str, POSITIONAL] = ""
    """Name of a published row, or a TOML file with a row of your own."""
    list: bool = False
    """Print every row: name, mAP, Rank-1, what its authors' code gave them again, tolerance, source."""
    weights: str = ""
    """File of published weights, folder of an export or import, or run folder, local or s3://bucket/prefix. Weights
    that are fine-tuned already are scored as they are; others are fine-tuned first, as the row says."""
    data: str = ""
    """The row's data set: a folder or s3://bucket/prefix with its files, or its shards."""
    source: str = ""
    """Of a row of domain adaptation the data set that is trained on with labels first, for weights that are not
    fine-tuned on it yet; likewise."""
    out: str = ""
    """Folder for scores, report and, where it takes one, the run. Started again with the same folder, it goes on.
    Empty: reproductions/ROW."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class ExportCommand:
    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    checkpoint: str = ""
    """Name of the checkpoint, e.g. step_0012000. Empty: the newest that verifies."""
    out: str = ""
    """Folder for backbone.safetensors and card.json. Empty: exports/ of the run."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class ImportCommand:
    file: Annotated[str, POSITIONAL]
    """Published weights: .pth, .pt, .pth.tar or .safetensors, local or s3://bucket/prefix/name. Nothing in it is
    run."""
    out: str
    """Folder for backbone.safetensors and card.json."""
    layout: Annotated[str, Arg(name="as")] = ""
    """What the file must be, e.g. pass, personvit_checkpoint or vit; a file of another layout is refused with the
    list of all. Empty: its keys tell."""
    network: Literal["teacher", "student"] = "teacher"
    """Which network of a training checkpoint. The published backbones are teachers."""
    size: Size | None = None
    """Image size (height, width) to resize the position table for. None: that of the file."""
    native: Size | None = None
    """Image size that the file's position table was made for. None: as its length tells, for images twice or three
    times as high as wide and for squares."""
    positions: Literal["bicubic", "bilinear"] = "bilinear"
    """How positions are resized: "bilinear" for evaluation and fine-tuning, "bicubic" for going on with pre-training,
    both as the references do."""
    statistics: Statistics | None = None
    """What images are normalised with: "imagenet" or "half" (.5, .5), which some weights of timm want. None: as the
    layout's family does."""
    heads: int = 0
    """Attention heads. 0: those of the published transformer of that width."""
    depth: int = 0
    """Number of blocks. 0: those of the published transformer of that width."""
    fusion: Literal["", "cat", "mean"] = ""
    """How CLS and part tokens are put together, of weights that were trained on a ReID data set: "cat" or "mean", as
    `method.fusion`. A classifier or a single neck tells by its width; the file of several necks does not say (PASS,
    without labels: "cat" on Market-1501, "mean" on MSMT17). Empty: as the file tells, else "cat"."""
    licence: str = ""
    """Licence of the weights and their data, for the card."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class ReportCommand:
    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class ListCommand:
    """List a run's checkpoints; RUN verify reads them, RUN compare A B tells how two differ, RUN prune deletes old
    ones."""

    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class VerifyRunCommand:
    """Read checkpoints and compare them with their checksums."""

    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    names: Annotated[tuple[str, ...], POSITIONAL] = ()
    """Names of checkpoints, e.g. step_0012000. None: all."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class CompareCommand:
    """Tell how two checkpoints differ; the exit code is 0 where training would go on alike from both."""

    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    a: Annotated[str, POSITIONAL]
    """A checkpoint of the run (step_0012000), another run's folder (its newest), or the folder of a checkpoint."""
    b: Annotated[str, POSITIONAL]
    """The checkpoint to compare with, likewise."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class PruneCommand:
    """Delete all but the newest good checkpoints, and what crashed attempts left behind them."""

    run: Annotated[str, POSITIONAL]
    """Run folder, local or s3://bucket/prefix."""
    keep_last: Annotated[int, Field(ge=1)]
    """How many of the newest checkpoints that verify stay."""
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """Those at multiples of this stay too. 0: none."""
    dry_run: bool = False
    """Only say what would be deleted."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class NoFlags:
    """A command without any."""


@settings
class RecipeCommand:
    recipe: Annotated[str, POSITIONAL]
    """A TOML file, or one of the recipes above."""


@settings
class PretrainCommand(RecipeCommand):
    dry_run: bool = False
    """Say whether it fits, what to change, how many steps it takes, and how it differs from the publication; start
    nothing. Needs no data set and no GPU."""
    full: bool = False
    """With --dry-run: also memory in parts, parameters, sources of what is published, and the resolved recipe."""
    json: bool = False
    """With --dry-run: all of it, for programs; memory in bytes."""
    rows: Annotated[int, Field(gt=0)] | None = None
    """With --dry-run: images of a data set that is not at hand. None: LUPerson's."""
    gpu: str | None = None
    """With --dry-run: GPU that time is calculated for, "H100" or as the driver names it, and whose memory it must fit.
    None: this machine's; without one both an A100 and an H100 are shown."""
    gpu_memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """With --dry-run: memory of a GPU, 10^9 bytes. None: that of --gpu, else of this machine's, if any."""
