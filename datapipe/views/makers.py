"""Who decodes images and makes views of them: the thread that asks, or processes, in slots of memory that they share.

Threads of the process that trains share its interpreter: whatever they do in Python delays the launching of the GPU's
work. With processes they only fetch bytes and wait. Which pixels come of an image is a function of (seed, position), so
nothing changes but who makes them.
"""

import importlib
import mmap
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import reduction
from typing import Any, NamedTuple, Protocol

import numpy as np

from datapipe.core.errors import ClusterError
from datapipe.core.parallel import follow_parent
from datapipe.core.randomness import Ints
from datapipe.core.stop_signals import sheltered
from datapipe.views.bicubic import Resize
from datapipe.views.render import make_views
from datapipe.views.spec import View, ViewSpec

ALIGNMENT = mmap.PAGESIZE
"""Views of a group begin at whole pages, which is what can be locked for copies to a GPU."""
Slot = dict[str, View]


class Made(NamedTuple):
    """What came of some images."""

    bad: list[int]
    """Rows whose bytes are no image."""
    boxes: Ints
    """int64 [spec.boxed, n, 5], as `make_views` has them."""


class ViewMaker(Protocol):
    """Makes views of images in slots: `slots[number][group]` is uint8, of the group's shape [V, n, H, W, 3]."""

    slots: list[Slot]

    def make(self, jpegs: list[bytes], positions: Ints, *, slot: int, first: int) -> Made:
        """Views of these images in the rows of a slot from `first` on."""

    def close(self) -> None:
        """Nothing is made any more."""


class ViewsHere:
    """The thread that asks makes them itself. `allocate(shape, dtype)` makes the slots."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, slots: int, spec: ViewSpec, seed: int, resize: Resize,
        allocate: Callable[..., Any] = np.empty,
    ) -> None:  # fmt: skip
        self.slots = [{name: allocate(shape, np.uint8) for name, shape in shapes.items()} for _ in range(slots)]
        self._spec, self._seed, self._resize = spec, seed, resize

    def make(self, jpegs: list[bytes], positions: Ints, *, slot: int, first: int) -> Made:
        return _made(jpegs, positions, self.slots[slot], first, self._spec, self._seed, self._resize)

    def close(self) -> None:
        pass


def _made(
    jpegs: list[bytes], positions: Ints, slot: Slot, first: int, spec: ViewSpec, seed: int, resize: Resize
) -> Made:
    views = {name: array[:, first : first + len(jpegs)] for name, array in slot.items()}
    boxes = np.zeros((spec.boxed, len(jpegs), 5), np.int64)
    return Made(make_views(jpegs, spec, seed, positions, views, boxes if spec.boxed else None, resize=resize), boxes)


class SharedMemory:
    """Bytes that processes share. They lie in no folder: /dev/shm of a container has 64 MB as a rule."""

    def __init__(self, size: int, file: int | None = None) -> None:
        self._file = os.fdopen(os.memfd_create("views", os.MFD_CLOEXEC) if file is None else file, "r+b", buffering=0)
        if file is None:
            self._file.truncate(size)
        self.size, self.bytes = size, mmap.mmap(self._file.fileno(), size)

    def __reduce__(self) -> tuple[Any, ...]:
        """As an argument of a process that is being started, which gets the descriptor."""
        return _received, (self.size, reduction.DupFd(self._file.fileno()))

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the last array in it."""
        self._file.close()


def _received(size: int, descriptor: Any) -> SharedMemory:
    return SharedMemory(size, descriptor.detach())


class _Layout(NamedTuple):
    """Where the views of each slot lie."""

    shapes: Mapping[str, tuple[int, ...]]
    slots: int

    @property
    def size(self) -> int:
        return self.slots * sum(map(_whole_pages, self.shapes.values()))

    def arrays(self, memory: SharedMemory) -> list[Slot]:
        """The slots; arrays uint8 of `shapes`."""
        found: list[Slot] = []
        place = 0
        for _ in range(self.slots):
            slot = {}
            for name, shape in self.shapes.items():
                count = int(np.prod(shape))
                slot[name] = np.frombuffer(memory.bytes, np.uint8, count, place).reshape(shape)
                place += _whole_pages(shape)
            found.append(slot)
        return found


def _whole_pages(shape: tuple[int, ...]) -> int:
    return -(-int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT


class _Child:
    """What a process knows from its start."""

    def __init__(
        self, memory: SharedMemory, layout: _Layout, spec: ViewSpec, seed: int, resize: tuple[str, str]
    ) -> None:
        self.slots, self.spec, self.seed = layout.arrays(memory), spec, seed
        module, name = resize
        self.resize: Resize = getattr(importlib.import_module(module), name)

    def make(self, jpegs: list[bytes], positions: Ints, slot: int, first: int) -> Made:
        return _made(jpegs, positions, self.slots[slot], first, self.spec, self.seed, self.resize)


_child: list[_Child] = []


class ViewProcesses:
    """`count` processes, and the slots that they share with this one.

    They are started at once, in the background, from a server that has imported what they need; they end with this
    process, however it ends. `resize` is `make_views`', a function of a module; `lock` the loader's. Close it.
    """

    def __init__(
        self, count: int, shapes: Mapping[str, tuple[int, ...]], *, slots: int, spec: ViewSpec, seed: int,
        resize: Resize, lock: Callable[[View], Callable[[], None]] | None = None,
    ) -> None:  # fmt: skip
        layout = _Layout(dict(shapes), slots)
        self._memory = SharedMemory(layout.size)
        self.slots = layout.arrays(self._memory)
        self._unlock = [lock(array) for slot in self.slots for array in slot.values()] if lock else []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"{__package__}.one_thread", __name__, resize.__module__])
        self._pool = ProcessPoolExecutor(
            count, mp_context=context, initializer=_begin,
            initargs=(self._memory, layout, spec, seed, (resize.__module__, resize.__name__)),
        )  # fmt: skip
        with sheltered():
            self._pool.submit(os.getpid)

    def make(self, jpegs: list[bytes], positions: Ints, *, slot: int, first: int) -> Made:
        """Views of these images in the rows of a slot from `first` on. Waits for it, and leaves the interpreter to
        others meanwhile. Raises ClusterError where a process was killed."""
        try:
            return self._pool.submit(_make, jpegs, positions, slot, first).result()
        except BrokenProcessPool as error:
            raise ClusterError(
                "a process that makes views was killed, probably for want of memory",
                where="stream.processes",
                hint="fewer of them, or 0: threads make the views; started again, the run goes on",
            ) from error

    def close(self) -> None:
        """End the processes, as soon as they have finished what is in their hands."""
        self._pool.shutdown(cancel_futures=True)
        while self._unlock:
            self._unlock.pop()()
        self._memory.close()


def _begin(*about: Any) -> None:
    follow_parent()
    _child[:] = [_Child(*about)]


def _make(jpegs: list[bytes], positions: Ints, slot: int, first: int) -> Made:
    return _child[0].make(jpegs, positions, slot, first)
