"""speculative_decoding.py - a small model drafts several tokens, and the large one checks them all in one pass.

The problem. Generation costs one pass of the model for each token, and a pass for one token uses the hardware badly:
all weights and the whole cache are read from memory to compute a single position. The same pass could score k more
positions at little extra cost, if only the tokens at those positions were known.

The idea. Guess them. A draft, much cheaper than the target model, proposes k tokens one after the other. One pass of
the target over all of them gives its own distribution p before each proposal and after the last. A proposal x, drawn
from the draft's distribution q, is accepted or rejected so that what is emitted has exactly the distribution p:

    accept x with probability                   min(1, p(x) / q(x))
    after the first rejection, draw from        leftover(p, q) = max(p - q, 0) / its sum
    after k acceptances, draw one more from     p at position k

Why that is p: a token x is emitted as an accepted proposal with probability q(x) min(1, p(x) / q(x)) = min(p(x), q(x)),
and as a replacement with probability max(p(x) - q(x), 0), because the probability of a rejection is the very sum that
leftover divides by. The two add up to p(x). A bad draft makes decoding slower but never changes its distribution, and
every pass of the target yields at least one token, so there are never more passes than without a draft.

On paper, three tokens. A proposal is accepted with probability sum(min(p, q)) = 0.8; a rejected one can only have been
the first token, proposed too often, and its replacement is drawn from the other two, proposed too rarely:

>>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.7, 0.2, 0.1])
>>> torch.minimum(p, q).sum()
tensor(0.8000)
>>> leftover(p, q)
tensor([0.0000, 0.5000, 0.5000])
>>> torch.minimum(p, q) + (1 - 0.8) * leftover(p, q)     # p again
tensor([0.5000, 0.3000, 0.2000])

Greedy decoding is the same algorithm. With temperature 0 both distributions are one-hot: a proposal is accepted if the
target would have chosen it too, and the replacement is the target's own choice. A draft needs no model either: prompt
lookup finds the last tokens earlier in the text and proposes what followed them there, with q one-hot.

How much it saves. If each proposal were accepted independently with probability alpha, a pass would yield

    tokens per pass = 1 + alpha + ... + alpha^k = (1 - alpha^(k + 1)) / (1 - alpha)

and with a draft whose pass costs c passes of the target, the speedup would be tokens per pass / (k c + 1). It pays only
if c is below (tokens per pass - 1) / k.

Papers: Leviathan et al. 2023 (section 2.3 and appendix A.1 for the rule, equation 1, theorem 3.8 for the speedup);
Chen et al. 2023 (the same rule, found independently); Saxena 2023 (prompt lookup). Simplified: one text at a time; in a
batch each row accepts a different number of tokens, and the caches need padding.

What you will see (under three minutes on two CPU cores): both models trained, then three workloads, each with the
target alone, the draft alone, the draft with several k, and prompt lookup: acceptance, measured and computed from p
and q; tokens per pass and speedup, measured and by formula; and the cost of a draft pass below which speculation pays.
The formulas leave out what a small model on a CPU does not get for free: k + 1 positions cost more than one, and the
bookkeeping between the passes takes time too.
"""

import math
import statistics
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from toy_dataset import EOS_ID, PAD_ID, SOS_ID, make_splits, run_script

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- the two models, both trained on digits and words: target, draft ---
TARGET = dict(d_model=64, num_layers=4, num_heads=4, d_ff=256)  # twice the base's depth: time per pass grows with it
DRAFT = dict(d_model=32, num_layers=1, num_heads=4, d_ff=128)   # Try num_layers=2: better proposals, at what cost?
NUM_EPOCHS = (5, 3)       # passes over the training numbers. Try (5, 1), (5, 12): what does a poor draft cost?
LEARNING_RATES = (4e-3, 1e-2)  # narrow models tolerate more than the base model's 2e-3
BATCH_SIZE = 128
SEED = 0

# --- decoding ---
NUM_PROPOSALS = (1, 2, 4, 8)  # k. Try (3, 16)
NUM_LOOKUP = 4            # k for prompt lookup. Try 8
NUM_TEXTS = 100           # texts for each row of a table. Try 500: smaller errors
TEMPERATURE = 1.0         # of the third workload. Try 0.5, 1.5: when do the two models agree more often?

# ======================================================================================================
# THE EXCHANGED PART
# ======================================================================================================


