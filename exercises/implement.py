"""implement.py - write the pieces of a transformer yourself, graded by the project's own tests.

    python exercises/implement.py                      the course, and how far you are
    python exercises/implement.py 2                    start exercise 2, and later: check what you have written
    python exercises/implement.py make_causal_mask     the same, by name
    python exercises/implement.py 2 --pytest           all of pytest's output
    python exercises/implement.py 2 --hint             the next hint
    python exercises/implement.py 2 --solution         your code against the original
    python exercises/implement.py 2 --restart          start again with a fresh copy; yours is moved aside

Starting an exercise copies the project to workbench/NAME/ and empties the body of one function there. Write it in your
editor, then give the same command again: it runs the tests that are about this function (a few seconds) and says which
properties hold and which do not yet.

Nothing here is written twice: the function is cut out of the project's source, the tests are the project's tests, the
expected results are computed by the original, and the solution is the original. course.py holds the list of exercises.
"""

import ast
import difflib
import doctest
import inspect
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import workbench
from course import EXERCISES, Exercise
from workbench import ROOT, InputError

from toy_dataset import run_script

FLAGS = ("--pytest", "--hint", "--solution", "--restart")
COMMAND = "python exercises/implement.py"


# ======================================================================================================
# CUTTING A FUNCTION OUT
# ======================================================================================================


def find(source: str, name: str) -> ast.FunctionDef:
    """The function of this name, or the method Class.method. Raises InputError if there is none."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next((item for item in node.body if getattr(item, "name", None) == part), None)
        if node is None:
            raise InputError(f"there is no {name} in this file anymore: write it again, or add --restart.")
    return node


def function_lines(source: str, name: str) -> list[str]:
    """The lines of a function, from its def to its end."""
    node = find(source, name)
    return source.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]


def body_lines(source: str, exercise: Exercise) -> tuple[int, int]:
    """Where the lines to be written start and end, as indices into source.splitlines(). The docstring is not in it."""
    node = find(source, exercise.name)
    if exercise.only_loop:
        node = next(item for item in node.body if isinstance(item, ast.For))
    elif ast.get_docstring(node) is not None:
        return node.body[0].end_lineno, node.end_lineno
    return node.body[0].lineno - 1, node.end_lineno


def cut(source: str, exercise: Exercise) -> str:
    """The source with the lines to be written replaced by one that raises NotImplementedError."""
    lines = source.splitlines(keepends=True)
    start, end = body_lines(source, exercise)
    indent = " " * find(source, exercise.name).col_offset + " " * (8 if exercise.only_loop else 4)
    lines[start:end] = [f"{indent}raise NotImplementedError  # write {exercise.name} here, then delete this line\n"]
    return "".join(lines)


def is_untouched(source: str, exercise: Exercise) -> bool:
    """Whether the line that cut() left is still the only one."""
    start, end = body_lines(source, exercise)
    return end - start == 1 and "raise NotImplementedError" in source.splitlines()[start]


def original_of(exercise: Exercise) -> str:
    """The source of the project's own file, which holds the solution."""
    return (ROOT / exercise.file).read_text(encoding="utf-8")


def path_of(exercise: Exercise) -> Path:
    """The learner's copy of the file."""
    return workbench.folder_of(exercise.name) / exercise.file


def twins_of(exercise: Exercise) -> list[str]:
    """Other files that contain an identical copy of the function."""
    function = "".join(function_lines(original_of(exercise), exercise.name))
    files = [path.relative_to(ROOT).as_posix() for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("variations/*.py")])
             if function in path.read_text(encoding="utf-8")]
    return [file for file in files if file != exercise.file]


# ======================================================================================================
# EXAMPLES: what the learner's function returns, beside what the original returns
# ======================================================================================================


def examples_of(exercise: Exercise) -> list[str]:
    """Lines of code to run: those of the docstring's doctests, then the exercise's own."""
    docstring = ast.get_docstring(find(original_of(exercise), exercise.name)) or ""
    parser = doctest.DocTestParser()
    texts = (docstring, textwrap.dedent(exercise.examples))
    return [example.source for text in texts for example in parser.get_examples(text)]


def run_examples(source: str, exercise: Exercise) -> list[str]:
    """What Python would print for each example line, in a module with this source. Exceptions are results as well."""
    path = ROOT / exercise.file
    module, results = ModuleType(path.stem), []
    module.__file__ = str(path)
    exec(compile(source, str(path), "exec"), module.__dict__)
    original_hook = sys.displayhook
    for example in examples_of(exercise):
        shown = []
        try:
            sys.displayhook = lambda value, shown=shown: shown.append(repr(value))
            exec(compile(example, "<example>", "single"), module.__dict__)
        except (Exception, SystemExit) as error:
            shown.append(f"{type(error).__name__}: {error}".partition("\n")[0])
        finally:
            sys.displayhook = original_hook
        results.append("\n".join(shown))
    return results


