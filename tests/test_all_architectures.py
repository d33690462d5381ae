"""What holds for all three architectures: the parts, parity with PyTorch's, masks, training, checkpoints."""

import copy
import io
import math
import os
import pickle
import re
from functools import cache
from itertools import islice

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import MODULES, TINY, tiny
from tqdm import tqdm

import decoder_only
import encoder_decoder
import encoder_only
import toy_dataset
from toy_dataset import IGNORE, InputError

attend = decoder_only.scaled_dot_product_attention


def outputs(module, model, batch):
    return module.predict(model, batch)[0]


EXAMPLE = {encoder_only: toy_dataset.masked_lm_example, decoder_only: toy_dataset.decoder_only_example,
           encoder_decoder: toy_dataset.encoder_decoder_example}


def batches(module, *sizes):
    """Batches of these sizes, of training numbers, none of them twice."""
    numbers = iter(toy_dataset.make_splits().train)
    return [toy_dataset.pad_batch([EXAMPLE[module](number) for number in islice(numbers, size)]) for size in sizes]


def fixed_batches(module, *sizes):
    """The same, with fixed masks for the masked LM, which would otherwise draw new ones each time."""
    found = batches(module, *sizes)
    for seed, batch in enumerate(found if module is encoder_only else []):
        batch["ids"], batch["targets"] = encoder_only.mask_tokens(batch["ids"], torch.Generator().manual_seed(seed))
    return found


def first_batch(module, size=8):
    return batches(module, size)[0]


def quiet():
    return tqdm(disable=True, total=1)


# --- the parts ---


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_pytorchs_forward_and_backward(masked):
    torch.manual_seed(0)
    ours = [torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    mask = torch.rand(2, 1, 5, 5) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True
    result, weights = attend(*ours, mask)
    expected = F.scaled_dot_product_attention(*theirs, mask)
    torch.testing.assert_close(result, expected)
    upstream = torch.randn_like(result)
    result.backward(upstream)
    expected.backward(upstream)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, other.grad)


