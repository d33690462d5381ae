"""visualizations.py - pictures of the parts of a transformer, and of what three trained transformers have learned.

    python visualizations.py

Draws every picture of the README into figures/ and prints the title of each. A title is one sentence that states the
picture's point. Its numbers are computed from what is drawn, so it stays true when a constant or the seed changes.

The models come from their checkpoints where these fit today's constants, otherwise from a shorter training run on the
spot: with the undertrained and the deep models, about a minute on two CPU cores. The measurements of
compare_architectures.py are read from figures/comparison.json. If that file is missing or belongs to other constants,
the comparison runs first, which takes minutes. The same seed gives the same pictures, byte for byte (on one machine,
with the same versions of PyTorch and Matplotlib).

To experiment, change NUMBER or SHORT_NUMBER, or a constant at the top of an architecture file, and run this again.
"""

import json
import math
import os
import textwrap
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from tqdm import tqdm

import compare_architectures
import decoder_only
import encoder_decoder
import encoder_only
import toy_dataset
from toy_dataset import PAD_ID, SOS_ID, VOCABULARY, InputError, align, make_padding_mask, number_to_words
from toy_dataset import run_script, to_ids, to_tokens

# ======================================================================================================
# CONSTANTS
# ======================================================================================================

# --- what is shown ---
NUMBER = 90210             # for large pictures; in no split, so no model has seen it. Try 605112
SHORT_NUMBER = 512         # for small multiples; also held out. Try 740 or 999; longer numbers get crowded
NUM_TEST_BATCHES = 2       # of 1,000 test numbers each, for the accuracy in a picture's note. Try 20: all of them
EPOCHS = 3                 # training of a model that has no checkpoint. Try 1
EARLY_STEPS = 120          # training of the models in sampling_strategies and beam_search_tree, which must still be
                           # uncertain. Try 60, 150; at most one epoch
NUM_SEARCHED = 500         # test numbers on which beam search and greedy search are compared. Try 20,000: all of them
BEAM_WIDTH = 4             # of that beam search. Try 2, 5
DEPTH = 16                 # layers of the two deep models in gradient_flow. Try 4: does the difference remain?
DEEP_STEPS = 60            # training of these two. Try 20: is the difference there already?
NUM_KEYS = 16              # random keys per query in softmax_scaling. Try 4, 64
SEED = 0                   # initial weights and random vectors. Try 1: which pictures change?

# --- how it looks ---
FIGURES = Path(__file__).parent / "figures"
matplotlib.rc_file(Path(__file__).parent / "figures" / "style.mplstyle")  # replaces the reader's own settings
# One color for each architecture, and others for everything else; the style sheet says where they come from.
COLORS = {"encoder_only": "#0072B2", "decoder_only": "#E69F00", "encoder_decoder": "#009E73"}
ENCODER_ONLY, DECODER_ONLY, ENCODER_DECODER = COLORS.values()
INK, GRAY, PALE, PURPLE, SKY = "#222222", "#707070", "#DDDDDD", "#AA4499", "#56B4E9"
NAMES = {"encoder_only": "encoder-only", "decoder_only": "decoder-only", "encoder_decoder": "encoder-decoder"}
NO_PROOF = "Attention weights show possible information flow, not reasoning."

MODULES = {"encoder_only": encoder_only, "decoder_only": decoder_only, "encoder_decoder": encoder_decoder}
# What each architecture reads when a number is shown in a picture.
EXAMPLES = {encoder_only.EncoderOnlyTransformer: toy_dataset.masked_lm_example,
            decoder_only.DecoderOnlyTransformer: toy_dataset.decoder_only_example,
            encoder_decoder.EncoderDecoderTransformer: toy_dataset.encoder_decoder_example}
WORD_KINDS = {"ones": toy_dataset.ONES[1:10], "teens": toy_dataset.ONES[10:], "tens": toy_dataset.TENS}


class Trained(NamedTuple):
    """A model, its held-out accuracy, and the sentence that reports it in the note under a picture."""

    model: nn.Module
    accuracy: float
    note: str


def tokens_of(ids: torch.Tensor) -> list[str]:
    """Ids (T) -> tokens, padding included."""
    return [VOCABULARY[i] for i in ids.tolist()]


# ======================================================================================================
# THE NUMBERS: each function can be used without drawing
# ======================================================================================================

# --- from the code itself, without training ---


