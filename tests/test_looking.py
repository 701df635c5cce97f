"""Section 11: pictures side by side, curves of losses, and sweeps over settings."""

import math
from collections.abc import Iterator
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import SHALLOW, change_features, fail, half_mask, last

import nst_helpers as nst

QUICK = replace(SHALLOW, num_steps=2)


@pytest.fixture(autouse=True)
def _no_figures() -> Iterator[None]:
    plt.close("all")
    yield
    plt.close("all")


def titles() -> list[str]:
    """Of the pictures in the one figure that was drawn."""
    (number,) = plt.get_fignums()
    return [ax.get_title() for ax in plt.figure(number).axes if ax.images]


# Pictures and maps ------------------------------------------------------------------------------


def test_pictures_stand_side_by_side_under_their_titles():
    wide, tall = torch.rand(1, 3, 20, 40), torch.rand(1, 3, 40, 20)
    nst.show_images({"wide": wide, "tall": tall})
    assert titles() == ["wide", "tall"]
    first, second = plt.gcf().axes
    assert first.get_gridspec().get_geometry() == (1, 2)
    assert (first.images[0].get_array() == nst.to_pil(wide)).all()
    assert (second.images[0].get_array() == nst.to_pil(tall)).all()


def test_a_figure_says_what_it_shows():
    nst.show_images({"wide": torch.rand(1, 3, 20, 40), "tall": torch.rand(1, 3, 40, 20)})
    assert "wide; tall" in plt.gcf().get_label()
    nst.plot_losses([{"style": torch.tensor(0.5)}, {"style": torch.tensor(0.25)}])
    for part in ("2 steps", "style from 0.5 to 0.25"):
        assert part in plt.gcf().get_label()


def test_a_row_may_be_short():
    nst.show_images({name: torch.rand(1, 3, 20, 30) for name in "abcde"}, columns=2)
    assert titles() == list("abcde")
    assert plt.gcf().axes[0].get_gridspec().get_geometry() == (3, 2)


def test_maps_share_one_scale_of_colours_beside_a_picture_too():
    maps = {"a": torch.full((2, 2), 1.0), "b": torch.full((2, 2), 4.0, dtype=torch.bfloat16)}
    nst.show_images(maps | {"picture": torch.rand(1, 3, 4, 4)})
    one, other, picture = (ax.images[0] for ax in plt.gcf().axes)
    assert one.norm is other.norm
    assert one.norm.vmax == 4
    assert picture.get_array().shape == (4, 4, 3)


def test_the_liveliest_channels_of_a_layer_come_first_under_their_numbers():
    features = torch.rand(1, 5, 8, 8) * torch.tensor([3, 0, 5, 1, 4]).view(1, 5, 1, 1)
    maps = nst.liveliest_channels(features.bfloat16(), "relu1_1", count=3)
    assert [title.split()[-1] for title in maps] == ["2", "4", "0"]
    assert all("relu1_1" in title for title in maps)
    first, *_ = maps.values()
    assert torch.equal(first, features.bfloat16()[0, 2].float())


# Losses -----------------------------------------------------------------------------------------


def test_losses_are_drawn_on_a_log_scale():
    history = [{"style": torch.tensor(1 / n), "total": torch.tensor(2 / n)} for n in (1, 2, 4)]
    nst.plot_losses(history)
    ax = plt.gca()
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert drawn == {"style": [1, 0.5, 0.25], "total": [2, 1, 0.5]}
    assert [list(line.get_xdata()) for line in ax.lines] == [[1, 2, 3]] * 2
    assert ax.get_yscale() == "log"


def test_losses_are_drawn_on_the_figure_that_is_given():
    figure = plt.Figure()
    nst.plot_losses([{"total": torch.tensor(1.0)}], figure)
    assert len(figure.axes) == 1
    assert plt.get_fignums() == []


def test_a_loss_of_zero_leaves_a_gap_and_stays_what_it_is():
    history = [{"content": torch.tensor(0.0)}, {"content": torch.tensor(0.5)}]
    nst.plot_losses(history)
    first, second = plt.gca().lines[0].get_ydata()
    assert math.isnan(first)
    assert second == 0.5
    assert history[0]["content"] == 0


def test_no_losses_at_all_are_refused():
    with pytest.raises(ValueError, match="history"):
        nst.plot_losses([])
    assert plt.get_fignums() == []


# Sweeps -----------------------------------------------------------------------------------------


