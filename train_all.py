"""train_all.py - the training that one would use for real: all three architectures, and all that surrounds the loop.

The loop itself is short: predict, loss, gradient, step. train() in each architecture file shows it bare. This file
shows what grows around it once a run takes hours and several GPUs, each technique in a short function of its own:

    the same result, however many processes share the work        plan_batches, seed_for
    batches larger than the memory: gradient accumulation         accumulate_gradients
    clipping, and a stop when training diverges                   update
    half the bytes per number: bf16 mixed precision               mixed_precision
    computing twice instead of remembering: checkpointing         checkpoint_layers, show_memory
    compiled kernels; several GPUs, several machines              wrap, start_processes, sum_over_ranks
    keeping the best weights, stopping early                      evaluate_and_keep_best
    killed at any moment, and going on as if nothing had been     save_state, load_state, StopRequest

    python train_all.py                              trains all that ARCHITECTURES names, one after the other
    torchrun --nproc-per-node=2 train_all.py         the same, shared by two processes: two GPUs, or two CPU cores
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train_all.py
                                                     two machines of 8 GPUs: typed on both, HOST is one of them

You will see the plan (what is trained, for how long, where it goes); for each model a bar, and a line for each look at
the validation numbers; at the end one table, right answers on 20,000 numbers that no model was trained on. It takes
some minutes on two CPU cores. Stop it whenever you like, by Ctrl-C or by pulling the plug, and run it again: it goes
on from its last checkpoint, and on a CPU it ends with the weights, to the last bit, that it would have had undisturbed.

The best weights of each model end in checkpoints/, where the architecture files look for theirs. So afterwards
`python decoder_only.py 342 90210` answers with them.

What is not set below is set in the architecture files, and works here as it does there: the sizes of the models,
DROPOUT, LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, GRAD_CLIP. There, too, are the parameter groups with and without
weight decay (create_optimizer) and the schedule of warmup and cosine (learning_rate_at).
"""

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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
ARCHITECTURES = ["encoder_only", "decoder_only", "encoder_decoder"]  # which. Try ["decoder_only"]
NUM_EPOCHS = 20            # passes over the training numbers. Try 1, 50
FINE_TUNING_EPOCHS = 4     # the same, for encoder_only's two fine-tunings. Try 1, 10
EVALUATE_EVERY = 200       # steps between two looks at the validation numbers. Try 50
EARLY_STOPPING_PATIENCE = 10  # after so many looks without a better one, stop. Try 1 (too hasty?), 1000 (never)
SEED = 0                   # initial weights, order, dropout, masks. Try 1: how much of the result is luck?

# --- how a step is computed ---
GLOBAL_BATCH_SIZE = 64     # numbers per step, of all processes together. Try 256 (fewer, smoother steps)
MICRO_BATCH_SIZE = 32      # numbers computed at once: what the memory holds. Try 8: slower, and just as good?
MIXED_PRECISION = "auto"   # "bf16", "off", or "auto": bf16 on GPUs that have it. Try "bf16" on a CPU: as good?
GRADIENT_CHECKPOINTING = False  # less memory, more time. Try True: it also prints how much less
COMPILE = False            # torch.compile: a minute or so at the start, then faster steps. Try True

# --- what is kept, and tested ---
CHECKPOINT_EVERY = 100     # steps between two checkpoints: what a power cut can cost. Try 1 (slower), 1000
TEST_EVERYTHING = False    # test on all numbers that were not trained on? Try True: a million answers, minutes
FOLDER = Path(__file__).parent / "checkpoints" / "train_all"  # checkpoints, best weights and histories of the runs

# torchrun starts this file once in each process, and tells it who it is: rank 0, 1, ... Without torchrun: 0 of 1.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Job(NamedTuple):
    """One training: who learns what, how fast, for how long, and starting from what."""

    name: str                # names its files, and its row in the tables
    module: ModuleType       # the architecture file
    options: dict            # for that file's build_model
    make_example: Callable   # number -> example
    learning_rate: float     # the peak
    num_epochs: int
    starts_from: "Job | None" = None  # whose best weights it begins with; None: random ones


PRETRAINING = Job("encoder_only", encoder_only, {"task": "masked_lm"}, toy_dataset.masked_lm_example,
                  encoder_only.LEARNING_RATE, NUM_EPOCHS)
