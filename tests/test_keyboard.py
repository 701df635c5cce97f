"""What a person at the keyboard sees and presses: the live view, and the panel, here without a browser."""

import base64
import io
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import nst_helpers as nst

IMAGES = Path(__file__).parent.parent / "images"
CONFIG = nst.StyleTransferConfig(weights="bundled", precision="float32", device="cpu", max_size=64, num_steps=6)
SOURCES = {"photo": IMAGES / "china.jpg", "painting": IMAGES / "starry_night.jpg"}


# Pictures on a page -----------------------------------------------------------------------------


def pictures_in(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.mark.parametrize(("size", "width"), [((32, 64), 300), ((64, 32), 150), ((600, 900), 300)])
def test_a_picture_is_as_long_on_the_page_at_every_size_and_never_heavier(size, width):
    tag = nst.picture_tag(torch.rand(1, 3, *size), 'a "cat" & <dog>', side=300)
    assert f"width: {width}px" in tag and 'alt="a &quot;cat&quot; &amp; &lt;dog&gt;"' in tag
    (picture,) = pictures_in(tag)
    assert max(picture.size) == min(300, *[max(size)]) and picture.format == "JPEG"


def test_the_picture_on_the_page_is_the_picture():
    image = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    (picture,) = pictures_in(nst.picture_tag(image, "blue"))
    assert nst.load_image(picture)[0, :, 5, 5].tolist() == pytest.approx([0.2, 0.5, 0.9], abs=0.02)


# The live view ----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told to go on."""
    now = [100.0]
    monkeypatch.setattr(nst.time, "monotonic", lambda: now[0])
    return now


def steps_of(content, number=6, clock=None, seconds=0.0):
    for i in range(number):
        if clock:
            clock[0] += seconds
        yield nst.Step(i + 1, content, {"style": torch.tensor(1.0 / (i + 1)), "total": torch.tensor(2.0)})


def watched(steps, content, config=CONFIG):
    shown = []
    passed = list(nst.watch(steps, content, config, lambda page, line: shown.append((page, line))))
    return passed, shown


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.7])
def test_it_is_drawn_at_a_steady_pace_whatever_a_step_takes(clock, seconds):
    content, config = torch.rand(1, 3, 32, 48), replace(CONFIG, num_steps=60)
    passed, shown = watched(steps_of(content, 60, clock, seconds), content, config)
    assert [step.number for step in passed] == [*range(1, 61)]
    assert len(shown) == pytest.approx(60 * seconds / max(1, 2 * seconds), abs=2.5) or seconds > 0.5
    assert 2 <= len(shown) <= 60 * seconds + 2


def test_a_slow_page_is_drawn_less_often_so_that_it_takes_less_than_3_percent(clock):
    content, config, drawn = torch.rand(1, 3, 32, 48), replace(CONFIG, num_steps=400), []

    def show(page, line):
        drawn.append(clock[0])
        clock[0] += 0.5  # seconds that the page takes

    list(nst.watch(steps_of(content, 400, clock, 0.1), content, config, show))
    assert len(drawn) >= 3
    assert len(drawn[:-1]) * 0.5 / (clock[0] - 100) < 0.03


def test_it_shows_the_picture_the_losses_and_how_far_it_is(clock):
    content = torch.rand(1, 3, 40, 64)
    steps = nst.watch(steps_of(content, 6, clock, 2.0), content, replace(CONFIG, scales=1), lambda *x: shown.append(x))
    shown = []
    for step in steps:
        if step.number == 4:  # by then the third one is drawn
            page, line = shown[-1]
            break
    assert re.fullmatch(r"step 3 of 6, 64 x 40 pixels \|.*\| 00:06, 00:06 left", line)
    picture, losses = pictures_in(page)
    assert picture.size == (64, 40) and losses.size[0] > 200 and line in page


