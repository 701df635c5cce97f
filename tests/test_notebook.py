"""The notebook runs from top to bottom, in Jupyter and in a stand-in for Colab."""

import ast
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from conftest import IMAGES, ROOT, readme_command, record_in
from nbclient import NotebookClient

import nst_helpers as nst

NOTEBOOK = ROOT / "style_transfer.ipynb"
cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
code = [cell for cell in cells if cell["cell_type"] == "code"]
texts = [cell for cell in cells if cell["cell_type"] == "markdown"]
sources = ["".join(cell["source"]) for cell in code]
SMALL = {"max_size": 64, "quality": '"quick"', "weights": '"bundled"'}


def copy_project(folder: Path, **values: object) -> Path:
    """The project in ``folder``, its notebook with other values in the form: its path."""
    shutil.copy(ROOT / "nst_helpers.py", folder)
    shutil.copytree(IMAGES, folder / "images")
    notebook = nbformat.read(NOTEBOOK, 4)
    set_form(notebook, **values)
    nbformat.write(notebook, folder / NOTEBOOK.name)
    return folder / NOTEBOOK.name


def set_form(notebook, **values: object) -> None:
    form = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in values.items():
        pattern = rf"^{name} = \S+"
        form.source, count = re.subn(pattern, f"{name} = {value}", form.source, flags=re.MULTILINE)
        assert count == 1, name


def saved_in(folder: Path) -> Path:
    (path,) = (folder / "outputs").glob("*[0-9].png")
    return path


# It runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nbval_runs_it_and_its_checked_outputs_are_right(tmp_path):
    copy_project(tmp_path, **SMALL)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, NOTEBOOK.name], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert f"{len(code)} passed" in run.stdout
    picture, film = sorted((tmp_path / "outputs").iterdir(), key=lambda path: path.suffix)
    assert re.fullmatch(r"stylized_output_\d{8}_\d{6}\.png", picture.name)
    assert re.fullmatch(r"stylized_output_\d{8}_\d{6}\.webp", film.name)
    assert nst.load_image(picture).shape == (1, 3, 43, 64)


@pytest.mark.slow
def test_jupyter_executes_it_as_the_readme_says(tmp_path):
    copy_project(tmp_path, **SMALL)
    command = readme_command("jupyter execute")
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert record_in(saved_in(tmp_path))["finished"]


@pytest.mark.slow
def test_papermill_runs_it_for_other_pictures(tmp_path):
    copy_project(tmp_path, **SMALL)
    command = readme_command("papermill")
    photo, painting = (word for word in command if word.endswith(".jpg"))
    (tmp_path / "my").mkdir()
    shutil.copy(IMAGES / "chelsea.png", tmp_path / photo)
    shutil.copy(IMAGES / "stained_glass.jpg", tmp_path / painting)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record = record_in(saved_in(tmp_path))
    assert record["photo"]["sha256"] == nst.sha256_of(IMAGES / "chelsea.png")
    assert record["paintings"][0]["sha256"] == nst.sha256_of(IMAGES / "stained_glass.jpg")


@pytest.mark.slow
def test_a_control_and_regions_are_painted_when_they_are_asked_for(tmp_path):
    path = copy_project(tmp_path, **SMALL)
    text = path.read_text(encoding="utf-8")
    for off, on in (
        ('control = \\"off\\"', 'control = \\"color\\"'),
        ("regions = False", "regions = True"),
    ):
        assert text.count(off) == 1
        text = text.replace(off, on)
    notebook = nbformat.reads(text, 4)
    NotebookClient(notebook, timeout=300, resources=at(tmp_path)).execute()
    for part in ("nst.sweep_control(", "mask of the sky"):
        (cell,) = [cell for cell in notebook.cells if part in cell.source]
        assert any("<img" in output.get("data", {}).get("text/html", "") for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "part"),
    [("max_size", '"large"', "'large'"), ("content_picture", '"images/no.jpg"', "no.jpg")],
)
def test_a_parameter_that_cannot_be_is_one_sentence_in_its_cell(tmp_path, name, value, part):
    path = copy_project(tmp_path, **(SMALL | {name: value}))
    notebook = nbformat.read(path, 4)
    client = NotebookClient(notebook, timeout=120, allow_errors=True, resources=at(tmp_path))
    client.execute()
    errors = [
        output.evalue
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "error"
    ]
    assert part in errors[0]
    assert "\n" not in errors[0]


