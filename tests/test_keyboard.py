"""Section 12: what a person at the keyboard sees and presses, here without a browser."""

import base64
import io
import re
import sys
import threading
import tracemalloc
import types
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import IMAGES, SHALLOW, encoded, fail, last, record_in
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from traitlets import Bunch

import nst_helpers as nst

SOURCES = {"photo": IMAGES / "china.jpg", "painting": IMAGES / "starry_night.jpg"}
CHELSEA = (IMAGES / "chelsea.png").read_bytes()


class Page(HTMLParser):
    """The tags of some HTML, [(tag, attributes), ...], and the words between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def pictures(self) -> list[Image.Image]:
        return [picture_in(attributes["src"]) for attributes in self.attributes("img")]


def bytes_in(address: str) -> bytes:
    """Of a data: address."""
    return base64.b64decode(address.partition(";base64,")[2])


def picture_in(address: str) -> Image.Image:
    return Image.open(io.BytesIO(bytes_in(address)))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that stands still unless it is told to go on."""
    now = [100.0]
    monkeypatch.setattr(nst.time, "monotonic", lambda: now[0])
    return now


def steps_of(
    count: int, clock: list[float], seconds: float = 0.0, total: int | None = None
) -> Iterator[nst.Step]:
    """Steps that take ``seconds`` each."""
    total = total or count
    image = torch.rand(1, 3, 40, 64)
    for number in range(1, count + 1):
        clock[0] += seconds
        losses = {"style": torch.tensor(1 / number), "total": torch.tensor(2.0)}
        yield nst.Step(number, total, number / total, image, losses, {})


# Pictures on a page -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "width"), [((32, 64), 300), ((64, 32), 150), ((600, 900), 300)])
def test_a_picture_is_as_long_on_the_page_at_every_size_and_never_heavier(size, width):
    page = Page(nst.picture_tag(torch.rand(1, 3, *size), 'a "cat" & <dog>', side=300))
    (attributes,) = page.attributes("img")
    assert f"width: {width}px" in attributes["style"]
    assert attributes["alt"] == 'a "cat" & <dog>'
    (picture,) = page.pictures
    assert max(picture.size) == min(300, max(size))
    assert picture.format == "JPEG"


def test_the_picture_on_the_page_is_the_picture():
    image = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    (picture,) = Page(nst.picture_tag(image, "blue")).pictures
    assert nst.load_image(picture)[0, :, 5, 5].tolist() == pytest.approx([0.2, 0.5, 0.9], abs=0.02)


def test_a_figure_on_a_page_can_be_read_out():
    figure = plt.Figure((3, 2), dpi=100)
    figure.set_label('two "lines"')
    figure.subplots().plot([1, 2])
    page = Page(nst.figure_tag(figure, width=150))
    (attributes,) = page.attributes("img")
    assert attributes["alt"] == 'two "lines"'
    assert "width: 150px" in attributes["style"]
    (picture,) = page.pictures
    assert picture.size == (300, 200)
    assert len(set(picture.convert("L").tobytes())) > 2


def test_in_a_notebook_every_figure_is_such_a_page(monkeypatch, tmp_path):
    shell = InteractiveShell(ipython_dir=str(tmp_path))
    monkeypatch.setattr(nst, "get_ipython", lambda: shell)
    monkeypatch.setattr(InteractiveShell, "_instance", shell)
    monkeypatch.setattr(nst.warnings, "showwarning", nst.warnings.showwarning)
    nst.set_up_notebook()
    figure = plt.Figure((3, 2))
    figure.set_label("nothing much")
    figure.subplots()
    data, _ = shell.display_formatter.format(figure)
    assert {*data} == {"text/plain", "text/html", "image/jpeg"}  # for pages with and without HTML
    assert Page(data["text/html"]).attributes("img")[0]["alt"] == "nothing much"


def test_a_film_on_a_page_is_the_file_itself(tmp_path):
    film = nst.save_timelapse([torch.zeros(1, 3, 16, 24), torch.ones(1, 3, 16, 24)], tmp_path)
    (attributes,) = Page(nst.film_tag(film)).attributes("img")
    assert bytes_in(attributes["src"]) == film.read_bytes()
    assert attributes["src"].startswith("data:image/webp;")
    assert attributes["alt"]


def test_before_and_after_has_the_result_on_top_and_a_slider_that_uncovers_the_photo():
    photo, result = torch.zeros(1, 3, 64, 96), torch.ones(1, 3, 32, 48)
    page = Page(nst.before_and_after(photo, result, side=200))
    below, above = page.pictures
    assert nst.load_image(below).mean() < 0.02
    assert nst.load_image(above).mean() > 0.98
    assert below.size == above.size == (48, 32)
    # What is later lies on top, even where a page may not have styles of its own.
    (_, first), (_, second), (slider, third) = page.tags[1:]
    assert first["alt"] != second["alt"]
    assert re.search(r"width: 200px", first["style"])
    assert re.search(r"width: 200px", second["style"])
    assert "clip-path" in second["style"]
    assert "clip-path" not in first["style"]
    assert slider == "input"
    assert third["aria-label"]
    assert "previousSibling" in third["oninput"]  # which is the result: nothing stands between
    assert page.words == ""


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_download_link_holds_the_file_itself(tmp_path, kind):
    path = tmp_path / f"picture.{kind}"
    path.write_bytes(bytes(range(256)))
    (link,) = Page(nst.download_link(path)).attributes("a")
    assert link["download"] == path.name
    assert link["href"].startswith(f"data:image/{kind};")
    assert bytes_in(link["href"]) == path.read_bytes()


