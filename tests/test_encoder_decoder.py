"""Cross-attention, generation, and beam search against exhaustive search."""

import re

import pytest
import torch
from conftest import tiny

import encoder_decoder as t5
import toy_dataset
from toy_dataset import EOS_ID, PAD_ID, SOS_ID, VOCABULARY, InputError

NUMBERS = [7, 90210, 342, 55, 600006]
SOURCES = [t5.make_source(number) for number in NUMBERS]


def score(model, source, text, length_penalty):
    """The score of a text (ids up to and with <EOS>), computed in one pass, without any cache."""
    source = torch.tensor([source])
    log_probs = model(source, torch.tensor([[SOS_ID, *text[:-1]]])).log_softmax(-1)[0]
    return (log_probs[torch.arange(len(text)), torch.tensor(text)].sum() / len(text) ** length_penalty).item()


def strip(ids):
    return [i for i in ids.tolist() if i != PAD_ID]


# --- which positions may attend to which ---


def test_every_output_depends_on_the_whole_source_and_no_later_target():
    model = tiny(t5)
    source, target = torch.tensor([t5.make_source(90210)]), torch.tensor([[SOS_ID, 30, 31, 32]])
    before = model(source, target)
    for s in range(source.size(1)):
        changed = source.clone()
        changed[0, s] = 15 if source[0, s] != 15 else 14
        assert (model(changed, target) != before).any(dim=-1).all()
    for t in range(1, 4):
        changed = target.clone()
        changed[0, t] = 35
        assert model(source, changed)[0, :t].equal(before[0, :t])


def test_the_order_of_the_source_matters_only_with_positions():
    model, target = tiny(t5), torch.tensor([[SOS_ID, 30, 31, 32]])
    source = torch.tensor([t5.make_source(90210)])
    shuffled = source[:, [3, 1, 5, 2, 0, 4]]
    assert not torch.allclose(model(shuffled, target), model(source, target), atol=1e-3)
    model.positional_encoding.table.zero_()
    torch.testing.assert_close(model(shuffled, target), model(source, target), atol=1e-5, rtol=1e-5)


def test_the_order_of_the_target_matters_to_one_layer_only_with_positions():
    model, source = tiny(t5, num_layers=1), torch.tensor([t5.make_source(90210)])
    memory = model.encode(source)
    one, other = torch.tensor([[SOS_ID, 30, 31, 32]]), torch.tensor([[SOS_ID, 31, 30, 32]])

    def last(target):
        return model.decode(target, memory, source)[:, -1]

    assert not torch.allclose(last(one), last(other), atol=1e-3)
    model.positional_encoding.table.zero_()
    torch.testing.assert_close(last(one), last(other), atol=1e-5, rtol=1e-5)


def test_the_content_of_source_padding_changes_nothing():
    model, target = tiny(t5), torch.tensor([[SOS_ID, 30, 31]])
    source = torch.tensor([t5.make_source(342)])
    padded = torch.cat([source, torch.full((1, 3), PAD_ID)], dim=1)
    torch.testing.assert_close(model(padded, target), model(source, target), atol=1e-5, rtol=1e-5)
    memory = model.encode(padded)
    scrambled = memory.clone()
    scrambled[:, 4:] = 1000.0
    assert model.decode(target, scrambled, padded).equal(model.decode(target, memory, padded))


def test_cached_logits_equal_recomputed_logits_at_every_step():
    model, source = tiny(t5), torch.tensor([t5.make_source(90210)])
    target, memory, cache = torch.tensor([[SOS_ID, 30, 31, 32, 33]]), model.encode(source), model.new_cache()
    for length in range(1, 6):
        cached = model.decode(target[:, :length], memory, source, cache)[:, -1]
        recomputed = model.decode(target[:, :length], memory, source)[:, -1]
        torch.testing.assert_close(cached, recomputed, atol=1e-5, rtol=1e-5)
        assert len(cache[0][0]) == length and len(cache[0][1]) == source.size(1)


