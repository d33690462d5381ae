"""visualizations.py - pictures of what transformers are made of, and of what three of them have learned.

    python visualizations.py

It draws every picture of the README into figures/, and says in one line what to see in each. Each picture makes one
point, and its title says the point. The numbers come from the code itself or from models trained here: from their
checkpoints where they fit, and where there is none a shorter training takes its place (not much more than a minute in
all on two CPU cores; a third of that with checkpoints). What compare_architectures.py has measured is drawn from
figures/comparison.json; if that is missing it is measured now, and that takes minutes.

Each picture has two functions. One computes numbers and could be used without any picture; one draws them. To play:
change NUMBER or SHORT_NUMBER below, or a constant at the top of an architecture file, and run this again: the diagrams
and the masks are drawn from the models themselves.

The same seed gives the same pictures, byte for byte (on one machine, with one version of PyTorch and Matplotlib).
"""

import json
import math
import os
import textwrap
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn as nn
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from tqdm import tqdm

import compare_architectures
import decoder_only
import encoder_decoder
import encoder_only
import toy_dataset
from toy_dataset import PAD_ID, VOCABULARY, InputError, align, make_padding_mask
from toy_dataset import number_to_words, run_script, to_ids, to_tokens

# ======================================================================================================
# CONSTANTS
# ======================================================================================================

# --- what is shown ---
NUMBER = 90210             # for pictures with room: in no split, so no model has ever seen it. Try 605112
SHORT_NUMBER = 512         # for small multiples; held out too. Try 740 or 999; more than three digits get crowded
NUM_TEST_BATCHES = 2       # of 1,000 test numbers each, for the accuracy in a picture's corner. Try 20: all of them
EPOCHS = {"encoder_only": 3, "decoder_only": 3, "encoder_decoder": 3}  # of a model that has no checkpoint. Try 1
DEPTH = 16                 # layers of the two deep models in gradient_flow. Try 4: does the difference remain?
DEEP_STEPS = 60            # and their training. Try 20: when does it begin?
EARLY_STEPS = 120          # training of the model in sampling_strategies: it must still hesitate. Try 60, 400
NUM_KEYS = 16              # keys that a random query chooses from, in softmax_scaling. Try 4, 64
SEED = 0                   # initial weights, samples. Try 1: which pictures change?

# --- how it looks ---
FIGURES = Path(__file__).parent / "figures"
WIDTH, DPI = 7.0, 110      # inches, and pixels in each: 770 pixels, sharp in a README and readable on a phone
# One colour for each architecture, from the palette of Okabe & Ito, which all eyes can tell apart; others for the rest.
ENCODER_ONLY, DECODER_ONLY, ENCODER_DECODER = "#0072B2", "#E69F00", "#009E73"  # blue, orange, green
INK, GREY, PALE, PURPLE, SKY = "#222222", "#707070", "#DDDDDD", "#AA4499", "#56B4E9"
COLOURS = {"encoder_only": ENCODER_ONLY, "decoder_only": DECODER_ONLY, "encoder_decoder": ENCODER_DECODER}
MODULES = (encoder_only, decoder_only, encoder_decoder)
NAMES = {"encoder_only": "encoder-only", "decoder_only": "decoder-only", "encoder_decoder": "encoder-decoder"}
STYLE = {
    "font.size": 13, "axes.titlesize": 13, "axes.labelsize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.grid": False, "grid.color": "#E3E3E3", "axes.axisbelow": True, "lines.linewidth": 2.5, "hatch.linewidth": 0.6,
    "hatch.color": "#BBBBBB", "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.06,
}
matplotlib.rcdefaults()  # whatever the reader's own matplotlibrc says, the pictures are the same
matplotlib.rcParams.update(STYLE)
NO_PROOF = "Attention shows where information could flow; it is no proof of reasoning."

# What each architecture is given to read when a number is shown in a picture.
EXAMPLES = {encoder_only.EncoderOnlyTransformer: toy_dataset.masked_lm_example,
            decoder_only.DecoderOnlyTransformer: toy_dataset.decoder_only_example,
            encoder_decoder.EncoderDecoderTransformer: toy_dataset.encoder_decoder_example}


class Trained(NamedTuple):
    """A model, how good it is on held-out numbers, and the sentence that says so in the corner of its pictures."""

    model: nn.Module
    accuracy: float
    note: str


def tokens_of(ids: torch.Tensor) -> list[str]:
    """Ids (T) -> tokens, padding included."""
    return [VOCABULARY[i] for i in ids.tolist()]


# ======================================================================================================
# THE NUMBERS, part 1: from the code itself, nothing trained
# ======================================================================================================


def position_similarity(table: torch.Tensor, position: int) -> torch.Tensor:
    """How alike the encodings of all positions are to one of them, 1 = the same: cosines of angles. (max_length)."""
    directions = table / table.norm(dim=1, keepdim=True)
    return directions @ directions[position]


def example_masks() -> dict:
    """The four masks of one padded batch, made by the models' own functions: name -> (mask (T, S), rows, columns).

    The batch holds 42 and 342; shown is what 42, the shorter one, may look at.
    """
    batch = toy_dataset.pad_batch([toy_dataset.encoder_decoder_example(number) for number in (42, 342)])
    source, target = batch["source"][:1], batch["target"][:1]
    S, T = source.size(1), target.size(1)
    digits, words = tokens_of(source[0]), tokens_of(target[0])
    causal = encoder_decoder.make_causal_mask(T, T)
    return {
        "padding": (make_padding_mask(source)[0, 0].expand(S, S), digits, digits),
        "causal": (causal, words, words),
        "causal & padding": ((make_padding_mask(target) & causal)[0, 0], words, words),
        "cross-attention": (make_padding_mask(source)[0, 0].expand(T, S), words, digits),
    }


def largest_weights(sizes: list[int], num_queries=256) -> tuple[list[float], list[float]]:
    """The mean of the largest attention weight for random queries and keys of each d_k: without the scale, and with it.

    1 means that softmax has picked a single key, 1 / NUM_KEYS that all count alike.
    """
    generator = torch.Generator().manual_seed(SEED)
    raw, scaled = [], []
    for d_k in sizes:
        query, key = (torch.randn(n, d_k, generator=generator) for n in (num_queries, NUM_KEYS))
        for factor, found in ((math.sqrt(d_k), raw), (1.0, scaled)):  # times sqrt(d_k) undoes the division by it
            _, weights = encoder_only.scaled_dot_product_attention(query * factor, key, key)
            found.append(weights.max(dim=-1).values.mean().item())
    return raw, scaled


def learning_rates() -> dict:
    """Each architecture's learning rate at each step of its own training, from its own constants and function."""
    rates = {}
    for module in MODULES:
        num_steps = module.NUM_EPOCHS * math.ceil(len(toy_dataset.make_splits().train) / module.BATCH_SIZE)
        rates[module.__name__] = [module.learning_rate_at(step, num_steps) for step in range(num_steps)]
    return rates


class Sublayer(NamedTuple):
    """One box of a diagram: what it is, how large, and its parameters."""

    name: str
    details: str
    parameters: int


