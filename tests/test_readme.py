"""Everything that README.md names exists: files, functions, constants, pictures, anchors."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()  # the full tables, and the pictures that README.md leaves out
SOURCES = {path.name: path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]}
# Names in backticks that are not ours: other libraries' functions, shell variables, what an exercise would add.
FOREIGN = {"F.scaled_dot_product_attention", "nn.Linear", "OMP_NUM_THREADS", "CONSTANT"}


def defined_names() -> set[str]:
    """All constants, functions, classes, methods and their parameters in all Python files of the repository."""
    names = set()
    for source in SOURCES.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
            if isinstance(node, ast.Assign):
                names |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            if isinstance(node, ast.keyword):
                names.add(node.arg)
    return names


def test_every_link_and_picture_leads_to_a_file():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert any(link.endswith(".png") for link in links)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_picture_has_an_alternative_text_and_every_committed_picture_is_shown():
    shown = re.findall(r"!\[([^]]*)\]\((?:\.\./)?(figures/[^)]+)\)", README + RESULTS)
    assert all(len(text) > 10 for text, _ in shown)
    committed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "figures").rglob("*.png")}
    assert {path for _, path in shown} == committed


def test_every_anchor_has_its_heading():
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}
    anchors = set(re.findall(r"\(#([^)]+)\)", README))
    assert len(anchors) > 10
    assert anchors - headings == set()


def test_every_script_that_a_command_runs_exists():
    scripts = set(re.findall(r"[\w/]+\.py\b", README))
    assert len(scripts) > 8
    folders = (ROOT, ROOT / "tests", ROOT / "exercises")
    assert [name for name in scripts if not any((folder / name).exists() for folder in folders)] == []


def test_every_constant_and_function_in_backticks_is_defined():
    quoted = set(re.findall(r"`([A-Za-z_][\w.]*)`", README))
    identifiers = {name for name in quoted if ("_" in name or name.isupper() or re.search(r"[a-z][A-Z]", name))
                   and not name.endswith(".py")} - FOREIGN
    assert len(identifiers) > 30
    assert identifiers - defined_names() == set()


def test_no_placeholder_is_left():
    assert "@@" not in README + RESULTS


def test_the_table_of_files_gives_their_true_length():
    for name, lines in re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.MULTILINE):
        assert int(lines) == len(SOURCES[name].splitlines()), name


def test_it_can_be_read_in_half_an_hour():
    assert len(README.splitlines()) <= 450 and len(README.split()) <= 5000


def test_every_variation_is_in_the_table_and_its_output_in_the_results():
    for path in (ROOT / "variations").glob("*.py"):
        assert f"variations/{path.name}" in README and f"`python variations/{path.name}`" in RESULTS