def describe_difference(source: str, exercise: Exercise) -> list[str]:
    """The first example whose result differs from the original's; and, if all results are those of a typical mistake,
    its name."""
    original = original_of(exercise)
    got, expected = run_examples(source, exercise), run_examples(original, exercise)
    different = [i for i in range(len(got)) if got[i] != expected[i]]
    if not different:
        return []
    first = different[0]
    setup = [code for code, result in zip(examples_of(exercise)[:first], expected) if not result]
    lines = ["The first example with a wrong result:", ""]
    lines += textwrap.indent("".join([*setup, examples_of(exercise)[first]]), "  >>> ").splitlines()
    for name, text in (("got", got[first]), ("expected", expected[first])):
        lines += [f"  {name if i == 0 else '':10}{line[:88]}".rstrip()
                  for i, line in enumerate(text.splitlines() or ["nothing"])]
    for mistake, (old, new) in exercise.mistakes.items():
        with suppress(ValueError):  # you may have changed the project's own file
            if run_examples(make_mistake(original, exercise, old, new), exercise) == got:
                lines += ["", *textwrap.wrap(f"These are the results of a typical mistake: {mistake}.", 98)]
    return lines


def make_mistake(source: str, exercise: Exercise, old: str, new: str) -> str:
    """The original source with `old`, which the function contains exactly once, replaced by `new`."""
    function = "".join(function_lines(source, exercise.name))
    if function.count(old) != 1:
        raise ValueError(f"{exercise.name} contains {old!r} {function.count(old)} times")
    return source.replace(function, function.replace(old, new))


# ======================================================================================================
# THE COMMANDS
# ======================================================================================================


def say(text: str, indent: str = "  ") -> None:
    """Print a paragraph, wrapped to the width of a terminal."""
    print(textwrap.fill(inspect.cleandoc(text), 98, initial_indent=indent, subsequent_indent=indent))


def show_course() -> None:
    """The list of exercises, with what is done."""
    progress = workbench.read_progress()
    print("Write the pieces of a transformer yourself. The project's own tests grade them.\n")
    for number, exercise in enumerate(EXERCISES, start=1):
        facts = progress.get(exercise.name, {})
        hints = f", {facts['hints']} hint{'s' * (facts['hints'] > 1)}" if "hints" in facts else ""
        state = (f"done {facts['done']}" if "done" in facts
                 else "started" if path_of(exercise).exists() else "")
        print(f"  {number:>2}  {exercise.name:30} {exercise.file:36}{state}{hints if state else ''}".rstrip())
    ahead = [exercise for exercise in EXERCISES if "done" not in progress.get(exercise.name, {})]
    print(f"\n{len(EXERCISES) - len(ahead)} of {len(EXERCISES)} done."
          + (f" Next: {COMMAND} {ahead[0].number}" if ahead else " Now find a bug: python exercises/debug.py"))


def show_task(exercise: Exercise) -> None:
    """What to write, where, what explains it, and how it will be graded."""
    source = workbench.read_source(path_of(exercise))
    print(f"EXERCISE {exercise.number} of {len(EXERCISES)}: {exercise.name}\n")
    say(exercise.task)
    print(f"\n  where     {workbench.shown(path_of(exercise))}, line {body_lines(source, exercise)[0] + 1}")
    print(f"  read      {exercise.see}")
    print("  graded    these properties have to hold:")
    for sentence in exercise.properties:
        print(textwrap.fill(sentence, 98, initial_indent=" " * 12 + "- ", subsequent_indent=" " * 14))
    if twins := twins_of(exercise):
        print(f"  (It is also in {' and '.join(twins)}, complete: try without looking.)")
    print(f"\n  Once it is written:  {COMMAND} {exercise.number}\n"
          f"  If you are stuck:    {COMMAND} {exercise.number} --hint")


def start(exercise: Exercise) -> None:
    """Copy the project, empty the function, and say what to do."""
    emptied = cut(original_of(exercise), exercise)
    workbench.create(exercise.name)
    path_of(exercise).write_text(emptied, encoding="utf-8")
    show_task(exercise)


