"""Processes make the very bytes that threads make, and end when they should."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from datapipe.core.config import ViewConfig
from datapipe.core.errors import ClusterError
from datapipe.core.randomness import Ints
from datapipe.views import bicubic
from datapipe.views.makers import ViewMaker, ViewProcesses, ViewsHere
from datapipe.views.spec import RegionSpec, View, regions
from tests.datapipe.crop_set import jpegs
from tests.support.golden import ROOT
from training.config.bicubic import fastest

SPEC = regions(ViewConfig(), RegionSpec((0.3, 0.9), (0.375, 0.667), (0.0, 1.0), True), size=(32, 16), pair=True)
SHAPES = {group.name: SPEC.shape(group, 6) for group in SPEC.groups}
ABOUT: dict[str, Any] = {"slots": 2, "spec": SPEC, "seed": 3}


def made(maker: ViewMaker) -> tuple[list[int], Ints, dict[str, View]]:
    """Five images, the third of which is none, in rows 1 to 6 of the second slot."""
    for array in maker.slots[1].values():
        array[:] = 9
    found = maker.make([*list(jpegs(5))[:2], b"no image", *list(jpegs(5))[3:]], np.arange(7, 12), slot=1, first=1)
    return found.bad, found.boxes, maker.slots[1]


@pytest.fixture(scope="module")
def processes() -> Iterator[ViewProcesses]:
    maker = ViewProcesses(2, SHAPES, resize=fastest(), **ABOUT)
    yield maker
    maker.close()


def test_processes__make_the_bytes_that_threads_make(processes: ViewProcesses) -> None:
    bad, boxes, slot = made(ViewsHere(SHAPES, resize=bicubic.resize, **ABOUT))
    its_bad, its_boxes, its_slot = made(processes)
    assert its_bad == bad == [2]
    np.testing.assert_array_equal(its_boxes, boxes)
    for name, array in slot.items():
        np.testing.assert_array_equal(its_slot[name], array)
        assert (array[:, 0] == 9).all() and (array[:, 1] != 9).any()


def test_processes__share_memory_outside_dev_shm(processes: ViewProcesses) -> None:
    child = psutil.Process(processes._pool.submit(os.getpid).result())
    maps = [one.path for one in child.memory_maps(grouped=False)]
    in_shm = [path for path in maps if path.startswith("/dev/shm") and "/sem." not in path]
    assert any("memfd:views" in path for path in maps) and not in_shm


def test_slots__begin_at_whole_pages_and_are_locked_and_unlocked() -> None:
    locked: dict[int, int] = {}

    def lock(array: View) -> Callable[[], None]:
        locked[array.ctypes.data] = array.nbytes
        return lambda: locked.pop(array.ctypes.data) and None

    maker = ViewProcesses(1, SHAPES, resize=bicubic.resize, lock=lock, **ABOUT)
    arrays = [array for slot in maker.slots for array in slot.values()]
    assert locked == {array.ctypes.data: array.nbytes for array in arrays} and len(locked) == 2 * len(SHAPES)
    assert not any(place % 4096 for place in locked)
    maker.close()
    assert not locked
    maker.close()  # which does no harm: neither are pages unlocked again, nor is another file's descriptor closed


def test_processes__one_that_is_killed_is_a_clear_error() -> None:
    maker = ViewProcesses(1, SHAPES, resize=bicubic.resize, **ABOUT)
    os.kill(maker._pool.submit(os.getpid).result(), signal.SIGKILL)
    with pytest.raises(ClusterError, match="a process that makes views was killed") as raised:
        made(maker)
    assert raised.value.where == "stream.processes"
    maker.close()


PARENT = """
import os, signal
from tests.datapipe.views.test_makers import ABOUT, SHAPES, made
from datapipe.views import bicubic
from datapipe.views.makers import ViewProcesses
if __name__ == "__main__":
    maker = ViewProcesses(2, SHAPES, resize=bicubic.resize, **ABOUT)
    made(maker)
    import psutil
    assert maker._pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"  # as it was when libraries were loaded
    print(*[one.pid for one in psutil.Process().children(recursive=True)], flush=True)
    signal.pause()
"""


def test_processes__compute_with_one_thread_and_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(children) >= 3  # two, and the server that they are forked from
        parent.kill()
    assert not psutil.wait_procs(children, timeout=60)[1]