def example_masks() -> dict:
    """The four masks of one padded batch, from the models' own functions: name -> (mask (T, S), queries, keys).

    The batch holds 42 and 342. The masks of 42, the shorter one, are returned.
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
    """The largest attention weight of random queries, averaged, for each d_k: without 1/sqrt(d_k), and with it.

    1 means that all weight is on a single key, 1 / NUM_KEYS that all keys have equal weight.
    """
    generator = torch.Generator().manual_seed(SEED)
    unscaled, scaled = [], []
    for d_k in sizes:
        query, key = (torch.randn(n, d_k, generator=generator) for n in (num_queries, NUM_KEYS))
        for factor, found in ((math.sqrt(d_k), unscaled), (1.0, scaled)):  # times sqrt(d_k) undoes the division by it
            _, weights = encoder_only.scaled_dot_product_attention(query * factor, key, key)
            found.append(weights.max(dim=-1).values.mean().item())
    return unscaled, scaled


class PostNormLayer(encoder_only.EncoderLayer):
    """The two sublayers arranged as in Vaswani et al. 2017: the norm follows the sum, on the residual stream itself."""

    def forward(self, x, mask, attention_maps=None):
        x = self.attention_norm(x + self.attention(x, mask, attention_maps))
        return self.feed_forward_norm(x + self.feed_forward(x))


def build_deep_model(post_norm: bool, depth=DEPTH):
    """A deep, narrow masked LM: pre-norm as in encoder_only.py, or post-norm with exactly the same initial weights."""
    torch.manual_seed(SEED)
    model = encoder_only.build_model(d_model=32, num_layers=depth, num_heads=4, d_ff=128, dropout=0.0).cpu()
    if post_norm:
        for layer in model.layers:
            layer.__class__ = PostNormLayer  # the same modules, another forward()
        model.final_norm = nn.Identity()     # the last layer already ends in a norm
    return model


def layer_gradients(model, batch) -> list[float]:
    """The norm of the loss's gradient with respect to each layer's parameters, first layer first."""
    model.zero_grad()
    torch.manual_seed(SEED)  # so that the same tokens are masked every time
    loss_sum, num_targets = encoder_only.compute_loss(model, batch)
    (loss_sum / num_targets).backward()
    return [math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters())) for layer in model.layers]


def gradient_flow(num_steps=DEEP_STEPS, depth=DEPTH, progress=None) -> dict:
    """Gradient norms by layer, before and after training: ("pre-norm" or "post-norm", steps) -> a list of depth."""
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


# --- from trained models ---


@torch.no_grad()
def attention_maps(model, number: int) -> dict[str, tuple]:
    """All attention weights of a model that reads a number's text: stack -> (queries, keys, weights (layers, H, T, S)).

    The stacks are "layers", or "encoder" and "decoder" with "cross" between them.
    """
    example = toy_dataset.pad_batch([EXAMPLES[type(model)](number)])
    self_maps, encoder_maps, cross_maps = [], [], []
    if "source" not in example:
        model(example["ids"], attention_maps=self_maps)
        tokens = tokens_of(example["ids"][0])
        return {"layers": (tokens, tokens, torch.cat(self_maps))}
    memory = model.encode(example["source"], encoder_maps)
    model.decode(example["target"], memory, example["source"], None, self_maps, cross_maps)
    source, target = tokens_of(example["source"][0]), tokens_of(example["target"][0])
    predicted = [*target[1:], "<EOS>"]  # a row of cross-attention is labeled with the word that it helps to predict
    return {"encoder": (source, source, torch.cat(encoder_maps)), "decoder": (target, target, torch.cat(self_maps)),
            "cross": (predicted, source, torch.cat(cross_maps))}


def digit_word_pairs(number: int) -> list[tuple[int, int]]:
    """Positions (digit, word) in `<CLS> digits <SEP> words <SEP>` that belong together, in both directions."""
    first_word = len(str(number)) + 2
    pairs = [(1 + i, first_word + row) for row, positions in enumerate(align(number)) for i in positions]
    return pairs + [(word, digit) for digit, word in pairs]


def share_on_cells(weights: torch.Tensor, cells: list[tuple[int, int]]) -> torch.Tensor:
    """The share of attention on some cells (row, column), within their rows: (..., T, S) -> (...)."""
    rows, columns = zip(*cells)
    return weights[..., rows, columns].sum(dim=-1) / len(set(rows))


def next_token_distributions(model, prompt: list[str]) -> dict[str, torch.Tensor]:
    """The next-token distribution (V) after a prompt, under each sampling strategy."""
    with torch.no_grad():
        logits = model(torch.tensor([to_ids(prompt)]))[:, -1]
    logits[:, PAD_ID] = -math.inf  # as in decoder_only.generate
    strategies = {
        "temperature 1": logits,
        "temperature 0.5": decoder_only.scale_by_temperature(logits, 0.5),
        "temperature 2": decoder_only.scale_by_temperature(logits, 2.0),
        "greedy (top-k 1)": decoder_only.keep_top_k(logits, 1),
        "top-k 3": decoder_only.keep_top_k(logits, 3),
        "top-p 0.9": decoder_only.keep_top_p(logits, 0.9),
    }
    return {name: chosen[0].softmax(dim=-1) for name, chosen in strategies.items()}


def principal_components(vectors: torch.Tensor, num=2) -> tuple[torch.Tensor, torch.Tensor]:
    """PCA: vectors (N, C) projected onto the num directions in which they vary most, (N, num), and the share of the
    total variance along each of these, (num). The sign of a direction is arbitrary: the largest coordinate is made
    positive.
    """
    centered = vectors.double() - vectors.double().mean(dim=0)
    _, spread, directions = torch.linalg.svd(centered, full_matrices=False)
    projected = centered @ directions[:num].T
    projected *= projected.gather(0, projected.abs().argmax(dim=0, keepdim=True)).sign()
    return projected, spread[:num] ** 2 / (spread**2).sum()


def share_beside_own_kind(vectors: torch.Tensor, kinds: torch.Tensor) -> float:
    """The share of vectors (N, any size) whose nearest neighbor is of their own kind; kinds: (N)."""
    distances = torch.cdist(vectors, vectors).fill_diagonal_(math.inf)
    return (kinds[distances.argmin(dim=1)] == kinds).float().mean().item()


def influence(model, number: int) -> tuple[list[str], list[str], torch.Tensor]:
    """How sensitive each output is to each input: outputs, inputs, and norms (T, S) of d logits_t / d embedding_s.

    Attention weights describe one layer; this derivative follows every path through all of them, and is exactly 0 where
    the masks leave no path. The norm is the Frobenius norm of the (V, C) derivative.
    """
    inputs = []

    def watch(module, arguments, output):  # makes the embedding's output a leaf to differentiate with respect to
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    example = toy_dataset.pad_batch([EXAMPLES[type(model)](number)])
    texts = [example[name] for name in ("ids", "source", "target") if name in example]  # ids, or source and target
    handle = model.embedding.register_forward_hook(watch)
    logits = model(*texts)                                                                      # (1, T, V)
    handle.remove()
    norms = []
    for t in range(logits.size(1)):  # one backward pass per logit, batched: row v of the identity selects logit v
        gradients = torch.autograd.grad(logits[0, t], inputs, torch.eye(logits.size(2)), retain_graph=True,
                                        is_grads_batched=True)                                  # (V, 1, S, C) each
        norms.append(torch.cat(gradients, dim=2).square().sum(dim=(0, 1, 3)).sqrt())            # (S)
    return tokens_of(texts[-1][0]), tokens_of(torch.cat(texts, dim=1)[0]), torch.stack(norms)


@torch.no_grad()
def beam_steps(model, number: int, width: int, num_steps: int) -> list[dict[tuple, float]]:
    """Beam search, one dictionary per step: every text that the step keeps -> its log-probability, most probable first.

    encoder_decoder.beam_search is the same search for a whole batch, with a cache and an early stop.
    """
    source = torch.tensor([encoder_decoder.make_source(number)])
    memory = model.encode(source)
    steps, unfinished = [], {(): 0.0}
    for _ in range(num_steps):
        candidates = {}
        for text, log_prob in unfinished.items():
            logits = model.decode(torch.tensor([[SOS_ID, *to_ids(list(text))]]), memory, source)[0, -1]
            word_log_probs = zip(VOCABULARY, logits.log_softmax(dim=-1).tolist())
            candidates |= {(*text, word): log_prob + more for word, more in word_log_probs if word != "<PAD>"}
        ranked = sorted(candidates, key=candidates.get, reverse=True)
        ended = [text for text in ranked[:width] if text[-1] == "<EOS>"]
        unfinished = {text: candidates[text] for text in [t for t in ranked if t[-1] != "<EOS>"][:width]}
        steps.append({text: candidates[text] for text in ranked if text in unfinished or text in ended})
    return steps


def compare_searches(model, numbers: list[int], width=BEAM_WIDTH) -> tuple[dict, list[float]]:
    """Greedy search and beam search on some numbers: an example to draw, and each search's share of correct names.

    Of the numbers that only beam search names correctly, the example has the largest ratio of its text's probability to
    that of greedy search's text. It holds both texts, the beam search's steps, this ratio (0 if the beam dropped greedy
    search's text), and behind: how many steps pass before beam search ranks its text above greedy search's.
    """
    sources = [encoder_decoder.make_source(number) for number in numbers]
    results = (encoder_decoder.generate(model, sources, temperature=0.0),
               encoder_decoder.beam_search(model, sources, width)[0][:, 0])
    greedy, beam = ([tuple(to_tokens(ids)) for ids in texts.tolist()] for texts in results)
    correct = [(*number_to_words(number), "<EOS>") for number in numbers]
    rows = [row for row in zip(numbers, greedy, beam, correct) if row[1] != row[2] == row[3]]
    rows = [row for row in rows if max(map(len, row[1:])) <= 7]  # longer ones do not fit the picture
    examples = []
    for number, g, b, _ in rows or [(numbers[0], greedy[0], beam[0], correct[0])]:
        steps = beam_steps(model, number, width, max(len(g), len(b)))
        ahead = [step.get(b[:n], -math.inf) > step.get(g[:n], -math.inf) for n, step in enumerate(steps, start=1)]
        ratio = math.exp(steps[len(b) - 1].get(b, -math.inf) - steps[len(g) - 1].get(g, math.inf))
        examples.append({"number": number, "greedy": g, "beam": b, "steps": steps, "ratio": ratio,
                         "behind": [*ahead, True].index(True)})
    shares = [sum(map(tuple.__eq__, texts, correct)) / len(numbers) for texts in (greedy, beam)]
    return max(examples, key=lambda example: example["ratio"]), shares


# ======================================================================================================
# DRAWING: what all pictures have in common
# ======================================================================================================


def new_figure(title: str, height: float, note: str = "") -> Figure:
    """An empty picture of the common width. The title states its point; the note is small, in the lower corner."""
    figure = Figure(figsize=(matplotlib.rcParams["figure.figsize"][0], height))
    figure.suptitle(textwrap.fill(title, 54, break_on_hyphens=False), x=0.01, ha="left", linespacing=1.25)
    figure.supxlabel(textwrap.fill(note, 82, break_on_hyphens=False), x=0.99, ha="right", color=GRAY, linespacing=1.3)
    return figure


def legend_above(axes, ncols: int, left=-0.02) -> None:
    """The legend in the space above the axes, where it covers no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(left, 1.0), ncols=ncols)


