"""Which data set lies somewhere, and in which layout: by its lists and folders, or by what its folder is called."""

import difflib

from datapipe.core.errors import ConfigError, DataError
from training.reid.datasets.benchmarks import MARKET, PUBLISHED, DiskLayout, by_folder
from training.reid.datasets.image_stores import FolderImages, ImageStore
from training.reid.datasets.read_part import lacks
from training.reid.datasets.reid_set import Labelled

OWN = "own"
"""As a name: the user's own images in the layout of Market-1501, compared with nothing."""
NAMES = (*PUBLISHED, OWN)


def recognise(source: ImageStore, name: str) -> tuple[str, DiskLayout]:
    """(name, layout) of what is there; the name is empty where only the layout is known.

    `name` says what it should be. Another data set's lists in its place are found too: compare. Raises ConfigError for
    a name that nobody knows and for several data sets in one folder, DataError where there is none.
    """
    if name and name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, 1)
        raise ConfigError(f"no data set is called {name}", where="the name of the data set",
                          hint=f"{f'{nearest[0]}? ' if nearest else ''}There are {', '.join(NAMES)}")  # fmt: skip
    if name in PUBLISHED:
        fitting = [layout for layout in PUBLISHED[name].layouts if not lacks(source, layout)]
        if fitting:
            return name, fitting[0]
    listed = {} if name == OWN else _listed(source)
    if len(listed) > 1:
        raise ConfigError(f"several data sets lie here: {' and '.join(listed)}", where=source.url, hint="name one")
    if listed:
        return next(iter(listed.items()))
    if lacks(source, MARKET):
        raise _nothing(source, name)
    called = "" if name == OWN else name or by_folder(source.url)
    return called, _in_folders(called)


def by_counts(parts: dict[str, Labelled]) -> str:
    """The published data set that has exactly these numbers of images and identities; empty: none."""
    counts = {part: (len(images), images.identities) for part, images in parts.items()}
    return next((name for name, published in PUBLISHED.items() if published.counts == counts), "")


def _listed(source: ImageStore) -> dict[str, DiskLayout]:
    """The data sets that are told by their lists, or by folders that only they have."""
    layouts = {name: layout for name, published in PUBLISHED.items() for layout in published.layouts[:1]}
    return {
        name: layout
        for name, layout in layouts.items()
        if (layout.query.lists or layout.query.folders != MARKET.query.folders)
        and not lacks(source, layout)
        and not any(source.has(folder) for folder in layout.absent)
    }


def _in_folders(name: str) -> DiskLayout:
    """The layout of a data set that has a folder for each part."""
    layouts = PUBLISHED[name].layouts if name else ()
    return next((layout for layout in layouts if not layout.query.lists), MARKET)


def _nothing(source: ImageStore, name: str) -> DataError:
    """What is missing of the layout that fits best, and where the data set may be instead."""
    sets = [PUBLISHED[name]] if name in PUBLISHED else [*PUBLISHED.values()]
    layouts = [MARKET, *(layout for published in sets for layout in published.layouts)]
    missing = min((lacks(source, layout) for layout in layouts), key=len)
    below = [folder for folder in source.sub_folders() if _any_fits(source, folder)]
    if below:
        hint = f"{source.store.address(below[0])} has one"
    else:
        hint = "expected query/ and bounding_box_test/ with names like 0002_c1s1_000451_03.jpg, or the lists and " \
               "folders of MSMT17, Occluded-Duke, CUHK03, Occluded-REID, Partial-REID or P-DukeMTMC-reID"  # fmt: skip
    return DataError(f"no data set of people: {' and '.join(missing)} missing or without images", where=source.url,
                     hint=hint)  # fmt: skip


def _any_fits(source: ImageStore, folder: str) -> bool:
    inside = FolderImages(source.store.at(folder))
    layouts = [MARKET, *(layout for published in PUBLISHED.values() for layout in published.layouts)]
    return any(not lacks(inside, layout) for layout in layouts)