def test_attention_weights_sum_to_one_and_masked_ones_are_exactly_zero():
    mask = torch.rand(4, 1, 6, 6) < 0.5
    mask[..., 0] = True
    weights = attend(*torch.randn(3, 4, 2, 6, 8), mask)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 6))
    assert (weights[~mask.expand_as(weights)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fully_masked_row_stays_finite_in_every_precision(dtype):
    query = torch.randn(1, 1, 3, 4, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])
    result, weights = attend(query, query, query, mask)
    result.float().sum().backward()
    assert result.isfinite().all() and weights.isfinite().all() and query.grad.isfinite().all()


def test_dropout_zeroes_attention_weights_after_softmax_but_not_the_returned_ones():
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    dropped = []

    def half(weights):
        dropped.append(weights)
        return 2 * weights * (torch.arange(6) % 2)

    output, weights = attend(query, key, value, None, half)
    torch.testing.assert_close(weights, attend(query, key, value)[1])
    assert dropped[0].equal(weights)
    torch.testing.assert_close(output, half(weights) @ value)


def test_multi_head_attention_equals_pytorchs_on_the_same_weights():
    torch.manual_seed(0)
    ours = encoder_only.MultiHeadAttention(32, 4, 0.0)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    copy_attention(ours, theirs)
    x, padding = torch.randn(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    expected, _ = theirs(x, x, x, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(ours(x, ~padding[:, None, None, :]), expected, atol=1e-5, rtol=1e-5)


def copy_attention(ours, theirs):
    """Copy our four matrices into PyTorch's fused one."""
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.out_proj.bias.copy_(ours.output.bias)


def copy_rest(ours, theirs, norms):
    theirs.linear1.load_state_dict(ours.feed_forward.expand.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.contract.state_dict())
    for i, norm in enumerate(norms, start=1):
        getattr(theirs, f"norm{i}").load_state_dict(norm.state_dict())


@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_equals_pytorchs_pre_norm_layer_on_the_same_weights(causal):
    torch.manual_seed(0)
    ours = (decoder_only.DecoderLayer if causal else encoder_only.EncoderLayer)(32, 4, 64, 0.0)
    theirs = nn.TransformerEncoderLayer(32, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True)
    copy_attention(ours.attention, theirs.self_attn)
    copy_rest(ours, theirs, [ours.attention_norm, ours.feed_forward_norm])
    x, mask = torch.randn(2, 6, 32), torch.ones(6, 6, dtype=torch.bool)
    mask = mask.tril() if causal else mask
    torch.testing.assert_close(ours(x, mask), theirs(x, src_mask=~mask), atol=1e-5, rtol=1e-5)


def test_a_cross_attention_layer_equals_pytorchs_on_the_same_weights():
    torch.manual_seed(0)
    ours = encoder_decoder.DecoderLayer(32, 4, 64, 0.0)
    theirs = nn.TransformerDecoderLayer(32, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True)
    copy_attention(ours.self_attention, theirs.self_attn)
    copy_attention(ours.cross_attention, theirs.multihead_attn)
    copy_rest(ours, theirs, [ours.self_attention_norm, ours.cross_attention_norm, ours.feed_forward_norm])
    x, memory, mask = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.ones(5, 5, dtype=torch.bool).tril()
    memory_mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    memory_mask[1, ..., 4:] = False
    expected = theirs(x, memory, tgt_mask=~mask, memory_key_padding_mask=~memory_mask[:, 0, 0])
    torch.testing.assert_close(ours(x, mask, memory, memory_mask), expected, atol=1e-5, rtol=1e-5)


def layer_of(kind):
    """A layer with dropout 0.5 in training mode, its branches by name, and a call with inputs of zeros."""
    module, name = kind.split(".")
    layer = getattr({"bert": encoder_only, "gpt": decoder_only, "t5": encoder_decoder}[module], name)(32, 4, 64, 0.5)
    x, mask = torch.zeros(2, 50, 32), torch.ones(50, 50, dtype=torch.bool)
    memory = (torch.zeros(2, 7, 32), torch.ones(2, 1, 1, 7, dtype=torch.bool)) if kind == "t5.DecoderLayer" else ()
    branches = [name for name, _ in layer.named_children() if "norm" not in name and name != "dropout"]
    return layer.train(), branches, lambda: layer(x, mask, *memory)


class Constant(nn.Module):
    """Stands for a branch of a layer: whatever goes in, the same number comes out."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x, *_, **__):
        return torch.full_like(x, self.number)


@pytest.mark.parametrize("kind", ["bert.EncoderLayer", "gpt.DecoderLayer", "t5.EncoderLayer", "t5.DecoderLayer"])
def test_dropout_is_applied_to_what_each_branch_adds_to_the_residual_stream(kind):
    torch.manual_seed(0)
    layer, branches, call = layer_of(kind)
    assert len(branches) == (3 if kind == "t5.DecoderLayer" else 2)
    for speaking in branches:
        for name in branches:
            setattr(layer, name, Constant(float(name == speaking)))
        assert set(call().unique().tolist()) == {0.0, 2.0}, speaking  # half is dropped, the rest doubled


def test_attention_dropout_acts_in_training_only_and_maps_precede_it():
    torch.manual_seed(0)
    attention, x, maps = encoder_only.MultiHeadAttention(32, 4, 0.5), torch.randn(1, 6, 32), []
    exact = attention.eval()(x, None)
    attention.train()
    assert not torch.allclose(attention(x, None, attention_maps=maps), exact)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(1, 4, 6))
    attention.value.bias.data.fill_(1)  # if only the bias is left, the heads' output is the sum of the weights
    attention.value.weight.data.zero_()
    attention.output.weight.data.copy_(torch.eye(32))
    attention.output.bias.data.zero_()
    assert attention(x, None).unique().numel() > 10
    torch.testing.assert_close(attention.eval()(x, None), torch.ones(1, 6, 32))


def test_positions_are_the_sines_and_cosines_of_the_paper():
    table = decoder_only.PositionalEncoding(6, 10)(torch.tensor([0, 3]))
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    for i in range(3):
        angle = 3 / 10000 ** (2 * i / 6)
        assert table[1, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[1, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_a_layer_has_two_thirds_of_its_parameters_in_the_feed_forward_network():
    layer = encoder_only.EncoderLayer(128, 4, 512, 0.0)
    share = sum(p.numel() for p in layer.feed_forward.parameters()) / sum(p.numel() for p in layer.parameters())
    assert share == pytest.approx(2 / 3, abs=0.01)


# --- the models ---


def test_a_model_equals_pytorchs_layers_between_embedding_and_final_norm(module):
    """From token ids to logits, on the same weights: embedding * sqrt(C) + positions, layers, norm, embedding again."""
    torch.manual_seed(0)
    model, ids = tiny(module), torch.tensor([toy_dataset.to_ids("9 0 2 1 0".split())])

    def embed(ids):
        return model.embedding(ids) * math.sqrt(32) + module.PositionalEncoding(32, 40)(torch.arange(ids.size(1)))

    def stack(layers, norm, x, mask=None, memory=None):
        for ours in layers:
            theirs = (nn.TransformerEncoderLayer if memory is None else nn.TransformerDecoderLayer)(
                32, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True)
            copy_attention(ours.attention if memory is None else ours.self_attention, theirs.self_attn)
            if memory is not None:
                copy_attention(ours.cross_attention, theirs.multihead_attn)
            copy_rest(ours, theirs, [part for name, part in ours.named_children() if name.endswith("norm")])
            x = theirs(x, src_mask=mask) if memory is None else theirs(x, memory, tgt_mask=mask)
        return norm(x)

    if module is encoder_decoder:
        target = torch.tensor([toy_dataset.to_ids("<SOS> ninety thousand two".split())])
        memory = stack(model.encoder, model.encoder_norm, embed(ids))
        x, found = stack(model.decoder, model.decoder_norm, embed(target), look_back(4), memory), model(ids, target)
    else:
        mask = look_back(5) if module is decoder_only else None
        x, found = stack(model.layers, model.final_norm, embed(ids), mask), model(ids)
    torch.testing.assert_close(found, x @ model.embedding.weight.T, atol=1e-4, rtol=1e-4)


def look_back(T):
    """PyTorch's causal mask, in which True means may NOT attend."""
    return ~torch.ones(T, T, dtype=torch.bool).tril()


def test_dropout_acts_on_the_sum_of_embedding_and_position_in_training_only(module):
    torch.manual_seed(0)
    model = tiny(module, dropout=0.5)
    ids, positions = torch.randint(6, 40, (4, 30)), torch.arange(30)
    exact, dropped = model.embed(ids, positions), model.train().embed(ids, positions)
    zeroed = dropped == 0
    assert 0.45 < zeroed.float().mean() < 0.55
    torch.testing.assert_close(dropped[~zeroed], 2 * exact[~zeroed])


def test_one_constant_sets_every_dropout_probability(module):
    found = [part.p for part in module.build_model(**TINY | {"dropout": 0.3}).modules() if isinstance(part, nn.Dropout)]
    assert set(found) == {0.3} and len(found) == {encoder_decoder: 11}.get(module, 5)  # 1, and 2 or 3 in each layer


def test_a_new_model_has_xavier_weights_zero_biases_and_small_embeddings(module):
    torch.manual_seed(0)
    model = module.build_model(d_model=64, d_ff=256, num_layers=1)
    assert model.embedding.weight.std().item() * math.sqrt(64) == pytest.approx(0.5, rel=0.1)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            bound = math.sqrt(6 / (part.in_features + part.out_features))
            assert part.weight.abs().max() <= bound and not part.bias.any()
            assert part.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # that of a uniform one


def test_each_head_has_its_own_attention_map_and_maps_keep_no_graph(module):
    model, batch, maps = tiny(module), first_batch(module), []
    if module is encoder_decoder:
        model.decode(batch["target"], model.encode(batch["source"], maps), batch["source"], None, maps, maps)
    else:
        model(batch["ids"], attention_maps=maps)
    assert len(maps) == (6 if module is encoder_decoder else 2)
    for weights in maps:
        assert not weights.requires_grad and weights.size(1) == 4 and not weights[:, 0].equal(weights[:, 1])
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_the_fastest_available_device_is_used(module, monkeypatch):
    assert module.get_device().type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert module.get_device().type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module.get_device().type == "cuda"


def test_the_parameter_count_matches_the_formula(module):
    for task in encoder_only.TASKS if module is encoder_only else (None,):
        model = module.build_model(**TINY, **({"task": task} if task else {}))
        assert sum(p.numel() for p in model.parameters()) == module.parameter_formula(model)[1]


def test_the_first_loss_is_near_that_of_uniform_guessing(module):
    torch.manual_seed(0)
    loss_sum, num_targets = module.compute_loss(module.build_model(), first_batch(module, 128))
    assert (loss_sum / num_targets).item() == pytest.approx(math.log(len(toy_dataset.VOCABULARY)), abs=0.3)


def test_a_batch_of_mixed_lengths_gives_the_same_outputs_as_its_members_alone(module):
    model = tiny(module)
    examples = [EXAMPLE[module](number) for number in (7, 90210, 342)]
    fields = [field for field in examples[0] if field != "targets"]
    together = model(*[toy_dataset.pad_batch(examples)[field] for field in fields])
    for i, example in enumerate(examples):
        alone = model(*[toy_dataset.pad_batch([example])[field] for field in fields])[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_the_output_layer_is_the_embedding_table(module):
    model = tiny(module)
    before = outputs(module, model, first_batch(module))
    with torch.no_grad():
        model.embedding.weight[5] += 100
    assert (outputs(module, model, first_batch(module))[..., 5] != before[..., 5]).any()
    assert not any("output" in name and "attention" not in name for name, _ in model.named_parameters())


def test_every_parameter_gets_a_gradient(module):
    model = tiny(module)
    torch.manual_seed(0)
    module.compute_loss(model, first_batch(module, 64))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_sequence_longer_than_max_length_is_refused(module):
    model = tiny(module, max_length=4)
    with pytest.raises(InputError, match="MAX_LENGTH = 4"):
        outputs(module, model, first_batch(module))


@pytest.mark.parametrize("change, names", [
    ({"num_heads": 5}, "D_MODEL = 32.*NUM_HEADS = 5"), ({"d_model": 31, "num_heads": 1}, "D_MODEL = 31.*even"),
    ({"num_layers": 0}, "NUM_LAYERS = 0"), ({"d_ff": -1}, "D_FF = -1"), ({"dropout": 1.0}, "DROPOUT = 1.0"),
    ({"max_length": 0}, "MAX_LENGTH = 0"), ({"d_model": 32.0}, "D_MODEL = 32.0")])
def test_invalid_model_sizes_are_refused(module, change, names):
    with pytest.raises(ValueError, match=names):
        module.build_model(**TINY | change)


def test_the_suggested_numbers_of_heads_work(module):
    with pytest.raises(InputError) as caught:
        module.build_model(d_model=24, num_heads=5)
    proposed = str(caught.value).split("NUM_HEADS = ")[2].split(" work")[0]
    assert proposed == "1, 2, 3, 4, 6, 8, 12"
    assert all(module.build_model(d_model=24, num_heads=int(n)) for n in proposed.split(", "))


# --- constants ---

WRONG = {
    "TEMPERATURE": [-1, "a", math.nan], "TOP_K": [0, 2.5], "TOP_P": [0, 2, "a"], "MAX_NEW_TOKENS": [0, 2.5],
    "REPETITION_PENALTY": [0, "a"], "BEAM_WIDTH": [0, "a"], "LENGTH_PENALTY": [-1, "a"], "SEED": ["a", 1.5, None],
    "MASK_PROBABILITY": [0, 1.5, "a"], "FINE_TUNING_STEPS": [0], "FINE_TUNING_LEARNING_RATE": [0, "a"],
    "NUM_LABELS": [[0], 5], "ITERATIONS": [0, "a"], "NUM_EPOCHS": [0, 1.5], "BATCH_SIZE": [0, "a"],
    "LEARNING_RATE": [0, "a", math.nan], "FINAL_LEARNING_RATE_RATIO": [-1, 2], "WARMUP_STEPS": [-1, "a"],
    "WEIGHT_DECAY": [-1, "a"], "GRAD_CLIP": [0, "a"], "EXAMPLES": [[], 5], "MASKED_EXAMPLES": [[], "a"]}
WRONG_EXAMPLES = {"EXAMPLES": [[7, 10**7], ["a"]], "PROGRESS_EXAMPLE": [-1, "a"], "DETAILED_EXAMPLE": [10**7],
                  "MASKED_EXAMPLES": [["7 <SEP> <MASK>", "<MASK>"]]}


CASES = [*((name, value, f"{name} = {re.escape(repr(value))} must be") for name, values in WRONG.items()
           for value in values),
         *((name, value, "language|MASK") for name, values in WRONG_EXAMPLES.items() for value in values)]


@pytest.mark.parametrize("module, name, value, message", [
    (module, *case) for module in MODULES for case in CASES if hasattr(module, case[0])])
def test_invalid_constants_are_refused_before_training(module, monkeypatch, tmp_path, name, value, message):
    monkeypatch.setattr(module, "CHECKPOINT", tmp_path / "model.pt")
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("it trained"))
    monkeypatch.setattr(module, name, value)
    with pytest.raises(InputError, match=message) as caught:
        module.train_and_test()
    assert "\n" not in str(caught.value)


def test_a_size_in_quotes_is_shown_in_quotes(module):
    with pytest.raises(InputError, match="D_MODEL = '128' must be a whole number"):
        module.build_model(d_model="128")


# --- training ---


def test_padding_and_ignored_targets_carry_no_loss(module):
    if module is encoder_only:
        batch = toy_dataset.pad_batch([toy_dataset.tagging_example(n) for n in (7, 342)])
        model, field = tiny(module, task="tagging"), "places"
    else:
        batch, model, field = first_batch(module), tiny(module), "targets"
    loss_sum, num_targets = module.compute_loss(model, batch)
    logits, targets = module.predict(model, batch)
    expected = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != IGNORE].sum()
    torch.testing.assert_close(loss_sum, expected, rtol=1e-4, atol=1e-4)
    assert num_targets == (targets != IGNORE).sum() < targets.numel()
    batch[field] = torch.full_like(batch[field], IGNORE)
    loss_sum, num_targets = module.compute_loss(model, batch)
    assert loss_sum == 0 and num_targets == 0


def test_a_step_without_targets_leaves_the_weights_finite(module):
    batch, model = first_batch(module), tiny(module)
    batch["targets"] = torch.full_like(batch["ids" if "ids" in batch else "targets"], IGNORE)
    history = module.train(model, toy_dataset.Splits([batch], [batch], []), 1, 1e-3, 1, quiet())
    assert history[0]["loss"] == 0 and all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("module", [decoder_only, encoder_decoder], ids=lambda m: m.__name__)
def test_losses_of_unequal_micro_batches_add_up_to_the_batch_loss(module):
    examples = [EXAMPLE[module](number) for number in (7, 12, 90210, 777777)]
    model = tiny(module)
    whole = module.compute_loss(model, toy_dataset.pad_batch(examples))
    parts = [module.compute_loss(model, toy_dataset.pad_batch(part)) for part in (examples[:1], examples[1:])]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0])
    assert sum(number for _, number in parts) == whole[1]


