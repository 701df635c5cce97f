"""What cells of the notebook draw: figures, live progress and sweeps."""

import base64
import io
import math
import re
import types
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import SHALLOW, break_looks, fail, half_mask, last
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

import nst_helpers as nst

QUICK = replace(SHALLOW, num_steps=2)


@pytest.fixture(autouse=True)
def _no_figures():
    plt.close("all")


def titles() -> list[str]:
    """Of the pictures in the one figure that was drawn."""
    (number,) = plt.get_fignums()
    return [ax.get_title() for ax in plt.figure(number).axes if ax.images]


def files_on(page: str) -> list[bytes]:
    """The files that some HTML holds."""
    return [base64.b64decode(data) for data in re.findall(r'base64,([^"]*)"', page)]


def pictures_on(page: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for data in files_on(page)]


def test_pictures_stand_side_by_side_under_their_titles():
    wide, tall = torch.rand(1, 3, 20, 40), torch.rand(1, 3, 40, 20)
    nst.show_images({"wide": wide, "tall": tall})
    assert titles() == ["wide", "tall"]
    first, second = plt.gcf().axes
    assert (first.images[0].get_array() == nst.to_pil(wide)).all()
    assert (second.images[0].get_array() == nst.to_pil(tall)).all()
    assert "wide; tall" in plt.gcf().get_label()


def test_maps_share_one_scale_even_beside_a_picture_in_a_short_row():
    maps = {"a": torch.full((2, 2), 1.0), "b": torch.full((2, 2), 4.0, dtype=torch.bfloat16)}
    nst.show_images(maps | {"picture": torch.rand(1, 3, 2, 2)}, columns=2)
    assert titles() == ["a", "b", "picture"]
    assert plt.gcf().axes[0].get_gridspec().get_geometry() == (2, 2)
    one, other, picture = (ax.images[0] for ax in plt.gcf().axes if ax.images)
    assert one.norm is other.norm
    assert one.norm.vmax == 4
    assert picture.get_array().shape == (2, 2, 3)


def test_losses_are_drawn_on_a_log_scale_with_a_gap_for_0():
    history = [{"style": torch.tensor(n), "total": torch.tensor(n + 1)} for n in (1, 0.5, 0.0)]
    nst.plot_losses(history)
    ax = plt.gca()
    (style, total) = (list(line.get_ydata()) for line in ax.lines)
    assert style[:2] == [1, 0.5]
    assert math.isnan(style[2])
    assert total == [2, 1.5, 1]
    assert [list(line.get_xdata()) for line in ax.lines] == [[1, 2, 3]] * 2
    assert [line.get_label() for line in ax.lines] == ["style", "total"]
    assert ax.get_yscale() == "log"
    assert "style from 1 to 0" in plt.gcf().get_label()
    assert history[2]["style"] == 0
    with pytest.raises(ValueError, match="history"):
        nst.plot_losses([])


def test_figures_of_the_notebook_have_alt_text(monkeypatch, tmp_path):
    shell = InteractiveShell(ipython_dir=str(tmp_path))
    monkeypatch.setattr(nst, "get_ipython", lambda: shell)
    monkeypatch.setattr(InteractiveShell, "_instance", shell)
    nst.set_up_notebook()
    figure = plt.Figure((3, 2), dpi=100)
    figure.set_label('two "lines"')
    figure.subplots().plot([1, 2])
    data, _ = shell.display_formatter.format(figure)
    assert {*data} == {"text/plain", "text/html", "image/jpeg"}
    with Image.open(io.BytesIO(base64.b64decode(data["image/jpeg"]))) as copy:
        assert copy.width < 300 / 2  # where a page takes no HTML
    assert 'alt="two &quot;lines&quot;"' in data["text/html"]


def test_a_picture_on_a_page_is_a_small_copy_as_wide_as_asked_and_a_film_the_file_itself(tmp_path):
    piece = torch.ones(1, 3, 20, 40)
    enlarged = nst.picture_tag(piece, "a piece", 80, "image-rendering: pixelated")
    (picture,) = pictures_on(enlarged)
    assert (picture.size, picture.format) == ((40, 20), "JPEG")
    assert "width: 80px" in enlarged
    assert "pixelated" in enlarged
    original = Image.new("RGBA", (900, 600), (255, 0, 0, 100))
    (copy,) = pictures_on(nst.picture_tag(original, "a cut-out"))
    assert (copy.size, copy.format, copy.mode) == ((512, 341), "WEBP", "RGBA")
    assert original.size == (900, 600)
    film = nst.save_timelapse([torch.zeros(1, 3, 16, 24)], tmp_path)
    page = nst.picture_tag(film, 'a "film"')
    assert files_on(page) == [film.read_bytes()]
    assert "data:image/webp" in page
    assert 'alt="a &quot;film&quot;"' in page


