"""The module reads from top to bottom: whatever a line names is defined above it."""

import ast
import re

from conftest import ROOT

SOURCE = (ROOT / "nst_helpers.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
# Part II's public entry makes a network where none is given; reading weights is part III's work.
HANDED_OVER = {("_plan", "load_network")}
LONGEST_FUNCTION = 40  # lines, without its docstring


def defined_names(node: ast.stmt) -> list[str]:
    """The names that a statement of the module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [name for target in targets if target is not None for name in ast.walk(target)]
    return [name.id for name in names if isinstance(name, ast.Name)]


def used_names(node: ast.stmt) -> set[str]:
    """All names in a statement, quoted annotations included."""
    names = {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}
    quoted = {found.value for found in ast.walk(node) if isinstance(found, ast.Constant)}
    return names | {text for text in quoted if isinstance(text, str) and text.isidentifier()}


def length(function: ast.FunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


LINES = {name: node.lineno for node in TREE.body for name in defined_names(node)}


def test_nothing_is_named_above_its_definition():
    early = {
        (getattr(node, "name", "?"), name)
        for node in TREE.body
        for name in used_names(node)
        if LINES.get(name, 0) > node.lineno
    }
    assert early == HANDED_OVER


def test_the_four_parts_come_in_order():
    banners = re.findall(r"^# (I|II|III|IV)\. ", SOURCE, re.MULTILINE)
    assert banners == ["I", "II", "III", "IV"]


def test_functions_are_short():
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert {f.name: length(f) for f in functions if length(f) > LONGEST_FUNCTION} == {}
