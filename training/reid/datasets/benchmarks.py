"""The published data sets, as facts: where the images of each part lie, how names are read, how many there must be.

Identity -1 is junk and dropped everywhere; 0000 of Market-1501's gallery stays as a distractor. Counts are those after
junk is dropped.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

PARTS = ("query", "gallery", "train")


class Count(NamedTuple):
    """Official numbers of one part."""

    images: int
    identities: int


@dataclass(frozen=True)
class SplitFacts:
    """Where the images of one part are."""

    folders: tuple[str, ...]
    """Folders of the images. Without lists, all that lies below any of them is of this part; an image that is listed
    may lie in any, and the first that has it counts. None: the data set has no such part."""
    lists: tuple[str, ...] = ()
    """Files that name the images, one a line, with or without an identity after it. None: all images of the folder."""
    column: str = ""
    """Where the list is a Matlab file: the variable that holds the rows (from 1) of this part."""
    cameras: tuple[int, ...] = ()
    """For each folder: the camera (from 1) that all of its images count as, whatever their names say. None: names
    tell."""


@dataclass(frozen=True)
class DiskLayout:
    """One way in which a data set lies on disk."""

    query: SplitFacts
    gallery: SplitFacts
    train: SplitFacts
    name: str
    """Regular expression for the beginning of a base name, with the groups `pid` and, where names tell it, `camera`
    (counted from 1). Not anchored at the end: Market-1501 has names like 1488_c3s3_015653_00.jpg.jpg."""
    absent: tuple[str, ...] = ()
    """Folders that it does not have, but another data set with the same ones does."""

    @property
    def parts(self) -> dict[str, SplitFacts]:
        return {"query": self.query, "gallery": self.gallery, "train": self.train}


@dataclass(frozen=True)
class Benchmark:
    """A data set of the literature."""

    title: str
    counts: dict[str, Count]
    layouts: tuple[DiskLayout, ...]
    folders: tuple[str, ...] = ()
    """How its folder is usually called: letters and digits alone, lower case."""
    one_space: bool = True
    """Whether train, query and gallery number their identities together, so that one number is one person."""


MARKET_NAME = r"(?P<pid>-?\d+)_c(?P<camera>\d+)"
"""0002_c1s1_000451_03.jpg; DukeMTMC-reID's 0005_c2_f0046985.jpg likewise."""
MSMT17_NAME = r"(?P<pid>-?\d+)_(?:\d+_|c)(?P<camera>\d+)"
"""0000_000_01_0303morning_0015_0.jpg: the camera is the third field; and the names of copies in Market's layout."""
CUHK03_NAME = r"\d+_(?P<pid>\d+)_(?P<camera>[12])_\d+"
"""1_001_1_01.png: pair of cameras, person within the pair, camera within the pair, image."""

MARKET = DiskLayout(
    SplitFacts(("query",)), SplitFacts(("bounding_box_test",)), SplitFacts(("bounding_box_train",)), MARKET_NAME
)
"""The layout that most sets follow."""

OCCLUDED_DUKE = DiskLayout(
    SplitFacts(("query", "bounding_box_test"), ("query.list",)),  # some queries are gallery images of DukeMTMC-reID
    SplitFacts(("bounding_box_test",), ("gallery.list",)),
    SplitFacts(("bounding_box_train",), ("train.list",)),
    MARKET_NAME,
)


IDENTITY_NAME = r"(?P<pid>\d+)_"
"""001_01.tif: identity, image."""
OCCLUDED, WHOLE = 1, 2
"""Cameras that stand for kinds of images in the occluded and partial sets, whose protocol asks for whole bodies by
occluded ones and knows no cameras. The readers named beside each set give queries one camera and the gallery another,
so that the rule "same identity and same camera: not in the ranking" leaves out nothing."""
NO_TRAINING = SplitFacts(())

OCCLUDED_REID = DiskLayout(
    SplitFacts(("occluded_body_images",), cameras=(OCCLUDED,)),
    SplitFacts(("whole_body_images",), cameras=(WHOLE,)),
    NO_TRAINING,
    IDENTITY_NAME,
    absent=("partial_body_images", "test/occluded_body_images"),  # in shards folders are found at any depth
)
"""As released: occluded_body_images/001/001_01.tif. Read so by VlSomers/bpbreid
(`torchreid/data/datasets/image/occluded_reid.py`: *.tif) and hh23333/PVPM (`.../occlusion_reid.py`: *.jpg, of copies),
and, identities by folder, by wangguanan/light-reid (`lightreid/data/datasets/occluded_reid.py`); all count queries as
camera 0, the gallery as camera 1."""
OCCLUDED_REID_FLAT = DiskLayout(
    SplitFacts(("query",), cameras=(OCCLUDED,)), SplitFacts(("gallery",), cameras=(WHOLE,)), NO_TRAINING, IDENTITY_NAME
)
"""A copy in other hands: query/001_01.jpg and gallery/. JDAI-CV/fast-reid reads it
(`projects/PartialReID/partialreid/partial_dataset.py`), with the image's number as its camera, which would leave an
image of each identity out of a ranking; here it is not."""
PARTIAL_REID = DiskLayout(
    SplitFacts(("partial_body_images",), cameras=(OCCLUDED,)),
    SplitFacts(("whole_body_images",), cameras=(WHOLE,)),
    NO_TRAINING,
    IDENTITY_NAME,
)
"""As released: partial_body_images/001_001.jpg, whole_body_images/, and occluded_body_images/, which takes no part.
Read so by VlSomers/bpbreid (`torchreid/data/datasets/image/partial_reid.py`), huanghoujing/EANet
(`package/data/datasets/partial_reid.py`) and JDAI-CV/fast-reid (as above, again with the image's number as its camera).
hh23333/PVPM (`torchreid/data/datasets/image/partial_reid.py`) asks with occluded_body_images."""
P_DUKEMTMC = DiskLayout(
    SplitFacts(("test/occluded_body_images",), cameras=(OCCLUDED,)),
    SplitFacts(("test/whole_body_images",), cameras=(WHOLE,)),
    SplitFacts(("train/occluded_body_images", "train/whole_body_images"), cameras=(OCCLUDED, WHOLE)),
    IDENTITY_NAME,
)
"""As released: test/occluded_body_images/<identity>/<identity>_*.jpg. Read so by hh23333/PVPM
(`torchreid/data/datasets/image/pduke_reid.py`) and VlSomers/bpbreid (`.../p_dukemtmc_reid.py`), which differ in the
name of the folder alone: P-DukeMTMC-reid, P-DukeMTMC-reID. Both train on occluded and whole images."""


