"""compare_architectures.py - which architecture for what? Nothing asserted, everything measured.

    python compare_architectures.py

Three architectures are put to three kinds of work: understand (what is each digit worth?), transform (digits to
words), generate (name a new number out of nothing). That makes nine cells of a table. Each is really trained here,
with the same width, layers, numbers, steps and optimizer as all others, and tested on numbers that it never saw.
Where an architecture must do a work that it was not made for, it is helped as well as it can be, and the output says
how. What you will see, in this order (about four minutes on two CPU cores):

    masks           what may look at what: all that makes the three differ
    examples        what each cell reads, what it must say, what is scored
    the table       T1 to T9: right answers, parameters, training time, time and forward passes per answer
    the wall        the best that ANY left-to-right reader can reach on place values, computed, and who sits on it
    strategies      greedy, temperature, top-k, top-p, repetition penalty, beam search, on the same prompts
    beam search     against greedy, on a model that has learned and on one that has not yet
    KV cache        against computing everything anew, by length
    parameters      by component
    decision guide  every line made of the numbers above, and naming the row that it got them from

All numbers also go to figures/comparison.json, which visualizations.py draws. Nothing else is saved.
"""

import json
import math
import os
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import decoder_only
import encoder_decoder
import encoder_only
import toy_dataset
from toy_dataset import CLS_ID, DIGITS, EOS_ID, IGNORE, MASK_ID, MAX_DIGITS, MAX_WORDS, ONES, PLACES, SEP_ID
from toy_dataset import SOS_ID, SPECIAL_TOKENS, VOCABULARY, InputError, format_mask, make_padding_mask
from toy_dataset import number_to_words, pad_batch, run_script, to_ids

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- the same for every cell ---
D_MODEL = 128          # width: how many numbers describe a token. Try 32: which cells suffer first?
NUM_LAYERS = 2         # of each stack; an encoder-decoder has two stacks. Try 1
NUM_HEADS = 4          # attention patterns side by side. Try 1
D_FF = 512             # inner width of the feed-forward networks. Try 128
BATCH_SIZE = 64        # numbers per step. Try 32, 128
NUM_EPOCHS = 4         # passes over the training numbers. Try 1 (who learns fastest?), 10
LEARNING_RATE = 2e-3   # the peak. Try 1e-3, 2e-4
SEEDS = [0]            # each cell is trained once with each. Try [0, 1, 2]: mean and spread, in three times the time

# --- what is measured ---
NUM_TESTED = 3_000     # held-out numbers that each cell is tested on. Try 300 (more luck), 20_000
NUM_SAMPLES = 500      # texts that are written freely, and prompts of the strategies. Try 100
TOP_P = 0.9            # texts are written freely by drawing tokens with this top-p. Try 1.0: as the model believes
NUM_TIMED = 50         # answers whose time is taken, one by one. Try 10
EARLY_EPOCHS = 1       # training of the "unfinished" model that beam search is tried on. Try 2
BEAM_WIDTH = 5         # of the comparison with greedy. Try 2, 10
CACHE_LENGTHS = [32, 64, 128, 256, 512]  # tokens that are there already when a new one is asked for. Try adding 1000

COMPARISON = Path(__file__).parent / "figures" / "comparison.json"

SIZES = {"d_model": D_MODEL, "num_layers": NUM_LAYERS, "num_heads": NUM_HEADS, "d_ff": D_FF}
NAMES = {"encoder_only": "encoder-only", "decoder_only": "decoder-only", "encoder_decoder": "encoder-decoder"}
LONGEST = MAX_DIGITS + 1 + MAX_WORDS + 1  # digits, <SEP>, words, <EOS>: no text of the language is longer
DIGIT_IDS = torch.tensor(to_ids(DIGITS))
GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}  # whatever the architecture files' constants are
FREELY = {"temperature": 1.0, "top_k": None, "top_p": TOP_P}

# ======================================================================================================
# THE WORK: what each cell learns from, and how it answers
# ======================================================================================================
# An example trains whatever its fields fit: each architecture's own predict() understands them. An answer is a text.
# Place values are written as number words, the power of ten: 3 4 2 -> two one zero. The vocabulary needs no new words.


def place_words(number: int) -> list[str]:
    """What each digit is worth, as the power of ten.

    >>> place_words(342)       # hundreds, tens, ones
    ['two', 'one', 'zero']
    """
    return [ONES[place] for place in reversed(range(len(str(number))))]


def while_reading_example(number: int) -> dict:
    """Decoder-only, place values: the answer to each digit is due at the digit, before the next one is read.

    ids      <SEP>  3    4    2
    targets    -   two  one  zero

    <SEP>, "answers from here on", is what decoder_only.evaluate starts to count at.
    """
    return {"ids": to_ids(["<SEP>", *str(number)]), "targets": [IGNORE, *to_ids(place_words(number))]}


def after_reading_example(number: int) -> dict:
    """Decoder-only, place values: the answer is due when all digits have been read, as text that goes on.

    ids      <SOS>  3  4  2  <SEP>  two  one  zero
    targets    -    -  -  -   two   one  zero <EOS>
    """
    prompt, answer = decoder_only.make_prompt(number), to_ids([*place_words(number), "<EOS>"])
    return {"ids": prompt + answer[:-1], "targets": [IGNORE] * (len(prompt) - 1) + answer}


def translated_places_example(number: int) -> dict:
    """Encoder-decoder, place values: digits are one language, their place values another.

    source   3 4 2 <EOS>
    target   <SOS> two one  zero
    targets   two  one zero <EOS>
    """
    words = to_ids(place_words(number))
    return {"source": encoder_decoder.make_source(number), "target": [SOS_ID, *words], "targets": [*words, EOS_ID]}


def one_pass_example(number: int) -> dict:
    """Encoder-only, digits to words: all words at once. There are always masks enough for the longest name, so that
    their number tells nothing; <SEP> says where the name ends, and what comes after that is not asked.

    ids      <CLS> 3 4 2 <SEP> <MASK> <MASK>  <MASK> <MASK> <MASK> <MASK> ...
    targets    -   - - -   -   three  hundred forty   two   <SEP>    -    ...
    """
    prompt, words = to_ids(["<CLS>", *str(number), "<SEP>"]), to_ids([*number_to_words(number), "<SEP>"])
    return {"ids": prompt + [MASK_ID] * (MAX_WORDS + 1),
            "targets": [IGNORE] * len(prompt) + words + [IGNORE] * (MAX_WORDS + 1 - len(words))}


