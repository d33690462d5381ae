"""The scripts, run as a reader runs them, in a copy of the folder, with constants changed to make them fast."""

import contextlib
import doctest
import importlib
import io
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import MODULES, ROOT
from tqdm import tqdm

import encoder_only
import quick_start
import toy_dataset

FILES = ["encoder_only", "decoder_only", "encoder_decoder"]
FAST = {"D_MODEL": 16, "NUM_LAYERS": 1, "NUM_HEADS": 2, "D_FF": 16, "NUM_EPOCHS": 1, "FINE_TUNING_STEPS": 2,
        "NUM_LABELS": "[100]", "MAX_NEW_TOKENS": 12}
SMALL = {"NUM_TRAIN": 600, "NUM_VALIDATION": 50, "NUM_TEST": 600}


def set_constants(path, constants):
    source = path.read_text()
    for name, value in constants.items():
        source = re.sub(rf"^{name} = [^#\n]*", f"{name} = {value}  ", source, flags=re.MULTILINE)
    path.write_text(source)


def copy_of(folder, *names, **constants):
    """Copies toy_dataset.py and the named files, small and fast, into a folder."""
    for name in ("toy_dataset", *names):
        shutil.copy(ROOT / f"{name}.py", folder)
        set_constants(folder / f"{name}.py", SMALL if name == "toy_dataset" else FAST | constants)
    return folder


def run(folder, name, *arguments):
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, f"{name}.py", *arguments], cwd=folder, capture_output=True, text=True,
                          env=environment, timeout=300)


def run_here(folder, name, *arguments):
    """Like run, but in this process, which has PyTorch loaded: for scripts that end before they train."""
    status, printed, errors = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        try:
            runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):  # as Python does
                print(status, file=sys.stderr)
                status = 1
    return subprocess.CompletedProcess(sys.argv, status, printed.getvalue(), errors.getvalue())


def assert_one_sentence(done, status, *parts):
    assert done.returncode == status
    errors = [line for line in re.split(r"[\r\n]", done.stderr) if line.strip() and not line.startswith("training:")]
    assert len(errors) == 1 and all(part in errors[0] for part in parts), done.stderr


def assert_plain(text):
    """ASCII, and at most 100 columns, except for paths and generated text: an untrained model may generate anything."""
    assert text.isascii()
    assert [line for line in text.splitlines() if len(line) > 100 and not re.search(" -> |^Saved", line)] == []


@pytest.mark.parametrize("name", ["toy_dataset", *FILES])
def test_the_examples_in_the_docstrings_are_true(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 3 and results.failed == 0


def test_toy_dataset_prints_the_language(tmp_path):
    done = run(copy_of(tmp_path), "toy_dataset")
    assert done.returncode == 0 and done.stderr == ""
    assert "numbers in more than one split: 0" in done.stdout
    assert_plain(done.stdout)


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_only_the_data_trains_shows_saves_and_then_answers(tmp_path, name):
    """Also: an older checkpoint that no longer fits is kept, and using it to answer gives one sentence."""
    folder = copy_of(tmp_path, name)
    done = run(folder, name, "342")  # a question, and no checkpoint
    assert done.returncode == 0, done.stderr
    assert_plain(done.stdout)
    assert "TEST on 600 " in done.stdout and "342 -> " in done.stdout

    checkpoint = folder / "checkpoints" / f"{name}.pt"
    before = checkpoint.read_bytes()
    questions = {"342": "342 -> "}
    if name == "encoder_only":
        questions |= {"342 <SEP> three <MASK> forty two": "three ["}
    done = run(folder, name, *questions)
    assert done.returncode == 0 and all(answer in done.stdout for answer in questions.values())
    assert "TEST" not in done.stdout

    set_constants(folder / f"{name}.py", {"D_FF": 32})
    assert_one_sentence(run_here(folder, name, "342"), 1, str(checkpoint.with_suffix("")), "D_FF = 16")
    assert checkpoint.read_bytes() == before
    done = run(folder, name)
    assert done.returncode == 0 and checkpoint.with_name(f"{name}.pt.old").read_bytes() == before
    assert_plain(done.stdout)
    assert "TEST on 600 " in done.stdout and "Next: " in done.stdout


@pytest.mark.parametrize("name, argument", [*((name, "1234567") for name in FILES), ("decoder_only", "--help")])
def test_a_wrong_argument_ends_with_status_2_and_one_sentence(tmp_path, name, argument):
    assert_one_sentence(run_here(copy_of(tmp_path, name), name, argument), 2, argument)


@pytest.mark.parametrize("name", ["toy_dataset", "quick_start"])
def test_scripts_without_arguments_say_so(tmp_path, name):
    assert_one_sentence(run_here(copy_of(tmp_path, *FILES, "quick_start"), name, "342"), 2, "no arguments")


@pytest.mark.parametrize("name, constants, parts", [
    ("encoder_only", {"NUM_HEADS": 3}, ["D_MODEL = 16", "NUM_HEADS = 3"]),
    ("encoder_only", {"SEED": "'a'"}, ["SEED = 'a'"]),
    ("decoder_only", {"LEARNING_RATE": 1000}, ["LEARNING_RATE = 1000"]),
    ("decoder_only", {"D_MODEL": "'128'"}, ["D_MODEL = '128'"]),
    ("encoder_decoder", {"MAX_LENGTH": 5}, ["MAX_LENGTH = 5"])])
def test_invalid_constants_end_with_status_1_and_one_sentence(tmp_path, name, constants, parts):
    start = run if "LEARNING_RATE" in constants else run_here  # training has to start before it can diverge
    assert_one_sentence(start(copy_of(tmp_path, name, **constants), name), 1, *parts)


def test_a_damaged_checkpoint_is_named_and_left_alone(tmp_path):
    folder = copy_of(tmp_path, "decoder_only")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "decoder_only.pt").write_bytes(b"not a checkpoint")
    assert_one_sentence(run_here(folder, "decoder_only", "342"), 1, "decoder_only.pt", "damaged")
    assert (folder / "checkpoints" / "decoder_only.pt").read_bytes() == b"not a checkpoint"


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoints_folder_that_cannot_be_created_is_named_before_training(tmp_path, name):
    folder = copy_of(tmp_path, name)
    (folder / "checkpoints").write_text("a file where a folder should be")
    done = run_here(folder, name)
    assert_one_sentence(done, 1, str(folder / "checkpoints"))
    assert "step" not in done.stdout


