"""Image files in, one feature vector per image out.

Preparation as in the validation of TransReID: the whole image is resized to (height, width) by PIL, bilinear and
antialiased. Normalised with the statistics of pre-training (ImageNet); TransReID's fine-tuned models want .5 / .5.
Shapes: B images of one batch, N images in all, C channels.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from datapipe.core.config import Size
from datapipe.core.errors import DataError
from datapipe.core.progress import QUIET_S, Progress
from datapipe.core.settings import settings
from datapipe.formats.images import Undecodable, decode_image
from datapipe.views.normalisation import IMAGENET_MEAN, IMAGENET_STD, Triple
from training.core.device_copy import to_device
from training.core.out_of_memory import scoring_memory
from training.core.precision import at_least_float32
from training.nn.identity.fusion import FEATURES as FUSED
from training.nn.identity.fusion import fused, fused_width

Features = dict[str, NDArray[np.float32]]
"""Name -> float32 [N, C]."""

Form = tuple[Size, Literal["bilinear", "bicubic"]]
"""(height, width) that images are resized to, and how."""
Prepared = list[Future[list[dict[Form, NDArray[np.uint8]]]]]
"""The images of a batch in every form, item by item, while threads prepare them."""
Item = TypeVar("Item")
"""What a thread reads at a time: one image, or several."""
Kept = TypeVar("Kept")
"""What is kept of the features of a batch."""

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


class Module(Protocol):
    """What both kinds of network have as `torch.nn.Module`s."""

    training: bool

    def parameters(self) -> Iterator[Tensor]: ...

    def train(self, mode: bool = True) -> object: ...


class Backbone(Module, Protocol):
    """A network whose features are made of its tokens."""

    def features(self, images: Tensor) -> TokenFeatures: ...  # images [B, 3, H, W], normalised


@runtime_checkable
class NamedFeatures(Module, Protocol):
    """A network that says itself which features it has, in place of those of its tokens."""

    def named_features(self, images: Tensor) -> dict[str, Tensor]: ...  # images [B, 3, H, W] -> [B, C] each


Embedder = Backbone | NamedFeatures
"""A `torch.nn.Module` that images are embedded by."""


def embed(
    backbone: Embedder,
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
    """A network, and how images are prepared for it."""

    backbone: Embedder
    size: Size
    """(height, width)."""
    config: EmbedConfig

    @property
    def form(self) -> "Form":
        """What images are made into for it."""
        return self.size, self.config.interpolation


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
    batch = networks[0].config.batch
    batches = [paths[start : start + batch] for start in range(0, len(paths), batch)]
    collected = embed_batches(
        networks, batches, lambda path: [(path, read(path))], _float32, images=len(paths), device=device, label=label
    )
    return [
        {name: np.concatenate([features[name] for features in parts]) for name in parts[0]}
        for parts in zip(*collected, strict=True)
    ]


def _float32(features: dict[str, Tensor]) -> Features:
    return {name: values.to(torch.float32).cpu().numpy() for name, values in features.items()}


def embed_batches(
    networks: Sequence[Network],
    batches: Sequence[Sequence[Item]],
    read: Callable[[Item], Iterable[tuple[str, bytes]]],
    keep: Callable[[dict[str, Tensor]], Kept],
    *,
    images: int,
    device: torch.device | str,
    label: str,
) -> list[list[Kept]]:
    """What is kept of the features of each batch (of each network), as `features_of` gives them.

    `read` gives the images of an item, each with its name for errors; threads of the first network's configuration read
    and prepare items ahead. `images`: how many there are in all. Networks are left in the mode they came in. Errors:
    those of `read`, `DataError` that names the image which cannot be decoded, `ConfigError` where memory runs out.
    """
    first = networks[0]
    with ExitStack() as modes:
        for network in networks:
            modes.callback(network.backbone.train, network.backbone.training)
            network.backbone.train(False)
        modes.enter_context(scoring_memory(first.config.batch, device))
        progress = modes.enter_context(Progress(label, images, unit="images", quiet_s=QUIET_S))
        forms = [network.form for network in networks]
        prepared = prepare(batches, read, forms, threads=first.config.threads)
        return [
            [keep(features_of(network, batch[network.form], device)) for network in networks]
            for batch in progress.over(prepared, lambda batch: len(batch[first.form]))
        ]


@torch.inference_mode()
def features_of(network: Network, pixels: NDArray[np.uint8], device: torch.device | str) -> dict[str, Tensor]:
    """Every feature of prepared images [B, H, W, 3] by name, [B, C] each, on the device: float64 where the parameters
    are, else float32. In the mode that the network is in."""
    backbone, _, config = network
    dtype = next(iter(backbone.parameters())).dtype
    images = normalise(pixels, dtype, device, config)
    low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    with torch.autocast(images.device.type, dtype=low, enabled=low is not None):
        if isinstance(backbone, NamedFeatures):
            features = backbone.named_features(images)
            return {name: at_least_float32(values) for name, values in features.items()}
        tokens = backbone.features(images)
    features = {"cls": tokens.cls, "mean": tokens.patches.mean(dim=1)}
    if tokens.parts.shape[1]:
        mean = tokens.parts.mean(dim=1)
        features |= {
            **{name: fused(tokens.cls, mean, fusion) for fusion, name in FUSED.items()},
            "parts": mean,
            "each_part": tokens.parts.flatten(1),
        }
    return {name: at_least_float32(values) for name, values in features.items()}


def prepare(
    batches: Iterable[Sequence[Item]], read: Callable[[Item], Iterable[tuple[str, bytes]]], forms: Sequence[Form], *,
    threads: int,
) -> Iterator[dict[Form, NDArray[np.uint8]]]:  # fmt: skip
    """The images of each batch in every form, uint8 [B, H, W, 3], in order.

    A thread takes an item at a time; ahead of the batch that is handed out are `AHEAD` more, and an item for every
    thread.
    """

    def made(item: Item) -> list[dict[Form, NDArray[np.uint8]]]:
        images = (decode(data, name) for name, data in read(item))
        return [{form: resize(image, *form) for form in dict.fromkeys(forms)} for image in images]

    def stacked(items: Prepared) -> dict[Form, NDArray[np.uint8]]:
        images = [image for item in items for image in item.result()]
        return {form: np.stack([image[form] for image in images]) for form in forms}

    waiting: deque[Prepared] = deque()
    with ThreadPoolExecutor(max_workers=threads) as pool:
        try:
            for batch in batches:
                waiting.append([pool.submit(made, item) for item in batch])
                if len(waiting) > AHEAD and sum(map(len, waiting)) > threads:
                    yield stacked(waiting.popleft())
            while waiting:
                yield stacked(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def normalise(pixels: NDArray[np.uint8], dtype: torch.dtype, device: torch.device | str, config: EmbedConfig) -> Tensor:
    """uint8 [B, H, W, 3] -> (x / 255 - mean) / std as [B, 3, H, W] on the device."""
    device = torch.device(device)
    images = to_device(pixels, device).permute(0, 3, 1, 2).to(dtype).div(255)
    mean, std = (to_device(torch.tensor(values, dtype=dtype), device) for values in (config.mean, config.std))
    return (images - mean[:, None, None]) / std[:, None, None]


def decode(data: bytes, name: str = "") -> NDArray[np.uint8]:
    """RGB [height, width, 3] as ingestion sees it: upright, whole, bits by their real range. Raises DataError."""
    try:
        return decode_image(data)
    except Undecodable as error:
        raise DataError(f"an image cannot be decoded: {error}", where=name, hint="replace or remove it") from error


def resize(image: NDArray[np.uint8], size: Size, interpolation: Literal["bilinear", "bicubic"]) -> NDArray[np.uint8]:
    """To (height, width), antialiased."""
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), method))
