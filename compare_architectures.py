"""compare_architectures.py - which architecture for which task? Everything measured, nothing asserted.

    python compare_architectures.py

Three architectures, three tasks: understand (what is each digit's place value?), transform (digits to words) and
generate (sample a new number and its name unconditionally). Each of the nine combinations, a cell of the table, is
trained here from scratch with three seeds and tested on held-out numbers. All cells have the same width, layers per
stack, training numbers and steps; the learning rate is the best of three for each architecture (see LEARNING_RATES).
You will see, in under five minutes on two idle CPU cores:

    the table         exact match (mean and range over the seeds), parameters, training time, latency, forward passes
    the wall          the best expected accuracy of ANY causal tagger on place values, computed; who exceeds it
    strategies        greedy, temperature, top-k, top-p and repetition penalty on the same prompts
    beam search       against greedy decoding, with a trained and with an undertrained model
    KV cache          against recomputing everything, by length
    decision guide    verdicts computed from these numbers; differences within the seed noise do not count

All numbers are also written to figures/comparison.json, which visualizations.py draws. Nothing else is saved.
"""

import json
import logging
import math
import os
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from tqdm import tqdm

import decoder_only
import encoder_decoder
import encoder_only
import toy_dataset
from toy_dataset import CLS_ID, DIGITS, EOS_ID, IGNORE, MASK_ID, MAX_DIGITS, MAX_WORDS, ONES, SEP_ID
from toy_dataset import SOS_ID, SPECIAL_TOKENS, VOCABULARY, InputError, number_to_words, pad_batch, run_script, to_ids

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- shared by all cells; half the width of the architecture files, so that 30 training runs fit into five minutes ---
D_MODEL = 64           # width of the residual stream. Try 32: which cells suffer first?
NUM_LAYERS = 2         # per stack; an encoder-decoder has two stacks. Try 1
NUM_HEADS = 4          # attention heads per layer. Try 1
D_FF = 256             # hidden width of the feed-forward networks. Try 64
BATCH_SIZE = 32        # examples per step. Try 128 with NUM_EPOCHS = 8: equal steps, four times the examples
NUM_EPOCHS = 2         # passes over the training numbers. Try 1 (which cells learn fastest?), 10
# The best of three for each architecture: mean exact match of its three tasks on the validation numbers, with a seed
# that is not used otherwise (search_learning_rates). Measured, in percent: understand / transform / generate
#                    2e-3                  4e-3                  8e-3
#   encoder-only     100.0 / 93.9 /  3.0   100.0 / 94.8 /  8.8   100.0 / 96.2 /  2.8
#   decoder-only       1.5 / 99.4 / 94.6     1.5 / 99.6 / 97.6     5.6 / 99.4 / 98.6
#   encoder-decoder  100.0 /100.0 / 83.4   100.0 /100.0 / 92.8   100.0 /100.0 / 95.8
LEARNING_RATES = {"encoder_only": 4e-3, "decoder_only": 8e-3, "encoder_decoder": 8e-3}
NUM_SEEDS = 3          # training runs per cell. Try 5: more time, wider ranges
SEED = 0               # decides the seeds of all runs; no two values share a run. Try 1, 2: do the verdicts hold?

# --- evaluation ---
NUM_TESTED = 2_000     # held-out numbers per run. Try 300 (noisier), 20_000
NUM_SAMPLES = 500      # unconditional samples, and prompts per decoding strategy. Try 100
NUM_TIMED = 8          # answers timed, one at a time. Try 50
NUM_ROUNDS = 10        # timings of each row, interleaved with those of the others; the median counts. Try 30
TOP_P = 0.9            # top-p for unconditional sampling. Try 1.0: the model's full distribution
MARGIN = 0.03          # differences in accuracy below this do not count. With 0.01, two of the 20 verdicts differed
                       # between SEED = 1 and 2, with 0.025 one between 0 and 1; with 0.03 all three agree
BEAM_WIDTH = 5         # hypotheses kept by beam search. Try 2, 10
UNDERTRAINED = 4_000   # training numbers, each seen once, of the undertrained model in beam search. Try 8_000
CACHE_LENGTHS = [32, 64, 128, 256, 512]  # tokens in the cache when the next one is generated. Try adding 1000

COMPARISON = Path(__file__).parent / "figures" / "comparison.json"

SIZES = {"d_model": D_MODEL, "num_layers": NUM_LAYERS, "num_heads": NUM_HEADS, "d_ff": D_FF}
SEEDS = [NUM_SEEDS * SEED + i for i in range(NUM_SEEDS)]
LONGEST = MAX_DIGITS + 1 + MAX_WORDS + 1  # digits, <SEP>, words, <EOS>: the longest text in the language
DIGIT_IDS = torch.tensor(to_ids(DIGITS))
# Decoding settings are given in full, so that those at the top of the architecture files have no effect here.
GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}
SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": TOP_P}
COUNTS = ["BATCH_SIZE", "NUM_EPOCHS", "NUM_SEEDS", "NUM_TESTED", "NUM_SAMPLES", "NUM_TIMED", "NUM_ROUNDS", "BEAM_WIDTH",
          "UNDERTRAINED"]  # checked to be at least 1
