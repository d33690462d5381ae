"""The language: names, splits, examples, batches; and what every script does with arguments and errors."""

import re
import sys
from types import ModuleType

import pytest
import torch
from conftest import ROOT

import toy_dataset as toy
from toy_dataset import IGNORE, InputError

NAMES = {0: "zero", 10: "ten", 11: "eleven", 20: "twenty", 21: "twenty one", 100: "one hundred", 101: "one hundred one",
         110: "one hundred ten", 119: "one hundred nineteen", 1000: "one thousand", 1001: "one thousand one",
         10000: "ten thousand", 100000: "one hundred thousand",
         999999: "nine hundred ninety nine thousand nine hundred ninety nine"}


@pytest.mark.parametrize("number, name", NAMES.items())
def test_names_are_those_written_by_hand(number, name):
    assert " ".join(toy.number_to_words(number)) == name


def language(max_digits):
    """toy_dataset.py as it is with another MAX_DIGITS."""
    source = (ROOT / "toy_dataset.py").read_text()
    module = ModuleType(f"toy_dataset_{max_digits}")
    exec(re.sub(r"^MAX_DIGITS = \d+", f"MAX_DIGITS = {max_digits}", source, flags=re.MULTILINE), module.__dict__)
    return module


@pytest.mark.parametrize("max_digits", [3, 4, 7, 10, 12])
def test_the_language_can_be_larger_or_smaller_and_ends_where_it_says(max_digits):
    other = language(max_digits)
    numbers = [0, 7, 100, *(n % 10**max_digits for n in (70_000_000_001, 123_456_789_012, 900_000_000_000)),
               10**max_digits - 1]
    for number in numbers:
        name = other.number_to_words(number)
        assert other.words_to_number(name) == number == other.parse_number(str(number))
        assert other.to_tokens(other.to_ids(name)) == name and len(name) <= other.MAX_WORDS
    with pytest.raises(ValueError, match=f"0 to {10**max_digits - 1}"):
        other.words_to_number(other.number_to_words(10**max_digits))
    with pytest.raises(ValueError, match=f"1 to {max_digits} digits"):
        other.parse_number(str(10**max_digits))
    assert len(other.PLACES) == max_digits == len(set(other.PLACES))
    train, validation, test = map(set, other.make_splits())
    assert not (train & validation or train & test or validation & test) and train and validation and test


def test_large_names_are_those_written_by_hand():
    assert " ".join(language(12).number_to_words(70_003_000_201)) == "seventy billion three million two hundred one"


@pytest.mark.parametrize("max_digits", [2, 13])
def test_a_language_of_any_other_size_is_refused_in_one_sentence(max_digits):
    with pytest.raises(SystemExit, match=f"MAX_DIGITS = {max_digits} .*3 to 12"):
        language(max_digits)


def test_the_longest_names_have_max_words():
    assert max(len(toy.number_to_words(number)) for number in range(776_000, 778_000)) == toy.MAX_WORDS
    assert max(len(toy.number_to_words(number)) for split in toy.make_splits() for number in split) <= toy.MAX_WORDS


def test_the_smallest_and_the_largest_number_can_be_typed():
    assert [toy.parse_number(text) for text in ("0", "10", "999999")] == [0, 10, 999999]


def test_reading_a_name_undoes_naming():
    numbers = [*range(10**5), *range(10**5, 10**6, 97)]
    assert all(toy.words_to_number(toy.number_to_words(number)) == number for number in numbers)


def test_every_number_has_a_unique_name():
    assert len({tuple(toy.number_to_words(number)) for number in range(10**5)}) == 10**5


@pytest.mark.parametrize("words", ["", "two two", "hundred", "one zero", "twenty eleven", "thousand one", "cat"])
def test_words_that_are_not_a_name_are_refused(words):
    with pytest.raises(InputError):
        toy.words_to_number(words.split())


@pytest.mark.parametrize("text", ["", "-1", "1,000", "007", "abc", "1234567", "1.5", "\u0663"])
def test_text_that_is_not_a_number_is_refused_and_named(text):
    with pytest.raises(ValueError, match=re.escape(repr(text)) if len(text) < 7 else text):
        toy.parse_number(text)


def test_an_unknown_token_is_named_in_the_error():
    with pytest.raises(ValueError, match="'frog'"):
        toy.to_ids(["one", "frog"])


