"""quantization.py - weights, activations and the KV cache as small integers: what can be saved before accuracy falls.

The problem. Generating one token reads every weight once, and reading takes longer than computing. A model with 7
billion weights in float32 is 28 GB; in 4 bits it is 3.5 GB, fits a laptop, and is read in an eighth of the time.

The idea. Within a block of numbers, keep one scale and round each number to a whole multiple of it (absmax,
round-to-nearest). With b bits there are 2^b codes; one is left unused so that the range is symmetric:

    levels = 2^(b-1) - 1       scale = max |x| / levels       integer = round(x / scale)       x' = scale * integer
    |x - x'| <= scale / 2      so the largest number of a block decides how coarse all the others become

On paper: 3 bits have levels -3 ... 3. The largest number is 3, so the scale is 1 and no error exceeds 0.5:

>>> integers, scale = quantize(torch.tensor([0.3, -1.2, 0.9, 3.0]), bits=3, granularity="tensor")
>>> integers, scale
(tensor([[ 0, -1,  1,  3]], dtype=torch.int8), tensor([[1.]], dtype=torch.float16))

What is a block? A whole tensor (one scale), a row of a weight matrix, that is an output channel, or a group of 32
numbers. Smaller blocks have smaller maxima, and cost 16 bits for each scale: half a bit per weight in groups of 32.

Activations can be rounded too, one scale per token, so that the matrix product itself runs on integers. In large
models a few features are a hundred times as large as the rest; they set the scale, and the rest rounds to zero.
LLM.int8() computes those few columns in floating point and the others in integers. Models as small as this one have no
such features. So one is planted, without changing the function: a norm's output is multiplied by OUTLIER in one
channel, and the weights that read this channel are divided by it.

At 2 or 3 bits rounding a trained model is not enough. Quantization-aware training rounds the weights in every forward
pass and trains the unrounded ones behind them. The derivative of rounding is zero almost everywhere, so the backward
pass ignores it, as if x' were x (straight-through estimator).

Papers: Dettmers et al. 2022 (LLM.int8(), section 3); Bengio et al. 2013 (straight-through estimator, section 2.3);
Jacob et al. 2018 (quantization-aware training, section 3). Simplified: integers are multiplied as float32, where
products of 8-bit integers are exact but not fast; embedding table, biases and norms, few of the parameters, stay in
float32; there is no calibration on data (GPTQ, AWQ), which repairs much of 3 and 4 bits without training.

What you will see (about two minutes on two CPU cores): bytes of the packed file, weight error and exact match by bits
and granularity; 8-bit activations with and without an outlier; the KV cache in 8 bits; what training repairs. Writes
figures/variations/quantization.png.
"""

import math
import statistics
import sys
import tempfile
import textwrap
from copy import deepcopy
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from toy_dataset import InputError, make_splits, number_to_words, run_script

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

BITS = (8, 6, 4, 3, 2)    # of a weight. 2 bits are -1, 0, 1
GROUP = 32                # numbers in a group. Try 8: more scales, smaller errors
OUTLIER = 100.0           # how much larger the planted feature is. Try 10, 1000
THRESHOLD = 6.0           # LLM.int8(): features with a larger value stay in floating point. Try 1: which features stay?

D_MODEL = 64              # Try 128: does a wider model tolerate fewer bits?
BATCH_SIZE = 128
NUM_EPOCHS = 4            # of the base model
LEARNING_RATE = 4e-3
REPAIR_BITS = (3, 2)      # where quantization-aware training is tried
REPAIR_EPOCHS = 2         # of further training, with and without rounding. Try 10
REPAIR_RATE = 2e-3
NUM_TESTS = 1000          # held-out numbers for exact match
SEEDS = (0, 1, 2)         # of base models: rounding itself has nothing random
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "quantization.png"

# ======================================================================================================
# THE EXCHANGED PART
# ======================================================================================================

GRANULARITIES = ("tensor", "channel", "group")