def empty_source_example(number: int) -> dict:
    """Encoder-decoder, writing freely: nothing to read, and the whole text to write.

    source   <EOS>
    target   <SOS> 3 4   2   <SEP>  three  hundred forty  two
    targets    3   4 2 <SEP> three hundred  forty   two  <EOS>
    """
    text = to_ids([*str(number), "<SEP>", *number_to_words(number)])
    return {"source": [EOS_ID], "target": [SOS_ID, *text], "targets": [*text, EOS_ID]}


@torch.no_grad()
def read_off(model, prompts: list[list[int]], asked: torch.Tensor, names=VOCABULARY) -> list[str]:
    """One pass: what the model says at each position that holds one of the ids `asked`. names: of its classes."""
    ids = pad_batch([{"ids": prompt} for prompt in prompts])["ids"]                     # (B, T)
    said = model(ids.to(next(model.parameters()).device)).argmax(dim=-1).cpu()          # (B, T)
    return [" ".join(names[i] for i in row[where].tolist()) for row, where in zip(said, torch.isin(ids, asked))]


def tag_digits(model, numbers) -> list[str]:
    """Encoder-only: the label of each digit."""
    return read_off(model, [toy_dataset.tagging_example(number)["ids"] for number in numbers], DIGIT_IDS, ONES)


def say_while_reading(model, numbers) -> list[str]:
    """Decoder-only: what it says at each digit. One pass does it here, as the causal mask hides what comes later."""
    return read_off(model, [while_reading_example(number)["ids"] for number in numbers], DIGIT_IDS)


def name_in_one_pass(model, numbers) -> list[str]:
    """Encoder-only: all words at once, up to <SEP>."""
    texts = read_off(model, [one_pass_example(number)["ids"] for number in numbers], torch.tensor([MASK_ID]))
    return [text.partition(" <SEP>")[0] for text in texts]


def go_on(model, numbers, make_prompt=decoder_only.make_prompt, **settings) -> list[str]:
    """Decoder-only: how the text goes on after the prompt. Greedy unless `settings` say otherwise."""
    prompts = [make_prompt(number) for number in numbers]
    return list(map(decoder_only.to_words, decoder_only.generate(model, prompts, LONGEST, **GREEDY | settings)))


def translate(model, numbers, make_source=encoder_decoder.make_source, **settings) -> list[str]:
    """Encoder-decoder: what it writes for the source. Greedy unless `settings` say otherwise."""
    sources = [make_source(number) for number in numbers]
    return list(map(encoder_decoder.to_words, encoder_decoder.generate(model, sources, LONGEST, **GREEDY | settings)))


