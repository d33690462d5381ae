"""mixture_of_experts.py - many feed-forward networks, of which each token uses one or two.

The problem. In a dense model every token passes through every weight, so a model that stores more also computes more,
for every token. Yet most of what a model stores is of no use for the token at hand.

The idea. Replace each feed-forward network with E of them, the experts, and a router: a linear layer with a softmax
that assigns each token a probability p_i for each expert. Only the k most probable experts process the token, and
their outputs are summed with weights g_i, the gates:

    p = softmax(router(x))                 y = sum of g_i * FFN_i(x) over the k chosen experts
    top-1 (Switch)    g = p of the chosen expert
    top-2 (Mixtral)   g_i = p_i / (p_1 + p_2), which equals a softmax over the two largest logits alone

Total parameters grow with E, active parameters and multiply-adds per token with k. On paper, with probabilities 0.6,
0.3 and 0.1:

>>> choose_experts(torch.tensor([[0.6, 0.3, 0.1]]), top_k=1)
(tensor([[0.6000]]), tensor([[0]]))
>>> choose_experts(torch.tensor([[0.6, 0.3, 0.1]]), top_k=2)
(tensor([[0.6667, 0.3333]]), tensor([[0, 1]]))

Balance. Only chosen experts are trained, so an expert that is chosen early improves early and is chosen more often.
Shazeer et al. (section 4) saw routers converge to the same few experts for all tokens. The usual remedy is an auxiliary
loss in each layer:

    loss = cross-entropy + BALANCE * sum over layers of (E * sum_i f_i P_i)
    f_i: share of the choices that went to expert i        P_i: mean probability of expert i
    its value is 1 if f or P is uniform, and E / k if the same k experts get every token with certainty

Capacity. Experts on different devices wait for the busiest one, and their input buffers have a fixed size. So an
expert processes at most capacity = ceil(capacity_factor * k * N / E) of the N tokens in a batch. The rest are dropped:
only the residual connection carries them past the layer. First choices are served before second choices, earlier
tokens before later ones. Padding is never routed: it would fill the buffers and distort the balance.

A capacity makes a token's output depend on the other texts in its batch and, through later tokens' first choices, on
the future. So here it applies in training only, and a prompt gets the same answer alone and in a batch. Real systems
differ: Switch keeps a capacity at inference, a larger one; Mixtral's published code has none; DeepSeek-V3 drops no
tokens in training or at inference.

Papers: Shazeer et al. 2017 (section 2.1, and 4 for balancing); Lepikhin et al. 2020 (GShard, section 2.2: top-2,
capacity); Fedus et al. 2021 (Switch, section 2.1 for top-1, 2.2 for capacity and loss); Jiang et al. 2024 (Mixtral,
section 2.1); Jelassi et al. 2024 ("Mixture of Parrots": experts help memorization more than reasoning). Simplified: no
noise on the router's logits, and all experts on one device, in a Python loop over experts where large systems run one
grouped matrix product. That loop has overhead of its own: compare the columns for work and for time.

What you will see (about three minutes on two CPU cores): two tasks. FACTS assign a random word to each number, so they
can only be memorized; NAMES, the base model's task, follow a rule. Dense models with the same active and with the same
total parameters against top-1 and top-2 routing, with and without balancing and capacity; the load of the experts over
training; and which expert takes which word and digit, in figures/variations/mixture_of_experts.png.
"""

import math
import random
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from toy_dataset import DIGITS, IGNORE, TOKEN_TO_ID, VOCABULARY, WORDS, InputError, Splits, run_script, to_ids

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

NUM_EXPERTS = 8           # E, in each layer. Try 2, 32
BALANCE = 0.01            # weight of the balancing loss, as in Switch. Try 1: what does perfect balance cost?
CAPACITY_FACTOR = 1.0     # of the rows with a capacity: 1 has room for perfect balance only. Try 1.25, 2

D_MODEL = 32              # small, so that most parameters are in the experts. Try 64
D_FF = 16                 # inner width of one expert, and of the dense model with the same active parameters
NUM_HEADS = 2
SEEDS = (0, 1, 2)         # of initial weights, facts and order of batches

# Of 8e-3, 1.6e-2 and 2.4e-2, tried with two seeds, the learning rate of each task is the best for each of its rows (for
# the names the highest tried, so perhaps not the best there is).
NUM_FACTS = 1500          # numbers with a random word. Try 500, 6000: when does which model run out of space?
FACT_EPOCHS = 50
FACT_BATCH_SIZE = 250
FACT_LEARNING_RATE = 1.6e-2
NAME_EPOCHS = 3           # passes over the base's training numbers
NAME_BATCH_SIZE = 128
NAME_LEARNING_RATE = 2.4e-2
TIMED_STEPS = 9           # of each row, for the median
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "mixture_of_experts.png"

