"""Ablations: every part is what its name says, and everything else of the model stays as it was."""

import decoder_only
import encoder_only
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import tiny

from variations import ablations
from variations.ablations import DECODER_ROWS, RMSNorm, SwiGLUFeedForward

PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123456)]
IDS = torch.tensor([PROMPTS[3]])
CHANGED = {row.name: row for row in DECODER_ROWS if row not in ablations.BASES}


@pytest.fixture(params=CHANGED)
def model(request):
    model = tiny(decoder_only)
    CHANGED[request.param].change(model)
    return model.eval()


def test_cached_generation_gives_the_recomputed_tokens(model):
    cached, recomputed = (decoder_only.generate(model, PROMPTS, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, recomputed)


def test_prompts_of_different_lengths_continue_in_one_batch_as_they_do_alone(model):
    together = decoder_only.generate(model, PROMPTS)
    for row, prompt in zip(together, PROMPTS):
        alone = decoder_only.generate(model, [prompt])[0]
        assert torch.equal(row[:len(alone)], alone)


@pytest.mark.skipif(not hasattr(F, "rms_norm"), reason="F.rms_norm is new in torch 2.4")
def test_rmsnorm_equals_pytorchs_forward_and_backward():
    x, norm = torch.randn(3, 5, 16, requires_grad=True), RMSNorm(16)
    norm.weight.data.normal_()
    found, expected = norm(x), F.rms_norm(x, (16,), norm.weight, ablations.EPSILON)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))


def test_rmsnorm_has_its_epsilon_inside_the_root():
    tiny_x = torch.full((4,), 1e-4)
    torch.testing.assert_close(RMSNorm(4)(tiny_x), tiny_x / (1e-8 + 1e-5) ** 0.5)


def test_swiglu_equals_its_definition_and_has_as_many_parameters_as_the_base():
    part, base = SwiGLUFeedForward(48, 192), decoder_only.FeedForward(48, 192)
    x, sizes = torch.randn(2, 3, 48), [sum(p.numel() for p in module.parameters()) for module in (part, base)]
    gate = x @ part.gate.weight.T + part.gate.bias
    inner = gate * torch.sigmoid(gate) * (x @ part.expand.weight.T + part.expand.bias)
    torch.testing.assert_close(part(x), inner @ part.contract.weight.T + part.contract.bias)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


@pytest.mark.parametrize("name, activation", [("ReLU", F.relu), ("SiLU", F.silu)])
def test_an_exchanged_activation_acts_between_the_two_projections(name, activation):
    model, x = tiny(decoder_only), torch.randn(2, 3, 32)
    CHANGED[name].change(model)
    part = model.layers[0].feed_forward
    torch.testing.assert_close(part(x), part.contract(activation(part.expand(x))))


@pytest.mark.parametrize("module", [decoder_only, encoder_only])
def test_post_norm_layers_equal_pytorchs(module):
    model, x = tiny(module), torch.randn(2, 5, 32)
    ablations.set_post_norm(model)
    layer = model.layers[0]
    theirs = nn.TransformerEncoderLayer(32, 4, 64, 0.0, F.gelu, batch_first=True).eval()
    weights = [f"{name}.{kind}" for name in ("query", "key", "value") for kind in ("weight", "bias")]
    mine = dict(layer.attention.named_parameters())
    theirs.self_attn.in_proj_weight.data = torch.cat([mine[name] for name in weights[::2]])
    theirs.self_attn.in_proj_bias.data = torch.cat([mine[name] for name in weights[1::2]])
    theirs.self_attn.out_proj.load_state_dict(layer.attention.output.state_dict())
    theirs.linear1.load_state_dict(layer.feed_forward.expand.state_dict())
    theirs.linear2.load_state_dict(layer.feed_forward.contract.state_dict())
    theirs.norm1.load_state_dict(layer.attention_norm.state_dict())
    theirs.norm2.load_state_dict(layer.feed_forward_norm.state_dict())
    torch.testing.assert_close(layer(x, torch.ones(5, 5, dtype=torch.bool)), theirs(x), atol=1e-5, rtol=1e-4)


def test_without_norms_there_are_none_and_with_rmsnorm_no_layernorm_is_left():
    for name in ("no norms", "RMSNorm"):
        model = tiny(decoder_only)
        CHANGED[name].change(model)
        assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())


def test_untied_embeddings_start_equal_and_diverge_in_training():
    base, model = tiny(decoder_only), tiny(decoder_only)
    ablations.set_untied(model)
    assert torch.equal(model(IDS), base(IDS))
    model(IDS).logsumexp(-1).sum().backward()
    assert not model.embedding.weight.grad.equal(model.embedding.input_table.grad)
    assert (model.embedding.input_table.grad[3] == 0).all()  # <CLS> is not read: no gradient through the input


def test_without_the_factor_the_embedding_enters_unscaled():
    model = tiny(decoder_only)
    ablations.set_unscaled(model)
    plain = model.embed(IDS, torch.arange(IDS.size(1))) - model.positional_encoding(torch.arange(IDS.size(1)))
    torch.testing.assert_close(plain, model.embedding.weight[IDS], atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_the_chosen_places_and_nowhere_else():
    model = tiny(decoder_only)
    ablations.set_dropout(model, weights=0.3)
    assert model.dropout.p == 0 and {layer.dropout.p for layer in model.layers} == {0}
    assert {layer.attention.dropout.p for layer in model.layers} == {0.3}


def test_each_row_is_compared_with_a_base_of_the_same_size_and_data():
    bases = {row.name: row for row in ablations.BASES}
    for row in CHANGED.values():
        assert (row.num_layers, row.num_train) == (bases[row.base].num_layers, bases[row.base].num_train)


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(ablations, D_MODEL=16, NUM_STEPS=2, BATCH_SIZE=4, SEEDS=(0, 1))
    assert all(f"  {name} " in printed for name in CHANGED)