@torch.no_grad()
def fill_all(model, numbers) -> list[str]:
    """Encoder-only, writing freely: as many texts as there are numbers, out of nothing but masks.

    A masked LM cannot say how long a text should be, so it is told: lengths are drawn as the training numbers have
    them. Then mask by mask a token is drawn from what the model believes, given those drawn before (Wang & Cho 2019).
    From the right, words before digits: of the orders tried (left, right, random, surest first) it gave the most valid
    texts. Mask-predict, which takes the likeliest, would write the same text for the same lengths.
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
            new = decoder_only.choose_tokens(logits, **FREELY, generator=None)          # (B)
            ids[:, column] = torch.where(masked, new, ids[:, column])
    return [" ".join(toy_dataset.to_tokens(row)[1:-1]) for row in ids.tolist()]


class Cell(NamedTuple):
    """One architecture at one kind of work."""

    row: str                       # its name in the table
    module: ModuleType
    work: str
    natural: bool                  # is it the work that this architecture was made for?
    how: str                       # how it is put to this work
    make_example: Callable         # number -> what it learns from
    answer: Callable               # (model, numbers) -> texts, one for each number
    options: dict = {}             # of its build_model


CELLS = [
    Cell("T1", encoder_only, "understand", True, "a label for each token, all in one pass",
         toy_dataset.tagging_example, tag_digits, {"task": "tagging"}),
    Cell("T2", decoder_only, "understand", False, "says what a digit is worth when it has just read it",
         while_reading_example, say_while_reading),
    Cell("T3", encoder_decoder, "understand", False, "reads all digits, then writes one word for each",
         translated_places_example, translate),
    Cell("T4", encoder_only, "transform", False, "all words at once, in one pass, into more masks than are needed",
         one_pass_example, name_in_one_pass, {"task": "masked_lm"}),
    Cell("T5", decoder_only, "transform", False, "the digits are a prompt, the name is how the text goes on",
         partial(toy_dataset.decoder_only_example, loss_on_prompt=False), go_on),
    Cell("T6", encoder_decoder, "transform", True, "reads the digits, writes the name",
         toy_dataset.encoder_decoder_example, translate),
    Cell("T7", encoder_only, "generate", False, "draws tokens for nothing but masks, from the right; is told how many",
         toy_dataset.masked_lm_example, fill_all, {"task": "masked_lm"}),
    Cell("T8", decoder_only, "generate", True, "goes on after <SOS>, drawing token by token",
         toy_dataset.decoder_only_example, partial(go_on, make_prompt=lambda _: [SOS_ID], **FREELY)),
    Cell("T9", encoder_decoder, "generate", False, "reads an empty source, then draws token by token",
         empty_source_example, partial(translate, make_source=lambda _: [EOS_ID], **FREELY)),
]
# Not one of the nine: what the wall that T2 runs into is not.
AFTER_READING = Cell("T10", decoder_only, "understand", False, "reads all digits, then writes one word for each",
                     after_reading_example, go_on)

# ======================================================================================================
# TRAINING, the same for all
# ======================================================================================================


def check_constants() -> None:
    """Refuse constants that cannot be measured with, or that would make the comparison unfair. Raises InputError."""
    for name, value in [("BATCH_SIZE", BATCH_SIZE), ("NUM_EPOCHS", NUM_EPOCHS), ("NUM_TESTED", NUM_TESTED),
                        ("NUM_SAMPLES", NUM_SAMPLES), ("NUM_TIMED", NUM_TIMED), ("EARLY_EPOCHS", EARLY_EPOCHS),
                        ("BEAM_WIDTH", BEAM_WIDTH), ("the number of SEEDS", len(SEEDS)),
                        ("the shortest of CACHE_LENGTHS", min(CACHE_LENGTHS, default=0))]:
        if not (isinstance(value, int) and value >= 1):
            raise InputError(f"{name} = {value} must be a whole number, at least 1.")
    if not 0 < TOP_P <= 1:
        raise InputError(f"TOP_P = {TOP_P} must be above 0 and at most 1: 0.9 works.")
    if encoder_only.MAX_LENGTH <= LONGEST:
        raise InputError(f"MAX_LENGTH = {encoder_only.MAX_LENGTH} in the architecture files must be above {LONGEST}: "
                         "digits and words stand in one text here.")
    num_test = len(toy_dataset.make_splits().test)
    if max(NUM_TESTED, NUM_SAMPLES, NUM_TIMED) > num_test:
        raise InputError(f"NUM_TESTED = {NUM_TESTED}, NUM_SAMPLES = {NUM_SAMPLES} and NUM_TIMED = {NUM_TIMED} must be "
                         f"at most {num_test}, the size of the test split.")
    for name in ("DROPOUT", "MAX_LENGTH", "WARMUP_STEPS", "FINAL_LEARNING_RATE_RATIO", "WEIGHT_DECAY", "GRAD_CLIP"):
        values = [getattr(module, name) for module in (encoder_only, decoder_only, encoder_decoder)]
        if len(set(values)) > 1:
            raise InputError(f"{name} is {', '.join(map(str, values))} in encoder_only.py, decoder_only.py and "
                             "encoder_decoder.py: to compare them, set it to the same value in all three.")


def held_out_numbers(count: int) -> list[int]:
    """Numbers of the test split, their lengths as even as it allows."""
    test = toy_dataset.make_splits().test
    by_length = [[n for n in test if len(str(n)) == length] for length in range(1, MAX_DIGITS + 1)]
    counts = toy_dataset.spread_evenly(count, [len(numbers) for numbers in by_length])
    return [n for numbers, share in zip(by_length, counts) for n in numbers[:share]]


def train_cell(cell: Cell, seed: int, num_epochs: int, bar) -> tuple:
    """A new model for a cell, trained. Returns it, its history, and the seconds that this took."""
    bar.set_description(f"{cell.work}, {NAMES[cell.module.__name__]}")
    torch.manual_seed(seed)
    model = cell.module.build_model(**SIZES, **cell.options)
    loaders = toy_dataset.make_dataloaders(cell.make_example, BATCH_SIZE, seed)
    few = {field: values[:400] for field, values in next(iter(loaders.validation)).items()}  # enough for a curve
    start = time.perf_counter()
    history = cell.module.train(model, loaders._replace(validation=[few]), num_epochs, LEARNING_RATE, progress=bar)
    return model.eval(), history, time.perf_counter() - start


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
# MEASURING a cell
# ======================================================================================================


def truth(work: str, number: int) -> str:
    """The right answer."""
    return " ".join(place_words(number) if work == "understand" else number_to_words(number))


def score(answers: list[str], truths: list[str]) -> dict:
    """Shares of whole answers that are right, of tokens that are, and of tokens by their place from the left."""
    hits, asked = Counter(), Counter()
    for answer, true in zip(answers, truths):
        said = answer.split()
        for i, token in enumerate(true.split()):
            asked[i] += 1
            hits[i] += said[i : i + 1] == [token]  # an answer that is too short is wrong where it lacks
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


def judge(texts: list[str]) -> dict:
    """Of texts written freely, the shares that are valid (digits and words agree), distinct (different texts), and new:
    valid, distinct, and of a number that was not learned from."""
    numbers = [read_text(text) for text in texts]
    new = set(numbers) - {None} - set(toy_dataset.make_splits().train)
    return {"valid": statistics.fmean(number is not None for number in numbers),
            "distinct": len(set(texts)) / len(texts), "new": len(new) / len(texts)}


def in_batches(answer, model, numbers: list[int], size: int = 1000) -> list[str]:
    """All answers, computed a thousand at a time."""
    return [text for i in range(0, len(numbers), size) for text in answer(model, numbers[i : i + size])]


def time_answers(cell: Cell, model, numbers: list[int]) -> dict:
    """What an answer costs somebody who waits for it, one number at a time: the median time, the mean number of passes
    through a stack of layers. These are counted where each of them begins, at the embedding."""
    passes, seconds = [], []
    hook = model.embedding.register_forward_hook(lambda *_: passes.append(1))
    for number in numbers:
        start = time.perf_counter()
        cell.answer(model, [number])
        seconds.append(time.perf_counter() - start)
    hook.remove()
    return {"ms_per_answer": 1000 * statistics.median(seconds), "forward_passes": len(passes) / len(numbers)}


def measure_cell(cell: Cell, model, seed: int) -> dict:
    """How well a trained cell does its work on held-out numbers, and at what cost."""
    torch.manual_seed(seed)  # for what is drawn
    if cell.work == "generate":
        found = judge(in_batches(cell.answer, model, held_out_numbers(NUM_SAMPLES)))  # their count alone matters
        found |= {"sequence_accuracy": found["valid"], "token_accuracy": None, "by_position": None}
    else:
        numbers = held_out_numbers(NUM_TESTED)
        found = score(in_batches(cell.answer, model, numbers), [truth(cell.work, number) for number in numbers])
        found |= {"valid": None, "new": None, "distinct": None}
    found |= {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    return found | time_answers(cell, model, held_out_numbers(NUM_TIMED))


def mean_of_runs(runs: list[dict]) -> dict:
    """The runs of one cell, one for each seed, as one: the mean of each number, and how far they spread."""
    cell = dict(runs[0])
    for key, first in runs[0].items():
        values = [run[key] for run in runs]
        if isinstance(first, float):
            cell[key] = statistics.fmean(values)
        elif key == "by_position" and first is not None:
            cell[key] = list(map(statistics.fmean, zip(*values)))
    cell["sequence_accuracy_by_seed"] = [run["sequence_accuracy"] for run in runs]
    return cell


def run_cell(cell: Cell, bar) -> tuple[dict, object]:
    """Train and measure a cell once for each seed. Returns its entry in comparison.json, and the first seed's model."""
    runs, models = [], []
    for seed in SEEDS:
        model, history, seconds = train_cell(cell, seed, NUM_EPOCHS, bar)
        bar.set_description(f"testing {NAMES[cell.module.__name__]}")
        runs.append({"train_seconds": seconds, **measure_cell(cell, model, seed), "history": thin_out(history)})
        models.append(model)
    about = {"row": cell.row, "architecture": cell.module.__name__, "work": cell.work, "natural": cell.natural,
             "how": cell.how}
    return about | mean_of_runs(runs), models[0]


