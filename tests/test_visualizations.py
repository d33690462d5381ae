"""The pictures: each is written and whole, and the numbers in it are right. Not pixels are compared, but numbers."""

import json
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
import torch.nn as nn
from matplotlib.text import Text
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import compare_architectures  # noqa: E402
import decoder_only  # noqa: E402
import encoder_decoder  # noqa: E402
import encoder_only  # noqa: E402
import toy_dataset  # noqa: E402
import visualizations  # noqa: E402
from toy_dataset import EOS_ID, to_ids  # noqa: E402

TINY = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64}
MODULES = {"encoder_only": encoder_only, "decoder_only": decoder_only, "encoder_decoder": encoder_decoder}
PROMISED = """positional_encoding masks architectures attention_encoder attention_decoder cross_attention
    sampling_strategies learning_rate_schedule training_curves model_complexity token_embeddings softmax_scaling
    gradient_flow beam_search_tree kv_cache comparison_matrix causal_wall influence""".split()
SHOW_A_TRAINED_MODEL = """attention_encoder attention_decoder cross_attention sampling_strategies token_embeddings
    beam_search_tree influence""".split()
SILENT = tqdm(disable=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    """Untrained ones: what is computed for a picture must be right whatever the weights. The encoder-decoder is given
    an inclination to end its texts, as trained ones do; a tree of endless texts would be no picture to judge."""
    torch.manual_seed(0)
    models = {name: module.build_model(**TINY).cpu().eval() for name, module in MODULES.items()}
    writer = models["encoder_decoder"]
    writer.decoder_norm.bias.data += 8 * writer.embedding.weight.data[EOS_ID] / writer.embedding.weight[EOS_ID].norm()
    return models


@pytest.fixture(scope="module")
def trained(models):
    return {name: visualizations.Trained(model, 0.5, "Held-out accuracy: 50%.") for name, model in models.items()}


@pytest.fixture(scope="module")
def flow():
    return visualizations.gradient_flow(num_steps=2, depth=3, progress=SILENT)


@pytest.fixture(scope="module")
def comparison():
    """Made-up measurements, in the form in which compare_architectures.py writes them."""
    history = [{"step": step, "loss": 4 / step} | ({"exact_match": step / 100} if step % 50 == 0 else {})
               for step in range(10, 101, 10)]
    cells = [{"architecture": cell.module.__name__, "work": cell.work, "natural": cell.natural, "history": history,
              "sequence_accuracy": 0.9 if cell.natural else 0.2, "ms_per_answer": 12.34, "forward_passes": 11.8}
             for cell in compare_architectures.CELLS]
    wall = {"ceiling": 1 / 3, "causal": 0.331, "after_reading": 0.99, "bidirectional": 1.0, "encoder_decoder": 0.98}
    return {"cells": cells, "wall": wall,
            "kv_cache": {"lengths": [64, 512], "cached_ms": [1.0, 1.1], "recomputed_ms": [2.0, 20.0]}}


@pytest.fixture(scope="module")
def figures(trained, flow, comparison):
    return dict(visualizations.draw_all(trained, trained["decoder_only"], flow, comparison))


@pytest.fixture(scope="module")
def files(figures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return {name: visualizations.save(figure, name, folder) for name, figure in figures.items()}


# --- the files ---


def test_exactly_the_promised_pictures_are_drawn(figures):
    assert sorted(figures) == sorted(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_a_picture_is_a_small_png_of_the_promised_size_and_not_blank(figures, files, name):
    data = files[name].read_bytes()
    assert files[name].name == f"{name}.png" and data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == visualizations.WIDTH * visualizations.DPI == 770
    assert 400 <= height <= 1100 and height == pytest.approx(figures[name].get_figheight() * visualizations.DPI, abs=1)
    assert len(data) < 200_000
    pixels = matplotlib.image.imread(files[name])[..., :3]
    assert pixels.std() > 0.05, "nearly blank"
    assert (pixels.min(axis=2) < 0.5).mean() > 0.01, "hardly any ink"


@pytest.mark.parametrize("name", PROMISED)
def test_a_picture_says_what_to_see_and_no_text_in_it_is_cut_off_or_hard_to_read(figures, name):
    figure = figures[name]
    figure.draw_without_rendering()
    title = figure.get_suptitle()
    assert title.isascii() and len(title.split()) >= 6 and title.count("\n") <= 1
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height
    for text in figure.findobj(Text):
        assert text.get_fontsize() >= 11 or not text.get_text(), f"{text.get_text()!r} is too small for a phone"


@pytest.mark.parametrize("name", PROMISED)
def test_the_labels_along_an_axis_and_the_titles_do_not_overlap(figures, name):
    figure = figures[name]
    figure.draw_without_rendering()
    groups = [[axes.title for axes in figure.axes] + [figure._suptitle]]
    for axes in figure.axes:
        groups += [axes.get_xticklabels(), axes.get_yticklabels(), [axes.xaxis.label, axes.yaxis.label, axes.title]]
    for group in groups:
        boxes = [text.get_window_extent() for text in group if text.get_visible() and text.get_text().strip()]
        # Letters don't fill the boxes of their lines: a fifth of the smaller side may be shared.
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                across = min(a.x1, b.x1) - max(a.x0, b.x0)
                up = min(a.y1, b.y1) - max(a.y0, b.y0)
                assert across <= 0.3 * min(a.width, b.width) or up <= 0.3 * min(a.height, b.height)


def test_pictures_of_trained_models_carry_their_held_out_accuracy_and_attention_is_not_oversold(figures):
    for name in SHOW_A_TRAINED_MODEL:
        assert "Held-out accuracy" in " ".join(figures[name].get_supxlabel().split()), name
    for name in ("attention_encoder", "attention_decoder", "cross_attention"):
        assert "no proof of reasoning" in " ".join(figures[name].get_supxlabel().split())


def test_the_same_models_give_the_same_bytes(files, trained, flow, comparison, tmp_path):
    for name, figure in visualizations.draw_all(trained, trained["decoder_only"], flow, comparison):
        assert visualizations.save(figure, name, tmp_path).read_bytes() == files[name].read_bytes(), name


# --- numbers that need no training ---


def test_the_likeness_of_two_positions_depends_on_their_distance_alone_and_is_largest_at_home():
    table = encoder_only.PositionalEncoding(32, 64).table
    from_16, from_40 = (visualizations.position_similarity(table, position) for position in (16, 40))
    assert from_16.argmax() == 16 and from_16[16].item() == pytest.approx(1)
    torch.testing.assert_close(from_16[:40], from_40[24:], atol=1e-5, rtol=0)


def test_the_masks_hide_padding_and_the_future():
    masks = visualizations.example_masks()
    drawn = {name: ["".join("#" if cell else "." for cell in row) for row in mask.tolist()]
             for name, (mask, _, _) in masks.items()}
    assert drawn == {
        "padding": ["###."] * 4,
        "causal": ["#....", "##...", "###..", "####.", "#####"],
        "causal & padding": ["#....", "##...", "###..", "###..", "###.."],
        "cross-attention": ["###."] * 5,
    }
    assert masks["cross-attention"][1:] == (["<SOS>", "forty", "two", "<PAD>", "<PAD>"], ["4", "2", "<EOS>", "<PAD>"])


def test_without_the_scale_the_largest_weight_grows_towards_1_and_with_it_stays():
    raw, scaled = visualizations.largest_weights([4, 64, 1024])
    assert raw[0] < raw[1] < raw[2] and raw[2] > 0.9
    assert max(scaled) - min(scaled) < 0.05 and max(scaled) < 0.4
    generator = torch.Generator().manual_seed(visualizations.SEED)
    query, key = (torch.randn(n, 4, generator=generator) for n in (256, 16))
    assert raw[0] == pytest.approx((query @ key.T).softmax(-1).amax(-1).mean().item(), abs=1e-5)
    assert scaled[0] == pytest.approx((query @ key.T / 2).softmax(-1).amax(-1).mean().item(), abs=1e-5)


def test_the_learning_rates_are_those_of_each_files_own_training():
    rates = visualizations.learning_rates()
    for name, module in MODULES.items():
        num_steps = module.NUM_EPOCHS * len(module.create_dataloaders().train)
        assert len(rates[name]) == num_steps
        assert max(rates[name]) == pytest.approx(module.LEARNING_RATE, rel=1e-3)
        assert rates[name][num_steps // 2] == module.learning_rate_at(num_steps // 2, num_steps)


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_is_counted_once_and_the_diagram_shows_the_same_numbers(models, name):
    model = models[name]
    counts = compare_architectures.count_parameters(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert (counts["cross-attention"] > 0) == (name == "encoder_decoder")
    drawn = dict.fromkeys(counts, 0)
    for sublayers in visualizations.describe_stacks(model).values():
        for sublayer in sublayers:
            drawn[sublayer.name] += TINY["num_layers"] * sublayer.parameters
    for component in ("self-attention", "cross-attention", "feed-forward"):
        assert drawn[component] == counts[component]


def texts_in(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_changing_a_constant_changes_the_diagram(models):
    before = texts_in(visualizations.draw_architectures(models))
    other = decoder_only.build_model(**TINY | {"num_layers": 3, "num_heads": 2, "d_ff": 96}).cpu()
    after = texts_in(visualizations.draw_architectures(models | {"decoder_only": other}))
    assert before.count("2 such layers") == 4 and after.count("2 such layers") == 3 and "3 such layers" in after
    assert "2 heads of 16" not in before and "2 heads of 16" in after
    assert "96 wide inside" not in before and "96 wide inside" in after


def test_the_diagram_says_who_looks_where_from_what_the_models_do(models):
    texts = texts_in(visualizations.draw_architectures(models))
    assert (texts.count("looks both ways"), texts.count("looks left only"), texts.count("looks at source")) == (2, 2, 1)


def test_the_post_norm_model_starts_from_the_same_weights_and_is_pytorchs_post_norm_layer():
    pre, post = (visualizations.build_deep_model(post_norm, depth=2) for post_norm in (False, True))
    for a, b in zip(pre.layers.parameters(), post.layers.parameters()):
        assert torch.equal(a, b)
    ours = post.layers[0]
    theirs = nn.TransformerEncoderLayer(32, encoder_only.NUM_HEADS, 128, 0.0, activation="gelu", batch_first=True)
    attention = ours.attention
    with torch.no_grad():
        for part in ("weight", "bias"):
            getattr(theirs.self_attn, f"in_proj_{part}").copy_(torch.cat(
                [getattr(attention.query, part), getattr(attention.key, part), getattr(attention.value, part)]))
            for mine, other in ((attention.output, theirs.self_attn.out_proj),
                                (ours.feed_forward.expand, theirs.linear1),
                                (ours.feed_forward.contract, theirs.linear2)):
                getattr(other, part).copy_(getattr(mine, part))
    x = torch.randn(3, 5, 32)
    assert torch.equal(post.final_norm(x), x)  # no norm but the layers' own
    torch.testing.assert_close(ours(x, torch.ones(3, 1, 1, 5, dtype=torch.bool)), theirs(x), atol=1e-5, rtol=1e-4)


def test_gradients_by_layer_are_those_of_the_loss(flow):
    model = visualizations.build_deep_model(False, depth=3)
    batch = next(iter(encoder_only.create_dataloaders(batch_size=32, seed=0).validation))
    batch = {"ids": batch["ids"][:100]}
    norms = visualizations.layer_gradients(model, batch)
    assert norms == pytest.approx(flow["pre-norm", 0], rel=1e-4)
    torch.manual_seed(visualizations.SEED)
    loss_sum, count = encoder_only.compute_loss(model, batch)
    for layer, norm in zip(model.layers, norms):
        gradients = torch.autograd.grad(loss_sum / count, list(layer.parameters()), retain_graph=True)
        assert norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-4)


def test_deep_post_norm_loses_its_gradient_in_training_and_pre_norm_does_not():
    found = visualizations.gradient_flow(num_steps=40, progress=SILENT)
    spread = {key: max(norms) / min(norms) for key, norms in found.items()}
    assert len(found["pre-norm", 0]) == visualizations.DEPTH
    assert spread["post-norm", 0] < 20 and spread["pre-norm", 40] < 30 < 100 < spread["post-norm", 40]


# --- numbers from models ---


def test_attention_maps_carry_the_real_tokens_and_rows_that_sum_to_1(models):
    expected = {
        "encoder_only": {"layers": ("<CLS> 4 2 <SEP> forty two <SEP>",) * 2},
        "decoder_only": {"layers": ("<SOS> 4 2 <SEP> forty two",) * 2},
        "encoder_decoder": {"encoder": ("4 2 <EOS>",) * 2, "decoder": ("<SOS> forty two",) * 2,
                            "cross": ("forty two <EOS>", "4 2 <EOS>")},
    }
    for name, kinds in expected.items():
        found = visualizations.attention_maps(models[name], 42)
        assert {kind: (" ".join(item.rows), " ".join(item.columns)) for kind, item in found.items()} == kinds
        for item in found.values():
            assert item.weights.shape == (2, 4, len(item.rows), len(item.columns))
            torch.testing.assert_close(item.weights.sum(dim=-1), torch.ones(2, 4, len(item.rows)))
    assert visualizations.attention_maps(models["decoder_only"], 512)["layers"].weights.triu(1).abs().max() == 0


def test_cross_attention_is_the_one_that_the_models_own_file_shows(models):
    maps = visualizations.attention_maps(models["encoder_decoder"], 90210)["cross"]
    own = encoder_decoder.cross_attention(models["encoder_decoder"], 90210)
    torch.testing.assert_close(maps.weights.mean(dim=(0, 1)), own)


def test_the_share_of_attention_on_the_alignment():
    truth = torch.zeros(6, 6)  # 90210: ninety {9 0}, thousand {9 0}, two {2}, hundred {2}, ten {1 0}, <EOS>
    for row, column in enumerate([1, 0, 2, 2, 3, 5]):
        truth[row, column] = 1
    assert visualizations.share_on_alignment(truth, 90210) == pytest.approx(1)
    assert visualizations.share_on_alignment(truth.flip(1), 90210) == pytest.approx(0)
    uniform = torch.full((6, 6), 1 / 6)
    assert visualizations.share_on_alignment(uniform, 90210) == pytest.approx(8 / 5 / 6)
    assert visualizations.chance_on_alignment(90210) == pytest.approx(8 / 5 / 6)


def test_the_boxes_of_the_encoders_picture_join_digits_and_their_words():
    tokens = "<CLS> 5 1 2 <SEP> five hundred twelve <SEP>".split()
    pairs = {(tokens[row], tokens[column]) for row, column in visualizations.digit_word_pairs(512)}
    half = {("5", "five"), ("5", "hundred"), ("1", "twelve"), ("2", "twelve")}
    assert pairs == half | {(word, digit) for digit, word in half}


def test_the_share_on_pairs_counts_their_rows_alone():
    weights = torch.tensor([[0.2, 0.8, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    assert visualizations.share_on_pairs(weights, [(0, 0), (0, 1), (1, 2)]).item() == pytest.approx(1.5 / 2)
    assert visualizations.share_on_pairs(weights.expand(2, 4, 3, 3), [(0, 1)]).shape == (2, 4)


def test_each_strategy_keeps_what_it_promises(models):
    prompt = visualizations.prompt_before_last_word(90210)
    assert " ".join(prompt) == "<SOS> 9 0 2 1 0 <SEP> ninety thousand two hundred"
    found = visualizations.next_token_distributions(models["decoder_only"], prompt)
    learned = found["as learned"]
    logits = models["decoder_only"](torch.tensor([to_ids(prompt)]))[0, -1]
    torch.testing.assert_close(learned[1:], logits[1:].softmax(-1))
    for name, probabilities in found.items():
        assert probabilities.sum().item() == pytest.approx(1), name
        assert probabilities[toy_dataset.PAD_ID] == 0
        assert probabilities.argmax() == learned.argmax()
    assert [(found[name] > 0).sum().item() for name in ("greedy (top-k 1)", "top-k 3")] == [1, 3]
    assert found["temperature 0.5"].max() > learned.max() > found["temperature 2"].max()
    likeliest = learned.sort(descending=True).values
    kept = (found["top-p 0.9"] > 0).sum().item()
    assert likeliest[: kept - 1].sum() < 0.9 <= likeliest[:kept].sum() + 1e-6


def test_pca_finds_the_directions_of_planted_data():
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(200, 2, generator=generator) * torch.tensor([3.0, 1.0])
    directions = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    points, shares = visualizations.principal_components(coordinates @ directions + 7)
    centred = coordinates - coordinates.mean(dim=0)
    assert shares.sum().item() == pytest.approx(1)
    assert shares[0].item() == pytest.approx((points[:, 0].square().sum() / centred.square().sum()).item(), rel=1e-4)
    assert torch.corrcoef(torch.stack([points[:, 0].float(), coordinates[:, 0]]))[0, 1].abs() > 0.99
    torch.testing.assert_close(torch.cdist(points, points).float(), torch.cdist(centred, centred), atol=1e-2, rtol=1e-3)
    assert (points.gather(0, points.abs().argmax(dim=0, keepdim=True)) > 0).all()  # signs are settled


def test_the_word_map_sees_planted_kinds_and_knows_when_there_are_none(models):
    model = decoder_only.build_model(**TINY).cpu()
    for i, words in enumerate(visualizations.WORD_KINDS.values()):
        model.embedding.weight.data[to_ids(words), i] += 5
    found = visualizations.map_words(model)
    assert [len(points) for points in found.points.values()] == [9, 10, 8]
    assert found.neighbours_here == found.neighbours_in_full == 1 and found.variance_shown > 0.8
    assert visualizations.map_words(models["decoder_only"]).neighbours_in_full < 0.7


def test_influence_is_the_derivative(models):
    model, step = decoder_only.build_model(**TINY).cpu().double(), 1e-6
    table = model.positional_encoding
    table.table = table.table.double()
    found = visualizations.influence(model.float(), 42).weights
    model.double()
    ids = torch.tensor([toy_dataset.decoder_only_example(42)["ids"]])
    x = model.embedding(ids).detach()
    squares = torch.zeros(ids.size(1), ids.size(1))
    for s in range(ids.size(1)):
        for c in range(x.size(2)):
            moved = x.clone()
            moved[0, s, c] += step
            outputs = []
            for value in (x, moved):
                hook = model.embedding.register_forward_hook(lambda *_, value=value: value)
                outputs.append(model(ids)[0].detach())
                hook.remove()
            squares[:, s] += ((outputs[1] - outputs[0]) / step).square().sum(dim=1).float()
    torch.testing.assert_close(found, squares.sqrt(), atol=1e-3, rtol=1e-2)


def test_influence_is_exactly_0_where_a_model_may_not_look_and_nowhere_else(models):
    encoder, decoder, both = (visualizations.influence(models[name], 512) for name in MODULES)
    assert (encoder.weights > 0).all()
    assert torch.equal(decoder.weights > 0, torch.ones(8, 8).tril().bool())
    assert both.columns == "5 1 2 <EOS> <SOS> five hundred twelve".split() and both.rows == both.columns[4:]
    assert (both.weights[:, :4] > 0).all() and torch.equal(both.weights[:, 4:] > 0, torch.ones(4, 4).tril().bool())


def test_texts_of_a_beam_are_merged_where_they_begin_alike_and_the_best_is_a_straight_line():
    texts = ["a b c".split(), "a d".split(), "e c".split(), "a b".split()]
    assert visualizations.group_by_beginning(texts) == [texts[0], texts[3], texts[1], texts[2]]
    rows = visualizations.place_in_tree(texts)
    assert [rows[tuple(texts[0][:n])] for n in range(4)] == [0, 0, 0, 0]
    assert rows["a", "d"] == 2 and rows["e",] == rows["e", "c"] == 3


def test_a_hypothesis_has_the_probability_that_the_model_gives_to_its_words(models):
    model = models["encoder_decoder"]
    found = visualizations.beam_hypotheses(model, 42)
    assert len(found) == encoder_decoder.BEAM_WIDTH
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
    for words, score, probability in found:
        source = torch.tensor([encoder_decoder.make_source(42)])
        log_probs = model(source, torch.tensor([to_ids(["<SOS>", *words[:-1]])]))[0].log_softmax(-1)
        log_prob = sum(log_probs[i, token].item() for i, token in enumerate(to_ids(words)))
        assert score == pytest.approx(log_prob / len(words), abs=1e-4)
        assert probability == pytest.approx(math.exp(log_prob), rel=1e-2)


# --- where the numbers come from ---


def test_what_was_compared_is_drawn_as_it_was_measured(figures):
    shown = {name: " ".join(" ".join(texts_in(figures[name])).split()) for name in
             ("training_curves", "kv_cache", "comparison_matrix", "causal_wall")}
    assert "right, in 100, 100 and 100 steps" in shown["training_curves"]
    assert "at 512 tokens a new one costs 1.1 ms instead of 20.0" in shown["kv_cache"]
    matrix = shown["comparison_matrix"]
    assert matrix.count("90%") == 3 + 1 and matrix.count("20%") == 6 + 1  # and each once in the title
    assert shown["comparison_matrix"].count("12 ms, 12 passes") == 9
    assert all(share in shown["causal_wall"] for share in ("at 33%", "33.1%", "99.0%", "100.0%", "98.0%"))
    bars = [bar.get_height() for bar in figures["causal_wall"].axes[0].patches]
    assert bars == [0.331, 0.99, 1.0, 0.98]


def test_a_comparison_is_used_only_if_it_belongs_to_todays_constants(monkeypatch, tmp_path):
    path = tmp_path / "comparison.json"
    monkeypatch.setattr(compare_architectures, "COMPARISON", path)
    assert visualizations.load_comparison() is None
    constants = {"D_MODEL": compare_architectures.D_MODEL, "toy_dataset.SEED": toy_dataset.SEED}
    for text, fits in ((json.dumps({"constants": constants}), True), ("{\"constants\": {", False), ("{}", False),
                       (json.dumps({"constants": constants | {"D_MODEL": 7}}), False),
                       (json.dumps({"constants": constants | {"toy_dataset.SEED": 7}}), False)):
        path.write_text(text)
        assert (visualizations.load_comparison() is not None) == fits, text


def test_the_committed_measurements_have_what_the_pictures_draw(comparison):
    if not compare_architectures.COMPARISON.exists():
        pytest.skip("no figures/comparison.json: python compare_architectures.py writes it")
    found = json.loads(compare_architectures.COMPARISON.read_text())
    for cell, made_up in zip(found["cells"], comparison["cells"]):
        assert set(made_up) <= set(cell)
        assert [cell[key] for key in ("architecture", "work", "natural")] == [
            made_up[key] for key in ("architecture", "work", "natural")]
    assert set(comparison["wall"]) <= set(found["wall"]) and set(comparison["kv_cache"]) <= set(found["kv_cache"])
    for draw in (visualizations.draw_training_curves, visualizations.draw_kv_cache,
                 visualizations.draw_comparison_matrix, visualizations.draw_causal_wall):
        assert draw(found).get_suptitle().count("\n") <= 1


def test_checkpoints_are_used_where_they_fit_and_others_are_not_touched(models, monkeypatch, tmp_path):
    for module in MODULES.values():
        monkeypatch.setattr(module, "CHECKPOINT", tmp_path / f"{module.__name__}.pt")
        defaults = list(module.load.__defaults__)
        monkeypatch.setattr(module.load, "__defaults__", (module.CHECKPOINT, *defaults[1:]))
    decoder = decoder_only.build_model()
    decoder_only.save(decoder, decoder_only.CHECKPOINT)
    encoder_decoder.save(models["encoder_decoder"], encoder_decoder.CHECKPOINT)  # of other sizes
    before = encoder_decoder.CHECKPOINT.read_bytes()
    found = visualizations.load_models()
    assert found["encoder_only"] is found["encoder_decoder"] is None
    assert torch.equal(found["decoder_only"].embedding.weight, decoder.embedding.weight.cpu())
    assert encoder_decoder.CHECKPOINT.read_bytes() == before


@pytest.fixture(scope="module")
def small_copy(tmp_path_factory, comparison):
    """The repository's scripts in a folder of their own, with small models, and no checkpoints."""
    folder = tmp_path_factory.mktemp("copy")
    small = {"D_MODEL": 32, "NUM_LAYERS": 1, "D_FF": 64, "NUM_TRAIN": 300, "NUM_TEST": 400, "EARLY_STEPS": 4,
             "DEPTH": 3, "DEEP_STEPS": 3}
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        for name, value in small.items():
            source = re.sub(rf"^{name} = [\d_]+", f"{name} = {value}", source, flags=re.MULTILINE)
        (folder / path.name).write_text(source)
    (folder / "figures").mkdir()
    (folder / "figures" / "comparison.json").write_text(json.dumps(comparison | {"constants": {}}))
    return folder


def run_script(folder, *arguments):
    """As in a terminal without a screen that knows ASCII only."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")}
    return subprocess.run([sys.executable, "visualizations.py", *arguments], cwd=folder, capture_output=True, text=True,
                          env=environment | {"LC_ALL": "C", "PYTHONUTF8": "0"})


def test_the_script_trains_what_is_missing_writes_all_and_says_what_to_see(small_copy):
    done = run_script(small_copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and max(map(len, done.stdout.splitlines())) <= 100
    assert done.stdout.count("no checkpoint that fits") == 3 and "100%" in done.stderr  # the progress bar
    for name in PROMISED:
        assert re.search(rf"^figures/{name}\.png\n    \S", done.stdout, re.MULTILINE), name
        assert (small_copy / "figures" / f"{name}.png").stat().st_size > 10_000
    assert not (small_copy / "checkpoints").exists()  # what is trained for pictures is not saved as a model


def test_a_mistake_gets_one_sentence(small_copy):
    wrong = run_script(small_copy, "figures")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "takes no arguments" in wrong.stderr
    (small_copy / "blocked").write_text("a file where the folder should be")
    source = small_copy / "visualizations.py"
    source.write_text(source.read_text().replace('"figures"', '"blocked"'))
    blocked = run_script(small_copy)
    assert blocked.returncode == 1 and len(blocked.stderr.splitlines()) == 1 and "blocked" in blocked.stderr


def test_the_accuracy_in_the_corner_is_measured_on_numbers_of_the_test(models):
    loaders = decoder_only.create_dataloaders()
    found = visualizations.measure(decoder_only, models["decoder_only"], loaders.test)
    assert found.accuracy == 0 and "2,000 numbers" in found.note  # it is untrained
    assert loaders.test.dataset.numbers[0] not in toy_dataset.make_splits().train


def test_shown_numbers_are_held_out():
    assert visualizations.NUMBER not in toy_dataset.make_splits().train
    assert visualizations.SHORT_NUMBER not in toy_dataset.make_splits().train


def test_percentages_say_what_they_must():
    shares = {0.0: "0%", 1.0: "100%", 0.736: "74%", 0.9981: "99.81%", 0.00004: "<0.01%", 0.0123: "1.23%",
              0.99999: ">99.99%"}
    assert {share: visualizations.percent(share) for share in shares} == shares
