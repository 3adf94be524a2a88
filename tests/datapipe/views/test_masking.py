"""Masks: the references' statistics on any grid, the same for any batch that holds the image."""

from itertools import cycle
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import chi2_contingency, ks_2samp

from datapipe.views import masking
from datapipe.views.masking import MaskConfig, Masks, MaskSpec, block_mask, draw_masks
from tests.support.golden import golden

GRID = (16, 8)
FIXED = MaskConfig(ratios=(0.3,), spreads=(0.0,))


def drawn(config: MaskConfig, count: int = 400, *, grid: tuple[int, int] = GRID, equal: bool = False) -> Masks:
    return draw_masks([MaskSpec(grid, config, equal)], 3, np.arange(count))[0]


def listed(value: object) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else (float(str(value)),)


def config_of(setting: dict[str, Any]) -> MaskConfig:
    return MaskConfig(ratios=listed(setting["pred_ratio"]), spreads=listed(setting["pred_ratio_var"]),
                      aspect=tuple(setting["aspect_ratio"]))  # fmt: skip


@pytest.mark.slow
def test_block_masks__have_the_statistics_of_the_reference() -> None:
    about, tensors = golden("ibot_block_masks")
    for name, setting in about["hyper_parameters"].items():
        config = config_of(setting)
        theirs = tensors[f"{name}/achieved_ratio_many"].numpy()
        masks = drawn(config, len(theirs), grid=tuple(setting["grid"]))
        ours = masks.mean(axis=(1, 2))
        error = np.sqrt((ours.var() + theirs.var()) / len(theirs))
        assert abs(ours.mean() - theirs.mean()) <= 3 * error + 1e-12, name
        assert ks_2samp(ours, theirs).pvalue > 0.001, name
        assert ours.max() <= max(np.add(config.ratios, config.spreads))
        assert abs((ours == 0).mean() - (theirs == 0).mean()) < 0.05
        place_error = np.sqrt(masks.var(axis=0) * 2 / len(theirs)) + 1 / len(theirs)
        places = np.abs(masks.mean(axis=0) - tensors[f"{name}/mean_mask"].numpy())  # one comparison per patch
        assert (places / place_error).max() < 4.5, name


def accepted(grid: tuple[int, int], mask: Masks, places: list[tuple[slice, slice] | None]) -> list[tuple[int, int]]:
    """Heights and widths of the rectangles that were hidden, of all that were tried: those that led to this mask."""
    built, sizes = np.zeros(grid, bool), []
    for place in places:
        if place is not None and not built[place].all() and mask[place].all():
            built[place] = True
            sizes.append(built[place].shape)
    np.testing.assert_array_equal(built, mask)
    return sizes  # type: ignore[return-value]


@pytest.mark.slow
def test_block_masks__block_sizes_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[slice, slice] | None] = []
    original = masking._rectangle

    def watched(*arguments: Any) -> Any:
        tried.append(original(*arguments))
        return tried[-1]

    monkeypatch.setattr(masking, "_rectangle", watched)
    about, tensors = golden("ibot_block_masks")
    for name, setting in about["hyper_parameters"].items():
        grid = tuple(setting["grid"])
        sizes: list[tuple[int, int]] = []
        for position in range(1500):
            tried.clear()
            (mask,) = draw_masks([MaskSpec(grid, config_of(setting))], 4, np.array([position]))[0]
            sizes += accepted(grid, mask, tried)
        for axis, kind in enumerate(("height", "width")):
            theirs = tensors[f"{name}/block_{kind}_histogram"].numpy()
            ours = np.bincount([size[axis] for size in sizes], minlength=len(theirs))
            often = theirs + ours > 20
            assert ours[len(theirs) - 1] == theirs[-1] == 0  # never as high or as wide as the grid
            assert chi2_contingency([ours[often], theirs[often]]).pvalue > 0.001, (name, kind)


def test_draw_masks__hang_on_seed_and_position_alone() -> None:
    laws = [MaskSpec(GRID), MaskSpec(GRID, MaskConfig(kind="random"))]
    positions = np.array([7, 1_000_003, 3, 12])
    whole = draw_masks(laws, 5, positions)
    assert whole.shape == (2, 4, *GRID) and whole.dtype == np.bool_
    for row in range(4):
        np.testing.assert_array_equal(draw_masks(laws, 5, positions[row : row + 1])[:, 0], whole[:, row])
    many = draw_masks([MaskSpec(GRID, FIXED)] * 2, 5, np.arange(50))
    assert not np.array_equal(many[0], many[1])
    assert not np.array_equal(many, draw_masks([MaskSpec(GRID, FIXED)] * 2, 6, np.arange(50)))


