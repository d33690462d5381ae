"""toy_dataset.py - the small language that all three transformers in this repository learn.

Whole numbers below a million, written as digits, and their English names, written as words:

    3 4 2      <->  three hundred forty two
    9 0 2 1 0  <->  ninety thousand two hundred ten          (no "and", no hyphens)

Why this language? All million sentences are known, so every answer can be checked. It is small enough to learn in
seconds on two CPU cores, and it still has what makes real language hard:

    variable length      7 is one digit and one word, 777777 is six digits and nine words
    alignment            "two thousand ten" is 2 0 1 0: the zeros have no words of their own
    left context         "two" after "thousand" is 2 or 200, but not 2000: the thousands have been named
    right context        "six hundred ..." is 600, or 600000 if "thousand" follows later

The models train on 10,000 numbers, 1% of the language, and are tested on others. Getting those right takes the naming
rule, not memorized names.

The language defines three tasks, one for each transformer family:

    understand   label each digit's place value:  3 4 2 -> hundreds, tens, ones      (encoder_only.py)
    generate     generate a new number with its name                                 (decoder_only.py)
    transform    digits in, words out                                                (encoder_decoder.py)

Run `python toy_dataset.py` (a second or two): it prints the vocabulary, the splits, the same numbers as input to each
architecture, and a padded batch with its mask. To experiment, change a constant below and run it again.
"""

import random
import sys
from collections import defaultdict
from functools import cache
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

# ======================================================================================================
# CONSTANTS
# ======================================================================================================

MAX_DIGITS = 6           # longest number, in digits: 6 is below a million. Try 9 (below a billion), 12 (a trillion).
NUM_TRAIN = 10_000       # training numbers: 1% of the language, if MAX_DIGITS is 6. Try 1_000: what breaks first?
NUM_VALIDATION = 2_000   # held out; evaluated during training to monitor progress
NUM_TEST = 20_000        # held out; used only after training: the accuracies that count
SEED = 1234              # decides which numbers fall into which split. Try 1235: do the results change?


class InputError(ValueError):
    """A user error: the shell shows one line, no traceback.

    It has its own class so that bugs in the code (yours, while you experiment) keep their full traceback.
    """


if not (isinstance(MAX_DIGITS, int) and 3 <= MAX_DIGITS <= 12):
    sys.exit(f"toy_dataset.py: MAX_DIGITS = {MAX_DIGITS} is out of range: use an integer from 3 to 12.")

# ======================================================================================================
# THE LANGUAGE: numbers <-> words
# ======================================================================================================

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()                       # ONES[n] names n, for n below 20
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # TENS[n] names 10 * (n + 2)
UNITS = {"billion": 10**9, "million": 10**6, "thousand": 1000, "hundred": 100}  # large to small, in spoken order
UNITS = {word: value for word, value in UNITS.items() if value < 10**MAX_DIGITS}  # only those that occur
VALUES = {**{word: n for n, word in enumerate(ONES)}, **{word: 10 * n for n, word in enumerate(TENS, start=2)}}

# Place values, counted from the right: PLACES[0] is that of the last digit.
PLACES = ("ones tens hundreds thousands ten-thousands hundred-thousands millions ten-millions hundred-millions "
          "billions ten-billions hundred-billions").split()[:MAX_DIGITS]


def number_to_words(number: int) -> list[str]:
    """The English name of a number.

    >>> " ".join(number_to_words(90210))
    'ninety thousand two hundred ten'
    """
    if number < 20:
        return [ONES[number]]
    if number < 100:
        tens, rest = divmod(number, 10)
        return [TENS[tens - 2]] + (number_to_words(rest) if rest else [])
    # The largest unit that fits splits the number into two smaller ones, each named the same way:
    # 90210 = 90 thousand + 210. A remainder of zero is omitted: "ninety thousand", not "ninety thousand zero".
    unit, value = next((unit, value) for unit, value in UNITS.items() if value <= number)
    count, rest = divmod(number, value)
    return number_to_words(count) + [unit] + (number_to_words(rest) if rest else [])