# ======================================================================================================
# THE WALL
# ======================================================================================================


def left_to_right_ceiling(numbers: list[int]) -> tuple[float, list[float]]:
    """The best that ANY left-to-right reader can reach on the place values of these numbers, however large it is:
    the share of all digits, and of those at each position.

    It must say what digit i is worth having seen the digits up to i, and nothing else. That depends on how many more
    follow. But within each length numbers are drawn blindly, so it does not matter which digits it has seen, only that
    it has seen i of them: the number has i digits or more. So the best it can do is to answer, at each position, for
    the commonest length among those still possible, and then at position i it is right for

        max over the lengths L >= i of (how many numbers have L digits)

    of the numbers that have a digit there. It is given how common each length is among the very numbers tested, but not
    which numbers these are: who has a list of them, or knows that they are not on another list (those learned from),
    could rule out a length now and then. Training cannot teach that: there, all numbers are on the list.

    >>> left_to_right_ceiling([7, 34, 342])     # lengths 1, 2, 3, one of each: 3 of 6 digits
    (0.5, [0.3333333333333333, 0.5, 1.0])
    """
    lengths = Counter(len(str(number)) for number in numbers)
    still_possible = [[count for length, count in lengths.items() if length > i] for i in range(max(lengths))]
    hits, asked = list(map(max, still_possible)), list(map(sum, still_possible))
    return sum(hits) / sum(asked), [h / a for h, a in zip(hits, asked)]


def build_wall(cells: list[dict], after_reading: dict) -> dict:
    """The ceiling, and what each reader reached: the share of digits right, of all and by position from the left."""
    ceiling, by_position = left_to_right_ceiling(held_out_numbers(NUM_TESTED))
    readers = {cell["architecture"]: cell for cell in cells if cell["work"] == "understand"}
    readers = {"causal": readers["decoder_only"], "after_reading": after_reading,
               "bidirectional": readers["encoder_only"], "encoder_decoder": readers["encoder_decoder"]}
    return {"ceiling": ceiling, **{name: cell["token_accuracy"] for name, cell in readers.items()},
            "by_position": {"ceiling": by_position, **{name: cell["by_position"] for name, cell in readers.items()}}}


# ======================================================================================================
# INFERENCE: strategies, beam search, KV cache
# ======================================================================================================

STRATEGIES = {
    "greedy": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.0": {"temperature": 1.0},
    "temperature 1.5": {"temperature": 1.5},
    "top-k 5": {"temperature": 1.0, "top_k": 5},
    "top-k 10": {"temperature": 1.0, "top_k": 10},
    "top-k 40": {"temperature": 1.0, "top_k": 40},  # of a vocabulary of 46: hardly a limit
    "top-p 0.75": {"temperature": 1.0, "top_p": 0.75},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "repetition penalty 1.2": {"repetition_penalty": 1.2},
    "repetition penalty 2": {"repetition_penalty": 2.0},
}
BEAM_WIDTHS = [3, 5, 10]


def search(model, numbers, beam_width: int, make_source=encoder_decoder.make_source) -> list[str]:
    """Encoder-decoder: the likeliest text that beam search finds for each source. The score is the text's
    log-probability itself (length penalty 0), so that more of it can only be better."""
    sources = [make_source(number) for number in numbers]
    texts, _ = encoder_decoder.beam_search(model, sources, beam_width, length_penalty=0.0, max_new_tokens=LONGEST)
    return list(map(encoder_decoder.to_words, texts[:, 0]))


def measure_strategies(models: dict) -> list[dict]:
    """Each strategy on the same prompts: held-out numbers to name, and an empty prompt (or source) to go on from."""
    numbers = held_out_numbers(NUM_SAMPLES)
    rows = [("decoder_only", name, partial(go_on, models["T8"], **settings),
             partial(go_on, models["T8"], make_prompt=lambda _: [SOS_ID], **settings))
            for name, settings in STRATEGIES.items()]
    rows += [("encoder_decoder", "greedy", partial(translate, models["T6"]),
              partial(translate, models["T9"], make_source=lambda _: [EOS_ID]))]
    rows += [("encoder_decoder", f"beam width {width}", partial(search, models["T6"], beam_width=width),
              partial(search, models["T9"], beam_width=width, make_source=lambda _: [EOS_ID]))
             for width in BEAM_WIDTHS]
    measured = []
    for i, (architecture, strategy, name, write) in enumerate(rows, start=1):
        torch.manual_seed(SEEDS[0])
        start = time.perf_counter()
        names = name(numbers)
        seconds = time.perf_counter() - start
        named = statistics.fmean(said == truth("transform", number) for said, number in zip(names, numbers))
        tokens = sum(len(said.split()) + 1 for said in names)  # and <EOS>
        measured.append({"row": f"S{i}", "strategy": strategy, "architecture": architecture, "named": named,
                         **judge(write(numbers)), "tokens_per_second": tokens / seconds})
    return measured


