"""The causal mask, the KV cache, sampling strategies, generation."""

import math

import pytest
import torch
from conftest import tiny

import decoder_only as gpt
import toy_dataset
from toy_dataset import EOS_ID, PAD_ID, SEP_ID, SOS_ID, VOCABULARY, InputError

PROMPTS = [gpt.make_prompt(number) for number in (7, 90210, 342, 55)]


def text_of(number):
    return torch.tensor([toy_dataset.decoder_only_example(number)["ids"]])


# --- which positions may attend to which ---


def test_changing_a_token_leaves_all_earlier_outputs_exactly_as_they_were():
    model, ids = tiny(gpt), text_of(90210)
    before = model(ids)
    for t in range(1, ids.size(1)):
        changed = ids.clone()
        changed[0, t] = 30 if ids[0, t] != 30 else 31
        after = model(changed)
        assert after[0, :t].equal(before[0, :t])
        assert (after[0, t:] != before[0, t:]).any(dim=-1).all()


def test_the_gradient_with_respect_to_a_later_input_is_exactly_zero():
    model, ids = tiny(gpt), text_of(342)
    x = model.embed(ids, torch.arange(ids.size(1))).detach().requires_grad_()
    model.embed = lambda *_: x
    (gradient,) = torch.autograd.grad(model(ids)[0, 3].sum(), x)
    assert (gradient[0, 4:] == 0).all() and (gradient[0, :4] != 0).any(dim=-1).all()


def test_one_layer_depends_on_the_order_of_earlier_tokens_only_with_positions():
    """One layer only: a second one could infer the order from the first one's outputs, thanks to the causal mask."""
    model, ids = tiny(gpt, num_layers=1), text_of(90210)
    shuffled = ids[:, [3, 1, 4, 2, 0, *range(5, ids.size(1))]]
    assert not torch.allclose(model(shuffled)[:, -1], model(ids)[:, -1], atol=1e-3)
    model.positional_encoding.table.zero_()
    torch.testing.assert_close(model(shuffled)[:, -1], model(ids)[:, -1], atol=1e-5, rtol=1e-5)


def test_the_rows_of_a_causal_mask_are_the_last_positions():
    assert gpt.make_causal_mask(1, 4).tolist() == [[True] * 4]
    assert gpt.make_causal_mask(2, 3).tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_real_position(side):
    model, ids = tiny(gpt), text_of(342)
    pad = torch.full((1, 4), PAD_ID)
    if side == "left":
        padded = model(torch.cat([pad, ids], dim=1))[:, 4:]
    else:
        padded = model(torch.cat([ids, pad], dim=1))[:, : ids.size(1)]
    torch.testing.assert_close(padded, model(ids), atol=1e-5, rtol=1e-5)


# --- the cache ---


@pytest.mark.parametrize("pad", [0, 3])
def test_cached_logits_equal_recomputed_logits_at_every_step(pad):
    model = tiny(gpt)
    ids = torch.cat([torch.full((1, pad), PAD_ID, dtype=torch.long), text_of(90210)], dim=1)
    cache, first = model.new_cache(), pad + 4
    for length in [first, *range(first + 1, ids.size(1) + 1)]:
        cached = model(ids[:, :length], cache)[:, -1]
        torch.testing.assert_close(cached, model(ids[:, :length])[:, -1], atol=1e-5, rtol=1e-5)
        assert len(cache[0]) == length


@pytest.mark.parametrize("settings", [dict(temperature=0.0), dict(temperature=1.0), dict(temperature=1.0, top_p=0.8)])
def test_generation_gives_the_same_tokens_with_and_without_the_cache(trained_decoder, settings):
    texts = [gpt.generate(trained_decoder, PROMPTS, use_cache=use_cache, generator=torch.Generator().manual_seed(1),
                          **settings) for use_cache in (True, False)]
    assert texts[0].equal(texts[1])


def test_each_token_costs_one_forward_pass_of_one_position_and_the_last_one_none(trained_decoder):
    lengths, forward = [], trained_decoder.embed
    trained_decoder.embed = lambda ids, positions: lengths.append(ids.size(1)) or forward(ids, positions)
    new = gpt.generate(trained_decoder, [PROMPTS[1]], max_new_tokens=4)
    del trained_decoder.embed
    assert lengths == [len(PROMPTS[1])] + [1] * (new.size(1) - 1)


