"""Parameter sharing: one module in several places, its gradient the sum over them, its file the size of one."""

import copy
import math
from types import SimpleNamespace

import decoder_only
import pytest
import torch
from conftest import tiny
from torch.utils.data import DataLoader

from variations import parameter_sharing
from variations.parameter_sharing import (
    ROWS,
    WHOLE_LAYER,
    FactorizedEmbedding,
    break_even,
    checkpoint_bytes,
    exchange,
    multiplications,
    num_parameters,
)

PROMPTS = [decoder_only.make_prompt(number) for number in (7, 342, 90210, 123456)]
IDS = torch.tensor([PROMPTS[3]])
BATCH = decoder_only.toy_dataset.pad_batch([decoder_only.toy_dataset.decoder_only_example(n) for n in (7, 342, 90210)])
SHARED = {row: options for row, options in ROWS.items() if "shared" in options}


def shared_model(parts=WHOLE_LAYER, **options):
    return exchange(tiny(decoder_only, num_layers=3), shared=parts, **options)


def unshared_copy(model):
    """Layers of their own with the same values: a shared tensor is in the state under each of its names."""
    other = tiny(decoder_only, seed=1, num_layers=len(model.layers))
    other.load_state_dict(model.state_dict())
    return other


def gradients(model):
    model.zero_grad()
    decoder_only.compute_loss(model, BATCH)[0].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("parts", [("attention",), ("feed_forward",), WHOLE_LAYER])
def test_sharing_computes_what_an_unshared_model_with_equal_weights_computes(parts):
    model = shared_model(parts)
    assert torch.equal(model(IDS), unshared_copy(model)(IDS))


@pytest.mark.parametrize("parts", [("attention",), ("feed_forward",), WHOLE_LAYER])
def test_the_gradient_of_a_shared_weight_is_the_sum_over_its_places_of_use(parts):
    model = shared_model(parts)
    shared, own = gradients(model), gradients(unshared_copy(model))
    for name, gradient in shared.items():
        path = name.split(".")
        places = [name]
        if path[0] == "layers" and path[2] in parts:
            places = [".".join(["layers", str(i), *path[2:]]) for i in range(3)]
        torch.testing.assert_close(gradient, sum(own[place] for place in places), atol=1e-4, rtol=1e-4)


def test_sharing_a_single_layer_changes_nothing():
    base = tiny(decoder_only, num_layers=1)
    model = exchange(copy.deepcopy(base), shared=WHOLE_LAYER)
    assert torch.equal(model(IDS), base(IDS))
    for name, gradient in gradients(base).items():
        assert torch.equal(gradients(model)[name], gradient)


def test_parameters_are_counted_once_and_multiplications_at_each_use():
    own, model, one = tiny(decoder_only, num_layers=3), shared_model(), tiny(decoder_only, num_layers=1)
    assert num_parameters(own) == decoder_only.parameter_formula(own)[1]
    assert num_parameters(model) == num_parameters(one) == decoder_only.parameter_formula(one)[1]
    V, C, D_FF = len(decoder_only.VOCABULARY), 32, 64
    assert multiplications(model) == multiplications(own) == V * C + 3 * (4 * C * C + 2 * C * D_FF)


def test_the_optimizer_updates_and_decays_a_shared_weight_once(recwarn):
    model = shared_model()
    optimizer = decoder_only.create_optimizer(model)
    listed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(listed) == sorted({id(parameter) for parameter in model.parameters()})
    assert len(recwarn) == 0  # torch warns of parameters that appear twice
    assert len(optimizer.param_groups[0]["params"]) == 6


def test_layers_stay_shared_through_training_and_through_a_file(tmp_path):
    model = shared_model()
    optimizer = decoder_only.create_optimizer(model)
    losses = [decoder_only.train_step(model, BATCH, optimizer, 3e-3)[0] for _ in range(10)]
    assert losses[-1] < losses[0] and num_parameters(model) == num_parameters(tiny(decoder_only, num_layers=1))
    decoder_only.save(model, tmp_path / "model.pt")
    loaded = decoder_only.load(tmp_path / "model.pt", shared_model())
    assert torch.equal(loaded(IDS), model.eval()(IDS)) and num_parameters(loaded) == num_parameters(model)
    # Whoever loads the file without the exchange gets layers of their own, with equal weights.
    assert torch.equal(decoder_only.load(tmp_path / "model.pt", tiny(decoder_only, num_layers=3))(IDS), model(IDS))


def test_a_checkpoint_holds_shared_tensors_once():
    own, model, one = tiny(decoder_only, num_layers=3), shared_model(), tiny(decoder_only, num_layers=1)
    layer = 4 * (num_parameters(own) - num_parameters(one)) // 2
    assert checkpoint_bytes(own) - checkpoint_bytes(model) > 2 * layer
    assert checkpoint_bytes(model) - checkpoint_bytes(one) < 0.2 * layer  # more names for the same tensors


@pytest.mark.parametrize("row", SHARED)
def test_each_place_of_use_has_its_own_cache_and_cached_logits_equal_recomputed_ones(row):
    model = exchange(tiny(decoder_only, num_layers=3), **SHARED[row])
    ids, cache = torch.randint(7, 40, (2, 12)), model.new_cache()
    for length in range(1, 13):
        cached = model(ids[:, :length], cache)[:, -1]
        torch.testing.assert_close(cached, model(ids[:, :length])[:, -1], atol=1e-4, rtol=1e-4)
    assert [len(kv) for kv in cache] == [12, 12, 12]
    assert not torch.allclose(cache[0].key, cache[1].key, atol=1e-2)


