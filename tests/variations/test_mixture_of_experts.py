"""Mixture of experts: what a slow loop over tokens computes, a router that learns, balance, capacity, and padding."""

from types import SimpleNamespace

import decoder_only
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

from variations import mixture_of_experts
from variations.mixture_of_experts import (
    MixtureOfExperts,
    Setting,
    active_parameters,
    balance_loss,
    build,
    choose_experts,
    count_choices,
    exchange,
    make_facts,
    mixtures,
    work_per_token,
)

PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123456)]
IDS = torch.tensor([PROMPTS[3]])


@pytest.fixture(scope="module")
def batch():
    """16 training examples of different lengths."""
    return next(iter(decoder_only.create_dataloaders(16, 0).train))


def make_mixture(num_experts=4, top_k=2, balance=0.0, capacity_factor=None):
    """A mixture of width 8 in training mode, inputs (3, 5, 8), and which of them are real."""
    torch.manual_seed(0)
    mixture = MixtureOfExperts(8, 16, num_experts, top_k, balance, capacity_factor)
    real = torch.tensor([[True] * 5, [True, True, True, False, False], [False, True, True, True, True]])
    return mixture, torch.randn(3, 5, 8, requires_grad=True), real


def one_token_at_a_time(mixture, x, real, capacity=10**6):
    """The definition: each token in turn, first choices of all tokens before second ones; and how many were dropped."""
    output, load, dropped = torch.zeros(x.shape), [0] * len(mixture.experts), 0
    for choice in range(mixture.top_k):
        for b, t in real.nonzero().tolist():
            p = mixture.router(x[b, t]).softmax(dim=-1)
            best = p.argsort(descending=True)[:mixture.top_k]
            gate = p[best[choice]] / (p[best].sum() if mixture.top_k > 1 else 1)
            e = best[choice].item()
            load[e] += 1
            if load[e] > capacity:
                dropped += 1
                continue
            term = torch.zeros(x.shape)
            term[b, t] = 1
            output = output + term * gate * mixture.experts[e](x[b, t])
    return output, dropped


@pytest.mark.parametrize("capacity_factor, capacity", [(None, 10**6), (0.7, {1: 3, 2: 5, 3: 7})])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_grouped_by_expert_it_computes_what_a_loop_over_tokens_computes(top_k, capacity_factor, capacity):
    mixture, x, real = make_mixture(4, top_k, capacity_factor=capacity_factor)
    capacity = capacity if capacity_factor is None else capacity[top_k]  # ceil(0.7 * top_k * 12 tokens / 4 experts)
    mixture.log = []
    found, (expected, dropped) = mixture(x, real), one_token_at_a_time(mixture, x, real, capacity)
    torch.testing.assert_close(found, expected)
    assert mixture.log[0][2] == dropped and (dropped > 0) == (capacity_factor is not None)
    weight, inputs = torch.randn(x.shape), [x, *mixture.parameters()]
    gradients = [torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True) for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_one_expert_is_the_dense_network_in_training_and_after_it(batch):
    models = tiny(decoder_only), exchange(tiny(decoder_only), 1, 1)
    real = batch["ids"] != decoder_only.PAD_ID
    torch.testing.assert_close(*(model(batch["ids"])[real] for model in models))
    optimizers = [decoder_only.create_optimizer(model) for model in models]
    for _ in range(3):
        dense, mixed = (decoder_only.train_step(model.train(), batch, optimizer, 1e-3)
                        for model, optimizer in zip(models, optimizers))
        torch.testing.assert_close(mixed, dense)


def test_all_experts_with_equal_router_weights_give_their_mean():
    mixture, x, real = make_mixture(3, 3)
    torch.nn.init.zeros_(mixture.router.weight)
    mean = torch.stack([expert(x) for expert in mixture.experts]).mean(dim=0)
    torch.testing.assert_close(mixture(x, real), mean * real[:, :, None])


def test_the_gates_of_top_2_are_a_softmax_over_the_two_largest_logits():
    logits = torch.randn(10, 6)
    gates, chosen = choose_experts(logits.softmax(dim=-1), 2)
    largest = logits.topk(2)
    assert torch.equal(chosen, largest.indices)
    torch.testing.assert_close(gates, largest.values.softmax(dim=-1))


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_learns_from_the_output_without_any_balancing(top_k):
    mixture, x, real = make_mixture(4, top_k)
    mixture(x, real).square().sum().backward()
    assert mixture.router.weight.grad.abs().max() > 1e-4


