"""The exercises: every entry works, typical mistakes are caught and named, and nothing that a learner wrote is lost.

That the original passes is not tested here: the tests that grade an exercise belong to the rest of the suite.
"""

import ast
import importlib.util
import inspect
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from operator import attrgetter
from types import ModuleType

import pytest
import toy_dataset
from _pytest.runner import runtestprotocol
from conftest import ROOT
from toy_dataset import InputError

sys.path.insert(0, str(ROOT / "exercises"))

import debug  # noqa: E402
import implement  # noqa: E402
import workbench  # noqa: E402
from course import EXERCISES  # noqa: E402
from debug import BUGS  # noqa: E402

CAUSAL = next(exercise for exercise in EXERCISES if exercise.name == "make_causal_mask")
# Each bug of debug.py, fixed in a different way: text of the original -> another correct text.
OTHERWISE = {
    "dropout left on": ("    model.eval()\n    loss_sum", "    model.train(False)\n    loss_sum"),
    "top-p drops the crossing token": ("before >= p", "~(before < p)"),
    "padding counts in the loss": ('IGNORE if field in ("targets", "places") else PAD_ID',
                                   'PAD_ID if field not in ("targets", "places") else IGNORE'),
    "positions forget the cache": ("positions[:, start:])", "positions[:, start:ids.size(1)])"),
    "causal mask shifted by one": (".tril(diagonal=S - T)", ".tril(S - T)"),
    "targets not shifted": ("    targets = text[1:]\n", "    targets = [*text[1:]]\n"),
    "padding is attended to": ("make_padding_mask(ids)", "(ids != PAD_ID)[:, None, None]"),
    "gradients never zeroed": ("    optimizer.zero_grad() ", "    model.zero_grad() "),
    "loss on unmasked tokens too": ("ids.masked_fill(~chosen, IGNORE)", "torch.where(chosen, ids, IGNORE)"),
    "no cross-attention": ("x = x + self.dropout(\n            self.cross_attention(",
                           "x = x + 1 * self.dropout(\n            self.cross_attention("),
    "source padding is attended to": ("make_padding_mask(source)", "(source != PAD_ID)[:, None, None]"),
    "caches not reordered with their beams": ("parent.gather(1, best)", "torch.gather(parent, 1, best)"),
}


@pytest.fixture(autouse=True)
def empty_workbench(monkeypatch, tmp_path):
    monkeypatch.setattr(workbench, "WORKBENCH", tmp_path / "workbench")


def use_instead(patch, file, name, source) -> None:
    """Replace a function of an imported module by the one in source, wherever it has been imported."""
    changed = ModuleType(file)
    changed.__file__ = str(ROOT / f"{file}.py")
    exec(compile(source, f"{file}.py", "exec"), changed.__dict__)
    module = importlib.import_module(file.replace("/", "."))
    original, replacement = (inspect.unwrap(attrgetter(name)(m)) for m in (module, changed))
    if original.__code__.co_freevars == replacement.__code__.co_freevars:
        patch.setattr(original, "__code__", replacement.__code__)
    else:  # an empty __init__, which no longer calls super()
        patch.setattr(f"{module.__name__}.{name}", replacement)


def mended_otherwise(bug) -> str:
    """The project's file, with the function that holds the bug written in another correct way."""
    original, (old, new) = (ROOT / f"{bug.made.file}.py").read_text(encoding="utf-8"), OTHERWISE[bug.mistake]
    function = "".join(implement.function_lines(original, debug.function_of(bug.made)))
    assert function.count(old) == 1 and new != old
    return original.replace(function, function.replace(old, new))


def planted(bug) -> str:
    """The project's file with the mistake."""
    return (ROOT / f"{bug.made.file}.py").read_text(encoding="utf-8").replace(bug.made.old, bug.made.new)


