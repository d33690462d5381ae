"""compare_architectures.py: equal conditions, held-out numbers, exact measurements, verdicts that follow from them."""

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
from toy_dataset import IGNORE, MASK_ID, SOS_ID, VOCABULARY, InputError, number_to_words  # noqa: E402

TINY = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32}
SMALL_RUN = {"D_MODEL": "16", "NUM_LAYERS": "1", "NUM_HEADS": "2", "D_FF": "32", "BATCH_SIZE": "50", "NUM_EPOCHS": "2",
             "NUM_SEEDS": "2", "NUM_TESTED": "120", "NUM_SAMPLES": "30", "NUM_TIMED": "2", "NUM_ROUNDS": "2",
             "UNDERTRAINED": "100", "CACHE_LENGTHS": "[8, 16]"}
ALL_CELLS = [*compare.CELLS, compare.AFTER_READING]
BY_NAME = {cell.name: cell for cell in ALL_CELLS}
GENERATE = [cell.name for cell in ALL_CELLS if cell.truth is None]
NO_BAR = compare.tqdm(disable=True)


def by_name(cell) -> str:
    return cell.name


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
    """The script, run once as a reader runs it. Returns what it printed and what it wrote."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("compare"))
    done = subprocess.run([sys.executable, "compare_architectures.py"], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"LANG": "C", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "figures" / "comparison.json").read_text()), folder


def test_it_runs_on_a_gpu(accelerator, tmp_path):
    done = subprocess.run([sys.executable, "compare_architectures.py"], cwd=copy_of_the_repository(tmp_path),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"device {accelerator.type}" in done.stdout


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


def overfit(cell, numbers: list[int], num_steps: int):
    """A small model for a cell, trained on these numbers alone."""
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


def best_of_any_causal_tagger(numbers: list[int]) -> float:
    """By brute force: for each prefix that occurs, the most frequent label among all numbers with that prefix."""
    labels = defaultdict(Counter)
    for digits in map(str, numbers):
        for i in range(len(digits)):
            labels[digits[: i + 1]][len(digits) - i - 1] += 1
    return sum(max(counts.values()) for counts in labels.values()) / sum(map(Counter.total, labels.values()))


@pytest.mark.parametrize("copies", [{1: 100, 2: 10, 3: 1}, {1: 100, 2: 30, 3: 1}, {1: 1, 2: 1, 3: 1}, {2: 3, 3: 1},
                                    {1: 700, 2: 20, 3: 1}])
def test_the_ceiling_equals_brute_force_over_a_whole_language(copies):
    # All numbers of each length, each length repeated to make it common or rare. In a whole language a prefix tells
    # nothing but its length, so the best label for each prefix is the best label for its position.
    numbers = [n for length, times in copies.items() for n in [*range(10 ** (length - 1), 10**length)] * times]
    assert compare.causal_ceiling(numbers)[0] == pytest.approx(best_of_any_causal_tagger(numbers), abs=1e-12)


@pytest.mark.parametrize("lengths, expected", [(range(1, 7), 6 / 21), (range(3, 7), 6 / 18), ([5], 1.0)])
def test_the_ceiling_for_evenly_spread_lengths_matches_a_hand_calculation(lengths, expected):
    numbers = [int("7" * length) for length in lengths]
    assert compare.causal_ceiling(numbers)[0] == pytest.approx(expected)


def test_no_answers_by_position_beat_the_ceiling_and_some_reach_it():
    rng = random.Random(0)
    numbers = [rng.randrange(10 ** (length - 1), 10**length) for length in rng.choices([2, 3, 4], [1, 5, 3], k=300)]
    truths = [[len(str(n)) - i - 1 for i in range(len(str(n)))] for n in numbers]
    num_digits = sum(map(len, truths))
    shares = []
    for first in range(4):  # all ways to label by position
        for second in range(4):
            for third in range(4):
                for fourth in range(4):
                    answers = (first, second, third, fourth)
                    shares.append(sum(a == t for truth in truths for a, t in zip(answers, truth)) / num_digits)
    ceiling, by_position = compare.causal_ceiling(numbers)
    assert max(shares) == pytest.approx(ceiling)
    asked = [sum(len(truth) > i for truth in truths) for i in range(4)]
    assert sum(share * n for share, n in zip(by_position, asked)) / num_digits == pytest.approx(ceiling)


# --- fair and held out ---


def test_tested_numbers_are_held_out_distinct_and_evenly_distributed_over_lengths():
    splits = toy_dataset.make_splits()
    numbers = compare.held_out_numbers(compare.NUM_TESTED)
    assert len(set(numbers)) == len(numbers) == compare.NUM_TESTED
    assert set(numbers) <= set(splits.test) and not set(numbers) & set(splits.train)
    lengths = Counter(len(str(n)) for n in numbers)
    longer = [lengths[n] for n in range(4, toy_dataset.MAX_DIGITS + 1)]
    assert max(longer) - min(longer) <= 1 and lengths[3] > 0
    assert set(compare.held_out_numbers(50, "validation")) <= set(splits.validation)


@pytest.mark.parametrize("cell", ALL_CELLS, ids=by_name)
def test_a_cell_is_trained_on_training_numbers_and_tested_on_test_numbers(cell, monkeypatch, few_numbers):
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
    compare.run_cell(cell._replace(answer=answer), NO_BAR)
    assert learned == set(toy_dataset.make_splits().train)
    assert asked and (cell.truth is None or asked <= set(toy_dataset.make_splits().test))


def test_all_cells_get_the_same_sizes_steps_and_seeds_and_each_architecture_one_learning_rate(monkeypatch, few_numbers):
    calls, rates = [], {}
    for module in (encoder_only, decoder_only, encoder_decoder):
        def train(model, loaders, num_epochs, learning_rate, num_evaluations, progress, module=module):
            sizes = {name: size for name, size in model.constants.items() if name != "task"}
            calls.append((num_epochs, len(loaders.train), loaders.train.batch_size, str(sizes)))
            rates.setdefault(module.__name__, set()).add(learning_rate)
            return [{"step": 1, "loss": 1.0}]
        monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(compare, "measure_cell", lambda cell, model, seed: {"seed": seed})
    entries = [compare.run_cell(cell, NO_BAR)[0] for cell in ALL_CELLS]
    assert len(calls) == 10 * compare.NUM_SEEDS and len(set(calls)) == 1 and calls[0][0] == compare.NUM_EPOCHS
    assert rates == {name: {rate} for name, rate in compare.LEARNING_RATES.items()}
    assert {tuple(entry["by_seed"]["seed"]) for entry in entries} == {tuple(compare.SEEDS)}


def test_a_training_run_depends_on_its_seed_alone(monkeypatch, few_numbers):
    monkeypatch.setattr(compare, "SIZES", TINY)
    cell, weights = BY_NAME["decoder-only, generate"], []
    for seed, noise in [(0, 5), (0, 6), (1, 5)]:
        torch.manual_seed(noise)
        model, _ = compare.train_cell(cell, seed, NO_BAR, num_epochs=1)
        assert not model.training
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_each_seed_has_its_own_order_of_the_training_numbers(monkeypatch, few_numbers):
    orders = []
    monkeypatch.setattr(decoder_only, "train", lambda model, loaders, *_, **__: orders.append(
        [batch["ids"].tolist() for batch in loaders.train]))
    for seed in (0, 1):
        compare.train_cell(BY_NAME["decoder-only, generate"], seed, NO_BAR)
    assert orders[0] != orders[1]


def test_different_values_of_SEED_share_no_training_run(tmp_path):
    source = Path(compare.__file__).read_text()
    line = re.search(r"^SEEDS = .*$", source, re.MULTILINE).group()
    seeds = []
    for seed in range(3):
        names = {"NUM_SEEDS": 3, "SEED": seed}
        exec(line, names)
        seeds += names["SEEDS"]
    assert len(set(seeds)) == 9


@pytest.mark.parametrize("module", [encoder_only, decoder_only, encoder_decoder])
@pytest.mark.parametrize("name", ["WEIGHT_DECAY", "DROPOUT", "WARMUP_STEPS"])
def test_constants_that_would_make_the_comparison_unfair_are_refused(module, name, monkeypatch):
    monkeypatch.setattr(module, name, 0.5)
    with pytest.raises(InputError, match=f"{name} is .* in all three"):
        compare.check_constants()


@pytest.mark.parametrize("name, value", [("NUM_EPOCHS", 0), ("NUM_SEEDS", 0), ("NUM_TESTED", 20_001),
                                         ("NUM_SAMPLES", 0.5), ("CACHE_LENGTHS", []), ("CACHE_LENGTHS", [0, 5]),
                                         ("BEAM_WIDTH", 0), ("TOP_P", 0), ("TOP_P", 1.1), ("UNDERTRAINED", -1)])
def test_constants_that_measure_nothing_are_refused_by_name(name, value, monkeypatch):
    monkeypatch.setattr(compare, name, value)
    with pytest.raises(InputError, match=name):
        compare.check_constants()


def test_the_nine_cells_are_all_pairs_and_each_architecture_has_one_native_task():
    pairs = {(cell.module.__name__, cell.task) for cell in compare.CELLS}
    assert len(compare.CELLS) == len(pairs) == 9
    native = [(cell.module.__name__, cell.task) for cell in compare.CELLS if cell.native]
    assert native == [("encoder_only", "understand"), ("encoder_decoder", "transform"), ("decoder_only", "generate")]


def test_learning_rates_are_chosen_on_validation_numbers_with_a_seed_that_is_used_nowhere_else(monkeypatch):
    seeds, splits = set(), []
    monkeypatch.setattr(compare, "train_cell", lambda cell, seed, bar, rate: (seeds.add(seed), []))
    monkeypatch.setattr(compare, "measure_cell", lambda cell, model, seed, split="test": splits.append(split) or
                        {"sequence_accuracy": 1.0})
    compare.search_learning_rates()
    assert splits == ["validation"] * 30 and seeds and not seeds & set(compare.SEEDS)


def test_strategies_and_searches_are_measured_with_the_models_they_are_named_for(monkeypatch):
    monkeypatch.setattr(compare, "run_cell", lambda cell, bar: ({}, [cell.name]))
    monkeypatch.setattr(compare, "train_cell", lambda cell, *settings: ((cell.name, settings[0], *settings[2:]), []))
    monkeypatch.setattr(compare, "time_cells", lambda cells, models: [{} for _ in cells])
    for name in ("measure_strategies", "compare_beam", "build_wall", "time_cache"):
        monkeypatch.setattr(compare, name, lambda *models: models)
    found, name = compare.compare(), "encoder-decoder, transform"
    assert found["strategies"] == (["decoder-only, generate"],)
    undertrained = [(name, seed, 1, compare.UNDERTRAINED) for seed in compare.SEEDS]
    assert found["beam"] == ({"trained": [name], "undertrained": undertrained},)


# --- examples and answers ---


DRAWN = {  # inputs and targets as the docstrings draw them
    "decoder-only, understand": ("<SEP> 3 4 2", "- two one zero"),
    "encoder-decoder, understand": ("<SOS> two one zero", "two one zero <EOS>"),
    "encoder-only, transform": ("<CLS> 3 4 2 <SEP>" + 10 * " <MASK>",
                                "- - - - - three hundred forty two <SEP> - - - - -"),
    "decoder-only, transform": ("<SOS> 3 4 2 <SEP> three hundred forty two", "- - - - three hundred forty two <EOS>"),
    "encoder-decoder, transform": ("<SOS> three hundred forty two", "three hundred forty two <EOS>"),
    "decoder-only, generate": ("<SOS> 3 4 2 <SEP> three hundred forty two",
                               "3 4 2 <SEP> three hundred forty two <EOS>"),
    "encoder-decoder, generate": ("<SOS> 3 4 2 <SEP> three hundred forty two",
                                  "3 4 2 <SEP> three hundred forty two <EOS>"),
    "decoder-only, understand after reading": ("<SOS> 3 4 2 <SEP> two one zero", "- - - - two one zero <EOS>")}


@pytest.mark.parametrize("cell", ALL_CELLS, ids=by_name)
def test_an_example_matches_its_docstring(cell):
    if cell.name not in DRAWN:
        assert cell.make_example in encoder_only.TASKS.values()
        return
    example = cell.make_example(342)
    source = example.pop("source", None)
    tokens = [["-" if i == IGNORE else VOCABULARY[i] for i in ids] for ids in example.values()]
    assert [" ".join(row) for row in tokens] == list(DRAWN[cell.name])
    if source is not None:
        assert toy_dataset.to_tokens(source) == (["<EOS>"] if cell.truth is None else ["3", "4", "2", "<EOS>"])


def test_labels_given_while_reading_do_not_depend_on_later_digits(untrained):
    cell = BY_NAME["decoder-only, understand"]
    (short,), (long,) = (cell.answer(untrained(cell), [number]) for number in (34, 34_567))
    assert long.split()[:2] == short.split()


def test_one_pass_naming_has_targets_at_masks_only_and_their_number_leaks_nothing():
    lengths = {sum(i == MASK_ID for i in compare.one_pass_example(number)["ids"]) for number in (7, 342, 777_777)}
    assert lengths == {toy_dataset.MAX_WORDS + 1}
    example = compare.one_pass_example(777_777)
    assert [VOCABULARY[i] for i in example["targets"][-10:]] == [*number_to_words(777_777), "<SEP>"]


def test_an_encoder_does_not_mask_a_batch_that_has_targets(untrained):
    batch = toy_dataset.pad_batch([compare.one_pass_example(number) for number in (7, 342)])
    seen = []
    model = untrained(BY_NAME["encoder-only, transform"])
    model.embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    _, targets = encoder_only.predict(model, batch)
    assert torch.equal(seen[0], batch["ids"]) and torch.equal(targets, batch["targets"])


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in GENERATE])
def test_answers_in_a_batch_equal_those_one_by_one(name, untrained):
    cell, numbers = BY_NAME[name], [100, 90_210, 342, 777_777]
    model = untrained(cell)
    assert cell.answer(model, numbers) == [cell.answer(model, [number])[0] for number in numbers]


@pytest.mark.parametrize("name", ["encoder-only, understand", "decoder-only, understand", "encoder-only, transform",
                                  "decoder-only, transform", "encoder-decoder, transform", compare.AFTER_READING.name])
def test_a_model_that_has_memorized_a_few_numbers_answers_them_correctly(name):
    cell, numbers = BY_NAME[name], [100, 342, 7001, 90_210]
    model = overfit(cell, numbers, num_steps=120)
    found = compare.score(cell.answer(model, numbers), [" ".join(cell.truth(number)) for number in numbers])
    # All four begin with a different digit, so that even the causal tagger can memorize their labels.
    assert found["sequence_accuracy"] == found["token_accuracy"] == 1.0


@pytest.mark.parametrize("name", GENERATE)
def test_unconditional_samples_differ_and_follow_the_seed(name, untrained):
    cell = BY_NAME[name]
    model = untrained(cell)
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(cell.answer(model, range(8)))
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 4


def test_filled_texts_have_no_masks_and_the_lengths_of_training_numbers(untrained):
    torch.manual_seed(0)
    shapes = {(len(str(n)), len(number_to_words(n))) for n in toy_dataset.make_splits().train}
    drawn = set()
    for text in compare.fill_all(untrained(BY_NAME["encoder-only, generate"]), range(30)):
        digits, words = text.split(" <SEP> ")
        assert not set(text.replace("<SEP>", "").split()) & set(toy_dataset.SPECIAL_TOKENS)
        drawn.add((len(digits.split()), len(words.split())))
    assert drawn <= shapes and len(drawn) > 5


def test_masks_are_filled_from_right_to_left_each_given_all_to_its_right(untrained):
    model, inputs = untrained(BY_NAME["encoder-only, generate"]), []
    model.embedding.register_forward_hook(lambda _, arguments, __: inputs.append(arguments[0].clone()))
    compare.fill_all(model, range(1))
    left = [(ids[0] == MASK_ID).nonzero().flatten().tolist() for ids in inputs]
    assert len(left[-1]) == 1 and all(longer[:-1] == shorter for longer, shorter in zip(left, left[1:]))


class Recorder:
    """Stands in for an architecture file's generate, and keeps the settings of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, inputs, max_new_tokens, **settings):
        self.calls.append(settings)
        return torch.full((len(inputs), 1), toy_dataset.EOS_ID)


