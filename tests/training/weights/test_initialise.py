import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datapipe.core.config import StorageConfig, ViewConfig
from datapipe.core.errors import ConfigError, DataError, NotFoundError
from datapipe.storage import open_store
from tests.support.golden import difference, golden, group, tolerance
from tests.support.trajectory import dino_config, pass_config, personvit_config
from tests.training.weights import published_files as files
from tests.training.weights.published_files import backbone_state, save
from tests.training.weights.test_safe_load import Runs
from training.config.build import build_method, initial_method
from training.config.run_config import RunConfig
from training.methods.dino import DinoConfig
from training.methods.pass_reid import PassConfig
from training.methods.personmae import PersonMaeConfig
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig
from training.weights.export import Provenance, export
from training.weights.initialise import InitConfig, in_words
from training.weights.published import Stated, read_published

HEAD = HeadConfig(out_dim=16, hidden=8, bottleneck=4)


def backbone_of(setting: dict[str, Any], **changes: Any) -> BackboneConfig:
    known = BackboneConfig(
        arch="custom", size=tuple(setting["img_size"]), patch=setting["patch_size"], width=setting["embed_dim"],
        depth=setting["depth"], heads=setting["num_heads"], mlp_ratio=setting["mlp_ratio"],
    )  # fmt: skip
    return replace(known, **changes)


def without_mask(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "masked_embed"}


@pytest.mark.parametrize(("item", "make"), [
    ("train_dino", dino_config), ("train_pass", pass_config), ("train_ibot", personvit_config),
])  # fmt: skip
def test_start__from_a_training_checkpoint_of_the_same_method(item: str, make: Any, tmp_path: Path) -> None:
    about, tensors = golden(item)
    setting = about["hyper_parameters"]
    initial = group(tensors, "init/")
    state, head = group(initial, "backbone."), group(initial, "head.")
    mask = {name: tensor for name, tensor in state.items() if name == "masked_embed"}
    loss = "ibot_loss" if mask else "dino_loss"
    centres = {name: torch.randn_like(centre) for name, centre in group(tensors, "f64/final_center/").items()}
    saved = files.training_checkpoint(without_mask(state), head, loss=loss, extra=mask, centres=centres)
    path = save(saved, tmp_path / "x.pth")
    config = RunConfig(method=make(setting), backbone=backbone_of(setting), init=InitConfig(weights=path, heads=True))
    method, origin = initial_method(config)
    for network in (method.student, method.teacher):
        for name, tensor in network.state_dict().items():
            if name != "backbone.masked_embed":
                assert torch.equal(tensor, initial[name]), name
    assert origin["fresh"] == list(mask) and origin["heads"]
    names = {"center": "centre_cls", "center2": "centre_patch"}
    own = {names.get(name, name.replace("center", "centre")): centre for name, centre in centres.items()}
    assert own.keys() == {name for name, _ in method.named_buffers() if name.startswith("centre_")}
    assert all(torch.equal(method.get_buffer(name), centre.reshape(1, -1).float()) for name, centre in own.items())
    assert re.search("starts from x.pth .* from its teacher.*centres of the loss: taken$", in_words(origin))
    student, _ = initial_method(replace(config, init=replace(config.init, network="student")))
    for name, tensor in student.student.state_dict().items():
        wanted = initial[name] + (0 if name == "backbone.masked_embed" else 1)
        assert torch.equal(tensor, wanted), name
    both, origin = initial_method(replace(config, init=replace(config.init, network="both")))
    for network, other in ((both.student, student.student), (both.teacher, method.teacher)):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert "student and teacher each from its own" in in_words(origin) and "normalised" not in in_words(origin)
    _, origin = initial_method(replace(config, views=ViewConfig(statistics="half")))
    assert "its images were normalised with 'imagenet', this run's are with 'half'" in in_words(origin)


@torch.no_grad()
def test_start__positions_for_another_size_are_those_of_local_views(tmp_path: Path) -> None:
    about, tensors = golden("pass_backbone")
    setting = about["hyper_parameters"]
    rows, columns = setting["local_grid"]
    size = (rows * setting["patch_size"], columns * setting["patch_size"])
    path = save(backbone_state("pass_backbone"), tmp_path / "x.pth")
    stated = Stated(heads=setting["num_heads"], size=tuple(setting["img_size"]))
    export(read_published(path, StorageConfig(), stated).backbone, open_store(str(tmp_path)), Provenance())
    config = RunConfig(
        method=PassConfig(head=HEAD, local_size=size), backbone=backbone_of(setting, size=size, drop_path=0.1),
        init=InitConfig(weights=str(tmp_path)),
    )  # fmt: skip
    method, origin = initial_method(config)
    table = method.backbone().pos_embed
    assert difference(table, tensors["pos_table_local"]) < tolerance(about, "output")
    assert origin["positions"] == {"from": tuple(setting["img_size"]), "to": size, "interpolation": "bicubic"}
    seen = method.backbone()(tensors["area1_input"], part=1)
    assert difference(seen.cls, tensors["area1_cls"]) < tolerance(about, "output")


