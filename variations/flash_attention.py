"""flash_attention.py - attention in tiles: the same result without the T x S matrix.

The problem. Attention as the base files write it stores a score and a weight for each pair of positions: 2 * H * T * S
numbers that are written to memory and read again; the weights are also kept for the backward pass. On a GPU this
traffic, not the arithmetic, limits the speed; and at 32,000 positions one head's matrix of weights takes 4 GB.

The idea. The output of a query is a weighted average of values, and an average can be built up piece by piece. Softmax
seems to need all scores at once, for their maximum m and the sum of their exponentials; but both can be corrected as
scores come in ("online softmax"). For each tile of keys, with scores S and an output O not yet divided by the total:

    m_new = max(m, max(S))          the weights are exp(S - m_new); sums made with the old m are off by a factor
    factor = exp(m - m_new)
    total = factor * total + sum(exp(S - m_new))
    O = factor * O + exp(S - m_new) V                       at the end: output = O / total

The backward pass needs the weights again. They are recomputed, tile by tile, from the scores and the stored m and
total, two numbers for each query: P = exp(S - m) / total. (FlashAttention-2 stores one, m + ln total. In a row with
nothing to attend to, m is the most negative number, and the sum would lose ln total to rounding.) The rest is the
derivative of softmax, with D = sum(dO * output):

    dV = P^T dO,    dS = P * (dO V^T - D),    dQ = dS K / sqrt(d_k),    dK = dS^T Q / sqrt(d_k)

On paper: one query with the scores ln (1, 2 | 4, 1), two tiles of two keys, values (8, 0 | 0, 16). Tile 1: m = ln 2,
weights (1/2, 1), total 3/2, O = 4. Tile 2: m_new = ln 4, so factor = 1/2; weights (1, 1/4), total 3/4 + 5/4 = 2 and
O = 2 + 4 = 6. Output 6 / 2 = 3. In one piece: (1 * 8 + 2 * 0 + 4 * 0 + 1 * 16) / 8 = 3.

>>> scores, value = torch.tensor([[1.0, 2, 4, 1]]).log(), torch.tensor([[8.0], [0], [0], [16]])
>>> tiled_attention(scores, torch.eye(4), value, scale=1.0, tile=2)
tensor([[3.]])

Papers: Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022 (FlashAttention; algorithm 1, backward in appendix
B.4); Dao 2023 (FlashAttention-2, section 3.1); Rabe & Staats 2021 (memory). Simplified: each tile takes several PyTorch
operations, in a Python loop, and tiles that the causal mask hides entirely are computed anyway. The mask comes in
whole, T x T booleans that the columns of memory leave out; kernels compute it from the indices. What this can show is
the memory, which grows with T, not with T squared. What it cannot show is the speed: that comes from doing all of this
in one kernel, in the GPU's fast on-chip memory. F.scaled_dot_product_attention has such kernels, and is in the table.

What you will see (about a minute on two CPU cores): for growing T the largest difference from the written-out version,
the bytes kept for the backward pass, the peak memory and the milliseconds of forward and backward; then the decoder
trained with it.
"""

import json
import math
import statistics
import sys
import tempfile
import textwrap
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.benchmark import Timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from toy_dataset import run_script

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

TILE = 128                # queries and keys in a tile. Try 32 (less memory, more loops), 1024

# --- the table ---
LENGTHS = (256, 512, 1024, 2048, 4096)  # T = S. Try adding 8192, if there is memory for the written-out version
NUM_HEADS, D_K = 4, 32    # the base model's
REPEATS = 3               # measurements of time, of which the median counts

# --- training ---
NUM_STEPS = 60            # steps of the base model with each attention
BATCH_SIZE = 64

# ======================================================================================================
# THE EXCHANGED PART
# ======================================================================================================


def tiles_of(length: int, tile: int) -> list[slice]:
    """0 ... length in pieces of `tile`, the last one shorter if it does not divide."""
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


def tile_of_scores(query, key, mask, scale, rows, columns):
    """scores = Q K^T * scale of one tile, masked: (..., rows, columns)."""
    scores = query[..., rows, :] @ key[..., columns, :].transpose(-2, -1) * scale
    if mask is None:
        return scores
    return scores.masked_fill(~mask[..., rows, columns], torch.finfo(scores.dtype).min)


