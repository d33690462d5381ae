"""Attention in tiles: the same output and gradients as PyTorch's, whatever the tiles, and memory that grows with T."""

import math
from functools import partial

import decoder_only
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from variations import flash_attention
from variations.flash_attention import TiledAttention, exchange, peak_bytes, random_inputs, saved_bytes, tiled_attention

PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123456)]


def inputs(T, S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
            for length in (T, S, S)]


def masks(T, S):
    padding = torch.ones(2, 1, 1, S, dtype=torch.bool)
    padding[1, ..., S // 2:] = False
    causal = decoder_only.make_causal_mask(T, S)
    return {"none": None, "causal": causal, "padding": padding, "both": padding & causal}


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("T, S, tile", [(6, 6, 2), (7, 7, 3), (5, 9, 4), (1, 9, 4), (6, 6, 100)])
def test_output_and_gradients_equal_pytorchs_whatever_the_tiles(T, S, tile, kind):
    mask, tensors = masks(T, S)[kind], inputs(T, S)
    found, expected = tiled_attention(*tensors, mask, tile=tile), F.scaled_dot_product_attention(*tensors, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    for one, other in zip(*(torch.autograd.grad((output * weight).sum(), tensors) for output in (found, expected))):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_large_scores_do_not_overflow():
    query, key, value = inputs(6, 6)
    torch.testing.assert_close(tiled_attention(100 * query, 100 * key, value, tile=2),
                               F.scaled_dot_product_attention(100 * query, 100 * key, value), atol=1e-5, rtol=1e-5)


def test_a_fully_masked_row_has_the_gradient_of_the_written_out_version():
    mask = torch.ones(6, 6, dtype=torch.bool).tril(-1)  # the first row may attend to nothing: the average of all values
    tensors = [tensor.detach().float().requires_grad_() for tensor in inputs(6, 6)]
    outputs = [tiled_attention(*tensors, mask, tile=2), flash_attention.written_out(*tensors, mask)]
    for one, other in zip(*(torch.autograd.grad(output.square().sum(), tensors) for output in outputs)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fully_masked_row_and_half_precision_stay_finite(dtype):
    query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs(6, 6))
    mask = torch.ones(6, 6, dtype=torch.bool).tril(-1)  # the first row may attend to nothing
    output = tiled_attention(query, key, value, mask, tile=2)
    gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
    assert output.dtype == dtype and all(tensor.isfinite().all() for tensor in (output, *gradients))


def test_nothing_of_size_t_times_t_is_stored_for_the_backward_pass():
    for attend, factor in ((flash_attention.written_out, 16), (tiled_attention, 4)):
        kept = [saved_bytes(attend, random_inputs(length)) for length in (128, 512)]
        assert kept[1] / kept[0] == pytest.approx(factor, rel=0.1)
    peaks = [peak_bytes(partial(flash_attention.forward_and_backward, attend, random_inputs(512)))
             for attend in (flash_attention.written_out, tiled_attention)]
    assert peaks[1] < peaks[0] / 2


def test_the_gradient_of_the_gradient_is_refused_not_wrong():
    query, key, value = inputs(4, 4)
    gradient, = torch.autograd.grad(tiled_attention(query, key, value).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), query)


def test_a_decoder_with_tiles_computes_and_generates_what_the_base_does():
    base, model = tiny(decoder_only), exchange(tiny(decoder_only))
    ids = torch.tensor([PROMPTS[3]])
    torch.testing.assert_close(model(ids), base(ids), atol=1e-5, rtol=1e-5)
    expected = decoder_only.generate(base, PROMPTS)
    for use_cache in (True, False):
        assert torch.equal(decoder_only.generate(model, PROMPTS, use_cache=use_cache), expected)


def test_dropout_on_weights_that_are_never_stored_is_refused():
    with pytest.raises(ValueError, match="dropout=0"):
        exchange(tiny(decoder_only, dropout=0.1))


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(flash_attention, LENGTHS=(8, 16), REPEATS=1, NUM_STEPS=2, BATCH_SIZE=4, TILE=8)
    assert all(printed.count(name) >= 2 for name in flash_attention.VERSIONS)


def test_on_paper():
    scores, value = torch.tensor([[1.0, 2, 4, 1]]).log(), torch.tensor([[8.0], [0], [0], [16]])
    assert TiledAttention.apply(scores, torch.eye(4), value, None, 1.0, 2).item() == pytest.approx(3)
    assert (scores.softmax(-1) @ value).item() == pytest.approx(3) and not math.isnan(scores.sum())
