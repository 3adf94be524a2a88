"""The tensors of a checkpoint: verified file by file, read by ranges, each fragment checked by its hash."""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from datapipe.core.errors import DataError, NotFoundError
from datapipe.core.parallel import in_order
from datapipe.core.progress import QUIET_S, Progress
from datapipe.storage import Store, is_remote
from training.checkpoint.digest import matches
from training.checkpoint.lineage import complete
from training.checkpoint.machine_blocks import MachineBlocks
from training.checkpoint.metadata import Form, Fragment, Marker, RankFile, read_marker
from training.checkpoint.snapshot import TYPES
from training.engine.state_fragments import Piece, whole
from training.methods.base import Method
from training.weights.counted_keys import check_counted

BLOCK = 8 << 20
"""Bytes read at a time: fragments that lie side by side are fetched together up to this many."""
IN_FLIGHT = 16
"""Reads at a time from remote stores by each rank; local disks are read one after the other."""
HINT = "use an older checkpoint, or delete this one"


class DamageError(DataError):
    """What was read of a checkpoint is not what was written."""


def verify(store: Store, name: str, files: Sequence[RankFile]) -> None:
    """Raises DataError or NotFoundError for the first of these files of a checkpoint that is not as it was written."""
    for file in files:  # before as many reads are planned as a marker asks for
        path = f"{name}/{file.name}"
        if file.bytes >= BLOCK and store.size(path) != file.bytes:
            raise _of_other_size(store, path, file.bytes)
    asks = [_whole(f"{name}/{file.name}", file.bytes) for file in files]
    answers = _answers(store, chain.from_iterable(asks))
    with Progress(f"verify {name}", sum(file.bytes for file in files) / 1e6, unit="MB", quiet_s=QUIET_S) as progress:
        for file, parts in zip(files, asks, strict=True):
            _verify(store, f"{name}/{file.name}", file, (next(answers) for _ in parts), progress)


def _verify(store: Store, path: str, file: RankFile, blocks: Iterator[bytes], progress: Progress) -> None:
    size, digest = 0, hashlib.sha256()
    for block in blocks:
        size += len(block)
        digest.update(block)
        progress.advance(len(block) / 1e6)
        del block  # before the next one is read
    if size != file.bytes:
        raise _of_other_size(store, path, file.bytes)
    if digest.hexdigest() != file.sha256:
        raise DataError("the checksum of a file is wrong", where=store.address(path), hint=HINT)


def _of_other_size(store: Store, path: str, wanted: int) -> DataError:
    return DataError(f"a file has {store.size(path):,} bytes, should have {wanted:,}", where=store.address(path),
                     hint=HINT)  # fmt: skip


def newest_good(store: Store, warn: Callable[[str], None]) -> tuple[str, Marker] | None:
    """The newest checkpoint that verifies. A damaged one is passed over with a warning for the one before it."""
    for name in reversed(complete(store, warn)):
        try:
            marker = read_marker(store, name)
            verify(store, name, marker.files)
            return name, marker
        except (DataError, NotFoundError) as error:
            warn(passed_over(name, error))
    return None


def passed_over(name: str, error: DataError | NotFoundError) -> str:
    """The warning about a damaged checkpoint."""
    return f"warning: checkpoint {name} is passed over: {error.what} ({error.where})"


class _Ask(NamedTuple):
    """Bytes of a file; fewer where it ends before."""

    path: str
    start: int
    size: int


def _whole(path: str, total: int) -> list[_Ask]:
    """All of a file; of a small one a byte more than it should have, which saves asking for its size."""
    if total < BLOCK:
        return [_Ask(path, 0, total + 1)]
    return [_Ask(path, start, min(BLOCK, total - start)) for start in range(0, total, BLOCK)]


def _answers(store: Store, asks: Iterable[_Ask]) -> Iterator[bytes]:
    def read(ask: _Ask) -> bytes:
        return store.read(ask.path, start=ask.start, size=ask.size)

    return in_order(read, asks, threads=IN_FLIGHT if is_remote(store.url) else 0)


class _Copy(NamedTuple):
    """Numbers that a piece wants out of a fragment."""

    file: str
    fragment: Fragment
    bytes: int
    """Size of the whole fragment, which is checked as a whole."""
    piece: Piece

    @property
    def end(self) -> int:
        return self.fragment.offset + self.bytes


_NOBODY = Piece("", (), 0, torch.empty(0), shared=False)


class _Stretch(NamedTuple):
    """Bytes of a file that are read together, and what is wanted of them."""

    file: str
    start: int
    size: int
    copies: list[_Copy]