def tests_of(exercise: Exercise) -> list[str]:
    """The tests of all properties, each once."""
    return list(dict.fromkeys(test for tests in exercise.properties.values() for test in tests))


def check(exercise: Exercise) -> None:
    """Run the tests; say for each property whether it holds, and show the first example with a wrong result."""
    source = workbench.read_source(path_of(exercise))
    if is_untouched(source, exercise):
        show_task(exercise)
        return
    outcomes = workbench.run_tests(workbench.folder_of(exercise.name), tests_of(exercise))
    red = {sentence: [outcome for outcome in outcomes if outcome.message is not None
                      and any(outcome.test == test or outcome.test.startswith(f"{test}[") for test in tests)]
           for sentence, tests in exercise.properties.items()}
    holding = sum(not failed for failed in red.values())
    print(f"EXERCISE {exercise.number}: {exercise.name}, {holding} of {len(red)} properties hold\n")
    for sentence, failed in red.items():
        print(textwrap.fill(sentence, 98, initial_indent="  NO   " if failed else "  yes  ",
                            subsequent_indent=" " * 7))
        if failed:
            print(textwrap.fill(workbench.explain(failed[0], exercise.file), 98, initial_indent=" " * 9,
                                subsequent_indent=" " * 9, break_on_hyphens=False))
    print()
    if holding < len(red):
        difference = describe_difference(source, exercise)
        print("\n".join(difference) + "\n" if difference else "", end="\n" if difference else "")
        print(f"All of pytest's output:  {COMMAND} {exercise.number} --pytest\n"
              f"A hint:                  {COMMAND} {exercise.number} --hint")
        return
    workbench.note_progress(exercise.name, done=time.strftime("%Y-%m-%d"))
    print("Done.\n\n"
          f"  run it    python {workbench.shown(path_of(exercise))}\n"
          f"  compare   {COMMAND} {exercise.number} --solution")
    if exercise.number < len(EXERCISES):
        print(f"  next      {COMMAND} {exercise.number + 1}")


def show_hint(exercise: Exercise) -> None:
    """The next hint; all of them, once they have been seen."""
    seen = min(workbench.read_progress().get(exercise.name, {}).get("hints", 0) + 1, len(exercise.hints))
    workbench.note_progress(exercise.name, hints=seen)
    for i, hint in enumerate(exercise.hints[:seen], start=1):
        print(textwrap.fill(f"Hint {i} of {len(exercise.hints)}: {inspect.cleandoc(hint)}", 98))
    if seen == len(exercise.hints):
        print(f"That was the last one. The solution:  {COMMAND} {exercise.number} --solution")


def show_solution(exercise: Exercise) -> None:
    """The difference between the learner's function and the original."""
    original = original_of(exercise)
    mine = workbench.read_source(path_of(exercise)) if path_of(exercise).exists() else cut(original, exercise)
    difference = difflib.unified_diff(*(function_lines(source, exercise.name) for source in (mine, original)),
                                      workbench.shown(path_of(exercise)), exercise.file, n=99)
    print("".join(difference) or "Your code is identical to the original.\n", end="")


def main(*arguments) -> None:
    """arguments: an exercise and a flag, in either order, both optional."""
    exercises = [argument for argument in arguments if isinstance(argument, Exercise)]
    flags = [argument for argument in arguments if isinstance(argument, str)]
    if not arguments:
        show_course()
        return
    if len(exercises) != 1 or len(flags) > 1:
        raise InputError(f"give one exercise and at most one of {', '.join(FLAGS)}: {COMMAND} 2 --hint")
    exercise, flag = exercises[0], flags[0] if flags else None
    if flag == "--hint":
        show_hint(exercise)
    elif flag == "--solution":
        show_solution(exercise)
    elif flag == "--pytest":
        workbench.show_pytest(workbench.folder_of(exercise.name), tests_of(exercise))
    elif flag == "--restart" or not workbench.folder_of(exercise.name).exists():
        start(exercise)
    else:
        check(exercise)


def parse_argument(text: str) -> Exercise | str:
    """An exercise by number or name, or one of FLAGS."""
    if text in FLAGS:
        return text
    for exercise in EXERCISES:
        if text in (exercise.name, str(exercise.number)):
            return exercise
    close = difflib.get_close_matches(text, [exercise.name for exercise in EXERCISES], n=1)
    raise InputError(f"{text!r} is not an exercise. " + (f"Did you mean {close[0]}? " if close else "")
                     + f"{COMMAND} without arguments lists them.")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # your code may contain what this terminal cannot print
    run_script(main, parse_argument)
