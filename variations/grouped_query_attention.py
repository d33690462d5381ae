"""grouped_query_attention.py - fewer key and value heads: what they save in the cache, what they cost in quality.

The problem. Generation with a KV cache reads the keys and values of all earlier tokens for every new one. For long
texts and large batches that is most of the work, and most of the memory: for L layers of H heads, d_k wide,

    bytes per token = 2 * L * H * d_k * bytes per number                (2: a key and a value)

The idea. Keep the H query heads, but let several of them share one key and value head. With G groups,

    query head h attends with key and value head  h // (H / G),     bytes per token = 2 * L * G * d_k * bytes per number

G = H is multi-head attention (MHA), G = 1 multi-query attention (MQA), and anything in between grouped-query
attention (GQA). There are as many scores as before, so computing them costs the same; reading the cache costs G / H.

On paper: Llama 3 8B has L = 32, H = 32, G = 8 and d_k = 128, in bfloat16. A text of 8,192 tokens takes 1 GiB of cache,
where it would take 4 GiB with 32 heads:

>>> [2 * 32 * heads * 128 * 2 * 8192 / 2**30 for heads in (8, 32)]
[1.0, 4.0]

A trained MHA model can be converted: average the key and value heads of each group ("mean pooling") and continue
training for 5% of the original steps; the paper reports that most of the quality is recovered. The experiment compares
this with keeping the first head of each group, and with the MHA model trained for the same additional steps. Here
5% is a dozen steps, and the learning rate of these steps was not searched.

Papers: Shazeer 2019 (MQA); Ainslie et al. 2023 (GQA; section 2.1 for the conversion, 2.2 for the groups). Simplified:
the models are trained on names only (no loss on the prompt), so that they are good enough to compare within seconds;
every row has the base's learning rate; and the time per token includes a copy of the cache (KVCache.append), which also
shrinks with G and which a cache allocated in advance would avoid.

What you will see (about two minutes on two CPU cores): the cache's bytes per token, by the formula and as measured;
milliseconds per token with 1,000 positions in the cache; exact match after equal training, with several seeds; and the
conversions, before and after further training.
"""

import statistics
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from decoder_only import scaled_dot_product_attention
from toy_dataset import SOS_ID, run_script

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

NUM_HEADS = 8             # query heads in every row. Try 4, 16
GROUPS = (8, 2, 1)        # key and value heads: MHA, GQA, MQA. Try (8, 4, 2, 1)

# --- memory and time ---
CACHED_POSITIONS = 1000   # tokens in the cache while one more is generated. Try 100: does the cache still matter?
CACHED_BATCH = 32         # texts generated at once. Try 1

# --- quality ---
BATCH_SIZE = 128
NUM_EPOCHS = 3            # passes over the training numbers. Try 1 (which learns faster?), 10 (any difference?)
LEARNING_RATE = 2e-3      # the base model's, for every row
SEEDS = (0, 1, 2)         # of initial weights and order of batches

# --- conversion ---
UPTRAINING = 0.05         # further training of a converted model, as a share of the original steps. Try 0.01, 0.2
UPTRAINING_RATE = 5e-4    # its peak learning rate, in every row. Try 2e-3: what happens to the unchanged model?

# ======================================================================================================
# THE EXCHANGED PART
# ======================================================================================================


