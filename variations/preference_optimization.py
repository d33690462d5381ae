"""preference_optimization.py - RLHF and DPO, measured against the optimum that has a closed form.

The problem. A pretrained model generates what is common in its data, which is not always what we want. What we want can
be scored (a reward r(y) for a whole text y) or compared (y is preferred to y'), but there is no gradient through the
sampled tokens. And maximizing the reward alone destroys the language model: generating one rewarded text, always the
same, is optimal.

The idea. Maximize the reward while staying close to the start model. The policy pi maximizes

    J(pi) = E[r(y)] - beta * KL(pi || start),           KL(pi || start) = E[log pi(y) - log start(y)],    y ~ pi

which has a solution in closed form, the start model reweighted:

    optimum(y) = start(y) exp(r(y) / beta) / Z,         Z = sum over y of start(y) exp(r(y) / beta),     J = beta * ln Z

For a real language Z is out of reach, because it sums over all texts. Here r is 0 or 1, so Z needs only the start
model's mean reward m, and the best reward and KL for each beta can be computed. On paper: with beta = 1 / ln 4 a
rewarded text counts four times. For m = 1/3 that is 4/3 against 2/3, so the optimum has reward 2/3:

>>> reward, kl = optimum(1 / 3, 1 / math.log(4))
>>> round(reward, 4), round(kl, 4), round(2 / 3 * math.log(2) + 1 / 3 * math.log(1 / 2), 4)
(0.6667, 0.231, 0.231)

RLHF (reinforcement learning from human feedback) follows the gradient of J, which can be estimated from samples:

    gradient of E[R] = E[(R - b) * gradient of log pi(y)],     R = r(y) - beta * (log pi(y) - log start(y))

for every baseline b that does not depend on y (REINFORCE). The closer b is to R, the lower the variance. At the optimum
R equals beta * ln Z for every text, so the variance is zero.

DPO (direct preference optimization) needs neither a reward nor samples from the policy, only pairs. It inverts the
closed form: every policy is the optimum for the reward beta * log(pi(y) / start(y)), up to a constant. This implicit
reward is fitted to the pairs by logistic regression (Bradley & Terry 1952: P(y is preferred to y') = sigmoid(r - r')):

    loss = -log sigmoid(beta * [log pi(chosen) / start(chosen) - log pi(rejected) / start(rejected)])

The experiment. The decoder generates numbers, digit by digit up to <SEP>; the reward is 1 if the number contains a 7.
The name that would follow is not rewarded and, except in one row, not part of the KL. A second reward, 1 if the number
is divisible by 3, has a shortcut: numbers made only of the digits 0, 3, 6 and 9 need no sum of digits.

Papers: Ziegler et al. 2019, section 2 (RLHF with the KL penalty); Williams 1992 (REINFORCE); Kool et al. 2019 (the
baseline: the mean of the other samples); Rafailov et al. 2023, section 4 (equation 4: the optimum, 7: DPO). Simplified:
the reward is a rule, not a model of human judgments, and the pairs are labeled by it. PPO's clipping and value network
are left out: each batch of samples serves one step. One seed, so read differences between rows with caution. Each
method has its own learning rate; RLHF's is ten times DPO's, which is one reason why it forgets more names.

What you will see (under three minutes on two CPU cores): for each method and beta the reward and KL reached, beside
those of the optimum; how diverse the numbers still are, and how many numbers the model can still name; the collapse
without a KL penalty; and how the policy obtains divisibility by 3. Writes
figures/variations/preference_optimization.png.
"""

import math
import sys
import textwrap
from collections import Counter
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
from toy_dataset import DIGITS, MAX_DIGITS, PAD_ID, SEP_ID, SOS_ID, InputError, make_splits, run_script, to_tokens

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- the start model ---
D_MODEL = 64
NUM_EPOCHS = 4            # passes over the training numbers
START_BATCH_SIZE = 128
START_LEARNING_RATE = 4e-3
SEED = 0

