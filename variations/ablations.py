"""ablations.py - one small part at a time: which details of a transformer matter, and which do not.

The problem. Papers and code differ in dozens of small parts: this activation or that, a norm here or there, dropout in
four places. Each was a reasonable idea. To find out which of them make a difference, change one at a time, keep
everything else, and compare its effect with the differences between seeds.

The idea. Take the base models, replace one part, train with the same data, steps, learning rate and seeds, and sort by
the effect on exact match. A row counts as different only if its range over the seeds does not overlap its base's.

    activation       FFN(x) = f(x W_1) W_2        f: GELU (base), ReLU, SiLU (also called Swish)
                     SwiGLU(x) = (SiLU(x W_gate) * x W_1) W_2        2/3 as wide: three matrices, equal parameters
    norm             LayerNorm (base), RMSNorm(x) = x / sqrt(mean(x^2) + epsilon) * scale, or none
    place of norm    pre-norm: x + f(norm(x)) (base), or post-norm: norm(x + f(x)); in 2 layers and in 8
    dropout          10% at the embedding, on attention weights, on the residual branches, or on all; on all also with
                     500 training numbers instead of 10,000; the base hardly overfits them yet
    embeddings       input and output share a table (base), or have one each; with the factor sqrt(C) (base), or not

On paper: for x = (3, 4), RMSNorm divides by sqrt((9 + 16) / 2) = 3.5355; it does not subtract the mean:

>>> RMSNorm(2)(torch.tensor([3.0, 4.0])).detach()
tensor([0.8485, 1.1314])

Papers: Hendrycks & Gimpel 2016 (GELU, SiLU); Ramachandran et al. 2017 (Swish); Shazeer 2020 (SwiGLU); Zhang & Sennrich
2019 (RMSNorm); Xiong et al. 2020 (pre-norm, post-norm); Srivastava et al. 2014 (dropout); Press & Wolf 2017 (tying).
Simplified: all rows use the base's learning rate, which was chosen for the base. A part that needs another one is at a
disadvantage here; the effect is that of replacing it and nothing else. And the models are narrower than the base
(D_MODEL) and trained briefly: with longer training most rows approach 100%, and the differences shrink.

What you will see (about three minutes on two CPU cores): a table for the decoder (digits -> words) and one for the
encoder (how many words does the name have?), each sorted by effect.
"""

import math
import statistics
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
import encoder_only
import toy_dataset
from toy_dataset import decoder_only_example, run_script

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

DROPOUT = 0.1             # where a row has dropout. Try 0.3
EPSILON = 1e-5            # in RMSNorm, as in LayerNorm
FEW_NUMBERS = 500         # training numbers where they are few. Try 100: does dropout help once the base overfits?
MANY_LAYERS = 8           # of the rows about depth. Try 16
D_MODEL = 64              # half the base's width, for speed. Try 128
NUM_STEPS = 200           # training steps of the decoder, and half as many of the encoder. Try 1000: what remains?
BATCH_SIZE = 64
LEARNING_RATE = 2e-3      # the base's
SEEDS = (0, 1, 2)         # of initial weights and order of batches

# ======================================================================================================
# THE EXCHANGED PARTS
# ======================================================================================================


class RMSNorm(nn.Module):
    """In place of nn.LayerNorm: y = weight * x / sqrt(mean(x^2) + EPSILON), the mean over the C dimensions."""

    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        # In float32, whatever x is: the square of 300 does not fit into float16.
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPSILON)     # (..., C)
        return self.weight * normalized.to(x.dtype)


class ActivatedFeedForward(decoder_only.FeedForward):
    """FFN(x) = f(x W_1 + b_1) W_2 + b_2 with another f."""

    activation = None

    def forward(self, x):
        return self.contract(type(self).activation(self.expand(x)))                     # (B, T, D_FF) -> (B, T, C)


class ReLUFeedForward(ActivatedFeedForward):
    activation = F.relu


class SiLUFeedForward(ActivatedFeedForward):
    activation = F.silu


