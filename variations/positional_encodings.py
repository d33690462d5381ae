"""positional_encodings.py - six ways to encode the order of tokens, and which of them work beyond the trained length.

The problem. Without a mask, attention computes the same output for any order of its keys, so order has to be encoded.
The 2017 paper adds a vector to each embedding that depends on the absolute position. A model trained on texts of up to
50 tokens has never seen the vector of position 51, and nothing in its training says what to do with it.

The idea. What matters is usually how far apart two tokens are, so relative encodings put the distance where two
positions meet: into the score of the query at t and the key at s.

    RoPE     score = rotate(q, t) . rotate(k, s) / sqrt(d_k)      turns query and key by an angle proportional to their
                                                                  position; only the difference enters the product
    ALiBi    score = q . k / sqrt(d_k) - slope_h * (t - s)        a fixed penalty on distance, one slope for each head
    T5       score = q . k / sqrt(d_k) + b[bucket(t - s), h]      a learned number for each head and range of distances

The other three leave attention unchanged: sinusoidal (the base file), learned (an embedding table for positions, as in
BERT and GPT-2), and none at all (the causal mask alone gives a decoder some information about order).

Where attention gets the positions from. Its arguments are x, the mask and the cache, no positions. The length of the
cache gives the index of each new token, and that is enough: left padding shifts the indices of all queries and keys of
a row by the same amount, and a relative encoding depends only on their difference. For the same reason keys can be
cached rotated: each is rotated once, by its own index, and never again.

On paper, one head with d_k = 2 and frequency 1: rotate((1, 0), t) = (cos t, sin t). A query (1, 0) at t = 5 and a key
(1, 0) at s = 3 have the dot product cos 5 cos 3 + sin 5 sin 3 = cos(5 - 3), as have t = 105 and s = 103:

>>> q, k = (rotate(torch.tensor([[1.0, 0.0]]), torch.tensor([t])) for t in (5, 3))
>>> round((q * k).sum().item(), 4), round(math.cos(2), 4)
(-0.4161, -0.4161)

Papers: Vaswani et al. 2017, section 3.5 (sinusoidal); Devlin et al. 2019 (learned, in BERT); Kazemnejad et al. 2023
(none, "NoPE"); Su et al. 2021, section 3.2 (RoPE); Press et al. 2022, section 3 (ALiBi); Raffel et al. 2020, section
2.1 (T5's buckets). Stretching RoPE: Chen et al. 2023, section 2.3 (position interpolation: all positions divided by a
constant, then a short further training); Peng et al. 2023, section 3.1 (the larger base, "NTK-aware"). Simplified: all
six divide the scores by sqrt(d_k), which T5 does not; further training here uses texts of the trained lengths, where
Chen et al. train on long ones.

What you will see (under three minutes on two CPU cores): (a) six models trained on short texts and tested on longer
ones, and a trained RoPE model stretched to longer texts, with and without further training; (b) the same six encodings
on the base task, with several seeds. Writes figures/variations/positional_encodings.png.
"""

import math
import random
import statistics
import sys
import textwrap
from copy import deepcopy
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from decoder_only import scaled_dot_product_attention
from toy_dataset import EOS_ID, IGNORE, MAX_DIGITS, MAX_WORDS, SOS_ID, InputError, Splits
from toy_dataset import make_splits, number_to_words, pad_batch, run_script, to_ids

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- the encodings ---
ROTARY_BASE = 10_000.0    # the slowest pair takes at most 2 pi * ROTARY_BASE positions a turn. Try 100, 500_000
NUM_BUCKETS = 32          # T5: how many different ranges of distances. Try 8
MAX_DISTANCE = 128        # T5: all distances from here on share the last bucket. Try 32

# --- (a) longer texts than in training ---
TRAIN_PAIRS = (1, 2, 3)              # numbers in a training text. Try (1, 2, 3, 4, 5, 6): which encodings benefit?
TEST_PAIRS = (1, 2, 3, 4, 6, 8, 12)  # numbers in a test text
NUM_STEPS = 500                      # training steps. Try 1000: do long texts improve too?
NUM_TEXTS = 250                      # test texts for each length
STRETCH = 4.0                        # slows the slowest rotation of a trained RoPE model by this factor. Try 2
FURTHER_STEPS = 100                  # training steps after stretching. Try 300

