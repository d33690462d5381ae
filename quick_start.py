"""quick_start.py - three transformers, trained from scratch and evaluated, in about a minute on two CPU cores.

    python quick_start.py

Each model is trained on its native task with 10,000 numbers, 1% of a small language, and evaluated on 2,000 held-out
ones. You will see the loss fall and the accuracy rise, sample answers, one model's cross-attention drawn as text, and a
summary table. Nothing is saved. Each architecture file, run on its own, trains longer, shows more, and saves a
checkpoint.
"""

import time

import torch

import decoder_only
import encoder_decoder
import encoder_only
from toy_dataset import MAX_DIGITS, NUM_TRAIN, NUM_VALIDATION, number_to_words, run_script

BATCH_SIZE = 128                                                                 # examples per step. Try 32, 512
NUM_EPOCHS = {"encoder_only": 2, "decoder_only": 4, "encoder_decoder": 3}        # epochs. Try 1 for each
SEED = 0                                                                         # Try 1: how much is seed noise?
EXAMPLES = [42, 342, 7001, 90210, 600006]                                        # example numbers. Try your own


def train_and_show(module, model, loaders) -> list:
    """Train one model, print its answers, and return its row of the summary table."""
    start = time.perf_counter()
    history = module.train(model, loaders, NUM_EPOCHS[module.__name__], num_evaluations=4)
    seconds = time.perf_counter() - start
    print("  " + "\n  ".join(module.answer(model, EXAMPLES)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    exact = history[-1]["exact_match"]
    return [module.__name__, f"{parameters:,}", f"{len(history)}", f"{seconds:.0f} s", f"{exact:.2%}"]


def main() -> None:
    """Train all three models with the same seed, and print a summary table."""
    start = time.perf_counter()
    print(f"THREE TRANSFORMERS, ONE SMALL LANGUAGE: numbers of up to {MAX_DIGITS} digits and their English names.\n"
          f"  90210 <-> {' '.join(number_to_words(90210))}\n"
          f"Each model is trained on {NUM_TRAIN:,} numbers and evaluated on {NUM_VALIDATION:,} held-out ones (exact: "
          f"exact match).")
    rows = []

    print("\n1. ENCODER-ONLY (BERT, here without pretraining): bidirectional attention.\n"
          "   Task: label each digit's place value.")
    torch.manual_seed(SEED)
    model = encoder_only.build_model(task="tagging")
    rows.append(train_and_show(encoder_only, model, encoder_only.create_dataloaders(BATCH_SIZE, SEED, "tagging")))

    print("\n2. DECODER-ONLY (GPT): causal attention.\n"
          "   Task: generation from a prompt. The digits are the prompt, the name is the continuation.")
    torch.manual_seed(SEED)
    model = decoder_only.build_model()
    loaders = decoder_only.create_dataloaders(BATCH_SIZE, SEED, loss_on_prompt=False)
    rows.append(train_and_show(decoder_only, model, loaders))

    print("\n3. ENCODER-DECODER (T5, here without pretraining): two stacks, joined by cross-attention.\n"
          "   Task: sequence to sequence, digits in, words out.")
    torch.manual_seed(SEED)
    model = encoder_decoder.build_model()
    rows.append(train_and_show(encoder_decoder, model, encoder_decoder.create_dataloaders(BATCH_SIZE, SEED)))
    encoder_decoder.show_alignment(model, 90210)

    print(f"\n{'':18}{'task':22}{'parameters':>12}{'steps':>8}{'training':>10}{'exact match':>16}")
    for (name, *cells), task in zip(rows, ["place values", "digits -> words", "digits -> words"]):
        print(f"{name:18}{task:22}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (12, 8, 10, 16))))
    print(f"Total: {time.perf_counter() - start:.0f} seconds.\n\nNext:\n"
          "  python toy_dataset.py             the language, and each model's input format\n"
          "  python encoder_only.py            then decoder_only.py and encoder_decoder.py: run and read them,\n"
          "                                    change a constant at the top, run again\n"
          "  python compare_architectures.py   which architecture for which task, measured")


if __name__ == "__main__":
    run_script(main)
