"""Grouped-query attention: it is what PyTorch computes, reduces to the base, and keeps a smaller cache."""

import decoder_only
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from toy_dataset import Splits

from variations import grouped_query_attention
from variations.grouped_query_attention import GroupedQueryAttention, exchange, pool_heads

PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123456)]
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.fixture(params=[4, 2, 1])
def model(request):
    return exchange(tiny(decoder_only), request.param).eval()


def test_with_as_many_groups_as_heads_it_equals_the_base_attention_bit_for_bit():
    base, model = tiny(decoder_only), exchange(tiny(decoder_only), 4, "mean")
    ids = torch.tensor([PROMPTS[3]])
    assert torch.equal(model(ids), base(ids))
    gradients = [torch.autograd.grad(m(ids).square().sum(), m.layers[0].attention.key.weight)[0] for m in (base, model)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_it_equals_attention_with_keys_and_values_repeated_for_each_head(num_groups):
    torch.manual_seed(0)
    attention, x = GroupedQueryAttention(32, 4, 0.0, num_groups), torch.randn(2, 6, 32, requires_grad=True)
    query = attention.query(x).unflatten(-1, (4, -1)).transpose(1, 2)
    key, value = (f(x).unflatten(-1, (num_groups, -1)).transpose(1, 2).repeat_interleave(4 // num_groups, dim=1)
                  for f in (attention.key, attention.value))
    heads = F.scaled_dot_product_attention(query, key, value, CAUSAL)
    expected, maps = attention.output(heads.transpose(1, 2).flatten(2)), []
    found = attention(x, CAUSAL[None, None], attention_maps=maps)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))
    scores = (query @ key.transpose(-2, -1) / 8**0.5).masked_fill(~CAUSAL, -torch.inf)
    torch.testing.assert_close(maps[0], scores.softmax(-1))


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5), reason="enable_gqa is new in torch 2.5")
def test_it_equals_pytorchs_grouped_query_attention():
    torch.manual_seed(0)
    attention, x = GroupedQueryAttention(32, 4, 0.0, 2), torch.randn(2, 6, 32)
    query = attention.query(x).unflatten(-1, (4, -1)).transpose(1, 2)
    key, value = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (attention.key, attention.value))
    heads = F.scaled_dot_product_attention(query, key, value, CAUSAL, enable_gqa=True)
    torch.testing.assert_close(attention(x, CAUSAL[None, None]), attention.output(heads.transpose(1, 2).flatten(2)))


