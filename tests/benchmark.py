"""benchmark.py - how fast the three models are, beside PyTorch's own layers and beside doing without a cache.

    python tests/benchmark.py        a few minutes

Absolute times mean little on a shared machine. So all figures are ratios of two things that were timed in turns, a few
steps of the one, a few of the other, and the median of the ratios is what is printed.
"""

import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import decoder_only  # noqa: E402
import encoder_decoder  # noqa: E402
import encoder_only  # noqa: E402
from toy_dataset import PAD_ID, VOCABULARY, make_splits  # noqa: E402

TURNS = 15            # pairs of measurements; the median of their ratios counts
STEPS = 6             # training steps in one measurement
NUM_TOKENS = 512      # length of the decoding test


class TorchTransformer(nn.Module):
    """The same model, of PyTorch's layers: same sizes, embeddings, positions, final norms, tied output."""

    def __init__(self, module):
        super().__init__()
        sizes = dict(d_model=module.D_MODEL, nhead=module.NUM_HEADS, dim_feedforward=module.D_FF,
                     dropout=module.DROPOUT, activation=F.gelu, batch_first=True, norm_first=True)
        self.module = module
        self.embedding = nn.Embedding(len(VOCABULARY), module.D_MODEL)
        self.positions = module.PositionalEncoding(module.D_MODEL, module.MAX_LENGTH)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), module.NUM_LAYERS,
                                             nn.LayerNorm(module.D_MODEL), enable_nested_tensor=False)
        if module is encoder_decoder:
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), module.NUM_LAYERS,
                                                 nn.LayerNorm(module.D_MODEL))

    def embed(self, ids):
        return self.embedding(ids) * math.sqrt(self.module.D_MODEL) + self.positions(torch.arange(ids.size(1)))

    def forward(self, ids, target=None):
        later = torch.ones(*2 * [ids.size(1) if target is None else target.size(1)], dtype=torch.bool).triu(1)
        causal = later if self.module is decoder_only else None
        x = self.encoder(self.embed(ids), causal, ids == PAD_ID)
        if target is not None:
            x = self.decoder(self.embed(target), x, later, None, target == PAD_ID, ids == PAD_ID)
        return F.linear(x, self.embedding.weight)


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def verdict(ratio: float, most: float) -> str:
    return f"{ratio:6.2f}   (at most {most}: {'yes' if ratio <= most else 'NO'})"


def train_some_steps(module, model, optimizer, batch) -> None:
    for _ in range(STEPS):
        loss_sum, num_targets = module.compute_loss(model, batch)
        optimizer.zero_grad()
        (loss_sum / num_targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def benchmark_training() -> None:
    print(f"TRAINING STEP: time of ours / time of PyTorch's layers, {TURNS} turns of {STEPS} steps")
    for module in (encoder_only, decoder_only, encoder_decoder):
        batch = next(iter(module.create_dataloaders().train))
        models = [module.build_model().cpu(), TorchTransformer(module)]
        sides = [(module, model, torch.optim.AdamW(model.parameters(), 1e-3), batch) for model in models]
        for side in sides:
            train_some_steps(*side)  # warm up
        ours, theirs = sides
        ratios = [seconds(train_some_steps, *ours) / seconds(train_some_steps, *theirs) for _ in range(TURNS)]
        print(f"  {module.__name__:18}{verdict(statistics.median(ratios), 1.0)}", flush=True)


@torch.no_grad()
def benchmark_cache() -> None:
    print(f"\nDECODING {NUM_TOKENS} TOKENS of one text, milliseconds per token by length")
    model = decoder_only.build_model(max_length=NUM_TOKENS + 1).cpu().eval()
    ids = torch.randint(6, len(VOCABULARY), (1, NUM_TOKENS))
    runs = []
    for _ in range(3):
        cache, cached = model.new_cache(), []
        for length in range(1, NUM_TOKENS + 1):
            cached.append(seconds(model, ids[:, :length], cache))
        runs.append(cached)
    cached = [statistics.median(times) for times in zip(*runs)]
    print(f"  {'length':>12}{'with cache':>14}{'recomputing':>14}")
    for end in (50, 100, 200, 300, 400, NUM_TOKENS):
        recomputed = statistics.median(seconds(model, ids[:, :end]) for _ in range(9))
        with_cache = statistics.mean(cached[end - 50:end])
        print(f"  {f'{end - 49}-{end}':>12}{1000 * with_cache:14.2f}{1000 * recomputed:14.2f}")
    ratio = statistics.mean(cached[-50:]) / statistics.mean(cached[:50])
    print(f"  last 50 tokens / first 50, with the cache {verdict(ratio, 1.5)}", flush=True)


def benchmark_beam_search() -> None:
    print("\nBEAM SEARCH of width 5 / greedy decoding, 256 numbers in one batch, a briefly trained model")
    torch.manual_seed(0)
    model, loaders = encoder_decoder.build_model(), encoder_decoder.create_dataloaders(128)
    optimizer = encoder_decoder.create_optimizer(model, 1e-3)
    for batch in [batch for _ in range(3) for batch in loaders.train]:
        loss_sum, num_targets = encoder_decoder.compute_loss(model, batch)
        optimizer.zero_grad()
        (loss_sum / num_targets).backward()
        optimizer.step()
    sources = [encoder_decoder.make_source(number) for number in make_splits().test[:256]]
    encoder_decoder.beam_search(model, sources, 5)  # warm up
    beam, greedy = encoder_decoder.beam_search, encoder_decoder.generate
    ratios = [seconds(beam, model, sources, 5) / seconds(greedy, model, sources) for _ in range(TURNS)]
    print(f"  {'':18}{verdict(statistics.median(ratios), 6)}")


if __name__ == "__main__":
    benchmark_training()
    benchmark_cache()
    benchmark_beam_search()