STRATEGIES = {
    "greedy": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.0": {"temperature": 1.0},
    "temperature 1.5": {"temperature": 1.5},
    "top-k 5": {"temperature": 1.0, "top_k": 5},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "repetition penalty 2": {"repetition_penalty": 2.0},
}
# The guide compares one setting of each kind. The other temperatures, 0.7 and 1.0, would get no stable verdict: with
# SEED = 1 they gave 78% and 81% new samples, top-p 0.9 gave 84%, and the seeds of each were 4 to 5 points apart.
GUIDED = ["greedy", "temperature 1.5", "top-k 5", "top-p 0.9", "repetition penalty 2"]
# Constants of the architecture files that the numbers also depend on: a comparison needs them equal in all three.
SHARED = ["DROPOUT", "MAX_LENGTH", "WARMUP_STEPS", "FINAL_LEARNING_RATE_RATIO", "WEIGHT_DECAY", "GRAD_CLIP"]

# ======================================================================================================
# TASKS: what each cell is trained on, and how it answers
# ======================================================================================================
# An example has the fields that its architecture's predict() expects. An answer is a string. Place values are written
# as number words, the power of ten (3 4 2 -> two one zero), so the vocabulary needs no new tokens.


def place_words(number: int) -> list[str]:
    """Each digit's place value, as the power of ten.

    >>> place_words(342)       # hundreds, tens, ones
    ['two', 'one', 'zero']
    """
    return [ONES[place] for place in reversed(range(len(str(number))))]


def streaming_example(number: int) -> dict:
    """Decoder-only, place values: each digit is labeled as it is read, before the next one.

    ids      <SEP>  3    4    2
    targets    -   two  one  zero

    decoder_only.evaluate scores the positions from <SEP> on.
    """
    return {"ids": to_ids(["<SEP>", *str(number)]), "targets": [IGNORE, *to_ids(place_words(number))]}


def after_reading_example(number: int) -> dict:
    """Decoder-only, place values: the labels are generated after all digits have been read.

    ids      <SOS>  3  4  2  <SEP>  two  one  zero
    targets    -    -  -  -   two   one  zero <EOS>
    """
    prompt, answer = decoder_only.make_prompt(number), to_ids([*place_words(number), "<EOS>"])
    return {"ids": prompt + answer[:-1], "targets": [IGNORE] * (len(prompt) - 1) + answer}


def translated_places_example(number: int) -> dict:
    """Encoder-decoder, place values: the digits are the source, their place values the target.

    source   3 4 2 <EOS>
    target   <SOS> two one  zero
    targets   two  one zero <EOS>
    """
    words = to_ids(place_words(number))
    return {"source": encoder_decoder.make_source(number), "target": [SOS_ID, *words], "targets": [*words, EOS_ID]}


def one_pass_example(number: int) -> dict:
    """Encoder-only, digits to words: all words at once. The number of masks is fixed (the longest name), so that it
    leaks nothing; <SEP> ends the name, and later positions have no target.

    ids      <CLS> 3 4 2 <SEP> <MASK> <MASK>  <MASK> <MASK> <MASK> <MASK> ...
    targets    -   - - -   -   three  hundred forty   two   <SEP>    -    ...
    """
    prompt, words = to_ids(["<CLS>", *str(number), "<SEP>"]), to_ids([*number_to_words(number), "<SEP>"])
    return {"ids": prompt + [MASK_ID] * (MAX_WORDS + 1),
            "targets": [IGNORE] * len(prompt) + words + [IGNORE] * (MAX_WORDS + 1 - len(words))}


def empty_source_example(number: int) -> dict:
    """Encoder-decoder, unconditional generation: an empty source, and the whole text as the target.

    source   <EOS>
    target   <SOS> 3 4   2   <SEP>  three  hundred forty  two
    targets    3   4 2 <SEP> three hundred  forty   two  <EOS>
    """
    text = to_ids([*str(number), "<SEP>", *number_to_words(number)])
    return {"source": [EOS_ID], "target": [SOS_ID, *text], "targets": [*text, EOS_ID]}


@torch.no_grad()
def predict_at(asked: torch.Tensor, make_example, names, model, numbers) -> list[str]:
    """One forward pass: the predicted classes at the positions whose ids are in `asked`, up to <SEP>."""
    ids = pad_batch([{"ids": make_example(number)["ids"]} for number in numbers])["ids"]  # (B, T)
    predicted = model(ids.to(next(model.parameters()).device)).argmax(dim=-1).cpu()     # (B, T)
    return [" ".join(names[i] for i in row[where].tolist()).partition(" <SEP>")[0]
            for row, where in zip(predicted, torch.isin(ids, asked))]


def complete(model, numbers, make_prompt=decoder_only.make_prompt, **settings) -> list[str]:
    """Decoder-only: the continuation of the prompt. Greedy unless `settings` say otherwise."""
    settings = GREEDY | {"repetition_penalty": 1.0} | settings
    prompts = [make_prompt(number) for number in numbers]
    return [decoder_only.to_words(ids) for ids in decoder_only.generate(model, prompts, LONGEST, **settings)]


def translate(model, numbers, make_source=encoder_decoder.make_source, **settings) -> list[str]:
    """Encoder-decoder: the target generated for the source. Greedy unless `settings` say otherwise."""
    sources = [make_source(number) for number in numbers]
    return [encoder_decoder.to_words(ids)
            for ids in encoder_decoder.generate(model, sources, LONGEST, **GREEDY | settings)]


