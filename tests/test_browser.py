"""A person at the keyboard: the notebook in a real JupyterLab, driven by a real browser.

Skipped where there is no Chromium (``apt-get install chromium``). With ``NST_SCREENSHOTS=images`` the notebook runs at
full size, and the README's screenshots are taken anew.
"""

import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import nst_helpers as nst

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

ROOT = Path(__file__).parent.parent
SHOTS = os.environ.get("NST_SCREENSHOTS")
PATIENCE = 300_000  # milliseconds that the browser waits for what must come
LAB_SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # else cells out of sight are not in the page
    "docmanager-extension/plugin": {"autosave": False},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The folder of a copy of the project, and the address of a JupyterLab that serves it."""
    project, home = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("jupyter")
    for name in ("style_transfer.ipynb", "nst_helpers.py"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "images", project / "images")
    for name, settings in LAB_SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    folders |= {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    if not SHOTS:
        environment["NST_QUICK"] = "1"
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root", "--IdentityProvider.token="]
    command = [sys.executable, "-m", "jupyterlab", *options]
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
        return self.page.locator(".jp-CodeCell", has=self.page.locator(".jp-InputArea", has_text=text))

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
            Image.open(io.BytesIO(data)).convert("RGB").save(ROOT / SHOTS / f"screen_{name}.jpg", quality=85)


@pytest.fixture(scope="module")
def person(lab):
    """Someone who opened the notebook and chose Run All."""
    project, address = lab
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        person = Person(browser.new_page(viewport={"width": 1280, "height": 1000}), project)
        person.open(address)
        person.choose("Run", "Run All Cells")
        if SHOTS:
            step = person.wait_for(r"step (5[5-9]|6\d) of", person.cell("nst.watch("))
            person.shot("live", person.cell("nst.watch("))
            assert step
        person.wait_for(r"Saved as .*\.webp")  # the last cell but one
        person.wait_until_idle()
        yield person
        browser.close()


def pictures(project: Path) -> list[Path]:
    return sorted((project / "outputs").glob("stylized_output_*[0-9].png"))


def newest(project: Path) -> tuple[Path, dict]:
    path = max(pictures(project), key=lambda path: path.stat().st_mtime_ns)
    with Image.open(path) as picture:
        return path, json.loads(picture.text["style_transfer"])


def assert_is_painted(path: Path, photo: Path) -> None:
    """Neither blank, nor the photo."""
    image = nst.load_image(path)
    before = nst.resize(nst.load_image(photo), image.shape[2:])
    assert image.std() > 0.1
    assert (image - before).abs().mean() > 0.03


def test_run_all_gives_a_picture_that_can_be_seen_and_downloaded(person):
    path, record = newest(person.project)
    assert_is_painted(path, person.project / "images" / "china.jpg")
    assert record["finished"]
    saved = person.cell("nst.save_image(result")
    name, data = person.download(saved.locator("a[download]"))
    assert (name, data) == (path.name, path.read_bytes())
    person.wait_for(rf"step {record['step']} of {record['step']}.*done", person.cell("nst.watch("))
    for cell in ("nst.watch(", 'nst.show_images({"content": content, "style": style, "result"', 'type="range"'):
        shown = person.cell(cell).locator("img").first
        assert shown.evaluate("image => image.complete && image.naturalWidth") > 50
    assert person.page.locator(".jp-Notebook .jp-OutputArea-output img").count() < 60  # nothing grew
    person.shot("result", person.cell('type="range"'))


def test_before_and_after_are_parted_where_the_slider_stands(person):
    view = person.cell('type="range"')
    view.locator("input[type=range]").evaluate("slider => { slider.value = 30; slider.oninput() }")
    assert "70%" in view.locator("img").nth(1).evaluate("image => image.style.clipPath")


@pytest.mark.parametrize(
    ("name", "data"), [("notes.jpg", b"no picture at all"), ("empty.png", b""), ("half.jpg", None)]
)
def test_an_upload_that_is_no_picture_is_refused_in_a_sentence(person, tmp_path, name, data):
    if data is None:
        data = (ROOT / "images" / "china.jpg").read_bytes()[:20_000]
    (tmp_path / name).write_bytes(data)
    person.upload("Your photo", tmp_path / name)
    person.wait_for("Not taken: the uploaded picture is .* The photo stays the one it was", person.panel)
    person.wait_until_idle()


def test_an_upload_with_too_many_pixels_is_refused_in_a_sentence(person, tmp_path):
    Image.new("1", (12_000, 9_000)).save(tmp_path / "huge.png")  # a few kilobytes
    person.upload("Your painting", tmp_path / "huge.png")
    person.wait_for("Not taken: the uploaded picture has more than .* The painting stays", person.panel)
    person.wait_until_idle()


def test_two_uploaded_pictures_are_painted_and_downloaded(person):
    files = {"photo": ROOT / "images" / "chelsea.png", "painting": ROOT / "images" / "stained_glass.jpg"}
    for which, path in files.items():
        person.upload(f"Your {which}", path)
        person.wait_for(f"Your {which} is taken", person.panel)
        person.wait_until_idle()
    person.wait_for(r"pixels in about \d+ s, with", person.panel)
    person.press("Paint")
    person.press("Paint")
    person.wait_for("is being painted already: wait for it, or press Stop", person.panel)
    person.wait_for("Done and saved", person.panel)
    path, record = newest(person.project)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()]
    assert [record["photo"]["sha256"], record["paintings"][0]["sha256"]] == hashes
    assert_is_painted(path, files["photo"])
    assert person.download(person.panel.locator("a[download]")) == (path.name, path.read_bytes())
    person.shot("panel", person.panel.locator(".jp-Cell-outputArea"))


def test_stop_keeps_the_picture_so_far(person):
    person.select("Size", "512")
    person.select("Quality", "best")
    person.press("Paint")
    person.wait_for(r"step [1-9]\d* of", person.panel)
    person.press("Stop")
    person.wait_for("Stopped and saved", person.panel)
    path, record = newest(person.project)
    assert not record["finished"] and 1 <= record["step"] < record["settings"]["num_steps"]
    assert nst.load_image(path).std() > 0.1
    assert person.panel.locator("img").first.evaluate("image => image.complete && image.naturalWidth") > 50
    person.press("Stop")
    person.wait_for("There is nothing to stop", person.panel)


def test_the_cells_below_use_what_was_uploaded_and_uploads_outlive_run_all(person):
    link = person.cell("nst.save_image(result").locator("a[download]")
    older = link.inner_text()
    person.choose("Run", "Run All Cells")
    link.filter(has_not_text=older).wait_for(timeout=PATIENCE)
    record = newest(person.project)[1]
    assert record["photo"]["sha256"] == hashlib.sha256((ROOT / "images" / "chelsea.png").read_bytes()).hexdigest()
    person.wait_for(r"Saved as .*\.webp")
    person.wait_until_idle()


def test_a_form_value_out_of_range_is_refused_in_a_sentence_and_can_be_mended(person):
    form = person.cell("#@title Settings").locator(".cm-content")

    def fill(number: str) -> None:
        form.locator(".cm-line", has_text="num_steps = ").locator("span", has_text=re.compile(r"^\d+$")).dblclick()
        person.page.keyboard.type(number)
        person.page.keyboard.press("Shift+Enter")
        person.page.keyboard.press("Shift+Enter")

    fill("0")
    cell = person.cell("config = nst.StyleTransferConfig(")
    person.wait_for("num_steps must be a whole number of at least 1, not 0", cell)
    assert "Traceback" not in cell.inner_text()
    fill("75")
    person.wait_for("Painting on", cell)


def test_a_kernel_restarted_half_way_paints_again_after_run_all(person):
    person.press("Paint")
    person.wait_for(r"step [1-9]\d* of", person.panel)
    before = pictures(person.project)
    person.restart_and_run_all()
    person.wait_for(r"Saved as .*\.webp")
    person.wait_until_idle()
    assert len(pictures(person.project)) == len(before) + 1
    assert newest(person.project)[1]["finished"]