@pytest.mark.parametrize(("size", "width"), [((32, 64), 200), ((64, 32), 100), ((600, 900), 200)])
def test_before_and_after_has_the_result_on_top_of_the_photo(size, width):
    photo, result = torch.zeros(1, 3, 64, 96), torch.ones(1, 3, *size)
    page = nst.before_and_after(photo, result, side=200)
    below, above = pictures_on(page)
    assert nst.load_image(below).mean() < 0.02
    assert nst.load_image(above).mean() > 0.98
    assert below.size == above.size
    assert max(above.size) == min(200, max(size))  # never heavier than it looks
    first, second, slider = re.findall(r"<(?:img|input)[^>]*>", page)
    assert f"width: {width}px" in first
    assert "clip-path" in second
    assert "clip-path" not in first
    assert "previousSibling" in slider  # which is the result: nothing stands between
    assert f"{second}{slider}" in page


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(nst.time, "monotonic", lambda: now[0])
    return now


def steps_of(count, clock, seconds=0.0, progress=None):
    """Steps that take ``seconds`` each."""
    image = torch.rand(1, 3, 40, 64)
    for number in range(1, count + 1):
        clock[0] += seconds
        losses = {"style": torch.tensor(1 / number), "total": torch.tensor(2.0)}
        yield nst.Step(number, count, progress or number / count, image, losses, image, None)


def watch(steps) -> list[str]:
    """The lines that ``watch`` shows of all ``steps``."""
    lines = []
    list(nst.watch(steps, lambda page, line: lines.append(line)))
    return lines


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.7])
def test_progress_is_drawn_once_a_second_at_most_and_at_the_end(clock, seconds):
    drawn = watch(steps_of(12, clock, seconds))
    assert 12 * seconds / (1 + seconds) <= len(drawn) <= 12 * seconds + 2
    assert drawn[-1].startswith("100%")
    assert "done" in drawn[-1]
    assert watch(iter(())) == []


def test_a_slow_page_takes_less_than_3_percent_of_the_time(clock):
    drawn = []

    def show(page, line):
        drawn.append(line)
        clock[0] += 0.5  # seconds that the page takes

    assert len(list(nst.watch(steps_of(400, clock, 0.1), show))) == 400
    assert len(drawn) >= 3
    assert 0.5 * (len(drawn) - 1) / (clock[0] - 100) < 0.03


def test_a_page_has_the_picture_and_the_share_of_the_work(clock):
    shown = []
    for step in nst.watch(steps_of(6, clock, 2.0), lambda *page: shown.append(page)):
        if step.number == 4:  # by now the third one is drawn
            page, line = shown[-1]
            break
    assert line == " 50% | 00:06, 00:06 left, 64 x 40 pixels"
    (picture,) = pictures_on(page)
    assert picture.size == (64, 40)
    assert line in page
    assert 'value="0.5"' in page
    assert "<pre" not in page  # JupyterLab breaks its lines inside words
    assert shown[-1][1].startswith(" 67%")  # the loop was left: its last picture
    assert "stopped" in shown[-1][1]
    early, *_ = watch(steps_of(1, clock, 20, progress=0.02))  # nobody can tell yet
    assert "left" not in early
    first, *_ = watch(steps_of(1, clock, 20, progress=0.2))  # a fifth of the work is done
    assert first.startswith(" 20%")
    assert "00:20, 01:20 left" in first


def test_outside_a_notebook_lines_are_printed(clock, capsys):
    for shows in ([], [nst.live_view()]):
        capsys.readouterr()
        list(nst.watch(steps_of(1, clock), *shows))
        assert capsys.readouterr().out.startswith("100%")


def test_a_live_view_is_one_place_that_is_drawn_over(monkeypatch, clock):
    shown = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data))
    monkeypatch.setattr(nst, "display", lambda display_id: handle)
    show = nst.live_view()
    assert len(shown) == 1  # something is there before the first step
    list(nst.watch(steps_of(3, clock, 2.0), show))
    assert len(shown) == 5  # each step, and the end
    assert shown[-1]["text/plain"].startswith("100%")
    assert len(files_on(shown[-1]["text/html"])) == 1


