"""Sources read the way ingestion reads them: sources and units go through pickle in between."""

import pickle
from typing import Any

from datapipe.core.config import StorageConfig
from datapipe.sources import open_sources
from datapipe.sources.base import Crop, Source


def units(url: str, storage: StorageConfig = StorageConfig()) -> list[tuple[Source, Any]]:  # noqa: B008  (frozen)
    """The units of the one source at a url, each with its source, as another process would get them."""
    (source,) = open_sources([url], storage)
    found = []
    for unit in source.units():
        elsewhere, received = pickle.loads(pickle.dumps((source, unit)))
        assert received == unit
        found.append((elsewhere, received))
    return found


def crops(url: str, storage: StorageConfig = StorageConfig()) -> list[Crop]:  # noqa: B008  (frozen)
    """All crops of the one source at a url."""
    return [crop for source, unit in units(url, storage) for crop in source.read(unit)]
