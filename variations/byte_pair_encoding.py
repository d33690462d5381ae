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
>>> [(pair, count) for pair, count in zip(tokenizer.ranks, tokenizer.counts)]
[((b'n', b'e'), 3), ((b'o', b'ne'), 2)]
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
row, so that only the names are tokenized differently.

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
from collections import Counter
from itertools import pairwise
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
NAMES_PER_STEP = 64              # equal names: an update sees this many, however many tokens they are
NUM_STEPS = 300                  # updates in every run. Try 1000: does the order of the rows change?
LEARNING_RATE = 4e-3
NUM_TESTS = 1000                 # held-out numbers for loss and exact match
NUM_TIMED = 20                   # numbers named one at a time, for milliseconds per name
SEEDS = (0, 1, 2)                # of initial weights and order of names
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "byte_pair_encoding.png"

# ======================================================================================================
# THE EXCHANGED PART
# ======================================================================================================

CONTROL = SPECIAL_TOKENS + DIGITS  # <PAD> ... <MASK> and the digits of prompts keep the ids that they have in the base


def merge_pair(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Replace each occurrence of the pair by one token, from left to right.

    >>> merge_pair([b"n", b"o", b"n", b"e"], (b"n", b"e"))
    [b'n', b'o', b'ne']
    """
    merged = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


class BytePairEncoding:
    """Text <-> ids. A token is a byte string: one of the 256 bytes, or what merges have made of them."""

    def __init__(self, across_words: bool = False):
        self.across_words = across_words
        self.ranks = {}    # pair -> its place in the order of learning
        self.counts = []   # how often each pair occurred when it was merged
        self.tokens = [token.encode() for token in CONTROL] + [bytes([byte]) for byte in range(256)]  # by id
        # Text is never encoded to control tokens: "<EOS>" typed by a user is five bytes, and does not end the answer.
        self.ids = {token: i for i, token in enumerate(self.tokens) if i >= len(CONTROL)}

    def split(self, text: str) -> list[str]:
        """The parts within which merges take place: words, each with the space before it, or the whole text.

        >>> BytePairEncoding().split("two hundred ten")
        ['two', ' hundred', ' ten']
        """
        return [text] if self.across_words else re.findall(" ?[^ ]+| ", text)

    def train(self, texts: list[str], num_merges: int):
        """Learn merges from texts: num_merges, or fewer if every part has become one token. Returns self.

        Equal parts are merged equally, so each is kept once, with its number of occurrences. And a merge changes the
        counts of pairs only in the parts that contain it: the others need no recount.
        """
        parts = Counter(part for text in texts for part in self.split(text))
        words = [([bytes([byte]) for byte in part.encode()], count) for part, count in parts.items()]
        pairs = Counter()
        for tokens, count in words:
            for pair in pairwise(tokens):
                pairs[pair] += count
        while len(self.ranks) < num_merges and any(pairs.values()):
            # The pair itself is the second key. With the first alone, ties would depend on the order of the texts.
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            self.add(best, pairs[best])
            for i, (tokens, count) in enumerate(words):
                if best[0] in tokens and len(merged := merge_pair(tokens, best)) < len(tokens):
                    for pair in pairwise(tokens):
                        pairs[pair] -= count
                    for pair in pairwise(merged):
                        pairs[pair] += count
                    words[i] = merged, count
        return self

    def add(self, pair: tuple[bytes, bytes], count: int) -> None:
        """Append a merge to the list, and its token to the vocabulary, unless two other tokens gave the same before."""
        self.ranks[pair] = len(self.ranks)
        self.counts.append(count)
        if pair[0] + pair[1] not in self.ids:
            self.ids[pair[0] + pair[1]] = len(self.tokens)
            self.tokens.append(pair[0] + pair[1])

    def encode(self, text: str) -> list[int]:
        """Any text (that UTF-8 can represent) -> ids: apply the merges that occur, the earliest learned first."""
        ids = []
        for part in self.split(text):
            tokens = [bytes([byte]) for byte in part.encode()]
            while len(tokens) > 1:
                best = min(pairwise(tokens), key=lambda pair: self.ranks.get(pair, math.inf))
                if best not in self.ranks:
                    break
                tokens = merge_pair(tokens, best)
            ids += [self.ids[token] for token in tokens]
        return ids

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
        learned = len(tokenizer.ranks)
        tokenizers[f"{'all ' * (learned < num_merges)}{learned} merges" if learned else "characters"] = tokenizer
    across = BytePairEncoding(across_words=True).train(names, MERGES_ACROSS)
    return tokenizers | {f"{len(across.ranks)} across words": across, "words": Words()}


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


def milliseconds_per_name(model) -> float:
    """Time to name NUM_TIMED numbers one at a time, greedily, with the KV cache."""
    start = time.perf_counter()
    for number in make_splits().test[:NUM_TIMED]:
        decoder_only.generate(model, [decoder_only.make_prompt(number)], max_new_tokens=MAX_LENGTH, temperature=0.0)
    return 1000 * (time.perf_counter() - start) / NUM_TIMED


def measure(tokenizers: dict, bar) -> dict[str, dict]:
    """For each row: tokens and milliseconds per name and, for equal "tokens" and equal "names", a training run per
    seed: names and tokens seen, seconds, exact match, and loss per token and per name."""
    found = {row: {"tokens": [], "names": []} for row in tokenizers}
    for seed in SEEDS:
        for row, tokenizer in tokenizers.items():
            train, test = ([make_example(number, tokenizer) for number in numbers]
                           for numbers in (make_splits().train, make_splits().test[:NUM_TESTS]))
            test_batches = [pad_batch(test[i:i + 500]) for i in range(0, len(test), 500)]
            targets = statistics.mean(sum(target != IGNORE for target in example["targets"]) for example in test)
            length = statistics.mean(len(example["ids"]) for example in train)
            for equal, size in (("tokens", round(TOKENS_PER_STEP / length)), ("names", NAMES_PER_STEP)):
                batches, model = draw_batches(train, size, seed), build(tokenizer, seed)
                start = time.perf_counter()
                decoder_only.train(model, Splits(batches, [], []), 1, LEARNING_RATE, num_evaluations=0, progress=bar)
                seconds = time.perf_counter() - start
                tested = decoder_only.evaluate(model, test_batches)
                found[row][equal].append({
                    "names": NUM_STEPS * size,
                    "tokens": sum((batch["ids"] != PAD_ID).sum().item() for batch in batches),
                    "seconds": seconds, "exact": tested["exact_match"],
                    "per token": tested["loss"], "per name": tested["loss"] * targets})
            found[row]["tokens per name"] = targets - 1  # without <EOS>
            fastest = found[row].get("milliseconds", math.inf)  # the best of the seeds: other work only adds time
            found[row]["milliseconds"] = min(fastest, milliseconds_per_name(model))
    return found


def values_of(runs: list[dict], key: str) -> list[float]:
    return [run[key] for run in runs]


def best_of(found: dict, equal: str) -> str:
    """The row with the highest exact match."""
    return max(found, key=lambda row: statistics.mean(values_of(found[row][equal], "exact")))


def show(token: bytes) -> str:
    """A token in ASCII: _ for a space, \\xe2 for a byte beyond it."""
    return token.decode("ascii", "backslashreplace").replace(" ", "_")


def print_merges(tokenizers: dict) -> None:
    """Every merge within words, in the order of learning, and those across words that are not among them."""
    *_, within, across, _ = tokenizers.values()
    parts = {part.encode() for number in make_splits().train for part in
             within.split(" ".join(number_to_words(number)))}

    def cells(tokenizer):
        return [f"{rank + 1:4} {show(a)}+{show(b)}{'*' * (a + b in parts)} {count:,}"
                for ((a, b), rank), count in zip(tokenizer.ranks.items(), tokenizer.counts)]

    def print_in_columns(texts, columns):
        for i in range(0, len(texts), columns):
            print("  " + "".join(f"{text:{96 // columns}}" for text in texts[i:i + columns]).rstrip())

    print(f"\nMERGES WITHIN WORDS, in the order of learning, each with its count at that time\n"
          f"_ is a space; * completes one of the {len(parts)} words, counted with and without a space before them\n")
    print_in_columns(cells(within), 4)
    whole = [a + b for a, b in within.ranks if a + b in parts]
    if parts <= within.ids.keys():
        say(f"{len(within.ranks)} merges exist: then each of the {len(parts)} words is one token. The first to become "
            f"one is {show(whole[0])}, the last {show(whole[-1])}.")
    spanning = [cell for cell, (a, b) in zip(cells(across), across.ranks) if b" " in (a + b)[1:]]
    print(f"\nMERGES ACROSS WORDS: {len(spanning)} of {len(across.ranks)} tokens go beyond one word. The first and "
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
    best = best_of(found, "tokens")
    exact = {row: statistics.mean(values_of(result["tokens"], "exact")) for row, result in found.items()}
    figure = new_figure(f"After equally many tokens, {exact[best]:.0%} of the names are correct with {best}, "
                        f"{exact['characters']:.0%} with characters", 4.8)
    axes = figure.subplots()
    for equal, colour, marker, shift, label in (
            ("tokens", "#0072B2", "o", -0.1, f"equal tokens: {NUM_STEPS} updates of {TOKENS_PER_STEP:,} tokens"),
            ("names", "#E69F00", "s", 0.1, f"equal names: {NUM_STEPS} updates of {NAMES_PER_STEP} names")):
        for x, result in enumerate(found.values()):
            values = values_of(result[equal], "exact")
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
    update = {"tokens": f"about {TOKENS_PER_STEP:,} tokens", "names": f"{NAMES_PER_STEP} names"}[equal]
    print(f"\nEQUAL {equal.upper()}: {NUM_STEPS} updates of {update}. Exact match on {NUM_TESTS:,} held-out numbers, "
          f"mean of\n{len(SEEDS)} seeds (range). Loss in nats per token and per name, and in bits per character; its "
          f"floor is 0\n\n  {'':18}{'names':>9}{'tokens':>11}{'seconds':>9}{'exact match':>24}{'token':>8}{'name':>8}"
          f"{'bits':>8}")
    exact, seconds = {}, []
    for row, result in found.items():
        runs = result[equal]
        exact[row] = values_of(runs, "exact")
        seconds.append(statistics.mean(values_of(runs, "seconds")))
        per_token, per_name = (statistics.mean(values_of(runs, key)) for key in ("per token", "per name"))
        print(f"  {row:18}{runs[0]['names']:9,}{runs[0]['tokens']:11,}{seconds[-1]:9.1f}{spread(exact[row]):>24}"
              f"{per_token:8.4f}{per_name:8.3f}{per_name / math.log(2) / letters:8.4f}")
    best = best_of(found, equal)
    level = [row for row in found if row != best and not differ(exact[row], exact[best])]
    say(f"Highest exact match: {best}; within seed noise of it (the ranges overlap): {', '.join(level) or 'none'}. "
        f"Training took {min(seconds):.1f} to {max(seconds):.1f} s, a factor of {max(seconds) / min(seconds):.1f}.")


def main() -> None:
    """The merges, the misspellings, the tokenizers, training for equal tokens and for equal names, the picture."""
    for name, value in [("NUM_STEPS", NUM_STEPS), ("NAMES_PER_STEP", NAMES_PER_STEP), ("NUM_TESTS", NUM_TESTS),
                        ("NUM_TIMED", NUM_TIMED)]:
        check_constant(name, value, int, lambda n: n >= 1, "a whole number, at least 1")
    check_constant("TOKENS_PER_STEP", TOKENS_PER_STEP, int, lambda n: n >= MAX_LENGTH,
                   f"a whole number, at least {MAX_LENGTH}, so that it holds a name")
    for num_merges in [*NUM_MERGES, MERGES_ACROSS]:
        check_constant("NUM_MERGES, MERGES_ACROSS", num_merges, int, lambda n: n >= 0, "whole numbers, at least 0")
    check_constant("NUM_MERGES", NUM_MERGES, tuple, lambda rows: 0 in rows and list(rows) == sorted(set(rows)),
                   "ascending and start with 0, the characters: (0, 16) works")

    tokenizers = train_tokenizers()
    print_merges(tokenizers)
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
    order = [", ".join(sorted(found, key=lambda row: statistics.mean(values_of(found[row]["tokens"], loss))))
             for loss in ("per token", "per name")]
    say(f"From the lowest loss to the highest, per token: {order[0]}. Per name, which is comparable: {order[1]}.")
    print_results(found, "names")
    save_figure(draw(found), FIGURE)


if __name__ == "__main__":
    run_script(main)
