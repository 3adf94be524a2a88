"""Image files in, one feature vector per image out.

Preparation as in the validation of TransReID: the whole image is resized to (height, width) by PIL, bilinear and
antialiased. Normalised with the statistics of pre-training (ImageNet); TransReID's fine-tuned models want .5 / .5.
Shapes: B images of one batch, N images in all, C channels.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from datapipe.core.config import Size
from datapipe.core.errors import DataError
from datapipe.core.image_formats import FORMATS
from datapipe.core.progress import QUIET_S, Progress
from datapipe.core.settings import settings
from datapipe.views.normalisation import IMAGENET_MEAN, IMAGENET_STD, Triple
from training.core.device_copy import to_device
from training.core.out_of_memory import scoring_memory
from training.nn.identity.fusion import FEATURES as FUSED
from training.nn.identity.fusion import fused, fused_width

Features = dict[str, NDArray[np.float32]]
"""Name -> float32 [N, C]."""

AHEAD = 3
"""Batches being prepared while one is embedded."""


@settings
class EmbedConfig:
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, by PIL, antialiased. TransReID validates with bilinear, cluster-contrast with bicubic."""
    mean: Triple = IMAGENET_MEAN
    """Subtracted from R, G, B in 0..1. ImageNet's, as in pre-training; .5 for TransReID's fine-tuned models."""
    std: Triple = IMAGENET_STD
    """Divisor of R, G, B after the mean is subtracted."""
    batch: int = Field(default=64, ge=1)
    """Images embedded at once. Lower it when memory runs out; the features stay the same up to rounding."""
    threads: int = Field(default=2, ge=1)
    """Threads that read, decode and resize."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the forward pass; parameters stay as they are. bf16 or fp16 on a GPU with many images."""


def feature_widths(width: int, parts: int) -> dict[str, int]:
    """The features that `embed` gives of a backbone of this width with so many part tokens, and the length of each."""
    widths = {"cls": width, "mean": width}
    fused = {name: fused_width(width, parts, fusion) for fusion, name in FUSED.items()}
    return widths | fused | {"parts": width, "each_part": parts * width} if parts else widths


class TokenFeatures(Protocol):
    """What a backbone returns: after its final norm."""

    @property
    def cls(self) -> Tensor: ...  # [B, C]

    @property
    def parts(self) -> Tensor: ...  # [B, P, C]; P may be 0

    @property
    def patches(self) -> Tensor: ...  # [B, patches, C]


class Backbone(Protocol):
    """A `torch.nn.Module` with `features`."""

    training: bool

    def features(self, images: Tensor) -> TokenFeatures: ...  # images [B, 3, H, W], normalised

    def parameters(self) -> Iterator[Tensor]: ...

    def train(self, mode: bool = True) -> object: ...


@runtime_checkable
class NamedFeatures(Protocol):
    """A network that says itself which features it has, beside or in place of those of its tokens."""

    def named_features(self, images: Tensor) -> dict[str, Tensor]: ...  # images [B, 3, H, W] -> [B, C] each


def embed(
    backbone: Backbone,
    paths: Sequence[str],
    read: Callable[[str], bytes],
    *,
    size: Size,
    device: torch.device | str = "cpu",
    config: EmbedConfig | None = None,
    label: str = "embed",
) -> Features:
    """Features of every image, in the order of `paths`, not normalised; no gradient, no drop path.

    "cls" and "mean" (of the patches); where the backbone has part tokens also "cls+parts" ([CLS ; mean of the parts],
    what PASS fine-tunes and evaluates), "cls_parts_mean" ((CLS + mean of the parts) / 2), "parts" (their mean) and
    "each_part" (all of them, one after the other). All of one pass.
    `size` is (height, width). `label`: what its progress is called. The backbone must be on `device`; it is left in the
    mode it came in.
    Errors: `DataError` that names the image which cannot be decoded, `ConfigError` where memory runs out.
    """
    (features,) = embed_each(
        [Network(backbone, size, config or EmbedConfig())], paths, read, device=device, label=label
    )
    return features


class Network(NamedTuple):
    """A backbone, and how images are prepared for it."""

    backbone: Backbone
    size: Size
    """(height, width)."""
    config: EmbedConfig


