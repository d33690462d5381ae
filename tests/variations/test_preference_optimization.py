"""Preference optimization: the losses are their equations, and both lead to the optimum in closed form."""

import math

import decoder_only
import pytest
import torch
from conftest import tiny

from variations import preference_optimization
from variations.preference_optimization import dpo_loss, log_probability, optimum, read_numbers, rlhf_loss, sample

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
START = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)  # a "language" of four texts


def best(beta):
    weighted = START * (REWARDS / beta).exp()
    return weighted / weighted.sum()


def pad(*rows):
    return torch.tensor([row + [decoder_only.PAD_ID] * (9 - len(row)) for row in rows])


def texts_of(*numbers):
    return pad(*(decoder_only.make_prompt(number) for number in numbers))


def train_toy(loss_of, learning_rate, num_steps):
    """Minimize loss_of(log p of the four texts) by Adam; returns p."""
    logits = START.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], learning_rate)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_of(logits.log_softmax(0)).backward()
        optimizer.step()
    return logits.softmax(0).detach()


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_rlhf_from_samples_reaches_the_optimum(beta):
    generator = torch.Generator().manual_seed(0)

    def loss_of(log_p):
        texts = torch.multinomial(log_p.detach().exp(), 64, replacement=True, generator=generator)
        return rlhf_loss(log_p[texts], START.log()[texts], REWARDS[texts], beta)

    torch.testing.assert_close(train_toy(loss_of, 0.03, 700), best(beta), atol=1e-3, rtol=0)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_dpo_on_all_pairs_as_often_as_raters_choose_them_reaches_the_optimum(beta):
    one, other = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    share = START[one] * START[other] * (REWARDS[one] - REWARDS[other]).sigmoid()

    def loss_of(log_p):
        return (share * dpo_loss(log_p[one], log_p[other], START.log()[one], START.log()[other], beta)).sum()

    torch.testing.assert_close(train_toy(loss_of, 0.03, 700), best(beta), atol=1e-3, rtol=0)


def test_the_gradient_of_dpo_is_its_formula():
    logs = torch.randn(4, 6, dtype=torch.float64)
    chosen, rejected = (row.clone().requires_grad_() for row in logs[:2])
    gradients = torch.autograd.grad(dpo_loss(chosen, rejected, *logs[2:], 0.3).sum(), (chosen, rejected))
    margin = 0.3 * ((logs[0] - logs[2]) - (logs[1] - logs[3]))
    expected = -0.3 * torch.sigmoid(-margin)
    torch.testing.assert_close(gradients[0], expected)
    torch.testing.assert_close(gradients[1], -expected)


def test_the_gradient_of_rlhf_is_unbiased():
    """Averaged over all batches of three texts, each as often as it is sampled: exactly the gradient of -J."""
    beta, logits = 0.3, torch.tensor([0.2, -0.1, 0.4, 0.3], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    J = (log_p.exp() * (REWARDS - beta * (log_p - START.log()))).sum()
    batches = torch.cartesian_prod(*[torch.arange(4)] * 3)                              # (64, 3)
    chance = log_p.detach()[batches].sum(dim=1).exp()
    losses = torch.stack([rlhf_loss(log_p[b], START.log()[b], REWARDS[b], beta) for b in batches])
    found, expected = (torch.autograd.grad(loss, logits, retain_graph=True)[0]
                       for loss in ((chance * losses).sum(), -J))
    torch.testing.assert_close(found, expected)


def test_at_the_optimum_every_batch_has_gradient_zero():
    log_p, texts = best(0.5).log().requires_grad_(), torch.tensor([0, 1, 1, 3])
    rlhf_loss(log_p[texts], START.log()[texts], REWARDS[texts], 0.5).backward()
    torch.testing.assert_close(log_p.grad, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("beta", [3.0, 1.0, 0.3, 0.1])
def test_reward_and_kl_of_the_optimum_are_those_of_the_reweighted_start_model(beta):
    p = best(beta)
    expected = (p * REWARDS).sum().item(), (p * (p / START).log()).sum().item()
    assert optimum((START * REWARDS).sum().item(), beta) == pytest.approx(expected)


def test_without_the_kl_penalty_the_optimum_is_the_start_model_on_rewarded_texts():
    assert optimum(0.3, 0) == (1.0, -math.log(0.3)) == pytest.approx(optimum(0.3, 0.01))


def test_log_probability_is_the_sum_over_the_tokens_and_padding_adds_nothing():
    model, prompt = tiny(decoder_only), decoder_only.make_prompt(342)
    logits = model(torch.tensor([prompt]))[0].double()
    logits[:, decoder_only.PAD_ID] = -math.inf
    expected = sum(logits[t].log_softmax(0)[prompt[t + 1]] for t in range(len(prompt) - 1))
    found = log_probability(model, texts_of(342, 7))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1:], log_probability(model, texts_of(7)), atol=1e-5, rtol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if found.sum().backward(retain_graph=True) is None)


