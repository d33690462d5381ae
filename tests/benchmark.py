"""benchmark.py - the speed of the three models on the CPU, against PyTorch's own layers and decoding without a cache.

    python tests/benchmark.py        a few minutes

Absolute times mean little on a shared machine. So two things are always timed in turns, a few steps of one, a few of
the other, and the median of the ratios is printed.
"""

import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import decoder_only  # noqa: E402
import encoder_decoder  # noqa: E402
import encoder_only  # noqa: E402
from toy_dataset import EOS_ID, PAD_ID, VOCABULARY, make_splits  # noqa: E402

TURNS = 15            # pairs of measurements; the median of their ratios counts
STEPS = 6             # training steps in one measurement
NUM_TOKENS = 512      # length of the decoding test


class TorchTransformer(nn.Module):
    """The same model, built from PyTorch's layers: same sizes, embeddings, positions, final norms, tied output."""

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


def train_for_a_while(module):
    """A model after three epochs: it ends its names, unlike an untrained one."""
    torch.manual_seed(0)
    model = module.build_model().cpu()
    module.train(model, module.create_dataloaders(128), 3, num_evaluations=0, progress=tqdm(disable=True))
    return model.eval()


@torch.no_grad()
def plain_loop(model, prompt: list[int]) -> list[int]:
    """Greedy decoding as briefly as it can be written: everything is recomputed for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + decoder_only.MAX_NEW_TOKENS and ids[-1] != EOS_ID:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


def benchmark_generation() -> None:
    """One name at a time, where overhead counts most; and beam search, many at a time."""
    numbers = make_splits().test[:256]
    model = train_for_a_while(decoder_only)
    prompts = [decoder_only.make_prompt(number) for number in numbers[:30]]

    def one_by_one(decode):
        return [decode(model, prompt) for prompt in prompts]

    def cached(model, prompt):
        return decoder_only.generate(model, [prompt])[0].tolist()

    assert one_by_one(cached) == one_by_one(plain_loop)
    ratios = [seconds(one_by_one, plain_loop) / seconds(one_by_one, cached) for _ in range(TURNS)]
    print("\nGREEDY, one name at a time: time of a plain loop without a cache / time of generate "
          f"{statistics.median(ratios):6.2f}", flush=True)

    model = train_for_a_while(encoder_decoder)
    beam, greedy, one = encoder_decoder.beam_search, encoder_decoder.generate, encoder_decoder.beam_search_one
    sources = [encoder_decoder.make_source(number) for number in numbers]
    beam(model, sources, 5)  # warm up
    ratios = [seconds(beam, model, sources, 5) / seconds(greedy, model, sources) for _ in range(TURNS)]
    print(f"BEAM SEARCH of width 5, {len(sources)} numbers in one batch: time / time of greedy decoding "
          f"{verdict(statistics.median(ratios), 6)}", flush=True)
    ratios = [len(sources) * seconds(one, model, sources[turn], 5) / seconds(beam, model, sources, 5)
              for turn in range(TURNS)]
    print(f"{'':13}time per number of a plain loop (beam_search_one) / its own {statistics.median(ratios):6.1f}")


if __name__ == "__main__":
    benchmark_training()
    benchmark_cache()
    benchmark_generation()