def draw_lines(title: str, note: str, lines: list[tuple], ncols: int, **settings):
    """A picture of lines (xs, ys, format, settings), with its legend. Returns the figure and its axes."""
    figure = new_figure(title, 4.4, note)
    axes = figure.subplots()
    for xs, ys, form, line in lines:
        axes.plot(xs, ys, form, **line)
    axes.set(**settings)
    axes.grid(axis="y")
    legend_above(axes, ncols)
    return figure, axes


def shades(color: str) -> LinearSegmentedColormap:
    """White for 0, then the color, and for 1 a dark shade of it: larger is darker, in grayscale as well."""
    return LinearSegmentedColormap.from_list("", ["white", color, [0.35 * channel for channel in to_rgb(color)]])


def draw_map(axes, values, rows: list[str], columns: list[str], color: str, boxed=(), frame=1.2):
    """A matrix of shares as colored cells, first row on top, with tokens. Hatched: exactly 0. boxed: cells to frame."""
    mesh = axes.pcolormesh(values, cmap=shades(color), vmin=0, vmax=1, edgecolors=PALE, linewidth=0.5)
    for row, column in (values == 0).nonzero().tolist():
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", linewidth=0))
    for row, column in boxed:
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=INK, linewidth=frame, zorder=3,
                                 clip_on=False))
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, rotation=90)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set(visible=True, color=PALE)
    return mesh


def percent(share: float) -> str:
    """A share as a percentage with two significant digits, more near 0% and 100%: 73%, 99.81%, 0.12%."""
    if 0 < share < 0.0001:
        return "<0.01%"
    if 0.9999 < share < 1:
        return ">99.99%"
    return f"{share:.0%}" if 0.05 <= share <= 0.99 or share in (0, 1) else f"{share:.2%}"


def times(ratio: float) -> str:
    """A ratio as text, also where it is small: 6.2 times, 1/405."""
    return f"{ratio:,.1f} times" if ratio >= 1 else f"1/{1 / ratio:,.0f}"


PERCENT_TICKS = {"ticks": [0, 0.5, 1], "labels": ["0%", "50%", "100%"]}


# ======================================================================================================
# THE PICTURES: each function takes its numbers or its model, and returns a Figure
# ======================================================================================================

# --- the parts ---

LINE, COLUMN = 0.19, 1.83  # of the block diagrams, in inches: from one line of text to the next, one stack to the next


def draw_box(axes, left: float, bottom: float, width: float, lines: list[str], color: str) -> float:
    """A rounded box with centered lines of text, the first one bold. All sizes in inches. Returns the height."""
    height = LINE * len(lines) + 0.08
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.05",
                                  edgecolor=color, facecolor=shades(color)(0.08), linewidth=1.3, zorder=2))
    for i, line in enumerate(lines):
        y = bottom + height / 2 + LINE * ((len(lines) - 1) / 2 - i)
        axes.text(left + width / 2, y, line, ha="center", va="center", fontsize=11, zorder=3,
                  fontweight="bold" if i == 0 else "normal")
    return height


def draw_path(axes, *points) -> None:
    """A thin line through some points, with an arrowhead at its end."""
    *_, before, end = points
    axes.plot(*zip(*points[:-1]), color=GRAY, linewidth=1.3, zorder=1)
    axes.annotate("", end, before, arrowprops={"arrowstyle": "-|>", "color": GRAY, "linewidth": 1.3,
                                               "shrinkA": 0, "shrinkB": 0})