JOBS = [
    PRETRAINING,
    Job("encoder_only_tagging", encoder_only, {"task": "tagging"}, toy_dataset.tagging_example,
        encoder_only.FINE_TUNING_LEARNING_RATE, FINE_TUNING_EPOCHS, starts_from=PRETRAINING),
    Job("encoder_only_counting", encoder_only, {"task": "counting"}, toy_dataset.counting_example,
        encoder_only.FINE_TUNING_LEARNING_RATE, FINE_TUNING_EPOCHS, starts_from=PRETRAINING),
    Job("decoder_only", decoder_only, {},
        partial(toy_dataset.decoder_only_example, loss_on_prompt=decoder_only.LOSS_ON_PROMPT),
        decoder_only.LEARNING_RATE, NUM_EPOCHS),
    Job("encoder_decoder", encoder_decoder, {}, toy_dataset.encoder_decoder_example,
        encoder_decoder.LEARNING_RATE, NUM_EPOCHS),
]


def say(text: str) -> None:
    """Print, on one process: the others would only say the same."""
    if RANK == 0:
        print(text, flush=True)


def check_constants(jobs) -> None:
    """Refuse constants that cannot work, before anything is trained. Raises InputError."""
    names = {job.module.__name__ for job in JOBS}
    if not jobs or not names.issuperset(ARCHITECTURES):
        raise InputError(f"ARCHITECTURES = {ARCHITECTURES} must name one or more of: {', '.join(sorted(names))}.")
    for name in ("NUM_EPOCHS", "FINE_TUNING_EPOCHS", "EVALUATE_EVERY", "EARLY_STOPPING_PATIENCE", "GLOBAL_BATCH_SIZE",
                 "MICRO_BATCH_SIZE", "CHECKPOINT_EVERY"):
        value = globals()[name]
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} = {value} must be a whole number, at least 1.")
    if MIXED_PRECISION not in ("auto", "bf16", "off"):
        raise InputError(f"MIXED_PRECISION = {MIXED_PRECISION!r} must be 'auto', 'bf16' or 'off'.")
    fewest = min(map(len, plan_batches(len(toy_dataset.make_splits().train), num_epochs=1)))
    if fewest < WORLD_SIZE:
        works = max(1, GLOBAL_BATCH_SIZE // (2 * WORLD_SIZE))
        raise InputError(f"{WORLD_SIZE} processes cannot share a step of {fewest} micro-batches: lower "
                         f"MICRO_BATCH_SIZE = {MICRO_BATCH_SIZE} to {works}, or start fewer processes.")
    for job in jobs:
        job.module.check_training(job.num_epochs, job.learning_rate)
        job.module.check_writable(job.module.CHECKPOINT)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not os.access(FOLDER, os.W_OK):
        raise InputError(f"FOLDER = {FOLDER} is not writable: change its permissions, or FOLDER in train_all.py.")


# ======================================================================================================
# THE SAME RESULT, WHOEVER COMPUTES IT
# ======================================================================================================
# A step uses a global batch. It is cut into micro-batches, and these are the units of all that follows. Which numbers
# are in micro-batch j of step i, which of their tokens are masked and which values dropout zeroes follows from
# (SEED, i, j) and from nothing else: not from what was computed before, and not from who computes it. Therefore
#     one process that takes the micro-batches one after the other        (gradient accumulation)
#     several processes that take them side by side                       (data parallelism)
#     a run that was killed after step 1000 and goes on with step 1001    (exact resume)
# are one and the same training. Often each process draws from its own running generator instead. Then a resumed run has
# to restore the state of all of them, and a run on two GPUs is another one than on four.


def seed_for(*place) -> int:
    """A seed for a place in the run, such as ("noise", step, j). Near places get seeds with nothing in common."""
    return random.Random(repr((SEED, *place))).getrandbits(32)


def plan_batches(num_numbers: int, num_epochs: int) -> list[list[list[int]]]:
    """The whole training's data in order: plan[step][j] lists the numbers (their indices) of micro-batch j.

    Each epoch takes every number once, in an order of its own. It is cut into steps as even as can be, so that there is
    no leftover of three numbers whose gradient is mere noise; and each step is cut into micro-batches in the same way.

    The usual tool, DistributedSampler, gives every process its share of each epoch. It repeats some numbers to make the
    shares equal, it cannot begin in the middle of an epoch, and unless someone remembers to call set_epoch it uses the
    same order in every epoch, a bug in many a public training loop. A list of indices needs no reminder, can begin
    anywhere, and can be printed.
    """
    plan = []
    for epoch in range(num_epochs):
        order = torch.randperm(num_numbers, generator=torch.Generator().manual_seed(seed_for("order", epoch)))
        for batch in order.tensor_split(math.ceil(num_numbers / GLOBAL_BATCH_SIZE)):
            plan.append([micro.tolist() for micro in batch.tensor_split(math.ceil(len(batch) / MICRO_BATCH_SIZE))])
    return plan


# ======================================================================================================
# ONE STEP
# ======================================================================================================


def mixed_precision(job):
    """A context in which matrix products run in bfloat16 (Micikevicius et al. 2018; Kalamkar et al. 2019).

    bf16 has float32's range, with 8 bits of precision instead of 24: half the memory traffic and, on GPUs made for it,
    many times the speed. Weights, gradients, optimizer and loss remain float32. An update adds thousandths to a
    weight, and in bf16 1 + 0.001 is 1: what accumulates must be fine, only what is recomputed each time may be coarse.
    The older float16 ends at 65504 and loses small gradients to zero. There one scales the loss up before backward, and
    the gradients down again before they are clipped (GradScaler). bf16 doesn't need that, so it is left out.
    """
    return torch.autocast(job.module.get_device().type, torch.bfloat16, enabled=precision() == "bf16")


def precision() -> str:
    """What MIXED_PRECISION comes to on this machine: "bf16" or "off"."""
    if MIXED_PRECISION == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "off"
    return MIXED_PRECISION


def add_gradient(job, model, batch) -> tuple[float, int]:
    """Forward and backward: adds the gradient of the batch's summed loss to .grad. Returns it, and of how many."""
    with mixed_precision(job):
        loss_sum, num_targets = job.module.compute_loss(model, batch)
    loss_sum.backward()  # outside of the context: each operation's gradient has that operation's precision anyway
    return loss_sum.item(), num_targets.item()


def accumulate_gradients(job, model, batches, num_micro_batches: int, step: int) -> tuple[float, int, int]:
    """Leave in .grad the gradients of this process's micro-batches, summed. Returns their loss, targets and tokens.

    Backward adds to .grad, so several small batches, one after the other, give the gradient of a large one that would
    not fit into the memory (Ott et al. 2018). It has to be the gradient of the summed loss, for means don't add up: of
    two micro-batches with 100 and 300 targets, the mean of their means counts a target of the first three times as much
    as one of the second. update() divides once, by the number of all targets.

    batches: an iterator over this process's micro-batches.
    """
    model.zero_grad()
    sums = [0, 0, 0]
    mine = range(num_micro_batches)[RANK::WORLD_SIZE]
    for j in mine:
        batch = next(batches)
        torch.manual_seed(seed_for("noise", step, j))  # dropout and masks belong to the micro-batch, not to the process
        # DistributedDataParallel exchanges gradients in each backward. Once is enough: the sum, with the last one.
        with model.no_sync() if dist.is_initialized() and j != mine[-1] else nullcontext():
            loss_sum, num_targets = add_gradient(job, model, batch)
        texts = [batch[field] for field in ("ids", "source", "target") if field in batch]
        num_tokens = sum((ids != PAD_ID).sum().item() for ids in texts)
        sums = [total + new for total, new in zip(sums, (loss_sum, num_targets, num_tokens))]
    return tuple(sums)


def update(job, model, optimizer, loss_sum: float, num_targets: float, step: int) -> tuple[float, float]:
    """From the summed gradient to the next weights: divide, clip, look, step. Returns the loss and the gradient's norm.

    The order matters: clipped before it is divided, a sum over a thousand targets would be cut to the length that is
    meant for their mean. (With float16's scaled gradients likewise: unscale, then clip, then step.)
    """
    num_targets = max(1, num_targets)  # where nothing is asked, move nothing: not 0 / 0
    for parameter in model.parameters():
        parameter.grad.mul_(WORLD_SIZE / num_targets)  # DistributedDataParallel has divided by WORLD_SIZE: undo that
    loss = loss_sum / num_targets
    # Clip the length of the whole gradient (Pascanu et al. 2013): a rare huge one keeps only its direction.
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), job.module.GRAD_CLIP).item()
    # One step along a gradient of NaN makes every weight NaN, for good. So look first (NaN compares as False). And a
    # loss of ten times blind guessing is as lost, though norms and clipping may keep it finite for ever.
    if not (loss < 10 * math.log(len(VOCABULARY)) and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"{job.name}: training diverged, the loss is {loss:.4g} at step {step + 1}. Lower LEARNING_RATE = "
            f"{job.learning_rate} or raise WARMUP_STEPS = {job.module.WARMUP_STEPS} in {job.module.__name__}.py. "
            "The last checkpoint saved is untouched.")
    optimizer.step()
    return loss, grad_norm


