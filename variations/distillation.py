"""distillation.py - a small student learns from a trained teacher: from its probabilities, and from its answers.

The problem. A large model is accurate but slow. A small one trained on the same few labels is fast but less accurate.
Can the large one, once trained, help to train the small one?

The idea. A label says which token is correct. The teacher's probabilities also say how plausible it finds the others,
which depends on the input, so they carry more information per example. Most of it is in small probabilities. So both
models' logits are divided by a temperature T, which flattens both distributions, before they are compared:

    p = softmax(teacher / T)        q = softmax(student / T)        soft loss = T^2 KL(p || q) = T^2 sum p ln(p / q)
    loss = LABEL_WEIGHT * cross-entropy with the labels + (1 - LABEL_WEIGHT) * soft loss

The gradient of KL with respect to the student's logits is (q - p) / T, and for large T the difference q - p itself
shrinks as 1 / T. The factor T^2 makes up for both; without it, a larger T would also raise the weight of the labels.
(Without labels it would hardly matter: Adam divides each gradient by its usual size.) In the limit of large T the soft
loss matches the student's logits to the teacher's, all V of them with equal weight:

    gradient of soft loss = T (q - p)   ->   (student - teacher) / V          for logits of mean 0

On paper: teacher's logits (3, 0, -3), student's (0, 0, 0). At T = 1 the gradient is much like that of a label: the
first logit is raised, the others are lowered, almost equally. At T = 100 it is nearly (student - teacher) / V: the
second logit, where both agree, stays, and the third is lowered as much as the first is raised.

>>> teacher, student = torch.tensor([3.0, 0.0, -3.0]), torch.zeros(3, requires_grad=True)
>>> for T in (1, 4, 100):
...     print(torch.autograd.grad(soft_loss(student, teacher, T), student)[0])
tensor([-0.6170,  0.2860,  0.3310])
tensor([-1.0259,  0.2189,  0.8069])
tensor([-1.0048,  0.0100,  0.9948])

The other way to learn from a teacher needs no probabilities, and no labels: let it answer inputs that nobody has
labeled, and train on its answers as if they were labels (sequence-level distillation). Some are wrong, but there can be
as many as the teacher has time to give.

Papers: Hinton et al. 2015 (section 2; equations 2 to 4 for the limit of large T); Sanh et al. 2019 (DistilBERT,
sections 2 and 3); Kim & Rush 2016 (section 3.1: word-level, the probabilities; 3.2: sequence-level, the answers).
Simplified: answers are greedy, where Kim & Rush use beam search; the student starts from random weights, DistilBERT
from its teacher's.

The comparison. The teacher was trained on the 10,000 labeled training numbers. The student has NUM_LABELED of them, few
enough that data limit it. All rows train for equally many steps of equally many names, with equally searched learning
rates; the teacher's own time is not counted. Two rows are controls: the true names of the numbers that the teacher
answered, the ceiling for learning from its answers; and the teacher's own labels, for those who have them.

What you will see (about three minutes on two CPU cores): the teacher and each student, with parameters, milliseconds
per name and exact match; how many of the teacher's answers are wrong; how close its probabilities are to the labels.
Writes figures/variations/distillation.png.
"""

import math
import random
import statistics
import sys
import textwrap
from pathlib import Path

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the base files are one folder up

import decoder_only
from toy_dataset import (IGNORE, MAX_DIGITS, PAD_ID, InputError, decoder_only_example, make_splits,
                         pad_batch, run_script, spread_evenly)

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- teacher and student ---
TEACHER = dict(d_model=64, d_ff=256, num_layers=2)
STUDENT = dict(d_model=32, d_ff=128, num_layers=1)  # Try num_layers=2: which rows does depth help?
TEACHER_EPOCHS = 4        # Try 2: a worse teacher. How many of its mistakes does the student inherit?
TEACHER_BATCH_SIZE = 128
TEACHER_RATE = 4e-3

