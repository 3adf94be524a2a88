import pytest

from training.checkpoint.metadata import MARKER
from training.checkpoint.retention import due, kept, old_files, strays, superseded
from training.checkpoint.settings import CheckpointConfig


def _names(*steps: int) -> list[str]:
    return [f"step_{step:07d}" for step in steps]


def _left(
    config: CheckpointConfig, complete: list[str], newest: int, epoch_steps: float = 10.0, partial: tuple[int, ...] = ()
) -> list[int]:
    folders = sorted({*complete, *_names(*partial)})
    going = superseded(config, complete, folders, f"step_{newest:07d}", epoch_steps)
    return sorted(int(name[5:]) for name in folders if name not in going)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (CheckpointConfig(every_steps=4), [4, 8, 12, 16, 20, 24]),
        (CheckpointConfig(every_steps=10, keep_every_steps=8), [8, 10, 16, 20, 24]),
        (CheckpointConfig(every_steps=0, keep_every_epochs=1), [11, 21]),
        (CheckpointConfig(every_steps=0, keep_every_epochs=0.5), [6, 11, 16, 21]),
        (CheckpointConfig(every_steps=0), []),
    ],
)
def test_due__by_steps_and_by_epochs(config: CheckpointConfig, steps: list[int]) -> None:
    """Epochs of 10.5 steps: the first step at or after each."""
    assert [step for step in range(1, 26) if due(config, step, 10.5)] == steps


def test_kept__once_per_multiple_whatever_the_rounding() -> None:
    config = CheckpointConfig(keep_every_epochs=0.1)
    found = [step for step in range(1, 3_001) if kept(config, step, 1_000.0)]
    assert found == list(range(100, 3_001, 100))


def test_superseded__the_last_and_those_for_evaluation_stay() -> None:
    config = CheckpointConfig(keep_last=2, keep_every_steps=20)
    assert _left(config, _names(10, 20, 30, 40, 50, 60, 70), 70) == [20, 40, 60, 70]
    assert _left(config, _names(70, 60, 50, 40, 30, 20, 10), 70) == [20, 40, 60, 70], "in whatever order"
    assert _left(CheckpointConfig(keep_last=3), _names(10, 20, 30, 40), 40) == [20, 30, 40]
    assert _left(CheckpointConfig(keep_every_epochs=2), _names(10, 20, 30, 40, 50), 50) == [20, 40, 50]


def test_superseded__partial_ones_of_older_steps_go_younger_ones_may_be_somebodys() -> None:
    assert _left(CheckpointConfig(), _names(10, 20), 20, partial=(5, 15, 20, 30)) == [10, 20, 30]


def test_superseded__damaged_ones_ahead_do_not_count() -> None:
    """After falling back from 30 and 40 to 10, step 20 is new: 10 and 20 are the last two."""
    assert _left(CheckpointConfig(keep_last=2), _names(10, 20, 30, 40), 20) == [10, 20, 30, 40]


def test_superseded__foreign_ones_count_for_nothing_and_stay() -> None:
    names = _names(10, 20, 30, 40)
    assert superseded(CheckpointConfig(), names, names, names[-1], 10.0, foreign=_names(10, 30)) == []


def test_old_files__markers_go_first() -> None:
    files = [f"{name}/{file}" for name in _names(10, 20, 30) for file in ("rank_00000.aa-1.safetensors", MARKER)]
    going = old_files([*files, "notes.txt", "step_1/x", "other/step_0000001"], "step_0000020", ["step_0000005"])
    assert [name.endswith(MARKER) for name in going] == [True, True, False, False]
    assert {*going} == {*files[:4]}


def test_strays__all_that_the_marker_does_not_know() -> None:
    files = ["step_0000020/rank_00000.aa-1.safetensors", f"step_0000020/{MARKER}"]
    other = ["step_0000020/rank_00000.aa-1.json", "step_0000020/rank_00000.bb-1.safetensors"]
    known = ["rank_00000.aa-1.safetensors"]
    assert strays([*files, *other, "step_0000030/rank_00000.bb-1.safetensors"], "step_0000020", known) == other
