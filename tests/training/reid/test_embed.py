"""Images to features: preparation, order, batches, modes."""

import io
import re
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from datapipe.core.errors import DataError
from datapipe.core.progress import lines_sent_to
from tests.training.reid.people import crop
from training.reid.embed import EmbedConfig, decode, embed, feature_widths, normalise, resize


class Tokens(NamedTuple):
    cls: Tensor
    parts: Tensor
    patches: Tensor


class Means(nn.Module):
    """CLS: mean colour; patches: mean colour of each row; parts: of the upper and lower half."""

    def __init__(self, parts: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.parts = parts
        self.modes: list[bool] = []

    def features(self, images: Tensor) -> Tokens:
        self.modes.append(self.training)
        rows = (images * self.scale[:, None, None]).mean(3).transpose(1, 2)  # [B, H, 3]
        halves = torch.stack([half.mean(1) for half in rows.chunk(2, dim=1)], dim=1)
        return Tokens(rows.mean(1), halves if self.parts else halves[:, :0], rows)


def reader(images: dict[str, bytes]) -> Callable[[str], bytes]:
    return images.__getitem__


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    return {f"{number}.jpg": crop(number, 1, 0) for number in range(10)}


def test_embed__names_shapes_and_order(images: dict[str, bytes]) -> None:
    backbone = Means()
    found = embed(backbone, list(images), reader(images), size=(32, 16), config=EmbedConfig(batch=4))
    shapes = {name: values.shape for name, values in found.items()}
    assert shapes == {"cls": (10, 3), "mean": (10, 3), "cls+parts": (10, 6), "cls_parts_mean": (10, 3),
                      "parts": (10, 3), "each_part": (10, 6)}  # fmt: skip
    assert shapes == {name: (10, width) for name, width in feature_widths(3, 2).items()}
    assert all(values.dtype == np.float32 for values in found.values())
    one = embed(backbone, ["7.jpg"], reader(images), size=(32, 16))
    np.testing.assert_allclose(found["cls"][7], one["cls"][0], atol=1e-6)
    np.testing.assert_allclose(found["cls+parts"], np.concatenate([found["cls"], found["mean"]], axis=1), atol=1e-5)


def test_embed__part_features_of_one_pass(images: dict[str, bytes]) -> None:
    backbone = Means()
    found = embed(backbone, list(images), reader(images), size=(32, 16))
    assert len(backbone.modes) == 1
    pixels = np.stack([resize(decode(data), (32, 16), "bilinear") for data in images.values()])
    halves = backbone.features(normalise(pixels, torch.float32, "cpu", EmbedConfig())).parts.detach().numpy()
    assert not np.allclose(halves[:, 0], halves[:, 1], atol=0.1)
    np.testing.assert_allclose(found["each_part"], np.concatenate([halves[:, 0], halves[:, 1]], axis=1), atol=1e-5)
    np.testing.assert_allclose(found["parts"], halves.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(found["cls+parts"][:, 3:], found["parts"], atol=1e-6)
    mean = (found["cls"] + (halves[:, 0] + halves[:, 1]) / 2) / 2
    np.testing.assert_allclose(found["cls_parts_mean"], mean, atol=1e-6)


def test_embed__without_parts(images: dict[str, bytes]) -> None:
    assert set(embed(Means(parts=False), list(images), reader(images), size=(32, 16))) == {"cls", "mean"}


def test_embed__does_not_depend_on_batch_and_threads(images: dict[str, bytes]) -> None:
    backbone = Means().double()
    first, second = (
        embed(backbone, list(images), reader(images), size=(32, 16), config=EmbedConfig(batch=batch, threads=threads))
        for batch, threads in ((1, 1), (64, 4))
    )
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-6)


def test_embed__evaluates_and_puts_the_mode_back(images: dict[str, bytes]) -> None:
    backbone = Means()
    for mode in (True, False):
        backbone.train(mode)
        embed(backbone, list(images), reader(images), size=(32, 16))
        assert backbone.training is mode
    assert not any(backbone.modes)


def test_embed__colours_are_normalised_rgb() -> None:
    red = np.zeros((40, 20, 3), np.uint8)
    red[..., 0] = 255
    data = io.BytesIO()
    Image.fromarray(red).save(data, "PNG")
    cls = embed(Means(), ["red.png"], lambda _: data.getvalue(), size=(16, 8))["cls"]
    np.testing.assert_allclose(cls, [[(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]], rtol=1e-5)
    half = EmbedConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    cls = embed(Means(), ["red.png"], lambda _: data.getvalue(), size=(16, 8), config=half)["cls"]
    np.testing.assert_allclose(cls, [[1, -1, -1]], rtol=1e-5)


def test_embed__lower_precision_is_close(images: dict[str, bytes]) -> None:
    class Linear(Means):
        def features(self, images: Tensor) -> Tokens:
            tokens = super().features(images)
            weight = torch.eye(3)
            return Tokens(*(nn.functional.linear(part, weight) for part in tokens))

    exact, low = (
        embed(Linear(), list(images), reader(images), size=(32, 16), config=EmbedConfig(precision=precision))["cls"]
        for precision in ("fp32", "bf16")
    )
    assert 0 < np.abs(exact - low).max() < 0.02


def test_embed__names_the_broken_image(images: dict[str, bytes]) -> None:
    for broken in (images["3.jpg"][:300], b"nothing", b""):
        with pytest.raises(DataError, match="cannot be decoded") as caught:
            embed(Means(), list(images), reader({**images, "3.jpg": broken}), size=(32, 16))
        assert caught.value.where == "3.jpg"


def test_embed__tells_rate_and_time_left(images: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datapipe.core.progress.INTERVAL_S", 0.0)
    monkeypatch.setattr("datapipe.core.progress.FIRST_S", 0.0)
    lines: list[str] = []
    with lines_sent_to(lines.append):
        embed(Means(), list(images), reader(images), size=(32, 16), config=EmbedConfig(batch=2), label="random: query")
    assert len(lines) == 6  # each batch, and the end
    line = r"random: query: +(\d+)%, (\d+) of 10 images, [\d,]+ images/s, (\?|\d+ s) left"
    found = [re.fullmatch(line, one) for one in lines[:-1]]
    assert [match and match[2] for match in found] == ["2", "4", "6", "8", "10"]
    assert [bool(match and match[3] == "?") for match in found] == [True, True, False, False, False]


def test_embed__needs_images() -> None:
    with pytest.raises(DataError, match="no images"):
        embed(Means(), [], reader({}), size=(32, 16))


def test_resize__is_height_by_width_and_antialiased() -> None:
    checks = np.indices((128, 64)).sum(0) % 2 * np.uint8(255)
    small = resize(np.repeat(checks[..., None].astype(np.uint8), 3, axis=2), (32, 16), "bilinear")
    assert small.shape == (32, 16, 3)
    assert np.abs(small.astype(int) - 127).max() <= 12


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_decode__other_modes_and_formats(mode: str) -> None:
    data = io.BytesIO()
    Image.fromarray(np.full((20, 10, 3), 204, np.uint8)).convert(mode).save(data, "JPEG" if mode == "CMYK" else "PNG")
    image = decode(data.getvalue())
    assert image.shape == (20, 10, 3)
    np.testing.assert_allclose(image, 204, atol=4)


def test_decode__agrees_with_other_decoders() -> None:
    data = crop(3, 1, 0)
    image = decode(data).astype(int)
    assert np.abs(image - np.asarray(Image.open(io.BytesIO(data)))).max() <= 2
    assert np.abs(image - cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]).max() <= 2


def test_normalise__keeps_double() -> None:
    pixels = np.full((2, 4, 3, 3), 255, np.uint8)
    images = normalise(pixels, torch.float64, "cpu", EmbedConfig(mean=(0, 0, 0), std=(1, 1, 1)))
    assert images.dtype == torch.float64 and images.shape == (2, 3, 4, 3)
    assert torch.equal(images, torch.ones_like(images))