def test_the_time_left_counts_that_larger_sizes_take_longer(clock):
    content, config = torch.rand(1, 3, 200, 400), replace(CONFIG, max_size=400, num_steps=20)
    plan = nst.plan_scales((200, 400), config)
    assert len(plan) > 2
    work = [(s.size[0] + 8) * (s.size[1] + 8) for s in plan for _ in range(s.steps)]

    def steps():
        for i, pixels in enumerate(work):
            clock[0] += pixels / 1000
            yield nst.Step(i + 1, content, {"total": torch.tensor(1.0)})

    _, shown = watched(steps(), content, config)
    minutes, seconds = map(int, re.search(r"(\d\d):(\d\d) left", shown[1][1]).groups())
    number = int(re.search(r"step (\d+)", shown[1][1])[1])
    assert minutes * 60 + seconds == pytest.approx(sum(work[number:]) / 1000, abs=1.1)


@pytest.mark.parametrize("how", ["break", "error", "interrupt"])
def test_however_a_run_ends_its_last_picture_is_shown(clock, how):
    content, shown = torch.rand(1, 3, 32, 48), []

    def steps():
        yield from steps_of(content, 4)
        raise KeyboardInterrupt if how == "interrupt" else ValueError

    def look():
        for step in nst.watch(steps(), content, CONFIG, lambda page, line: shown.append(line)):
            if how == "break" and step.number == 3:
                break

    if how == "break":
        look()
    else:
        with pytest.raises(KeyboardInterrupt if how == "interrupt" else ValueError):
            look()
    assert len(shown) == 2
    assert shown[-1].startswith(f"step {3 if how == 'break' else 4} of 6") and shown[-1].endswith("stopped")


def test_a_run_that_came_to_its_end_says_so(clock):
    content = torch.rand(1, 3, 32, 48)
    assert watched(steps_of(content), content)[1][-1][1].endswith("done")
    assert watched(iter(()), content)[1] == []


def test_without_a_page_plain_lines_are_printed(clock, capsys):
    content = torch.rand(1, 3, 32, 48)
    list(nst.watch(steps_of(content, 6, clock, 1.5), content, CONFIG))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(line.startswith("step ") for line in lines)


# The panel --------------------------------------------------------------------------------------


@pytest.fixture
def panel(vgg, tmp_path, monkeypatch):
    monkeypatch.setattr(nst, "display", lambda page: panel.told.append(page.data))
    panel = nst.Panel(CONFIG, vgg, SOURCES, tmp_path)
    panel.told = []
    yield panel
    panel.stop()
    if panel.thread.is_alive():
        panel.thread.join(60)


def uploaded(data: bytes, version: int = 8):
    """What a FileUpload widget of ipywidgets 8 or 7 holds."""
    if version == 7:
        return {"a.png": {"content": data, "metadata": {"name": "a.png"}}}
    return ({"name": "a.png", "content": memoryview(data)},)


def record_of(folder: Path) -> dict:
    (path,) = folder.glob("*[0-9].png")
    with Image.open(path) as picture:
        return json.loads(picture.text["style_transfer"])


@pytest.mark.parametrize("version", [7, 8])
def test_an_upload_is_taken_at_once_and_said(panel, version):
    data = (IMAGES / "chelsea.png").read_bytes()
    panel.plan(painting=uploaded(data, version))
    assert panel.sources == {"photo": SOURCES["photo"], "painting": data}
    assert "Your painting is taken." in panel.told[-1]
    assert [picture.size for picture in pictures_in(panel.told[-1])] == [(64, 43), (64, 43)]


@pytest.mark.parametrize("data", [b"", b"no picture", (IMAGES / "chelsea.png").read_bytes()[:9000]])
def test_an_upload_that_is_no_picture_changes_nothing_and_is_said(panel, data):
    panel.plan(photo=uploaded(data))
    assert panel.sources == SOURCES
    assert re.search(r"<b>Not taken: the uploaded picture is .*\. The photo stays the one it was\.</b>", panel.told[-1])
    assert "64 x 43 pixels in about" in panel.told[-1]


def test_the_controls_make_the_settings_and_the_estimate_is_told(panel):
    panel.plan(num_steps=3, style_weight=3.0, color="luminance", max_size=32)
    assert panel.config == replace(CONFIG, num_steps=3, style_weight=3.0, color="luminance", max_size=32)
    assert re.search(r"32 x 21 pixels in about \d+ s, with 0\.\d of the \d+\.\d GB of memory", panel.told[-1])
    with pytest.raises(ValueError, match="num_steps must be"):
        panel.plan(num_steps=0)