def describe_stacks(model) -> dict[str, list[Sublayer]]:
    """A model's stacks (`layers`, or `encoder` and `decoder`), read off its modules: name -> one layer's sublayers."""
    stacks = {}
    for stack_name, stack in model.named_children():
        if not isinstance(stack, nn.ModuleList):
            continue
        stacks[stack_name] = []
        for name, part in stack[0].named_children():
            parameters = sum(p.numel() for p in part.parameters())
            if name.endswith("attention"):
                kind = "cross-attention" if name == "cross_attention" else "self-attention"
                details = f"{part.num_heads} heads of {part.query.out_features // part.num_heads}"
                stacks[stack_name].append(Sublayer(kind, details, parameters))
            elif name == "feed_forward":
                details = f"{part.expand.out_features} wide inside"
                stacks[stack_name].append(Sublayer("feed-forward", details, parameters))
    return stacks


class PostNormLayer(encoder_only.EncoderLayer):
    """The same two sublayers, put together as in 2017: the norm after the sum, across the residual stream."""

    def forward(self, x, mask, attention_maps=None):
        x = self.attention_norm(x + self.attention(x, mask, attention_maps))
        return self.feed_forward_norm(x + self.feed_forward(x))


def build_deep_model(post_norm: bool, depth=DEPTH):
    """A deep, narrow masked LM, pre-norm as in encoder_only.py, or post-norm with the very same initial weights."""
    sizes = {"d_model": 32, "num_heads": 4, "d_ff": 128, "dropout": 0.0}
    torch.manual_seed(SEED)
    model = encoder_only.build_model(num_layers=depth, **sizes).cpu()
    if post_norm:
        layers = nn.ModuleList(PostNormLayer(**sizes) for _ in range(depth))
        layers.load_state_dict(model.layers.state_dict())
        model.layers, model.final_norm = layers, nn.Identity()  # the last layer's own norm is the final one
    return model


def layer_gradients(model, batch) -> list[float]:
    """The length of the loss's gradient with respect to each layer's parameters, first layer first."""
    model.zero_grad()
    torch.manual_seed(SEED)  # so that the same tokens are hidden whenever this is asked
    loss_sum, num_targets = encoder_only.compute_loss(model, batch)
    (loss_sum / num_targets).backward()
    return [math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters())) for layer in model.layers]


def gradient_flow(num_steps=DEEP_STEPS, depth=DEPTH, progress=None) -> dict:
    """Gradients by layer, (norm, steps of training) -> one number per layer, for pre-norm and post-norm."""
    loaders = encoder_only.create_dataloaders(batch_size=32, seed=SEED, num_train=32 * num_steps)
    batch = next(iter(loaders.validation))
    batch = {"ids": batch["ids"][:100]}
    found = {}
    for name in ("pre-norm", "post-norm"):
        model = build_deep_model(name == "post-norm", depth)
        found[name, 0] = layer_gradients(model, batch)
        encoder_only.train(model, loaders, num_epochs=1, num_evaluations=0, progress=progress)
        found[name, num_steps] = layer_gradients(model, batch)
    return found


# ======================================================================================================
# THE NUMBERS, part 2: from trained models
# ======================================================================================================


class Attention(NamedTuple):
    """Numbers for each pair of tokens: who looks, or knows (rows), at what, or of what (columns)."""

    rows: list[str]
    columns: list[str]
    weights: torch.Tensor  # (layers, H, T, S), each row sums to 1; influence: (T, S)


@torch.no_grad()
def attention_maps(model, number: int) -> dict[str, Attention]:
    """All attention weights of a model that reads a number's text, by the stack; and "cross", between two stacks."""
    example = toy_dataset.pad_batch([EXAMPLES[type(model)](number)])
    self_maps, encoder_maps, cross_maps = [], [], []
    if "source" not in example:
        model(example["ids"], attention_maps=self_maps)
        tokens = tokens_of(example["ids"][0])
        return {"layers": Attention(tokens, tokens, torch.cat(self_maps))}
    memory = model.encode(example["source"], encoder_maps)
    model.decode(example["target"], memory, example["source"], None, self_maps, cross_maps)
    source, target = tokens_of(example["source"][0]), tokens_of(example["target"][0])
    predicted = [*target[1:], "<EOS>"]  # a row of cross-attention is named after the word that it helps to predict
    return {"encoder": Attention(source, source, torch.cat(encoder_maps)),
            "decoder": Attention(target, target, torch.cat(self_maps)),
            "cross": Attention(predicted, source, torch.cat(cross_maps))}


def share_on_alignment(weights: torch.Tensor, number: int) -> float:
    """The share of the attention (T, S) that lies on the digits that the words are made of; <EOS> has none."""
    digits = align(number)
    return sum(weights[row, list(positions)].sum().item() for row, positions in enumerate(digits)) / len(digits)


def chance_on_alignment(number: int) -> float:
    """The share that would lie there if attention were spread evenly over the source, <EOS> included."""
    digits = align(number)
    return sum(map(len, digits)) / len(digits) / (len(str(number)) + 1)


def digit_word_pairs(number: int) -> list[tuple[int, int]]:
    """Positions (digit, word) in `<CLS> digits <SEP> words <SEP>` that belong together, in both directions."""
    first_word = len(str(number)) + 2
    pairs = [(1 + i, first_word + row) for row, positions in enumerate(align(number)) for i in positions]
    return pairs + [(word, digit) for digit, word in pairs]