# --- generation ---


@pytest.mark.parametrize("settings", [dict(temperature=0.0), dict(temperature=1.0)])
def test_generation_gives_the_same_tokens_with_and_without_the_cache(trained_encoder_decoder, settings):
    texts = [t5.generate(trained_encoder_decoder, SOURCES, use_cache=use_cache,
                         generator=torch.Generator().manual_seed(1), **settings) for use_cache in (True, False)]
    assert texts[0].equal(texts[1])


def test_sources_of_different_lengths_give_the_same_targets_in_one_batch_as_alone(trained_encoder_decoder):
    together = t5.generate(trained_encoder_decoder, SOURCES)
    for source, row in zip(SOURCES, together):
        assert strip(row) == strip(t5.generate(trained_encoder_decoder, [source])[0])


def test_greedy_top_k_1_and_a_beam_of_width_1_are_the_same(trained_encoder_decoder):
    sources = [t5.make_source(number) for number in toy_dataset.make_splits().test[:200]]
    greedy = t5.generate(trained_encoder_decoder, sources, temperature=0.0)
    top_1 = t5.generate(trained_encoder_decoder, sources, temperature=1.0, top_k=1)
    for penalty in (0.0, 1.0, 2.0):
        beam = t5.beam_search(trained_encoder_decoder, sources, 1, penalty)[0][:, 0]
        assert [strip(row) for row in beam] == [strip(row) for row in greedy] == [strip(row) for row in top_1]
    for seed in range(20):  # untrained ones rate <EOS> highly; it must wait until it is the most likely
        model = tiny(t5, seed)
        greedy = t5.generate(model, SOURCES, 8, temperature=0.0)
        beam = t5.beam_search(model, SOURCES, 1, 0.0, 8)[0][:, 0]
        assert [strip(row) for row in beam] == [strip(row) for row in greedy]


def test_only_padding_follows_eos_and_the_limit_holds():
    model = tiny(t5)
    sampled = t5.generate(model, SOURCES * 10, 6, temperature=1.0)
    for ids in (sampled, t5.beam_search(model, SOURCES, 4, 1.0, 6)[0].flatten(0, 1)):
        assert ids.size(1) <= 6
        for row in ids.tolist():
            if EOS_ID in row:
                assert set(row[row.index(EOS_ID) + 1:]) <= {PAD_ID}


def test_decoding_continues_to_the_last_token_that_max_length_allows():
    """The decoder reads up to MAX_LENGTH positions, <SOS> included, and predicts a token at each of them."""
    short, longer = tiny(t5, max_length=6), tiny(t5, max_length=30)  # the same weights
    sources = [t5.make_source(number) for number in range(50, 90)]
    sampled = [t5.generate(model, sources, limit, temperature=2.0, generator=torch.Generator().manual_seed(0))
               for model, limit in ((short, 50), (longer, 6))]
    beams = [t5.beam_search(model, sources, 3, 1.0, limit)[0] for model, limit in ((short, 50), (longer, 6))]
    assert sampled[0].equal(sampled[1]) and beams[0].equal(beams[1])
    assert sampled[0].size(-1) == 6 == beams[0].size(-1)


def test_padding_is_never_generated_however_likely_it_is():
    model = tiny(t5)
    decode, scores = model.decode, []

    def prefers_padding(*arguments, **options):
        logits = decode(*arguments, **options)
        scores.append(logits[..., PAD_ID].max())
        return logits + 99.0 * (torch.arange(len(VOCABULARY)) == PAD_ID)

    model.decode = prefers_padding
    texts = [t5.generate(model, SOURCES, 4), t5.generate(model, SOURCES, 4, temperature=1.0),
             t5.beam_search(model, SOURCES, 3, 1.0, 4)[0].flatten(0, 1)]
    for ids in texts:
        assert all(PAD_ID not in row[: row.index(EOS_ID) if EOS_ID in row else None] and row for row in ids.tolist())
    assert scores


