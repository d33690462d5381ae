"""train_all.py - a production-style training pipeline for all three architectures.

train() in each architecture file shows the bare loop: predict, loss, gradient, step. This file adds what a run needs
once it takes hours and several GPUs, one technique per short function:

    the same data and dropout on any number of processes      plan_batches, seed_for
    gradient accumulation: batches larger than the memory     accumulate_gradients
    gradient clipping, and a stop when training diverges      update
    bf16 mixed precision                                      mixed_precision
    gradient checkpointing: recompute instead of storing      checkpoint_layers, show_memory
    compiled kernels, and how well they use the GPU           wrap, flops_utilization
    several GPUs, several machines                            start_processes, fail_together
    keeping the best weights, early stopping                  evaluate_and_keep_best
    exact resume after an interruption                        save_state, load_state, StopRequest

    python train_all.py                              trains everything in ARCHITECTURES, one model after another
    torchrun --nproc-per-node=2 train_all.py         the same, on two processes: two GPUs, or two CPU cores
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train_all.py
                                                     two machines with 8 GPUs each: run on both; HOST is one of them

You will see the plan; for each model a progress bar and a line per evaluation; and a final table of exact-match
accuracy on 20,000 held-out numbers. It takes minutes on two CPU cores. Stop it at any time (Ctrl-C or kill -9) and
run it again: it resumes from its last checkpoint, and on a CPU the final weights are bit-identical to those of an
uninterrupted run. The best weights of each model end up in checkpoints/, where the architecture files look for theirs:
afterwards `python decoder_only.py 342 90210` answers with them.

What is not set below is set in the architecture files: the model sizes, DROPOUT, LEARNING_RATE, WARMUP_STEPS,
WEIGHT_DECAY, GRAD_CLIP, the optimizer's parameter groups (create_optimizer), the schedule (learning_rate_at).
"""

import hashlib
import json
import math
import os
import pickle
import random
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import decoder_only
import encoder_decoder
import encoder_only
import toy_dataset
from toy_dataset import MAX_DIGITS, PAD_ID, VOCABULARY, InputError, NumberDataset, pad_batch, run_script

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- what is trained, and how long ---
ARCHITECTURES = ["encoder_only", "decoder_only", "encoder_decoder"]  # Try ["decoder_only"]
NUM_EPOCHS = 20            # passes over the training numbers. Try 1, 50
FINE_TUNING_EPOCHS = 4     # the same, for encoder_only's three fine-tuning runs. Try 1, 10
EVALUATE_EVERY = 200       # steps between evaluations. Try 50
EARLY_STOPPING_PATIENCE = 10  # evaluations without improvement before stopping. Try 1 (too soon?), 1000 (never)
SEED = 0                   # initial weights, order of the data, dropout, masks. Try 1: how much is seed noise?

# --- how a step is computed ---
GLOBAL_BATCH_SIZE = 64     # examples per step, across all processes. Try 256 (fewer, smoother steps)
MICRO_BATCH_SIZE = 32      # examples per forward pass: what fits in memory. Try 8: slower; equally accurate?
MIXED_PRECISION = "auto"   # "bf16", "off", or "auto": bf16 on GPUs with native support. Try "bf16" on a CPU
GRADIENT_CHECKPOINTING = False  # less memory, more time. Try True: it also prints how much memory it saves
COMPILE = False            # torch.compile: a minute or so at the start, then faster steps. Try True

# --- what is saved and tested ---
CHECKPOINT_EVERY = 100     # steps between checkpoints: the most that a crash can cost. Try 1 (slower), 1000
TEST_EVERYTHING = False    # test on all remaining numbers, not 20,000? Try True: a million answers, in minutes
FOLDER = Path(__file__).parent / "checkpoints" / "train_all"  # checkpoints, best weights and training histories

# What torchrun, or any launcher that follows torch.distributed's env:// convention, tells each process it starts.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# Peak bf16 matrix-multiplication throughput in FLOP/s, from the data sheets (SXM modules, without sparsity).
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


class Job(NamedTuple):
    """One training run."""
    name: str                # names its files, and its row in the tables
    module: ModuleType       # the architecture file
    options: dict            # for that file's build_model
    make_example: Callable   # number -> example
    learning_rate: float     # the peak
    num_epochs: int
    starts_from: "Job | None" = None  # initialize from this job's best weights; None: random initialization


PRETRAINING = Job("encoder_only", encoder_only, {"task": "masked_lm"}, toy_dataset.masked_lm_example,
                  encoder_only.LEARNING_RATE, NUM_EPOCHS)
