import pytest

from training.config.batch_split import portion


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(512, 64, 8, (64, 64)), (16, 64, 3, (6, 6)), (100, 64, 1, (100, 50)), (7, 2, 2, (4, 2)), (4, 4, 8, (1, 1))],
)
def test_portion__covers_the_batch_with_little_padding(
    batch: int, micro: int, world: int, expected: tuple[int, int]
) -> None:
    found = portion(batch, micro, world)
    assert tuple(found) == expected
    assert found.rows * world >= batch and found.rows % found.micro == 0 and found.micro <= micro