# --- generation ---


def test_prompts_of_different_lengths_continue_in_one_batch_as_they_do_alone(trained_decoder):
    together = gpt.generate(trained_decoder, PROMPTS)
    for prompt, row in zip(PROMPTS, together):
        alone = gpt.generate(trained_decoder, [prompt])[0]
        assert row[: len(alone)].equal(alone) and (row[len(alone):] == PAD_ID).all()


def test_top_k_1_and_tiny_top_p_are_greedy(trained_decoder):
    greedy = gpt.generate(trained_decoder, PROMPTS, temperature=0.0)
    assert gpt.generate(trained_decoder, PROMPTS, temperature=1.0, top_k=1).equal(greedy)
    assert gpt.generate(trained_decoder, PROMPTS, temperature=1.0, top_p=1e-6).equal(greedy)


def test_only_padding_follows_eos_and_the_limit_holds(trained_decoder):
    new = gpt.generate(trained_decoder, [[SOS_ID]] * 50, max_new_tokens=12, temperature=1.0)
    assert new.size(1) <= 12
    for row in new.tolist():
        assert row.count(EOS_ID) <= 1
        if EOS_ID in row:
            assert set(row[row.index(EOS_ID) + 1:]) <= {PAD_ID}
        assert PAD_ID not in row[: row.index(EOS_ID) if EOS_ID in row else None]


def always(likely):
    """A model whose logits are the same at every position: those given for some tokens, and much lower for the rest."""
    model, logits = tiny(gpt, max_length=8), torch.full((len(VOCABULARY),), -9.0)
    for token, logit in likely.items():
        logits[toy_dataset.TOKEN_TO_ID[token]] = logit
    model.forward = lambda ids, *_, **__: logits.repeat(len(ids), ids.size(1), 1)
    return model


def words_of(new):
    return [toy_dataset.to_tokens(row) for row in new.tolist()]


def test_generation_continues_to_the_last_token_that_max_length_allows():
    """The model reads up to eight positions. A token after the eighth can still be generated: it is never fed back."""
    prompt = gpt.to_ids(["<SOS>", "7", "<SEP>"])
    assert gpt.generate(always({"one": 1.0}), [prompt], max_new_tokens=50).size(1) == 6
    real, longer = tiny(gpt, max_length=8), tiny(gpt, max_length=30)  # the same weights
    ids = gpt.generate(real, [prompt] * 20, 50, temperature=2.0, generator=torch.Generator().manual_seed(0))
    expected = gpt.generate(longer, [prompt] * 20, 6, temperature=2.0, generator=torch.Generator().manual_seed(0))
    assert ids.equal(expected) and ids.size(1) == 6
    assert gpt.generate(real, [[SOS_ID] * 8], max_new_tokens=50).size(1) == 1
    with pytest.raises(InputError, match="MAX_LENGTH = 8"):
        gpt.generate(real, [[SOS_ID] * 9])


