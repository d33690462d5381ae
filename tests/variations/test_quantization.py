"""Quantization: errors within half a step, files that hold what they say, gradients that pass through rounding."""

import math

import decoder_only
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from variations import quantization
from variations.quantization import (
    BITS,
    GRANULARITIES,
    QuantizedCache,
    QuantizedLinear,
    dequantize,
    exchange,
    load_packed,
    pack,
    plant_outlier,
    quantize,
    quantize_cache,
    round_through,
    save_packed,
    unpack,
)

PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123456)]
IDS = torch.tensor([PROMPTS[3]])


def layer(**settings):
    """A QuantizedLinear 64 -> 48 and an input (5, 64)."""
    torch.manual_seed(0)
    linear = QuantizedLinear(64, 48)
    for name, value in settings.items():
        setattr(linear, name, value)
    return linear, torch.randn(5, 64)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
def test_no_error_exceeds_half_a_step_and_integers_fit_their_bits(bits, granularity):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(bits))
    integers, scale = quantize(x, bits, granularity)
    assert scale.shape == ({"tensor": 1, "channel": 6, "group": 12}[granularity], 1)
    assert integers.abs().max() == 2 ** (bits - 1) - 1
    errors = (x.view(integers.shape) - integers * scale.float()).abs()
    assert (errors <= scale.float() / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rounding_twice_is_rounding_once_and_zeros_stay_zeros(granularity):
    once = dequantize(*quantize(torch.randn(4, 64), 4, granularity), (4, 64))
    torch.testing.assert_close(dequantize(*quantize(once, 4, granularity), (4, 64)), once)
    zeros = torch.zeros(4, 64)
    assert torch.equal(dequantize(*quantize(zeros, 4, granularity), (4, 64)), zeros)


def test_an_outlier_coarsens_its_own_block_only():
    x = torch.linspace(-1, 1, 128).view(2, 64)
    x[0, 0] = 1000
    errors = {g: (dequantize(*quantize(x, 8, g), x.shape) - x).abs() for g in GRANULARITIES}
    assert errors["tensor"][1].max() > 0.5 and errors["channel"][1].max() < 0.01
    assert errors["channel"][0, 32:].max() > 0.4 and errors["group"][0, 32:].max() < 0.01


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 100])
def test_packing_loses_nothing_and_takes_exactly_the_bits(bits, count):
    levels = 2 ** (bits - 1) - 1
    integers = torch.randint(-levels, levels + 1, (count,), dtype=torch.int8)
    packed = pack(integers, bits)
    assert packed.nbytes == math.ceil(count * bits / 8)
    assert torch.equal(unpack(packed, bits, count), integers)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_packed_file_restores_the_rounded_model(granularity, tmp_path):
    model = exchange(tiny(decoder_only), 3, granularity)
    size = save_packed(model, tmp_path / "model.pt")
    other = load_packed(exchange(tiny(decoder_only, seed=1), 3, granularity), tmp_path / "model.pt")
    for module in other.modules():  # the weights in the file are rounded already
        module.__class__ = torch.nn.Linear if isinstance(module, QuantizedLinear) else module.__class__
    assert torch.equal(other(IDS), model(IDS))
    torch.save(tiny(decoder_only).state_dict(), tmp_path / "float.pt")
    assert size < 0.7 * (tmp_path / "float.pt").stat().st_size


def test_the_gradient_passes_through_rounding_as_if_it_were_not_there():
    x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(4, 32)
    rounded = round_through(x, 2, "channel")
    assert torch.equal(rounded, dequantize(*quantize(x, 2, "channel"), x.shape)) and not torch.equal(rounded, x)
    assert torch.equal(torch.autograd.grad((rounded * weight).sum(), x)[0], weight)


@pytest.mark.parametrize("activations", ["tensor", "channel"])
def test_rounded_inputs_and_weights_are_multiplied_as_integers(activations):
    linear, x = layer(activations=activations)
    a, a_scale = quantize(x, 8, activations)
    w, w_scale = quantize(linear.weight, 8, "channel")
    integer = a.view(5, 64).int() @ w.int().T                                           # exact
    torch.testing.assert_close(linear(x), integer * a_scale.float() * w_scale.float().T + linear.bias)


def test_llm_int8_with_all_features_above_the_threshold_is_the_float_layer():
    linear, x = layer(activations="channel", threshold=0.0)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))


def test_llm_int8_keeps_an_outlier_from_ruining_the_other_features():
    linear, x = layer(activations="channel")
    x[0, 5] = 1000
    linear.weight.data[:, 5] *= 100
    expected, errors = F.linear(x, linear.weight, linear.bias), []
    for linear.threshold in (math.inf, 6.0):
        errors.append((linear(x) - expected).abs().max())
    assert errors[1] < 0.1 < errors[0]


