"""What carries the same name in several variations is written the same; what differs on purpose is listed here. And
what their docstrings work out on paper comes out."""

import ast
import doctest
import importlib
from collections import defaultdict

import pytest
from conftest import ROOT

NAMES = sorted(path.stem for path in (ROOT / "variations").glob("*.py"))

# Each variation has its own of these: its exchange, its experiment, its picture.
OWN = {"main", "exchange", "build", "draw", "measure"}


def sources() -> dict[str, dict[str, str]]:
    """Name of a function or class -> {variation: its source}."""
    found = defaultdict(dict)
    for path in sorted((ROOT / "variations").glob("*.py")):
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name][path.stem] = ast.get_source_segment(text, node)
    return found


def test_what_carries_the_same_name_in_two_variations_is_written_the_same():
    different = {name: list(by_file) for name, by_file in sources().items() if len(set(by_file.values())) > 1}
    assert {name: files for name, files in different.items() if name not in OWN} == {}


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_in_the_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(f"variations.{name}")).failed == 0
