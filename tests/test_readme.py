"""The README says what is so: its settings, its promises, and the files that it names."""

import ast
import functools
import re
from dataclasses import fields

import pytest
from conftest import README, ROOT

import nst_helpers as nst

OUTSIDE = re.sub(r"<details>.*?</details>", "", README, flags=re.DOTALL)  # what is not folded
NOT_SEEN = {"weights", "device", "seconds"}  # settings that no strip of pictures could show


def table(heading: str) -> list[list[str]]:
    """The rows of all tables whose first heading this is, each a list of its cells."""
    _, *parts = README.split(f"\n| {heading} |")
    assert parts, f"there is no table {heading}"
    rows = []
    for part in parts:
        lines = part.split("\n\n")[0].splitlines()[2:]  # after the headings and the rule
        rows += [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return rows


@functools.cache
def first_lines_of_docstrings() -> set[str]:
    """Of all tests."""
    found = set()
    for file in ROOT.glob("tests/test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if is_function and node.name.startswith("test_"):
                found.add((ast.get_docstring(node) or "").partition("\n")[0])
    return found


PROMISES = [row[0] for row in table("what happens if…")]


def test_there_are_many_promises():
    assert len(PROMISES) > 20
    assert len(set(PROMISES)) == len(PROMISES)


@pytest.mark.parametrize("promise", PROMISES)
def test_what_happens_if_has_a_test(promise):
    assert promise in first_lines_of_docstrings()


def test_every_setting_is_listed_with_its_default():
    listed = {row[0].strip("`"): row[1].strip("`") for row in table("setting")}
    defaults = {setting.name: repr(setting.default) for setting in fields(nst.StyleTransferConfig)}
    assert listed == defaults


def test_every_setting_that_can_be_seen_has_its_strip_of_pictures():
    strips = set(re.findall(r"^!\[.*\]\(images/settings/(\w+)\.jpg\)$", README, re.MULTILINE))
    settings = {setting.name for setting in fields(nst.StyleTransferConfig)}
    assert strips == (settings - NOT_SEEN) | {"masks", "keep"}
    for strip in strips:
        assert nst.load_image(ROOT / "images" / "settings" / f"{strip}.jpg").std() > 0.1


def test_it_is_short_outside_its_folded_parts():
    assert len(OUTSIDE.encode()) < 14_000
    for heading in ("what you see", "what happens if…"):
        rows = OUTSIDE.split(f"\n| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
        assert len(rows) <= 10


def test_its_code_runs(monkeypatch, tmp_path, capsys):
    """As it stands, but small: on the sample pictures, in a folder of its own."""
    (snippet,) = re.findall(r"```python\n(import nst_helpers.*?)```", README, re.DOTALL)
    for large, small in (("max_size=256", 'max_size=32, quality="quick", weights="bundled"'),):
        assert large in snippet
        snippet = snippet.replace(large, small)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(ROOT / "images")
    exec(snippet, {})
    assert (tmp_path / "outputs" / "sheet.png").is_file()
    assert len(list((tmp_path / "outputs").glob("stylized_output_*.png"))) == 1
    assert re.search(r"step (\d+) of \1\b", capsys.readouterr().out)
    nst.plt.close("all")


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"\b(?:images|tests)/[\w/]+\.\w+\b", README))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