def share_on_pairs(weights: torch.Tensor, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """The share of attention on some cells (row, column), of all that their rows give: (..., T, S) -> (...)."""
    rows, columns = zip(*pairs)
    return weights[..., rows, columns].sum(dim=-1) / len(set(rows))


def prompt_before_last_word(number: int) -> list[str]:
    """A number and its name, up to the last word: `<SOS> 9 0 2 1 0 <SEP> ninety thousand two hundred`."""
    return ["<SOS>", *str(number), "<SEP>", *number_to_words(number)[:-1]]


def next_token_distributions(model, prompt: list[str]) -> dict[str, torch.Tensor]:
    """What may come after a prompt, and with which probability (V), under each sampling strategy."""
    with torch.no_grad():
        logits = model(torch.tensor([to_ids(prompt)]))[:, -1]
    logits[:, PAD_ID] = -math.inf  # as in decoder_only.generate
    strategies = {
        "as learned": logits,
        "temperature 0.5": decoder_only.scale_by_temperature(logits, 0.5),
        "temperature 2": decoder_only.scale_by_temperature(logits, 2.0),
        "greedy (top-k 1)": decoder_only.keep_top_k(logits, 1),
        "top-k 3": decoder_only.keep_top_k(logits, 3),
        "top-p 0.9": decoder_only.keep_top_p(logits, 0.9),
    }
    return {name: chosen[0].softmax(dim=-1) for name, chosen in strategies.items()}


WORD_KINDS = {"ones": toy_dataset.ONES[1:10], "teens": toy_dataset.ONES[10:], "tens": toy_dataset.TENS}


def principal_components(vectors: torch.Tensor, num=2) -> tuple[torch.Tensor, torch.Tensor]:
    """PCA: vectors (N, C) seen along the num directions in which they differ most, (N, num), and the share of the whole
    variance that lies in each of these, (num). A direction's sign is free; here the largest coordinate is positive.
    """
    centred = vectors - vectors.mean(dim=0)
    _, spread, directions = torch.linalg.svd(centred.double(), full_matrices=False)
    projected = centred.double() @ directions[:num].T
    projected *= projected.gather(0, projected.abs().argmax(dim=0, keepdim=True)).sign()
    return projected, spread[:num] ** 2 / (spread**2).sum()


def share_beside_own_kind(vectors: torch.Tensor, kinds: torch.Tensor) -> float:
    """The share of vectors (N, any) whose nearest neighbour is of their own kind; kinds: (N)."""
    distances = torch.cdist(vectors, vectors).fill_diagonal_(math.inf)
    return (kinds[distances.argmin(dim=1)] == kinds).float().mean().item()


class WordMap(NamedTuple):
    """The number words' embeddings, seen in two dimensions, and what got lost by that."""

    points: dict[str, torch.Tensor]  # kind -> (n, 2)
    variance_shown: float
    neighbours_here: float           # share of words whose nearest neighbour is of their own kind, in two dimensions,
    neighbours_in_full: float        # and in all of them


def map_words(model) -> WordMap:
    """Where a model has put the number words."""
    sizes = [len(words) for words in WORD_KINDS.values()]
    kinds = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    vectors = model.embedding.weight.detach()[to_ids([word for words in WORD_KINDS.values() for word in words])]
    points, shares = principal_components(vectors)
    by_kind = dict(zip(WORD_KINDS, points.split(sizes)))
    return WordMap(by_kind, shares.sum().item(), *(share_beside_own_kind(x, kinds) for x in (points, vectors)))


def influence(model, number: int) -> Attention:
    """How strongly each input moves each output: the length of d logits_t / d embedding_s, by autograd. (T, S).

    Not what attention would show, but what really gets through all layers. 0 means that the model cannot know.
    """
    inputs = []

    def watch(module, arguments, output):  # the embedding's output becomes a variable to differentiate by
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    example = toy_dataset.pad_batch([EXAMPLES[type(model)](number)])
    handle = model.embedding.register_forward_hook(watch)
    if "source" in example:
        logits = model(example["source"], example["target"])
        rows, columns = example["target"][0], torch.cat([example["source"], example["target"]], dim=1)[0]
    else:
        logits = model(example["ids"])
        rows = columns = example["ids"][0]
    handle.remove()
    # One backward pass for each logit, all of a position's at once: row v of the identity asks for logit v alone.
    every_logit = torch.eye(logits.size(-1))
    lengths = []
    for t in range(len(rows)):
        gradients = torch.autograd.grad(logits[0, t], inputs, every_logit, retain_graph=True, is_grads_batched=True)
        lengths.append(torch.cat(gradients, dim=2).square().sum(dim=(0, 1, 3)).sqrt())          # (S)
    return Attention(tokens_of(rows), tokens_of(columns), torch.stack(lengths))


class Hypothesis(NamedTuple):
    """One finished text of a beam search."""

    words: list[str]
    score: float
    probability: float


def beam_hypotheses(model, number: int) -> list[Hypothesis]:
    """What beam search found for a number, best first."""
    texts, scores = encoder_decoder.beam_search(model, [encoder_decoder.make_source(number)])
    found = []
    for ids, score in zip(texts[0].tolist(), scores[0].tolist()):
        if score > -math.inf:
            words = to_tokens(ids)
            found.append(Hypothesis(words, score, math.exp(score * len(words) ** encoder_decoder.LENGTH_PENALTY)))
    return found


def group_by_beginning(texts: list[list[str]], length=0) -> list[list[str]]:
    """Different texts, put in an order in which those that begin alike stand together, otherwise as they came."""
    if len(texts) == 1:
        return texts
    groups = {}
    for text in texts:
        groups.setdefault(tuple(text[length : length + 1]), []).append(text)
    return [text for group in groups.values() for text in group_by_beginning(group, length + 1)]


def place_in_tree(texts: list[list[str]]) -> dict[tuple, int]:
    """Texts, merged where they begin alike: each beginning -> the row in which it stands, 0 on top.

    Each text ends in a row of its own, and a beginning stands in the row of the first text that has it: so the best
    text is a straight line, from which the others branch off downwards.
    """
    rows = {}
    for row, text in enumerate(group_by_beginning(texts)):
        for length in range(len(text) + 1):
            rows.setdefault(tuple(text[:length]), row)
    return rows


# ======================================================================================================
# DRAWING: what all pictures have in common
# ======================================================================================================


def new_figure(title: str, height: float, note: str = "") -> Figure:
    """An empty picture of the common width. The title says what to see; the note stands small in the lower corner."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    title = textwrap.fill(title, 54, break_on_hyphens=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold", linespacing=1.25)
    note = textwrap.fill(note, 86, break_on_hyphens=False)
    figure.supxlabel(note, x=0.99, ha="right", fontsize=11, color=GREY, linespacing=1.3)
    return figure


def legend_above(axes, ncols: int, left=-0.02) -> None:
    """The legend in the space over the axes, where it covers no data."""
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(left, 1.0), ncols=ncols, columnspacing=1.2)


def shades(colour: str) -> LinearSegmentedColormap:
    """White for 0, then the colour, and for 1 a dark shade of it: so more is darker, on grey paper too."""
    dark = [0.35 * channel for channel in to_rgb(colour)]
    return LinearSegmentedColormap.from_list("", ["white", colour, dark])


def draw_map(axes, values, rows: list[str], columns: list[str], colour: str):
    """A matrix of shares as coloured cells, first row on top, with a token beside each row and under each column."""
    mesh = axes.pcolormesh(values, cmap=shades(colour), vmin=0, vmax=1, edgecolors=PALE, linewidth=0.5)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, rotation=90)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set(visible=True, color=PALE)
    return mesh


def box_cells(axes, cells: list[tuple[int, int]], width: float) -> None:
    """Frames around some cells (row, column) of a map."""
    for row, column in cells:
        frame = Rectangle((column, row), 1, 1, fill=False, edgecolor=INK, linewidth=width, zorder=3, clip_on=False)
        axes.add_patch(frame)


def percent(share: float) -> str:
    """A share as a percentage, with as many digits as say something: 73%, 99.81%, 0.12%."""
    if 0 < share < 0.0001:
        return "<0.01%"
    if 0.9999 < share < 1:
        return ">99.99%"
    return f"{share:.0%}" if 0.05 <= share <= 0.99 or share in (0, 1) else f"{share:.2%}"


PERCENT_TICKS = {"ticks": [0, 0.5, 1], "labels": ["0%", "50%", "100%"]}


# ======================================================================================================
# THE PICTURES: each takes its numbers or its model, and returns a Figure
# ======================================================================================================

# --- what the parts are ---


def draw_box(axes, left: float, bottom: float, width: float, height: float, lines: list[str], colour: str) -> None:
    """A rounded box with lines of text in its middle, the first one bold. All sizes in inches."""
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.05",
                                  edgecolor=colour, facecolor=shades(colour)(0.08), linewidth=1.3, zorder=2))
    for i, line in enumerate(lines):
        y = bottom + height / 2 + LINE * ((len(lines) - 1) / 2 - i)
        axes.text(left + width / 2, y, line, ha="center", va="center", fontsize=11, zorder=3,
                  fontweight="bold" if i == 0 else "normal")


def draw_path(axes, *points) -> None:
    """A thin line through some points, with an arrowhead at its end."""
    *_, before, end = points
    axes.plot(*zip(*points[:-1]), color=GREY, linewidth=1.3, zorder=1)
    axes.annotate("", end, before, arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.3,
                                               "shrinkA": 0, "shrinkB": 0})


# The measures of a diagram, in inches.
LINE = 0.19                # from one line of text to the next
COLUMN = 1.83              # from one stack to the next
INNER, OUTER = 1.46, 1.64  # widths of boxes inside and outside the layers
MIDDLE, ROAD = 0.76, 1.62  # within a column: the middle of the inner boxes, and where the residual stream runs


def draw_layer(axes, left: float, bottom: float, sublayers: list[Sublayer], num_layers: int, looks: dict, colour: str):
    """One layer as its forward() is written, from below: x = x + sublayer(norm(x)). looks: what an attention may see.

    Returns the height of each sublayer's middle, and that of the layer's top.
    """
    heights, y, road, middle = {}, bottom + 0.12, left + ROAD, left + MIDDLE
    for name, details, parameters in sublayers:
        lines = [name, details, *([looks[name]] if name in looks else []), f"{parameters:,}"]
        height = LINE * len(lines) + 0.1
        draw_path(axes, (road, y), (middle, y), (middle, y + 0.12))
        draw_box(axes, middle - 0.3, y + 0.12, 0.6, LINE + 0.06, ["norm"], GREY)
        draw_path(axes, (middle, y + 0.35), (middle, y + 0.48))
        draw_box(axes, middle - INNER / 2, y + 0.48, INNER, height, lines, colour)
        heights[name] = y + 0.48 + height / 2
        y += 0.58 + height
        draw_path(axes, (middle, y - 0.1), (middle, y), (road - 0.08, y))
        axes.text(road, y, "+", ha="center", va="center", fontsize=12, fontweight="bold", zorder=4,
                  bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": INK})
        y += 0.17
    axes.text(middle, y + LINE / 2, f"{num_layers} such layers", ha="center", va="center", fontsize=11, color=GREY)
    axes.add_patch(Rectangle((left, bottom), COLUMN - 0.11, y + LINE - bottom, fill=False, edgecolor=GREY,
                             linestyle=(0, (4, 3))))
    return heights, y + LINE


def draw_stack(axes, left: float, model, stack: str, reads: str, writes: str, colour: str):
    """A stack from its embedding up to its final norm, and the output layer where it writes something.

    Returns the heights of its sublayers and that of its top.
    """
    attention = attention_maps(model, SHORT_NUMBER)[stack].weights  # whether it looks ahead is not claimed, but seen
    looks = {"self-attention": "looks left only" if attention.triu(1).sum() == 0 else "looks both ways",
             "cross-attention": "looks at source"}
    V, C = model.embedding.weight.shape
    axes.text(left + MIDDLE, 0.32, reads, ha="center", va="top", fontsize=11)
    draw_path(axes, (left + MIDDLE, 0.35), (left + MIDDLE, 0.5))
    height = 3 * LINE + 0.1
    draw_box(axes, left + 0.05, 0.5, OUTER, height, ["embedding", f"{V} x {C} = {V * C:,}", "+ position"], colour)
    num_layers = len(getattr(model, stack))
    heights, top = draw_layer(axes, left, 1.35, describe_stacks(model)[stack], num_layers, looks, colour)
    axes.plot([left + ROAD] * 2, [0.5 + height, top + 0.18], color=INK, linewidth=2, zorder=1.5)
    draw_box(axes, left + 0.05, top + 0.18, OUTER, LINE + 0.06, ["norm"], GREY)
    top += 0.43
    if writes:
        draw_path(axes, (left + MIDDLE, top), (left + MIDDLE, top + 0.15))
        draw_box(axes, left + 0.05, top + 0.15, OUTER, 2 * LINE + 0.06, [f"{V} logits", "same embedding"], colour)
        axes.text(left + MIDDLE, top + 0.77, writes, ha="center", va="center", fontsize=11)
        top += 1.05
    return heights, top


def draw_architectures(models: dict) -> Figure:
    """The three models as they are built: every size and number is read off their modules."""
    total = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    factor = total["encoder_decoder"] / total["decoder_only"]
    title = f"The same parts, three plans: the third bridges two texts, and has {factor:.1f} times the parameters"
    note = "Drawn from the models themselves. The last line of a box: its parameters."
    figure = new_figure(title, 9.2, note)
    axes = figure.subplots()
    digits, words = " ".join(str(SHORT_NUMBER)), number_to_words(SHORT_NUMBER)
    pair = f"{digits} <SEP>\n{' '.join(words[:2])} ..."
    stacks = [("encoder_only", "layers", f"<CLS> {pair}", "every hidden token"),
              ("decoder_only", "layers", f"<SOS> {pair}", "every next token"),
              ("encoder_decoder", "encoder", f"{digits} <EOS>", ""),
              ("encoder_decoder", "decoder", f"<SOS> {words[0]}\n{' '.join(words[1:2])} ...", "every next word")]
    tops = []
    for i, (name, stack, reads, writes) in enumerate(stacks):
        heights, top = draw_stack(axes, COLUMN * i, models[name], stack, reads, writes, COLOURS[name])
        tops.append(top)
        if writes:
            middle = COLUMN * i + MIDDLE - (COLUMN / 2 if stack == "decoder" else 0)
            axes.text(middle, top, f"{NAMES[name]}\n{total[name]:,}", ha="center", va="bottom", fontweight="bold")
    # The bridge leads from the encoder's last norm to the decoder's cross-attention.
    gap, start, end = COLUMN * 3 - 0.06, tops[2] - 0.12, heights["cross-attention"]
    draw_path(axes, (gap - 0.1, start), (gap, start), (gap, end), (gap + 0.11, end))
    axes.set(xlim=(-0.03, 4 * COLUMN - 0.08), ylim=(-0.1, tops[3] + 0.45), aspect="equal")
    axes.set_axis_off()
    return figure


def draw_positional_encoding(table: torch.Tensor) -> Figure:
    """table: (max_length, C), of the class PositionalEncoding."""
    figure = new_figure("Each position has a pattern of its own, most like those of its neighbours", 7)
    above, below = figure.subplots(2, 1, height_ratios=[1.4, 1])
    mesh = above.pcolormesh(table, cmap="PuOr", vmin=-1, vmax=1)
    above.invert_yaxis()
    above.set(xlabel="dimension of the vector: fast waves left, slow ones right", ylabel="position in the text")
    figure.colorbar(mesh, ax=above, ticks=[-1, 0, 1], label="value (sine, cosine)")
    for position, colour, dashes in ((table.size(0) // 4, INK, "-"), (table.size(0) * 5 // 8, PURPLE, "--")):
        likeness = position_similarity(table, position)
        below.plot(likeness, color=colour, linestyle=dashes, label=f"to position {position}")
    below.set(xlabel="position in the text", ylabel="likeness (cosine)")
    below.grid(axis="y")
    legend_above(below, ncols=2)
    return figure


def draw_masks(masks: dict) -> Figure:
    """masks: as example_masks returns them."""
    figure = new_figure("Filled cells may be looked at: never padding, and in a decoder never the future", 7.4,
                        "Each row shows what that token may look at. Drawn for 42, padded beside 342 in one batch.")
    colours = [ENCODER_ONLY, DECODER_ONLY, DECODER_ONLY, ENCODER_DECODER]
    for axes, colour, (name, (mask, rows, columns)) in zip(figure.subplots(2, 2).flat, colours, masks.items()):
        axes.set_title(name)
        draw_map(axes, mask * 0.5, rows, columns, colour)
    return figure


def draw_softmax_scaling(sizes: list[int], raw: list[float], scaled: list[float]) -> Figure:
    """sizes: d_k; raw and scaled: as largest_weights returns them."""
    title = (f"Without 1/sqrt(d_k) softmax picks one winner: at d_k = {sizes[-1]} it gets {percent(raw[-1])} of the "
             f"attention, with it {percent(scaled[-1])}")
    note = f"Random queries and {NUM_KEYS} random keys: much like those of an untrained model."
    figure = new_figure(title, 4.2, note)
    axes = figure.subplots()
    axes.plot(sizes, raw, "o-", color=PURPLE, label="softmax(q k)")
    axes.plot(sizes, scaled, "s-", color=INK, label="softmax(q k / sqrt(d_k))")
    axes.axhline(1 / NUM_KEYS, color=GREY, linewidth=1.2, linestyle=":")
    axes.text(sizes[-1], 1 / NUM_KEYS + 0.015, "all keys alike", ha="right", va="bottom", color=GREY)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="d_k, dimensions of a query and a key", ylabel="largest weight (mean)", ylim=(0, 1.02))
    axes.set_yticks(**PERCENT_TICKS)
    axes.grid(axis="y")
    legend_above(axes, ncols=2)
    return figure


def draw_learning_rate_schedule(rates: dict) -> Figure:
    """rates: as learning_rates returns them."""
    to_the_peak = rates["decoder_only"].index(max(rates["decoder_only"])) + 1
    title = f"Careful start, long goodbye: {to_the_peak} steps up to the peak, then half a cosine down"
    figure = new_figure(title, 4.2, "Drawn by each file's own learning_rate_at, from its own constants.")
    axes = figure.subplots()
    for (name, values), dashes in zip(rates.items(), ("-", (0, (3, 3)), "-")):  # dashed, as it may cover the one before
        axes.plot(range(1, len(values) + 1), values, color=COLOURS[name], linestyle=dashes, label=NAMES[name])
    axes.set(xlabel="training step", ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="plain")
    axes.grid(axis="y")
    legend_above(axes, ncols=3)
    return figure


def draw_gradient_flow(found: dict) -> Figure:
    """found: as gradient_flow returns it."""
    num_steps = max(steps for _, steps in found)
    pre, post = (found[name, num_steps] for name in ("pre-norm", "post-norm"))
    title = (f"With post-norm the first of {len(pre)} layers soon gets 1/{post[-1] / post[0]:,.0f} of the last one's "
             f"gradient, with pre-norm {pre[0] / pre[-1]:.1f} times it")
    note = "The gradient of all of a layer's parameters. Both start from the same weights and see the same data."
    figure = new_figure(title, 4.6, note)
    axes = figure.subplots()
    for (name, steps), norms in found.items():
        colour, marker = (INK, "o") if name == "pre-norm" else (PURPLE, "s")
        style = {"linestyle": "-"} if steps else {"linestyle": ":", "markerfacecolor": "white"}
        axes.plot(range(1, len(norms) + 1), norms, marker, color=colour, **style,
                  label=f"{name}, " + (f"after {steps} steps" if steps else "untrained"))
    axes.set(xlabel="layer (1 is next to the input)", ylabel="length of gradient", yscale="log")
    axes.grid(axis="y")
    legend_above(axes, ncols=2)
    return figure


def draw_model_complexity(models: dict) -> Figure:
    """Parameters by component, and all together."""
    counts = {name: compare_architectures.count_parameters(model) for name, model in models.items()}
    totals = {name: sum(count.values()) for name, count in counts.items()}
    shares = [count["feed-forward"] / totals[name] for name, count in counts.items()]
    title = (f"Feed-forward holds {min(shares):.0%} to {max(shares):.0%} of the parameters; to look at a second text "
             f"costs {counts['encoder_decoder']['cross-attention']:,}")
    figure = new_figure(title, 6.2, "Counted in the models' own modules.")
    axes = figure.subplots()
    components = [name for name in counts["decoder_only"] if any(count[name] for count in counts.values())]
    for i, (name, count) in enumerate(counts.items()):
        values = [totals[name], *(count[component] for component in components)]
        rows = [row + 0.27 * (i - 1) for row in range(len(values))]
        bars = axes.barh(rows, values, 0.25, color=COLOURS[name], label=NAMES[name])
        axes.bar_label(bars, [f"{value:,}" for value in values], padding=4, fontsize=11)
    axes.set_yticks(range(len(components) + 1), ["all together", *components])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("parameters")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=0.14)
    legend_above(axes, ncols=3, left=-0.25)
    return figure


# --- what the models have learned ---


def draw_attention(attention: Attention, colour: str, title: str, note: str, boxes=()) -> Figure:
    """Every layer and head as a small map, up to four in a row."""
    num_layers, num_heads, *_ = attention.weights.shape
    num_columns = min(4, num_heads)
    rows_per_layer = math.ceil(num_heads / num_columns)
    figure = new_figure(title, 2.2 + 2.0 * num_layers * rows_per_layer, f"{NO_PROOF} {note}")
    grid = figure.subplots(num_layers * rows_per_layer, num_columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        layer, head = divmod(i, rows_per_layer * num_columns)
        if head >= num_heads:
            axes.set_axis_off()
            continue
        rows = attention.rows if i % num_columns == 0 else []  # labels stand at the left and at the foot only
        columns = attention.columns if i + num_columns >= grid.size else []
        mesh = draw_map(axes, attention.weights[layer, head], rows, columns, colour)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=12, fontweight="normal")
        axes.tick_params(labelsize=11)
        box_cells(axes, boxes, width=1.2)
    figure.supylabel("who looks", fontsize=13)
    bar = figure.colorbar(mesh, ax=grid, location="bottom", aspect=60, label="at what: share of its attention")
    bar.set_ticks(**PERCENT_TICKS)
    return figure


def draw_attention_encoder(trained: Trained, number: int) -> Figure:
    """The masked LM reads digits and words together; the pairs that belong together are boxed."""
    attention = attention_maps(trained.model, number)["layers"]
    pairs = digit_word_pairs(number)
    shares = share_on_pairs(attention.weights, pairs)                                   # (layers, H)
    layer, head = divmod(shares.argmax().item(), shares.size(1))
    title = (f"No one told it which word names which digit: layer {layer + 1}, head {head + 1} has "
             f"{percent(shares.max().item())} on the boxed pairs")
    note = f"Boxed: digits and words that belong together; the share is of their rows. {trained.note}"
    return draw_attention(attention, ENCODER_ONLY, title, note, pairs)


def draw_attention_decoder(trained: Trained, number: int) -> Figure:
    """The GPT reads from left to right."""
    attention = attention_maps(trained.model, number)["layers"]
    above = attention.weights.triu(diagonal=1).sum().item()
    title = f"A decoder looks back only: the attention above the diagonal adds up to {above:g}"
    return draw_attention(attention, DECODER_ONLY, title, trained.note)


def draw_cross_attention(trained: Trained, number: int) -> Figure:
    """Which digits the encoder-decoder looks at for each word: the mean of all layers and heads."""
    attention = attention_maps(trained.model, number)["cross"]
    weights = attention.weights.mean(dim=(0, 1))                                        # (T, S)
    cells = [(row, column) for row, columns in enumerate(align(number)) for column in columns]
    row, column = max(cells, key=lambda cell: weights[cell].item())
    title = (f"For '{attention.rows[row]}' it looks at the {attention.columns[column]}: "
             f"{percent(share_on_alignment(weights, number))} of the attention lies on the boxed digits")
    note = (f"Mean of all layers and heads. Boxed: the digits that the word is made of; spread evenly, "
            f"{percent(chance_on_alignment(number))} would lie on them. {NO_PROOF} {trained.note}")
    figure = new_figure(title, 6.6, note)
    axes = figure.subplots()
    draw_map(axes, weights, attention.rows, attention.columns, ENCODER_DECODER)
    axes.set(xlabel="digit looked at", ylabel="word being predicted", aspect="auto")
    axes.tick_params(labelsize=15)
    axes.tick_params(axis="x", rotation=0)
    box_cells(axes, cells, width=3)
    for row, shares in enumerate(weights.tolist()):
        for column, share in enumerate(shares):
            axes.text(column + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center",
                      color="white" if share > 0.4 else INK)
    return figure


def draw_influence(trained: dict[str, Trained], number: int) -> Figure:
    """Who can know what, measured through all layers, for the three models side by side. Hatched: exactly 0."""
    found = {name: influence(item.model, number) for name, item in trained.items()}
    decoder = found["decoder_only"].weights
    from_the_right = decoder[tuple(torch.triu_indices(*decoder.shape, offset=1))]
    accuracies = ", ".join(f"{NAMES[name]} {percent(item.accuracy)}" for name, item in trained.items())
    title = ("What reaches which output: in the encoder all, in the decoder nothing from the right "
             f"({(from_the_right == 0).sum()} of {len(from_the_right)} exactly 0)")
    note = ("Length of d output / d input, relative to the largest in its row; hatched: exactly 0. "
            f"Held-out accuracy: {accuracies}.")
    figure = new_figure(title, 4.4, note)
    grid = figure.subplots(1, 3, width_ratios=[len(item.columns) for item in found.values()])
    for (name, item), axes in zip(found.items(), grid):
        draw_map(axes, item.weights / item.weights.amax(dim=1, keepdim=True), item.rows, item.columns, COLOURS[name])
        for row, column in (item.weights == 0).nonzero().tolist():
            axes.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", linewidth=0))
        axes.set_anchor("N")
        axes.tick_params(labelsize=11)
        axes.set_title(NAMES[name], x=-0.3)
        axes.set_xlabel("input" if name != "encoder_decoder" else "source | target")
    grid[0].set_ylabel("output at")
    grid[2].axvline(len(str(number)) + 1, color=INK)  # between the source, with its <EOS>, and the target
    return figure


def draw_token_embeddings(trained: Trained) -> Figure:
    """The number words, where the model has put them."""
    points, shown, here, in_full = map_words(trained.model)
    title = f"Ones, teens and tens live apart: {percent(here)} of the words have a nearest neighbour of their own kind"
    num_dimensions = trained.model.embedding.embedding_dim
    note = (f"PCA of the embeddings, learned from digits and names alone. Shown: {percent(shown)} of the variance; in "
            f"all {num_dimensions} dimensions it is {percent(in_full)} of the words. {trained.note}")
    figure = new_figure(title, 7, note)
    axes = figure.subplots()
    every_point = torch.cat(list(points.values()))
    width, height = (every_point.amax(dim=0) - every_point.amin(dim=0)).tolist()
    for (kind, places), colour, marker in zip(points.items(), (INK, PURPLE, SKY), "os^"):
        places = sorted(zip(places.tolist(), WORD_KINDS[kind]), key=lambda item: item[0][1])  # lowest first
        xs, ys = zip(*(place for place, _ in places))
        axes.scatter(xs, ys, s=60, color=colour, marker=marker, label=kind)
        # A kind's words stand so close together that their names would overlap; so these form a column beside them.
        x, middle = max(xs) + width / 14, sum(ys) / len(ys)
        for i, (place, word) in enumerate(places):
            y = middle + height / 24 * (i - (len(places) - 1) / 2)
            axes.annotate(word, place, (x, y), va="center", fontsize=12, annotation_clip=False,
                          arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (0, 0.5)})
            axes.update_datalim([(x + width / 4, y)])  # the axes make room for the names, too
    axes.set(xlabel="first principal component", ylabel="second principal component", xticks=[], yticks=[])
    legend_above(axes, ncols=3)
    return figure


def draw_sampling_strategies(trained: Trained, number: int, num_tokens=8) -> Figure:
    """The last word of a number's name under six strategies; what one rules out stays visible as an outline."""
    prompt = prompt_before_last_word(number)
    distributions = next_token_distributions(trained.model, prompt)
    learned, right_word = distributions["as learned"], number_to_words(number)[-1]
    shown = learned.topk(num_tokens).indices
    kept = (distributions["top-p 0.9"] > 0).sum().item()
    title = f"'{' '.join(prompt[-2:])} ...' and then? Top-k 3 leaves 3 words to draw from, top-p 0.9 leaves {kept}"
    note = f"An unfinished model, asked for {number} (right: {right_word}). Outlined: as learned. {trained.note}"
    figure = new_figure(title, 6.3, note)
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (name, probabilities) in zip(grid.flat, distributions.items()):
        axes.barh(range(num_tokens), probabilities[shown].tolist(), color=DECODER_ONLY)
        axes.barh(range(num_tokens), learned[shown].tolist(), fill=False, edgecolor=GREY, linewidth=1)
        axes.set_title(name)
        axes.set_yticks(range(num_tokens), tokens_of(shown))
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() == right_word else "normal")
        axes.set_xlim(0, 1)
        axes.set_xticks(**PERCENT_TICKS)
        axes.tick_params(axis="y", length=0)
    for axes in grid[1]:
        axes.set_xlabel("probability")
    axes.invert_yaxis()  # of all, as they share it: the likeliest on top
    return figure


