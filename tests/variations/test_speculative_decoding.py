"""Speculative decoding: greedy gives the target's tokens, sampling the target's distribution, whatever the draft."""

import decoder_only
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from tqdm import tqdm

from variations import speculative_decoding
from variations.speculative_decoding import (ModelDraft, PromptLookup, leftover, next_token_distribution, roll_back,
                                             speculative_generate, tokens_per_pass, verify)

PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123123)]
DRAFTS = {"another model": lambda target: ModelDraft(tiny(decoder_only, seed=1, num_layers=1)),
          "the target itself": lambda target: ModelDraft(target), "prompt lookup": lambda target: PromptLookup()}


def distributions(*shape, seed=0, sharpness=1):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sharpness * logits).softmax(dim=-1)


class Table:
    """A model whose next-token distribution depends on the last token only; its cache only has a length."""

    constants = {"MAX_LENGTH": 64}

    def __init__(self, seed):
        logits = torch.full((len(decoder_only.VOCABULARY),) * 2, -1e9)
        logits[:, :4] = 2 * torch.randn(logits.size(0), 4, generator=torch.Generator().manual_seed(seed))
        logits[:, decoder_only.PAD_ID] = -1e9
        self.logits = logits

    def parameters(self):
        return iter([self.logits])

    def new_cache(self):
        return [decoder_only.KVCache()]

    def __call__(self, ids, cache):
        new = ids[:, len(cache[0]):]
        cache[0].append(new[:, None, :, None].float(), new[:, None, :, None].float())
        return self.logits[new]


def test_a_proposal_or_its_replacement_is_distributed_exactly_as_the_target():
    p, q = distributions(50, 8), distributions(50, 8, seed=1)
    accepted = q * (p / q).clamp(max=1)
    rejected = 1 - accepted.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(accepted + rejected * leftover(p, q), p)


def test_verify_accepts_as_often_as_its_rule_says_and_emits_the_targets_distribution():
    p, q = distributions(2, 5, sharpness=4), F.pad(distributions(1, 5, seed=1), (0, 0, 0, 1))
    generator, draws = torch.Generator().manual_seed(0), 4000
    emitted, accepted = torch.zeros(5), 0
    for proposed in torch.multinomial(q[0], draws, replacement=True, generator=generator):
        n, following = verify(p, q, proposed[None], generator)
        accepted += n
        emitted[proposed if n else following] += 1
    torch.testing.assert_close(emitted.double() / draws, p[0], atol=0.03, rtol=0)
    assert accepted / draws == pytest.approx(torch.minimum(p[0], q[0]).sum().item(), abs=0.03)


def test_after_the_first_rejection_nothing_is_accepted_and_after_none_the_target_adds_one():
    p = F.one_hot(torch.tensor([1, 2, 3, 4]), 6).double()
    for proposed, expected in (([1, 2, 3], (3, 4)), ([1, 5, 3], (1, 2)), ([5, 2, 3], (0, 1)), ([], (0, 1))):
        proposed = torch.tensor(proposed, dtype=torch.long)
        q = F.pad(F.one_hot(proposed, 6).double(), (0, 0, 0, 1))
        assert verify(p[:len(proposed) + 1], q, proposed) == expected


def test_the_same_seed_samples_the_same_texts():
    target, draft = tiny(decoder_only), tiny(decoder_only, 1)

    def texts():
        rows = speculative_decoding.measure(target, draft, PROMPTS, 1.0, tqdm(disable=True))
        return {name: (row["tokens"], row["nats"]) for name, row in rows.items()}

    assert texts() == texts()


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_greedy_gives_the_tokens_of_the_base_whatever_drafts_them(name, k):
    target = tiny(decoder_only)
    for prompt in PROMPTS:
        for limit in (1, 2, 24, 60):  # 60: beyond MAX_LENGTH
            expected = decoder_only.generate(target, [prompt], max_new_tokens=limit)[0].tolist()
            assert speculative_generate(target, DRAFTS[name](target), prompt, k, limit)[0] == expected


def test_a_trained_model_ends_its_text_where_it_does_without_a_draft(trained_decoder):
    for prompt in PROMPTS:
        expected = decoder_only.generate(trained_decoder, [prompt])[0].tolist()
        assert expected[-1] == decoder_only.EOS_ID
        for draft in (ModelDraft(trained_decoder), PromptLookup()):
            assert speculative_generate(trained_decoder, draft, prompt, 4)[0] == expected


def test_sampled_texts_have_exactly_the_targets_distribution():
    target, draft, generator, draws = Table(0), Table(1), torch.Generator().manual_seed(0), 4000
    first = next_token_distribution(target.logits[decoder_only.SEP_ID], 1.0)
    second = next_token_distribution(target.logits, 1.0)
    second[decoder_only.EOS_ID] = 0  # nothing follows it
    found = torch.zeros_like(second)
    for _ in range(draws):
        new, _ = speculative_generate(target, ModelDraft(draft), [decoder_only.SEP_ID], 2, 2, 1.0, generator)
        if len(new) == 2:
            found[new[0], new[1]] += 1 / draws
    torch.testing.assert_close(found, first[:, None] * second, atol=0.03, rtol=0)


