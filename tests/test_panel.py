"""The panel and the downloads, here without a browser."""

import html
import io
import json
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import ipywidgets
import pytest
import torch
from conftest import (
    IMAGES,
    NO_SPACE,
    SHALLOW,
    break_looks,
    encoded,
    fail,
    last,
    ours,
    record_in,
    replace_looks,
)
from IPython.core.events import EventManager, available_events
from PIL import Image
from test_figures import files_on
from traitlets import Bunch

import nst_helpers as nst

SOURCES = {"photo": IMAGES / "china.jpg", "painting": IMAGES / "starry_night.jpg"}
CHELSEA = (IMAGES / "chelsea.png").read_bytes()
TRANSPARENT = encoded(Image.new("RGBA", (60, 40), (200, 120, 40, 99)))
with Image.open(SOURCES["painting"]) as picture:  # of which the right half is cut away
    half = picture.resize((60, 40)).convert("RGBA")
half.paste((255, 255, 255, 0), (30, 0, 60, 40))
CUT_OUT = encoded(half)


def words_on(widget) -> str:
    return html.unescape(re.sub("<[^>]*>", "", widget.value))


@pytest.fixture
def colab(monkeypatch):
    """Stands for ``google.colab.files``: answers as it is told, notes what it is asked."""
    files = types.ModuleType("google.colab.files")
    files.answers, files.downloads = [], []
    files.upload = lambda: files.answers.pop(0)
    files.download = files.downloads.append
    package = types.ModuleType("google.colab")
    package.files = files
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    shell = type("Shell", (), {"__module__": "google.colab._shell"})()
    monkeypatch.setattr(nst, "get_ipython", lambda: shell)
    return files


@pytest.fixture
def displayed(monkeypatch) -> list[object]:
    """What is displayed."""
    shown = []
    monkeypatch.setattr(nst, "display", shown.append)
    return shown


MISSING = {"photo": "no such.jpg", "painting": "nor this.jpg"}


def test_outside_colab_nothing_is_asked(monkeypatch, colab):
    """Kaggle's image is built on Colab's: the package is there, the page that answers is not."""
    monkeypatch.setattr(nst, "get_ipython", lambda: None)
    assert nst.choose_pictures(**MISSING) == MISSING


# As in VS Code (googlecolab/colab-vscode, issue 276) and where third-party cookies are blocked
# (googlecolab/colabtools, issue 1513).
BROKEN = RuntimeError("TypeError: Cannot read property '_uploadFiles' of undefined")


def test_where_colabs_upload_fails_a_sentence_says_what_to_do(colab):
    colab.upload = fail(BROKEN)
    with pytest.warns(nst.StyleTransferWarning, match="Files pane") as caught:
        assert nst.choose_pictures(**MISSING) == MISSING
    assert len(ours(caught)) == 1


def test_colab_asks_only_for_a_missing_file(colab):
    given = {which: str(path) for which, path in SOURCES.items()}
    assert nst.choose_pictures(**given) == given
    colab.answers = [{"../../etc/evil name.png": CHELSEA}, {}]
    pasted = {"photo": f"'{SOURCES['photo']}'", "painting": "https://example.org/a.jpg"}
    assert nst.choose_pictures(**pasted) == pasted
    assert nst.choose_pictures(**MISSING) == MISSING | {"photo": CHELSEA}