@torch.no_grad()
def fill_all(model, numbers) -> list[str]:
    """Encoder-only, unconditional generation: as many texts as there are numbers, from masks alone.

    A masked LM does not model length, so lengths are sampled from the training numbers. The masks are then filled one
    at a time from right to left, each token sampled given those already filled (simplified from Wang & Cho 2019, who
    resample positions many times). Mask-predict takes the argmax, so equal lengths would give equal texts.
    """
    train = toy_dataset.make_splits().train
    drawn = [train[i] for i in torch.randint(len(train), (len(numbers),)).tolist()]
    prompts = [[CLS_ID] + [MASK_ID] * len(str(n)) + [SEP_ID] + [MASK_ID] * len(number_to_words(n)) for n in drawn]
    ids = pad_batch([{"ids": prompt + [SEP_ID]} for prompt in prompts])["ids"].to(next(model.parameters()).device)
    for column in reversed(range(ids.size(1))):
        masked = ids[:, column] == MASK_ID                                              # (B)
        if masked.any():
            logits = model(ids)[:, column].float()                                      # (B, V)
            logits[:, : len(SPECIAL_TOKENS)] = -math.inf
            new = decoder_only.choose_tokens(logits, **SAMPLING, generator=None)        # (B)
            ids[:, column] = torch.where(masked, new, ids[:, column])
    return [" ".join(toy_dataset.to_tokens(row)[1:-1]) for row in ids.tolist()]


class Cell(NamedTuple):
    """One cell of the table: an architecture on a task."""

    module: ModuleType
    task: str
    native: bool                   # is it the task that the architecture was designed for?
    how: str                       # how it does the task
    make_example: Callable         # number -> training example
    answer: Callable               # (model, numbers) -> texts, one for each number
    truth: Callable | None         # number -> the words of the correct answer; None: any valid text is correct
    options: dict = {}             # of its build_model

    @property
    def name(self) -> str:
        return f"{self.module.__name__.replace('_', '-')}, {self.task}"


CELLS = [
    Cell(encoder_only, "understand", True, "labels all digits in one pass",
         toy_dataset.tagging_example, partial(predict_at, DIGIT_IDS, toy_dataset.tagging_example, ONES), place_words,
         {"task": "tagging"}),
    Cell(decoder_only, "understand", False, "labels each digit as it reads it",
         streaming_example, partial(predict_at, DIGIT_IDS, streaming_example, VOCABULARY), place_words),
    Cell(encoder_decoder, "understand", False, "reads all digits, generates a word for each",
         translated_places_example, translate, place_words),
    Cell(encoder_only, "transform", False, "predicts all words in one pass",
         one_pass_example, partial(predict_at, torch.tensor([MASK_ID]), one_pass_example, VOCABULARY), number_to_words,
         {"task": "masked_lm"}),
    Cell(decoder_only, "transform", False, "reads the digits as a prompt, then continues with the name",
         partial(toy_dataset.decoder_only_example, loss_on_prompt=False), complete, number_to_words),
    Cell(encoder_decoder, "transform", True, "reads the digits, then generates the name",
         toy_dataset.encoder_decoder_example, translate, number_to_words),
    Cell(encoder_only, "generate", False, "fills an all-mask sequence of given length, right to left",
         toy_dataset.masked_lm_example, fill_all, None, {"task": "masked_lm"}),
    Cell(decoder_only, "generate", True, "samples token by token after <SOS>",
         toy_dataset.decoder_only_example, partial(complete, make_prompt=lambda _: [SOS_ID], **SAMPLING), None),
    Cell(encoder_decoder, "generate", False, "reads an empty source, then samples token by token",
         empty_source_example, partial(translate, make_source=lambda _: [EOS_ID], **SAMPLING), None),
]
# Not one of the nine: the same architecture and data as one of them, but the labels come after the whole input.
AFTER_READING = Cell(decoder_only, "understand after reading", False, "reads all digits, generates a word for each",
                     after_reading_example, complete, place_words)

# ======================================================================================================
# TRAINING
# ======================================================================================================


def check_constants() -> None:
    """Reject constants that cannot work, or that would make the comparison unfair. Raises InputError."""
    num_test = len(toy_dataset.make_splits().test)
    counts = {name: globals()[name] for name in COUNTS}
    for name, value in (counts | {"the shortest of CACHE_LENGTHS": min(CACHE_LENGTHS, default=0)}).items():
        if not (isinstance(value, int) and value >= 1):
            raise InputError(f"{name} = {value} must be a whole number, at least 1.")
        if name in ("NUM_TESTED", "NUM_SAMPLES", "NUM_TIMED") and value > num_test:
            raise InputError(f"{name} = {value} must be at most {num_test}, the size of the test split.")
    if not 0 < TOP_P <= 1:
        raise InputError(f"TOP_P = {TOP_P} must be above 0 and at most 1: 0.9 works.")
    if encoder_only.MAX_LENGTH <= LONGEST:
        raise InputError(f"MAX_LENGTH = {encoder_only.MAX_LENGTH} in the architecture files must be above {LONGEST}, "
                         "the longest text: digits and words.")
    for name in SHARED:
        values = [getattr(module, name) for module in (encoder_only, decoder_only, encoder_decoder)]
        if len(set(values)) > 1:
            raise InputError(f"{name} is {', '.join(map(str, values))} in encoder_only.py, decoder_only.py and "
                             "encoder_decoder.py: to compare them, set it to the same value in all three.")