# --- data ---
NUM_LABELED = 300         # labeled numbers for the student. Try 1000, 10_000: does the teacher still help?
NUM_UNLABELED = 38_400    # numbers that the teacher answers: half of a student's examples, each read once. Try 1000

# --- training ---
TEMPERATURES = (1, 4)     # Try (2, 20)
LABEL_WEIGHT = 0.1        # of the labels beside the teacher's probabilities. Try 0, 0.5
BATCH_SIZE = 256
NUM_STEPS = 300           # of every student. Try 1000
LEARNING_RATES = (1.6e-2, 3.2e-2, 6.4e-2)  # each row keeps the best of these, found with the first seed
NUM_TESTS = 2000          # held-out numbers for exact match; other numbers choose the learning rate
SEEDS = (0, 1, 2)         # of the student's labeled numbers, initial weights and order of batches; one teacher
TIMINGS = 5               # of each model; their median counts
FIGURE = Path(__file__).resolve().parent.parent / "figures" / "variations" / "distillation.png"

# ======================================================================================================
# THE EXCHANGED PART
# ======================================================================================================


def soft_loss(student, teacher, temperature: float):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) for each position: two logits (..., V) -> (...)."""
    log_p = (teacher / temperature).log_softmax(dim=-1)                                 # (..., V)
    log_q = (student / temperature).log_softmax(dim=-1)                                 # (..., V)
    return temperature ** 2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1)               # (...)


def distillation_loss(student, batch, temperature: float | None):
    """In place of decoder_only.compute_loss: the mean over the targets of a batch.

    temperature: None for labels alone; otherwise batch["teacher"] holds the teacher's logits (B, T, V).
    """
    logits, targets = decoder_only.predict(student, batch)                              # (B, T, V), (B, T)
    scored = targets != IGNORE          # not the prompt, and not padding: the teacher has logits there too
    hard = F.cross_entropy(logits[scored], targets[scored])
    if temperature is None:
        return hard
    soft = soft_loss(logits[scored], batch["teacher"].to(logits.device)[scored], temperature).mean()
    return LABEL_WEIGHT * hard + (1 - LABEL_WEIGHT) * soft


@torch.no_grad()
def add_teacher_logits(teacher, data: dict) -> dict:
    """The data with the teacher's logits (N, T, V) for each text: computed once, read in every epoch."""
    teacher.eval()
    logits = [decoder_only.predict(teacher, {name: tensor[rows] for name, tensor in data.items()})[0]
              for rows in torch.arange(len(data["ids"])).split(1000)]
    return data | {"teacher": torch.cat(logits)}


def answered_example(number: int, answer: list[int]) -> dict:
    """The example that decoder_only_example makes of a number, with a generated answer in place of its name.

    answer: ids, with padding after <EOS>. The student learns to end the text where the teacher did.
    """
    prompt = decoder_only.make_prompt(number)
    text = prompt + [i for i in answer if i != PAD_ID]
    return {"ids": text[:-1], "targets": [IGNORE] * (len(prompt) - 1) + text[len(prompt):]}


def ask_teacher(teacher, numbers: list[int], bar) -> list[dict]:
    """An example for each number, with the teacher's greedy answer."""
    examples = []
    for start in range(0, len(numbers), 1000):
        some = numbers[start:start + 1000]
        answers = decoder_only.generate(teacher, [decoder_only.make_prompt(number) for number in some], temperature=0.0)
        examples += [answered_example(number, answer) for number, answer in zip(some, answers.tolist())]
        bar.update()
    return examples


# ======================================================================================================
# THE EXPERIMENT
# ======================================================================================================


def build(bar):
    """The teacher, trained on the 10,000 labeled training numbers."""
    torch.manual_seed(0)
    loaders = decoder_only.create_dataloaders(TEACHER_BATCH_SIZE, 0, loss_on_prompt=False)
    teacher = decoder_only.build_model(**TEACHER)
    decoder_only.train(teacher, loaders, TEACHER_EPOCHS, TEACHER_RATE, num_evaluations=0, progress=bar)
    return teacher.eval()