# ======================================================================================================
# THE EXCHANGED PART
# ======================================================================================================


def choose_experts(probabilities, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (N, E) -> gates and chosen experts, both (N, k), the most probable expert first.

    Choosing has no gradient, so the router learns only through the gates. That is why top-1 keeps the probability: a
    single gate divided by its own sum would always be 1, with gradient 0.
    """
    gates, chosen = probabilities.topk(top_k, dim=-1)                                   # (N, k), (N, k)
    if top_k > 1:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return gates, chosen


def balance_loss(probabilities, chosen) -> torch.Tensor:
    """E * sum_i f_i P_i  (Switch, equation 4). Probabilities (N, E), chosen experts (N, k) -> a scalar.

    Counting has no gradient, so f acts as a constant: each expert's probability is pushed down in proportion to its
    load.

    >>> even, one = torch.tensor([[0.8, 0.2], [0.2, 0.8]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> [balance_loss(p, choose_experts(p, top_k=1)[1]).item() for p in (even, one)]
    [1.0, 2.0]

    1 is the value for uniform routing, not a lower bound. With narrow choices of one expert and clear choices of
    another it is lower:

    >>> narrow = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.01, 0.99]])
    >>> round(balance_loss(narrow, choose_experts(narrow, top_k=1)[1]).item(), 2)
    0.9
    """
    E = probabilities.size(1)
    f = torch.bincount(chosen.flatten(), minlength=E) / chosen.numel()                  # (E)
    P = probabilities.mean(dim=0)                                                       # (E)
    return E * (f * P).sum()


class AddLoss(torch.autograd.Function):
    """Returns x unchanged; its backward pass also minimizes `loss`, as if it had been added to the training loss.

    In a training loop of your own, add the layers' losses to the cross-entropy and skip this class. Here
    decoder_only.train stays as it is. All that adding a term to a loss does to the gradients is to start a backward
    pass from that term with d(a + b)/db = 1, and that can happen anywhere in the graph. (Megatron-LM does it this way
    too.) The loss that train reports remains the cross-entropy, comparable with that of a dense model. With gradient
    accumulation, divide BALANCE by the number of micro-batches.
    """

    @staticmethod
    def forward(ctx, x, loss):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.new_ones(())


class MixtureOfExperts(nn.Module):
    """In place of decoder_only.FeedForward: E of them, of which each token uses top_k."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int, top_k: int, balance: float,
                 capacity_factor: float | None):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k = {top_k} experts cannot be chosen out of {num_experts}.")
        self.top_k, self.balance, self.capacity_factor = top_k, balance, capacity_factor
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.experts = nn.ModuleList(decoder_only.FeedForward(d_model, d_ff) for _ in range(num_experts))
        self.experts.apply(decoder_only.init_weights)
        # A list, to which each pass appends its probabilities (N, E), choices (N, k) and number of dropped choices.
        self.log = None

    def forward(self, x, real):
        """x (B, T, C) -> (B, T, C). real (B, T): True where a token stands; at padding the output is 0."""
        tokens = x[real]                                                                # (N, C): one list, no padding
        probabilities = self.router(tokens).softmax(dim=-1)                             # (N, E)
        gates, chosen = choose_experts(probabilities, self.top_k)                       # (N, k), (N, k)
        capacity = None
        if self.training:
            gates = AddLoss.apply(gates, self.balance * balance_loss(probabilities, chosen))
            if self.capacity_factor is not None:
                capacity = math.ceil(self.capacity_factor * chosen.numel() / len(self.experts))
        mixed, processed = torch.zeros_like(tokens), 0
        for e, expert in enumerate(self.experts):
            # The tokens that chose e, and whether e is their first choice or second. In the transpose, all first
            # choices precede all second ones; the capacity cuts off the end of this list.
            rank, token = (chosen.T == e).nonzero(as_tuple=True)                        # (n), (n)
            rank, token = rank[:capacity], token[:capacity]
            # y += g_e * FFN_e(x), for all tokens of this expert at once.
            mixed = mixed.index_add(0, token, gates[token, rank, None] * expert(tokens[token]))
            processed += len(token)
        if self.log is not None:
            self.log.append((probabilities.detach(), chosen, chosen.numel() - processed))
        output = torch.zeros_like(x)
        output[real] = mixed
        return output                                                                   # (B, T, C)


