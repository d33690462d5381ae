"""Llama's parts: each equals a slow definition, and the base's generation, cache and padding work with all of them."""

import math

import decoder_only
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from tqdm import tqdm

from variations import llama, positional_encodings
from variations.llama import PARTS, ROWS, LlamaAttention, RMSNorm, SwiGLU, exchange, rotate

PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123456)]


@pytest.fixture(params=ROWS)
def model(request):
    """A small decoder with one part exchanged, or none, or all; every weight random."""
    torch.manual_seed(0)
    model = exchange(tiny(decoder_only), ROWS[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def test_cached_generation_gives_the_recomputed_tokens(model):
    for settings in (dict(), dict(temperature=1.0, top_k=5), dict(temperature=0.7, top_p=0.9),
                     dict(repetition_penalty=2.0)):
        cached, recomputed = (
            decoder_only.generate(model, PROMPTS, **settings, use_cache=use_cache,
                                  generator=torch.Generator().manual_seed(0)) for use_cache in (True, False))
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
    ids, padding = torch.tensor([PROMPTS[1]]), torch.zeros(1, 5, dtype=torch.long)
    expected = model(ids)
    torch.testing.assert_close(model(torch.cat([padding, ids], dim=1))[:, 5:], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(torch.cat([ids, padding], dim=1))[:, :-5], expected, atol=1e-4, rtol=1e-4)


def test_the_future_changes_nothing(model):
    ids = torch.tensor([PROMPTS[3]])
    changed = ids.clone()
    changed[:, -1] = decoder_only.EOS_ID
    assert torch.equal(model(ids)[:, :-1], model(changed)[:, :-1])


def test_every_part_receives_a_gradient(model):
    loss, _ = decoder_only.compute_loss(model, llama_batch())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def llama_batch():
    return decoder_only.toy_dataset.pad_batch([decoder_only.toy_dataset.decoder_only_example(n) for n in (7, 90210)])


@pytest.mark.skipif(not hasattr(F, "rms_norm"), reason="F.rms_norm is new in torch 2.4")
def test_rms_norm_equals_torchs_forward_and_backward():
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    x, y = (torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    ours, torchs = norm(x), F.rms_norm(y, (8,), norm.weight, llama.EPSILON)
    torch.testing.assert_close(ours, torchs)
    ours.square().sum().backward()
    torchs.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_rms_norm_adds_epsilon_inside_the_root_and_keeps_float16_finite():
    norm = RMSNorm(2)
    x = torch.tensor([1e-3, 1e-3])
    torch.testing.assert_close(norm(x), x / math.sqrt(1e-6 + llama.EPSILON))
    assert norm(torch.tensor([1000.0, -1000.0], dtype=torch.float16)).tolist() == [1.0, -1.0]


def test_swiglu_equals_a_loop_over_its_hidden_units():
    part, x = SwiGLU(4, 12), torch.randn(4)
    expected = part.down.bias.clone()
    for unit in range(part.gate.out_features):
        gate = part.gate.weight[unit] @ x + part.gate.bias[unit]
        up = part.up.weight[unit] @ x + part.up.bias[unit]
        expected = expected + part.down.weight[:, unit] * (gate / (1 + torch.exp(-gate)) * up)
    torch.testing.assert_close(part(x), expected)


def test_swiglu_has_the_parameters_of_the_feed_forward_network_up_to_rounding(monkeypatch):
    monkeypatch.setattr(llama, "MULTIPLE_OF", 1)
    weights = [sum(p.numel() for p in part.parameters() if p.dim() == 2)
               for part in (SwiGLU(96, 384), decoder_only.FeedForward(96, 384))]
    assert weights[0] == weights[1]
    monkeypatch.setattr(llama, "MULTIPLE_OF", 256)
    assert SwiGLU(8, 16384).gate.out_features == 11008  # Llama 7B: D_MODEL = 4096, D_FF = 4 * 4096


def test_with_as_many_key_value_heads_as_heads_and_no_rotation_it_equals_the_base():
    base, ours = decoder_only.MultiHeadAttention(16, 4, 0.0), LlamaAttention(16, 4, 0.0, 4, rotary=False)
    ours.load_state_dict(base.state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(ours(x, causal(5)), base(x, causal(5)))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_equals_the_fused_version_on_rotated_queries_and_grouped_keys(num_kv_heads):
    attention, x = LlamaAttention(16, 4, 0.0, num_kv_heads, rotary=True), torch.randn(2, 5, 16)
    query, key, value = (attention.split_heads(project(x))
                         for project in (attention.query, attention.key, attention.value))
    heads = []
    for head in range(4):  # which key-value head each query head reads
        group = head * num_kv_heads // 4
        q, k = rotate(query[:, head], torch.arange(5)), rotate(key[:, group], torch.arange(5))
        heads.append(F.scaled_dot_product_attention(q, k, value[:, group], is_causal=True))
    torch.testing.assert_close(attention(x, causal(5)), attention.output(torch.cat(heads, dim=-1)))


def test_rotation_pairs_each_dimension_with_the_one_half_the_width_away():
    x, d_k = torch.randn(7, 6), 6
    expected = torch.empty_like(x)
    for position in range(7):
        for i in range(d_k // 2):
            angle = position * 10_000 ** (-2 * i / d_k)
            a, b = x[position, i], x[position, i + d_k // 2]
            expected[position, i] = a * math.cos(angle) - b * math.sin(angle)
            expected[position, i + d_k // 2] = a * math.sin(angle) + b * math.cos(angle)
    torch.testing.assert_close(rotate(x, torch.arange(7)), expected)
    assert llama.ROTARY_BASE == positional_encodings.ROTARY_BASE  # the sources are held equal by the twins' test


def test_the_cache_holds_key_value_heads_only_and_its_size_follows_the_formula():
    for parts, num_kv_heads in ((), 4), (("GQA",), llama.NUM_KV_HEADS):
        model = exchange(tiny(decoder_only), parts)
        assert llama.cache_bytes_per_token(model) == 2 * 2 * num_kv_heads * 8 * 4  # K and V, layers, G, d_k, float32


def test_without_biases_no_linear_layer_has_one():
    model = exchange(tiny(decoder_only), PARTS)
    assert not any("bias" in name for name, _ in model.named_parameters())


def test_key_value_heads_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(llama.InputError, match="NUM_KV_HEADS = 3 must divide NUM_HEADS = 4"):
        LlamaAttention(16, 4, 0.0, 3, rotary=False)


def test_with_rope_no_position_is_added_and_all_five_have_all_parts():
    for row, parts in ROWS.items():
        model = exchange(tiny(decoder_only), parts)
        assert (model.positional_encoding(torch.arange(5)).abs().sum() == 0) == ("RoPE" in parts), row
    assert ROWS["all five"] == PARTS and all(ROWS[part] == (part,) for part in PARTS)


def test_new_matrices_are_initialized_as_the_bases_own():
    torch.manual_seed(0)
    model = exchange(decoder_only.build_model(), PARTS)
    base = decoder_only.build_model()
    for name in ("attention.query", "attention.output"):
        new, old = (m.layers[0].get_submodule(name).weight.std().item() for m in (model, base))
        assert new == pytest.approx(old, rel=0.1)


def test_the_loss_is_that_on_held_out_names_at_half_time_and_at_the_end(monkeypatch):
    points = [{"loss": 9.0, "validation_loss": loss, "exact_match": exact} for loss, exact in ((2.0, 0.5), (1.0, 0.75))]
    monkeypatch.setattr(decoder_only, "train", lambda *arguments, **options: [{"loss": 9.0}, *points])
    found = llama.measure(tqdm(disable=True))["RoPE"]
    assert (found["half"][0], found["loss"][0], found["exact"][0]) == (2.0, 1.0, 0.75)


def test_the_table_and_the_verdict_are_those_of_the_measurements(monkeypatch, capsys):
    losses = {"base": [3.0, 4.0], "RoPE": [1.0, 2.0], "SwiGLU": [5.0, 6.0]}
    found = {row: {"parameters": 10, "bytes": 4.0, "half": [8.0, 8.0], "loss": losses.get(row, [2.0, 3.5]),
                   "exact": [0.25, 0.75]} for row in ROWS}
    monkeypatch.setattr(llama, "measure", lambda bar: found)
    monkeypatch.setattr(llama, "milliseconds_per_step", lambda: dict.fromkeys(ROWS, 7.0))
    llama.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "RoPE 10 4 7 8.000 1.5000 (1.0000 to 2.0000) 50.0% (25.0 to 75.0)" in printed
    assert "below the base's, beyond seed noise: RoPE; above it: SwiGLU; within seed noise" in printed


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(llama, num_train=8, D_MODEL=16, BATCH_SIZE=4, SEEDS=(0, 1), NUM_EPOCHS=1, TIMED_STEPS=1)
    assert all(f"\n  {row} " in printed for row in ROWS)
