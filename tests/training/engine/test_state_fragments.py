import pytest
import torch

from training.engine.state_fragments import Piece, divide, whole

WORLDS = (1, 2, 3, 4, 7, 64)


def _pieces() -> list[Piece]:
    shapes = {"model/a": (3, 5), "model/b": (), "model/c": (1_000,), "model/d": (7,)}
    found = [whole(key, torch.arange(max(1, torch.Size(shape).numel())).view(shape).float()) for key, shape in
             shapes.items()]  # fmt: skip
    return [*found, whole("model/count", torch.arange(9)), whole("model/flags", torch.ones(11, dtype=torch.bool))]


@pytest.mark.parametrize("world", WORLDS)
def test_divide__every_number_once_in_about_equal_shares(world: int) -> None:
    pieces = _pieces()
    parts = [divide(pieces, rank, world) for rank in range(world)]
    for piece in pieces:
        mine = [one for part in parts for one in part if one.key == piece.key]
        ends = [0, *(one.end for one in mine)]
        assert [one.start for one in mine] == ends[:-1] and ends[-1] == piece.values.numel()
        assert torch.equal(torch.cat([one.values for one in mine]), piece.values)
    total = sum(piece.bytes for piece in pieces)
    assert all(abs(sum(one.bytes for one in part) - total / world) <= 16 for part in parts)


def test_divide__what_a_rank_alone_holds_it_saves() -> None:
    own = Piece("exp_avg/a", (10,), 4, torch.ones(3), shared=False)
    nothing = Piece("exp_avg/b", (10,), 10, torch.ones(0), shared=False)
    for rank in range(3):
        found = divide([own, nothing, whole("model/a", torch.ones(9))], rank, 3)
        assert found[0] is own and [piece.key for piece in found] == ["exp_avg/a", "model/a"]


def test_whole__writes_through() -> None:
    tensor = torch.zeros(2, 3)
    whole("model/a", tensor).values[4] = 5
    assert tensor[1, 1] == 5
    with pytest.raises(RuntimeError):
        whole("model/a", tensor.t())  # a copy would be restored in vain