# --- optimizing ---
BETAS = (1.0, 0.3, 0.1)   # the price of one nat of KL, in units of reward. Try 3.0, 0.03
BATCH_SIZE = 256          # texts for each step of RLHF, pairs for each step of DPO
NUM_STEPS = 100           # of RLHF
NUM_PAIRS = 16384         # for DPO, sampled once from the start model, used once. Try 2048: how far can you trust it?
RLHF_LEARNING_RATE = 3e-3 # the better of 1e-3 and 3e-3 for beta 0.3. Try 3e-4 (too slow)
DPO_LEARNING_RATE = 3e-4  # with 1e-4 it stops early (less reward, less KL), with 1e-3 it forgets more names
SHORTCUT = (0.1, 200)     # beta and steps of RLHF for "divisible by 3". Try (0.1, 100): it finds nothing yet
NUM_SAMPLES = 4000        # to measure reward and KL
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "preference_optimization.png"

# Rewards of a number; a text that is no number has reward 0.
REWARDS = {"contains a 7": lambda number: "7" in str(number), "divisible by 3": lambda number: number % 3 == 0}

# ======================================================================================================
# THE EXCHANGED PARTS: two losses in place of cross-entropy
# ======================================================================================================


def log_probability(model, texts):
    """texts (B, T) of ids, from <SOS>, padded on the right -> log p(text), the sum over its tokens, (B).

    In float64 from the logits on: the difference between two models is small against the sum. On the CPU, because Apple
    GPUs have no float64.
    """
    logits, targets = model(texts[:, :-1]).cpu().double(), texts[:, 1:].cpu()
    logits = logits.index_fill(-1, torch.tensor(PAD_ID), -math.inf)
    return -F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD_ID, reduction="none").sum(dim=1)


def rlhf_loss(log_policy, log_start, rewards, beta):
    """REINFORCE with a KL penalty: (B) log-probabilities of texts sampled from the policy, and their rewards -> scalar.

    Its gradient estimates that of -J; its value means nothing.
    """
    # R = r - beta * log(pi / start). Detached: its own derivative has mean zero and would only add noise.
    returns = rewards - beta * (log_policy.detach() - log_start)                        # (B)
    # The mean of the others: a baseline that contained the text's own return would depend on y, and bias the gradient.
    baseline = (returns.sum() - returns) / (len(returns) - 1)                           # (B)
    return -((returns - baseline) * log_policy).mean()


def dpo_loss(log_chosen, log_rejected, start_chosen, start_rejected, beta):
    """(N) log-probabilities of both texts of each pair, under the policy and the start model -> (N) losses.

    A pair's gradient is -beta * sigmoid(-margin) * (gradient of log_chosen - gradient of log_rejected): a pair that is
    ranked correctly by a wide margin has almost none.
    """
    margin = beta * ((log_chosen - start_chosen) - (log_rejected - start_rejected))     # (N)
    return -F.logsigmoid(margin)


def optimum(mean_reward: float, beta: float) -> tuple[float, float]:
    """Reward and KL (nats) of the best policy for this beta, from the start model's mean reward; rewards are 0 or 1."""
    if beta == 0:
        return 1.0, -math.log(mean_reward)  # the limit: the start model restricted to the rewarded texts
    weight = math.exp(1 / beta)
    Z = 1 - mean_reward + mean_reward * weight
    reward = mean_reward * weight / Z
    return reward, reward / beta - math.log(Z)                                          # KL = E[r / beta - ln Z]


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def sample(model, num_texts: int, generator, whole=False):
    """num_texts texts from the model as ids (num_texts, T): `<SOS> 3 4 2 <SEP>`, or with the name if whole."""
    new = decoder_only.generate(model, [[SOS_ID]] * num_texts, temperature=1.0, generator=generator,
                                max_new_tokens=decoder_only.MAX_NEW_TOKENS if whole else MAX_DIGITS + 1)
    if not whole:
        ended = (new == SEP_ID).long()
        new = new.masked_fill(ended.cumsum(dim=1) - ended > 0, PAD_ID)                  # what follows the first <SEP>
    return F.pad(new, (1, 0), value=SOS_ID)


def read_numbers(texts) -> list[int | None]:
    """The number of each text; None if it is not written as one: other tokens, no <SEP>, a leading zero."""
    numbers = []
    for ids in texts.tolist():
        tokens = to_tokens(ids[1:])
        digits = tokens[:tokens.index("<SEP>")] if "<SEP>" in tokens else []
        well_formed = digits and set(digits) <= set(DIGITS) and (digits[0] != "0" or len(digits) == 1)
        numbers.append(int("".join(digits)) if well_formed else None)
    return numbers