def test_one_batch_can_be_overfitted(module):
    if module is encoder_only:
        model = module.build_model(**TINY, task="counting")
        batch = toy_dataset.pad_batch([toy_dataset.counting_example(n) for n in (7, 342, 90210, 55)])
    else:
        model, batch = module.build_model(**TINY), first_batch(module, 2)
        if module is decoder_only:  # two different first digits after the same <SOS> cannot both be certain
            batch = toy_dataset.pad_batch([toy_dataset.decoder_only_example(90210)])
    optimizer = module.create_optimizer(model, 1e-2)
    for _ in range(60):
        loss_sum, num_targets = module.compute_loss(model, batch)
        optimizer.zero_grad()
        (loss_sum / num_targets).backward()
        optimizer.step()
    assert (loss_sum / num_targets).item() < 0.02


def test_weight_decay_touches_the_matrices_of_linear_layers_once_and_nothing_else(module):
    model = tiny(module)
    decayed, spared = (group["params"] for group in module.create_optimizer(model).param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names[id(p)] for p in decayed) == sorted(
        name for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name)
    assert len(decayed) + len(spared) == len(names) == len({id(p) for p in [*decayed, *spared]})
    assert [group["weight_decay"] for group in module.create_optimizer(model).param_groups] == [module.WEIGHT_DECAY, 0]