def quantize(x, bits: int, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Absmax, round-to-nearest. x of any shape -> integers (blocks, numbers per block), int8, and scales (blocks, 1).

    granularity: one block is the whole "tensor", a row of it (the last dimension: "channel"), or a "group" of GROUP.
    """
    blocks = x.reshape(-1, {"tensor": x.numel(), "channel": x.size(-1), "group": GROUP}[granularity])
    levels = 2 ** (bits - 1) - 1
    # Scales are stored in float16. The minimum keeps a block of zeros from being divided by zero.
    scale = (blocks.abs().amax(dim=1, keepdim=True) / levels).clamp(min=2**-14).half()
    integers = (blocks / scale.float()).round().clamp(-levels, levels)
    return integers.to(torch.int8), scale


def dequantize(integers, scale, shape) -> torch.Tensor:
    """x' = scale * integer, in float32 and the given shape."""
    return (integers.float() * scale.float()).view(shape)


def round_through(x, bits: int, granularity: str) -> torch.Tensor:
    """x rounded to what `bits` can hold, with the gradient of x itself: the straight-through estimator."""
    rounded = dequantize(*quantize(x.detach(), bits, granularity), x.shape)
    return rounded + (x - x.detach())  # adds zeros, exactly, but lets the gradient through


class QuantizedLinear(nn.Linear):
    """A Linear layer that computes with rounded weights and, where asked, rounded inputs. Trains the unrounded ones."""

    bits, granularity = 8, "channel"
    activations = None     # or the granularity of 8-bit inputs: "tensor", or "channel", which is one scale per token
    threshold = math.inf   # features of the input that exceed it stay in floating point, as do their weights

    def forward(self, x):
        if self.activations is None:
            return F.linear(x, round_through(self.weight, self.bits, self.granularity), self.bias)
        outliers = (x.abs() > self.threshold).flatten(end_dim=-2).any(dim=0)            # (in): these columns are apart
        regular = round_through(x.masked_fill(outliers, 0), 8, self.activations)        # (..., in)
        weight = round_through(self.weight.masked_fill(outliers, 0), self.bits, self.granularity)       # (out, in)
        return F.linear(regular, weight, self.bias) + F.linear(x[..., outliers], self.weight[:, outliers])


class QuantizedCache(decoder_only.KVCache):
    """decoder_only.KVCache in 8 bits: int8 numbers and one float16 scale per key or value vector."""

    def __init__(self):
        super().__init__()
        self.key_scale = self.value_scale = None

    def append(self, key, value):
        """Round the new keys and values (B, H, T, d_k), store them, and return all, unpacked (B, H, S, d_k)."""
        new = []
        for x in (key, value):
            integers, scale = quantize(x, 8, "channel")
            new += [integers.view(x.shape), scale.view(*x.shape[:-1], 1)]               # (B, H, T, d_k), (B, H, T, 1)
        if self.key is not None:
            new = [torch.cat(pair, dim=2) for pair in zip(self.stored(), new)]
        self.key, self.key_scale, self.value, self.value_scale = new
        return (dequantize(self.key, self.key_scale, self.key.shape),
                dequantize(self.value, self.value_scale, self.value.shape))

    def stored(self) -> list[torch.Tensor]:
        return [self.key, self.key_scale, self.value, self.value_scale]


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================


def exchange(model, bits: int, granularity: str, activations: str | None = None, threshold: float = math.inf):
    """Let all Linear layers of a decoder-only model compute with rounded weights, in place; returns the model."""
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = QuantizedLinear  # the same weights, another forward
            module.bits, module.granularity = bits, granularity
            module.activations, module.threshold = activations, threshold
    return model


def quantize_cache(model):
    """Let a decoder-only model generate with 8-bit caches, in place; returns it."""
    model.new_cache = lambda: [QuantizedCache() for _ in model.layers]
    return model


@torch.no_grad()
def plant_outlier(model, factor: float):
    """Make channel 0 of each norm's output `factor` times as large, in place. The logits stay the same. Returns the
    model."""
    for layer in model.layers:
        attention = layer.attention
        for norm, readers in ((layer.attention_norm, (attention.query, attention.key, attention.value)),
                              (layer.feed_forward_norm, (layer.feed_forward.expand,))):
            norm.weight[0] *= factor
            norm.bias[0] *= factor
            for linear in readers:
                linear.weight[:, 0] /= factor
    return model


# ======================================================================================================
# THE PACKED FILE
# ======================================================================================================


def pack(integers, bits: int) -> torch.Tensor:
    """Integers from -levels to levels -> uint8, bit after bit, without gaps: ceil(N * bits / 8) bytes."""
    codes = integers.flatten().int() + 2 ** (bits - 1) - 1                              # 0 ... 2^bits - 2
    stream = ((codes[:, None] >> torch.arange(bits)) & 1).flatten()                     # (N * bits): zeros and ones
    stream = F.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8)).sum(dim=1).to(torch.uint8)