def draw_stack(axes, left: float, model, stack: str, reads: str, writes: str, color: str) -> tuple[dict, float]:
    """One stack, from the bottom up: embedding, a layer as its forward() is written, final norm, output layer.

    Returns the height of each sublayer, and that of the top.
    """
    attention = attention_maps(model, SHORT_NUMBER)[stack][2]  # what it may attend to is measured, not assumed
    reach = {"self-attention": ["causal" if attention.triu(1).sum() == 0 else "bidirectional"],
             "cross-attention": ["over the source"]}
    layers = getattr(model, stack)
    V, C = model.embedding.weight.shape
    middle, road, heights = left + 0.76, left + 1.62, {}  # of the sublayers, and of the residual stream beside them
    axes.text(middle, 0.32, reads, ha="center", va="top", fontsize=11)
    draw_path(axes, (middle, 0.35), (middle, 0.5))
    draw_box(axes, left + 0.05, 0.5, 1.64, ["embedding", f"{V} x {C} = {V * C:,}", "+ position"], color)
    y = 1.47
    for name, part in layers[0].named_children():  # each is drawn as forward() has it: x = x + sublayer(norm(x))
        if "norm" in name or "dropout" in name:
            continue
        name = {"attention": "self-attention"}.get(name, name.replace("_", "-"))
        size = (f"d_ff = {part.expand.out_features}" if name == "feed-forward" else
                f"{part.num_heads} heads of {part.query.out_features // part.num_heads}")
        draw_path(axes, (road, y), (middle, y), (middle, y + 0.12))
        draw_box(axes, middle - 0.3, y + 0.12, 0.6, ["norm"], GRAY)
        draw_path(axes, (middle, y + 0.37), (middle, y + 0.5))
        lines = [name, size, *reach.get(name, []), f"{sum(p.numel() for p in part.parameters()):,}"]
        height = draw_box(axes, middle - 0.73, y + 0.5, 1.46, lines, color)
        heights[name] = y + 0.5 + height / 2
        y += 0.62 + height
        draw_path(axes, (middle, y - 0.12), (middle, y), (road - 0.08, y))
        axes.text(road, y, "+", ha="center", va="center", fontsize=12, fontweight="bold", zorder=4,
                  bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": INK})
        y += 0.17
    axes.text(middle, y + LINE / 2, f"{len(layers)} layers", ha="center", va="center", fontsize=11, color=GRAY)
    axes.add_patch(Rectangle((left, 1.35), COLUMN - 0.11, y + LINE - 1.35, fill=False, edgecolor=GRAY,
                             linestyle=(0, (4, 3))))
    top = y + LINE + 0.18
    axes.plot([road, road], [1.15, top], color=INK, linewidth=2, zorder=1.5)
    top += draw_box(axes, left + 0.05, top, 1.64, ["norm"], GRAY)
    if writes:
        draw_path(axes, (middle, top), (middle, top + 0.15))
        top += 0.15 + draw_box(axes, left + 0.05, top + 0.15, 1.64, [f"{V} logits", "tied embedding"], color)
        axes.text(middle, top + 0.16, writes, ha="center", va="center", fontsize=11)
        top += 0.42
    return heights, top


def draw_architectures(models: dict) -> Figure:
    """The three models as they are built: every size and number is read from their modules."""
    total = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    title = ("Same building blocks, three layouts: the encoder-decoder has "
             f"{total['encoder_decoder'] / total['decoder_only']:.1f} times the parameters")
    figure = new_figure(title, 9.2, "Drawn from the models themselves. The last line of each box: its parameters.")
    axes = figure.subplots()
    digits, words = " ".join(str(SHORT_NUMBER)), number_to_words(SHORT_NUMBER)
    pair = f"{digits} <SEP>\n{' '.join(words[:2])} ..."
    stacks = [("encoder_only", "layers", f"<CLS> {pair}", "masked tokens"),
              ("decoder_only", "layers", f"<SOS> {pair}", "next tokens"),
              ("encoder_decoder", "encoder", f"{digits} <EOS>", ""),
              ("encoder_decoder", "decoder", f"<SOS> {words[0]}\n{' '.join(words[1:2])} ...", "next words")]
    tops = []
    for i, (name, stack, reads, writes) in enumerate(stacks):
        heights, top = draw_stack(axes, COLUMN * i, models[name], stack, reads, writes, COLORS[name])
        tops.append(top)
        if writes:
            middle = COLUMN * i + 0.76 - (COLUMN / 2 if stack == "decoder" else 0)
            axes.text(middle, top, f"{NAMES[name]}\n{total[name]:,}", ha="center", va="bottom", fontweight="bold")
    # The encoder's output goes to the decoder's cross-attention.
    gap, start, end = COLUMN * 3 - 0.06, tops[2] - 0.12, heights["cross-attention"]
    draw_path(axes, (gap - 0.1, start), (gap, start), (gap, end), (gap + 0.11, end))
    axes.set(xlim=(-0.03, 4 * COLUMN - 0.08), ylim=(-0.1, tops[3] + 0.45), aspect="equal")
    axes.set_axis_off()
    return figure


def draw_positional_encoding(table: torch.Tensor) -> Figure:
    """table: (max_length, C), of the class PositionalEncoding."""
    far = table.size(0) // 4
    shown = {far: (INK, "-"), table.size(0) * 5 // 8: (PURPLE, "--")}
    similarity = {position: F.cosine_similarity(table, table[position], dim=-1) for position in shown}
    title = (f"Nearby positions have similar encodings: cosine {similarity[far][far + 1]:.2f} at distance 1, "
             f"{similarity[far][0]:.2f} at distance {far}")
    figure = new_figure(title, 7)
    above, below = figure.subplots(2, 1, height_ratios=[1.4, 1])
    mesh = above.pcolormesh(table, cmap="PuOr", vmin=-1, vmax=1)
    above.invert_yaxis()
    above.set(xlabel="dimension (high frequencies left, low right)", ylabel="position in the text")
    figure.colorbar(mesh, ax=above, ticks=[-1, 0, 1], label="value (sine, cosine)")
    for position, (color, dashes) in shown.items():
        below.plot(similarity[position], color=color, linestyle=dashes, label=f"with position {position}")
    below.set(xlabel="position in the text", ylabel="cosine similarity")
    below.grid(axis="y")
    legend_above(below, ncols=2)
    return figure


def draw_masks(masks: dict) -> Figure:
    """masks: as example_masks returns them."""
    title = "A padding mask hides padding, a causal mask hides the future; & combines them"
    figure = new_figure(title, 7.4,
                        "Rows: queries. Filled: the keys they may attend to. For 42, padded beside 342.")
    colors = [ENCODER_ONLY, DECODER_ONLY, DECODER_ONLY, ENCODER_DECODER]
    for axes, color, (name, (mask, rows, columns)) in zip(figure.subplots(2, 2).flat, colors, masks.items()):
        axes.set_title(name)
        draw_map(axes, mask * 0.5, rows, columns, color)
    return figure


def draw_softmax_scaling(sizes: list[int], unscaled: list[float], scaled: list[float]) -> Figure:
    """sizes: d_k; unscaled and scaled: as largest_weights returns them."""
    title = (f"At d_k = {sizes[-1]} the largest of {NUM_KEYS} attention weights averages {percent(unscaled[-1])} "
             f"without 1/sqrt(d_k), {percent(scaled[-1])} with it")
    lines = [(sizes, unscaled, "o-", {"color": PURPLE, "label": "softmax(q k)"}),
             (sizes, scaled, "s-", {"color": INK, "label": "softmax(q k / sqrt(d_k))"})]
    figure, axes = draw_lines(title, "Random queries and keys, similar to those of an untrained model.", lines, 2,
                              xlabel="d_k, dimensions of a query and a key", ylabel="largest weight (mean)",
                              ylim=(0, 1.02))
    axes.axhline(1 / NUM_KEYS, color=GRAY, linewidth=1.2, linestyle=":")
    axes.text(sizes[-1], 1 / NUM_KEYS + 0.015, "all keys equal", ha="right", va="bottom", color=GRAY)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_yticks(**PERCENT_TICKS)
    return figure


def draw_learning_rate_schedule() -> Figure:
    """The learning rate at each step of each file's own training, from its own constants and function."""
    rates = {}
    for name, module in MODULES.items():
        num_steps = module.NUM_EPOCHS * math.ceil(len(toy_dataset.make_splits().train) / module.BATCH_SIZE)
        rates[name] = [module.learning_rate_at(step, num_steps) for step in range(num_steps)]
    warmups = sorted({values.index(max(values)) + 1 for values in rates.values()})
    title = f"Linear warmup for {' or '.join(map(str, warmups))} steps, then cosine decay to the end of training"
    lines = [(range(1, len(values) + 1), values, dashes, {"color": COLORS[name], "label": NAMES[name]})
             for (name, values), dashes in zip(rates.items(), ("-", "--", "-"))]  # dashed: it may cover the first
    figure, axes = draw_lines(title, "Computed by each file's own learning_rate_at, from its own constants.", lines, 3,
                              xlabel="training step", ylabel="learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="plain")
    return figure


def draw_gradient_flow(found: dict) -> Figure:
    """found: as gradient_flow returns it."""
    num_steps = max(steps for _, steps in found)
    depth = len(found["pre-norm", 0])
    post, pre = (times(found[name, num_steps][0] / found[name, num_steps][-1]) for name in ("post-norm", "pre-norm"))
    title = (f"Layer 1's gradient after {num_steps} steps, relative to layer {depth}'s: {post} with post-norm, {pre} "
             "with pre-norm")
    lines = []
    for (name, steps), norms in found.items():
        color, marker = (INK, "o") if name == "pre-norm" else (PURPLE, "s")
        line = {"color": color, "label": f"{name}, " + (f"after {steps} steps" if steps else "untrained")}
        if not steps:
            line |= {"linewidth": 1.5, "markerfacecolor": "white"}
        lines.append((range(1, depth + 1), norms, marker + ("-" if steps else ":"), line))
    note = "Gradient of all parameters of a layer. Same initial weights, same data."
    return draw_lines(title, note, lines, 2, xlabel="layer (1 is next to the input)", ylabel="gradient norm",
                      yscale="log")[0]


def draw_model_complexity(models: dict) -> Figure:
    """Parameters by component, with the component's share of its model."""
    counts = {name: compare_architectures.count_parameters(model) for name, model in models.items()}
    both = counts["encoder_decoder"]
    components = sorted((name for name in both if any(count[name] for count in counts.values())), key=both.get)[::-1]
    shares = [count[components[0]] / sum(count.values()) for count in counts.values()]
    title = (f"The {components[0]} layers hold {min(shares):.0%} to {max(shares):.0%} of the parameters; "
             f"cross-attention adds {both['cross-attention']:,}")
    figure = new_figure(title, 6.2, "Counted in the models' own modules. In parentheses: the share of the model.")
    axes = figure.subplots()
    for i, (name, count) in enumerate(counts.items()):
        total = sum(count.values())
        values = [total, *(count[component] for component in components)]
        bars = axes.barh([row + 0.27 * (i - 1) for row in range(len(values))], values, 0.25, color=COLORS[name],
                         label=NAMES[name])
        labels = [f"{n:,} ({percent(n / total)})" if 0 < n < total else f"{n:,}" for n in values]
        axes.bar_label(bars, labels, padding=4, fontsize=11)
    axes.set_yticks(range(len(components) + 1), ["total", *components])
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


def draw_attention(attention: tuple, color: str, title: str, note: str, boxed=(), best=None) -> Figure:
    """Every layer and head as a small map, up to four in a row; the title of the best (layer, head) in bold."""
    queries, keys, weights = attention
    num_layers, num_heads, *_ = weights.shape
    num_columns = min(4, num_heads)
    rows_per_layer = math.ceil(num_heads / num_columns)
    figure = new_figure(title, 2.2 + 2.0 * num_layers * rows_per_layer, f"{note} {NO_PROOF}")
    grid = figure.subplots(num_layers * rows_per_layer, num_columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        layer, head = divmod(i, rows_per_layer * num_columns)
        if head >= num_heads:
            axes.set_axis_off()
            continue
        rows = queries if i % num_columns == 0 else []  # labels only at the left and at the bottom
        columns = keys if i + num_columns >= grid.size else []
        mesh = draw_map(axes, weights[layer, head], rows, columns, color, boxed)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=12,
                       fontweight="bold" if (layer, head) == best else "normal")
        axes.tick_params(labelsize=11)
    figure.supylabel("query", fontsize=13)
    bar = figure.colorbar(mesh, ax=grid, location="bottom", aspect=60, label="attention weight, by key")
    bar.set_ticks(**PERCENT_TICKS)
    return figure


def draw_attention_encoder(trained: Trained, number: int) -> Figure:
    """The masked LM reads digits and words together; the pairs that belong together are boxed."""
    tokens, _, weights = attention = attention_maps(trained.model, number)["layers"]
    pairs = digit_word_pairs(number)
    shares = share_on_cells(weights, pairs)                                             # (layers, H)
    uniform = share_on_cells(torch.full_like(weights[0, 0], 1 / len(tokens)), pairs).item()
    title = (f"Trained without alignments, the best head puts {percent(shares.max().item())} of its attention on "
             "matching digits and words (boxed)")
    best = layer, head = divmod(shares.argmax().item(), shares.size(1))
    note = (f"Best of {shares.numel()} heads on this number: layer {layer + 1}, head {head + 1}. Uniform attention: "
            f"{percent(uniform)}. {trained.note}")
    return draw_attention(attention, ENCODER_ONLY, title, note, pairs, best)


def draw_attention_decoder(trained: Trained, number: int) -> Figure:
    """The GPT reads from left to right."""
    attention = attention_maps(trained.model, number)["layers"]
    above = attention[2].triu(diagonal=1).sum().item()
    title = f"Causal attention: in all heads together, the weights right of the diagonal sum to {above:g}"
    return draw_attention(attention, DECODER_ONLY, title, f"Hatched: exactly 0. {trained.note}")


def draw_cross_attention(trained: Trained, number: int) -> Figure:
    """The digits that the encoder-decoder attends to for each word: the mean over all layers and heads."""
    words, digits, weights = attention_maps(trained.model, number)["cross"]
    weights = weights.mean(dim=(0, 1))                                                  # (T, S)
    cells = [(row, column) for row, columns in enumerate(align(number)) for column in columns]
    share, uniform = (share_on_cells(w, cells).item() for w in (weights, torch.full_like(weights, 1 / len(digits))))
    title = f"Cross-attention puts {percent(share)} of its weight on the digits that determine each word (boxed)"
    note = f"Mean over all layers and heads. Uniform attention: {percent(uniform)}. {trained.note} {NO_PROOF}"
    figure = new_figure(title, 6.6, note)
    axes = figure.subplots()
    draw_map(axes, weights, words, digits, ENCODER_DECODER, cells, frame=3)
    axes.set(xlabel="source token (key)", ylabel="word being predicted", aspect="auto")
    axes.tick_params(labelsize=15)
    axes.tick_params(axis="x", rotation=0)
    for row, shares in enumerate(weights.tolist()):
        for column, share in enumerate(shares):
            axes.text(column + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center",
                      color="white" if share > 0.4 else INK)
    return figure


def draw_influence(trained: dict[str, Trained], number: int) -> Figure:
    """The inputs that each output depends on, measured through all layers, for the three models."""
    found = {name: influence(item.model, number) for name, item in trained.items()}
    right = {name: norms[tuple(torch.triu_indices(*norms.shape, 1))] for name, (_, _, norms) in found.items()}
    counts = {name: f"{(values == 0).sum()} of {len(values)}" for name, values in right.items()}
    title = (f"Inputs right of an output have exactly no effect: decoder-only {counts['decoder_only']} cells, "
             f"encoder-only {counts['encoder_only']}")
    accuracies = ", ".join(f"{NAMES[name]} {percent(item.accuracy)}" for name, item in trained.items())
    note = f"Frobenius norm of d logits / d embedding; 0 where no path leads. Held-out accuracy: {accuracies}."
    figure = new_figure(title, 7.2, note)
    grid = figure.subplots(2, 2, height_ratios=[2, 1.15])
    for (name, (outputs, inputs, norms)), axes in zip(found.items(), grid.flat):
        draw_map(axes, norms / norms.amax(dim=1, keepdim=True), outputs, inputs, COLORS[name])
        axes.set_title(NAMES[name])
        axes.set(xlabel="input" if name != "encoder_decoder" else "source | target", ylabel="output at", anchor="W")
        axes.tick_params(labelsize=11)
    grid[1, 0].axvline(len(str(number)) + 1, color=INK)  # between the source, with its <EOS>, and the target
    grid[1, 1].set_axis_off()
    bar = figure.colorbar(ScalarMappable(cmap=shades(GRAY)), cax=grid[1, 1].inset_axes([0.05, 0.6, 0.9, 0.12]),
                          orientation="horizontal")  # gray stands for the three colors
    bar.set_ticks([0, 1], labels=["0", "largest in its row"])
    grid[1, 1].legend([Patch(facecolor="white", hatch="////")], ["exactly 0"], loc="upper left",
                      bbox_to_anchor=(0, 0.3))
    return figure


def draw_token_embeddings(trained: Trained) -> Figure:
    """The embeddings of the number words, projected to two dimensions."""
    words = [word for kind in WORD_KINDS.values() for word in kind]
    kinds = torch.tensor([i for i, kind in enumerate(WORD_KINDS.values()) for _ in kind])
    vectors = trained.model.embedding.weight.detach()[to_ids(words)]
    points, shares = principal_components(vectors)
    in_the_plane, in_full = (share_beside_own_kind(x, kinds) for x in (points, vectors))
    chance = sum(n * (n - 1) for n in kinds.bincount().tolist()) / (len(words) * (len(words) - 1))
    title = (f"{percent(in_the_plane)} of the words are nearest to one of their own kind in this plane, "
             f"{percent(in_full)} in all {vectors.size(1)} dimensions")
    note = (f"PCA of the embeddings, learned from digits and names alone. Random groups of these sizes: "
            f"{percent(chance)}. {trained.note}")
    figure = new_figure(title, 7, note)
    axes = figure.subplots()
    width, height = (points.amax(dim=0) - points.amin(dim=0)).tolist()
    for i, (kind, color, marker) in enumerate(zip(WORD_KINDS, (INK, PURPLE, SKY), "os^")):
        places = sorted(zip(points[kinds == i].tolist(), WORD_KINDS[kind]), key=lambda item: item[0][1])  # lowest first
        xs, ys = zip(*(place for place, _ in places))
        axes.scatter(xs, ys, s=60, color=color, marker=marker, label=kind)
        # Words of a kind may lie so close together that their labels would overlap: these form a column beside them.
        x, middle = max(xs) + width / 14, sum(ys) / len(ys)
        for rank, (place, word) in enumerate(places):
            y = middle + height / 24 * (rank - (len(places) - 1) / 2)
            axes.annotate(word, place, (x, y), va="center", fontsize=12, annotation_clip=False,
                          arrowprops={"arrowstyle": "-", "color": GRAY, "linewidth": 0.6, "relpos": (0, 0.5)})
            axes.update_datalim([(x + width / 4, y)])  # the axes make room for the labels, too
    axes.set(xlabel=f"first principal component ({percent(shares[0].item())} of the variance)",
             ylabel=f"second principal component ({percent(shares[1].item())})", xticks=[], yticks=[])
    legend_above(axes, ncols=3)
    return figure


def draw_sampling_strategies(trained: Trained, number: int, num_tokens=7) -> Figure:
    """The last word of a number's name under six strategies; the outline is the model's own distribution."""
    prompt = ["<SOS>", *str(number), "<SEP>", *number_to_words(number)[:-1]]
    distributions = next_token_distributions(trained.model, prompt)
    own, correct = distributions["temperature 1"], number_to_words(number)[-1]
    shown = own.topk(num_tokens).indices
    kept = {name: (distributions[name] > 0).sum().item() for name in ("top-k 3", "top-p 0.9")}
    title = (f"After '{' '.join(prompt[-2:])}', top-k 3 leaves {kept['top-k 3']} candidates and top-p 0.9 leaves "
             f"{kept['top-p 0.9']}")
    note = (f"Undertrained model, prompted with {number} (correct: {correct}). Outline: temperature 1, the model's own "
            f"distribution. {trained.note}")
    figure = new_figure(title, 6.3, note)
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    bars = {name: [*p[shown].tolist(), max(0.0, 1 - p[shown].sum().item())] for name, p in distributions.items()}
    for axes, (name, widths) in zip(grid.flat, bars.items()):
        axes.barh(range(num_tokens + 1), widths, color=DECODER_ONLY)
        axes.barh(range(num_tokens + 1), bars["temperature 1"], fill=False, edgecolor=GRAY, linewidth=1)
        axes.set_title(name)
        axes.set_yticks(range(num_tokens + 1), [*tokens_of(shown), "all others"])
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() == correct else "normal")
        axes.set_xlim(0, 1)
        axes.set_xticks(**PERCENT_TICKS)
        axes.tick_params(axis="y", length=0)
    for axes in grid[1]:
        axes.set_xlabel("probability")
    axes.invert_yaxis()  # of all, as they share it: the most probable on top
    return figure


def draw_beam_search_tree(trained: Trained, numbers: list[int]) -> Figure:
    """Every text that a beam search keeps, by step, the most probable on top, and the one that greedy search takes."""
    example, shares = compare_searches(trained.model, numbers)
    number, greedy, beam, steps, ratio, behind = example.values()
    if ratio > 1 and behind < len(steps):
        title = (f"For {number}, beam search's text overtakes greedy search's in step {behind + 1} and ends "
                 f"{ratio:.1f} times as probable")
        choice = "Of the numbers that only beam search names correctly, the one with the largest ratio. "
    else:
        title = f"For {number}, greedy search and beam search " + (
            "agree on every word" if greedy == beam else "end with different texts")
        choice = ""
    note = (f"In a box: the probability of the text so far. {choice}Undertrained model. Held-out accuracy on "
            f"{len(numbers)} numbers: greedy {percent(shares[0])}, beam search (width {BEAM_WIDTH}) "
            f"{percent(shares[1])}.")
    places, log_probs = {(): (0, 0)}, {}
    for column, step in enumerate(steps, start=1):  # without the last step's unfinished texts
        kept = [text for text in step if column < len(steps) or text[-1] == "<EOS>"]
        places |= {text: (column, row) for row, text in enumerate(kept)}
        log_probs |= step
    num_rows = 1 + max(row for _, row in places.values())
    figure = new_figure(title, 2.3 + 0.62 * num_rows, note)
    axes = figure.subplots()
    verdict = {text: "correct" if text == (*number_to_words(number), "<EOS>") else "wrong" for text in (greedy, beam)}
    looks = {f"beam search ({verdict[beam]})": (beam, ENCODER_DECODER, 4, "-"),
             f"greedy ({verdict[greedy]})": (greedy, PURPLE, 4, (0, (2, 1))), "also kept": ((), GRAY, 1.2, "-")}
    for label, (_, color, width, dashes) in looks.items():
        axes.plot([], [], color=color, linewidth=width, linestyle=dashes, label=label)
    for text, (column, row) in places.items():
        color, width, dashes = next(look for path, *look in looks.values() if text == path[:column] or not path)
        if text:
            before, above = places[text[:-1]]
            axes.plot([before, column], [above, row], color=color, linewidth=width, linestyle=dashes, zorder=1)
        label = f"{text[-1]}\n{percent(math.exp(log_probs[text]))}" if text else str(number)
        axes.text(column, row, label, ha="center", va="center", fontsize=11, zorder=3,
                  bbox={"boxstyle": "round,pad=0.15", "edgecolor": color,
                        "facecolor": shades(color)(0.15 if width > 2 else 0.0)})
    if behind < len(steps):
        axes.axvspan(behind + 0.5, behind + 1.5, color=PALE, alpha=0.5, linewidth=0, zorder=0)
        axes.text(behind + 1, -0.62, "overtakes", ha="center", va="center", fontsize=12, fontweight="bold")
    axes.set(xlim=(-0.4, len(steps) + 0.4), ylim=(num_rows - 0.5, -0.85))
    axes.set_axis_off()
    legend_above(axes, ncols=3)
    return figure


# --- drawn from what compare_architectures.py has measured ---


def stays_above(history: list[dict], threshold=0.99) -> int | None:
    """The first evaluated step from which exact match never falls below the threshold again; None if there is none."""
    step = None
    for point in history:
        if "exact_match" in point:
            step = None if point["exact_match"] < threshold else step or point["step"]
    return step


def draw_training_curves(comparison: dict) -> Figure:
    """Loss and held-out accuracy of each architecture on its native task."""
    cells = [cell for name in NAMES for cell in comparison["cells"] if cell["native"] and cell["architecture"] == name]
    stays = {cell["architecture"]: stays_above(cell["history"]) for cell in cells}
    never = [NAMES[name] for name, step in stays.items() if step is None]
    title = (f"Held-out exact match does not settle at 99% or more in this run: {', '.join(never)}" if never else
             f"From step {max(stays.values()):,} on, held-out exact match stays at 99% or more for all three")
    note = (f"Each on its native task: {', '.join(cell['task'] for cell in cells)}. Circled: 99% or more from there on."
            " Random digits keep the loss of generate above 0; its exact match is that of the names, given the digits.")
    figure = new_figure(title, 7, note)
    above, below = figure.subplots(2, 1, sharex=True)
    for cell, marker in zip(cells, "os^"):
        name, history = cell["architecture"], cell["history"]
        accuracies = {point["step"]: point["exact_match"] for point in history if "exact_match" in point}
        above.plot([point["step"] for point in history], [point["loss"] for point in history], color=COLORS[name],
                   linewidth=1.5, label=NAMES[name])
        below.plot(accuracies.keys(), accuracies.values(), marker=marker, color=COLORS[name])
        if stays[name]:
            place = stays[name], accuracies[stays[name]]
            below.plot(*place, "o", markersize=17, markerfacecolor="none", color=COLORS[name], markeredgewidth=2.5)
            below.annotate(f"{stays[name]:,}", place, (0, 13), textcoords="offset points", ha="center")
    above.set(yscale="log", ylabel="training loss (nats)")
    below.set(xlabel="training step", ylabel="held-out exact match", ylim=(-0.03, 1.28))
    below.set_yticks(**PERCENT_TICKS)
    for axes in (above, below):
        axes.grid(axis="y")
    legend_above(above, ncols=3, left=-0.1)
    return figure


def draw_kv_cache(comparison: dict) -> Figure:
    """Time per token by length, with and without the cache."""
    measured = comparison["kv_cache"]
    lengths, cached, recomputed = measured["lengths"], measured["cached_ms"], measured["recomputed_ms"]
    title = (f"At {lengths[-1]} tokens, one more takes {cached[-1]:.1f} ms with the KV cache, {recomputed[-1]:.1f} ms "
             f"without; at {lengths[0]}, {cached[0]:.1f} and {recomputed[0]:.1f} ms")
    lines = [(lengths, recomputed, "s--", {"color": INK, "label": "without cache (recomputed)"}),
             (lengths, cached, "o-", {"color": DECODER_ONLY, "label": "with the KV cache"})]
    return draw_lines(title, "Decoder-only, as measured by compare_architectures.py.", lines, 2, ylim=(0, None),
                      xlabel="length of the text so far (tokens)", ylabel="ms per new token")[0]


def draw_comparison_matrix(comparison: dict) -> Figure:
    """The 3 x 3 table: architectures by tasks. The native task of each architecture is framed."""
    cells = comparison["cells"]
    native = min(cell["sequence_accuracy"] for cell in cells if cell["native"])
    other = min(cell["sequence_accuracy"] for cell in cells if not cell["native"])
    title = (f"Framed: each architecture's native task, at least {math.floor(1000 * native) / 10}% accurate. "
             f"Elsewhere accuracy falls to {percent(other)}")
    note = ("Held-out exact match (generate: valid samples): mean, and range over the training seeds. Below: latency. "
            "Same width, layers per stack, data and steps.")
    figure = new_figure(title, 5.6, note)
    axes = figure.subplots()
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    for cell in cells:
        row, column = list(NAMES).index(cell["architecture"]), tasks.index(cell["task"])
        tint = shades(COLORS[cell["architecture"]])(0.05 + 0.4 * cell["sequence_accuracy"])
        axes.add_patch(Rectangle((column + 0.04, row + 0.05), 0.92, 0.9, facecolor=tint, edgecolor=INK,
                                 linewidth=3 if cell["native"] else 0))
        by_seed = cell["by_seed"]["sequence_accuracy"]
        cost = f"{cell['ms_per_answer']:.2g} ms, {cell['forward_passes']:.0f} passes".replace(" 1 passes", " 1 pass")
        for height, text, style in [(0.32, f"{cell['sequence_accuracy']:.1%}", {"fontsize": 19, "fontweight": "bold"}),
                                    (0.58, f"{100 * min(by_seed):.1f} to {100 * max(by_seed):.1f}", {"fontsize": 12}),
                                    (0.8, cost, {"fontsize": 12})]:
            axes.text(column + 0.5, row + height, text, ha="center", va="center", **style)
    axes.set(xlim=(0, len(tasks)), ylim=(3, 0))
    axes.set_xticks([i + 0.5 for i in range(len(tasks))], tasks)
    axes.set_yticks([0.5, 1.5, 2.5], NAMES.values())
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=14)
    axes.spines[:].set_visible(False)
    return figure


def draw_causal_wall(comparison: dict) -> Figure:
    """Token accuracy on place values, against the expected accuracy of the optimal causal tagger."""
    wall = comparison["wall"]
    readers = {"causal": ("decoder-only,\nwhile reading", DECODER_ONLY),
               "after_reading": ("decoder-only,\nafter reading", DECODER_ONLY),
               "bidirectional": ("encoder-only", ENCODER_ONLY),
               "encoder_decoder": ("encoder-\ndecoder", ENCODER_DECODER)}
    names, colors = zip(*readers.values())
    shares = [wall[reader] for reader in readers]
    title = (f"Causal taggers can expect at most {percent(wall['ceiling'])} on place values; after reading the whole "
             f"number, a decoder gets {percent(wall['after_reading'])}")
    note = ("Place value of each digit (ones, tens, ...). Dashed: expected accuracy of the optimal causal tagger, "
            "computed for the tested numbers; a measurement may exceed it by sampling error.")
    figure = new_figure(title, 5, note)
    axes = figure.subplots()
    bars = axes.bar(names, shares, width=0.6, color=colors)
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=4, fontweight="bold")
    axes.axhline(wall["ceiling"], color=INK, linestyle="--", linewidth=1.8)
    axes.set(ylabel="token accuracy", ylim=(0, 1.1))
    axes.set_yticks(**PERCENT_TICKS)
    axes.tick_params(axis="x", length=0)
    return figure


