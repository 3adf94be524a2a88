"""PersonMAE: a region of a person, mostly hidden, predicts another region (Hu et al., "PersonMAE: Person
Re-Identification Pre-Training with Masked AutoEncoders", 2023).

No code is public, and no more than the abstract could be read, so this is a reimplementation. Of the abstract: region A
is masked by blocks, its visible patches enter the encoder, all of region B is predicted, as pixels and as features.
Everything beyond is a choice, declared as a field of `PersonMaeConfig` with its source. Decoders, targets and losses
are those of BootMAE (Dong et al., ECCV 2022), which has authors in common; `regions = "same"` is BootMAE on rectangles.

Shapes: B images, H x W pixels, N patches (row-major) on a grid of R rows and G columns, S = 1 + K seen tokens (CLS and
the K visible patches), Q places asked for, V = patch * patch * 3 values of a patch, C channels of the encoder.
"""

import copy
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from datapipe.core.config import Range, ViewConfig
from datapipe.core.errors import ConfigError
from datapipe.core.settings import settings
from datapipe.views.masking import MaskConfig, MaskSpec
from datapipe.views.spec import RegionSpec, ViewSpec, regions
from training.core.device_copy import table
from training.core.precision import Precision, at_least_float32, autocast_region, full_precision
from training.core.schedules import grown
from training.methods.base import (
    Method,
    MethodSettings,
    Outcome,
    PublishedRecipe,
    Role,
    TrainingProgress,
    Views,
    by_source,
)
from training.nn import positions, reconstruction
from training.nn.drop_path import Paths, draw_path_masks, on_device
from training.nn.feature_diagnostics import of_features
from training.nn.mae_decoder import Decoder
from training.nn.reconstruction import PixelNorm
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.nn.workload import Decoding, Stack, Workload