def variants():
    """All sources to be graded: (name, what was done to it), file, function, source, tests."""
    for exercise in EXERCISES:
        file, original = exercise.file.removesuffix(".py"), implement.original_of(exercise)
        sources = {None: implement.cut(original, exercise)}
        with suppress(ValueError):  # a mistake whose text is gone fails the test of its exercise, not all
            for mistake, change in exercise.mistakes.items():
                sources[mistake] = implement.make_mistake(original, exercise, *change)
        for mistake, source in sources.items():
            yield (exercise.name, mistake), file, exercise.name, source, implement.tests_of(exercise)
    for bug in BUGS:
        for what, source in (("planted", planted(bug)), ("mended", mended_otherwise(bug))):
            yield (bug.mistake, what), bug.made.file, debug.function_of(bug.made), source, bug.tests


class Grader:
    """A pytest plugin: in place of running each test once, run those of each variant with the variant in place."""

    def __init__(self, variants):
        self.variants, self.first_red = variants, {}

    def pytest_runtestloop(self, session):
        for key, file, name, source, tests in self.variants:
            self.first_red[key] = None
            with pytest.MonkeyPatch.context() as patch:
                use_instead(patch, file, name, source)
                for item in session.items:
                    test = item.nodeid.removeprefix("tests/")
                    if any(test == one or test.startswith(f"{one}[") for one in tests):
                        if any(report.failed for report in runtestprotocol(item, nextitem=None, log=False)):
                            self.first_red[key] = test
                            break
        return True


@pytest.fixture(scope="module")
def first_red() -> dict:
    """(exercise or bug, what was done to it) -> the first test that fails, or None. One pytest in this process for all:
    each in a process of its own would take minutes."""
    grader = Grader(list(variants()))
    tests = {f"{ROOT / 'tests' / test}" for *_, tests in grader.variants for test in tests}
    options = ["-q", "-p", "no:cacheprovider", "--tb=native", f"--rootdir={ROOT}"]
    with redirect_stdout(io.StringIO()) as output:
        status = pytest.main([*options, *sorted(tests)], plugins=[grader])
    assert status == 0, f"not all tests that grade exercises and bugs exist: {output.getvalue()[-2000:]}"
    return grader.first_red


def run_main(module, capsys, *words) -> str:
    """What a script prints, given these words on the command line."""
    module.main(*map(module.parse_argument, words))
    text = capsys.readouterr().out
    lines = text.partition("\n--- ")[0].splitlines()  # what follows in a diff is source, up to 120 columns wide
    assert text.isascii() and ("--solution" in words or max(map(len, lines)) <= 100)
    return text