JOBS = [
    PRETRAINING,
    Job("encoder_only_tagging", encoder_only, {"task": "tagging"}, toy_dataset.tagging_example,
        encoder_only.FINE_TUNING_LEARNING_RATE, FINE_TUNING_EPOCHS, starts_from=PRETRAINING),
    Job("encoder_only_counting", encoder_only, {"task": "counting"}, toy_dataset.counting_example,
        encoder_only.FINE_TUNING_LEARNING_RATE, FINE_TUNING_EPOCHS, starts_from=PRETRAINING),
    Job("encoder_only_matching", encoder_only, {"task": "matching"}, toy_dataset.matching_example,
        encoder_only.FINE_TUNING_LEARNING_RATE, FINE_TUNING_EPOCHS, starts_from=PRETRAINING),
    Job("decoder_only", decoder_only, {},
        partial(toy_dataset.decoder_only_example, loss_on_prompt=decoder_only.LOSS_ON_PROMPT),
        decoder_only.LEARNING_RATE, NUM_EPOCHS),
    Job("encoder_decoder", encoder_decoder, {}, toy_dataset.encoder_decoder_example,
        encoder_decoder.LEARNING_RATE, NUM_EPOCHS),
]


def say(text: str) -> None:
    """Print on rank 0 only."""
    if RANK == 0:
        print(text, flush=True)


def check_constants(jobs) -> None:
    """Reject constants that cannot work, before anything is trained. Raises InputError."""
    names = {job.module.__name__ for job in JOBS}
    if not jobs or not names.issuperset(ARCHITECTURES):
        raise InputError(f"ARCHITECTURES = {ARCHITECTURES} must name one or more of: {', '.join(sorted(names))}.")
    for name in ("NUM_EPOCHS", "FINE_TUNING_EPOCHS", "EVALUATE_EVERY", "EARLY_STOPPING_PATIENCE", "GLOBAL_BATCH_SIZE",
                 "MICRO_BATCH_SIZE", "CHECKPOINT_EVERY", "SEED"):
        value, least = globals()[name], 0 if name == "SEED" else 1
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name} = {value!r} must be an integer, at least {least}.")
    if MIXED_PRECISION not in ("auto", "bf16", "off"):
        raise InputError(f"MIXED_PRECISION = {MIXED_PRECISION!r} must be 'auto', 'bf16' or 'off'.")
    if min(map(len, plan_batches(len(toy_dataset.make_splits().train), num_epochs=1))) < WORLD_SIZE:
        raise InputError(f"{WORLD_SIZE} processes need a step of at least {WORLD_SIZE} examples: raise "
                         f"GLOBAL_BATCH_SIZE = {GLOBAL_BATCH_SIZE} to {2 * WORLD_SIZE}, or start fewer processes.")
    for job in jobs:
        job.module.check_training(job.num_epochs, job.learning_rate)
        job.module.check_writable(job.module.CHECKPOINT)
    if RANK == 0:
        FOLDER.mkdir(parents=True, exist_ok=True)
        if not os.access(FOLDER, os.W_OK):
            raise InputError(f"FOLDER = {FOLDER} is not writable: change its permissions, or FOLDER in train_all.py.")


# ======================================================================================================
# ONE RESULT, HOWEVER IT IS COMPUTED
# ======================================================================================================
# Each step uses a global batch, which is cut into micro-batches, the units of everything that follows. Which numbers
# are in micro-batch j of step i, which of their tokens are masked and which activations dropout zeroes all follow from
# (SEED, i, j) and from nothing else: not from what was computed before, and not from which process computes it. So
#     one process that takes the micro-batches one after the other        (gradient accumulation)
#     several processes that take them side by side                       (data parallelism)
#     a run that was killed after step 1000 and resumes at step 1001      (exact resume)
# are the same training run: the third bit for bit, the second up to rounding, since gradients sum in another order.
# With the usual running generator per process, resuming must restore all of them, and two GPUs differ from four.


def seed_for(*place) -> int:
    """A seed for a place in the run, such as ("noise", step, j). Neighboring places get unrelated seeds."""
    return random.Random(repr((SEED, *place))).getrandbits(32)


def micro_batches_per_step() -> int:
    """As few as memory allows, but at least one per process: with more processes, each gets a smaller one."""
    return max(math.ceil(GLOBAL_BATCH_SIZE / MICRO_BATCH_SIZE), WORLD_SIZE)


