"""parameter_sharing.py - one layer's weights used several times (ALBERT, Universal Transformer): what it saves.

The problem. Most parameters of a transformer are in its layers, and a deeper model has more of them. Each takes memory
four times in training: the weight, its gradient, and Adam's two averages. Each is in every checkpoint, and with several
GPUs its gradient is exchanged in every step.

The idea. Use the same layer L times. The model is as deep as before and has the parameters of one layer:

    x = layer_1(x);  x = layer_2(x);  x = layer_3(x);  x = layer_4(x)         L layers of their own
    x = layer(x);    x = layer(x);    x = layer(x);    x = layer(x)           one layer, L times

What depends on the parameters is divided by L: weights, gradients, optimizer state, checkpoint. What depends on the
computation stays: multiplications, activations, and the KV cache, since the layer's input differs from one place of use
to the next, and so do its keys and values. The gradient of a shared weight is the sum over its places of use.

On paper: one weight used twice, y = w (w x). With two weights of its own, y = w_2 w_1 x has the gradients w_2 x and
w_1 x. With w = w_1 = w_2 = 3 and x = 2, either is 6, and the gradient of the shared weight is 12:

>>> w, x = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0)
>>> torch.autograd.grad(w * (w * x), w)
(tensor(12.),)

Sharing may also stop at a part of the layer: ALBERT compares sharing attention only and the feed-forward network only.
The Universal Transformer adds an encoding of the depth before each use, so that the layer can tell the first from the
last. It is the positional encoding's formula, with the number of the use in place of the position.

ALBERT's other saving is the embedding table. E numbers per token, and one matrix (E, C) that expands them to the width
C, replace C numbers per token:

    V * C   ->   V * E + E * C            fewer parameters if   V > E * C / (C - E)

At a given width this depends on the vocabulary alone. ALBERT-base has C = 768, E = 128 and 30,000 tokens:

>>> 30_000 * 768, 30_000 * 128 + 128 * 768
(23040000, 3938304)
>>> round(break_even(128, 768), 1)
153.6

Papers: Lan et al. 2019 (ALBERT: section 3.1; tables 3 and 4); Dehghani et al. 2018 (Universal Transformer: section
2.1). Simplified: ALBERT shares between encoder layers; the Universal Transformer adds the position again at each
depth, not only the depth, and can stop early where a position needs no further layer (ACT, section 2.2).

What you will see (under three minutes on two CPU cores): for each way of sharing, parameters, bytes of the checkpoint,
multiplications and milliseconds; exact match after equal training; and at which vocabulary a factorized embedding pays.
Writes figures/variations/parameter_sharing.png.
"""

import math
import statistics
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from toy_dataset import VOCABULARY, InputError, make_splits, run_script

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

NUM_LAYERS = 4            # places of use. Try 8: does the shared layer still keep up?
D_MODEL = 32              # Try 64: with more capacity per layer, does sharing cost less?
EMBEDDING_WIDTH = 16      # E of the row with a factorized embedding, which is measured but not trained
WIDTHS = (4, 8, 16, 24)   # E in the table of factorized embeddings; each below D_MODEL
LARGE_VOCABULARY = 30_000 # ALBERT's, in the same table

BATCH_SIZE = 128
NUM_EPOCHS = 4            # passes over the training numbers. Try 2: which row learns late? How far apart are the seeds?
LEARNED = 0.1             # training loss (nats) by which the speed of learning is compared. Try 0.5, 0.02
LEARNING_RATES = (8e-3, 1.6e-2, 3.2e-2)  # each row keeps the best of these, found with the first seed
NUM_TESTS = 2000          # held-out numbers for exact match; other numbers choose the learning rate
SEEDS = (0, 1, 2)         # of initial weights and order of batches
TIMINGS = 15              # of each row; the fastest counts
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "parameter_sharing.png"

# ======================================================================================================
# THE EXCHANGED PART
# ======================================================================================================

WHOLE_LAYER = ("attention_norm", "attention", "feed_forward_norm", "feed_forward")


