"""A few tiny labelled crops, and the layouts of the published data sets, for the tests of this folder."""

import io
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from scipy.io import savemat


def crop(pid: int, camera: int, number: int) -> bytes:
    """A JPEG of 64 x 32 pixels whose colour tells the identity, up to camera and noise."""
    random = np.random.default_rng([pid + 1, camera, number])
    shirt, trousers = np.random.default_rng(pid + 1).integers(40, 215, (2, 3))
    image = np.concatenate([np.full((32, 32, 3), shirt), np.full((32, 32, 3), trousers)])
    image = image + 10 * camera + random.normal(0, 12, image.shape)
    pixels = np.ascontiguousarray(image.clip(0, 255), np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")


def market(root: Path, *, identities: int = 6, cameras: int = 3, images: int = 2) -> Path:
    """query (one image per identity and camera), bounding_box_test (with distractors and junk), bounding_box_train."""
    for folder, first, count in (("query", 0, 1), ("bounding_box_test", 1, images), ("bounding_box_train", 0, 1)):
        (root / folder).mkdir(parents=True)
        offset = 100 if folder == "bounding_box_train" else 0
        for pid in range(1, identities + 1):
            for camera in range(1, cameras + 1):
                for number in range(first, first + count):
                    name = f"{pid + offset:04d}_c{camera}s1_{number:06d}_00.jpg"
                    (root / folder / name).write_bytes(crop(pid + offset, camera, number))
    test = root / "bounding_box_test"
    (test / "0000_c1s1_000001_01.jpg").write_bytes(crop(0, 1, 1))
    (test / "-1_c2s1_000001_01.jpg").write_bytes(crop(50, 2, 1))
    (test / "Thumbs.db").write_bytes(b"no image")
    return root


def msmt17(root: Path, *, train: str = "train", test: str = "test") -> Path:
    """MSMT17's lists and folders: 3 people to train on, 2 others to test on, both numbered from 0; cameras 1 and 11.

    The last person to train on is in list_val. One image of each camera is a query, two are the gallery.
    """
    lists: dict[str, list[str]] = {}
    for folder, people in ((train, 3), (test, 2)):
        for pid in range(people):
            for number, camera in enumerate((1, 1, 1, 11, 11, 11)):
                end = "_ex" * (number % 2)
                name = f"{pid:04d}/{pid:04d}_{number:03d}_{camera:02d}_0303morning_0015_{number}{end}.jpg"
                part = ("val" if pid == 2 else "train") if folder == train else "gallery" if number % 3 else "query"
                lists.setdefault(part, []).append(f"{name} {pid}\n")
                (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
                (root / folder / name).write_bytes(crop(pid + (20 if folder == train else 0), camera, number))
    for part, lines in lists.items():
        (root / f"list_{part}.txt").write_text("".join(lines))
    return root


def tiff(data: bytes) -> bytes:
    """The image as TIFF, which is what Occluded-REID is released as."""
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "TIFF")
    return out.getvalue()


def occluded_reid(root: Path) -> Path:
    """Occluded-REID as released, for 3 people with 2 images of either kind: occluded_body_images/001/001_01.tif."""
    for kind, folder in enumerate(("occluded_body_images", "whole_body_images"), start=1):
        for pid in (1, 2, 3):
            (root / folder / f"{pid:03d}").mkdir(parents=True)
            for number in (1, 2):
                name = f"{pid:03d}/{pid:03d}_{number:02d}.tif"
                (root / folder / name).write_bytes(tiff(crop(pid, kind, number)))
    (root / "Readme.txt").write_text("no image")
    return root


def partial_reid(root: Path) -> Path:
    """Partial-REID as released, for 3 people with 2 images of each kind: partial_body_images/001_001.jpg."""
    for kind, folder in enumerate(("partial_body_images", "whole_body_images", "occluded_body_images"), start=1):
        (root / folder).mkdir(parents=True)
        for pid in (1, 2, 3):
            for number in (1, 2):
                (root / folder / f"{pid:03d}_{number:03d}.jpg").write_bytes(crop(pid, kind, number))
    return root


def p_dukemtmc(root: Path) -> Path:
    """P-DukeMTMC-reID as released: 2 people to train on, 2 others to test on who are numbered alike, each with an
    occluded image and two whole ones. The name of one tells a camera, which must not count."""
    for part, offset in (("train", 20), ("test", 0)):
        for kind, (folder, images) in enumerate((("occluded_body_images", 1), ("whole_body_images", 2)), start=1):
            for pid in (1, 2):
                (root / part / folder / f"{pid:04d}").mkdir(parents=True)
                for number in range(1, images + 1):
                    name = f"{pid:04d}_c{number + 2}_f0046182.jpg" if pid == 2 else f"{pid:04d}_{number:02d}.jpg"
                    data = crop(pid + offset, kind, number)
                    (root / part / folder / f"{pid:04d}" / name).write_bytes(data)
    return root


def cuhk03(root: Path, boxes: str) -> Path:
    """Images and Matlab file of CUHK03's new protocol: two people to train on, two to test on, two pairs of cameras."""
    names, labels, rows = [], [], {"train_idx": [], "query_idx": [], "gallery_idx": []}
    folder = root / f"images_{boxes}"
    folder.mkdir(parents=True)
    for label, (pair, person) in enumerate(((1, 1), (1, 2), (2, 1), (2, 2)), start=1):
        for camera in (1, 2):
            for image in (1, 2):
                names.append(f"{pair}_{person:03d}_{camera}_{image:02d}.png")
                labels.append(label)
                rows["train_idx" if label < 3 else "query_idx" if image == 1 else "gallery_idx"].append(len(names))
                (folder / names[-1]).write_bytes(crop(label, camera, image))  # JPEG bytes under .png, as found in use
    content = io.BytesIO()
    columns = {name: np.array(values)[:, None] for name, values in {**rows, "labels": labels}.items()}
    savemat(content, {"filelist": np.array(names, object)[:, None], **columns})
    (root / f"cuhk03_new_protocol_config_{boxes}.mat").write_bytes(content.getvalue())
    return root
