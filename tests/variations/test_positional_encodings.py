"""Positional encodings: each equals a slow definition, and the base's generation, cache and padding work with all."""

import math
from types import SimpleNamespace

import decoder_only
import pytest
import torch
from conftest import tiny

from variations import positional_encodings
from variations.positional_encodings import ENCODINGS, BucketedBias, LinearBias, RotaryAttention, exchange, rotate

torch.manual_seed(0)


@pytest.fixture(params=ENCODINGS)
def model(request):
    """A small decoder with each encoding, every weight random, biases of T5 included."""
    model = exchange(tiny(decoder_only), request.param).eval()
    if request.param == "T5 bias":
        model.layers[0].attention.bias.table.weight.data.normal_()
    return model


PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123456)]


def test_cached_generation_gives_the_recomputed_tokens(model):
    cached, recomputed = (decoder_only.generate(model, PROMPTS, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, recomputed)


def test_logits_are_the_same_with_and_without_the_cache_whatever_the_padding(model):
    ids = torch.tensor([[0] * (8 - len(prompt)) + prompt for prompt in PROMPTS])
    cache, expected = model.new_cache(), model(ids)
    steps = [model(ids[:, :length], cache) for length in (5, 6, 8)]  # 5 positions, then 1, then 2
    real = ids != 0
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], expected[real], atol=1e-5, rtol=1e-4)


def test_prompts_of_different_lengths_continue_in_one_batch_as_they_do_alone(model):
    together = decoder_only.generate(model, PROMPTS)
    for row, prompt in zip(together, PROMPTS):
        alone = decoder_only.generate(model, [prompt])[0]
        assert torch.equal(row[:len(alone)], alone)


def test_padding_on_either_side_leaves_the_logits_unchanged(model):
    ids = torch.tensor([PROMPTS[1]])
    padding = torch.zeros(1, 5, dtype=torch.long)
    expected = model(ids)
    torch.testing.assert_close(model(torch.cat([padding, ids], dim=1))[:, 5:], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(torch.cat([ids, padding], dim=1))[:, :-5], expected, atol=1e-5, rtol=1e-4)


def test_the_future_changes_nothing(model):
    ids = torch.tensor([PROMPTS[3]])
    changed = ids.clone()
    changed[:, -1] = decoder_only.EOS_ID
    assert torch.equal(model(ids)[:, :-1], model(changed)[:, :-1])


def test_rotation_is_multiplication_by_a_complex_number():
    x, positions = torch.randn(2, 3, 10, 8), torch.arange(10)
    frequencies = torch.tensor([10_000 ** (-2 * i / 8) for i in range(4)])
    numbers = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * positions[:, None] * frequencies)
    torch.testing.assert_close(rotate(x, positions), torch.cat([numbers.real, numbers.imag], dim=-1))


def test_positions_enter_a_rotated_score_only_as_their_signed_distance():
    query, key = torch.randn(1, 8), torch.randn(1, 8)

    def score(t, s):
        return (rotate(query, torch.tensor([t])) * rotate(key, torch.tensor([s]))).sum()

    torch.testing.assert_close(score(5, 3), score(105, 103), atol=1e-4, rtol=1e-4)
    assert abs(score(5, 3) - score(3, 5)) > 1e-3


def test_rotary_attention_rotates_keys_before_caching_and_never_values():
    attention, x, cache = RotaryAttention(16, 2, 0.0), torch.randn(1, 6, 16), decoder_only.KVCache()
    attention(x, torch.ones(6, 6, dtype=torch.bool).tril(), cache)
    plain_key, plain_value = (attention.split_heads(project(x)) for project in (attention.key, attention.value))
    torch.testing.assert_close(cache.key, rotate(plain_key, torch.arange(6)))
    torch.testing.assert_close(cache.value, plain_value)


def test_with_all_positions_0_rotary_attention_equals_the_base_attention():
    base = decoder_only.MultiHeadAttention(16, 2, 0.0)
    attention = RotaryAttention(16, 2, 0.0)
    attention.load_state_dict(base.state_dict())
    attention.interpolation = math.inf  # every position becomes 0
    x, mask = torch.randn(2, 6, 16), torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(x, mask), base(x, mask))