def unpack(packed, bits: int, count: int) -> torch.Tensor:
    """The inverse of pack: `count` integers, int8."""
    stream = ((packed.int()[:, None] >> torch.arange(8)) & 1).flatten()[:count * bits]
    return ((stream.view(-1, bits) << torch.arange(bits)).sum(dim=1) - 2 ** (bits - 1) + 1).to(torch.int8)


def quantized_weights(model) -> dict[str, QuantizedLinear]:
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def save_packed(model, path: Path) -> int:
    """Write a model that went through exchange(): packed integers, scales, and the rest. Returns the file's bytes."""
    layers = quantized_weights(model)
    content = {"rest": {name: tensor for name, tensor in model.state_dict().items() if name not in layers}}
    for name, layer in layers.items():
        integers, scale = quantize(layer.weight.detach().cpu(), layer.bits, layer.granularity)
        content[name] = {"packed": pack(integers, layer.bits), "scale": scale}
    torch.save(content, path)
    return path.stat().st_size


def load_packed(model, path: Path):
    """Fill a model from such a file, with the weights that the integers stand for. model: after the same exchange()."""
    content = torch.load(path, weights_only=True)
    weights = content["rest"]
    for name, layer in quantized_weights(model).items():
        scale = content[name]["scale"]
        integers = unpack(content[name]["packed"], layer.bits, layer.weight.numel()).view(len(scale), -1)
        weights[name] = dequantize(integers, scale, layer.weight.shape)
    model.load_state_dict(weights)
    return model


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def build(seed: int, bar):
    """A base model, trained in float32, and its data."""
    torch.manual_seed(seed)
    loaders = decoder_only.create_dataloaders(BATCH_SIZE, seed, loss_on_prompt=False)
    model = decoder_only.build_model(d_model=D_MODEL, d_ff=4 * D_MODEL)
    decoder_only.train(model, loaders, NUM_EPOCHS, LEARNING_RATE, num_evaluations=0, progress=bar)
    return model.eval(), loaders


def accuracy(model, loaders) -> float:
    """Exact match on NUM_TESTS held-out numbers."""
    dataset = deepcopy(loaders.test.dataset)
    dataset.numbers, dataset.examples = dataset.numbers[:NUM_TESTS], dataset.examples[:NUM_TESTS]
    loader = torch.utils.data.DataLoader(dataset, 1000, collate_fn=loaders.test.collate_fn)
    return decoder_only.evaluate(model, loader)["exact_match"]


def worst_error(model) -> float:
    """The largest |x - x'| of any weight, as a share of its bound, scale / 2."""
    shares = []
    for layer in quantized_weights(model).values():
        weight = layer.weight.detach()
        integers, scale = quantize(weight, layer.bits, layer.granularity)
        errors = (weight.view(integers.shape) - integers * scale.float()).abs()
        shares.append((errors / (scale.float() / 2)).max().item())
    return max(shares)