def test_steps_equal_adamw_written_out(module):
    """Loshchilov & Hutter 2019, algorithm 2: running means of the gradient and its square, corrected for starting at 0;
    decoupled decay, for matrices of Linear layers alone; the learning rate given to each step. In float64, because some
    gradients are 0 up to rounding (a key bias shifts all scores alike), and Adam divides by them."""
    model = tiny(module).double().train()
    optimizer, written_out = module.create_optimizer(model, 123.0), copy.deepcopy(model)  # 123: must not matter
    parameters = dict(written_out.named_parameters())
    mean, square = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    decay = {f"{name}.weight" for name, part in written_out.named_modules() if isinstance(part, nn.Linear)}
    for step, (batch, rate) in enumerate(zip(fixed_batches(module, 8, 8, 8), (1e-3, 3e-3, 2e-3)), start=1):
        loss_sum, num_targets = module.compute_loss(written_out, batch)
        written_out.zero_grad()
        (loss_sum / num_targets).backward()
        norm = torch.cat([p.grad.flatten() for p in parameters.values()]).norm().item()
        found = module.train_step(model, batch, optimizer, rate)
        assert found == pytest.approx(((loss_sum / num_targets).item(), norm))
        with torch.no_grad():
            for name, p in parameters.items():
                gradient = p.grad * min(1.0, module.GRAD_CLIP / norm)
                mean[name] = 0.9 * mean[name] + 0.1 * gradient
                square[name] = 0.98 * square[name] + 0.02 * gradient**2
                p -= rate * module.WEIGHT_DECAY * p * (name in decay)
                p -= rate * (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.98**step)).sqrt() + 1e-8)
        torch.testing.assert_close(dict(model.named_parameters()), parameters)


