"""try_constants.py - sets one constant at a time to the values that its comment suggests, and shows what happens.

    python tests/try_constants.py                    all three architecture files (an hour or more on two CPU cores)
    python tests/try_constants.py decoder_only       one of them
    python tests/try_constants.py decoder_only NUM_LAYERS NUM_HEADS

Each run is the script itself, in a copy of the folder that also holds a checkpoint of the unchanged file, with shorter
training than by default (see SHORT), so that a table takes minutes. How much is seed noise, the row SEED shows; run the
file by itself to see a change at full length. "refused" rows show the script's error message.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ["encoder_only", "decoder_only", "encoder_decoder"]
SHORT = {"NUM_EPOCHS": 2, "FINE_TUNING_STEPS": 100, "NUM_LABELS": [100]}  # instead of the files' own
NUM_TEST = 2_000


def values_to_try(source: str) -> list[tuple[str, str]]:
    """All (constant, value) pairs that the comments beside the constants suggest: `D_MODEL = 128  # ... Try 32, 256`.

    >>> values_to_try("WIDTH = 1  # how wide. Try 2 (too wide, (very)), 3.5e-1: no more, None\\n")
    [('WIDTH', '2'), ('WIDTH', '3.5e-1'), ('WIDTH', 'None')]
    """
    pairs = []
    for name, proposals in re.findall(r"^([A-Z_]+) = .*#.*\bTry (.*)$", source, re.MULTILINE):
        proposals = re.sub(r"\([^()]*(\([^()]*\))?[^()]*\)", "", proposals)                   # without the remarks
        pairs += [(name, value) for value in re.findall(r"(?:^|, )(-?\d[\d.e_-]*|None|True|False)\b", proposals)]
    return pairs


def set_constants(path: Path, constants: dict) -> None:
    """Rewrite `NAME = ...` in a file; skips names that it lacks. Raises ValueError for one set twice."""
    source = path.read_text()
    for name, value in constants.items():
        source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", source, flags=re.MULTILINE)
        if count > 1:
            raise ValueError(f"{name} is set {count} times in {path}")
    path.write_text(source)


def run(name: str, folder: Path, constants: dict) -> str:
    """Run a script with changed constants, in a folder that may hold an older checkpoint. Returns a summary."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    set_constants(folder / f"{name}.py", SHORT | constants)
    set_constants(folder / "toy_dataset.py", {"NUM_TEST": NUM_TEST})
    start = time.perf_counter()
    done = subprocess.run([sys.executable, f"{name}.py"], cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        return ("CRASHED " if "Traceback" in done.stderr else "refused ") + last.rpartition(".py: ")[2]
    figures = re.findall(r"held-out numbers: ([\d.]+%)", done.stdout)
    loss = re.findall(r"held-out: loss ([\d.]+)", done.stdout)[-1]
    return f"{seconds:6.0f} s   held-out: {', '.join(figures)}, loss {loss}"


def main(arguments: list[str]) -> None:
    """Try all constants, or the named ones."""
    names = [name for name in arguments if name in FILES] or FILES
    wanted = [constant for constant in arguments if constant not in FILES]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n{name}.py, {SHORT['NUM_EPOCHS']} epochs, tested on {NUM_TEST:,} held-out numbers", flush=True)
            print(f"  {'unchanged':28}{run(name, Path(folder), {})}", flush=True)
            for constant, value in values_to_try((ROOT / f"{name}.py").read_text()):
                if not wanted or constant in wanted:
                    print(f"  {f'{constant} = {value}':28}{run(name, Path(folder), {constant: value})}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