# ======================================================================================================
# RUNNING THIS FILE
# ======================================================================================================


def save(figure: Figure, name: str, folder: Path = FIGURES) -> Path:
    """Write a picture as PNG, without date or version in it: the same picture is the same bytes."""
    path = folder / f"{name}.png"
    # Pillow's default, zlib's strategy for filtered data (1), makes flat pictures with text larger: 0 is zlib's own.
    figure.savefig(path, metadata={"Software": None}, pil_kwargs={"compress_level": 9, "compress_type": 0})
    return path


def load_comparison() -> dict | None:
    """The measurements of compare_architectures.py if they were made with today's constants, otherwise None."""
    try:
        found = json.loads(compare_architectures.COMPARISON.read_text())
        today = json.loads(json.dumps(compare_architectures.all_constants()))
        return found if found["constants"] == today else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def train_and_measure(module, num_steps=None) -> Trained:
    """A file's model and its held-out accuracy: from its checkpoint or, where none fits, from a short training run.

    num_steps: instead train a new model for this many steps only, so that it is still uncertain. Nothing is saved.
    """
    loaders, num_epochs, model = module.create_dataloaders(), EPOCHS, None
    if num_steps:
        loaders, num_epochs = loaders._replace(train=list(islice(loaders.train, num_steps))), 1
    else:
        with suppress(InputError, FileNotFoundError):
            model = module.load()
    if model is None:
        torch.manual_seed(SEED)
        model = module.build_model()
        description = f"{NAMES[module.__name__]}, " + ("undertrained" if num_steps else "no matching checkpoint")
        num_steps = num_epochs * len(loaders.train)
        with tqdm(total=num_steps, desc=description, ascii=True, ncols=95, mininterval=0.5) as bar:
            module.train(model, loaders, num_epochs, num_evaluations=0, progress=bar)
    batches = list(islice(loaders.test, NUM_TEST_BATCHES))
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    found = module.evaluate(model, batches)
    accuracy, what = ((found["accuracy"], f"of the masked tokens in {count:,} texts") if module is encoder_only else
                      (found["exact_match"], f"of {count:,} names"))
    return Trained(model.cpu().eval(), accuracy, f"Held-out accuracy: {percent(accuracy)} {what}.")