@pytest.mark.parametrize("loss", ["nan", "inf", "too large", "gradient nan"])
def test_a_diverged_step_raises_before_the_weights_change(module, monkeypatch, loss):
    model, (batch,) = tiny(module), fixed_batches(module, 4)
    optimizer, before = module.create_optimizer(model), copy.deepcopy(model.state_dict())

    def compute_loss(model, batch):
        total = model.embedding.weight.sum()
        value = {"nan": total + math.nan, "inf": total + math.inf, "too large": total * 0 + 40.0,
                 "gradient nan": (total * 0).sqrt()}[loss]
        return value, torch.tensor(1)

    monkeypatch.setattr(module, "compute_loss", compute_loss)
    with pytest.raises(FloatingPointError):
        module.train_step(model, batch, optimizer, 1e-3)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("num_steps, warmup_steps", [(1000, 100), (1000, 0), (50, 40), (50, 200), (1, 0), (2, 200)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_minimum(module, num_steps, warmup_steps):
    rates = [module.learning_rate_at(step, num_steps, 1.0, warmup_steps) for step in range(num_steps)]
    top = rates.index(max(rates))
    assert rates[0] > 0 and max(rates) == pytest.approx(1.0, abs=0.01) or num_steps < 3
    assert rates[-1] == pytest.approx(module.FINAL_LEARNING_RATE_RATIO)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert num_steps != 1000 or warmup_steps != 100 or top in (98, 99, 100)


def test_a_short_run_is_not_all_warmup_and_the_decay_is_half_a_cosine(module, monkeypatch):
    monkeypatch.setattr(module, "FINAL_LEARNING_RATE_RATIO", 0.1)
    rates = [module.learning_rate_at(step, 50, 1.0, 200) for step in range(50)]
    assert rates.index(max(rates)) == 9  # the last step of the first fifth
    rates = [module.learning_rate_at(step, 1000, 1.0, 200) for step in range(1000)]
    assert [rates[step - 1] for step in (100, 200)] == pytest.approx([0.5, 1.0])
    for done in (0.25, 0.5, 0.75, 1.0):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
        assert rates[round(200 + 800 * done) - 1] == pytest.approx(expected)


def test_training_visits_all_batches_in_training_mode_at_the_scheduled_rate(module, monkeypatch):
    model, loader = tiny(module), fixed_batches(module, 4, 4, 4)
    seen, found, step = [], [], module.train_step

    def train_step(model, batch, optimizer, rate):
        seen.append((id(batch), model.training, rate))
        found.append(step(model, batch, optimizer, rate))
        return found[-1]

    monkeypatch.setattr(module, "train_step", train_step)
    bar = tqdm(total=6, file=io.StringIO())
    splits = toy_dataset.Splits(loader, loader[:1], test=None)  # None: it must not need the test numbers
    history = module.train(model, splits, 2, 5e-4, 3, bar)
    assert [batch for batch, _, _ in seen] == 2 * [id(batch) for batch in loader]
    assert all(training for _, training, _ in seen)
    assert [rate for *_, rate in seen] == [module.learning_rate_at(step, 6, 5e-4) for step in range(6)]
    assert [row["learning_rate"] for row in history] == [rate for *_, rate in seen] and bar.n == 6
    assert [(row["loss"], row["grad_norm"]) for row in history] == found


def test_the_validation_metrics_in_the_history_are_those_of_evaluate(module):
    model, (one, other) = tiny(module), fixed_batches(module, 8, 16)
    history = module.train(model, toy_dataset.Splits([one], [other], [one]), 2, 1e-3, 2, quiet())
    found = module.evaluate(model, [other])
    assert (history[-1]["validation_loss"], history[-1]["exact_match"]) == (found["loss"], found["exact_match"])


def test_an_answer_counts_as_correct_only_if_every_target_is_predicted(module, monkeypatch):
    """Three answers: correct, one token wrong, all wrong. Predictions at positions without a target do not matter."""
    batch = toy_dataset.pad_batch([EXAMPLE[module](number) for number in (777, 342, 90210)])
    targets = batch["targets"] if "targets" in batch else batch["ids"].masked_fill(batch["ids"] < 6, IGNORE)
    guesses, one = targets.clamp(min=0), (targets[1] != IGNORE).nonzero()[-1]  # without a target: <PAD>
    if module is decoder_only:
        guesses[0, 0] += 1  # a digit of the prompt, which is random
        one = batch["ids"][1].tolist().index(toy_dataset.SEP_ID)  # where the first word is predicted
    guesses[1, one], guesses[2] = guesses[1, one] + 1, guesses[2] + 1
    logits = 9.0 * F.one_hot(guesses, len(toy_dataset.VOCABULARY) + 1).float()
    monkeypatch.setattr(module, "predict", lambda *_: (logits, targets))
    found = module.evaluate(tiny(module), [batch, batch])
    assert found["mistakes"] == [1, 2, 4, 5] and found["exact_match"] == pytest.approx(1 / 3)


def test_one_wrong_token_anywhere_in_the_answer_is_a_mistake_a_missing_end_too(module, monkeypatch):
    batch = toy_dataset.pad_batch([EXAMPLE[module](342)])
    targets = batch["targets"] if "targets" in batch else batch["ids"].masked_fill(batch["ids"] < 6, IGNORE)
    answer = (targets[0] != IGNORE).nonzero().flatten().tolist()
    if module is decoder_only:
        answer = [t for t in answer if t >= batch["ids"][0].tolist().index(toy_dataset.SEP_ID)]
    for wrong in answer:
        guesses = targets.clamp(min=0)
        guesses[0, wrong] += 1
        logits = 9.0 * F.one_hot(guesses, len(toy_dataset.VOCABULARY) + 1).float()
        monkeypatch.setattr(module, "predict", lambda *_, logits=logits: (logits, targets))
        assert module.evaluate(tiny(module), [batch])["mistakes"] == [0]


def test_the_loss_of_an_evaluation_weights_all_targets_equally(module):
    model, parts = tiny(module), fixed_batches(module, 3, 17)
    sums, numbers = zip(*(module.compute_loss(model, batch) for batch in parts))
    assert module.evaluate(model, parts)["loss"] == pytest.approx((sum(sums) / sum(numbers)).item(), rel=1e-5)


def train_briefly(module, **options):
    """Two epochs of eight batches, with dropout. Returns the history and the model."""
    torch.manual_seed(0)
    model = module.build_model(**TINY | {"dropout": 0.1})
    splits = toy_dataset.Splits(batches(module, *[32] * 8), batches(module, 200), None)
    return module.train(model, splits, 2, num_evaluations=2, progress=quiet(), **options), model


briefly_trained = cache(train_briefly)  # shared by the tests that change nothing


def test_the_same_seed_gives_the_same_losses_to_the_last_digit(module):
    first, second = train_briefly(module)[0], briefly_trained(module)[0]
    assert first == second and len(first) == 16 and first[0]["loss"] > first[-1]["loss"]


def test_the_history_records_step_loss_rate_norm_and_evaluations(module):
    history, _ = briefly_trained(module)
    assert [row["step"] for row in history] == list(range(1, 17))
    assert [row["step"] for row in history if "exact_match" in row] == [8, 16]
    assert {"loss", "learning_rate", "grad_norm", "validation_loss", "exact_match"} <= set(history[-1])


def test_each_step_follows_the_gradient_of_its_own_batch_alone(module):
    """With a learning rate too small to move anything, equal batches have equal gradients, unless they accumulate."""
    model, (batch,) = tiny(module), fixed_batches(module, 16)
    history = module.train(model, toy_dataset.Splits([batch] * 4, [batch], None), 1, 1e-12, 1, quiet())
    norms = [row["grad_norm"] for row in history]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-4)


def test_gradients_are_clipped_before_the_optimizer_step(module, monkeypatch):
    monkeypatch.setattr(module, "GRAD_CLIP", 1e-3)
    norms, original = [], torch.optim.AdamW.step

    def step(self, *arguments, **options):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    history, _ = train_briefly(module)
    assert len(norms) == len(history)
    assert max(norms) <= 1.001e-3 < min(row["grad_norm"] for row in history)


def test_diverging_training_stops_with_a_sentence_that_says_what_to_change(module):
    with pytest.raises(FloatingPointError, match="(?s)diverged.*LEARNING_RATE = 1000"):
        train_briefly(module, learning_rate=1000)


@pytest.mark.parametrize("name, value", [("GRAD_CLIP", 0), ("WEIGHT_DECAY", -1), ("WARMUP_STEPS", -1)])
def test_invalid_training_constants_are_refused(module, monkeypatch, name, value):
    monkeypatch.setattr(module, name, value)
    with pytest.raises(InputError, match=f"{name} = {value}"):
        train_briefly(module)


def test_evaluation_disables_dropout_and_restores_the_mode(module):
    _, model = briefly_trained(module)
    loader = [first_batch(module, 16)]
    for training in (True, False):
        model.train(training)
        assert module.evaluate(model, loader) == module.evaluate(model, loader)
        assert model.training is training


# --- checkpoints ---


def test_loading_restores_what_was_saved_and_the_file_is_safe_to_read(module, tmp_path):
    model = tiny(module)
    module.save(model, tmp_path / "model.pt")
    loaded = module.load(tmp_path / "model.pt", module.build_model(**TINY))
    assert all(loaded.state_dict()[name].equal(value) for name, value in model.state_dict().items())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert not any(name.startswith(("_orig_mod.", "module.")) for name in content["weights"])
    assert content["weights"].keys() == dict(model.named_parameters()).keys()  # positions are a formula
    assert not loaded.training


@pytest.mark.parametrize("change", [{"d_model": 16}, {"num_layers": 1}, {"num_heads": 2}, {"d_ff": 128},
                                    {"max_length": 41}], ids=lambda change: next(iter(change)))
def test_a_checkpoint_with_other_constants_is_refused_by_name(module, tmp_path, change):
    """NUM_HEADS and MAX_LENGTH change the shape of no weight, so only this check can notice them."""
    module.save(tiny(module), tmp_path / "model.pt")
    (name, today), = change.items()
    with pytest.raises(InputError, match=rf"(?s)model\.pt.*{name.upper()} = {TINY[name]}.*{today}"):
        module.load(tmp_path / "model.pt", module.build_model(**TINY | change))


@pytest.mark.parametrize("name", ["MAX_DIGITS", "NUM_TRAIN", "SEED"])
def test_a_checkpoint_of_another_language_is_refused(module, tmp_path, monkeypatch, name):
    """It may have been trained on numbers that are in today's test split."""
    module.save(tiny(module), tmp_path / "model.pt")
    monkeypatch.setattr(toy_dataset, name, 999)
    with pytest.raises(InputError, match=f"toy_dataset.{name}"):
        module.load(tmp_path / "model.pt", module.build_model(**TINY))


def test_another_architectures_checkpoint_is_refused(module, tmp_path):
    other = MODULES[(MODULES.index(module) + 1) % 3]
    other.save(tiny(other), tmp_path / "model.pt")
    with pytest.raises(InputError, match="holds a"):
        module.load(tmp_path / "model.pt", module.build_model(**TINY))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1}), "half", "tensor"])