def rewards_of(texts, reward) -> torch.Tensor:
    """(B, T) -> (B) of 0s and 1s."""
    return torch.tensor([float(number is not None and reward(number)) for number in read_numbers(texts)],
                        dtype=torch.float64)


def optimize(start, losses, num_steps: int, learning_rate: float, bar):
    """A copy of the start model, fine-tuned for num_steps steps. losses(policy): yields the loss of each step."""
    policy = deepcopy(start)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.98))
    for step, loss in zip(range(num_steps), losses(policy)):
        optimizer.param_groups[0]["lr"] = decoder_only.learning_rate_at(step, num_steps, learning_rate, 10)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        bar.update()
    return policy


def rlhf(start, reward, beta: float, num_steps: int, bar, whole=False):
    """The start model fine-tuned by RLHF. whole: the texts, and so the KL, contain the name too."""
    generator = torch.Generator(start.embedding.weight.device).manual_seed(SEED)

    def losses(policy):
        while True:
            texts = sample(policy, BATCH_SIZE, generator, whole)
            with torch.no_grad():
                log_start = log_probability(start, texts)
            yield rlhf_loss(log_probability(policy, texts), log_start, rewards_of(texts, reward), beta)

    return optimize(start, losses, num_steps, RLHF_LEARNING_RATE, bar)


def make_pairs(start, reward, noisy: bool):
    """Pairs of texts from the start model, labeled: chosen (N, T), rejected (N, T).

    noisy: the first is chosen with probability sigmoid(r - r'), as in Bradley and Terry's model of a rater, from which
    DPO's loss follows. Otherwise the higher reward is always chosen, and pairs of equal reward are left out. Then the
    loss has no minimum: a larger margin always lowers it.
    """
    generator = torch.Generator(start.embedding.weight.device).manual_seed(SEED)
    one, other = sample(start, 2 * NUM_PAIRS, generator).chunk(2)
    difference = rewards_of(one, reward) - rewards_of(other, reward)                    # (N), -1, 0 or 1
    chance = difference.sigmoid() if noisy else (difference > 0).double()
    # A seed of their own: drawn from the texts' random numbers, the coins would be correlated with the texts.
    coins = torch.rand(len(one), dtype=torch.float64, generator=torch.Generator().manual_seed(SEED + 2))
    first = (coins < chance).to(one.device)
    chosen, rejected = torch.where(first[:, None], one, other), torch.where(first[:, None], other, one)
    return (chosen, rejected) if noisy else (chosen[difference != 0], rejected[difference != 0])


def dpo(start, pairs, beta: float, bar):
    """The start model fine-tuned by DPO, one pass over the pairs."""
    with torch.no_grad():
        start_logs = [log_probability(start, texts) for texts in pairs]

    def losses(policy):
        for rows in torch.arange(len(pairs[0])).split(BATCH_SIZE):
            logs = [log_probability(policy, texts[rows]) for texts in pairs]
            yield dpo_loss(*logs, *(log[rows] for log in start_logs), beta).mean()

    return optimize(start, losses, math.ceil(len(pairs[0]) / BATCH_SIZE), DPO_LEARNING_RATE, bar)


def measure(policy, start, reward, names) -> dict:
    """What the policy has become: all from NUM_SAMPLES sampled numbers, and the exact match on held-out names."""
    texts = sample(policy, NUM_SAMPLES, torch.Generator(start.embedding.weight.device).manual_seed(SEED + 1))
    with torch.no_grad():
        ratios = log_probability(policy, texts) - log_probability(start, texts)
    rewards, numbers = rewards_of(texts, reward), read_numbers(texts)
    return {"reward": rewards.mean().item(), "reward_error": rewards.std().item() / NUM_SAMPLES ** 0.5,
            "kl": ratios.mean().item(), "kl_error": ratios.std().item() / NUM_SAMPLES ** 0.5,
            "numbers": numbers, "distinct": len(set(numbers[:1000])) / len(numbers[:1000]),
            "well_formed": sum(number is not None for number in numbers) / NUM_SAMPLES,
            "naming": decoder_only.evaluate(policy, names)["exact_match"]}


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