def _msmt17(train: str, test: str) -> DiskLayout:
    """Training images are list_train and list_val, as for TransReID and its descendants (torchreid: the former)."""
    return DiskLayout(
        SplitFacts((test,), ("list_query.txt",)),
        SplitFacts((test,), ("list_gallery.txt",)),
        SplitFacts((train,), ("list_train.txt", "list_val.txt")),
        MSMT17_NAME,
    )


def _cuhk03(boxes: str) -> DiskLayout:
    """The new protocol's rows of a Matlab file, images as torchreid extracts them."""
    folders, lists = (f"images_{boxes}",), (f"cuhk03_new_protocol_config_{boxes}.mat",)
    query, gallery, train = (SplitFacts(folders, lists, f"{part}_idx") for part in PARTS)
    return DiskLayout(query, gallery, train, CUHK03_NAME)


_MSMT17_COUNTS = {"query": Count(11_659, 3_060), "gallery": Count(82_161, 3_060), "train": Count(32_621, 1_041)}

PUBLISHED = {
    "market1501": Benchmark(
        "Market-1501",
        {"query": Count(3_368, 750), "gallery": Count(15_913, 751), "train": Count(12_936, 751)},
        (MARKET,),
        ("market1501", "market1501v150915"),
    ),
    "dukemtmc": Benchmark(
        "DukeMTMC-reID",
        {"query": Count(2_228, 702), "gallery": Count(17_661, 1_110), "train": Count(16_522, 702)},
        (MARKET,),
        ("dukemtmcreid", "dukemtmc"),
    ),
    "occluded_duke": Benchmark(
        "Occluded-Duke",
        {"query": Count(2_210, 519), "gallery": Count(17_661, 1_110), "train": Count(15_618, 702)},
        (OCCLUDED_DUKE, MARKET),
        ("occludedduke", "occludeddukemtmc", "occludeddukemtmcreid"),
    ),
    "msmt17": Benchmark(
        "MSMT17",
        _MSMT17_COUNTS,
        (_msmt17("train", "test"), DiskLayout(MARKET.query, MARKET.gallery, MARKET.train, MSMT17_NAME)),
        ("msmt17", "msmt17v1"),
        one_space=False,  # train and test both begin at 0
    ),
    "msmt17_v2": Benchmark(
        "MSMT17 V2 (faces blurred)",
        _MSMT17_COUNTS,
        (_msmt17("mask_train_v2", "mask_test_v2"),),
        one_space=False,
    ),
    "cuhk03_detected": Benchmark(
        "CUHK03, new protocol, detected boxes",
        {"query": Count(1_400, 700), "gallery": Count(5_332, 700), "train": Count(7_365, 767)},
        (_cuhk03("detected"), MARKET),
        ("cuhk03npdetected",),
    ),
    "cuhk03_labeled": Benchmark(
        "CUHK03, new protocol, labelled boxes",
        {"query": Count(1_400, 700), "gallery": Count(5_328, 700), "train": Count(7_368, 767)},
        (_cuhk03("labeled"), MARKET),
        ("cuhk03nplabeled",),
    ),
    "occluded_reid": Benchmark(  # README of tinajia2012/ICME2018_Occluded-Person-Reidentification_datasets
        "Occluded-REID",
        {"query": Count(1_000, 200), "gallery": Count(1_000, 200), "train": Count(0, 0)},
        (OCCLUDED_REID, OCCLUDED_REID_FLAT),
    ),
    "partial_reid": Benchmark(  # CYFFF/PAAM_on_reid-strong-baseline, `data/datasets/partial_reid.py`: 60 x 5 each
        "Partial-REID",
        {"query": Count(300, 60), "gallery": Count(300, 60), "train": Count(0, 0)},
        (PARTIAL_REID,),
    ),
    "p_dukemtmc": Benchmark(  # together the 24,143 images and 1,299 identities of that README, which has no split
        "P-DukeMTMC-reID",
        {"query": Count(2_163, 634), "gallery": Count(9_053, 634), "train": Count(12_927, 665)},
        (P_DUKEMTMC,),
        one_space=False,  # no reader takes them together
    ),
}
"""By the name that commands and results use. MSMT17 V1 and V2 differ by about 4 mAP; published scores are V1's."""


def by_folder(url: str) -> str:
    """The name of the data set that a folder of this name usually holds; empty where none is known."""
    last = [re.sub(r"[^a-z0-9]", "", folder) for folder in url.lower().rstrip("/").split("/")[-2:]]
    known = {folder: name for name, published in PUBLISHED.items() for folder in published.folders}
    return known.get(last[-1]) or known.get("".join(last), "")