def plan_batches(num_numbers: int, num_epochs: int) -> list[list[list[int]]]:
    """The order of the data for the whole run: plan[step][j] lists the numbers (their indices) of micro-batch j.

    Each epoch visits every number once, in a new order. Steps are as equal in size as possible, so that no tiny last
    batch has a noisy gradient; each step is cut into micro-batches likewise. (The usual tool, DistributedSampler,
    repeats some numbers to give every process an equal share, cannot begin in the middle of an epoch, and uses the same
    order in every epoch unless set_epoch is called, a common bug.)
    """
    plan = []
    for epoch in range(num_epochs):
        order = torch.randperm(num_numbers, generator=torch.Generator().manual_seed(seed_for("order", epoch)))
        for batch in order.tensor_split(math.ceil(num_numbers / GLOBAL_BATCH_SIZE)):
            plan.append([micro.tolist() for micro in batch.tensor_split(min(micro_batches_per_step(), len(batch)))])
    return plan


# ======================================================================================================
# ONE STEP, AND ITS MEMORY
# ======================================================================================================


def precision() -> str:
    """What MIXED_PRECISION means on this machine: "bf16" or "off"."""
    # Native support begins with Ampere, 8.0. torch.cuda.is_bf16_supported() also counts slow emulation.
    native = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return MIXED_PRECISION if MIXED_PRECISION != "auto" else "bf16" if native else "off"


def mixed_precision(job):
    """A context in which matrix products run in bfloat16 (Micikevicius et al. 2018; Kalamkar et al. 2019).

    bf16 has float32's range with 8 bits of precision instead of 24: most activations take half the memory and, on GPUs
    made for it, matrix products run many times faster. Weights, gradients, optimizer state and loss stay in float32.
    An update changes a weight by about a thousandth, and in bf16 1 + 0.001 rounds to 1: accumulate in float32, compute
    in bf16. (The older float16 overflows at 65504 and loses small gradients to zero, so it also needs a GradScaler.)
    """
    return nullcontext() if precision() == "off" else torch.autocast(job.module.get_device().type, torch.bfloat16)


def add_gradient(job, model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward: adds the summed loss's gradient to .grad. Returns that loss and the number of targets."""
    with mixed_precision(job):
        loss_sum, num_targets = job.module.compute_loss(model, batch)
    loss_sum.backward()  # outside the context: backward runs each operation in the precision that forward used
    return loss_sum.detach(), num_targets


def accumulate_gradients(job, model, batches, num_micro_batches: int, step: int) -> torch.Tensor:
    """Leave the summed gradients of this process's micro-batches in .grad. Returns (3): loss sum, targets and tokens.

    Backward adds to .grad, so several small batches, one after the other, give the gradient of a large one that would
    not fit in memory (Ott et al. 2018). It has to be the gradient of the summed loss, because means do not add up: of
    two micro-batches with 100 and 300 targets, the mean of their means weights a target of the first three times as
    much as one of the second. update() divides once, by the total number of targets.

    batches: an iterator over this process's micro-batches. Nothing here waits for the GPU: operations, and copies from
    pinned memory, are only queued. One .item() per micro-batch would leave it idle until Python has caught up.
    """
    model.zero_grad()
    device, pinned = job.module.get_device(), torch.cuda.is_available()
    sums = torch.zeros(3, device=device)
    mine = range(num_micro_batches)[RANK::WORLD_SIZE]
    for j in mine:
        batch = {name: field.to(device, non_blocking=pinned) for name, field in next(batches).items()}
        torch.manual_seed(seed_for("noise", step, j))  # dropout and masks depend on the micro-batch, not on the process
        # DistributedDataParallel all-reduces in every backward. Once is enough: with the last micro-batch.
        with model.no_sync() if dist.is_initialized() and j != mine[-1] else nullcontext():
            loss_sum, num_targets = add_gradient(job, model, batch)
        num_tokens = sum((batch[text] != PAD_ID).sum() for text in ("ids", "source", "target") if text in batch)
        sums += torch.stack([loss_sum, num_targets, num_tokens])
    return sums


def update(job, model, optimizer, sums: torch.Tensor, step: int) -> tuple[float, ...]:
    """One optimizer step: normalize the summed gradient, clip, check, step. Returns the loss and the gradient norm.

    The order matters: clipping before dividing would scale the sum over a thousand targets to the norm meant for
    their mean. sums: loss sum and targets of all processes, and other values, which are returned as well.
    """
    num_targets = sums[1].clamp(min=1)  # no targets: avoid 0 / 0
    for parameter in model.parameters():
        parameter.grad.mul_(WORLD_SIZE / num_targets)  # DistributedDataParallel divided by WORLD_SIZE: undo that
    # Clip the norm of the whole gradient (Pascanu et al. 2013): a rare huge one is scaled down, its direction kept.
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), job.module.GRAD_CLIP)
    # .tolist() waits for the GPU, here and nowhere else in a step.
    loss, grad_norm, *others = torch.stack([sums[0] / num_targets, grad_norm, *sums[2:]]).tolist()
    # A step along a NaN gradient would make every weight NaN, so check first (comparisons with NaN are False). Above
    # 10 ln V the run has diverged too, even if clipping keeps the loss finite.
    if not (loss < 10 * math.log(len(VOCABULARY)) and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"{job.name}: training diverged, the loss is {loss:.4g} at step {step + 1}. Lower LEARNING_RATE = "
            f"{job.learning_rate} or raise WARMUP_STEPS = {job.module.WARMUP_STEPS} in {job.module.__name__}.py. "
            "The last checkpoint saved is untouched.")
    optimizer.step()
    return loss, grad_norm, *others


