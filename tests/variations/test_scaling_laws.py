"""Scaling laws: the fit recovers planted constants, the optimum is one, the unseen share is that of real draws."""

import itertools
import math
import random
import statistics

import pytest
import torch
from tqdm import tqdm

from variations import scaling_laws
from variations.scaling_laws import (
    BATCH_SIZE,
    NUM_FACTS,
    NUM_NICKNAMES,
    Law,
    LookupTable,
    check_optimum,
    compute_optimal,
    count_parameters,
    draw_facts,
    draw_numbers,
    extrapolate,
    fit_law,
    ideal_loss,
    ideal_rows,
    local_exponents,
    make_nicknames,
    probabilities,
    quality,
    train_table,
)

GUESSING = math.log(NUM_NICKNAMES)
CHINCHILLA = Law(E=1.69, N0=406.4 ** (1 / 0.34), alpha=0.34, D0=410.7 ** (1 / 0.28), beta=0.28)  # section 3.3
STEEP = Law(E=0.0, N0=80.0, alpha=0.6, D0=30.0, beta=0.4)
BAR = tqdm(disable=True, total=0)


def runs_of(law, sizes, draws, noise=0.0, seed=0):
    """Synthetic runs on a grid: the law's own losses, with log-normal noise on what exceeds E."""
    rng = random.Random(seed)
    return [(N, D, law.E + (law.loss(N, D) - law.E) * math.exp(rng.gauss(0, noise))) for N in sizes for D in draws]


GRIDS = {CHINCHILLA: ([10**k for k in (7, 8, 9, 10)], [10**k for k in (8, 9, 10, 11)]),
         STEEP: ([128, 512, 2048, 8192, 32768], [512, 2048, 8192, 32768, 131072])}


@pytest.mark.parametrize("law", [CHINCHILLA, STEEP], ids=["Chinchilla", "steep"])
def test_the_fit_recovers_planted_constants(law):
    assert fit_law(runs_of(law, *GRIDS[law]), law.E) == pytest.approx(law, rel=1e-2)


def test_the_fit_recovers_the_exponents_from_noisy_runs_and_ignores_an_outlier():
    runs = runs_of(STEEP, *GRIDS[STEEP], noise=0.02)
    runs[7] = (*runs[7][:2], 2 * runs[7][2])
    found = fit_law(runs, E=0.0)
    assert (found.alpha, found.beta) == pytest.approx((STEEP.alpha, STEEP.beta), rel=0.05)
    assert (found.N0, found.D0) == pytest.approx((STEEP.N0, STEEP.D0), rel=0.25)


@pytest.mark.parametrize("law", [CHINCHILLA, STEEP], ids=["Chinchilla", "steep"])
@pytest.mark.parametrize("C", [1e9, 1e21])
def test_the_closed_form_optimum_is_the_best_of_a_fine_grid_and_spends_the_budget(law, C):
    N, D = compute_optimal(law, C)
    assert 6 * N * D == pytest.approx(C)
    grid = [math.exp(i / 1000) for i in range(45_000)]
    best = min(grid, key=lambda size: law.loss(size, C / 6 / size))
    assert N == pytest.approx(best, rel=2e-3)


def test_the_optimum_moves_with_the_budget_as_the_exponents_say():
    growth = math.log(compute_optimal(STEEP, 1e12)[0] / compute_optimal(STEEP, 1e10)[0]) / math.log(100)
    assert growth == pytest.approx(STEEP.beta / (STEEP.alpha + STEEP.beta))


def test_a_law_has_no_error_on_its_own_runs_and_extrapolates_to_the_largest():
    runs = runs_of(STEEP, *GRIDS[STEEP])
    assert quality(STEEP, runs) == (1.0, 1.0)
    worse, factor = quality(STEEP._replace(alpha=0.9), runs)
    assert worse < 0.9 and factor > 1.1
    predicted, measured = extrapolate(runs)
    assert measured == runs[-1][2] and predicted == pytest.approx(measured, rel=1e-2)


def test_a_power_law_has_one_local_exponent_and_a_cliff_has_not():
    draws = (100, 400, 1600)
    assert local_exponents([(9, D, D**-0.7) for D in draws]) == pytest.approx([0.7, 0.7])
    assert local_exponents([(1, D, 1.0) for D in draws] + [(9, D, 2.0 ** (-D / 100)) for D in draws]) == pytest.approx(
        [3 * math.log(2) / math.log(4), 12 * math.log(2) / math.log(4)])