def draw(rows: list[tuple], mean_reward: float) -> Figure:
    """Reward by KL: the optimum as a curve, each run as a point."""
    furthest = max(rows[1:], key=lambda row: row[2]["kl"])  # the first is the start model
    figure = new_figure(f"Reward 1 is possible at a KL of {-math.log(mean_reward):.1f} nats; {furthest[0]} with beta = "
                        f"{furthest[1]:g} reaches {furthest[2]['reward']:.2f} at {furthest[2]['kl']:.1f}", 4.8)
    axes = figure.subplots()
    curve = [optimum(mean_reward, 10 ** (exponent / 20)) for exponent in range(40, -41, -1)] + [optimum(mean_reward, 0)]
    largest = max(1.2, 1.1 * furthest[2]["kl"])
    axes.plot([kl for _, kl in curve] + [largest], [best for best, _ in curve] + [1], color="#222222", label="optimum")
    styles = {"RLHF": ("#0072B2", "o", (-24, 5)), "RLHF, whole texts": ("#56B4E9", "s", (-12, -19)),
              "DPO": ("#E69F00", "D", (6, -15)), "DPO, no label noise": ("#AA4499", "^", (6, -15))}
    for name, (colour, marker, offset) in styles.items():
        points = [(row["kl"], row["reward"], beta) for method, beta, row in rows if method == name]
        axes.plot(*list(zip(*points))[:2], marker, color=colour, markersize=9, label=name, linestyle="none")
        for kl, reward, beta in points:
            axes.annotate(f"{beta:g}", (kl, reward), offset, textcoords="offset points", fontsize=11, color=colour)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1, 2, 5, 10], ["0", ".25", ".5", ".75", "1", "2", "5", "10"])
    axes.set(xlabel="KL to the start model (nats, logarithmic above 1)", ylabel="numbers that contain a 7",
             xlim=(-0.03, largest), ylim=(None, 1.05))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid()
    axes.legend(frameon=False, loc="lower center", title="labels: beta")
    return figure


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def show_rewards(rows: list[tuple], mean_reward: float, reward_name: str) -> None:
    """The table: (method, beta, what measure found) for each row, beside the optimum's numbers."""
    errors = [max(row[key] for _, _, row in rows) for key in ("reward_error", "kl_error")]
    print(f"\nREWARD: THE NUMBER {reward_name.upper()}; J = reward - beta KL; in parentheses, the optimum\n"
          f"Standard errors: of reward at most {errors[0]:.3f}, of KL at most {errors[1]:.3f}\n\n"
          f"  {'':20}{'beta':>5}{'reward':>15}{'KL':>15}{'J':>15}{'distinct':>10}{'numbers':>9}{'named':>7}")
    for method, beta, row in rows:
        line = f"  {method:20}"
        if beta is None:
            line += f"{'':5}{row['reward']:7.3f}{'':8}{row['kl']:7.3f}{'':23}"
        else:
            best, kl = optimum(mean_reward, beta)
            line += (f"{beta:5g}{row['reward']:7.3f} ({best:.3f}){row['kl']:7.3f} ({kl:.3f})"
                     f"{row['reward'] - beta * row['kl']:7.3f} ({best - beta * kl:.3f})")
        print(line + f"{row['distinct']:10.1%}{row['well_formed']:9.1%}{row['naming']:7.1%}")


