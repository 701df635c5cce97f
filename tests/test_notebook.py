"""The notebook is kept as one clean run, and runs through papermill and in a stand-in for Colab."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import IMAGES, ROOT, readme_command, record_in
from nbclient import NotebookClient

import nst_helpers as nst

NOTEBOOK = ROOT / "style_transfer.ipynb"
cells = nbformat.read(NOTEBOOK, 4).cells
code = [cell for cell in cells if cell.cell_type == "code"]
SMALL = {"max_size": 64, "quality": '"quick"', "weights": '"bundled"'}


def set_forms(notebook, **values: object) -> None:
    """Change what the forms assign."""
    for name, value in values.items():
        assignment = re.compile(rf"^{name} = \S+(?=.*#@param)", re.MULTILINE)
        (form,) = [cell for cell in notebook.cells if assignment.search(cell.source)]
        form.source = assignment.sub(f"{name} = {value}", form.source)


def copy_project(folder: Path, **values: object) -> Path:
    """The path of the notebook in a copy of the project, with other values in its forms."""
    shutil.copy(ROOT / "nst_helpers.py", folder)
    shutil.copytree(IMAGES, folder / "images")
    notebook = nbformat.read(NOTEBOOK, 4)
    set_forms(notebook, **values)
    nbformat.write(notebook, folder / NOTEBOOK.name)
    return folder / NOTEBOOK.name


def saved_in(folder: Path) -> Path:
    (path,) = (folder / "outputs").glob("*_in_*[0-9].png")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The committed file -------------------------------------------------------------------------------


def test_it_was_saved_after_one_clean_run():
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_it_names_no_machine():
    text = re.sub(r'base64,[^)"\\]*|"image/\w+": "[^"]*"', "", json.dumps(cells))
    assert re.findall(r"/(?:root|home|work|tmp|Users)/\S*", text) == []


def test_its_pictures_have_alternative_texts():
    outputs = [output.get("data", {}) for cell in code for output in cell.outputs]
    pages = [data["text/html"] for data in outputs if "text/html" in data]
    tags = [tag for page in pages for tag in re.findall(r"<img [^>]*", page)]
    assert len(tags) >= 9
    assert [tag[:80] for tag in tags if not re.search(r'alt="[^"]', tag)] == []
    # A picture outside HTML cannot have one.
    assert all("text/html" in data for data in outputs if any("image/" in kind for kind in data))
    assert not [cell.source for cell in cells if "![](" in cell.source]


def test_it_is_small_enough_to_be_shown_on_a_web_page():
    assert NOTEBOOK.stat().st_size < 1e6


def test_the_form_has_the_default_settings_and_the_config_takes_each():
    (form,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assigned = [node for node in ast.parse(form.source).body if isinstance(node, ast.Assign)]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}
    for name in ("content_picture", "style_picture"):
        assert (ROOT / values.pop(name)).is_file()
    assert values.pop("output_folder") == "outputs"
    assert values.pop("lesson") is True
    defaults = nst.StyleTransferConfig()
    assert values == {name: getattr(defaults, name) for name in values}
    (config,) = [cell.source for cell in code if cell.source.startswith("config = nst.")]
    assert [name for name in values if f"{name}={name}" not in config] == []


def test_every_control_on_the_list_has_values_to_try():
    (source,) = [cell.source for cell in code if cell.source.startswith("control = ")]
    choices = json.loads(source.split("#@param")[1].splitlines()[0])
    values = ast.literal_eval(ast.parse(source).body[1].value)
    assert choices == ["off", *values]
    for name, tried in values.items():
        configs = [nst.StyleTransferConfig(**{name: value}) for value in tried]
        assert nst.StyleTransferConfig() in configs or name == "num_steps"
        assert len({*map(str, configs)}) == len(tried) >= 2


def test_every_link_to_a_section_leads_to_one():
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    headings = {re.sub(r"\s", "-", heading) for heading in re.findall(r"(?m)^#+ (.+)$", text)}
    assert {*re.findall(r"\]\(#([^)]+)\)", text)} <= headings


# It runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_papermill_paints_two_other_pictures_and_every_extra(tmp_path):
    forms = {"control": '"color"', "photo_folder": '"my"', "kept_part": '"images/mask_sky.png"'}
    path = copy_project(tmp_path, **SMALL, **forms)
    notebook = nbformat.read(path, 4)
    (estimate,) = [n for n, cell in enumerate(notebook.cells) if "nst.estimate(" in cell.source]
    upload = 'panel.sources["photo"], panel.pictures = "images/china.jpg", {}'  # in the middle
    notebook.cells.insert(estimate + 1, nbformat.v4.new_code_cell(upload))
    nbformat.write(notebook, path)
    options = ["-p", "output_folder", "on/drive", "-p", "lesson", "False"]
    command = [*readme_command("papermill"), *options]
    photo, painting = (word for word in command if word.endswith(".jpg"))
    (tmp_path / "my").mkdir()
    shutil.copy(IMAGES / "chelsea.png", tmp_path / photo)
    shutil.copy(IMAGES / "stained_glass.jpg", tmp_path / painting)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "on" / "drive"
    (saved,) = folder.glob(f"{Path(photo).stem}_in_{Path(painting).stem}_*.png")
    assert nst.load_image(saved).shape == (1, 3, 43, 64)
    (with_mask,) = folder.glob(f"china_in_{Path(painting).stem}_*.png")
    assert record_in(with_mask)["own_pictures"] == ["keep"]
    # The painting in its own style, too: the photo was painted already.
    others = sorted(path.name for path in {*folder.iterdir()} - {saved, with_mask})
    beginnings = ["contact_sheet", "painting", "stylized_output"]
    assert [re.split(r"_\d", name)[0] for name in others] == beginnings
    assert [Path(name).suffix for name in others] == [".jpg", ".png", ".webp"]
    record = record_in(saved)
    assert record["finished"]
    assert record["photo"] == sha256(IMAGES / "chelsea.png")
    assert record["paintings"][0] == sha256(IMAGES / "stained_glass.jpg")
    ran = nbformat.read(tmp_path / "out.ipynb", 4).cells
    for part in ("nst.sweep(", "keep=keep", "nst.paint_folder("):
        (cell,) = [cell for cell in ran if part in cell.source]
        assert any("<img" in output.get("data", {}).get("text/html", "") for output in cell.outputs)
    of_lesson = [cell for cell in ran if cell.source.startswith("%%lesson")]
    assert len(of_lesson) > 10
    assert not any(cell.outputs for cell in of_lesson)


def test_without_the_module_outside_colab_the_first_cell_asks_for_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"nst_helpers\.py.*{tmp_path}.*--cwd"):
        exec(code[0].source, {"get_ipython": lambda: None})


@pytest.mark.parametrize("has_input", [False, True])
def test_on_kaggle_the_project_comes_from_an_input(monkeypatch, tmp_path, has_input):
    """Kaggle's image has google.colab too; https://www.kaggle.com/docs/notebooks on inputs."""
    working, project = tmp_path / "working", tmp_path / "kaggle" / "input" / "any" / "project"
    working.mkdir()
    (tmp_path / "kaggle").mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setitem(sys.modules, "google.colab", None)
    source = code[0].source.replace("/kaggle", str(tmp_path / "kaggle"))
    if has_input:
        (project / "images").mkdir(parents=True)
        (project / "nst_helpers.py").write_text("here")
        exec(source, {"get_ipython": lambda: None})
        assert sorted(path.name for path in working.iterdir()) == ["images", "nst_helpers.py"]
    else:
        with pytest.raises(FileNotFoundError, match="Add Input"):
            exec(source, {"get_ipython": lambda: None})


