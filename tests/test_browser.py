"""A person at the keyboard: the notebook in a real JupyterLab, driven by a real browser.

Skipped where there is no Chromium (``apt-get install chromium``). With ``NST_SCREENSHOTS=images``
the notebook runs at full size, and the README's screenshots are taken anew.
"""

import hashlib
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
from test_notebook import SMALL, copy_project

import nst_helpers as nst

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
SHOTS = os.environ.get("NST_SCREENSHOTS")
PATIENCE = 180_000  # milliseconds that the browser waits for what must come
LAB_SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {
        "windowingMode": "none"
    },  # else cells out of sight are not in the page
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
    folders = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    address = ["--ip=127.0.0.1", f"--port={port}"]
    options = ["--no-browser", "--allow-root", "--IdentityProvider.token=", *address]
    command = [*readme_command("jupyter lab"), *options]
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
            try:
                self.page.goto(address)
                break
            except sync_api.Error:
                self.page.wait_for_timeout(100)
        self.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=PATIENCE)
        self.page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=PATIENCE)

    def choose(self, menu: str, entry: str) -> None:
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}")).click()

    def restart_and_run_all(self) -> None:
        self.choose("Kernel", "Restart Kernel and Run All Cells")
        self.page.locator(".jp-Dialog button.jp-mod-warn").click()

    def cell(self, text: str):
        source = self.page.locator(".jp-InputArea", has_text=text)
        return self.page.locator(".jp-CodeCell", has=source)

    def wait_for(self, text: str, within=None):
        found = (within or self.page).get_by_text(re.compile(text)).first
        found.wait_for(timeout=PATIENCE)
        return found

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

    def choose_theme(self, name: str) -> None:
        self.page.get_by_role("menuitem", name="Settings", exact=True).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Theme$")).hover()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$")).click()
        self.page.wait_for_timeout(1000)  # while the styles load

    def run_all(self) -> None:
        self.choose("Run", "Run All Cells")

    def run_down_to_the_panel(self) -> None:
        text = "Nothing happens when you press a button?"
        self.page.get_by_role("paragraph").filter(has_text=text).click()
        self.choose("Run", "Run All Above Selected Cell")
        self.panel.locator("button.mod-primary").wait_for(timeout=PATIENCE)
        self.wait_until_idle()

    def select(self, label: str, value: str) -> None:
        row = self.panel.locator(".widget-dropdown", has_text=label)
        row.locator("select").select_option(label=value)
        self.wait_until_idle()

    def download(self, link) -> tuple[str, bytes]:
        with self.page.expect_download() as download:
            link.click()
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()

    def shot(self, name: str, top) -> None:
        """A screenshot with ``top`` at its upper edge, kept if it is wanted."""
        top.evaluate("element => element.scrollIntoView({block: 'start'})")
        self.page.wait_for_timeout(300)  # of painting, by the browser
        data = self.page.locator(".jp-MainAreaWidget:visible").first.screenshot()
        assert len(data) > 10_000
        if SHOTS:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            picture.save(ROOT / SHOTS / f"screen_{name}.jpg", quality=80)


@pytest.fixture(scope="module")
def person(lab) -> Iterator[Person]:
    """Someone who opened the notebook, and ran nothing yet."""
    project, address = lab
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        person = Person(browser.new_page(viewport={"width": 1280, "height": 1000}), project)
        person.open(address)
        yield person
        browser.close()


def pictures(project: Path) -> list[Path]:
    return sorted((project / "outputs").glob("stylized_output_*[0-9].png"))


def newest(project: Path) -> tuple[Path, dict]:
    path = max(pictures(project), key=lambda path: path.stat().st_mtime_ns)
    return path, record_in(path)


def assert_is_painted(path: Path, photo: Path) -> None:
    """Neither blank, nor the photo."""
    image = nst.load_image(path)
    before = nst.resize(nst.load_image(photo), image.shape[2:])
    assert image.std() > 0.1
    assert (image - before).abs().mean() > 0.03


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