class Reader:
    """The tensors of one checkpoint, without reading more than is asked for, or holding more than about one of them,
    IN_FLIGHT from a remote store."""

    def __init__(
        self, store: Store, name: str, marker: Marker | None = None, *, shared: MachineBlocks | None = None
    ) -> None:
        """`shared`: reads go by whole blocks, which the ranks of a machine share. Raises DataError for a damaged
        marker."""
        self.store, self.name, self._shared = store, name, shared
        self.marker = marker or read_marker(store, name)
        self._files = {file.name: file for file in self.marker.files}
        self._fragments: dict[str, list[tuple[str, Fragment]]] = {key: [] for key in self.marker.tensors}
        for file in self.marker.files:
            for fragment in file.fragments:
                self._fragments[fragment.key].append((file.name, fragment))

    @property
    def where(self) -> str:
        return self.store.address(self.name)

    def forms(self, kind: str) -> dict[str, Form]:
        """Names and forms of the tensors of one kind, such as "model"."""
        start = f"{kind}/"
        return {key.removeprefix(start): form for key, form in self.marker.tensors.items() if key.startswith(start)}

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Write the saved values into the pieces. Raises DataError where the checkpoint has no such tensor, or a
        fragment is damaged."""
        copies = sorted((copy for piece in pieces for copy in self._wanted(piece)),
                        key=lambda copy: (copy.file, copy.fragment.offset))  # fmt: skip
        files = [(file, list(rows)) for file, rows in groupby(copies, key=lambda copy: copy.file)]
        if self._shared is None:
            stretches = [stretch for _, rows in files for stretch in _stretches(rows)]
        else:
            stretches = self._shared.in_turn([block for file, rows in files for block in self._blocks(file, rows)])
        threads = IN_FLIGHT if is_remote(self.store.url) else 0
        answers = in_order(self._read, stretches, threads=threads)
        for stretch in stretches:
            self._take(stretch, next(answers))

    def whole(self, key: str) -> Tensor:
        """One tensor, put together."""
        form = self.marker.tensors[key]
        tensor = torch.empty(form.shape, dtype=TYPES[form.dtype])
        self.fill([whole(key, tensor)])
        return tensor

    def _wanted(self, piece: Piece) -> Iterator[_Copy]:
        form = self.marker.tensors.get(piece.key)
        if form is None or form.shape != piece.shape:
            has = "nothing" if form is None else f"shape {form.shape}"
            raise DataError(f"the checkpoint does not fit: it has {has} for {piece.key} {piece.shape}",
                            where=self.where, hint="was it made with these settings?")  # fmt: skip
        for file, fragment in self._fragments[piece.key]:
            if fragment.start < piece.end and piece.start < fragment.start + fragment.numel:
                yield _Copy(file, fragment, self._bytes(fragment), piece)

    def _blocks(self, file: str, copies: list[_Copy]) -> Iterator[_Stretch]:
        """What this rank wants of a file, in blocks that all ranks cut alike: parameters, which as a rule all want, and
        what else there is, in blocks of their own."""
        wanted = defaultdict(list)
        for copy in copies:
            wanted[copy.fragment.offset].append(copy)
        every = [_Copy(file, fragment, self._bytes(fragment), _NOBODY) for fragment in self._files[file].fragments]
        for _, kind in groupby(every, key=lambda copy: copy.fragment.key.startswith("model/")):
            for block in _stretches(kind):
                inside = [copy for held in block.copies for copy in wanted.get(held.fragment.offset, ())]
                if inside:
                    yield block._replace(copies=inside)

    def _read(self, stretch: _Stretch) -> bytes:
        file, start, size, _ = stretch
        if self._shared is None:
            return self._read_store(stretch)
        return self._shared.load(file, start, size, lambda: self._read_store(stretch))

    def _read_store(self, stretch: _Stretch) -> bytes:
        return self.store.read(f"{self.name}/{stretch.file}", start=stretch.start, size=stretch.size)

    def _take(self, stretch: _Stretch, content: bytes) -> None:
        try:
            self._copy(stretch, memoryview(content))
        except DamageError:
            if self._shared is None:
                raise
            self._shared.forget(*stretch[:3])
            self._copy(stretch, memoryview(self._read_store(stretch)))

    def _copy(self, stretch: _Stretch, content: memoryview) -> None:
        for copy in stretch.copies:
            begin = copy.fragment.offset - stretch.start
            data = content[begin : begin + copy.bytes]
            if not matches(data, copy.fragment.xxh3):
                raise DamageError(f"the checksum of {copy.fragment.key} is wrong",
                                  where=self.store.address(f"{self.name}/{stretch.file}"), hint=HINT)  # fmt: skip
            self._place(copy, data)

    def _bytes(self, fragment: Fragment) -> int:
        return fragment.numel * TYPES[self.marker.tensors[fragment.key].dtype].itemsize

    def _place(self, copy: _Copy, data: memoryview) -> None:
        dtype = TYPES[self.marker.tensors[copy.fragment.key].dtype]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the bytes cannot be written to, which nobody does
            values = torch.frombuffer(data, dtype=dtype)
        fragment, piece = copy.fragment, copy.piece
        low, high = max(fragment.start, piece.start), min(fragment.start + fragment.numel, piece.end)
        piece.values[low - piece.start : high - piece.start] = values[low - fragment.start : high - fragment.start].to(
            piece.values.device
        )


def _stretches(copies: Iterable[_Copy]) -> Iterator[_Stretch]:
    """Fragments of a file that lie side by side, together up to BLOCK bytes; a larger one by itself."""
    held: list[_Copy] = []
    start = end = 0
    for copy in copies:
        if held and (copy.fragment.offset > end or copy.end - start > max(BLOCK, end - start)):
            yield _Stretch(held[0].file, start, end - start, held)
            held = []
        if not held:
            start, end = copy.fragment.offset, copy.end
        held.append(copy)
        end = max(end, copy.end)
    if held:
        yield _Stretch(held[0].file, start, end - start, held)


def load_model(store: Store, name: str, method: Method) -> Marker:
    """Fill student, teacher and centres from a checkpoint by counted keys; its marker. Raises DataError."""
    reader = Reader(store, name)
    method.adopt_shapes({key: form.shape for key, form in reader.forms("model").items()})
    state = method.state_dict()
    refuse_misfit(reader, {key: tuple(value.shape) for key, value in state.items()})
    reader.fill([whole(f"model/{key}", value) for key, value in state.items()])
    return reader.marker


def refuse_misfit(reader: Reader, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises DataError, naming them, where a checkpoint's parameters and buffers are not these."""
    check_counted(shapes, reader.forms("model"), where=reader.where)