def held_out_numbers(count: int, split="test") -> list[int]:
    """Numbers of a split, with their lengths as evenly distributed as it allows."""
    held_out = getattr(toy_dataset.make_splits(), split)
    by_length = [[n for n in held_out if len(str(n)) == length] for length in range(1, MAX_DIGITS + 1)]
    counts = toy_dataset.spread_evenly(count, [len(numbers) for numbers in by_length])
    return [n for numbers, share in zip(by_length, counts) for n in numbers[:share]]


def train_cell(cell: Cell, seed: int, bar, num_epochs=NUM_EPOCHS, num_train=None, num_evaluations=0, rate=None):
    """Train a new model for a cell. Returns it and its history."""
    bar.set_description(cell.name)
    torch.manual_seed(seed)
    model = cell.module.build_model(**SIZES, **cell.options)
    loaders = toy_dataset.make_dataloaders(cell.make_example, BATCH_SIZE, seed, num_train)
    few = {field: values[:400] for field, values in next(iter(loaders.validation)).items()}  # enough for a curve
    history = cell.module.train(model, loaders._replace(validation=[few]), num_epochs,
                                rate or LEARNING_RATES[cell.module.__name__], num_evaluations, progress=bar)
    return model.eval(), history


def thin_out(history: list[dict], every: int = 20) -> list[dict]:
    """A history short enough for a plot: the mean loss since the last point, and exact_match where it was measured."""
    points, losses = [], []
    for entry in history:
        losses.append(entry["loss"])
        if len(losses) == every or "exact_match" in entry:
            points.append({"step": entry["step"], "loss": statistics.fmean(losses)})
            if "exact_match" in entry:
                points[-1]["exact_match"] = entry["exact_match"]
            losses = []
    return points


# ======================================================================================================
# MEASURING
# ======================================================================================================


def score(answers: list[str], truths: list[str]) -> dict:
    """Exact-match accuracy, token accuracy, and token accuracy by position from the left.

    In an answer that is too short the missing tokens count as wrong. Surplus tokens count only against exact match.
    """
    hits, asked = Counter(), Counter()
    for answer, truth in zip(answers, truths):
        tokens = answer.split()
        for i, token in enumerate(truth.split()):
            asked[i] += 1
            hits[i] += tokens[i : i + 1] == [token]
    return {"sequence_accuracy": statistics.fmean(a == t for a, t in zip(answers, truths)),
            "token_accuracy": hits.total() / asked.total(),
            "by_position": [hits[i] / asked[i] for i in sorted(asked)]}


def read_text(text: str) -> int | None:
    """The number, if a text is its digits, <SEP> and its name; else None."""
    digits, _, words = text.partition(" <SEP> ")
    try:
        number = toy_dataset.parse_number(digits.replace(" ", ""))
        return number if toy_dataset.words_to_number(words.split()) == number else None
    except InputError:
        return None


def score_samples(texts: list[str]) -> dict:
    """The shares of unconditional samples that are valid (digits and words agree), distinct (different texts), and new:
    valid, distinct, and of a number that is not in the training split."""
    numbers = [read_text(text) for text in texts]
    new = set(numbers) - {None} - set(toy_dataset.make_splits().train)
    return {"valid": statistics.fmean(number is not None for number in numbers),
            "distinct": len(set(texts)) / len(texts), "new": len(new) / len(texts)}


def measure_cell(cell: Cell, model, seed: int, split="test") -> dict:
    """Accuracy of a trained cell on held-out numbers."""
    torch.manual_seed(seed)  # for sampling
    if cell.truth is None:
        found = score_samples(cell.answer(model, range(NUM_SAMPLES)))
        return {"sequence_accuracy": found["valid"], **found}
    numbers = held_out_numbers(NUM_TESTED, split)
    return score(cell.answer(model, numbers), [" ".join(cell.truth(number)) for number in numbers])


def summarize(runs: list[dict]) -> dict:
    """The mean over the seeds of each measurement; by_seed has the individual values."""
    by_seed = {key: [run[key] for run in runs] for key in runs[0]}
    means = {key: [*map(statistics.fmean, zip(*values))] if isinstance(values[0], list) else statistics.fmean(values)
             for key, values in by_seed.items()}
    return means | {"by_seed": by_seed}


def run_cell(cell: Cell, bar) -> tuple[dict, list]:
    """Train and evaluate a cell once per seed. Returns its entry in comparison.json, and the models."""
    runs, models, histories = [], [], []
    for seed in SEEDS:
        start = time.perf_counter()
        model, history = train_cell(cell, seed, bar, num_evaluations=0 if models else 10)  # one curve is drawn
        runs.append({"train_seconds": time.perf_counter() - start, **measure_cell(cell, model, seed)})
        models.append(model)
        histories.append(history)
    about = {"name": cell.name, "architecture": cell.module.__name__, "task": cell.task, "native": cell.native,
             "how": cell.how, "parameters": sum(parameter.numel() for parameter in models[0].parameters())}
    return about | summarize(runs) | {"history": thin_out(histories[0])}, models


def search_learning_rates(rates=(2e-3, 4e-3, 8e-3), seed=100) -> None:
    """How LEARNING_RATES were found: each cell's exact match on the validation numbers, by peak learning rate.

    python -c "import compare_architectures; compare_architectures.search_learning_rates()"     (some minutes)
    """
    with tqdm(disable=True) as bar:
        for cell in [*CELLS, AFTER_READING]:
            models = [train_cell(cell, seed, bar, rate=rate)[0] for rate in rates]
            shares = [measure_cell(cell, model, seed, "validation")["sequence_accuracy"] for model in models]
            print(f"{cell.name:40}" + "".join(f"{share:10.2%}" for share in shares), flush=True)


