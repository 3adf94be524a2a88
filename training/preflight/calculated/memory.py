"""What a recipe needs of a GPU's memory, calculated: parameters, optimizer state, activations, and the peak of a step.

Pure: a function of the recipe and of the sizes of the parameters, which are those of a module on the meta device.

    forward    state, what autograd keeps of a micro-batch, and what is alive when the loss is formed
    backward   the same without what the loss alone needed, with the largest temporaries: the prototypes' or a block's
    reduction  state, all gradients, and what the ranks' sum takes
    step       state, gradients, and the temporaries of norms and AdamW

The peak is the largest of the four. `RESERVED` and `FRAGMENTATION` stand for what is not calculated.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from training.config.batch_split import BatchSplit, split_of
from training.config.build import build_method, deepspeed_json, view_spec, workload
from training.config.run_config import RunConfig
from training.core.world import World
from training.engine.overlapped_reduction import overlaps
from training.engine.param_groups import group_parameters
from training.methods.base import Method
from training.nn.mae_decoder import Decoder
from training.preflight.calculated import activation_memory
from training.preflight.calculated.activation_memory import FULL, Numerics

DECODER = " decoder"
"""How the names of decoders end among the parts of a student."""
DOUBLE = 8
"""Bytes of a float64."""
RESERVED = 1 << 30
"""CUDA context, kernels, workspace of NCCL: about this much of a GPU before the first tensor."""
WORKSPACE = 32 << 20
"""What cuBLAS is given for a matrix product on GPUs of compute capability 9, by PyTorch's allocator; 8 MiB on older."""
FRAGMENTATION = 0.05
"""Share of the peak that the allocator loses in pieces too small to use. An assumption, as the one above."""
REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed keeps parameters of stage 3 together that are used again within this many; its default."""


@dataclasses.dataclass(frozen=True)
class Census:
    """How many numbers a method has, by part."""

    student: dict[str, int]
    """Part -> numbers, trained or not."""
    teacher: int
    trained: int
    buffers: int
    groups: tuple[int, ...]
    """Numbers in each of the optimizer's groups."""
    largest: int
    """Numbers in the largest trained parameter."""
    lowered_blocks: int
    """Numbers in the weights of the student's blocks, which autocast copies in lower precision."""
    lowered_rest: int
    """Numbers in the weights of its patch embedding and decoders, which autocast copies in lower precision."""
    couples: bool
    """Do targets or statistics couple the images of a batch, so that it must not be split?"""

    @property
    def parameters(self) -> int:
        """All, student and teacher."""
        return sum(self.student.values()) + self.teacher


def census(config: RunConfig) -> Census:
    """Build the recipe's method without memory for its parameters, and count."""
    with torch.device("meta"):
        method = build_method(config)
    trained = {name: value.numel() for name, value in method.named_parameters() if value.requires_grad}
    groups = group_parameters(method, layer_decay=config.optimisation.layer_decay)
    lowered = _lowered_weights(method)
    teacher = method.networks().get("teacher")
    blocks = sum(count for name, count in lowered.items() if name.startswith("backbone.blocks."))
    return Census(
        student=_parts(method),
        teacher=sum(value.numel() for value in teacher.parameters()) if teacher is not None else 0,
        trained=sum(trained.values()),
        buffers=sum(value.numel() for value in method.buffers()),
        groups=tuple(sum(trained[name] for name in group.names) for group in groups),
        largest=max(trained.values()),
        lowered_blocks=blocks,
        lowered_rest=sum(lowered.values()) - blocks,
        couples=method.couples_batch(),
    )


