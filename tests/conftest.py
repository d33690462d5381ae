"""What several test files need: the repository on the path, small models, and a briefly trained one of each kind."""

import functools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import decoder_only  # noqa: E402
import encoder_decoder  # noqa: E402
import encoder_only  # noqa: E402
import toy_dataset  # noqa: E402

# Exactness ("equal to the last digit") is tested on the CPU, where additions come in the same order each time. So GPUs
# are hidden from the tests and from the scripts that they start, except from tests with the fixture `accelerator`.
IS_AVAILABLE = {part: part.is_available for part in (torch.cuda, torch.backends.mps)}
ACCELERATOR = decoder_only.get_device()
VISIBLE_DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")
for part in IS_AVAILABLE:
    part.is_available = functools.wraps(part.is_available)(lambda: False)  # torch's compiler looks at __wrapped__

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores: one thread each, in scripts too
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

TINY = dict(d_model=32, num_layers=2, num_heads=4, d_ff=64, dropout=0.0, max_length=40)
MODULES = [encoder_only, decoder_only, encoder_decoder]

# A process that a shell starts in the background ignores Ctrl-C, and so would all scripts that these tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny(module, seed=0, **changes):
    """A small untrained model in evaluation mode, its weights larger than usual so that outputs differ clearly."""
    torch.manual_seed(seed)
    model = module.build_model(**TINY | changes).cpu().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=MODULES, ids=lambda module: module.__name__)
def module(request):
    return request.param


@pytest.fixture(scope="session", autouse=True)
def gpus_hidden_from_scripts():
    """Not when this file is imported: then the workers of pytest-xdist would inherit it, and never see a GPU."""
    if ACCELERATOR.type == "cuda":
        torch.cuda.init()  # reads CUDA_VISIBLE_DEVICES for the last time in this process
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def accelerator(monkeypatch):
    """This machine's GPU, visible again; without one the test is skipped, and says so."""
    if ACCELERATOR.type == "cpu":
        pytest.skip("this machine has no CUDA or MPS device")
    if VISIBLE_DEVICES is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE_DEVICES)
    for part, is_available in IS_AVAILABLE.items():
        monkeypatch.setattr(part, "is_available", is_available)
    return ACCELERATOR


def quick_training(module, num_epochs=2, **options):
    """A small model after a short training run: not good, but far from random."""
    torch.manual_seed(0)
    model = module.build_model(**TINY | {"d_model": 64}, **options).cpu()
    loaders = (module.create_dataloaders(128, 0, **options) if module is encoder_only
               else module.create_dataloaders(128, 0))
    module.train(model, loaders, num_epochs, 4e-3, 1, tqdm(disable=True, total=1))
    return model.eval()


@pytest.fixture(scope="session")
def trained_decoder():
    return quick_training(decoder_only)


@pytest.fixture(scope="session")
def trained_encoder_decoder():
    return quick_training(encoder_decoder)


@pytest.fixture(scope="session")
def trained_encoder():
    return quick_training(encoder_only, 1)


def evaluate_held_out(evaluate, trained: set, model, loader):
    """evaluate(model, loader), if the loader holds no number that was trained on."""
    batches = list(loader)
    digits = {toy_dataset.TOKEN_TO_ID[digit]: digit for digit in toy_dataset.DIGITS}
    rows = [[digits[i] for i in ids if i in digits] for batch in batches for ids in batch["ids"].tolist()]
    assert not trained & {int("".join(row)) for row in rows if row}
    return evaluate(model, batches)


@pytest.fixture(params=sorted({"cpu", ACCELERATOR.type}))
def run_main(request, monkeypatch, capsys, tmp_path):
    """run_main(variation, NAME=value, ...): calls its main() with small constants; returns what it printed.

    num_train: how many training numbers are left. Also checks what holds for every variation: tested on numbers that
    were not trained on, ASCII, at most 100 columns, a picture below 200 KB, in a folder that did not exist. Where there
    is a GPU, the test runs there as well.
    """
    if request.param != "cpu":
        request.getfixturevalue("accelerator")

    def run(variation, num_train=16, **constants):
        splits = toy_dataset.make_splits()
        few = splits._replace(train=splits.train[:num_train], validation=splits.validation[:20], test=splits.test[:20])
        for module in (variation, toy_dataset):
            monkeypatch.setattr(module, "make_splits", lambda: few, raising=False)
        picture = tmp_path / "new" / "picture.png"
        if hasattr(variation, "FIGURE"):
            constants["FIGURE"] = picture
        for name, value in constants.items():
            monkeypatch.setattr(variation, name, value)
        for module in (encoder_only, decoder_only):
            watched = functools.partial(evaluate_held_out, module.evaluate, set(few.train))
            monkeypatch.setattr(module, "evaluate", watched)
        variation.main()
        printed = capsys.readouterr().out
        assert printed.isascii()
        assert [line for line in printed.splitlines() if len(line) > 100 and str(tmp_path) not in line] == []
        assert not hasattr(variation, "FIGURE") or picture.stat().st_size < 200_000
        return printed

    return run