def draw_beam_search_tree(trained: Trained, number: int) -> Figure:
    """All that beam search had in hand at the end, merged where the texts begin alike; the best on top."""
    found = beam_hypotheses(trained.model, number)
    texts = [hypothesis.words for hypothesis in found]
    others = sum(hypothesis.probability for hypothesis in found[1:])
    title = (f"Beam search ends with {len(found)} text{'s' if texts[1:] else ''}: the best has "
             f"{percent(found[0].probability)} of the probability, the others together {percent(others)}")
    note = (f"Score: log-probability / length^{encoder_decoder.LENGTH_PENALTY:g}; the highest wins. Where a line ends, "
            f"it wrote <EOS>. {trained.note}")
    figure = new_figure(title, 2.2 + 0.45 * len(found), note)
    axes = figure.subplots()
    last = max(map(len, texts))      # the column of <EOS>; from it on the numbers stand
    inch = last / 5.1                # so many columns, each of one word, are an inch
    prob, score = last - 0.5 + 0.85 * inch, last - 0.5 + 1.5 * inch
    rows = place_in_tree(texts)
    for beginning, row in rows.items():
        depth, is_best = len(beginning), list(beginning) == texts[0][: len(beginning)]
        colour, width = (ENCODER_DECODER, 3) if is_best else (GREY, 1.2)
        ends = depth > 0 and beginning[-1] == "<EOS>"
        if depth:
            before, here = rows[beginning[:-1]], last - 0.5 if ends else depth
            axes.plot([depth - 1, depth - 0.5, depth - 0.5, here], [before, before, row, row], color=colour,
                      linewidth=width, zorder=2 if is_best else 1)
        if not ends:
            axes.text(depth, row, beginning[-1] if depth else str(number), ha="center", va="center", zorder=3,
                      fontweight="bold" if is_best else "normal", fontsize=min(12, 80 / last),
                      bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": colour})
    for x, heading in ((prob, "prob."), (score, "score")):
        axes.text(x, -0.75, heading, ha="right", color=GREY)
    for hypothesis in found:
        row = rows[tuple(hypothesis.words)]
        axes.text(prob, row, percent(hypothesis.probability), ha="right", va="center")
        axes.text(score, row, f"{hypothesis.score:.2f}", ha="right", va="center")
    axes.set(xlim=(-0.5, score + 0.05), ylim=(len(found) - 0.5, -1))
    axes.set_axis_off()
    return figure


# --- drawn from what compare_architectures.py has measured ---


def draw_training_curves(comparison: dict) -> Figure:
    """Loss and held-out accuracy of each architecture at the work that it was made for."""
    cells = [cell for name in NAMES for cell in comparison["cells"] if cell["natural"] and cell["architecture"] == name]
    reached, ends = [], []
    for cell in cells:
        tested = [point for point in cell["history"] if "exact_match" in point]
        reached.append(next((f"{point['step']:,}" for point in tested if point["exact_match"] >= 0.99), "not so many"))
        ends.append(f"{cell['work']} ({percent(tested[-1]['exact_match'])} at the end)")
    title = f"From nothing to 99% of held-out answers right, in {', '.join(reached[:-1])} and {reached[-1]} steps"
    note = (f"Each at the work that it was made for: {', '.join(ends)}. The loss of generate cannot reach 0: digits "
            "out of nothing are anyone's guess.")
    figure = new_figure(title, 7, note)
    above, below = figure.subplots(2, 1, sharex=True)
    for cell, marker in zip(cells, "os^"):
        name, history = cell["architecture"], cell["history"]
        losses = [(point["step"], point["loss"]) for point in history]
        accuracies = [(point["step"], point["exact_match"]) for point in history if "exact_match" in point]
        above.plot(*zip(*losses), color=COLOURS[name], linewidth=1.5, label=NAMES[name])
        below.plot(*zip(*accuracies), marker=marker, color=COLOURS[name])
    above.set(yscale="log", ylabel="training loss (nats)")
    below.set(xlabel="training step", ylabel="held-out, all right", ylim=(-0.03, 1.05))
    below.set_yticks(**PERCENT_TICKS)
    for axes in (above, below):
        axes.grid(axis="y")
    legend_above(above, ncols=3, left=-0.1)
    return figure


def draw_kv_cache(comparison: dict) -> Figure:
    """Time per token, with and without the cache, by length."""
    measured = comparison["kv_cache"]
    lengths, cached, recomputed = measured["lengths"], measured["cached_ms"], measured["recomputed_ms"]
    title = (f"The cache pays off with length: at {lengths[-1]} tokens a new one costs {cached[-1]:.1f} ms instead of "
             f"{recomputed[-1]:.1f}")
    figure = new_figure(title, 4.4, "Decoder-only, as measured by compare_architectures.py.")
    axes = figure.subplots()
    axes.plot(lengths, recomputed, "s--", color=INK, label="everything computed anew")
    axes.plot(lengths, cached, "o-", color=DECODER_ONLY, label="with the KV cache")
    axes.set(xlabel="length of the text so far (tokens)", ylabel="ms per new token", ylim=(0, None))
    axes.grid(axis="y")
    legend_above(axes, ncols=2)
    return figure


def draw_comparison_matrix(comparison: dict) -> Figure:
    """The 3 x 3 table: architectures by kinds of work; framed is the work that an architecture was made for."""
    cells = comparison["cells"]
    at_home = min(cell["sequence_accuracy"] for cell in cells if cell["natural"])
    away = min(cell["sequence_accuracy"] for cell in cells if not cell["natural"])
    title = f"At home (framed) each is at least {percent(at_home)} right; away from home down to {percent(away)}"
    note = ("Large: held-out answers that are wholly right (generate: texts that are valid). Small: the cost of one. "
            "All trained with the same width, layers, data and steps.")
    figure = new_figure(title, 5.6, note)
    axes = figure.subplots()
    works = list(dict.fromkeys(cell["work"] for cell in cells))
    for cell in cells:
        row, column = list(NAMES).index(cell["architecture"]), works.index(cell["work"])
        tint = shades(COLOURS[cell["architecture"]])(0.05 + 0.4 * cell["sequence_accuracy"])
        axes.add_patch(Rectangle((column + 0.04, row + 0.05), 0.92, 0.9, facecolor=tint, edgecolor=INK,
                                 linewidth=3 if cell["natural"] else 0))
        axes.text(column + 0.5, row + 0.4, percent(cell["sequence_accuracy"]), ha="center", va="center", fontsize=19,
                  fontweight="bold")
        cost = f"{cell['ms_per_answer']:.2g} ms, {cell['forward_passes']:.0f} passes"
        axes.text(column + 0.5, row + 0.74, cost.replace(" 1 passes", " 1 pass"), ha="center", va="center", fontsize=12)
    axes.set(xlim=(0, len(works)), ylim=(3, 0))
    axes.set_xticks([i + 0.5 for i in range(len(works))], works)
    axes.set_yticks([0.5, 1.5, 2.5], NAMES.values())
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=14)
    axes.spines[:].set_visible(False)
    return figure