def next_token_distribution(logits, temperature):
    """Logits (..., V) -> what the base's choose_tokens samples from, (..., V). Temperature 0 gives a one-hot vector.

    In float64: where p and q nearly agree, max(p - q, 0) would be little but rounding errors in float32.
    """
    logits = logits.cpu().double()
    logits[..., PAD_ID] = -math.inf  # never generate padding
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).double()
    return (logits / temperature).softmax(dim=-1)


def leftover(p, q):
    """What the target gives more probability than the draft does, normalized: max(p - q, 0) / sum.   (..., V)"""
    excess = (p - q).clamp(min=0)
    return excess / excess.sum(dim=-1, keepdim=True)


def verify(p, q, proposed, generator=None):
    """Decide which of k proposals stay: returns their number n, and the token that follows them.

    p (k + 1, V): the target's distributions before each proposal and after the last. q (k + 1, V): those that the
    proposals were drawn from, then zeros. proposed (k): ids. All proposals after the first rejected one are lost,
    however good: they continue a text that the target has not accepted.
    """
    index = torch.arange(len(proposed))
    ratio = p[index, proposed] / q[index, proposed]                                     # (k); q > 0: it was drawn
    accepted = torch.rand(len(proposed), dtype=p.dtype, generator=generator) < ratio    # min(1, p / q)
    n = accepted.long().cumprod(dim=0).sum().item()                                     # acceptances before a rejection
    # Where all are accepted q is zero, and the leftover is p itself: one more token from the same pass.
    return n, torch.multinomial(leftover(p[n], q[n]), 1, generator=generator).item()


def roll_back(cache, length: int) -> None:
    """Drop the keys and values of all positions from `length` on: those of rejected tokens.

    Without this the cache would hold the rejected token in the place of its replacement, which would never be read.
    """
    for kv in cache:
        if len(kv) > length:
            kv.key, kv.value = kv.key[:, :, :length], kv.value[:, :, :length]           # (B, H, length, d_k)


class ModelDraft:
    """A small decoder proposes tokens. One for each text, since it holds the cache of that text."""

    def __init__(self, model):
        self.model, self.cache = model, model.new_cache()

    def propose(self, ids, k, temperature, generator):
        """ids (1, S) -> n <= k ids, (n), and the distributions they were drawn from, then zeros, (n + 1, V).

        Proposes nothing after <EOS>.
        """
        # The last token is always new to the draft. After k acceptances it is the last two, as the draft never reads
        # its own last proposal. The base's forward computes whatever the cache does not hold yet.
        roll_back(self.cache, ids.size(1) - 1)
        proposed, q = [], []
        while len(proposed) < k and EOS_ID not in proposed:
            q.append(next_token_distribution(self.model(ids, self.cache)[0, -1], temperature))
            proposed.append(torch.multinomial(q[-1], 1, generator=generator).item())
            ids = torch.cat([ids, ids.new_tensor([[proposed[-1]]])], dim=1)
        nothing = torch.zeros(len(decoder_only.VOCABULARY), dtype=torch.float64)
        return torch.tensor(proposed, dtype=torch.long), torch.stack([*q, nothing])


class PromptLookup:
    """No model: find the last two tokens (or else the last one) earlier in the text, and propose what came after."""

    def propose(self, ids, k, temperature, generator):
        """As ModelDraft.propose, each q one-hot. Without a match nothing is proposed: an ordinary pass follows."""
        text, proposed = ids[0].tolist(), []
        for n in (2, 1):
            for start in range(len(text) - n - 1, -1, -1):  # the latest match first
                if not proposed and text[start:start + n] == text[-n:]:
                    proposed = text[start + n:start + n + k]
        proposed = torch.tensor(proposed, dtype=torch.long)
        return proposed, F.pad(F.one_hot(proposed, len(decoder_only.VOCABULARY)).double(), (0, 0, 0, 1))