def test_a_planted_outlier_changes_the_inputs_and_not_the_logits():
    base, model = tiny(decoder_only), plant_outlier(tiny(decoder_only), 100)
    torch.testing.assert_close(model(IDS), base(IDS), atol=1e-4, rtol=1e-3)
    x = torch.randn(3, 32)
    assert torch.equal(model.layers[0].attention_norm(x)[:, 1:], base.layers[0].attention_norm(x)[:, 1:])
    torch.testing.assert_close(model.layers[0].attention_norm(x)[:, 0], 100 * base.layers[0].attention_norm(x)[:, 0])


def test_all_linear_layers_are_rounded_and_weights_themselves_are_kept():
    base, model = tiny(decoder_only), exchange(tiny(decoder_only), 2, "channel")
    assert len(quantization.quantized_weights(model)) == 12
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values()))
    assert not torch.allclose(model(IDS), base(IDS), atol=1e-2)
    torch.testing.assert_close(exchange(model, 8, "group")(IDS), base(IDS), atol=0.2, rtol=0.1)


def test_the_quantized_cache_returns_rounded_keys_and_values_in_a_quarter_of_the_memory():
    torch.manual_seed(0)
    cache, key, value = QuantizedCache(), torch.randn(2, 4, 5, 64), torch.randn(2, 4, 5, 64)
    cache.append(key[:, :, :3], value[:, :, :3])
    for found, x in zip(cache.append(key[:, :, 3:], value[:, :, 3:]), (key, value)):
        assert torch.equal(found, dequantize(*quantize(x, 8, "channel"), x.shape))
        assert (found - x).abs().max() < 0.02
    assert len(cache) == 5
    assert sum(tensor.nbytes for tensor in cache.stored()) == (64 + 2) / (64 * 4) * (key.nbytes + value.nbytes)


def test_generation_with_a_quantized_cache_does_not_depend_on_the_batch():
    model = quantize_cache(tiny(decoder_only))
    for row, prompt in zip(decoder_only.generate(model, PROMPTS), PROMPTS):
        alone = decoder_only.generate(model, [prompt])[0]
        assert torch.equal(row[:len(alone)], alone)


def test_training_with_rounded_weights_moves_the_unrounded_ones():
    model = exchange(tiny(decoder_only), 2, "channel")
    batch = next(iter(decoder_only.create_dataloaders(8, 0).train))
    optimizer, before = decoder_only.create_optimizer(model), model.layers[0].attention.query.weight.clone()
    losses = [decoder_only.train_step(model, batch, optimizer, 1e-2)[0] for _ in range(15)]
    assert losses[-1] < losses[0] and not torch.equal(model.layers[0].attention.query.weight, before)


def test_accuracy_is_measured_on_the_first_held_out_test_numbers(monkeypatch):
    monkeypatch.setattr(decoder_only, "evaluate", lambda model, loader: {"exact_match": loader.dataset.numbers})
    found = quantization.accuracy(None, decoder_only.create_dataloaders(8, 0))
    assert found == quantization.make_splits().test[:quantization.NUM_TESTS]


def test_the_worst_error_is_a_share_of_half_a_step():
    assert 0.95 < quantization.worst_error(exchange(tiny(decoder_only), 8, "channel")) < 1.001


def test_each_row_measures_the_model_that_it_names(monkeypatch):
    def describe(model, loaders):
        query = model.layers[0].attention.query
        threshold = query.threshold < math.inf if hasattr(query, "bits") else None
        return (model.trained, getattr(query, "bits", 32), threshold,
                model.layers[0].attention_norm.weight[0].item() > 50)

    def train(model, *_, **__):
        model.trained = getattr(model.layers[0].attention.query, "bits", 32)

    base = tiny(decoder_only)
    base.trained = None
    for name, value in {"build": lambda seed, bar: (base, None), "accuracy": describe, "file_size": lambda model: 0,
                        "generate_with_cache": lambda model: type(model.new_cache()[0]).__name__, "SEEDS": (0,),
                        "worst_error": lambda model: 0}.items():
        monkeypatch.setattr(quantization, name, value)
    monkeypatch.setattr(decoder_only, "train", train)
    found = quantization.measure(None)
    assert found["cache"] == {"float32": ["KVCache"], "8 bits": ["QuantizedCache"]}
    assert found["activations"]["outlier, float32"] == [(None, 32, None, True)]
    assert found["activations"]["the same with LLM.int8()"] == [(None, 8, True, False)]
    assert found["repair"][3, "rounded"] == [(None, 3, False, False)]
    assert found["repair"][3, "trained further, then rounded"] == [(32, 3, False, False)]
    assert found["repair"][3, "trained further with rounding"] == [(3, 3, False, False)]


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(quantization, D_MODEL=32, BATCH_SIZE=8, NUM_EPOCHS=1, REPAIR_EPOCHS=1, NUM_TESTS=10,
                       SEEDS=(0, 1))
    assert all(title in printed for title in ("WEIGHTS", "ACTIVATIONS", "KV CACHE", "REPAIR"))


def test_groups_that_do_not_fit_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(quantization, "GROUP", 48)
    with pytest.raises(quantization.InputError, match="GROUP = 48 must divide D_MODEL"):
        quantization.main()
