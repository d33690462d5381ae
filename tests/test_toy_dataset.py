"""The language: names, splits, examples, batches."""

import re

import pytest
import torch

import toy_dataset as toy
from toy_dataset import IGNORE, InputError

NAMES = {0: "zero", 10: "ten", 11: "eleven", 20: "twenty", 21: "twenty one", 100: "one hundred", 101: "one hundred one",
         110: "one hundred ten", 119: "one hundred nineteen", 1000: "one thousand", 1001: "one thousand one",
         10000: "ten thousand", 100000: "one hundred thousand",
         999999: "nine hundred ninety nine thousand nine hundred ninety nine"}


@pytest.mark.parametrize("number, name", NAMES.items())
def test_names_are_those_written_by_hand(number, name):
    assert " ".join(toy.number_to_words(number)) == name


def test_reading_a_name_undoes_naming_for_the_whole_language():
    assert all(toy.words_to_number(toy.number_to_words(number)) == number for number in range(10**6))


def test_every_number_has_a_name_of_its_own():
    assert len({tuple(toy.number_to_words(number)) for number in range(10**5)}) == 10**5


@pytest.mark.parametrize("words", ["", "two two", "hundred", "one zero", "twenty eleven", "thousand one", "cat"])
def test_what_is_no_name_is_refused(words):
    with pytest.raises(InputError):
        toy.words_to_number(words.split())


@pytest.mark.parametrize("text", ["", "-1", "1,000", "007", "abc", "1234567", "1.5", "\u0663"])
def test_what_is_no_number_is_refused_and_named(text):
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


def test_the_splits_share_no_number_and_have_the_promised_sizes():
    train, validation, test = map(set, toy.make_splits())
    assert not (train & validation or train & test or validation & test)
    assert (len(train), len(validation), len(test)) == (toy.NUM_TRAIN, toy.NUM_VALIDATION, toy.NUM_TEST)


def test_everything_below_100_is_learned_and_at_most_half_of_each_longer_length():
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


@pytest.mark.parametrize("number", [0, 7, 42, 342, 90210, 777777])
def test_the_end_follows_the_last_word_and_only_padding_follows_the_end(number):
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
    asked = [target for target in silent["targets"] if target != IGNORE]
    assert toy.to_tokens(asked) == [*toy.number_to_words(number), "<EOS>"]


def test_places_and_counts_are_true():
    example = toy.tagging_example(342)
    assert [toy.PLACES[p] for p in example["places"] if p != IGNORE] == ["hundreds", "tens", "ones"]
    assert toy.counting_example(342)["count"] == 3


def test_padding_fills_ids_with_pad_and_labels_with_ignore():
    batch = toy.pad_batch([toy.tagging_example(7), toy.tagging_example(342)])
    assert batch["ids"][0].tolist()[3:] == [toy.PAD_ID] * 2
    assert batch["places"][0].tolist()[3:] == [IGNORE] * 2
    mask = toy.make_padding_mask(batch["ids"])
    assert mask.shape == (2, 1, 1, 5) and mask.dtype == torch.bool
    assert mask[0, 0, 0].tolist() == [True] * 3 + [False] * 2


def test_the_alignment_is_the_one_made_by_hand():
    assert toy.align(90210) == [{0, 1}, {0, 1}, {2}, {2}, {3, 4}]
    assert toy.align(342) == [{0}, {0}, {1}, {2}]
    assert toy.align(0) == [{0}] and toy.align(600006) == [{0}, {0}, {0, 1, 2}, {5}]
    assert toy.align(17) == [{0, 1}] and toy.align(20) == [{0, 1}] and toy.align(21) == [{0}, {1}]
    assert all(len(toy.align(n)) == len(toy.number_to_words(n)) for n in range(0, 10**6, 37))


def test_training_numbers_come_in_a_new_order_each_epoch_and_the_others_in_theirs():
    loaders = toy.make_dataloaders(toy.tagging_example, 64, seed=0, num_train=200)
    first, second = (torch.cat([b["ids"][:, 1] for b in loaders.train]).tolist() for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    again = toy.make_dataloaders(toy.tagging_example, 64, seed=0, num_train=200)
    assert torch.cat([b["ids"][:, 1] for b in again.train]).tolist() == first
    assert next(iter(loaders.validation))["ids"].equal(next(iter(loaders.validation))["ids"])


def test_impossible_batches_and_splits_are_refused(monkeypatch):
    with pytest.raises(InputError, match="BATCH_SIZE"):
        toy.make_dataloaders(toy.tagging_example, 0, seed=0)
    monkeypatch.setattr(toy, "NUM_TRAIN", 50)
    toy.make_splits.cache_clear()
    with pytest.raises(InputError, match="NUM_TRAIN"):
        toy.make_splits()
    monkeypatch.undo()
    toy.make_splits.cache_clear()
