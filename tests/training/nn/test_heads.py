import torch
from torch import nn

from training.nn.heads import DinoHead, HeadConfig, TokenHeads

SMALL = HeadConfig(out_dim=7, hidden=6, bottleneck=4)


def test_prototypes__are_cosines_times_length() -> None:
    torch.manual_seed(0)
    head = DinoHead(5, SMALL).double()
    rows = torch.randn(3, 5, dtype=torch.float64)
    bottleneck, directions = head.mlp(rows), head.last_layer.weight_v
    logits = head(rows)
    for row in range(3):
        for prototype in range(7):
            expected = torch.cosine_similarity(bottleneck[row], directions[prototype], dim=0)
            torch.testing.assert_close(logits[row, prototype], expected, rtol=0, atol=1e-12)


def test_norm_last_layer__freezes_the_length_only() -> None:
    for frozen in (True, False):
        head = DinoHead(5, HeadConfig(out_dim=7, hidden=6, bottleneck=4, norm_last_layer=frozen))
        assert head.last_layer.weight_g.requires_grad is not frozen
        assert head.last_layer.weight_v.requires_grad


def test_head__number_of_layers() -> None:
    single = DinoHead(5, HeadConfig(out_dim=7, hidden=6, bottleneck=4, layers=1))
    assert isinstance(single.mlp, nn.Linear)  # key mlp.weight, as the reference
    assert single(torch.randn(2, 3, 5)).shape == (2, 3, 7)
    assert len(DinoHead(5, HeadConfig(out_dim=7, hidden=6, bottleneck=4, layers=2)).state_dict()) == 6


def test_token_heads__share_nothing() -> None:
    heads = TokenHeads(5, SMALL, ("cls", "pt1"))
    heads({"cls": torch.randn(2, 5)})["cls"].sum().backward()
    assert all((parameter.grad is None) == ("pt1" in name or name.endswith("weight_g"))
               for name, parameter in heads.named_parameters())  # fmt: skip
