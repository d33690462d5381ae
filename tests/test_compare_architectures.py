"""What compare_architectures.py promises: fair, held out, computed exactly, and every number in one file."""

import doctest
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import compare_architectures as compare  # noqa: E402
import decoder_only  # noqa: E402
import encoder_decoder  # noqa: E402
import encoder_only  # noqa: E402
import toy_dataset  # noqa: E402
from toy_dataset import EOS_ID, IGNORE, MASK_ID, VOCABULARY, InputError, number_to_words  # noqa: E402

TINY = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32}
SMALL_RUN = {"D_MODEL": "16", "NUM_LAYERS": "1", "NUM_HEADS": "2", "D_FF": "32", "BATCH_SIZE": "50", "NUM_EPOCHS": "2",
             "SEEDS": "[0, 1]", "NUM_TESTED": "120", "NUM_SAMPLES": "30", "NUM_TIMED": "2", "CACHE_LENGTHS": "[8, 16]"}
ALL_CELLS = [*compare.CELLS, compare.AFTER_READING]
by_row = {cell.row: cell for cell in ALL_CELLS}


def by_name(cell) -> str:
    return f"{cell.work} by {cell.module.__name__}"


def set_constants(path: Path, constants: dict) -> None:
    source = path.read_text()
    for name, value in constants.items():
        source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", source, flags=re.MULTILINE)
        assert count == 1, name
    path.write_text(source)


