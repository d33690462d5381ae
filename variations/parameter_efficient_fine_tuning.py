"""parameter_efficient_fine_tuning.py - teach a trained model something new by training few of its parameters.

The problem. Fine-tuning changes every weight, so each task leaves behind a model as large as the first. With ten
tasks that is ten models to store and to keep in memory, and none of them still does what the first one did.

The idea. Freeze the trained weights and train a small addition. It is all that has to be stored for a task, one base
model serves any number of them, and without the addition the base is as before, bit for bit. Where the addition goes:

    LoRA             beside a weight matrix:     y = x W^T + b + (alpha / r) (x A^T) B^T,   A (r, in), B (out, r)
    adapter          after each sublayer:        h <- h + gelu(h A^T) B^T,  a network with a narrow middle
    prefix tuning    before the keys and values: key <- [P_k, key], value <- [P_v, value],  in every layer
    prompt tuning    before the text:            x <- [P, x],  a few vectors in front of the embeddings
    BitFit           nothing is added; the biases are trained, all weight matrices stay

LoRA's B starts at zero, and so does the last matrix of an adapter: training starts from exactly the base model. LoRA
alone can be merged into the weights, W <- W + (alpha / r) B A, and then costs no time at all in generation.

On paper: of the 4096 x 4096 weights of a matrix in Llama 2 7B, an update of rank 8 trains 0.4%:

>>> 8 * (4096 + 4096) / (4096 * 4096)
0.00390625

and rank 1 is enough for a change whose columns are all multiples of one vector, here of (1, 0):

>>> W, A, B = torch.eye(2), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [0.0]])
>>> W + B @ A
tensor([[1., 2.],
        [0., 1.]])

The task. A decoder that names numbers in English learns a dialect with the same words: units before tens, as in
German ("two forty" for 42), from 1,000 examples. Nothing in the prompt says which language is wanted. So a model that
speaks the dialect perfectly answers every number in it, and its accuracy in English is exactly the share of names that
are the same in both. That floor is printed: down to it, lower accuracy in English is what the task demands; below it,
fine-tuning did damage.

Papers: Hu et al. 2021 (LoRA, section 4.1); Houlsby et al. 2019 (adapters, section 2.1); Li & Liang 2021 (prefix tuning,
section 4); Lester et al. 2021 (prompt tuning, section 2); Ben Zaken et al. 2021 (BitFit). Simplified: LoRA is on all
six matrices of a layer, as in QLoRA (Dettmers et al. 2023), where Hu et al. mostly take query and value; adapters train
no norms; the prefix is trained directly, not through a second network. Soft prompts take no position away from the
text: sinusoidal positions that were never trained would be a handicap that the original, on T5, did not have.

What you will see (about three minutes on two CPU cores): for each method the parameters, the bytes to store, and
exact match in both languages, its learning rate found by the same search; then two dialects as two adapters for one
base, and their sum. Writes figures/variations/parameter_efficient_fine_tuning.png.
"""

import math
import random
import statistics
import sys
import textwrap
from copy import deepcopy
from functools import partial
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from decoder_only import DecoderOnlyTransformer, scaled_dot_product_attention
from toy_dataset import IGNORE, MASK_ID, ONES, TENS, VOCABULARY, Splits, make_splits, number_to_words, pad_batch
from toy_dataset import run_script, to_ids

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- the base model, trained on English ---
D_MODEL = 64              # Try 128 (slower): do the methods come closer to each other?
BASE_EPOCHS = 4           # passes over the 10,000 training numbers
BASE_BATCH_SIZE = 128
BASE_LEARNING_RATE = 4e-3

# --- the additions ---
LORA_ALPHA = 16           # LoRA's output is scaled by LORA_ALPHA / rank. Try 1: which learning rate is chosen then?
ADAPTER_WIDTH = 8         # the narrow middle of an adapter. Try 1, 32
PREFIX_LENGTH = 8         # keys and values before those of the text, in each layer. Try 1, 32
PROMPT_LENGTH = 8         # vectors before the text. Try 1, 32

# --- fine-tuning ---
NUM_EXAMPLES = 1000       # names in the dialect. Try 100: which method needs the fewest?
NUM_STEPS = 200           # Try 1000: which methods catch up?
BATCH_SIZE = 64
LEARNING_RATES = (1e-3, 4e-3, 2e-2, 1e-1, 4e-1)  # each method keeps the best of these, found with the first seed
NUM_VALIDATION = 300      # numbers that choose the learning rate
NUM_TESTS = 500           # other numbers, on which all accuracies in the tables are measured
SEEDS = (0, 1, 2)         # of examples, their order, and the initial values of what is added
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "parameter_efficient_fine_tuning.png"