def time_interleaved(calls: dict) -> dict:
    """Milliseconds per call: name -> function becomes name -> median.

    Timer warms up before each timing and waits for a GPU. The rows take turns, so that other load on the computer
    slows all of them alike, and the median ignores the rounds in which it was busy.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # its import warns if there is no GPU
    from torch.utils.benchmark import Timer

    timers = {name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
              for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    for _ in range(NUM_ROUNDS):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(1).median)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def time_cells(cells: list[Cell], models: dict[str, list]) -> list[dict]:
    """Latency at batch size 1, what a single user waits for, and forward passes through a stack of layers per answer.
    Passes are counted at the embedding, which an encoder-decoder's two stacks share."""
    def answer_one_by_one(cell):
        torch.manual_seed(SEED)  # so that samples have the same lengths each time
        for number in held_out_numbers(NUM_TIMED):
            cell.answer(models[cell.name][0], [number])

    times = time_interleaved({cell.name: partial(answer_one_by_one, cell) for cell in cells})
    measured = []
    for cell in cells:
        passes = []
        hook = models[cell.name][0].embedding.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        answer_one_by_one(cell)
        hook.remove()
        measured.append({"ms_per_answer": times[cell.name] / NUM_TIMED, "forward_passes": len(passes) / NUM_TIMED})
    return measured