def test_a_generator_leaves_the_global_random_state_alone(trained_encoder_decoder):
    state = torch.get_rng_state()
    t5.generate(trained_encoder_decoder, SOURCES, temperature=1.0, generator=torch.Generator().manual_seed(0))
    t5.beam_search(trained_encoder_decoder, SOURCES)
    assert torch.get_rng_state().equal(state)


def test_decoding_disables_dropout_and_restores_the_mode():
    model = tiny(t5, dropout=0.5)
    for training in (True, False):
        model.train(training)
        assert t5.generate(model, SOURCES).equal(t5.generate(model, SOURCES))
        assert t5.beam_search(model, SOURCES)[1].equal(t5.beam_search(model, SOURCES)[1])
        assert model.training is training


# --- beam search ---


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
def test_a_beam_as_wide_as_all_hypotheses_finds_what_exhaustive_search_finds(length_penalty):
    model, source = tiny(t5, seed=2), t5.make_source(42)
    words = [i for i in range(len(VOCABULARY)) if i not in (PAD_ID, EOS_ID)]
    pairs = torch.tensor([[SOS_ID, word] for word in words])
    log_probs = model(torch.tensor([source]).expand(len(words), -1), pairs).log_softmax(-1)  # (words, 2, V)
    everything = [(log_probs[0, 0, EOS_ID].item(), (EOS_ID,))]
    for i, first in enumerate(words):
        for second in [EOS_ID, *words]:
            total = log_probs[i, 0, first] + log_probs[i, 1, second]
            everything.append((total.item() / 2**length_penalty, (first, second)))
    everything.sort(reverse=True)
    found, scores = t5.beam_search(model, [source], len(everything), length_penalty, max_new_tokens=2)
    assert strip(found[0, 0]) == list(everything[0][1])
    assert scores[0].tolist() == pytest.approx([value for value, _ in everything], abs=1e-4)
    # Each hypothesis once, and nothing else: no text that continues after <EOS>, none that contains padding.
    assert sorted(tuple(strip(ids)) for ids in found[0]) == sorted(text for _, text in everything)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_reported_scores_are_the_recomputed_ones_best_first(trained_encoder_decoder, length_penalty):
    texts, scores = t5.beam_search(trained_encoder_decoder, SOURCES, 4, length_penalty)
    checked = 0
    for source, beams, values in zip(SOURCES, texts, scores.tolist()):
        assert values == sorted(values, reverse=True)
        for ids, value in zip(beams, values):
            if value > -torch.inf:
                expected = score(trained_encoder_decoder, source, strip(ids), length_penalty)
                assert value == pytest.approx(expected, abs=1e-4)
                checked += 1
        assert len({tuple(ids.tolist()) for ids, value in zip(beams, values) if value > -torch.inf}) > 0
    assert checked > 8


def test_beam_search_of_a_batch_equals_that_of_its_members_alone(trained_encoder_decoder):
    texts, scores = t5.beam_search(trained_encoder_decoder, SOURCES, 3)
    for i, source in enumerate(SOURCES):
        alone, alone_scores = t5.beam_search(trained_encoder_decoder, [source], 3)
        torch.testing.assert_close(scores[i], alone_scores[0], atol=1e-4, rtol=1e-4)
        assert [strip(ids) for ids in texts[i]] == [strip(ids) for ids in alone[0]]


def test_a_beam_never_finds_a_less_likely_text_than_greedy_decoding(trained_encoder_decoder):
    sources = [t5.make_source(number) for number in toy_dataset.make_splits().test[:60]]
    greedy = t5.generate(trained_encoder_decoder, sources, temperature=0.0)
    _, scores = t5.beam_search(trained_encoder_decoder, sources, 5, 0.0)
    better = [score(trained_encoder_decoder, source, strip(ids), 0.0) - 1e-4 <= value
              for source, ids, value in zip(sources, greedy, scores[:, 0].tolist())]
    assert sum(better) >= 0.95 * len(better)  # it prunes, so it may do worse, but rarely does


