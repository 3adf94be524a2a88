"""What a checkpoint says of itself: where it stands in the run, and which file holds which numbers of which tensor."""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.errors import DataError
from datapipe.storage import Store, unsafe

MOST_BYTES = 256 << 20
"""Of a marker: a part of a tensor takes 100 of them."""
MOST_NUMBER = 1 << 53
LATEST_S = 2.5e11
"""The last time that a calendar has, the year 9892."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Type of a tensor, as safetensors names it -> bytes of a number."""
FORMAT = 2
MARKER = "checkpoint.json"
_NAME = re.compile(r"step_(\d{7,})")


class Form(NamedTuple):
    """Shape of a whole tensor, and its type as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


class Fragment(NamedTuple):
    """A stretch of a flattened tensor in a file."""

    key: str
    start: int
    """Place of the first number in the tensor."""
    numel: int
    offset: int
    """Place of the first byte in the file."""
    xxh3: str
    """Checksum of the file's bytes, 128 bits: quick, against accidents. Another kind has its name
    in front (`digest.py`)."""


@dataclass(frozen=True)
class RankFile:
    """What one rank wrote."""

    name: str
    bytes: int
    sha256: str
    fragments: tuple[Fragment, ...]
    """In the order in which they lie in the file."""


@dataclass(frozen=True, kw_only=True)
class Marker:
    """Everything but the numbers. Written last."""

    step: int
    samples: int
    manifest: str
    manifest_rows: int
    seed: int
    batch: int
    world: int
    tensors: dict[str, Form]
    """"model/..." or the optimizer's name of it, such as "exp_avg/...", and the parameter's or buffer's name."""
    files: tuple[RankFile, ...]
    steps: dict[str, float]
    """The optimizer's step count of each parameter that it has begun with; 0 where it does not count."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """The fields of `LossScale`; empty where the loss was not scaled."""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    """The pretrained weights that the run began with, where it did."""
    time: float = 0.0
    term: int = 0
    """Term of the run's lease (`training/core/run_folder/lease.py`); 0: written without one."""
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """The digest of the whole marker, hence of every number in the checkpoint."""
        return _digest(self._content())

    def to_bytes(self) -> bytes:
        """As it is stored: JSON with its own checksum. Step and term come first, for those who need no more."""
        content = self._content()
        head = {key: content[key] for key in ("step", "term") if key in content}
        return json.dumps(head | content | {"sha256": self.sha256}, separators=(",", ":")).encode()

    def _content(self) -> dict[str, Any]:
        """Without a term it is what it was before there were terms."""
        content = asdict(self)
        return content if self.term else {key: value for key, value in content.items() if key != "term"}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_from(content: dict[str, Any]) -> RankFile:
    """The inverse of `asdict`. Raises ValueError where the name is not one of a file in the checkpoint's own folder."""
    name = content["name"]
    why = unsafe(name) or ("it leads into another folder" if "/" in name else "")
    if why or name == MARKER:
        raise ValueError(f"it names the file {name!r}, which cannot be one of its own: {why or 'it is the marker'}")
    fragments = tuple(Fragment(*row) for row in content["fragments"])
    return RankFile(name, content["bytes"], content["sha256"], fragments)


def name_of(step: int) -> str:
    """The folder of a checkpoint: `step_0000100`, steps done."""
    return f"step_{step:07d}"