def at(folder: Path) -> dict:
    return {"metadata": {"path": str(folder)}}


class Reader(NotebookClient):
    """Runs a notebook, and presses stop when the loop has shown its third view."""

    views = 0

    def process_message(self, message, cell, cell_index):
        if message["msg_type"] == "update_display_data":
            self.views += 1
            if self.views == 3:
                self.interrupted = asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(message, cell, cell_index)


@pytest.mark.slow
def test_a_stopped_cell(tmp_path):
    """You stop the cell"""
    path = copy_project(tmp_path, **(SMALL | {"num_steps": 100_000}))
    notebook = nbformat.read(path, 4)
    end = next(i for i, cell in enumerate(notebook.cells) if "nst.save_image(result" in cell.source)
    notebook.cells = [cell for cell in notebook.cells[: end + 1] if cell.cell_type == "code"]
    Reader(notebook, timeout=120, resources=at(tmp_path)).execute()
    saved = saved_in(tmp_path)
    record = record_in(saved)
    assert 3 <= record["step"] < 100_000
    assert not record["finished"]
    loop = next(cell for cell in notebook.cells if "nst.watch(" in cell.source)
    view, _ = [output.data for output in loop.outputs if "text/html" in output.get("data", {})]
    assert f"step {record['step']} of 100000" in view["text/plain"]  # and below it the curves
    assert list((tmp_path / "outputs").glob("*.partial.png"))


# In Colab -----------------------------------------------------------------------------------------


def run_cell(text: str, **names: object) -> dict:
    """The names after the cell with ``text`` ran, which it finds ``names`` in."""
    (source,) = [source for source in sources if text in source]
    exec(source, names)
    return names


@pytest.fixture
def colab(monkeypatch) -> types.ModuleType:
    """A stand-in for ``google.colab.files``: gives what it is told to."""
    files = types.ModuleType("google.colab.files")
    files.uploads = []
    files.upload = lambda: files.uploads.pop(0)
    package = types.ModuleType("google.colab")
    package.files = files
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    return files


def test_the_helper_is_written_under_its_own_name_whatever_the_browser_calls_it(
    colab, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    colab.uploads = [{"nst_helpers (1).py": b"# the module"}]
    for _ in range(2):  # run, and run again: it asks once
        run_cell('os.path.exists("nst_helpers.py")')
    assert Path("nst_helpers.py").read_bytes() == b"# the module"


def test_without_the_helper_outside_colab_it_says_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", None)
    with pytest.raises(FileNotFoundError) as error:
        run_cell('os.path.exists("nst_helpers.py")')
    assert "nst_helpers.py" in str(error.value)
    assert error.value.__suppress_context__


COLAB_FILES = """
import shutil
from pathlib import Path
FOLDER = Path(__file__).parent
calls = FOLDER / "calls"
def upload():  # like Colab's: the files lie in the current folder and come as {name: bytes}
    calls.write_text(calls.read_text() + "upload ")
    number = calls.read_text().count("upload")
    names = {1: ["nst_helpers.py"], 2: ["chelsea.png"]}.get(number, [])
    for name in names:
        shutil.copy(FOLDER / name, name)
    return {name: Path(name).read_bytes() for name in names}
def download(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"Cannot find file: {path}")
    calls.write_text(calls.read_text() + f"download:{path} ")
"""


@pytest.mark.slow
def test_in_colab_the_lone_notebook_runs_from_top_to_bottom(tmp_path):
    """A photo is uploaded, the sample painting lies in the file panel; nothing else is there."""
    content, package = tmp_path / "content", tmp_path / "site" / "google" / "colab"
    content.mkdir()
    package.mkdir(parents=True)
    shutil.copy(IMAGES / "starry_night.jpg", content)
    for file in (ROOT / "nst_helpers.py", IMAGES / "chelsea.png"):
        shutil.copy(file, package)
    for file, text in {"__init__.py": "", "files.py": COLAB_FILES, "calls": ""}.items():
        (package / file).write_text(text)
    notebook = nbformat.read(NOTEBOOK, 4)
    set_form(notebook, **SMALL)
    start_of_colab = "import google.colab.files  # Colab imports it before any cell runs"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(start_of_colab))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    NotebookClient(notebook, timeout=300, resources=at(content)).execute(env=environment)
    calls = (package / "calls").read_text().split()
    assert calls[:3] == ["upload"] * 3
    assert calls[3:] == [f"download:{saved_in(content).relative_to(content)}"]
    assert record_in(saved_in(content))["photo"]["sha256"] == nst.sha256_of(IMAGES / "chelsea.png")


