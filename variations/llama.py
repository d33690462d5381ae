"""llama.py - from GPT-2 to Llama in five replacements, each measured alone and all together.

The problem. The decoder of decoder_only.py is GPT-2's (with sinusoidal positions). Most open models since 2023 follow
Llama instead, which replaces five parts. Each replacement is small and was published earlier; a paper that introduces
a whole model does not say how much each contributes. At this size that can be measured.

The idea, five times:

    RMSNorm     y = w * x / sqrt(mean(x^2) + epsilon)          LayerNorm without subtracting the mean and without a
                                                               shift: one reduction fewer
    RoPE        rotate queries and keys by their position      relative positions in place of absolute ones;
                                                               positional_encodings.py compares six encodings
    SwiGLU      W_down (silu(W_gate x) * W_up x)               one branch gates the other, element by element; three
                                                               matrices, so 2/3 of the width for equal parameters
    GQA         H query heads share G key-value heads          the KV cache shrinks by a factor of H / G;
                                                               grouped_query_attention.py measures what that saves
    no biases   W x, not W x + b                               slightly fewer parameters; PaLM: more stable training

On paper: RMSNorm of (3, 4) divides by sqrt((9 + 16) / 2) = 3.5355:

>>> RMSNorm(2)(torch.tensor([3.0, 4.0])).detach()
tensor([0.8485, 1.1314])

What the papers claim. RMSNorm (Zhang & Sennrich 2019): the quality of LayerNorm in 7% to 64% less time, depending on
the model. SwiGLU (Shazeer 2020): lower perplexity at equal parameters and compute, at the size of T5-base, and "no
explanation". RoPE (Su et al. 2021): faster convergence. GQA (Ainslie et al. 2023; in Llama 2's two largest models):
nearly the quality of multi-head attention at nearly the speed of multi-query attention, for a model of 11 billion
parameters, where reading the cache dominates. No biases (Chowdhery et al. 2022, PaLM, section 2): more stable training
of large models. So RMSNorm, RoPE and SwiGLU claim a gain at moderate sizes too. GQA and the missing biases are meant
for large models; neither is expected to lower the loss here.

Papers: Touvron et al. 2023a, 2023b (Llama, section 2.2, and Llama 2). The definitions are those of the published
models, so that weights could be copied: epsilon inside the root, statistics in float32, RoPE with base 10000 on the
pairs (i, i + d_k/2) as in Hugging Face's version, SwiGLU's width 2/3 of D_FF, rounded up to a multiple. Simplified:
input and output share one embedding table, as in the base file, scaled by sqrt(C) at the input (Llama 1 and 2 have two
tables and do not scale); the initialization is the base's, and so is the learning rate, which was chosen for the base.

What you will see (under three minutes on two CPU cores): one row for the base, one for each replacement alone, one
for all five. The loss covers the names only, so an ideal model reaches 0.
"""

import math
import statistics
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from decoder_only import scaled_dot_product_attention
from toy_dataset import InputError, make_splits, run_script

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- model ---
D_MODEL = 64              # half of the base model's width, for speed; D_FF is four times as much. Try 128
NUM_KV_HEADS = 2          # key-value heads for NUM_HEADS query heads; it must divide them. Try 1, 4 (no sharing)
ROTARY_BASE = 10_000.0    # the slowest pair takes at most 2 pi * ROTARY_BASE positions a turn. Try 100, 500_000
EPSILON = 1e-5            # in RMSNorm: 1e-6 in Llama, 1e-5 since Llama 2
MULTIPLE_OF = 8           # SwiGLU's width is rounded up to this; 256 in Llama, for fast matrix products

# --- training ---
NUM_EPOCHS = 2            # passes over the training numbers. Try 10 (slow): which differences remain?
BATCH_SIZE = 64
LEARNING_RATE = 4e-3      # twice the base model's: half its width tolerates it
TIMED_STEPS = 15          # steps of each row that are timed
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