def draw_causal_wall(comparison: dict) -> Figure:
    """Place values of digits: what a left-to-right reader can reach at best, what it reaches, and what others do."""
    wall = comparison["wall"]
    readers = {"causal": ("decoder-only,\nwhile reading", DECODER_ONLY),
               "after_reading": ("decoder-only,\nafter reading", DECODER_ONLY),
               "bidirectional": ("encoder-only", ENCODER_ONLY),
               "encoder_decoder": ("encoder-\ndecoder", ENCODER_DECODER)}
    names, colours = zip(*readers.values())
    shares = [wall[reader] for reader in readers]
    title = (f"The wall is at {percent(wall['ceiling'])}: answering while it reads from left to right, a decoder gets "
             f"{percent(wall['causal'])}, afterwards {percent(wall['after_reading'])}")
    note = ("What each digit is worth (ones, tens, ...). Dashed: the best of any left-to-right reader on these "
            "held-out numbers, but for luck of some tenths of a percent.")
    figure = new_figure(title, 5, note)
    axes = figure.subplots()
    bars = axes.bar(names, shares, width=0.6, color=colours)
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=4, fontweight="bold")
    axes.axhline(wall["ceiling"], color=INK, linestyle="--", linewidth=1.8)
    axes.set(ylabel="digits labelled right", ylim=(0, 1.1))
    axes.set_yticks(**PERCENT_TICKS)
    axes.tick_params(axis="x", length=0)
    return figure


