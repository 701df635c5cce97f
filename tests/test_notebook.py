"""The notebook runs from top to bottom, in Jupyter and in a stand-in for Colab, and is well kept."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient

import nst_helpers as nst

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "style_transfer.ipynb"
cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
code = [cell for cell in cells if cell["cell_type"] == "code"]
sources = ["".join(cell["source"]) for cell in code]


def copy_project(folder: Path) -> Path:
    for name in ("style_transfer.ipynb", "nst_helpers.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "images", folder / "images")
    return folder


# It runs ----------------------------------------------------------------------------------------


def test_nbval_runs_it_and_its_checked_outputs_are_right(tmp_path):
    project = copy_project(tmp_path)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", NOTEBOOK.name]
    run = subprocess.run(command, cwd=project, env={**os.environ, "NST_QUICK": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert f"{len(code)} passed" in run.stdout
    picture, film = sorted((project / "outputs").iterdir(), key=lambda path: path.suffix)
    assert re.fullmatch(r"stylized_output_\d{8}_\d{6}\.png", picture.name)
    assert re.fullmatch(r"stylized_output_\d{8}_\d{6}\.webp", film.name)
    assert nst.load_image(picture).shape == nst.load_image(film).shape == (1, 3, 64, 96)


@pytest.fixture
def colab(monkeypatch):
    """A stand-in for ``google.colab.files``: answers what it is told, notes what it is asked."""
    files = types.ModuleType("google.colab.files")
    files.answers, files.downloads = [], []
    files.upload = lambda: files.answers.pop(0)
    files.download = files.downloads.append
    package = types.ModuleType("google.colab")
    package.files = files
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "google.colab.files", files)
    return files


def run_cell(text: str, **names) -> dict:
    """The names after the cell with ``text`` ran, which it finds ``names`` in."""
    (source,) = [source for source in sources if text in source]
    exec(source, names)
    return names


def choose(photo: str = "images/china.jpg", painting: str = "images/starry_night.jpg") -> dict:
    """What the cell that may ask for pictures chose."""
    names = {"contextlib": contextlib, "os": os, "nst": nst, "content_picture": photo, "style_picture": painting}
    return run_cell("sources = {", **names)["sources"]


def test_in_colab_the_first_cell_asks_for_the_helper_only_while_it_is_missing(colab, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def upload():
        Path("nst_helpers.py").write_text("")
        return {"nst_helpers.py": b""}

    colab.upload = upload
    for _ in range(2):
        exec(sources[0], {})
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "nst_helpers.py" in said and "top of the project" in said


def test_with_an_address_the_first_cell_clones_once_and_survives_a_restart(monkeypatch, tmp_path):
    source = sources[0].replace('REPO_URL = ""', 'REPO_URL = "https://example.org/project"')
    clones = []

    def clone(command, check):
        clones.append(command)
        Path(command[-1]).mkdir()
        Path(command[-1], "nst_helpers.py").write_text("")

    monkeypatch.setattr(subprocess, "run", clone)
    for _ in range(3):  # run, run again, and run in a fresh kernel, back in the first folder
        monkeypatch.chdir(tmp_path)
        exec(source, {})
        exec(source, {})
        assert Path.cwd() == tmp_path / "style-transfer"
    assert len(clones) == 1 and "https://example.org/project" in clones[0]


def test_in_colab_an_upload_is_used_as_bytes_and_none_means_the_sample(colab, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    data = (ROOT / "images" / "chelsea.png").read_bytes()
    colab.answers = [{"../../etc/evil name.png": data}, {}]
    assert choose() == {"photo": data, "painting": "images/starry_night.jpg"}
    said = capsys.readouterr().out
    assert "Choose a photo, or press Cancel to go on with images/china.jpg." in said


@pytest.mark.parametrize("data", [b"", b"no picture", (ROOT / "images" / "china.jpg").read_bytes()[:20_000]])
def test_in_colab_an_upload_that_is_no_picture_is_said_in_a_sentence_and_the_sample_stays(colab, capsys, data):
    colab.answers = [{"a.jpg": data}, {}]
    assert choose()["photo"] == "images/china.jpg"
    said = capsys.readouterr().out
    assert "the uploaded picture is " in said and "It stays images/china.jpg; run this cell again" in said


def test_in_colab_without_the_folder_of_samples_one_beside_the_notebook_will_do(colab, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "images" / "china.jpg", tmp_path)
    colab.answers = [{}, {}]
    assert choose() == {"photo": "china.jpg", "painting": "starry_night.jpg"}


def test_outside_colab_nothing_is_asked_and_the_forms_pictures_are_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", None)
    assert choose("my/photo.png") == {"photo": "my/photo.png", "painting": "images/starry_night.jpg"}


def test_the_picture_is_downloaded_in_colab_and_linked_elsewhere(colab, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    shown = []
    names = {"nst": nst, "result": torch.rand(1, 3, 20, 30), "output_folder": Path("outputs"), "photo_source": None}
    names |= {"display": shown.append, "HTML": str}
    path = run_cell("nst.save_image(result", **names)["path"]
    assert colab.downloads == [str(path)] and not shown
    monkeypatch.setitem(sys.modules, "google.colab", None)
    path = run_cell("nst.save_image(result", **names)["path"]
    assert shown == [f'<a href="outputs/{path.name}" download="{path.name}">Download {path.name}</a>']
    assert f"Saved as {path}" in capsys.readouterr().out
    assert len(colab.downloads) == 1


COLAB_FILES = """
import json, shutil
from pathlib import Path
FOLDER = Path(__file__).parent
calls = FOLDER / "calls"
def upload():  # like Colab's: the files lie in the current folder and come as {name: bytes}
    calls.write_text(calls.read_text() + "upload ")
    number = calls.read_text().count("upload")
    names = {1: ["nst_helpers.py"], 2: ["chelsea.png"], 4: ["chelsea.png"]}.get(number, [])
    for name in names:
        shutil.copy(FOLDER / name, name)
    return {name: Path(name).read_bytes() for name in names}