def labeled_examples(numbers: list[int]) -> list[dict]:
    return [decoder_only_example(number, loss_on_prompt=False) for number in numbers]


def unlabeled_numbers() -> list[int]:
    """NUM_UNLABELED numbers that are in no split: neither trained on by the teacher, nor ever tested on.

    As many of each length as there are left. With six digits, numbers below 10,000 are all in a split, so these have
    five or six digits.
    """
    taken, rest = set().union(*make_splits()), [[] for _ in range(MAX_DIGITS)]
    for number in range(10 ** MAX_DIGITS):
        if number not in taken:
            rest[len(str(number)) - 1].append(number)
    counts, rng = spread_evenly(NUM_UNLABELED, [len(numbers) for numbers in rest]), random.Random(0)
    return [number for numbers, count in zip(rest, counts) for number in rng.sample(numbers, count)]


def half_labeled(labeled: list[dict], others: list[dict]) -> dict:
    """Padded examples of both kinds, the labeled ones repeated until they are as many as the others."""
    data = pad_batch(labeled + others)
    repeats = max(1, len(others) // len(labeled))
    rows = torch.cat([torch.arange(len(labeled)).repeat(repeats), len(labeled) + torch.arange(len(others))])
    return {name: tensor[rows] for name, tensor in data.items()}


def train_student(data: dict, temperature: float | None, rate: float, seed: int, bar):
    """A new student, trained for NUM_STEPS steps on batches of the rows of data, each pass in another order."""
    torch.manual_seed(seed)
    student = decoder_only.build_model(**STUDENT)
    optimizer = decoder_only.create_optimizer(student, rate)
    order = []
    while len(order) < NUM_STEPS * BATCH_SIZE:
        order += torch.randperm(len(data["ids"])).tolist()
    for step in range(NUM_STEPS):
        rows = order[step * BATCH_SIZE:(step + 1) * BATCH_SIZE]
        for group in optimizer.param_groups:
            group["lr"] = decoder_only.learning_rate_at(step, NUM_STEPS, rate)
        loss = distillation_loss(student, {name: tensor[rows] for name, tensor in data.items()}, temperature)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), decoder_only.GRAD_CLIP)
        optimizer.step()
        bar.update()
    return student.eval()


def share_correct(model, numbers: list[int]) -> float:
    """The share of these numbers that the model names correctly."""
    return decoder_only.evaluate(model, [pad_batch(labeled_examples(numbers))])["exact_match"]


LABELS = f"{NUM_LABELED:,} labels"
ANSWERS = f"+ teacher's answers to {NUM_UNLABELED:,}"
TRUTH = f"+ true names of those {NUM_UNLABELED:,}"
ALL_LABELS = "all the teacher's labels"
SOFT = {T: f"+ teacher's probabilities, T = {T:g}" for T in TEMPERATURES}


def build_data(teacher, answered: list[dict], true: list[dict], seed: int) -> dict[str, tuple[dict, float | None]]:
    """For each row: what a student trains on, padded, and the temperature of the soft loss, None without one."""
    labeled = labeled_examples(random.Random(seed).sample(make_splits().train, NUM_LABELED))
    data = pad_batch(labeled)
    softened = add_teacher_logits(teacher, data)
    return {LABELS: (data, None),
            **{name: (softened, temperature) for temperature, name in SOFT.items()},
            ANSWERS: (half_labeled(labeled, answered), None),
            TRUTH: (half_labeled(labeled, true), None),
            ALL_LABELS: (pad_batch(labeled_examples(make_splits().train)), None)}


