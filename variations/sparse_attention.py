"""sparse_attention.py - attending to a few positions instead of all: what can still be reached, and what cannot.

The problem. Full attention compares every position with every other: T * T pairs. Ten times the text costs a hundred
times as much.

The idea. Let each position attend to a few others, chosen by a fixed pattern, and let depth do the rest: what a
position has read in one layer, its neighbors can read from it in the next. With the pattern as a boolean matrix M
(True = may attend), layer by layer

    reach after L layers = M^L  (as booleans)         pairs computed = sum(M), not T * T

    window               the w positions on either side: L layers reach L * w positions
    strided              a window, and every s-th position (Child et al. 2019): two layers reach everything if
                         w >= s - 1; if only 2w + 1 >= s, everything but some pairs near the ends
    window + global      a window, and <CLS>, which attends to all and to which all attend (Longformer)
    window + random      a window, and r random positions for each (a part of BigBird)
    BigBird              window, random and global together

The test. To label a digit with its place value, a model must know how far to the right <SEP> is. A position that cannot
reach <SEP> has to guess, however the model is trained, so the best possible accuracy can be computed. Lengths that give
a position the same view cannot be told apart there. A position's view after L layers consists of its view after L - 1
layers and of the views of the positions that it attends to:

    view_0(i) = the kind of token at i       view_L(i) = (view_{L-1}(i), {(j, view_{L-1}(j)) for all j with M[i, j]})

On paper: window 1, one layer, numbers of one to three digits, equally likely. The first digit sees <CLS>, itself and
its right neighbor. If that is <SEP>, the number has one digit; otherwise it has two or three, which look the same. The
second and third digits see enough. Of the 1 + 2 + 3 = 6 labels, at most 5 can be correct:

>>> round(ceiling(lambda T: window(T, 1), num_layers=1, max_digits=3), 4) == round(5 / 6, 4)
True

Papers: Child et al. 2019 (strided); Beltagy et al. 2020 (Longformer, section 3.1); Zaheer et al. 2020 (BigBird, section
2). Xiao et al. 2023 add that a decoder with a sliding window needs the first few tokens too ("attention sinks"): many
heads put their weight there when nothing else fits. Simplified: the patterns are masks on full attention, so they
decide what is seen but save nothing; real implementations skip the blocks that are all False.

What you will see (about a minute on two CPU cores): for each pattern its pairs, its reach, the ceiling computed by
enumeration, and what a trained encoder reaches, with several seeds. Writes figures/variations/sparse_attention.png.
"""

import random
import statistics
import sys
import textwrap
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import encoder_only
from toy_dataset import IGNORE, InputError, Splits, pad_batch, run_script, to_ids

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- the patterns ---
WINDOW = 2                # positions on either side. Try 1, 4: at which reach does the window see all?
STRIDE = 4                # of the strided pattern. Try 8
NUM_RANDOM = 1            # random links for each position. Try 3
LONG = 1024               # a text length for which the pairs are counted too

# --- the task ---
MAX_DIGITS = 16           # longest number, in digits; all lengths are equally likely. Only digits are needed, no names
NUM_LAYERS = 2            # Try 4: which ceilings rise?
D_MODEL = 64
NUM_STEPS = 300           # training steps. Try 1000: does any model exceed its ceiling?
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
NUM_TESTS = 2000          # numbers that each model is tested on
SEEDS = (0, 1, 2)         # of weights, training numbers and random links
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "sparse_attention.png"

# ======================================================================================================
# THE EXCHANGED PART: patterns (T, T), True = may attend
# ======================================================================================================


