"""What ranks tell each other with a step: all of it by one all-reduce, whoever takes part."""

from functools import partial
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from training.core.exchange import Exchange
from training.core.world import World


def _everything(world: World) -> list[Any]:
    """What is heard in three steps of a sum, of rows, and of rows that are told in every second step."""
    exchange, heard, now = Exchange(world), list[Any](), [0]

    def hear(name: str, told: Any) -> None:
        heard.append((now[0], name, told if isinstance(told, list) else told.tolist()))

    exchange.add_sum(lambda: [1.0, now[0]], partial(hear, "sum"))
    exchange.add_rows(lambda: [0.1 + world.rank], partial(hear, "rows"))
    exchange.add_rows(lambda: [now[0], world.rank] if now[0] % 2 else None, partial(hear, "second"))
    for now[0] in range(3):
        exchange.receive()
        exchange.send()
    exchange.receive()
    exchange.receive()  # once only
    return heard


def test_exchange__of_one_rank_is_heard_in_the_same_step() -> None:
    assert _everything(World()) == [
        (0, "sum", [1, 0]), (0, "rows", [[0.1]]),
        (1, "sum", [1, 1]), (1, "rows", [[0.1]]), (1, "second", [[1, 0]]),
        (2, "sum", [1, 2]), (2, "rows", [[0.1]]),
    ]  # fmt: skip


@pytest.mark.slow
def test_exchange__of_several_is_heard_in_the_next_step_on_all_alike() -> None:
    first, second = run_ranks(2, _everything)
    assert first == second == [
        (1, "sum", [2, 0]), (1, "rows", [[0.1], [1.1]]),
        (2, "sum", [2, 2]), (2, "rows", [[0.1], [1.1]]), (2, "second", [[1, 0], [1, 1]]),
        (2, "sum", [2, 4]), (2, "rows", [[0.1], [1.1]]),
    ]  # fmt: skip