def test_cached_generation_gives_the_recomputed_tokens(model):
    cached, recomputed = (decoder_only.generate(model, PROMPTS, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, recomputed)


def test_prompts_of_different_lengths_continue_in_one_batch_as_they_do_alone(model):
    together = decoder_only.generate(model, PROMPTS)
    for row, prompt in zip(together, PROMPTS):
        alone = decoder_only.generate(model, [prompt])[0]
        assert torch.equal(row[:len(alone)], alone)


def test_the_cache_holds_one_key_and_value_for_each_group_and_position(model):
    cache = model.new_cache()
    model(torch.tensor([PROMPTS[1]]), cache)
    assert cache[0].key.shape == cache[0].value.shape == (1, model.layers[0].attention.num_groups, len(PROMPTS[1]), 8)


def test_pooling_averages_the_heads_of_a_group_or_keeps_the_first():
    projection = torch.nn.Linear(2, 8, bias=False)                     # 4 heads of width 2
    projection.weight.data = torch.arange(16.0).view(8, 2)
    heads = projection.weight.view(4, 2, 2)
    mean, first = (pool_heads(projection, 4, 2, how)["weight"].view(2, 2, 2) for how in ("mean", "first"))
    torch.testing.assert_close(mean, torch.stack([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2]))
    torch.testing.assert_close(first, torch.stack([heads[0], heads[2]]))


def test_a_conversion_of_equal_heads_changes_nothing():
    model = tiny(decoder_only)
    for layer in model.layers:  # all key heads alike, all value heads alike: then their mean is each of them
        for projection in (layer.attention.key, layer.attention.value):
            for parameter in (projection.weight, projection.bias):
                parameter.data = torch.cat([parameter.data.chunk(4)[0]] * 4)
    ids = torch.tensor([PROMPTS[3]])
    before = model(ids)
    torch.testing.assert_close(exchange(model, 1, "mean")(ids), before, atol=1e-4, rtol=1e-4)


def test_heads_that_cannot_be_shared_equally_are_refused():
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        GroupedQueryAttention(32, 4, 0.0, 3)


def test_new_key_and_value_heads_start_as_the_bases_do():
    attention = exchange(tiny(decoder_only), 2).layers[0].attention
    assert not attention.key.bias.any() and not attention.value.bias.any()


def test_a_share_of_the_original_steps_counts_all_epochs(monkeypatch):
    trained = []
    monkeypatch.setattr(decoder_only, "train", lambda model, loaders, *_, **__: trained.append(len(loaders.train)))
    grouped_query_attention.train_on(None, Splits(range(100), [], []), 0.05, None)
    assert trained == [0.05 * 100 * grouped_query_attention.NUM_EPOCHS]


def test_the_trained_mha_model_is_converted_and_held_out_numbers_decide_before_and_after(monkeypatch):
    for name, value in dict(build=lambda num_groups, seed: [num_groups, seed], copy_of=list, SEEDS=(5, 6),
                            exchange=lambda model, *conversion: [*model, *conversion],
                            train_on=lambda model, *_: model.append("further")).items():
        monkeypatch.setattr(grouped_query_attention, name, value)
    monkeypatch.setattr(decoder_only, "create_dataloaders", lambda *_, **__: Splits("train", "validation", "test"))
    monkeypatch.setattr(decoder_only, "train", lambda model, *_, **__: model.append("trained"))
    monkeypatch.setattr(decoder_only, "evaluate", lambda model, split: {"exact_match": (*model, split)})
    scratch, converted = grouped_query_attention.measure_quality(None)
    assert scratch == {g: [(g, seed, "trained", "validation") for seed in (5, 6)] for g in (8, 2, 1)}
    assert converted.keys() == {(8, "mean"), (2, "mean"), (2, "first"), (1, "mean"), (1, "first")}
    for (g, how), pairs in converted.items():
        assert pairs == [((8, seed, "trained", g, how, "validation"),
                          (8, seed, "trained", g, how, "further", "validation")) for seed in (5, 6)]


def test_the_conclusions_are_those_of_the_measurements(monkeypatch, capsys):
    scratch = {8: [0.90, 0.94], 2: [0.85, 0.91], 1: [0.70, 0.72]}
    converted = {(8, "mean"): [(0.9, 0.9)], (1, "mean"): [(0.1, 0.8)], (1, "first"): [(0.2, 0.5)]}
    monkeypatch.setattr(grouped_query_attention, "measure_cache", lambda: {})
    monkeypatch.setattr(grouped_query_attention, "measure_quality", lambda bar: (scratch, converted))
    grouped_query_attention.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "(the ranges do not overlap): MQA, 1 KV head." in printed
    assert "MQA, 1 KV head, mean of each group 10.0% (10.0 to 10.0) 80.0% (80.0 to 80.0)" in printed
    assert "reaches 80.0% from mean pooling and 50.0% from the first head (beyond seed noise); trained from" in printed


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main, monkeypatch):
    build = decoder_only.build_model
    monkeypatch.setattr(decoder_only, "D_MODEL", 16)
    monkeypatch.setattr(decoder_only, "build_model", lambda **sizes: build(**{"d_model": 16, "d_ff": 16} | sizes))
    printed = run_main(grouped_query_attention, BATCH_SIZE=8, SEEDS=(0, 1), NUM_EPOCHS=1, CACHED_POSITIONS=10,
                       CACHED_BATCH=2)
    assert all(f"{g} KV head" in printed for g in (8, 2, 1)) and "mean of each group" in printed
    sizes = [line.split()[-3:-1] for line in printed.splitlines()[5:8]]
    assert sizes == [["256"] * 2, ["64"] * 2, ["32"] * 2]