def test_damaged_and_foreign_files_are_refused_with_one_sentence(module, tmp_path, content):
    path = tmp_path / "model.pt"
    if content == "half":
        module.save(tiny(module), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "tensor":
        torch.save(torch.ones(3), path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"model\.pt is damaged, or not a checkpoint") as caught:
        module.load(path, module.build_model(**TINY))
    assert "\n" not in str(caught.value) and path.read_bytes() == before


def test_code_in_a_checkpoint_is_not_run(module, tmp_path):
    class Code:
        def __reduce__(self):  # what unpickling calls
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"architecture": "x", "constants": {}, "weights": Code()}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="damaged, or not a checkpoint"):
        module.load(tmp_path / "model.pt", module.build_model(**TINY))
    assert not (tmp_path / "it ran").exists()


def test_an_interrupted_save_leaves_the_old_checkpoint(module, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    module.save(tiny(module), path)
    before = path.read_bytes()

    def die(content, file):
        with open(file, "wb") as half:
            half.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        module.save(tiny(module, seed=1), path)
    assert path.read_bytes() == before


def test_saving_keeps_the_previous_checkpoint(module, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"something of yours")
    module.save(tiny(module), path)
    assert (tmp_path / "model.pt.old").read_bytes() == b"something of yours"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(module, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=str(tmp_path)):
        module.save(tiny(module), tmp_path / "model.pt")


# --- the whole file, as main runs it ---


@pytest.fixture
def small_language(monkeypatch):
    """Splits with as few numbers of each length as possible."""
    for name, size in (("NUM_TRAIN", 400), ("NUM_VALIDATION", 40), ("NUM_TEST", 60)):
        monkeypatch.setattr(toy_dataset, name, size)
    toy_dataset.make_splits.cache_clear()
    yield toy_dataset.make_splits()
    toy_dataset.make_splits.cache_clear()


def test_the_final_accuracy_is_measured_on_test_numbers_after_training(
        module, monkeypatch, tmp_path, capsys, small_language):
    calls = []
    monkeypatch.setattr(module, "CHECKPOINT", tmp_path / "model.pt")
    monkeypatch.setattr(module, "describe_floor", lambda dataset: "as low as it gets")
    monkeypatch.setattr(module, "train", lambda model, loaders, *_, **__: calls.append("train") or [])
    monkeypatch.setattr(module, "evaluate", lambda model, loader: calls.append(loader.dataset.numbers) or {
        "loss": 1.0, "exact_match": 0.4321, "accuracy": 0.4321, "mistakes": []})
    module.train_and_test()
    assert calls[0] == "train" and all(call in ("train", small_language.test) for call in calls)
    assert calls[-1] == small_language.test and calls.count("train") == calls.count(small_language.test)
    assert capsys.readouterr().out.count("43.21%") == calls.count("train")


GENERATORS = pytest.mark.parametrize("module", [decoder_only, encoder_decoder], ids=lambda module: module.__name__)


@GENERATORS
def test_wrong_answers_and_no_others_are_marked_with_the_correct_ones(module, monkeypatch):
    def generate(model, prompts, temperature, **_):
        assert temperature == 0 and len(prompts) == 2
        return toy_dataset.pad_batch([{"ids": toy_dataset.to_ids(text.split())} for text in
                                      ("forty two <EOS>", "three hundred forty <EOS>")])["ids"]

    monkeypatch.setattr(module, "generate", generate)
    assert module.answer(tiny(module), [42, 342]) == [
        "42 -> forty two", "342 -> three hundred forty\n    WRONG: three hundred forty two"]


@GENERATORS
def test_text_ends_at_eos_or_at_the_limit(module):
    for text in ("forty two <EOS> nine nine", "forty two <EOS> <PAD> <PAD>", "forty two <PAD>", "forty two"):
        assert module.to_words(torch.tensor(toy_dataset.to_ids(text.split()))) == "forty two"


@GENERATORS
def test_strategies_are_compared_on_held_out_numbers(module, monkeypatch, capsys):
    """A model that names every number, and generates one and the same text unconditionally."""
    asked, calls = set(), []

    def generate(model, prompts, *_, **settings):
        texts = []
        calls.append(settings)
        for prompt in prompts:
            digits = "".join(token for token in toy_dataset.to_tokens(prompt) if token.isdigit())
            asked.update([int(digits)] if digits else [])
            texts.append([*toy_dataset.number_to_words(int(digits)), "<EOS>"] if digits else
                         "4 2 <SEP> forty two <EOS>".split())
        return toy_dataset.pad_batch([{"ids": toy_dataset.to_ids(text)} for text in texts])["ids"]

    monkeypatch.setattr(module, "generate", generate)
    if module is encoder_decoder:
        monkeypatch.setattr(module, "beam_search", lambda *arguments: (generate(*arguments)[:, None], None))
    module.show_strategies(tiny(module))
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    rows = [re.findall(r"[\d.]+%", line) for line in lines]
    expected = ["100.0%", "0.2%", "100.0%"] if module is decoder_only else ["100.0%"]
    used = dict(zip((line[2:24].strip() for line in lines), calls[::len(calls) // len(lines)]))
    for name, settings in {"greedy": {"temperature": 0.0}, "temperature 1.5": {"temperature": 1.5},
                           "top-p 0.9": {"temperature": 1.0, "top_p": 0.9}}.items():
        assert settings.items() <= used[name].items()
    assert len(rows) >= 6 and all(row == expected for row in rows)
    assert len(asked) == 500 and asked <= set(toy_dataset.make_splits().test)


# --- on a GPU, where there is one ---


def on(device, model):
    return copy.deepcopy(model).to(device)


def test_a_gpu_is_used_and_computes_what_the_cpu_computes(module, accelerator):
    assert next(module.build_model(**TINY).parameters()).device.type == accelerator.type
    model, (batch,) = tiny(module), fixed_batches(module, 16)
    found, targets = module.predict(on(accelerator, model), batch)
    assert found.device.type == accelerator.type == targets.device.type
    torch.testing.assert_close(found.cpu(), module.predict(model, batch)[0], atol=1e-3, rtol=1e-3)


def test_training_on_a_gpu_matches_training_on_the_cpu(module, accelerator):
    parts, losses = fixed_batches(module, 16, 16, 16), []
    for model in (tiny(module), on(accelerator, tiny(module))):
        history = module.train(model, toy_dataset.Splits(parts, parts[:1], None), 3, 1e-3, 1, quiet())
        losses.append([row["loss"] for row in history] + [history[-1]["validation_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_gpu_generates_what_the_cpu_generates(accelerator, request):
    trained_encoder, trained_decoder, trained_encoder_decoder = (
        request.getfixturevalue(f"trained_{name}") for name in ("encoder", "decoder", "encoder_decoder"))
    numbers = [7, 342, 90210, 600006]
    prompts = [decoder_only.make_prompt(number) for number in numbers]
    sources = [encoder_decoder.make_source(number) for number in numbers]
    texts = [encoder_only.parse_text(text) for text in encoder_only.MASKED_EXAMPLES]
    for model, write in ((trained_encoder, lambda model: encoder_only.generate(model, texts, 2)),
                         (trained_decoder, lambda model: decoder_only.generate(model, prompts)),
                         (trained_encoder_decoder, lambda model: encoder_decoder.generate(model, sources)),
                         (trained_encoder_decoder, lambda model: encoder_decoder.beam_search(model, sources, 3)[0])):
        found = write(on(accelerator, model))
        assert found.device.type == accelerator.type and found.cpu().equal(write(model))


@GENERATORS
def test_sampling_on_a_gpu_takes_a_generator_of_that_gpu(module, accelerator):
    model, prompt = on(accelerator, tiny(module)), [toy_dataset.SOS_ID]
    first, second = (module.generate(model, [prompt] * 9, 9, temperature=1.0, top_k=9, top_p=0.9,
                                     generator=torch.Generator(accelerator).manual_seed(3)) for _ in range(2))
    assert first.equal(second)


def test_the_cpu_loads_what_a_gpu_saved(module, accelerator, tmp_path):
    model = on(accelerator, tiny(module))
    module.save(model, tmp_path / "model.pt")
    loaded = module.load(tmp_path / "model.pt", module.build_model(**TINY).cpu())
    assert all(value.equal(model.state_dict()[name].cpu()) for name, value in loaded.state_dict().items())


def test_every_device_masks_the_same_tokens(accelerator):
    ids = torch.randint(6, 40, (20, 12))
    here, there = (encoder_only.mask_tokens(tokens, torch.Generator().manual_seed(0))
                   for tokens in (ids, ids.to(accelerator)))
    assert all(one.equal(other.cpu()) for one, other in zip(here, there))