def copy_of_the_repository(folder: Path) -> Path:
    """The scripts in an empty folder, with constants so small that everything runs in seconds."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    set_constants(folder / "compare_architectures.py", SMALL_RUN)
    set_constants(folder / "toy_dataset.py", {"NUM_TRAIN": "400", "NUM_VALIDATION": "100", "NUM_TEST": "400"})
    return folder


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The script, run once as a reader runs it. Returns what it printed, and what it wrote."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("compare"))
    done = subprocess.run([sys.executable, "compare_architectures.py"], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"LANG": "C", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "figures" / "comparison.json").read_text()), folder


@pytest.fixture
def few_numbers(monkeypatch):
    """Splits of a few numbers each."""
    splits = toy_dataset.make_splits()
    few = toy_dataset.Splits(splits.train[:120], splits.validation[:30], splits.test[:60])
    monkeypatch.setattr(toy_dataset, "make_splits", lambda: few)


@pytest.fixture
def untrained():
    """A small model with random weights for a cell."""
    def build(cell):
        torch.manual_seed(0)
        return cell.module.build_model(**TINY, **cell.options).eval()
    return build


def learn_by_heart(cell, numbers: list[int], num_steps: int):
    """A small model for a cell, trained on nothing but these numbers."""
    torch.manual_seed(0)
    model = cell.module.build_model(**TINY | {"d_model": 32}, **cell.options)
    batch = toy_dataset.pad_batch([cell.make_example(number) for number in numbers])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(num_steps):
        loss_sum, num_targets = cell.module.compute_loss(model, batch)
        optimizer.zero_grad()
        (loss_sum / num_targets).backward()
        optimizer.step()
    return model.eval()


# --- the ceiling ---


def best_of_any_reader(numbers: list[int]) -> float:
    """By brute force: for each beginning that occurs, the best of all answers, counted over all that begin like it."""
    labels = defaultdict(Counter)
    for digits in map(str, numbers):
        for i in range(len(digits)):
            labels[digits[: i + 1]][len(digits) - i - 1] += 1
    return sum(max(counts.values()) for counts in labels.values()) / sum(map(Counter.total, labels.values()))


@pytest.mark.parametrize("copies", [{1: 100, 2: 10, 3: 1}, {1: 100, 2: 30, 3: 1}, {1: 1, 2: 1, 3: 1}, {2: 3, 3: 1},
                                    {1: 700, 2: 20, 3: 1}])
def test_the_ceiling_is_that_of_brute_force_over_a_whole_language(copies):
    # All numbers of each length, each length repeated to make it common or rare. In a whole language, no beginning
    # tells more than its length: so the best answer to each beginning is the best answer to its position.
    numbers = [n for length, times in copies.items() for n in [*range(10 ** (length - 1), 10**length)] * times]
    assert compare.left_to_right_ceiling(numbers)[0] == pytest.approx(best_of_any_reader(numbers), abs=1e-12)


@pytest.mark.parametrize("lengths, expected", [(range(1, 7), 6 / 21), (range(3, 7), 6 / 18), ([5], 1.0)])
def test_the_ceiling_of_evenly_spread_lengths_is_known_by_hand(lengths, expected):
    numbers = [int("7" * length) for length in lengths]
    assert compare.left_to_right_ceiling(numbers)[0] == pytest.approx(expected)


def test_no_answers_by_position_beat_the_ceiling_and_some_reach_it():
    rng = random.Random(0)
    numbers = [rng.randrange(10 ** (length - 1), 10**length) for length in rng.choices([2, 3, 4], [1, 5, 3], k=300)]
    truths = [[len(str(n)) - i - 1 for i in range(len(str(n)))] for n in numbers]
    num_digits = sum(map(len, truths))
    shares = []
    for first in range(4):  # all ways to answer by position, whatever they are
        for second in range(4):
            for third in range(4):
                for fourth in range(4):
                    answers = (first, second, third, fourth)
                    shares.append(sum(a == t for truth in truths for a, t in zip(answers, truth)) / num_digits)
    ceiling, by_position = compare.left_to_right_ceiling(numbers)
    assert max(shares) == pytest.approx(ceiling)
    asked = [sum(len(truth) > i for truth in truths) for i in range(4)]
    assert sum(share * n for share, n in zip(by_position, asked)) / num_digits == pytest.approx(ceiling)


# --- fair and held out ---


def test_tested_numbers_are_test_numbers_without_repetition_and_as_even_as_can_be():
    splits = toy_dataset.make_splits()
    numbers = compare.held_out_numbers(compare.NUM_TESTED)
    assert len(set(numbers)) == len(numbers) == compare.NUM_TESTED
    assert set(numbers) <= set(splits.test) and not set(numbers) & set(splits.train)
    lengths = Counter(len(str(n)) for n in numbers)
    longer = [lengths[n] for n in range(4, toy_dataset.MAX_DIGITS + 1)]
    assert max(longer) - min(longer) <= 1 and lengths[3] > 0


@pytest.mark.parametrize("cell", ALL_CELLS, ids=by_name)
def test_a_cell_learns_from_training_numbers_and_is_asked_about_test_numbers(cell, monkeypatch, few_numbers):
    learned, asked = set(), set()

    def train(model, loaders, *_, **__):
        learned.update(loaders.train.dataset.numbers)
        assert loaders.train.dataset.examples == list(map(cell.make_example, loaders.train.dataset.numbers))
        return []

    def answer(model, numbers):
        asked.update(numbers)
        return cell.answer(model, numbers)

    monkeypatch.setattr(cell.module, "train", train)
    monkeypatch.setattr(compare, "SIZES", TINY)
    monkeypatch.setattr(compare, "NUM_TESTED", 20)
    monkeypatch.setattr(compare, "NUM_SAMPLES", 5)
    monkeypatch.setattr(compare, "NUM_TIMED", 2)
    compare.run_cell(cell._replace(answer=answer), compare.tqdm(disable=True))
    assert learned == set(toy_dataset.make_splits().train)
    assert asked and asked <= set(toy_dataset.make_splits().test)


def test_all_cells_get_the_same_sizes_steps_and_learning_rate(monkeypatch, few_numbers):
    calls = []
    for module in (encoder_only, decoder_only, encoder_decoder):
        def train(model, loaders, num_epochs, learning_rate, progress, module=module):
            sizes = {name: size for name, size in model.constants.items() if name != "task"}
            calls.append((num_epochs, learning_rate, len(loaders.train), loaders.train.batch_size, str(sizes)))
            return []
        monkeypatch.setattr(module, "train", train)
    for cell in ALL_CELLS:
        compare.train_cell(cell, 0, compare.NUM_EPOCHS, compare.tqdm(disable=True))
    assert len(calls) == 10 and len(set(calls)) == 1
    assert calls[0][:2] == (compare.NUM_EPOCHS, compare.LEARNING_RATE)


@pytest.mark.parametrize("module", [encoder_only, decoder_only, encoder_decoder])
def test_constants_that_would_make_it_unfair_are_refused(module, monkeypatch):
    monkeypatch.setattr(module, "WEIGHT_DECAY", 0.5)
    with pytest.raises(InputError, match="WEIGHT_DECAY is .* in all three"):
        compare.check_constants()


@pytest.mark.parametrize("name, value", [("NUM_EPOCHS", 0), ("SEEDS", []), ("NUM_TESTED", 20_001), ("NUM_SAMPLES", 0.5),
                                         ("CACHE_LENGTHS", []), ("CACHE_LENGTHS", [0, 5]), ("BEAM_WIDTH", 0),
                                         ("TOP_P", 0), ("TOP_P", 1.1)])
def test_constants_that_measure_nothing_are_refused_by_name(name, value, monkeypatch):
    monkeypatch.setattr(compare, name, value)
    with pytest.raises(InputError, match=name):
        compare.check_constants()


def test_the_nine_cells_are_all_pairs_and_each_architecture_has_one_natural_work():
    pairs = {(cell.module.__name__, cell.work) for cell in compare.CELLS}
    assert len(compare.CELLS) == len(pairs) == 9
    natural = [(cell.module.__name__, cell.work) for cell in compare.CELLS if cell.natural]
    assert natural == [("encoder_only", "understand"), ("encoder_decoder", "transform"), ("decoder_only", "generate")]


# --- examples and answers ---


@pytest.mark.parametrize("cell", ALL_CELLS, ids=by_name)
def test_an_example_is_what_its_docstring_draws(cell):
    drawn = {"T2": ("<SEP> 3 4 2", "- two one zero"),
             "T3": ("<SOS> two one zero", "two one zero <EOS>"),
             "T4": ("<CLS> 3 4 2 <SEP>" + 10 * " <MASK>", "- - - - - three hundred forty two <SEP> - - - - -"),
             "T5": ("<SOS> 3 4 2 <SEP> three hundred forty two", "- - - - three hundred forty two <EOS>"),
             "T6": ("<SOS> three hundred forty two", "three hundred forty two <EOS>"),
             "T8": ("<SOS> 3 4 2 <SEP> three hundred forty two", "3 4 2 <SEP> three hundred forty two <EOS>"),
             "T9": ("<SOS> 3 4 2 <SEP> three hundred forty two", "3 4 2 <SEP> three hundred forty two <EOS>"),
             "T10": ("<SOS> 3 4 2 <SEP> two one zero", "- - - - two one zero <EOS>")}
    if cell.row not in drawn:
        assert cell.make_example in encoder_only.TASKS.values()
        return
    example = cell.make_example(342)
    source = example.pop("source", None)
    tokens = [["-" if i == IGNORE else VOCABULARY[i] for i in ids] for ids in example.values()]
    assert [" ".join(row) for row in tokens] == list(drawn[cell.row])
    if source is not None:
        assert toy_dataset.to_tokens(source) == (["<EOS>"] if cell.work == "generate" else ["3", "4", "2", "<EOS>"])


def test_the_while_reading_example_hides_what_follows_from_each_answer(untrained):
    model = untrained(by_row["T2"])
    (short,), (long,) = (compare.say_while_reading(model, [number]) for number in (34, 34_567))
    assert long.split()[:2] == short.split()


def test_one_pass_naming_is_asked_for_masks_alone_and_their_number_tells_nothing():
    lengths = {sum(i == MASK_ID for i in compare.one_pass_example(number)["ids"]) for number in (7, 342, 777_777)}
    assert lengths == {toy_dataset.MAX_WORDS + 1}
    example = compare.one_pass_example(777_777)
    assert [VOCABULARY[i] for i in example["targets"][-10:]] == [*number_to_words(777_777), "<SEP>"]


def test_an_encoder_takes_a_batch_with_targets_as_it_stands(untrained):
    batch = toy_dataset.pad_batch([compare.one_pass_example(number) for number in (7, 342)])
    seen = []
    model = untrained(by_row["T4"])
    model.embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    _, targets = encoder_only.predict(model, batch)
    assert torch.equal(seen[0], batch["ids"]) and torch.equal(targets, batch["targets"])


@pytest.mark.parametrize("label", ["T1", "T2", "T3", "T4", "T5", "T6", "T10"])
def test_answers_in_a_batch_are_the_answers_one_by_one(label, untrained):
    cell, numbers = by_row[label], [100, 90_210, 342, 777_777]
    model = untrained(cell)
    assert cell.answer(model, numbers) == [cell.answer(model, [number])[0] for number in numbers]


@pytest.mark.parametrize("label", ["T1", "T2", "T4", "T5", "T6", "T10"])
def test_a_model_that_has_learned_a_few_numbers_by_heart_answers_them_right(label):
    cell, numbers = by_row[label], [100, 342, 7001, 90_210]
    model = learn_by_heart(cell, numbers, num_steps=120)
    found = compare.score(cell.answer(model, numbers), [compare.truth(cell.work, number) for number in numbers])
    # While reading, all four begin with another digit, so that even a left-to-right reader can learn them by heart.
    assert found["sequence_accuracy"] == found["token_accuracy"] == 1.0


@pytest.mark.parametrize("label", ["T7", "T8", "T9"])
def test_texts_written_freely_differ_and_follow_the_seed(label, untrained):
    cell = by_row[label]
    model = untrained(cell)
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(cell.answer(model, range(8)))
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 4


def test_filled_texts_have_no_mask_left_and_lengths_of_training_numbers(untrained):
    torch.manual_seed(0)
    shapes = {(len(str(n)), len(number_to_words(n))) for n in toy_dataset.make_splits().train}
    for text in compare.fill_all(untrained(by_row["T7"]), range(30)):
        digits, words = text.split(" <SEP> ")
        assert not set(text.replace("<SEP>", "").split()) & set(toy_dataset.SPECIAL_TOKENS)
        assert (len(digits.split()), len(words.split())) in shapes


# --- measuring ---


def test_scores_are_shares_of_whole_answers_of_tokens_and_of_tokens_by_place():
    found = compare.score(["two one zero", "one", "zero zero two"], ["two one zero", "one zero", "one zero"])
    assert found["sequence_accuracy"] == pytest.approx(1 / 3)
    assert found["token_accuracy"] == pytest.approx(5 / 7)  # 3 of 3, 1 of 2 (too short), 1 of 2
    assert found["by_position"] == pytest.approx([2 / 3, 2 / 3, 1.0])


def test_texts_are_judged_valid_new_and_distinct():
    learned, unseen = toy_dataset.make_splits().train[0], toy_dataset.make_splits().test[0]

    def text(number):
        return f"{' '.join(str(number))} <SEP> {' '.join(number_to_words(number))}"

    wrong = ["", "7", "7 <SEP>", "7 <SEP> eight", "0 7 <SEP> seven", "7 <SEP> seven seven", "7 <SEP> seven <SEP> seven"]
    assert list(map(compare.read_text, wrong)) == [None] * len(wrong)
    assert compare.judge([text(learned), text(unseen), text(unseen), "7 <SEP> eight"]) == {
        "valid": 0.75, "distinct": 0.75, "new": 0.25}


def test_passes_are_counted(untrained):
    cell = by_row["T1"]
    assert compare.time_answers(cell, untrained(cell), [342, 7001])["forward_passes"] == 1
    for label, more in [("T5", 0), ("T6", 1)]:  # a pass for each token, and one for the source
        cell = by_row[label]
        model, numbers = untrained(cell), [342, 7001]
        tokens = [len(text.split()) for text in cell.answer(model, numbers)]
        passes = compare.time_answers(cell, model, numbers)["forward_passes"]
        limit = compare.LONGEST
        assert passes == sum(min(count + 1, limit) + more for count in tokens) / 2


@pytest.mark.parametrize("num_steps", [0, 40])
def test_log_probabilities_are_those_of_beam_search_for_texts_that_end_and_for_those_cut_off(num_steps):
    numbers = [342, 7001, 90_210]
    model = learn_by_heart(by_row["T6"], numbers, num_steps)
    sources = [encoder_decoder.make_source(number) for number in numbers]
    ids, scores = encoder_decoder.beam_search(model, sources, 4, length_penalty=0.0, max_new_tokens=compare.LONGEST)
    assert (EOS_ID in ids[:, 0]) == (num_steps > 0)
    said = compare.log_probabilities(model, numbers, compare.search(model, numbers, 4))
    assert said == pytest.approx(scores[:, 0].tolist(), abs=1e-3)


def test_a_history_is_thinned_out_to_means_and_keeps_every_evaluation():
    history = [{"step": i + 1, "loss": float(i)} for i in range(50)]
    history[24]["exact_match"] = 0.5
    history[49]["exact_match"] = 1.0
    points = compare.thin_out(history)
    assert [point["step"] for point in points] == [20, 25, 45, 50]
    assert [point["loss"] for point in points] == [9.5, 22.0, 34.5, 47.0]
    assert [point.get("exact_match") for point in points] == [None, 0.5, None, 1.0]


def test_several_seeds_give_their_mean_and_each_single_one():
    runs = [{"sequence_accuracy": share, "by_position": [share, 1.0], "valid": None, "parameters": 7,
             "history": [share]} for share in (0.5, 1.0)]
    assert compare.mean_of_runs(runs) == {"sequence_accuracy": 0.75, "by_position": [0.75, 1.0], "valid": None,
                                          "parameters": 7, "history": [0.5], "sequence_accuracy_by_seed": [0.5, 1.0]}


@pytest.mark.parametrize("label", ["T1", "T5", "T6"])
def test_components_hold_every_parameter_once(label, untrained):
    model = untrained(by_row[label])
    counts = compare.count_parameters(model)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    C, K, V = 16, toy_dataset.MAX_DIGITS, len(VOCABULARY)
    attention = 4 * (C * C + C)
    assert counts["token embedding"] == V * C and counts["head"] == (C * K + K if label == "T1" else 0)
    assert counts["self-attention"] == (2 if label == "T6" else 1) * attention
    assert counts["cross-attention"] == (attention if label == "T6" else 0)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(compare).failed == 0 and doctest.testmod(compare).attempted >= 2


# --- the decision guide ---


def example_of_findings() -> dict:
    """Findings as the script collects them, invented."""
    cells = [{"row": f"T{i + 1}", "architecture": architecture, "work": work, "sequence_accuracy": 1.0,
              "ms_per_answer": 1.0 + i} for i, (work, architecture) in enumerate(
                  (work, name) for work in ("understand", "transform", "generate") for name in compare.NAMES)]
    strategies = [{"row": f"S{i + 1}", "strategy": name, "named": 1.0, "distinct": 1.0, "valid": 0.9, "new": 0.8}
                  for i, name in enumerate([*compare.STRATEGIES, "greedy", "beam width 3"])]
    beam = [{"row": f"B{i + 1}", "model": "trained" if i < 2 else "unfinished", "method": "-", "exact": 0.5,
             "likelier": 0.1, "ms_per_answer": 1.0} for i in range(4)]
    return {"cells": cells, "strategies": strategies, "beam": beam,
            "wall": {"ceiling": 0.3, "causal": 0.3, "after_reading": 1.0, "bidirectional": 1.0},
            "kv_cache": {"lengths": [1, 2], "cached_ms": [1.0, 1.0], "recomputed_ms": [1.0, 4.0]},
            "parameters": {"encoder_only": {"a": 1}, "decoder_only": {"a": 2}, "encoder_decoder": {"a": 3}}}


def test_the_guide_says_what_was_measured_and_names_rows():
    found = example_of_findings()
    lines = compare.decision_guide(found)
    assert len(lines) == 10
    assert all(re.search(r"\b[TWSBKP]\d", line) for line in lines)
    assert "is all there: encoder-only (T1: 100.00% right, 1.0 ms). As right, and slower: decoder-only (T2" in lines[0]
    assert "25% after 2 (K2)" in lines[8] and "1.5 times" in lines[9]


def test_shares_differ_only_when_luck_does_not_explain_it():
    assert not compare.differ(1.0, 0.992, 500)   # four mistakes, and none
    assert compare.differ(1.0, 0.992, 3000)      # twenty-four, and none
    assert compare.differ(0.74, 0.81, 500) and compare.differ(0.81, 0.74, 500)
    assert not compare.differ(1.0, 1.0, 10) and not compare.differ(0.0, 0.0, 10)
    # Two coins that fall alike are called different in about one of twenty trials.
    torch.manual_seed(0)
    shares = torch.distributions.Binomial(500, 0.7).sample((1000, 2)).div(500).tolist()
    assert 0.02 < sum(compare.differ(*pair, 500) for pair in shares) / 1000 < 0.08


def test_the_guide_calls_equal_what_luck_explains_and_names_the_fastest_first():
    found = example_of_findings()
    found["cells"][6]["sequence_accuracy"] = 0.998   # of 500 texts
    assert "out of nothing: encoder-only (T7: 99.80% right, 7.0 ms). As right" in compare.decision_guide(found)[2]
    found["cells"][6]["sequence_accuracy"] = 0.9
    assert "Less often right: encoder-only (T7: 90.00%" in compare.decision_guide(found)[2]


def test_the_guide_turns_with_the_numbers():
    found = example_of_findings()
    found["cells"][0]["sequence_accuracy"] = 0.4       # the encoder fails, the decoder is next in speed
    for cell in found["cells"][3:6]:
        cell["sequence_accuracy"] = 0.2
    found["strategies"][0]["named"] = 0.5
    found["beam"][1]["exact"], found["beam"][3]["exact"] = 0.6, 0.4
    lines = compare.decision_guide(found)
    assert "is all there: decoder-only (T2" in lines[0] and "Less often right: encoder-only (T1: 40.00%" in lines[0]
    assert "none has learned it yet" in lines[1]
    assert "greedy is not the best (S1: 50.0%" in lines[4]
    assert "and more right (B1: 50.0%, B2: 60.0%)" in lines[6] and "and fewer right (B3" in lines[7]


# --- the script ---


def test_it_runs_as_a_reader_runs_it_and_prints_everything_in_order(small_run):
    done, _, _ = small_run
    headings = ["THREE ARCHITECTURES", "MASKS", "EXAMPLES", "THE TABLE", "THE WALL", "STRATEGIES", "BEAM SEARCH",
                "KV CACHE", "PARAMETERS", "DECISION GUIDE"]
    assert re.findall(f"^({'|'.join(headings)})", done.stdout, re.MULTILINE) == headings
    assert done.stdout.isascii() and [line for line in done.stdout.splitlines() if len(line) > 100] == []
    assert [line for line in done.stdout.splitlines() if line != line.rstrip()] == []
    bars = done.stderr.replace("\n", "\r").split("\r")
    assert done.stderr.isascii() and max(map(len, bars)) <= 100
    steps = (2 * 10 * 2 + 1) * 8  # seeds, cells, epochs, and the unfinished model's; of 400 numbers in batches of 50
    assert f"{steps}/{steps}" in bars[-2] + bars[-1]


def test_every_row_that_the_guide_names_is_printed(small_run):
    done, _, _ = small_run
    tables, _, guide = done.stdout.partition("DECISION GUIDE")
    lines = guide.split("  - ")[1:]
    assert len(lines) == 10 and all(re.search(r"\b[TWSBKP]\d", line) for line in lines)
    rows = set(re.findall(r"\b[TWSBKP]\d+\b", guide))
    assert len(rows) > 15
    assert rows <= set(re.findall(r"^  ([TWSBKP]\d+)\b", tables, re.MULTILINE))


def test_the_file_follows_its_schema(small_run):
    _, found, folder = small_run
    assert list(found) == ["constants", "cells", "after_reading", "wall", "strategies", "beam", "kv_cache",
                           "parameters"]
    assert [path.name for path in (folder / "figures").iterdir()] == ["comparison.json"]
    keys = ("row architecture work natural how train_seconds sequence_accuracy token_accuracy by_position valid new "
            "distinct parameters ms_per_answer forward_passes history sequence_accuracy_by_seed").split()
    assert [cell["row"] for cell in found["cells"]] == [f"T{i}" for i in range(1, 10)]
    for cell in [*found["cells"], found["after_reading"]]:
        assert sorted(cell) == sorted(keys)
        free = cell["work"] == "generate"
        assert all((cell[key] is None) == free for key in ("token_accuracy", "by_position"))
        assert all((cell[key] is None) != free for key in ("valid", "new", "distinct"))
        assert 0 <= cell["sequence_accuracy"] <= 1 and len(cell["sequence_accuracy_by_seed"]) == 2
        assert cell["sequence_accuracy"] == pytest.approx(sum(cell["sequence_accuracy_by_seed"]) / 2, abs=1e-4)
        assert cell["train_seconds"] > 0 and cell["ms_per_answer"] > 0 and cell["forward_passes"] >= 1
        assert cell["history"][-1]["step"] == 16 and "exact_match" in cell["history"][-1]
    wall = found["wall"]
    readers = ["ceiling", "causal", "after_reading", "bidirectional", "encoder_decoder"]
    assert list(wall) == [*readers, "by_position"] and list(wall["by_position"]) == readers
    assert all(len(shares) == toy_dataset.MAX_DIGITS for shares in wall["by_position"].values())
    assert [row["row"] for row in found["strategies"]] == [f"S{i}" for i in range(1, 17)]
    assert sorted(found["strategies"][0]) == ["architecture", "distinct", "named", "new", "row", "strategy",
                                              "tokens_per_second", "valid"]
    assert [row["row"] for row in found["beam"]] == ["B1", "B2", "B3", "B4"]
    assert {len(values) for values in found["kv_cache"].values()} == {2}
    assert list(found["parameters"]) == ["encoder_only", "decoder_only", "encoder_decoder"]
    assert found["constants"]["D_MODEL"] == 16 and found["constants"]["toy_dataset.NUM_TRAIN"] == 400


def test_printed_and_written_numbers_agree(small_run):
    done, found, _ = small_run
    for cell in [*found["cells"], found["after_reading"]]:
        line = next(line for line in done.stdout.splitlines()
                    if re.match(rf"  {cell['row']} +{cell['work']} ", line) and "%" in line)
        assert f"{cell['sequence_accuracy']:.2%}" in line and f"{cell['parameters']:,}" in line
    assert re.search(rf"^  W1 .* {found['wall']['ceiling']:.2%} ", done.stdout, re.MULTILINE)


def test_the_ceiling_binds_the_causal_reader_and_only_it(small_run):
    _, found, _ = small_run
    wall = found["wall"]
    assert wall["ceiling"] < 0.5
    assert wall["causal"] < wall["ceiling"] + 0.05  # luck: the guesses of a reader that cannot know


def test_a_folder_that_cannot_be_written_is_one_sentence_before_any_training(tmp_path):
    folder = copy_of_the_repository(tmp_path)
    (folder / "figures").write_text("a file, where the folder should be")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "compare_architectures.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and time.perf_counter() - start < 30
    assert len(done.stderr.strip().splitlines()) == 1 and "figures" in done.stderr


def test_arguments_are_refused(tmp_path):
    folder = copy_of_the_repository(tmp_path)
    command = [sys.executable, "compare_architectures.py", "342"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_ctrl_c_ends_it_cleanly_and_writes_nothing(tmp_path):
    folder = copy_of_the_repository(tmp_path)
    set_constants(folder / "compare_architectures.py", {"NUM_EPOCHS": "1000"})
    process = subprocess.Popen([sys.executable, "-u", "compare_architectures.py"], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if "T10" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped." in errors and "Traceback" not in errors
    assert list((folder / "figures").iterdir()) == []