# ======================================================================================================
# LESS MEMORY: GRADIENT CHECKPOINTING
# ======================================================================================================


def checkpoint_layers(model) -> None:
    """Keep only the input of each layer for the backward pass, and compute the rest anew there (Chen et al. 2016).

    Backward needs what forward computed: attention weights for each pair of positions, D_FF values for each position,
    in every layer. With this, those of one layer at a time: about a third more computing, and hardly more memory for
    each layer more. The second forward must repeat the first, so checkpoint() restores the random state for dropout.
    """
    for stack in ("layers", "encoder", "decoder"):  # the lists of layers, as the three files name them
        for layer in getattr(model, stack, []):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


class PeakMemory(TorchDispatchMode):
    """`with PeakMemory() as peak:` watches every operation, and adds up the tensors alive after it: peak.most bytes.

    GPUs keep this account themselves (torch.cuda.max_memory_allocated), CPUs do not. Counted are also the weights, once
    they are used, and the gradients.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):  # counted by storage: a transposed view has no memory of its own
                storage = tensor.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.most = max(self.most, sum(self.alive.values()))
        return result


def sample_batch(job) -> dict:
    """A micro-batch to try things on."""
    return pad_batch([job.make_example(number) for number in toy_dataset.make_splits().train[:MICRO_BATCH_SIZE]])


def measure_memory(job, num_layers: int, checkpointing: bool) -> int:
    """The most bytes in use while a model of so many layers computes the gradient of one micro-batch."""
    model, batch = job.module.build_model(**job.options | {"num_layers": num_layers}), sample_batch(job)
    if checkpointing:
        checkpoint_layers(model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        add_gradient(job, model, batch)
        return torch.cuda.max_memory_allocated()
    with PeakMemory() as peak:
        add_gradient(job, model, batch)
    return peak.most


def show_memory(jobs) -> None:
    """What gradient checkpointing saves, by depth."""
    say(f"\nGRADIENT CHECKPOINTING: peak memory while computing the gradient of {MICRO_BATCH_SIZE} numbers\n"
        f"(weights, gradients, and what is kept between forward and backward)\n\n"
        f"  {'':24}{'layers':>8}{'without':>12}{'with it':>12}")
    for job in {job.module: job for job in jobs}.values():  # one of each architecture
        for num_layers in (2, 12):
            without, with_it = (measure_memory(job, num_layers, checkpointing) / 1e6 for checkpointing in (False, True))
            say(f"  {job.module.__name__:24}{num_layers:8}{without:9.1f} MB{with_it:9.1f} MB")


# ======================================================================================================
# SEVERAL PROCESSES, AND COMPILED KERNELS
# ======================================================================================================
# Data parallelism (Li et al. 2020): every process has the whole model, computes the gradient of its own micro-batches,
# and adds it up with those of the others. All take the same step from the same weights, so their weights remain the
# same without ever being sent. Only rank 0 prints, and reads and writes files; what it read, it tells the others.


def start_processes() -> None:
    """If torchrun started this file: meet the other processes, and take one GPU each."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if torch.cuda.is_available():
        gpu, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()  # the local rank counts per machine
        if gpu >= num_gpus:
            raise InputError(f"This machine has {num_gpus} GPU(s), one for each process: run torchrun with "
                             f"--nproc-per-node={num_gpus}.")
        torch.cuda.set_device(gpu)  # from now on "cuda" means this one
    elif torch.backends.mps.is_available():
        raise InputError("torchrun is for NVIDIA GPUs and for CPUs; on this Apple GPU run python train_all.py.")
    # nccl takes gradients from GPU to GPU without a detour through the CPU; gloo works everywhere.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def sum_over_ranks(*values: float) -> list[float]:
    """Each value, summed over all processes."""
    if not dist.is_initialized():
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(totals)
    return totals.tolist()