@pytest.mark.parametrize("a", scaling_laws.TAILS)
def test_probabilities_sum_to_1_and_fall_as_a_power(a):
    p = probabilities(a)
    assert len(p) == NUM_FACTS and p.sum().item() == pytest.approx(1, abs=1e-12)
    assert (p[0] / p[999]).item() == pytest.approx(1000 ** (1 + a))


def test_the_computed_loss_is_that_of_every_sequence_of_draws():
    p, D = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64), 4
    for rows in range(5):
        expected = 0.0
        for draws in itertools.product(range(4), repeat=D):
            known = {fact for fact in draws if fact < rows}
            expected += math.prod(p[fact].item() for fact in draws) * sum(
                p[fact].item() for fact in range(4) if fact not in known)
        assert ideal_loss(p, rows, D) == pytest.approx(GUESSING * expected)


@pytest.mark.parametrize("a", scaling_laws.TAILS)
def test_in_the_limit_the_exponents_are_a_over_1_plus_a_in_the_draws_and_a_in_the_rows(a):
    p = probabilities(a)
    by_draws = [ideal_loss(p, NUM_FACTS, D) for D in (1000, 4000)]
    by_rows = [ideal_loss(p, rows, 10**12) for rows in (1000, 4000)]
    assert math.log(by_draws[0] / by_draws[1]) / math.log(4) == pytest.approx(a / (1 + a), abs=0.03)
    assert math.log(by_rows[0] / by_rows[1]) / math.log(4) == pytest.approx(a, abs=0.03)


def test_in_the_limit_the_best_table_grows_as_the_budget_to_the_power_1_over_2_plus_a():
    p = probabilities(1.0)
    growth = math.log(ideal_rows(p, 1e12) / ideal_rows(p, 1e9)) / math.log(1000)
    assert growth == pytest.approx(1 / 3, abs=0.03)


def test_nicknames_are_the_same_on_every_machine_and_equally_frequent():
    nicknames = make_nicknames(0)
    assert nicknames[:8].tolist() == [12, 15, 21, 0, 3, 27, 3, 7]
    counts = nicknames.bincount(minlength=NUM_NICKNAMES)
    assert len(counts) == NUM_NICKNAMES and (counts / NUM_FACTS * NUM_NICKNAMES - 1).abs().max() < 0.03
    assert not torch.equal(nicknames, make_nicknames(1))


