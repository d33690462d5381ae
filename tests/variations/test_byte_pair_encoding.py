"""Byte-pair encoding: the merges of the definition, text that survives any tokenizer, a model that follows it."""

import math
import random
from collections import Counter

import decoder_only
import pytest
import torch
from conftest import tiny
from toy_dataset import (EOS_ID, PAD_ID, VOCABULARY, Splits, decoder_only_example, make_splits, number_to_words,
                         pad_batch)

from variations import byte_pair_encoding
from variations.byte_pair_encoding import (CONTROL, BytePairEncoding, Words, draw_batches, exchange, make_example,
                                           merge_pair, written)

NUMBERS = make_splits().train[:200]
NAMES = [" ".join(number_to_words(number)) for number in NUMBERS]
ANY_TEXT = ["", " ", "  two  hundred ", "fourty two", "\n\t", "two\nhundred", "\N{SNOWMAN} \U0001f642", "\u56db\u5341",
            "\x00", "<EOS>", "42", "hundred" * 3, "na\u00efve"]


def naive_merges(texts, num_merges):
    """The definition: after each merge every pair of every text is counted again."""
    tokens, learned = [bytes([byte]) for byte in range(256)], []
    texts = [list(text.encode()) for text in texts]
    while len(learned) < num_merges:
        counts = Counter(pair for ids in texts for pair in zip(ids, ids[1:]))
        if not counts:
            break
        ((a, b), count), *_ = sorted(counts.items(), key=lambda item: (-item[1], [tokens[i] for i in item[0]], item[0]))
        learned.append((tokens[a], tokens[b], count))
        for ids in texts:
            replace(ids, a, b, len(tokens))
        tokens.append(tokens[a] + tokens[b])
    return learned


def replace(ids, a, b, new):
    """In place, from left to right."""
    i = 0
    while i < len(ids) - 1:
        if ids[i:i + 2] == [a, b]:
            ids[i:i + 2] = [new]
        i += 1


def naive_ids(tokenizer, text):
    """Each merge in turn, over the whole part."""
    ids = []
    for part in tokenizer.split(text):
        part = [len(CONTROL) + byte for byte in part.encode()]
        for (a, b), new in tokenizer.merges.items():
            replace(part, a, b, new)
        ids += part
    return ids


@pytest.fixture(scope="module", params=["characters", "16 merges", "all", "across words"])
def tokenizer(request):
    num_merges = {"characters": 0, "16 merges": 16}.get(request.param, 150)
    return BytePairEncoding(across_words=request.param == "across words").train(NAMES, num_merges)


def learned_by(tokenizer):
    return [(tokenizer.tokens[a], tokenizer.tokens[b], count)
            for (a, b), count in zip(tokenizer.merges, tokenizer.counts)]


def test_the_learned_merges_and_their_counts_are_those_of_recounting_after_each_merge():
    words = [part for name in NAMES for part in BytePairEncoding().split(name)]
    assert learned_by(BytePairEncoding().train(NAMES, 200)) == naive_merges(words, 200)
    assert learned_by(BytePairEncoding(across_words=True).train(NAMES[:40], 80)) == naive_merges(NAMES[:40], 80)


@pytest.mark.parametrize("seed", range(5))
def test_merges_are_those_of_the_definition_on_random_texts_full_of_ties_and_repetitions(seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices("ab ", k=rng.randrange(12))) for _ in range(20)]
    assert learned_by(BytePairEncoding(across_words=True).train(texts, 30)) == naive_merges(texts, 30)


def test_equally_frequent_pairs_are_merged_in_byte_order_whatever_the_order_of_the_texts():
    texts = ["zy", "xw", "vu", "xy"]
    for order in (texts, texts[::-1]):
        learned = learned_by(BytePairEncoding().train(order, 10))
        assert learned == [(b"v", b"u", 1), (b"x", b"w", 1), (b"x", b"y", 1), (b"z", b"y", 1)]