def from_rank_0(value):
    """Rank 0's value, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wrap(job, model):
    """The model as the training loop calls it: checkpointed, compiled, shared by processes, or simply itself.

    What wraps it shares its weights. The checkpoints are made from the model itself, so that no name in them begins
    with `_orig_mod.` (compiled) or `module.` (shared), and they can be loaded anywhere.
    """
    if GRADIENT_CHECKPOINTING:
        checkpoint_layers(model)
    wrapped = model
    if COMPILE:
        # torch.compile (Ansel et al. 2024) records the operations, and writes kernels that do several of them in one
        # passage over the memory. It does so at the first use: let that be here, and not within a step.
        wrapped = torch.compile(model)
        try:
            add_gradient(job, wrapped, sample_batch(job))
        except Exception as error:  # many kinds of failure, and one remedy
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"COMPILE = True fails on this machine; set it to False. ({reason:.200})") from None
    if dist.is_initialized():
        wrapped = DistributedDataParallel(wrapped)  # sends rank 0's weights to all
    return wrapped


# ======================================================================================================
# CHECKPOINTS
# ======================================================================================================
# There are two. NAME_last.pt holds all that is needed to go on. NAME_best.pt holds the weights that did best on the
# validation numbers, in the architecture file's own format. The history, for plots, stands beside them.


def path_of(job, kind: str) -> Path:
    """FOLDER/NAME_last.pt, FOLDER/NAME_best.pt or FOLDER/NAME_history.json."""
    return FOLDER / f"{job.name}_{kind}"


def run_constants(job, model) -> dict:
    """All that the result depends on: a run goes on only where none of it has changed.

    What changes only speed and memory is left out. A run may stop on one GPU, and go on with eight, compiled.
    """
    found = job.module.all_constants(model) | {"LEARNING_RATE": job.learning_rate, "NUM_EPOCHS": job.num_epochs,
                                               "MIXED_PRECISION": precision(),
                                               "toy_dataset.NUM_VALIDATION": toy_dataset.NUM_VALIDATION}
    for name in ("SEED", "GLOBAL_BATCH_SIZE", "MICRO_BATCH_SIZE", "EVALUATE_EVERY", "EARLY_STOPPING_PATIENCE"):
        found[name] = globals()[name]
    for name in ("DROPOUT", "WARMUP_STEPS", "FINAL_LEARNING_RATE_RATIO", "WEIGHT_DECAY", "GRAD_CLIP",
                 "MASK_PROBABILITY", "LOSS_ON_PROMPT"):
        found[f"{job.module.__name__}.{name}"] = getattr(job.module, name, None)  # some have not all of them
    return found


def write_atomically(path: Path, write) -> None:
    """write(another path), then rename: under `path` there is a whole file at any moment, the old one or the new."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save_state(job, model, optimizer, state: dict) -> None:
    """Write NAME_last.pt and NAME_history.json.

    The optimizer belongs to it: without its running means of the gradients, AdamW would start anew, at a learning rate
    that is no start's. The place in the data, the learning rate and the random state do not: they follow from the step.
    """
    if RANK > 0:
        return
    whole = state | {"job": job.name, "constants": run_constants(job, model), "weights": model.state_dict(),
                     "optimizer": optimizer.state_dict()}
    write_atomically(path_of(job, "last.pt"), lambda path: torch.save(whole, path))
    # For plots and for people: a line for each step. No clock is in it, so equal runs write equal files.
    lines = ",\n".join(json.dumps(entry) for entry in state["history"])
    write_atomically(path_of(job, "history.json"), lambda path: path.write_text(f"[\n{lines}\n]\n"))