def checkpoint_layers(model) -> None:
    """Store only each layer's input, and recompute the rest in the backward pass (Chen et al. 2016).

    Without it, backward needs attention weights for each pair of positions and D_FF values for each position, of every
    layer. The price is about a third more compute. checkpoint() restores the random state, so dropout is the same.
    """
    for stack in ("layers", "encoder", "decoder"):  # the lists of layers, as the three files name them
        for layer in getattr(model, stack, []):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def sample_batch(job) -> dict:
    """A micro-batch for measurements."""
    return pad_batch([job.make_example(number) for number in toy_dataset.make_splits().train[:MICRO_BATCH_SIZE]])


def measure_memory(job, num_layers: int, checkpointing: bool) -> int:
    """Bytes of activations stored between forward and backward. (Backward then recomputes one layer at a time.)"""
    model, stored = job.module.build_model(**job.options | {"num_layers": num_layers}), {}
    if checkpointing:
        checkpoint_layers(model)

    def note(tensor):  # autograd calls it with each tensor that it stores; counted by storage, as views share memory
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with mixed_precision(job), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_sum, _ = job.module.compute_loss(model, sample_batch(job))  # the name keeps what is stored alive
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for pointer, size in stored.items() if pointer not in weights)


def show_memory(jobs) -> None:
    """What gradient checkpointing saves, by depth."""
    say(f"\nGRADIENT CHECKPOINTING: activations stored for the backward pass, {MICRO_BATCH_SIZE} examples at a time\n\n"
        f"  {'':24}{'layers':>8}{'without':>12}{'with':>12}")
    for job in {job.module: job for job in jobs}.values():  # one of each architecture
        for num_layers in (2, 12):
            without, with_it = (measure_memory(job, num_layers, checkpointing) / 1e6 for checkpointing in (False, True))
            say(f"  {job.module.__name__:24}{num_layers:8}{without:9.1f} MB{with_it:9.1f} MB")


# ======================================================================================================
# SEVERAL PROCESSES, AND COMPILED KERNELS
# ======================================================================================================
# Data parallelism (Li et al. 2020): every process holds the whole model, and computes the gradient of its own
# micro-batches; these are summed. All take the same step from the same weights, so the weights stay equal without being
# sent again. Only rank 0 prints and touches files; it broadcasts what it reads.


def start_processes() -> None:
    """If a launcher started several processes: connect them, and select this one's GPU. Raises InputError."""
    global store
    if (RANK, WORLD_SIZE) == (0, 1):
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or RANK >= WORLD_SIZE:
        raise InputError(f"RANK = {RANK} and WORLD_SIZE = {WORLD_SIZE} are set"
                         f"{' without ' if missing else ''}{', '.join(missing)}: use torchrun, which sets a complete "
                         "environment, or unset them for a run on one process.")
    say(f"Waiting for all {WORLD_SIZE} processes ...")
    store, *_ = next(dist.rendezvous("env://"))
    num_gpus = torch.cuda.device_count()
    # nccl is the backend for NVIDIA GPUs; gloo runs everywhere.
    dist.init_process_group("nccl" if num_gpus else "gloo", store=store, rank=RANK, world_size=WORLD_SIZE)
    if num_gpus:
        gpu = int(os.environ.get("LOCAL_RANK", RANK % num_gpus))  # the local rank counts per machine
        if gpu >= num_gpus:
            raise InputError(f"this machine has {num_gpus} GPU(s), and each process needs its own: run torchrun with "
                             f"--nproc-per-node={num_gpus}.")
        torch.cuda.set_device(gpu)  # from now on "cuda" means this one
    elif torch.backends.mps.is_available():
        raise InputError("several processes need NVIDIA GPUs or CPUs; on an Apple GPU, run python train_all.py.")


