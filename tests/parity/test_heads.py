from typing import Any

import pytest
import torch

from tests.support.golden import difference, golden, group, tolerance
from training.nn.heads import DinoHead, HeadConfig, MaskedHead, TokenHeads
from training.weights.counted_keys import load_counted


def head_config(constructor: dict[str, Any], *, norm_last_layer: bool) -> HeadConfig:
    return HeadConfig(
        out_dim=constructor["out_dim"],
        hidden=constructor["hidden_dim"],
        bottleneck=constructor["bottleneck_dim"],
        layers=constructor["nlayers"],
        norm_last_layer=norm_last_layer,
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_dino_head__output_and_gradients(frozen: bool) -> None:
    about, tensors = golden("dino_head")
    case = f"ssl_norm_last_{str(frozen).lower()}/"
    constructor = about["hyper_parameters"]["ssl_constructor"]
    head = DinoHead(constructor["in_dim"], head_config(constructor, norm_last_layer=frozen))
    load_counted(head, group(tensors, case + "state/"))
    trainable = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    assert sorted(trainable) == sorted(about["hyper_parameters"][case + "trainable"])

    rows = tensors[case + "input"].clone().requires_grad_()
    output = head(rows)
    assert difference(output, tensors[case + "output"]) < tolerance(about, "output")
    (output * tensors[case + "cotangent"]).sum().backward()
    gradients = group(tensors, case + "grad/")
    assert gradients.keys() == set(trainable)
    assert rows.grad is not None
    assert difference(rows.grad, tensors[case + "grad_input"]) < tolerance(about, "gradient")
    for name, theirs in gradients.items():
        ours = head.get_parameter(name).grad
        assert ours is not None, name
        assert difference(ours, theirs) < tolerance(about, "gradient"), name


def test_token_heads__one_head_per_token() -> None:
    about, tensors = golden("dino_head")
    settings = about["hyper_parameters"]
    inputs = group(tensors, "pass/global_input_")
    parts = sorted(name for name in inputs if name != "cls")
    constructor = settings["pass_constructor"]
    config = head_config(constructor, norm_last_layer=settings["pass_norm_last_layer"])
    heads = TokenHeads(constructor["in_dim"], config, ("cls", *parts))
    load_counted(heads, group(tensors, "pass/state/"))
    outputs = heads(inputs)
    for name, theirs in group(tensors, "pass/global_output_").items():
        assert difference(outputs[name], theirs) < tolerance(about, "output"), name
    for number, part in enumerate(parts, start=1):
        area = f"pass/area{number}_"
        local = heads({"cls": tensors[area + "input_cls"], part: tensors[area + "input_pt"]})
        assert difference(local["cls"], tensors[area + "output_cls"]) < tolerance(about, "output")
        assert difference(local[part], tensors[area + "output_pt"]) < tolerance(about, "output")


@pytest.mark.parametrize("case", ["ibot_shared/", "ibot_not_shared/"])
@torch.no_grad()
def test_masked_head__cls_and_patches(case: str) -> None:
    about, tensors = golden("dino_head")
    constructor = about["hyper_parameters"][case + "constructor"]
    shared = constructor["shared_head"]
    config = head_config(constructor, norm_last_layer=constructor["norm_last_layer"])
    own = None if shared else constructor["patch_out_dim"]
    head = MaskedHead(constructor["in_dim"], config, patch_out_dim=own)
    state = group(tensors, case + "state/")
    twice = [name for name in state if shared and name.startswith("last_layer2.")]
    for name in twice:  # one layer under two names
        assert torch.equal(state[name], state[name.replace("last_layer2", "last_layer")])
    load_counted(head, state, leave_out=twice)
    tokens = tensors[case + "tokens_input"]
    out = head({"cls": tokens[:, 0], "patch": tokens[:, 1:]})
    assert difference(out["cls"], tensors[case + "cls_output"]) < tolerance(about, "output")
    assert difference(out["patch"], tensors[case + "patch_output"]) < tolerance(about, "output")
    alone = head({"cls": tensors[case + "vector_input"]})["cls"]
    assert difference(alone, tensors[case + "vector_output"]) < tolerance(about, "output")


def test_dino_head__keys_are_the_reference_ones() -> None:
    head = DinoHead(4, HeadConfig(out_dim=6, hidden=5, bottleneck=3))
    assert list(head.state_dict()) == [
        *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
    assert torch.equal(head.last_layer.weight_g, torch.ones(6, 1))