def test_start__pass_from_a_vit_and_back(tmp_path: Path) -> None:
    """Part tokens start as from the seed alone; the CLS slot of a common table becomes PASS's own position."""
    setting = golden("transreid_ssl_backbone")[0]["hyper_parameters"]
    state = backbone_state("transreid_ssl_backbone")
    path = save(state, tmp_path / "x.pth")
    config = RunConfig(method=PassConfig(head=HEAD), backbone=backbone_of(setting), init=InitConfig(weights=path))
    before = torch.random.get_rng_state()
    method, origin = initial_method(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    fresh = build_method(config).student.state_dict()
    for name, tensor in method.student.state_dict().items():
        if name.startswith("head.") or "part" in name:
            assert torch.equal(tensor, fresh[name]), name
        elif name.endswith("_pos") or name.endswith("pos_embed"):
            assert torch.equal(tensor, state["pos_embed"][:, :1] if "cls" in name else state["pos_embed"][:, 1:])
        else:
            assert torch.equal(tensor, state[name.removeprefix("backbone.")]), name
    assert origin["fresh"] == [*(f"part{part}_pos" for part in (1, 2, 3)), *(f"part_token{part}" for part in (1, 2, 3))]
    student = method.student.state_dict()
    assert all(torch.equal(tensor, student[name]) for name, tensor in method.teacher.state_dict().items())

    export(method.backbone(), open_store(str(tmp_path / "export")), Provenance(method="pass", origin=origin))
    again = replace(config, method=DinoConfig(head=HEAD), init=InitConfig(weights=str(tmp_path / "export")))
    dino, origin = initial_method(again)
    assert all(torch.equal(tensor, state[name]) for name, tensor in dino.backbone().state_dict().items())
    assert (origin["layout"], origin["method"], origin["origin"]["file"]) == ("export", "pass", "x.pth")


def test_start__the_ics_stem(tmp_path: Path) -> None:
    setting = golden("transreid_ssl_ics_backbone")[0]["hyper_parameters"]
    state = backbone_state("transreid_ssl_ics_backbone")
    init = InitConfig(weights=save(state, tmp_path / "x.pth"))
    config = RunConfig(method=DinoConfig(head=HEAD), backbone=backbone_of(setting, stem="ics"), init=init)
    for network in (initial_method(config)[0].student, initial_method(config)[0].teacher):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.backbone.state_dict().items())
    with pytest.raises(ConfigError, match="the weights have stem ics, the recipe patch"):
        initial_method(replace(config, backbone=backbone_of(setting)))


@pytest.mark.parametrize("table", ["sincos", "learned"])
def test_start__personmae_takes_the_encoder_of_mae_with_its_positions(table: Any, tmp_path: Path) -> None:
    setting = golden("transreid_ssl_backbone")[0]["hyper_parameters"]
    state = backbone_state("transreid_ssl_backbone")
    method = PersonMaeConfig(positions=table, pixel_width=8, feature_width=8, decoder_heads=2)
    init = InitConfig(weights=save(files.mae(state), tmp_path / "x.pth"))
    made, origin = initial_method(RunConfig(method=method, backbone=backbone_of(setting), init=init))
    for network in (made.student, made.teacher):
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.backbone.state_dict().items())
    assert made.backbone().pos_embed.requires_grad == (table == "learned") and origin["layout"] == "mae"


def test_start__what_does_not_fit_is_told(tmp_path: Path) -> None:
    setting = golden("transreid_ssl_backbone")[0]["hyper_parameters"]
    state = backbone_state("transreid_ssl_backbone")
    config = RunConfig(
        method=DinoConfig(head=HEAD), backbone=backbone_of(setting),
        init=InitConfig(weights=save(state, tmp_path / "x.pth"), heads=True),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no projection heads"):
        initial_method(config)
    with pytest.raises(DataError, match="missing: blocks"):
        initial_method(replace(config, backbone=backbone_of(setting, depth=setting["depth"] + 1)))
    with pytest.raises(ConfigError, match="the weights have shape width .* the recipe width"):
        initial_method(replace(config, backbone=backbone_of(setting, width=3 * setting["embed_dim"])))
    with pytest.raises(NotFoundError):
        initial_method(replace(config, init=InitConfig(weights=str(tmp_path / "none.pth"))))
    trace = tmp_path / "trace"
    bait = {**state, "norm.weight": Runs(os.system, f"touch {trace}")}
    with pytest.raises(DataError, match="nothing was run"):
        initial_method(replace(config, init=InitConfig(weights=save(bait, tmp_path / "bait.pth"))))
    assert not trace.exists()


def test_start__heads_of_another_shape(tmp_path: Path) -> None:
    about, _ = golden("transreid_ssl_backbone")
    state = backbone_state("transreid_ssl_backbone")
    content = files.training_checkpoint(state, files.head_state("ssl_norm_last_true"))
    config = RunConfig(
        method=DinoConfig(head=HEAD), backbone=backbone_of(about["hyper_parameters"]),
        init=InitConfig(weights=save(content, tmp_path / "x.pth"), heads=True),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"of another shape: last_layer\.weight_g"):
        initial_method(config)


def test_start__centres_that_are_missing_are_said_and_others_refused(tmp_path: Path) -> None:
    about, tensors = golden("train_dino")
    setting, initial = about["hyper_parameters"], group(tensors, "init/")
    state, head = group(initial, "backbone."), group(initial, "head.")
    path = tmp_path / "x.pth"
    config = RunConfig(
        method=dino_config(setting), backbone=backbone_of(setting), init=InitConfig(weights=str(path), heads=True)
    )
    save(files.training_checkpoint(state, head, centres={}), path)
    method, origin = initial_method(config)
    assert in_words(origin).endswith("centres of the loss: from zero, the file has none")
    assert not method.get_buffer("centre_cls").any()
    sinkhorn = replace(config, method=replace(dino_config(setting), targets="sinkhorn"))
    assert "centres" not in in_words(initial_method(sinkhorn)[1])
    for wrong in ({"center": torch.zeros(1, 4)}, {"center_pt1": method.get_buffer("centre_cls")}):
        save(files.training_checkpoint(state, head, centres=wrong), path)
        with pytest.raises(DataError, match="centres of the loss do not fit"):
            initial_method(config)
    save(state, path)
    with pytest.raises(ConfigError, match="one network, not a student and its teacher"):
        initial_method(replace(config, init=InitConfig(weights=str(path), network="both")))