def test_colab_downloads_a_picture_at_once_or_a_link_holds_it(colab, displayed, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(CHELSEA)
    nst.offer_download(path)
    assert colab.downloads == [str(path)]
    assert displayed == []
    colab.download = fail(BROKEN)
    nst.offer_download(path)
    (shown,) = displayed
    assert f'download="{path.name}"' in shown.data
    assert files_on(shown.data) == [CHELSEA]


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("outputs/picture.png", "outputs/picture.png"),
        ("{here}/out #1/100% what?.png", "out%20%231/100%25%20what%3F.png"),
        ('a:"b".png', "a%3A%22b%22.png"),
        ("{here}/café/写.png", "caf%C3%A9/%E5%86%99.png"),
        ("../picture.png", None),
        ("{here}2/a & b.png", None),
    ],
)
def test_elsewhere_a_file_in_the_folder_is_linked_to_and_of_others_the_path_is_shown(
    monkeypatch, displayed, tmp_path, path, address
):
    monkeypatch.chdir(tmp_path)
    path = Path(path.format(here=tmp_path))
    nst.offer_download(path)
    (shown,) = displayed
    assert html.escape(path.as_posix()) in shown.data
    if address is None:
        assert "href" not in shown.data
    else:
        assert f'download="{html.escape(path.name)}" href="{address}"' in shown.data


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "all", True])
def test_a_wrong_strength_is_refused(shallow, pair, strength):
    step = next(nst.stylize(*pair, SHALLOW, network=shallow))
    with pytest.raises(ValueError, match=f"strength .*{strength!r}"):
        nst.blend_with_photo(step, step.image, strength)


@pytest.fixture
def measured(monkeypatch) -> list[object]:
    """The jobs whose speed was measured, which takes no time here."""
    jobs = []
    monkeypatch.setattr(nst, "_free_bytes", lambda device: 8e9)  # so estimates never change
    monkeypatch.setattr(nst, "_measure_seconds_per_pixel", lambda job: jobs.append(job) or 1e-6)
    return jobs


@pytest.fixture
def panel(shallow, tmp_path, measured):
    panel = nst.Panel(SHALLOW, SOURCES, tmp_path, network=shallow)
    yield panel
    if panel.is_painting and panel.thread.is_alive():
        panel.stop()
        panel.thread.join(60)


class Gate:
    """Lets the steps of ``stylize`` through as it is told."""

    def __init__(self, stylize):
        self.stylize = stylize
        self.is_open = threading.Semaphore(0)
        self.is_waiting = threading.Semaphore(0)

    def steps(self, *args, **kwargs):
        for step in self.stylize(*args, **kwargs):
            self.is_waiting.release()
            assert self.is_open.acquire(timeout=60)
            yield step

    def let_through(self, count):
        """Come back when ``count`` more steps are done and the next one waits."""
        for _ in range(count):
            assert self.is_waiting.acquire(timeout=60)
            self.is_open.release()
        assert self.is_waiting.acquire(timeout=60)
        self.is_waiting.release()

    def finish(self, panel):
        self.is_open.release(1000)
        panel.thread.join(60)
        assert not panel.is_painting


@pytest.fixture
def gate(monkeypatch, panel):
    gate = Gate(nst.stylize)
    monkeypatch.setattr(nst, "stylize", gate.steps)
    yield gate
    gate.is_open.release(1000)


def paint(panel):
    """Press Paint, and wait for the end of the run."""
    panel.paint_button.click()
    panel.thread.join(60)
    assert not panel.is_painting


def upload(panel, which, data, name="my cat.png", button=None):
    """As the browser does."""
    button = button or panel.uploads[which]
    file = {"name": name, "type": "image/png", "size": len(data), "content": memoryview(data)}
    file["last_modified"] = datetime.now(timezone.utc)
    is_old = ipywidgets.__version__.startswith("7.")  # Colab's
    button.set_trait("value", {file["name"]: file} if is_old else (file,))


def saved(folder):
    """The one picture that was saved; no other file is there."""
    (path,) = folder.iterdir()
    assert path.suffixes == [".png"]  # and not .partial.png
    return path


def assert_offered(panel, path):
    """The panel names the file, and its link holds it."""
    assert str(path) in words_on(panel.status)
    assert panel.save_button.disabled
    assert f'download="{path.name}"' in panel.link.value
    assert files_on(panel.link.value) == [path.read_bytes()]
    assert panel.paint_button.description == "Paint"


def shown_in(box) -> list[ipywidgets.Widget]:
    """All the widgets in a box, and in the boxes in it."""
    inner = [shown_in(child) for child in getattr(box, "children", ())]
    return [box, *(widget for widgets in inner for widget in widgets)]


