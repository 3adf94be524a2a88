"""Sums of all ranks that are heard later: of one rank here; of two in the tests of what uses it."""

import torch

from training.core.late_reduce import LateReduce
from training.core.world import World


def test_late_reduce__answers_once() -> None:
    late = LateReduce(World())
    assert late.answer() is None
    late.ask(torch.tensor([1.0, 2.0]))
    answer = late.answer()
    assert answer is not None and answer.tolist() == [1, 2] and late.answer() is None


def test_late_reduce__rows_are_a_table_with_the_precision_they_had() -> None:
    late = LateReduce(World())
    late.ask_rows(torch.tensor([0.1, 0.2], dtype=torch.float64))
    answer = late.answer()
    assert answer is not None and answer.tolist() == [[0.1, 0.2]]
