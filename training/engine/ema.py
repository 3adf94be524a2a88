"""The teacher as a moving average of the student."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def update(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], momentum: float) -> None:
    """teacher[name] = momentum * teacher[name] + (1 - momentum) * student[name], in place, for every teacher name.

    Parameters only, frozen ones too (reference: the EMA in PASS `PASS/main_pass.py` train_one_epoch); matched by name,
    never by order. Local arithmetic on whatever part of the parameters this rank holds. The student may have
    parameters the teacher lacks (mask tokens).
    """
    missing = sorted(teacher.keys() - student.keys())
    assert not missing, f"the student lacks {missing}"
    averages = list(teacher.values())
    if averages:  # all at once: one launch on a GPU
        torch._foreach_lerp_(averages, [student[name].to(average) for name, average in teacher.items()], 1 - momentum)