def test_a_panel_shows_all_its_widgets(panel):
    expected = [*panel.uploads.values(), *panel.controls.values(), panel.paint_button, panel.page]
    expected += [panel.stop_button, panel.strength, panel.chosen, panel.status, panel.link]
    expected += [panel.format, panel.save_button]
    assert {*expected} <= {*shown_in(panel)}
    assert "children" not in repr(panel)  # shown without a kernel


SUBSHELLS = {"supported_features": ["kernel subshells"]}


def shell_of(kernel_info, header):
    """Stands for the shell of a kernel, with a request from a page."""
    shell = types.SimpleNamespace(kernel=types.SimpleNamespace(kernel_info=kernel_info))
    shell.events = EventManager(shell, available_events)
    shell.get_parent = lambda: {"header": header}
    return shell


@pytest.mark.parametrize(
    ("kernel_info", "header", "wait"),
    [
        ({}, {"subshell_id": None}, True),
        (SUBSHELLS, {}, True),
        (SUBSHELLS, {"subshell_id": None}, False),
    ],
    ids=["old kernel", "old page", "new"],
)
def test_a_panel_says_while_cells_run_that_clicks_wait_where_they_do(
    monkeypatch, shallow, measured, tmp_path, kernel_info, header, wait
):
    shell = shell_of(kernel_info, header)
    monkeypatch.setattr(nst, "get_ipython", lambda: shell)
    panel = nst.Panel(SHALLOW, SOURCES, tmp_path, network=shallow)
    texts = [widget for widget in shown_in(panel) if isinstance(widget, ipywidgets.HTML)]
    before = [text.value for text in texts]
    shell.events.trigger("pre_run_cell", object())
    assert sum(text.value != old for text, old in zip(texts, before, strict=True)) == wait
    shell.events.trigger("post_run_cell", object())
    assert [text.value for text in texts] == before


def open_widgets() -> set[str]:
    return {*ipywidgets.Widget.get_manager_state()["state"]}


def test_a_new_panel_leaves_nothing_of_the_old_one_behind(monkeypatch, shallow, measured, tmp_path):
    shell = shell_of({}, {})
    monkeypatch.setattr(nst, "get_ipython", lambda: shell)
    before = open_widgets()
    panel = nst.Panel(SHALLOW, SOURCES, tmp_path, network=shallow)
    count = len(open_widgets() - before)
    panel.controls["color"].value = "content"
    panel.controls["color"].value = SHALLOW.color
    upload(panel, "photo", CHELSEA)
    for _ in range(2):
        panel = nst.Panel(SHALLOW, SOURCES, tmp_path, network=shallow, earlier=panel)
    assert len(open_widgets() - before) == count
    for event in ("pre_run_cell", "post_run_cell"):
        assert len(shell.events.callbacks[event]) == 1


def test_uploads_are_not_kept_in_what_a_notebook_saves(panel):
    def saved_with_notebook() -> int:
        return len(json.dumps(ipywidgets.Widget.get_manager_state()))

    before = saved_with_notebook()
    for shade in (0, 100, 200):
        upload(panel, "photo", encoded(Image.new("RGB", (1300, 1300), (shade, 9, 99)), "BMP"))
    assert len(panel.sources["photo"]) > 5e6
    assert saved_with_notebook() - before < 0.5e6


def test_an_upload_is_taken_and_shown_with_its_name_at_once(panel):
    assert "china.jpg" in words_on(panel.chosen)
    upload(panel, "painting", CHELSEA, "<my> cat.png")
    assert panel.sources == {"photo": SOURCES["photo"], "painting": CHELSEA}
    assert "<my> cat.png" in words_on(panel.chosen)
    assert "for the next run" not in words_on(panel.chosen)
    _, painting = files_on(panel.chosen.value)
    assert (nst.load_image(painting) - nst.load_image(CHELSEA, 64)).abs().mean() < 0.03
    button = panel.uploads["photo"]
    change = {"name": "value", "new": {"old.png": {"content": CHELSEA}}, "owner": button}
    button.notify_change(Bunch(change, type="change"))  # as in ipywidgets 7
    assert panel.sources["photo"] == CHELSEA
    assert "old.png" in words_on(panel.chosen)