PHOTO, PAINTING = IMAGES / "chelsea.png", IMAGES / "stained_glass.jpg"


def test_the_panel_is_ready_and_paints_when_nothing_below_has_run(person):
    person.run_down_to_the_panel()
    person.wait_for(r"pixels in about \d+ s, using", person.panel)
    person.press("Paint")
    person.wait_for(r"Done\. Saved as", person.panel)
    path, record = newest(person.project)
    assert_is_painted(path, IMAGES / "china.jpg")
    assert record["finished"]


@pytest.mark.parametrize(
    ("name", "data"), [("notes.jpg", b"no picture at all"), ("empty.png", b""), ("half.jpg", None)]
)
def test_an_upload_that_is_no_picture_is_refused_in_a_sentence(person, tmp_path, name, data):
    if data is None:
        data = (IMAGES / "china.jpg").read_bytes()[:20_000]
    (tmp_path / name).write_bytes(data)
    person.upload("Your photo", tmp_path / name)
    person.wait_for("Not used: .* The photo is unchanged", person.panel)
    person.wait_until_idle()


def test_a_picture_larger_than_jupyter_carries_by_itself_is_taken(person, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1900, 1900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert 10 * 2**20 < (tmp_path / "large.png").stat().st_size < 100e6
    person.upload("Your photo", tmp_path / "large.png")
    person.wait_for("Your photo is loaded", person.panel)
    person.wait_until_idle()


def test_after_a_file_that_never_arrives_the_buttons_work_again(person, tmp_path):
    (tmp_path / "huge.png").write_bytes(bytes(101_000_000))
    with person.page.expect_websocket():  # the server hangs up, and the page calls again
        person.upload("Your photo", tmp_path / "huge.png")
    person.select("Quality", "normal")
    (tmp_path / "notes.png").write_bytes(b"no picture")
    person.upload("Your photo", tmp_path / "notes.png")
    person.wait_for("Not used", person.panel)
    person.wait_until_idle()
    person.select("Quality", "quick")


def test_two_uploaded_pictures_are_painted_and_downloaded(person):
    for which, path in {"photo": PHOTO, "painting": PAINTING}.items():
        person.upload(f"Your {which}", path)
        person.wait_for(f"Your {which} is loaded", person.panel)
        person.wait_until_idle()
    person.press("Paint")
    person.wait_for(r"Done\. Saved as", person.panel)
    path, record = newest(person.project)
    hashes = [record["photo"]["sha256"], record["paintings"][0]["sha256"]]
    assert hashes == [sha256(PHOTO), sha256(PAINTING)]
    assert_is_painted(path, PHOTO)
    link = person.panel.locator("a[download]")
    assert person.download(link) == (path.name, path.read_bytes())
    person.shot("panel", person.panel.locator(".jp-Cell-outputArea"))
    if SHOTS:
        person.choose_theme("JupyterLab Dark")
        person.shot("panel_dark", person.panel.locator(".jp-Cell-outputArea"))
        person.choose_theme("JupyterLab Light")


def test_the_strength_slider_blends_saves_and_offers_at_once(person):
    before = len(pictures(person.project))
    handle = person.panel.locator(".noUi-handle").last
    handle.focus()
    person.page.keyboard.press("ArrowLeft")
    person.wait_for("At a strength of 9", person.panel)
    assert len(pictures(person.project)) == before + 1
    path, record = newest(person.project)
    assert 0.85 < record["strength"] < 1
    link = person.panel.locator("a[download]")
    assert person.download(link) == (path.name, path.read_bytes())


def test_stop_keeps_the_picture_so_far(person):
    person.select("Size", "512")
    person.select("Quality", "best")
    person.press("Paint")
    person.wait_for(r"step [1-9]\d* of", person.panel)
    person.press("Stop")
    person.wait_for(r"Stopped\. Saved as", person.panel)
    path, record = newest(person.project)
    assert not record["finished"]
    assert nst.load_image(path).std() > 0.1
    person.press("Stop")
    person.wait_for("There is nothing to stop", person.panel)
    person.select("Size", "96")
    person.select("Quality", "quick")


def test_run_all_says_that_cells_run_and_ends_with_a_picture_of_what_was_uploaded(person):
    person.run_all()
    person.wait_for("Cells are running", person.panel)
    saved = person.cell("nst.save_image(result")
    saved.locator("a[download]").wait_for(timeout=PATIENCE)
    person.wait_until_idle()
    assert person.panel.get_by_text("Cells are running").count() == 0
    path, record = newest(person.project)
    assert record["photo"]["sha256"] == sha256(PHOTO)  # uploads outlive Run All
    assert person.download(saved.locator("a[download]")) == (path.name, path.read_bytes())
    for cell in ("nst.watch(", 'nst.show_images({"photo": content', "before_and_after"):
        shown = person.cell(cell).locator("img").first
        assert shown.evaluate("image => image.complete && image.naturalWidth") > 50


def test_clicks_are_heard_while_cells_run(person):
    person.select("Size", "256")
    person.select("Quality", "best")
    person.run_all()
    person.wait_for(r"step \d+ of [1-9]\d\d,", person.cell("nst.watch("))
    person.press("Paint")
    person.wait_for(r"step [1-9]\d* of", person.panel)
    person.press("Stop")
    person.wait_for(r"Stopped\. Saved as", person.panel)
    assert person.page.locator(".jp-Notebook-ExecutionIndicator[data-status=busy]").count()
    person.choose("Kernel", "Interrupt Kernel")
    person.wait_for("Stopped: the cells below", person.cell("nst.watch("))
    person.wait_until_idle()
    person.select("Size", "96")
    person.select("Quality", "quick")


def test_before_and_after_are_parted_where_the_slider_stands(person):
    view = person.cell("before_and_after")
    slider = view.locator("input[type=range]")
    slider.evaluate("slider => { slider.value = 30; slider.oninput() }")
    assert "30%" in view.locator("img").nth(1).evaluate("image => image.style.clipPath")


@pytest.mark.parametrize(
    ("link", "heading"),
    [
        ("Paint your own", "Paint your own"),
        ("How it works", "How it works"),
        ("One control at a time", "One control at a time"),
        ("The result", "The result"),
    ],
)
def test_a_link_to_a_section_leads_there(person, link, heading):
    anchor = person.page.locator(".jp-MarkdownCell a", has_text=re.compile(f"^{link}$")).first
    anchor.scroll_into_view_if_needed()
    anchor.click()
    found = person.page.locator(".jp-MarkdownCell :is(h2, h3)", has_text=heading).first
    sync_api.expect(found).to_be_in_viewport()


def test_a_form_value_out_of_range_is_refused_in_a_sentence_and_can_be_mended(person):
    form = person.cell("#@title Settings").locator(".cm-content")

    def fill(number: str) -> None:
        line = form.locator(".cm-line", has_text="max_size = ")
        line.locator("span", has_text=re.compile(r"^\d+$")).dblclick()
        person.page.keyboard.type(number)
        person.page.keyboard.press("Shift+Enter")
        person.page.keyboard.press("Shift+Enter")

    fill("3")
    cell = person.cell("config = nst.StyleTransferConfig(")
    person.wait_for("max_size must be .*, not 3", cell)
    assert "Traceback" not in cell.inner_text()
    fill("96")
    person.wait_for("Painting on", cell)


def test_a_kernel_restarted_half_way_paints_again_after_run_all(person):
    before = pictures(person.project)
    person.restart_and_run_all()
    person.wait_until_idle()
    person.cell("nst.save_image(result").locator("a[download]").wait_for(timeout=PATIENCE)
    assert len(pictures(person.project)) == len(before) + 1
    assert newest(person.project)[1]["finished"]