def measure(teacher, answered: list[dict], true: list[dict], bar) -> dict[str, dict]:
    """For each row of students: the learning rate found with the first seed, exact match by seed, one student."""
    splits, found = make_splits(), {}
    for seed in SEEDS:
        for row, (data, temperature) in build_data(teacher, answered, true, seed).items():
            if seed == SEEDS[0]:
                tried = {rate: train_student(data, temperature, rate, seed, bar) for rate in LEARNING_RATES}
                rate = max(tried, key=lambda rate: share_correct(tried[rate], splits.validation))
                found[row] = {"rate": rate, "exact": [], "student": tried[rate]}
                student = tried[rate]
            else:
                student = train_student(data, temperature, found[row]["rate"], seed, bar)
            found[row]["exact"].append(share_correct(student, splits.test[:NUM_TESTS]))
    return found


def time_names(models: dict) -> dict[str, float]:
    """Milliseconds per name, 200 names generated at once; medians."""
    prompts = [decoder_only.make_prompt(number) for number in make_splits().test[:200]]
    timers = {name: Timer("generate(model, prompts)", globals={"generate": decoder_only.generate, "model": model,
                                                              "prompts": prompts}) for name, model in models.items()}
    times = {name: [] for name in models}
    for _ in range(TIMINGS):  # in turns, so that a slow moment of the machine affects all rows
        for name, timer in timers.items():
            times[name].append(1000 * timer.timeit(2).mean / len(prompts))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def probability_of_labels(teacher, temperature: float) -> float:
    """The probability that the teacher, at this temperature, gives to the correct token: the mean over the names."""
    data = pad_batch(labeled_examples(make_splits().train[:NUM_LABELED]))
    logits, targets = decoder_only.predict(teacher, data)
    scored = targets != IGNORE
    return (logits[scored] / temperature).softmax(dim=-1).gather(1, targets[scored][:, None]).mean().item()


def spread(values: list[float]) -> str:
    """The mean over the seeds, and the range: `1.2% (0.9 to 1.6)`."""
    return f"{statistics.mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def differ(values: list[float], others: list[float]) -> bool:
    """Whether two rows differ by more than seed noise: their ranges over the seeds do not overlap."""
    return max(values) < min(others) or max(others) < min(values)


def relation(values: list[float], others: list[float]) -> str:
    """How one row stands to another: above, below, or within seed noise of it."""
    if not differ(values, others):
        return "within seed noise of"
    return "above" if min(values) > max(others) else "below"


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


def draw(found: dict, teacher_exact: float) -> Figure:
    """Exact match of each row of students, beside that of the teacher."""
    mean = {row: statistics.mean(result["exact"]) for row, result in found.items()}
    figure = new_figure(f"A student with {NUM_LABELED:,} labels names {mean[LABELS]:.0%} of the numbers, with the "
                        f"teacher's answers to {NUM_UNLABELED:,} more {mean[ANSWERS]:.0%}", 4.2)
    axes = figure.subplots()
    for y, (row, result) in enumerate(reversed(found.items())):
        colour, marker = ("#E69F00", "s") if row in (TRUTH, ALL_LABELS) else ("#0072B2", "o")
        axes.plot([min(result["exact"]), max(result["exact"])], [y, y], color=colour, clip_on=False)
        axes.plot(mean[row], y, marker, color=colour, markersize=9, clip_on=False)
    axes.set_yticks(range(len(found)), reversed(found))
    axes.axvline(teacher_exact, color="#707070", linestyle="--", linewidth=1.5, label="teacher")
    axes.set(xlabel="exact match, mean and range", xlim=(0, 1))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="x")
    axes.plot([], [], "o", color="#0072B2", markersize=9, label="student")
    axes.plot([], [], "s", color="#E69F00", markersize=9, label="student with more true labels")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=11)
    return figure