def count_parameters(model) -> dict[str, int]:
    """Parameters by component, for visualizations.py; each parameter belongs to exactly one."""
    components = dict.fromkeys(["token embedding", "self-attention", "cross-attention", "feed-forward", "norms",
                                "head"], 0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            component = "norms"
        elif "cross_attention" in name:
            component = "cross-attention"
        elif "attention" in name:
            component = "self-attention"
        elif "feed_forward" in name:
            component = "feed-forward"
        else:
            component = "token embedding" if name.startswith("embedding") else "head"
        components[component] += parameter.numel()
    return components


def causal_ceiling(numbers: list[int]) -> tuple[float, list[float]]:
    """The best expected accuracy of ANY causal tagger on the place values of these numbers, however large it is:
    over all digits, and by position.

    It must label digit i having seen only the digits up to i, while the label depends on how many follow. Within each
    length the numbers are drawn uniformly, so the digits themselves say nothing about the length; only their count
    does: there are at least i. At each position, the Bayes-optimal tagger assumes the most common length among those
    still possible. At position i it is correct for

        max over the lengths L >= i of (how many numbers have L digits)

    of the numbers that have a digit there. It is given how common each length is in the test, but not which numbers
    are in it. A measured accuracy can exceed this expectation by the sampling error of the test set.

    >>> causal_ceiling([7, 34, 342])     # lengths 1, 2, 3, one of each: 3 of 6 digits
    (0.5, [0.3333333333333333, 0.5, 1.0])
    """
    lengths = Counter(len(str(number)) for number in numbers)
    still_possible = [[count for length, count in lengths.items() if length > i] for i in range(max(lengths))]
    hits, asked = list(map(max, still_possible)), list(map(sum, still_possible))
    return sum(hits) / sum(asked), [h / a for h, a in zip(hits, asked)]


def build_wall(entries: list[dict], after_reading: dict) -> dict:
    """The ceiling and each model's token accuracy on place values: overall, and by position from the left."""
    found = {entry["architecture"]: entry for entry in entries if entry["task"] == "understand"}
    readers = {"causal": found["decoder_only"], "after_reading": after_reading,
               "bidirectional": found["encoder_only"], "encoder_decoder": found["encoder_decoder"]}
    ceiling, by_position = causal_ceiling(held_out_numbers(NUM_TESTED))
    return {"ceiling": ceiling, **{name: entry["token_accuracy"] for name, entry in readers.items()},
            "by_position": {"ceiling": by_position, **{name: entry["by_position"] for name, entry in readers.items()}}}


# ======================================================================================================
# DECODING: strategies, beam search, KV cache
# ======================================================================================================


def measure_strategies(models: list) -> list[dict]:
    """Each decoding strategy with the same decoder-only models and prompts: held-out numbers to name, and <SOS> alone
    for unconditional samples."""
    numbers = held_out_numbers(NUM_SAMPLES)
    names = [" ".join(number_to_words(number)) for number in numbers]
    few = held_out_numbers(min(NUM_SAMPLES, 100))
    times = time_interleaved({name: partial(complete, models[0], few, **STRATEGIES[name]) for name in STRATEGIES})
    rows = []
    for strategy, settings in STRATEGIES.items():
        runs = []
        for model, seed in zip(models, SEEDS):
            torch.manual_seed(seed)
            named = score(complete(model, numbers, **settings), names)["sequence_accuracy"]
            samples = complete(model, numbers, make_prompt=lambda _: [SOS_ID], **settings)
            runs.append({"named": named, **score_samples(samples)})
        rows.append({"strategy": strategy, **summarize(runs), "ms_per_answer": times[strategy] / len(few)})
    return rows


def search(model, numbers, beam_width: int) -> tuple[list[str], torch.Tensor]:
    """Encoder-decoder: the best hypothesis for each number, and its log-probability in nats (B). Width 1 is greedy."""
    sources = [encoder_decoder.make_source(number) for number in numbers]
    ids, scores = encoder_decoder.beam_search(model, sources, beam_width, length_penalty=0.0, max_new_tokens=LONGEST)
    return [encoder_decoder.to_words(best) for best in ids[:, 0]], scores[:, 0]


def compare_beam(models: dict[str, list]) -> list[dict]:
    """Greedy decoding and beam search on the same held-out numbers, by trained and by undertrained models."""
    numbers, few = held_out_numbers(NUM_SAMPLES), held_out_numbers(min(NUM_SAMPLES, 100))
    names = [" ".join(number_to_words(number)) for number in numbers]
    rows = []
    for name, trained in models.items():
        times = time_interleaved({"greedy": partial(translate, trained[0], few),
                                  f"beam width {BEAM_WIDTH}": partial(search, trained[0], few, BEAM_WIDTH)})
        runs = {method: [] for method in times}
        for model in trained:
            results = [search(model, numbers, width) for width in (1, BEAM_WIDTH)]
            for method, (texts, log_probs) in zip(runs, results):
                gains = log_probs - results[0][1]
                runs[method].append({"exact": score(texts, names)["sequence_accuracy"],
                                     "log_probability": log_probs.mean().item(),
                                     "likelier": (gains > 1e-4).float().mean().item(),  # 1e-4: rounding
                                     "less_likely": (gains < -1e-4).float().mean().item()})
        rows += [{"model": name, "method": method, **summarize(found), "ms_per_answer": times[method] / len(few)}
                 for method, found in runs.items()]
    return rows


@torch.no_grad()
def time_cache() -> dict:
    """Milliseconds for one more token by the length of the text so far, with the KV cache and without, at batch size 1.
    The model has decoder_only.py's own sizes and is untrained: the weights make no difference to the time."""
    model = decoder_only.build_model(max_length=max(CACHE_LENGTHS) + 1).eval()
    device = next(model.parameters()).device
    calls, kilobytes = {}, []
    for length in CACHE_LENGTHS:
        ids = torch.randint(len(SPECIAL_TOKENS), len(VOCABULARY), (1, length + 1), device=device)
        cache = model.new_cache()
        model(ids[:, :-1], cache)
        past = [(layer.key, layer.value) for layer in cache]

        def with_cache(ids=ids, cache=cache, past=past):
            for layer, (key, value) in zip(cache, past):
                layer.key, layer.value = key, value  # back to the text without its newest token
            return model(ids, cache)[0, -1].argmax().item()

        calls["cached", length] = with_cache
        calls["recomputed", length] = lambda ids=ids: model(ids)[0, -1].argmax().item()
        kilobytes.append(sum(key.nbytes + value.nbytes for key, value in past) / 1000)
    times = time_interleaved(calls)
    return {"lengths": CACHE_LENGTHS, "cached_ms": [times["cached", length] for length in CACHE_LENGTHS],
            "recomputed_ms": [times["recomputed", length] for length in CACHE_LENGTHS], "cache_kilobytes": kilobytes}


# ======================================================================================================
# THE DECISION GUIDE
# ======================================================================================================


def differ(values: list[float], others: list[float]) -> bool:
    """Do two sets of runs differ beyond seed noise? Their ranges are disjoint, and their means at least MARGIN apart.

    Three runs against three have disjoint ranges by chance in one case of ten, even where nothing differs. The margin
    discards the smaller of these differences, so that another SEED gives the same verdict more often.
    """
    disjoint = min(values) > max(others) or max(values) < min(others)
    return disjoint and abs(statistics.fmean(values) - statistics.fmean(others)) >= MARGIN


def give_verdicts(choices: list[tuple]) -> list[str]:
    """A verdict on each choice (name, accuracies by seed, milliseconds), against the one with the highest mean. The
    best choice is the fastest of those equal to it; if several are about as fast (within a fifth), the first. Without
    milliseconds (None) all count as equally fast."""
    top = max((accuracies for _, accuracies, _ in choices), key=statistics.fmean)
    equal = [not differ(accuracies, top) for _, accuracies, _ in choices]
    times = [ms or 1.0 for _, _, ms in choices]
    fastest = min(ms for ms, is_equal in zip(times, equal) if is_equal)
    best = next(i for i, ms in enumerate(times) if equal[i] and ms <= 1.2 * fastest)
    slower = [ms / times[best] for ms in times]
    return ["best choice" if i == best else "worse" if not equal[i] else
            f"equal, {slower[i]:.1f}x slower" if slower[i] > 1.2 else "equal" for i in range(len(choices))]


def decision_table(found: dict) -> list[tuple]:
    """Rows (question, choice, accuracies by seed, milliseconds, verdict), computed from the measurements."""
    entries = [*found["cells"], found["after_reading"]]
    questions = {f"{task}: {measure}": [
        (entry["name"].replace(f", {task}", ""), entry["by_seed"]["sequence_accuracy"], entry["ms_per_answer"])
        for entry in entries if entry["task"].startswith(task)]
        for task, measure in [("understand", "exact"), ("transform", "exact"), ("generate", "valid")]}
    # A strategy's own cost is small beside the model's, and lost in timing noise, so accuracy alone decides.
    questions |= {question: [(row["strategy"], row["by_seed"][key], None)
                             for row in found["strategies"] if row["strategy"] in GUIDED]
                  for question, key in [("one correct answer", "named"), ("many new answers", "new")]}
    return [(question, *choice, verdict) for question, choices in questions.items()
            for choice, verdict in zip(choices, give_verdicts(choices))]


def guide_sentences(found: dict) -> list[str]:
    """Five sentences for what has no row in the table."""
    wall, cache, sentences = found["wall"], found["kv_cache"], []
    sizes = {cell["architecture"]: cell["parameters"] for cell in found["cells"] if cell["task"] == "transform"}
    for greedy, beam in zip(found["beam"][::2], found["beam"][1::2]):
        gains = [after - before for before, after in zip(greedy["by_seed"]["exact"], beam["by_seed"]["exact"])]
        verdict = "equal to"
        if differ(gains, [0.0]):
            verdict = "in every seed " + ("better than" if gains[0] > 0 else "worse than")
        sentences.append(
            f"Beam search with the {greedy['model']} model: {verdict} greedy ({beam['exact']:.1%} exact, greedy "
            f"{greedy['exact']:.1%}), at {beam['ms_per_answer'] / greedy['ms_per_answer']:.1f} times the cost.")
    return [f"Labels before the input is complete: no causal tagger can expect to label more than "
            f"{wall['ceiling']:.1%} of the digits correctly. Decoder-only measured {wall['causal']:.1%}; after reading "
            f"all, {wall['after_reading']:.1%}.",
            *sentences,
            f"KV cache: after {cache['lengths'][-1]:,} tokens the next one takes {cache['cached_ms'][-1]:.2f} ms, and "
            f"{cache['recomputed_ms'][-1]:.2f} ms without the cache.",
            f"Memory: at the same width and layers per stack, an encoder-decoder has "
            f"{sizes['encoder_decoder'] / sizes['decoder_only']:.1f} times the parameters of a decoder-only model."]


# ======================================================================================================
# WHAT IS PRINTED
# ======================================================================================================


def percent(shares: list[float]) -> tuple[float, str]:
    """Mean and range over the seeds, in percent."""
    return 100 * statistics.fmean(shares), f"{100 * min(shares):.2f}-{100 * max(shares):.2f}"


def show(heading: str, columns: str, rows: list[tuple]) -> None:
    """Print a table under its heading, in lines of at most 100 columns: text left-aligned, numbers right-aligned."""
    print("\n" + textwrap.fill(heading, 98, break_on_hyphens=False) + "\n")
    columns = ["", *columns.split()]
    rows = [columns] + [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) if column in ("", "choice", "verdict") else cell.rjust(width)
                               for cell, width, column in zip(row, widths, columns)).rstrip())