# It is kept as it should be -----------------------------------------------------------------------


def test_it_was_saved_after_one_clean_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pages = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    assert sum("<img" in page for page in pages) >= 9
    assert NOTEBOOK.stat().st_size < 1e6
    assert "Note:" not in json.dumps(outputs)  # no warning


def test_it_is_as_short_as_it_should_be():
    assert len(cells) <= 45
    words = [re.sub(r"data:image[^)]*", "", "".join(cell["source"])).split() for cell in texts]
    assert sum(map(len, words)) <= 1400
    for source in sources:
        lines = [line for line in source.splitlines() if line.strip()]
        assert len(lines) <= 12, source
        assert not re.search(r"^\s*(def |class |%|!)", source, re.MULTILINE), source


def test_it_names_no_machine_and_no_person():
    text = re.sub(r'base64,[^)]*|"image/\w+": "[^"]*"', "", json.dumps(cells))
    assert not re.search(r"/(root|home|work|tmp|Users)/", text)


def test_every_form_field_is_its_settings_default():
    form = next(cell for cell in code if "parameters" in cell["metadata"].get("tags", []))
    source = "".join(form["source"])
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    fields = {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}
    assert source.count("#@param") == len(fields)
    for name in ("content_picture", "style_picture"):
        assert (ROOT / fields.pop(name)).is_file()
    defaults = nst.StyleTransferConfig()
    assert fields == {name: getattr(defaults, name) for name in fields}
    config = next(source for source in sources if source.startswith("config = nst."))
    for name in fields:
        assert f"{name}={name}" in config, f"the form's {name} is never used"


def test_no_cell_below_the_form_changes_what_it_set():
    form = next(cell for cell in code if "parameters" in cell["metadata"].get("tags", []))
    fields = re.findall(r"^(\w+) = ", "".join(form["source"]), re.MULTILINE)
    for source in sources[sources.index("".join(form["source"])) + 1 :]:
        for name in fields:
            assert not re.search(rf"^{name} = ", source, re.MULTILINE), name


def test_every_control_that_can_be_chosen_can_be_swept():
    (source,) = [source for source in sources if source.startswith("control = ")]
    choices = re.findall(r'"(\w+)"', source.split("#@param")[1].split("]")[0])
    assert choices[0] == "off"
    assert {*choices[1:]} <= {*nst.CONTROL_VALUES}


def test_every_link_to_a_section_leads_to_one():
    text = "\n\n".join("".join(cell["source"]) for cell in texts)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"\s", "-", heading) for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert len(links) >= 4
    assert {*links} <= anchors


def test_every_figure_is_followed_by_words_and_has_an_alternative_text():
    for cell, following in pairwise(cells):
        if cell["cell_type"] != "code":
            continue
        data = [output.get("data", {}) for output in cell["outputs"]]
        source = "".join(cell["source"])
        # A bare picture cannot be read out: in HTML it has an alternative text.
        bare = [kinds for kinds in data if any(kind.startswith("image/") for kind in kinds)]
        assert all("text/html" in kinds for kinds in bare), source
        if re.search(r"nst\.(show_images|plot_losses)\(", source) and data:
            assert following["cell_type"] == "markdown", source
    pages = [
        "".join(output["data"]["text/html"])
        for cell in code
        for output in cell["outputs"]
        if "text/html" in output.get("data", {})
    ]
    for text in [*pages, *("".join(cell["source"]) for cell in texts)]:
        assert all(re.search('alt="[^"]', tag) for tag in re.findall(r"<img [^>]*", text))
        assert not re.search(r"!\[\]\(", text)
