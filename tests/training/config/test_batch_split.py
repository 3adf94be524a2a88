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