def load_state(job, model) -> dict | None:
    """What NAME_last.pt holds, or None if there is no such file. Raises InputError if no run can go on from it."""
    path = path_of(job, "last.pt")
    if not path.exists():
        return None
    remedy = "Or, to train anew, move the file away; until then it is left as it is."
    try:
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))  # a pickle may hold code; not this one
        name, constants, _ = saved["job"], saved["constants"], saved["optimizer"]
    except PermissionError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged, or not a checkpoint of train_all.py. Put a good copy there. "
                         f"{remedy}") from None
    if name != job.name:
        raise InputError(f"{path} holds a training of {name}, not of {job.name}. Put the right file there. {remedy}")
    for name, today in run_constants(job, model).items():
        if constants.get(name) != today:
            raise InputError(f"{path} was made with {name} = {constants.get(name)}, and now it is {today}. Change it "
                             f"back to go on. {remedy}")
    return saved


def load_best(job):
    """The best weights of a job, in a model."""
    return job.module.load(path_of(job, "best.pt"), job.module.build_model(**job.options))


class StopRequest:
    """`with StopRequest() as stop:` Ctrl-C no longer tears a step apart. It sets stop.requested, to be looked at where
    all is in order. So does SIGTERM, which clusters send before they take a machine back.
    """

    def __enter__(self):
        self.requested = self.agreed = False  # agreed: by all processes, see take_step
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.requested = True

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ======================================================================================================
# ONE TRAINING, FROM THE FIRST STEP OR FROM WHERE IT STOPPED
# ======================================================================================================