class SwiGLU(nn.Module):
    """In place of FeedForward: W_down (silu(W_gate x) * W_up x),   silu(z) = z * sigmoid(z).

    Three matrices of width W take 3 C W parameters, the base's two take 2 C D_FF: equal for W = 2/3 D_FF.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        width = math.ceil(int(2 * d_ff / 3) / MULTIPLE_OF) * MULTIPLE_OF
        self.gate = nn.Linear(d_model, width)
        self.up = nn.Linear(d_model, width)
        self.down = nn.Linear(width, d_model)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))                             # (B, T, W) -> (B, T, C)


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
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class LlamaAttention(nn.Module):
    """In place of MultiHeadAttention: H query heads, G key-value heads, queries and keys rotated if `rotary`.

    With G = H and rotary=False it is the base's attention. Query head h reads key-value head h // (H / G).
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float, num_kv_heads: int, rotary: bool):
        super().__init__()
        if num_heads % num_kv_heads:
            raise InputError(f"NUM_KV_HEADS = {num_kv_heads} must divide NUM_HEADS = {num_heads}.")
        if rotary and d_model // num_heads % 2:
            raise InputError(f"D_MODEL / NUM_HEADS = {d_model // num_heads} must be even: RoPE rotates pairs.")
        self.d_k, self.group_size, self.rotary = d_model // num_heads, num_heads // num_kv_heads, rotary
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, num_kv_heads * self.d_k)    # (G * d_k) wide: this is what GQA saves,
        self.value = nn.Linear(d_model, num_kv_heads * self.d_k)  # here in parameters and below in the cache
        self.output = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, x):
        """(B, T, H * d_k) -> (B, H, T, d_k), likewise for G heads."""
        return x.unflatten(-1, (-1, self.d_k)).transpose(1, 2)

    def forward(self, x, mask, cache=None, attention_maps=None):
        """x (B, T, C) -> (B, T, C); arguments as in decoder_only.MultiHeadAttention."""
        query = self.split_heads(self.query(x))                                         # (B, H, T, d_k)
        key, value = self.split_heads(self.key(x)), self.split_heads(self.value(x))     # (B, G, T, d_k)
        if self.rotary:
            start = 0 if cache is None else len(cache)
            positions = torch.arange(start, start + x.size(1), device=x.device)         # see positional_encodings.py
            query, key = rotate(query, positions), rotate(key, positions)
        if cache is not None:
            key, value = cache.append(key, value)                                       # (B, G, S, d_k)
        # Repeated only after the cache: what is kept are G heads.
        key, value = (heads.repeat_interleave(self.group_size, dim=1) for heads in (key, value))
        heads, weights = scaled_dot_product_attention(query, key, value, mask, self.dropout)
        if attention_maps is not None:
            attention_maps.append(weights.detach())
        return self.output(heads.transpose(1, 2).flatten(start_dim=2))                  # (B, T, C)


class NoPositions(nn.Module):
    """In place of decoder_only.PositionalEncoding: nothing is added to the embeddings."""

    def forward(self, positions):
        """Integer positions (...) -> zeros (..., 1)."""
        return torch.zeros(*positions.shape, 1, device=positions.device)


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================

PARTS = ("RMSNorm", "RoPE", "SwiGLU", "GQA", "no biases")


def exchange(model, parts):
    """Put the named PARTS into an untrained decoder-only model, in place; returns it.

    New matrices are initialized as the base's own.
    """
    C, H, device = model.constants["D_MODEL"], model.constants["NUM_HEADS"], model.embedding.weight.device
    for layer in model.layers:
        if "RMSNorm" in parts:
            layer.attention_norm, layer.feed_forward_norm = RMSNorm(C), RMSNorm(C)
        if "SwiGLU" in parts:
            layer.feed_forward = SwiGLU(C, model.constants["D_FF"]).apply(decoder_only.init_weights)
        if "RoPE" in parts or "GQA" in parts:
            num_kv_heads = NUM_KV_HEADS if "GQA" in parts else H
            new = LlamaAttention(C, H, layer.attention.dropout.p, num_kv_heads, rotary="RoPE" in parts)
            layer.attention = new.apply(decoder_only.init_weights)
    if "RMSNorm" in parts:
        model.final_norm = RMSNorm(C)
    if "RoPE" in parts:
        model.positional_encoding = NoPositions()
    if "no biases" in parts:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bias = None
    return model.to(device)


def build(parts, seed: int):
    """A new model with the named parts; models of one seed share the initial weights of all other parts."""
    torch.manual_seed(seed)
    return exchange(decoder_only.build_model(d_model=D_MODEL, d_ff=4 * D_MODEL), parts)


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================

ROWS = {"base": (), **{part: (part,) for part in PARTS}, "all five": PARTS}


