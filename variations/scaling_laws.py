"""scaling_laws.py - loss by parameters and data: where it follows a power law, where not, and how to spend compute.

The problem. A large model is trained once. How many parameters N should it have, and how many tokens D should it be
trained on, if the budget is C = 6 N D floating-point operations? All one can do is train small models and extrapolate.

The idea. Over many orders of magnitude the loss of language models is close to a floor plus two power laws:

    loss(N, D) = E + (N0 / N)^alpha + (D0 / D)^beta

E is the entropy of the text, the lowest loss that any model can reach. The other terms are the cost of too few
parameters and of too little data. Fit the constants to small runs, minimize the loss subject to 6 N D = C, and train
only the model that comes out. On paper: with equal exponents N and D grow equally, each tenfold for a hundred times the
budget.

>>> law = Law(E=0.0, N0=100.0, alpha=0.5, D0=100.0, beta=0.5)
>>> [compute_optimal(law, C) for C in (6e6, 6e8)]
[(1000.0, 1000.0), (10000.0, 10000.0)]

Why should there be a power law at all? Compare two languages:

Names. The decoder names numbers (342: three hundred forty two). One algorithm names them all, so a model that has
learned it has nothing left to learn.

Nicknames. Each of NUM_FACTS facts has one of 32 nicknames, drawn at random once. No fact says anything about another,
so each has to be seen. Their frequencies have a long tail, as those of words do (Zipf's law): p_k = k^-(1+a) / Z. After
D draws, even a learner that never forgets, with room for the `rows` most frequent facts, has to guess the nickname of
a fact that it has not seen or has no room for. Its expected loss can be computed:

    ideal = ln 32 * [sum over k <= rows of p_k (1 - p_k)^D + sum over k > rows of p_k]

(1 - p_k)^D switches from 0 to 1 where p_k is about 1 / D, which is at k ~ D^(1/(1+a)), and the facts beyond k have a
total probability of about k^-a. So the loss falls as D^(-a/(1+a)) and as rows^-a. These are power laws because many
small things are learned one by one, the most frequent first (Hutter 2021; Michaud et al. 2023 call them quanta). On
paper, for two facts with p = 3/4 and 1/4 and two draws, the unseen share is 3/4 * (1/4)^2 + 1/4 * (3/4)^2 = 12/64:

>>> round(ideal_loss(torch.tensor([0.75, 0.25], dtype=torch.float64), rows=2, D=2) / math.log(NUM_NICKNAMES), 4)
0.1875

An embedding and a linear layer learn the nicknames, not the transformer: the input is a single token, so there is
nothing to attend to and nothing to generalize, only facts to store. It also trains in seconds.

In both languages the input determines the answer, so E is 0. It is computed here, not fitted. For real text E is
unknown and has to be fitted as well, and the fitted exponents depend on it.

What carries over to real language: the form of the law, the fit, the closed-form optimum, and the long tail as a likely
cause. What does not: the exponents and the ratio of D to N. Here they follow from a. For text, Kaplan et al. found that
the optimal N grows as C^0.73, Hoffmann et al. as C^0.5, with about 20 tokens per parameter; later work traces the
difference to how parameters were counted and to learning rates and schedules. Also, C = 6 N D assumes that each token
uses all parameters. A dense transformer does; a table reads one row, so here the budget is a price that we set.

Papers: Kaplan et al. 2020, sections 3 and 4; Hoffmann et al. 2022, section 3.3 (approach 3); Hutter 2021 ("Learning
Curve Theory"); Michaud et al. 2023 ("The Quantization Model of Neural Scaling"). Simplified: a small table holds the
most frequent facts by construction, where a network would have to find out which ones to store; the names' held-out
numbers have three digits or more, the training numbers one or more.

What you will see (under three minutes on two CPU cores): the loss by N and D for both languages, beside the computed
loss; the fitted constants, with their ranges over seeds; how well the law predicts a run larger than all that it was
fitted to; the optimal N for three budgets, tested by training smaller and larger tables. Writes
figures/variations/scaling_laws.png.
"""

