"""Ablations: every part is what its name says, and everything else of the model stays as it was."""

import decoder_only
import encoder_only
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import toy_dataset
from conftest import tiny

from variations import ablations
from variations.ablations import DECODER_ROWS, RMSNorm, Row, SwiGLUFeedForward

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
    ablations.set_dropout(model, embedding=0.1, branches=0.2)
    assert model.dropout.p == 0.1 and {layer.dropout.p for layer in model.layers} == {0.2}


def test_each_row_is_compared_with_a_base_of_the_same_size_and_data():
    bases = {row.name: row for row in ablations.BASES}
    for row in CHANGED.values():
        assert (row.num_layers, row.num_train) == (bases[row.base].num_layers, bases[row.base].num_train)


def test_each_row_gets_its_depth_and_numbers_and_each_seed_its_weights_and_held_out_numbers_decide(monkeypatch):
    monkeypatch.setattr(toy_dataset, "make_dataloaders", lambda _, size, seed, num_train: toy_dataset.Splits(
        [("train", num_train, seed)], ("validation", num_train, seed), ("test", num_train, seed)))
    monkeypatch.setattr(decoder_only, "build_model", lambda num_layers, **_: [num_layers, torch.initial_seed()])
    monkeypatch.setattr(decoder_only, "train", lambda model, loaders, *_, **__: model.append(loaders.train[0]))
    monkeypatch.setattr(decoder_only, "evaluate", lambda model, batches: {"exact_match": (*model, batches)})
    monkeypatch.setattr(ablations, "SEEDS", (5, 6))
    rows = [Row("base"), Row("deep", num_layers=8), Row("few", num_train=500)]
    assert ablations.measure(decoder_only, rows, None) == {
        name: [(depth, seed, ("train", numbers, seed), ("validation", numbers, seed)) for seed in (5, 6)]
        for name, depth, numbers in [("base", 2, None), ("deep", 8, None), ("few", 2, 500)]}


def test_rows_are_sorted_by_their_effect_against_their_own_base_and_those_beyond_seed_noise_are_named(capsys):
    names = ["base", "base, 8 layers", "SiLU", "no norms", "post-norm, 8 layers", "ReLU"]
    means = dict(zip(names, (0.50, 0.80, 0.51, 0.10, 0.70, 0.60)))
    rows = [row for row in DECODER_ROWS if row.name in names]
    ablations.print_table("TITLE", rows, {name: [mean - 0.01, mean, mean + 0.01] for name, mean in means.items()})
    printed = capsys.readouterr().out
    assert [" ".join(line.split()) for line in printed.splitlines()[4:10]] == [
        "base 50.0% (49.0 to 51.0)", "base, 8 layers 80.0% (79.0 to 81.0)", "ReLU 60.0% (59.0 to 61.0) +10.0",
        "SiLU 51.0% (50.0 to 52.0) +1.0 within seed noise", "post-norm, 8 layers 70.0% (69.0 to 71.0) -10.0",
        "no norms 10.0% (9.0 to 11.0) -40.0"]
    assert ("Better than the base beyond seed noise: ReLU. Worse: post-norm, 8 layers; no norms. (If none of the 4 "
            "changes had an effect, 0.4 rows would be expected") in " ".join(printed.split())


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(ablations, D_MODEL=16, NUM_STEPS=2, BATCH_SIZE=4, SEEDS=(0, 1))
    assert all(f"  {name} " in printed for name in CHANGED)