def test_the_probabilities_of_all_texts_of_one_token_sum_to_one():
    model = tiny(decoder_only)
    texts = torch.tensor([[decoder_only.SOS_ID, token] for token in range(1, len(decoder_only.VOCABULARY))])
    assert log_probability(model, texts).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_sample_ends_at_its_first_sep_unless_the_whole_text_is_wanted():
    model, generator, SEP = tiny(decoder_only), torch.Generator(), decoder_only.SEP_ID
    number_only, whole = (sample(model, 200, generator.manual_seed(0), whole).tolist() for whole in (False, True))
    cut = [text for text in number_only if SEP in text[:-1]]
    assert cut and all(set(text[text.index(SEP) + 1:]) == {decoder_only.PAD_ID} for text in cut)
    assert all(text[0] == decoder_only.SOS_ID and len(text) == 1 + preference_optimization.MAX_DIGITS + 1
               for text in number_only)
    assert any(text[text.index(SEP) + 1] != decoder_only.PAD_ID for text in whole if SEP in text[:-1])


def test_only_what_is_written_as_a_number_has_one_and_may_be_rewarded():
    SOS, SEP, zero, seven = decoder_only.to_ids(["<SOS>", "<SEP>", "0", "7"])
    word = decoder_only.to_ids(["seven"])[0]
    texts = pad([SOS, seven, SEP], [SOS, zero, SEP], [SOS, zero, seven, SEP], [SOS, SEP], [SOS, seven],
                [SOS, word, SEP], [SOS, seven, zero, SEP, word])
    assert read_numbers(texts) == [7, 0, None, None, None, None, 70]
    assert preference_optimization.rewards_of(texts, lambda number: number != 70).tolist() == [1, 1, 0, 0, 0, 0, 0]


def test_pairs_are_chosen_by_reward_or_as_often_as_raters_would(monkeypatch):
    monkeypatch.setattr(preference_optimization, "NUM_PAIRS", 500)
    monkeypatch.setattr(preference_optimization, "sample",
                        lambda model, num_texts, generator: texts_of(*range(num_texts)))
    chosen, rejected = preference_optimization.make_pairs(tiny(decoder_only), lambda number: number < 100, noisy=False)
    assert read_numbers(chosen) == list(range(100)) and read_numbers(rejected) == list(range(500, 600))
    monkeypatch.setattr(preference_optimization, "sample",
                        lambda model, num_texts, generator: texts_of(*[1] * 500, *[2] * 500))
    chosen, rejected = preference_optimization.make_pairs(tiny(decoder_only), lambda number: number == 1, noisy=True)
    assert [a + b for a, b in zip(read_numbers(chosen), read_numbers(rejected))] == [3] * 500
    assert read_numbers(chosen).count(1) / 500 == pytest.approx(1 / (1 + math.exp(-1)), abs=0.06)
    assert len(preference_optimization.make_pairs(tiny(decoder_only), lambda number: False, noisy=True)[0]) == 500