def start_or_resume(job):
    """The model, its optimizer, and the state of its run: a new one, or where an earlier one stopped."""
    torch.manual_seed(SEED)
    model = job.module.build_model(**job.options)
    # Together with the weights and the optimizer, this is all that a run is between two steps.
    state = {"step": 0, "finished": False, "history": [], "best": None, "evaluations_since_best": 0,
             "tokens": 0, "seconds": 0.0}
    saved = from_rank_0(load_state(job, model) if RANK == 0 else None)
    if saved is None and job.starts_from is not None and RANK == 0:
        model = job.module.build_fine_tuned(load_best(job.starts_from), job.options["task"])
    optimizer = job.module.create_optimizer(model, job.learning_rate)
    if saved is not None:
        model.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        state = {name: saved[name] for name in state}
    return model, optimizer, state


def evaluate_and_keep_best(job, model, state: dict, validation) -> dict:
    """Look at the validation numbers; if it was never better, save the weights. Returns what was found.

    Early stopping (Prechelt 1998): training numbers can be learned by heart, and then validation gets worse while the
    training loss still falls. So keep the weights of the best moment, and stop when it is long past. With a cosine
    schedule the best moment is usually near the end, where steps are small: patience must not be short.
    """
    found = from_rank_0(job.module.evaluate(model, validation) if RANK == 0 else None)
    score = (found["exact_match"], -found["loss"])  # right answers count; among equals, the model that is surer of them
    state["evaluations_since_best"] += 1
    if state["best"] is None or score > state["best"]:
        state["best"], state["evaluations_since_best"] = score, 0
        # Killed between this and the next save_state, a run goes on from an earlier step, comes by here again, and
        # writes the same file once more.
        if RANK == 0:
            job.module.save(model, path_of(job, "best.pt"))
    return {"validation_loss": found["loss"], "exact_match": found["exact_match"]}


def train_one(job) -> dict:
    """Train one job until it is finished. Returns its state."""
    model, optimizer, state = start_or_resume(job)
    splits = toy_dataset.make_splits()
    plan = plan_batches(len(splits.train), job.num_epochs)
    if state["finished"]:
        say(f"\n{job.name}: finished at step {state['step']:,}")
        return state
    say(f"\n{job.name}: {len(plan):,} steps" + (f", goes on after step {state['step']:,}" if state["step"] else ""))
    wrapped = wrap(job, model)
    mine = [micro for micros in plan[state["step"]:] for micro in micros[RANK::WORLD_SIZE]]
    batches = iter(DataLoader(NumberDataset(splits.train, job.make_example), batch_sampler=mine, collate_fn=pad_batch))
    validation = DataLoader(NumberDataset(splits.validation, job.make_example), batch_size=1000, collate_fn=pad_batch)
    bar = tqdm(total=len(plan), initial=state["step"], ascii=True, ncols=95, mininterval=0.5, disable=RANK > 0,
               bar_format="  {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")
    model.train()
    with bar, StopRequest() as stop:
        while not (state["finished"] or stop.agreed):
            take_step(job, model, wrapped, optimizer, state, plan, batches, validation, bar, stop)
    if not state["finished"]:
        say(f"Saved after step {state['step']:,} of {len(plan):,}, in {path_of(job, 'last.pt')}.\n"
            "To go on from there, run the same command again.")
        raise KeyboardInterrupt
    if state["step"] < len(plan):
        say(f"  stopped early, after {EARLY_STOPPING_PATIENCE} looks at the validation numbers without a better one")
    return state