class SwiGLUFeedForward(nn.Module):
    """SwiGLU(x) = (SiLU(x W_gate) * x W_1) W_2, with biases as the base has them (Shazeer 2020, equation 6).

    One projection gates the other, element by element. With three matrices instead of two, the inner width is 2/3 of
    d_ff, so that the number of parameters stays (nearly) the same.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        width = round(2 * d_ff / 3)
        self.gate = nn.Linear(d_model, width)
        self.expand = nn.Linear(d_model, width)
        self.contract = nn.Linear(width, d_model)

    def forward(self, x):
        return self.contract(F.silu(self.gate(x)) * self.expand(x))                     # (B, T, 2/3 D_FF) -> (B, T, C)


class PostNormDecoderLayer(decoder_only.DecoderLayer):
    """x = norm(x + f(x)): the 2017 paper's order. The stream itself is normalized: no identity path is left."""

    def forward(self, x, mask, cache=None, attention_maps=None):
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, cache, attention_maps)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class PostNormEncoderLayer(encoder_only.EncoderLayer):
    """The same for the encoder."""

    def forward(self, x, mask, attention_maps=None):
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, attention_maps=attention_maps)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class UntiedEmbedding(nn.Embedding):
    """An embedding that reads a table of its own; `weight` is left to the output layer."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__(*embedding.weight.shape)
        self.load_state_dict(embedding.state_dict())
        self.input_table = nn.Parameter(embedding.weight.detach().clone())

    def forward(self, ids):
        return F.embedding(ids, self.input_table)


class UnscaledEmbedding(nn.Embedding):
    """An embedding that cancels the factor sqrt(C) with which the model multiplies it."""

    def forward(self, ids):
        return super().forward(ids) / math.sqrt(self.embedding_dim)


# ======================================================================================================
# THE EXCHANGE: functions that change one part of a base model, in place
# ======================================================================================================


def set_feed_forward(model, part):
    """part(d_model, d_ff) in place of each feed-forward network, its weights drawn as the base draws them."""
    for layer in model.layers:
        device = layer.feed_forward.expand.weight.device
        layer.feed_forward = part(*reversed(layer.feed_forward.expand.weight.shape)).apply(decoder_only.init_weights)
        layer.feed_forward.to(device)


def set_norms(model, part):
    """part(d_model) in place of every LayerNorm, the final one included."""
    for module in [model, *model.layers]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, part(child.weight.numel()).to(child.weight.device))


def set_post_norm(model):
    """Post-norm layers; their last norm makes the final one redundant."""
    post_norm = PostNormDecoderLayer if isinstance(model.layers[0], decoder_only.DecoderLayer) else PostNormEncoderLayer
    for layer in model.layers:
        layer.__class__ = post_norm  # the same modules, another forward
    model.final_norm = nn.Identity()


def set_dropout(model, embedding=0.0, weights=0.0, branches=0.0):
    """Dropout with these probabilities: after the embedding, on attention weights, on what is added to the stream."""
    model.dropout.p = embedding
    for layer in model.layers:
        layer.attention.dropout.p, layer.dropout.p = weights, branches


def set_untied(model):
    model.embedding = UntiedEmbedding(model.embedding).to(model.embedding.weight.device)


def set_unscaled(model):
    model.embedding.__class__ = UnscaledEmbedding


class Row(NamedTuple):
    """One ablation: what is replaced, and the base it is compared with."""

    name: str
    change: Callable = lambda model: None   # in place
    base: str = "base"                      # the name of the row that it is compared with
    num_layers: int = 2
    num_train: int | None = None            # training numbers; None: all


BASES = [Row("base"), Row(f"base, {MANY_LAYERS} layers", num_layers=MANY_LAYERS),
         Row(f"base, {FEW_NUMBERS} numbers", num_train=FEW_NUMBERS)]
EVERYWHERE = dict(embedding=DROPOUT, weights=DROPOUT, branches=DROPOUT)
DECODER_ROWS = [
    *BASES,
    Row("ReLU", partial(set_feed_forward, part=ReLUFeedForward)),
    Row("SiLU", partial(set_feed_forward, part=SiLUFeedForward)),
    Row("SwiGLU", partial(set_feed_forward, part=SwiGLUFeedForward)),
    Row("RMSNorm", partial(set_norms, part=RMSNorm)),
    Row("no norms", partial(set_norms, part=lambda d_model: nn.Identity())),
    Row("post-norm", set_post_norm),
    Row(f"post-norm, {MANY_LAYERS} layers", set_post_norm, f"base, {MANY_LAYERS} layers", MANY_LAYERS),
    Row("untied embeddings", set_untied),
    Row("no sqrt(C)", set_unscaled),
    Row("dropout, embedding", partial(set_dropout, embedding=DROPOUT)),
    Row("dropout, attention weights", partial(set_dropout, weights=DROPOUT)),
    Row("dropout, residual branches", partial(set_dropout, branches=DROPOUT)),
    Row("dropout everywhere", partial(set_dropout, **EVERYWHERE)),
    Row(f"dropout everywhere, {FEW_NUMBERS}", partial(set_dropout, **EVERYWHERE), f"base, {FEW_NUMBERS} numbers",
        num_train=FEW_NUMBERS),
]
# Not the untied embeddings: a classifier does not use its output table.
ENCODER_ROWS = [row for row in DECODER_ROWS if row.num_layers == 2 and row.num_train is None
                and row.name != "untied embeddings" and not row.name.startswith("dropout, ")]

# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def load_batches(module, row: Row, seed: int):
    """Splits with one training batch per step, the same for all rows with equal num_train and seed."""
    if module is decoder_only:
        make_example, steps = partial(decoder_only_example, loss_on_prompt=False), NUM_STEPS
    else:
        make_example, steps = toy_dataset.counting_example, NUM_STEPS // 2
    loaders = toy_dataset.make_dataloaders(make_example, BATCH_SIZE, seed, row.num_train)
    batches = []
    while len(batches) < steps:
        batches += list(loaders.train)
    return loaders._replace(train=batches[:steps])


def measure(module, rows: list[Row], bar) -> dict[str, list[float]]:
    """Name of the row -> exact match on the validation numbers, for each seed."""
    options = {} if module is decoder_only else {"task": "counting"}
    found = {row.name: [] for row in rows}
    for seed in SEEDS:
        loaders = {row.num_train: load_batches(module, row, seed) for row in rows}
        for row in rows:
            torch.manual_seed(seed)
            model = module.build_model(d_model=D_MODEL, d_ff=4 * D_MODEL, num_layers=row.num_layers, **options)
            row.change(model)
            try:
                module.train(model, loaders[row.num_train], 1, LEARNING_RATE, num_evaluations=0, progress=bar)
                accuracy = module.evaluate(model, loaders[row.num_train].validation)["exact_match"]
            except FloatingPointError:  # diverged: it has learned nothing
                accuracy = 0.0
            found[row.name].append(accuracy)
    return found


def spread(values: list[float]) -> str:
    """The mean over the seeds, and the range: `1.2% (0.9 to 1.6)`."""
    return f"{statistics.mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def differ(values: list[float], others: list[float]) -> bool:
    """Whether two rows differ by more than seed noise: their ranges over the seeds do not overlap."""
    return max(values) < min(others) or max(others) < min(values)


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def print_table(title: str, rows: list[Row], found: dict[str, list[float]]) -> None:
    """The bases, then the others by their effect, the best first; and which of them differ beyond seed noise."""
    effect = {row.name: statistics.mean(found[row.name]) - statistics.mean(found[row.base]) for row in rows}
    bases = [row for row in rows if row in BASES]
    others = sorted((row for row in rows if row not in BASES), key=lambda row: -effect[row.name])
    print(f"\n{title}: exact match on held-out numbers, mean of {len(SEEDS)} seeds (range)\n\n"
          f"  {'':34}{'exact match':>26}{'effect':>10}")
    for row in bases:
        print(f"  {row.name:34}{spread(found[row.name]):>26}")
    for row in others:
        noise = "" if differ(found[row.name], found[row.base]) else "   within seed noise"
        print(f"  {row.name:34}{spread(found[row.name]):>26}{100 * effect[row.name]:+10.1f}{noise}")
    beyond = [row for row in others if differ(found[row.name], found[row.base])]
    better, worse = ([row.name for row in beyond if (effect[row.name] > 0) == sign] for sign in (True, False))
    # By chance the ranges of two equally good rows are disjoint in 2 of C(2n, n) orders.
    by_chance = 2 * len(others) / math.comb(2 * len(SEEDS), len(SEEDS))
    say(f"Better than the base beyond seed noise: {'; '.join(better) or 'nothing'}. Worse: "
        f"{'; '.join(worse) or 'nothing'}. (If none of the {len(others)} changes had an effect, "
        f"{by_chance:.1f} rows would be expected to look different by chance.)")


def main() -> None:
    """Train every row with every seed, decoder and encoder, and print both tables."""
    total = len(SEEDS) * (len(DECODER_ROWS) * NUM_STEPS + len(ENCODER_ROWS) * (NUM_STEPS // 2))
    with tqdm(total=total, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        decoder, encoder = measure(decoder_only, DECODER_ROWS, bar), measure(encoder_only, ENCODER_ROWS, bar)
    print_table(f"DECODER, digits -> words, {NUM_STEPS} steps", DECODER_ROWS, decoder)
    print_table(f"ENCODER, number of words, {NUM_STEPS // 2} steps", ENCODER_ROWS, encoder)


if __name__ == "__main__":
    run_script(main)
