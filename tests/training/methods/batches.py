"""Batches taken apart: what micro-batches, padding and ranks make of them must add up to the whole."""

import torch
from torch import Tensor

from training.methods.base import Method, Outcome, TrainingProgress, Views

FLAT = ("weight", "position", "sample", "label", "camera")
"""One value an image; everything else has the view in front."""
UNKNOWN = ("position", "sample", "label", "camera")
"""-1 in padding."""
GREY = 0.3
"""Pixels of padding: no loss may look at them."""


def rows(views: Views, start: int, stop: int, padding: int = 0) -> Views:
    """Part of a batch, with padding rows at its end."""
    found = {}
    for name, values in views.items():
        assert isinstance(values, Tensor)
        axis = 0 if name in FLAT else 1
        kept = values.narrow(axis, start, stop - start)
        shape = [*kept.shape[:axis], padding, *kept.shape[axis + 1 :]]
        filler = -1 if name in UNKNOWN else GREY if axis and kept.is_floating_point() else 0
        found[name] = torch.cat([kept, kept.new_full(shape, filler)], dim=axis)
    return found  # type: ignore[return-value]


def gradients(made: Method) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in made.named_parameters() if value.grad is not None}


def taken_apart(made: Method, views: Views, start: TrainingProgress) -> tuple[Outcome, list[Outcome]]:
    """Outcomes of a batch of four images as a whole and as 3 images, 1 with padding, padding alone; loss, sums and
    gradients of the parts have to add up."""
    whole = made(views, start)
    whole.loss.backward()
    expected = gradients(made)
    made.zero_grad()
    parts: list[Outcome] = []
    for part in (rows(views, 0, 3), rows(views, 3, 4, padding=2), rows(views, 0, 0, padding=3)):
        parts.append(made(part, start))
        parts[-1].loss.backward()
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=1e-12, atol=0)
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value, rtol=1e-12, atol=1e-15)
    found = gradients(made)
    assert found.keys() == expected.keys() == made.roles().keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-14)
    for name in whole.metrics:
        assert all(part.metrics[name].isfinite().all() for part in parts), name
    return whole, parts


def same_images(whole: Outcome, parts: list[Outcome], name: str) -> None:
    """A metric of each image does not depend on what it came with."""
    both = torch.cat([parts[0].metrics[name], parts[1].metrics[name][:1]])
    torch.testing.assert_close(both, whole.metrics[name], rtol=1e-12, atol=1e-12)