# ======================================================================================================
# THE EXCHANGED PART: each wraps a trained module, `inner`, and trains only what it adds
# ======================================================================================================


class LoRALinear(nn.Module):
    """A Linear layer and a trained update of low rank: y = x W^T + b + (alpha / r) (x A^T) B^T."""

    def __init__(self, inner: nn.Linear, rank: int):
        super().__init__()
        self.inner, self.scale = inner, LORA_ALPHA / rank
        self.down = nn.Linear(inner.in_features, rank, bias=False)                      # A: random
        self.up = nn.Linear(rank, inner.out_features, bias=False)                       # B: zero, so the update is too
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.inner(x) + self.scale * self.up(self.down(x))                       # (..., in) -> (..., out)


class Adapter(nn.Module):
    """A sublayer (attention or feed-forward network) followed by a small network with its own residual connection."""

    def __init__(self, inner: nn.Module, d_model: int, width: int):
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(d_model, width), nn.Linear(width, d_model)
        nn.init.zeros_(self.up.weight)  # with a zero bias as well, the adapter starts as the identity
        nn.init.zeros_(self.up.bias)

    def forward(self, *arguments):
        h = self.inner(*arguments)                                                      # (B, T, C)
        return h + self.up(F.gelu(self.down(h)))


class PrefixAttention(nn.Module):
    """Attention whose every query may also attend to trained keys and values that no token produced."""

    def __init__(self, inner: nn.Module, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.inner = inner
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)                   # (1, H, P, d_k)

    def forward(self, x, mask, cache=None, attention_maps=None):
        """x (B, T, C) -> (B, T, C); arguments as in decoder_only.MultiHeadAttention."""
        inner, B, P = self.inner, x.size(0), self.key.size(2)
        query, key, value = (inner.split_heads(project(x)) for project in (inner.query, inner.key, inner.value))
        if cache is not None:
            key, value = cache.append(key, value)  # the text's alone: the prefix is the same in every text
        key = torch.cat([self.key.expand(B, -1, -1, -1), key], dim=2)                   # (B, H, P + S, d_k)
        value = torch.cat([self.value.expand(B, -1, -1, -1), value], dim=2)
        mask = torch.cat([mask.new_ones(*mask.shape[:-1], P), mask], dim=-1)            # (B, 1, T, P + S)
        heads, weights = scaled_dot_product_attention(query, key, value, mask, inner.dropout)
        if attention_maps is not None:
            attention_maps.append(weights.detach())
        return inner.output(heads.transpose(1, 2).flatten(start_dim=2))                 # (B, T, C)


class PromptedDecoder(DecoderOnlyTransformer):
    """A decoder with trained vectors, `prompt` (P, C), in front of every text. <MASK>, which it never uses, marks them.

    They stand in ids and in the cache like other tokens, so masks and cached generation work as they are.
    """

    def embed(self, ids, positions):
        P = len(self.prompt)
        x = super().embed(ids, (positions - P).clamp(min=0))                            # the text starts at position 0
        soft = self.prompt[positions.clamp(max=P - 1)]                                  # (B, T, C)
        return torch.where((ids == MASK_ID)[..., None], soft, x)

    def forward(self, ids, cache=None, attention_maps=None):
        P, cached = len(self.prompt), 0 if cache is None else len(cache[0])
        num_new = ids.size(1) - max(0, cached - P)
        soft = ids.new_full((len(ids), P), MASK_ID)
        logits = super().forward(torch.cat([soft, ids], dim=1), cache, attention_maps)
        return logits[:, -num_new:]                                                     # (B, T, V): none for the prompt


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================