def file_size(model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save_packed(model, Path(folder) / "model.pt")


@torch.inference_mode()
def generate_with_cache(model) -> tuple[float, float, list[str]]:
    """Bytes per token of the cache as they lie in memory, exact match of what is generated, and the texts."""
    numbers = make_splits().test[:NUM_TESTS]
    cache, ids = model.new_cache(), torch.tensor([decoder_only.make_prompt(numbers[0])])
    model(ids.to(model.embedding.weight.device), cache)
    size = sum(tensor.nbytes for kv in cache for tensor in vars(kv).values()) / ids.numel()
    generated = decoder_only.generate(model, [decoder_only.make_prompt(number) for number in numbers])
    texts = [decoder_only.to_words(row) for row in generated]
    right = [text == " ".join(number_to_words(number)) for number, text in zip(numbers, texts)]
    return size, statistics.mean(right), texts


def measure(bar) -> dict[str, dict]:
    """Everything, by table and row: lists over the seeds."""
    found = {"weights": {}, "activations": {}, "cache": {}, "repair": {}}

    def add(table, row, value):
        found[table].setdefault(row, []).append(value)

    for seed in SEEDS:
        base, loaders = build(seed, bar)
        add("weights", (32, "float"), (file_size(base), 0.0, accuracy(base, loaders)))
        for bits in BITS:
            for granularity in GRANULARITIES:
                model = exchange(deepcopy(base), bits, granularity)
                add("weights", (bits, granularity), (file_size(model), worst_error(model), accuracy(model, loaders)))

        planted = plant_outlier(deepcopy(base), OUTLIER)
        for name, model in (("", base), ("outlier, ", planted)):
            add("activations", f"{name}float32", accuracy(model, loaders))
            for label, activations, threshold in (("8-bit weights", None, math.inf),
                                                  ("8-bit weights and inputs, one scale", "tensor", math.inf),
                                                  ("8-bit weights and inputs, per token", "channel", math.inf),
                                                  ("the same with LLM.int8()", "channel", THRESHOLD)):
                rounded = exchange(deepcopy(model), 8, "channel", activations, threshold)
                add("activations", name + label, accuracy(rounded, loaders))

        for name, model in (("float32", base), ("8 bits", quantize_cache(deepcopy(base)))):
            add("cache", name, generate_with_cache(model))

        further = deepcopy(base)
        decoder_only.train(further, loaders, REPAIR_EPOCHS, REPAIR_RATE, num_evaluations=0, progress=bar)
        for bits in REPAIR_BITS:
            add("repair", (bits, "rounded"), accuracy(exchange(deepcopy(base), bits, "channel"), loaders))
            add("repair", (bits, "trained further, then rounded"),
                accuracy(exchange(deepcopy(further), bits, "channel"), loaders))
            aware = exchange(deepcopy(base), bits, "channel")
            decoder_only.train(aware, loaders, REPAIR_EPOCHS, REPAIR_RATE, num_evaluations=0, progress=bar)
            add("repair", (bits, "trained further with rounding"), accuracy(aware, loaders))
    return found


def spread(values: list[float]) -> str:
    """The mean over the seeds, and the range: `1.2% (0.9 to 1.6)`."""
    return f"{statistics.mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def differ(values: list[float], others: list[float]) -> bool:
    """Whether two rows differ by more than seed noise: their ranges over the seeds do not overlap."""
    return max(values) < min(others) or max(others) < min(values)


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
    """Exact match by bits, a line for each granularity, and what training repairs."""
    bits = min(REPAIR_BITS)
    aware = {bits: statistics.mean(found["repair"][bits, "trained further with rounding"]) for bits in REPAIR_BITS}
    rounded = statistics.mean(found["repair"][bits, "rounded"])
    figure = new_figure(f"{bits}-bit weights: rounding leaves {rounded:.0%} of the answers correct, training with "
                        f"rounded weights {aware[bits]:.0%}", 4.6)
    axes = figure.subplots()
    for granularity, colour, marker in zip(GRANULARITIES, ("#E69F00", "#0072B2", "#009E73"), "so^"):
        rows = [[accuracy for *_, accuracy in found["weights"][bits, granularity]] for bits in BITS]
        axes.plot(BITS, [statistics.mean(row) for row in rows], color=colour, marker=marker, clip_on=False,
                  label={"tensor": "one scale per tensor", "channel": "per output channel",
                         "group": f"per group of {GROUP}"}[granularity])
        axes.fill_between(BITS, [min(row) for row in rows], [max(row) for row in rows], color=colour, alpha=0.15, lw=0)
    axes.plot(aware.keys(), aware.values(), color="#222222", marker="D", linestyle="--", clip_on=False,
              label="per channel, trained with rounding")
    axes.set(xlabel="bits per weight", ylabel="exact match", ylim=(0, 1), xticks=BITS)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="y")
    axes.legend(frameon=False, loc="lower right")
    return figure


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def main() -> None:
    """Four tables, what they come to, and the picture."""
    if D_MODEL % GROUP or min(BITS + REPAIR_BITS) < 2 or max(BITS + REPAIR_BITS) > 8:
        raise InputError(f"GROUP = {GROUP} must divide D_MODEL = {D_MODEL}, and all of BITS = {BITS} and REPAIR_BITS = "
                         f"{REPAIR_BITS} lie between 2 and 8.")
    steps_per_epoch = math.ceil(len(make_splits().train) / BATCH_SIZE)
    total = len(SEEDS) * steps_per_epoch * (NUM_EPOCHS + REPAIR_EPOCHS * (1 + len(REPAIR_BITS)))
    with tqdm(total=total, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        found = measure(bar)

    print(f"\nWEIGHTS rounded, everything else float32. Exact match on {NUM_TESTS:,} held-out numbers,\n"
          f"mean of {len(SEEDS)} models (range)\n"
          f"error: the largest rounding error, relative to its bound of half a step\n\n"
          f"  {'bits':>4}  {'one scale per':15}{'file, bytes':>14}{'error':>9}{'exact match':>25}")
    exact = {}
    for (bits, granularity), rows in found["weights"].items():
        sizes, errors, exact[bits, granularity] = zip(*rows)
        print(f"  {bits:4}  {granularity:15}{sizes[0]:14,}{max(errors):9.3f}{spread(exact[bits, granularity]):>25}")
    for granularity in GRANULARITIES:
        changes = []
        for bits in BITS:  # rounding has nothing random, so each model is compared with itself
            points = [100 * (a - b) for a, b in zip(exact[bits, granularity], exact[32, "float"])]
            changes.append(f"{bits} bits {min(points):+.1f} to {max(points):+.1f}")
        say(f"One scale per {granularity}, change of the same model in points: {'; '.join(changes)}.")

    print("\nACTIVATIONS: the inputs of all Linear layers in 8 bits as well\n"
          f"outlier: one feature made {OUTLIER:g} times as large, the function unchanged\n")
    for name, values in found["activations"].items():
        print(f"  {name:50}{spread(values):>25}")

    print(f"\nKV CACHE: {NUM_TESTS:,} names generated\n\n  {'':10}{'bytes per token':>17}{'exact match':>25}")
    for name, rows in found["cache"].items():
        print(f"  {name:10}{rows[0][0]:17,.0f}{spread([row[1] for row in rows]):>25}")
    same = [text == other for (*_, texts), (*_, others) in zip(*found["cache"].values())
            for text, other in zip(texts, others)]
    say(f"With the 8-bit cache {statistics.mean(same):.2%} of the texts are the same, word for word.")

    print(f"\nREPAIR, one scale per channel, {REPAIR_EPOCHS * steps_per_epoch} more steps\n")
    for (bits, how), values in found["repair"].items():
        print(f"  {bits} bits, {how:42}{spread(values):>25}")
    for bits in REPAIR_BITS:
        aware, later = (found["repair"][bits, f"trained further{how}"] for how in (" with rounding", ", then rounded"))
        beyond = "beyond" if differ(aware, later) else "within"
        say(f"{bits} bits: rounding during training instead of after it changes exact match by "
            f"{100 * (statistics.mean(aware) - statistics.mean(later)):+.1f} points, {beyond} seed noise; float32 has "
            f"{statistics.mean(exact[32, 'float']):.1%}.")
    save_figure(draw(found), FIGURE)


if __name__ == "__main__":
    run_script(main)