def share(layers, parts) -> None:
    """Let all layers use the first layer's parts, in place.

    It is the same module in all of them, not one with the same values: copies drift apart from the first step on. And
    it is the module, not its tensors one by one. create_optimizer walks over the modules, each of which modules() lists
    once; two Linear layers that hold the same tensor would list it twice, and AdamW would update and decay it twice.
    """
    for layer in layers[1:]:
        for part in parts:
            setattr(layer, part, getattr(layers[0], part))


class DepthEncodedLayer(decoder_only.DecoderLayer):
    """A layer that first adds a fixed vector (C) to the residual stream, which depends on the depth of this use."""

    def forward(self, x, mask, cache=None, attention_maps=None):
        return super().forward(x + self.depth_encoding, mask, cache, attention_maps)    # (B, T, C)


class FactorizedEmbedding(nn.Module):
    """In place of nn.Embedding(V, C): a narrow table (V, E), and one matrix that expands its rows to C."""

    def __init__(self, num_tokens: int, width: int, d_model: int):
        super().__init__()
        self.embedding_dim = d_model
        self.table = nn.Embedding(num_tokens, width)
        self.expand = nn.Linear(width, d_model, bias=False)
        nn.init.xavier_uniform_(self.expand.weight)
        # An element of the product is a sum of E products, and the expansion's variance is 2 / (E + C). This standard
        # deviation gives the product the one that the base's table starts with, 0.5 / sqrt(C).
        nn.init.normal_(self.table.weight, std=0.5 * math.sqrt((width + d_model) / (2 * width * d_model)))

    def forward(self, ids):
        return self.expand(self.table(ids))                                             # (B, T, E) -> (B, T, C)

    @property
    def weight(self):
        """The table (V, C) that the two stand for: the output layer multiplies with it, as input and output are tied.
        Its rank, and therefore that of the logits, is at most E."""
        return F.linear(self.table.weight, self.expand.weight)                          # (V, E) -> (V, C)


def break_even(width: int, d_model: int) -> float:
    """The vocabulary at which V * E + E * C = V * C; with more tokens the factorized table is the smaller one.

    >>> break_even(width=32, d_model=64)            # 64 * 32 + 32 * 64 = 64 * 64
    64.0
    """
    return width * d_model / (d_model - width)


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================


def exchange(model, shared=(), depth_encoding=False, embedding_width=None):
    """Let the layers of a decoder-only model share these parts, in place; returns the model.

    depth_encoding: add the depth's encoding before each layer. embedding_width: E of a factorized embedding, untrained.
    """
    device, d_model = model.embedding.weight.device, model.embedding.embedding_dim
    share(model.layers, shared)
    if depth_encoding:
        encode = decoder_only.PositionalEncoding(d_model, len(model.layers))
        for depth, layer in enumerate(model.layers):
            layer.__class__ = DepthEncodedLayer  # the same modules, another forward
            layer.register_buffer("depth_encoding", encode(torch.tensor(depth)), persistent=False)
    if embedding_width is not None:
        model.embedding = FactorizedEmbedding(len(VOCABULARY), embedding_width, d_model)
    return model.to(device)


OWN, SAME, ONCE = f"{NUM_LAYERS} layers of their own", f"{NUM_LAYERS} times the same layer", "1 layer"
FACTORIZED = "factorized embedding"
ROWS = {
    OWN: {},
    "attention shared": dict(shared=("attention",)),
    "feed-forward shared": dict(shared=("feed_forward",)),
    SAME: dict(shared=WHOLE_LAYER),
    "same, with depth encoding": dict(shared=WHOLE_LAYER, depth_encoding=True),
    ONCE: {},
    FACTORIZED: dict(embedding_width=EMBEDDING_WIDTH),
}
TRAINED = [row for row in ROWS if row != FACTORIZED]


def build(row: str, seed: int):
    """A new model for this row of the table."""
    torch.manual_seed(seed)
    model = decoder_only.build_model(d_model=D_MODEL, d_ff=4 * D_MODEL, num_layers=1 if row == ONCE else NUM_LAYERS)
    return exchange(model, **ROWS[row])


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def num_parameters(model) -> int:
    """parameters() lists a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiplications(model) -> int:
    """Multiplications with weights per token, a shared weight counted at each use. Not counted: attention scores, and
    the product that forms a factorized embedding's table, once for a whole batch."""
    uses = [module.weight for part in (*model.layers, model.embedding) for module in part.modules()
            if isinstance(module, nn.Linear)]
    return sum(weight.numel() for weight in uses) + model.embedding.weight.numel()