# --- the course ---


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_an_exercise_is_the_source_without_one_body(exercise):
    original = implement.original_of(exercise)
    emptied = implement.cut(original, exercise)
    assert implement.is_untouched(emptied, exercise) and not implement.is_untouched(original, exercise)
    start, end = implement.body_lines(original, exercise)
    before, after = original.splitlines()[:start], original.splitlines()[end:]
    assert emptied.splitlines()[:start] == before and emptied.splitlines()[start + 1:] == after
    docstrings = {ast.get_docstring(implement.find(source, exercise.name)) for source in (original, emptied)}
    assert len(docstrings) == 1


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_what_explains_an_exercise_exists(exercise):
    where, _, picture = exercise.see.partition("; ")
    file, heading = where.split(", ", 1)
    assert re.search(rf"^#+ {re.escape(heading)}$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert not picture or (ROOT / picture).exists()
    assert len(exercise.hints) >= 2 and len(exercise.mistakes) >= 3
    assert all(len(line) <= 94 for example in implement.examples_of(exercise) for line in example.splitlines())


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_an_empty_body_and_each_typical_mistake_fail_and_the_mistake_is_named(exercise, first_red):
    original = implement.original_of(exercise)
    sources = [original, *(implement.make_mistake(original, exercise, *change)
                           for change in exercise.mistakes.values())]
    assert [mistake for mistake in (None, *exercise.mistakes) if not first_red[exercise.name, mistake]] == []
    results = {tuple(implement.run_examples(source, exercise)) for source in sources}
    assert len(results) == len(sources)  # all differ, so a learner who makes one is told which


# --- implement.py, as a learner uses it ---


def write(text) -> None:
    """Replace the placeholder in the learner's file, or what was written there before, by a body."""
    path = implement.path_of(CAUSAL)
    source = path.read_text()
    start, end = implement.body_lines(source, CAUSAL)
    lines = source.splitlines(keepends=True)
    path.write_text("".join([*lines[:start], f"    {text}\n", *lines[end:]]))


def test_an_exercise_from_start_to_finish(capsys):
    assert "0 of " in run_main(implement, capsys)
    task = run_main(implement, capsys, "make_causal_mask")
    line = int(re.search(r"where +workbench/make_causal_mask/decoder_only\.py, line (\d+)", task)[1])
    assert "NotImplementedError" in implement.path_of(CAUSAL).read_text().splitlines()[line - 1]
    assert run_main(implement, capsys, "2") == task  # nothing has been written yet

    write("return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T + 1)")
    report = run_main(implement, capsys, "2")
    assert f"0 of {len(CAUSAL.properties)} properties hold" in report
    assert ">>> make_causal_mask(3, 3).int()\n  got       tensor([[1, 1, 0]," in report
    assert "expected  tensor([[1, 0, 0]," in report and "typical mistake: the diagonal is off by one, " in report

    assert "Hint 1" in run_main(implement, capsys, "2", "--hint")
    assert "Hint 2" in run_main(implement, capsys, "--hint", "2")
    assert "+    return torch.ones(T, S" in run_main(implement, capsys, "2", "--solution")

    write("return torch.arange(S, device=device) <= torch.arange(S - T, S, device=device)[:, None]")
    assert "Done." in run_main(implement, capsys, "2")
    assert re.search(r"make_causal_mask .* done \d{4}-\d\d-\d\d, 2 hints", run_main(implement, capsys))


def test_starting_again_moves_the_old_copy_aside_and_nothing_else_touches_it(capsys):
    run_main(implement, capsys, "2")
    write("return 'mine'")
    path = implement.path_of(CAUSAL)
    before = path.read_text()
    for flag in ("--hint", "--solution"):
        run_main(implement, capsys, "2", flag)
    assert path.read_text() == before
    aside = re.search(r"now workbench/(\S+)/", run_main(implement, capsys, "2", "--restart"))[1]
    assert (workbench.WORKBENCH / aside / "decoder_only.py").read_text() == before
    assert implement.is_untouched(path.read_text(), CAUSAL)


@pytest.mark.parametrize("body, sentence", [
    ("return torch.ones((T, S)", r"^workbench/make_causal_mask/decoder_only\.py, line \d+: '\(' was never closed\.$"),
    ("return 1\n  return 2", r"line \d+: unindent does not match"),
    ("pass\n\ntorhc.ones(3)", r"^workbench/make_causal_mask/ cannot be tested: NameError: name 'torhc'"),
    ("pass\x00", r"^workbench/make_causal_mask/decoder_only\.py.* null ")])
def test_code_that_cannot_run_gets_one_sentence_with_the_line(capsys, body, sentence):
    run_main(implement, capsys, "2")
    write(body)
    with pytest.raises(InputError, match=sentence) as caught:
        implement.check(CAUSAL)
    assert "\n" not in str(caught.value)


def test_a_missing_function_and_an_endless_loop_are_told_apart(capsys, monkeypatch):
    run_main(implement, capsys, "2")
    path = implement.path_of(CAUSAL)
    path.write_text(path.read_text().replace("def make_causal_mask", "def make_mask"))
    with pytest.raises(InputError, match="no make_causal_mask"):
        implement.check(CAUSAL)
    path.write_text(path.read_text().replace("def make_mask", "def make_causal_mask"))
    write("while True: pass")
    monkeypatch.setattr(workbench, "TIME_LIMIT", 0.5)
    with pytest.raises(InputError, match="after 0.5 seconds: is there a loop that never ends"):
        implement.check(CAUSAL)


def test_without_pytest_the_command_that_installs_it_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r tests/requirements\.txt"):
        workbench.run_tests(tmp_path, [])


def test_a_copy_that_was_interrupted_is_not_taken_for_a_complete_one(capsys, monkeypatch):
    def interrupt(folder):
        folder.mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workbench, "copy_code", interrupt)
        with pytest.raises(KeyboardInterrupt):
            implement.main(CAUSAL)
    assert "where " in run_main(implement, capsys, "2") and implement.path_of(CAUSAL).exists()


