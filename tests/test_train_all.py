"""What train_all.py promises. Runs that are killed, stopped or distributed are started as a reader starts them."""

import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

import decoder_only  # noqa: E402
import encoder_decoder  # noqa: E402
import encoder_only  # noqa: E402
import kill_train_all  # noqa: E402
import toy_dataset  # noqa: E402
import train_all  # noqa: E402
from toy_dataset import InputError, Splits, number_to_words  # noqa: E402
from train_all import Job  # noqa: E402

TINY = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32}
MASKED = Job("encoder_only", encoder_only, TINY | {"task": "masked_lm", "dropout": 0.1}, toy_dataset.masked_lm_example,
             2e-3, 2)
TAGGING = Job("encoder_only_tagging", encoder_only, TINY | {"task": "tagging"}, toy_dataset.tagging_example, 1e-2, 2)
DECODER = Job("decoder_only", decoder_only, TINY | {"dropout": 0.1}, toy_dataset.decoder_only_example, 2e-3, 2)
TRANSLATOR = Job("encoder_decoder", encoder_decoder, TINY, toy_dataset.encoder_decoder_example, 2e-3, 2)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Few numbers, small batches, an empty folder; and one thread, as small matrices gain nothing from more."""
    splits = toy_dataset.make_splits()
    few = Splits(splits.train[:101], splits.validation[:40], splits.test[:50])
    monkeypatch.setattr(toy_dataset, "make_splits", lambda: few)
    for module in (encoder_only, decoder_only, encoder_decoder):
        monkeypatch.setattr(module, "CHECKPOINT", tmp_path / f"{module.__name__}.pt")
    for name, value in {"FOLDER": tmp_path / "train_all", "GLOBAL_BATCH_SIZE": 16, "MICRO_BATCH_SIZE": 5,
                        "EVALUATE_EVERY": 4, "CHECKPOINT_EVERY": 3}.items():
        monkeypatch.setattr(train_all, name, value)
    train_all.FOLDER.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def last(job) -> dict:
    """What is in a job's last checkpoint."""
    return torch.load(train_all.path_of(job, "last.pt"), weights_only=True)


def train_and_stop(job, monkeypatch, step: int) -> None:
    """Train until Ctrl-C is pressed in the middle of a step."""
    def press(*arguments):
        if arguments[-1] == step - 1:
            signal.raise_signal(signal.SIGINT)
        return accumulate(*arguments)

    accumulate = train_all.accumulate_gradients
    with monkeypatch.context() as patch:
        patch.setattr(train_all, "accumulate_gradients", press)
        with pytest.raises(KeyboardInterrupt):
            train_all.train_one(job)


def assert_close(weights: dict, expected: dict) -> None:
    """Equal to float precision, except for the key biases.

    A key bias adds the same amount to all scores of a query, which softmax ignores, so its gradient is 0. The computed
    gradient is rounding noise, which Adam turns into a full step.
    """
    assert weights.keys() == expected.keys()
    for name in weights.keys() - {name for name in weights if name.endswith("key.bias")}:
        assert torch.allclose(weights[name], expected[name], atol=1e-4), name


def gradient_of(job, micro_batches, **options) -> tuple[list[torch.Tensor], int]:
    """The gradient that accumulate_gradients leaves after these micro-batches, and of how many targets."""
    torch.manual_seed(0)
    model = job.module.build_model(**job.options | options)
    batches = (toy_dataset.pad_batch([job.make_example(n) for n in numbers]) for numbers in micro_batches)
    _, num_targets, _ = train_all.accumulate_gradients(job, model, batches, len(micro_batches), step=0).tolist()
    return [parameter.grad for parameter in model.parameters()], num_targets


# --- the jobs ---


def test_each_job_has_the_learning_rate_of_its_file_and_fine_tuning_starts_from_the_pretrained_weights():
    for job in train_all.JOBS:
        fine_tuned = job.options.get("task", "masked_lm") != "masked_lm"
        rate = job.module.FINE_TUNING_LEARNING_RATE if fine_tuned else job.module.LEARNING_RATE
        assert job.learning_rate == rate and job.starts_from is (train_all.PRETRAINING if fine_tuned else None)


# --- the order of the data ---