class GroupedQueryAttention(nn.Module):
    """decoder_only.MultiHeadAttention with num_groups key and value heads, each for H / num_groups query heads."""

    def __init__(self, d_model: int, num_heads: int, dropout: float, num_groups: int):
        super().__init__()
        if num_heads % num_groups:
            raise ValueError(f"{num_heads} query heads cannot share {num_groups} key and value heads equally.")
        self.num_heads, self.num_groups = num_heads, num_groups
        width = num_groups * (d_model // num_heads)
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, width)       # (C, G * d_k): this, and the cache, is what becomes smaller
        self.value = nn.Linear(d_model, width)
        self.output = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, cache=None, attention_maps=None):
        """x (B, T, C) -> (B, T, C); arguments as in decoder_only.MultiHeadAttention."""
        B, T, _ = x.shape
        H, G = self.num_heads, self.num_groups
        query = self.query(x).unflatten(-1, (H, -1)).transpose(1, 2)                    # (B, H, T, d_k)
        key, value = (project(x).unflatten(-1, (G, -1)).transpose(1, 2)                 # (B, G, T, d_k)
                      for project in (self.key, self.value))
        if cache is not None:
            key, value = cache.append(key, value)                                       # (B, G, S, d_k)
        # The H / G query heads of a group are stacked as if they were more positions, so that a group is one matrix
        # product with its keys as stored in the cache. Repeating the keys H / G times instead gives the same result,
        # but writes out again what the smaller cache has saved.
        query = query.reshape(B, G, H // G * T, -1)                                     # (B, G, H/G * T, d_k)
        mask = mask.expand(B, 1, T, key.size(2)).repeat(1, 1, H // G, 1)                # (B, 1, H/G * T, S)
        heads, weights = scaled_dot_product_attention(query, key, value, mask, self.dropout)
        if attention_maps is not None:
            attention_maps.append(weights.detach().reshape(B, H, T, -1))
        heads = heads.reshape(B, H, T, -1)                                              # (B, H, T, d_k)
        return self.output(heads.transpose(1, 2).flatten(start_dim=2))                  # (B, T, C)


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================


def pool_heads(projection: nn.Linear, num_heads: int, num_groups: int, how: str) -> dict[str, torch.Tensor]:
    """Key or value projection of H heads -> weights for num_groups heads: the mean of each group, or its first head."""
    pooled = {}
    for name, tensor in projection.state_dict().items():
        heads = tensor.unflatten(0, (num_groups, num_heads // num_groups, -1))          # (G, H/G, d_k, ...)
        pooled[name] = (heads.mean(dim=1) if how == "mean" else heads[:, 0]).flatten(0, 1)
    return pooled


def exchange(model, num_groups: int, how: str | None = None):
    """Give a decoder-only model grouped-query attention, in place; returns it.

    how: "mean" or "first" makes the new key and value heads from the trained ones; None starts them at random.
    Queries and outputs are kept in any case.
    """
    for layer in model.layers:
        old = layer.attention
        d_model, num_heads = old.query.in_features, old.num_heads
        new = GroupedQueryAttention(d_model, num_heads, old.dropout.p, num_groups)
        new.apply(decoder_only.init_weights)
        new.query, new.output = old.query, old.output
        if how is not None:
            new.key.load_state_dict(pool_heads(old.key, num_heads, num_groups, how))
            new.value.load_state_dict(pool_heads(old.value, num_heads, num_groups, how))
        layer.attention = new.to(old.query.weight.device)
    return model


def build(num_groups: int, seed: int):
    """A new model with num_groups key and value heads."""
    torch.manual_seed(seed)
    return exchange(decoder_only.build_model(num_heads=NUM_HEADS), num_groups)


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def name_of(num_groups: int) -> str:
    kind = {NUM_HEADS: "MHA", 1: "MQA"}.get(num_groups, "GQA")
    return f"{kind}, {num_groups} KV head{'s' if num_groups > 1 else ''}"


@torch.inference_mode()
def next_token(model, ids, filled):
    """Logits after a text whose keys and values, except for the last token's, are `filled`, a pair for each layer."""
    cache = model.new_cache()
    for kv, (key, value) in zip(cache, filled):
        kv.append(key, value)  # the first append keeps the tensors themselves: nothing is copied
    return model(ids, cache)


def measure_cache() -> dict[int, tuple[float, float]]:
    """By number of groups: bytes per token in the cache as stored in memory, and milliseconds per new token."""
    timers, measured, times = {}, {}, {num_groups: [] for num_groups in GROUPS}
    for num_groups in GROUPS:
        model = exchange(decoder_only.build_model(num_heads=NUM_HEADS, max_length=CACHED_POSITIONS + 1), num_groups)
        model.eval()
        device = model.embedding.weight.device
        shape = (CACHED_BATCH, num_groups, CACHED_POSITIONS, decoder_only.D_MODEL // NUM_HEADS)
        filled = [(torch.randn(shape, device=device), torch.randn(shape, device=device)) for _ in model.layers]
        ids = torch.full((CACHED_BATCH, CACHED_POSITIONS + 1), SOS_ID, device=device)
        measured[num_groups] = sum(key.nbytes + value.nbytes for key, value in filled) / ids[:, 1:].numel()
        timers[num_groups] = Timer("next_token(model, ids, filled)", globals={**globals(), **locals()},
                                   num_threads=torch.get_num_threads())
    for _ in range(5):  # in turns, so that a slow moment of the machine affects all rows
        for num_groups, timer in timers.items():
            times[num_groups].append(1000 * timer.timeit(3).mean)
    return {num_groups: (measured[num_groups], statistics.median(times[num_groups])) for num_groups in GROUPS}


def train_on(model, loaders, share: float, bar):
    """Train a model for this share of the original steps, with a complete schedule. Returns it."""
    few = loaders._replace(train=list(loaders.train)[:max(1, round(share * NUM_EPOCHS * len(loaders.train)))])
    decoder_only.train(model, few, 1, UPTRAINING_RATE, num_evaluations=0, progress=bar)
    return model


def copy_of(trained):
    """A new model with the same weights."""
    model = build(trained.layers[0].attention.num_groups, seed=0)
    model.load_state_dict(trained.state_dict())
    return model


def measure_quality(bar) -> tuple[dict, dict]:
    """Exact match by seed: for each number of groups trained from scratch, and for conversions of the MHA model."""
    scratch = {num_groups: [] for num_groups in GROUPS}
    converted = {}
    for seed in SEEDS:
        for num_groups in GROUPS:
            loaders = decoder_only.create_dataloaders(BATCH_SIZE, seed, loss_on_prompt=False)
            model = build(num_groups, seed)
            decoder_only.train(model, loaders, NUM_EPOCHS, LEARNING_RATE, num_evaluations=0, progress=bar)
            scratch[num_groups].append(decoder_only.evaluate(model, loaders.validation)["exact_match"])
            if num_groups != NUM_HEADS:
                continue
            for target in GROUPS:
                for how in ("mean", "first") if target != NUM_HEADS else ("mean",):  # of one head, mean and first agree
                    new = exchange(copy_of(model), target, how)
                    before = decoder_only.evaluate(new, loaders.validation)["exact_match"]
                    train_on(new, loaders, UPTRAINING, bar)
                    after = decoder_only.evaluate(new, loaders.validation)["exact_match"]
                    converted.setdefault((target, how), []).append((before, after))
    return scratch, converted


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
    """Memory and time, quality after equal training, conversion."""
    torch.manual_seed(0)
    caches = measure_cache()
    print(f"\nCACHE with {CACHED_POSITIONS:,} positions, batch of {CACHED_BATCH}, {torch.get_num_threads()} thread(s), "
          f"{decoder_only.get_device().type}:\nbytes per token by the formula and as measured, milliseconds per token"
          f"\n\n  {'':24}{'formula':>12}{'measured':>12}{'ms':>12}")
    for num_groups, (measured, milliseconds) in caches.items():
        formula = 2 * decoder_only.NUM_LAYERS * num_groups * (decoder_only.D_MODEL // NUM_HEADS) * 4  # float32: 4 bytes
        print(f"  {name_of(num_groups):24}{formula:12,}{measured:12,.0f}{milliseconds:12.1f}")

    loaders = decoder_only.create_dataloaders(BATCH_SIZE, 0, loss_on_prompt=False)
    steps = NUM_EPOCHS * len(loaders.train)
    conversions = 2 * len(GROUPS) - 1
    num_steps = len(SEEDS) * (len(GROUPS) * steps + conversions * max(1, round(UPTRAINING * steps)))
    with tqdm(total=num_steps, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        scratch, converted = measure_quality(bar)

    print(f"\nTRAINED FROM SCRATCH, {steps} steps each: exact match on held-out numbers,\n"
          f"mean of {len(SEEDS)} seeds (range)\n")
    for num_groups, values in scratch.items():
        print(f"  {name_of(num_groups):24}{spread(values):>28}")
    worse = [name_of(g) for g in GROUPS if g != NUM_HEADS and differ(scratch[g], scratch[NUM_HEADS])]
    say(f"Different from MHA beyond seed noise (the ranges do not overlap): {'; '.join(worse) or 'none'}.")

    print(f"\nCONVERTED from the trained MHA models, then trained for {UPTRAINING:.0%} more steps "
          f"({max(1, round(UPTRAINING * steps))})\n\n"
          f"  {'':42}{'before':>24}{'after':>24}")
    for (num_groups, how), pairs in converted.items():
        label = "unchanged" if num_groups == NUM_HEADS else f"{how} of each group"
        before, after = zip(*pairs)
        print(f"  {f'{name_of(num_groups)}, {label}':42}{spread(before):>24}{spread(after):>24}")
    smallest = min(GROUPS)
    means = {how: statistics.mean(after for _, after in converted[smallest, how]) for how in ("mean", "first")}
    beyond = differ(*([after for _, after in converted[smallest, how]] for how in ("mean", "first")))
    say(f"After further training, {name_of(smallest)} reaches {means['mean']:.1%} from mean pooling and "
        f"{means['first']:.1%} from the first head ({'beyond' if beyond else 'within'} seed noise); "
        f"trained from scratch it reaches {statistics.mean(scratch[smallest]):.1%}.")


if __name__ == "__main__":
    run_script(main)
