"""Parameter-efficient fine-tuning: it starts from the base, trains only what it adds, and leaves the base behind."""

import copy

import decoder_only
import pytest
import torch
from conftest import tiny
from toy_dataset import number_to_words, to_ids

from variations import parameter_efficient_fine_tuning
from variations.parameter_efficient_fine_tuning import (
    METHODS,
    LoRALinear,
    exchange,
    batches_of,
    merge,
    no_one,
    take_out,
    trained_parameters,
    units_first,
)

PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123456)]
IDS = torch.tensor([PROMPTS[3]])
LORA = [method for method in METHODS if method.startswith("LoRA")]
ADDED = [*LORA, "adapters", "prefix tuning", "prompt tuning"]


def moved(method):
    """A model with this method, what it trains moved away from its initial values, as training does."""
    model = exchange(tiny(decoder_only), method)
    for parameter in trained_parameters(model).values():
        parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("method", [*LORA, "adapters", "biases only", "last layer", "full fine-tuning"])
def test_before_training_it_equals_the_base_bit_for_bit(method):
    base, model = tiny(decoder_only), exchange(tiny(decoder_only), method)
    assert torch.equal(model(IDS), base(IDS))


@pytest.mark.parametrize("method", ADDED)
def test_removed_after_training_it_equals_the_base_bit_for_bit(method):
    base, model = tiny(decoder_only), exchange(tiny(decoder_only), method)
    decoder_only.train_step(model, batches_of([342, 7], "units first", 2)[0],
                            decoder_only.create_optimizer(model), 0.1)
    assert not torch.allclose(model(IDS), base(IDS), atol=1e-3)
    assert torch.equal(take_out(model)(IDS), base(IDS))
    assert model.state_dict().keys() == base.state_dict().keys() and type(model) is type(base)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_what_is_trained_and_nothing_else(method):
    model = exchange(tiny(decoder_only), method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):  # with LoRA's B at zero, the first step's gradient does not reach A
        decoder_only.train_step(model, batches_of([342, 21], "units first", 2)[0],
                                decoder_only.create_optimizer(model), 0.1)
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == set(trained_parameters(model))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_restores_the_same_model_from_the_base(method):
    model, other = moved(method), exchange(tiny(decoder_only), method)
    other.load_state_dict(trained_parameters(model), strict=False)
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("method", ADDED)
def test_cached_generation_and_mixed_lengths_give_the_tokens_of_recomputing_alone(method):
    model = moved(method)
    cached, recomputed = (decoder_only.generate(model, PROMPTS, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, recomputed)
    for row, prompt in zip(cached, PROMPTS):
        alone = decoder_only.generate(model, [prompt])[0]
        assert torch.equal(row[:len(alone)], alone)


@pytest.mark.parametrize("method", ADDED)
def test_padding_and_later_tokens_change_nothing(method):
    model, alone = moved(method), moved(method)(IDS)
    torch.testing.assert_close(model(torch.nn.functional.pad(IDS, (3, 0)))[:, 3:], alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(torch.nn.functional.pad(IDS, (0, 1), value=20))[:, :-1], alone)


def test_lora_is_a_linear_layer_with_the_merged_weight():
    layer, x = LoRALinear(torch.nn.Linear(6, 5), rank=2), torch.randn(3, 6)
    torch.nn.init.normal_(layer.up.weight)
    weight = layer.inner.weight + parameter_efficient_fine_tuning.LORA_ALPHA / 2 * layer.up.weight @ layer.down.weight
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.inner.bias))
    assert torch.linalg.matrix_rank(weight - layer.inner.weight, rtol=1e-4) == 2


@pytest.mark.parametrize("method", LORA)
def test_merging_changes_no_logit_beyond_rounding_and_leaves_a_plain_model(method):
    model = moved(method)
    before = model(IDS)
    torch.testing.assert_close(merge(model)(IDS), before, atol=1e-3, rtol=1e-3)
    assert model.state_dict().keys() == tiny(decoder_only).state_dict().keys()


def test_a_prefix_acts_like_the_cached_keys_and_values_of_earlier_tokens():
    torch.manual_seed(0)
    attention = tiny(decoder_only).layers[0].attention
    x, causal, cache = torch.randn(1, 7, 32), decoder_only.make_causal_mask(7, 7), decoder_only.KVCache()
    expected = attention(x, causal)[:, 3:]
    attention(x[:, :3], causal[:3, :3], cache)
    prefixed = parameter_efficient_fine_tuning.PrefixAttention(attention, cache.key, cache.value)
    torch.testing.assert_close(prefixed(x[:, 3:], causal[3:, 3:]), expected)


def test_a_soft_prompt_gives_logits_for_the_text_only_and_starts_it_at_position_0():
    model = moved("prompt tuning")
    assert model(IDS).shape == (1, IDS.size(1), len(decoder_only.VOCABULARY))
    positions = torch.arange(3) + len(model.prompt)
    assert torch.equal(model.embed(IDS[:, :3], positions), take_out(model).embed(IDS[:, :3], torch.arange(3)))