@torch.no_grad()
def log_probabilities(model, numbers: list[int], texts: list[str]) -> list[float]:
    """log p(text | number) by an encoder-decoder: the sum over the text's tokens and <EOS>, in nats."""
    examples = []
    for number, text in zip(numbers, texts):
        ids = to_ids([*text.split(), "<EOS>"])[:LONGEST]  # a text of that length was cut off, without an <EOS>
        examples.append({"source": encoder_decoder.make_source(number), "target": [SOS_ID, *ids[:-1]], "targets": ids})
    logits, targets = encoder_decoder.predict(model, pad_batch(examples))
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")  # (B, T)
    return (-losses.sum(dim=1)).tolist()


def compare_beam(models: dict) -> list[dict]:
    """Greedy and beam search on the same held-out numbers, by models that have and have not learned the work."""
    numbers = held_out_numbers(NUM_SAMPLES)
    rows = []
    for learned, model in models.items():
        found = {}
        methods = {"greedy": translate, f"beam width {BEAM_WIDTH}": partial(search, beam_width=BEAM_WIDTH)}
        for method, answer in methods.items():
            start = time.perf_counter()
            texts = answer(model, numbers)
            seconds = time.perf_counter() - start
            found[method] = log_probabilities(model, numbers, texts)
            rows.append({"row": f"B{len(rows) + 1}", "model": learned, "method": method,
                         "log_probability": statistics.fmean(found[method]),
                         "exact": statistics.fmean(text == truth("transform", n) for text, n in zip(texts, numbers)),
                         "likelier": statistics.fmean(b > g + 1e-4 for b, g in zip(found[method], found["greedy"])),
                         "less_likely": statistics.fmean(b < g - 1e-4 for b, g in zip(found[method], found["greedy"])),
                         "ms_per_answer": 1000 * seconds / len(numbers)})
    return rows


@torch.no_grad()
def time_cache(repeats: int = 20) -> dict:
    """Milliseconds for one more token after texts of several lengths, with the KV cache and without; one text at a
    time, the fastest of several runs, as what else the computer does can only slow it down. The weights are random:
    they make no difference to the time."""
    model = decoder_only.build_model(**SIZES, max_length=max(CACHE_LENGTHS) + 1).eval()
    device = next(model.parameters()).device
    measured = {"lengths": CACHE_LENGTHS, "cached_ms": [], "recomputed_ms": [], "cache_kilobytes": []}
    for length in CACHE_LENGTHS:
        ids = torch.randint(len(SPECIAL_TOKENS), len(VOCABULARY), (1, length + 1), device=device)
        cache = model.new_cache()
        model(ids[:, :-1], cache)
        past = [(layer.key, layer.value) for layer in cache]
        cached, recomputed = [], []
        for _ in range(repeats):
            for layer, (key, value) in zip(cache, past):
                layer.key, layer.value = key, value  # back to the text without its newest token
            start = time.perf_counter()
            model(ids, cache)[0, -1].argmax().item()
            middle = time.perf_counter()
            model(ids)[0, -1].argmax().item()
            cached.append(1000 * (middle - start))
            recomputed.append(1000 * (time.perf_counter() - middle))
        measured["cached_ms"].append(min(cached))
        measured["recomputed_ms"].append(min(recomputed))
        size = sum(key.numel() + value.numel() for key, value in past) * past[0][0].element_size()
        measured["cache_kilobytes"].append(size / 1000)
    return measured


def count_parameters(model) -> dict[str, int]:
    """Parameters by component, every one in exactly one of them."""
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

# ======================================================================================================
# WHAT IS PRINTED
# ======================================================================================================


def say(text: str, label: str = "") -> None:
    """Print a paragraph, to the right of its label, in lines that fit a terminal of 100 columns."""
    print(textwrap.fill(text, 98, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False))


def explain(columns: dict[str, str]) -> None:
    """What the columns of the table that follows mean."""
    for name, meaning in columns.items():
        say(meaning, f"  {name:11}")
    print()


def side_by_side(blocks: list[str]) -> str:
    """Blocks of text, beside each other."""
    columns = [block.splitlines() for block in blocks]
    widths = [max(map(len, lines)) for lines in columns]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(("  " + "     ".join(map(str.ljust, row, widths))).rstrip() for row in rows)


def show_masks() -> None:
    """What may look at what, in a batch in which 42 stands beside the longer 342: made by the models' own functions."""
    def tokens_of(ids):
        return [VOCABULARY[i] for i in ids[0].tolist()]

    tagging = pad_batch([toy_dataset.tagging_example(number) for number in (42, 342)])["ids"][:1]
    decoding = pad_batch([toy_dataset.decoder_only_example(number) for number in (42, 342)])["ids"][:1]
    pair = pad_batch([toy_dataset.encoder_decoder_example(number) for number in (42, 342)])
    source, target = pair["source"][:1], pair["target"][:1]
    masks = {}
    for name, make_causal_mask, rows, columns in [
            ("encoder-only", None, tagging, tagging),
            ("decoder-only", decoder_only.make_causal_mask, decoding, decoding),
            ("encoder-decoder: encoder", None, source, source),
            ("its decoder", encoder_decoder.make_causal_mask, target, target),
            ("its decoder, across", None, target, source)]:
        mask = make_padding_mask(columns)[0, 0]
        if make_causal_mask is not None:
            mask = mask & make_causal_mask(rows.size(1), columns.size(1))
        mask = mask.expand(rows.size(1), -1)
        masks[name] = f"{name}\n\n" + format_mask(mask, tokens_of(rows), tokens_of(columns))
    say("MASKS: a row is a token that looks, a column one that may be looked at (#) or not (.). <PAD> fills 42 up to "
        "the length of the 342 beside it in the batch. Nobody looks at it; what it sees itself is never asked for.")
    print()
    print(side_by_side(list(masks.values())[:2]) + "\n\n" + side_by_side(list(masks.values())[2:]))