def step_of(name: str) -> int | None:
    """The steps done that a folder name states; None for another name."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def completed(files: Iterable[str]) -> list[str]:
    """Names of the checkpoints that have their marker, oldest first, from the names of all files below the folder."""
    return in_steps(folder for folder, _, file in (name.rpartition("/") for name in files) if file == MARKER)


def in_steps(names: Iterable[str]) -> list[str]:
    """Names of checkpoints, oldest first; other names are left out."""
    return sorted((name for name in names if step_of(name) is not None), key=lambda name: step_of(name) or 0)


def was_pruned(store: Store, name: str) -> bool:
    """Is a checkpoint that was complete gone? A run that goes on deletes old ones at any time, their markers first, so
    ask this where reading one failed: it may be neither damaged nor a mistake."""
    return not store.exists(f"{name}/{MARKER}")


def read_marker(store: Store, name: str) -> Marker:
    """Raises DataError for a marker that is damaged, of another format, or of another step than the name says."""
    return parsed_marker(read_bytes(store, name), store, name)


def read_bytes(store: Store, name: str) -> bytes:
    """The marker of a checkpoint as it is stored. Raises NotFoundError, and DataError where it is no marker's size."""
    return store.read_small(f"{name}/{MARKER}", MOST_BYTES, what="the checkpoint's marker", hint="delete it")


def parsed_marker(data: bytes, store: Store, name: str) -> Marker:
    """A marker from its bytes; raises as `read_marker` does."""
    try:
        content = parse_record(data)
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')}, this version reads {FORMAT}")
        stated = content.pop("sha256", None)
        if stated != _digest(content):
            raise ValueError("its checksum is wrong")
        content["tensors"] = {key: _form(*form) for key, form in content["tensors"].items()}
        content["files"] = tuple(file_from(file) for file in content["files"])
        marker = Marker(**content)
        _refuse_senseless(marker)
        _refuse_gaps(marker)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(
            f"the checkpoint's marker is damaged: {error}", where=store.address(f"{name}/{MARKER}"), hint="delete it"
        ) from error
    if step_of(name) != marker.step:
        raise DataError(
            f"this is a copy of a checkpoint, or was renamed: its marker is that of step {marker.step:,}",
            where=store.address(name), hint=f"call it {name_of(marker.step)}, or delete it",
        )  # fmt: skip
    return marker


def _form(shape: Any, dtype: Any) -> Form:
    """Raises ValueError for what is no form of a tensor."""
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape) or dtype not in SIZES:
        raise ValueError(f"a tensor of shape {shape} and type {dtype}")
    return Form(tuple(shape), dtype)


def _refuse_senseless(marker: Marker) -> None:
    """Raises ValueError for numbers that are none, and for fragments that do not lie within the bytes of their file."""
    counts = {name: getattr(marker, name) for name in ("step", "samples", "manifest_rows", "batch", "world", "term")}
    for name, number in counts.items():
        if type(number) is not int or not 0 <= number < MOST_NUMBER:
            raise ValueError(f"{name} is {number!r}")
    if type(marker.time) not in (int, float) or not 0 <= marker.time < LATEST_S:
        raise ValueError(f"time is {marker.time!r}")
    for file in marker.files:
        if type(file.bytes) is not int or not 0 <= file.bytes < MOST_NUMBER or not isinstance(file.sha256, str):
            raise ValueError(f"{file.name} is said to have {file.bytes!r} bytes")
        for fragment in file.fragments:
            place = (fragment.start, fragment.numel, fragment.offset)
            if any(type(number) is not int or number < 0 for number in place) or not isinstance(fragment.xxh3, str):
                raise ValueError(f"a part of {fragment.key} lies at {place}")
            if fragment.offset + fragment.numel * SIZES[marker.tensors[fragment.key].dtype] > file.bytes:
                raise ValueError(f"a part of {fragment.key} lies behind the {file.bytes:,} bytes of {file.name}")


def _refuse_gaps(marker: Marker) -> None:
    """Raises ValueError unless the files hold every number of every tensor once."""
    ranges_of_key: dict[str, list[tuple[int, int]]] = {key: [] for key in marker.tensors}
    for file in marker.files:
        for fragment in file.fragments:
            ranges_of_key[fragment.key].append((fragment.start, fragment.start + fragment.numel))
    for key, ranges in ranges_of_key.items():
        ranges.sort()
        edges = [0, *(end for _, end in ranges)]
        if [start for start, _ in ranges] != edges[:-1] or edges[-1] != math.prod(marker.tensors[key].shape):
            raise ValueError(f"its files do not hold {key} whole")
