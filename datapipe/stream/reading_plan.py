"""Pure: how much of a window of blocks a machine keeps, and how much of the next one it reads ahead.

The order mixes the crops of a window of blocks, so that each block is used until the window's end. Where a machine
cannot keep all blocks of a window, the crops of the others are read one by one; where it cannot keep those of two
windows, only a part of the next one is read ahead. Both parts shrink with the room there is, and nothing is switched
off at once.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from datapipe.core.config import StreamConfig
from datapipe.core.randomness import Ints
from datapipe.sampling.epoch_order import scramble
from datapipe.stream.disk_cache import ROOM_MADE

SPREAD = 3.0
"""Standard deviations of the number of a window's blocks that are at home on a machine, for which there is room."""
MOVED: Mapping[int, float] = {1: 0.22, 2: 0.07}
"""Part of a window's blocks that a machine reads beside those at home there, at most, by `assignment_version`: for
samples that are moved to it so that all ranks get equally many. Counted for batches of 1,024 on 2 to 64 machines: by
version 1 .05 to .20 on the machine that reads most, by version 2 .04 to .07; in larger batches less."""
_KEY, _PARTS = np.array([2 << 62], np.uint64), 1 << 30
"""Of the numbers that blocks are chosen by; another key than those of their homes."""


class Readers(NamedTuple):
    """Who reads a data set together."""

    machines: int = 1
    """Among which its blocks are shared; 1 also where each of several reads nearly every block."""
    ranks: int = 1
    """Among which requests per second are shared."""


ALONE = Readers()


@dataclass(frozen=True)
class ReadingPlan:
    """What is kept where, of blocks in numbers from 0 to 1 (see `numbers_of`) those below `kept` and `ahead`."""

    keeps: Literal["memory", "disk", "nothing"]
    window: int
    """Bytes of the blocks that one machine reads of a window, those of data sets beside this one included."""
    limit: int
    """Bytes that may be kept."""
    kept: float = 1.0
    """Share of the blocks of a window that are kept."""
    ahead: float = 0.0
    """Share of the blocks of the next window that are read ahead."""

    def advice(self) -> Iterator[str]:
        """What is slower than it could be, and what to set; nothing where all is well."""
        if self.keeps != "disk" and not (self.keeps == "nothing" and self.limit == 0 and self.window):
            return
        whole = f"stream.cache_gb = {needed_gb(self.window):g}"
        of = f"a window of {_gb(self.window)} on each machine, stream.cache_gb allows {_gb(self.limit)}"
        if self.keeps == "nothing":
            yield f"crops are read one by one, a request each: nothing is kept of {of}; {whole} keeps two windows"
        elif self.kept < 1:
            yield (f"{1 - self.kept:.0%} of the crops are read one by one, a request each, and nothing is read ahead: "
                   f"{of}; {whole} keeps two windows")  # fmt: skip
        elif self.ahead < 1:
            yield (f"{1 - self.ahead:.0%} of a window is read when it begins, while training waits: {of}; "
                   f"{whole} keeps two windows")  # fmt: skip


def plan_reading(
    config: StreamConfig, *, rows: int, crop_bytes: float, remote: bool, machines: int = 1, beside: int = 0
) -> ReadingPlan:
    """How a data set of so many crops of this mean size is read. `remote`: from a store that wants to be read in
    blocks. `beside`: bytes of windows of data sets that are mixed with it, which share the disk."""
    mine = window_bytes(config, rows=rows, crop_bytes=crop_bytes)
    in_memory = int(config.cache_mb * 1e6)
    if mine <= in_memory:
        return ReadingPlan("memory", mine, in_memory)
    if not remote:
        return ReadingPlan("nothing", 0, 0)
    blocks = max(1.0, min(config.window, rows / config.block))
    window = math.ceil((mine + beside) * _share(machines, blocks, MOVED[config.assignment_version]))
    limit = int(config.cache_gb * 1e9)
    if not limit:
        return ReadingPlan("nothing", window, 0)
    held = (1 - ROOM_MADE) * limit / window
    return ReadingPlan("disk", window, limit, kept=min(1.0, held), ahead=min(1.0, max(0.0, held - 1)))


def window_bytes(config: StreamConfig, *, rows: int, crop_bytes: float) -> int:
    """Bytes of the crops of a window."""
    return math.ceil(crop_bytes * min(config.window * config.block, rows))


def needed_gb(window: int) -> float:
    """`stream.cache_gb` for two windows, in a round number."""
    return math.ceil(20 * window / (1 - ROOM_MADE) / 1e9) / 10


def numbers_of(blocks: Ints) -> Ints:
    """A pseudo-random number below 2^30 for each block, the same on all machines."""
    return scramble(blocks, _KEY, np.array([_PARTS]))


def among(numbers: Ints, share: float) -> np.ndarray:
    """Whether blocks of these numbers are in a share of all, bool [n]; those of a smaller one are in a larger one."""
    return numbers < share * _PARTS


def _share(machines: int, blocks: float, moved: float) -> float:
    """The most of a window's blocks that one of the machines is likely to read; `moved`: see `MOVED`."""
    if machines == 1:
        return 1.0
    mean = 1 / machines
    return min(1.0, mean + max(moved, SPREAD * math.sqrt(mean * (1 - mean) / blocks)))


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.0f} MB"