# --- (b) the base task ---
NUM_EPOCHS = 2            # passes over the training numbers. Try 10 (slow): is there any difference left?
SEEDS = (0, 1, 2)         # of initial weights and order of batches

# --- both ---
D_MODEL = 64              # half of the base model's width, for speed. Try 128
MAX_LENGTH = 1 + max(TRAIN_PAIRS + TEST_PAIRS) * (MAX_DIGITS + MAX_WORDS + 2)  # room for the longest text
BATCH_SIZE = 48
LEARNING_RATE = 4e-3      # twice the base model's: half its width tolerates it
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "positional_encodings.png"

# ======================================================================================================
# THE EXCHANGED PARTS
# ======================================================================================================


def rotate(x, positions, base=ROTARY_BASE):
    """Rotary position embedding: turn each pair of dimensions of x (..., T, d_k) by an angle that grows with position.

        (x_i, x_{i + d_k/2}) <- (x_i cos a - x_{i + d_k/2} sin a,  x_i sin a + x_{i + d_k/2} cos a),
        a = position * base^(-2i / d_k)

    The pairs are (i, i + d_k/2), as in Hugging Face's Llama; the paper and Meta's own code pair (2i, 2i + 1). Training
    works equally well with either, but weights trained with one must be permuted for the other. positions: (T).
    """
    half = x.size(-1) // 2
    frequencies = base ** (-torch.arange(half, device=x.device) / half)                 # (d_k/2)
    angles = positions[:, None] * frequencies                                           # (T, d_k/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)                       # the angles stay in float32
    first, second = x[..., :half], x[..., half:]                                        # (..., T, d_k/2) each
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)  # (..., T, d_k)


class RotaryAttention(nn.Module):
    """decoder_only.MultiHeadAttention with rotated queries and keys.

    Values are not rotated: positions influence which tokens are attended to, not what is read from them.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float):
        super().__init__()
        if d_model // num_heads % 2:
            raise InputError(f"D_MODEL / NUM_HEADS = {d_model // num_heads} must be even: RoPE rotates pairs.")
        self.num_heads = num_heads
        self.base, self.interpolation = ROTARY_BASE, 1.0  # plain numbers: can be changed in a trained model
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, x):
        """(B, T, C) -> (B, H, T, d_k)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, mask, cache=None, attention_maps=None):
        """x (B, T, C) -> (B, T, C); arguments as in decoder_only.MultiHeadAttention."""
        query, key, value = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        start = 0 if cache is None else len(cache)
        positions = torch.arange(start, start + x.size(1), device=x.device) / self.interpolation
        query, key = rotate(query, positions, self.base), rotate(key, positions, self.base)
        if cache is not None:
            key, value = cache.append(key, value)                                       # (B, H, S, d_k), keys rotated
        heads, weights = scaled_dot_product_attention(query, key, value, mask, self.dropout)
        if attention_maps is not None:
            attention_maps.append(weights.detach())
        return self.output(heads.transpose(1, 2).flatten(start_dim=2))                  # (B, T, C)


class LinearBias(nn.Module):
    """ALiBi: distances (T, S) -> a penalty for each head, (H, T, S). Nothing is learned.

        bias_h = -slope_h * distance,    slope_h = 2^(-8h / H) for h = 1 ... H

    Heads with a steep slope attend to close neighbors, flat ones to the whole text. In a longer text the bias of nearby
    keys is what it was in training, and keys farther away than any in training get even less weight.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        slopes = 2.0 ** (-8 * torch.arange(1, num_heads + 1) / num_heads)               # (H)
        self.register_buffer("slopes", slopes[:, None, None], persistent=False)

    def forward(self, distances):
        return -self.slopes * distances


class BucketedBias(nn.Module):
    """T5: distances (T, S) -> a learned number for each head and bucket, (H, T, S).

    Half of the buckets hold one small distance each. The others grow geometrically up to MAX_DISTANCE, and the last one
    holds everything beyond. A bucket that no training text was long enough to reach keeps its initial bias, 0.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.table = nn.Embedding(NUM_BUCKETS, num_heads)
        nn.init.zeros_(self.table.weight)

    @staticmethod
    def bucket(distances):
        """bucket(n) = n                                                       for n < E = NUM_BUCKETS / 2
                       E + floor(E * ln(n / E) / ln(MAX_DISTANCE / E))         otherwise, at most NUM_BUCKETS - 1"""
        exact = NUM_BUCKETS // 2
        ratio = (distances.clamp(min=exact) / exact).log() / math.log(MAX_DISTANCE / exact)
        far = (exact + (ratio * exact).long()).clamp(max=NUM_BUCKETS - 1)
        return torch.where(distances < exact, distances, far)

    def forward(self, distances):
        return self.table(self.bucket(distances)).permute(2, 0, 1)


