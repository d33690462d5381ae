"""Sparse attention: patterns as described, the ceiling is right on paper, no output depends on more than its reach."""

import encoder_only
import pytest
import torch
from conftest import tiny

from variations import sparse_attention
from variations.sparse_attention import ceiling, exchange, global_token, make_patterns, reach, strided, views, window

PATTERNS = make_patterns(seed=0)


@pytest.fixture(params=PATTERNS)
def name(request):
    return request.param


def test_a_window_as_long_as_the_text_equals_full_attention_bit_for_bit():
    ids = torch.tensor([encoder_only.to_ids("<CLS> 3 4 2 7 1 <SEP>".split())])
    base, model = tiny(encoder_only, task="tagging"), tiny(encoder_only, task="tagging")
    assert torch.equal(exchange(model, lambda T: window(T, T))(ids), base(ids))


def test_masked_positions_get_exactly_zero_weight(name):
    model, maps = exchange(tiny(encoder_only, task="tagging"), PATTERNS[name]), []
    model(torch.tensor([encoder_only.to_ids(["<CLS>", *"1234567890", "<SEP>"])]), maps)
    for weights in maps:
        assert (weights[0, :, ~PATTERNS[name](12)] == 0).all() and (weights[0, :, PATTERNS[name](12)] > 0).all()


def test_an_output_depends_on_what_is_within_reach_and_on_nothing_else(name):
    model = exchange(tiny(encoder_only, task="tagging"), PATTERNS[name])
    x = model.embedding.weight[encoder_only.to_ids(["<CLS>", *"12345678901234", "<SEP>"])].detach()[None]
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)

    def run(x):
        for layer in model.layers:
            x = layer(x, mask)
        return x.sum(dim=-1)[0]

    depends = torch.autograd.functional.jacobian(run, x)[:, 0].abs().sum(dim=-1) > 0     # (T, T)
    assert torch.equal(depends, reach(PATTERNS[name](16), len(model.layers)))


def test_padding_changes_nothing(name):
    model = exchange(tiny(encoder_only, task="tagging"), PATTERNS[name])
    ids = torch.tensor([encoder_only.to_ids(["<CLS>", *"123456", "<SEP>"])])
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded)[:, :8], model(ids), atol=1e-5, rtol=1e-4)


def test_patterns_pair_by_pair():
    for i in range(9):
        for j in range(9):
            assert window(9, 2)[i, j] == (abs(i - j) <= 2)
            assert strided(9, 1, 4)[i, j] == (abs(i - j) <= 1 or abs(i - j) % 4 == 0)
            assert global_token(9)[i, j] == (i == 0 or j == 0)


def test_reach_equals_following_the_links_one_by_one(name):
    mask = PATTERNS[name](10)
    for start in range(10):
        reached = {start}
        for _ in range(2):
            reached |= {j for i in reached for j in range(10) if mask[i, j]}
        assert set(reach(mask, 2)[start].nonzero().flatten().tolist()) == reached


def test_a_window_knows_the_place_only_within_reach_of_the_end():
    # Window w, L layers: digit i of n sees the end if n + 1 - i <= w L; otherwise it knows that there is more.
    for w, num_layers in ((1, 1), (2, 1), (1, 3)):
        right = sum(min(n, w * num_layers) for n in range(1, 11))  # those that see the end, in all lengths
        right += sum(1 for i in range(1, 11) if i + w * num_layers <= 10)  # one right guess for digit i
        assert ceiling(lambda T, w=w: window(T, w), num_layers, 10) == pytest.approx(right / 55)


def test_full_attention_has_no_ceiling_and_blindness_the_lowest():
    assert ceiling(PATTERNS["full"], 1, 12) == 1
    assert ceiling(lambda T: torch.eye(T, dtype=torch.bool), 3, 12) == pytest.approx(12 / 78)  # each digit one guess


def test_equal_views_give_equal_outputs_whatever_the_weights():
    # Two lengths with the same view at digit 2: whatever the weights, the output there is the same.
    pattern = PATTERNS["window"]
    assert views(pattern, 9, 2)[2] == views(pattern, 12, 2)[2] and views(pattern, 9, 2)[7] != views(pattern, 12, 2)[7]
    model = exchange(tiny(encoder_only, task="tagging"), pattern)
    short, long = (model(torch.tensor([encoder_only.to_ids(["<CLS>", *"7" * n, "<SEP>"])]))[0] for n in (9, 12))
    torch.testing.assert_close(short[2], long[2], atol=1e-5, rtol=1e-4)
    assert (short[7] - long[7]).abs().max() > 1e-3


def test_places_are_counted_from_the_right_and_all_lengths_occur():
    batches = sparse_attention.make_batches(400, seed=0)
    rows = [[place for place in row if place >= 0] for batch in batches for row in batch["places"].tolist()]
    assert all(row == list(range(len(row)))[::-1] for row in rows)
    assert {len(row) for row in rows} == set(range(1, sparse_attention.MAX_DIGITS + 1))


def test_random_links_are_as_many_as_asked_for_and_others_for_another_seed():
    links = [sparse_attention.random_links(18, 8, seed) for seed in (0, 1)]
    assert all(4 < mask.sum(dim=1).min() and mask.sum(dim=1).max() <= 8 for mask in links)
    assert not torch.equal(*links)


def test_every_model_is_tested_on_texts_that_none_was_trained_on(monkeypatch):
    trained, tested = [], []
    monkeypatch.setattr(sparse_attention, "make_batches", lambda num_texts, seed: [(num_texts, seed)])
    monkeypatch.setattr(encoder_only, "train", lambda model, loaders, *_, **__: trained.extend(loaders.train))
    monkeypatch.setattr(encoder_only, "evaluate", lambda model, tests: tested.extend(tests) or {"accuracy": 0.5})
    found = sparse_attention.measure(bar=None)
    assert not {seed for _, seed in trained} & {seed for _, seed in tested} and len(set(tested)) == 3
    assert found["window"] == [(ceiling(PATTERNS["window"], 2, 16), 0.5)] * 3 and found["full"] == [(1, 0.5)] * 3


def test_each_pattern_is_shown_with_its_own_pairs_reach_and_results(run_main):
    drawn = []
    printed = run_main(
        sparse_attention, LONG=32, measure=lambda bar: {name: [(0.5, 0.48), (0.9, 0.91)] for name in PATTERNS},
        draw=lambda found, draw=sparse_attention.draw: drawn.append(draw(found)) or drawn[0])
    shares = [matrix.float().mean().item() for matrix in (
        window(18, 2), window(32, 2), reach(window(18, 2), 1), reach(window(18, 2), 2))]
    expected = "{:.0%} {:.1%} {:.0%} {:.0%} 70.0% 69.5% (48.0 to 91.0)".format(*shares)
    printed = " ".join(printed.split())
    assert f"window {expected}" in printed and "within 0.5 points" in printed and "its ceiling is 1.0 points" in printed
    assert drawn[0].get_suptitle().replace("\n", " ").endswith("except with window and window + random")
    picture, mask = drawn[0].axes[4].images[0].get_array(), PATTERNS["window + random"](18)
    assert torch.equal(torch.tensor(picture.data), mask.int() + reach(mask, 2).int())


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(sparse_attention, D_MODEL=16, NUM_STEPS=2, BATCH_SIZE=4, NUM_TESTS=8, SEEDS=(0, 1), LONG=32)
    assert all(f"  {pattern} " in printed for pattern in PATTERNS)