def test_each_token_has_one_id_and_padding_is_zero():
    assert len(set(toy.VOCABULARY)) == len(toy.VOCABULARY)
    assert toy.PAD_ID == 0 == toy.TOKEN_TO_ID["<PAD>"]
    assert not set(toy.DIGITS) & set(toy.WORDS)
    assert toy.to_tokens(toy.to_ids(toy.VOCABULARY[1:])) == toy.VOCABULARY[1:]
    assert toy.to_tokens([toy.PAD_ID, *toy.to_ids(["7", "<EOS>"]), toy.PAD_ID]) == ["7", "<EOS>"]


def test_the_splits_share_no_number_and_have_the_promised_sizes():
    train, validation, test = map(set, toy.make_splits())
    assert not (train & validation or train & test or validation & test)
    assert (len(train), len(validation), len(test)) == (toy.NUM_TRAIN, toy.NUM_VALIDATION, toy.NUM_TEST)


def test_training_has_all_numbers_below_100_and_at_most_half_of_each_longer_length():
    train = set(toy.make_splits().train)
    assert train >= set(range(100))
    for length in range(3, toy.MAX_DIGITS + 1):
        of_length = sum(len(str(number)) == length for number in train)
        assert 0 < of_length <= 9 * 10 ** (length - 1) // 2
        assert any(len(str(number)) == length for number in toy.make_splits().test)


def test_the_splits_are_the_same_on_every_machine():
    assert toy.make_splits().train[:5] == [71188, 7049, 3502, 435348, 3663]  # from SEED, by Python's own generator
    toy.make_splits.cache_clear()
    first = toy.make_splits()
    toy.make_splits.cache_clear()
    assert toy.make_splits() == first


def test_another_seed_gives_other_splits(monkeypatch):
    first = toy.make_splits()
    monkeypatch.setattr(toy, "SEED", toy.SEED + 1)
    other = toy.make_splits.__wrapped__()
    assert all(set(one) != set(two) for one, two in zip(first, other))
    assert sorted(map(len, first)) == sorted(map(len, other))


def test_the_loaders_visit_each_number_of_their_split_once(monkeypatch):
    for name, size in (("NUM_TRAIN", 500), ("NUM_VALIDATION", 1100), ("NUM_TEST", 1300)):  # last batches are small
        monkeypatch.setattr(toy, name, size)
    splits = toy.make_splits.__wrapped__()
    monkeypatch.setattr(toy, "make_splits", lambda: splits)
    loaders = toy.make_dataloaders(toy.counting_example, 64, seed=0)
    for numbers, loader in zip(splits, loaders):
        assert loader.dataset.numbers == numbers
        rows = [row for batch in loader for row in batch["ids"][:, 1:].tolist()]
        asked = [int("".join(token for token in toy.to_tokens(row) if token != "<SEP>")) for row in rows]
        assert sorted(asked) == sorted(numbers)


def test_fewer_training_numbers_are_the_first_ones_and_of_all_lengths():
    loaders = toy.make_dataloaders(toy.counting_example, 64, seed=0, num_train=300)
    assert loaders.train.dataset.numbers == toy.make_splits().train[:300]
    assert len({len(str(number)) for number in loaders.train.dataset.numbers}) >= toy.MAX_DIGITS - 1
    assert loaders.test.dataset.numbers == toy.make_splits().test


@pytest.mark.parametrize("number", [0, 7, 42, 342, 90210, 777777])
def test_eos_follows_the_last_word_and_only_padding_follows_eos(number):
    example = toy.encoder_decoder_example(number)
    assert example["targets"][-1] == toy.EOS_ID == example["source"][-1]
    assert toy.PAD_ID not in example["targets"]
    batch = toy.pad_batch([example, toy.encoder_decoder_example(777777)])
    row = batch["target"][0].tolist()
    assert all(i == toy.PAD_ID for i in row[len(example["target"]):])


@pytest.mark.parametrize("number", [0, 7, 42, 342, 90210, 777777])
def test_each_target_is_the_next_input(number):
    for example, field in ((toy.encoder_decoder_example(number), "target"), (toy.decoder_only_example(number), "ids")):
        assert example[field][1:] == example["targets"][:-1]
    silent = toy.decoder_only_example(number, loss_on_prompt=False)
    assert len(silent["targets"]) == len(silent["ids"])
    asked = [target for target in silent["targets"] if target != IGNORE]
    assert toy.to_tokens(asked) == [*toy.number_to_words(number), "<EOS>"]


def test_place_values_and_word_counts_are_correct():
    example = toy.tagging_example(342)
    assert [toy.PLACES[p] for p in example["places"] if p != IGNORE] == ["hundreds", "tens", "ones"]
    places = [toy.PLACES[p] for p in toy.tagging_example(123456)["places"] if p != IGNORE]
    assert places == ["hundred-thousands", "ten-thousands", "thousands", "hundreds", "tens", "ones"]
    assert toy.counting_example(342)["count"] == 3