def test_merging_goes_from_left_to_right_and_does_not_overlap():
    assert merge_pair([1] * 5, (1, 1), 9) == [9, 9, 1]
    assert merge_pair([1, 2, 9, 2], (1, 2), 9) == [9, 9, 2]


def test_decoding_gives_back_any_text(tokenizer):
    rng = random.Random(0)
    strange = ["".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(32, 127)])) for _ in range(30))
               for _ in range(20)]
    for text in ANY_TEXT + NAMES + strange:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encoding_applies_the_merges_in_the_order_in_which_they_were_learned(tokenizer):
    rng = random.Random(0)
    for text in ANY_TEXT + NAMES + ["".join(rng.choices("thrine ", k=30)) for _ in range(50)]:
        assert tokenizer.encode(text) == naive_ids(tokenizer, text)


def test_merges_are_applied_by_rank_and_not_by_length_or_position():
    tokenizer = BytePairEncoding().train(["bc"] * 3 + ["ab"] * 2, 2)
    assert [tokenizer.tokens[i] for i in tokenizer.encode("abc")] == [b"a", b"bc"]


def test_without_merges_a_token_is_a_byte():
    text = "two \N{SNOWMAN}"
    assert [i - len(CONTROL) for i in BytePairEncoding().train(NAMES, 0).encode(text)] == list(text.encode())


def test_bytes_that_are_not_text_are_decoded_without_an_error(tokenizer):
    snowman = tokenizer.encode("\N{SNOWMAN}")
    assert tokenizer.decode(snowman[:-1]) == "\N{REPLACEMENT CHARACTER}"


def test_text_never_becomes_a_control_token(tokenizer):
    for text in [*VOCABULARY[:len(CONTROL)], " ".join(CONTROL)]:
        assert min(tokenizer.encode(text)) >= len(CONTROL)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_two_merges_that_give_the_same_bytes_are_two_tokens_and_text_still_survives():
    texts = ["ab", "ab", "ab", "abc", "bc", "bc", "xabc", "bcx"] + ["a" * k for k in range(9)]
    tokenizer = BytePairEncoding(across_words=True).train(texts, 100)
    assert len(tokenizer.merges) == len(tokenizer.counts) == len(tokenizer.tokens) - len(CONTROL) - 256
    assert len(set(tokenizer.tokens)) < len(tokenizer.tokens)
    for text in texts + ["abcabc", "aaaaaaaaaaaaa"]:
        assert tokenizer.encode(text) == naive_ids(tokenizer, text) and tokenizer.decode(tokenizer.encode(text)) == text


def test_within_words_merges_end_when_each_word_is_one_token_and_never_span_two():
    tokenizer = BytePairEncoding().train(NAMES, 10_000)
    assert len(tokenizer.merges) < 200 and not any(b" " in token[1:] for token in tokenizer.tokens)
    for name in NAMES:
        assert len(tokenizer.encode(name)) == len(name.split())


def test_words_are_the_bases_tokens_and_others_are_a_value_error():
    words, number = Words(), 90210
    assert make_example(number, words) == decoder_only_example(number, loss_on_prompt=False)
    assert words.decode(words.encode("forty two")) == "forty two"
    with pytest.raises(ValueError, match="'fourty' is not in the vocabulary"):
        words.encode("fourty two")


def test_examples_predict_the_name_and_the_end_from_the_same_prompt_in_every_tokenizer(tokenizer):
    example, base = make_example(342, tokenizer), decoder_only_example(342, loss_on_prompt=False)
    prompt = decoder_only.make_prompt(342)
    assert example["ids"][:len(prompt)] == base["ids"][:len(prompt)] == prompt
    name = tokenizer.encode("three hundred forty two")
    assert example["ids"][len(prompt):] == name and example["targets"][len(prompt) - 1:] == [*name, EOS_ID]
    assert example["targets"][:len(prompt) - 1] == base["targets"][:len(prompt) - 1]


def model_for(tokenizer):
    return exchange(tiny(decoder_only, max_length=byte_pair_encoding.MAX_LENGTH), tokenizer)


