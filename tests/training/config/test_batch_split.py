import pytest

from training.config.batch_split import split_batch


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(512, 64, 8, (64, 64)), (16, 64, 3, (6, 6)), (100, 64, 1, (100, 50)), (7, 2, 2, (4, 2)), (4, 4, 8, (1, 1))],
)
def test_split_batch__covers_the_batch_with_little_padding(
    batch: int, micro: int, world: int, expected: tuple[int, int]
) -> None:
    found = split_batch(batch, micro, world)
    assert tuple(found) == expected
    assert found.per_rank * world >= batch and found.per_rank % found.micro_batch == 0 and found.micro_batch <= micro


@pytest.mark.parametrize(
    ("batch", "micro", "world", "group", "expected"),
    [
        (256, 0, 1, 64, (256, 256)), (256, 0, 3, 64, (128, 128)), (256, 64, 3, 64, (128, 64)),
        (256, 100, 1, 64, (256, 64)), (256, 150, 1, 64, (256, 128)), (256, 4, 5, 64, (64, 64)), (12, 0, 8, 6, (6, 6)),
    ],
)  # fmt: skip
def test_split_batch__keeps_groups_whole_on_any_number_of_ranks(
    batch: int, micro: int, world: int, group: int, expected: tuple[int, int]
) -> None:
    found = split_batch(batch, micro, world, group)
    assert tuple(found) == expected
    assert found.per_rank * world >= batch and found.per_rank % found.micro_batch == found.micro_batch % group == 0


@pytest.mark.parametrize("lost", range(9))
def test_split_batch__goes_on_whatever_machines_are_lost(lost: int) -> None:
    """64 machines of 8 GPUs and fewer: all of the batch, and at most one image of padding more than its share."""
    for world in (512 - 8 * lost, 64 - 8 * lost + 1):
        found = split_batch(4096, 32, world)
        assert 4096 <= found.per_rank * world < 4096 + world * found.micro_batches