class BiasedAttention(nn.Module):
    """decoder_only.MultiHeadAttention with a bias on the scores that depends on the distance (LinearBias or T5's)."""

    def __init__(self, d_model: int, num_heads: int, dropout: float, bias: nn.Module):
        super().__init__()
        self.num_heads = num_heads
        self.bias = bias
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, x):
        """(B, T, C) -> (B, H, T, d_k)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, mask, cache=None, attention_maps=None):
        """x (B, T, C) -> (B, T, C); arguments as in decoder_only.MultiHeadAttention."""
        query, key, value = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        if cache is not None:
            key, value = cache.append(key, value)                                       # (B, H, S, d_k)
        T, S = query.size(2), key.size(2)
        index = torch.arange(S, device=x.device)
        distances = (index[S - T:, None] - index).clamp(min=0)                          # (T, S); the mask hides t < s
        # scores = Q K^T / sqrt(d_k) + bias(distance), the bias before the mask, so that what is masked stays masked
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1)) + self.bias(distances)       # (B, H, T, S)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
        if attention_maps is not None:
            attention_maps.append(weights.detach())
        heads = self.dropout(weights) @ value                                           # (B, H, T, d_k)
        return self.output(heads.transpose(1, 2).flatten(start_dim=2))                  # (B, T, C)


class LearnedPositions(nn.Module):
    """In place of decoder_only.PositionalEncoding: a trained vector for each position.

    The vectors beyond the longest training text keep their random initial values.
    """

    def __init__(self, d_model: int, max_length: int):
        super().__init__()
        self.table = nn.Embedding(max_length, d_model)
        nn.init.normal_(self.table.weight, std=0.02)  # as in BERT and GPT-2

    def forward(self, positions):
        """Integer positions (...) -> (..., C)."""
        return self.table(positions)


class NoPositions(nn.Module):
    """In place of decoder_only.PositionalEncoding: nothing is added to the embeddings."""

    def forward(self, positions):
        """Integer positions (...) -> zeros (..., 1)."""
        return torch.zeros(*positions.shape, 1, device=positions.device)


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================

ENCODINGS = ("sinusoidal", "learned", "none", "RoPE", "ALiBi", "T5 bias")


def exchange(model, encoding: str):
    """Put one of ENCODINGS into a decoder-only model, in place; returns it. All other weights stay as they are."""
    constants, device = model.constants, model.embedding.weight.device
    if encoding == "sinusoidal":
        return model
    if encoding == "learned":
        model.positional_encoding = LearnedPositions(constants["D_MODEL"], constants["MAX_LENGTH"]).to(device)
        return model
    model.positional_encoding = NoPositions()
    bias = {"ALiBi": LinearBias, "T5 bias": BucketedBias}.get(encoding)
    bias = bias and bias(constants["NUM_HEADS"])  # one table for all layers, as in T5
    for layer in model.layers:
        sizes = constants["D_MODEL"], constants["NUM_HEADS"], layer.attention.dropout.p
        if encoding == "none":
            continue
        new = RotaryAttention(*sizes) if encoding == "RoPE" else BiasedAttention(*sizes, bias)
        new.load_state_dict(layer.attention.state_dict(), strict=False)  # a table of biases has nothing to load
        layer.attention = new.to(device)
    return model


def build(encoding: str, seed: int):
    """A new model with this encoding. Models of one seed start from the same weights, whatever their encoding."""
    torch.manual_seed(seed)
    return exchange(decoder_only.build_model(d_model=D_MODEL, d_ff=4 * D_MODEL, max_length=MAX_LENGTH), encoding)


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def make_text(numbers: list[int], only_last: bool) -> dict:
    """Several numbers and their names in one text, as GPT packs documents: each ends with <EOS>.

    ids      <SOS>  7 <SEP> seven <EOS>  4     2   <SEP> forty two
    targets    -    - seven <EOS>   -    -     -   forty two  <EOS>      (- is IGNORE; only_last: the last name alone)
    """
    ids, targets = [SOS_ID], []
    for i, number in enumerate(numbers):
        digits, name = to_ids([*str(number), "<SEP>"]), to_ids(number_to_words(number)) + [EOS_ID]
        ids += digits + name
        targets += [IGNORE] * len(digits) + (name if not only_last or i == len(numbers) - 1 else [IGNORE] * len(name))
    return {"ids": ids[:-1], "targets": targets}


def make_texts(seed: int) -> tuple[list, dict]:
    """Training batches, and test batches by number of pairs. All texts of a batch have the same number of pairs."""
    rng, splits = random.Random(seed), make_splits()

    def batch(numbers, pairs, size, only_last):
        return pad_batch([make_text(rng.choices(numbers, k=pairs), only_last) for _ in range(size)])

    train = [batch(splits.train, TRAIN_PAIRS[step % len(TRAIN_PAIRS)], BATCH_SIZE, only_last=False)
             for step in range(NUM_STEPS + FURTHER_STEPS)]
    return train, {pairs: [batch(splits.test, pairs, 50, only_last=True) for _ in range(math.ceil(NUM_TEXTS / 50))]
                   for pairs in TEST_PAIRS}


def stretch(model, base=ROTARY_BASE, interpolation=1.0):
    """Change how a RoPE model rotates, and nothing else; returns it."""
    for layer in model.layers:
        layer.attention.base, layer.attention.interpolation = base, interpolation
    return model


def measure_length(bar) -> dict[str, list[float]]:
    """(a): for each encoding, and for stretched RoPE models, the share of correct last names for each of TEST_PAIRS."""
    train_batches, test = make_texts(SEEDS[0])
    found = {}

    def train(model, batches, peak):
        decoder_only.train(model, Splits(batches, [], []), 1, peak, num_evaluations=0, progress=bar)
        return model

    def test_as(name, model):
        found[name] = [decoder_only.evaluate(model, test[pairs])["exact_match"] for pairs in TEST_PAIRS]

    for encoding in ENCODINGS:
        model = train(build(encoding, SEEDS[0]), train_batches[:NUM_STEPS], LEARNING_RATE)
        test_as(encoding, model)
        if encoding == "RoPE":
            rotary = model
    # Both divide the slowest frequency, base^(-(d_k - 2) / d_k), by STRETCH. A larger base leaves the fastest as it is.
    d_k = D_MODEL // rotary.constants["NUM_HEADS"]
    larger = ROTARY_BASE * STRETCH ** (d_k / (d_k - 2))
    test_as(f"RoPE, base {larger:,.0f}", stretch(rotary, base=larger))
    test_as(f"RoPE, positions / {STRETCH:g}", stretch(rotary, interpolation=STRETCH))
    for name, interpolation in ((f"RoPE, positions / {STRETCH:g}", STRETCH), ("RoPE", 1.0)):
        further = train(stretch(deepcopy(rotary), interpolation=interpolation), train_batches[NUM_STEPS:],
                        LEARNING_RATE / 2)
        test_as(f"{name}, {FURTHER_STEPS} more steps", further)
    return found


def measure_base_task(bar) -> dict[str, list[tuple[float, float]]]:
    """(b): for each encoding and seed, the share of held-out numbers that are misnamed, of those with a digit 0 and of
    those without."""
    found = {encoding: [] for encoding in ENCODINGS}
    for seed in SEEDS:
        for encoding in ENCODINGS:
            loaders = decoder_only.create_dataloaders(BATCH_SIZE, seed)
            model = build(encoding, seed)
            decoder_only.train(model, loaders, NUM_EPOCHS, LEARNING_RATE, num_evaluations=0, progress=bar)
            numbers = loaders.validation.dataset.numbers
            wrong = set(decoder_only.evaluate(model, loaders.validation)["mistakes"])
            zeros = [i for i, number in enumerate(numbers) if "0" in str(number)]
            others = [i for i, number in enumerate(numbers) if "0" not in str(number)]
            found[encoding].append(tuple(sum(i in wrong for i in part) / len(part) for part in (zeros, others)))
    return found


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


def draw(accuracies: dict[str, list[float]]) -> Figure:
    """Accuracy by number of pairs, one line for each encoding, the trained range shaded."""
    best = max(ENCODINGS, key=lambda encoding: accuracies[encoding][-1])
    figure = new_figure(f"Texts {TEST_PAIRS[-1] / TRAIN_PAIRS[-1]:g} times as long as in training: {best} is still "
                        f"{accuracies[best][-1]:.0%} correct, sinusoidal {accuracies['sinusoidal'][-1]:.0%}", 4.8)
    axes = figure.subplots()
    axes.axvspan(TRAIN_PAIRS[0], TRAIN_PAIRS[-1], color="#EEEEEE")
    axes.text(TRAIN_PAIRS[0] + 0.1, 0.02, "trained", color="#707070")
    colors = ("#222222", "#56B4E9", "#707070", "#E69F00", "#009E73", "#AA4499")
    for encoding, color, marker in zip(ENCODINGS, colors, "sv^oDP"):
        axes.plot(TEST_PAIRS, accuracies[encoding], color=color, marker=marker, label=encoding, clip_on=False)
    axes.set(xlabel="pairs of number and name in a text", ylabel="last name correct", ylim=(0, 1))
    axes.set_xticks(TEST_PAIRS)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="y")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, columnspacing=1.2)
    return figure


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def main() -> None:
    """Both measurements, their tables and conclusions."""
    if max(TEST_PAIRS) <= max(TRAIN_PAIRS):
        raise InputError(f"TEST_PAIRS = {TEST_PAIRS} needs a length beyond the longest of TRAIN_PAIRS = {TRAIN_PAIRS}.")
    steps_per_epoch = math.ceil(len(make_splits().train) / BATCH_SIZE)
    num_steps = len(ENCODINGS) * (NUM_STEPS + len(SEEDS) * NUM_EPOCHS * steps_per_epoch) + 2 * FURTHER_STEPS
    with tqdm(total=num_steps, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        accuracies = measure_length(bar)
        mistakes = measure_base_task(bar)

    print(f"\n(a) TRAINED on texts of {TRAIN_PAIRS[0]} to {TRAIN_PAIRS[-1]} numbers and names, {NUM_STEPS} steps of "
          f"{BATCH_SIZE}, one seed: last name correct,\n    by the number of pairs in the text; beyond: mean over the "
          f"lengths not trained\n\n  {'':36}" + "".join(f"{pairs:>7}" for pairs in TEST_PAIRS) + f"{'beyond':>9}")
    beyond = {name: statistics.mean(share for pairs, share in zip(TEST_PAIRS, shares) if pairs > max(TRAIN_PAIRS))
              for name, shares in accuracies.items()}
    for name, shares in accuracies.items():
        print(f"  {name:36}" + "".join(f"{share:7.0%}" for share in shares) + f"{beyond[name]:9.0%}")
    furthest = max(ENCODINGS, key=beyond.get)
    stretched = [f"{share:.0%} ({name})" for name, share in beyond.items() if name not in ENCODINGS]
    say(f"In this run {furthest} is best beyond the trained lengths, {beyond[furthest]:.0%} correct (sinusoidal, the "
        f"base: {beyond['sinusoidal']:.0%}). RoPE reaches {beyond['RoPE']:.0%}; stretched or trained further: "
        f"{', '.join(stretched)}.")
    trained = {name: statistics.mean(share for pairs, share in zip(TEST_PAIRS, accuracies[name])
                                     if pairs in TRAIN_PAIRS) for name in ENCODINGS}
    slow = [f"{name} ({share:.0%})" for name, share in trained.items() if share < 0.9]
    if slow:
        say(f"At the trained lengths, on average below 90% after {NUM_STEPS} steps: {', '.join(slow)}. What these miss "
            "beyond is not a failure to extrapolate alone.")

    print(f"\n(b) BASE TASK, {NUM_EPOCHS} epochs: held-out numbers misnamed, mean of {len(SEEDS)} seeds (range)\n")
    print(f"  {'':12}{'with a zero':>24}{'without':>24}")
    for encoding, rows in mistakes.items():
        zeros, others = zip(*rows)
        print(f"  {encoding:12}{spread(zeros):>24}{spread(others):>24}")
    totals = {encoding: [zeros for zeros, _ in rows] for encoding, rows in mistakes.items()}
    fewest = min(totals, key=lambda encoding: statistics.mean(totals[encoding]))
    equal = [other for other in ENCODINGS if other != fewest and not differ(totals[fewest], totals[other])]
    say(f"Fewest mistakes on numbers with a zero: {fewest}. Within seed noise of it (the ranges overlap): "
        f"{', '.join(equal) or 'none'}.")
    save_figure(draw(accuracies), FIGURE)


if __name__ == "__main__":
    run_script(main)