@pytest.mark.parametrize("data", [b"", b"no picture", CHELSEA[:9000]])
def test_a_broken_upload_changes_nothing_and_is_named_at_the_buttons(panel, data):
    before = panel.chosen.value
    upload(panel, "photo", data, "notes.txt")
    assert panel.sources == SOURCES
    assert "notes.txt" in words_on(panel.chosen)
    panel.controls["color"].value = "content"
    assert panel.chosen.value == before  # the refusal was read by now
    upload(panel, "photo", CHELSEA)  # the button still works
    assert panel.sources["photo"] == CHELSEA


def test_other_clicks_bring_new_upload_buttons_in_place_of_stuck_ones(panel):
    first = dict(panel.uploads)
    panel.controls["color"].value = "content"
    second = dict(panel.uploads)
    assert panel.upload_row.children == tuple(second.values())
    assert not {*first.values()} & {*second.values()}
    upload(panel, "painting", CHELSEA, button=first["painting"])  # it comes late
    assert panel.sources["painting"] == CHELSEA
    paint(panel)
    assert not {*second.values()} & {*panel.uploads.values()}


def test_the_controls_make_the_settings(panel, measured):
    changes = {"style_weight": 3, "max_size": 256, "color": "luminance", "quality": "best"}
    before = {name: control.value for name, control in panel.controls.items()}
    for name, value in changes.items():
        panel.controls[name].value = value
    assert panel.config == replace(
        SHALLOW,
        **changes | {"style_weight": 3 * SHALLOW.style_weight},
        num_steps="auto",  # another quality was chosen, so the number of the settings is void
    )
    for name, value in before.items():
        panel.controls[name].value = value
    assert panel.config == SHALLOW
    assert [job.config for job in measured] == [SHALLOW]  # measured once, when it was made


def test_the_estimate_is_that_of_the_run(monkeypatch, panel, shallow):
    upload(panel, "painting", CUT_OUT)
    panel.controls["max_size"].value = 256

    def estimate(photo, painting, config, network, *, visible, cutout, seconds_per_pixel):
        assert (photo.shape, visible.shape, cutout) == ((1, 3, 171, 256), (1, 3, 40, 60), None)
        assert (config, network, seconds_per_pixel) == (panel.config, shallow, 1e-6)
        return nst.Estimate(83.0, 1.5e9, 7.25e9, 1e-6)

    monkeypatch.setattr(nst, "estimate", estimate)
    panel.controls["color"].value = "luminance"
    for number in ("256 x 171", "83 s", "1.5", "7.2"):
        assert number in words_on(panel.chosen)


def test_paint_makes_and_saves_the_picture_of_the_settings(panel, shallow, tmp_path):
    photo, painting = (nst.load_image(source, SHALLOW.max_size) for source in SOURCES.values())
    expected = last(nst.stylize(photo, painting, SHALLOW, network=shallow)).image
    paint(panel)
    assert panel.stop_button.disabled
    assert torch.equal(panel.result.image, expected)
    path = saved(tmp_path)
    assert torch.equal(nst.load_image(path), (expected * 255).round() / 255)
    assert record_in(path)["finished"]
    assert_offered(panel, path)
    assert re.fullmatch(r"china_in_starry_night_\d{8}_\d{6}\.png", path.name)
    (shown,) = files_on(panel.page.value)
    assert (nst.load_image(shown) - expected).abs().mean() < 0.03


