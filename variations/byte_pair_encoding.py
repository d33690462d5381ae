"""byte_pair_encoding.py - subword tokens: from single characters to whole words, by merging what is frequent.

The problem. The base files read whole words, so a word outside their vocabulary is an error. Single characters can
spell everything, but then a name of seven words is a sequence of forty tokens: more positions to compute, and more
steps to generate. What is wanted is a vocabulary that has frequent words in one piece and can still spell all others.

The idea. Start from bytes: 256 tokens that can spell any text in any language. Count all pairs of adjacent tokens in
the training text, make the most frequent pair a new token, and repeat:

    pair   = argmax over (a, b) of count(a, b)          ties: the pair that comes first in byte order
    merge:   a b -> ab everywhere, left to right        each merge adds one token to the vocabulary

The list of merges, in the order in which they were learned, is the tokenizer. Encoding starts from bytes again and
applies them in that order. Decoding concatenates the tokens' bytes, so nothing is ever lost.

On paper: of the pairs in "one", "none" and "nine", (n, e) is the most frequent, with 3; after this merge it is (o, ne).
"nineteen" was not in the text and is spelled from what was:

>>> tokenizer = BytePairEncoding().train(["one", "none", "nine"], num_merges=2)
>>> [(tokenizer.tokens[a], tokenizer.tokens[b], count) for (a, b), count in zip(tokenizer.merges, tokenizer.counts)]
[(b'n', b'e', 3), (b'o', b'ne', 2)]
>>> [tokenizer.tokens[i] for i in tokenizer.encode("nineteen")]
[b'n', b'i', b'ne', b't', b'e', b'e', b'n']

Spaces. GPT-2 first splits the text into words, each with the space before it, and merges only within words. " hundred"
becomes one token with its space, so decoding restores spaces exactly; the price is that "two" at the beginning of a
name is not the same token as " two" within it. And in a language of few words merges run out, once every word is one
token. Without the split, frequent pairs soon span words (" hundred seven"): sequences become shorter still, but the
vocabulary fills with combinations, each of them rare. The experiment has both.

Comparing tokenizers. Losses per token, and so perplexities, are not comparable: they average over different tokens, and
most characters follow from those before them. The loss per name is comparable, being a sum over the same text, and so
are bits per character. Their floor is 0 here, since the digits determine the name. Digits stay one token each in every
row, so that only the names are tokenized differently. All rows make equally many updates: of equally many tokens, which
are fewer names where tokens are short, or of the same names, which then cost more tokens and more time.

Papers: Sennrich et al. 2016, section 3.2 (they mark the end of each word, not the space before it); Radford et al. 2019
(GPT-2), section 2.2 (bytes, and no merges across words). Simplified: GPT-2 also separates letters from digits and
punctuation before merging; spaces are the only boundary here.

What you will see (about three minutes on two CPU cores): all merges in order, with their counts; what a misspelling
becomes in each tokenizer; vocabulary, tokens and milliseconds per name; loss and exact match of a decoder trained with
each, on equally many tokens and on equally many names. Writes figures/variations/byte_pair_encoding.png.
"""

import math
import random
import re
import statistics
import sys
import textwrap
import time
from collections import Counter, defaultdict
from itertools import pairwise, product
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from decoder_only import check_constant
from toy_dataset import DIGITS, EOS_ID, IGNORE, MAX_DIGITS, MAX_WORDS, PAD_ID, SPECIAL_TOKENS, VOCABULARY, WORDS
from toy_dataset import InputError, Splits, make_splits, number_to_words, pad_batch, run_script, to_ids, to_tokens

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

NUM_MERGES = (0, 16, 64, 256)    # rows that merge within words; where fewer merges exist, all of them. Try 32
MERGES_ACROSS = 256              # the row that merges across words. Try 1000: when does every name become one token?
MISSPELLINGS = ("forty two", "fourty two", "ninty", "Forty-two", "\N{SNOWMAN} two")