def test_a_damaged_progress_file_is_named():
    workbench.WORKBENCH.mkdir()
    (workbench.WORKBENCH / "progress.json").write_text("{")
    with pytest.raises(InputError, match=r"progress\.json is damaged"):
        implement.main()


@pytest.mark.parametrize("script, argument, part", [
    ("implement", "make_causal", "Did you mean make_causal_mask?"), ("debug", "99", f"1 to {len(BUGS)}")])
def test_from_any_folder_a_wrong_argument_is_one_sentence_and_status_2(tmp_path, script, argument, part):
    done = subprocess.run([sys.executable, str(ROOT / "exercises" / f"{script}.py"), argument], cwd=tmp_path,
                          capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "LANG": "C"})
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1 and part in done.stderr


# --- debug.py ---


@pytest.fixture
def few_numbers(monkeypatch):
    splits = toy_dataset.make_splits()
    few = toy_dataset.Splits(splits.train[:640], splits.validation[:50], splits.test[:50])
    monkeypatch.setattr(toy_dataset, "make_splits", lambda: few)


def printed(script) -> str:
    text = io.StringIO()
    with redirect_stdout(text):
        exec(inspect.cleandoc(script), {})
    return text.getvalue()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.mistake)
def test_a_planted_bug_has_a_symptom_fails_tests_and_can_be_fixed_in_two_ways(bug, few_numbers, first_red):
    assert bug.mistake not in bug.report + bug.script
    assert all(len(line) <= 96 for line in inspect.cleandoc(bug.script).splitlines())
    name, expected = debug.function_of(bug.made), printed(bug.script)
    for what, source in (("planted", planted(bug)), ("mended", mended_otherwise(bug))):
        with pytest.MonkeyPatch.context() as patch:
            use_instead(patch, bug.made.file, name, source)
            assert (printed(bug.script) == expected) is (what == "mended")
        assert (first_red[bug.mistake, what] is None) is (what == "mended")


def test_a_bug_from_report_to_fix(capsys):
    with pytest.raises(InputError, match="no bug has been planted yet"):
        debug.main("check")
    bug = next(bug for bug in BUGS if bug.mistake == "padding counts in the loss")
    path = workbench.folder_of(bug.name) / "toy_dataset.py"
    report = run_main(debug, capsys, str(bug.number))
    assert report.count("21 targets") == 1 and report.count("34 targets") == 1  # as it should be, and as it is
    assert report.endswith(run_main(debug, capsys))  # without a number: the bug that is being looked for
    assert "It is still there." in run_main(debug, capsys, "check")

    assert run_main(debug, capsys, "--hint") == "It is in toy_dataset.py.\n"
    assert run_main(debug, capsys, "--hint") == "It is in toy_dataset.py.\nIt is in pad_batch.\n"
    assert "-            filler = PAD_ID\n" in run_main(debug, capsys, "--hint")

    path.write_text(path.read_text().replace(bug.made.new, bug.made.old))
    assert "It is gone." in run_main(debug, capsys, "check")
    assert json.loads((workbench.WORKBENCH / "progress.json").read_text())[bug.name]["done"]
