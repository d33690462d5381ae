"""quick_start.py - three transformers, trained from nothing and tested, in under a minute on two CPU cores.

    python quick_start.py

Each of the three is given the work it was made for, learns it from 10,000 numbers, 1% of a small language, and is then
asked about numbers that it never saw. You will see the loss fall, the share of right answers rise, a few answers, and
at the end a picture of one model's attention, and a table. Nothing is saved: each file, run by itself, trains longer,
shows more and keeps what it learned.
"""

import time

import torch

import decoder_only
import encoder_decoder
import encoder_only
from toy_dataset import number_to_words, run_script

BATCH_SIZE = 128                                                                 # numbers per step. Try 32, 512
NUM_EPOCHS = {"encoder_only": 2, "decoder_only": 4, "encoder_decoder": 3}        # passes over them. Try 1 for each
SEED = 0                                                                         # Try 1: how much of it is luck?
EXAMPLES = [42, 342, 7001, 90210, 600006]                                        # numbers to ask about. Try your own


def train_and_show(module, model, loaders) -> list:
    """Train one model, let it answer, and return its row of the summary table."""
    start = time.perf_counter()
    history = module.train(model, loaders, NUM_EPOCHS[module.__name__], num_evaluations=4)
    seconds = time.perf_counter() - start
    print("  " + "\n  ".join(module.answer(model, EXAMPLES)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    exact = history[-1]["exact_match"]
    return [module.__name__, f"{parameters:,}", f"{len(history)}", f"{seconds:.0f} s", f"{exact:.2%}"]


def main() -> None:
    """Train and show the three, each with the same seed, and sum them up in one table."""
    start = time.perf_counter()
    print("THREE TRANSFORMERS, ONE SMALL LANGUAGE: numbers below a million and their English names.\n"
          f"  90210 <-> {' '.join(number_to_words(90210))}\n"
          "Each learns from 10,000 numbers and is tested on 2,000 others (held-out; exact: all of it right).")
    rows = []

    print("\n1. ENCODER-ONLY (BERT): reads all of a text at once. Made to understand: what is each digit worth?")
    torch.manual_seed(SEED)
    model = encoder_only.build_model(task="tagging")
    rows.append(train_and_show(encoder_only, model, encoder_only.create_dataloaders(BATCH_SIZE, SEED, "tagging")))

    print("\n2. DECODER-ONLY (GPT): reads from left to right, writes what comes next. Made to generate: the\n"
          "   digits are the beginning of a text; how does it go on?")
    torch.manual_seed(SEED)
    model = decoder_only.build_model()
    loaders = decoder_only.create_dataloaders(BATCH_SIZE, SEED, loss_on_prompt=False)
    rows.append(train_and_show(decoder_only, model, loaders))

    print("\n3. ENCODER-DECODER (T5): reads one text, writes another. Made to transform: digits in, words out.")
    torch.manual_seed(SEED)
    model = encoder_decoder.build_model()
    rows.append(train_and_show(encoder_decoder, model, encoder_decoder.create_dataloaders(BATCH_SIZE, SEED)))
    encoder_decoder.show_alignment(model, 90210)

    print(f"\n{'':18}{'its work here':22}{'parameters':>12}{'steps':>8}{'training':>10}{'held-out exact':>16}")
    for (name, *cells), work in zip(rows, ["place of each digit", "digits -> words", "digits -> words"]):
        print(f"{name:18}{work:22}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (12, 8, 10, 16))))
    print(f"All in {time.perf_counter() - start:.0f} seconds.\n\nNext:\n"
          "  python toy_dataset.py             the language, and how each of the three is fed it\n"
          "  python encoder_only.py            and then decoder_only.py, encoder_decoder.py: run them, read\n"
          "                                    them, change a constant at the top, run them again\n"
          "  python compare_architectures.py   which architecture for what, measured")


if __name__ == "__main__":
    run_script(main)