def checkpoint_bytes(model) -> int:
    """The size of the checkpoint. Under each of its names a shared tensor refers to one storage, written once."""
    with tempfile.TemporaryDirectory() as folder:
        decoder_only.save(model, Path(folder) / "model.pt")
        return (Path(folder) / "model.pt").stat().st_size


def time_rows(rows) -> dict[str, tuple[float, float]]:
    """Milliseconds per training step of BATCH_SIZE numbers, and per generated token of one text.

    The fastest of TIMINGS: whatever else the machine does only ever makes a timing longer.
    """
    timers = {}
    batch = next(iter(decoder_only.create_dataloaders(BATCH_SIZE, 0, loss_on_prompt=False).train))
    prompt = decoder_only.make_prompt(123456)
    for row in rows:
        model = build(row, seed=0)
        names = {"model": model, "optimizer": decoder_only.create_optimizer(model), "batch": batch, "prompt": prompt,
                 "train_step": decoder_only.train_step, "generate": decoder_only.generate}
        timers[row] = (Timer("train_step(model, batch, optimizer, 1e-6)", globals=names),
                       Timer("generate(model, [prompt])", globals=names),
                       decoder_only.generate(model, [prompt]).size(1))
    times = {row: [] for row in rows}
    for _ in range(TIMINGS):  # in turns, so that a busy period of the machine affects all rows
        for row, (step, text, num_tokens) in timers.items():
            times[row].append((1000 * step.timeit(3).mean, 1000 * text.timeit(3).mean / num_tokens))
    return {row: tuple(map(min, zip(*pairs))) for row, pairs in times.items()}


def load_epochs(seed: int):
    """Splits with the batches of all epochs, the same for every row, and with NUM_TESTS numbers to test on."""
    loaders = decoder_only.create_dataloaders(BATCH_SIZE, seed, loss_on_prompt=False)
    tests = loaders.test.collate_fn(loaders.test.dataset.examples[:NUM_TESTS])
    return loaders._replace(train=[batch for _ in range(NUM_EPOCHS) for batch in loaders.train], test=[tests])


def steps_until_learned(history: list[dict]) -> float:
    """The first step at which the mean loss of 10 steps is below LEARNED; infinity if there is none."""
    losses = [step["loss"] for step in history]
    means = ((step, statistics.mean(losses[step - 10:step])) for step in range(10, len(losses) + 1))
    return next((step for step, mean in means if mean < LEARNED), math.inf)


def train_row(row: str, rate: float, seed: int, loaders, bar) -> tuple[float, float, float]:
    """A new model, trained. Returns its exact match on validation and on test numbers, and the steps until learned."""
    model = build(row, seed)
    try:
        history = decoder_only.train(model, loaders, 1, rate, num_evaluations=0, progress=bar)
    except FloatingPointError:
        history = []  # too high a learning rate: the model is judged as it stands
    return (*(decoder_only.evaluate(model, loader)["exact_match"] for loader in (loaders.validation, loaders.test)),
            steps_until_learned(history))


def measure(bar) -> dict[str, dict]:
    """For each trained row, the learning rate found with the first seed; by seed, exact match, steps until learned."""
    found, loaders = {}, {seed: load_epochs(seed) for seed in SEEDS}
    for row in TRAINED:
        tried = {rate: train_row(row, rate, SEEDS[0], loaders[SEEDS[0]], bar) for rate in LEARNING_RATES}
        rate = max(tried, key=lambda rate: tried[rate][0])
        results = [tried[rate], *(train_row(row, rate, seed, loaders[seed], bar) for seed in SEEDS[1:])]
        _, exact, steps = zip(*results)
        found[row] = {"rate": rate, "exact": exact, "steps": steps}
    return found