class MixtureLayer(decoder_only.DecoderLayer):
    """decoder_only.DecoderLayer, except that the experts get to know which positions are padding.

    A dense feed-forward network need not know: nothing reads its output there. But padding that is routed would count
    in the balancing loss and take up capacity.
    """

    def forward(self, x, mask, cache=None, attention_maps=None):
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache, attention_maps))
        # The last position may attend to all positions but padding, so the last row of the mask is the padding mask.
        # With a cache the mask covers S positions and x the last T of them.
        real = mask[:, 0, -1, -x.size(1):]                                              # (B, T)
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x), real))
        return x


# ======================================================================================================
# THE EXCHANGE
# ======================================================================================================


def exchange(model, num_experts: int, top_k: int, balance: float = BALANCE, capacity_factor: float | None = None):
    """Turn each feed-forward network of a decoder-only model into expert 0 of a mixture, in place; returns the model.

    The other experts have the same sizes and new weights.
    """
    for layer in model.layers:
        d_ff, d_model = layer.feed_forward.expand.weight.shape
        mixture = MixtureOfExperts(d_model, d_ff, num_experts, top_k, balance, capacity_factor)
        mixture.experts[0] = layer.feed_forward
        layer.feed_forward = mixture.to(layer.attention_norm.weight.device).train(layer.training)
        layer.__class__ = MixtureLayer  # the same modules, another forward
    return model


class Setting(NamedTuple):
    """One row: a dense model of width d_ff, or a mixture of experts of that width."""

    d_ff: int
    top_k: int | None = None               # None: dense
    balance: float = BALANCE
    capacity_factor: float | None = None


def make_rows() -> dict[str, Setting]:
    """All rows of the experiment. The dense models match the active parameters of top-1, of top-2, and the total."""
    rows = {
        "dense, active size of top-1": Setting(D_FF),
        "dense, active size of top-2": Setting(2 * D_FF),
        "dense, total size": Setting(NUM_EXPERTS * D_FF),
    }
    for top_k in (1, 2):
        rows[f"top-{top_k}"] = Setting(D_FF, top_k)
        rows[f"top-{top_k}, not balanced"] = Setting(D_FF, top_k, 0.0)
    rows["top-1, capacity"] = Setting(D_FF, 1, BALANCE, CAPACITY_FACTOR)
    rows["top-1, capacity, not balanced"] = Setting(D_FF, 1, 0.0, CAPACITY_FACTOR)
    return rows


NAME_ROWS = ("dense, active size of top-1", "dense, total size", "top-1")  # the rows that are trained on names as well


def build(setting: Setting, seed: int):
    """A new model for one row."""
    torch.manual_seed(seed)
    model = decoder_only.build_model(d_model=D_MODEL, d_ff=setting.d_ff, num_heads=NUM_HEADS)
    if setting.top_k is not None:
        exchange(model, NUM_EXPERTS, setting.top_k, setting.balance, setting.capacity_factor)
    return model