def test_the_balancing_loss_is_1_if_uniform_and_as_large_as_it_can_be_if_collapsed():
    E, uniform = 4, torch.full((8, 4), 0.25)
    assert balance_loss(uniform, torch.arange(8)[:, None] % E) == 1
    assert balance_loss(uniform, torch.zeros(8, 1, dtype=torch.long)) == 1  # the ties of a router that knows nothing
    assert balance_loss(torch.eye(E)[:1].expand(8, E), torch.zeros(8, 1, dtype=torch.long)) == E
    both = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(8, E)
    assert balance_loss(both, torch.tensor([[0, 1]]).expand(8, 2)) == E / 2


def test_the_balancing_loss_pushes_each_expert_down_in_proportion_to_its_load():
    p = torch.rand(6, 3, requires_grad=True)
    balance_loss(p, torch.tensor([[0], [0], [0], [1], [1], [2]])).backward()
    torch.testing.assert_close(p.grad, torch.tensor([[3.0, 2.0, 1.0]]).expand(6, 3) / 6 * 3 / 6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_training_minimizes_the_cross_entropy_plus_the_balancing_losses(top_k, batch):
    balanced, plain = (exchange(tiny(decoder_only), 4, top_k, balance).train() for balance in (0.5, 0.0))
    for model in (balanced, plain):
        torch.manual_seed(1)
        for mixture in mixtures(model):
            mixture.router.reset_parameters()
            mixture.experts[1:].apply(decoder_only.init_weights)
    routed = []
    for mixture in mixtures(plain):
        mixture.register_forward_pre_hook(lambda mixture, inputs: routed.append((mixture, *inputs)))
    losses = [total / number for total, number in (decoder_only.compute_loss(m, batch) for m in (balanced, plain))]
    assert losses[0] == losses[1]  # what is reported is the cross-entropy
    explicit = losses[1]
    for mixture, x, real in routed:
        p = mixture.router(x[real]).softmax(dim=-1)
        explicit = explicit + 0.5 * balance_loss(p, choose_experts(p, top_k)[1])
    losses[0].backward()
    explicit.backward()
    assert len(routed) == 2
    for ours, theirs in zip(balanced.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_routed_takes_no_capacity_and_is_not_counted(side):
    found = []
    padding = torch.full((1, 6), decoder_only.PAD_ID)
    for ids in (IDS, torch.cat([padding, IDS] if side == "left" else [IDS, padding], dim=1)):
        model = exchange(tiny(decoder_only), 4, 2, balance=0.5, capacity_factor=0.5).train()
        for mixture in mixtures(model):
            mixture.log = []
        logits = model(ids)[ids != decoder_only.PAD_ID]
        logits.square().sum().backward()
        logs = [entry for mixture in mixtures(model) for entry in mixture.log]
        found.append((logits, logs, [mixture.router.weight.grad for mixture in mixtures(model)]))
    assert found[0][1][0][1].shape == (IDS.numel(), 2) and found[0][1][0][2] > 0
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_the_capacity_drops_exactly_the_latest_tokens():
    mixture, _, _ = make_mixture(4, 1, capacity_factor=1.0)
    mixture.router.weight.data = torch.eye(4, 8)
    x = torch.rand(2, 4, 8) + torch.tensor([3.0] + 7 * [0.0])                           # all 8 tokens want expert 0
    output = mixture(x, torch.ones(2, 4, dtype=torch.bool)).flatten(0, 1)
    assert output[:2].abs().sum(dim=-1).all() and not output[2:].any()                  # capacity 8 / 4 = 2
    assert mixture.eval()(x, torch.ones(2, 4, dtype=torch.bool)).abs().sum(dim=-1).all()


def test_first_choices_are_served_before_second_ones():
    mixture, _, _ = make_mixture(2, 2, capacity_factor=0.5)
    mixture.router.weight.data, mixture.log = torch.eye(2, 8), []
    x = F.one_hot(torch.tensor([[0, 1, 1, 0]]), 8).float()
    output = mixture(x, torch.ones(1, 4, dtype=torch.bool))
    gate = torch.tensor([1.0, 0.0]).softmax(dim=0)[0]  # room for 2 tokens each: every first choice, no second one
    expected = torch.stack([gate * mixture.experts[e](x[0, t]) for t, e in enumerate((0, 1, 1, 0))])
    torch.testing.assert_close(output[0], expected)
    assert mixture.log[0][2] == 4


@pytest.fixture(params=[1, 2])
def model(request):
    return exchange(tiny(decoder_only), 4, request.param, capacity_factor=0.5)


def test_cached_generation_gives_the_recomputed_tokens(model):
    cached, recomputed = (decoder_only.generate(model, PROMPTS, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, recomputed)
    cache = model.new_cache()
    model(IDS[:, :-2], cache)
    torch.testing.assert_close(model(IDS, cache), model(IDS)[:, -2:], atol=1e-4, rtol=1e-4)


def test_prompts_of_different_lengths_continue_in_one_batch_as_they_do_alone(model):
    together = decoder_only.generate(model, PROMPTS)
    for row, prompt in zip(together, PROMPTS):
        alone = decoder_only.generate(model, [prompt])[0]
        assert torch.equal(row[:len(alone)], alone)


def test_a_checkpoint_gives_back_the_experts_and_the_router(model, tmp_path):
    decoder_only.save(model, tmp_path / "model.pt")
    other = exchange(tiny(decoder_only, seed=1), 4, mixtures(model)[0].top_k)
    assert torch.equal(decoder_only.load(tmp_path / "model.pt", other)(IDS), model(IDS))


def test_choosing_more_experts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="top_k = 3 experts cannot be chosen out of 2"):
        exchange(tiny(decoder_only), 2, 3)


def test_active_parameters_and_work_follow_the_formulas():
    C, F_, E, T, V = 32, 16, 8, 6, len(decoder_only.VOCABULARY)
    ids = make_facts(0).test[0]["ids"][:5]
    dense, mixed = build(Setting(F_), 0), build(Setting(F_, 2), 0)
    expert = 2 * C * F_ + F_ + C
    total = sum(p.numel() for p in dense.parameters())
    assert active_parameters(dense) == total
    assert active_parameters(mixed) == total + 2 * (expert + C * E)
    assert sum(p.numel() for p in mixed.parameters()) == total + 2 * ((E - 1) * expert + C * E)
    attention = 4 * C * C + 2 * T * C                                                   # projections; scores, mixing
    assert work_per_token(dense, ids) == 2 * (attention + 2 * C * F_) + V * C
    assert work_per_token(mixed, ids) == 2 * (attention + 2 * 2 * C * F_ + C * E) + V * C


def test_choices_are_counted_under_the_token_that_made_them(batch):
    model = exchange(tiny(decoder_only), 8, 1)
    counts = count_choices(model, batch)
    real = batch["ids"][batch["ids"] != decoder_only.PAD_ID]
    for layer in counts:
        assert torch.equal(layer.sum(dim=1), torch.bincount(real, minlength=len(decoder_only.VOCABULARY)))
    assert counts[0][decoder_only.SOS_ID].count_nonzero() == 1  # always at position 0, attending to itself alone


def test_each_row_has_the_size_the_balancing_and_the_capacity_of_its_name():
    rows = mixture_of_experts.make_rows()
    for mixed in ("top-1", "top-2"):
        active = active_parameters(build(rows[f"dense, active size of {mixed}"], 0))
        assert active_parameters(build(rows[mixed], 0)) == pytest.approx(active, rel=0.06)  # the router and biases
    for row, setting in rows.items():
        assert (setting.balance == 0) == ("not balanced" in row)
        assert (setting.capacity_factor is not None) == ("capacity" in row)


def test_the_facts_depend_on_the_seed_their_order_on_the_epoch_and_only_the_word_is_learned():
    facts, other = make_facts(0), make_facts(1)
    assert not torch.equal(facts.test[0]["ids"], other.test[0]["ids"])
    assert not torch.equal(facts.train[0]["ids"], facts.train[6]["ids"])                # 1500 / 250 steps an epoch
    assert (facts.test[0]["targets"][:, :-1] == decoder_only.IGNORE).all()


def test_names_are_tested_on_the_test_numbers(monkeypatch):
    monkeypatch.setattr(decoder_only, "create_dataloaders", lambda *_, **__: SimpleNamespace(train=[0], test=[1]))
    monkeypatch.setattr(decoder_only, "train", lambda *_, **__: None)
    monkeypatch.setattr(decoder_only, "evaluate", lambda model, loader: {"exact_match": loader[0]})
    monkeypatch.setattr(mixture_of_experts, "count_choices", lambda model, batch: None)
    exact, _ = mixture_of_experts.measure_names(mixture_of_experts.make_rows(), None)
    assert list(exact.values()) == [[1, 1, 1]] * 3


def test_the_loss_is_that_of_the_last_steps_and_the_dropped_share_that_of_all(monkeypatch):
    one, even = torch.eye(8)[:1].expand(8, 8), torch.full((8, 8), 1 / 8)
    log = [(one, torch.zeros(8, 1, dtype=torch.long), 6)] * 10 + [(even, torch.arange(8)[:, None], 0)] * 10
    monkeypatch.setattr(decoder_only, "train", lambda model, *_, **__: [m.log.extend(log) for m in mixtures(model)])
    monkeypatch.setattr(decoder_only, "evaluate", lambda *_: {"exact_match": 0.5})
    monkeypatch.setattr(mixture_of_experts, "time_steps", lambda *_: {"top-1": 1.0})
    monkeypatch.setattr(mixture_of_experts, "work_per_token", lambda *_: 1.0)
    line = mixture_of_experts.measure({"top-1": Setting(16, 1)}, None)["top-1"]
    assert set(line["balance"]) == {1.0} and sum(line["dropped"]) / len(line["dropped"]) == 6 / 8 / 2


def test_the_sentences_on_collapse_follow_from_the_loads(capsys):
    one, even = torch.eye(8)[0].expand(5, 8), torch.full((5, 8), 1 / 8)
    loads = {"top-1": (even, even), "top-1, not balanced": (even, one),
             "top-2": (even, even), "top-2, not balanced": (one, even)}
    mixture_of_experts.show_loads({row: {"loads": [torch.cat(half)], "balance": [1]} for row, half in loads.items()})
    late, early = " ".join(capsys.readouterr().out.split()).split("Top-1 without")[1].split("Top-2 without")
    assert "12.5% of the choices in the first tenth of training and 100.0% in the last" in late
    assert "0 of 8 experts starve in the first tenth and 7 in the last" in late and late.endswith(": a collapse. ")
    assert "7 of 8 experts starve in the first tenth and 0 in the last" in early and "training undoes." in early
    assert "+20.0 points against b (beyond" in mixture_of_experts.compare("a", "b", {"a": [0.8], "b": [0.6]})


def test_the_picture_shows_the_first_layer_and_the_last_by_token():
    choices = torch.ones(2, len(decoder_only.VOCABULARY), 8)
    choices[1, :, 3] = 9
    assert mixture_of_experts.predictable(torch.tensor([[[3, 1], [0, 4]]])) == [(7 / 8, 5 / 8)]
    words, later, *_ = (axes.images[0].get_array() for axes in mixture_of_experts.draw(choices).axes if axes.images)
    assert words[0, 3] == 1 / 8 and later[0, 3] == 9 / 16


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(mixture_of_experts, NUM_EXPERTS=3, NUM_FACTS=20, FACT_BATCH_SIZE=4, FACT_EPOCHS=2, NAME_EPOCHS=1,
                       NAME_BATCH_SIZE=8, SEEDS=(0, 1), TIMED_STEPS=1)
    assert all(title in printed for title in ("FACTS", "LOAD", "NAMES", "collapse"))


@pytest.mark.parametrize("name, value, sentence", [("NUM_EXPERTS", 1, "must be at least 2"),
                                                   ("CAPACITY_FACTOR", 0, "CAPACITY_FACTOR = 0 above 0"),
                                                   ("FACT_EPOCHS", 1, "at least 10 training steps")])
def test_constants_that_do_not_work_are_refused_in_one_sentence(monkeypatch, name, value, sentence):
    monkeypatch.setattr(mixture_of_experts, name, value)
    with pytest.raises(mixture_of_experts.InputError, match=sentence):
        mixture_of_experts.main()