def test_a_sweep_paints_and_draws_every_combination_under_its_label(shallow, pair):
    sheet = nst.sweep(*pair, QUICK, shallow, style_weight=(3, 300), tv_weight=(0, 2, 50))
    pairs_of_values = [(style, tv) for style in (3, 300) for tv in (0, 2, 50)]
    assert list(sheet) == [f"style_weight = {s}, tv_weight = {t}" for s, t in pairs_of_values]
    for (style_weight, tv_weight), image in zip(pairs_of_values, sheet.values(), strict=True):
        config = replace(QUICK, style_weight=style_weight, tv_weight=tv_weight)
        assert torch.equal(image, last(nst.stylize(*pair, config, network=shallow)).image)
    assert titles() == list(sheet)
    assert plt.gcf().axes[0].get_gridspec().get_geometry() == (2, 3)


def test_a_sweep_of_sizes_paints_each_size(shallow, pair):
    sheet = nst.sweep(*pair, QUICK, shallow, max_size=(32, 64))
    assert [max(image.shape) for image in sheet.values()] == [32, 64]


def test_masks_a_kept_part_and_a_start_are_those_of_every_run(shallow, pair, pictures):
    photo, painting = pair
    size = photo.shape[2:]
    given = {
        "masks": [half_mask(size), half_mask(size, left=False)],
        "keep": half_mask(size),
        "start": 1 - photo,
    }
    paintings = [painting, nst.shrink_to(pictures["stained_glass"], 64)]
    sheet = nst.sweep(photo, paintings, QUICK, shallow, **given, style_weight=(3, 300))
    for style_weight, image in zip((3, 300), sheet.values(), strict=True):
        config = replace(QUICK, style_weight=style_weight)
        expected = last(nst.stylize(photo, paintings, config, network=shallow, **given))
        assert torch.equal(image, expected.image)


