"""Distillation: the soft loss and its gradient are the paper's equations, and no test number reaches the student."""

import random

import decoder_only
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from toy_dataset import (IGNORE, MAX_DIGITS, PAD_ID, VOCABULARY, Splits, decoder_only_example, make_splits,
                         number_to_words, pad_batch, to_ids)
from tqdm import tqdm

from variations import distillation
from variations.distillation import (
    add_teacher_logits,
    answered_example,
    ask_teacher,
    distillation_loss,
    half_labeled,
    labeled_examples,
    soft_loss,
    train_student,
    unlabeled_numbers,
)

NUMBERS = [7, 342, 90210, 123456]
TEMPERATURES = [1, 4, 20]


def two_logits():
    torch.manual_seed(0)
    return torch.randn(5, 11, dtype=torch.float64, requires_grad=True), 3 * torch.randn(5, 11, dtype=torch.float64)


def gradient(loss, student):
    return torch.autograd.grad(loss.sum(), student)[0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_soft_loss_is_torchs_kl_divergence_times_the_square_of_the_temperature(temperature):
    student, teacher = two_logits()
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    expected = temperature ** 2 * F.kl_div(log_q, p, reduction="none").sum(-1)
    torch.testing.assert_close(soft_loss(student, teacher, temperature), expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradient_is_t_times_the_difference_of_the_probabilities(temperature):
    student, teacher = two_logits()
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    torch.testing.assert_close(gradient(soft_loss(student, teacher, temperature), student), temperature * (q - p))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_with_equal_logits_loss_and_gradient_are_zero(temperature):
    _, teacher = two_logits()
    student = (teacher + 3).requires_grad_()  # a constant added to all logits changes no probability
    loss = soft_loss(student, teacher, temperature)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-9, rtol=0)
    torch.testing.assert_close(gradient(loss, student), torch.zeros_like(teacher), atol=1e-9, rtol=0)


def test_against_a_one_hot_teacher_at_temperature_1_it_is_the_cross_entropy():
    student, _ = two_logits()
    labels = torch.tensor([0, 3, 10, 3, 5])
    one_hot = 1000 * F.one_hot(labels, 11).double()
    soft, hard = soft_loss(student, one_hot, 1), F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(soft, hard)
    torch.testing.assert_close(gradient(soft, student), gradient(hard, student))


def test_for_a_large_temperature_the_gradient_matches_logits_as_in_equation_4_of_the_paper():
    student, teacher = two_logits()
    difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    limit, errors = difference.detach() / 11, []
    for temperature in (10, 100, 1000):
        errors.append((gradient(soft_loss(student, teacher, temperature), student) - limit).abs().max().item())
    assert errors[1] < errors[0] / 8 and errors[2] < errors[1] / 8 and errors[2] < 1e-2 * limit.abs().max()


@pytest.mark.parametrize("temperature", [None, 1, 4])
def test_neither_padding_nor_the_prompt_counts(temperature):
    student, teacher = tiny(decoder_only, seed=1), tiny(decoder_only)
    data = add_teacher_logits(teacher, pad_batch(labeled_examples(NUMBERS)))
    loss = distillation_loss(student, data, temperature)
    longer = {"ids": F.pad(data["ids"], (0, 3), value=PAD_ID), "targets": F.pad(data["targets"], (0, 3), value=IGNORE),
              "teacher": F.pad(data["teacher"], (0, 0, 0, 3), value=50.0)}
    torch.testing.assert_close(distillation_loss(student, longer, temperature), loss)
    longer["teacher"][longer["targets"] == IGNORE] = torch.randn(len(decoder_only.VOCABULARY))
    torch.testing.assert_close(distillation_loss(student, longer, temperature), loss)


def test_without_a_temperature_the_loss_is_the_bases():
    student, data = tiny(decoder_only), pad_batch(labeled_examples(NUMBERS))
    loss_sum, num_targets = decoder_only.compute_loss(student, data)
    torch.testing.assert_close(distillation_loss(student, data, None), loss_sum / num_targets)


def test_with_labels_the_loss_is_the_weighted_mean_of_both(monkeypatch):
    student, teacher = tiny(decoder_only, seed=1), tiny(decoder_only)
    data = add_teacher_logits(teacher, pad_batch(labeled_examples(NUMBERS)))
    losses = []
    for weight in (0.0, 1.0, 0.3):
        monkeypatch.setattr(distillation, "LABEL_WEIGHT", weight)
        losses.append(distillation_loss(student, data, 4))
    torch.testing.assert_close(losses[1], distillation_loss(student, data, None))
    torch.testing.assert_close(losses[2], 0.7 * losses[0] + 0.3 * losses[1])
    # A student that is the teacher has no soft loss left, and gets no gradient from it.
    monkeypatch.setattr(distillation, "LABEL_WEIGHT", 0.0)
    distillation_loss(teacher, data, 4).backward()
    assert max(parameter.grad.abs().max() for parameter in teacher.parameters()) < 1e-4


def test_the_teachers_logits_are_those_of_each_text_alone_and_carry_no_gradient():
    teacher = tiny(decoder_only, dropout=0.5)
    data = add_teacher_logits(teacher.train(), pad_batch(labeled_examples(NUMBERS)))
    assert not data["teacher"].requires_grad
    for row, number in enumerate(NUMBERS):
        ids = decoder_only_example(number)["ids"]
        torch.testing.assert_close(data["teacher"][row, :len(ids)], teacher(torch.tensor([ids]))[0])


@pytest.mark.parametrize("number", [*NUMBERS, 0, 999_999])
def test_a_correct_answer_makes_the_example_of_the_label(number):
    answer = to_ids([*number_to_words(number), "<EOS>"])
    assert answered_example(number, [*answer, PAD_ID, PAD_ID]) == decoder_only_example(number, loss_on_prompt=False)


def test_the_teachers_examples_hold_what_it_generates():
    teacher = tiny(decoder_only)
    for number, example in zip(NUMBERS, ask_teacher(teacher, NUMBERS, tqdm(disable=True))):
        generated = decoder_only.generate(teacher, [decoder_only.make_prompt(number)])[0].tolist()
        targets = [target for target in example["targets"] if target != IGNORE]
        assert targets == generated and len(example["ids"]) == len(example["targets"])
        assert example["ids"] == (decoder_only.make_prompt(number) + generated)[:-1]


def test_unlabeled_numbers_are_in_no_split_and_all_are_different():
    numbers = unlabeled_numbers()
    assert len(set(numbers)) == len(numbers) == distillation.NUM_UNLABELED
    assert set(numbers).isdisjoint(set().union(*make_splits())) and max(numbers) < 10 ** MAX_DIGITS
    assert sum(number < 100_000 for number in numbers) == len(numbers) / 2  # as many of five digits as of six


def test_no_row_trains_on_a_number_that_it_is_tested_or_chosen_on(monkeypatch):
    monkeypatch.setattr(distillation, "NUM_UNLABELED", 50)
    monkeypatch.setattr(distillation, "NUM_LABELED", 20)
    numbers = unlabeled_numbers()
    prompts_of = {tuple(decoder_only.make_prompt(n)) for split in make_splits()[1:] for n in split}
    rows = distillation.build_data(tiny(decoder_only), labeled_examples(numbers), labeled_examples(numbers), seed=0)
    assert len(rows) == 6
    for data, _ in rows.values():
        for ids in data["ids"].tolist():
            assert tuple(ids[:ids.index(decoder_only.SEP_ID) + 1]) not in prompts_of


def test_a_student_trains_and_the_same_seed_gives_the_same_student(monkeypatch):
    monkeypatch.setattr(distillation, "BATCH_SIZE", 4)
    monkeypatch.setattr(distillation, "NUM_STEPS", 30)
    data = add_teacher_logits(tiny(decoder_only), pad_batch(labeled_examples(random.Random(0).sample(range(1000), 10))))
    students = [train_student(data, 4, 1e-2, seed, tqdm(disable=True)) for seed in (0, 0, 1)]
    weights = [student.embedding.weight for student in students]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    torch.manual_seed(0)
    untrained = decoder_only.build_model(**distillation.STUDENT)
    assert distillation_loss(students[0], data, 4) < 0.7 * distillation_loss(untrained, data, 4)


def test_without_a_teacher_a_student_is_trained_as_the_base_is(monkeypatch):
    monkeypatch.setattr(distillation, "BATCH_SIZE", 4)
    monkeypatch.setattr(distillation, "NUM_STEPS", 10)
    data, bar = pad_batch(labeled_examples(range(40))), tqdm(disable=True)
    student = train_student(data, None, 1e-2, 0, bar)
    torch.manual_seed(0)
    base = decoder_only.build_model(**distillation.STUDENT)
    batches = [{name: tensor[rows] for name, tensor in data.items()} for rows in torch.randperm(40).split(4)]
    decoder_only.train(base, Splits(batches, [], []), 1, 1e-2, num_evaluations=0, progress=bar)
    torch.testing.assert_close(student.embedding.weight, base.embedding.weight)


def test_each_row_has_its_examples_and_temperature_and_the_labeled_ones_are_repeated(monkeypatch):
    labeled, others = labeled_examples([7, 8]), labeled_examples(range(300, 305))
    assert torch.equal(half_labeled(labeled, others)["ids"], pad_batch(2 * labeled + others)["ids"])
    monkeypatch.setattr(distillation, "half_labeled", lambda labeled, others: others)
    monkeypatch.setattr(distillation, "make_splits", lambda: Splits(list(range(1000)), [], []))
    rows, again = (distillation.build_data(tiny(decoder_only), ["answered"], ["true"], seed) for seed in (0, 1))
    assert (rows[distillation.ANSWERS][0], rows[distillation.TRUTH][0]) == (["answered"], ["true"])
    assert {rows[name][1]: name for name in distillation.SOFT.values()} == distillation.SOFT
    assert not torch.equal(rows[distillation.LABELS][0]["ids"], again[distillation.LABELS][0]["ids"])


def test_validation_numbers_choose_the_learning_rate_and_test_numbers_are_reported(monkeypatch):
    quality = {"validation": [0, 0.1, 0.7, 0.4], "test": [0, 0.2, 0.3, 0.9]}
    for name, value in dict(LEARNING_RATES=(1, 2, 3), SEEDS=(5, 6), build_data=lambda *_: {"row": ("data", None)},
                            make_splits=lambda: Splits("train", "validation", "test"),
                            train_student=lambda data, temperature, *rate_and_seed: rate_and_seed[:2],
                            share_correct=lambda student, split: quality[split][student[0]] + student[1]).items():
        monkeypatch.setattr(distillation, name, value)
    assert distillation.measure(None, [], [], None) == {"row": {"rate": 2, "exact": [5.3, 6.3], "student": (2, 5)}}


def test_the_conclusions_are_those_of_the_measurements(monkeypatch, capsys):
    rows = (distillation.LABELS, *distillation.SOFT.values(), distillation.ANSWERS, distillation.TRUTH,
            distillation.ALL_LABELS)
    exact = ([0.4, 0.5], [0.1, 0.2], [0.45, 0.6], [0.6, 0.7], [0.65, 0.75], [0.8, 0.9])
    found = {row: {"rate": 0, "exact": values, "student": tiny(decoder_only)} for row, values in zip(rows, exact)}
    for name, value in dict(build=lambda _: tiny(decoder_only), unlabeled_numbers=lambda: NUMBERS,
                            measure=lambda *_: found, ask_teacher=lambda *_: labeled_examples([*NUMBERS[:3], 8]),
                            share_correct=lambda *_: 0.95, time_names=lambda _: {"teacher": 4, "student": 1},
                            save_figure=lambda *_: None).items():
        monkeypatch.setattr(distillation, name, value)
    distillation.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "T = 1: exact match is below that of labels alone." in printed
    assert "25.00% of them wrong: exact match is above that of labels alone (+20.0 points), and within" in printed
    assert "true names for the same numbers (+25.0 points). Here distillation pays." in printed
    assert "no teacher, exact match is above that with its answers." in printed


def test_at_a_high_temperature_the_teacher_gives_every_token_the_same_probability():
    found = distillation.probability_of_labels(tiny(decoder_only), 1e6)
    assert found == pytest.approx(1 / len(VOCABULARY), rel=1e-3)


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(distillation, TEACHER=distillation.STUDENT, TEACHER_EPOCHS=1, TEACHER_BATCH_SIZE=8,
                       NUM_LABELED=8, NUM_UNLABELED=10, BATCH_SIZE=4, NUM_STEPS=2, LEARNING_RATES=(1e-3, 1e-2),
                       NUM_TESTS=10, SEEDS=(0, 1), TIMINGS=1)
    assert all(text in printed for text in ("teacher: 16 labels", "of them wrong", "Here distillation"))


@pytest.mark.parametrize("name", ["NUM_LABELED", "NUM_UNLABELED"])
def test_more_numbers_than_there_are_are_refused_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr(distillation, name, 10 ** 6)
    with pytest.raises(distillation.InputError, match=f"{name} = 1000000 must be from 1 to"):
        distillation.main()