def spread(values: list[float]) -> str:
    """The mean over the seeds, and the range: `1.2% (0.9 to 1.6)`."""
    return f"{statistics.mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def differ(values: list[float], others: list[float]) -> bool:
    """Whether two rows differ by more than seed noise: their ranges over the seeds do not overlap."""
    return max(values) < min(others) or max(others) < min(values)


def relation(values: list[float], others: list[float]) -> str:
    """How one row stands to another: above, below, or within seed noise of it."""
    if not differ(values, others):
        return "within seed noise of"
    return "above" if min(values) > max(others) else "below"


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


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def draw(found: dict, parameters: dict[str, int]) -> Figure:
    """Exact match by number of parameters: a point for each row, with the range over the seeds."""
    mean = {row: statistics.mean(found[row]["exact"]) for row in found}
    figure = new_figure(f"With the parameters of one layer, using it {NUM_LAYERS} times changes exact match from "
                        f"{mean[ONCE]:.1%} to {mean[SAME]:.1%}; {NUM_LAYERS} layers of their own reach "
                        f"{mean[OWN]:.1%}", 4.8)
    axes = figure.subplots()
    rows = sorted(found, key=parameters.get)
    for y, row in enumerate(rows):
        colour, marker = ("#E69F00", "s") if row == ONCE else ("#0072B2", "o")
        axes.plot([min(found[row]["exact"]), max(found[row]["exact"])], [y, y], color=colour, clip_on=False)
        axes.plot(mean[row], y, marker, color=colour, markersize=9, clip_on=False)
    axes.set_yticks(range(len(rows)), [f"{row}: {parameters[row]:,}" for row in rows])
    lowest = math.floor(10 * min(min(result["exact"]) for result in found.values())) / 10
    axes.set(xlabel="exact match, mean and range", ylabel="row: parameters", xlim=(lowest, 1))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="x")
    axes.plot([], [], "o", color="#0072B2", markersize=9, label=f"{NUM_LAYERS} layers deep")
    axes.plot([], [], "s", color="#E69F00", markersize=9, label="1 layer deep")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=11)
    return figure


def show_sizes(sizes: dict, times: dict) -> None:
    """What sharing saves: parameters and bytes, multiplications and milliseconds."""
    print(f"\nSIZE AND TIME: parts shared between {NUM_LAYERS} layers, width {D_MODEL}\n"
          "parameters: each counted once; products: multiplications with weights per token, at each use\n"
          f"step: milliseconds per training step of {BATCH_SIZE} numbers; token: per generated token, one text "
          f"(one\nthread, {decoder_only.get_device().type})\n\n"
          f"  {'':28}{'parameters':>12}{'file, bytes':>14}{'products':>12}{'step':>10}{'token':>10}")
    for row, (parameters, size, products) in sizes.items():
        step, token = times[row]
        print(f"  {row:28}{parameters:12,}{size:14,}{products:12,}{step:10.1f}{token:10.2f}")
    shares = [f"{one / other:.0%} of the {name}" for name, one, other in zip(
        ("parameters", "bytes", "products", "time per training step", "time per generated token"),
        (*sizes[SAME], *times[SAME]), (*sizes[OWN], *times[OWN]))]
    say(f"{SAME}, compared with {OWN}: {', '.join(shares[:-1])} and {shares[-1]}.")