def show_examples(number: int = 342) -> None:
    """What each cell learns from, for one number: what it reads, what it must say, and what is scored."""
    print(f"\nEXAMPLES: how each cell of the table learns its work, with {number} (- : nothing is asked here)")
    for cell in [*CELLS, AFTER_READING]:
        example = cell.make_example(number)
        if "targets" not in example and "places" not in example:  # the masked LM: what is hidden is drawn each time
            generator = torch.Generator().manual_seed(8)
            corrupted, targets = encoder_only.mask_tokens(torch.tensor([example["ids"]]), generator)
            example = {"ids": corrupted[0].tolist(), "targets": targets[0].tolist()}
        rows = {field: ["-" if i == IGNORE else (PLACES if field == "places" else VOCABULARY)[i] for i in ids]
                for field, ids in example.items()}
        source = rows.pop("source", None)
        widths = [max(map(len, column)) for column in zip(*rows.values())]
        asked = list(rows.values())[-1]
        print(f"\n  {cell.row:4}{cell.work}, {NAMES[cell.module.__name__]}: {cell.how}")
        if source is not None:
            print("      source   " + " ".join(source))
        for name, row in zip(("written" if source else "input", "target"), rows.values()):
            line = " ".join(f"{token:{width}}" for token, width in zip(row, widths)).rstrip()
            print(f"      {name:9}" + (line if len(line) <= 84 else line[:80].rstrip() + " ..."))
        print(f"      scored   {sum(token != '-' for token in asked)} of {len(asked)} positions")


def percent(share: float | None) -> str:
    """A share for a table; an empty cell where there is none."""
    return "-" if share is None else f"{share:.2%}"


def show_table(cells: list[dict]) -> None:
    """The 3 x 3 table, and the row that is not one of the nine."""
    print()
    say(f"THE TABLE: every cell was trained here, and tested on {NUM_TESTED:,} held-out numbers; generate: on "
        f"{NUM_SAMPLES} texts, drawn with top-p {TOP_P}. How each is put to its work: EXAMPLES, above.")
    explain({"right": "whole answers without a mistake (understand, transform)",
             "tokens": "digits or words that are right",
             "valid": "texts in which digits and words agree (generate); this is what counts as right",
             "distinct": "different texts", "new": "texts that are valid, distinct, and of a number not learned from",
             "ms, passes": "of one answer, asked for by itself: time, and passes through a stack of layers",
             "*": "what this architecture was made for"})
    spread = " +- sd" if len(SEEDS) > 1 else ""
    print(f"  {'':4}{'work':11}{'architecture':18}{'right' + spread:>15}{'tokens':>9}{'parameters':>12}{'training':>10}"
          f"{'ms':>8}{'passes':>8}")
    for cell in cells:
        right = percent(cell["sequence_accuracy"])
        if spread:
            right += f" +- {100 * statistics.stdev(cell['sequence_accuracy_by_seed']):.2f}"
        name = NAMES[cell["architecture"]] + (" *" if cell["natural"] else "")
        print(f"  {cell['row']:4}{cell['work']:11}{name:18}{right:>15}{percent(cell['token_accuracy']):>9}"
              f"{cell['parameters']:>12,}{cell['train_seconds']:>8.0f} s{cell['ms_per_answer']:>8.1f}"
              f"{cell['forward_passes']:>8.1f}")
    print(f"\n  {'generate':33}{'valid':>15}{'distinct':>9}{'new':>12}")
    for cell in cells:
        if cell["work"] == "generate":
            print(f"  {cell['row']:15}{NAMES[cell['architecture']]:18}{percent(cell['valid']):>15}"
                  f"{percent(cell['distinct']):>9}{percent(cell['new']):>12}")


def show_wall(wall: dict) -> None:
    """Who can say what a digit is worth, and who cannot, by position."""
    print()
    say("THE WALL: share of digits whose place value is right, of all and by position from the left. What the 3 of 342 "
        "is worth shows only when the 4 and the 2 have followed. A reader that must answer before that can do no "
        "better than W1, however large it is, but for luck: W1 is computed, not trained.")
    print()
    rows = {"ceiling": "best of any left-to-right reader", "causal": "decoder-only, while reading (T2)",
            "after_reading": "decoder-only, after reading (T10)", "bidirectional": "encoder-only (T1)",
            "encoder_decoder": "encoder-decoder (T3)"}
    print(f"  {'':38}{'all':>8}" + "".join(f"{i + 1:>{5 if MAX_DIGITS > 6 else 8}}" for i in range(MAX_DIGITS)))
    for i, (key, name) in enumerate(rows.items(), start=1):
        cells = (f"{share:5.0%}" if MAX_DIGITS > 6 else f"{share:8.1%}" for share in wall["by_position"][key])
        print(f"  W{i}  {name:34}{wall[key]:8.2%}" + "".join(cells))
    print()
    say("What the wall is not: a limit of the architecture. W3 is the same kind of decoder, asked once it has read all "
        "digits. What binds is having to answer position by position, while still reading.")


def show_strategies(strategies: list[dict]) -> None:
    """Inference strategies, on the same prompts."""
    print()
    say(f"STRATEGIES, on the same prompts: {NUM_SAMPLES} held-out numbers to name, and {NUM_SAMPLES} texts to write "
        f"freely. S1 to S{len(STRATEGIES)} are written by T8; the others, as decoder_only.py has no beam search, by T6 "
        "(names) and T9 (freely). Greedy and beam search draw nothing: the same prompt, the same text.")
    explain({"named": "names that are right", "tokens/s": "while naming",
             "distinct": "of the texts written freely; likewise valid and new, as in THE TABLE"})
    print(f"  {'':5}{'strategy':25}{'named':>9}{'distinct':>10}{'valid':>9}{'new':>9}{'tokens/s':>11}")
    for row in strategies:
        if row["row"] == f"S{len(STRATEGIES) + 1}":
            print("       encoder-decoder")
        print(f"  {row['row']:5}{row['strategy']:25}{row['named']:9.1%}{row['distinct']:10.1%}{row['valid']:9.1%}"
              f"{row['new']:9.1%}{row['tokens_per_second']:11,.0f}")


def show_beam(beam: list[dict]) -> None:
    """Beam search against greedy."""
    print()
    say(f"BEAM SEARCH against greedy, encoder-decoder, {NUM_SAMPLES} held-out numbers. The trained model is T6; the "
        f"unfinished one was given a training of {EARLY_EPOCHS} in place of {NUM_EPOCHS} epochs.")
    explain({"log p": "of the whole text, mean over all",
             "likelier": "share of the texts that the model finds likelier than greedy's (less: less likely)",
             "right": "names without a mistake"})
    print(f"  {'':5}{'model':13}{'method':15}{'log p':>12}{'likelier':>10}{'less':>8}{'right':>9}{'ms/answer':>11}")
    for row in beam:
        print(f"  {row['row']:5}{row['model']:13}{row['method']:15}{row['log_probability']:12.5f}"
              f"{row['likelier']:10.1%}{row['less_likely']:8.1%}{row['exact']:9.1%}{row['ms_per_answer']:11.2f}")