def take_step(job, model, wrapped, optimizer, state, plan, batches, validation, bar, stop) -> None:
    """One step of training, and what is due after it: a look at the validation numbers, a checkpoint, the end."""
    step, start = state["step"], time.perf_counter()
    learning_rate = job.module.learning_rate_at(step, len(plan), job.learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    sums = accumulate_gradients(job, wrapped, batches, len(plan[step]), step)
    # One message holds all that the processes must agree on. Whether to stop is part of it: either all stop after this
    # step, or none does, for who goes on alone waits for the others for ever.
    loss_sum, num_targets, num_tokens, stop.agreed = sum_over_ranks(*sums, stop.requested)
    loss, grad_norm = update(job, model, optimizer, loss_sum, num_targets, step)
    state["step"] = step = step + 1
    state["history"].append({"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm})
    if step % EVALUATE_EVERY == 0 or step == len(plan):
        state["history"][-1] |= evaluate_and_keep_best(job, model, state, validation)
        if RANK == 0:
            bar.write("  step {step:>6,}  loss {loss:.4f}  held-out: loss {validation_loss:.4f}, exact "
                      "{exact_match:7.2%}".format(**state["history"][-1]))
    state["tokens"] += int(num_tokens)
    state["seconds"] += time.perf_counter() - start
    bar.set_postfix_str(f"loss {loss:.4f}, lr {learning_rate:.1e}, gradient {grad_norm:.2f}, "
                        f"{state['tokens'] / state['seconds']:,.0f} tokens/s", refresh=False)
    bar.update()
    state["finished"] = step == len(plan) or state["evaluations_since_best"] >= EARLY_STOPPING_PATIENCE
    if state["finished"] and RANK == 0:
        # The best weights go to where the architecture file looks for them; and that before "finished" is on the disk,
        # or a power cut between the two would leave it out for good.
        job.module.save(load_best(job), job.module.CHECKPOINT.with_name(f"{job.name}.pt"))
    if state["finished"] or stop.agreed or step % CHECKPOINT_EVERY == 0:
        save_state(job, model, optimizer, state)


# ======================================================================================================
# RUNNING THIS FILE
# ======================================================================================================


def time_a_step(job) -> float:
    """Seconds per step, roughly: one micro-batch forward and backward, the second time, times their number."""
    model, batch = job.module.build_model(**job.options), sample_batch(job)
    add_gradient(job, model, batch)
    start = time.perf_counter()
    add_gradient(job, model, batch)
    return (time.perf_counter() - start) * math.ceil(GLOBAL_BATCH_SIZE / MICRO_BATCH_SIZE) / WORLD_SIZE


def show_plan(jobs) -> None:
    """What will be trained, how, for how long, and where it goes. Checkpoints that don't fit are refused here."""
    num_train = len(toy_dataset.make_splits().train)
    rows, total = [], 0.0
    for job in jobs:
        model = job.module.build_model(**job.options)
        state = load_state(job, model) or {"step": 0, "finished": False}
        num_steps = len(plan_batches(num_train, job.num_epochs))
        minutes = 0.0 if state["finished"] else (num_steps - state["step"]) * time_a_step(job) / 60
        total += minutes
        start = f"the best {job.starts_from.name}" if job.starts_from else "random weights"
        rows.append(f"  {job.name:24}{sum(p.numel() for p in model.parameters()):12,}{num_steps:9,}"
                    f"{'all' if state['finished'] else format(state['step'], ','):>9}{minutes:7.1f} min   {start}")
    rows.append(f"  {'together':24}{'':30}{total:7.1f} min")
    say(f"PLAN: {num_train:,} numbers to learn from, {GLOBAL_BATCH_SIZE} at a step, {MICRO_BATCH_SIZE} at once, on "
        f"{WORLD_SIZE} x {jobs[0].module.get_device().type}\n(mixed precision {precision()}, gradient checkpointing "
        f"{'on' if GRADIENT_CHECKPOINTING else 'off'}, compiling {'on' if COMPILE else 'off'})\n\n"
        f"  {'':24}{'parameters':>12}{'steps':>9}{'done':>9}{'about':>11}   starts from\n" + "\n".join(rows))
    say(f"\nFiles, in {FOLDER}:\n"
        "  NAME_last.pt        to go on from; to train anew, move it away\n"
        "  NAME_best.pt        the best weights so far\n"
        "  NAME_history.json   loss, learning rate and gradient norm of each step, held-out results\n"
        f"and in {jobs[0].module.CHECKPOINT.parent}:\n"
        "  NAME.pt             the best weights of what is finished: the architecture files answer with them")


def test_best(job, numbers: list[int]) -> tuple:
    """The best model of a job, and what evaluate finds on these numbers."""
    model = load_best(job)
    starts = tqdm(range(0, len(numbers), 1000), desc=f"  testing {job.name}", leave=False, ascii=True, ncols=95,
                  mininterval=0.5)
    # A generator makes each batch when it is needed: the examples of a million numbers would fill the memory.
    batches = (pad_batch([job.make_example(number) for number in numbers[i : i + 1000]]) for i in starts)
    return model, job.module.evaluate(model, batches)


def show_results(jobs, states) -> None:
    """Test every model once, and sum up all in one table."""
    splits = toy_dataset.make_splits()
    numbers = splits.test
    if TEST_EVERYTHING:
        numbers = sorted(set(range(10**MAX_DIGITS)).difference(splits.train))
    rows, mistakes = [], []
    for job, state in zip(jobs, states):
        model, found = test_best(job, numbers)
        rows.append(f"  {job.name:24}{sum(p.numel() for p in model.parameters()):12,}{state['step']:9,}"
                    f"{state['seconds'] / 60:7.1f} min{found['exact_match']:12.4%}{len(found['mistakes']):10,}")
        if job is not PRETRAINING:  # answer() would hide other tokens than the test did
            wrong = [numbers[i] for i in found["mistakes"][:3]]
            mistakes += [f"{job.name}: {line}" for line in job.module.answer(model, wrong)] if wrong else []
    say(f"\nRESULTS, on {'all ' if TEST_EVERYTHING else ''}{len(numbers):,} numbers that were not trained on "
        f"(exact: each answer about a number is right)\n\n"
        f"  {'':24}{'parameters':>12}{'steps':>9}{'training':>11}{'exact':>12}{'wrong':>10}\n" + "\n".join(rows))
    if PRETRAINING in jobs:
        say("  encoder_only is the masked language model. It cannot reach 100%: a digit that is hidden together\n"
            "  with its word can only be guessed. What it is good for, its two fine-tunings show.")
    if mistakes:
        say("\nTHE FIRST MISTAKES\n" + "\n".join(textwrap.fill(line, 98, initial_indent="  ", subsequent_indent="    ")
                                               for line in mistakes))
    say(f"\nNext: python {jobs[-1].module.__name__}.py 342 90210 answers with these weights; the histories, for plots, "
        f"are in\n{FOLDER}")


def main() -> None:
    """Plan, train, test."""
    jobs = [job for job in JOBS if job.module.__name__ in ARCHITECTURES]
    try:
        check_constants(jobs)
        start_processes()
        show_plan(jobs)
        if GRADIENT_CHECKPOINTING:
            show_memory(jobs)
        states = [train_one(job) for job in jobs]
    except (InputError, FloatingPointError, KeyboardInterrupt):
        if RANK > 0:
            sys.exit(1)  # the same has happened on rank 0, which says it
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if RANK == 0:
        show_results(jobs, states)


if __name__ == "__main__":
    run_script(main)
