"""What holds for all three architectures: the parts, parity with PyTorch's, masks, training, checkpoints."""

import math
import os
import pickle

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


def first_batch(module, size=8):
    return next(iter(module.create_dataloaders(size, 0).train))


# --- the parts ---


@pytest.mark.parametrize("masked", [False, True])
def test_written_out_attention_is_pytorchs_forward_and_backward(masked):
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
def test_a_row_with_nothing_to_attend_to_stays_finite_in_every_precision(dtype):
    query = torch.randn(1, 1, 3, 4, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])
    result, weights = attend(query, query, query, mask)
    result.float().sum().backward()
    assert result.isfinite().all() and weights.isfinite().all() and query.grad.isfinite().all()


def test_multi_head_attention_is_pytorchs_on_the_same_weights():
    torch.manual_seed(0)
    ours = encoder_only.MultiHeadAttention(32, 4, 0.0)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    copy_attention(ours, theirs)
    x, padding = torch.randn(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    expected, _ = theirs(x, x, x, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(ours(x, ~padding[:, None, None, :]), expected, atol=1e-5, rtol=1e-5)


def copy_attention(ours, theirs):
    """Our four matrices into PyTorch's fused one."""
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
def test_a_layer_is_pytorchs_pre_norm_layer_on_the_same_weights(causal):
    torch.manual_seed(0)
    ours = (decoder_only.DecoderLayer if causal else encoder_only.EncoderLayer)(32, 4, 64, 0.0)
    theirs = nn.TransformerEncoderLayer(32, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True)
    copy_attention(ours.attention, theirs.self_attn)
    copy_rest(ours, theirs, [ours.attention_norm, ours.feed_forward_norm])
    x, mask = torch.randn(2, 6, 32), torch.ones(6, 6, dtype=torch.bool)
    mask = mask.tril() if causal else mask
    torch.testing.assert_close(ours(x, mask), theirs(x, src_mask=~mask), atol=1e-5, rtol=1e-5)


def test_a_cross_attending_layer_is_pytorchs_decoder_layer_on_the_same_weights():
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


def test_the_parameters_are_as_many_as_arithmetic_says(module):
    for task in encoder_only.TASKS if module is encoder_only else (None,):
        model = module.build_model(**TINY, **({"task": task} if task else {}))
        assert sum(p.numel() for p in model.parameters()) == module.parameter_formula(model)[1]


def test_the_first_loss_is_near_that_of_blind_guessing(module):
    torch.manual_seed(0)
    loss_sum, num_targets = module.compute_loss(module.build_model(), first_batch(module, 128))
    assert (loss_sum / num_targets).item() == pytest.approx(math.log(len(toy_dataset.VOCABULARY)), abs=0.3)


def test_a_batch_of_mixed_lengths_gives_what_its_members_give_alone(module):
    model = tiny(module)
    make = {encoder_only: toy_dataset.masked_lm_example, decoder_only: toy_dataset.decoder_only_example,
            encoder_decoder: toy_dataset.encoder_decoder_example}[module]
    examples = [make(number) for number in (7, 90210, 342)]
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


def test_what_is_longer_than_max_length_is_refused(module):
    model = tiny(module, max_length=4)
    with pytest.raises(InputError, match="MAX_LENGTH = 4"):
        outputs(module, model, first_batch(module))


@pytest.mark.parametrize("change, names", [
    ({"num_heads": 5}, "D_MODEL = 32.*NUM_HEADS = 5"), ({"d_model": 31, "num_heads": 1}, "D_MODEL = 31.*even"),
    ({"num_layers": 0}, "NUM_LAYERS = 0"), ({"d_ff": -1}, "D_FF = -1"), ({"dropout": 1.0}, "DROPOUT = 1.0"),
    ({"max_length": 0}, "MAX_LENGTH = 0"), ({"d_model": 32.0}, "D_MODEL = 32.0")])
def test_sizes_of_which_no_model_can_be_made_are_refused(module, change, names):
    with pytest.raises(ValueError, match=names):
        module.build_model(**TINY | change)


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


def test_a_step_of_which_nothing_is_asked_leaves_the_weights_finite(module):
    batch, model = first_batch(module), tiny(module)
    batch["targets"] = torch.full_like(batch["ids" if "ids" in batch else "targets"], IGNORE)
    history = module.train(model, toy_dataset.Splits([batch], [batch], []), 1, 1e-3, 1, tqdm(disable=True, total=1))
    assert history[0]["loss"] == 0 and all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("module", [decoder_only, encoder_decoder], ids=lambda m: m.__name__)
def test_losses_of_unequal_micro_batches_add_up_to_that_of_the_whole(module):
    make = toy_dataset.decoder_only_example if module is decoder_only else toy_dataset.encoder_decoder_example
    examples = [make(number) for number in (7, 12, 90210, 777777)]
    model = tiny(module)
    whole = module.compute_loss(model, toy_dataset.pad_batch(examples))
    parts = [module.compute_loss(model, toy_dataset.pad_batch(part)) for part in (examples[:1], examples[1:])]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0])
    assert sum(number for _, number in parts) == whole[1]


def test_one_batch_can_be_learned_by_heart(module):
    if module is encoder_only:
        model = module.build_model(**TINY, task="counting")
        batch = toy_dataset.pad_batch([toy_dataset.counting_example(n) for n in (7, 342, 90210, 55)])
    else:
        model, batch = module.build_model(**TINY), first_batch(module, 2)
        if module is decoder_only:  # two different first digits after the same <SOS> cannot both be certain
            batch = toy_dataset.pad_batch([toy_dataset.decoder_only_example(90210)])
    optimizer = module.create_optimizer(model, 5e-3)
    for _ in range(150):
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