def draw_all(trained: dict[str, Trained], early: dict[str, Trained], flow: dict, comparison: dict):
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
    yield "learning_rate_schedule", draw_learning_rate_schedule()
    yield "sampling_strategies", draw_sampling_strategies(early["decoder_only"], NUMBER)
    numbers = toy_dataset.make_splits().test[:NUM_SEARCHED]
    yield "beam_search_tree", draw_beam_search_tree(early["encoder_decoder"], numbers)
    yield "training_curves", draw_training_curves(comparison)
    yield "kv_cache", draw_kv_cache(comparison)
    yield "comparison_matrix", draw_comparison_matrix(comparison)
    yield "causal_wall", draw_causal_wall(comparison)


def main() -> None:
    """Draw everything."""
    for number in (NUMBER, SHORT_NUMBER):
        toy_dataset.parse_number(str(number))  # refused here, before a minute of training, if outside the language
    FIGURES.mkdir(parents=True, exist_ok=True)
    if not os.access(FIGURES, os.W_OK):
        raise PermissionError(f"{FIGURES} is not writable: change its permissions, or FIGURES in this file.")
    comparison = load_comparison()
    if comparison is None:
        print("No matching figures/comparison.json: running the comparison first (takes minutes).")
        comparison = compare_architectures.compare()
        compare_architectures.save(comparison)
    trained = {name: train_and_measure(module) for name, module in MODULES.items()}
    early = {name: train_and_measure(MODULES[name], EARLY_STEPS) for name in ("decoder_only", "encoder_decoder")}
    with tqdm(total=2 * DEEP_STEPS, desc="pre-norm, post-norm", ascii=True, ncols=95, mininterval=0.5) as bar:
        flow = gradient_flow(progress=bar)
    for name, figure in draw_all(trained, early, flow, comparison):
        print(save(figure, name).relative_to(FIGURES.parent))
        print(textwrap.indent(textwrap.fill(figure.get_suptitle(), 96, break_on_hyphens=False), "    "))


if __name__ == "__main__":
    run_script(main)
