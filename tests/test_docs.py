"""Everything that docs/*.md name exists, and their examples print what is shown beside them."""

import ast
import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
QUESTIONS = PAGES["interview_questions.md"]


def prose(page: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def links(page: str) -> list[tuple[str, str]]:
    """All (text, address) of a page."""
    return re.findall(r"\[([^][]*)\]\(([^)\s]+)\)", prose(page))


def anchors(page: str) -> list[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def names_in(source: str) -> set[str]:
    """The functions, classes, methods (also as Class.method) and constants that a Python file defines."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def answers() -> dict[str, str]:
    """Each question with its answer."""
    chapters = re.split(r"^## ", QUESTIONS, flags=re.MULTILINE)[2:]  # after the introduction and the contents
    return dict(question.split("\n", 1) for chapter in chapters for question in chapter.split("\n### ")[1:])


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    broken = set()
    for _, address in links(PAGES[page]):
        if not address.startswith("https:"):
            file, _, anchor = address.partition("#")
            target = (ROOT / "docs" / file) if file else ROOT / "docs" / page
            if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
                broken.add(address)
    assert sorted(broken) == []


@pytest.mark.parametrize("page", PAGES)
def test_no_two_headings_of_a_page_have_the_same_anchor(page):
    assert len(set(anchors(PAGES[page]))) == len(anchors(PAGES[page]))


@pytest.mark.parametrize("page", PAGES)
def test_every_name_that_links_to_a_file_is_defined_in_that_file(page):
    quoted = {(text.strip("`"), address) for text, address in links(PAGES[page])
              if re.fullmatch(r"`[\w.]+`", text) and address.endswith(".py")}
    missing = [(name, address) for name, address in quoted
               if name not in names_in((ROOT / "docs" / address).read_text(encoding="utf-8"))]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_constant_in_backticks_is_defined_somewhere(page):
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    defined = set().union(*(names_in(path.read_text(encoding="utf-8")) for path in files))
    constants = re.findall(r"`([A-Z]+_[A-Z_]*[A-Z]{2})(?: = [^`]*)?`", prose(PAGES[page]))
    foreign = {"OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert set(constants) - defined - foreign == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_names_an_existing_script_and_existing_bugs(page):
    commands = [line.strip() for line in re.findall(r"`((?:python|torchrun|diff) [^`]*)`", prose(PAGES[page]))]
    breaks = re.findall(r'Break\("([^"]*)"', (ROOT / "tests" / "break_it.py").read_text(encoding="utf-8"))
    scripts = {script for command in commands for script in re.findall(r"[\w/]+\.py\b", command)}
    named = {name for command in commands if "break_it.py" in command for name in re.findall(r'"([^"]*)"', command)}
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    assert named - set(breaks) == set()


@pytest.mark.parametrize("page", PAGES)
def test_sources_have_well_formed_permanent_addresses(page):
    addresses = {address for _, address in links(PAGES[page]) if ":" in address}
    hosts = {re.match(r"https://([^/]+)/", address).group(1) for address in addresses}
    assert hosts <= {"arxiv.org", "aclanthology.org", "www.usenix.org", "cdn.openai.com", "pytorch.org", "github.com",
                     "huggingface.co", "www.nvidia.com"}
    arxiv = [address for address in addresses if "arxiv.org" in address]
    assert [address for address in arxiv if not re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", address)] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_print_what_is_shown_beside_them(page):
    text = re.sub(r"^```.*$", "", PAGES[page], flags=re.MULTILINE)  # a closing fence would count as expected output
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(doctest.DocTestParser().get_doctest(text, {}, page, page, 0))
    assert runner.summarize().failed == 0


def test_the_contents_list_every_question_in_order():
    contents = QUESTIONS.split("## Contents\n")[1].split("\n## ")[0]
    assert re.findall(r"^- \[(.*)\]\(#", contents, re.MULTILINE) == list(answers())


def test_every_topic_has_enough_questions():
    topics = re.findall(r"^## (.*)$", QUESTIONS, re.MULTILINE)[1:]
    chapters = re.split(r"^## ", QUESTIONS, flags=re.MULTILINE)[2:]
    assert {"Attention", "Positions", "Masks", "Training", "Architectures", "Decoding", "Memory and speed",
            "Fine-tuning", "Alignment", "Scaling", "Evaluation", "Debugging"} <= set(topics)
    assert len(answers()) >= 70
    assert all(chapter.count("\n### ") >= 3 for chapter in chapters)


@pytest.mark.parametrize("question, answer", answers().items(), ids=list(answers()))
def test_an_answer_is_a_few_sentences_and_points_into_this_repository(question, answer):
    paragraphs = [" ".join(paragraph.split()) for paragraph in prose(answer).split("\n\n") if paragraph.strip()]
    body = [p for p in paragraphs if not p.startswith(("See:", "*A common wrong answer:*"))]
    text = re.sub(r"`[^`]*`", "x", re.sub(r"\[([^][]*)\]\([^)]*\)", r"\1", " ".join(body)).replace("et al.", ""))
    assert 2 <= len(re.findall(r"[.!?]\)?(?= |$)", text)) <= 7
    assert len(text.split()) >= 30
    see = paragraphs[-1]
    assert see.startswith("See: ")
    assert any(address.startswith("../") for _, address in links(see)) or re.search(r"`(python|torchrun) ", see)