@pytest.mark.parametrize("grid", [(16, 8), (24, 8), (4, 4), (14, 14), (8, 4), (3, 2)])
def test_block_masks__of_any_grid_stay_below_their_share(grid: tuple[int, int]) -> None:
    for ratio in (0.1, 0.3, 0.75):
        config = MaskConfig(ratios=(ratio,), spreads=(0.0,))
        hidden = drawn(config, 200, grid=grid).sum(axis=(1, 2))
        assert (hidden <= ratio * grid[0] * grid[1]).all()
        assert hidden.mean() >= 0.5 * np.floor(ratio * grid[0] * grid[1])


@pytest.mark.parametrize("kind", ["block", "random"])
def test_equal__hides_exactly_as_many_everywhere(kind: str) -> None:
    config = MaskConfig(kind=kind, ratios=(0.75,), spreads=(0.0,))  # type: ignore[arg-type]
    masks = drawn(config, equal=True)
    assert set(masks.sum(axis=(1, 2)).tolist()) == {96}
    assert masks.mean(axis=0).min() > 0.1  # rectangles reach the corners least
    if kind == "block":  # what is made up patch by patch only adds
        assert not (drawn(config) & ~masks).any()


def test_random_masks__every_patch_alike() -> None:
    masks = drawn(MaskConfig(kind="random", ratios=(0.25, 0.5), spreads=(0.0, 0.25)), 4000)
    share = masks.mean(axis=(1, 2))
    assert (share == 0.25).mean() == pytest.approx(0.5, abs=0.03)
    assert share[share != 0.25].min() < 0.26 and share.max() > 0.73
    assert abs(masks.mean(axis=0) - masks.mean()).max() < 0.04


def test_block_mask__follows_its_numbers_by_hand() -> None:
    config = MaskConfig(ratios=(0.5,), spreads=(0.0,), aspect=(1.0, 1.0), least_area=4)
    refused = [1.0, 0.5, 0.0, 0.0]  # 32 patches: a square of 6, wider than 5 columns
    square = [0.0, 0.5, 0.0, 0.99]  # 4 patches at the top right
    numbers = iter([refused, square] + [refused] * 10 + [square])
    mask = block_mask((8, 5), 0.9, numbers, config)
    expected = np.zeros((8, 5), bool)
    expected[:2, 3:] = True
    np.testing.assert_array_equal(mask, expected)  # ten refusals end the mask
    assert next(numbers) == square
    again = block_mask((8, 5), 0.5, cycle([square]), config)  # adds nothing: refused ten times
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize(("changes", "told"), [
    ({"ratios": (0.3,)}, "1 ratios need as many spreads"),
    ({"ratios": (0.1, 0.3)}, "ratio - spread"),
    ({"ratios": (0.3,), "spreads": (0.7,)}, "ratio - spread"),
    ({"aspect": (2.0, 1.0)}, "aspect"),
])  # fmt: skip
def test_config__mistakes_are_told(changes: dict[str, object], told: str) -> None:
    if changes.get("ratios") == (0.1, 0.3):
        changes = {**changes, "spreads": (0.2, 0.2)}
    with pytest.raises(ValidationError, match=told):
        MaskConfig(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="single ratio"):
        MaskSpec(GRID, MaskConfig(), equal=True)


@pytest.mark.slow
def test_overhang__hides_all_places_about_equally_often_and_exactly_as_many() -> None:
    inside = MaskConfig(ratios=(0.75,), spreads=(0.0,), least_area=10, most_area=39)
    beyond = MaskConfig(ratios=(0.75,), spreads=(0.0,), least_area=10, most_area=39, overhang=True)
    often, rarely = (drawn(config, 1000, equal=True).mean(axis=0) for config in (beyond, inside))
    assert often.min() > 0.68 and often.max() < 0.82
    assert rarely.min() < 0.3 and rarely.max() > 0.9
    masks = drawn(beyond, equal=True)
    assert set(masks.sum(axis=(1, 2))) == {MaskSpec(GRID, beyond, True).hidden} == {96}


def test_most_area__bounds_a_single_rectangle() -> None:
    """Of one rectangle each: numbers that ask for the largest area get no more than allowed."""
    config = MaskConfig(ratios=(0.9,), spreads=(0.0,), aspect=(1.0, 1.0), least_area=1, most_area=9)
    mask = block_mask(GRID, 0.9, iter([[1.0, 0.0, 0.0, 0.0]]), config)
    assert mask.sum() == 9 and mask[:3, :3].all()


def test_overhang__a_rectangle_by_hand() -> None:
    config = MaskConfig(ratios=(0.9,), spreads=(0.0,), aspect=(1.0, 1.0), least_area=9, most_area=9, overhang=True)
    first = block_mask(GRID, 0.9, iter([[0.0, 0.0, 0.0, 0.0]]), config)  # two of its three rows and columns are out
    assert first.sum() == 1 and first[0, 0]
    last = block_mask(GRID, 0.9, iter([[0.0, 0.0, 0.999, 0.999]]), config)
    assert last.sum() == 1 and last[-1, -1]
