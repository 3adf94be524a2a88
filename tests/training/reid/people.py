"""A few tiny labelled crops in the Market layout, for the tests of this folder."""

from pathlib import Path

import numpy as np
import simplejpeg


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
