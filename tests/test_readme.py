"""The README's code runs, and the settings, commands and files it names exist."""

import re
import shutil
import sysconfig
from dataclasses import fields

from conftest import README, ROOT

import nst_helpers as nst


def test_its_code_runs(monkeypatch, tmp_path):
    (snippet,) = re.findall(r"```python\n(import nst_helpers.*?)```", README, re.DOTALL)
    assert "max_size=256" in snippet
    small = 'max_size=32, quality="quick", num_steps=6, weights="bundled"'
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(ROOT / "images")
    names = {}
    exec(snippet.replace("max_size=256", small), names)
    nst.plt.close("all")
    assert (tmp_path / "outputs" / "sheet.png").is_file()
    assert len(list((tmp_path / "outputs").glob("chelsea_in_stained_glass_*.png"))) == 1
    (tmp_path / "frames").mkdir()
    for number in (1, 2):
        nst.to_pil(names["photo"]).save(tmp_path / "frames" / f"{number:05}.png")
    (recipe,) = re.findall(r"```python\n(import dataclasses.*?)```", README, re.DOTALL)
    exec(recipe, names)
    painted = sorted((tmp_path / "painted").iterdir())
    assert [path.name for path in painted] == ["00001.png", "00002.png"]
    assert (names["step"].total, names["step"].job.start is None) == (10, False)


def test_its_commands_exist():
    folder = sysconfig.get_path("scripts")
    commands = {*re.findall(r"\.venv/bin/([\w-]+)", README)}
    assert [name for name in commands if not shutil.which(name, path=folder)] == []


def test_its_settings_table_is_the_config():
    table = README.split("\n| setting | default |")[1].split("\n\n")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", table, re.MULTILINE))
    assert listed == {field.name: repr(field.default) for field in fields(nst.StyleTransferConfig)}


def test_the_files_it_links_to_and_names_exist():
    linked = re.findall(r"\]\(([^)#:]+)\)|(?:src|srcset)=\"([^\":]+)\"", README)
    named = {*sum(linked, ()), *re.findall(r"\b(?:images|tests)/[\w/]+\.\w+\b", README)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