def add_lora(model, rank: int) -> None:
    for layer in model.layers:
        for sublayer in (layer.attention, layer.feed_forward):
            for name, child in list(sublayer.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(sublayer, name, LoRALinear(child, rank))


def add_adapters(model) -> None:
    for layer in model.layers:
        layer.attention, layer.feed_forward = (Adapter(sublayer, model.constants["D_MODEL"], ADAPTER_WIDTH)
                                               for sublayer in (layer.attention, layer.feed_forward))


def random_words(count: int, device) -> torch.Tensor:
    """Ids of number words (1, count), to start from: both papers found that better than random vectors."""
    return torch.randint(to_ids(["zero"])[0], len(VOCABULARY), (1, count)).to(device)


@torch.no_grad()
def add_prefix(model) -> None:
    cache = model.new_cache()
    model(random_words(PREFIX_LENGTH, model.embedding.weight.device), cache)
    for layer, kv in zip(model.layers, cache):
        layer.attention = PrefixAttention(layer.attention, kv.key.clone(), kv.value.clone())


@torch.no_grad()
def add_prompt(model) -> None:
    ids = random_words(PROMPT_LENGTH, model.embedding.weight.device)
    prompt = model.embed(ids, torch.zeros_like(ids))[0]                                 # (P, C)
    model.__class__ = PromptedDecoder  # the same weights, another forward
    model.prompt = nn.Parameter(prompt.clone())


def unfreeze(model, chosen) -> None:
    """Train those of the model's own parameters whose name is chosen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))


METHODS = {
    "full fine-tuning": partial(unfreeze, chosen=lambda name: True),
    "LoRA, rank 16": partial(add_lora, rank=16),
    "LoRA, rank 4": partial(add_lora, rank=4),
    "LoRA, rank 1": partial(add_lora, rank=1),
    "adapters": add_adapters,
    "prefix tuning": add_prefix,
    "prompt tuning": add_prompt,
    "biases only": partial(unfreeze, chosen=lambda name: name.endswith("bias")),
    "last layer": partial(unfreeze, chosen=lambda name: name.startswith(f"layers.{decoder_only.NUM_LAYERS - 1}.")),
}


def exchange(model, method: str):
    """Freeze a trained decoder-only model and put one of METHODS into it, in place; returns it."""
    model.requires_grad_(False)
    METHODS[method](model)  # new parameters require gradients by default
    return model.to(model.embedding.weight.device)


def trained_parameters(model) -> dict[str, torch.Tensor]:
    """What has to be stored for a task. Put back by model.load_state_dict(these, strict=False)."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def take_out(model):
    """Remove what was added, in place; returns the model. (What was overwritten stays as it is.)"""
    if isinstance(model, PromptedDecoder):
        model.__class__ = DecoderOnlyTransformer
        del model.prompt
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (LoRALinear, Adapter, PrefixAttention)):
                setattr(parent, name, child.inner)
    return model