@pytest.mark.parametrize("row", ROWS)
def test_generation_does_not_depend_on_the_batch(row):
    model = exchange(tiny(decoder_only, num_layers=3), **ROWS[row])
    for generated, prompt in zip(decoder_only.generate(model, PROMPTS), PROMPTS):
        alone = decoder_only.generate(model, [prompt])[0]
        assert torch.equal(generated[:len(alone)], alone)


def test_the_depth_encoding_is_the_positional_encoding_of_the_depth_and_is_added_before_each_use():
    model, table = shared_model(depth_encoding=True), decoder_only.PositionalEncoding(32, 3).table
    x, mask = torch.randn(1, 5, 32), torch.ones(5, 5, dtype=torch.bool)
    base = shared_model().layers[0]
    for depth, layer in enumerate(model.layers):
        torch.testing.assert_close(layer(x, mask), base(x + table[depth], mask))
    assert model.state_dict().keys() == shared_model().state_dict().keys()  # it follows from a formula: not saved


def test_a_factorized_embedding_of_full_width_with_the_identity_is_the_base():
    base = tiny(decoder_only)
    model = exchange(copy.deepcopy(base), embedding_width=32)
    with torch.no_grad():
        model.embedding.expand.weight.copy_(torch.eye(32))
        model.embedding.table.weight.copy_(base.embedding.weight)
    torch.testing.assert_close(model(IDS), base(IDS))
    torch.testing.assert_close(gradients(model)["embedding.table.weight"], gradients(base)["embedding.weight"])


def test_input_and_output_of_a_factorized_embedding_are_tied_and_its_rank_is_its_width():
    embedding = FactorizedEmbedding(40, 4, 32)
    assert torch.allclose(embedding(torch.arange(40)), embedding.weight, atol=1e-6)
    assert torch.linalg.matrix_rank(embedding.weight) == 4


def test_a_factorized_embedding_starts_with_the_spread_of_the_bases():
    torch.manual_seed(0)
    weights = torch.stack([FactorizedEmbedding(1000, width, 64).weight for width in (8, 32) for _ in range(5)])
    assert weights.std().item() == pytest.approx(0.5 / 64 ** 0.5, rel=0.05)


def test_break_even_is_where_both_tables_have_equally_many_parameters():
    for E, C in ((8, 32), (16, 64), (128, 768)):
        assert break_even(E, C) * C == pytest.approx(break_even(E, C) * E + E * C)


def test_only_one_row_is_one_layer_deep():
    depths = {row: len(parameter_sharing.build(row, 0).layers) for row in ROWS}
    assert depths == dict.fromkeys(ROWS, 4) | {"1 layer": 1}


def test_learned_is_the_first_step_whose_last_ten_losses_are_low_on_average():
    for losses, step in (([1.0, 0.0] * 10 + [0.05] * 10, 29), ([1.0] * 30, math.inf), ([], math.inf)):
        assert parameter_sharing.steps_until_learned([{"loss": loss} for loss in losses]) == step


def test_the_rate_is_chosen_on_validation_numbers_and_exact_match_measured_on_test_numbers(monkeypatch):
    results = {8e-3: (0.7, 0.9, 30), 1.6e-2: (0.8, 0.6, 20), 3.2e-2: (0.6, 0.7, 10)}
    monkeypatch.setattr(parameter_sharing, "load_epochs", lambda seed: None)
    monkeypatch.setattr(parameter_sharing, "train_row", lambda row, rate, *_: results[rate])
    expected = {"rate": 1.6e-2, "exact": (0.6,) * 3, "steps": (20,) * 3}
    assert list(parameter_sharing.measure(None).values()) == [expected] * 6


def test_each_epoch_has_its_own_order(monkeypatch):
    train = DataLoader(range(50), 50, shuffle=True)
    test = SimpleNamespace(collate_fn=list, dataset=SimpleNamespace(examples=[]))
    monkeypatch.setattr(decoder_only, "create_dataloaders", lambda *_, **__: SimpleNamespace(
        train=train, test=test, _replace=lambda **changed: changed["train"]))
    first, second, *_ = parameter_sharing.load_epochs(0)
    assert set(first.tolist()) == set(second.tolist()) and not torch.equal(first, second)


def test_the_sentences_on_size_and_vocabulary_follow_from_the_numbers(monkeypatch, capsys):
    monkeypatch.setattr(parameter_sharing, "VOCABULARY", range(100))
    sizes, times = {parameter_sharing.OWN: (1000, 2000, 500)}, {parameter_sharing.OWN: (10.0, 4.0)}
    sizes[parameter_sharing.SAME], times[parameter_sharing.SAME] = (250, 600, 500), (9.0, 3.0)
    parameter_sharing.show_sizes(sizes, times)
    for total in (10_000, 100_000):
        parameter_sharing.show_factorization(total)
    printed = " ".join(capsys.readouterr().out.split())
    assert "25% of the parameters, 30% of the bytes, 100% of the products, 90% of the time per training" in printed
    assert "16 V = 32.0 1,088 (10.9%)" in printed and "only an E below 24.2 saves" in printed  # 3200 - (1600 + 512)
    assert "by -10.9%" in printed and "vocabulary it pays." in printed and "vocabulary it does not pay." in printed


def test_the_experiment_runs_end_to_end_and_says_what_it_found(run_main):
    printed = run_main(parameter_sharing, BATCH_SIZE=8, NUM_EPOCHS=1, LEARNING_RATES=(1e-3, 1e-2), NUM_TESTS=10,
                       SEEDS=(0, 1), TIMINGS=1)
    assert all(text in printed for text in (*ROWS, "pays above", "At equal parameters"))


def test_widths_that_are_not_narrower_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(parameter_sharing, "WIDTHS", (16, 32))
    with pytest.raises(parameter_sharing.InputError, match="must be above 0 and below D_MODEL = 32"):
        parameter_sharing.main()
