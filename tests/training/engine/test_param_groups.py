import pytest
import torch

from training.core.world import World
from training.engine.clock import Clock
from training.engine.param_groups import group_parameters, settings_at
from training.engine.plain import PlainStepper
from training.engine.settings import OptimisationConfig
from training.methods.base import Method
from training.methods.pass_reid import Pass, PassConfig
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig


def _method() -> Method:
    backbone = BackboneConfig(arch="custom", size=(16, 8), patch=8, width=8, depth=1, heads=1)
    return Pass(PassConfig(local_size=(8, 8), head=HeadConfig(out_dim=8, hidden=8, bottleneck=4)), backbone)


def test_group_parameters__every_trainable_parameter_once() -> None:
    method = _method()
    names = [name for group in group_parameters(method) for name in group.names]
    assert sorted(names) == sorted(name for name, value in method.named_parameters() if value.requires_grad)
    kinds = {(group.decay, group.release_epoch) for group in group_parameters(method)}
    assert kinds == {(True, 0), (True, 1), (False, 0)}


def test_group_parameters__layer_decay_slows_what_lies_deep_below() -> None:
    method = _method()
    factors = {name: group.lr_factor for group in group_parameters(method, layer_decay=0.5) for name in group.names}
    assert factors["student.backbone.patch_embed.proj.weight"] == 0.25
    assert factors["student.backbone.blocks.0.attn.qkv.weight"] == 0.5
    assert factors["student.backbone.norm.weight"] == factors["student.head.mlp_cls.0.weight"] == 1.0


def test_settings_at__ends_of_the_schedules() -> None:
    config = OptimisationConfig(epochs=10, batch=10, warmup_epochs=1, lr=1e-3, final_lr=1e-6)
    clock = Clock(batch=10, epoch_samples=100, epochs=10, seed=0)
    first, peak, last = (settings_at(config, clock.at(samples)) for samples in (0, 90, 990))
    assert first == pytest.approx((0.0, 0.04, 0.996, 0.0))
    assert peak.lr == pytest.approx(1e-3)
    assert 1e-6 < last.lr < 2e-6 and 0.39 < last.weight_decay < 0.4 and 0.9999 < last.ema < 1


def test_frozen_parameters__neither_move_nor_count_steps() -> None:
    method = _method()
    stepper = PlainStepper(method, group_parameters(method), OptimisationConfig(lr=0.1), World())
    frozen = next(name for name in stepper.names if "last_layer" in name)
    clock = Clock(batch=10, epoch_samples=20, epochs=2, seed=0)
    for samples in (0, 10, 20):
        before = stepper.parameters[frozen].detach().clone()
        progress = clock.at(samples)
        stepper.apply(settings_at(OptimisationConfig(epochs=2, batch=10, warmup_epochs=0), progress), progress)
        for value in stepper.parameters.values():
            value.grad = torch.ones_like(value)
        stepper._totals = {"loss": torch.tensor(1.0)}
        assert stepper.step().finite
        assert torch.equal(before, stepper.parameters[frozen]) == (samples < 20)
    assert stepper.steps()[frozen] == 1


def test_step__a_gradient_that_is_not_finite_changes_nothing() -> None:
    method = _method()
    stepper = PlainStepper(method, group_parameters(method), OptimisationConfig(), World())
    clock = Clock(batch=10, epoch_samples=20, epochs=2, seed=0)
    stepper.apply(settings_at(OptimisationConfig(epochs=2, batch=10), clock.at(20)), clock.at(20))
    before = {name: value.detach().clone() for name, value in stepper.parameters.items()}
    for value in stepper.parameters.values():
        value.grad = torch.full_like(value, float("nan"))
    stepper._totals = {"loss": torch.tensor(1.0)}
    assert not stepper.step().finite
    assert all(torch.equal(value, stepper.parameters[name]) for name, value in before.items())


def test_lr_of__a_factor_multiplies_the_peak_alone() -> None:
    """A group of twice the rate begins its warm-up where all do, and ends where all do."""
    config = OptimisationConfig(schedule="epoch", epochs=10, batch=10, warmup_epochs=2, lr=1e-3, warmup_lr=1e-4,
                                final_lr=1e-5)  # fmt: skip
    clock = Clock(batch=10, epoch_samples=100, epochs=10, seed=0)
    start, half, end = (settings_at(config, clock.at(samples)) for samples in (90, 100, 1_000))
    assert start.lr == pytest.approx(1e-4) and start.lr_of(2) == pytest.approx(1e-4)
    assert half.lr == pytest.approx(5.5e-4) and half.lr_of(2) == pytest.approx(10.5e-4)
    assert end.lr_of(1) == pytest.approx(1e-5) == end.lr_of(2)