def words_to_number(words: list[str]) -> int:
    """The number with this name; the exact inverse of number_to_words.

    Raises InputError for anything that is not the name of a number ("two two", "hundred", "one zero").

    >>> words_to_number("ninety thousand two hundred ten".split())
    90210
    """
    total = group = 0  # `group` is the sum of the words since the last thousand, million, ...
    for word in words:
        if word == "hundred":
            group *= 100
        elif word in UNITS:
            total, group = total + group * UNITS[word], 0
        elif word in VALUES:
            group += VALUES[word]
        else:
            raise InputError(f"{word!r} is not a number word. Known words: {' '.join([*VALUES, *UNITS])}.")
    number = total + group
    # The sum also accepts "two ten" (12), so check that number_to_words gives the same words back.
    if not words or number >= 10**MAX_DIGITS or number_to_words(number) != list(words):
        raise InputError(f"'{' '.join(words)}' is not the name of a number from 0 to {10**MAX_DIGITS - 1}.")
    return number


def parse_number(text: str) -> int:
    """Parse user input. Raises InputError, in one sentence, if it is outside the language.

    >>> parse_number("342")
    342
    """
    if not (text.isascii() and text.isdigit()) or (text != "0" and text.startswith("0")):
        raise InputError(f"{text!r} is not a number in this language: digits only, no sign, comma or leading zero.")
    if len(text) > MAX_DIGITS:
        raise InputError(f"{text} is too long: numbers in this language have 1 to {MAX_DIGITS} digits.")
    return int(text)


# ======================================================================================================
# THE VOCABULARY: tokens <-> ids
# ======================================================================================================

# A model's input is neither digits nor words but ids: row numbers of its embedding table. Digits and words share ONE
# table, so that a token has the same embedding everywhere: in a source, in a target, before or after a <SEP>.
SPECIAL_TOKENS = [
    "<PAD>",   # pads sequences to the longest in the batch; masked in attention, ignored by the loss
    "<SOS>",   # start of sequence: a decoder's first input
    "<EOS>",   # end of sequence: the model predicts it to stop
    "<CLS>",   # "classify": its output vector represents the whole sequence (BERT)
    "<SEP>",   # separates the digits from their name
    "<MASK>",  # replaces a token that must be predicted (BERT)
]
DIGITS = list("0123456789")
WORDS = [*VALUES, *reversed(UNITS)]
VOCABULARY = SPECIAL_TOKENS + DIGITS + WORDS
TOKEN_TO_ID = {token: i for i, token in enumerate(VOCABULARY)}
PAD_ID, SOS_ID, EOS_ID, CLS_ID, SEP_ID, MASK_ID = range(len(SPECIAL_TOKENS))  # PAD_ID is 0

IGNORE = -100  # target of positions without a loss: F.cross_entropy skips it (its default ignore_index)

MAX_WORDS = max(len(number_to_words(int("7" * length))) for length in range(1, MAX_DIGITS + 1))  # 777777 is the longest


def to_ids(tokens: list[str]) -> list[int]:
    """Tokens -> ids. Raises InputError naming the first token that is not in the vocabulary.

    >>> to_ids(["<SOS>", "7", "seven"])
    [1, 13, 23]
    """
    for token in tokens:
        if token not in TOKEN_TO_ID:
            raise InputError(f"{token!r} is not in the vocabulary. Known tokens: {' '.join(VOCABULARY)}.")
    return [TOKEN_TO_ID[token] for token in tokens]


def to_tokens(ids: list[int]) -> list[str]:
    """Ids -> tokens, dropping padding; otherwise the inverse of to_ids."""
    return [VOCABULARY[i] for i in ids if i != PAD_ID]


# ======================================================================================================
# THE SPLITS: training, validation and test numbers
# ======================================================================================================


class Splits(NamedTuple):
    """Three disjoint lists of numbers (or three DataLoaders over them)."""

    train: list
    validation: list
    test: list