def test_both_methods_compare_the_policy_with_the_start_model_on_the_same_texts(monkeypatch):
    start, policy, pairs = tiny(decoder_only), tiny(decoder_only, 1), (texts_of(7, 8, 9), texts_of(1, 2, 3))
    monkeypatch.setattr(preference_optimization, "optimize", lambda start, losses, *settings: losses(policy))
    monkeypatch.setattr(preference_optimization, "BATCH_SIZE", 2)
    monkeypatch.setattr(preference_optimization, "sample", lambda model, num_texts, generator, whole: pairs[not whole])
    logs = [[log_probability(model, texts) for texts in pairs] for model in (policy, start)]
    losses = dpo_loss(*logs[0], *logs[1], 0.3)
    found = torch.stack(list(preference_optimization.dpo(start, pairs, 0.3, None)))
    torch.testing.assert_close(found, torch.stack([losses[:2].mean(), losses[2]]))
    found = next(preference_optimization.rlhf(start, lambda number: number == 7, 0.3, 1, None, whole=True))
    torch.testing.assert_close(found, rlhf_loss(logs[0][0], logs[1][0], torch.tensor([1.0, 0, 0]).double(), 0.3))


def test_reward_and_kl_are_measured_on_texts_of_the_policy(monkeypatch):
    start, policy, numbers = tiny(decoder_only), tiny(decoder_only, 1), [*range(1000), *[7] * 600]
    monkeypatch.setattr(preference_optimization, "NUM_SAMPLES", 1600)
    monkeypatch.setattr(preference_optimization, "sample",
                        lambda model, *_: texts_of(*numbers if model is policy else [1]))
    monkeypatch.setattr(preference_optimization, "log_probability",
                        lambda model, texts: torch.arange(1600.0) * (3 if model is policy else 1))
    monkeypatch.setattr(decoder_only, "evaluate", lambda model, loader: {"exact_match": 0.5})
    found = preference_optimization.measure(policy, start, lambda number: number == 7, [])
    assert found["reward"] == 601 / 1600 and found["kl"] == 1599 and found["distinct"] == 1
    assert found["kl_error"] == pytest.approx(2 * torch.arange(1600.0).std().item() / 40)


def test_each_run_is_shown_beside_the_optimum_for_its_beta_and_its_reward(run_main):
    """Made up: 2 in 4 numbers contain a 7 at the start, 1 in 4 is divisible by 3; RLHF ends 0.1 below, DPO 0.2."""
    contains_a_7, drawn = preference_optimization.REWARDS["contains a 7"], []

    def measure(policy, start, reward, names):
        trained_for, beta, gap = (reward, 1.0, 0) if policy is start else policy
        assert trained_for is reward
        best, kl = optimum(0.5 if reward is contains_a_7 else 0.25, beta)
        return dict(reward=best - gap, reward_error=0, kl=kl, kl_error=0, numbers=[3, 12, 5, 33], distinct=1,
                    well_formed=1, naming=1)

    printed = " ".join(run_main(
        preference_optimization, NUM_SAMPLES=4, MAX_DIGITS=3, NUM_EPOCHS=1, D_MODEL=32, measure=measure,
        sample=lambda *_: texts_of(*[7, 170, 12, 8] * 5), make_pairs=lambda *_, noisy: ([], []),
        rlhf=lambda start, reward, beta, *_, whole=False: (reward, beta, 0.1),
        dpo=lambda start, pairs, beta, bar: (contains_a_7, beta, 0.2),
        draw=lambda rows, mean, draw=preference_optimization.draw: drawn.append(mean) or draw(rows, mean)).split())
    for name, beta, gap, mean in (("RLHF", 0.3, 0.1, 0.5), ("DPO", 0.1, 0.2, 0.5), ("RLHF", 0.1, 0.1, 0.25)):
        best, kl = optimum(mean, beta)
        J = best - beta * kl
        assert f"{name} {beta} {best - gap:.3f} ({best:.3f}) {kl:.3f} ({kl:.3f}) {J - gap:.3f} ({J:.3f})" in printed
    assert "0.3: RLHF 0.100, DPO 0.200" in printed and drawn == [0.5]
    assert "0, 3, 6 and 9 alone are 50.0%" in printed and "Of all other numbers, 50.0% are" in printed


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(preference_optimization, num_train=512, D_MODEL=32, NUM_EPOCHS=1, START_BATCH_SIZE=16,
                       NUM_STEPS=2, BATCH_SIZE=16, NUM_PAIRS=64, NUM_SAMPLES=200, SHORTCUT=(0.1, 2), MAX_DIGITS=4)
    assert all(word in printed for word in ("RLHF, whole texts", "DPO, no label noise", "DIVISIBLE BY 3"))