def embed_each(
    networks: Sequence[Network],
    paths: Sequence[str],
    read: Callable[[str], bytes],
    *,
    device: torch.device | str = "cpu",
    label: str = "embed",
) -> list[Features]:
    """What `embed` gives of each network, in one pass: every image is read and decoded once. Batch and threads are
    those of the first network's configuration; errors as there."""
    if not len(paths):
        raise DataError("no images to embed")
    first = networks[0].config
    forms = [(network.size, network.config.interpolation) for network in networks]
    collected: list[list[Features]] = []
    with ExitStack() as modes:
        for network in networks:
            modes.callback(network.backbone.train, network.backbone.training)
            network.backbone.train(False)
        modes.enter_context(scoring_memory(first.batch, device))
        progress = modes.enter_context(Progress(label, len(paths), unit="images", quiet_s=QUIET_S))
        for batch in progress.over(_batches(paths, read, forms, first), lambda batch: len(batch[forms[0]])):
            collected.append([
                _embed_batch(backbone, normalise(batch[form], _dtype(backbone), device, config), config)
                for form, (backbone, _, config) in zip(forms, networks, strict=True)
            ])  # fmt: skip
    return [
        {name: np.concatenate([features[name] for features in parts]) for name in parts[0]}
        for parts in zip(*collected, strict=True)
    ]


def _dtype(backbone: Backbone) -> torch.dtype:
    return next(iter(backbone.parameters())).dtype


def normalise(pixels: NDArray[np.uint8], dtype: torch.dtype, device: torch.device | str, config: EmbedConfig) -> Tensor:
    """uint8 [B, H, W, 3] -> (x / 255 - mean) / std as [B, 3, H, W] on the device."""
    device = torch.device(device)
    images = to_device(pixels, device).permute(0, 3, 1, 2).to(dtype).div(255)
    mean, std = (to_device(torch.tensor(values, dtype=dtype), device) for values in (config.mean, config.std))
    return (images - mean[:, None, None]) / std[:, None, None]


def decode(data: bytes, name: str = "") -> NDArray[np.uint8]:
    """RGB [height, width, 3]. JPEG by libjpeg-turbo; everything else, and odd JPEGs, by PIL."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return _decode_with_pil(data, name)


def resize(image: NDArray[np.uint8], size: Size, interpolation: Literal["bilinear", "bicubic"]) -> NDArray[np.uint8]:
    """To (height, width), antialiased."""
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), method))


@torch.inference_mode()
def _embed_batch(backbone: Backbone, images: Tensor, config: EmbedConfig) -> Features:
    low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    with torch.autocast(images.device.type, dtype=low, enabled=low is not None):
        if isinstance(backbone, NamedFeatures):
            named = backbone.named_features(images)
            return {name: values.to(torch.float32).cpu().numpy() for name, values in named.items()}
        tokens = backbone.features(images)
    features = {"cls": tokens.cls, "mean": tokens.patches.mean(dim=1)}
    if tokens.parts.shape[1]:
        mean = tokens.parts.mean(dim=1)
        features |= {
            **{name: fused(tokens.cls, mean, fusion) for fusion, name in FUSED.items()},
            "parts": mean,
            "each_part": tokens.parts.flatten(1),
        }
    return {name: values.to(torch.float32).cpu().numpy() for name, values in features.items()}


Form = tuple[Size, Literal["bilinear", "bicubic"]]
"""(height, width) that images are resized to, and how."""


def _batches(
    paths: Sequence[str], read: Callable[[str], bytes], forms: Sequence[Form], config: EmbedConfig
) -> Iterator[dict[Form, NDArray[np.uint8]]]:
    """In every form uint8 [B, H, W, 3], in order; a few batches are prepared ahead."""

    def prepare(path: str) -> dict[Form, NDArray[np.uint8]]:
        image = decode(read(path), path)
        return {form: resize(image, *form) for form in dict.fromkeys(forms)}

    def stacked(images: list[Future[dict[Form, NDArray[np.uint8]]]]) -> dict[Form, NDArray[np.uint8]]:
        prepared = [image.result() for image in images]
        return {form: np.stack([image[form] for image in prepared]) for form in prepared[0]}

    waiting: deque[list[Future[dict[Form, NDArray[np.uint8]]]]] = deque()
    with ThreadPoolExecutor(max_workers=config.threads) as pool:
        try:
            for start in range(0, len(paths), config.batch):
                waiting.append([pool.submit(prepare, path) for path in paths[start : start + config.batch]])
                if len(waiting) > AHEAD:
                    yield stacked(waiting.popleft())
            while waiting:
                yield stacked(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_with_pil(data: bytes, name: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"an image cannot be decoded: {error}", where=name, hint="replace or remove it") from error