import math
import random
import statistics
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from toy_dataset import MAX_DIGITS, VOCABULARY, InputError, NumberDataset, decoder_only_example, make_splits, pad_batch
from toy_dataset import run_script

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- nicknames ---
TAILS = (0.5, 1.0)        # a, in p_k ~ k^-(1+a). Try 0.25, a longer tail, or 3.0: does a law remain?
NUM_FACTS = 2**20         # many more than are ever learned: a language that ends bends the law
NUM_NICKNAMES = 32        # guessing costs ln 32 = 3.47 nats
ROWS = (8, 32, 128, 512, 2048)                  # sizes of the table
DRAWS = (512, 2048, 8192, 32768, 131072)        # D: multiples of BATCH_SIZE, ascending
WIDTH = 16                # of an embedding. Try 32: slightly lower losses for small D, twice the parameters
TABLE_LEARNING_RATE = 0.5 # of Adagrad, for all sizes. 0.1 is too slow; 0.3 and 1.0 are about as good

# --- names ---
D_MODELS = (4, 8, 16, 32, 64)                   # widths of the decoder
NAMES = (320, 1280, 5120, 20480)                # D: numbers to train on, each used once

# --- both ---
BATCH_SIZE = 32
SEEDS = (0, 1, 2)         # of weights, draws and nicknames
HUBER = 1e-3              # where the Huber loss of the fit turns linear, as in Hoffmann et al.
BUDGETS = (1e7, 1e8, 1e9) # C = 6 N D. Try 1e10: beyond the range of D that was fitted, and slower to test
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "scaling_laws.png"

# ======================================================================================================
# THE LAW
# ======================================================================================================


class Law(NamedTuple):
    """loss(N, D) = E + (N0 / N)^alpha + (D0 / D)^beta. Hoffmann et al. write A = N0^alpha and B = D0^beta."""

    E: float
    N0: float
    alpha: float
    D0: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        return self.E + (self.N0 / N) ** self.alpha + (self.D0 / D) ** self.beta