def test_a_sweep_paints_and_draws_every_combination(shallow, pair, capsys):
    sheet = nst.sweep(*pair, QUICK, shallow, max_size=(32, 64), tv_weight=(0, 2, 50))
    values = [(size, tv) for size in (32, 64) for tv in (0, 2, 50)]
    assert list(sheet) == [f"max_size = {size}, tv_weight = {tv}" for size, tv in values]
    for (size, tv), image in zip(values, sheet.values(), strict=True):
        config = replace(QUICK, max_size=size, tv_weight=tv)
        photo = nst.shrink_to(pair[0], size)
        assert torch.equal(image, last(nst.stylize(photo, pair[1], config, network=shallow)).image)
    assert titles() == list(sheet)
    assert plt.gcf().axes[0].get_gridspec().get_geometry() == (2, 3)
    assert f"{[*sheet][-1]}: |" in capsys.readouterr().out


def test_every_run_of_a_sweep_has_the_masks_and_the_start(shallow, pair, pictures):
    photo, painting = pair
    size = photo.shape[2:]
    masks = [half_mask(size), half_mask(size, left=False)]
    given = {"masks": masks, "keep": half_mask(size), "start": 1 - photo}
    given["visible"] = [half_mask(painting.shape[2:]), None]
    paintings = [painting, nst.shrink_to(pictures["stained_glass"], 64)]
    sheet = nst.sweep(photo, paintings, QUICK, shallow, **given, style_weight=(3, 300))
    for style_weight, image in zip((3, 300), sheet.values(), strict=True):
        config = replace(QUICK, style_weight=style_weight)
        expected = last(nst.stylize(photo, paintings, config, network=shallow, **given))
        assert torch.equal(image, expected.image)


@pytest.mark.parametrize(("at_step", "count"), [(1, 0), (4, 2), (5, 2), (6, 3)])
def test_a_stopped_sweep_draws_what_has_been_painted(monkeypatch, shallow, pair, at_step, count):
    done = last(nst.stylize(*pair, replace(QUICK, style_weight=3), network=shallow))
    break_looks(monkeypatch, at_step, fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        nst.sweep(*pair, QUICK, shallow, style_weight=(3, 30, 300))
    assert len(plt.get_fignums()) == (count > 0)
    if count > 0:
        assert titles() == [f"style_weight = {value}" for value in (3, 30, 300)[:count]]
        assert (plt.gcf().axes[0].images[0].get_array() == nst.to_pil(done.image)).all()


@pytest.mark.parametrize("is_given", [True, False])
def test_a_sweep_loads_a_network_for_each_run_that_needs_its_own(pair, shallow, is_given):
    given = {"network": shallow} if is_given else {}
    sheet = nst.sweep(*pair, QUICK, pooling=("max", "average"), **given)
    for pooling, image in zip(("max", "average"), sheet.values(), strict=True):
        expected = last(nst.stylize(*pair, replace(QUICK, pooling=pooling)))
        assert torch.equal(image, expected.image)


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"style_weight": (1, -1)}, ValueError, "style_weight .*-1"),
        ({"style_weight": 3}, ValueError, "style_weight .*3"),
        ({"style_weight": ()}, ValueError, r"style_weight .*\(\)"),
        ({"style_blend": ((1,), (1.0, 2.0))}, ValueError, r"style_blend .*\(1.0, 2.0\)"),
        ({"device": ("cpu", "cuda:99")}, ValueError, "device .*cuda:99"),
        ({}, ValueError, "sweep .*none"),
        ({"seed": (1,), "noise": (0,), "tv_weight": (1,)}, ValueError, "seed, noise, tv_weight"),
        ({"stile_weight": (3, 30)}, TypeError, "stile_weight"),
        ({"weights": ("bundled", "no such.pth")}, FileNotFoundError, "weights .*no such.pth"),
    ],
)
def test_a_bad_value_is_refused_before_the_first_run(monkeypatch, pair, values, error, match):
    break_looks(monkeypatch, 1, fail(AssertionError("a run was started")))
    with pytest.raises(error, match=match):
        nst.sweep(*pair, QUICK, **values)
    with pytest.raises(ValueError, match=r"content .*cat.jpg"):
        nst.sweep("cat.jpg", pair[1], QUICK, style_weight=(3, 30))
    assert plt.get_fignums() == []