def test_a_close_up_is_the_middle_at_twice_its_size():
    image = torch.zeros(1, 3, 100, 200)
    image[:, :, 30:70, 80:120] = 1
    page = Page(nst.close_up(image, side=40))
    (picture,) = page.pictures
    assert picture.size == (40, 40)
    assert nst.load_image(picture).min() > 0.98
    assert "width: 80px" in page.attributes("img")[0]["style"]
    (whole,) = Page(nst.close_up(image, side=400)).pictures
    assert whole.size == (200, 100)


# What cells of the notebook call ----------------------------------------------------------------


@pytest.fixture
def colab(monkeypatch) -> types.ModuleType:
    """A stand-in for ``google.colab.files``: answers as it is told, notes what it is asked."""
    files = types.ModuleType("google.colab.files")
    files.answers = []
    files.downloads = []
    files.upload = lambda: files.answers.pop(0)
    files.download = files.downloads.append
    package = types.ModuleType("google.colab")
    package.files = files
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "google.colab.files", files)
    return files


def choose() -> dict:
    return nst.choose_pictures(str(SOURCES["photo"]), str(SOURCES["painting"]))


CHOSEN = {which: str(path) for which, path in SOURCES.items()}


def test_outside_colab_no_picture_is_asked_for():
    assert choose() == CHOSEN


def test_in_colab_an_upload_is_used_as_bytes_and_none_means_the_given_file(colab):
    colab.answers = [{"../../etc/evil name.png": CHELSEA}, {}]
    assert choose() == CHOSEN | {"photo": CHELSEA}


@pytest.mark.parametrize("data", [b"", b"no picture", CHELSEA[:9000]])
def test_in_colab_an_upload_that_is_no_picture_is_said_and_the_given_file_stays(
    colab, capsys, data
):
    colab.answers = [{}, {"a.png": data}]
    assert choose() == CHOSEN
    *_, said = capsys.readouterr().out.splitlines()
    assert "the uploaded picture" in said
    assert CHOSEN["painting"] in said


def test_in_colab_a_sample_may_lie_beside_the_notebook(colab, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(CHELSEA)
    colab.answers = [{}, {}]
    sources = nst.choose_pictures("images/cat.png", "images/no such.png")
    assert sources["photo"] == "cat.png"
    first, second = capsys.readouterr().out.splitlines()
    assert "cancel" in first
    assert "cancel" not in second  # there is no picture to fall back on


def test_a_picture_is_offered_for_download_as_the_place_allows(colab, monkeypatch, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(CHELSEA)
    displayed = []
    monkeypatch.setattr(nst, "display", displayed.append)
    nst.offer_download(path)
    assert colab.downloads == [str(path)]
    assert displayed == []
    monkeypatch.setitem(sys.modules, "google.colab", None)
    monkeypatch.delitem(sys.modules, "google.colab")
    nst.offer_download(path)
    assert len(colab.downloads) == 1
    (link,) = Page(displayed[0].data).attributes("a")
    assert Path(link["href"]) == path
    assert link["download"] == path.name


def test_without_a_step_nothing_is_painted_yet(clock):
    (step,) = steps_of(1, clock)
    assert nst.require_step(step) is step
    with pytest.raises(ValueError, match="painted"):
        nst.require_step(None)


def test_a_blend_remembers_its_strength_and_leaves_the_step_as_it_is(clock):
    (step,) = steps_of(1, clock)
    before = step.image.clone()
    photo = torch.full((1, 3, 80, 128), 0.5)
    blend = nst.blend_with_photo(step, photo, 0.25)
    assert torch.allclose(blend.image, 0.375 + before / 4)
    assert blend.record["strength"] == 0.25
    assert torch.equal(step.image, before)
    assert "strength" not in step.record


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "all", None, True])
def test_a_strength_that_is_none_is_refused(clock, strength):
    (step,) = steps_of(1, clock)
    with pytest.raises(ValueError, match="strength") as error:
        nst.blend_with_photo(step, step.image, strength)
    assert repr(strength) in str(error.value)


# The live view ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.7])
def test_it_is_drawn_once_a_second_whatever_a_step_takes(clock, seconds):
    shown = []
    watched = nst.watch(steps_of(12, clock, seconds), lambda *page: shown.append(page))
    assert [step.number for step in watched] == [*range(1, 13)]
    assert 12 * seconds / (1 + seconds) <= len(shown) <= 12 * seconds + 2


def test_a_slow_page_is_drawn_less_often_so_that_it_takes_less_than_3_percent(clock):
    drawn = []

    def show(page, line):
        drawn.append(line)
        clock[0] += 0.5  # seconds that the page takes

    list(nst.watch(steps_of(400, clock, 0.1), show))
    assert len(drawn) >= 3
    assert 0.5 * (len(drawn) - 1) / (clock[0] - 100) < 0.03


def test_it_shows_the_picture_the_losses_and_how_far_it_is(clock):
    shown = []
    for step in nst.watch(steps_of(6, clock, 2.0), lambda *page: shown.append(page)):
        if step.number == 4:  # by now the third one is drawn
            page, line = shown[-1]
            break
    assert re.fullmatch(r"step 3 of 6, 64 x 40 pixels \|.*\| 00:06, 00:06 left", line)
    picture, losses = Page(page).pictures
    assert picture.size == (64, 40)
    assert losses.width > 200
    assert line in Page(page).words
    assert all(tag["alt"] for tag in Page(page).attributes("img"))