def mixtures(model) -> list[MixtureOfExperts]:
    """The mixture of each layer; of a dense model, none."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def make_facts(seed: int) -> Splits:
    """Numbers of four digits, each with a random word: `<SOS> 3 4 2 7 <SEP> -> seven`. No rule, nothing held out.

    Returns one training batch per step, and a batch of all facts to test what was memorized.
    """
    draw = random.Random(seed)
    numbers = draw.sample(range(1000, 10000), NUM_FACTS)
    texts = torch.tensor([to_ids(["<SOS>", *str(number), "<SEP>", draw.choice(WORDS)]) for number in numbers])
    ids, targets = texts[:, :-1], texts[:, 1:].clone()                                  # (NUM_FACTS, 6)
    targets[:, :-1] = IGNORE                                                            # only the word is predicted
    order = torch.Generator().manual_seed(seed)
    batches = [{"ids": ids[rows], "targets": targets[rows]} for _ in range(FACT_EPOCHS)
               for rows in torch.randperm(NUM_FACTS, generator=order).split(FACT_BATCH_SIZE)]
    everything = [{"ids": ids, "targets": targets}]
    return Splits(batches, everything, everything)


def active_parameters(model) -> int:
    """The number of parameters that one token uses: all, except those of the experts that it does not choose."""
    idle = sum(sum(p.numel() for p in mixture.experts[:len(mixture.experts) - mixture.top_k].parameters())
               for mixture in mixtures(model))
    return sum(p.numel() for p in model.parameters()) - idle


@torch.no_grad()  # in inference mode older versions of PyTorch count nothing
def work_per_token(model, ids) -> float:
    """Multiply-adds of a forward pass per token, in matrix products, as counted by PyTorch. ids (B, T) without padding.
    """
    with FlopCounterMode(display=False) as counter:
        model.eval()(ids.to(model.embedding.weight.device))
    return counter.get_total_flops() / 2 / ids.numel()                                  # a multiply-add is two FLOPs


def time_steps(rows: dict[str, Setting], batch) -> dict[str, float]:
    """Median milliseconds of a training step. The rows take turns, so that a busy moment slows all of them."""
    models = {row: build(setting, 0) for row, setting in rows.items()}
    optimizers = {row: decoder_only.create_optimizer(model) for row, model in models.items()}
    times = {row: [] for row in rows}
    for _ in range(TIMED_STEPS):
        for row, model in models.items():
            start = time.perf_counter()
            decoder_only.train_step(model, batch, optimizers[row], 0.0)  # its .item() waits for a GPU
            times[row].append(1000 * (time.perf_counter() - start))
    return {row: statistics.median(times[row]) for row in rows}


def loads_of(mixture) -> torch.Tensor:
    """The share of the choices that went to each expert, by tenth of training: (10, E)."""
    loads = torch.stack([torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS) / chosen.numel()
                         for _, chosen, _ in mixture.log])                              # (steps, E)
    return torch.stack([tenth.mean(dim=0) for tenth in loads.tensor_split(10)]).cpu()


def measure(rows: dict[str, Setting], bar) -> dict[str, dict]:
    """For each row: sizes, work and time; by seed, facts recalled; by seed and layer, what the experts did."""
    milliseconds, found = time_steps(rows, make_facts(0).train[0]), {}
    for row, setting in rows.items():
        found[row] = line = {"ms": milliseconds[row], "recalled": [], "loads": [], "balance": [], "dropped": []}
        for seed in SEEDS:
            facts, model = make_facts(seed), build(setting, seed)
            for mixture in mixtures(model):
                mixture.log = []
            decoder_only.train(model, facts, 1, FACT_LEARNING_RATE, num_evaluations=0, progress=bar)
            for mixture in mixtures(model):
                line["loads"].append(loads_of(mixture))
                line["balance"] += [balance_loss(p, chosen).item() for p, chosen, _ in mixture.log[-10:]]
                line["dropped"] += [dropped / chosen.numel() for _, chosen, dropped in mixture.log]
                mixture.log = None
            line["recalled"].append(decoder_only.evaluate(model, facts.test)["exact_match"])
        line["total"] = sum(p.numel() for p in model.parameters())
        line["active"], line["work"] = active_parameters(model), work_per_token(model, facts.test[0]["ids"][:100])
    return found


@torch.inference_mode()
def count_choices(model, batch) -> torch.Tensor:
    """How often each token of the vocabulary has each expert as its first choice, by layer: (layers, V, E)."""
    ids, counts = batch["ids"], []
    for mixture in mixtures(model):
        mixture.log = []
    model.eval()(ids.to(model.embedding.weight.device))
    tokens = ids[ids != decoder_only.PAD_ID]                                            # (N), in the order of the log
    for mixture in mixtures(model):
        (_, chosen, _), = mixture.log
        pairs = tokens * NUM_EXPERTS + chosen[:, 0].cpu()
        counts.append(torch.bincount(pairs, minlength=len(VOCABULARY) * NUM_EXPERTS).view(-1, NUM_EXPERTS))
        mixture.log = None
    return torch.stack(counts)


def measure_names(rows: dict[str, Setting], bar) -> tuple[dict[str, list[float]], torch.Tensor]:
    """Exact match on held-out names by seed, and count_choices of the first top-1 model on held-out numbers."""
    exact, choices = {row: [] for row in NAME_ROWS}, None
    for seed in SEEDS:
        for row in NAME_ROWS:
            loaders = decoder_only.create_dataloaders(NAME_BATCH_SIZE, seed, loss_on_prompt=False)
            model = build(rows[row], seed)
            decoder_only.train(model, loaders, NAME_EPOCHS, NAME_LEARNING_RATE, num_evaluations=0, progress=bar)
            exact[row].append(decoder_only.evaluate(model, loaders.test)["exact_match"])
            if row == "top-1" and choices is None:
                choices = count_choices(model, next(iter(loaders.test)))
    return exact, choices


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


def predictable(choices) -> list[tuple[float, float]]:
    """By layer: how often the best guess of a token's expert is right, knowing the token, and knowing nothing."""
    return [((counts.max(dim=1).values.sum() / counts.sum()).item(), (counts.sum(dim=0).max() / counts.sum()).item())
            for counts in choices]