def show_accuracy(found: dict, times: dict) -> None:
    """What sharing costs, at equal depth and at equal parameters."""
    num_steps = NUM_EPOCHS * math.ceil(len(make_splits().train) / BATCH_SIZE)
    print(f"\nACCURACY after {num_steps} steps: exact match on {NUM_TESTS:,} held-out numbers, mean of {len(SEEDS)} "
          f"seeds (range)\nlearned: the first step with a training loss below {LEARNED:g}, the earliest and the latest "
          f"seed\n\n  {'':28}{'rate':>8}{'exact match':>26}{'learned':>20}")
    exact = {row: result["exact"] for row, result in found.items()}
    steps = {row: result["steps"] for row, result in found.items()}
    for row, result in found.items():
        first, last = (f"{step}" if step < math.inf else "never" for step in (min(steps[row]), max(steps[row])))
        learned = first if first == last else f"{first} to {last}"
        print(f"  {row:28}{result['rate']:8.1e}{spread(exact[row]):>26}{learned:>20}")
    for row in ("attention shared", "feed-forward shared", SAME):
        say(f"At equal depth, {row}: exact match is {relation(exact[row], exact[OWN])} that of {OWN}, and the number "
            f"of steps until learned, each at its own rate, is {relation(steps[row], steps[OWN])} theirs.")
    say(f"At equal parameters, {SAME}: exact match is {relation(exact[SAME], exact[ONCE])} that of 1 layer used "
        f"once, and a training step takes {times[SAME][0] / times[ONCE][0]:.1f} times as long. With the depth encoding "
        f"it is {relation(exact['same, with depth encoding'], exact[SAME])} that without.")
    by_chance = 2 / math.comb(2 * len(SEEDS), len(SEEDS))
    say(f"The ranges of two equally good rows are disjoint by chance in {by_chance:.0%} of all comparisons.")
    edge = [row for row in found if found[row]["rate"] in (LEARNING_RATES[0], LEARNING_RATES[-1])]
    say("Best at the lowest or highest learning rate tried, so perhaps better still beyond it: "
        f"{'; '.join(edge) or 'none'}.")


def show_factorization(total: int) -> None:
    """At which vocabulary a factorized embedding pays, for each E, and how much of the model it saves."""
    vocabularies = (len(VOCABULARY), LARGE_VOCABULARY)
    print(f"\nFACTORIZED EMBEDDING: V * E + E * C in place of V * C, C = {D_MODEL}\n"
          f"saved: parameters, and as a share of the whole model with {NUM_LAYERS} layers of its own\n\n"
          f"  {'E':>4}{'pays above':>13}" + "".join(f"{f'saved at V = {V:,}':>26}" for V in vocabularies))
    for E in WIDTHS:
        line = f"  {E:4}{f'V = {break_even(E, D_MODEL):.1f}':>13}"
        for V in vocabularies:
            saved = V * D_MODEL - (V * E + E * D_MODEL)
            line += f"{f'{saved:,} ({saved / (total + (V - len(VOCABULARY)) * D_MODEL):.1%})':>26}"
        print(line)
    V, E = len(VOCABULARY), EMBEDDING_WIDTH
    saved = V * D_MODEL - (V * E + E * D_MODEL)
    widest = V * D_MODEL / (V + D_MODEL)
    pays = saved > 0.05 * total  # less is not worth the product and the rank
    say(f"With {V} tokens the whole table is {V * D_MODEL / total:.1%} of the model, and only an E below {widest:.1f} "
        f"saves anything. E = {E} changes the number of parameters by {-saved / total:+.1%}, adds a matrix product, "
        f"and limits the logits to rank {E}: at this vocabulary it {'pays' if pays else 'does not pay'}.")


def main() -> None:
    """Sizes and times, exact match after equal training, the arithmetic of the embedding, the picture."""
    if not all(0 < E < D_MODEL for E in (*WIDTHS, EMBEDDING_WIDTH)):
        raise InputError(f"WIDTHS = {WIDTHS} and EMBEDDING_WIDTH = {EMBEDDING_WIDTH} must be above 0 and below "
                         f"D_MODEL = {D_MODEL}.")
    times = time_rows(ROWS)
    models = {row: build(row, seed=0) for row in ROWS}
    sizes = {row: (num_parameters(model), checkpoint_bytes(model), multiplications(model))
             for row, model in models.items()}
    runs = len(TRAINED) * (len(LEARNING_RATES) + len(SEEDS) - 1)
    total = runs * NUM_EPOCHS * math.ceil(len(make_splits().train) / BATCH_SIZE)
    with tqdm(total=total, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        found = measure(bar)
    show_sizes(sizes, times)
    show_accuracy(found, times)
    show_factorization(sizes[OWN][0])
    save_figure(draw(found, {row: size[0] for row, size in sizes.items()}), FIGURE)


if __name__ == "__main__":
    run_script(main)