def test_the_dialects_need_no_new_words_and_no_two_numbers_share_a_name():
    for dialect in (units_first, no_one, lambda words: no_one(units_first(words))):
        names = [tuple(dialect(number_to_words(number))) for number in range(0, 10**6, 7)]
        assert len(set(names)) == len(names)
        assert all(to_ids(list(name)) for name in names[:100])
    assert units_first(["forty"]) == ["forty"] and no_one(["one"]) == ["one"]


def test_each_method_trains_or_starts_from_what_its_description_says():
    assert all(name.endswith("bias") for name in trained_parameters(exchange(tiny(decoder_only), "biases only")))
    assert all(name.startswith("layers.1.") for name in trained_parameters(exchange(tiny(decoder_only), "last layer")))
    assert parameter_efficient_fine_tuning.random_words(500, "cpu").min() == to_ids(["zero"])[0]
    adapter, x = moved("adapters").layers[0].feed_forward, torch.randn(1, 3, 32)
    h = adapter.inner(x)
    torch.testing.assert_close(adapter(x), h + adapter.up(torch.nn.functional.gelu(adapter.down(h))))


def test_examples_are_training_numbers_drawn_by_the_seed_and_only_their_names_are_learned(monkeypatch):
    targets = batches_of([42], "units first", 1)[0]["targets"][0].tolist()
    assert targets == [decoder_only.IGNORE] * 3 + to_ids(["two", "forty", "<EOS>"])
    monkeypatch.setattr(parameter_efficient_fine_tuning, "batches_of", lambda numbers, *_: set(numbers))
    first, second = (parameter_efficient_fine_tuning.training_batches("English", seed) for seed in (0, 1))
    assert first != second and first | second <= set(parameter_efficient_fine_tuning.make_splits().train)


def test_the_rate_is_chosen_in_the_dialect_and_on_other_numbers_than_the_tests(monkeypatch):
    rates, tests = [], set(parameter_efficient_fine_tuning.make_splits().test)

    def exact_match(model, language, numbers):
        if set(numbers) <= tests:
            return {"units first": 0.6, "English": 0.3}[language]
        return 0.9 if (rates[-1], language) == (4e-3, "units first") else 0.1

    for name, value in (("METHODS", ["LoRA"]), ("NUM_TESTS", 5), ("exact_match", exact_match),
                        ("fine_tune", lambda base, method, rate, *_: rates.append(rate) or copy.deepcopy(base))):
        monkeypatch.setattr(parameter_efficient_fine_tuning, name, value)
    row = parameter_efficient_fine_tuning.measure(tiny(decoder_only), None)["LoRA"]
    assert (row["rate"], row["dialect"], row["English"]) == (4e-3, [0.6] * 3, [0.3] * 3)


def test_the_sum_of_two_dialects_adds_both_updates_to_the_weights(monkeypatch):
    def fine_tune(base, method, *_):
        model = exchange(copy.deepcopy(base), method)
        torch.nn.init.normal_(model.layers[0].attention.query.up.weight)
        return model

    for name, value in (("NUM_TESTS", 5), ("fine_tune", fine_tune), ("exact_match", lambda model, *_: merge(
            copy.deepcopy(model)).layers[0].attention.query.weight)):
        monkeypatch.setattr(parameter_efficient_fine_tuning, name, value)
    table, _ = parameter_efficient_fine_tuning.measure_two(tiny(decoder_only), "LoRA, rank 4", 0.0, None)
    base, first, second, both = (row["both"] for row in table.values())
    torch.testing.assert_close(both - base, (first - base) + (second - base))


def test_the_conclusions_and_the_picture_follow_from_the_measurements(monkeypatch, capsys):
    row, figures = {"parameters": 10, "bytes": 40, "rate": 4e-3, "English": [0.5], "out": [0.5]}, []
    found = {"full fine-tuning": row | {"parameters": 90, "dialect": [0.6, 0.7], "same": [False]},
             "LoRA, rank 4": row | {"dialect": [0.8, 0.9], "same": [True]}}
    splits = parameter_efficient_fine_tuning.make_splits()._replace(test=[7, 42, 100, 5])
    for name, value in (("make_splits", lambda: splits), ("build", lambda bar: None), ("measure", lambda *_: found),
                        ("measure_two", lambda *_: ({"+ both": {"both": 0.4}}, 1e-5)), ("exact_match", lambda *_: 0.25),
                        ("save_figure", lambda figure, path: figures.append(figure))):
        monkeypatch.setattr(parameter_efficient_fine_tuning, name, value)
    parameter_efficient_fine_tuning.main()
    printed, lines = " ".join(capsys.readouterr().out.split()), figures[0].axes[0].lines
    assert "overlap): none. Above it: LoRA, rank 4." in printed and "75.0% of the names are the same" in printed
    assert [line.get_color() for line in lines[:4:2]] == ["#0072B2", "#E69F00"] and lines[4].get_xdata()[0] == 0.25


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(parameter_efficient_fine_tuning, D_MODEL=16, BASE_EPOCHS=1, BASE_BATCH_SIZE=8, NUM_EXAMPLES=12,
                       NUM_STEPS=2, BATCH_SIZE=4, LEARNING_RATES=(1e-3, 1e-2), NUM_VALIDATION=10, NUM_TESTS=10,
                       SEEDS=(0, 1))
    assert all(f"  {method} " in printed for method in METHODS)
    assert f"bit-identical to the base's: {'; '.join(ADDED)}." in " ".join(printed.split())