def test_quick_start_trains_all_three_and_prints_a_summary(tmp_path):
    folder = copy_of(tmp_path, *FILES, "quick_start")
    set_constants(folder / "quick_start.py", {"NUM_EPOCHS": dict.fromkeys(FILES, 1)})
    done = run(folder, "quick_start")
    assert done.returncode == 0, done.stderr
    assert_plain(done.stdout)
    table = done.stdout[done.stdout.index("exact match\n"):]
    assert all(re.search(rf"^{name} .*%$", table, re.MULTILINE) for name in FILES)
    assert "CROSS-ATTENTION for 90210" in done.stdout


def test_quick_start_describes_each_model_after_its_training(monkeypatch, capsys):
    """Compares each row of the table with the trained model, and each training run with the constants."""
    for name, size in SMALL.items():
        monkeypatch.setattr(toy_dataset, name, size)
    toy_dataset.make_splits.cache_clear()
    monkeypatch.setattr(quick_start, "BATCH_SIZE", 75)
    monkeypatch.setattr(quick_start, "NUM_EPOCHS", {"encoder_only": 1, "decoder_only": 3, "encoder_decoder": 2})
    trained, found = {}, []

    def evaluate(model, loader):  # as if each evaluation found one percent more than the one before
        found.append((len(found) + 1) / 100)
        return {"loss": 9.0, "exact_match": found[-1], "mistakes": []}

    def watch(module):
        train, build = module.train, partial(module.build_model, 16, 1, 2, 16)
        monkeypatch.setattr(module, "build_model", build)
        torch.manual_seed(quick_start.SEED)
        expected = build(task="tagging") if module is encoder_only else build()

        def watched(model, loaders, *arguments, **options):
            assert all(value.equal(expected.state_dict()[name]) for name, value in model.state_dict().items())
            assert loaders.train.batch_size == 75 and loaders.train.generator.initial_seed() == quick_start.SEED
            options["progress"] = tqdm(disable=True, total=1)
            history = train(model, loaders, *arguments, **options)
            trained[module.__name__] = model, loaders, len(history), found[-1]
            return history

        monkeypatch.setattr(module, "train", watched)
        monkeypatch.setattr(module, "evaluate", evaluate)

    for module in MODULES:
        watch(module)
    quick_start.main()
    printed = capsys.readouterr().out
    for module in MODULES:
        model, _, steps, exact = trained[module.__name__]
        assert steps == 8 * quick_start.NUM_EPOCHS[module.__name__]  # 600 numbers in batches of 75
        row = next(line for line in printed.splitlines() if line.startswith(f"{module.__name__} ")).split()
        assert row[-1] == f"{exact:.2%}" and row[-4] == str(steps)
        assert row[-5] == f"{sum(parameter.numel() for parameter in model.parameters()):,}"
        assert "\n  ".join(module.answer(model, quick_start.EXAMPLES)) in printed
    assert trained["encoder_only"][0].task == "tagging"
    batch = next(iter(trained["decoder_only"][1].train))  # a translation: the digits are given, and cost nothing
    assert (batch["targets"][:, 0] == toy_dataset.IGNORE).all()
    toy_dataset.make_splits.cache_clear()