def window(T: int, w: int) -> torch.Tensor:
    """Itself and the w positions on either side.

    >>> window(4, 1).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 1, 0],
            [0, 1, 1, 1],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    index = torch.arange(T)
    return (index[:, None] - index).abs() <= w


def strided(T: int, w: int, stride: int) -> torch.Tensor:
    """The window, and all positions whose distance is a multiple of the stride."""
    index = torch.arange(T)
    return window(T, w) | ((index[:, None] - index) % stride == 0)


def global_token(T: int) -> torch.Tensor:
    """Position 0 (<CLS>) attends to all positions, and all attend to it."""
    mask = torch.zeros(T, T, dtype=torch.bool)
    mask[0, :] = mask[:, 0] = True
    return mask


def random_links(T: int, num_links: int, seed: int) -> torch.Tensor:
    """num_links random positions for each. Row i is the same in every text that is long enough to have its links."""
    mask = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        rng = random.Random(f"{seed} {i}")
        for _ in range(num_links):
            j = rng.randrange(MAX_DIGITS + 2)
            if j < T:
                mask[i, j] = True
    return mask


def make_patterns(seed: int) -> dict:
    """Name -> function T -> (T, T)."""
    return {
        "full": lambda T: torch.ones(T, T, dtype=torch.bool),
        "window": lambda T: window(T, WINDOW),
        "strided": lambda T: strided(T, WINDOW, STRIDE),
        "window + global": lambda T: window(T, WINDOW) | global_token(T),
        "window + random": lambda T: window(T, WINDOW) | random_links(T, NUM_RANDOM, seed),
        "BigBird": lambda T: window(T, WINDOW) | global_token(T) | random_links(T, NUM_RANDOM, seed),
    }


class SparseAttention(encoder_only.MultiHeadAttention):
    """encoder_only.MultiHeadAttention that may attend where its pattern and the padding mask both allow it."""

    pattern = None  # a function T -> (T, T)

    def forward(self, x, mask, attention_maps=None):
        """x (B, T, C) -> (B, T, C); arguments as in encoder_only.MultiHeadAttention."""
        return super().forward(x, mask & self.pattern(x.size(1)).to(x.device), attention_maps)


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================


def exchange(model, pattern):
    """Restrict the attention of an encoder-only model to a pattern, in place; returns it. All weights stay."""
    for layer in model.layers:
        layer.attention.__class__ = SparseAttention  # the same module, another forward
        layer.attention.pattern = pattern
    return model


def build(pattern, seed: int):
    """A new tagger with this pattern, and a class for each of MAX_DIGITS places. One seed, one set of weights."""
    torch.manual_seed(seed)
    model = encoder_only.build_model(d_model=D_MODEL, num_layers=NUM_LAYERS, d_ff=4 * D_MODEL, task="tagging")
    model.head = nn.Linear(D_MODEL, MAX_DIGITS).to(model.embedding.weight.device)
    return exchange(model, pattern)


# ======================================================================================================
# WHAT CAN BE REACHED
# ======================================================================================================


def reach(mask: torch.Tensor, num_layers: int) -> torch.Tensor:
    """The boolean power: [i, j] is True if information from position j can reach i within num_layers layers."""
    result = torch.eye(len(mask), dtype=torch.bool)
    for _ in range(num_layers):
        result = (mask | torch.eye(len(mask), dtype=torch.bool)).float() @ result.float() > 0  # | eye: the residual
    return result


def views(pattern, num_digits: int, num_layers: int) -> list:
    """What each position of `<CLS> digits <SEP>` can know about the text's length after num_layers layers.

    Which digits there are says nothing about how many follow, so for this purpose all digits are alike.
    """
    T = num_digits + 2
    attended = [row.nonzero().flatten().tolist() for row in pattern(T)]
    found = ["<CLS>", *["digit"] * num_digits, "<SEP>"]
    for _ in range(num_layers):
        # A key stands for the nested view, so that views stay short: equal views have equal keys.
        found = [hash((i, found[i], tuple((j, found[j]) for j in attended[i]))) for i in range(T)]
    return found


def ceiling(pattern, num_layers: int, max_digits: int) -> float:
    """The best share of correct place values that any model with this pattern can expect, by enumeration.

    All lengths from 1 to max_digits are equally likely. At digit i, all lengths with the same view get the same
    label, which is correct for only one of them, so each distinct view gives one correct answer.
    """
    seen = {(i, view) for n in range(1, max_digits + 1)
            for i, view in enumerate(views(pattern, n, num_layers)[1:-1], start=1)}
    return len(seen) / sum(range(1, max_digits + 1))


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def make_batches(num_texts: int, seed: int) -> list[dict]:
    """Numbers of 1 to MAX_DIGITS digits with the place of each digit: ids <CLS> 3 4 2 <SEP>, places - 2 1 0 -."""
    rng, examples = random.Random(seed), []
    for _ in range(num_texts):
        digits = rng.choices("0123456789", k=rng.randint(1, MAX_DIGITS))
        examples.append({"ids": to_ids(["<CLS>", *digits, "<SEP>"]),
                         "places": [IGNORE, *reversed(range(len(digits))), IGNORE]})
    return [pad_batch(examples[i:i + BATCH_SIZE]) for i in range(0, num_texts, BATCH_SIZE)]


def measure(bar) -> dict[str, list[tuple[float, float]]]:
    """For each pattern and seed: the ceiling for equally likely lengths, and the trained model's accuracy."""
    found = {}
    for seed in SEEDS:
        loaders = Splits(make_batches(NUM_STEPS * BATCH_SIZE, seed), [], [])
        tests = make_batches(NUM_TESTS, seed=len(SEEDS) + seed)
        for name, pattern in make_patterns(seed).items():
            model = build(pattern, seed)
            encoder_only.train(model, loaders, 1, LEARNING_RATE, num_evaluations=0, progress=bar)
            accuracy = encoder_only.evaluate(model, tests)["accuracy"]
            found.setdefault(name, []).append((ceiling(pattern, NUM_LAYERS, MAX_DIGITS), accuracy))
    return found