def test_while_a_run_paints_it_says_how_far_it_is_and_nothing_else_is_begun(panel, gate, tmp_path):
    panel.start()
    gate.let_through(1)
    assert f" {panel.result.progress:.0%}" in panel.paint_button.description
    before, thread = panel.status.value, panel.thread
    panel.start()
    assert panel.thread is thread
    assert panel.status.value != before
    panel.format.value = "jpeg"  # counts at the end
    assert panel.link.value == ""
    panel.controls["color"].value = "luminance"
    assert not re.search(r"\d s\b", words_on(panel.chosen))  # no time to estimate
    gate.finish(panel)
    assert re.search(r"\d s\b", words_on(panel.chosen))
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".jpg"
    assert_offered(panel, path)


def test_the_run_of_the_panel_goes_before_the_steps_of_a_cell(
    monkeypatch, panel, gate, shallow, pair
):
    of_panel = []

    def see(asked, look):
        of_panel.append(threading.current_thread() is panel.thread)
        return look(*asked)

    steps_of_cell = gate.stylize(*pair, SHALLOW, network=shallow)
    next(steps_of_cell)
    replace_looks(monkeypatch, see)
    panel.start()
    gate.let_through(1)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(next, steps_of_cell)
        gate.let_through(3)
        gate.finish(panel)
        assert step.result(60).number == 2
    assert of_panel == sorted(of_panel, reverse=True)
    assert {*of_panel} == {True, False}


def test_a_run_has_the_settings_and_pictures_of_its_start(panel, gate, tmp_path):
    panel.controls["color"].value = "content"
    panel.start()
    gate.let_through(1)
    upload(panel, "photo", TRANSPARENT)
    upload(panel, "painting", CHELSEA)
    panel.controls["color"].value = "luminance"
    assert words_on(panel.chosen).count("for the next run") == 2
    gate.finish(panel)
    assert words_on(panel.chosen).count("for the next run") == 2  # other pictures are shown done
    path = saved(tmp_path)
    assert path.name.startswith("china_in_starry_night_")
    record = record_in(path)
    assert record["settings"]["color"] == "content"
    assert record["photo"] == nst._sha256_of(SOURCES["photo"])
    assert record["paintings"] == [nst._sha256_of(SOURCES["painting"])]
    panel.strength.value = 0  # the photo that was painted, not the one that is chosen now
    (blend,) = files_on(panel.link.value)
    photo = nst.load_image(SOURCES["photo"], SHALLOW.max_size)
    assert torch.equal(nst.load_image(blend), (photo * 255).round() / 255)
    paint(panel)
    assert "for the next run" not in words_on(panel.chosen)


@pytest.mark.parametrize("steps", [2, 5])
def test_stop_keeps_the_picture_so_far(panel, gate, tmp_path, steps):
    panel.start()
    gate.let_through(steps)
    assert list(tmp_path.glob("*.partial.png"))
    assert not panel.stop_button.disabled
    panel.stop_button.click()
    gate.finish(panel)
    path = saved(tmp_path)
    assert record_in(path)["step"] == panel.result.number == steps + 1
    assert record_in(path)["finished"] is (steps == 5)  # a stop in the last step comes too late
    assert ("Done." in words_on(panel.status)) is (steps == 5)
    assert_offered(panel, path)
    paint(panel)  # the next run is not stopped
    assert panel.result.number == SHALLOW.num_steps


def test_strength_mixes_the_photo_in_without_a_new_run(panel, gate, tmp_path):
    assert panel.strength.disabled  # there is nothing to mix yet
    panel.start()
    gate.finish(panel)
    first, thread = saved(tmp_path), panel.thread
    panel.strength.value = 0.5
    panel.strength.value = 0.25
    assert saved(tmp_path) == first  # only Save saves a blend
    assert "Saved as" not in words_on(panel.status)
    assert not panel.save_button.disabled
    photo = nst.load_image(SOURCES["photo"], SHALLOW.max_size)
    blend = photo + 0.25 * (panel.result.image - photo)
    (offered,) = files_on(panel.link.value)
    assert re.search(r'download="china_in_starry_night_\d{8}_\d{6}\.png"', panel.link.value)
    assert (nst.load_image(offered) - blend).abs().max() < 0.01
    (shown,) = files_on(panel.page.value)
    assert (nst.load_image(shown) - blend).abs().mean() < 0.03
    panel.save_button.click()
    (second,) = set(tmp_path.iterdir()) - {first}
    assert second.read_bytes() == offered
    assert record_in(second)["strength"] == 0.25
    assert_offered(panel, second)
    panel.strength.value = 1
    assert_offered(panel, first)
    assert panel.thread is thread
    panel.strength.value = 0.75
    panel.start()
    assert panel.strength.value == 1
    assert panel.strength.disabled
    assert panel.save_button.disabled
    gate.finish(panel)
    (third,) = set(tmp_path.iterdir()) - {first, second}
    assert record_in(third)["notes"] == []