@settings
class PersonMaeConfig(MethodSettings):
    """PersonMAE: the visible patches of one region predict all of another one. Regions are cut and mirrored, never
    recoloured: of the settings under `views` only `flip` and `interpolation` apply."""

    name: Literal["personmae"] = "personmae"
    """The method."""
    regions: Literal["pair", "same"] = "pair"
    """"pair": B is another crop of the image than A (PersonMAE's abstract). "same": B is A (BootMAE)."""
    region_scale: Range = (0.4, 1.0)
    """Area of a region as a share of the image. Unknown for PersonMAE; MALE and BootMAE (.2, 1), HAP (.8, 1)."""
    region_ratio: Range = (0.375, 0.667)
    """Width over height of a region (HAP, MALE): half of the square-ish default, for persons are twice as high."""
    region_iou: Range = (0.0, 1.0)
    """Bounds on the overlap of A and B, intersection over union: B is drawn up to 8 times to meet them. Unknown for
    PersonMAE; (0, 1): none."""
    share_flip: bool = True
    """Mirror both regions or neither. Otherwise each by itself; the decoders are told in either case."""
    mask_ratio: float = Field(default=0.75, ge=0, lt=1)
    """Share of A's patches that is hidden, the same in every image. Unknown for PersonMAE; BootMAE and MALE .75, HAP
    .5."""
    mask_kind: Literal["block", "random"] = "block"
    """"block": overlapping rectangles, in the abstract. "random": single patches, as in MAE."""
    mask_area: Range = (0.08, 0.306)
    """Area that a rectangle aims at as a share of the grid. Unknown for PersonMAE; BootMAE 16 to 60 of 196."""
    mask_aspect: Range = (0.3, 1 / 0.3)
    """Height over width of a rectangle (BEiT, BootMAE)."""
    mask_overhang: bool = True
    """May rectangles reach beyond the region? Published ones may not, and then hide its middle, where the person is,
    .95 of the time and its corners .2. With overhang all patches are hidden equally often. Ours."""
    positions: Literal["sincos", "learned"] = "sincos"
    """Position table of the encoder: fixed sin-cos of row and column (MAE, BootMAE), or learned."""
    pixel_norm: PixelNorm = "mae"
    """How the pixels of a patch are standardised to be a target. "mae": all values together; "bootmae": each channel by
    itself, which leaves no colour to predict (a short run on rendered crops: 62 instead of 84 % in an identity probe);
    "none": as they are."""
    loss_on: Literal["all", "masked"] = "all"
    """Patches of B that the loss is about. "all" is in the abstract; "masked", the hidden ones of A, as in MAE and
    BootMAE, makes sense only with `regions = "same"`."""
    weigh_centres: bool = False
    """Let the middle of masked blocks count up to double, as BootMAE does. Only with `loss_on = "masked"`."""
    feature_weight: float = Field(default=1.0, ge=0)
    """Factor of the feature loss, after its growth (BootMAE: 1)."""
    feature_growth: float = Field(default=0.25, ge=0, le=1)
    """Share of the run in which that factor grows, linearly, epoch by epoch (BootMAE: a quarter)."""
    decoder_depth: int = Field(default=2, ge=1)
    """Blocks of either decoder (BootMAE: 2)."""
    pixel_width: int = Field(default=512, ge=0)
    """Channels of the pixel decoder, a multiple of 4 (BootMAE: 512). 0: those of the encoder."""
    feature_width: int = Field(default=0, ge=0)
    """Channels of the feature decoder, a multiple of 4. 0: those of the encoder, as in BootMAE."""
    decoder_heads: int = Field(default=0, ge=0)
    """Attention heads of either decoder. 0: those of the encoder, as in BootMAE."""
    pixel_memory: int = 0
    """Block of the encoder to whose output the pixel decoder attends; -1 is the last (BootMAE: the first)."""
    feature_memory: int = -1
    """Encoder block whose output the feature decoder attends to (BootMAE: the last)."""

    @model_validator(mode="after")
    def _fits(self) -> "PersonMaeConfig":
        if self.loss_on == "masked" and self.regions == "pair":
            raise ValueError('loss_on = "masked" needs regions = "same": no patch of another region is hidden')
        if self.weigh_centres and self.loss_on == "all":
            raise ValueError('weigh_centres needs loss_on = "masked"')
        if self.pixel_width % 4 or self.feature_width % 4:
            raise ValueError("pixel_width and feature_width must be multiples of 4, as positions have four parts")
        return self

    def law(self, backbone: BackboneConfig) -> MaskSpec:
        """The mask of region A: equally many patches in every image, so that what stays is rectangular."""
        least, most = (max(1, round(share * math.prod(backbone.grid))) for share in self.mask_area)
        config = MaskConfig(
            kind=self.mask_kind,
            ratios=(self.mask_ratio,),
            spreads=(0.0,),
            aspect=self.mask_aspect,
            least_area=least,
            most_area=most,
            overhang=self.mask_overhang,
        )
        return MaskSpec(backbone.grid, config, equal=True)


_ABSTRACT = "abstract (Hu et al., 2023)"
_COMMON = by_source(_ABSTRACT, {
    "method.name": "personmae", "method.regions": "pair", "method.mask_kind": "block", "method.loss_on": "all",
}) | by_source("MAE main_pretrain.py; PersonMAE's own is not public", {"optimisation.precision": "fp16"})  # fmt: skip
PUBLISHED = {
    "personmae_vits": PublishedRecipe(_COMMON),
    "personmae_vitb": PublishedRecipe(
        _COMMON | by_source(_ABSTRACT, {"backbone.arch": "vit_base"}),
        "LUPerson; how much of it is not in the abstract",
    ),
    "personmae_vitl": PublishedRecipe(_COMMON),
}
"""Nothing was for ViT-S and ViT-L: there, what the abstract says."""


class DecoderQueries(NamedTuple):
    """What the decoders are to predict."""

    places_BQ2: Tensor
    """Where mask tokens go: (row, column) in the frame of A."""
    seen_too: bool
    """Are predictions wanted also for the visible patches themselves?"""
    patches_BQ: Tensor | None
    """Which patches of B the predictions are for, row by row; None: all, in order."""
    weight_BQ: Tensor
    """What each counts in the loss."""


class Predictions(NamedTuple):
    """What the student says of the patches asked for."""

    pixels_BQV: Tensor
    features_BQC: Tensor