D_MODEL = 64
TOKENS_PER_STEP = 1000           # equal tokens: an update sees as many names as give this many. Try 4000
NAMES_PER_STEP = 32              # equal names: an update sees this many, however many tokens they are
NUM_STEPS = 250                  # updates in every run. Try 1000: does the order of the rows change?
LEARNING_RATE = 8e-3             # of 2e-3, 4e-3, 8e-3 and 16e-3 the best, or within a point of it, for every row
NUM_TESTS = 1000                 # held-out numbers for loss and exact match
NUM_GENERATED = 20               # of them, generated one at a time, for milliseconds per name
SEEDS = (0, 1, 2)                # of initial weights and order of names
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "byte_pair_encoding.png"

# ======================================================================================================
# THE EXCHANGED PART
# ======================================================================================================

CONTROL = SPECIAL_TOKENS + DIGITS  # <PAD> ... <MASK> and the digits of prompts keep the ids that they have in the base


def merge_pair(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace each occurrence of the pair by the id `new`, from left to right.

    >>> merge_pair([5, 1, 2, 1, 2, 2], (1, 2), new=9)
    [5, 9, 9, 2]
    """
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


class BytePairEncoding:
    """Text <-> ids. A token is a byte string: one of the 256 bytes, or what a merge has made of two tokens."""

    def __init__(self, across_words: bool = False):
        self.across_words = across_words
        self.tokens = [token.encode() for token in CONTROL] + [bytes([byte]) for byte in range(256)]  # by id
        self.merges = {}   # pair of ids -> id of the token that replaces it, in the order of learning
        self.counts = []   # how often each of these pairs occurred when it was merged

    def split(self, text: str) -> list[str]:
        """The parts within which merges take place: words, each with the space before it, or the whole text.

        >>> BytePairEncoding().split("two hundred ten")
        ['two', ' hundred', ' ten']
        """
        return [text] if self.across_words else re.findall(" ?[^ ]+| ", text)

    def spell(self, text: str) -> list[int]:
        """The ids of the text's bytes. Never control tokens: "<EOS>" in a text is five bytes and ends nothing."""
        return [len(CONTROL) + byte for byte in text.encode()]

    def train(self, texts: list[str], num_merges: int):
        """Learn merges from texts: num_merges, or fewer if every part has become one token. Returns self.

        Equal parts are merged equally, so each is kept once, with its number of occurrences. And a merge changes the
        counts of pairs only in the parts that contain it: the others need no recount.
        """
        parts = Counter(part for text in texts for part in self.split(text))
        words = [(self.spell(part), count) for part, count in parts.items()]
        pairs = Counter()
        for ids, count in words:
            for pair in pairwise(ids):
                pairs[pair] += count
        while len(self.merges) < num_merges and any(pairs.values()):
            # Ties go to the pair that comes first in byte order; otherwise they would depend on the order of the texts.
            best = min(pairs, key=lambda pair: (-pairs[pair], self.tokens[pair[0]], self.tokens[pair[1]], pair))
            self.merges[best] = new = len(self.tokens)
            self.tokens.append(self.tokens[best[0]] + self.tokens[best[1]])
            self.counts.append(pairs[best])
            for i, (ids, count) in enumerate(words):
                if best[0] in ids and len(merged := merge_pair(ids, best, new)) < len(ids):
                    for pair in pairwise(ids):
                        pairs[pair] -= count
                    for pair in pairwise(merged):
                        pairs[pair] += count
                    words[i] = merged, count
        return self

    def encode(self, text: str) -> list[int]:
        """Any text (that UTF-8 can represent) -> ids.

        The earliest learned merge comes first. It makes no pair that was learned before it, since such a pair can't
        contain the new token; so this is the same as applying all merges in turn.
        """
        encoded = []
        for part in self.split(text):
            ids = self.spell(part)
            while len(ids) > 1:
                best = min(pairwise(ids), key=lambda pair: self.merges.get(pair, math.inf))
                if best not in self.merges:
                    break
                ids = merge_pair(ids, best, self.merges[best])
            encoded += ids
        return encoded

    def decode(self, ids: list[int]) -> str:
        """The inverse of encode. Bytes that are not valid UTF-8, which a model may well generate, become U+FFFD."""
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")


class Words:
    """The base's tokenizer with the same methods: a token is a word, and other words are an error."""

    tokens = [token.encode() for token in VOCABULARY]

    def encode(self, text: str) -> list[int]:
        """Raises InputError, a ValueError, for the first word that is not in the vocabulary."""
        return to_ids(text.split())

    def decode(self, ids: list[int]) -> str:
        return " ".join(to_tokens(ids))


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================


def exchange(model, tokenizer):
    """Give a decoder-only model the tokenizer's vocabulary, in place; returns it. Nothing else depends on it: the
    output layer is the embedding table (weight tying)."""
    old = model.embedding.weight
    model.embedding = nn.Embedding(len(tokenizer.tokens), old.size(1)).apply(decoder_only.init_weights).to(old.device)
    return model


def make_example(number: int, tokenizer) -> dict:
    """toy_dataset.decoder_only_example with the name in the tokenizer's ids, and a loss on the name alone.

    ids      <SOS>  3   4   2   <SEP>   th   ree   _hund   red _fort   y   _two
    targets    -    -   -   -    th    ree _hund    red  _fort   y   _two  <EOS>
    """
    prompt = decoder_only.make_prompt(number)
    name = [*tokenizer.encode(" ".join(number_to_words(number))), EOS_ID]
    return {"ids": (prompt + name)[:-1], "targets": [IGNORE] * (len(prompt) - 1) + name}


def written(tokenizer, row: torch.Tensor) -> str:
    """One row of generated ids as text, up to <EOS>."""
    ids = [*row.tolist(), EOS_ID]
    return tokenizer.decode(ids[:ids.index(EOS_ID)])


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================

MAX_LENGTH = 2 + MAX_DIGITS + MAX_WORDS * (1 + max(map(len, WORDS)))  # enough for any prompt and name, byte by byte


def train_tokenizers() -> dict:
    """All rows, by name; merges are learned from the names of the training numbers."""
    names = [" ".join(number_to_words(number)) for number in make_splits().train]
    tokenizers = {}
    for num_merges in NUM_MERGES:
        tokenizer = BytePairEncoding().train(names, num_merges)
        learned = len(tokenizer.merges)
        tokenizers[f"{'all ' * (learned < num_merges)}{learned} merges" if learned else "characters"] = tokenizer
    across = BytePairEncoding(across_words=True).train(names, MERGES_ACROSS)
    return tokenizers | {f"{len(across.merges)} across words": across, "words": Words()}


def build(tokenizer, seed: int):
    torch.manual_seed(seed)
    model = decoder_only.build_model(d_model=D_MODEL, d_ff=4 * D_MODEL, max_length=MAX_LENGTH)
    return exchange(model, tokenizer)


def draw_batches(examples: list[dict], size: int, seed: int) -> list[dict]:
    """NUM_STEPS batches, pass after pass over the examples, each pass in another order: the same for all tokenizers."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < NUM_STEPS * size:
        drawn += rng.sample(examples, len(examples))
    return [pad_batch(drawn[i:i + size]) for i in range(0, NUM_STEPS * size, size)]


def measure(tokenizers: dict, bar) -> dict[str, dict]:
    """For each row: tokens and milliseconds per name, the wrong answers, and for equal "tokens" and equal "names", by
    seed, what was seen in training, its seconds, exact match, and loss per token and per name."""
    found = {row: {"tokens": defaultdict(list), "names": defaultdict(list), "milliseconds": math.inf, "wrong": []}
             for row in tokenizers}
    for seed, (row, tokenizer) in product(SEEDS, tokenizers.items()):
        train, test = ([make_example(number, tokenizer) for number in numbers]
                       for numbers in (make_splits().train, make_splits().test[:NUM_TESTS]))
        test_batches = [pad_batch(test[i:i + 500]) for i in range(0, len(test), 500)]
        targets = statistics.mean(sum(target != IGNORE for target in example["targets"]) for example in test)
        found[row]["tokens per name"] = targets - 1  # without <EOS>
        length = statistics.mean(len(example["ids"]) for example in train)
        for equal, size in (("names", NAMES_PER_STEP), ("tokens", round(TOKENS_PER_STEP / length))):
            batches, model = draw_batches(train, size, seed), build(tokenizer, seed)
            start = time.perf_counter()
            decoder_only.train(model, Splits(batches, [], []), 1, LEARNING_RATE, num_evaluations=0, progress=bar)
            seconds = time.perf_counter() - start
            tested = decoder_only.evaluate(model, test_batches)
            seen = sum((batch["ids"] != PAD_ID).sum().item() for batch in batches)
            for key, value in (("names", NUM_STEPS * size), ("tokens", seen), ("seconds", seconds),
                               ("exact", tested["exact_match"]), ("per token", tested["loss"]),
                               ("per name", tested["loss"] * targets)):
                found[row][equal][key].append(value)
        milliseconds, wrong = generate_names(model, tokenizer)
        # The best of the seeds: other work on the machine can only add time.
        found[row]["milliseconds"] = min(found[row]["milliseconds"], milliseconds)
        found[row]["wrong"] += wrong
    return found


def generate_names(model, tokenizer) -> tuple[float, list[tuple[int, str]]]:
    """NUM_GENERATED names, greedily and one at a time: milliseconds per name, and the wrong ones with their numbers."""
    numbers, rows = make_splits().test[:NUM_GENERATED], []
    start = time.perf_counter()
    for number in numbers:
        rows.append(decoder_only.generate(model, [decoder_only.make_prompt(number)], MAX_LENGTH, temperature=0.0)[0])
    milliseconds = 1000 * (time.perf_counter() - start) / len(numbers)
    answers = [(number, written(tokenizer, row)) for number, row in zip(numbers, rows)]
    return milliseconds, [(number, text) for number, text in answers if text != " ".join(number_to_words(number))]


def show(token: bytes) -> str:
    """A token in ASCII: _ for a space, \\xe2 for a byte beyond it."""
    return token.decode("ascii", "backslashreplace").replace(" ", "_")


def print_in_columns(texts: list[str], columns: int) -> None:
    for i in range(0, len(texts), columns):
        print("  " + "".join(f"{text:{96 // columns}}" for text in texts[i:i + columns]).rstrip())


def print_merges(within: BytePairEncoding, across: BytePairEncoding) -> None:
    """Every merge within words, in the order of learning, and some of those across words."""
    names = [" ".join(number_to_words(number)) for number in make_splits().train]
    words = {part.encode() for name in names for part in within.split(name)}
    cells, spanning = [], []
    for tokenizer in (within, across):
        for place, ((a, b), count) in enumerate(zip(tokenizer.merges, tokenizer.counts), start=1):
            a, b = tokenizer.tokens[a], tokenizer.tokens[b]
            cell = f"{place:4} {show(a)}+{show(b)}{'*' * (a + b in words)} {count:,}"
            if tokenizer is within:
                cells.append(cell)
            elif b" " in (a + b)[1:]:
                spanning.append(cell)
    print(f"\nMERGES WITHIN WORDS, in the order of learning, each with its count at that time\n"
          f"_ is a space; * completes one of the {len(words)} words, counted with and without a space before them\n")
    print_in_columns(cells, 4)
    if words <= set(within.tokens):
        say(f"{len(within.merges)} merges exist: then each of the {len(words)} words is one token.")
    print(f"\nMERGES ACROSS WORDS: {len(spanning)} of {len(across.merges)} tokens go beyond one word. The first and "
          f"the last of them:\n")
    print_in_columns(spanning[:9] + spanning[9:][-6:], 3)


def print_misspellings(tokenizers: dict) -> None:
    """What each tokenizer makes of texts that are not names, and the error of the one that has only words."""
    print("\nWHAT A MISSPELLING BECOMES (tokens between bars)")
    for text in MISSPELLINGS:
        print(f"\n  {ascii(text)}")
        for row, tokenizer in tokenizers.items():
            try:
                tokens = "|".join(show(tokenizer.tokens[i]) for i in tokenizer.encode(text))
            except InputError as error:
                tokens = f"ValueError: {ascii(str(error).partition('. ')[0])}"
            print(f"    {row:18}{tokens}")


def spread(values: list[float]) -> str:
    """The mean over the seeds, and the range: `1.2% (0.9 to 1.6)`."""
    return f"{statistics.mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def differ(values: list[float], others: list[float]) -> bool:
    """Whether two rows differ by more than seed noise: their ranges over the seeds do not overlap."""
    return max(values) < min(others) or max(others) < min(values)


def new_figure(title: str, height: float) -> Figure:
    """An empty picture in the style of visualizations.py. The title is a plain sentence that the picture shows."""
    matplotlib.rc_file(Path(__file__).resolve().parent.parent / "figures" / "style.mplstyle")
    figure = Figure(figsize=(matplotlib.rcParams["figure.figsize"][0], height))
    figure.suptitle(textwrap.fill(title, 54), x=0.01, ha="left", linespacing=1.25)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture: the same bytes from the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None}, pil_kwargs={"compress_level": 9})
    print(f"\nWrote {path}")


def draw(found: dict) -> Figure:
    """Exact match of each row, for equal tokens and for equal names."""
    exact = {row: statistics.mean(result["tokens"]["exact"]) for row, result in found.items()}
    best = max(exact, key=exact.get)
    figure = new_figure(f"After equally many tokens, {exact[best]:.0%} of the names are correct with {best}, "
                        f"{exact['characters']:.0%} with characters", 4.8)
    axes = figure.subplots()
    for equal, colour, marker, shift, label in (
            ("tokens", "#0072B2", "o", -0.1, f"equal tokens: {NUM_STEPS} updates of {TOKENS_PER_STEP:,} tokens"),
            ("names", "#E69F00", "s", 0.1, f"equal names: {NUM_STEPS} updates of {NAMES_PER_STEP} names")):
        for x, result in enumerate(found.values()):
            values = result[equal]["exact"]
            axes.plot([x + shift] * 2, [min(values), max(values)], color=colour, clip_on=False)
            axes.plot(x + shift, statistics.mean(values), marker, color=colour, markersize=9, clip_on=False)
        axes.plot([], [], marker, color=colour, markersize=9, label=label)
    axes.set_xticks(range(len(found)), [textwrap.fill(row, 10) + f"\n{result['tokens per name']:.1f}"
                                        for row, result in found.items()])
    axes.set(xlabel="tokenizer, tokens per name", ylabel="exact match, mean and range", ylim=(0, 1))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="y")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=11)
    return figure


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def print_results(found: dict, equal: str) -> None:
    """One table, and what it comes to."""
    letters = statistics.mean(len(" ".join(number_to_words(number))) for number in make_splits().test[:NUM_TESTS])
    update = {"tokens": f"about {TOKENS_PER_STEP:,} tokens, prompts included",
              "names": f"{NAMES_PER_STEP} names"}[equal]
    print(f"\nEQUAL {equal.upper()}: {NUM_STEPS} updates of {update}\n"
          f"Exact match on {NUM_TESTS:,} held-out numbers, mean of {len(SEEDS)} seeds (range)\n"
          f"Loss in nats per token and per name, and in bits per character; its floor is 0\n\n"
          f"  {'':18}{'names':>9}{'tokens':>11}{'seconds':>9}{'exact match':>24}{'token':>8}{'name':>8}{'bits':>8}")
    mean = {row: {key: statistics.mean(values) for key, values in result[equal].items()}
            for row, result in found.items()}
    exact = {row: result[equal]["exact"] for row, result in found.items()}
    for row, values in mean.items():
        print(f"  {row:18}{values['names']:9,.0f}{values['tokens']:11,.0f}{values['seconds']:9.1f}"
              f"{spread(exact[row]):>24}{values['per token']:8.4f}{values['per name']:8.3f}"
              f"{values['per name'] / math.log(2) / letters:8.4f}")
    best = max(mean, key=lambda row: mean[row]["exact"])
    level = [row for row in found if row != best and not differ(exact[row], exact[best])]
    seconds = [values["seconds"] for values in mean.values()]
    say(f"Highest exact match: {best}; within seed noise of it (the ranges overlap): {', '.join(level) or 'none'}. "
        f"Training took {min(seconds):.1f} to {max(seconds):.1f} s, a factor of {max(seconds) / min(seconds):.1f}.")
    order = [", ".join(sorted(mean, key=lambda row: mean[row][loss])) for loss in ("per token", "per name")]
    say(f"From the lowest loss to the highest, per token: {order[0]}. Per name, which is comparable: {order[1]}.")


def print_mistakes(found: dict) -> None:
    """Wrong names, how many of them contain something that is not a word of the language, and one of them."""
    print(f"\nMISTAKES in {NUM_GENERATED * len(SEEDS)} generated names (equal tokens): how many, how many of them "
          f"misspelled,\nand the first misspelled one, or else the first\n")
    for row, result in found.items():
        misspelled = [(n, text) for n, text in result["wrong"] if not set(text.split()) <= set(WORDS)]
        example = "".join(f"{n}: {ascii(text)[1:-1]}" for n, text in (misspelled + result["wrong"])[:1])
        print(f"  {row:18}{len(result['wrong']):3}{len(misspelled):4}  "
              + (example if len(example) <= 71 else example[:68] + "..."))


def main() -> None:
    """The merges, the misspellings, the tokenizers, training for equal tokens and for equal names, the picture."""
    for name, value, lowest in [("NUM_STEPS", NUM_STEPS, 1), ("NAMES_PER_STEP", NAMES_PER_STEP, 1),
                                ("NUM_TESTS", NUM_TESTS, 1), ("NUM_GENERATED", NUM_GENERATED, 1),
                                ("TOKENS_PER_STEP", TOKENS_PER_STEP, MAX_LENGTH), ("MERGES_ACROSS", MERGES_ACROSS, 0)]:
        check_constant(name, value, int, lambda n, lowest=lowest: n >= lowest,
                       f"a whole number, at least {lowest}")
    check_constant("NUM_MERGES", NUM_MERGES, tuple, lambda rows: rows[:1] == (0,) and list(rows) == sorted(set(rows)),
                   "ascending, beginning with 0, the characters: (0, 16) works")

    tokenizers = train_tokenizers()
    print_merges(*list(tokenizers.values())[-3:-1])
    print_misspellings(tokenizers)
    total = len(tokenizers) * 2 * len(SEEDS) * NUM_STEPS
    with tqdm(total=total, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        found = measure(tokenizers, bar)

    print(f"\nTOKENIZERS: the time is for generating one name at a time\n\n"
          f"  {'':18}{'vocabulary':>12}{'tokens per name':>18}{'ms per name':>14}")
    for row, tokenizer in tokenizers.items():
        print(f"  {row:18}{len(tokenizer.tokens):12}{found[row]['tokens per name']:18.2f}"
              f"{found[row]['milliseconds']:14.1f}")
    print_results(found, "tokens")
    print_mistakes(found)
    print_results(found, "names")
    save_figure(draw(found), FIGURE)


if __name__ == "__main__":
    run_script(main)
