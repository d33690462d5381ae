"""What holds for every file in variations/: what it may import, what it shares with others, examples that are true."""

import ast
import doctest
import importlib
from collections import defaultdict

import pytest
from conftest import ROOT

PATHS = sorted((ROOT / "variations").glob("*.py"))
BASE_FILES = {"encoder_only", "decoder_only", "encoder_decoder"}
DRIVERS = {path.stem for path in ROOT.glob("*.py")} - BASE_FILES - {"toy_dataset"}
OWN = {"main", "exchange", "build", "draw", "measure"}  # each variation has its own of these


def by_name(path):
    """pytest shows the file's name."""
    return path.stem


@pytest.mark.parametrize("path", PATHS, ids=by_name)
def test_a_variation_imports_base_files_and_neither_a_driver_nor_another_variation(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported & BASE_FILES
    assert imported & (DRIVERS | {"variations"} | {other.stem for other in PATHS}) == set()


@pytest.mark.parametrize("path", PATHS, ids=by_name)
def test_the_examples_in_docstrings_are_true(path):
    assert doctest.testmod(importlib.import_module(f"variations.{path.stem}")).failed == 0


def test_what_has_the_same_name_in_two_variations_is_written_the_same():
    found = defaultdict(dict)
    for path in PATHS:
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                found[node.name][path.stem] = ast.get_source_segment(text, node)
    assert {name: list(files) for name, files in found.items() if len(set(files.values())) > 1} == {}
    assert {"positional_encodings", "llama"} <= set(found["rotate"])


@pytest.mark.parametrize("path", PATHS, ids=by_name)
def test_two_rows_differ_only_if_their_ranges_do_not_overlap(path):
    variation = importlib.import_module(f"variations.{path.stem}")
    low, middle, high = [0.1, 0.2], [0.2, 0.3], [0.25, 0.4]
    if hasattr(variation, "spread"):
        assert variation.spread([0.5, 0.25, 0.75]) == "50.0% (25.0 to 75.0)"
    if hasattr(variation, "differ"):
        assert [variation.differ(*rows) for rows in [(low, high), (high, low), (low, middle), (middle, high)]] == [
            True, True, False, False]
    if hasattr(variation, "relation"):
        assert [variation.relation(*rows) for rows in [(low, high), (high, low), (low, middle)]] == [
            "below", "above", "within seed noise of"]
