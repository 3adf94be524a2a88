"""Several data sets read as one: sample ids count on from one to the next."""

from collections.abc import Iterator, Sequence

import numpy as np

from datapipe.core.randomness import Ints
from datapipe.dataset.manifest import Manifest
from datapipe.stream.stream import Fetched, Stream

LABELS_APART = 1 << 32
"""Between labels of one data set and of the next, so that no identity or camera has a label of another data set."""


class MixedStream:
    """What `Stream` is for one data set, for several. Each keeps its own blocks, substitutes and count of broken crops.

    Row r of data set k is the rows of all before k, plus r; its label and camera are k * LABELS_APART plus its own
    ones, -1 where unknown.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = tuple(streams)
        self._starts = np.cumsum([0, *(stream.rows for stream in streams)])
        self.rows = int(self._starts[-1])
        self._joined: dict[str, tuple[list[Ints], Ints]] = {}

    @property
    def pid(self) -> Ints:
        """Identity of every row, int64."""
        return self._labels("pid")

    @property
    def camera(self) -> Ints:
        """Camera of every row, int64."""
        return self._labels("camera")

    def labels(self, rows: Ints) -> tuple[Ints, Ints]:
        """Identity and camera of these rows, int64; unlike `pid` and `camera` it makes nothing for all rows."""
        pid, camera = np.full(len(rows), -1, np.int64), np.full(len(rows), -1, np.int64)
        for number, places in self._split(rows):
            own = self.streams[number].labels(rows[places] - self._starts[number])
            for whole, part in zip((pid, camera), own, strict=True):
                whole[places] = _apart(part, number)
        return pid, camera

    @property
    def replaced(self) -> int:
        """Broken crops that others took the place of, so far."""
        return sum(stream.replaced for stream in self.streams)

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the storage so far."""
        return sum(stream.bytes_read for stream in self.streams)

    @property
    def cached(self) -> tuple[int, int]:
        """(crops that came from a cache, of so many that were asked of one) so far."""
        counts = [stream.cached for stream in self.streams]
        return sum(hits for hits, _ in counts), sum(reads for _, reads in counts)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The versions that are read now."""
        return tuple(manifest for stream in self.streams for manifest in stream.manifests)

    @property
    def renewed(self) -> int:
        """How often another version of a data set has taken the place of the one before."""
        return sum(stream.renewed for stream in self.streams)

    def renew(self) -> None:
        """Read the newest version of each data set from now on: see `Stream.renew`."""
        for stream in self.streams:
            stream.renew()

    @property
    def reads_ahead(self) -> bool:
        """Whether `prepare` does anything."""
        return any(stream.reads_ahead for stream in self.streams)

    def fetch(self, samples: Ints) -> Fetched:
        """The checked crops of these samples; raises as `Stream.fetch` does."""
        rows, data = np.empty_like(samples), [b""] * len(samples)
        for number, places in self._split(samples):
            first = self._starts[number]
            fetched = self.streams[number].fetch(samples[places] - first)
            rows[places] = first + fetched.rows
            for place, jpeg in zip(places.tolist(), fetched.data, strict=True):
                data[place] = jpeg
        return Fetched(rows, data)

    def peek(self, samples: Ints) -> list[bytes]:
        """The checked crops of these samples, uncounted: see `Stream.peek`."""
        data = [b""] * len(samples)
        for number, places in self._split(samples):
            jpegs = self.streams[number].peek(samples[places] - self._starts[number])
            for place, jpeg in zip(places.tolist(), jpegs, strict=True):
                data[place] = jpeg
        return data

    def replace(self, sample: int, row: int, reason: str) -> Fetched:
        """Fetch another crop of the same data set in place of one that cannot be read: see `Stream.replace`."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        first = int(self._starts[number])
        fetched = self.streams[number].replace(sample - first, row - first, reason)
        return Fetched(first + fetched.rows, fetched.data)

    def prepare(self, samples: Ints, turns: Ints) -> None:
        """Begin to read the blocks of these samples: see `Stream.prepare`."""
        for number, places in self._split(samples):
            self.streams[number].prepare(samples[places] - self._starts[number], turns[places])

    def passed(self, samples: Ints, turns: Ints) -> None:
        """See `Stream.passed`."""
        for number, places in self._split(samples):
            self.streams[number].passed(samples[places] - self._starts[number], turns[places])

    def close(self) -> None:
        """End the reading threads."""
        for stream in self.streams:
            stream.close()

    def _split(self, samples: Ints) -> Iterator[tuple[int, Ints]]:
        """Each data set that is among these, and where."""
        chosen = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(chosen).tolist():
            yield number, np.flatnonzero(chosen == number)

    def _labels(self, name: str) -> Ints:
        """Labels of all data sets, joined again when one of them has others: a version without some of its crops."""
        parts = [getattr(stream, name) for stream in self.streams]
        known, joined = self._joined.get(name, ([], np.empty(0, np.int64)))
        if len(known) != len(parts) or any(part is not before for part, before in zip(parts, known, strict=True)):
            joined = np.concatenate([_apart(part, number) for number, part in enumerate(parts)])
            self._joined[name] = parts, joined
        return joined


def _apart(labels: Ints, number: int) -> Ints:
    """Labels of a data set as those of the mix, int64."""
    return np.where(labels < 0, -1, labels + np.int64(number * LABELS_APART))