def test_embedding_table_and_output_layer_follow_the_vocabulary_and_the_rest_is_the_base(tokenizer):
    base, model = tiny(decoder_only, max_length=byte_pair_encoding.MAX_LENGTH), model_for(tokenizer)
    ids = torch.tensor([make_example(90210, tokenizer)["ids"]])
    assert model(ids).shape == (*ids.shape, len(tokenizer.tokens)) == (*ids.shape, len(model.embedding.weight))
    assert model.embedding.weight.std().item() == pytest.approx(0.5 / 32 ** 0.5, rel=0.1)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name != "embedding.weight"}
    assert kept.keys() == base.state_dict().keys() - {"embedding.weight"}
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in kept.items())


def test_the_longest_name_fits_the_model_byte_by_byte():
    example = make_example(373373, BytePairEncoding())
    assert len(example["ids"]) == 72 <= byte_pair_encoding.MAX_LENGTH


def test_padding_changes_no_logit_of_a_real_token(tokenizer):
    model, examples = model_for(tokenizer), [make_example(number, tokenizer) for number in (7, 342, 90210)]
    together = model(pad_batch(examples)["ids"])
    for example, logits in zip(examples, together):
        torch.testing.assert_close(logits[:len(example["ids"])], model(torch.tensor([example["ids"]]))[0])


def test_cached_generation_gives_the_recomputed_tokens_alone_and_in_a_batch(tokenizer):
    model, prompts = model_for(tokenizer), [decoder_only.make_prompt(number) for number in (7, 342, 90210)]
    together, recomputed = (decoder_only.generate(model, prompts, 30, use_cache=cache) for cache in (True, False))
    assert torch.equal(together, recomputed)
    for row, prompt in zip(together, prompts):
        alone = decoder_only.generate(model, [prompt], 30)[0]
        assert torch.equal(row[:len(alone)], alone)


def test_what_is_generated_is_read_up_to_the_end_of_the_answer(tokenizer):
    row = torch.tensor([*tokenizer.encode("forty two"), EOS_ID, PAD_ID, PAD_ID])
    assert written(tokenizer, row) == written(tokenizer, row[:-3]) == "forty two"


def test_the_base_trains_and_evaluates_a_model_with_another_tokenizer():
    tokenizer = BytePairEncoding().train(NAMES, 40)
    batch, model = pad_batch([make_example(number, tokenizer) for number in (7, 342)]), model_for(tokenizer)
    optimizer = decoder_only.create_optimizer(model)
    for _ in range(40):
        decoder_only.train_step(model, batch, optimizer, 1e-2)
    assert decoder_only.evaluate(model, [batch])["exact_match"] == 1
    rows = decoder_only.generate(model, [decoder_only.make_prompt(number) for number in (7, 342)], 40)
    assert [written(tokenizer, row) for row in rows] == ["seven", "three hundred forty two"]