@torch.inference_mode()
def speculative_generate(target, draft, prompt: list[int], k: int, max_new_tokens=decoder_only.MAX_NEW_TOKENS,
                         temperature=0.0, generator=None) -> tuple[list[int], dict]:
    """Continue one prompt as decoder_only.generate does: the same tokens (greedy), the same distribution (sampling).

    Both models in evaluation mode. Returns the new ids and what was counted: passes of the target, proposals examined
    (those up to the first rejection), accepted, and overlap, the sum over those examined of their probability of being
    accepted, sum(min(p, q)).
    """
    ids = torch.tensor([prompt], device=next(target.parameters()).device)               # (1, S)
    limit = min(len(prompt) + max_new_tokens, target.constants["MAX_LENGTH"] + 1)       # as in generate
    cache, counts = target.new_cache(), {"passes": 0, "examined": 0, "accepted": 0, "overlap": 0.0}
    while ids.size(1) < limit and EOS_ID not in ids[0, len(prompt):]:
        S = ids.size(1)
        proposed, q = draft.propose(ids, min(k, limit - S - 1), temperature, generator)
        ids = torch.cat([ids, proposed.to(ids.device)[None]], dim=1)                    # (1, S + k)
        logits = target(ids, cache)[0, -len(proposed) - 1:]                             # (k + 1, V): one pass for all
        p = next_token_distribution(logits, temperature)
        n, following = verify(p, q, proposed, generator)
        if EOS_ID in proposed[:n]:
            ids = ids[:, :S + n]                                                        # nothing follows <EOS>
        else:
            ids = torch.cat([ids[:, :S + n], ids.new_tensor([[following]])], dim=1)     # (1, S + n + 1)
        roll_back(cache, ids.size(1) - 1)
        examined = min(n + 1, len(proposed))
        counts["passes"] += 1
        counts["examined"] += examined
        counts["accepted"] += n
        counts["overlap"] += torch.minimum(p, q)[:examined].sum().item()
    return ids[0, len(prompt):].tolist(), counts


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================
# Nothing in the models is exchanged: the new part takes the place of decoder_only.generate.


def tokens_per_pass(alpha: float, k: int) -> float:
    """1 + alpha + ... + alpha^k: equation 1 of Leviathan et al."""
    return sum(alpha ** i for i in range(k + 1))


def train(sizes: dict, num_epochs: int, learning_rate: float, bar):
    """A decoder trained on digits and words: it can name numbers and generate them."""
    torch.manual_seed(SEED)
    model, loaders = decoder_only.build_model(**sizes), decoder_only.create_dataloaders(BATCH_SIZE, SEED)
    decoder_only.train(model, loaders, num_epochs, learning_rate, num_evaluations=0, progress=bar)
    return model.eval()


@torch.inference_mode()
def nats(target, prompt: list[int], new: list[int]) -> float:
    """-log of the probability that the target samples these ids at TEMPERATURE."""
    ids = torch.tensor([prompt + new], device=next(target.parameters()).device)
    p = next_token_distribution(target(ids[:, :-1])[0, len(prompt) - 1:], TEMPERATURE)  # (T, V)
    return -p.gather(1, ids[0, len(prompt):, None].cpu()).log().sum().item()