def test_the_latest_result_is_offered_in_the_format_that_is_chosen(panel, tmp_path):
    panel.format.value = "webp"  # counts for the next result
    paint(panel)
    (webp,) = tmp_path.iterdir()
    assert webp.suffix == ".webp"
    assert_offered(panel, webp)
    panel.format.value = "jpeg"
    (offered,) = files_on(panel.link.value)
    assert Image.open(io.BytesIO(offered)).format == "JPEG"
    assert [*tmp_path.iterdir()] == [webp]
    panel.save_button.click()
    (jpeg,) = tmp_path.glob("*.jpg")
    assert_offered(panel, jpeg)
    assert nst.read_record(jpeg) == nst.read_record(webp)
    panel.format.value = "webp"
    assert_offered(panel, webp)


def test_a_transparent_result_is_shown_as_it_is_saved(panel, tmp_path):
    upload(panel, "photo", TRANSPARENT)
    paint(panel)
    with Image.open(saved(tmp_path)) as picture:
        assert picture.getchannel("A").getextrema() == (99, 99)
    (shown,) = files_on(panel.page.value)
    assert Image.open(io.BytesIO(shown)).getchannel("A").getextrema() == (99, 99)
    assert "gradient" in panel.page.value  # the checkerboard
    with pytest.warns(nst.StyleTransferWarning, match="JPEG"):
        panel.format.value = "jpeg"
    (shown,) = files_on(panel.page.value)
    assert Image.open(io.BytesIO(shown)).mode == "RGB"


ERRORS = {
    "Memory <ran> out.": MemoryError("Memory <ran> out."),
    "ValueError.": ValueError(),
    "Stopped.": KeyboardInterrupt(),
}


@pytest.mark.parametrize(("words", "error"), ERRORS.items(), ids=ERRORS)
def test_an_error_is_said_and_the_picture_so_far_is_saved(
    monkeypatch, panel, colab, tmp_path, words, error
):
    stylize = nst.stylize

    def broken(*args, **kwargs):
        yield next(stylize(*args, **kwargs))
        raise error

    monkeypatch.setattr(nst, "stylize", broken)
    panel.paint_button.click()
    path = saved(tmp_path)  # and no .partial.png
    assert record_in(path)["step"] == 1
    assert words in words_on(panel.status)
    assert_offered(panel, path)
    assert not panel.is_painting


def test_a_full_disk_is_said_and_the_result_stays(monkeypatch, panel, tmp_path):
    write = nst._write_new_file

    def write_partials_alone(data, folder, suffix, name="partial"):
        return write(data, folder, suffix) if name == "partial" else fail(NO_SPACE)()

    monkeypatch.setattr(nst, "_write_new_file", write_partials_alone)
    paint(panel)
    assert "No space left" in words_on(panel.status)
    assert panel.result.number == SHALLOW.num_steps
    (offered,) = files_on(panel.link.value)  # it can be downloaded all the same
    panel.status.value = ""
    panel.save_button.click()
    assert "No space left" in words_on(panel.status)
    monkeypatch.setattr(nst, "_write_new_file", write)
    panel.save_button.click()
    assert saved(tmp_path).read_bytes() == offered