def show_measurements(found: dict) -> None:
    """All tables except the guide."""
    show(f"THE TABLE: {NUM_SEEDS} seeds, tested on {NUM_TESTED:,} held-out numbers (generate: {NUM_SAMPLES} samples, "
         f"top-p {TOP_P}). exact: exact match in percent, mean and range over the seeds (generate: valid samples, in "
         "which digits and words agree). train: seconds. ms, passes: latency of one answer at batch size 1, and passes "
         "through a stack of layers. *: the architecture's native task.", "exact range parameters train ms passes",
         [(entry["name"] + " *" * entry["native"], *percent(entry["by_seed"]["sequence_accuracy"]),
           f"{entry['parameters']:,}", entry["train_seconds"], entry["ms_per_answer"], entry["forward_passes"])
          for entry in [*found["cells"], found["after_reading"]]])
    wall = found["wall"]
    names = {"ceiling": "optimal causal tagger (expected)", "causal": "decoder-only, while reading",
             "after_reading": "decoder-only, after reading", "bidirectional": "encoder-only",
             "encoder_decoder": "encoder-decoder"}
    show("THE WALL: accuracy per digit on place values in percent, overall and by position from the left. The place "
         "value of the 3 in 342 depends on how many digits follow. The first row is computed, not trained: the "
         "expected accuracy of the optimal tagger that sees only the digits so far.",
         " ".join(["all", *map(str, range(1, MAX_DIGITS + 1))]),
         [(name, *(f"{100 * share:.1f}" for share in [wall[key], *wall["by_position"][key]]))
          for key, name in names.items()])
    show(f"STRATEGIES: decoder-only, {NUM_SAMPLES} held-out numbers to name and {NUM_SAMPLES} unconditional samples "
         "per seed. named: exact match. Of the samples: distinct (different texts), valid, new (valid, distinct, and "
         "not a training number). ms: of one name in a batch.", "named range distinct valid new range ms",
         [(row["strategy"], *percent(row["by_seed"]["named"]), 100 * row["distinct"], 100 * row["valid"],
           *percent(row["by_seed"]["new"]), row["ms_per_answer"]) for row in found["strategies"]])
    show(f"BEAM SEARCH: encoder-decoder, {NUM_SAMPLES} held-out numbers. The undertrained model has seen "
         f"{UNDERTRAINED:,} training numbers once. likelier, less: share of the texts whose log-probability is higher, "
         "or lower, than that of greedy's text. log-p: the mean log-probability. ms: per name, batched.",
         "exact range log-p likelier less ms",
         [(f"{row['model']}, {row['method']}", *percent(row["by_seed"]["exact"]), f"{row['log_probability']:.4f}",
           100 * row["likelier"], 100 * row["less_likely"], row["ms_per_answer"]) for row in found["beam"]])
    show("KV CACHE: milliseconds for one more token at batch size 1, by the number of tokens so far.",
         "cached recomputed ratio cache-kB",
         [(f"{length:,} tokens", cached, recomputed, recomputed / cached, f"{size:,.0f}")
          for length, cached, recomputed, size in zip(*found["kv_cache"].values())])


