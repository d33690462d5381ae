"""kill_train_all.py - kills train_all.py at random moments and shows that nothing is lost.

    python tests/kill_train_all.py         20 kills: a few minutes
    python tests/kill_train_all.py 100     100 kills

Each run is the script itself, in a copy of the folder with small models, a checkpoint after every step, dropout, and
encoder_only's pretraining and fine-tuning, so that masks, dropout, order, optimizer, best weights and runs that start
from another are all covered. It runs once uninterrupted. Then it is started, killed at a random moment of its training
(SIGKILL on POSIX, TerminateProcess on Windows: no chance to clean up), and started again, until it finishes; new runs
follow until all kills are done. After each kill, every checkpoint must be a complete file. Each finished run must have
exactly the uninterrupted run's weights, optimizer state and history.

SEED fixes the random delays; what the script is doing when a delay ends still depends on the machine's speed.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SEED = 0
KILLED = 1 if os.name == "nt" else -signal.SIGKILL  # the exit status after process.kill()
SMALL_MODEL = {"D_MODEL": 16, "NUM_LAYERS": 1, "NUM_HEADS": 2, "D_FF": 32, "DROPOUT": 0.1}
SMALL = {
    "toy_dataset.py": {"NUM_TRAIN": 300, "NUM_VALIDATION": 100, "NUM_TEST": 100},
    "encoder_only.py": SMALL_MODEL,
    "decoder_only.py": SMALL_MODEL,
    "encoder_decoder.py": SMALL_MODEL,
    "train_all.py": {"ARCHITECTURES": ["encoder_only"], "GLOBAL_BATCH_SIZE": 16, "MICRO_BATCH_SIZE": 6, "NUM_EPOCHS": 3,
                     "FINE_TUNING_EPOCHS": 1, "EVALUATE_EVERY": 10, "CHECKPOINT_EVERY": 1},
}


def small_copy(folder: Path, **constants) -> Path:
    """A copy of the scripts with the constants of SMALL, and with the given ones in train_all.py."""
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        source = file.read_text()
        for name, value in (SMALL.get(file.name, {}) | (constants if file.name == "train_all.py" else {})).items():
            source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", source, flags=re.MULTILINE)
            assert count == 1, f"{name} is set {count} times in {file.name}"
        (folder / file.name).write_text(source)
    return folder


def start(folder: Path, *command: str, **variables: str) -> subprocess.Popen:
    """Start train_all.py in a folder; command: replaces `python`; variables: added to its environment."""
    # One thread: two processes with two threads each would wait for one another on a machine with two cores.
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen([*(command or [sys.executable]), "train_all.py"], cwd=folder, text=True, env=variables,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(folder: Path, *command: str) -> tuple[str, str]:
    """Run train_all.py in a folder to its end. Returns what it printed, and what it printed to stderr."""
    process = start(folder, *command)
    try:
        printed, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:  # processes that wait for each other forever
        process.terminate()
        raise
    assert process.returncode == 0, errors
    return printed, errors


def files_of(folder: Path) -> dict:
    """The contents of all checkpoints and histories in a folder; reading them shows that they are complete."""
    files = {path.relative_to(folder): torch.load(path, weights_only=True) for path in folder.rglob("*.pt")}
    return files | {path.relative_to(folder): json.loads(path.read_text()) for path in folder.rglob("*.json")}


def differences(found, expected, place="") -> list[str]:
    """Where two nested structures of tensors, numbers and strings differ at all, times in seconds excepted."""
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return [line for key in expected if key != "seconds"
                for line in differences(found[key], expected[key], f"{place}/{key}")]
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)) and len(found) == len(expected):
        return [line for i, pair in enumerate(zip(found, expected)) for line in differences(*pair, f"{place}/{i}")]
    same = torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
    return [] if same else [place]


def run_and_kill(folder: Path, rng: random.Random) -> bool:
    """Start train_all.py, and kill it a moment after one to three evaluations. False if it finished first.

    Evaluations are counted by their printed lines, so that the kill falls into the training on any machine.
    """
    process, lines = start(folder), rng.randint(1, 3)
    for line in process.stdout:
        lines -= "validation:" in line
        if lines == 0:
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
    process.communicate()
    assert process.returncode in (0, KILLED)
    return process.returncode == KILLED


def main(num_kills: int = 20) -> None:
    """Kill, resume, compare."""
    rng = random.Random(SEED)
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed = small_copy(Path(temporary) / "undisturbed", NUM_EPOCHS=6)
        run(undisturbed)
        expected = files_of(undisturbed)
        kills = runs = 0
        while kills < num_kills:
            runs += 1
            folder = small_copy(Path(temporary) / f"killed{runs}", NUM_EPOCHS=6)
            while run_and_kill(folder, rng):
                kills += 1
                steps = [file["step"] for path, file in files_of(folder).items() if path.name.endswith("_last.pt")]
                print(f"  kill {kills:3}: every file is complete; steps so far: {sum(steps)}", flush=True)
            wrong = differences(files_of(folder), expected)
            print(f"Run {runs} finished. Differences from the uninterrupted run: {', '.join(wrong) or 'none'}",
                  flush=True)
            if wrong:
                sys.exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