def test_facts_without_a_row_and_unseen_facts_are_guessed_uniformly_and_stay_so_when_others_are_learned():
    torch.manual_seed(0)
    model = LookupTable(rows=4)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.5)
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(torch.tensor([0, 1, 4, 7])), torch.tensor([3, 5, 9, 9]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probabilities_of = model(torch.arange(8)).softmax(dim=-1)
    torch.testing.assert_close(probabilities_of[2:], torch.full((6, NUM_NICKNAMES), 1 / NUM_NICKNAMES))
    assert probabilities_of[0, 3] > 0.9 and probabilities_of[1, 5] > 0.9
    assert sum(weight.numel() for weight in model.parameters()) == count_parameters(4) + scaling_laws.WIDTH * (1 + 32)


def test_the_share_that_real_draws_leave_unseen_is_the_computed_one():
    p = probabilities(0.5)
    unseen = [1 - p[draw_facts(p, 500, seed).unique()].sum().item() for seed in range(20)]
    assert GUESSING * statistics.mean(unseen) == pytest.approx(ideal_loss(p, NUM_FACTS, 500), rel=0.03)


def test_a_run_is_the_beginning_of_a_longer_one_and_its_loss_stays_above_what_was_unseen():
    short, long = train_table(1.0, 64, (512,), 0, BAR), train_table(1.0, 64, (512, 2048), 0, BAR)
    assert short[0] == long[0] > long[1] > GUESSING * probabilities(1.0)[64:].sum().item()
    assert long[0] < 2 * ideal_loss(probabilities(1.0), 64, 512)
    assert train_table(1.0, 64, (512,), 1, BAR) != short


def test_the_optimum_is_tested_with_three_tables_of_equal_budget(monkeypatch):
    monkeypatch.setattr(scaling_laws, "SEEDS", (0, 1))
    C = 6 * count_parameters(40) * 12 * BATCH_SIZE
    found = check_optimum(1.0, count_parameters(40), C, BAR)
    assert [(rows, D, len(losses)) for rows, D, losses in found] == [(10, 1536, 2), (40, 384, 2), (160, 96, 2)]


def test_no_held_out_number_is_trained_on_and_all_lengths_are_equally_frequent():
    numbers = draw_numbers(3000, seed=0)
    assert numbers == draw_numbers(3000, seed=0) != draw_numbers(3000, seed=1)
    assert not set(numbers) & set(scaling_laws.make_splits().validation)
    counts = [sum(len(str(number)) == length for number in numbers) for length in range(1, 7)]
    assert counts == [500] * 6


def test_names_are_tested_on_held_out_numbers_after_training_with_the_rate_of_the_width(monkeypatch):
    trained, tested = [], []
    monkeypatch.setattr(scaling_laws.decoder_only, "train", lambda model, loaders, epochs, rate, **_: trained.append(
        (loaders.train.dataset.numbers, rate)))
    monkeypatch.setattr(scaling_laws.decoder_only, "evaluate", lambda model, loader: tested.append(
        loader.dataset.numbers) or {"loss": 0.5})
    found = [scaling_laws.train_names(d_model, 32, seed, BAR)[1:] for d_model, seed in ((4, 0), (64, 1))]
    assert found == [(32, 0.5)] * 2 and tested == [scaling_laws.make_splits().validation] * 2
    assert trained == [(draw_numbers(32, 0), 3.2e-2), (draw_numbers(32, 1), 0.5 / 64)]


def test_runs_are_averaged_over_all_seeds_and_the_range_is_that_of_the_seeds():
    assert scaling_laws.mean_runs([[(1, 2, 3.0)], [(1, 2, 4.0)], [(1, 2, 8.0)]]) == [(1, 2, 5.0)]
    assert scaling_laws.with_range([2.0, 1.0, 3.0], 1) == "2.0 (1.0 to 3.0)"


def test_the_typical_error_is_that_of_the_logarithm():
    runs = [(N, D, STEEP.loss(N, D) * math.exp(0.1)) for N, D in ((128, 512), (8192, 32768))]
    variance = statistics.pvariance([math.log(loss) for *_, loss in runs])
    assert quality(STEEP, runs) == pytest.approx((1 - 0.01 / variance, math.exp(0.1)))


def test_the_verdicts_follow_from_made_up_laws_and_losses(monkeypatch, capsys):
    monkeypatch.setattr(scaling_laws, "NUM_FACTS", 4096)
    monkeypatch.setattr(scaling_laws, "TAILS", (0.5,))
    monkeypatch.setattr(scaling_laws, "fit_law", lambda runs, E: STEEP)
    laws, runs = {0.5: [STEEP._replace(beta=0.2)] * 2}, runs_of(STEEP, *GRIDS[STEEP])
    better, overlapping = ([(1, 1, [5.0, 5.2]), (2, 1, same), (3, 1, [6.0, 6.2])] for same in ([4.0, 4.2], [4.0, 5.1]))
    scaling_laws.show_optima(laws, {(0.5, 1e5): better, (0.5, 1e6): overlapping})
    scaling_laws.show_fits(laws, {0.5: runs}, {0.5: runs})
    printed = " ".join(capsys.readouterr().out.split())
    assert "5.1000 4.1000 6.1000" in printed and "In 1 of 2 cases" in printed
    assert "to the power 0.25 (0.25 to 0.25) by the fit, 0.40 in the limit" in printed
    assert "in the limit 0.50 0.33" in printed


SMALL = dict(D_MODELS=(4, 8), NAMES=(32, 64, 128), ROWS=(8, 16, 32), DRAWS=(256, 512, 1024), BUDGETS=(1e5, 1e6),
             SEEDS=(0, 1), NUM_FACTS=4096)


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(scaling_laws, **SMALL)
    assert all(title in printed for title in ("NAMES", "NICKNAMES, a = 0.5", "POWER LAW", "THE FIT", "OPTIMAL"))
    assert printed.count("Extrapolation") == 3


@pytest.mark.parametrize("wrong", [dict(DRAWS=(512, 1000)), dict(DRAWS=(1024, 512)), dict(ROWS=(8, 5000))])
def test_draws_and_rows_that_do_not_fit_are_refused_in_one_sentence(wrong, run_main):
    with pytest.raises(scaling_laws.InputError, match="must be ascending multiples of BATCH_SIZE = 32, and ROWS"):
        run_main(scaling_laws, **SMALL | wrong)