def say(text: str) -> None:
    """Print a conclusion, wrapped to the width of a terminal."""
    print("\n" + textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  "))


def main() -> None:
    """Train the teacher, let it answer, train the students, and print the table."""
    splits = make_splits()
    if not 0 < NUM_LABELED <= len(splits.train):
        raise InputError(f"NUM_LABELED = {NUM_LABELED} must be from 1 to {len(splits.train)}.")
    left = 10 ** MAX_DIGITS - sum(map(len, splits))
    if not 0 < NUM_UNLABELED <= left:
        raise InputError(f"NUM_UNLABELED = {NUM_UNLABELED} must be from 1 to {left}, as many as are in no split.")
    total = (TEACHER_EPOCHS * math.ceil(len(splits.train) / TEACHER_BATCH_SIZE) + math.ceil(NUM_UNLABELED / 1000)
             + (len(TEMPERATURES) + 4) * (len(LEARNING_RATES) + len(SEEDS) - 1) * NUM_STEPS)
    with tqdm(total=total, desc="training", ascii=True, ncols=95, mininterval=0.5) as bar:
        teacher, numbers = build(bar), unlabeled_numbers()
        answered, true = ask_teacher(teacher, numbers, bar), labeled_examples(numbers)
        found = measure(teacher, answered, true, bar)

    student = found[ANSWERS]["student"]
    times = time_names({"teacher": teacher, "student": student})
    sizes = {name: sum(parameter.numel() for parameter in model.parameters())
             for name, model in (("teacher", teacher), ("student", student))}
    teacher_exact = share_correct(teacher, splits.test[:NUM_TESTS])
    print(f"\nSTUDENTS, {NUM_STEPS} steps of {BATCH_SIZE} names each; exact match on {NUM_TESTS:,} held-out numbers, "
          f"mean of\n{len(SEEDS)} seeds (range); ms: milliseconds per name, 200 at once, one thread, "
          f"{decoder_only.get_device().type}\n\n"
          f"  {'':46}{'parameters':>11}{'ms':>7}{'rate':>9}{'exact match':>24}\n"
          f"  {f'teacher: {len(splits.train):,} labels':46}{sizes['teacher']:11,}{times['teacher']:7.3f}"
          f"{TEACHER_RATE:9.1e}{teacher_exact:>24.1%}")
    for row, result in found.items():
        print(f"  {f'student: {row}':46}{sizes['student']:11,}{times['student']:7.3f}{result['rate']:9.1e}"
              f"{spread(result['exact']):>24}")

    exact = {row: result["exact"] for row, result in found.items()}
    mean = {row: statistics.mean(values) for row, values in exact.items()}
    say(f"The student has {sizes['student'] / sizes['teacher']:.0%} of the teacher's parameters and takes "
        f"{times['student'] / times['teacher']:.0%} of its time per name.")
    for temperature, row in SOFT.items():
        say(f"The teacher's probabilities at T = {temperature:g}: exact match is {relation(exact[row], exact[LABELS])} "
            f"that of labels alone. At this temperature the teacher gives the correct tokens a mean probability of "
            f"{probability_of_labels(teacher, temperature):.1%}, where a label gives them 100%.")
    wrong = statistics.mean(one != other for one, other in zip(answered, true))
    gained, possible = mean[ANSWERS] - mean[LABELS], mean[TRUTH] - mean[LABELS]
    pays = relation(exact[ANSWERS], exact[LABELS]) == "above"
    say(f"The teacher's answers to {NUM_UNLABELED:,} unlabeled numbers, {wrong:.2%} of them wrong: exact match is "
        f"{relation(exact[ANSWERS], exact[LABELS])} that of labels alone ({100 * gained:+.1f} points), and "
        f"{relation(exact[ANSWERS], exact[TRUTH])} that of true names for the same numbers ({100 * possible:+.1f} "
        f"points). Here distillation {'pays' if pays else 'does not pay'}.")
    say(f"With the teacher's own {len(splits.train):,} labels, and no teacher, exact match is "
        f"{relation(exact[ALL_LABELS], exact[ANSWERS])} that with its answers.")
    edge = [row for row in found if found[row]["rate"] in (LEARNING_RATES[0], LEARNING_RATES[-1])]
    say("Best at the lowest or highest learning rate tried, so perhaps better still beyond it: "
        f"{'; '.join(edge) or 'none'}.")
    save_figure(draw(found, teacher_exact), FIGURE)


if __name__ == "__main__":
    run_script(main)
