import torch
import torch.nn.functional as F
from torch import Tensor

from training.nn.blocks import Attention
from training.nn.mae_decoder import Decoder
from training.nn.positions import grid
from training.nn.vision_transformer import BackboneConfig

ENCODER = BackboneConfig(arch="custom", size=(32, 16), patch=8, width=12, depth=2, heads=3, init_std=0.3)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decoder(width: int = 20, heads: int = 3) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ENCODER, width=width, depth=2, heads=heads, out=7).double()


def test_attention__equals_naive_loops() -> None:
    torch.manual_seed(0)
    layer = Attention(10, 6, heads=3).double()  # 3 heads of 3 channels: 9 of 10
    tokens, memory = numbers(2, 4, 10), numbers(2, 5, 6, seed=1)
    query, (key, value) = layer.query(tokens), layer.key_value(memory).chunk(2, dim=-1)
    found = torch.zeros(2, 4, 9, dtype=torch.float64)
    for b in range(2):
        for head in range(3):
            part = slice(3 * head, 3 * head + 3)
            for t in range(4):
                scores = torch.stack([query[b, t, part] @ key[b, m, part] / 3**0.5 for m in range(5)])
                found[b, t, part] = sum(p * value[b, m, part] for m, p in enumerate(scores.softmax(dim=0)))
    torch.testing.assert_close(layer(tokens, memory), layer.proj(found), rtol=1e-12, atol=1e-12)


def test_attention__is_the_library_s() -> None:
    torch.manual_seed(0)
    layer = Attention(12, 12, heads=3).double()
    tokens = numbers(2, 4, 12)
    query = layer.query(tokens).unflatten(-1, (3, 4)).transpose(1, 2)
    key, value = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in layer.key_value(tokens).chunk(2, dim=-1))
    wanted = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(layer(tokens, tokens), layer.proj(wanted), rtol=1e-12, atol=1e-12)


def test_decoder__asks_in_any_order_and_sees_in_any_order() -> None:
    made, seen, memory = decoder(), numbers(2, 4, 12), numbers(2, 4, 12, seed=1)
    places = grid(4, 2).expand(2, -1, -1)
    found = made(seen, memory, places)
    assert found.shape == (2, 4 + 8, 20)
    backwards = made(seen.flip(1), memory.flip(1), places.flip(1))
    torch.testing.assert_close(backwards[:, :4].flip(1), found[:, :4])
    torch.testing.assert_close(backwards[:, 4:].flip(1), found[:, 4:])


def test_decoder__what_it_says_depends_on_the_place_the_seen_tokens_and_the_memory() -> None:
    made, seen, memory = decoder(), numbers(2, 4, 12), numbers(2, 4, 12, seed=1)
    places = grid(4, 2).expand(2, -1, -1)
    found = made(seen, memory, places)[:, 4:]
    assert not torch.allclose(found[:, 0], found[:, 1])
    for others in ((seen + 1, memory, places), (seen, numbers(2, 4, 12, seed=2), places), (seen, memory, places + 1)):
        assert not torch.allclose(made(*others)[:, 4:], found)


def test_decoder__every_parameter_learns() -> None:
    made = decoder()
    out = made.predict(made(numbers(2, 4, 12), numbers(2, 5, 12, seed=1), grid(4, 2).expand(2, -1, -1)))
    out.square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in made.parameters())
