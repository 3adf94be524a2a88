"""Answers come in order, some of them made ahead, and no more than that."""

from threading import Barrier, Lock

import pytest

from datapipe.core.parallel import in_order

THREADS = 3


def test_in_order__works_ahead_by_as_many_as_there_are_threads() -> None:
    together, lock, begun = Barrier(THREADS), Lock(), [0]

    def work(number: int) -> int:
        with lock:
            begun[0] += 1
        if number < THREADS:
            together.wait(300)  # broken unless so many are under way at the same time
        return -number

    answers = in_order(work, range(20), threads=THREADS)
    for number in range(20):
        assert next(answers) == -number
        assert begun[0] <= number + THREADS
    assert list(answers) == []


@pytest.mark.parametrize("threads", [0, THREADS])
def test_in_order__raises_an_error_in_its_turn_and_leaves_the_rest(threads: int) -> None:
    done: list[int] = []

    def work(number: int) -> int:
        if number == 4:
            raise ValueError("four")
        done.append(number)
        return number

    answers = in_order(work, range(1_000), threads=threads)
    assert [next(answers) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="four"):
        next(answers)
    assert len(done) <= 4 + 2 * THREADS