def busiest(line: dict) -> list[float]:
    """The share of the choices that the busiest expert of a layer has in each tenth of training: mean over layers and
    seeds."""
    return torch.stack(line["loads"]).max(dim=2).values.mean(dim=0).tolist()            # (10)


def draw(choices) -> Figure:
    """Heat maps of tokens by experts: words in the first and the last layer, digits in the first.

    What the last layer computes at the digits is never read: no later layer attends to it, and the loss is on names.
    """
    known = [f"{by_token:.0%} of cases in layer {i}" for i, (by_token, _) in enumerate(predictable(choices), start=1)]
    figure = new_figure(f"The token alone predicts its expert in {' and '.join(known)}", 7.4)
    panels = figure.subplot_mosaic([["words", "later", "digits"], ["words", "later", "bar"]], height_ratios=[14, 15])
    for name, layer, tokens in (("words", 0, WORDS), ("later", -1, WORDS), ("digits", 0, [*DIGITS, "<SOS>", "<SEP>"])):
        tokens = [token for token in tokens if choices[0][TOKEN_TO_ID[token]].any()]    # `zero` is never held out
        counts = choices[layer][[TOKEN_TO_ID[token] for token in tokens]]               # (tokens, E)
        shares, axes = counts / counts.sum(dim=1, keepdim=True), panels[name]
        image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set(title=f"layer {layer % len(choices) + 1}", xlabel="expert", xticks=range(NUM_EXPERTS),
                 yticks=range(len(tokens)), xticklabels=range(1, NUM_EXPERTS + 1))
        axes.set_yticklabels(tokens if name != "later" else [])
        axes.tick_params(length=0, labelsize=11)
    panels["bar"].axis("off")
    figure.colorbar(image, ax=panels["bar"], location="top", fraction=0.1, label="share of its choices",
                    format=lambda share, _: f"{share:.0%}", ticks=[0, 0.5, 1])
    return figure


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def compare(row: str, other: str, values: dict[str, list[float]]) -> str:
    """The difference of two rows in points of accuracy, and whether it exceeds seed noise."""
    points = 100 * (statistics.mean(values[row]) - statistics.mean(values[other]))
    noise = "beyond" if differ(values[row], values[other]) else "within"
    return f"{points:+.1f} points against {other} ({noise} seed noise)"


def show_facts(found: dict[str, dict]) -> None:
    """The table of facts, and what the experts bring and cost."""
    print(f"\nFACTS: {NUM_FACTS:,} numbers with a random word each, seen {FACT_EPOCHS} times; {NUM_EXPERTS} experts of "
          f"width {D_FF}\nparameters in all and active for one token; multiply-adds per token; milliseconds per step;\n"
          f"words recalled ({1 / len(WORDS):.1%} by guessing), mean of {len(SEEDS)} seeds (range); choices dropped\n\n"
          f"  {'':31}{'total':>8}{'active':>8}{'work':>8}{'ms':>7}{'recalled':>24}{'dropped':>9}")
    for row, line in found.items():
        dropped = f"{statistics.mean(line['dropped']):9.1%}" if line["dropped"] else ""
        print(f"  {row:31}{line['total']:8,}{line['active']:8,}{line['work']:8,.0f}{line['ms']:7.1f}"
              f"{spread(line['recalled']):>24}{dropped}")
    recalled = {row: line["recalled"] for row, line in found.items()}
    for top_k in (1, 2):
        row, dense = f"top-{top_k}", f"dense, active size of top-{top_k}"
        say(f"Top-{top_k}, facts recalled: {compare(row, dense, recalled)}; "
            f"{compare(row, 'dense, total size', recalled)}. It does {found[row]['work'] / found[dense]['work']:.2f} "
            f"times the multiply-adds of the first in {found[row]['ms'] / found[dense]['ms']:.1f} times its time.")
    for row, other in (("top-1, not balanced", "top-1"), ("top-2, not balanced", "top-2"), ("top-1, capacity", "top-1"),
                       ("top-1, capacity, not balanced", "top-1, not balanced")):
        say(f"{row.capitalize()}, facts recalled: {compare(row, other, recalled)}.")


