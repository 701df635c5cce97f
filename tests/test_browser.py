"""The notebook in a real JupyterLab, driven by a real browser.

Skipped where there is no Chromium (``apt-get install chromium``). With ``NST_SCREENSHOTS=images``
the notebook runs at full size, and the README's screenshots are taken anew.
"""

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import IMAGES, ROOT, readme_command, record_in
from PIL import Image
from test_notebook import SMALL, copy_project, sha256

import nst_helpers as nst

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
SHOTS = os.environ.get("NST_SCREENSHOTS")
PATIENCE = 180_000  # milliseconds
VIEW = {"width": 1280, "height": 1000}  # pixels
LAB_SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # put all cells into the page
    "docmanager-extension/plugin": {"autosave": False},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The folder of a copy of the project, and the address of a JupyterLab that serves it."""
    project, home = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("jupyter")
    copy_project(project, **({"weights": '"bundled"'} if SHOTS else SMALL | {"max_size": 96}))
    for name, settings in LAB_SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ("JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    own = {name: str(home / name) for name in names}
    environment = os.environ | own | {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    options = ["--no-browser", "--allow-root", "--IdentityProvider.token=", "--ip=127.0.0.1"]
    command = [*readme_command("jupyter lab"), *options, f"--port={port}"]
    with (home / "log").open("w+") as log:
        server = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log)
        try:
            yield project, f"http://127.0.0.1:{port}/lab/tree/style_transfer.ipynb?reset"
        finally:
            server.terminate()
            server.wait()


class Person:
    """Someone who looks at a page and clicks."""

    def __init__(self, page, project: Path) -> None:
        self.page, self.project = page, project

    def open(self, address: str) -> None:
        for _ in range(600):  # until the server answers
            with contextlib.suppress(sync_api.Error):
                self.page.goto(address)
                break
            self.page.wait_for_timeout(100)
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=PATIENCE)
        self.page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=PATIENCE)

    def choose(self, menu: str, entry: str) -> None:
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}")).click()

    def cell(self, text: str):
        return self.page.locator(
            ".jp-CodeCell", has=self.page.locator(".jp-InputArea", has_text=text)
        )

    def wait_for(self, text: str, within=None):
        (within or self.page).get_by_text(re.compile(text)).first.wait_for(timeout=PATIENCE)

    def wait_until_idle(self) -> None:
        idle = self.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        idle.first.wait_for(timeout=PATIENCE, state="attached")

    @property
    def panel(self):
        return self.cell("nst.Panel(")

    def press(self, name: str) -> None:
        self.panel.locator("button", has_text=re.compile(rf"^\W*{name}")).click()

    def upload(self, button: str, *path: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.press(button)
        chooser.value.set_files(*path)

    def fill_form(self, name: str, value: str) -> None:
        """Change a number or a word in the form, and run it and the cell below."""
        line = self.cell("#@title Settings").locator(".cm-line", has_text=f"{name} = ")
        line.locator("span", has_text=re.compile(r'^("\w+"|\d+)$')).first.dblclick()
        self.page.keyboard.type(value)
        self.page.keyboard.press("Shift+Enter")
        self.page.keyboard.press("Shift+Enter")

    def choose_theme(self, name: str) -> None:
        self.page.get_by_role("menuitem", name="Settings", exact=True).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Theme$")).hover()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$")).click()
        self.page.wait_for_timeout(1000)  # while the styles load

    def select(self, label: str, value: str) -> None:
        row = self.panel.locator(".widget-dropdown", has_text=label)
        row.locator("select").select_option(label=value)
        self.wait_until_idle()

    def download(self, link) -> tuple[str, bytes]:
        with self.page.expect_download() as download:
            link.click()
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()

    def shot(self, name: str) -> None:
        """A screenshot of the panel, for the README."""
        data = self.panel.locator(".nst-panel").screenshot()
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        picture.save(ROOT / SHOTS / f"screen_{name}.jpg", quality=85)


@pytest.fixture(scope="module")
def person(lab) -> Iterator[Person]:
    """Someone who opened the notebook, and ran nothing yet."""
    project, address = lab
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        person = Person(browser.new_page(viewport=VIEW), project)
        person.open(address)
        yield person
        browser.close()


def pictures(project: Path) -> list[Path]:
    return sorted((project / "outputs").glob("*_in_*[0-9].png"))


def newest(project: Path) -> tuple[Path, dict]:
    path = max(pictures(project), key=lambda path: path.stat().st_mtime_ns)
    return path, record_in(path)


PHOTO, PAINTING = IMAGES / "chelsea.png", IMAGES / "stained_glass.jpg"
ENDLESS = "import os, time\nwhile not os.path.exists('over'):\n    time.sleep(0.05)"


def test_the_first_clicks_are_taken_while_a_later_cell_runs_or_the_panel_says_they_wait(person):
    below = "stylize is what the panel calls"
    person.page.get_by_role("paragraph").filter(has_text=below).click()
    for key in ("b", "Enter"):  # a new cell
        person.page.keyboard.press(key)
    person.page.keyboard.insert_text(ENDLESS)
    person.choose("Run", "Run All Above Selected Cell")
    person.page.keyboard.press("Control+Enter")
    person.wait_for(r"pixels in about \d+ s, using", person.panel)
    person.cell("while not os").get_by_text("[*]:").wait_for(timeout=PATIENCE)
    person.upload("Your photo", PHOTO)
    if person.panel.get_by_text("clicks wait").count():
        (person.project / "over").touch()
    person.wait_for(PHOTO.name, person.panel)
    person.press("Paint")
    person.wait_for(r"Done\. Saved as", person.panel)
    assert newest(person.project)[1]["photo"] == sha256(PHOTO)
    (person.project / "over").touch()
    person.wait_until_idle()
    if SHOTS:
        person.shot("panel")
        person.choose_theme("JupyterLab Dark")
        person.shot("panel_dark")
        person.choose_theme("JupyterLab Light")


@pytest.mark.parametrize("width", [1400, 700])
def test_the_picture_is_beside_the_controls_where_there_is_room_and_below_them_else(person, width):
    person.page.set_viewport_size({"width": width, "height": 900})
    output = person.panel.locator(".jp-OutputArea").first
    output.evaluate("element => element.scrollIntoView({block: 'start'})")
    person.page.wait_for_timeout(500)  # while JupyterLab arranges itself
    picture = person.panel.locator("img[alt^='the result']").bounding_box()
    controls = [
        person.panel.locator(kind).last.bounding_box() for kind in (".widget-upload", "select")
    ]
    assert picture["width"] > 200
    if width == 1400:
        assert all(box["x"] + box["width"] <= picture["x"] for box in controls)
        assert all(box["y"] + box["height"] < 900 for box in [picture, *controls])
    else:
        assert all(box["y"] + box["height"] <= picture["y"] for box in controls)
        assert picture["x"] + picture["width"] <= width
    person.page.set_viewport_size(VIEW)


def test_upload_buttons_show_no_number_of_files(person):
    button = person.panel.locator(".widget-upload").first
    height = button.evaluate("element => [element.clientHeight, element.scrollHeight]")
    assert height[1] > height[0]  # a second line, cut off
    assert button.inner_text().split("\n")[0].strip() == "Your photo"


def test_an_upload_that_cannot_be_read_is_refused(person, tmp_path):
    (tmp_path / "half.jpg").write_bytes((IMAGES / "china.jpg").read_bytes()[:20_000])
    person.upload("Your photo", tmp_path / "half.jpg")
    person.wait_for("Not used: 'half.jpg' .* The photo is unchanged", person.panel)
    person.wait_until_idle()


def test_an_upload_over_ten_megabytes_arrives(person, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1900, 1900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert 10 * 2**20 < (tmp_path / "large.png").stat().st_size < 100e6
    person.upload("Your photo", tmp_path / "large.png")
    person.wait_for("large.png", person.panel)
    person.wait_until_idle()


def test_after_a_file_that_never_arrives_the_buttons_work_again(person, tmp_path):
    (tmp_path / "huge.png").write_bytes(bytes(101_000_000))
    with person.page.expect_websocket():  # the server hangs up, and the page calls again
        person.upload("Your photo", tmp_path / "huge.png")
    person.select("Quality", "normal")
    person.upload("Your photo", IMAGES / "china.jpg")
    person.wait_for("china.jpg", person.panel)
    person.wait_until_idle()
    person.select("Quality", "quick")


def test_two_uploaded_pictures_are_painted_and_downloaded(person):
    for which, path in {"photo": PHOTO, "painting": PAINTING}.items():
        person.upload(f"Your {which}", path)
        person.wait_for(path.name, person.panel)
        person.wait_until_idle()
    person.press("Paint")
    person.wait_for(r"Done\. Saved as .*chelsea_in_stained_glass", person.panel)
    path, record = newest(person.project)
    assert [record["photo"], *record["paintings"]] == [sha256(PHOTO), sha256(PAINTING)]
    assert nst.load_image(path).std() > 0.1
    link = person.panel.locator("a[download]")
    assert person.download(link) == (path.name, path.read_bytes())


def test_the_strength_slider_blends_its_link_downloads_the_blend_and_save_saves_it(person):
    before = pictures(person.project)
    person.panel.locator(".noUi-handle").last.press("ArrowLeft")
    person.wait_for("Not saved yet", person.panel)
    assert pictures(person.project) == before
    name, data = person.download(person.panel.locator("a[download]"))
    assert name.startswith("chelsea_in_stained_glass_")
    person.press("Save")
    person.wait_for("^Saved as", person.panel)
    assert len(pictures(person.project)) == len(before) + 1
    path, record = newest(person.project)
    assert path.read_bytes() == data
    assert record["strength"] == pytest.approx(0.95)


def test_the_arrows_of_dropdowns_are_seen_in_the_dark(person):
    person.choose_theme("JupyterLab Dark")
    data = person.panel.locator("select").first.screenshot()
    person.choose_theme("JupyterLab Light")
    picture = Image.open(io.BytesIO(data)).convert("L")
    darkest, lightest = picture.crop((picture.width - 22, 6, *picture.size)).getextrema()
    assert lightest - darkest > 100


# The words of an element's text that stand on more than one line.
BROKEN_WORDS = """element => {
    const text = element.firstChild, range = document.createRange()
    return [...text.data.matchAll(/\\S+/g)].map(found => {
        range.setStart(text, found.index)
        range.setEnd(text, found.index + found[0].length)
        return [found[0], new Set([...range.getClientRects()].map(box => box.top)).size]
    }).filter(([word, lines]) => lines > 1)
}"""


def test_stop_keeps_the_picture_so_far(person):
    person.select("Size", "512")
    person.select("Quality", "best")
    person.page.set_viewport_size({"width": 1100, "height": 900})
    person.press("Paint")
    line = person.panel.get_by_text(re.compile(r"^\s*\d+% \|"))
    line.wait_for(timeout=PATIENCE)
    assert line.evaluate(BROKEN_WORDS) == []
    person.page.set_viewport_size(VIEW)
    person.press("Stop")
    person.wait_for(r"Stopped\. Saved as", person.panel)
    assert not newest(person.project)[1]["finished"]
    assert person.panel.get_by_role("button", name="Stop").is_disabled()
    person.select("Size", "96")
    person.select("Quality", "quick")


def test_run_all_paints_the_uploaded_pictures(person):
    person.choose("Run", "Run All Cells")
    saved = person.cell("nst.save_image(result")
    saved.locator("a[download]").wait_for(timeout=PATIENCE)
    person.wait_until_idle()
    paint = person.panel.get_by_role("button", name="Paint", exact=True).bounding_box()
    assert 0 < paint["y"] < VIEW["height"]  # the new panel came into view
    path, record = newest(person.project)
    assert record["photo"] == sha256(PHOTO)  # uploads outlive Run All
    assert person.download(saved.locator("a[download]")) == (path.name, path.read_bytes())
    for cell in ("nst.watch(", 'nst.show_images({"photo": content', "before_and_after"):
        shown = person.cell(cell).locator("img").first
        assert shown.evaluate("image => image.complete && image.naturalWidth") > 50
    view = person.cell("before_and_after")
    view.locator("input").evaluate("slider => { slider.value = 30; slider.oninput() }")
    assert "30%" in view.locator("img").nth(1).evaluate("image => image.style.clipPath")
    person.press("Paint")  # in the new panel
    person.wait_for(r"Done\. Saved as", person.panel)


def test_a_wrong_form_value_gives_one_sentence_and_can_be_corrected(person):
    person.fill_form("max_size", "3")
    cell = person.cell("config = nst.StyleTransferConfig(")
    person.wait_for("max_size must be .*, not 3", cell)
    person.fill_form("max_size", "256")
    person.wait_for("Painting on", cell)


def test_a_stopped_cell_keeps_its_picture_and_the_cells_below_save_it(person):
    person.fill_form("quality", "best")
    before = len(pictures(person.project))
    person.choose("Run", "Run All Cells")
    loop = person.cell("nst.watch(")
    person.wait_for(r"\d% \|.* left", loop)
    person.choose("Kernel", "Interrupt Kernel")
    person.wait_for("Stopped: the cells below", loop)
    person.wait_until_idle()
    assert len(pictures(person.project)) == before + 1
    assert not newest(person.project)[1]["finished"]
    person.fill_form("quality", "quick")
    person.fill_form("max_size", "96")


def test_after_a_restart_of_the_kernel_run_all_paints_again(person):
    before = pictures(person.project)
    person.choose("Kernel", "Restart Kernel…")
    person.page.locator(".jp-Dialog button.jp-mod-warn").click()
    lost = person.panel.locator(".jupyter-widgets-disconnected")
    lost.first.wait_for(timeout=PATIENCE)
    marks = [
        mark.evaluate("mark => getComputedStyle(mark, '::before').content") for mark in lost.all()
    ]
    assert "Run All" in marks[0]
    assert {*marks[1:]} == {"none"}
    person.wait_until_idle()
    person.choose("Run", "Run All Cells")
    person.wait_until_idle()
    person.cell("nst.save_image(result").locator("a[download]").wait_for(timeout=PATIENCE)
    assert len(pictures(person.project)) == len(before) + 1
    assert newest(person.project)[1]["finished"]