def cache_bytes_per_token(model) -> float:
    """What the KV cache takes for each token of a text, counted from the tensors that it holds."""
    cache, ids = model.new_cache(), torch.tensor([decoder_only.make_prompt(342)], device=model.embedding.weight.device)
    with torch.no_grad():
        model(ids, cache)
    return sum(x.numel() * x.element_size() for layer in cache for x in (layer.key, layer.value)) / ids.numel()


def milliseconds_per_step() -> dict[str, float]:
    """Median time of a training step for each row. The rows take turns, so that a busy moment slows all of them."""
    batch = next(iter(decoder_only.create_dataloaders(BATCH_SIZE, SEEDS[0], loss_on_prompt=False).train))
    models = {row: build(parts, SEEDS[0]) for row, parts in ROWS.items()}
    optimizers = {row: decoder_only.create_optimizer(model) for row, model in models.items()}
    times = {row: [] for row in ROWS}
    for _ in range(TIMED_STEPS):
        for row, model in models.items():
            start = time.perf_counter()
            decoder_only.train_step(model, batch, optimizers[row], LEARNING_RATE)  # its .item() waits for a GPU
            times[row].append(1000 * (time.perf_counter() - start))
    return {row: statistics.median(times[row]) for row in ROWS}


def measure(bar) -> dict[str, dict]:
    """For each row: parameters, bytes of cache, and for each seed the held-out loss halfway and at the end, and exact
    match."""
    found = {}
    for row, parts in ROWS.items():
        runs = []
        for seed in SEEDS:
            loaders = decoder_only.create_dataloaders(BATCH_SIZE, seed, loss_on_prompt=False)
            model = build(parts, seed)
            history = decoder_only.train(model, loaders, NUM_EPOCHS, LEARNING_RATE, num_evaluations=2, progress=bar)
            half, end = (point for point in history if "exact_match" in point)
            runs.append((half["validation_loss"], end["validation_loss"], end["exact_match"]))
        half, loss, exact = zip(*runs)
        found[row] = {"parameters": sum(p.numel() for p in model.parameters()), "bytes": cache_bytes_per_token(model),
                      "half": half, "loss": loss, "exact": exact}
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


def main() -> None:
    """Train every row; print the table and the conclusions."""
    num_steps = len(ROWS) * len(SEEDS) * NUM_EPOCHS * math.ceil(len(make_splits().train) / BATCH_SIZE)
    with tqdm(total=num_steps, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        found = measure(bar)
    milliseconds = milliseconds_per_step()

    print(f"\nD_MODEL {D_MODEL}, {NUM_EPOCHS} epochs: loss on held-out names (0 is possible) and exact match,\n"
          f"mean of {len(SEEDS)} seeds (range)\n")
    print(f"  {'':10}{'parameters':>11}{'cache':>9}{'ms per':>8}{'loss at':>9}\n"
          f"  {'':10}{'':>11}{'B/token':>9}{'step':>8}{'half':>9}{'loss at the end':>27}{'exact match':>23}")
    for row, r in found.items():
        loss = f"{statistics.mean(r['loss']):.4f} ({min(r['loss']):.4f} to {max(r['loss']):.4f})"
        print(f"  {row:10}{r['parameters']:11,}{r['bytes']:9,.0f}{milliseconds[row]:8.0f}"
              f"{statistics.mean(r['half']):9.3f}{loss:>27}{spread(r['exact']):>23}")
    base = found["base"]
    verdicts = {"lower": [], "higher": [], "same": []}
    for row in list(ROWS)[1:]:
        loss = found[row]["loss"]
        verdict = "same" if not differ(loss, base["loss"]) else "lower" if max(loss) < min(base["loss"]) else "higher"
        verdicts[verdict].append(row)
    say(f"Final loss below the base's, beyond seed noise: {', '.join(verdicts['lower']) or 'none'}; above it: "
        f"{', '.join(verdicts['higher']) or 'none'}; within seed noise (the ranges overlap): "
        f"{', '.join(verdicts['same']) or 'none'}. The ranges of two equally good rows are disjoint by chance in "
        f"{2 / math.comb(2 * len(SEEDS), len(SEEDS)):.0%} of all comparisons.")
    say(f"All five together: {found['all five']['bytes'] / base['bytes']:.0%} of the base's cache, "
        f"{found['all five']['parameters'] / base['parameters']:.0%} of its parameters, "
        f"{milliseconds['all five'] / milliseconds['base']:.0%} of its time per step.")


if __name__ == "__main__":
    run_script(main)