def show_guide(found: dict) -> None:
    """The decision guide: a table, and sentences for what has no row in it."""
    show(f"DECISION GUIDE: percent, mean and range over {NUM_SEEDS} seeds; milliseconds. Two choices are equal "
         f"unless their ranges are disjoint and their means at least {100 * MARGIN:g} apart. The best choice is the "
         "fastest of those equal to the most accurate; if several are about as fast, the first.",
         "choice mean range ms verdict",
         [(question, choice, *percent(accuracies), ms or "-", verdict)
          for question, choice, accuracies, ms, verdict in decision_table(found)])
    print()
    for sentence in guide_sentences(found):
        print(textwrap.fill(sentence, 98, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False))


# ======================================================================================================
# RUNNING THIS FILE
# ======================================================================================================
# figures/comparison.json: constants, cells (the nine), after_reading, wall, strategies, beam, kv_cache, as returned
# by compare(). Shares are from 0 to 1, means over the seeds; by_seed has the individual values.


def all_constants() -> dict:
    """All that the numbers depend on: constants of this file, of the architecture files and of the data; and, since
    they affect rounding and timing, PyTorch's version, the device and the number of threads."""
    names = [*COUNTS, "D_MODEL", "NUM_LAYERS", "NUM_HEADS", "D_FF", "LEARNING_RATES", "SEED", "TOP_P", "CACHE_LENGTHS",
             "STRATEGIES"]
    of_data = ["MAX_DIGITS", "NUM_TRAIN", "NUM_VALIDATION", "NUM_TEST", "SEED"]
    of_cached_model = ["D_MODEL", "NUM_LAYERS", "NUM_HEADS", "D_FF"]
    return {**{name: globals()[name] for name in names},
            **{f"toy_dataset.{name}": getattr(toy_dataset, name) for name in of_data},
            **{f"decoder_only.{name}": getattr(decoder_only, name) for name in [*SHARED, *of_cached_model]},
            "encoder_only.MASK_PROBABILITY": encoder_only.MASK_PROBABILITY, "torch": torch.__version__,
            "device": str(decoder_only.get_device()), "threads": torch.get_num_threads()}


def save(found: dict) -> None:
    """Write all numbers, to five significant digits. Atomic: COMPARISON is always a complete file, old or new."""
    found = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.5g}"))
    temporary = COMPARISON.with_name(COMPARISON.name + ".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(temporary, COMPARISON)


def compare() -> dict:
    """Train and measure everything, under one progress bar. Returns what save writes."""
    cells = [*CELLS, AFTER_READING]
    num_train = len(toy_dataset.make_splits().train)
    num_steps = len(cells) * NUM_EPOCHS * math.ceil(num_train / BATCH_SIZE)
    num_steps += math.ceil(min(UNDERTRAINED, num_train) / BATCH_SIZE)
    entries, models = [], {}
    with tqdm(total=NUM_SEEDS * num_steps, ascii=True, ncols=95, mininterval=0.5) as bar:
        for cell in cells:
            entry, models[cell.name] = run_cell(cell, bar)
            entries.append(entry)
        translation = next(cell for cell in CELLS if cell.name == "encoder-decoder, transform")
        undertrained = [train_cell(translation, seed, bar, 1, UNDERTRAINED)[0] for seed in SEEDS]
        bar.set_description("timing and decoding")
        entries = [entry | times for entry, times in zip(entries, time_cells(cells, models))]
        return {"constants": all_constants(), "cells": entries[:-1], "after_reading": entries[-1],
                "wall": build_wall(entries[:-1], entries[-1]),
                "strategies": measure_strategies(models["decoder-only, generate"]),
                "beam": compare_beam({"trained": models[translation.name], "undertrained": undertrained}),
                "kv_cache": time_cache()}


def main() -> None:
    """Compare, print, write."""
    start = time.perf_counter()
    check_constants()
    COMPARISON.parent.mkdir(parents=True, exist_ok=True)  # an error here comes before minutes of training
    if not os.access(COMPARISON.parent, os.W_OK):
        raise PermissionError(f"{COMPARISON.parent} is not writable: change its permissions, or COMPARISON here.")
    constants = all_constants()
    print(textwrap.fill(
        f"THREE ARCHITECTURES, THREE TASKS. Shared by all cells: width {D_MODEL}, {NUM_LAYERS} layers per stack, "
        f"{toy_dataset.NUM_TRAIN:,} training numbers, {NUM_EPOCHS} epochs in batches of {BATCH_SIZE}, seeds "
        f"{', '.join(map(str, SEEDS))}. Measured with PyTorch {constants['torch']}, device {constants['device']}, "
        f"{constants['threads']} threads.", 98) + "\n")
    for cell in [*CELLS, AFTER_READING]:
        print(f"  {cell.name:40}{cell.how}")
    print(flush=True)  # before the progress bar, which writes to stderr
    found = compare()
    show_measurements(found)
    show_guide(found)
    save(found)
    print(f"\nTotal: {time.perf_counter() - start:.0f} seconds. The numbers are in {COMPARISON.parent.name}/"
          f"{COMPARISON.name}.\nNext: python visualizations.py draws them. Or change a constant at the top and run it "
          "again.")


if __name__ == "__main__":
    run_script(main)