@pytest.mark.parametrize("num_steps, warmup_steps", [(1000, 100), (1000, 0), (50, 40), (50, 200), (1, 0), (2, 200)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(module, num_steps, warmup_steps):
    rates = [module.learning_rate_at(step, num_steps, 1.0, warmup_steps) for step in range(num_steps)]
    top = rates.index(max(rates))
    assert rates[0] > 0 and max(rates) == pytest.approx(1.0, abs=0.01) or num_steps < 3
    assert rates[-1] == pytest.approx(module.FINAL_LEARNING_RATE_RATIO)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert num_steps != 1000 or warmup_steps != 100 or top in (98, 99, 100)


def train_briefly(module, **options):
    torch.manual_seed(0)
    model = module.build_model(**TINY | {"dropout": 0.1})
    loaders = toy_dataset.make_dataloaders(
        {encoder_only: toy_dataset.masked_lm_example, decoder_only: toy_dataset.decoder_only_example,
         encoder_decoder: toy_dataset.encoder_decoder_example}[module], 32, 0, num_train=256)
    loaders = loaders._replace(validation=[next(iter(loaders.validation))])
    return module.train(model, loaders, 2, num_evaluations=2, progress=tqdm(disable=True, total=1), **options), model


def test_the_same_seed_gives_the_same_losses_to_the_last_digit(module):
    first, second = train_briefly(module)[0], train_briefly(module)[0]
    assert first == second and len(first) == 16 and first[0]["loss"] > first[-1]["loss"]


def test_the_history_tells_step_loss_rate_norm_and_what_evaluation_found(module):
    history, _ = train_briefly(module)
    assert [row["step"] for row in history] == list(range(1, 17))
    assert [row["step"] for row in history if "exact_match" in row] == [8, 16]
    assert {"loss", "learning_rate", "grad_norm", "validation_loss", "exact_match"} <= set(history[-1])


def test_each_step_follows_the_gradient_of_its_own_batch_alone(module):
    """With a learning rate too small to move anything, equal batches have equal gradients; left over, they add up."""
    options = {"task": "tagging"} if module is encoder_only else {}  # no masks drawn anew in each step
    model, loaders = tiny(module, **options), module.create_dataloaders(16, 0, **options)
    batch = next(iter(loaders.validation))
    history = module.train(model, loaders._replace(train=[batch] * 4, validation=[batch]), 1, 1e-12, 1,
                           tqdm(disable=True, total=1))
    norms = [row["grad_norm"] for row in history]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-4)


def test_gradients_are_clipped_before_the_one_step_that_follows_them(module, monkeypatch):
    monkeypatch.setattr(module, "GRAD_CLIP", 1e-3)
    norms, original = [], torch.optim.AdamW.step

    def step(self, *arguments, **options):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    history, _ = train_briefly(module)
    assert len(norms) == len(history)
    assert max(norms) <= 1.001e-3 < min(row["grad_norm"] for row in history)


def test_training_that_diverges_stops_with_a_sentence_that_says_what_to_change(module):
    with pytest.raises(FloatingPointError, match="(?s)diverged.*LEARNING_RATE = 1000"):
        train_briefly(module, learning_rate=1000)


@pytest.mark.parametrize("name, value", [("GRAD_CLIP", 0), ("WEIGHT_DECAY", -1), ("WARMUP_STEPS", -1)])
def test_training_constants_that_cannot_train_are_refused(module, monkeypatch, name, value):
    monkeypatch.setattr(module, name, value)
    with pytest.raises(InputError, match=f"{name} = {value}"):
        train_briefly(module)


def test_evaluation_is_without_dropout_and_puts_the_mode_back(module):
    _, model = train_briefly(module)
    loader = [first_batch(module, 16)]
    for training in (True, False):
        model.train(training)
        assert module.evaluate(model, loader) == module.evaluate(model, loader)
        assert model.training is training


# --- checkpoints ---


def test_what_was_saved_is_what_is_loaded_and_the_file_is_safe_to_read(module, tmp_path):
    model = tiny(module)
    module.save(model, tmp_path / "model.pt")
    loaded = module.load(tmp_path / "model.pt", module.build_model(**TINY))
    assert all(loaded.state_dict()[name].equal(value) for name, value in model.state_dict().items())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert not any(name.startswith(("_orig_mod.", "module.")) for name in content["weights"])


def test_a_checkpoint_of_other_constants_is_refused_with_their_name(module, tmp_path):
    module.save(tiny(module), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"(?s)model\.pt.*D_FF = 64.*128"):
        module.load(tmp_path / "model.pt", module.build_model(**TINY | {"d_ff": 128}))


def test_a_checkpoint_of_another_language_is_refused(module, tmp_path, monkeypatch):
    module.save(tiny(module), tmp_path / "model.pt")
    monkeypatch.setattr(toy_dataset, "NUM_TRAIN", 999)
    with pytest.raises(InputError, match="toy_dataset.NUM_TRAIN"):
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


def test_a_save_that_dies_half_way_leaves_the_old_checkpoint(module, tmp_path, monkeypatch):
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


def test_saving_keeps_what_stood_there_before(module, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"something of yours")
    module.save(tiny(module), path)
    assert (tmp_path / "model.pt.old").read_bytes() == b"something of yours"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_named(module, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=str(tmp_path)):
        module.save(tiny(module), tmp_path / "model.pt")