def show_cache(cache: dict) -> None:
    """The KV cache against recomputing."""
    print("\nKV CACHE: milliseconds for one more token, decoder-only, one text, by the number of tokens so far\n")
    print(f"  {'':5}{'tokens':>7}{'cached':>10}{'recomputed':>12}{'factor':>9}{'cache size':>13}")
    for i, (length, cached, recomputed, size) in enumerate(zip(*cache.values()), start=1):
        print(f"  K{i:<4}{length:7,}{cached:10.2f}{recomputed:12.2f}{recomputed / cached:9.1f}{size:10,.0f} kB")


def show_parameters(parameters: dict) -> None:
    """Parameters by component."""
    print("\nPARAMETERS by component, of T1, T8 and T6\n")
    components = list(next(iter(parameters.values())))
    titles = [component.removeprefix("token ") for component in components]
    widths = [max(len(title), 6) + 1 for title in titles]
    print(" " * 21 + "".join(f"{title:>{width}}" for title, width in zip(titles, widths)) + f"{'all':>10}")
    for i, (architecture, counts) in enumerate(parameters.items(), start=1):
        cells = (f"{counts[component]:>{width},}" for component, width in zip(components, widths))
        print(f"  P{i}  {NAMES[architecture]:15}" + "".join(cells) + f"{sum(counts.values()):>10,}")


def differ(share: float, other: float, num_answers: int) -> bool:
    """Are two shares of right answers, each of so many, further apart than luck alone would put them?

    Luck: two standard errors of their difference. One right and one wrong answer are added to each (Laplace), for
    all of 500 answers right does not mean that the next one cannot be wrong.
    """
    share, other = ((p * num_answers + 1) / (num_answers + 2) for p in (share, other))
    return abs(share - other) > 2 * math.sqrt((share * (1 - share) + other * (1 - other)) / num_answers)


def guide_by_work(cells: list[dict]) -> list[str]:
    """For each kind of work: the fastest of the architectures that do it best, and what the others do."""
    wanted = {"understand": "A label for each part of a text that is all there",
              "transform": "One text made into another", "generate": "New texts, out of nothing"}
    lines = []
    for work, want in wanted.items():
        rows = sorted((cell for cell in cells if cell["work"] == work), key=lambda cell: cell["ms_per_answer"])
        best = max(cell["sequence_accuracy"] for cell in rows)
        num_answers = len(SEEDS) * (NUM_SAMPLES if work == "generate" else NUM_TESTED)
        groups = {"": [], "As right, and slower: ": [], "Less often right: ": []}
        for cell in rows:
            if differ(cell["sequence_accuracy"], best, num_answers):
                group = "Less often right: "
            else:
                group = "As right, and slower: " if groups[""] else ""
            groups[group].append(f"{NAMES[cell['architecture']]} ({cell['row']}: "
                                 f"{percent(cell['sequence_accuracy'])} right, {cell['ms_per_answer']:.1f} ms)")
        advice = [f"{start}{', '.join(names)}." for start, names in groups.items() if names]
        lines.append(f"{want}: {'none has learned it yet; ' if best < 0.5 else ''}{' '.join(advice)}")
    return lines


def guide_by_strategy(strategies: list[dict]) -> list[str]:
    """Which strategy, if one answer is right, and if many are."""
    greedy, *others = strategies[: len(STRATEGIES)]
    named, harmful = (choose(others, key=lambda row: row["named"]) for choose in (max, min))
    newest = max(strategies, key=lambda row: row["new"])
    oldest = min((row for row in others if "penalty" not in row["strategy"]), key=lambda row: row["new"])
    enough = named["named"] <= greedy["named"] or not differ(named["named"], greedy["named"], NUM_SAMPLES)
    return [
        f"One answer is right: greedy is {'as good as any' if enough else 'not the best'} ({greedy['row']}: "
        f"{greedy['named']:.1%} named). The best of the others is {named['strategy']} ({named['row']}: "
        f"{named['named']:.1%}), the worst {harmful['strategy']} ({harmful['row']}: {harmful['named']:.1%}).",
        f"Many answers are right: {newest['strategy']} writes the most that is new ({newest['row']}: "
        f"{newest['new']:.1%}, valid {newest['valid']:.1%}); of the strategies that draw, {oldest['strategy']} writes "
        f"the least ({oldest['row']}: {oldest['new']:.1%}, valid {oldest['valid']:.1%}); greedy, which does not, "
        f"{greedy['new']:.1%} ({greedy['row']}: {greedy['distinct']:.1%} distinct).",
    ]


def guide_by_beam(beam: list[dict]) -> list[str]:
    """What beam search buys, for a model that has learned and for one that has not."""
    lines = []
    for greedy, searched in (beam[:2], beam[2:]):
        verdict = "no more"
        if differ(searched["exact"], greedy["exact"], NUM_SAMPLES):
            verdict = "more" if searched["exact"] > greedy["exact"] else "fewer"
        lines.append(
            f"Beam search with the {greedy['model']} model: a likelier text for {searched['likelier']:.1%} of the "
            f"numbers, and {verdict} right ({greedy['row']}: {greedy['exact']:.1%}, {searched['row']}: "
            f"{searched['exact']:.1%}), for {searched['ms_per_answer'] / greedy['ms_per_answer']:.1f} times the time.")
    return lines