class TiledAttention(torch.autograd.Function):
    """softmax(Q K^T * scale) V, forward and backward in tiles. What is kept between the two is O(T), not O(T S)."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale, tile):
        wide = torch.promote_types(query.dtype, torch.float32)  # sums in float32 at least, whatever the inputs are
        outputs, ms, totals = [], [], []
        for rows in tiles_of(query.size(-2), tile):
            shape = query[..., rows, :1].shape                                          # (..., rows, 1)
            m = torch.full(shape, torch.finfo(torch.float32).min, dtype=wide, device=query.device)
            total = torch.zeros_like(m)
            output = m.new_zeros(*shape[:-1], value.size(-1))
            for columns in tiles_of(key.size(-2), tile):
                scores = tile_of_scores(query, key, mask, scale, rows, columns).to(wide)
                m_new = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
                weights, factor = (scores - m_new).exp(), (m - m_new).exp()
                total = factor * total + weights.sum(dim=-1, keepdim=True)
                output = factor * output + weights @ value[..., columns, :].to(wide)
                m = m_new
            outputs.append((output / total).to(value.dtype))
            ms.append(m)
            totals.append(total)
        output, m, total = (torch.cat(parts, dim=-2) for parts in (outputs, ms, totals))  # (..., T, d_k), (..., T, 1)
        ctx.save_for_backward(query, key, value, mask, output, m, total)
        ctx.scale, ctx.tile = scale, tile
        return output

    @staticmethod
    @once_differentiable  # a second derivative is refused, not silently wrong
    def backward(ctx, grad_output):
        query, key, value, mask, output, m, total = ctx.saved_tensors
        wide = total.dtype
        grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=wide) for x in (query, key, value))
        D = (grad_output.to(wide) * output.to(wide)).sum(dim=-1, keepdim=True)          # (..., T, 1)
        for rows in tiles_of(query.size(-2), ctx.tile):
            grad_rows = grad_output[..., rows, :].to(wide)
            for columns in tiles_of(key.size(-2), ctx.tile):
                scores = tile_of_scores(query, key, mask, ctx.scale, rows, columns).to(wide)
                P = (scores - m[..., rows, :]).exp() / total[..., rows, :]              # the weights, once more
                grad_value[..., columns, :] += P.transpose(-2, -1) @ grad_rows
                dS = P * (grad_rows @ value[..., columns, :].to(wide).transpose(-2, -1) - D[..., rows, :]) * ctx.scale
                if mask is not None:
                    dS = dS.masked_fill(~mask[..., rows, columns], 0)  # a constant was filled in: no gradient
                grad_query[..., rows, :] += dS @ key[..., columns, :].to(wide)
                grad_key[..., columns, :] += dS.transpose(-2, -1) @ query[..., rows, :].to(wide)
        grads = (grad.to(x.dtype) for grad, x in ((grad_query, query), (grad_key, key), (grad_value, value)))
        return *grads, None, None, None


def tiled_attention(query, key, value, mask=None, scale=None, tile=TILE):
    """decoder_only.scaled_dot_product_attention without its weights: (..., T, d_k), (..., S, d_k) -> (..., T, d_k).

    mask: boolean, broadcastable to (..., T, S), True = may attend; expand makes its missing sizes without copying.
    """
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], query.size(-2), key.size(-2))
    return TiledAttention.apply(query, key, value, mask, scale, tile)


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================


class FlashAttention(decoder_only.MultiHeadAttention):
    """decoder_only.MultiHeadAttention with tiled_attention. It stores no weights to drop or draw."""

    def forward(self, x, mask, cache=None, attention_maps=None):
        """x (B, T, C) -> (B, T, C); arguments as in decoder_only.MultiHeadAttention."""
        query, key, value = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        if cache is not None:
            key, value = cache.append(key, value)                                       # (B, H, S, d_k)
        heads = tiled_attention(query, key, value, mask)                                # (B, H, T, d_k)
        return self.output(heads.transpose(1, 2).flatten(start_dim=2))                  # (B, T, C)


def exchange(model):
    """Give a decoder-only model tiled attention, in place; returns it. All weights stay as they are."""
    for layer in model.layers:
        if layer.attention.dropout.p:
            raise ValueError("The tiles keep no weights on which dropout could act: build the model with dropout=0.")
        layer.attention.__class__ = FlashAttention  # the same module, another forward
    return model


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def written_out(query, key, value, mask):
    return decoder_only.scaled_dot_product_attention(query, key, value, mask)[0]


def fused_causal(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)  # it need not read a mask


VERSIONS = {"written out": written_out, "tiled": tiled_attention, "PyTorch, mask": F.scaled_dot_product_attention,
            "PyTorch, is_causal": fused_causal}


def random_inputs(length: int, dtype=torch.float32):
    """Query, key and value (1, H, T, d_k) that require gradients, and a causal mask (T, T)."""
    generator = torch.Generator().manual_seed(length)
    shape = (1, NUM_HEADS, length, D_K)
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    return *tensors, decoder_only.make_causal_mask(length, length)


def saved_bytes(attend, inputs) -> int:
    """The bytes that autograd keeps for the backward pass, besides the inputs; shared storage counts once."""
    storages, own = {}, {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = attend(*inputs)
    del output
    return sum(storages.values())


def forward_and_backward(attend, inputs):
    """Output and the gradients of query, key and value, for a loss that weights all outputs differently."""
    output = attend(*inputs)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    return output, *torch.autograd.grad((output * weight).sum(), inputs[:3])


def peak_bytes(run) -> int:
    """The most memory that was allocated at one time during run(), beyond what was allocated before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]  # in the order of time
    return max(change["Total Allocated"] for change in changes) - changes[0]["Total Allocated"] + changes[0]["Bytes"]