# ======================================================================================================
# RUNNING THIS FILE
# ======================================================================================================


def check_writable(folder: Path) -> None:
    """Raises OSError, naming the folder, if no picture can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable: change its permissions, or FIGURES in this file.")


def save(figure: Figure, name: str, folder: Path = FIGURES) -> Path:
    """Write a picture as PNG, without date or version in it: the same picture is the same bytes."""
    path = folder / f"{name}.png"
    # Adaptive filters, the usual choice, make flat pictures with text larger: compress_type 0 goes without.
    figure.savefig(path, metadata={"Software": None}, pil_kwargs={"compress_level": 9, "compress_type": 0})
    return path


def load_comparison() -> dict | None:
    """What compare_architectures.py has measured, if it belongs to today's constants; else None."""
    try:
        found = json.loads(compare_architectures.COMPARISON.read_text())
        constants = found["constants"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    for name, value in constants.items():
        module = toy_dataset if name.startswith("toy_dataset.") else compare_architectures
        if getattr(module, name.removeprefix("toy_dataset."), None) != value:
            return None
    return found


def load_models() -> dict:
    """The trained model of each file, from its checkpoint; None where there is none that fits today's constants."""
    models = {}
    for module in MODULES:
        try:
            models[module.__name__] = module.load()
        except (InputError, FileNotFoundError):
            models[module.__name__] = None
    return models


def measure(module, model, loader) -> Trained:
    """How good a model is on held-out numbers, for the corner of its pictures."""
    batches = list(islice(loader, NUM_TEST_BATCHES))
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    found = module.evaluate(model, batches)
    if module is encoder_only:
        accuracy, what = found["accuracy"], f"of the hidden tokens in {count:,} texts"
    else:
        accuracy, what = found["exact_match"], f"of {count:,} numbers named right"
    return Trained(model.cpu().eval(), accuracy, f"Held-out accuracy: {percent(accuracy)} {what}.")


def train_what_is_missing(models: dict) -> tuple[dict[str, Trained], Trained, dict]:
    """Everything that is trained here, with one progress bar: models that have no checkpoint, the unfinished model of
    sampling_strategies, and the deep models of gradient_flow. Nothing of it is saved.
    """
    loaders = {module.__name__: module.create_dataloaders() for module in MODULES}
    batch_size = decoder_only.BATCH_SIZE
    early_loaders = toy_dataset.make_dataloaders(toy_dataset.decoder_only_example, batch_size, SEED,
                                                 num_train=EARLY_STEPS * batch_size)
    missing = [module for module in MODULES if models[module.__name__] is None]
    num_steps = sum(EPOCHS[module.__name__] * len(loaders[module.__name__].train) for module in missing)
    num_steps += len(early_loaders.train) + 2 * DEEP_STEPS
    with tqdm(total=num_steps, ascii=True, ncols=95, mininterval=0.5) as bar:
        for module in missing:
            name = module.__name__
            bar.set_description(NAMES[name])
            torch.manual_seed(SEED)
            models[name] = module.build_model()
            module.train(models[name], loaders[name], EPOCHS[name], num_evaluations=0, progress=bar)
        bar.set_description("unfinished model")
        torch.manual_seed(SEED)
        early = decoder_only.build_model()
        decoder_only.train(early, early_loaders, num_epochs=1, num_evaluations=0, progress=bar)
        bar.set_description("deep models")
        flow = gradient_flow(progress=bar)
    trained = {name: measure(module, models[name], loaders[name].test) for name, module in zip(models, MODULES)}
    return trained, measure(decoder_only, early, loaders["decoder_only"].test), flow


def draw_all(trained: dict[str, Trained], early: Trained, flow: dict, comparison: dict):
    """Every picture, one after the other: its name and the Figure."""
    models = {name: item.model for name, item in trained.items()}
    sizes = [4, 16, 64, 256, 1024]
    yield "architectures", draw_architectures(models)
    yield "positional_encoding", draw_positional_encoding(models["encoder_only"].positional_encoding.table)
    yield "masks", draw_masks(example_masks())
    yield "softmax_scaling", draw_softmax_scaling(sizes, *largest_weights(sizes))
    yield "attention_encoder", draw_attention_encoder(trained["encoder_only"], SHORT_NUMBER)
    yield "attention_decoder", draw_attention_decoder(trained["decoder_only"], SHORT_NUMBER)
    yield "cross_attention", draw_cross_attention(trained["encoder_decoder"], NUMBER)
    yield "influence", draw_influence(trained, SHORT_NUMBER)
    yield "token_embeddings", draw_token_embeddings(trained["decoder_only"])
    yield "gradient_flow", draw_gradient_flow(flow)
    yield "model_complexity", draw_model_complexity(models)
    yield "learning_rate_schedule", draw_learning_rate_schedule(learning_rates())
    yield "sampling_strategies", draw_sampling_strategies(early, NUMBER)
    yield "beam_search_tree", draw_beam_search_tree(trained["encoder_decoder"], NUMBER)
    yield "training_curves", draw_training_curves(comparison)
    yield "kv_cache", draw_kv_cache(comparison)
    yield "comparison_matrix", draw_comparison_matrix(comparison)
    yield "causal_wall", draw_causal_wall(comparison)


def main() -> None:
    """Draw everything."""
    for number in (NUMBER, SHORT_NUMBER):
        toy_dataset.parse_number(str(number))  # refuses what is outside the language before a minute of training
    check_writable(FIGURES)
    comparison = load_comparison()
    if comparison is None:
        print("No figures/comparison.json that fits: measuring what compare_architectures.py measures (minutes).")
        comparison = compare_architectures.compare()
        compare_architectures.save(comparison)
    models = load_models()
    for name, model in models.items():
        print(f"{NAMES[name]:16} {'from its checkpoint' if model else 'no checkpoint that fits: a short training'}")
    for name, figure in draw_all(*train_what_is_missing(models), comparison):
        print(save(figure, name).relative_to(FIGURES.parent))
        print(textwrap.indent(textwrap.fill(figure.get_suptitle(), 96), "    "))


if __name__ == "__main__":
    run_script(main)
