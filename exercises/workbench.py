"""workbench.py - what implement.py and debug.py share: the folder that a learner works in, and the tests that grade it.

Every exercise gets a complete copy of the project, workbench/NAME/, so that no exercise can disturb another or the
project itself. Nothing in it is ever overwritten: starting again moves the old copy aside, with the date in its name.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from break_it import copy_code  # noqa: E402

from toy_dataset import InputError  # noqa: E402

WORKBENCH = ROOT / "workbench"
TIME_LIMIT = 120  # seconds for the tests of one exercise; they take a few, so if they take longer, a loop is endless


class Outcome(NamedTuple):
    """The result of one test: message is None if it passed, traceback is pytest's short one."""

    test: str
    message: str | None
    traceback: str


def folder_of(name: str) -> Path:
    """The folder of an exercise or bug."""
    return WORKBENCH / name


def shown(path: Path) -> str:
    """A path as it is typed from the root of the project: workbench/make_causal_mask/decoder_only.py."""
    return path.relative_to(WORKBENCH.parent).as_posix()


def create(name: str) -> Path:
    """Copy the project to workbench/NAME/ and return the folder. An older copy is renamed, with the date."""
    folder = folder_of(name)
    if folder.exists():
        aside = folder.with_name(f"{name}.{time.strftime('%Y-%m-%d_%H.%M.%S')}")
        folder.rename(aside)
        print(f"Your old copy is now {shown(aside)}/.\n")
    unfinished = folder_of(f"{name}.unfinished")  # a copy that is interrupted must not look like a complete one
    copy_code(unfinished)
    unfinished.rename(folder)
    return folder


def read_progress() -> dict:
    """What workbench/progress.json holds: for each exercise or bug that was started, a dict."""
    path = WORKBENCH / "progress.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        raise InputError(f"{path} is damaged. Delete it: it holds only which exercises are done.") from None


def note_progress(name: str, **facts) -> None:
    """Record these facts about an exercise, for instance done="2026-11-25"."""
    progress = read_progress()
    progress[name] = progress.get(name, {}) | facts
    WORKBENCH.mkdir(exist_ok=True)
    temporary = WORKBENCH / "progress.json.tmp"
    temporary.write_text(json.dumps(progress, indent=1), encoding="utf-8")
    temporary.replace(WORKBENCH / "progress.json")


def read_source(path: Path) -> str:
    """A Python file of the learner's. Raises InputError, in one sentence with the line, if it is not valid Python."""
    try:
        source = path.read_text(encoding="utf-8")
        compile(source, path.name, "exec")
        return source
    except FileNotFoundError:
        raise InputError(f"{shown(path)} is gone: add --restart to start again with a fresh copy.") from None
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise InputError(f"{shown(path)}{line}: {error.msg}.") from None
    except ValueError as error:  # bytes that are not UTF-8, or null characters
        raise InputError(f"{shown(path)} cannot be read as Python: {error}.") from None


def pytest_command(tests: list[str]) -> list[str]:
    """The command that runs these tests in a copy of the project. -B: no cached bytecode, so that no edit is missed."""
    if importlib.util.find_spec("pytest") is None:
        raise InputError("The exercises are graded by the project's tests, which need pytest: "
                         "python -m pip install -r tests/requirements.txt")
    return [sys.executable, "-B", "-m", "pytest", "--rootdir=.", "-p", "no:cacheprovider", "--tb=short",
            *(f"tests/{test}" for test in tests)]


def show_pytest(folder: Path, tests: list[str]) -> None:
    """Run the tests, with pytest's own output."""
    subprocess.run(pytest_command(tests), cwd=folder, timeout=TIME_LIMIT)


def run_tests(folder: Path, tests: list[str]) -> list[Outcome]:
    """Run tests of the copy in folder, each named as pytest does: test_decoder_only.py::test_...

    Raises InputError if pytest cannot run them: it is not installed, the code cannot be imported or does not end.
    """
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [*pytest_command(tests), "-vv", f"--junitxml={report}"]  # -vv: both sides of == in full
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIME_LIMIT,
                                  encoding="utf-8", errors="replace")
        except subprocess.TimeoutExpired:
            raise InputError(f"The tests were still running after {TIME_LIMIT} seconds: is there a loop that never "
                             "ends?") from None
        if done.returncode not in (0, 1):  # 1: some tests failed
            reason = re.findall(r"^(?:E +|ERROR: )(.+)$", done.stdout + done.stderr, re.MULTILINE)
            raise InputError(f"{shown(folder)}/ cannot be tested: {reason[-1] if reason else done.stderr[-500:]}")
        outcomes = []
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.get("classname").removeprefix("tests.").replace(".", "/")
            problems = [child for child in case if child.tag in ("failure", "error")]
            message = problems[0].get("message") if problems else None
            outcomes.append(Outcome(f"{file}.py::{case.get('name')}", message, problems[0].text if problems else ""))
    return outcomes


def explain(outcome: Outcome, file: str) -> str:
    """Why a test failed, in a short line of ASCII: the line of the learner's file that raised, or what was compared."""
    code = re.findall(r"^    (\S.*)\nE ", outcome.traceback, re.MULTILINE)  # the statement that failed
    wanted = re.search(r"Greatest absolute difference: \S+ at index \([^)]*\)|Expected \S+ but got .*", outcome.message)
    text = wanted[0] if wanted else outcome.message.strip().partition("\n")[0]
    if re.match(r"assert \(?(False|tensor\(False\))|AssertionError", text) and code:  # says less than the statement
        text = code[-1]
    text = text.replace("\N{PLUS-MINUS SIGN}", "+-").encode("ascii", "backslashreplace").decode()
    raised = re.findall(rf"^(?:\S*[\\/])?{re.escape(file)}:(\d+): in ", outcome.traceback, re.MULTILINE)
    text = f"{file}, line {raised[-1]}: {text}" if raised else text
    return text if len(text) <= 170 else text[:167] + "..."