def spread(values: list[float]) -> str:
    """The mean over the seeds, and the range: `1.2% (0.9 to 1.6)`."""
    return f"{statistics.mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


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
    """The patterns for the longest text: attended, reached after all layers, not reached."""
    T = MAX_DIGITS + 2
    patterns = make_patterns(SEEDS[0])
    blind = [name for name in patterns if not reach(patterns[name](T), NUM_LAYERS).all()]
    title = f"{NUM_LAYERS} layers reach the whole text, except with {' and '.join(blind) or 'none'}"
    figure = new_figure(title, 6.2)
    for axes, (name, pattern) in zip(figure.subplots(2, 3).flat, patterns.items()):
        mask = pattern(T)
        axes.imshow((mask.int() + reach(mask, NUM_LAYERS).int()).numpy(), vmin=0, vmax=2,
                    cmap=ListedColormap(["white", "#F4C88A", "#0072B2"]))
        best, accuracies = statistics.mean(row[0] for row in found[name]), [row[1] for row in found[name]]
        axes.set_title(f"{name}\nceiling {best:.0%}\nmodel {statistics.mean(accuracies):.0%}", fontsize=12)
        axes.set_xticks([0, T - 1], ["<CLS>", "<SEP>"], fontsize=10)
        axes.set_yticks([0, T - 1], ["<CLS>", "<SEP>"], fontsize=10)
        axes.spines[:].set_visible(True)
    figure.supxlabel(f"blue: the row attends to the column; orange: reached through {NUM_LAYERS} layers", fontsize=12)
    return figure


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def main() -> None:
    """The table, the picture, and a conclusion."""
    if not 1 <= WINDOW <= MAX_DIGITS or STRIDE < 1 or MAX_DIGITS + 2 > encoder_only.MAX_LENGTH:
        raise InputError(f"WINDOW = {WINDOW}, STRIDE = {STRIDE} and MAX_DIGITS = {MAX_DIGITS} must be at least 1, and "
                         f"MAX_DIGITS at most {encoder_only.MAX_LENGTH - 2}.")
    patterns = make_patterns(SEEDS[0])
    total = len(SEEDS) * len(patterns) * NUM_STEPS
    with tqdm(total=total, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        found = measure(bar)
    T = MAX_DIGITS + 2
    print(f"\nSPARSE ATTENTION, {NUM_LAYERS} layers, numbers of 1 to {MAX_DIGITS} digits ({T} tokens)\n"
          f"pairs: share of the T * T pairs that are attended to, here and in a long text\n"
          f"1 layer, {NUM_LAYERS} layers: share of the pairs between which information can pass\n"
          f"ceiling: the best accuracy that can be expected\n"
          f"model: after {NUM_STEPS} steps, mean of {len(SEEDS)} seeds (range)\n\n"
          f"  {'':16}{'pairs':>8}{f'T={LONG}':>9}{'1 layer':>9}{f'{NUM_LAYERS} layers':>10}{'ceiling':>10}"
          f"{'model':>26}")
    for name, pattern in patterns.items():
        mask = pattern(T)
        row = [mask, pattern(LONG), reach(mask, 1), reach(mask, NUM_LAYERS)]
        pairs, long, once, often = (matrix.float().mean().item() for matrix in row)
        best, accuracies = zip(*found[name])
        print(f"  {name:16}{pairs:8.0%}{long:9.1%}{once:9.0%}{often:10.0%}{statistics.mean(best):10.1%}"
              f"{spread(accuracies):>26}")
    distance = {name: statistics.mean(best - accuracy for best, accuracy in rows) for name, rows in found.items()}
    over = max(accuracy - best for rows in found.values() for best, accuracy in rows)
    say(f"On average the models come to within {100 * max(distance.values()):.1f} points of their ceilings. The "
        f"most by which a single run exceeds its ceiling is {100 * max(over, 0):.1f} points: the lengths of the test "
        "numbers are drawn at random, and the ceiling is computed for equally many of each.")
    save_figure(draw(found), FIGURE)


if __name__ == "__main__":
    run_script(main)