def test_the_time_left_comes_from_the_share_of_the_work_that_is_done(clock):
    shown = []
    (step,) = steps_of(1, clock, total=10)
    late = replace(step, number=5, progress=0.2)  # half of the steps, but a fifth of the work

    def steps():
        clock[0] += 20
        yield late

    list(nst.watch(steps(), lambda page, line: shown.append(line)))
    assert "00:20, 01:20 left" in shown[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_run_that_breaks_off_shows_its_last_picture_and_raises(clock, error):
    def steps():
        yield from steps_of(4, clock, total=6)
        raise error

    shown = []
    with pytest.raises(error):
        list(nst.watch(steps(), lambda page, line: shown.append(line)))
    assert len(shown) == 2  # the first, and the last
    assert shown[-1].startswith("step 4 of 6")
    assert shown[-1].endswith("stopped")


def test_a_loop_that_is_left_shows_its_last_picture(clock):
    shown = []
    for step in nst.watch(steps_of(6, clock), lambda page, line: shown.append(line)):
        if step.number == 3:
            break
    assert shown[-1].startswith("step 3 of 6")
    assert shown[-1].endswith("stopped")


def test_a_run_that_came_to_its_end_says_so(clock):
    shown = []
    list(nst.watch(steps_of(6, clock), lambda page, line: shown.append(line)))
    assert shown[-1].startswith("step 6 of 6")
    assert shown[-1].endswith("done")


def test_a_run_without_a_step_shows_nothing(clock):
    assert list(nst.watch(iter(()), fail(AssertionError("something was shown")))) == []


def test_without_a_page_plain_lines_are_printed(clock, capsys):
    list(nst.watch(steps_of(6, clock, 1.5)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("step ") for line in lines)


def test_a_run_of_very_many_steps_takes_no_memory_for_those_that_are_not_painted_yet(shallow, pair):
    config = replace(SHALLOW, num_steps=10**7)
    tracemalloc.start()
    try:
        steps = nst.watch(nst.stylize(*pair, config, network=shallow), lambda page, line: None)
        next(steps)
        next(steps)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e7  # a list of a number for each step has 8e7 bytes


class Handle:
    """A stand-in for what ``IPython.display.display`` gives: notes what is shown in its place."""

    def __init__(self) -> None:
        self.shown: list[dict] = []

    def update(self, data, raw):
        assert raw
        self.shown.append(data)


def test_a_live_view_is_one_place_that_is_drawn_over(monkeypatch, clock):
    handles = []

    def display(*, display_id):
        handles.append(Handle())
        return handles[-1]

    monkeypatch.setattr(nst, "display", display)
    show = nst.live_view()
    (handle,) = handles
    assert len(handle.shown) == 1  # something is there before the first step
    list(nst.watch(steps_of(3, clock, 2.0), show))
    assert len(handles) == 1
    assert len(handle.shown) == 5  # each step, and the end
    assert handle.shown[-1]["text/plain"].startswith("step 3 of 3")
    assert len(Page(handle.shown[-1]["text/html"]).pictures) == 2


def test_a_live_view_outside_a_notebook_prints(clock, capsys):
    list(nst.watch(steps_of(1, clock), nst.live_view()))
    assert "step 1 of 1" in capsys.readouterr().out


# One run of the panel ---------------------------------------------------------------------------


def show_nothing(page: str, line: str) -> None:
    """For a run that nobody looks at."""


@pytest.fixture(scope="module")
def expected(shallow) -> torch.Tensor:
    """What ``SHALLOW`` makes of ``SOURCES``."""
    photo, painting = (nst.load_image(source, SHALLOW.max_size) for source in SOURCES.values())
    return last(nst.stylize(photo, painting, SHALLOW, network=shallow)).image


def test_a_run_saves_the_picture_that_its_settings_make_and_nothing_else(
    shallow, tmp_path, expected
):
    run = nst.PanelRun(SOURCES, SHALLOW, shallow)
    run.paint(tmp_path, show_nothing)
    assert list(tmp_path.iterdir()) == [run.path]  # and no partial one
    assert torch.equal(nst.load_image(run.path), (expected * 255).round() / 255)
    record = record_in(run.path)
    assert record["finished"]
    assert record["photo"]["sha256"] == nst.sha256_of(SOURCES["photo"])
    assert record["paintings"][0]["sha256"] == nst.sha256_of(SOURCES["painting"])


def test_a_stopped_run_saves_its_picture_and_leaves_no_partial_one(shallow, tmp_path):
    run = nst.PanelRun(SOURCES, SHALLOW, shallow)
    run.stopping.set()
    run.paint(tmp_path, show_nothing)
    assert list(tmp_path.iterdir()) == [run.path]
    assert record_in(run.path)["step"] == 1


def test_the_latest_picture_lies_on_disk_while_a_run_paints(shallow, tmp_path):
    seen = []
    nst.PanelRun(SOURCES, SHALLOW, shallow).paint(
        tmp_path, lambda *_: seen.extend(tmp_path.iterdir())
    )
    assert seen[0].name.endswith(".partial.png")


def test_the_photo_is_the_photo_in_whatever_order_the_sources_come(shallow, tmp_path, expected):
    turned = {"painting": SOURCES["painting"], "photo": SOURCES["photo"]}
    run = nst.PanelRun(turned, SHALLOW, shallow)
    run.paint(tmp_path, show_nothing)
    assert torch.equal(run.step.image, expected)
    assert record_in(run.path)["photo"]["sha256"] == nst.sha256_of(SOURCES["photo"])


# The panel --------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch) -> list[float]:
    """The rates that were measured: always the same one, which takes no time."""
    rates = []

    def measure(pictures, config, network):
        rates.append(1e-6)
        return rates[-1]

    monkeypatch.setattr(nst, "measure_rate", measure)
    return rates


@pytest.fixture
def panel(shallow, tmp_path, measured) -> Iterator[nst.Panel]:
    panel = nst.Panel(SHALLOW, SOURCES, tmp_path, network=shallow)
    yield panel
    if panel.run is not None and panel.run.is_painting:
        panel.run.stopping.set()
        panel.run.thread.join(60)


class Gate:
    """Lets the steps of ``stylize`` through as they are told."""

    def __init__(self, stylize) -> None:
        self.stylize = stylize
        self.runs = 0
        self.is_open = threading.Semaphore(0)
        self.is_waiting = threading.Semaphore(0)

    def steps(self, *args, **kwargs):
        self.runs += 1
        for step in self.stylize(*args, **kwargs):
            self.is_waiting.release()
            assert self.is_open.acquire(timeout=60)
            yield step

    def let_through(self, count: int) -> None:
        """Come back when ``count`` more steps are done and the next one waits."""
        for _ in range(count):
            assert self.is_waiting.acquire(timeout=60)
            self.is_open.release()
        assert self.is_waiting.acquire(timeout=60)
        self.is_waiting.release()

    def finish(self, panel: nst.Panel) -> None:
        """Let all steps through, and wait for the end of the run."""
        self.is_open.release(1000)
        finish(panel)


def finish(panel: nst.Panel) -> None:
    """Wait for the end of the run."""
    panel.run.thread.join(60)
    assert not panel.run.thread.is_alive()


@pytest.fixture
def gate(monkeypatch, panel) -> Iterator[Gate]:
    gate = Gate(nst.stylize)
    monkeypatch.setattr(nst, "stylize", gate.steps)
    yield gate
    gate.is_open.release(1000)


@pytest.fixture
def in_colab(monkeypatch) -> None:
    monkeypatch.setitem(nst.sys.modules, "google.colab", object())


@pytest.fixture
def again(panel, shallow, tmp_path):
    """Runs the panel's cell again, perhaps after the form was changed."""

    def make(config=SHALLOW, earlier=panel, **changed) -> nst.Panel:
        sources = {which: Path(str(path)) for which, path in (SOURCES | changed).items()}
        network = shallow if config.precision == SHALLOW.precision else None
        return nst.Panel(config, sources, tmp_path, network=network, earlier=earlier)

    return make


def upload(panel: nst.Panel, which: str, data: bytes, name: str = "a.png") -> None:
    """As the browser does."""
    file = {
        "name": name,
        "type": "image/png",
        "size": len(data),
        "content": memoryview(data),
        "last_modified": datetime.now(timezone.utc),
    }
    is_old = ipywidgets.__version__.startswith("7.")
    value = {name: {"metadata": {"name": name}, "content": data}} if is_old else (file,)
    panel.uploads[which].set_trait("value", value)


def told(panel: nst.Panel) -> str:
    """The words on the panel, without the HTML."""
    return Page(panel.status.value).words + " " + Page(panel.chosen.value).words


def saved(folder: Path) -> Path:
    """The one picture that was saved."""
    (path,) = folder.glob("*[0-9].png")
    return path


def transparent(size=(60, 40)) -> bytes:
    """A PNG of a cat's colour that nobody sees."""
    return encoded(Image.new("RGBA", size, (200, 120, 40, 0)))


def shown_on(monkeypatch, panel: nst.Panel) -> list[ipywidgets.Widget]:
    """The widgets of a panel as the last line of a cell, in their order, without the boxes."""
    displayed = []
    monkeypatch.setattr(nst, "display", displayed.append)
    panel._ipython_display_()

    def leaves(widget):
        if not isinstance(widget, ipywidgets.Box):
            return [widget]
        return [leaf for child in widget.children for leaf in leaves(child)]

    (box,) = displayed
    return leaves(box)


def test_a_panel_shows_its_uploads_controls_and_buttons(monkeypatch, panel):
    shown = shown_on(monkeypatch, panel)
    buttons = [panel.paint_button, panel.stop_button, panel.strength]
    outputs = [panel.chosen, panel.status, panel.link, panel.page]
    expected = [*panel.uploads.values(), *panel.controls.values(), *buttons, *outputs]
    assert {id(widget) for widget in expected} <= {id(widget) for widget in shown}


def test_what_is_said_stands_above_the_buttons_and_the_link_follows_it(monkeypatch, panel):
    shown = shown_on(monkeypatch, panel)
    assert shown.index(panel.status) < shown.index(panel.paint_button)
    assert shown.index(panel.link) == shown.index(panel.status) + 1


def test_where_a_panel_cannot_be_drawn_words_stand_in_its_place(monkeypatch, panel):
    displayed = []
    monkeypatch.setattr(nst, "display", displayed.append)
    panel._ipython_display_()
    (box,) = displayed
    assert "children" not in repr(box)  # which is what a page shows then
    assert "run" in repr(box)


def test_a_panel_makes_the_network_that_it_needs(measured, tmp_path):
    panel = nst.Panel(SHALLOW, SOURCES, tmp_path)
    panel.start()
    finish(panel)
    assert record_in(saved(tmp_path))["weights"]["source"] == "bundled"


class Kernel:
    """Of what asks for what: the part of ipykernel's that matters here."""

    def __init__(self, *features: str) -> None:
        self.kernel_info = {"supported_features": features} if features else {}
        self.request = {"header": {"msg_type": "execute_request"}}
        self._parent_ident = {"shell": [b"the page"]}
        self.sender = [b"the page"]

    def get_parent(self) -> dict:
        return self.request

    def set_parent(self, sender, request) -> None:
        self.sender, self.request = sender, request


@pytest.mark.parametrize("features", [(), ("debugger",), ("debugger", "kernel subshells")])
def test_what_is_clicked_is_made_for_no_cell_where_clicks_then_need_not_wait(
    monkeypatch, shallow, measured, tmp_path, features
):
    kernel, asked_by = Kernel(*features), {}
    shell = types.SimpleNamespace(kernel=kernel, events=types.SimpleNamespace(register=print))
    monkeypatch.setattr(nst, "get_ipython", lambda: shell)
    made = ipywidgets.Widget.open

    def open_widget(widget) -> None:
        asked_by[id(widget)] = kernel.request
        made(widget)

    monkeypatch.setattr(ipywidgets.Widget, "open", open_widget)
    before = kernel.request
    panel = nst.Panel(SHALLOW, SOURCES, tmp_path, network=shallow)
    assert (kernel.request, kernel.sender) == (before, [b"the page"])
    buttons = [panel.paint_button, panel.stop_button, panel.strength]
    for widget in [*panel.uploads.values(), *panel.controls.values(), *buttons]:
        assert (asked_by[id(widget)] == {}) is ("kernel subshells" in features)
    with pytest.raises(ValueError, match="max_size"), nst.heard_beside_cells():
        replace(SHALLOW, max_size=0)
    assert kernel.request == before


# Its uploads


def test_an_upload_is_taken_at_once_shown_and_said(panel):
    upload(panel, "painting", CHELSEA)
    assert panel.sources == {"photo": SOURCES["photo"], "painting": CHELSEA}
    assert "painting" in Page(panel.status.value).words
    photo, painting = Page(panel.chosen.value).pictures
    assert photo.size == painting.size == (64, 43)
    expected = nst.load_image(CHELSEA, 64)
    assert (nst.load_image(painting) - expected).abs().mean() < 0.03


def test_an_upload_of_an_older_ipywidgets_is_taken_too(panel):
    files = {"a.png": {"content": CHELSEA, "metadata": {"name": "a.png"}}}
    button = panel.uploads["photo"]
    change = {"name": "value", "old": {}, "new": files, "owner": button, "type": "change"}
    button.notify_change(Bunch(change))
    assert panel.sources == {"photo": CHELSEA, "painting": SOURCES["painting"]}


def test_an_upload_with_a_path_for_a_name(monkeypatch, panel, tmp_path):
    """An upload is called `../../something`"""
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    upload(panel, "photo", CHELSEA, "../evil.png")
    assert panel.sources["photo"] == CHELSEA
    assert list(tmp_path.rglob("*")) == [inner]


def use_a_control(panel: nst.Panel) -> None:
    panel.controls["color"].value = "content"


def use_another_control(panel: nst.Panel) -> None:
    panel.controls["style"].value = 3


@pytest.mark.parametrize("act", [use_a_control, nst.Panel.start])
def test_the_next_click_elsewhere_brings_new_buttons_where_one_waits_for_a_lost_file(panel, act):
    lost = dict(panel.uploads)
    act(panel)
    for which, button in panel.uploads.items():
        assert button is not lost[which]
    assert panel.upload_row.children == tuple(panel.uploads.values())
    if panel.run is not None:
        finish(panel)
    upload(panel, "photo", CHELSEA)
    assert panel.sources["photo"] == CHELSEA
    use_another_control(panel)
    assert [button.icon for button in panel.uploads.values()] == ["check", "upload"]
    panel.uploads = lost  # what comes late is taken too
    upload(panel, "painting", CHELSEA)
    assert panel.sources["painting"] == CHELSEA


@pytest.mark.parametrize("data", [b"", b"no picture", CHELSEA[:9000]])
def test_an_upload_that_is_no_picture_changes_nothing_and_is_said(panel, data):
    before = panel.chosen.value
    upload(panel, "photo", data)
    assert panel.sources == SOURCES
    assert panel.chosen.value == before
    assert "photo" in Page(panel.status.value).words
    upload(panel, "photo", CHELSEA)  # the button still works
    assert panel.sources["photo"] == CHELSEA


@pytest.fixture
def decoded(monkeypatch, panel) -> list[object]:
    """What Pillow opens from now on."""
    opened = []
    open_file = Image.open

    def noted(file, *args, **kwargs):
        opened.append(file)
        return open_file(file, *args, **kwargs)

    monkeypatch.setattr(Image, "open", noted)
    return opened


def test_an_upload_is_decoded_once(panel, decoded):
    upload(panel, "painting", CHELSEA)
    (file,) = decoded
    assert file.getvalue() == CHELSEA


def test_no_control_decodes_or_measures_again(panel, decoded, measured):
    upload(panel, "painting", CHELSEA)
    decoded.clear()
    assert len(measured) == 1  # when the panel was made
    panel.controls["style"].value = nst.Panel.STYLES["more"]
    panel.controls["color"].value = "luminance"
    panel.controls["quality"].value = "quick"
    assert decoded == []
    panel.controls["size"].value = 256
    assert len(measured) == 1
    assert max(Page(panel.chosen.value).pictures[0].size) == nst.THUMBNAIL_SIDE


# Its controls and its estimate


def test_the_controls_make_the_settings(panel):
    panel.controls["style"].value = 3
    panel.controls["size"].value = 256
    panel.controls["color"].value = "luminance"
    panel.controls["quality"].value = "best"
    assert panel.config == replace(
        SHALLOW,
        style_weight=3 * SHALLOW.style_weight,
        max_size=256,
        color="luminance",
        quality="best",
        num_steps="auto",  # another quality was chosen, so the number of the settings is void
    )
    panel.controls["style"].value = 1
    panel.controls["size"].value = SHALLOW.max_size
    panel.controls["color"].value = SHALLOW.color
    panel.controls["quality"].value = SHALLOW.quality
    assert panel.config == SHALLOW


def test_the_quality_multiplies_the_seconds_where_they_are_set(shallow, tmp_path, measured):
    config = replace(SHALLOW, num_steps="auto", seconds=10)
    panel = nst.Panel(config, SOURCES, tmp_path, network=shallow)
    panel.controls["quality"].value = "best"
    effort = nst.QUALITIES["best"] / nst.QUALITIES[config.quality]
    assert panel.config == replace(config, quality="best", seconds=10 * effort)


def test_the_estimate_is_that_of_the_run(monkeypatch, panel):
    def estimate(photo, painting, config, network, *, rate):
        assert photo.shape == (1, 3, 171, 256)
        assert config == panel.config
        assert network is panel.network
        assert rate == 1e-6  # as measured
        return nst.Estimate(seconds=83.0, memory=1.5e9, free=7.25e9)

    monkeypatch.setattr(nst, "estimate", estimate)
    panel.controls["size"].value = 256
    words = Page(panel.chosen.value).words
    for number in ("256 x 171", "83 s", "1.5", "7.2"):
        assert number in words


def test_the_rate_is_measured_with_what_is_to_be_painted(monkeypatch, shallow, tmp_path):
    asked = []

    def measure(pictures, config, network):
        asked.append((pictures, config, network))
        return 1e-6

    monkeypatch.setattr(nst, "measure_rate", measure)
    nst.Panel(SHALLOW, SOURCES, tmp_path, network=shallow)
    ((pictures, config, network),) = asked
    assert pictures.size == (43, 64)
    assert config == SHALLOW
    assert network is shallow


def test_a_run_that_does_not_fit_into_memory_is_said_before_paint_is_pressed(monkeypatch, panel):
    monkeypatch.setattr(nst, "free_memory", lambda device: 1e6)
    panel.controls["size"].value = 256
    assert "max_size" in Page(panel.chosen.value).words


# Paint


def test_paint_makes_the_picture_that_the_settings_make(panel, tmp_path, expected):
    panel.paint_button.click()
    finish(panel)
    assert torch.equal(panel.result.image, expected)
    (path,) = tmp_path.iterdir()
    assert str(path) in Page(panel.status.value).words
    (link,) = Page(panel.link.value).attributes("a")
    assert link["download"] == path.name
    assert bytes_in(link["href"]) == path.read_bytes()
    assert "step 6 of 6" in panel.page.value


def test_before_paint_there_is_no_result(panel):
    assert panel.result is None


def test_the_paint_button_says_how_far_the_run_is(panel, gate):
    panel.start()
    gate.let_through(0)
    assert panel.paint_button.description.startswith("Painting")
    gate.let_through(1)
    assert panel.paint_button.description.startswith("Painting")
    percent = round(100 * panel.result.progress)
    assert 0 < percent < 100
    assert re.search(rf"\b{percent}\s?%$", panel.paint_button.description)
    gate.finish(panel)
    assert panel.paint_button.description == "Paint"


def test_paint_pressed_twice_is_one_run_and_a_sentence(panel, gate):
    panel.start()
    gate.let_through(1)
    before = panel.status.value
    run = panel.run
    panel.start()
    assert panel.run is run
    assert panel.status.value != before
    gate.finish(panel)
    assert gate.runs == 1


def test_a_run_has_the_settings_and_pictures_of_the_moment_paint_was_pressed(panel, gate, tmp_path):
    panel.controls["color"].value = "content"
    panel.start()
    gate.let_through(1)
    upload(panel, "photo", transparent())
    upload(panel, "painting", CHELSEA)
    panel.controls["color"].value = "luminance"
    gate.finish(panel)
    path = saved(tmp_path)
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
    record = record_in(path)
    assert record["settings"]["color"] == "content"
    assert record["photo"]["sha256"] == nst.sha256_of(SOURCES["photo"])
    assert record["paintings"][0]["sha256"] == nst.sha256_of(SOURCES["painting"])


def test_a_transparent_photo_makes_a_transparent_picture(panel, tmp_path):
    upload(panel, "photo", transparent())
    panel.start()
    finish(panel)
    with Image.open(saved(tmp_path)) as picture:
        assert picture.mode == "RGBA"
        assert picture.getchannel("A").getextrema() == (0, 0)


def test_a_run_of_the_panel_and_one_of_a_cell_do_not_disturb_each_other(
    panel, gate, pictures, expected, shallow
):
    photo = nst.shrink_to(pictures["chelsea"], 64)
    painting = nst.shrink_to(pictures["stained_glass"], 64)
    config = replace(SHALLOW, color="luminance", num_steps=4)
    alone = last(gate.stylize(photo, painting, config, network=shallow))
    panel.start()
    steps = []
    for step in gate.stylize(photo, painting, config, network=shallow):
        steps.append(step)
        gate.let_through(1)
    gate.finish(panel)
    assert torch.equal(steps[-1].image, alone.image)
    assert torch.equal(panel.result.image, expected)


def test_runs_in_several_threads_take_turns(monkeypatch, shallow, pair):
    """Threads that share the cores take far longer than one after the other."""
    inside = []
    most = []
    calculate = nst.calculate_losses

    def counted(*args, **kwargs):
        inside.append(1)
        try:
            losses = calculate(*args, **kwargs)
            most.append(len(inside))
            return losses
        finally:
            inside.pop()

    monkeypatch.setattr(nst, "calculate_losses", counted)
    config = replace(SHALLOW, num_steps=6)
    runs = [
        threading.Thread(target=last, args=[nst.stylize(*pair, config, network=shallow)])
        for _ in range(3)
    ]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # whatever may come between, does
    try:
        for run in runs:
            run.start()
        for run in runs:
            run.join(60)
    finally:
        sys.setswitchinterval(usual)
    assert most == [1] * 18


# Stop


def test_stop_keeps_the_picture_so_far_and_no_partial_one(panel, gate, tmp_path):
    panel.start()
    gate.let_through(2)
    (partial,) = tmp_path.iterdir()
    assert partial.name.endswith(".partial.png")
    panel.stop_button.click()
    gate.finish(panel)
    path = saved(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    record = record_in(path)
    assert record["step"] == panel.result.number == 3
    assert not record["finished"]
    assert str(path) in Page(panel.status.value).words
    (link,) = Page(panel.link.value).attributes("a")
    assert bytes_in(link["href"]) == path.read_bytes()
    assert panel.paint_button.description == "Paint"


def test_a_stop_in_the_last_step_leaves_a_finished_picture(panel, gate, tmp_path):
    panel.start()
    gate.let_through(panel.config.num_steps - 1)
    panel.stop()
    gate.finish(panel)
    assert record_in(saved(tmp_path))["finished"]
    assert "Done." in Page(panel.status.value).words


def test_after_a_stop_it_paints_again(panel, gate, tmp_path):
    panel.start()
    gate.let_through(1)
    panel.stop()
    gate.finish(panel)
    saved(tmp_path).unlink()
    panel.start()
    gate.finish(panel)
    assert record_in(saved(tmp_path))["finished"]


def test_stop_without_a_run_is_a_sentence_and_stops_none_that_follows(panel, tmp_path):
    panel.stop()
    assert panel.status.value
    panel.start()
    finish(panel)
    assert record_in(saved(tmp_path))["finished"]
    before = panel.status.value
    panel.stop()
    assert panel.status.value != before


# Strength


def test_strength_mixes_the_photo_in_without_a_new_run(panel, gate, tmp_path):
    assert panel.strength.disabled  # there is nothing to mix yet
    panel.start()
    gate.finish(panel)
    first = saved(tmp_path)
    panel.strength.value = 0.25
    assert gate.runs == 1
    photo = nst.load_image(SOURCES["photo"], SHALLOW.max_size)
    blend = photo + 0.25 * (panel.result.image - photo)
    (second,) = set(tmp_path.iterdir()) - {first}
    assert (nst.load_image(second) - blend).abs().max() < 0.01
    assert record_in(second)["strength"] == 0.25
    (shown,) = Page(panel.page.value).pictures
    assert (nst.load_image(shown) - blend).abs().mean() < 0.03
    assert str(second) in Page(panel.status.value).words
    (link,) = Page(panel.link.value).attributes("a")
    assert bytes_in(link["href"]) == second.read_bytes()
    panel.strength.value = 1.0  # which is the result again, since the result stays as it was
    assert (nst.load_image(Page(panel.page.value).pictures[0]) - panel.result.image).std() < 0.05


def test_strength_mixes_in_the_photo_that_was_painted(panel, tmp_path):
    panel.start()
    finish(panel)
    upload(panel, "photo", transparent())
    first = saved(tmp_path)
    panel.strength.value = 0
    (second,) = set(tmp_path.iterdir()) - {first}
    photo = nst.load_image(SOURCES["photo"], SHALLOW.max_size)
    assert torch.equal(nst.load_image(second), (photo * 255).round() / 255)
    with Image.open(second) as picture:
        assert picture.mode == "RGB"


def test_a_new_run_begins_at_full_strength_and_saves_no_blend(panel, gate, tmp_path):
    panel.start()
    gate.finish(panel)
    panel.strength.value = 0.5
    files = set(tmp_path.iterdir())
    panel.start()
    assert panel.strength.value == 1
    assert panel.strength.disabled
    finish(panel)
    assert not panel.strength.disabled
    (new,) = set(tmp_path.iterdir()) - files
    assert "strength" not in record_in(new)


def test_strength_on_a_new_panel_is_that_of_the_adopted_run(panel, again, tmp_path):
    panel.start()
    finish(panel)
    following = again()
    files = set(tmp_path.iterdir())
    following.strength.value = 0.5
    assert len(set(tmp_path.iterdir()) - files) == 1


def test_a_blend_that_cannot_be_saved_is_said(monkeypatch, panel):
    panel.start()
    finish(panel)
    monkeypatch.setattr(nst, "save_image", fail(OSError("No <space> left")))
    panel.strength.value = 0.5
    assert "No <space> left" in Page(panel.status.value).words
    assert len(Page(panel.page.value).pictures) == 1  # it is shown all the same


# What goes wrong


@pytest.mark.parametrize("error", [MemoryError("Memory <ran> out."), KeyboardInterrupt()])
def test_what_goes_wrong_is_said_and_the_picture_so_far_saved_and_offered(
    monkeypatch, panel, tmp_path, error
):
    stylize = nst.stylize

    def broken(*args, **kwargs):
        yield next(stylize(*args, **kwargs))
        raise error

    monkeypatch.setattr(nst, "stylize", broken)
    panel.start()
    finish(panel)
    path = saved(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert record_in(path)["step"] == 1
    words = Page(panel.status.value).words
    assert str(error) in words
    assert str(path) in words
    (link,) = Page(panel.link.value).attributes("a")
    assert bytes_in(link["href"]) == path.read_bytes()
    assert panel.paint_button.description == "Paint"


def test_a_full_disk_is_said_and_the_picture_stays_in_memory(monkeypatch, panel):
    monkeypatch.setattr(nst, "save_image", fail(OSError("No <space> left")))
    panel.start()
    finish(panel)
    assert "No <space> left" in Page(panel.status.value).words
    assert panel.result.number == SHALLOW.num_steps


def test_a_photo_that_is_gone_is_said_and_another_one_is_taken(shallow, tmp_path, measured):
    gone = SOURCES | {"photo": tmp_path / "gone.jpg"}
    panel = nst.Panel(SHALLOW, gone, tmp_path, network=shallow)
    assert "gone.jpg" in Page(panel.chosen.value).words
    panel.start()
    finish(panel)
    assert "gone.jpg" in Page(panel.status.value).words
    assert list(tmp_path.iterdir()) == []
    upload(panel, "photo", CHELSEA)
    assert len(Page(panel.chosen.value).pictures) == 2
    panel.start()
    finish(panel)
    assert record_in(saved(tmp_path))["finished"]


# The estimate and the runs


@pytest.fixture
def estimated(monkeypatch, panel) -> list[nst.Estimate]:
    """The estimates that are made from now on."""
    estimates = []
    estimate = nst.estimate

    def noted(*args, **kwargs):
        estimates.append(estimate(*args, **kwargs))
        return estimates[-1]

    monkeypatch.setattr(nst, "estimate", noted)
    return estimates


def test_estimates_are_made_anew_when_a_run_ends(panel, gate, estimated):
    panel.start()
    gate.let_through(1)
    panel.controls["color"].value = "luminance"
    estimated.clear()
    gate.finish(panel)
    assert len(estimated) == 1
    assert f"{estimated[0].seconds:.0f} s" in Page(panel.chosen.value).words


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # with the same network, or another
def test_nothing_is_measured_while_a_run_paints(panel, gate, measured, again, precision):
    panel.controls["style"].value = 3  # which the next panel takes over
    panel.start()
    gate.let_through(1)
    measured.clear()
    following = again(replace(SHALLOW, precision=precision))
    following.controls["color"].value = "luminance"
    upload(following, "photo", CHELSEA)
    assert measured == []
    gate.finish(panel)
    assert len(measured) <= 1  # the rate may be known from the earlier panel
    assert re.search(r"\d s\b", Page(following.chosen.value).words)


# A panel in place of an earlier one


def test_a_new_panel_adopts_the_run_of_the_earlier_one(panel, gate, again, tmp_path):
    panel.start()
    gate.let_through(1)
    following = again()
    assert following.run is panel.run
    assert following.result.number == 1
    before = following.status.value
    following.paint_button.click()  # which starts no second run
    assert gate.runs == 1
    assert following.status.value != before
    gate.let_through(1)
    assert following.result.number == 2
    following.stop_button.click()
    gate.finish(following)
    path = saved(tmp_path)
    assert record_in(path)["step"] == 3
    assert str(path) in Page(following.status.value).words
    assert "step 3 of 6" in following.page.value
    assert path.name in following.link.value
    assert following.paint_button.description == "Paint"


def test_a_third_panel_adopts_the_run_too(panel, gate, again, tmp_path):
    panel.start()
    gate.let_through(1)
    third = again(earlier=again())
    third.paint_button.click()
    third.stop_button.click()
    gate.finish(third)
    assert gate.runs == 1
    assert record_in(saved(tmp_path))["step"] == 2


def test_paint_on_a_new_panel_is_one_run_with_what_is_chosen_there(panel, gate, again, tmp_path):
    following = again(replace(SHALLOW, num_steps=3))
    following.paint_button.click()
    gate.finish(following)
    assert gate.runs == 1
    assert record_in(saved(tmp_path))["settings"]["num_steps"] == 3


def test_the_result_of_the_earlier_panel_stays(panel, again, expected):
    panel.start()
    finish(panel)
    following = again()
    assert torch.equal(following.result.image, expected)
    assert following.link.value


def test_when_an_adopted_run_ends_the_new_panel_estimates_anew(panel, gate, again, estimated):
    panel.start()
    gate.let_through(1)
    following = again()
    estimated.clear()
    gate.finish(following)
    assert len(estimated) == 1
    assert f"{estimated[0].seconds:.0f} s" in Page(following.chosen.value).words


def test_an_upload_outlives_running_the_cell_again(panel, again):
    upload(panel, "photo", CHELSEA)
    following = again()
    assert following.sources == {"photo": CHELSEA, "painting": SOURCES["painting"]}
    assert following.sources is not panel.sources


def test_each_source_is_kept_for_itself_where_the_form_names_another_file(panel, again):
    upload(panel, "photo", CHELSEA)
    glass = IMAGES / "stained_glass.jpg"
    following = again(painting=glass)
    assert following.sources == {"photo": CHELSEA, "painting": glass}
    other = IMAGES / "chelsea.png"
    assert again(photo=other, earlier=following).sources == SOURCES | {"photo": other}
    assert again(earlier=following).sources == {"photo": CHELSEA, "painting": SOURCES["painting"]}


def test_a_kept_upload_is_said(panel, again):
    upload(panel, "photo", CHELSEA)
    panel.start()
    finish(panel)
    words = told(again(painting=IMAGES / "stained_glass.jpg"))
    assert "photo" in words
    assert "painting" not in words


def test_the_controls_outlive_running_the_cell_again(panel, again):
    panel.controls["style"].value = 3
    panel.controls["size"].value = 256
    panel.controls["color"].value = "luminance"
    panel.controls["quality"].value = "quick"
    following = again()
    assert following.config == panel.config
    values = {name: control.value for name, control in following.controls.items()}
    assert values == {name: control.value for name, control in panel.controls.items()}


def test_what_the_form_says_now_counts_for_more_than_an_earlier_control(panel, again):
    panel.controls["size"].value = 256
    assert again(replace(SHALLOW, max_size=48)).config.max_size == 48


# In Colab


def test_in_colab_there_is_no_upload_widget_and_no_stop(monkeypatch, panel, in_colab):
    shown = shown_on(monkeypatch, panel)
    assert not {id(widget) for widget in panel.uploads.values()} & {id(widget) for widget in shown}
    assert panel.stop_button not in shown
    assert panel.paint_button in shown
    assert panel.page in shown


def test_in_colab_it_paints_in_the_foreground(monkeypatch, panel, in_colab, tmp_path):
    threads = []
    stylize = nst.stylize

    def noted(*args, **kwargs):
        threads.append(threading.current_thread())
        return stylize(*args, **kwargs)

    monkeypatch.setattr(nst, "stylize", noted)
    panel.paint_button.click()
    assert threads == [threading.main_thread()]
    path = saved(tmp_path)
    assert record_in(path)["finished"]
    assert str(path) in Page(panel.status.value).words