def main() -> None:
    """Train the start model, fine-tune it in every way, show the tables."""
    rows, (contains_a_7, by_3) = [], REWARDS.values()
    num_steps = (NUM_EPOCHS * math.ceil(len(make_splits().train) / START_BATCH_SIZE) + NUM_STEPS * (len(BETAS) + 2)
                 + SHORTCUT[1] + math.ceil(NUM_PAIRS / BATCH_SIZE) * len(BETAS))
    with tqdm(total=num_steps, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        torch.manual_seed(SEED)
        start = decoder_only.build_model(d_model=D_MODEL, d_ff=4 * D_MODEL)
        loaders = decoder_only.create_dataloaders(START_BATCH_SIZE, SEED)
        decoder_only.train(start, loaders, NUM_EPOCHS, START_LEARNING_RATE, num_evaluations=0, progress=bar)
        start.eval()
        reference = sample(start, 5 * NUM_SAMPLES, torch.Generator(start.embedding.weight.device).manual_seed(SEED))
        mean_reward, mean_by_3 = (rewards_of(reference, reward).mean().item() for reward in (contains_a_7, by_3))
        if not 0 < min(mean_reward, mean_by_3) <= max(mean_reward, mean_by_3) < 1:
            raise InputError(f"The start model's mean rewards, {mean_reward:.3f} and {mean_by_3:.3f}, must be above 0 "
                             f"and below 1: raise NUM_EPOCHS = {NUM_EPOCHS}.")

        def add(method, beta, policy, reward=contains_a_7):
            rows.append((method, beta, measure(policy, start, reward, loaders.validation)))

        add("start model", None, start)
        for beta in (*BETAS, 0.0):
            add("RLHF", beta, rlhf(start, contains_a_7, beta, NUM_STEPS, bar))
        add("RLHF, whole texts", BETAS[1], rlhf(start, contains_a_7, BETAS[1], NUM_STEPS, bar, whole=True))
        pairs = make_pairs(start, contains_a_7, noisy=True)
        for beta in BETAS:
            add("DPO", beta, dpo(start, pairs, beta, bar))
        pairs = make_pairs(start, contains_a_7, noisy=False)
        bar.total += math.ceil(len(pairs[0]) / BATCH_SIZE)  # known only now: how many pairs differ in reward
        add("DPO, no label noise", BETAS[1], dpo(start, pairs, BETAS[1], bar))
        add("RLHF", SHORTCUT[0], rlhf(start, by_3, *SHORTCUT, bar), by_3)

    *rows, shortcut = rows
    show_rewards(rows, mean_reward, "contains a 7")
    by_name = {(method, beta): row for method, beta, row in rows}
    gaps = [f"{beta:g}: RLHF {gap['RLHF']:.3f}, DPO {gap['DPO']:.3f}" for beta in BETAS for gap in [
        {method: optimum(mean_reward, beta)[0] - beta * optimum(mean_reward, beta)[1]
         - by_name[method, beta]["reward"] + beta * by_name[method, beta]["kl"] for method in ("RLHF", "DPO")}]]
    say(f"Shortfall of J from the optimum, by beta: {'; '.join(gaps)}.")
    collapsed = by_name["RLHF", 0.0]
    number, count = Counter(number for number in collapsed["numbers"] if number is not None).most_common(1)[0]
    say(f"Without a KL penalty the most frequent number is {number}, in {count / NUM_SAMPLES:.0%} of the samples, and "
        f"the KL is {collapsed['kl']:.1f} nats. Reward 1 is possible at {-math.log(mean_reward):.2f} nats: the start "
        "model, restricted to the numbers with a 7.")
    named = {method: f"{by_name[method, beta]['naming']:.1%}" for method, beta in by_name if beta in (None, BETAS[1])}
    say(f"Names were not part of any loss, and with beta {BETAS[1]:g} the share of held-out numbers named correctly "
        f"goes from {named['start model']} to {named['RLHF']} with RLHF and {named['DPO']} with DPO. With the names "
        f"inside the KL: {named['RLHF, whole texts']}.")

    show_rewards([shortcut], mean_by_3, "is divisible by 3")
    easy = {number for number in range(10 ** MAX_DIGITS) if set(str(number)) <= set("0369")}
    numbers, start_numbers = shortcut[2]["numbers"], read_numbers(reference)
    others = [number for number in numbers if number is not None and number not in easy]
    Z = 1 - mean_by_3 + mean_by_3 * math.exp(1 / SHORTCUT[0])
    best = sum(number in easy for number in start_numbers) / len(start_numbers) * math.exp(1 / SHORTCUT[0]) / Z
    divisible = sum(number % 3 == 0 for number in others) / max(1, len(others))
    # What is expected of a policy that has learned nothing else: the start model's share at the same lengths.
    at_start = [number for number in start_numbers if number is not None and number not in easy]
    all_by_length = Counter(len(str(number)) for number in at_start)
    divisible_by_length = Counter(len(str(number)) for number in at_start if number % 3 == 0)
    expected = sum(divisible_by_length[len(str(number))] / max(1, all_by_length[len(str(number))]) for number in others)
    say(f"Numbers made of 0, 3, 6 and 9 alone are {sum(number in easy for number in numbers) / NUM_SAMPLES:.1%} of the "
        f"texts; of the optimum's they would be {best:.1%}. Of all other numbers, {divisible:.1%} are divisible by 3 "
        f"(of the start model's other numbers of the same lengths: {expected / max(1, len(others)):.1%}).")
    save_figure(draw(rows, mean_reward), FIGURE)


if __name__ == "__main__":
    run_script(main)