def test_a_sweep_says_how_far_it_is(shallow, pair, capsys):
    nst.sweep(*pair, QUICK, shallow, style_weight=(3, 30, 300))
    printed = capsys.readouterr()
    for label in ("style_weight = 3", "style_weight = 30", "style_weight = 300"):
        assert f"{label}: |" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("at_step", "labels"),
    [
        (4, ["style_weight = 3", "style_weight = 30"]),  # in the second run
        (5, ["style_weight = 3", "style_weight = 30"]),  # before the third has a picture
        (6, ["style_weight = 3", "style_weight = 30", "style_weight = 300"]),
    ],
)
def test_a_stopped_sweep_draws_what_there_is_and_does_not_hide_the_stop(
    monkeypatch, shallow, pair, at_step, labels
):
    done = last(nst.stylize(*pair, replace(QUICK, style_weight=3), network=shallow))
    begun = next(nst.stylize(*pair, replace(QUICK, style_weight=30), network=shallow))
    change_features(monkeypatch, at_step, fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        nst.sweep(*pair, QUICK, shallow, style_weight=(3, 30, 300))
    assert titles() == labels
    first, second = (ax.images[0].get_array() for ax in plt.gcf().axes[:2])
    assert (first == nst.to_pil(done.image)).all()
    if at_step == 4:
        assert (second == nst.to_pil(begun.image)).all()


def test_a_sweep_that_is_stopped_before_its_first_picture_draws_nothing(monkeypatch, shallow, pair):
    change_features(monkeypatch, 1, fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        nst.sweep(*pair, QUICK, shallow, style_weight=(3, 30))
    assert plt.get_fignums() == []


@pytest.mark.parametrize("control", nst.CONTROL_VALUES)
def test_every_control_has_values_that_make_small_quick_runs(monkeypatch, shallow, pair, control):
    swept = []

    def sweep(content, style, config, network, **values):
        ((name, tried),) = values.items()
        assert name == control
        swept.extend(replace(config, **{name: value}) for value in tried)
        return {}

    monkeypatch.setattr(nst, "sweep", sweep)
    nst.sweep_control(control, *pair, replace(QUICK, num_steps=10**6, max_size=4096), shallow)
    assert len(set(swept)) == len(swept) >= 2
    assert all(config.num_steps != 10**6 for config in swept)
    assert all(config.max_size == 256 for config in swept)


def test_a_sweep_of_a_control_paints_a_small_copy_and_makes_the_networks_it_needs(
    shallow, pictures
):
    photo = nst.resize(pictures["china"], (32, 300))
    sheet = nst.sweep_control("pooling", photo, pictures["starry_night"], QUICK, shallow)
    assert titles() == list(sheet)
    assert len(sheet) == 2
    assert [tuple(image.shape) for image in sheet.values()] == [(1, 3, 27, 256)] * 2


def test_a_control_that_does_not_exist_is_refused(pair, shallow):
    with pytest.raises(ValueError, match="control") as error:
        nst.sweep_control("strokes", *pair, QUICK, shallow)
    assert "'strokes'" in str(error.value)


# The networks of a sweep ------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch) -> list[nst.VGG19Features]:
    """The networks that are made during the test."""
    networks = []
    make = nst.VGG19Features.__init__

    def noted(self, *args, **kwargs):
        make(self, *args, **kwargs)
        networks.append(self)

    monkeypatch.setattr(nst.VGG19Features, "__init__", noted)
    return networks


def test_a_sweep_makes_one_network_for_all_runs_that_can_share_it(made, pair):
    nst.sweep(*pair, QUICK, style_weight=(3, 30), tv_weight=(0, 2))
    assert len(made) == 1


def test_runs_share_a_network_with_weights_out_of_a_file_too(made, pair, tmp_path):
    path = tmp_path / "vgg19.pth"
    weights = {"features.0.weight": torch.rand(64, 3, 3, 3), "features.0.bias": torch.rand(64)}
    torch.save(weights, path)
    config = replace(QUICK, weights=path, content_layers=("relu1_1",))
    nst.sweep(*pair, config, style_weight=(3, 30))
    assert len(made) == 1


def test_a_sweep_makes_a_network_for_each_pooling(made, pair):
    sheet = nst.sweep(*pair, QUICK, pooling=("max", "average"), style_weight=(3, 30))
    assert [network.pooling for network in made] == ["max", "average"]
    for pooling, image in zip(("max", "average"), list(sheet.values())[::2], strict=True):
        expected = last(nst.stylize(*pair, replace(QUICK, pooling=pooling, style_weight=3)))
        assert torch.equal(image, expected.image)


def test_no_network_is_made_before_it_is_needed(monkeypatch, made, pair):
    change_features(monkeypatch, 1, fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        nst.sweep(*pair, QUICK, pooling=("max", "average"))
    assert [network.pooling for network in made] == ["max"]


def test_a_sweep_uses_the_network_it_is_given_as_stylize_does(made, pair):
    half = nst.VGG19Features(("relu1_1", "relu2_1"), "bundled", dtype=torch.bfloat16)
    made.clear()
    sheet = nst.sweep(*pair, QUICK, half, style_weight=(3, 30))
    assert made == []
    expected = last(nst.stylize(*pair, replace(QUICK, style_weight=3), network=half))
    assert torch.equal(sheet["style_weight = 3"], expected.image)


# What a sweep refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name", "given"),
    [
        ({"style_weight": (1, -1)}, "style_weight", "-1"),
        ({"style_weight": 3}, "style_weight", "3"),
        ({"style_weight": "30"}, "style_weight", "'30'"),
        ({"style_weight": ()}, "style_weight", "()"),
        ({"color": ("style", "sepia")}, "color", "'sepia'"),
        ({"style_blend": ((1,), (1, 2))}, "style_blend", "(1, 2)"),
        ({"tv_weight": (1,), "device": ("cpu", "cuda:99")}, "device", "cuda:99"),
        ({}, "sweep", "none"),
        ({"seed": (1,), "noise": (0,), "tv_weight": (1,)}, "sweep", "seed, noise, tv_weight"),
    ],
)
def test_a_bad_value_in_a_sweep_is_said_before_the_first_run(made, pair, values, name, given):
    with pytest.raises(ValueError, match=name) as error:
        nst.sweep(*pair, QUICK, **values)
    assert given in str(error.value)
    assert made == []
    assert plt.get_fignums() == []


def test_a_setting_that_does_not_exist_is_said_before_the_first_run(made, pair):
    with pytest.raises(TypeError, match="stile_weight") as error:
        nst.sweep(*pair, QUICK, stile_weight=(3, 30))
    assert "style_weight" in str(error.value)
    assert made == []


def test_a_network_that_does_not_fit_every_run_is_said_before_the_first(monkeypatch, shallow, pair):
    change_features(monkeypatch, 1, fail(AssertionError("a run was started")))
    with pytest.raises(ValueError, match="network") as error:
        nst.sweep(*pair, QUICK, shallow, pooling=("max", "average"))
    assert "'average'" in str(error.value)


def test_weights_that_are_missing_are_said_before_the_first_run(made, pair, tmp_path):
    missing = tmp_path / "no such.pth"
    with pytest.raises(FileNotFoundError) as error:
        nst.sweep(*pair, QUICK, weights=("bundled", missing))
    assert str(missing) in str(error.value)
    assert made == []


def test_what_is_no_picture_is_said_before_the_first_run(made, pair):
    photo, _ = pair
    with pytest.raises(ValueError, match="styles") as error:
        nst.sweep(photo, "images/starry_night.jpg", QUICK, style_weight=(3, 30))
    assert "images/starry_night.jpg" in str(error.value)
    assert made == []