@pytest.mark.parametrize("num_heads", [2, 4, 8])
def test_alibi_slopes_are_a_geometric_sequence_ending_at_one_256th(num_heads):
    slopes = -LinearBias(num_heads)(torch.ones(1, 1)).flatten()
    torch.testing.assert_close(slopes[-1], torch.tensor(1 / 256))
    torch.testing.assert_close(slopes[1:] / slopes[:-1], slopes[:1].expand(num_heads - 1))


def test_t5_buckets_equal_a_slow_definition():
    def slow(distance):
        return next((b for b in range(31, 15, -1) if distance >= 16 * 8 ** ((b - 16) / 16) - 1e-9), distance)

    assert BucketedBias.bucket(torch.arange(1000)).tolist() == [slow(distance) for distance in range(1000)]


def test_models_of_one_seed_start_from_the_same_weights_in_every_encoding():
    base, rotary, biased = (positional_encodings.build(encoding, 3) for encoding in ("sinusoidal", "RoPE", "T5 bias"))
    for name, weight in base.state_dict().items():
        assert torch.equal(rotary.state_dict()[name], weight) and torch.equal(biased.state_dict()[name], weight)


def test_biased_attention_equals_fused_attention_with_the_bias_as_a_float_mask():
    model = exchange(tiny(decoder_only), "ALiBi")
    attention, x = model.layers[0].attention, torch.randn(2, 6, 32)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    query, key, value = (attention.split_heads(f(x)) for f in (attention.query, attention.key, attention.value))
    index = torch.arange(6)
    bias = attention.bias(index[:, None] - index).masked_fill(~mask, -math.inf)
    heads = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias)
    torch.testing.assert_close(attention(x, mask), attention.output(heads.transpose(1, 2).flatten(2)))


def test_interpolation_makes_a_long_text_look_as_long_as_a_short_one():
    query, key = torch.randn(1, 8), torch.randn(1, 8)
    near, far = (rotate(query, torch.tensor([t]) / f) @ rotate(key, torch.tensor([s]) / f).T
                 for t, s, f in ((7, 5, 1), (28, 20, 4)))
    torch.testing.assert_close(near, far)


def test_a_larger_base_slows_the_slowest_rotation_by_the_stretch_and_not_the_fastest():
    x, d_k, factor = torch.randn(1, 8), 8, 4.0
    plain, slowed = (rotate(x, torch.tensor([t]), base)
                     for t, base in ((3.0, 10_000.0), (12.0, 10_000.0 * factor ** (d_k / (d_k - 2)))))
    torch.testing.assert_close(plain[:, 3::4], slowed[:, 3::4])  # the last pair, dimensions 3 and 7
    same = rotate(x, torch.tensor([12.0]))
    torch.testing.assert_close(same[:, 0::4], slowed[:, 0::4])   # the first pair, 0 and 4


def test_targets_are_the_names_of_all_numbers_or_of_the_last_alone():
    for only_last, expected in ((False, ["seven <EOS>", "forty two <EOS>"]), (True, ["forty two <EOS>"])):
        example = positional_encodings.make_text([7, 42], only_last)
        tokens = decoder_only.to_tokens(example["ids"])
        assert " ".join(tokens) == "<SOS> 7 <SEP> seven <EOS> 4 2 <SEP> forty two"
        asked = [target for target in example["targets"] if target != decoder_only.IGNORE]
        assert " ".join(decoder_only.to_tokens(asked)) == " ".join(expected)
        following = [*example["ids"][1:], decoder_only.EOS_ID]  # each target is the token that comes next
        assert all(target in (decoder_only.IGNORE, token) for target, token in zip(example["targets"], following))


def test_rows_differ_when_their_ranges_over_the_seeds_do_not_overlap():
    assert positional_encodings.differ([1, 2, 3], [4, 5, 6]) and positional_encodings.differ([4, 5, 6], [1, 2, 3])
    assert not positional_encodings.differ([1, 3, 5], [4, 6, 8])


def test_invalid_constants_are_refused_by_name(monkeypatch):
    with pytest.raises(positional_encodings.InputError, match="D_MODEL / NUM_HEADS = 3 must be even"):
        RotaryAttention(12, 4, 0.0)
    monkeypatch.setattr(positional_encodings, "TEST_PAIRS", (1, 2))
    with pytest.raises(positional_encodings.InputError, match="TEST_PAIRS"):
        positional_encodings.main()


