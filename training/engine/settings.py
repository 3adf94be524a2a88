"""Settings of the optimizer and of the engine that carries its steps out."""

from typing import Literal

from pydantic import Field

from datapipe.core.config import Range
from datapipe.core.settings import settings
from training.core.precision import Precision
from training.engine.reduction import Reduction


@settings
class OptimisationConfig:
    epochs: float = Field(default=100.0, gt=0)
    """Passes over the data set. The run is as many whole global batches as fit in."""
    batch: int = Field(default=512, ge=1)
    """Images in one optimizer step, over all ranks and micro-batches."""
    micro_batch: int = Field(default=64, ge=0)
    """Most images that one rank takes through forward and backward at once; the memory dial. Changes no result
    beyond rounding: gradients, centres and metrics are sums over the global batch. 0: all images of the rank,
    however many ranks there are, for methods that couple the images of a batch (Sinkhorn, batch norm in the stem)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """"sgd": with momentum, for the published fine-tuning; its weight decay is not decoupled."""
    schedule: Literal["step", "epoch", "staircase"] = "step"
    """When the learning rate changes. "step": at every step, as in pre-training; "epoch": once an epoch, along the
    cosine of timm as TransReID's fine-tuning has it, which the warm-up does not delay; "staircase": by a factor every
    so many epochs (PyTorch's StepLR), as in unsupervised training."""
    staircase_epochs: int = Field(default=20, ge=1)
    """Epochs on one step of the staircase."""
    staircase_factor: float = Field(default=0.1, gt=0, le=1)
    """Factor of the learning rate from one step of the staircase to the next."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate, for this very batch. The published recipes use 5e-4 * batch / 256."""
    final_lr: float = Field(default=1e-6, ge=0)
    """Learning rate that the cosine falls to."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    """Epochs in which the learning rate rises linearly."""
    warmup_lr: float = Field(default=0.0, ge=0)
    """Learning rate that it rises from."""
    betas: Range = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's decay of the velocity."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Decoupled weight decay at the start; the method says what is exempt, as a rule biases and norms."""
    final_weight_decay: float = Field(default=0.4, ge=0)
    """Weight decay at the end, along a cosine."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each depth over that of the next deeper one. 1: all learn alike, as in the published
    pre-training; .4 to .75 for fine-tuning masked autoencoders."""
    clip: Literal["tensor", "global", "none"] = "tensor"
    """"tensor": every parameter's gradient to norm clip_norm by itself, as the DINO family does; "global": all
    together; "none"."""
    clip_norm: float = Field(default=3.0, gt=0)
    """Largest gradient norm."""
    ema: float = Field(default=0.996, ge=0, le=1)
    """Teacher momentum at the start. Short runs need a shorter memory: .9 for a few hundred steps."""
    final_ema: float = Field(default=1.0, ge=0, le=1)
    """Teacher momentum at the end, along a half cosine."""
    ema_points: tuple[Range, ...] = ()
    """(epoch, teacher momentum) corners of a piecewise linear course in place of that cosine, one value per epoch, as
    BootMAE has it. Empty: the cosine."""
    precision: Precision = "bf16"
    """Autocast of the backbone; parameters, heads and losses are fp32 always, the teacher's too. "fp16" is for GPUs
    without bf16 units (Turing: T4, RTX 20) and scales the loss so that small gradients survive. On CPUs measure bf16
    first."""
    reduction: Reduction = "fp32"
    """Format in which the gradients of several ranks are sent and added up. "bf16": half the bytes, for networks of 100
    Gb/s and less between machines; a gradient then is off by some 2^-8 of itself, as with bf16 activations. Parameters,
    moments and what is accumulated on a rank stay fp32. With one rank nothing is sent."""


@settings
class EngineConfig:
    stepper: Literal["deepspeed", "plain"] = "deepspeed"
    """"plain": PyTorch alone, gradients by one all-reduce; the yardstick, any precision, one process or a few."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters are split over the ranks
    (student and teacher). Results are the same; 1 is the fastest where the model fits."""
    bucket: int = Field(default=16_000_000, ge=1)
    """Numbers reduced together under DeepSpeed; on GPUs while the backward pass goes on, but for the last ones. Smaller
    saves memory, too small ones take longer. Changes the last bits of sums."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"cuda": a GPU for each rank, an error where there is none. "auto": GPUs where Ray offers any or its autoscaler
    can bring some (without Ray: where torch finds one), else CPUs; a run that was on GPUs does not go on on CPUs.
    Decided once, when the command starts."""
    tf32: Literal["auto", "on", "off"] = "auto"
    """Float32 products on a GPU, those of heads and losses, by tensor cores that read 10 of the 23 bits of a mantissa
    (TF32), several times faster. "auto": where optimisation.precision is lowered, as the published runs have heads in
    fp16; in fp32 everything is exact, convolutions too. Nothing on a CPU."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of PyTorch per rank. 0: the cores divided by the ranks on this machine."""
    deterministic: bool = False
    """On a GPU: a run that is stopped and goes on, or is done again, has bit-identical weights, on the same number and
    kind of GPUs with the same versions; slower. On a CPU in fp32 that holds without it. README: what it does not cover.
    """
    audit: bool = False
    """Write the samples of every step and rank to ranks/audit_*.jsonl: proof that none is lost or doubled."""
