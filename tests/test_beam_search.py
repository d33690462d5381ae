"""Beam search on paper: a model that is a table of probabilities, for which every step can be followed by hand."""

import math

import pytest
import torch
from conftest import tiny

import encoder_decoder as t5
import toy_dataset
from toy_dataset import EOS_ID, PAD_ID, SOS_ID, VOCABULARY

A, B = toy_dataset.to_ids(["one", "two"])
# The example in the docstring of beam_search_one.
PAPER = {SOS_ID: {A: 0.6, B: 0.4}, A: {A: 0.4, B: 0.35, EOS_ID: 0.25}, B: {A: 0.05, B: 0.05, EOS_ID: 0.9}}


class TableModel:
    """p(next token) depends on the last token and on the source: tables maps a source's token to a table.

    It has what beam search needs of a model. Rows of source, memory and target that do not belong together are seen.
    """

    training, constants = False, {"MAX_LENGTH": 8}

    def __init__(self, tables):
        self.logits = torch.full((len(VOCABULARY),) * 3, -100.0)
        for source, table in tables.items():
            for last, probabilities in table.items():
                for token, probability in probabilities.items():
                    self.logits[source, last, token] = math.log(probability)

    def parameters(self):
        yield torch.zeros(1)

    def eval(self):
        return self

    def train(self, mode):
        return self

    def new_cache(self):
        return []

    def encode(self, source):
        return source[..., None].float()

    def decode(self, target, memory, source, cache=None):
        assert len(target) == len(memory) == len(source) and memory[:, 0, 0].equal(source[:, 0].float())
        return self.logits[source[:, :1].expand_as(target), target]


def strip(ids):
    return [i for i in ids.tolist() if i != PAD_ID]


def both(model, source, *settings):
    """The results [(score, ids), ...] of the readable and the batched beam search, after checking that they agree."""
    found = t5.beam_search_one(model, source, *settings)
    texts, scores = t5.beam_search(model, [source], *settings)
    batched = [(score, strip(ids)) for ids, score in zip(texts[0], scores[0].tolist()) if score > -math.inf]
    assert [ids for _, ids in batched] == [ids for _, ids in found]
    assert [score for score, _ in batched] == pytest.approx([score for score, _ in found], abs=1e-4)
    return found


def test_the_example_in_the_docstring_is_true():
    model = TableModel({SOS_ID: PAPER})
    (best, text), (second, other) = both(model, [SOS_ID], 2, 1.0)
    assert text == [B, EOS_ID] and best == pytest.approx(math.log(0.36) / 2, abs=1e-4)
    assert other == [A, B, EOS_ID] and second == pytest.approx(math.log(0.189) / 3, abs=1e-4)


def test_greedy_decoding_misses_the_most_probable_text_and_a_beam_of_2_finds_it():
    model = TableModel({SOS_ID: PAPER})
    assert t5.generate(model, [[SOS_ID]], max_new_tokens=3, temperature=0.0, use_cache=False).tolist() == [[A, A, A]]
    assert both(model, [SOS_ID], 2, 0.0)[0] == (pytest.approx(math.log(0.36), abs=1e-4), [B, EOS_ID])


def test_a_finished_candidate_outside_the_best_w_is_dropped():
    texts = [ids for _, ids in both(TableModel({SOS_ID: PAPER}), [SOS_ID], 2, 0.0)]
    assert [A, EOS_ID] not in texts  # 0.15, behind 0.36 and 0.24 when it was proposed


@pytest.mark.parametrize("num_stay", range(5))
def test_finished_sources_leave_the_batch_without_changing_the_others(num_stay):
    # If 2 of the 10 sources remain after the first step, they have 2 * 5 hypotheses: 10 rows, as many as before.
    short = {SOS_ID: {EOS_ID: 0.98, A: 0.01, B: 0.01}, A: {A: 0.5, EOS_ID: 0.5}, B: {B: 0.5, EOS_ID: 0.5}}
    model = TableModel({A: PAPER, B: short})
    sources = [[A]] * num_stay + [[B]] * (10 - num_stay)
    texts, scores = t5.beam_search(model, sources, 5, 1.0)
    for source, ids, values in zip(sources, texts, scores):
        alone = both(model, source, 5, 1.0)
        assert [strip(row) for row, value in zip(ids, values) if value > -math.inf] == [row for _, row in alone]


def test_as_many_hypotheses_continue_when_several_end_in_the_same_step():
    # The best four of step 2 are [B, EOS] 0.36, [A, A] 0.24, [A, EOS] 0.21, [A, B] 0.15: both unfinished ones continue.
    model = TableModel({SOS_ID: PAPER | {A: {A: 0.4, EOS_ID: 0.35, B: 0.25}}})
    assert [ids for _, ids in both(model, [SOS_ID], 2, 1.0)] == [[B, EOS_ID], [A, B, EOS_ID]]


def test_each_hypothesis_keeps_reading_its_own_source():
    mirrored = {SOS_ID: {A: 0.4, B: 0.6}, B: {B: 0.4, A: 0.35, EOS_ID: 0.25}, A: {A: 0.05, B: 0.05, EOS_ID: 0.9}}
    model = TableModel({A: PAPER, B: mirrored})
    texts, _ = t5.beam_search(model, [[A], [B]], 2, 1.0)
    assert [strip(row) for row in texts.flatten(0, 1)] == [[B, EOS_ID], [A, B, EOS_ID], [A, EOS_ID], [B, A, EOS_ID]]


@pytest.mark.parametrize("beam_width", [1, 2, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_the_batched_search_finds_what_the_readable_one_finds(trained_encoder_decoder, beam_width, length_penalty):
    sources = [t5.make_source(number) for number in (0, 342, 90210)]
    texts, scores = t5.beam_search(trained_encoder_decoder, sources, beam_width, length_penalty)
    for source, ids, values in zip(sources, texts, scores.tolist()):
        found = t5.beam_search_one(trained_encoder_decoder, source, beam_width, length_penalty)
        assert [strip(row) for row, value in zip(ids, values) if value > -math.inf] == [row for _, row in found]
        assert [value for value in values if value > -math.inf] == pytest.approx([s for s, _ in found], abs=1e-4)


def test_both_agree_on_untrained_models_where_many_texts_compete():
    for seed in range(6):
        both(tiny(t5, seed), t5.make_source(342), 3, 1.0, 5)


def test_padding_is_never_generated_however_probable_it_is():
    model = TableModel({SOS_ID: {SOS_ID: {PAD_ID: 0.9, A: 0.1}, A: {PAD_ID: 0.9, EOS_ID: 0.1}}})
    assert both(model, [SOS_ID], 2, 1.0, 4)[0][1] == [A, EOS_ID]