def show_loads(found: dict[str, dict]) -> None:
    """The load of the experts over training, and whether the router collapsed."""
    print(f"\nLOAD of a layer's busiest expert by tenth of training, mean of layers and seeds (uniform: "
          f"{1 / NUM_EXPERTS:.1%})\nloss: the balancing loss at the end, 1 if uniform, {NUM_EXPERTS} (top-1) or "
          f"{NUM_EXPERTS / 2:g} (top-2) if collapsed\n"
          "starved: experts with less than a tenth of the uniform load, in the first tenth and in the last\n\n"
          f"  {'':31}{'first':>8}{'second':>8}{'fourth':>8}{'last':>8}{'loss':>8}{'starved':>20}")
    starved = {}
    for row, line in found.items():
        if line["loads"]:
            loads = torch.stack(line["loads"])                                          # (seeds * layers, 10, E)
            early, late = starved[row] = (loads[:, [0, -1]] < 0.1 / NUM_EXPERTS).sum(dim=(0, 2)).tolist()
            first, second, _, fourth, *_, last = busiest(line)
            print(f"  {row:31}{first:8.1%}{second:8.1%}{fourth:8.1%}{last:8.1%}{statistics.mean(line['balance']):8.2f}"
                  f"{early:10} and{late:3} of {loads[:, 0].numel()}")

    print(f"\n  All experts of layer 1, seed {SEEDS[0]}, in the order of their load at the end\n")
    for row in ("top-1", "top-1, not balanced"):
        tenths = found[row]["loads"][0]                                                 # (10, E)
        for name, tenth in (("first", 0), ("second", 1), ("fourth", 3), ("last", 9)):
            loads = tenths[tenth, tenths[-1].argsort(descending=True)]
            print(f"  {row:20}{name:>7} tenth" + "".join(f"{load:8.1%}" for load in loads))
    for top_k in (1, 2):
        balanced, free = f"top-{top_k}", f"top-{top_k}, not balanced"
        (first, *_, last), (balanced_first, *_, balanced_last) = busiest(found[free]), busiest(found[balanced])
        half = NUM_EXPERTS * len(found[free]["loads"]) / 2
        verdict = ("a collapse" if starved[free][1] > half else
                   "a collapse that training undoes" if starved[free][0] > half else "no collapse")
        say(f"Top-{top_k} without balancing: the busiest expert has {first:.1%} of the choices in the first tenth of "
            f"training and {last:.1%} in the last (balanced: {balanced_first:.1%} and {balanced_last:.1%}). "
            f"{starved[free][0]} of {2 * half:.0f} experts starve in the first tenth and {starved[free][1]} in the "
            f"last. Calling it a collapse if more than half do: {verdict}.")


def main() -> None:
    """Facts, loads, names, and the picture."""
    if len(make_facts(0).train) < 10:
        raise InputError(f"FACT_EPOCHS = {FACT_EPOCHS} is too few: the loads need at least 10 training steps.")
    if NUM_EXPERTS < 2 or not CAPACITY_FACTOR > 0 or not BALANCE >= 0:
        raise InputError(f"NUM_EXPERTS = {NUM_EXPERTS} must be at least 2, CAPACITY_FACTOR = {CAPACITY_FACTOR} above "
                         f"0, and BALANCE = {BALANCE} at least 0.")
    rows = make_rows()
    name_steps = NAME_EPOCHS * len(decoder_only.create_dataloaders(NAME_BATCH_SIZE, 0).train)
    total = len(SEEDS) * (len(rows) * len(make_facts(0).train) + len(NAME_ROWS) * name_steps)
    with tqdm(total=total, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        found = measure(rows, bar)
        exact, choices = measure_names(rows, bar)
    show_facts(found)
    show_loads(found)
    print(f"\nNAMES, {name_steps} steps: exact match on held-out numbers, mean of {len(SEEDS)} seeds (range)\n")
    for row, values in exact.items():
        print(f"  {row:31}{spread(values):>24}")
    say(f"Top-1, names: {compare('top-1', 'dense, active size of top-1', exact)}; "
        f"{compare('top-1', 'dense, total size', exact)}.")
    say("Which expert a token of a held-out name goes to (top-1, the first seed's model): "
        + "; ".join(f"in layer {i} the token predicts it in {by_token:.1%} of cases, and always guessing the busiest "
                    f"expert is right in {by_nothing:.1%}"
                    for i, (by_token, by_nothing) in enumerate(predictable(choices), start=1)) + ".")
    save_figure(draw(choices), FIGURE)


if __name__ == "__main__":
    run_script(main)