def fail_together(error: BaseException) -> None:
    """End this process because of an error. The process that fails first reports it, with its rank.

    The others then fail in their next collective operation, as a consequence, and end silently. Which one was first is
    recorded in the store, the small key-value server through which the processes connect.
    """
    try:
        first = store.add("failures", 1) == 1
    except RuntimeError:
        first = True  # the store is gone, together with the process that held it
    if not first:
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    if not isinstance(error, KeyboardInterrupt):
        print(f"\nrank {RANK}: ", end="", file=sys.stderr, flush=True)
    raise error


def from_rank_0(value):
    """Rank 0's value, on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def wrap(job, model):
    """The model as the training loop calls it: checkpointed, compiled, distributed, or simply itself.

    The wrappers share its weights. Checkpoints are made from the model itself, so no name in them starts with
    `_orig_mod.` (compiled) or `module.` (distributed).
    """
    if GRADIENT_CHECKPOINTING:
        checkpoint_layers(model)
    wrapped = model
    if COMPILE:
        # torch.compile (Ansel et al. 2024) traces the operations and generates kernels that fuse several of them into
        # one pass over memory; dynamic: for all lengths at once. It does so at the first call, which is made here.
        wrapped = torch.compile(model, dynamic=True)
        try:
            add_gradient(job, wrapped, sample_batch(job))
        except Exception as error:  # many kinds of failure, one remedy
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"COMPILE = True fails on this machine; set it to False. ({reason:.200})") from None
    if dist.is_initialized():
        wrapped = DistributedDataParallel(wrapped)  # sends rank 0's weights to all
    return wrapped


def flops_utilization(job, model, tokens_per_second: float) -> float | None:
    """6 N * tokens per second / peak FLOP/s (Chowdhery et al. 2022, appendix B); None where the peak is unknown.

    Each of N parameters takes part in one multiplication and one addition per token in the forward pass, and in twice
    as many in backward; the paper's term for attention scores, small for short texts, is left out. In the
    encoder-decoder a token passes through one of two stacks, about half of the parameters. Padding does not count.
    """
    num_parameters = sum(p.numel() for p in model.parameters()) / (2 if job.module is encoder_decoder else 1)
    device = torch.cuda.get_device_name() if precision() == "bf16" and torch.cuda.is_available() else ""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    return peak and 6 * num_parameters * tokens_per_second / (peak * WORLD_SIZE)


# ======================================================================================================
# CHECKPOINTS
# ======================================================================================================
# NAME_last.pt holds all that is needed to resume. NAME_best.pt holds the weights that did best on the validation split,
# in the architecture file's own format. NAME_history.json is for plots and for reading.


def path_of(job, kind: str) -> Path:
    """FOLDER/NAME_last.pt, FOLDER/NAME_best.pt or FOLDER/NAME_history.json."""
    return FOLDER / f"{job.name}_{kind}"


def run_constants(job, model) -> dict:
    """What the result depends on: a run resumes only if none of it has changed. (Compiled kernels draw other dropout
    masks. The number of processes may change, as long as the number of micro-batches per step does not.)
    """
    found = job.module.all_constants(model) | {"LEARNING_RATE": job.learning_rate, "NUM_EPOCHS": job.num_epochs,
                                               "MIXED_PRECISION": precision(),
                                               "toy_dataset.NUM_VALIDATION": toy_dataset.NUM_VALIDATION}
    for name in ("SEED", "GLOBAL_BATCH_SIZE", "EVALUATE_EVERY", "EARLY_STOPPING_PATIENCE", "COMPILE"):
        found[name] = globals()[name]
    for name in ("DROPOUT", "WARMUP_STEPS", "FINAL_LEARNING_RATE_RATIO", "WEIGHT_DECAY", "GRAD_CLIP",
                 "MASK_PROBABILITY", "LOSS_ON_PROMPT"):
        found[f"{job.module.__name__}.{name}"] = getattr(job.module, name, None)  # not every file has all of them
    found["micro-batches per step (from MICRO_BATCH_SIZE; at least one per process)"] = micro_batches_per_step()
    if job.starts_from is not None:
        pretrained = path_of(job.starts_from, "best.pt")
        found[f"the SHA-256 of {pretrained.name}"] = hashlib.sha256(pretrained.read_bytes()).hexdigest()[:16]
    return found


def write_atomically(path: Path, write) -> None:
    """Write, then rename: if the process is killed, `path` is complete, old or new. (A power cut would need fsync.)"""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save_state(job, model, optimizer, state: dict) -> None:
    """Write NAME_history.json and NAME_last.pt.

    The optimizer is part of it: without its moment estimates AdamW would start cold in mid-schedule. The position in
    the data, the learning rate and the random state are not: they follow from the step.
    """
    whole = state | {"job": job.name, "constants": run_constants(job, model), "weights": model.state_dict(),
                     "optimizer": optimizer.state_dict()}
    # One line per step. No timestamps, so identical runs write identical files.
    lines = ",\n".join(json.dumps(entry) for entry in state["history"])
    # The checkpoint last: once it says finished, the run is never resumed, and what was not written stays so.
    write_atomically(path_of(job, "history.json"), lambda path: path.write_text(f"[\n{lines}\n]\n"))
    write_atomically(path_of(job, "last.pt"), lambda path: torch.save(whole, path))


def load_state(job, model) -> dict | None:
    """The contents of NAME_last.pt, or None if there is none. Raises InputError if no run can resume from it."""
    path = path_of(job, "last.pt")
    if not path.exists():
        return None
    remedy = "To start over instead, move the file away; it is never overwritten."
    try:
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))  # a pickle can run code; not this way
        name, constants, _ = saved["job"], saved["constants"], saved["optimizer"]
    except PermissionError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged, or not a checkpoint of train_all.py. Put a good copy there. "
                         f"{remedy}") from None
    if name != job.name:
        raise InputError(f"{path} holds a run of {name}, not of {job.name}. Put the right file there. {remedy}")
    for name, today in run_constants(job, model).items():
        if constants.get(name) != today:
            raise InputError(f"{path} was made with {name} = {constants.get(name)}, and now it is {today}. Change it "
                             f"back to resume. {remedy}")
    return saved


def load_best(job):
    """A model with the best weights of a job."""
    return job.module.load(path_of(job, "best.pt"), job.module.build_model(**job.options))


class StopRequest:
    """`with StopRequest() as stop:` Ctrl-C sets stop.requested, which is checked between steps, instead of interrupting
    a step. So does SIGTERM, which clusters send before preemption. A second Ctrl-C interrupts the step after all.
    """

    def __enter__(self):
        self.requested, self.time = False, math.inf
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        # Under torchrun, one Ctrl-C can arrive twice, from the terminal and from torchrun: allow a second for that.
        if number == signal.SIGINT and time.monotonic() - self.time > 1:
            raise KeyboardInterrupt
        self.requested, self.time = True, min(self.time, time.monotonic())

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ======================================================================================================
# ONE TRAINING RUN, FROM THE FIRST STEP OR FROM WHERE IT STOPPED
# ======================================================================================================


def start_or_resume(job):
    """The model, its optimizer, and the state of its run: a new one, or the one that NAME_last.pt holds."""
    torch.manual_seed(SEED)
    model = job.module.build_model(**job.options)
    # Together with the weights and the optimizer, this is the whole state of a run between two steps.
    state = {"step": 0, "finished": False, "history": [], "best": None, "evaluations_since_best": 0,
             "tokens": 0, "seconds": 0.0}
    saved = from_rank_0(load_state(job, model) if RANK == 0 else None)
    if saved is None and RANK > 0 and path_of(job, "last.pt").exists():
        raise InputError(f"{path_of(job, 'last.pt')} is here, but not on the machine of rank 0, which would load it. "
                         "Put FOLDER on a file system that all machines share.")
    if saved is None and job.starts_from is not None and RANK == 0:
        model = job.module.build_fine_tuned(load_best(job.starts_from), job.options["task"])
    optimizer = job.module.create_optimizer(model, job.learning_rate)
    if saved is not None:
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        state = {name: saved[name] for name in state}
    return model, optimizer, state


def evaluate_and_keep_best(job, model, state: dict, validation) -> dict:
    """Evaluate on the validation split; if this is the best so far, save the weights. Returns the metrics.

    Early stopping (Prechelt 1998): once a model memorizes the training numbers, validation gets worse. So keep the
    weights of the best evaluation, and stop when it is long past. (With a cosine schedule it is usually near the end.)
    """
    found = from_rank_0(job.module.evaluate(model, validation) if RANK == 0 else None)
    score = (found["exact_match"], -found["loss"])  # exact match first; ties go to the lower loss
    state["evaluations_since_best"] += 1
    if state["best"] is None or score > state["best"]:
        state["best"], state["evaluations_since_best"] = score, 0
        if RANK == 0:  # after a kill before the next save_state, the resumed run writes the same file again
            job.module.save(model, path_of(job, "best.pt"))
    return {"validation_loss": found["loss"], "exact_match": found["exact_match"]}


def train_one(job) -> dict:
    """Train one job until it is finished. Returns its state. Raises KeyboardInterrupt when it is asked to stop."""
    model, optimizer, state = start_or_resume(job)
    splits = toy_dataset.make_splits()
    plan = plan_batches(len(splits.train), job.num_epochs)
    if state["finished"]:
        say(f"\n{job.name}: finished at step {state['step']:,}")
        return state
    say(f"\n{job.name}: {len(plan):,} steps" + (f", resuming from step {state['step']:,}" if state["step"] else ""))
    wrapped = wrap(job, model)
    mine = [micro for micros in plan[state["step"]:] for micro in micros[RANK::WORLD_SIZE]]
    batches = iter(DataLoader(NumberDataset(splits.train, job.make_example), batch_sampler=mine, collate_fn=pad_batch,
                              pin_memory=torch.cuda.is_available()))
    validation = DataLoader(NumberDataset(splits.validation, job.make_example), batch_size=1000, collate_fn=pad_batch)
    bar = tqdm(total=len(plan), initial=state["step"], ascii=True, ncols=95, mininterval=0.5, disable=RANK > 0,
               bar_format="  {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")
    model.train()
    with bar, StopRequest() as stop:
        for step in range(state["step"], len(plan)):  # from 0, as in the plan; the history counts from 1
            start = time.perf_counter()
            rate = job.module.learning_rate_at(step, len(plan), job.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums = accumulate_gradients(job, wrapped, batches, len(plan[step]), step)
            sums = torch.cat([sums, sums.new_full((1,), stop.requested)])
            if dist.is_initialized():
                # One all-reduce carries everything the processes must agree on, including whether to stop: a process
                # that continued alone would wait for the others forever.
                dist.all_reduce(sums)
            loss, grad_norm, num_tokens, stopping = update(job, model, optimizer, sums, step)
            state["step"] = step + 1
            state["tokens"] += int(num_tokens)
            state["seconds"] += time.perf_counter() - start  # of training alone, without evaluations and checkpoints
            state["history"].append({"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm})
            if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == len(plan):
                state["history"][-1] |= evaluate_and_keep_best(job, model, state, validation)
                if RANK == 0:
                    bar.write("  step {step:>6,}  loss {loss:.4f}  validation: loss {validation_loss:.4f}, exact match "
                              "{exact_match:7.2%}".format(**state["history"][-1]))
            bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.1e}, gradient {grad_norm:.2f}, "
                                f"{state['tokens'] / state['seconds']:,.0f} tokens/s", refresh=False)
            bar.update()
            state["finished"] = step + 1 == len(plan) or state["evaluations_since_best"] >= EARLY_STOPPING_PATIENCE
            if state["finished"] and RANK == 0:
                # Before save_state: a run that is saved as finished does not come here again.
                job.module.save(load_best(job), job.module.CHECKPOINT.with_name(f"{job.name}.pt"))
            if RANK == 0 and (state["finished"] or stopping or (step + 1) % CHECKPOINT_EVERY == 0):
                save_state(job, model, optimizer, state)
            if state["finished"] or stopping:
                break
    if not state["finished"]:
        say(f"Saved after step {state['step']:,} of {len(plan):,}, in {path_of(job, 'last.pt')}.\n"
            "To resume, run the same command again.")
        raise KeyboardInterrupt
    if state["step"] < len(plan):
        say(f"  stopped early: no improvement in {EARLY_STOPPING_PATIENCE} evaluations")
    if utilization := flops_utilization(job, model, state["tokens"] / state["seconds"]):
        say(f"  model FLOP utilization {utilization:.1%}")
    return state


# ======================================================================================================
# RUNNING THIS FILE
# ======================================================================================================


def time_a_step(job) -> float:
    """Seconds per step, roughly: the second pass of one micro-batch, forward and backward, times their number."""
    model, batch = job.module.build_model(**job.options), sample_batch(job)
    add_gradient(job, model, batch)[0].item()
    start = time.perf_counter()
    add_gradient(job, model, batch)[0].item()  # .item() waits until a GPU is done
    return (time.perf_counter() - start) * GLOBAL_BATCH_SIZE / MICRO_BATCH_SIZE / WORLD_SIZE


def show_plan(jobs) -> None:
    """What will be trained, how, for how long, and where it goes. Refuses checkpoints made with other constants."""
    num_train, rows, total = len(toy_dataset.make_splits().train), [], 0.0
    for job in jobs:
        model = job.module.build_model(**job.options)
        state = load_state(job, model) or {"step": 0, "finished": False}
        num_steps = len(plan_batches(num_train, job.num_epochs))
        minutes = 0.0 if state["finished"] else (num_steps - state["step"]) * time_a_step(job) / 60
        total += minutes
        start = f"best {job.starts_from.name}" if job.starts_from else "random weights"
        rows.append(f"  {job.name:24}{sum(p.numel() for p in model.parameters()):12,}{num_steps:9,}"
                    f"{'all' if state['finished'] else format(state['step'], ','):>9}{minutes:7.1f} min   {start}")
    rows.append(f"  {'total':24}{'':30}{total:7.1f} min")
    print(f"PLAN: {num_train:,} training numbers, batch size {GLOBAL_BATCH_SIZE}, micro-batch size "
          f"{math.ceil(GLOBAL_BATCH_SIZE / micro_batches_per_step())}, on {WORLD_SIZE} x "
          f"{jobs[0].module.get_device().type}\n(mixed precision {precision()}, gradient checkpointing "
          f"{'on' if GRADIENT_CHECKPOINTING else 'off'}, compilation {'on' if COMPILE else 'off'})\n\n"
          f"  {'':24}{'parameters':>12}{'steps':>9}{'done':>9}{'about':>11}   starts from\n" + "\n".join(rows))
    print(f"\nFiles, in {FOLDER}:\n"
          "  NAME_last.pt        to resume from; move it away to start over\n"
          "  NAME_best.pt        the best weights so far\n"
          "  NAME_history.json   loss, learning rate and gradient norm of each step, validation results\n"
          f"and in {jobs[0].module.CHECKPOINT.parent}:\n"
          "  NAME.pt             the best weights of a finished run: the architecture files answer with them",
          flush=True)
    if GRADIENT_CHECKPOINTING:
        show_memory(jobs)


def show_results(jobs, states) -> None:
    """Test every model and print one table."""
    train, validation, numbers = toy_dataset.make_splits()
    if TEST_EVERYTHING:  # without the validation numbers: they chose the best weights and the time to stop
        numbers = sorted(set(range(10**MAX_DIGITS)).difference(train, validation))
    rows, mistakes = [], []
    for job, state in zip(jobs, states):
        model = load_best(job)
        starts = tqdm(range(0, len(numbers), 1000), f"  testing {job.name}", leave=False, ascii=True, ncols=95)
        # A generator makes each batch when it is needed: the examples of a million numbers would fill the memory.
        batches = (pad_batch([job.make_example(number) for number in numbers[i : i + 1000]]) for i in starts)
        found = job.module.evaluate(model, batches)
        rows.append(f"  {job.name:24}{sum(p.numel() for p in model.parameters()):12,}{state['step']:9,}"
                    f"{state['seconds'] / 60:7.1f} min{found['exact_match']:12.4%}{len(found['mistakes']):10,}")
        if job is not PRETRAINING:  # answer() would mask other tokens than the test did
            wrong = [numbers[i] for i in found["mistakes"][:3]]
            mistakes += [f"{job.name}: {line}" for line in job.module.answer(model, wrong)] if wrong else []
    say(f"\nRESULTS, on {'all ' if TEST_EVERYTHING else ''}{len(numbers):,} held-out numbers (exact: exact-match "
        f"accuracy)\n\n"
        f"  {'':24}{'parameters':>12}{'steps':>9}{'training':>11}{'exact':>12}{'wrong':>10}\n" + "\n".join(rows))
    if PRETRAINING in jobs:
        say("  encoder_only is the masked language model. It cannot reach 100%: a digit masked together with its\n"
            "  word can only be guessed. The three fine-tuning runs show what it is good for.")
    if mistakes:
        say("\nTHE FIRST MISTAKES\n" + "\n".join(textwrap.fill(line, 98, initial_indent="  ", subsequent_indent="    ")
                                               for line in mistakes))
    say(f"\nNext: python {jobs[-1].module.__name__}.py 342 90210 answers with these weights. The training histories, "
        f"for\nplots, are in {FOLDER}")


def main() -> None:
    """Plan, train, test."""
    jobs = [job for job in JOBS if job.module.__name__ in ARCHITECTURES]
    try:
        start_processes()
        check_constants(jobs)
        if RANK == 0:
            show_plan(jobs)
        states = [train_one(job) for job in jobs]
    except (Exception, KeyboardInterrupt) as error:
        if dist.is_initialized():
            fail_together(error)
        raise
    if RANK == 0:
        show_results(jobs, states)


def run_process() -> None:
    """run_script(main). One of several connected processes then ends without Python's shutdown.

    Gloo's threads may hold the last tensors for a moment longer. To release one they need the GIL, and a thread that
    asks for it while Python shuts down aborts the process. (dist.destroy_process_group, the usual end, is left out:
    with PyTorch 2.2 it sometimes never returns.)
    """
    status = None
    try:
        run_script(main)
    except SystemExit as end:
        status = end.code
    if not dist.is_initialized():
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)  # as sys.exit does
        status = 1
    sys.stdout.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    run_process()