@pytest.mark.parametrize("module, answer", [(decoder_only, compare.complete), (encoder_decoder, compare.translate)])
def test_decoding_is_greedy_and_ignores_the_constants_of_the_architecture_files(module, answer, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(module, "generate", recorder)
    answer(None, [342])
    answer(None, [342], temperature=1.0)
    expected = {"temperature": 0.0, "top_k": None, "top_p": None}
    if module is decoder_only:
        expected["repetition_penalty"] = 1.0
    assert recorder.calls == [expected, expected | {"temperature": 1.0}]


@pytest.mark.parametrize("strategy", compare.STRATEGIES)
def test_a_strategy_applies_what_its_name_says_to_naming_and_to_sampling(strategy, monkeypatch):
    recorder, (kind, _, value) = Recorder(), strategy.rpartition(" ")
    monkeypatch.setattr(decoder_only, "generate", recorder)
    monkeypatch.setattr(compare, "STRATEGIES", {strategy: compare.STRATEGIES[strategy]})
    monkeypatch.setattr(compare, "time_interleaved", lambda calls: dict.fromkeys(calls, 1.0))
    assert compare.measure_strategies([None, None])[0]["ms_per_answer"] == 0.01  # 1 ms for 100 answers
    expected = {"temperature": 0.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0}
    if kind:
        expected |= {"temperature": 0.0 if "penalty" in kind else 1.0}
        expected |= {kind.replace("-", "_").replace(" ", "_"): int(value) if kind == "top-k" else float(value)}
    assert recorder.calls == [expected] * 4  # two models, each naming and sampling


@pytest.mark.parametrize("name", GENERATE[1:])
def test_unconditional_samples_are_drawn_with_temperature_1_and_top_p(name, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(BY_NAME[name].module, "generate", recorder)
    BY_NAME[name].answer(None, range(3))
    assert compare.SAMPLING.items() <= recorder.calls[0].items() and compare.SAMPLING["top_p"] == compare.TOP_P


# --- measuring ---


def test_accuracy_is_measured_per_answer_per_token_and_by_position():
    found = compare.score(["two one zero", "one", "zero zero two"], ["two one zero", "one zero", "one zero"])
    assert found["sequence_accuracy"] == pytest.approx(1 / 3)
    assert found["token_accuracy"] == pytest.approx(5 / 7)  # 3 of 3, 1 of 2 (too short), 1 of 2
    assert found["by_position"] == pytest.approx([2 / 3, 2 / 3, 1.0])


def test_samples_are_scored_as_valid_new_and_distinct():
    learned, unseen = toy_dataset.make_splits().train[0], toy_dataset.make_splits().test[0]

    def text(number):
        return f"{' '.join(str(number))} <SEP> {' '.join(number_to_words(number))}"

    wrong = ["", "7", "7 <SEP>", "7 <SEP> eight", "0 7 <SEP> seven", "7 <SEP> seven seven", "7 <SEP> seven <SEP> seven"]
    assert list(map(compare.read_text, wrong)) == [None] * len(wrong)
    assert compare.score_samples([text(learned), text(unseen), text(unseen), "7 <SEP> eight"]) == {
        "valid": 0.75, "distinct": 0.75, "new": 0.25}


def test_forward_passes_are_counted_per_answer(untrained, monkeypatch):
    monkeypatch.setattr(compare, "NUM_TIMED", 3)
    monkeypatch.setattr(compare, "time_interleaved", lambda calls: dict.fromkeys(calls, 6.0))
    names = ["encoder-only, understand", "decoder-only, transform", "encoder-decoder, transform"]
    cells, models = [BY_NAME[name] for name in names], {name: [untrained(BY_NAME[name])] for name in names}
    found = compare.time_cells(cells, models)
    assert [row["ms_per_answer"] for row in found] == [2.0] * 3  # 6 ms for 3 answers
    assert found[0]["forward_passes"] == 1
    for cell, row, more in zip(cells[1:], found[1:], (0, 1)):  # one pass per token, and one for the source
        tokens = [len(text.split()) for text in cell.answer(models[cell.name][0], compare.held_out_numbers(3))]
        assert row["forward_passes"] == pytest.approx(sum(min(n + 1, compare.LONGEST) + more for n in tokens) / 3)


def test_samples_depend_on_the_seed_alone_wherever_they_are_measured(untrained, monkeypatch):
    monkeypatch.setattr(compare, "NUM_SAMPLES", 40)
    monkeypatch.setattr(compare, "time_interleaved", lambda calls: dict.fromkeys(calls, 1.0))
    cell, passes, scores = BY_NAME["encoder-only, generate"], [], []
    model = untrained(cell)
    for noise in range(3):
        torch.manual_seed(noise)
        passes.append(compare.time_cells([cell], {cell.name: [model]}))
        torch.manual_seed(noise)
        monkeypatch.setattr(compare, "score_samples", lambda texts: {"valid": hash(tuple(texts))})
        scores.append(compare.measure_cell(cell, model, seed=0))
    assert passes[0] == passes[1] == passes[2] and scores[0] == scores[1] == scores[2]
    assert compare.measure_cell(cell, model, seed=1) != scores[0]


def test_the_wall_compares_accuracies_per_digit(monkeypatch):
    monkeypatch.setattr(compare, "held_out_numbers", lambda count: [7, 34, 342])
    entries = [{"architecture": cell.module.__name__, "task": cell.task, "sequence_accuracy": 0.0,
                "token_accuracy": i / 10, "by_position": [i / 10]} for i, cell in enumerate(ALL_CELLS)]
    wall = compare.build_wall(entries[:-1], entries[-1])
    expected = {"ceiling": 0.5, "causal": 0.1, "after_reading": 0.9, "bidirectional": 0.0, "encoder_decoder": 0.2}
    by_position = wall.pop("by_position")
    assert wall == expected and by_position.pop("ceiling") == pytest.approx([1 / 3, 1 / 2, 1])
    assert by_position == {name: [share] for name, share in expected.items() if name != "ceiling"}


def test_times_are_medians_in_milliseconds_of_interleaved_rounds(monkeypatch):
    monkeypatch.setattr(compare, "NUM_ROUNDS", 3)
    order = []
    times = compare.time_interleaved({"short": lambda: (order.append("s"), time.sleep(0.002)),
                                      "long": lambda: (order.append("l"), time.sleep(0.008))})
    assert 2 <= times["short"] < 8 <= times["long"] < 30
    assert re.fullmatch(r"(s+l+){3}", "".join(order))  # each round times every row

    monkeypatch.setattr("torch.utils.benchmark.Timer.timeit", lambda self, n: next(measurements))
    measurements = iter([measurement_of(seconds) for seconds in (0.001, 0.5, 0.002)])
    assert compare.time_interleaved({"row": None}) == {"row": 2.0}  # the median ignores the slow round


def measurement_of(seconds):
    return type("Measurement", (), {"median": seconds})


def test_the_cached_row_computes_one_token_and_the_other_all_of_them(monkeypatch):
    monkeypatch.setattr(compare, "CACHE_LENGTHS", [8, 16])
    computed = {}

    def count(calls):
        for name, call in calls.items():
            computed[name] = []
            for _ in range(2):  # each repeat does the same work
                positions.clear()
                call()
                computed[name].append(sum(positions))
        return dict.fromkeys(calls, 1.0) | {("cached", 16): 2.0, ("recomputed", 8): 3.0}

    positions, build = [], decoder_only.build_model

    def build_and_watch(**options):
        model = build(**TINY, **options)
        model.embedding.register_forward_hook(lambda _, ids, __: positions.append(ids[0].numel()))
        return model

    monkeypatch.setattr(decoder_only, "build_model", build_and_watch)
    monkeypatch.setattr(compare, "time_interleaved", count)
    found = compare.time_cache()
    assert computed == {("cached", 8): [1, 1], ("recomputed", 8): [9, 9], ("cached", 16): [1, 1],
                        ("recomputed", 16): [17, 17]}
    assert found["cached_ms"] == [1.0, 2.0] and found["recomputed_ms"] == [3.0, 1.0]
    keys_and_values = 2 * TINY["num_layers"] * 16 * TINY["d_model"] * 4  # bytes, of 16 positions in float32
    assert found["cache_kilobytes"][1] == keys_and_values / 1000


def test_beam_search_is_compared_with_greedy_text_by_text(monkeypatch):
    numbers = [100, 342, 7001, 90_210]
    monkeypatch.setattr(compare, "held_out_numbers", lambda count: numbers)
    monkeypatch.setattr(compare, "time_interleaved", lambda calls: dict.fromkeys(calls, 3.0))
    names = [" ".join(number_to_words(number)) for number in numbers]
    results = {1: ([names[0], "one", "one", "one"], torch.tensor([-1.0, -2.0, -3.0, -2.0])),
               compare.BEAM_WIDTH: ([names[0], names[1], "two", "two"], torch.tensor([-1.0, -1.5, -2.0, -4.0]))}
    monkeypatch.setattr(compare, "search", lambda model, numbers, width: results[width])
    greedy, beam = compare.compare_beam({"trained": ["a model"]})
    assert (greedy["likelier"], greedy["less_likely"]) == (0, 0)
    assert (beam["likelier"], beam["less_likely"]) == (0.5, 0.25)
    assert (greedy["exact"], beam["exact"]) == (0.25, 0.5)
    assert greedy["log_probability"] == -2.0 and beam["ms_per_answer"] == 0.75


def test_search_of_width_1_is_greedy_and_wider_search_scores_log_probabilities():
    cell, numbers = BY_NAME["encoder-decoder, transform"], [342, 7001, 90_210]
    model = overfit(cell, numbers, num_steps=40)
    assert compare.search(model, numbers, 1)[0] == compare.translate(model, numbers)
    texts, scores = compare.search(model, numbers, 4)
    for number, text, score in zip(numbers, texts, scores):
        ids = toy_dataset.to_ids([*text.split(), "<EOS>"])
        example = {"source": encoder_decoder.make_source(number), "target": [SOS_ID, *ids[:-1]], "targets": ids}
        loss_sum, _ = encoder_decoder.compute_loss(model, toy_dataset.pad_batch([example]))
        assert score.item() == pytest.approx(-loss_sum.item(), abs=1e-3)


def test_a_history_is_thinned_out_to_means_and_keeps_every_evaluation():
    history = [{"step": i + 1, "loss": float(i)} for i in range(50)]
    history[24]["exact_match"] = 0.5
    history[49]["exact_match"] = 1.0
    points = compare.thin_out(history)
    assert [point["step"] for point in points] == [20, 25, 45, 50]
    assert [point["loss"] for point in points] == [9.5, 22.0, 34.5, 47.0]
    assert [point.get("exact_match") for point in points] == [None, 0.5, None, 1.0]


def test_several_seeds_give_their_mean_and_the_individual_values():
    runs = [{"sequence_accuracy": share, "by_position": [share, 1.0]} for share in (0.5, 1.0)]
    assert compare.summarize(runs) == {
        "sequence_accuracy": 0.75, "by_position": [0.75, 1.0],
        "by_seed": {"sequence_accuracy": [0.5, 1.0], "by_position": [[0.5, 1.0], [1.0, 1.0]]}}


@pytest.mark.parametrize("name", ["encoder-only, understand", "decoder-only, transform", "encoder-decoder, transform"])
def test_each_parameter_belongs_to_exactly_one_component(name, untrained):
    model = untrained(BY_NAME[name])
    counts = compare.count_parameters(model)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    C, K, V, translates = 16, toy_dataset.MAX_DIGITS, len(VOCABULARY), "encoder-decoder" in name
    attention = 4 * (C * C + C)
    assert counts["token embedding"] == V * C and counts["head"] == (C * K + K if "understand" in name else 0)
    assert counts["self-attention"] == (2 if translates else 1) * attention
    assert counts["cross-attention"] == (attention if translates else 0)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(compare).failed == 0 and doctest.testmod(compare).attempted >= 2


# --- the decision guide ---


def test_runs_differ_only_if_their_ranges_are_disjoint_and_their_means_a_margin_apart(monkeypatch):
    monkeypatch.setattr(compare, "MARGIN", 0.01)
    assert compare.differ([0.90, 0.92], [0.95, 0.99]) and compare.differ([0.95, 0.99], [0.90, 0.92])
    assert not compare.differ([0.90, 0.96], [0.95, 0.99])       # overlap
    assert not compare.differ([0.990, 0.991], [0.995, 0.996])   # disjoint, but too close to matter
    assert not compare.differ([1.0, 1.0], [1.0, 1.0])


@pytest.mark.parametrize("choices, verdicts", [
    # (accuracies by seed, milliseconds) of each choice
    ([([1.0, 1.0], 5.0), ([1.0, 0.99], 1.0), ([0.5, 0.6], 0.5)], ["equal, 5.0x slower", "best choice", "worse"]),
    ([([0.9, 0.9], 1.1), ([0.9, 0.9], 1.0)], ["best choice", "equal"]),        # as fast: the first
    ([([0.9, 0.9], 1.0), ([0.95, 0.96], 9.0)], ["worse", "best choice"]),      # accuracy before speed
    ([([0.9, 0.9], None), ([0.95, 0.96], None), ([0.955, 0.955], None)], ["worse", "best choice", "equal"]),
])
def test_the_best_choice_is_the_fastest_of_the_equally_accurate(choices, verdicts):
    assert compare.give_verdicts([("name", *choice) for choice in choices]) == verdicts


def findings(understand=(1.0, 1.0, 1.0, 1.0), gain=0.0) -> dict:
    """Made-up measurements, in the form that compare() returns."""
    def entry(cell, accuracy):
        return {"name": cell.name, "architecture": cell.module.__name__, "task": cell.task, "ms_per_answer": 1.0,
                "by_seed": {"sequence_accuracy": [accuracy, accuracy]}, "parameters": 1 + len(cell.module.__name__),
                "native": cell.native, "train_seconds": 7.0, "forward_passes": 3.0}

    accuracies = [*understand[:3], *[0.9] * 6]
    cells = [entry(cell, accuracy) for cell, accuracy in zip(compare.CELLS, accuracies)]
    beam = [{"model": model, "method": method, "ms_per_answer": ms, "exact": sum(exact) / 2,
             "by_seed": {"exact": exact}}
            for model in ("trained", "undertrained")
            for method, exact, ms in (("greedy", [0.3, 0.7], 1.0), ("beam width 5", [0.3 + gain, 0.7 + gain], 4.0))]
    strategies = [{"strategy": name, "by_seed": {"named": [0.9, 0.9], "new": [0.8, 0.8]}, "ms_per_answer": 1.0}
                  for name in compare.STRATEGIES]
    return {"cells": cells, "after_reading": entry(compare.AFTER_READING, understand[3]), "strategies": strategies,
            "beam": beam, "wall": {"ceiling": 0.3, "causal": 0.2, "after_reading": 1.0},
            "kv_cache": {"lengths": [1, 2], "cached_ms": [1.0, 1.0], "recomputed_ms": [1.0, 4.0]}}


def test_the_table_of_the_guide_has_each_cell_and_strategy_once_and_one_best_choice_per_question():
    table = compare.decision_table(findings())
    assert len(table) == 10 + 2 * len(compare.GUIDED)
    best = Counter(question for question, *_, verdict in table if verdict == "best choice")
    assert len(best) == 5 and set(best.values()) == {1}
    assert [row[1] for row in table[:4]] == ["encoder-only", "decoder-only", "encoder-decoder",
                                             "decoder-only after reading"]
    assert [row[2] for row in table[-10:]] == [[0.9, 0.9]] * 5 + [[0.8, 0.8]] * 5  # named, new


def test_verdicts_follow_the_measurements():
    def verdicts(**accuracies):
        return [row[-1] for row in compare.decision_table(findings(**accuracies))[:4]]

    assert verdicts(understand=(1.0, 0.1, 1.0, 1.0)) == ["best choice", "worse", "equal", "equal"]
    assert verdicts(understand=(0.4, 1.0, 0.2, 0.3)) == ["worse", "best choice", "worse", "worse"]


@pytest.mark.parametrize("gain, verdict", [(0.0, "equal to greedy"), (0.04, "in every seed better than greedy"),
                                           (-0.04, "in every seed worse than greedy")])
def test_beam_search_is_judged_by_its_gain_with_each_seed_not_by_the_spread_between_seeds(gain, verdict):
    sentences = compare.guide_sentences(findings(gain=gain))
    assert len(sentences) == 5
    assert all(verdict in sentence and "4.0 times the cost" in sentence for sentence in sentences[1:3])
    assert all(f"({50 + 100 * gain:.1f}% exact, greedy 50.0%)" in sentence for sentence in sentences[1:3])


def test_sentences_and_tables_have_each_number_in_its_place(capsys):
    found = findings()
    wall, _, _, cache, memory = compare.guide_sentences(found)
    assert "30.0% of the digits correctly. Decoder-only measured 20.0%; after reading all, 100.0%." in wall
    assert "after 2 tokens the next one takes 1.00 ms, and 4.00 ms without the cache" in cache and "1.2 times" in memory
    for row in [*found["strategies"], *found["beam"]]:
        row |= {"distinct": 0.1, "valid": 0.2, "log_probability": -1.5, "likelier": 0.6, "less_likely": 0.7}
    found["wall"] |= {"bidirectional": 0.4, "encoder_decoder": 0.5}
    found["wall"]["by_position"] = {name: [share / 2] for name, share in found["wall"].items()}
    found["kv_cache"]["cache_kilobytes"] = [8.0, 9.0]
    compare.show_measurements(found)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ("encoder-only, understand * 100.00 100.00-100.00 13 7.00 1.00 3.00",
                 "optimal causal tagger (expected) 30.0 15.0", "decoder-only, while reading 20.0 10.0",
                 "decoder-only, after reading 100.0 50.0", "encoder-only 40.0 20.0", "encoder-decoder 50.0 25.0",
                 "named range distinct valid new range ms",
                 "greedy 90.00 90.00-90.00 10.00 20.00 80.00 80.00-80.00 1.00",
                 "exact range log-p likelier less ms", "trained, greedy 50.00 30.00-70.00 -1.5000 60.00 70.00 1.00",
                 "cached recomputed ratio cache-kB", "2 tokens 1.00 4.00 4.00 9"):
        assert line in lines, line


# --- the script ---


def test_it_runs_as_a_reader_runs_it_and_prints_everything_in_order(small_run):
    done, _, _ = small_run
    headings = ["THREE ARCHITECTURES", "THE TABLE", "THE WALL", "STRATEGIES", "BEAM SEARCH", "KV CACHE",
                "DECISION GUIDE"]
    assert re.findall(f"^({'|'.join(headings)})", done.stdout, re.MULTILINE) == headings
    assert done.stdout.isascii() and [line for line in done.stdout.splitlines() if len(line) > 100] == []
    assert [line for line in done.stdout.splitlines() if line != line.rstrip()] == []
    bars = done.stderr.replace("\n", "\r").split("\r")
    assert done.stderr.isascii() and max(map(len, bars)) <= 100
    steps = 2 * (10 * 2 * 8 + 2)  # seeds, cells, epochs, steps, and those of the undertrained model
    assert f"{steps}/{steps}" in bars[-2] + bars[-1]


def test_the_file_follows_its_schema(small_run):
    _, found, folder = small_run
    assert list(found) == ["constants", "cells", "after_reading", "wall", "strategies", "beam", "kv_cache"]
    assert [path.name for path in (folder / "figures").iterdir()] == ["comparison.json"]
    assert [cell["name"] for cell in found["cells"]] == [cell.name for cell in compare.CELLS]
    for cell in [*found["cells"], found["after_reading"]]:
        scores = {"valid", "distinct", "new"} if cell["task"] == "generate" else {"token_accuracy", "by_position"}
        scores |= {"train_seconds", "sequence_accuracy"}
        assert set(cell) == scores | {"name", "architecture", "task", "native", "how", "parameters", "by_seed",
                                      "history", "ms_per_answer", "forward_passes"}
        assert set(cell["by_seed"]) == scores and {len(values) for values in cell["by_seed"].values()} == {2}
        assert 0 <= cell["sequence_accuracy"] <= 1 and cell["ms_per_answer"] > 0 and cell["forward_passes"] >= 1
        assert cell["history"][-1]["step"] == 16 and "exact_match" in cell["history"][-1]
    wall = found["wall"]
    readers = ["ceiling", "causal", "after_reading", "bidirectional", "encoder_decoder"]
    assert list(wall) == [*readers, "by_position"] and list(wall["by_position"]) == readers
    assert all(len(shares) == toy_dataset.MAX_DIGITS for shares in wall["by_position"].values())
    assert [row["strategy"] for row in found["strategies"]] == list(compare.STRATEGIES)
    assert [row["model"] for row in found["beam"]] == ["trained"] * 2 + ["undertrained"] * 2
    assert {len(values) for values in found["kv_cache"].values()} == {2}


def test_printed_and_written_numbers_agree(small_run):
    done, found, _ = small_run
    for cell in [*found["cells"], found["after_reading"]]:
        line = next(line for line in done.stdout.splitlines() if re.match(rf"  {cell['name']}( \*)?  .*\d$", line))
        assert f"{100 * cell['sequence_accuracy']:.2f}" in line and f"{cell['parameters']:,}" in line
    assert re.search(rf"^  optimal causal tagger.* {100 * found['wall']['ceiling']:.1f} ", done.stdout, re.MULTILINE)


def test_the_ceiling_binds_the_causal_tagger(small_run):
    _, found, _ = small_run
    assert found["wall"]["causal"] < found["wall"]["ceiling"] + 0.05  # 0.05: sampling error of a small test


def test_every_constant_that_the_numbers_depend_on_is_recorded():
    source = Path(compare.__file__).read_text().partition("# CONSTANTS")[2].partition("COMPARISON = ")[0]
    recorded = set(compare.all_constants())
    here = set(re.findall(r"^([A-Z_]+) = ", source, re.MULTILINE)) - {"MARGIN"}  # which only the verdicts depend on
    assert {"D_MODEL", "SEED", "TOP_P"} <= here <= recorded
    assert {"decoder_only.DROPOUT", "decoder_only.WEIGHT_DECAY", "encoder_only.MASK_PROBABILITY", "toy_dataset.SEED",
            "torch", "device", "threads"} <= recorded


def test_a_changed_constant_changes_what_is_recorded(monkeypatch):
    before = compare.all_constants()
    for module, name in [(compare, "NUM_SEEDS"), (decoder_only, "DROPOUT"), (toy_dataset, "NUM_TEST"),
                         (encoder_only, "MASK_PROBABILITY"), (torch, "__version__")]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 7)
            assert sum(value != before[key] for key, value in compare.all_constants().items()) == 1


def test_constants_survive_the_file_and_other_numbers_keep_five_digits(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "COMPARISON", tmp_path / "comparison.json")
    compare.save({"constants": compare.all_constants(), "cells": [1 / 3]})
    found = json.loads(compare.COMPARISON.read_text())
    assert found == {"constants": compare.all_constants(), "cells": [0.33333]}
    assert list(tmp_path.iterdir()) == [compare.COMPARISON]


def test_an_unwritable_folder_gives_one_sentence_before_any_training(tmp_path):
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
        if "after reading" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped." in errors and "Traceback" not in errors
    assert list((folder / "figures").iterdir()) == []