def test_a_higher_length_penalty_favors_longer_texts(trained_encoder_decoder):
    sources = [t5.make_source(number) for number in toy_dataset.make_splits().test[:40]]
    lengths = [t5.beam_search(trained_encoder_decoder, sources, 8, penalty)[0][:, 0].ne(PAD_ID).sum().item()
               for penalty in (0.0, 4.0)]
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("settings, name", [
    (dict(beam_width=0), "BEAM_WIDTH"), (dict(length_penalty=-1), "LENGTH_PENALTY"),
    (dict(max_new_tokens=0), "max_new_tokens")])
def test_invalid_settings_are_refused(settings, name):
    with pytest.raises(ValueError, match=f"(?i){name}"):
        t5.beam_search(tiny(t5), SOURCES, **settings)


@pytest.mark.parametrize("sources", [[], [[]]])
def test_an_empty_source_is_refused(sources):
    with pytest.raises(InputError, match="source"):
        t5.generate(tiny(t5), sources)


def test_teacher_forced_exact_match_equals_that_of_greedy_generation(trained_encoder_decoder):
    numbers = toy_dataset.make_splits().test[:300]
    loader = toy_dataset.DataLoader(toy_dataset.NumberDataset(numbers, toy_dataset.encoder_decoder_example), 100,
                                    collate_fn=toy_dataset.pad_batch)
    written = t5.generate(trained_encoder_decoder, [t5.make_source(n) for n in numbers], temperature=0.0)
    wrong = [i for i, (number, ids) in enumerate(zip(numbers, written))
             if toy_dataset.to_tokens(ids.tolist()) != [*toy_dataset.number_to_words(number), "<EOS>"]]
    found = t5.evaluate(trained_encoder_decoder, loader)
    assert found["mistakes"] == wrong and 0 < len(wrong) < 300


def test_the_cross_attention_map_has_a_row_for_each_word_and_sums_to_one(trained_encoder_decoder):
    weights = t5.cross_attention(trained_encoder_decoder, 90210)
    assert weights.shape == (6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6))
    for number, shape in ((342, (5, 4)), (7, (2, 2)), (20, (2, 3))):
        assert t5.cross_attention(trained_encoder_decoder, number).shape == shape


def test_the_cross_attention_map_is_the_mean_of_all_layers_and_heads(trained_encoder_decoder):
    model, maps = trained_encoder_decoder, []
    source = torch.tensor([t5.make_source(342)])
    target = torch.tensor([t5.to_ids("<SOS> three hundred forty two".split())])
    model.decode(target, model.encode(source), source, cross_maps=maps)
    mean = sum(weights[0, head] for weights in maps for head in range(4)) / (4 * len(maps))
    torch.testing.assert_close(t5.cross_attention(model, 342), mean)


def test_attention_on_the_aligned_digits_alone_is_shown_as_100_percent(monkeypatch, capsys):
    weights = torch.zeros(4, 5)  # one, thousand, ten, <EOS> x 1, 0, 1, 0, <EOS>
    for row, digits in zip(weights, [*toy_dataset.align(1010), {4}]):
        row[list(digits)] = 1 / len(digits)
    monkeypatch.setattr(t5, "cross_attention", lambda model, number: weights)
    t5.show_alignment(None, 1010)
    drawn = capsys.readouterr().out
    rows = {line.strip().partition("[")[0].strip(): line for line in drawn.splitlines() if "[#" in line}
    assert {word: row.count("[") for word, row in rows.items()} == {"one": 1, "thousand": 1, "ten": 2}
    assert len({row.index("[#####]") for row in (rows["one"], rows["thousand"])}) == 1  # below the same digit
    share, uniform = [int(percent) for percent in re.findall(r"(\d+)%", drawn)]
    assert share == 100 and uniform == round(100 * (1 + 1 + 2) / (3 * 5))
