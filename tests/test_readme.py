"""The README says what is so: its settings, its promises, and the files that it names."""

import ast
import functools
import re
from dataclasses import fields

import pytest
from conftest import ROOT

import nst_helpers as nst

README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The rows of the table whose first heading this is, each a list of its cells."""
    _, found, rest = README.partition(f"\n| {heading} |")
    assert found, f"there is no table {heading}"
    lines = rest.split("\n\n")[0].splitlines()[2:]  # after the headings and the rule below them
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


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
    for name, *_, seen in table("setting"):
        strips = re.findall(r"\(images/settings/(\w+)\.jpg\)", seen)
        if seen != "not in the picture":
            assert strips == [name.strip("`")]
        for strip in strips:
            assert nst.load_image(ROOT / "images" / "settings" / f"{strip}.jpg").std() > 0.1


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"\b(?:images|tests)/[\w/]+\.\w+\b", README))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