def test_only_the_absolute_encodings_add_anything_and_all_layers_share_one_table_of_biases():
    for encoding in ("none", "RoPE", "ALiBi", "T5 bias"):
        model = exchange(tiny(decoder_only), encoding)
        assert not model.positional_encoding(torch.arange(20)).any()
    first, second = (layer.attention.bias for layer in model.layers)
    assert first is second and not first.table.weight.any()


def test_texts_are_tested_on_the_last_name_of_test_numbers_and_trained_on_all_names_of_others(monkeypatch):
    asked, splits, example = {False: set(), True: set()}, positional_encodings.make_splits(), {"ids": [], "targets": []}
    monkeypatch.setattr(positional_encodings, "make_text", lambda texts, only: asked[only].update(texts) or example)
    positional_encodings.make_texts(0)
    assert asked[False] and asked[False] <= set(splits.train) and asked[True] and asked[True] <= set(splits.test)


def test_rope_is_stretched_before_it_is_trained_further_on_batches_not_yet_seen(monkeypatch):
    calls = []

    def record(model, loader):
        attention = model.layers[0].attention
        calls.append((loader, getattr(attention, "base", None), getattr(attention, "interpolation", None)))
        return {"exact_match": 0.5}

    for name, value in (("NUM_STEPS", 2), ("TEST_PAIRS", (4,)), ("make_texts", lambda seed: ("abcd", {4: "test"}))):
        monkeypatch.setattr(positional_encodings, name, value)
    monkeypatch.setattr(decoder_only, "train", lambda model, splits, *_, **__: record(model, splits.train))
    monkeypatch.setattr(decoder_only, "evaluate", record)
    positional_encodings.measure_length(None)
    base = 1e4 * 4 ** (16 / 14)  # base ** (-14 / 16) is the slowest frequency of 16 dimensions
    assert {batches for batches, *_ in calls[:12:2]} == {"ab"}
    assert calls[12:] == [("test", base, 1), ("test", 1e4, 4), ("cd", 1e4, 4), ("test", 1e4, 4), ("cd", 1e4, 1),
                          ("test", 1e4, 1)]


def test_the_tables_and_conclusions_follow_from_the_measurements(monkeypatch, capsys):
    numbers = SimpleNamespace(validation=SimpleNamespace(dataset=SimpleNamespace(numbers=[10, 20, 5, 6, 7])))
    wrong = iter([[0, 1, 2]] + [[0, 2]] * 5)  # one encoding also errs on the second number with a zero
    made_up = dict.fromkeys(ENCODINGS, [0.9, 0.4, 0.2]) | {"ALiBi": [0.8, 0.9, 0.7]}
    for name, value in (("TEST_PAIRS", (3, 6, 12)), ("SEEDS", (0,)), ("measure_length", lambda bar: made_up),
                        ("save_figure", lambda *_: None)):
        monkeypatch.setattr(positional_encodings, name, value)
    monkeypatch.setattr(decoder_only, "create_dataloaders", lambda *_: numbers)
    monkeypatch.setattr(decoder_only, "train", lambda *_, **__: None)
    monkeypatch.setattr(decoder_only, "evaluate", lambda *_: {"mistakes": next(wrong)})
    positional_encodings.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "ALiBi 80% 90% 70% 80%" in printed and "RoPE 90% 40% 20% 30%" in printed
    assert "ALiBi is best beyond the trained lengths, 80% correct" in printed and "below 90%" in printed
    assert "sinusoidal 100.0% (100.0 to 100.0) 33.3%" in printed and "none 50.0% (50.0 to 50.0) 33.3%" in printed
    assert "with a zero: learned." in printed and "overlap): none, RoPE, ALiBi, T5 bias." in printed


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(positional_encodings, num_train=8, D_MODEL=16, NUM_STEPS=2, FURTHER_STEPS=1, NUM_TEXTS=4,
                       BATCH_SIZE=4, TEST_PAIRS=(1, 4), SEEDS=(0, 1), NUM_EPOCHS=1)
    assert all(printed.count(encoding) >= 2 for encoding in ENCODINGS)