def test_a_missing_photo_is_said_and_another_is_taken(shallow, tmp_path, measured):
    gone = SOURCES | {"photo": tmp_path / "gone.jpg"}
    panel = nst.Panel(SHALLOW, gone, tmp_path, network=shallow)
    assert "gone.jpg" in words_on(panel.chosen)
    panel.start()
    assert "gone.jpg" in words_on(panel.status)
    upload(panel, "photo", TRANSPARENT, "../my cat 100%.tar.png")
    paint(panel)
    assert saved(tmp_path).name.startswith("my_cat_100_tar_in_starry_night_")


def test_of_cut_out_pictures_only_what_is_visible_counts(panel):
    assert panel.visible is None
    upload(panel, "painting", CUT_OUT)
    upload(panel, "photo", CUT_OUT)
    photo, _ = panel.load()
    assert photo[..., 35:].max() < 0.9  # the hidden part is not painted as white
    for small in files_on(panel.chosen.value):
        alpha = Image.open(io.BytesIO(small)).getchannel("A")
        assert (alpha.getpixel((5, 20)), alpha.getpixel((55, 20))) == (255, 0)
    paint(panel)
    (visible,) = panel.result.job.visible
    for mask in (visible, panel.result.job.cutout):
        assert mask.shape == (1, 3, 40, 60)
        assert mask[..., :30].min() == 1
        assert mask[..., 30:].max() == 0


def test_uploads_and_choices_outlive_running_the_cell_again(panel, shallow, tmp_path):
    upload(panel, "photo", CHELSEA)
    panel.controls["style_weight"].value = 3
    panel.controls["quality"].value = "best"
    panel.format.value = "webp"
    paint(panel)
    (path,) = tmp_path.iterdir()
    again = nst.Panel(SHALLOW, SOURCES, tmp_path, network=shallow, earlier=panel)
    assert_offered(again, path)
    again.strength.value = 0.5  # the picture can still be blended
    assert "Not saved yet" in words_on(again.status)
    assert again.sources == {"photo": CHELSEA, "painting": SOURCES["painting"]}
    assert again.config == panel.config
    assert again.format.value == "webp"
    changed = replace(SHALLOW, quality="normal", style_weight=7)
    other = SOURCES | {"photo": IMAGES / "stained_glass.jpg"}
    newest = nst.Panel(changed, other, tmp_path, network=shallow, earlier=again)
    assert newest.config == changed
    assert newest.sources == other


def test_colab_paints_in_the_foreground(panel, colab, tmp_path):
    panel.paint_button.click()
    assert not panel.is_painting  # though nobody waited
    assert_offered(panel, saved(tmp_path))


def test_a_network_that_cannot_be_loaded_is_a_sentence_and_can_be_loaded_later(tmp_path, shallow):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no weights")
    panel = nst.Panel(replace(SHALLOW, weights=str(broken)), SOURCES, tmp_path / "out")
    assert "broken.pth" in words_on(panel.chosen)
    panel.paint_button.click()
    assert "broken.pth" in words_on(panel.status)
    assert not panel.is_painting
    panel.network = shallow
    paint(panel)
    assert_offered(panel, saved(tmp_path / "out"))


def test_an_estimate_that_fails_is_a_sentence_and_paint_still_works(monkeypatch, shallow, tmp_path):
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    monkeypatch.setattr(nst, "_measure_seconds_per_pixel", fail(error))
    panel = nst.Panel(SHALLOW, SOURCES, tmp_path, network=shallow)
    assert str(error) in words_on(panel.chosen)
    paint(panel)
    assert_offered(panel, saved(tmp_path))


def test_what_went_wrong_in_a_run_is_named_beside_the_result(monkeypatch, panel, tmp_path):
    for _ in range(2):
        break_looks(monkeypatch, 3, fail(MemoryError()))
        with pytest.warns(nst.StyleTransferWarning) as caught:
            paint(panel)
        assert len(ours(caught)) == 1  # in every run
        assert str(ours(caught)[0].message) in words_on(panel.status)
        assert "Done" in words_on(panel.status)