@torch.no_grad()
def merge(model):
    """Fold LoRA into the weights, in place: W <- W + (alpha / r) B A. Returns the model, which is a plain one again."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.inner.weight += module.scale * module.up.weight @ module.down.weight
    return take_out(model)


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def units_first(words: list[str]) -> list[str]:
    """Units before tens, as in German.

    >>> " ".join(units_first(number_to_words(21342)))
    'one twenty thousand three hundred two forty'
    """
    words = list(words)
    for i in range(len(words) - 1):
        if words[i] in TENS and words[i + 1] in ONES:
            words[i], words[i + 1] = words[i + 1], words[i]
    return words


def no_one(words: list[str]) -> list[str]:
    """No "one" before hundred, nor before thousand at the start, as in Swedish, Italian or French.

    >>> " ".join(no_one(number_to_words(1101)))
    'thousand hundred one'
    """
    return [word for i, word in enumerate(words)
            if not (word == "one" and (words[i + 1:i + 2] == ["hundred"] or i == 0 and words[1:2] == ["thousand"]))]


LANGUAGES = {"English": list, "units first": units_first, "no one": no_one,
             "both": lambda words: no_one(units_first(words))}


def batches_of(numbers: list[int], language: str, size: int) -> list[dict]:
    """Batches of numbers and their names in a language; targets are the names alone."""
    examples = []
    for number in numbers:
        prompt = to_ids(["<SOS>", *str(number), "<SEP>"])
        name = to_ids([*LANGUAGES[language](number_to_words(number)), "<EOS>"])
        examples.append({"ids": (prompt + name)[:-1], "targets": [IGNORE] * (len(prompt) - 1) + name})
    return [pad_batch(examples[i:i + size]) for i in range(0, len(examples), size)]


def training_batches(language: str, seed: int) -> list[dict]:
    """NUM_STEPS batches, pass after pass over NUM_EXAMPLES training numbers, each pass in another order."""
    rng, order = random.Random(seed), []
    numbers = rng.sample(make_splits().train, NUM_EXAMPLES)
    while len(order) < NUM_STEPS * BATCH_SIZE:
        order += rng.sample(numbers, len(numbers))
    return batches_of(order[:NUM_STEPS * BATCH_SIZE], language, BATCH_SIZE)


def exact_match(model, language: str, numbers: list[int]) -> float:
    """The share of numbers whose whole name in this language is correct."""
    return decoder_only.evaluate(model, batches_of(numbers, language, 500))["exact_match"]


def fine_tune(base, method: str, rate: float, language: str, seed: int, bar):
    """A copy of the base, fine-tuned."""
    torch.manual_seed(seed)
    model = exchange(deepcopy(base), method)
    try:
        decoder_only.train(model, Splits(training_batches(language, seed), [], []), 1, rate, 0, progress=bar)
    except FloatingPointError:
        pass  # too high a learning rate: the model is judged as it stands
    return model


def build(bar):
    """The base model: a decoder that names numbers in English."""
    torch.manual_seed(0)
    model = decoder_only.build_model(d_model=D_MODEL, d_ff=4 * D_MODEL)
    loaders = decoder_only.create_dataloaders(BASE_BATCH_SIZE, 0, loss_on_prompt=False)
    decoder_only.train(model, loaders, BASE_EPOCHS, BASE_LEARNING_RATE, num_evaluations=0, progress=bar)
    return model.eval()


@torch.no_grad()
def logits_of(model, numbers: list[int]) -> torch.Tensor:
    """The logits for the English texts of these numbers."""
    return decoder_only.predict(model.eval(), batches_of(numbers, "English", len(numbers))[0])[0]


def measure(base, bar) -> dict[str, dict]:
    """For each method: parameters, bytes, the learning rate found, and by seed exact match in both languages, with the
    addition and after taking it out."""
    tests, found = make_splits().test[:NUM_TESTS], {}
    before = logits_of(base, tests)
    for method in METHODS:
        scores = {}
        for rate in LEARNING_RATES:
            model = fine_tune(base, method, rate, "units first", SEEDS[0], bar)
            scores[rate] = exact_match(model, "units first", make_splits().validation[:NUM_VALIDATION])
        row = {"rate": max(scores, key=scores.get), "dialect": [], "English": [], "out": [], "same": []}
        for seed in SEEDS:
            model = fine_tune(base, method, row["rate"], "units first", seed, bar)
            row["parameters"] = sum(tensor.numel() for tensor in trained_parameters(model).values())
            row["bytes"] = sum(tensor.nbytes for tensor in trained_parameters(model).values())
            row["dialect"].append(exact_match(model, "units first", tests))
            row["English"].append(exact_match(model, "English", tests))
            take_out(model)
            row["out"].append(exact_match(model, "English", tests))
            row["same"].append(torch.equal(logits_of(model, tests), before))
        found[method] = row
    return found


def measure_two(base, method: str, rate: float, bar) -> tuple[dict, float]:
    """Two dialects as two LoRA adapters: for the base, each adapter in it, and the sum of both, exact match in each of
    LANGUAGES. And by how much merging changes the logits at most."""
    tests = make_splits().test[:NUM_TESTS]
    stored = {dialect: trained_parameters(fine_tune(base, method, rate, dialect, SEEDS[0], bar))
              for dialect in ("units first", "no one")}
    models = {"base": base}
    for dialect, parameters in stored.items():
        models[f"+ {dialect}"] = exchange(deepcopy(base), method)
        models[f"+ {dialect}"].load_state_dict(parameters, strict=False)
    both = merge(deepcopy(models["+ units first"]))
    changed = (logits_of(both, tests) - logits_of(models["+ units first"], tests)).abs().max().item()
    exchange(both, method).load_state_dict(stored["no one"], strict=False)
    models["+ both"] = merge(both)
    return {name: {language: exact_match(model, language, tests) for language in LANGUAGES}
            for name, model in models.items()}, changed


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


def draw(found: dict, untouched: float) -> Figure:
    """Exact match in the dialect, a row for each method, by number of trained parameters."""
    full, lora = found["full fine-tuning"], found["LoRA, rank 4"]
    beyond = "beyond" if differ(lora["dialect"], full["dialect"]) else "within"
    figure = new_figure(f"LoRA of rank 4 trains {lora['parameters'] / full['parameters']:.0%} of the parameters and "
                        f"reaches {statistics.mean(lora['dialect']):.0%}, full fine-tuning "
                        f"{statistics.mean(full['dialect']):.0%} ({beyond} seed noise)", 4.8)
    axes = figure.subplots()
    rows = sorted(found.items(), key=lambda item: item[1]["parameters"])
    for y, (_, row) in enumerate(rows):
        colour, marker = ("#0072B2", "o") if all(row["same"]) else ("#E69F00", "s")
        axes.plot([min(row["dialect"]), max(row["dialect"])], [y, y], color=colour, clip_on=False)
        axes.plot(statistics.mean(row["dialect"]), y, marker, color=colour, markersize=9, clip_on=False)
    axes.set_yticks(range(len(rows)), [f"{method}: {row['parameters']:,}" for method, row in rows])
    axes.axvline(untouched, color="#707070", linestyle="--", linewidth=1.5)
    axes.text(untouched + 0.01, len(rows) - 1, "base, untrained in the dialect", color="#707070", fontsize=11,
              verticalalignment="center")
    axes.set(xlabel="exact match in the dialect, mean and range", xlim=(0, 1), ylabel="method: trained parameters")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="x")
    axes.plot([], [], "o", color="#0072B2", markersize=9, label="added; the base stays intact")
    axes.plot([], [], "s", color="#E69F00", markersize=9, label="overwrites the base's parameters")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=2, fontsize=11)
    return figure


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def main() -> None:
    """The table of methods, the table of dialects, the picture."""
    steps_per_epoch = math.ceil(len(make_splits().train) / BASE_BATCH_SIZE)
    total = BASE_EPOCHS * steps_per_epoch + NUM_STEPS * (len(METHODS) * (len(LEARNING_RATES) + len(SEEDS)) + 2)
    with tqdm(total=total, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        base = build(bar)
        found = measure(base, bar)
        table, changed = measure_two(base, "LoRA, rank 4", found["LoRA, rank 4"]["rate"], bar)

    tests = make_splits().test[:NUM_TESTS]
    floor = statistics.mean(units_first(words) == words for words in map(number_to_words, tests))
    print(f"\nFINE-TUNED on {NUM_EXAMPLES:,} names with units before tens, {NUM_STEPS} steps of {BATCH_SIZE}\n"
          f"exact match on {len(tests)} held-out numbers, mean of {len(SEEDS)} seeds (range)\n"
          f"in, out: exact match in English with the trained part in place, and with it removed\n\n"
          f"  {'':18}{'trained':>9}{'bytes':>10}{'rate':>8}{'dialect':>25}{'in':>8}{'out':>8}")
    untouched = exact_match(base, "units first", tests)
    print(f"  {'base':18}{0:9}{0:10}{'':8}{untouched:>25.1%}{exact_match(base, 'English', tests):8.1%}")
    for method, row in found.items():
        print(f"  {method:18}{row['parameters']:9,}{row['bytes']:10,}{row['rate']:8.0e}{spread(row['dialect']):>25}"
              f"{statistics.mean(row['English']):8.1%}{statistics.mean(row['out']):8.1%}")
    full = found["full fine-tuning"]["dialect"]
    others = {method: row["dialect"] for method, row in found.items() if row["dialect"] is not full}
    equal = [method for method, values in others.items() if not differ(values, full)]
    above = [method for method, values in others.items() if min(values) > max(full)]
    say(f"Within seed noise of full fine-tuning (the ranges overlap): {'; '.join(equal) or 'none'}. Above it: "
        f"{'; '.join(above) or 'none'}.")
    below = [method for method, row in found.items() if statistics.mean(row["dialect"]) < untouched]
    edge = [method for method, row in found.items() if row["rate"] in (LEARNING_RATES[0], LEARNING_RATES[-1])]
    say(f"Worse in the dialect than the base without any training: {'; '.join(below) or 'none'}. Best at the lowest "
        f"or highest learning rate tried, so perhaps better still beyond it: {'; '.join(edge) or 'none'}.")
    say(f"{floor:.1%} of the names are the same in both languages: the score in one of a perfect model of the other.")
    exact = [method for method, row in found.items() if all(row["same"])]
    say(f"With the trained part removed, the logits are bit-identical to the base's: {'; '.join(exact) or 'none'}. "
        "The others overwrite parameters of the base; undoing that requires the old values, as many bytes again.")

    print("\nTWO DIALECTS, one base and a LoRA adapter of rank 4 for each: exact match by language\n\n  "
          + " " * 18 + "".join(f"{language:>14}" for language in LANGUAGES))
    for name, shares in table.items():
        print(f"  {name:18}" + "".join(f"{share:14.1%}" for share in shares.values()))
    both = LANGUAGES["both"]
    alone = [statistics.mean(LANGUAGES[one](words) == both(words) for words in map(number_to_words, tests))
             for one in ("units first", "no one")]
    say(f"Merged into the weights, the adapter changes no logit by more than {changed:.0e}. Both merged together, "
        f"a combination that was never trained, name {table['+ both']['both']:.1%} of the numbers with both rules (one "
        f"seed). A perfect model of one rule alone would reach {alone[0]:.1%} or {alone[1]:.1%}.")
    save_figure(draw(found, untouched), FIGURE)


if __name__ == "__main__":
    run_script(main)