# Like Colab's: an upload is written to the current folder and given as {name: bytes}. The browser
# may have given the file a name of its own.
COLAB_FILES = """
import shutil
from pathlib import Path
folder = Path(__file__).parent
log = folder / "log"
names = ["nst_helpers (1).py", "chelsea.png", "stained_glass.jpg"]
def upload():
    name = names[len(log.read_text().split())]
    log.write_text(log.read_text() + "upload ")
    data = (folder / name).read_bytes()
    Path(name).write_bytes(data)
    return {name: data}
def download(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"Cannot find file: {path}")
    log.write_text(log.read_text() + f"download:{path} ")
"""


@pytest.mark.slow
def test_in_colab_the_notebook_alone_asks_for_what_is_missing_and_downloads_the_result(tmp_path):
    content, package = tmp_path / "content", tmp_path / "site" / "google" / "colab"
    content.mkdir()
    package.mkdir(parents=True)
    shutil.copy(ROOT / "nst_helpers.py", package / "nst_helpers (1).py")
    for name in ("chelsea.png", "stained_glass.jpg"):
        shutil.copy(IMAGES / name, package)
    for name, text in {"__init__.py": "", "files.py": COLAB_FILES, "log": ""}.items():
        (package / name).write_text(text)
    notebook = nbformat.read(NOTEBOOK, 4)
    set_forms(notebook, **SMALL)
    # Colab's kernel has a shell of its own class; see google.colab._kernel.
    start_of_colab = """
shell = get_ipython()
shell.__class__ = type("Shell", (type(shell),), {"__module__": "google.colab._shell"})
"""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(start_of_colab))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    resources = {"metadata": {"path": str(content)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute(env=environment)
    saved = saved_in(content)
    assert saved.name.startswith("chelsea_in_stained_glass_")
    calls = (package / "log").read_text().split()
    assert calls == ["upload"] * 3 + [f"download:{saved.relative_to(content)}"]
    record = record_in(saved)
    assert record["photo"] == sha256(IMAGES / "chelsea.png")
    assert record["paintings"][0] == sha256(IMAGES / "stained_glass.jpg")