def decision_guide(found: dict) -> list[str]:
    """Advice, every line made of measured numbers; where these turn out otherwise, so does the line."""
    wall, cache, parameters = found["wall"], found["kv_cache"], found["parameters"]
    shares = [cached / recomputed for cached, recomputed in zip(cache["cached_ms"], cache["recomputed_ms"])]
    totals = {architecture: sum(counts.values()) for architecture, counts in parameters.items()}
    return [
        *guide_by_work(found["cells"]),
        f"Labels due while the text is still coming in: no left-to-right reader can expect more than "
        f"{wall['ceiling']:.1%} of the digits (W1); decoder-only got {wall['causal']:.1%} (W2). If they can wait for "
        f"the end of the text, it gets {wall['after_reading']:.1%} (W3), and a bidirectional reader "
        f"{wall['bidirectional']:.1%} (W4).",
        *guide_by_strategy(found["strategies"]),
        *guide_by_beam(found["beam"]),
        f"Text written token by token: with the KV cache a token takes {shares[0]:.0%} of the time after "
        f"{cache['lengths'][0]:,} tokens (K1), and {shares[-1]:.0%} after {cache['lengths'][-1]:,} (K{len(shares)}).",
        f"Memory is short: at the same width and number of layers an encoder-decoder (P3) has "
        f"{totals['encoder_decoder'] / totals['decoder_only']:.1f} times the parameters of a decoder-only model (P2).",
    ]


# ======================================================================================================
# RUNNING THIS FILE
# ======================================================================================================
# The schema of figures/comparison.json. Shares are from 0 to 1; where something makes no sense it is null.
#   constants   the constants at the top of this file, and of toy_dataset.py, that the numbers belong to
#   cells       T1 to T9, each: row, architecture, work, natural, how; train_seconds; sequence_accuracy, token_accuracy,
#               by_position (of tokens, from the left); valid, new, distinct (of generate); parameters; ms_per_answer,
#               forward_passes; history [{step, loss (mean since the last), exact_match (where measured)}];
#               sequence_accuracy_by_seed. Numbers are means over SEEDS, the history is the first seed's.
#   after_reading  T10, the same
#   wall        ceiling, causal (T2), after_reading (T10), bidirectional (T1), encoder_decoder (T3): shares of digits
#               right; by_position: the same keys, a list of shares each
#   strategies  [{row, strategy, architecture, named, valid, new, distinct, tokens_per_second}]
#   beam        [{row, model, method, log_probability, exact, likelier, less_likely, ms_per_answer}]
#   kv_cache    lengths, cached_ms, recomputed_ms, cache_kilobytes: a list each
#   parameters  {architecture: {component: count}}


def check_writable(path: Path) -> None:
    """Raises OSError, naming the folder, if nothing can be written where path is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} is not writable: change its permissions, or COMPARISON in this file.")


def save(found: dict, path: Path = COMPARISON) -> None:
    """Write all numbers, five digits of each. Atomic: under that name there is a whole file, the old one or the new."""
    found = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.5g}"))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(temporary, path)


def all_constants() -> dict:
    """What the numbers belong to."""
    names = ("D_MODEL", "NUM_LAYERS", "NUM_HEADS", "D_FF", "BATCH_SIZE", "NUM_EPOCHS", "LEARNING_RATE", "SEEDS",
             "NUM_TESTED", "NUM_SAMPLES", "TOP_P", "NUM_TIMED", "EARLY_EPOCHS", "BEAM_WIDTH")
    data = {f"toy_dataset.{name}": getattr(toy_dataset, name) for name in ("MAX_DIGITS", "NUM_TRAIN", "SEED")}
    return {name: globals()[name] for name in names} | data


def compare() -> dict:
    """Train and measure everything, under one progress bar. Returns what save writes."""
    cells = [*CELLS, AFTER_READING]
    steps_per_epoch = math.ceil(len(toy_dataset.make_splits().train) / BATCH_SIZE)
    num_epochs = len(SEEDS) * len(cells) * NUM_EPOCHS + EARLY_EPOCHS
    entries, models = [], {}
    with tqdm(total=num_epochs * steps_per_epoch, ascii=True, ncols=95, mininterval=0.5) as bar:
        for cell in cells:
            entry, models[cell.row] = run_cell(cell, bar)
            entries.append(entry)
        early, *_ = train_cell(CELLS[5], SEEDS[0], EARLY_EPOCHS, bar)
        bar.set_description("strategies, beam search, cache")
        return {
            "constants": all_constants(),
            "cells": entries[:-1],
            "after_reading": entries[-1],
            "wall": build_wall(entries[:-1], entries[-1]),
            "strategies": measure_strategies(models),
            "beam": compare_beam({"trained": models["T6"], "unfinished": early}),
            "kv_cache": time_cache(),
            "parameters": {name: count_parameters(models[row]) for name, row in
                           [("encoder_only", "T1"), ("decoder_only", "T8"), ("encoder_decoder", "T6")]},
        }


def main() -> None:
    """Compare, print, write."""
    start = time.perf_counter()
    check_constants()
    check_writable(COMPARISON)  # before minutes of training, not after them
    say(f"THREE ARCHITECTURES, THREE KINDS OF WORK. The same for every cell: width {D_MODEL}, {NUM_LAYERS} layers in "
        f"each stack, {NUM_HEADS} heads, the same {toy_dataset.NUM_TRAIN:,} numbers, {NUM_EPOCHS} epochs in batches of "
        f"{BATCH_SIZE}, AdamW with warmup to {LEARNING_RATE:g} and cosine decay, seeds {SEEDS}. All shares of right "
        "answers are of held-out numbers.")
    print()
    show_masks()
    show_examples()
    print(flush=True)  # before the bar, which goes another way (stderr)
    found = compare()
    show_table([*found["cells"], found["after_reading"]])
    show_wall(found["wall"])
    show_strategies(found["strategies"])
    show_beam(found["beam"])
    show_cache(found["kv_cache"])
    show_parameters(found["parameters"])
    print()
    say("DECISION GUIDE: each line names the rows above that show it. Shares of right answers that luck could have put "
        "as far apart count as equal; of equals, the fastest comes first.")
    print()
    for line in decision_guide(found):
        say(line, "  - ")
    save(found)
    print(f"\nAll in {time.perf_counter() - start:.0f} seconds. The numbers are in {COMPARISON.parent.name}/"
          f"{COMPARISON.name}.\nNext: python visualizations.py draws them; or change a constant at the top of this "
          "file, and run it\nagain.")


if __name__ == "__main__":
    run_script(main)