def test_a_draft_that_is_the_target_is_always_accepted():
    target, generator = tiny(decoder_only), torch.Generator().manual_seed(0)
    for temperature in (0.0, 1.0):
        new, counts = speculative_generate(target, ModelDraft(target), PROMPTS[1], 3, 20, temperature, generator)
        assert counts["accepted"] == counts["examined"] == pytest.approx(counts["overlap"], rel=1e-5)
        assert len(new) == 20 and counts["passes"] == 5


def test_the_cache_is_rolled_back_to_what_was_accepted():
    model, ids = tiny(decoder_only), torch.tensor([PROMPTS[2]])
    wrong = torch.cat([ids, torch.tensor([[20, 21, 22]])], dim=1)
    right = torch.cat([ids, torch.tensor([[20, 23]])], dim=1)
    cache = model.new_cache()
    model(wrong, cache)
    roll_back(cache, ids.size(1) + 1)
    assert [len(kv) for kv in cache] == [ids.size(1) + 1] * 2
    torch.testing.assert_close(model(right, cache)[:, -1], model(right)[:, -1])


def test_prompt_lookup_proposes_what_followed_the_latest_longest_match():
    for text, k, expected in (([1, 2, 3, 9, 1, 2], 3, [3, 9, 1]), ([1, 2, 3, 9, 1, 2], 1, [3]), ([5, 6, 5], 2, [6, 5]),
                              ([2, 7, 1, 2, 8, 2], 1, [8]), ([1, 2, 3], 4, [])):
        proposed, q = PromptLookup().propose(torch.tensor([text]), k, 0.0, None)
        assert proposed.tolist() == expected and q.shape == (len(expected) + 1, len(decoder_only.VOCABULARY))
        assert q.sum(dim=-1).tolist() == [1.0] * len(expected) + [0.0]


def test_tokens_per_pass_is_the_geometric_sum():
    assert tokens_per_pass(0.5, 3) == pytest.approx((1 - 0.5 ** 4) / (1 - 0.5))
    assert tokens_per_pass(1.0, 3) == 4 and tokens_per_pass(0.0, 3) == 1


def test_temperature_and_padding_are_those_of_the_base():
    logits = torch.randn(3, len(decoder_only.VOCABULARY))
    p = next_token_distribution(logits, 0.5)
    assert (p[:, decoder_only.PAD_ID] == 0).all()
    torch.testing.assert_close(p[:, 1:], (logits[:, 1:].double() / 0.5).softmax(-1))


def test_the_table_and_the_verdict_are_computed_from_the_counts(capsys):
    alone = {"k": 0, "tokens": 100, "same": 1}
    checked = {"tokens": 100, "passes": 40, "examined": 80, "accepted": 60, "overlap": 56.0, "same": 1}
    rows = {"target alone": alone | {"seconds": 1.0, "nats": [1.0, 2.0, 3.0, 6.0]},
            "draft alone": alone | {"seconds": 0.2, "nats": [9.0, 9.0]},
            "draft, k = 2": checked | {"k": 2, "seconds": 0.5, "nats": [4.0, 4.0]},
            "lookup, k = 4": checked | {"k": 4, "passes": 80, "seconds": 0.4, "nats": [4.0, 4.0]}}
    speculative_decoding.show_workload("made up", rows)
    printed = " ".join(capsys.readouterr().out.split())
    assert "c = 0.20 passes" in printed  # 1 + 0.75 + 0.75^2 = 2.31 tokens per pass, each 2 * 0.2 + 1 passes long
    assert "draft, k = 2 75.0% 70.0% 2.50 2.31 5.00 2.00 1.65 0.75" in printed
    assert "draft, k = 2 saves the most passes of the target: 60%. Fastest: lookup, k = 4, 2.50 times" in printed
    assert "target alone 3.00 +- 1.08 nats, with speculation (all rows) 4.00" in printed


def test_texts_are_compared_with_those_of_the_target_and_scored_under_it(monkeypatch):
    target, draft = tiny(decoder_only), tiny(decoder_only, 1)
    monkeypatch.setattr(speculative_decoding, "NUM_PROPOSALS", (2,))
    monkeypatch.setattr(speculative_decoding, "nats", lambda model, prompt, new: model is target)
    rows = speculative_decoding.measure(target, draft, PROMPTS[:2], 0.0, tqdm(disable=True))
    assert [row["same"] for name, row in rows.items()] == [2, 0] + [2] * (len(rows) - 2)
    rows = speculative_decoding.measure(target, draft, PROMPTS[:1], 1.0, tqdm(disable=True))
    assert all(row["nats"] == [True] for row in rows.values())


def test_nats_are_minus_the_log_probability_of_the_new_tokens():
    target, new = tiny(decoder_only), [20, 21, decoder_only.EOS_ID]
    p = next_token_distribution(target(torch.tensor([PROMPTS[1] + new]))[0], 1.0)
    expected = -sum(p[len(PROMPTS[1]) - 1 + i, token].log().item() for i, token in enumerate(new))
    assert speculative_decoding.nats(target, PROMPTS[1], new) == pytest.approx(expected, rel=1e-5)


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    small = dict(d_model=16, num_layers=1, num_heads=2, d_ff=16)
    printed = run_main(speculative_decoding, num_train=8, TARGET=small, DRAFT=small, NUM_EPOCHS=(1, 2), BATCH_SIZE=4,
                       NUM_TEXTS=2, NUM_PROPOSALS=(1, 3))
    assert printed.count("draft, k = 3") >= 3 and printed.count("lookup, k = 4") >= 3
