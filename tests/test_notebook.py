"""The notebook runs from top to bottom, in Jupyter and in a stand-in for Colab, and is well kept."""

import ast
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
import pytest
import torch

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
    assert nst.choose_picture("a photo", "images/china.jpg") == data
    assert nst.choose_picture("a painting", "images/china.jpg") == os.path.join("images", "china.jpg")
    assert "Choose a photo, or press Cancel to go on with images" in capsys.readouterr().out


def test_in_colab_without_the_folder_of_samples_one_beside_the_notebook_will_do(colab, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    colab.answers = [{}, {}]
    missing = nst.choose_picture("a photo", "images/china.jpg")
    assert "there is no sample" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"china\.jpg"):
        nst.load_image(missing)
    shutil.copy(ROOT / "images" / "china.jpg", tmp_path)
    assert nst.choose_picture("a photo", "images/china.jpg") == "china.jpg"


def test_in_colab_the_picture_is_offered_for_download_and_elsewhere_nothing_happens(colab, monkeypatch):
    nst.offer_download(Path("outputs/a.png"))
    assert colab.downloads == [os.path.join("outputs", "a.png")]
    monkeypatch.setitem(sys.modules, "google.colab", None)
    nst.offer_download("outputs/b.png")
    assert nst.choose_picture("a photo", Path("images/china.jpg")) == os.path.join("images", "china.jpg")
    assert len(colab.downloads) == 1


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
            r"nst\.(show_|sweep|plot)|display\(Image", "".join(cell["source"])
        )
        assert not drawn or following["cell_type"] == "markdown", "a figure without a sentence after it"


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


def test_the_preview_is_a_light_jpeg_of_one_width_at_every_scale():
    for side in (32, 128):
        shown = nst.preview(torch.rand(1, 3, side, side), width=300)
        assert shown.width == 300 and shown.data[:2] == b"\xff\xd8"


def test_no_loss_at_all_is_said(figures):
    with pytest.raises(ValueError, match="at least one step"):
        nst.plot_losses([])