def download(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"Cannot find file: {path}")
    calls.write_text(calls.read_text() + f"download:{path} ")
"""


def test_in_colab_the_lone_notebook_runs_from_top_to_bottom_and_again_after_a_restart(tmp_path):
    """A photo is uploaded, the sample painting lies in the file panel, and nothing else is there."""
    content, package = tmp_path / "content", tmp_path / "site" / "google" / "colab"
    content.mkdir()
    package.mkdir(parents=True)
    shutil.copy(ROOT / "images" / "starry_night.jpg", content)
    for file in (ROOT / "nst_helpers.py", ROOT / "images" / "chelsea.png"):
        shutil.copy(file, package)
    for file, text in {"__init__.py": "", "files.py": COLAB_FILES, "calls": ""}.items():
        (package / file).write_text(text)
    notebook = nbformat.read(NOTEBOOK, 4)
    last = next(i for i, cell in enumerate(notebook.cells) if "nst.save_image(result" in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    environment = os.environ | {"NST_QUICK": "1", "PYTHONPATH": str(tmp_path / "site")}
    resources = {"metadata": {"path": str(content)}}
    for _ in range(2):
        NotebookClient(notebook, timeout=300, resources=resources).execute(env=environment)
    *_, saved = sorted((content / "outputs").glob("*.png"))
    calls = (package / "calls").read_text().split()
    assert calls[:4] == ["upload", "upload", "upload", calls[3]] and calls[3].startswith("download:outputs")
    assert calls[4:6] == ["upload", "upload"] and calls[6] == f"download:{saved.relative_to(content)}"
    assert nst.load_image(saved).shape == (1, 3, 64, 96)


# It is kept as it should be ---------------------------------------------------------------------


def test_it_was_saved_after_one_clean_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pictures = [o for o in outputs if {"image/png", "image/jpeg"} & set(o.get("data", {}))]
    assert len(pictures) >= 6
    assert NOTEBOOK.stat().st_size < 1.5e6


def test_it_names_no_machine_and_no_person():
    text = re.sub(r'base64,[^)]*|"image/\w+": "[^"]*"', "", json.dumps(cells))
    assert not re.search(r"/(root|home|work|tmp|Users)/", text)


def test_every_form_field_is_its_settings_default():
    form = next(source for source in sources if source.startswith("#@title Settings"))
    fields = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(form).body
        if isinstance(node, ast.Assign)
    }
    assert form.count("#@param") == len(fields)
    for name in ("content_picture", "style_picture"):
        assert (ROOT / fields.pop(name)).is_file()
    defaults = nst.StyleTransferConfig()
    assert fields == {name: getattr(defaults, name) for name in fields}
    config = next(source for source in sources if source.startswith("config = "))
    for name in fields:
        assert f"{name}={name}" in config, f"the form's {name} is never used"


def test_its_cells_are_short_plain_and_explained():
    for source in sources:
        lines = [line for line in source.splitlines() if line.strip()]
        assert len(lines) <= 12, source
        assert not re.search(r"^\s*(def |class |%|!)", source, re.MULTILINE), source
    for cell, following in pairwise(cells):
        drawn = cell["cell_type"] == "code" and re.search(
            r"nst\.(show_|sweep|plot)|display\((Image|HTML\(\w*f)", "".join(cell["source"])
        )
        assert not drawn or following["cell_type"] == "markdown", "a figure without a sentence after it"


def test_every_figure_has_an_alternative_text():
    for cell in code:
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        if kinds & {"image/png", "image/jpeg"}:
            assert len(cell["metadata"].get("alt", "")) > 20, "".join(cell["source"])
    pages = [text for cell in code for o in cell["outputs"] for text in o.get("data", {}).get("text/html", [])]
    pages += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    for text in pages:
        assert all('alt="' in tag for tag in re.findall(r"<img [^>]*", text)) and not re.search(r"!\[\]\(", text)


def test_the_readme_lists_every_setting_with_its_default():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", readme, re.MULTILINE))
    config = nst.StyleTransferConfig()
    assert rows == {name: repr(getattr(config, name)) for name in config.__dataclass_fields__}


def test_every_setting_that_can_be_seen_has_its_strip_of_pictures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \|.*\(images/settings/(\w+)\.jpg\) \|$", readme, re.MULTILINE)
    assert {*nst.StyleTransferConfig.__dataclass_fields__} - {name for name, _ in shown} == {"weights", "device"}
    for name, file in shown:
        assert name == file
        assert nst.load_image(ROOT / "images" / "settings" / f"{file}.jpg").std() > 0.1


def test_every_control_has_its_cell():
    names = "color style_blend masks keep style_scale init optimizer pooling content_layers style_layer_weights"
    for control in names.split():
        assert any(re.search(rf"\b{control}=", source) for source in sources), control
    for call in ("nst.save_timelapse(", "nst.sweep(", ".putalpha("):
        assert any(call in source for source in sources), call


# Looking ----------------------------------------------------------------------------------------


@pytest.fixture
def figures():
    plt.close("all")
    yield plt
    plt.close("all")


def test_pictures_stand_side_by_side_under_their_titles(figures):
    nst.show_images({"wide": torch.rand(1, 3, 20, 40), "tall": torch.rand(1, 3, 40, 20)})
    axes = figures.gcf().axes
    assert [ax.get_title() for ax in axes] == ["wide", "tall"]
    assert axes[0].images[0].get_array().shape == (20, 40, 3)


def test_maps_share_one_scale_of_colours_beside_a_picture_too(figures):
    maps = {"a": torch.full((2, 2), 1.0), "b": torch.full((2, 2), 4.0, dtype=torch.bfloat16)}
    nst.show_images(maps | {"picture": torch.rand(1, 3, 4, 4)})
    one, other, picture = (ax.images[0] for ax in figures.gcf().axes)
    assert one.norm is other.norm and one.norm.vmax == 4
    assert picture.get_array().shape == (4, 4, 3)


def test_losses_are_drawn_on_a_log_scale(figures):
    history = [{"style": torch.tensor(1 / n), "total": torch.tensor(2 / n)} for n in (1, 2, 4)]
    nst.plot_losses(history)
    ax = figures.gca()
    assert ax.get_yscale() == "log"
    assert {line.get_label(): list(line.get_ydata()) for line in ax.lines} == {
        "style": [1, 0.5, 0.25],
        "total": [2, 1, 0.5],
    }


def test_a_loss_of_zero_leaves_a_gap(figures):
    nst.plot_losses([{"content": torch.tensor(0.0)}, {"content": torch.tensor(0.5)}])
    first, second = figures.gca().lines[0].get_ydata()
    assert nst.math.isnan(first) and second == 0.5


def test_no_loss_at_all_is_said(figures):
    with pytest.raises(ValueError, match="at least one step"):
        nst.plot_losses([])