def measure(length: int) -> dict[str, tuple]:
    """By version: largest relative difference from the written-out one in float32 (of float32 and of bfloat16), bytes
    kept for backward, peak bytes, milliseconds."""
    inputs, rows = random_inputs(length), {}
    exact = forward_and_backward(written_out, inputs)
    halves = random_inputs(length, torch.bfloat16)
    as_floats = [tensor.detach().float().requires_grad_() for tensor in halves[:3]] + [halves[3]]
    exact_half = forward_and_backward(written_out, as_floats)

    def difference(found, expected):
        return max((a.float() - b).abs().max().item() / b.abs().max().item() for a, b in zip(found, expected))

    for name, attend in VERSIONS.items():
        run = partial(forward_and_backward, attend, inputs)
        rows[name] = (difference(run(), exact), difference(forward_and_backward(attend, halves), exact_half),
                      saved_bytes(attend, inputs), peak_bytes(run),
                      Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()))
    times = {name: [] for name in rows}
    for _ in range(REPEATS):  # in turns, so that a slow moment of the machine affects all versions
        for name, row in rows.items():
            times[name].append(1000 * row[-1].timeit(1).mean)
    return {name: (*row[:-1], statistics.median(times[name])) for name, row in rows.items()}


def train_both(bar) -> tuple[list, list]:
    """The losses of the base model and of the same model with tiled attention, step by step."""
    losses = []
    for change in (lambda model: model, exchange):
        torch.manual_seed(0)
        model = change(decoder_only.build_model())
        loaders = decoder_only.create_dataloaders(BATCH_SIZE, 0)
        few = loaders._replace(train=[batch for batch, _ in zip(loaders.train, range(NUM_STEPS))])
        history = decoder_only.train(model, few, 1, num_evaluations=0, progress=bar)
        losses.append([entry["loss"] for entry in history])
    return losses


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def main() -> None:
    """The table by length, and the training."""
    found = {}
    with tqdm(total=len(LENGTHS) + 2 * NUM_STEPS, desc="measuring", ascii=True, ncols=95, mininterval=0.5) as bar:
        for length in LENGTHS:
            found[length] = measure(length)
            bar.update()
        losses = train_both(bar)
    print(f"\nATTENTION, {NUM_HEADS} heads of {D_K}, causal, tiles of {TILE}, {torch.get_num_threads()} thread(s), "
          "forward and backward: largest relative\ndifference from the written-out version in float32; MB kept for "
          "backward, and at the peak\n\n"
          f"  {'T':>6}  {'':20}{'float32':>10}{'bfloat16':>10}{'kept MB':>10}{'peak MB':>10}{'ms':>10}")
    for length, rows in found.items():
        for name, (difference, half, kept, peak, milliseconds) in rows.items():
            print(f"  {length:>6}  {name:20}{difference:10.1e}{half:10.1e}{kept / 1e6:10.2f}{peak / 1e6:10.1f}"
                  f"{milliseconds:10.1f}")
    first, last = LENGTHS[0], LENGTHS[-1]
    growth = {name: found[last][name][2] / found[first][name][2] for name in VERSIONS}
    say(f"From T = {first} to {last}, {last // first} times as long, the memory kept for the backward pass grows "
        "by a factor of " + ", ".join(f"{growth[name]:.0f} ({name})" for name in VERSIONS) + ".")
    largest = max(abs(a - b) for a, b in zip(*losses))
    say(f"Trained with it for {NUM_STEPS} steps, the decoder's losses differ from the base model's by at most "
        f"{largest:.1e} (from {losses[0][0]:.3f} down to {losses[0][-1]:.3f}).")


if __name__ == "__main__":
    run_script(main)