def fit_law(runs: list[tuple[float, float, float]], E: float) -> Law:
    """The law that fits runs (N, D, loss) best, with the floor E given: Hoffmann et al., equation 3.

    Minimizes the Huber loss between log(predicted - E) and log(measured - E), so that runs count equally at all scales
    and outliers count little. The problem is not convex: L-BFGS starts at several points, and the best result is kept.
    """
    N, D, loss = torch.tensor(runs, dtype=torch.float64).T                              # (R) each
    target = (loss - E).log()
    # Around their means, logarithms make intercept and slope nearly independent, which L-BFGS needs.
    x, y = N.log() - N.log().mean(), D.log() - D.log().mean()
    best_error, best = math.inf, None
    for start in [(0.1, 0.1), (0.1, 1.0), (1.0, 0.1), (1.0, 1.0)]:
        # Exponents as exp(.), so that they stay positive.
        theta = torch.tensor([target.mean() - 1, math.log(start[0]), target.mean() - 1, math.log(start[1])],
                             dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def closure(theta=theta, optimizer=optimizer):
            optimizer.zero_grad()
            terms = torch.stack([theta[0] - theta[1].exp() * x, theta[2] - theta[3].exp() * y])     # (2, R)
            # log of a sum of two exponentials: log[(N0 / N)^alpha + (D0 / D)^beta]
            error = F.huber_loss(terms.logsumexp(dim=0), target, delta=HUBER, reduction="sum")
            error.backward()
            return error

        optimizer.step(closure)
        error = closure().item()
        if error < best_error:
            best_error, best = error, theta.detach().tolist()
    alpha, beta = math.exp(best[1]), math.exp(best[3])
    # The intercept at the mean of ln N is alpha * (ln N0 - mean).
    return Law(E, math.exp(best[0] / alpha + N.log().mean()), alpha, math.exp(best[2] / beta + D.log().mean()), beta)


def compute_optimal(law: Law, C: float) -> tuple[float, float]:
    """N and D that minimize the law under 6 N D = C: Hoffmann et al., equation 4.

    At the minimum alpha (N0 / N)^alpha = beta (D0 / D)^beta: another percent of either saves the same loss. Hence

        N = G (C/6)^(beta / (alpha+beta)),  D = (C/6) / N,  G = (alpha N0^alpha / (beta D0^beta))^(1 / (alpha+beta))
    """
    alpha, beta = law.alpha, law.beta
    log_G = (math.log(alpha / beta) + alpha * math.log(law.N0) - beta * math.log(law.D0)) / (alpha + beta)
    N = math.exp(log_G + beta / (alpha + beta) * math.log(C / 6))
    return round(N, 6), round(C / 6 / N, 6)


def quality(law: Law, runs) -> tuple[float, float]:
    """R^2 of the logarithm of the loss above E, and the typical error as a factor: exp of the root mean square."""
    logs = [math.log(loss - law.E) for *_, loss in runs]
    errors = [math.log(law.loss(N, D) - law.E) - log for (N, D, _), log in zip(runs, logs)]
    square = statistics.mean(error**2 for error in errors)
    return 1 - square / statistics.pvariance(logs), math.exp(square**0.5)


# ======================================================================================================
# NICKNAMES: a language with a long tail
# ======================================================================================================


def probabilities(a: float) -> torch.Tensor:
    """p_k = k^-(1+a) / Z for k = 1 ... NUM_FACTS, in float64: the sums below need it."""
    p = torch.arange(1, NUM_FACTS + 1, dtype=torch.float64) ** -(1 + a)
    return p / p.sum()


def make_nicknames(seed: int) -> torch.Tensor:
    """The nickname of each fact, (NUM_FACTS), the same on every machine."""
    return torch.randint(NUM_NICKNAMES, (NUM_FACTS,), generator=torch.Generator().manual_seed(seed))


def draw_facts(p: torch.Tensor, D: int, seed: int) -> torch.Tensor:
    """D independent draws, (D): a uniform number falls into the k-th interval of the cumulative sum with p_k."""
    uniform = torch.rand(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.searchsorted(p.cumsum(0), uniform).clamp(max=len(p) - 1)  # the sum may round to below 1


def ideal_loss(p: torch.Tensor, rows: int, D: int) -> float:
    """Expected loss of a learner that remembers each of the `rows` first facts once seen, and guesses the others."""
    unseen = (p[:rows] * (1 - p[:rows]) ** D).sum() + p[rows:].sum()
    return math.log(NUM_NICKNAMES) * unseen.item()


class LookupTable(nn.Module):
    """Facts (B) -> logits of their nicknames (B, NUM_NICKNAMES). The first `rows` facts have a row each.

    All others share a last row, which is never trained, like <UNK> in a vocabulary of the most frequent words.
    """

    def __init__(self, rows: int):
        super().__init__()
        # sparse: the gradient holds the rows of the batch only, so that a step costs the same however long the table.
        self.embedding = nn.Embedding(rows + 1, WIDTH, padding_idx=rows, sparse=True)
        torch.sparse.check_sparse_tensor_invariants.disable()  # the default, made explicit to silence a warning
        self.output = nn.Linear(WIDTH, NUM_NICKNAMES, bias=False)
        # Zero vectors: what was never seen gets equal logits, and so costs ln 32 exactly.
        nn.init.zeros_(self.embedding.weight)

    def forward(self, facts):
        return self.output(self.embedding(facts.clamp(max=self.embedding.num_embeddings - 1)))  # (B, WIDTH) -> (B, 32)


def count_parameters(rows: int) -> int:
    """N: what grows. The output layer, equal for all, is left out, as Kaplan et al. left out the embeddings."""
    return WIDTH * rows


def train_table(a: float, rows: int, draws: tuple[int, ...], seed: int, bar) -> list[float]:
    """The loss over the whole language, exactly, after each number of draws.

    One epoch: every draw is new. The learning rate is constant, so that a run over 512 draws is the beginning of the
    run over 2048, and one run gives all D. With a decaying rate each D needs its own run with its own schedule: a
    long schedule cut short understates small D, which is what Hoffmann et al. criticized in Kaplan et al.
    """
    p, nicknames = probabilities(a), make_nicknames(seed)
    facts = draw_facts(p, draws[-1], seed)                                              # (D)
    torch.manual_seed(seed)
    model, losses = LookupTable(rows), []
    # Adagrad (Duchi et al. 2011) divides by the root of the sum of a weight's squared gradients: a row moves by a full
    # step when its fact is first seen, while the output layer, which every fact moves, settles. Made for rare features.
    optimizer = torch.optim.Adagrad(model.parameters(), lr=TABLE_LEARNING_RATE)
    for step, batch in enumerate(facts.split(BATCH_SIZE), start=1):
        loss = F.cross_entropy(model(batch), nicknames[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
        if step * BATCH_SIZE in draws:
            with torch.no_grad():
                known = F.cross_entropy(model(torch.arange(rows)), nicknames[:rows], reduction="none")      # (rows)
            # No sampling: every fact counts by its probability. Facts without a row cost ln 32.
            losses.append((p[:rows] @ known.double() + math.log(NUM_NICKNAMES) * p[rows:].sum()).item())
    return losses


# ======================================================================================================
# NAMES: the decoder
# ======================================================================================================


def draw_numbers(D: int, seed: int) -> list[int]:
    """D numbers to train on, none of them held out. Lengths from 1 to MAX_DIGITS take turns; short numbers recur."""
    rng, held_out, numbers = random.Random(seed), set(make_splits().validation), []
    while len(numbers) < D:
        length = 1 + len(numbers) % MAX_DIGITS
        number = rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)
        if number not in held_out:
            numbers.append(number)
    return numbers


def train_names(d_model: int, D: int, seed: int, bar) -> tuple[int, int, float]:
    """N, D, and the loss on held-out names (nats per word) of a decoder that has seen D numbers, once."""
    torch.manual_seed(seed)
    model = decoder_only.build_model(d_model=d_model, d_ff=4 * d_model)
    dataset = NumberDataset(draw_numbers(D, seed), partial(decoder_only_example, loss_on_prompt=False))
    held_out = decoder_only.create_dataloaders(BATCH_SIZE, seed, loss_on_prompt=False)
    loaders = held_out._replace(train=DataLoader(dataset, BATCH_SIZE, collate_fn=pad_batch))
    # Small models need larger rates. Each width was tried with 10,000 numbers and rates up to 3.2e-2, doubling them:
    # 64 is best at 8e-3, the narrower ones at 3.2e-2, the highest (32 only by a narrow margin; it gets half of that).
    rate = min(3.2e-2, 0.5 / d_model)
    decoder_only.train(model, loaders, 1, rate, num_evaluations=0, progress=bar)
    N = sum(parameter.numel() for parameter in model.parameters())
    return N, D, decoder_only.evaluate(model, loaders.validation)["loss"]


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def measure(bar) -> dict[str | float, list[list[tuple]]]:
    """Language ("names", or the a of nicknames) -> for each seed the runs (N, D, loss), N and D ascending."""
    found = {"names": [[train_names(d_model, D, seed, bar) for d_model in D_MODELS for D in NAMES] for seed in SEEDS]}
    for a in TAILS:
        found[a] = [[(count_parameters(rows), D, loss) for rows in ROWS
                     for D, loss in zip(DRAWS, train_table(a, rows, DRAWS, seed, bar))] for seed in SEEDS]
    return found


def mean_runs(runs_by_seed: list[list[tuple]]) -> list[tuple]:
    """The runs with their loss averaged over the seeds."""
    return [(*same[0][:2], statistics.mean(loss for *_, loss in same)) for same in zip(*runs_by_seed)]


def local_exponents(runs: list[tuple]) -> list[float]:
    """For the largest N, -d ln(loss) / d ln(D) between neighboring D: constant if the loss is a power law of D."""
    largest = max(N for N, *_ in runs)
    points = [(D, loss) for N, D, loss in runs if N == largest]
    return [math.log(loss / next_loss) / math.log(next_D / D)
            for (D, loss), (next_D, next_loss) in zip(points, points[1:])]


def extrapolate(runs: list[tuple]) -> tuple[float, float]:
    """Fit without the largest N and the largest D; returns the predicted and the measured loss of the largest run."""
    largest_N, largest_D = max(N for N, *_ in runs), max(D for _, D, _ in runs)
    law = fit_law([run for run in runs if run[0] < largest_N and run[1] < largest_D], E=0.0)
    return law.loss(largest_N, largest_D), next(loss for *sizes, loss in runs if sizes == [largest_N, largest_D])


def ideal_rows(p: torch.Tensor, C: float) -> int:
    """The number of rows with the lowest computed loss for the budget C, to about 5%."""
    candidates = {round(1.05**i) for i in range(int(math.log(len(p), 1.05)))}
    return min(candidates, key=lambda rows: ideal_loss(p, rows, int(C / 6 / count_parameters(rows))))


def check_optimum(a: float, N: float, C: float, bar) -> list[tuple[int, int, list[float]]]:
    """Train tables a quarter as large, as large, and four times as large as N, all with budget C: rows, D, losses."""
    found = []
    for factor in (0.25, 1, 4):
        rows = max(1, round(factor * N / WIDTH))
        D = BATCH_SIZE * max(1, round(C / 6 / count_parameters(rows) / BATCH_SIZE))
        bar.total += len(SEEDS) * D // BATCH_SIZE  # known only now
        found.append((rows, D, [train_table(a, rows, (D,), seed, bar)[0] for seed in SEEDS]))
    return found


def with_range(values: list[float], digits: int) -> str:
    """The value of the mean runs, which comes first, and the range over the seeds: `0.57 (0.55 to 0.58)`."""
    return f"{values[0]:,.{digits}f} ({min(values[1:]):,.{digits}f} to {max(values[1:]):,.{digits}f})"


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def title_of(language: str | float) -> str:
    return language if language == "names" else f"nicknames, a = {language:g}"


def show_losses(runs: list[tuple], ideal: list[tuple] = ()) -> None:
    """Rows: N. Columns: D. In parentheses: the computed loss."""
    draws, computed = sorted({D for _, D, _ in runs}), {(N, D): loss for N, D, loss in ideal}
    print(f"\n  {'N':>9}" + "".join(f"{f'D = {D:,}':>17}" for D in draws))
    for N in sorted({N for N, *_ in runs}):
        cells = [f"{loss:.4f}" + (f" ({computed[N, D]:.4f})" if ideal else "") for n, D, loss in runs if n == N]
        print(f"  {N:9,}" + "".join(f"{cell:>17}" for cell in cells))


def show_exponents(means: dict, ideal: dict) -> None:
    """Whether the loss is a power of D."""
    print("\nIS IT A POWER LAW IN D? The exponent between neighboring D, for the largest N\n")
    for language, runs in means.items():
        print(f"  {title_of(language):22}" + "".join(f"{exponent:8.2f}" for exponent in local_exponents(runs)))
        if language in ideal:
            print(f"  {'  computed':22}" + "".join(f"{exponent:8.2f}" for exponent in local_exponents(ideal[language]))
                  + f"   in the limit: a / (1 + a) = {language / (1 + language):.2f}")
    ranges = [(title_of(language), local_exponents(runs)) for language, runs in means.items()]
    say("A power law has the same exponent everywhere. Measured: "
        + "; ".join(f"{name}: {min(exponents):.2f} to {max(exponents):.2f}" for name, exponents in ranges) + ".")


def show_fits(laws: dict, means: dict, ideal: dict) -> None:
    """The constants, how well the law fits, and how well it extrapolates."""
    print("\nTHE FIT of loss = (N0 / N)^alpha + (D0 / D)^beta to the mean losses (in parentheses: to each seed)\n"
          "R^2: of the logarithm; error: the root mean square error of the logarithm, as a factor\n\n"
          f"  {'':19}{'alpha':>21}{'beta':>21}{'N0':>10}{'D0':>10}{'R^2':>7}{'error':>8}")

    def row(name, exponents, law, runs):
        R2, error = quality(law, runs)
        print(f"  {name:19}{exponents[0]:>21}{exponents[1]:>21}{law.N0:10.3g}{law.D0:10.3g}{R2:7.3f}{error:8.2f}")
        return error

    errors = []
    for language, fits in laws.items():
        row(title_of(language), [with_range([getattr(law, key) for law in fits], 2) for key in ("alpha", "beta")],
            fits[0], means[language])
        if language in ideal:
            law = fit_law(ideal[language], E=0.0)
            errors.append(row("  computed losses", (f"{law.alpha:.2f}", f"{law.beta:.2f}"), law, ideal[language]))
            print(f"  {'  in the limit':19}{language:21.2f}{language / (1 + language):21.2f}")
    say("The computed losses have no noise, yet the law fits them only to a factor of "
        f"{' and '.join(f'{error:.2f}' for error in errors)}: a sum of two powers is an approximation.")
    for language, runs in means.items():
        predicted, measured = extrapolate(runs)
        say(f"Extrapolation, {title_of(language)}: fitted without the largest N and the largest D, the law predicts "
            f"{predicted:.4f} for the largest run; measured {measured:.4f}, a factor of "
            f"{max(predicted / measured, measured / predicted):.3g}.")


def show_optima(laws: dict, checks: dict) -> None:
    """The optimal N and D for each budget, and the losses of the tables trained to test them."""
    print("\nCOMPUTE-OPTIMAL N AND D for C = 6 N D, by the fit; computed: the N with the lowest computed loss\n"
          "Last columns: the loss of tables of size N/4, N and 4N, each trained with budget C\n\n"
          f"  {'':7}{'C':>6}{'N':>26}{'computed':>10}{'D':>9}{'D / N':>7}{'loss':>8}{'N/4':>8}{'N':>8}{'4N':>8}")
    hits = 0
    for (a, C), trained in checks.items():
        N, D = compute_optimal(laws[a][0], C)
        sizes = with_range([compute_optimal(law, C)[0] for law in laws[a]], 0)
        best = count_parameters(ideal_rows(probabilities(a), C))
        (*_, smaller), (*_, same), (*_, larger) = trained
        hits += max(same) < min(smaller + larger)
        print(f"  a = {a:<3g}{C:6.0e}{sizes:>26}{best:10,}{D:9,.0f}{D / N:7.1f}{laws[a][0].loss(N, D):8.4f}"
              + "".join(f"{statistics.mean(losses):8.4f}" for losses in (smaller, same, larger)))
    say(f"In {hits} of {len(checks)} cases the table of size N had a lower loss than both others, beyond seed noise.")
    for a in TAILS:
        growth = with_range([law.beta / (law.alpha + law.beta) for law in laws[a]], 2)
        say(f"a = {a:g}: the optimal N grows as C to the power {growth} by the fit, {1 / (2 + a):.2f} in the limit by "
            "the computed loss. For text: 0.73 (Kaplan et al.), 0.5 (Hoffmann et al.).")


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


def draw(found: dict, law: Law) -> Figure:
    """Loss by D: names for each N, with their law; nicknames for the largest table and each a, on the computed line."""
    names, a = mean_runs(found["names"]), min(TAILS)
    ratios = [[math.exp(exponent * math.log(D[1] / D[0])) for exponent in local_exponents(runs)]
              for runs, D in ((names, NAMES), (mean_runs(found[a]), DRAWS))]
    figure = new_figure(f"{NAMES[1] / NAMES[0]:g} times the data divides the loss on names by {min(ratios[0]):.1f} to "
                        f"{max(ratios[0]):.1f}, the loss on nicknames (a = {a:g}) by {min(ratios[1]):.1f} to "
                        f"{max(ratios[1]):.1f}", 5.0)
    left, right = figure.subplots(1, 2, sharey=True)
    sizes = sorted({N for N, *_ in names})
    for i, N in enumerate(sizes):
        points = [(D, loss) for n, D, loss in names if n == N]
        colour = matplotlib.colormaps["cividis"](0.85 * (1 - i / len(sizes)))
        left.plot(*zip(*points), color=colour, marker="os^Dv"[i % 5], label=f"{N:,}")
    left.plot(NAMES, [law.loss(sizes[-1], D) for D in NAMES], color="#222222", linestyle="--", linewidth=1.5,
              label="fit, largest N")
    left.set(title="names: one algorithm", xlabel="D: numbers, one epoch", ylabel="loss (nats)")
    left.legend(title="N: parameters", fontsize=11, title_fontsize=11, loc="lower left")
    for a, colour, marker in zip(TAILS, ("#0072B2", "#E69F00", "#009E73"), "os^"):
        p, runs = probabilities(a), mean_runs(found[a])
        points = [(D, loss) for N, D, loss in runs if N == count_parameters(ROWS[-1])]
        right.plot(*zip(*points), color=colour, marker=marker, linestyle="none", label=f"a = {a:g}")
        grid = [DRAWS[0] * (DRAWS[-1] / DRAWS[0]) ** (i / 20) for i in range(21)]
        right.plot(grid, [ideal_loss(p, ROWS[-1], round(D)) for D in grid], color=colour, linewidth=1.5,
                   label="computed")
    right.set(title="nicknames: a long tail", xlabel="D: draws, one epoch")
    right.legend(fontsize=11, loc="lower left")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.tick_params(which="minor", labelbottom=False)
        axes.grid()
    return figure


def main() -> None:
    """Train both languages, fit, print the tables, and test the optima."""
    if list(DRAWS) != sorted(set(DRAWS)) or any(D % BATCH_SIZE for D in DRAWS) or ROWS[-1] > NUM_FACTS:
        raise InputError(f"DRAWS = {DRAWS} must be ascending multiples of BATCH_SIZE = {BATCH_SIZE}, and ROWS = {ROWS} "
                         f"at most NUM_FACTS = {NUM_FACTS}.")
    num_steps = len(SEEDS) * (len(D_MODELS) * sum(math.ceil(D / BATCH_SIZE) for D in NAMES)
                              + len(TAILS) * len(ROWS) * DRAWS[-1] // BATCH_SIZE)
    with tqdm(total=num_steps, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        found = measure(bar)
        means = {language: mean_runs(runs) for language, runs in found.items()}
        # For each language the law of the mean runs, then one for each seed.
        laws = {language: [fit_law(runs, E=0.0) for runs in (means[language], *found[language])] for language in found}
        checks = {(a, C): check_optimum(a, compute_optimal(laws[a][0], C)[0], C, bar) for a in TAILS for C in BUDGETS}

    ideal = {a: [(N, D, ideal_loss(probabilities(a), N // WIDTH, D)) for N, D, _ in means[a]] for a in TAILS}
    print(f"\nNAMES: loss on held-out names, nats per word, mean of {len(SEEDS)} seeds\n"
          f"D numbers, each used once. The floor E is 0; guessing costs {math.log(len(VOCABULARY)):.2f}")
    show_losses(means["names"])
    for a in TAILS:
        print(f"\nNICKNAMES, a = {a:g}: loss over the whole language, nats, mean of {len(SEEDS)} seeds (in parentheses:"
              f" computed)\nD draws, one epoch. The floor E is 0; guessing costs {math.log(NUM_NICKNAMES):.2f}")
        show_losses(means[a], ideal[a])
        ratios = [loss / best for (*_, loss), (*_, best) in zip(means[a], ideal[a])]
        say(f"Measured / computed: {min(ratios):.2f} to {max(ratios):.2f}. The excess over 1 is the loss on facts that "
            "were seen but not learned well enough yet.")
    show_exponents(means, ideal)
    show_fits(laws, means, ideal)
    show_optima(laws, checks)
    save_figure(draw(found, laws["names"][0]), FIGURE)


if __name__ == "__main__":
    run_script(main)
