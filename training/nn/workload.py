"""What a micro-batch is to a network, in numbers: views through backbones, rows through heads, tokens through decoders.

A method says it of itself (`Method.workload`); what that takes in bytes and operations is summed up from it by code
that knows no method (`training/preflight`).
"""

from typing import NamedTuple

from datapipe.core.config import Size
from training.nn.heads import HeadConfig


class Stack(NamedTuple):
    """Views of one size, as they go through a backbone together."""

    rows: int
    """Views times images."""
    size: Size
    """(height, width), pixels."""
    patches: int
    """Patches that are cut."""
    tokens: int
    """Tokens that enter the blocks; fewer than patches where those are dropped first."""


class Scored(NamedTuple):
    """Rows that go through one head with prototypes, and what the teacher says about them."""

    student: int
    """Rows of the student."""
    targets: int
    """Rows of targets that the loss keeps."""
    teacher: int
    """Rows that the teacher scores."""
    prototypes: int
    teacher_mlp: int = 0
    """Rows that the teacher takes through the MLP of the head; 0: those that it scores."""


class Decoding(NamedTuple):
    """What goes through one decoder (`training/nn/mae_decoder.py`)."""

    images: int
    tokens: int
    """Tokens of an image in the decoder: those of the encoder and those of places to predict."""
    seen: int
    """Tokens of an image that come from the encoder; as many of its outputs are attended to."""
    predicted: int
    """Places of an image that are read out."""
    width: int
    """Channels of the decoder."""
    inner: int
    """Channels of all its attention heads together."""
    heads: int
    hidden: int
    """Width of its MLPs."""
    depth: int
    out: int
    """Numbers that are read out of each place."""


class Workload(NamedTuple):
    """One micro-batch of a method."""

    student: tuple[Stack, ...]
    """What its backbone sees, with gradient."""
    teacher: tuple[Stack, ...] = ()
    """What the teacher's sees, without."""
    head: HeadConfig | None = None
    """Shape of the heads with prototypes."""
    scored: tuple[Scored, ...] = ()
    """The rows of each of them."""
    decoded: tuple[Decoding, ...] = ()
    loss_kept: int = 0
    """Numbers in float32 that the loss keeps for the backward pass, beside those of `scored`."""
    loss_alive: int = 0
    """Numbers in float32 that are alive while it is formed and go then, beside those of `scored`; images that the
    method changes before the student sees them, too."""
    complete: bool = True
    """False: what heads and loss take is not said, and memory is known from below alone."""
    products_complete: bool = True
    """False: matrix products of teacher or heads are not said, and operations are known from below alone."""