def measure(target, draft_model, prompts, temperature: float, bar) -> dict[str, dict]:
    """By row: totals over the prompts of tokens, seconds and counts; the share of texts equal to the plain ones; the
    nats of each text. The rows take turns, so that a slow moment of the machine affects all."""
    methods = {"target alone": (None, 0), "draft alone": (None, 0)}
    methods |= {f"draft, k = {k}": (lambda: ModelDraft(draft_model), k) for k in NUM_PROPOSALS}
    methods[f"lookup, k = {NUM_LOOKUP}"] = (PromptLookup, NUM_LOOKUP)
    rows = {name: {"k": k, "tokens": 0, "seconds": 0.0, "same": 0, "nats": []} for name, (_, k) in methods.items()}
    torch.manual_seed(SEED)  # for the CPU, where speculation samples, and for the GPU, where generate does
    for prompt in prompts:
        for name, (make_draft, k) in methods.items():
            row, counts, start = rows[name], {}, time.perf_counter()
            if make_draft is None:
                model = target if name == "target alone" else draft_model
                new = decoder_only.generate(model, [prompt], temperature=temperature)[0].tolist()
            else:
                new, counts = speculative_generate(target, make_draft(), prompt, k, temperature=temperature)
            row["seconds"] += time.perf_counter() - start
            row["tokens"] += len(new)
            for key, value in counts.items():
                row[key] = row.get(key, 0) + value
            if name == "target alone":
                plain = new
            row["same"] += new == plain
            if temperature:
                row["nats"].append(nats(target, prompt, new))
            bar.update()
    return rows


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def show_workload(workload: str, rows: dict[str, dict]) -> None:
    """One workload's table, and what it comes to."""
    speeds = {name: row["seconds"] / row["tokens"] for name, row in rows.items()}       # seconds per token
    ratio = speeds["draft alone"] / speeds["target alone"]                              # c
    print(f"\n{workload.upper()}, {NUM_TEXTS} texts; a pass of the draft costs c = {ratio:.2f} passes of the target\n\n"
          f"  {'':16}{'acceptance':>20}{'tokens per pass':>19}{'ms per':>9}{'speedup':>19}{'pays if':>9}\n"
          f"  {'':16}{'measured':>10}{'computed':>10}{'measured':>10}{'formula':>9}{'token':>9}{'measured':>10}"
          f"{'formula':>9}{'c below':>9}")
    for name, row in rows.items():
        line = f"  {name:16}"
        if row["k"]:
            examined, measured = max(1, row["examined"]), row["tokens"] / row["passes"]
            alpha = row["accepted"] / examined
            line += f"{alpha:10.1%}{row['overlap'] / examined:10.1%}{measured:10.2f}"
        else:
            line += f"{'':30}"
        if name.startswith("draft, "):  # prompt lookup proposes fewer than k, or nothing: the formulas do not apply
            formula = tokens_per_pass(alpha, row["k"])
            line += (f"{formula:9.2f}{1000 * speeds[name]:9.2f}{speeds['target alone'] / speeds[name]:10.2f}"
                     f"{formula / (row['k'] * ratio + 1):9.2f}{(measured - 1) / row['k']:9.2f}")
        else:
            line += f"{'':9}{1000 * speeds[name]:9.2f}{speeds['target alone'] / speeds[name]:10.2f}"
        print(line)
    checked = [name for name, row in rows.items() if row["k"]]
    saved = {name: 1 - rows[name]["passes"] / rows[name]["tokens"] for name in checked}
    best, fastest = max(checked, key=saved.get), min(checked, key=speeds.get)
    say(f"{best} saves the most passes of the target: {saved[best]:.0%}. Fastest: {fastest}, "
        f"{speeds['target alone'] / speeds[fastest]:.2f} times the speed of the target alone.")
    if rows["target alone"]["nats"]:
        def nats_of(names):
            values = [value for name in names for value in rows[name]["nats"]]
            return f"{statistics.mean(values):.2f} +- {statistics.stdev(values) / len(values) ** 0.5:.2f}"
        say(f"-log p of the sampled texts under the target, mean and standard error: sampled from the target alone "
            f"{nats_of(['target alone'])} nats, with speculation (all rows) {nats_of(checked)}, from the draft alone "
            f"{nats_of(['draft alone'])}.")
    else:
        same = min(rows[name]["same"] for name in checked)
        share = "all" if same == NUM_TEXTS else f"at least {same} of"
        say(f"Texts equal to the target's own, token for token: {share} {NUM_TEXTS} in every row with speculation; "
            f"{rows['draft alone']['same']} from the draft alone.")


def main() -> None:
    """Train the two models, run the three workloads, show the tables."""
    numbers = make_splits().test[:NUM_TEXTS]
    repeating = [1001 * (100 + number % 900) for number in numbers]  # such as 342342
    workloads = {"names of held-out numbers, greedy": ([decoder_only.make_prompt(n) for n in numbers], 0.0),
                 "names that repeat, greedy": ([decoder_only.make_prompt(n) for n in repeating], 0.0),
                 f"new numbers, temperature {TEMPERATURE:g}": ([[SOS_ID]] * NUM_TEXTS, TEMPERATURE)}
    num_steps = [epochs * math.ceil(len(make_splits().train) / BATCH_SIZE) for epochs in NUM_EPOCHS]
    with tqdm(total=sum(num_steps), desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        target, draft_model = (train(*settings, bar) for settings in zip((TARGET, DRAFT), NUM_EPOCHS, LEARNING_RATES))
    num_runs = len(workloads) * NUM_TEXTS * (3 + len(NUM_PROPOSALS))
    with tqdm(total=num_runs, desc="generating", ascii=True, ncols=95, mininterval=0.5) as bar:
        found = {name: measure(target, draft_model, *workload, bar) for name, workload in workloads.items()}

    loaders = decoder_only.create_dataloaders(BATCH_SIZE, SEED)
    print("\nTRAINED: parameters, steps, exact match on held-out numbers\n")
    for name, model, steps in zip(("target", "draft"), (target, draft_model), num_steps):
        exact = decoder_only.evaluate(model, loaders.validation)["exact_match"]
        print(f"  {name:8}{sum(p.numel() for p in model.parameters()):>10,}{steps:8}{exact:10.2%}")
    for workload, rows in found.items():
        show_workload(workload, rows)


if __name__ == "__main__":
    run_script(main)