def test_padding_fills_ids_with_pad_and_labels_with_ignore():
    batch = toy.pad_batch([toy.tagging_example(7), toy.tagging_example(342)])
    assert batch["ids"][0].tolist()[3:] == [toy.PAD_ID] * 2
    assert batch["places"][0].tolist()[3:] == [IGNORE] * 2
    mask = toy.make_padding_mask(batch["ids"])
    assert mask.shape == (2, 1, 1, 5) and mask.dtype == torch.bool
    assert mask[0, 0, 0].tolist() == [True] * 3 + [False] * 2


def test_the_alignment_matches_one_made_by_hand():
    assert toy.align(90210) == [{0, 1}, {0, 1}, {2}, {2}, {3, 4}]
    assert toy.align(342) == [{0}, {0}, {1}, {2}]
    assert toy.align(0) == [{0}] and toy.align(600006) == [{0}, {0}, {0, 1, 2}, {5}]
    assert toy.align(17) == [{0, 1}] and toy.align(20) == [{0, 1}] and toy.align(21) == [{0}, {1}]
    assert all(len(toy.align(n)) == len(toy.number_to_words(n)) for n in range(0, 10**6, 37))
    larger = language(9)  # in which a group of three zeros, which has no words, may be in the middle
    assert larger.align(1_000_005) == [{0}, {0}, {6}]
    assert all(len(larger.align(n)) == len(larger.number_to_words(n)) for n in range(0, 10**9, 999_983))


def test_training_numbers_come_in_a_new_order_each_epoch_and_the_others_keep_theirs():
    loaders = toy.make_dataloaders(toy.tagging_example, 64, seed=0, num_train=200)
    first, second = (torch.cat([b["ids"][:, 1] for b in loaders.train]).tolist() for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    again = toy.make_dataloaders(toy.tagging_example, 64, seed=0, num_train=200)
    assert torch.cat([b["ids"][:, 1] for b in again.train]).tolist() == first
    other_seed = toy.make_dataloaders(toy.tagging_example, 64, seed=1, num_train=200)
    assert torch.cat([b["ids"][:, 1] for b in other_seed.train]).tolist() not in (first, second)
    assert next(iter(loaders.validation))["ids"].equal(next(iter(loaders.validation))["ids"])


def test_an_invalid_batch_size_is_refused():
    with pytest.raises(InputError, match="BATCH_SIZE"):
        toy.make_dataloaders(toy.tagging_example, 0, seed=0)


@pytest.mark.parametrize("name, size", [("NUM_TRAIN", 100), ("NUM_VALIDATION", 0), ("NUM_TEST", 0)])
def test_an_empty_split_is_refused(monkeypatch, name, size):
    monkeypatch.setattr(toy, name, size)
    with pytest.raises(InputError, match=f"{name} = {size}"):
        toy.make_splits.__wrapped__()


def test_a_mask_is_drawn_with_a_row_for_each_query_and_a_column_for_each_key():
    drawn = toy.format_mask(torch.tensor([[True, False], [True, True]]), ["one", "2"], ["a", "bc"])
    assert drawn.splitlines() == ["       b", "     a c", "one  # .", "  2  # #"]


# --- what every script does with arguments and errors ---


def run_main(monkeypatch, main, *arguments, parse=None):
    """run_script(main) as if called from the shell with these arguments."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    toy.run_script(main, parse)


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("error", [InputError("no"), FloatingPointError("no"), PermissionError("no")])
def test_a_user_error_is_one_sentence(monkeypatch, error):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, raises(error))
    assert caught.value.code == "script.py: no"  # a text as exit code: written to stderr, status 1


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        run_main(monkeypatch, raises(error))


def test_ctrl_c_ends_with_the_shells_status_for_it(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, raises(KeyboardInterrupt()))
    assert caught.value.code == 130 and capsys.readouterr().err == "\nStopped.\n"


def test_every_argument_is_parsed_before_anything_runs(monkeypatch, capsys):
    got = []
    run_main(monkeypatch, lambda *numbers: got.extend(numbers), "342", "7", parse=toy.parse_number)
    assert got == [342, 7]
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, lambda *numbers: got.extend(numbers), "342", "007", parse=toy.parse_number)
    assert got == [342, 7] and caught.value.code == 2
    assert capsys.readouterr().err.startswith("script.py: '007' is not a number")