def test_merges_come_from_the_training_numbers_and_those_that_complete_or_span_words_are_marked(monkeypatch, capsys):
    monkeypatch.setattr(byte_pair_encoding, "make_splits", lambda: Splits([20, 22], [7], [8]))
    tokenizers = byte_pair_encoding.train_tokenizers()
    byte_pair_encoding.print_merges(tokenizers["all 7 merges"], tokenizers["8 across words"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 ent+y 2 5 tw+enty* 2 6 _+tw 1 7 _tw+o* 1 7 merges exist" in printed
    assert "1 of 8 tokens go beyond one word. The first and the last of them: 8 twenty+_two 1" in printed


def test_every_pass_shows_every_example_once_in_an_order_that_depends_on_the_seed(monkeypatch):
    monkeypatch.setattr(byte_pair_encoding, "NUM_STEPS", 4)
    examples = [{"ids": [i], "targets": [i]} for i in range(8)]
    orders = [[i for batch in draw_batches(examples, 4, seed) for i in batch["ids"].flatten().tolist()]
              for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert all(sorted(order[:8]) == sorted(order[8:]) == [*range(8)] for order in orders)


def test_models_are_tested_on_test_numbers_and_what_they_saw_is_counted_without_padding(monkeypatch):
    for name, value in dict(NUM_STEPS=2, NAMES_PER_STEP=4, TOKENS_PER_STEP=10, SEEDS=(0,), build=lambda *_: None,
                            make_splits=lambda: Splits([7, 22], [8], [30]), generate_names=lambda *_: (1, [])).items():
        monkeypatch.setattr(byte_pair_encoding, name, value)
    monkeypatch.setattr(decoder_only, "train", lambda *_, **__: None)
    monkeypatch.setattr(decoder_only, "evaluate", lambda _, batches: {"exact_match": batches, "loss": 3})
    found = byte_pair_encoding.measure({"words": Words()}, None)["words"]
    assert found["tokens per name"] == 1
    for equal, size in [("tokens", 2), ("names", 4)]:  # examples of 4 and 6 tokens
        [[tested]] = found[equal].pop("exact")
        assert tested["ids"].tolist() == [decoder_only_example(30)["ids"]]
        assert {"names": [2 * size], "tokens": [2 * size * 5], "per name": [6]}.items() <= found[equal].items()


def test_loss_is_shown_in_bits_per_character_and_the_verdict_names_the_best_and_what_is_level(monkeypatch, capsys):
    monkeypatch.setattr(byte_pair_encoding, "make_splits", lambda: Splits([], [], [7]))  # seven: 5 characters
    wrong = [(42, "fifty two"), (7, "sevn"), (3, "ten")]
    found = {row: {"names": {"exact": [0.1]}, "tokens per name": 1, "wrong": wrong,
                   "tokens": {"names": [8], "tokens": [9], "seconds": [place], "exact": exact, "per token": [place],
                              "per name": [5 * math.log(2) * (4 - place)]}}
             for place, (row, exact) in enumerate([("characters", [0.5, 0.6]), ("16 merges", [0.7, 0.9]),
                                                   ("words", [0.6, 0.8])], start=1)}
    byte_pair_encoding.print_results(found, "tokens")
    byte_pair_encoding.print_mistakes(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "16 merges 8 9 2.0 80.0% (70.0 to 90.0) 2.0000 6.931 2.0000 words" in printed
    assert "Highest exact match: 16 merges; within seed noise of it (the ranges overlap): words. Training" in printed
    assert ("per token: characters, 16 merges, words. Per name, which is comparable: words, 16 merges, characters."
            in printed)
    assert "words 3 1 7: sevn" in printed
    lines = byte_pair_encoding.draw(found).axes[0].lines  # two for each row, and one for the legend
    assert [list(lines[i].get_ydata()) for i in (0, 7)] == [[0.5, 0.6], [0.1, 0.1]]


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(byte_pair_encoding, num_train=40, D_MODEL=16, NUM_STEPS=2, NAMES_PER_STEP=4, TOKENS_PER_STEP=150,
                       NUM_TESTS=10, NUM_GENERATED=1, SEEDS=(0, 1), MERGES_ACROSS=40, MAX_LENGTH=80)
    titles = ("MERGES WITHIN WORDS", "MERGES ACROSS WORDS", "WHAT A MISSPELLING BECOMES", "EQUAL TOKENS", "EQUAL NAMES")
    assert all(title in printed for title in titles)
    assert "ValueError: \"'fourty' is not in the vocabulary\"" in printed


@pytest.mark.parametrize("name, value, sentence", [
    ("TOKENS_PER_STEP", 10, "TOKENS_PER_STEP = 10 must be a whole number"),
    ("NUM_MERGES", (16, 64), "NUM_MERGES = (16, 64) must be ascending, beginning with 0"),
    ("NUM_STEPS", 0, "NUM_STEPS = 0 must be a whole number, at least 1"),
])
def test_constants_that_do_not_fit_are_refused_in_one_sentence(monkeypatch, name, value, sentence):
    monkeypatch.setattr(byte_pair_encoding, name, value)
    with pytest.raises(byte_pair_encoding.InputError) as caught:
        byte_pair_encoding.main()
    assert str(caught.value).startswith(sentence)