@pytest.mark.parametrize("sizes", [(16, 5), (16, 16), (100, 7), (500, 32), (1, 1)])
def test_each_epoch_takes_every_number_once_in_another_order(monkeypatch, sizes):
    monkeypatch.setattr(train_all, "GLOBAL_BATCH_SIZE", sizes[0])
    monkeypatch.setattr(train_all, "MICRO_BATCH_SIZE", sizes[1])
    plan = train_all.plan_batches(101, num_epochs=3)
    steps = len(plan) // 3
    epochs = [[n for step in plan[steps * e : steps * (e + 1)] for micro in step for n in micro] for e in range(3)]
    assert all(sorted(order) == list(range(101)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(0 < len(micro) <= sizes[1] for step in plan for micro in step)
    lengths = [sum(map(len, step)) for step in plan]
    assert max(lengths) <= sizes[0] and max(lengths) - min(lengths) <= 1


def test_the_order_follows_from_the_seed_alone(monkeypatch):
    plan = train_all.plan_batches(101, 2)
    torch.rand(5)
    assert train_all.plan_batches(101, 2) == plan
    assert train_all.plan_batches(101, 3)[: len(plan)] == plan
    monkeypatch.setattr(train_all, "SEED", 1)
    assert train_all.plan_batches(101, 2) != plan


def test_each_micro_batch_has_its_own_masks_and_dropout(monkeypatch):
    seeds = []

    def compute_loss(model, batch, compute_loss=encoder_only.compute_loss):
        seeds.append(torch.initial_seed())
        return compute_loss(model, batch)

    monkeypatch.setattr(encoder_only, "compute_loss", compute_loss)
    train_all.train_one(MASKED)
    assert len(set(seeds)) == len(seeds) == sum(map(len, train_all.plan_batches(101, 2)))


# --- gradient accumulation ---


@pytest.mark.parametrize("job", [DECODER, TRANSLATOR, TAGGING], ids=lambda job: job.name)
def test_four_micro_batches_of_unequal_token_counts_give_the_gradient_of_one_large_batch(job):
    numbers = [0, 7, 3, 20, 777777, 777776, 123456, 345, 100]
    pieces = [numbers[:4], numbers[4:6], numbers[6:8], numbers[8:]]
    counts = [gradient_of(job, [piece], dropout=0.0)[1] for piece in pieces]
    assert len(set(counts)) > 2
    small_steps, num_small = gradient_of(job, pieces, dropout=0.0)
    one_batch, num_one = gradient_of(job, [numbers], dropout=0.0)
    assert num_small == num_one == sum(counts)
    for ours, expected in zip(small_steps, one_batch):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)  # sums over 60 targets, of order 10


def test_the_micro_batch_size_does_not_change_what_is_learned(monkeypatch):
    job = TRANSLATOR
    train_all.train_one(job)
    expected = last(job)
    monkeypatch.setattr(train_all, "FOLDER", train_all.FOLDER / "other")
    monkeypatch.setattr(train_all, "MICRO_BATCH_SIZE", 16)
    train_all.FOLDER.mkdir()
    train_all.train_one(job)
    assert_close(last(job)["weights"], expected["weights"])
    assert last(job)["history"][-1]["loss"] == pytest.approx(expected["history"][-1]["loss"], abs=1e-4)


def test_loss_and_steps_equal_those_of_the_architecture_files_own_training():
    """One epoch, one micro-batch a step, in the same order: module.train must end with the same weights."""
    job = TRANSLATOR._replace(num_epochs=1)
    torch.manual_seed(train_all.SEED)
    model = job.module.build_model(**job.options)
    plan = train_all.plan_batches(101, 1)
    examples = toy_dataset.NumberDataset(toy_dataset.make_splits().train, job.make_example)
    order = [[n for micro in step for n in micro] for step in plan]
    loaders = Splits(torch.utils.data.DataLoader(examples, batch_sampler=order, collate_fn=toy_dataset.pad_batch),
                     torch.utils.data.DataLoader(examples, batch_size=50, collate_fn=toy_dataset.pad_batch), None)
    history = job.module.train(model, loaders, 1, job.learning_rate, 1, progress=train_all.tqdm(disable=True))
    train_all.train_one(job)
    assert_close(last(job)["weights"], model.state_dict())
    for ours, theirs in zip(last(job)["history"], history):
        for key in ("step", "loss", "learning_rate", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)


# --- one step ---


def test_the_gradient_is_divided_then_clipped_then_applied(monkeypatch):
    monkeypatch.setattr(decoder_only, "GRAD_CLIP", 0.5)
    model = decoder_only.build_model(**TINY)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # its step is the gradient that it was given
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    total = sum(parameter.numel() for parameter in model.parameters()) ** 0.5 * 3.0
    loss, norm = train_all.update(DECODER, model, optimizer, torch.tensor([20.0, 10.0]), step=0)
    assert loss == 2.0 and norm == pytest.approx(total / 10, rel=1e-4)
    moved = torch.cat([(before[name] - weights).flatten() for name, weights in model.state_dict().items()])
    assert moved.norm() == pytest.approx(0.5, rel=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    _, norm = train_all.update(DECODER, model, optimizer, torch.tensor([20.0, 10.0]), step=0)
    assert norm < 0.5
    assert all(torch.allclose(parameter.grad, torch.tensor(1e-5)) for parameter in model.parameters())  # not scaled up


def test_a_batch_without_targets_leaves_the_weights_unchanged(monkeypatch):
    monkeypatch.setattr(encoder_only, "MASK_PROBABILITY", 0.0)
    monkeypatch.setattr(encoder_only, "WEIGHT_DECAY", 0.0)
    job = MASKED._replace(num_epochs=1)
    torch.manual_seed(train_all.SEED)
    start = job.module.build_model(**job.options).state_dict()
    train_all.train_one(job)
    assert all(torch.equal(weights, start[name]) for name, weights in last(job)["weights"].items())
    assert all(entry["loss"] == 0 for entry in last(job)["history"])


@pytest.mark.parametrize("job", [MASKED, DECODER, TRANSLATOR._replace(options=TINY | {"dropout": 0.1})],
                         ids=lambda job: job.name)
def test_gradient_checkpointing_changes_the_memory_and_nothing_else(job):
    torch.manual_seed(0)
    model = job.module.build_model(**job.options)
    batch = toy_dataset.pad_batch([job.make_example(n) for n in (7, 342, 90210)])
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(1)
        train_all.add_gradient(job, model, batch)
        gradients.append([parameter.grad for parameter in model.parameters()])
        train_all.checkpoint_layers(model)
    assert all(torch.equal(without, with_it) for without, with_it in zip(*gradients))


def test_with_gradient_checkpointing_a_layer_stores_its_input_and_nothing_else():
    (shallow, deep), (_, all_deep) = ([train_all.measure_memory(DECODER, layers, checkpointing) for layers in (4, 12)]
                                      for checkpointing in (True, False))
    ids = train_all.sample_batch(DECODER)["ids"]
    assert deep - shallow == 8 * ids.numel() * TINY["d_model"] * 4  # float32
    assert deep < 0.2 * all_deep


def test_stored_activations_are_counted_once_each_and_weights_are_not(monkeypatch):
    job = DECODER._replace(options=TINY | {"num_layers": 1})
    model = torch.nn.Linear(10, 10)
    x = torch.ones(7, 10, requires_grad=True)

    def compute_loss(model, batch):
        y = model(x)                           # stores x, and the weights
        return (y.view(70) * y.t().reshape(70)).sum(), torch.tensor(1)  # stores y, and a copy of it

    monkeypatch.setattr(decoder_only, "build_model", lambda **options: model)
    monkeypatch.setattr(decoder_only, "compute_loss", compute_loss)
    assert train_all.measure_memory(job, 1, False) == 3 * 70 * 4


def test_the_table_of_memory_has_a_column_without_checkpointing_and_one_with_it(monkeypatch, capsys):
    monkeypatch.setattr(train_all, "measure_memory", lambda job, num_layers, on: num_layers * (1e6 if on else 9e6))
    train_all.show_memory([DECODER])
    printed = " ".join(capsys.readouterr().out.split())
    assert "without with decoder_only 2 18.0 MB 2.0 MB decoder_only 12 108.0 MB 12.0 MB" in printed


def test_automatic_precision_is_bf16_only_where_the_gpu_supports_it(monkeypatch):
    assert train_all.MIXED_PRECISION == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *including_emulation: True)
    for capability, expected in [((7, 5), "off"), ((8, 0), "bf16"), ((9, 0), "bf16")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert train_all.precision() == expected


def test_without_mixed_precision_there_is_no_autocast(monkeypatch):
    """torch.autocast("mps") raises in older versions of torch, even if it is disabled."""
    monkeypatch.setattr(train_all, "MIXED_PRECISION", "off")
    monkeypatch.setattr(torch, "autocast", None)
    train_all.add_gradient(DECODER, decoder_only.build_model(**TINY), train_all.sample_batch(DECODER))


@pytest.mark.parametrize("job", [MASKED, DECODER, TRANSLATOR], ids=lambda job: job.name)
def test_nothing_waits_for_the_device_between_micro_batches(job, monkeypatch):
    """On a GPU, reading one value makes Python wait until everything queued so far has been computed."""
    model = job.module.build_model(**job.options)
    batches = iter([train_all.sample_batch(job) for _ in range(2)])

    def wait(tensor, *arguments):
        raise AssertionError("reads a value from the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, name, wait)
        sums = train_all.accumulate_gradients(job, model, batches, 2, step=0)
    assert sums.shape == (3,)


def test_model_flop_utilization_is_6_flops_per_parameter_and_token_over_the_peak(monkeypatch):
    model = decoder_only.build_model(**TINY)
    assert train_all.flops_utilization(DECODER, model, 1e6) is None  # no GPU, no peak
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(train_all, "WORLD_SIZE", 2)
    one_gpu = 6 * sum(p.numel() for p in model.parameters()) * 1e6 / 989e12
    assert train_all.flops_utilization(DECODER, model, 1e6) == pytest.approx(one_gpu / 2)
    assert train_all.flops_utilization(TRANSLATOR, model, 1e6) == pytest.approx(one_gpu / 4)  # a token passes one stack
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU of next year")
    assert train_all.flops_utilization(DECODER, model, 1e6) is None


def test_peak_flops_are_those_without_sparsity_half_of_what_data_sheets_print_first():
    for name, sparse in {"A100": 624e12, "H100": 1979e12, "H200": 1979e12, "B200": 4500e12}.items():
        assert train_all.PEAK_FLOPS[name] == pytest.approx(sparse / 2, rel=1e-3)


def test_tokens_are_counted_in_source_and_target_without_padding_and_seconds_in_steps_alone(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(train_all.time, "perf_counter", lambda: next(clock))  # read once before and once after a step
    monkeypatch.setattr(encoder_decoder, "evaluate", lambda model, loader: {"exact_match": 0.5, "loss": 1.0})
    examples = [toy_dataset.encoder_decoder_example(number) for number in toy_dataset.make_splits().train]
    expected = 2 * sum(len(example["source"]) + len(example["target"]) for example in examples)
    state = train_all.train_one(TRANSLATOR)
    assert state["tokens"] == expected and state["seconds"] == state["step"] == 14


def test_the_plan_estimates_the_steps_that_remain(monkeypatch, capsys):
    train_and_stop(DECODER, monkeypatch, step=5)
    monkeypatch.setattr(train_all, "time_a_step", lambda job: 20.0)
    train_all.show_plan([DECODER])
    printed = capsys.readouterr().out
    assert "batch size 16, micro-batch size 4" in printed  # MICRO_BATCH_SIZE = 5 allows four equal parts
    assert re.search(r"decoder_only +[\d,]+ +14 +5 +3.0 min +random weights", printed)


def test_the_estimated_time_of_a_step_is_that_of_the_jobs_model_times_its_micro_batches(monkeypatch):
    models = []

    def add_gradient(job, model, batch):
        models.append(model)
        assert len(batch["ids"]) == train_all.MICRO_BATCH_SIZE
        return torch.tensor(0.0), torch.tensor(1)

    monkeypatch.setattr(train_all, "add_gradient", add_gradient)
    # The first pass, which includes what happens only once, is not part of the time.
    monkeypatch.setattr(train_all.time, "perf_counter", lambda: {1: 100.0, 2: 107.0}[len(models)])
    assert train_all.time_a_step(DECODER) == pytest.approx(7.0 * 16 / 5)
    assert len(models) == 2 and models[0].constants["D_MODEL"] == TINY["d_model"]


def learn_tagging(monkeypatch, precision: str) -> float:
    """Exact match on held-out numbers after a short training run."""
    monkeypatch.setattr(train_all, "MIXED_PRECISION", precision)
    monkeypatch.setattr(train_all, "EVALUATE_EVERY", 50)
    monkeypatch.setattr(train_all, "FOLDER", train_all.FOLDER.parent / precision)
    train_all.FOLDER.mkdir()
    state = train_all.train_one(TAGGING._replace(num_epochs=4))
    return state["history"][-1]["exact_match"]


def test_bf16_reaches_the_same_accuracy_and_keeps_float32_weights(monkeypatch):
    numbers = list(range(100, 1300))
    random.Random(0).shuffle(numbers)
    monkeypatch.setattr(toy_dataset, "make_splits", lambda: Splits(numbers[:500], numbers[500:700], []))
    seen = []

    def predict(*arguments, predict=encoder_only.predict):
        found = predict(*arguments)
        seen.append(found[0].dtype)
        return found

    monkeypatch.setattr(encoder_only, "predict", predict)
    assert learn_tagging(monkeypatch, "off") > 0.95
    assert set(seen) == {torch.float32}
    assert learn_tagging(monkeypatch, "bf16") > 0.95
    assert set(seen) == {torch.float32, torch.bfloat16}  # evaluated in float32, as the weights are
    saved = last(TAGGING)
    assert all(weights.dtype == torch.float32 for weights in saved["weights"].values())
    assert all(m.dtype == torch.float32 for moments in saved["optimizer"]["state"].values() for m in moments.values())


# --- stopping and resuming ---


@pytest.mark.parametrize("job", [MASKED, DECODER], ids=lambda job: job.name)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(job, monkeypatch):
    train_all.train_one(job)
    expected = kill_train_all.files_of(train_all.FOLDER)
    assert len(expected) == 3
    monkeypatch.setattr(train_all, "FOLDER", train_all.FOLDER.parent / "stopped")
    train_all.FOLDER.mkdir()
    train_and_stop(job, monkeypatch, step=5)
    assert last(job)["step"] == 5 and not last(job)["finished"]
    train_and_stop(job, monkeypatch, step=7)
    torch.rand(3)  # whatever the random state is when it resumes
    train_all.train_one(job)
    assert kill_train_all.differences(kill_train_all.files_of(train_all.FOLDER), expected) == []


def test_killed_after_any_of_its_writes_a_run_ends_like_an_uninterrupted_one(monkeypatch):
    """A kill at a random moment seldom falls between two files that are written one after the other."""
    class Killed(BaseException):
        pass

    def replace(source, target, replace=os.replace):
        replace(source, target)
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)
    countdown, job = [0], TAGGING._replace(num_epochs=1)
    train_all.train_one(job)
    num_writes, folder = -countdown[0], train_all.FOLDER.parent
    expected = kill_train_all.files_of(folder)
    assert num_writes >= 8  # the history and the checkpoint three times, the best weights, and their copy
    for countdown[0] in range(1, num_writes + 1):
        for path in expected:
            (folder / path).unlink(missing_ok=True)
        with pytest.raises(Killed):
            train_all.train_one(job)
        train_all.train_one(job)
        assert kill_train_all.differences(kill_train_all.files_of(folder), expected) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_is_recorded_and_its_handler_is_restored_at_the_end(number):
    before = signal.getsignal(number)
    with train_all.StopRequest() as stop:
        assert not stop.requested
        assert signal.getsignal(number) == stop.note  # otherwise the next line would end the tests
        signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts_the_step_and_keeps_the_last_checkpoint(monkeypatch):
    """A real second Ctrl-C, not the first one again: torchrun may deliver that twice, within an instant."""
    now, survived = [100.0], []
    accumulate = train_all.accumulate_gradients

    def press(*arguments):
        if arguments[-1] == 4:
            for seconds in (0.0, 0.1, 2.0):
                now[0] += seconds
                signal.raise_signal(signal.SIGINT)
                survived.append(seconds)
        return accumulate(*arguments)

    monkeypatch.setattr(train_all.time, "monotonic", lambda: now[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_all, "accumulate_gradients", press)
        train_all.train_one(DECODER)
    assert survived == [0.0, 0.1] and last(DECODER)["step"] == 3
    assert train_all.train_one(DECODER)["finished"]


def test_two_runs_from_one_seed_are_equal_and_another_seed_gives_another(monkeypatch):
    histories = []
    for run, seed in enumerate([0, 0, 1]):
        monkeypatch.setattr(train_all, "SEED", seed)
        monkeypatch.setattr(train_all, "FOLDER", train_all.FOLDER / str(run))
        train_all.FOLDER.mkdir()
        histories.append(train_all.train_one(MASKED)["history"])
    assert histories[0] == histories[1] != histories[2]


def test_the_history_is_json_with_a_line_for_each_step():
    train_all.train_one(DECODER)
    text = train_all.path_of(DECODER, "history.json").read_text()
    history = json.loads(text)
    assert history == last(DECODER)["history"] and text.count("\n") == len(history) + 2
    assert [entry["step"] for entry in history] == list(range(1, 15))
    assert [entry["step"] for entry in history if "exact_match" in entry] == [4, 8, 12, 14]
    assert all({"loss", "learning_rate", "grad_norm"} <= entry.keys() for entry in history)


@pytest.mark.parametrize("ties, best_evaluation", [("the first of equals", 1), ("the lower loss", 2)])
def test_the_best_weights_on_validation_go_where_the_architecture_file_looks(ties, best_evaluation, monkeypatch):
    scores = iter([(0.2, 1.0), (0.9, 3.0), (0.9, 4.0), (0.5, 1.0)] if ties == "the first of equals"
                  else [(0.2, 1.0), (0.9, 3.0), (0.9, 2.0), (0.5, 1.0)])
    weights = []

    def evaluate(model, loader):
        assert loader.dataset.numbers == toy_dataset.make_splits().validation
        weights.append(copy.deepcopy(model.state_dict()))
        exact_match, loss = next(scores)
        return {"exact_match": exact_match, "loss": loss, "mistakes": []}

    monkeypatch.setattr(decoder_only, "evaluate", evaluate)
    train_all.train_one(DECODER)
    for path in (train_all.path_of(DECODER, "best.pt"), decoder_only.CHECKPOINT):
        best = decoder_only.load(path, decoder_only.build_model(**TINY)).state_dict()
        assert all(torch.equal(best[name], weights[best_evaluation][name]) for name in best)
        assert not all(torch.equal(best[name], weights[3][name]) for name in best)


def test_checkpoints_are_written_when_due_and_finished_only_after_the_best_weights_are_in_place(monkeypatch):
    saved = []

    def save_state(job, model, optimizer, state, save_state=train_all.save_state):
        saved.append((state["step"], state["finished"], decoder_only.CHECKPOINT.exists()))
        save_state(job, model, optimizer, state)

    monkeypatch.setattr(train_all, "save_state", save_state)
    train_all.train_one(DECODER)
    assert saved == [(step, False, False) for step in (3, 6, 9, 12)] + [(14, True, True)]


def test_it_stops_early_when_validation_stops_improving(monkeypatch, capsys):
    monkeypatch.setattr(train_all, "EARLY_STOPPING_PATIENCE", 2)
    monkeypatch.setattr(decoder_only, "evaluate", lambda model, loader: {"exact_match": 0.5, "loss": 1.0})
    train_and_stop(DECODER, monkeypatch, step=9)
    assert train_all.train_one(DECODER)["step"] == 12  # evaluations at 4, the best, 8 and 12
    assert "stopped early" in capsys.readouterr().out
    assert train_all.train_one(DECODER)["step"] == 12  # and it remains so
    assert "finished at step 12" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_again(monkeypatch):
    train_all.train_one(DECODER)
    before = train_all.path_of(DECODER, "last.pt").read_bytes()
    monkeypatch.setattr(decoder_only, "compute_loss", None)
    assert train_all.train_one(DECODER)["finished"]
    assert train_all.path_of(DECODER, "last.pt").read_bytes() == before


def test_fine_tuning_starts_from_the_best_pretrained_weights(monkeypatch):
    monkeypatch.setattr(encoder_only, "DROPOUT", 0.0)
    train_all.train_one(MASKED)
    fine_tuned, _, _ = train_all.start_or_resume(TAGGING._replace(starts_from=MASKED))
    pretrained = train_all.load_best(MASKED).state_dict()
    assert all(torch.equal(weights, pretrained[name]) for name, weights in fine_tuned.state_dict().items()
               if not name.startswith("head"))


def test_a_fine_tuning_run_does_not_resume_after_its_pretrained_weights_have_changed(monkeypatch):
    tagging = TAGGING._replace(starts_from=MASKED)
    train_all.train_one(MASKED)
    train_and_stop(tagging, monkeypatch, step=5)
    assert train_all.load_state(tagging, encoder_only.build_model(**tagging.options))["step"] == 5
    encoder_only.save(encoder_only.build_model(**MASKED.options), train_all.path_of(MASKED, "best.pt"))
    with pytest.raises(InputError, match=r"SHA-256 of encoder_only_best\.pt = \w+, and now it is \w+\. Change it back"):
        train_all.train_one(tagging)


def test_checkpoints_hold_plain_names_whatever_the_model_was_wrapped_in(monkeypatch):
    monkeypatch.setattr(train_all, "COMPILE", True)
    monkeypatch.setattr(train_all, "GRADIENT_CHECKPOINTING", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the wrapper without the wait
    job = DECODER._replace(num_epochs=1)
    assert next(iter(train_all.wrap(job, decoder_only.build_model(**TINY)).state_dict())).startswith("_orig_mod.")
    train_all.train_one(job)
    names = set(decoder_only.build_model(**TINY).state_dict())
    assert set(last(job)["weights"]) == names
    assert set(torch.load(train_all.path_of(job, "best.pt"), weights_only=True)["weights"]) == names


def test_a_failing_compiler_is_reported_in_one_sentence(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no C++ compiler\nin a long story")

    monkeypatch.setattr(train_all, "COMPILE", True)
    monkeypatch.setattr(torch, "compile", lambda model, **options: fail)
    with pytest.raises(InputError, match=r"COMPILE = True .* set it to False\. \(.*\)$"):
        train_all.train_one(DECODER)


@pytest.mark.parametrize("job", [MASKED, DECODER, TRANSLATOR], ids=lambda job: job.name)
def test_new_lengths_and_batch_sizes_do_not_compile_again(job, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()  # it remembers which sizes have varied before
    monkeypatch.setattr(train_all, "COMPILE", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    wrapped = train_all.wrap(job, job.module.build_model(**job.options))
    assert len(compiled) == 1
    for numbers in ([7, 3], [777777, 123], [100, 20, 333333], [99999] * 16):
        train_all.add_gradient(job, wrapped, toy_dataset.pad_batch([job.make_example(n) for n in numbers]))
    assert len(compiled) == 1


def test_a_distributed_model_is_still_compiled_and_checkpointed(monkeypatch, tmp_path):
    monkeypatch.setattr(train_all, "COMPILE", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = train_all.wrap(DECODER, decoder_only.build_model(**TINY))
        assert next(iter(wrapped.state_dict())).startswith("module._orig_mod.")
    finally:
        dist.destroy_process_group()


# --- what goes wrong ---


def test_a_nan_loss_stops_the_run_and_leaves_the_last_checkpoint_intact(monkeypatch):
    update = train_all.update

    def poison(job, model, optimizer, sums, step):
        if step == 7:
            next(model.parameters()).grad[0] = float("nan")
        return update(job, model, optimizer, sums, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_all, "update", poison)
        with pytest.raises(FloatingPointError, match="decoder_only: .* step 8.* LEARNING_RATE = .* WARMUP_STEPS = "):
            train_all.train_one(DECODER)
    assert last(DECODER)["step"] == 6
    assert all(weights.isfinite().all() for weights in last(DECODER)["weights"].values())
    train_all.train_one(DECODER)  # and training can resume from it
    assert last(DECODER)["finished"]


def test_a_loss_above_ten_times_that_of_guessing_counts_as_divergence_though_it_is_finite():
    model = decoder_only.build_model(**TINY)
    optimizer = decoder_only.create_optimizer(model, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    guessing = math.log(len(toy_dataset.VOCABULARY))
    train_all.update(DECODER, model, optimizer, torch.tensor([9 * guessing, 1, 0, 0]), step=0)
    with pytest.raises(FloatingPointError, match="diverged"):
        train_all.update(DECODER, model, optimizer, torch.tensor([11 * guessing, 1, 0, 0]), step=0)


def test_a_learning_rate_of_10_is_stopped_in_one_sentence():
    """Norms and clipping keep it finite: it is stopped because its loss is ten times that of uniform guessing."""
    with pytest.raises(FloatingPointError, match="diverged, the loss is [0-9.e+]+ at step .* LEARNING_RATE = 10"):
        train_all.train_one(DECODER._replace(learning_rate=10))


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "a tensor", "an architecture file's", "another job's"])
def test_a_file_that_is_not_a_checkpoint_of_this_run_gets_one_sentence_and_is_kept(kind):
    path = train_all.path_of(DECODER, "last.pt")
    train_all.train_one(DECODER)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "an architecture file's":
        shutil.copy(train_all.path_of(DECODER, "best.pt"), path)
    elif kind == "another job's":
        train_all.train_one(TRANSLATOR)
        shutil.copy(train_all.path_of(TRANSLATOR, "last.pt"), path)
    else:
        path.write_bytes(b"my thesis\n" * 100 if kind == "text" else b"")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"decoder_only_last\.pt .*move the file away") as error:
        train_all.train_one(DECODER)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):  # what unpickling calls
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"job": DECODER.name, "constants": {}, "optimizer": Code()}, train_all.path_of(DECODER, "last.pt"))
    with pytest.raises(InputError, match="damaged, or not a checkpoint"):
        train_all.train_one(DECODER)
    assert not (tmp_path / "it ran").exists()


def test_an_interrupted_write_leaves_the_previous_checkpoint_intact(monkeypatch):
    train_and_stop(DECODER, monkeypatch, step=5)
    path = train_all.path_of(DECODER, "last.pt")
    before = path.read_bytes()

    def save_half(whole, path):
        path.write_bytes(before[:1000])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        with pytest.raises(OSError):
            train_all.train_one(DECODER)
    assert path.read_bytes() == before
    assert train_all.train_one(DECODER)["finished"]


@pytest.mark.parametrize("change, named", [
    ((train_all, "GLOBAL_BATCH_SIZE", 32), "GLOBAL_BATCH_SIZE = 16, and now it is 32"),
    ((decoder_only, "GRAD_CLIP", 0.1), "decoder_only.GRAD_CLIP = 1.0, and now it is 0.1"),
    ((toy_dataset, "SEED", 5), "toy_dataset.SEED = 1234, and now it is 5"),
    ({"learning_rate": 1e-4}, "LEARNING_RATE = 0.002, and now it is 0.0001"),
    ({"options": TINY | {"d_ff": 64}}, "D_FF = 32, and now it is 64"),
])
def test_a_run_does_not_resume_with_other_constants(change, named, monkeypatch):
    train_and_stop(DECODER, monkeypatch, step=5)
    before = train_all.path_of(DECODER, "last.pt").read_bytes()
    job = DECODER
    if isinstance(change, dict):
        job = DECODER._replace(**change)
    else:
        monkeypatch.setattr(*change)
    with pytest.raises(InputError, match=re.escape(named) + r"\. Change it back"):
        train_all.train_one(job)
    assert train_all.path_of(DECODER, "last.pt").read_bytes() == before


@pytest.mark.parametrize("place, name", [
    *(("decoder_only", name) for name in ("DROPOUT", "WARMUP_STEPS", "FINAL_LEARNING_RATE_RATIO", "WEIGHT_DECAY",
                                          "GRAD_CLIP", "LOSS_ON_PROMPT")),
    ("encoder_only", "MASK_PROBABILITY"),
    *(("train_all", name) for name in ("SEED", "GLOBAL_BATCH_SIZE", "MICRO_BATCH_SIZE", "EVALUATE_EVERY",
                                       "EARLY_STOPPING_PATIENCE", "COMPILE", "MIXED_PRECISION")),
    *(("toy_dataset", name) for name in ("NUM_TRAIN", "NUM_VALIDATION")),
])
def test_every_constant_that_the_result_depends_on_is_compared(place, name, monkeypatch):
    job = MASKED if place == "encoder_only" else DECODER
    model = job.module.build_model(**job.options)
    train_all.save_state(job, model, job.module.create_optimizer(model), {"step": 1, "history": []})
    module = sys.modules[place]
    other = {"COMPILE": True, "LOSS_ON_PROMPT": False, "MIXED_PRECISION": "bf16"}.get(name)
    monkeypatch.setattr(module, name, getattr(module, name) + 1 if other is None else other)
    with pytest.raises(InputError, match="and now it is"):
        train_all.load_state(job, model)


def test_constants_that_affect_only_speed_or_memory_may_change_before_resuming(monkeypatch):
    train_and_stop(DECODER, monkeypatch, step=5)
    for name, value in {"GRADIENT_CHECKPOINTING": True, "CHECKPOINT_EVERY": 7, "TEST_EVERYTHING": True}.items():
        monkeypatch.setattr(train_all, name, value)
    assert train_all.train_one(DECODER)["finished"]


@pytest.mark.parametrize("name, value", [("ARCHITECTURES", ["gpt"]), ("ARCHITECTURES", []), ("GLOBAL_BATCH_SIZE", 0),
                                         ("MICRO_BATCH_SIZE", 2.5), ("MIXED_PRECISION", "fp8"), ("EVALUATE_EVERY", -1),
                                         ("CHECKPOINT_EVERY", 0), ("NUM_EPOCHS", 0)])
def test_invalid_constants_are_refused_by_name(name, value, monkeypatch):
    monkeypatch.setattr(train_all, name, value)
    with pytest.raises(InputError, match=f"{name} = "):
        train_all.main()


@pytest.mark.parametrize("processes", [3, 8, 14])
def test_with_many_processes_each_has_a_micro_batch_in_every_step(processes, monkeypatch):
    monkeypatch.setattr(train_all, "WORLD_SIZE", processes)
    train_all.check_constants([DECODER])
    plan = train_all.plan_batches(101, 2)
    assert all(micros[rank::processes] and all(micros) for micros in plan for rank in range(processes))


def test_more_processes_than_examples_in_a_step_are_refused_with_what_works(monkeypatch):
    monkeypatch.setattr(train_all, "WORLD_SIZE", 20)
    with pytest.raises(InputError, match="20 processes .* GLOBAL_BATCH_SIZE = 16 to 40") as error:
        train_all.check_constants([DECODER])
    monkeypatch.setattr(train_all, "GLOBAL_BATCH_SIZE", int(re.search(r" to (\d+)", str(error.value))[1]))
    train_all.check_constants([DECODER])


def test_a_run_does_not_resume_on_more_processes_than_a_step_has_micro_batches(monkeypatch):
    """They would need smaller micro-batches, with other masks and dropout."""
    train_and_stop(DECODER, monkeypatch, step=5)
    monkeypatch.setattr(train_all, "WORLD_SIZE", 5)
    with pytest.raises(InputError, match="micro-batches per step .* one per process.* = 4, and now it is 5"):
        train_all.load_state(DECODER, decoder_only.build_model(**DECODER.options))


@pytest.mark.parametrize("variables, named", [({"RANK": "1", "WORLD_SIZE": "2"}, "without MASTER_ADDR, MASTER_PORT"),
                                              ({"WORLD_SIZE": "4"}, "without RANK, MASTER_ADDR, MASTER_PORT"),
                                              ({"RANK": "1"}, "RANK = 1 and WORLD_SIZE = 1 are set without WORLD")])
def test_an_incomplete_launcher_environment_is_refused(variables, named, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(train_all, name, int(value))
    with pytest.raises(InputError, match=named):
        train_all.main()


def fake_gpus(monkeypatch, count: int, local_rank: int) -> list:
    """A machine with GPUs, as far as start_processes can see. Returns the list of what it does."""
    done = []
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(train_all, "RANK", 3)
    monkeypatch.setattr(train_all, "WORLD_SIZE", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: done.append(gpu))
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(None, 3, 4)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: done.append(backend))
    return done


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch):
    done = fake_gpus(monkeypatch, count=2, local_rank=1)
    train_all.start_processes()
    assert done == ["nccl", 1]


def test_more_processes_than_gpus_are_refused_with_what_works(monkeypatch):
    fake_gpus(monkeypatch, count=2, local_rank=2)
    with pytest.raises(InputError, match="2 GPU.* --nproc-per-node=2"):
        train_all.start_processes()


def test_a_checkpoint_that_rank_0_does_not_have_is_refused(monkeypatch):
    train_all.train_one(DECODER)
    monkeypatch.setattr(train_all, "RANK", 1)
    with pytest.raises(InputError, match="a file system that all machines share"):
        train_all.start_or_resume(DECODER)


# --- the final test ---


def test_testing_everything_leaves_out_training_and_validation_numbers(monkeypatch, capsys):
    monkeypatch.setattr(train_all, "TEST_EVERYTHING", True)
    monkeypatch.setattr(train_all, "MAX_DIGITS", 2)
    monkeypatch.setattr(toy_dataset, "make_splits", lambda: Splits(list(range(60)), [60], [61]))
    job = TRANSLATOR._replace(num_epochs=1)
    state = train_all.train_one(job)
    train_all.show_results([job], [state])
    printed = capsys.readouterr().out
    assert "on all 39 held-out numbers" in printed  # 61 to 99: not those that chose the best weights
    model = train_all.load_best(job)
    wrong = sum("WRONG" in line for line in job.module.answer(model, list(range(61, 100))))
    row = next(line for line in printed.splitlines() if line.startswith("  encoder_decoder ") and "%" in line)
    assert int(row.split()[-1]) == wrong and row.split()[-2] == f"{1 - wrong / 39:.4%}"


def test_the_best_weights_are_tested_and_the_table_shows_what_was_found(monkeypatch, capsys):
    best, asked = object.__new__(encoder_decoder.EncoderDecoderTransformer), []
    torch.nn.Module.__init__(best)
    monkeypatch.setattr(train_all, "load_best", lambda job: best)
    monkeypatch.setattr(encoder_decoder, "evaluate",
                        lambda model, _: {"exact_match": 0.75, "mistakes": [3, 5, 8, 9]} if model is best else None)
    monkeypatch.setattr(encoder_decoder, "answer", lambda model, numbers: asked.extend(numbers) or ["a mistake"])
    train_all.show_results([TRANSLATOR], [{"step": 14, "seconds": 90.0, "history": [{"exact_match": 1.0}]}])
    assert re.search(r"encoder_decoder +0 +14 +1.5 min +75.0000% +4\n", capsys.readouterr().out)
    assert asked == [toy_dataset.make_splits().test[i] for i in (3, 5, 8)]


def test_the_first_mistakes_are_shown_with_the_correct_answers(capsys):
    job = TRANSLATOR._replace(num_epochs=1)
    train_all.show_results([job], [train_all.train_one(job)])
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    first = toy_dataset.make_splits().test[0]
    assert f"encoder_decoder: {first} -> " in printed and f"WRONG: {' '.join(number_to_words(first))}" in printed


# --- run as a reader runs it ---


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The script, run once with small models: its folder, what it printed, and what it printed to stderr."""
    folder = kill_train_all.small_copy(tmp_path_factory.mktemp("train_all") / "undisturbed")
    return folder, *kill_train_all.run(folder)


def test_the_script_prints_a_plan_a_bar_and_one_table(undisturbed):
    folder, printed, errors = undisturbed
    for word in ("PLAN", "parameters", "steps", "validation: loss", "RESULTS, on 100 held-out numbers", "exact"):
        assert word in printed
    assert printed.index("PLAN") < printed.index("encoder_only: ") < printed.index("RESULTS")
    for word in ("loss", "lr", "gradient", "tokens/s"):
        assert word in errors
    assert printed.isascii() and errors.isascii()
    assert [line for line in printed.splitlines() if len(line) > 100 and str(folder) not in line] == []
    rows = printed[printed.index("RESULTS"):]
    assert all(re.search(rf"^  {name} +[\d,]+ +{steps} .*%", rows, re.MULTILINE) for name, steps in [
        ("encoder_only", 57), ("encoder_only_tagging", 19), ("encoder_only_counting", 19),
        ("encoder_only_matching", 19)])


def test_the_architecture_file_answers_with_the_weights_that_were_trained(undisturbed):
    folder, *_ = undisturbed
    done = kill_train_all.subprocess.run([sys.executable, "encoder_only.py", "342"], cwd=folder, capture_output=True,
                                         text=True, check=True)
    assert done.stdout.count("342 -> ") == 2 and "TEST" not in done.stdout


def test_killed_at_random_moments_and_resumed_it_ends_like_an_uninterrupted_run(undisturbed, tmp_path):
    """Up to two kills (a run on a fast machine may finish before the second); tests/kill_train_all.py does twenty."""
    expected = kill_train_all.files_of(undisturbed[0])
    folder = kill_train_all.small_copy(tmp_path / "killed")
    rng = random.Random()
    assert kill_train_all.run_and_kill(folder, rng)
    kill_train_all.files_of(folder)  # reading them shows that every file is whole
    kill_train_all.run_and_kill(folder, rng)
    kill_train_all.files_of(folder)
    kill_train_all.run(folder)
    assert kill_train_all.differences(kill_train_all.files_of(folder), expected) == []


def test_ctrl_c_saves_and_resuming_loses_nothing(undisturbed, tmp_path):
    folder = kill_train_all.small_copy(tmp_path / "stopped", CHECKPOINT_EVERY=1000)
    process = kill_train_all.start(folder)
    while not (line := process.stdout.readline()).startswith("  step     10"):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    saved = torch.load(folder / "checkpoints" / "train_all" / "encoder_only_last.pt", weights_only=True)
    assert f"Saved after step {saved['step']} of 57" in printed and "run the same command again" in printed
    assert 10 <= saved["step"] < 57
    kill_train_all.run(folder)
    assert kill_train_all.differences(kill_train_all.files_of(folder), kill_train_all.files_of(undisturbed[0])) == []


# --- on two processes, as any launcher starts them: torchrun, or a shell that sets torch.distributed's variables ---

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")


def run_two(folder: Path) -> list[tuple[int, str, str]]:
    """Start train_all.py twice, by hand. Returns exit status, output and stderr of rank 0 and of rank 1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = [kill_train_all.start(folder, **variables, RANK=str(rank)) for rank in range(2)]
    try:
        printed = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, printed)]


def insert(folder: Path, before: str, code: str) -> None:
    """Insert code into the train_all.py in a folder, before a text that occurs in it once."""
    script = folder / "train_all.py"
    assert script.read_text().count(before) == 1
    script.write_text(script.read_text().replace(before, code + before))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The script, run once on two processes: its folder, and what run_two returns."""
    folder = kill_train_all.small_copy(tmp_path_factory.mktemp("train_all") / "two")
    insert(folder, "\n\n\ndef say(", "\n\n\nif RANK == 1:\n    os.replace = torch.save = None  # to write is to crash")
    insert(folder, "    run_process()\n",
           "    import atexit\n\n    atexit.register(os.abort)  # and so is Python's shutdown\n")
    return folder, run_two(folder)


def test_two_processes_match_one_and_only_rank_0_prints_and_writes(undisturbed, two_processes):
    """The same dropout, masks and order, so after 57 steps only the order of additions makes a difference: 1e-4."""
    folder, [(status, printed, errors), silent] = two_processes
    assert status == 0 and "on 2 x cpu" in printed and "Traceback" not in errors
    assert silent == (0, "", "")
    assert printed.count("PLAN") == 1 == printed.count("RESULTS")
    assert printed.count("  step     10") == undisturbed[1].count("  step     10") == 4
    ours, expected = kill_train_all.files_of(folder), kill_train_all.files_of(undisturbed[0])
    assert ours.keys() == expected.keys()
    for name in ("encoder_only", "encoder_only_tagging", "encoder_only_counting"):
        path = Path(f"checkpoints/train_all/{name}_last.pt")
        assert_close(ours[path]["weights"], expected[path]["weights"])
        for one, two in zip(expected[path]["history"], ours[path]["history"]):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


def test_a_gpu_trains_with_and_without_compiled_kernels(accelerator, tmp_path):
    if accelerator.type != "cuda":
        pytest.skip("compiled kernels for other GPUs are experimental")
    losses = {}
    for compiled in (False, True):
        folder = kill_train_all.small_copy(tmp_path / str(compiled), ARCHITECTURES=["decoder_only"], COMPILE=compiled)
        printed, _ = kill_train_all.run(folder)
        assert "on 1 x cuda" in printed and "RESULTS" in printed
        found = kill_train_all.files_of(folder)[Path("checkpoints/train_all/decoder_only_last.pt")]
        losses[compiled] = [entry["loss"] for entry in found["history"]]
    assert losses[True] == pytest.approx(losses[False], rel=0.2)  # other dropout masks


def test_under_torchrun_ctrl_c_and_sigterm_save_and_resuming_loses_nothing(two_processes, tmp_path):
    """SIGTERM reaches one process only, as when a cluster preempts one of two machines: both must stop."""
    folder = kill_train_all.small_copy(tmp_path / "stopped", CHECKPOINT_EVERY=1000)
    whole = (folder / "train_all.py").read_text()
    insert(folder, "    model.zero_grad()\n",
           "    if 10 <= step < 40:\n        time.sleep(0.1)  # leaves Ctrl-C the time to arrive\n")
    process = kill_train_all.start(folder, *TORCHRUN)
    while not (line := process.stdout.readline()).startswith("  step     10"):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=100)
    path = folder / "checkpoints" / "train_all" / "encoder_only_last.pt"
    step = torch.load(path, weights_only=True)["step"]
    assert process.returncode != 0 and f"Saved after step {step} of 57" in printed and 10 <= step < 40
    assert errors.count("Stopped.") == 1
    (folder / "train_all.py").write_text(whole)
    insert(folder, "    model.zero_grad()\n",
           "    if RANK == 1 and step == 45:\n        signal.raise_signal(signal.SIGTERM)\n")
    [(status, printed, errors), other] = run_two(folder)
    assert f"resuming from step {step}" in printed and "Saved after step 46 of 57" in printed
    assert status == other[0] == 130
    (folder / "train_all.py").write_text(whole)
    assert [status for status, *_ in run_two(folder)] == [0, 0]
    differences = kill_train_all.differences(kill_train_all.files_of(folder), kill_train_all.files_of(two_processes[0]))
    assert differences == []


def test_an_error_on_one_process_is_one_sentence_with_its_rank_and_ends_all(tmp_path):
    folder = kill_train_all.small_copy(tmp_path / "failing")
    insert(folder, "    model.zero_grad()\n", "    if RANK == 1 and step == 2:\n        raise InputError('no luck.')\n")
    outcomes = run_two(folder)
    assert [status for status, *_ in outcomes] == [1, 1]
    sentences = [line for _, _, errors in outcomes for line in errors.splitlines() if line.strip() and "%|" not in line]
    assert sentences == ["rank 1: train_all.py: no luck."]