def _parts(method: Method[Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    decoders = _decoders(method)
    for name, value in method.student.named_parameters():
        part = _part(name, decoders)
        counts[part] = counts.get(part, 0) + value.numel()
    return counts


def _part(name: str, decoders: tuple[str, ...]) -> str:
    """`backbone.blocks.3.norm1.weight` -> "blocks"; `head.pixel.embed.bias` -> "pixel decoder"."""
    words = name.split(".")
    if words[0] == "backbone":
        kind = words[1]
        known = {"patch_embed": "patch embedding", "blocks": "blocks", "norm": "final norm"}
        return known.get(kind, "tokens and positions")
    for decoder in decoders:
        if name.startswith(f"{decoder}."):
            return f"{decoder.rpartition('.')[2]}{DECODER}"
    if words[0] != "head":
        return words[0]
    return "prototypes" if words[1].startswith("last_layer") else "head MLPs"


def _decoders(method: Method[Any]) -> tuple[str, ...]:
    """Names of the student's decoders."""
    return tuple(name for name, module in method.student.named_modules() if isinstance(module, Decoder))


def _lowered_weights(method: Method[Any]) -> dict[str, int]:
    """Weights of the student's matrix products in the autocast region: backbone and decoders, but for their last layer
    and the heads with prototypes, which stay in float32."""
    inside = tuple(f"{name}." for name in ("backbone", *_decoders(method)))
    return {
        name: module.weight.numel()
        for name, module in method.student.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith(inside) and not name.endswith(".predict")
    }


class Memory(NamedTuple):
    """Bytes on one GPU."""

    state: dict[str, int]
    """What is there throughout a step."""
    saved: dict[str, int]
    """What the forward pass of a micro-batch keeps for the backward pass."""
    moments: dict[str, int]
    """All that is there at the fullest point of forward, backward, reduction and step."""

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def not_calculated(self) -> int:
        """CUDA context, workspaces and fragmentation: assumed."""
        return RESERVED + round(FRAGMENTATION * self.peak)

    @property
    def needed(self) -> int:
        return self.peak + self.not_calculated


def calculate(config: RunConfig, sizes: Census, *, world: int, cuda: bool) -> Memory:
    """The memory of one of `world` ranks, after the first step. `cuda`: with the kernels and AdamW of a GPU."""
    how = activation_memory.numerics(config, cuda=cuda)
    split = split_of(config, world)
    held = _Held(config, sizes, split, world, cuda)
    state = held.state() | {"batch": batch_bytes(config, split.micro_batch, cuda=cuda)}
    kept = activation_memory.saved(config, split.micro_batch, how) | {"lowered weights": lowered_copies(sizes, how)}
    base = sum(state.values()) + held.gathered()
    several = split.per_rank > split.micro_batch
    earlier = held.accumulated() if several else 0
    again = max(earlier, held.staged() + (held.gradients() if several else 0)) + held.sent()
    ended = sum(kept.values()) + (WORKSPACE if cuda else 0)
    moments = {
        "forward": base + earlier + ended + _forward_temporaries(config, split.micro_batch, sizes),
        "backward": base + again + ended + _backward_temporaries(config, split.micro_batch, how, sizes, held.stage),
        "reduction": base + FULL * held.reduction(),
        "step": sum(state.values()) + held.gradients() + held.step(),
    }
    return Memory(state, kept, moments)


def batch_bytes(config: RunConfig, images: int, *, cuda: bool) -> int:
    """The views of a micro-batch in float32, and as the loader hands them over; to a GPU in two slots."""
    spec = view_spec(config)
    pixels = 0
    for group in spec.groups:
        views, _, height, width, channels = spec.shape(group, images)
        pixels += views * images * height * width * channels
    return pixels * (FULL + (2 if cuda else 1))


def lowered_copies(sizes: Census, how: Numerics) -> int:
    """Weights in lower precision, which are kept for the backward pass and the next micro-batch."""
    return how.matrix * (sizes.lowered_rest + sizes.lowered_blocks) if how.lowered else 0


def _forward_temporaries(config: RunConfig, images: int, sizes: Census) -> int:
    """The larger of two: what is alive when the loss is formed, that is logits of student and teacher, targets before
    they are sorted for the product, and one head's logits over their temperature, or what the information of its
    targets takes, or what else the method says; or prototypes before they are scaled, in the last head."""
    work = workload(config, images)
    rows = work.scored
    logits = sum(part.prototypes * (part.student + part.teacher + part.targets) for part in rows)
    loss = logits + max((part.prototypes * max(part.student, 4 * part.targets) for part in rows), default=0)
    return FULL * max(loss + work.loss_alive, sizes.largest if rows else 0)


def _backward_temporaries(config: RunConfig, images: int, how: Numerics, sizes: Census, stage: int) -> int:
    """The larger of two: a gradient of a head's prototypes, as that of its logits takes the memory of the softmax that
    was kept (under ZeRO-3 four were measured, `tests/bench/memory.py`); or a block, made again where it is
    checkpointed."""
    head = FULL * sizes.largest * (4 if stage == 3 else 1) if workload(config, images).scored else 0
    return max(head, _block_again(config, images, how, sizes))


def _block_again(config: RunConfig, images: int, how: Numerics, sizes: Census) -> int:
    """What the dearest block takes in the backward pass beside what was kept of it."""
    backbone = config.backbone
    whole = dataclasses.replace(backbone, checkpoint_blocks=False)
    width, depth, _, mlp_ratio = backbone.shape
    most = 0
    for stack in workload(config, images).student:
        tokens = stack.rows * stack.tokens
        gradients = tokens * (2 * FULL * width + 2 * how.matrix * int(mlp_ratio * width))
        again = activation_memory.block_bytes(whole, stack, how) if backbone.checkpoint_blocks else 0
        most = max(most, again + gradients)
    lowered = how.matrix * sizes.lowered_blocks // depth if backbone.checkpoint_blocks and how.lowered else 0
    return most + lowered


class _Held(NamedTuple):
    """Which part of parameters, gradients and moments a rank holds, and what moving them takes."""

    config: RunConfig
    sizes: Census
    split: BatchSplit
    world: int
    cuda: bool

    @property
    def stage(self) -> int:
        """ZeRO stage; 0 too for the plain stepper."""
        return self.config.engine.zero_stage if self.config.engine.stepper == "deepspeed" else 0

    def state(self) -> dict[str, int]:
        """Parameters, moments, the float32 copy that ZeRO steps, and the gradients of stage 3."""
        sizes = self.sizes
        parts = self.world if self.stage == 3 else 1
        bytes_of_part = {
            "student": FULL * -(-sum(sizes.student.values()) // parts),
            "teacher": FULL * -(-sizes.teacher // parts),
            "buffers": FULL * sizes.buffers,
            **self._moments(),
        }
        if self.stage:
            bytes_of_part["ZeRO's copy of its parameters"] = FULL * self._own
        if self.stage == 3:  # the other stages let them go with the step
            bytes_of_part["gradients"] = FULL * self._own
        return bytes_of_part

    def _moments(self) -> dict[str, int]:
        """What the optimizer keeps of the numbers that this rank steps."""
        if self.config.optimisation.optimizer == "sgd":
            return {"momentum of SGD": FULL * self._own}
        return {"moments of AdamW": 2 * FULL * self._own}

    @property
    def _own(self) -> int:
        """Trained numbers that this rank steps."""
        return -(-self.sizes.trained // (self.world if self.stage else 1))

    def gathered(self) -> int:
        """Stage 3: the student's parameters, put together while they are in use."""
        if self.stage < 3 or self.world == 1:
            return 0
        reach = self._zero().get("stage3_max_reuse_distance", REUSE_DISTANCE)
        student = sum(self.sizes.student.values())
        return FULL * min(student, max(reach, self.sizes.largest, self._zero()["stage3_prefetch_bucket_size"]))

    def accumulated(self) -> int:
        """Between two micro-batches. Stage 1 splits gradients at the end of the last one: until then they are whole,
        and DeepSpeed's bucket stays."""
        return FULL * self.sizes.trained + self.staged() if self.stage == 1 else self.gradients()

    @property
    def _overlaps(self) -> bool:
        return overlaps(World(size=self.world, device=torch.device("cuda" if self.cuda else "cpu")), self.stage)

    def staged(self) -> int:
        """What DeepSpeed sets up at the start of a backward pass to add gradients up in, whatever their number. Nothing
        where that is done without it."""
        without = self._overlaps or (self.stage == 1 and self.world > 1)
        return FULL * self.config.engine.bucket if self.stage in (1, 2) and not without else 0

    def sent(self) -> int:
        """A bucket that is averaged beside the backward pass, its lowered copy included."""
        if not self._overlaps:
            return 0
        return (FULL + (2 if self._lowered else 0)) * min(self.config.engine.bucket, self._own)

    def gradients(self) -> int:
        """When the step begins, where they are not there throughout."""
        return 0 if self.stage == 3 else FULL * self._own

    def reduction(self) -> int:
        """Numbers alive when the ranks' gradients are added up."""
        bucket, trained = self.config.engine.bucket, self.sizes.trained
        if self.config.engine.stepper == "plain":
            return trained * (2 if self.world > 1 else 1)
        if self.stage == 0:
            return trained + min(bucket, trained)
        if self.stage == 1:  # all gradients wait for the end of the backward pass
            return trained + bucket + (bucket // 2 if self._lowered else 0) + self._own
        return bucket + self.sizes.largest + (self._own if self.stage == 2 else 0)

    @property
    def _lowered(self) -> bool:
        """Do gradients travel as copies of half the size?"""
        return self.world > 1 and self.config.optimisation.reduction == "bf16"

    def step(self) -> int:
        """Bytes of norms in float64 or of AdamW's temporaries, whichever is more."""
        parts = self.world if self.stage else 1
        group = -(-max(self.sizes.groups) // parts)
        stepped = group if self.stage or self.cuda else self.sizes.largest
        adam = FULL * stepped * (1 if self.cuda else 2) + (FULL * group if self.stage in (1, 2) else 0)
        norms = 2 * DOUBLE * min(self.sizes.largest, self._own) if self.config.engine.stepper == "deepspeed" else 0
        return max(adam, norms)

    def _zero(self) -> dict[str, Any]:
        settings: dict[str, Any] = deepspeed_json(self.config, World(size=self.world), self.split)["zero_optimization"]
        return settings