def test_paint_makes_the_picture_that_the_settings_make(panel, vgg, tmp_path):
    panel.start()
    panel.thread.join(60)
    content, style = panel.load()
    *_, step = nst.stylize(content, style, CONFIG, vgg)
    assert torch.equal(panel.result, step.image)
    assert "Done and saved" in panel.said.value
    (path,) = tmp_path.glob("*.png")  # and no partial one
    link = re.search(r'<a download="([^"]+)" href="data:image/png;base64,([^"]+)">', panel.page.value)
    assert link[1] == path.name and base64.b64decode(link[2]) == path.read_bytes()
    assert f"Saved as {path}" in panel.page.value and "step 6 of 6" in panel.page.value


@pytest.fixture
def gate(monkeypatch):
    """Each step waits until it is let through."""
    gate, stylize = threading.Semaphore(0), nst.stylize

    def slow(*args):
        for step in stylize(*args):
            assert gate.acquire(timeout=60)
            yield step

    monkeypatch.setattr(nst, "stylize", slow)
    return gate


def test_paint_pressed_twice_is_one_run_and_a_sentence(panel, gate):
    panel.start()
    first = panel.thread
    panel.start()
    assert panel.thread is first and "being painted already" in panel.said.value
    gate.release(6)
    first.join(60)
    assert "Done and saved" in panel.said.value


def test_stop_keeps_the_picture_so_far(panel, gate, tmp_path):
    panel.start()
    gate.release(2)
    panel.stop()
    assert "Stopping" in panel.said.value
    gate.release(1)
    panel.thread.join(60)
    assert "Stopped and saved" in panel.said.value and panel.result is not None
    record = record_of(tmp_path)
    assert 1 <= record["step"] <= 3 and not record["finished"]
    panel.stop()
    assert "nothing to stop" in panel.said.value


def test_after_a_stop_it_paints_again(panel, tmp_path):
    panel.stop()
    panel.start()
    panel.thread.join(60)
    assert record_of(tmp_path)["finished"]


def test_what_goes_wrong_in_the_thread_is_said_and_the_picture_so_far_saved(panel, monkeypatch, tmp_path):
    stylize = nst.stylize

    def broken(*args):
        yield next(stylize(*args))
        raise MemoryError("Memory ran out at 64 x 43 pixels <and so on>.")

    monkeypatch.setattr(nst, "stylize", broken)
    panel.start()
    panel.thread.join(60)
    assert panel.said.value == "<b>Memory ran out at 64 x 43 pixels &lt;and so on&gt;.</b>"
    assert record_of(tmp_path)["step"] == 1


def test_a_photo_that_is_gone_is_said(panel):
    panel.sources["photo"] = "images/no such.jpg"
    panel.start()
    panel.thread.join(60)
    assert "There is no picture at" in panel.said.value


def test_in_colab_it_paints_in_the_foreground(panel, monkeypatch):
    monkeypatch.setitem(nst.sys.modules, "google.colab", object())
    panel.start()
    assert panel.result is not None and "Done and saved" in panel.said.value


def test_uploads_outlive_a_new_panel_unless_the_form_names_other_files(panel, vgg, tmp_path):
    data = (IMAGES / "chelsea.png").read_bytes()
    panel.plan(photo=uploaded(data))
    assert nst.Panel(CONFIG, vgg, {**SOURCES}, tmp_path, panel).sources["photo"] == data
    other = SOURCES | {"painting": IMAGES / "stained_glass.jpg"}
    assert nst.Panel(CONFIG, vgg, other, tmp_path, panel).sources == other


def test_two_runs_at_once_take_turns(monkeypatch, vgg, pictures):
    """Both in one process, as a cell and the panel may: a step of one waits for the step of the other."""
    inside, most = [], []
    calculate = nst.calculate_losses

    def counted(*args):
        inside.append(1)
        most.append(len(inside))
        try:
            return calculate(*args)
        finally:
            inside.pop()

    monkeypatch.setattr(nst, "calculate_losses", counted)
    pair = [nst.shrink_to(pictures[name], 64) for name in ("china", "starry_night")]
    runs = [threading.Thread(target=lambda: list(nst.stylize(*pair, CONFIG, vgg))) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert len(most) == 18 and max(most) == 1