def test_padding_is_never_generated_however_likely_it_is():
    model = always({"<PAD>": 9.0, "two": 2.0, "one": 1.0})
    assert words_of(gpt.generate(model, [[SOS_ID]], 3)) == [["two"] * 3]
    new = gpt.generate(model, [[SOS_ID]] * 50, 3, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert {word for row in words_of(new) for word in row} == {"one", "two"} and PAD_ID not in new


def test_generation_stops_once_every_text_has_ended():
    model = always({"<EOS>": 2.0, "one": 2.0})
    new = gpt.generate(model, [[SOS_ID]] * 30, 6, temperature=1.0, generator=torch.Generator().manual_seed(0))
    lengths = (new != PAD_ID).sum(dim=1)
    assert new.size(1) == lengths.max() == 6 > lengths.min() == 1
    assert gpt.generate(always({"<EOS>": 1.0}), [[SOS_ID]] * 3, 6).size(1) == 1


def test_a_repetition_penalty_applies_to_all_generated_tokens_and_not_to_the_prompt():
    model, prompt = always({"one": 2.0, "two": 1.8, "six": 1.7}), gpt.to_ids(["<SOS>", "one"])
    expected = {1.0: "one one one one", 1.01: "one one one one", 1.5: "one two six one", 0.5: "one one one one"}
    for penalty, text in expected.items():
        assert words_of(gpt.generate(model, [prompt], 4, repetition_penalty=penalty)) == [text.split()]


def test_a_generator_makes_sampling_repeatable_and_leaves_the_global_one_alone(trained_decoder):
    state = torch.get_rng_state()
    first, second = (gpt.generate(trained_decoder, [[SOS_ID]] * 5, temperature=1.0,
                                  generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.equal(second) and torch.get_rng_state().equal(state)


def test_generation_disables_dropout_and_restores_the_mode():
    model = tiny(gpt, dropout=0.5)
    for training in (True, False):
        model.train(training)
        assert gpt.generate(model, PROMPTS).equal(gpt.generate(model, PROMPTS))
        assert model.training is training


@pytest.mark.parametrize("settings, name", [
    (dict(temperature=-1), "temperature"), (dict(top_k=0), "top_k"), (dict(top_p=0.0), "top_p"),
    (dict(top_p=1.5), "top_p"), (dict(repetition_penalty=0), "repetition"), (dict(max_new_tokens=0), "max_new")])
def test_invalid_settings_are_refused(settings, name):
    with pytest.raises(ValueError, match=f"(?i){name}"):
        gpt.generate(tiny(gpt), PROMPTS, **settings)


@pytest.mark.parametrize("prompts", [[], [[]]])
def test_an_empty_prompt_is_refused(prompts):
    with pytest.raises(InputError, match="prompt"):
        gpt.generate(tiny(gpt), prompts)


# --- strategies ---


def test_exactly_k_tokens_survive_top_k_ties_included():
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    for k in (1, 2, 3, 4, 9):
        assert (gpt.keep_top_k(logits, k) > -torch.inf).sum(dim=-1).tolist() == [min(k, 4)] * 2
    assert gpt.keep_top_k(logits, 2)[1].tolist() == [4, 3, -torch.inf, -torch.inf]


@pytest.mark.parametrize("p, kept", [(1e-9, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    survivors = gpt.keep_top_p(logits, p) > -torch.inf
    order = [1, 3, 0, 2]
    assert survivors[0].nonzero().flatten().tolist() == sorted(order[:kept])


def test_a_top_p_of_1_keeps_even_tokens_that_are_lost_in_a_float32_sum():
    logits = torch.tensor([[40.0, 0.0, -3.0]])  # the first has probability 1 up to rounding
    assert gpt.keep_top_p(logits, 1.0).equal(logits) and (gpt.keep_top_p(logits, 0.99) > -torch.inf).sum() == 1


def test_top_p_keeps_exactly_as_many_tokens_as_a_plain_loop_would():
    torch.manual_seed(0)
    for logits in torch.randn(20, 12, dtype=torch.float64):
        mass, count = 0.0, 0
        for probability in logits.softmax(-1).sort(descending=True).values:
            if mass >= 0.7:
                break
            mass, count = mass + probability, count + 1
        assert (gpt.keep_top_p(logits[None], 0.7) > -torch.inf).sum() == count


def drawn(probabilities, temperature=1.0, top_k=None, top_p=None):
    """Which tokens are ever drawn, in a thousand draws."""
    logits = torch.tensor([probabilities]).log().expand(1000, -1)
    return set(gpt.choose_tokens(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0)).tolist())


def test_temperature_comes_before_top_p():
    """0.75, 0.2, 0.05 reach 0.7 with one token; at temperature 5 they are 0.41, 0.35, 0.24, and it takes two."""
    assert drawn([0.75, 0.2, 0.05], top_p=0.7) == {0}
    assert drawn([0.75, 0.2, 0.05], temperature=5.0, top_p=0.7) == {0, 1}


def test_top_p_counts_the_probability_that_top_k_left():
    """Of 0.4, 0.3, 0.2, 0.1, top-k 2 leaves two, renormalized to 0.57 and 0.43: the first alone reaches 0.55."""
    assert drawn([0.4, 0.3, 0.2, 0.1], top_p=0.55) == {0, 1}
    assert drawn([0.4, 0.3, 0.2, 0.1], top_k=2) == {0, 1}
    assert drawn([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.55) == {0}
    assert drawn([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.9) == {0, 1}


def test_generation_applies_its_sampling_settings():
    model = always({"one": 3.0, "two": 2.0, "six": 1.0})

    def written(**settings):
        new = gpt.generate(model, [[SOS_ID]] * 100, 5, generator=torch.Generator().manual_seed(0), **settings)
        return {word for row in words_of(new) for word in row}

    assert written(temperature=1.0) >= {"one", "two", "six"} and written(temperature=0.0) == {"one"}
    assert written(temperature=1.0, top_k=2) == {"one", "two"} and written(temperature=0.01) == {"one"}
    assert written(temperature=1.0, top_p=0.5) == {"one"} and len(written(temperature=50.0)) == len(VOCABULARY) - 1


def test_temperature_sharpens_and_flattens_and_one_changes_nothing():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    entropy = [-(p * p.log()).sum() for t in (0.5, 1, 2) for p in [gpt.scale_by_temperature(logits, t).softmax(-1)]]
    assert entropy[0] < entropy[1] < entropy[2]
    assert gpt.scale_by_temperature(logits, 1.0).equal(logits)


def test_repetition_penalty_lowers_generated_tokens_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    assert gpt.penalize_repetition(logits, torch.tensor([[0, 1]]), 2.0).tolist() == [[1.0, -4.0, 1.0]]
    assert gpt.penalize_repetition(logits, torch.tensor([[0, 1]]), 1.0).equal(logits)


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(20000, 3)
    drawn = gpt.choose_tokens(logits, 1.0, None, None, torch.Generator().manual_seed(0))
    assert (drawn.bincount() / 20000).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


# --- evaluation ---


def test_teacher_forced_exact_match_equals_that_of_greedy_generation(trained_decoder):
    numbers = toy_dataset.make_splits().test[:300]
    loader = toy_dataset.DataLoader(toy_dataset.NumberDataset(numbers, toy_dataset.decoder_only_example), 100,
                                    collate_fn=toy_dataset.pad_batch)
    written = gpt.generate(trained_decoder, [gpt.make_prompt(n) for n in numbers], temperature=0.0)
    wrong = [i for i, (number, ids) in enumerate(zip(numbers, written))
             if toy_dataset.to_tokens(ids.tolist()) != [*toy_dataset.number_to_words(number), "<EOS>"]]
    found = gpt.evaluate(trained_decoder, loader)
    assert found["mistakes"] == wrong and 0 < len(wrong) < 300
    assert found["exact_match"] == pytest.approx(1 - len(wrong) / 300)


def test_an_unconditional_sample_is_valid_only_if_its_words_name_its_digits():
    def read(text):
        return gpt.read_text(torch.tensor(toy_dataset.to_ids(text.split())))

    assert read("4 2 <SEP> forty two <EOS>") == 42
    for text in ("4 2 <SEP> forty three <EOS>", "4 2 <SEP> forty two", "4 2 forty two <EOS>", "0 7 <SEP> seven <EOS>",
                 "<SEP> seven <EOS>", "4 2 <SEP> forty two two <EOS>"):
        assert read(text) is None


def test_the_loss_of_an_ideal_model_follows_from_how_numbers_are_drawn(monkeypatch):
    dataset = toy_dataset.NumberDataset([7, 342], toy_dataset.decoder_only_example)
    lengths = [len(str(number)) for number in toy_dataset.make_splits().train]
    one, three = (lengths.count(n) / len(lengths) for n in (1, 3))  # of the numbers that have 1 or 3 digits
    nats = -math.log(one / 10) - math.log(three / 900)              # 7 is one of ten, 342 one of nine hundred
    num_targets = len("7 <SEP> seven <EOS>".split()) + len("3 4 2 <SEP> three hundred forty two <EOS>".split())
    assert float(gpt.describe_floor(dataset).split()[0]) == pytest.approx(nats / num_targets, abs=6e-4)
    monkeypatch.setattr(gpt, "LOSS_ON_PROMPT", False)
    assert gpt.describe_floor(dataset).startswith("0 ")


def test_without_loss_on_the_prompt_no_target_lies_in_it():
    batch = next(iter(gpt.create_dataloaders(16, 0, loss_on_prompt=False).train))
    for ids, targets in zip(batch["ids"], batch["targets"]):
        assert (targets[: ids.tolist().index(SEP_ID)] == toy_dataset.IGNORE).all()
    assert len(VOCABULARY) == 46