def spread_evenly(total: int, capacities: list[int]) -> list[int]:
    """Distribute `total` over bins of limited capacity (in ascending order), as evenly as possible.

    >>> spread_evenly(100, [10, 50, 500])     # the first bin is full, the other two share the rest
    [10, 45, 45]
    """
    shares = []
    for i, capacity in enumerate(capacities):
        shares.append(min(capacity, total // (len(capacities) - i)))
        total -= shares[-1]
    return shares


@cache
def make_splits() -> Splits:
    """Draw the training, validation and test numbers: disjoint, determined by SEED, the same on every machine.

    Numbers are drawn by length. Sampled uniformly, nine in ten would have six digits and short ones would be rare.
    - Everything below 100 is for training: a word that never occurs in training cannot be predicted.
    - At most half of the numbers of each longer length are for training, and at most half of the rest for validation,
      so that some of every length remain for the test.
    """
    if NUM_TRAIN <= 100 or NUM_VALIDATION < 1 or NUM_TEST < 1:
        raise InputError(f"NUM_TRAIN = {NUM_TRAIN} must be above 100, since it includes all numbers below 100; "
                         f"NUM_VALIDATION = {NUM_VALIDATION} and NUM_TEST = {NUM_TEST} must be at least 1.")
    lengths = range(3, MAX_DIGITS + 1)
    sizes = [9 * 10 ** (length - 1) for length in lengths]  # how many numbers of this length there are
    train_counts = spread_evenly(NUM_TRAIN - 100, [size // 2 for size in sizes])
    left = [size - count for size, count in zip(sizes, train_counts)]
    validation_counts = spread_evenly(NUM_VALIDATION, [size // 2 for size in left])
    left = [size - count for size, count in zip(left, validation_counts)]
    test_counts = spread_evenly(NUM_TEST, left)

    rng = random.Random(SEED)
    splits = Splits(list(range(100)), [], [])
    for length, *counts in zip(lengths, train_counts, validation_counts, test_counts):
        # One draw without replacement, cut in three: disjoint by construction.
        drawn = iter(rng.sample(range(10 ** (length - 1), 10**length), sum(counts)))
        for split, count in zip(splits, counts):
            split.extend(next(drawn) for _ in range(count))
    for split in splits:
        rng.shuffle(split)  # so that split[:500] represents all lengths
    return splits


# ======================================================================================================
# THE EXAMPLES: one number, as input to each architecture
# ======================================================================================================
# An example is a dict of plain lists. "targets" align with the positions that predict them.


def masked_lm_example(number: int) -> dict:
    """BERT's two-segment input. Masking is dynamic, drawn anew for each batch (encoder_only.mask_tokens).

    ids      <CLS> 3 4 2 <SEP> three hundred forty two <SEP>
    """
    return {"ids": to_ids(["<CLS>", *str(number), "<SEP>", *number_to_words(number), "<SEP>"])}


def tagging_example(number: int) -> dict:
    """Token classification: a label for each digit, its place value (an index into PLACES).

    ids      <CLS>  3  4  2  <SEP>
    places     -    2  1  0    -                  (- is IGNORE)
    """
    digits = str(number)
    return {"ids": to_ids(["<CLS>", *digits, "<SEP>"]), "places": [IGNORE, *reversed(range(len(digits))), IGNORE]}


def counting_example(number: int) -> dict:
    """Sequence classification: one label per sequence, the number of words in the name (minus 1, to start at 0).

    ids      <CLS> 3 4 2 <SEP>
    count    3                                    (class 3: four words)
    """
    return {"ids": to_ids(["<CLS>", *str(number), "<SEP>"]), "count": len(number_to_words(number)) - 1}


def matching_example(number: int) -> dict:
    """Sentence-pair classification: do the digits (sentence A) and the name (sentence B) stand for the same number?

    ids      <CLS> 2 4 3 <SEP> three hundred forty two <SEP>
    match    0                                    (class 0: no, class 1: yes)

    Half of the pairs match, on average. In the others, one digit is replaced or two are swapped. A swap leaves the bag
    of tokens unchanged, so only their order reveals the mismatch (as in PAWS, Zhang et al. 2019). The name is always
    that of `number`, so no pair is in two splits.
    """
    rng = random.Random(number)  # the same pair for the same number, every time
    match, other = rng.randrange(2), number
    while not match and (other == number or len(str(other)) < len(str(number))):  # unchanged, or with a leading zero
        digits = list(str(number))
        i, j = rng.randrange(len(digits)), rng.randrange(len(digits))
        if rng.randrange(2):
            digits[i] = rng.choice(DIGITS)
        else:
            digits[i], digits[j] = digits[j], digits[i]
        other = int("".join(digits))
    return {"ids": to_ids(["<CLS>", *str(other), "<SEP>", *number_to_words(number), "<SEP>"]), "match": match}


def decoder_only_example(number: int, loss_on_prompt: bool = True) -> dict:
    """One sequence, as in GPT: the target of each position is the next token.

    ids      <SOS>  3  4   2    <SEP>   three  hundred forty  two
    targets    3    4  2  <SEP> three  hundred  forty   two  <EOS>

    With loss_on_prompt=False all targets before `three` become IGNORE: the model then learns to name a given number,
    but not to generate one.
    """
    prompt = to_ids(["<SOS>", *str(number), "<SEP>"])
    text = prompt + to_ids([*number_to_words(number), "<EOS>"])
    targets = text[1:]
    if not loss_on_prompt:
        targets[: len(prompt) - 1] = [IGNORE] * (len(prompt) - 1)
    return {"ids": text[:-1], "targets": targets}


def encoder_decoder_example(number: int) -> dict:
    """Two sequences, as in T5. The decoder's input is the target shifted right by one: teacher forcing.

    source   3 4 2 <EOS>
    target   <SOS> three   hundred forty two
    targets  three hundred  forty   two  <EOS>
    """
    words = to_ids(number_to_words(number))
    return {"source": to_ids([*str(number), "<EOS>"]), "target": [SOS_ID, *words], "targets": [*words, EOS_ID]}


# ======================================================================================================
# BATCHES: padding, the padding mask, DataLoaders
# ======================================================================================================


def pad_batch(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack examples of different lengths into (B, T) tensors, padded on the right.

    Token ids are padded with <PAD>, labels with IGNORE. A label that is a single number gives a (B) tensor.
    """
    batch = {}
    for field, first in examples[0].items():
        rows = [example[field] for example in examples]
        if not isinstance(first, int):
            filler = IGNORE if field in ("targets", "places") else PAD_ID
            longest = max(map(len, rows))
            rows = [row + [filler] * (longest - len(row)) for row in rows]
        batch[field] = torch.tensor(rows)  # (B, T), or (B)
    return batch


def make_padding_mask(ids: torch.Tensor) -> torch.Tensor:
    """Which positions hold a real token: True = may be attended to. (B, S) -> (B, 1, 1, S).

    The two 1s broadcast over heads and queries: padding is masked for every head at every position.
    """
    return (ids != PAD_ID)[:, None, None, :]


class NumberDataset(Dataset):
    """Numbers converted to examples once, not again in each epoch."""

    def __init__(self, numbers: list[int], make_example):
        self.numbers = numbers
        self.examples = [make_example(number) for number in numbers]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def make_dataloaders(make_example, batch_size: int, seed: int, num_train: int | None = None) -> Splits:
    """DataLoaders over the three splits: training numbers are reshuffled each epoch, the others keep their order.

    num_train: use only the first num_train training numbers (they are shuffled: a random subset).
    """
    if batch_size < 1:
        raise InputError(f"BATCH_SIZE = {batch_size} must be at least 1; try 64.")
    splits = make_splits()
    splits = splits._replace(train=splits.train[:num_train])
    train, validation, test = (NumberDataset(numbers, make_example) for numbers in splits)
    order = torch.Generator().manual_seed(seed)  # separate, so that other random draws do not change the order
    return Splits(
        DataLoader(train, batch_size, shuffle=True, collate_fn=pad_batch, generator=order),
        DataLoader(validation, batch_size=1000, collate_fn=pad_batch),
        DataLoader(test, batch_size=1000, collate_fn=pad_batch),
    )


# ======================================================================================================
# SUMS OVER ALL NUMBERS: for the best possible predictor
# ======================================================================================================


def log_sum_over_numbers(scores: torch.Tensor, num_digits: int) -> torch.Tensor:
    """log of the sum, over the texts x of all numbers with num_digits digits, of exp(sum over j of scores[j, x_j]).

    scores (B, T, V) -> (B). A text is `<CLS> digits <SEP> words <SEP>` (masked_lm_example): T tokens, at positions j.

    No need to visit a million texts: a name consists of groups (ninety thousand | two hundred ten) that depend on each
    other only through their positions, that is, the number of words before them. It is enough to sum over each group's
    1,000 values, for each number of words before it: dynamic programming, like the forward algorithm of HMMs.
    """
    num_words = scores.size(1) - num_digits - 3  # <CLS> and two <SEP>
    sums = {0: scores.new_zeros(len(scores))}    # number of words so far -> log of the sum over the groups so far, (B)
    for start, end, values in digit_groups(num_digits):
        terms = defaultdict(list)
        for before, log_sum in sums.items():
            first = 2 + num_digits + before                                             # position of the next word
            for count, tokens in values.items():                                        # (N, digits + count)
                if before + count <= num_words:
                    positions = [*range(1 + start, 1 + end), *range(first, first + count)]
                    total = scores[:, positions, tokens].sum(dim=-1)                    # (B, N)
                    terms[before + count].append(log_sum + total.logsumexp(dim=1))
        sums = {words: torch.stack(logs).logsumexp(dim=0) for words, logs in terms.items()}
    return sums[num_words]


@cache
def digit_groups(num_digits: int) -> list[tuple[int, int, dict[int, torch.Tensor]]]:
    """The groups of up to three digits that are named together: where each starts and ends, and its possible values.

    The values are grouped by number of words, as ids (N, digits + words): `2 0 0 two hundred` is in the group for 2.
    """
    groups, start = [], 0
    while start < num_digits:
        end = start + (num_digits - start - 1) % 3 + 1
        lowest = 10 ** (end - 1) if start == 0 and num_digits > 1 else 0  # no leading zeros
        rows = defaultdict(list)
        for value in range(lowest, 10 ** (end - start)):
            words = number_to_words(value * 10 ** (num_digits - end)) if value or num_digits == 1 else []
            rows[len(words)].append(to_ids([*str(value).zfill(end - start), *words]))
        groups.append((start, end, {count: torch.tensor(ids) for count, ids in rows.items()}))
        start = end
    return groups


# ======================================================================================================
# FOR SCRIPTS
# ======================================================================================================


def align(number: int) -> list[set[int]]:
    """For each word of the name, the positions of the digits that it expresses: the ground-truth alignment.

    >>> align(90210)       # ninety: 9 0 (not ninety-one), thousand: 9 0, two: 2, hundred: 2, ten: 1 0
    [{0, 1}, {0, 1}, {2}, {2}, {3, 4}]
    """
    positions, digits = [], str(number)
    start = 0
    while start < len(digits):  # in groups of three, as in speech: 90 | 210
        end = start + (len(digits) - start - 1) % 3 + 1
        group = digits[start:end]
        hundreds, last_two = int(group) // 100, int(group) % 100
        if hundreds:
            positions += [{end - 3}] * 2                                # "two", "hundred"
        if last_two >= 20:
            tens_and_ones = [{end - 2, end - 1}] if last_two % 10 == 0 else [{end - 2}, {end - 1}]
            positions += tens_and_ones                                  # "twenty", or "twenty one"
        elif last_two or number == 0:
            positions += [{end - 2, end - 1} if last_two >= 10 else {end - 1}]  # "twelve", or "two"
        if int(group) and end < len(digits):
            positions += [set(range(start, end))]                       # "thousand", "million", "billion"
        start = end
    return positions


def format_mask(mask: torch.Tensor, rows: list[str], columns: list[str]) -> str:
    """A boolean mask (T, S) as text: one row per query, `#` where it may attend, `.` where it may not."""
    width = max(map(len, rows))
    height = max(map(len, columns))
    header = [" " * (width + 2) + " ".join(c.rjust(height)[line] for c in columns) for line in range(height)]
    body = [f"{row:>{width}}  " + " ".join("#" if cell else "." for cell in cells)
            for row, cells in zip(rows, mask.tolist())]
    return "\n".join(header + body)


def main():
    """Print the language: vocabulary, splits, examples, a padded batch."""
    print(f"VOCABULARY: {len(VOCABULARY)} tokens, the same ids everywhere")
    for name, tokens in [("special", SPECIAL_TOKENS), ("digits", DIGITS), ("words", WORDS)]:
        line = f"  {name:8}"
        for token in tokens:
            if len(line) + len(token) > 90:
                print(line)
                line = " " * 10
            line += f" {token}={TOKEN_TO_ID[token]}"
        print(line)

    splits = make_splits()
    print(f"\nSPLITS of the {10**MAX_DIGITS:,} numbers, by number of digits (SEED = {SEED})")
    print("  " + " " * 12 + "".join(f"{length:>7}" for length in range(1, MAX_DIGITS + 1)) + f"{'all':>8}")
    for name, numbers in zip(Splits._fields, splits):
        counts = [sum(len(str(n)) == length for n in numbers) for length in range(1, MAX_DIGITS + 1)]
        print(f"  {name:12}" + "".join(f"{c:>7,}" for c in counts) + f"{len(numbers):>8,}  e.g. {numbers[:2]}")
    sets = [set(numbers) for numbers in splits]
    shared = len(sets[0] & sets[1]) + len(sets[0] & sets[2]) + len(sets[1] & sets[2])
    print(f"  numbers in more than one split: {shared}")
    print(f"  training numbers are {100 * len(splits.train) / 10**MAX_DIGITS:.2g}% of the language")

    def row(name, ids):
        print(f"    {name:8}" + " ".join("-" if i == IGNORE else VOCABULARY[i] for i in ids))

    print("\nTHE SAME NUMBERS, AS INPUT TO EACH ARCHITECTURE   (- : no target)")
    for number in (7, 342, 90210):
        print(f"\n  {number} = {' '.join(number_to_words(number))}")
        print("   encoder-only, pretraining: some of these tokens are masked and must be predicted")
        row("ids", masked_lm_example(number)["ids"])
        print("   encoder-only, tagging and counting: each digit's place value, the number of words in the name")
        example = tagging_example(number)
        row("ids", example["ids"])
        print("    places  " + " ".join("-" if p == IGNORE else PLACES[p] for p in example["places"]))
        print(f"    count   {counting_example(number)['count'] + 1}")
        print("   encoder-only, matching: do the digits and the name stand for the same number?")
        example = matching_example(number)
        row("ids", example["ids"])
        print(f"    match   {['no', 'yes'][example['match']]}")
        print("   decoder-only: each position predicts the next token")
        for field, ids in decoder_only_example(number).items():
            row(field, ids)
        print("   encoder-decoder: given the source and the target so far, predicts the next token")
        for field, ids in encoder_decoder_example(number).items():
            row(field, ids)

    print("\nA PADDED BATCH: sequences of different lengths in one tensor")
    batch = pad_batch([tagging_example(number) for number in (7, 342, 90210)])
    print(f"  ids, shape {tuple(batch['ids'].shape)}:")
    for ids in batch["ids"].tolist():
        print("    " + " ".join(f"{i:>2}" for i in ids) + "   " + " ".join(VOCABULARY[i] for i in ids))
    mask = make_padding_mask(batch["ids"])[1, 0].expand(batch["ids"].size(1), -1)
    tokens = [VOCABULARY[i] for i in batch["ids"][1].tolist()]
    print("  its padding mask, for the second row (# may attend, . masked; one row per query):")
    print("    " + format_mask(mask, tokens, tokens).replace("\n", "\n    "))
    print("\nNext: python quick_start.py (trains and shows all three), or read encoder_only.py from the top.")


def run_script(main, parse_argument=None) -> None:
    """Run main as a script: main(), or main(*arguments) with each argument read by parse_argument.

    User errors print one line to stderr and exit with status 1 (2 for a wrong argument); Ctrl-C exits with 130. All
    other exceptions are bugs and keep their traceback.
    """
    try:
        if sys.argv[1:] and parse_argument is None:
            raise InputError("takes no arguments; edit the constants at the top of the file.")
        arguments = [parse_argument(argument) for argument in sys.argv[1:]]
    except InputError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        main(*arguments)
    except (InputError, FloatingPointError, OSError) as error:
        sys.exit(f"{sys.argv[0]}: {error}")
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