class Decoders(nn.Module):
    """The pixel decoder and the feature decoder."""

    def __init__(self, config: PersonMaeConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        width, _, heads, _ = backbone.shape
        heads, depth = config.decoder_heads or heads, config.decoder_depth
        pixel_width, feature_width = config.pixel_width or width, config.feature_width or width
        self.pixel = Decoder(backbone, width=pixel_width, depth=depth, heads=heads, out=backbone.patch**2 * 3)
        self.feature = Decoder(backbone, width=feature_width, depth=depth, heads=heads, out=width)


class PersonMaeStudent(nn.Module):
    """Encoder of the visible patches of A, and decoders."""

    def __init__(self, config: PersonMaeConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.backbone = VisionTransformer(backbone)
        self.memories = config.pixel_memory, config.feature_memory
        if config.positions == "sincos":
            _fix_positions(self.backbone)
        self.head = Decoders(config, backbone)

    def forward(
        self,
        region_BIHW: Tensor,
        visible_BK: Tensor,
        queries: DecoderQueries,
        *,
        precision: Precision,
        path_masks: Paths,
    ) -> Predictions:
        """Both decoders see the encoder's normalised output, and each attends to what came out of a block of it."""
        with autocast_region(precision, region_BIHW.device):
            seen = self.backbone(
                region_BIHW, part=None, visible=visible_BK, path_masks=path_masks, blocks=self.memories
            )
            seen_BSC = torch.cat([seen.cls[:, None], seen.patches], dim=1)
            pixel_BTW = self.head.pixel(seen_BSC, seen.outputs[0], queries.places_BQ2)
            feature_BTW = self.head.feature(seen_BSC, seen.outputs[1], queries.places_BQ2)
        skipped = 1 if queries.seen_too else seen_BSC.shape[1]
        with full_precision(region_BIHW.device):
            return Predictions(
                self.head.pixel.predict(at_least_float32(pixel_BTW[:, skipped:])),
                self.head.feature.predict(at_least_float32(feature_BTW[:, skipped:])),
            )


class PersonMaeTeacher(nn.Module):
    """The encoder that the moving average makes; it sees all of B."""

    def __init__(self, student: PersonMaeStudent) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(student.backbone).requires_grad_(False)

    def forward(self, region_BIHW: Tensor, *, precision: Precision) -> Tensor:
        """What comes out of the last block, before the final norm and without CLS: [B, N, C]."""
        with autocast_region(precision, region_BIHW.device):
            (output_BTC,) = self.backbone(region_BIHW, part=None, blocks=(-1,)).outputs
            return at_least_float32(output_BTC[:, 1:])


class PersonMae(Method[PersonMaeConfig]):
    """Masked image modelling across two regions of one image, of pixels and of a moving average's features."""

    published = PUBLISHED
    student: PersonMaeStudent
    teacher: PersonMaeTeacher

    def __init__(self, config: PersonMaeConfig, backbone: BackboneConfig) -> None:
        super().__init__(config, backbone)
        _check(config, backbone)
        self.kept = backbone.grid[0] * backbone.grid[1] - config.law(backbone).hidden
        self.student = PersonMaeStudent(config, backbone)
        self.teacher = PersonMaeTeacher(self.student)

    @staticmethod
    def views(config: PersonMaeConfig, views: ViewConfig, backbone: BackboneConfig) -> ViewSpec:
        law = RegionSpec(config.region_scale, config.region_ratio, config.region_iou, config.share_flip)
        pair = config.regions == "pair"
        return regions(views, law, size=backbone.size, pair=pair, masks=(config.law(backbone),))

    @classmethod
    def workload(cls, config: PersonMaeConfig, views: ViewConfig, backbone: BackboneConfig, images: int) -> Workload:
        """The loss is formed of what is predicted and what was to be, and of both features standardised, once for the
        loss and once for the metrics."""
        patches, width, values = math.prod(backbone.grid), backbone.shape.width, 3 * backbone.patch**2
        hidden = config.law(backbone).hidden
        queries = patches if config.regions == "pair" else hidden
        predicted = patches if config.regions == "pair" or config.loss_on == "all" else queries
        seen = 1 + patches - hidden
        return Workload(
            student=(Stack(images, backbone.size, patches, seen),),
            teacher=(Stack(images, backbone.size, patches, 1 + patches),),
            decoded=tuple(
                Decoding(images, seen + queries, seen, predicted, *shape, depth=config.decoder_depth, out=out)
                for shape, out in zip(_decoder_shapes(config, backbone), (values, width), strict=True)
            ),
            loss_kept=images * predicted * (values + 2 * width),
            loss_alive=images * patches * (2 * values + 5 * width),
        )

    @staticmethod
    def fine_tuning_recipe(parts: int) -> str:
        del parts
        return "supervised_mae"

    def forward(self, views: Views, progress: TrainingProgress) -> Outcome:
        """Pixels and, with a factor that grows over the first part of the run, features:

        loss[b] = pixel loss[b] + a(epoch) * feature loss[b]
        """
        region_a, weight_B = views["region_a"][0], views["weight"]
        region_b = views["region_b"][0] if self.config.regions == "pair" else region_a
        # visible patches first, both kinds in their order on the grid; padding has no mask, and its first are taken
        order_BN = views["mask"][0].flatten(1).to(torch.int8).argsort(dim=1, stable=True)
        queries = self._queries(views, order_BN)
        with torch.no_grad():
            features_BNC = self.teacher(region_b, precision=self.precision)
        predicted = self.student(
            region_a,
            order_BN[:, : self.kept],
            queries,
            precision=self.precision,
            path_masks=self._path_masks(views, progress),
        )
        with full_precision(region_a.device):
            patch = self.student.backbone.config.patch
            pixels_BNV = reconstruction.pixel_target(region_b, patch, self.config.pixel_norm)
            wanted = Predictions(_taken(pixels_BNV, queries.patches_BQ), _taken(features_BNC, queries.patches_BQ))
            pixel_B, feature_B = self._losses(predicted, wanted, queries.weight_BQ)
            loss_B = pixel_B + self._feature_factor(progress) * feature_B
            weight_B = weight_B.to(loss_B.dtype)
            metrics = _metrics(pixel_B, feature_B, predicted.features_BQC, wanted.features_BQC, weight_B)
        return Outcome((weight_B * loss_B).sum(), {}, metrics)

    def roles(self) -> dict[str, Role]:
        """What has two or more dimensions decays, but for CLS and positions, as in BootMAE. Decoders come after all."""
        return {name: self._role(name, value) for name, value in self.named_parameters() if value.requires_grad}

    def backbone(self) -> VisionTransformer:
        """The student's encoder."""
        return self.student.backbone

    def _role(self, name: str, parameter: nn.Parameter) -> Role:
        network, _, rest = name.removeprefix("student.").partition(".")
        encoder = self.student.backbone
        exempt = rest in ("cls_token", "pos_embed")
        return Role(
            decay=parameter.ndim > 1 and not exempt,
            depth=encoder.depth_of(rest) if network == "backbone" else len(encoder.blocks) + 1,
        )

    def _queries(self, views: Views, order_BN: Tensor) -> DecoderQueries:
        """Two regions: all of B, at its places in A's frame. One region: its hidden patches, or all patches, where the
        visible ones are predicted from themselves."""
        rows, columns = self.student.backbone.config.grid
        dtype = views["region_a"].dtype
        if self.config.regions == "pair":
            box_a, box_b = views["boxes"].to(dtype)
            places = positions.in_frame(box_b, box_a, rows, columns)
            return DecoderQueries(places, False, None, torch.ones_like(places[..., 0]))
        hidden_BQ = order_BN[:, self.kept :]
        places = table(positions.grid, rows, columns, device=order_BN.device, dtype=dtype)[hidden_BQ]
        if self.config.loss_on == "all":
            return DecoderQueries(places, True, order_BN, torch.ones_like(order_BN, dtype=dtype))
        mask_BRG = views["mask"][0].to(dtype)
        weight_BRG = reconstruction.centre_weights(mask_BRG) if self.config.weigh_centres else mask_BRG
        return DecoderQueries(places, False, hidden_BQ, weight_BRG.flatten(1).gather(1, hidden_BQ))

    @staticmethod
    def _losses(predicted: Predictions, wanted: Predictions, weight_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel and feature loss of each image: [B] both. As many patches in every image, so Q is their number."""
        count = weight_BQ.shape[1]
        pixels = reconstruction.pixel_errors(predicted.pixels_BQV, wanted.pixels_BQV)
        features = reconstruction.feature_errors(predicted.features_BQC, wanted.features_BQC)
        pixel_B, feature_B = (reconstruction.over_patches(errors, weight_BQ, count) for errors in (pixels, features))
        return pixel_B, feature_B

    def _feature_factor(self, progress: TrainingProgress) -> float:
        epochs = progress.total_steps / progress.epoch_steps
        return self.config.feature_weight * grown(progress.epoch, epochs=self.config.feature_growth * epochs)

    def _path_masks(self, views: Views, progress: TrainingProgress) -> Paths:
        backbone, position = self.student.backbone, views["position"]
        purpose, device = "drop_path/region_a", views["region_a"].device
        drawn = draw_path_masks(
            backbone.config.drop_rates, seed=progress.seed, purpose=purpose, position=position, views=1
        )
        return on_device([drawn], device, whole=backbone.compiled)[0]


def _decoder_shapes(config: PersonMaeConfig, backbone: BackboneConfig) -> list[tuple[int, int, int, int]]:
    """(width, channels of all heads, heads, hidden width) of both decoders."""
    width, _, heads, mlp_ratio = backbone.shape
    heads = config.decoder_heads or heads
    widths = (config.pixel_width or width, config.feature_width or width)
    return [(own, own // heads * heads, heads, int(own * mlp_ratio)) for own in widths]


def _check(config: PersonMaeConfig, backbone: BackboneConfig) -> None:
    """Raises ConfigError where method and backbone do not go together."""
    depth, width = backbone.shape.depth, backbone.shape.width
    for name, block in (("pixel_memory", config.pixel_memory), ("feature_memory", config.feature_memory)):
        if not -depth <= block < depth:
            raise ConfigError(f"{name} = {block}, but the backbone has {depth} blocks", where=f"method.{name}",
                              hint=f"0 is its first block, {depth - 1} or -1 its last")  # fmt: skip
    if backbone.stem != "patch":
        raise ConfigError(f'the convolutions of stem = "{backbone.stem}" overlap: visible patches would tell of hidden',
                          where="backbone.stem", hint='PersonMAE needs stem = "patch"')  # fmt: skip
    if width % 4 and (config.positions == "sincos" or not (config.pixel_width and config.feature_width)):
        raise ConfigError(f"width = {width} is no multiple of 4, as sin-cos positions need", where="backbone.width",
                          hint="positions have four parts: sine and cosine of row and column")  # fmt: skip


def _fix_positions(backbone: VisionTransformer) -> None:
    """A position table of fixed sin-cos codes, zero for CLS."""
    table = positions.sincos(positions.grid(*backbone.config.grid), backbone.width)
    with torch.no_grad():
        backbone.pos_embed.zero_()[0, 1:] = table
    backbone.pos_embed.requires_grad_(False)


def _taken(values_BNX: Tensor, patches_BQ: Tensor | None) -> Tensor:
    """The patches asked for; None: all."""
    if patches_BQ is None:
        return values_BNX
    return values_BNX.gather(1, patches_BQ[..., None].expand(-1, -1, values_BNX.shape[-1]))


@torch.no_grad()
def _metrics(
    pixel_B: Tensor, feature_B: Tensor, said_BQC: Tensor, wanted_BQC: Tensor, weight_B: Tensor
) -> dict[str, Tensor]:
    """Terms of the loss, and what a run is watched by: the teacher's features of the patches asked for, standardised
    as in the loss and averaged over them. There are no prototypes, so nothing here has to do with ln K.

    student_teacher_cosine: of that average with the average of what the student predicted
    """
    told_BC, image_BC = (reconstruction.standardised(rows).mean(dim=1) for rows in (said_BQC, wanted_BQC))
    return {
        "loss_pixel": pixel_B.detach(),
        "loss_feature": feature_B.detach(),
        "student_teacher_cosine": F.cosine_similarity(told_BC, image_BC, dim=-1),
        **of_features(image_BC, weight_B),
    }
