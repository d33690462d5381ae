"""The pictures: each is written, whole and readable, and the numbers in it are right (numbers, not pixels)."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
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
from toy_dataset import to_ids  # noqa: E402

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


@pytest.fixture(scope="session")
def models():
    """Untrained: what is computed for a picture must be right whatever the weights."""
    torch.manual_seed(0)
    return {name: module.build_model(**TINY).cpu().eval() for name, module in MODULES.items()}


@pytest.fixture(scope="session")
def trained(models):
    return {name: visualizations.Trained(model, 0.5, "Held-out accuracy: 50%.") for name, model in models.items()}


@pytest.fixture(scope="session")
def flow():
    return visualizations.gradient_flow(num_steps=2, depth=3, progress=SILENT)


@pytest.fixture(scope="session")
def comparison():
    """Made-up measurements, in the form in which compare_architectures.py writes them."""
    history = [{"step": step, "loss": 4 / step} | ({"exact_match": step / 100} if step % 50 == 0 else {})
               for step in range(10, 101, 10)]
    cells = [{"architecture": cell.module.__name__, "task": cell.task, "native": cell.native, "history": history,
              "sequence_accuracy": 0.9 if cell.native else 0.2,
              "by_seed": {"sequence_accuracy": [0.85, 0.95] if cell.native else [0.15, 0.25]},
              "ms_per_answer": 12.34, "forward_passes": 11.8}
             for cell in compare_architectures.CELLS]
    wall = {"ceiling": 1 / 3, "causal": 0.331, "after_reading": 0.99, "bidirectional": 1.0, "encoder_decoder": 0.98}
    return {"cells": cells, "wall": wall,
            "kv_cache": {"lengths": [64, 512], "cached_ms": [1.0, 1.1], "recomputed_ms": [2.0, 20.0]}}


@pytest.fixture(scope="session")
def early(trained, trained_encoder_decoder):
    """Undertrained models; the encoder-decoder has learned enough for its searches to differ."""
    return {"decoder_only": trained["decoder_only"],
            "encoder_decoder": visualizations.Trained(trained_encoder_decoder.cpu(), 0.5, "Held-out accuracy: 50%.")}


@pytest.fixture(scope="session")
def drawn(trained, early, flow, comparison, tmp_path_factory):
    """All figures, and the files that they were saved to at once: drawing a figure again moves its parts a little."""
    figures = dict(visualizations.draw_all(trained, early, flow, comparison))
    folder = tmp_path_factory.mktemp("figures")
    return figures, {name: visualizations.save(figure, name, folder) for name, figure in figures.items()}


@pytest.fixture(scope="session")
def figures(drawn):
    return drawn[0]


@pytest.fixture(scope="session")
def files(drawn):
    return drawn[1]


# --- the files ---


def test_exactly_the_promised_pictures_are_drawn(figures):
    assert sorted(figures) == sorted(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_a_picture_is_a_small_png_of_the_promised_size_and_not_blank(figures, files, name):
    data = files[name].read_bytes()
    assert files[name].name == f"{name}.png" and data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 770 and 400 <= height <= 1100
    assert height == pytest.approx(figures[name].get_figheight() * 110, abs=1)
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
        assert "information flow, not reasoning" in " ".join(figures[name].get_supxlabel().split())


def test_the_same_models_give_the_same_bytes(files, trained, early, flow, comparison, tmp_path):
    for name, figure in visualizations.draw_all(trained, early, flow, comparison):
        assert visualizations.save(figure, name, tmp_path).read_bytes() == files[name].read_bytes(), name


# --- numbers that need no training ---


def lines_of(axes) -> dict:
    """What a reader takes from a line chart: label -> the y values of its line."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}


def test_the_similarity_of_two_positions_depends_on_their_distance_alone_and_is_largest_at_distance_0():
    figure = visualizations.draw_positional_encoding(encoder_only.PositionalEncoding(32, 64).table)
    drawn = lines_of(figure.axes[1])
    from_16, from_40 = (torch.tensor(drawn[f"with position {position}"]) for position in (16, 40))
    assert from_16.argmax() == 16 and from_16[16].item() == pytest.approx(1)
    torch.testing.assert_close(from_16[:40], from_40[24:], atol=1e-5, rtol=0)
    title = " ".join(figure.get_suptitle().split())
    assert f"{from_16[17]:.2f} at distance 1, {from_16[0]:.2f} at distance 16" in title


def test_the_masks_hide_padding_and_the_future(figures):
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
    for axes, (name, (mask, _, _)) in zip(figures["masks"].axes, masks.items()):
        assert axes.get_title("left") == name and axes.yaxis_inverted()  # the first row on top
        assert torch.equal(torch.tensor(axes.collections[0].get_array()) > 0, mask)


def labels_on(axis) -> list[str]:
    return [" ".join(label.get_text().split()) for label in axis.get_ticklabels()]


def test_the_largest_weight_grows_toward_1_only_without_the_scale():
    raw, scaled = visualizations.largest_weights([4, 64, 1024])
    assert raw[0] < raw[1] < raw[2] and raw[2] > 0.9
    assert max(scaled) - min(scaled) < 0.05 and max(scaled) < 0.4
    generator = torch.Generator().manual_seed(visualizations.SEED)
    query, key = (torch.randn(n, 4, generator=generator) for n in (256, 16))
    assert raw[0] == pytest.approx((query @ key.T).softmax(-1).amax(-1).mean().item(), abs=1e-5)
    assert scaled[0] == pytest.approx((query @ key.T / 2).softmax(-1).amax(-1).mean().item(), abs=1e-5)


def test_a_line_is_labeled_with_what_it_shows():
    figure = visualizations.draw_softmax_scaling([4, 16], [0.5, 0.9], [0.2, 0.25])
    assert lines_of(figure.axes[0]) == {"softmax(q k)": [0.5, 0.9], "softmax(q k / sqrt(d_k))": [0.2, 0.25]}
    assert "90% without 1/sqrt(d_k), 25% with it" in " ".join(figure.get_suptitle().split())
    assert set(figure.axes[0].lines[-1].get_ydata()) == {1 / visualizations.NUM_KEYS}  # all keys equal
    cache = {"lengths": [8, 64], "cached_ms": [1.0, 2.0], "recomputed_ms": [3.0, 40.0]}
    figure = visualizations.draw_kv_cache({"kv_cache": cache})
    assert lines_of(figure.axes[0]) == {"with the KV cache": [1.0, 2.0], "without cache (recomputed)": [3.0, 40.0]}
    assert ("At 64 tokens, one more takes 2.0 ms with the KV cache, 40.0 ms without; at 8, 1.0 and 3.0 ms"
            == " ".join(figure.get_suptitle().split()))


def test_the_learning_rates_are_those_of_each_files_own_training():
    figure = visualizations.draw_learning_rate_schedule()
    drawn = lines_of(figure.axes[0])
    for name, module in MODULES.items():
        num_steps = module.NUM_EPOCHS * len(module.create_dataloaders().train)
        rates = drawn[visualizations.NAMES[name]]
        assert len(rates) == num_steps and max(rates) == pytest.approx(module.LEARNING_RATE, rel=1e-3)
        assert rates[num_steps // 2] == module.learning_rate_at(num_steps // 2, num_steps)
        assert f"{rates.index(max(rates)) + 1} " in figure.get_suptitle()


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_is_counted_once_and_the_diagram_shows_the_same_numbers(models, name):
    model = models[name]
    counts = compare_architectures.count_parameters(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert (counts["cross-attention"] > 0) == (name == "encoder_decoder")
    drawn = dict.fromkeys(counts, 0)
    stacks = {"encoder_only": [0], "decoder_only": [1], "encoder_decoder": [2, 3]}[name]
    boxes = [text for text in visualizations.draw_architectures(models).axes[0].texts if text.get_ha() == "center"]
    for stack in stacks:
        column = [text for text in boxes if stack <= text.get_position()[0] / visualizations.COLUMN < stack + 1]
        column = [text.get_text() for text in sorted(column, key=lambda text: -text.get_position()[1])]
        heads = [i for i, text in enumerate(column) if text in counts]
        for i in heads:  # a box: its name, further lines, and last its number of parameters
            number = next(text for text in column[i:] if text.replace(",", "").isdigit())
            drawn[column[i]] += TINY["num_layers"] * int(number.replace(",", ""))
    for component in ("self-attention", "cross-attention", "feed-forward"):
        assert drawn[component] == counts[component]
    labels = texts_in(visualizations.draw_model_complexity(models))
    share = visualizations.percent(counts["feed-forward"] / sum(counts.values()))
    assert f"{counts['feed-forward']:,} ({share})" in labels and f"{sum(counts.values()):,}" in labels


def test_each_bar_of_the_parameter_counts_belongs_to_the_model_and_component_beside_it(figures, models):
    axes = figures["model_complexity"].axes[0]
    for bars, (name, color) in zip(axes.containers, visualizations.COLORS.items()):
        counts = compare_architectures.count_parameters(models[name])
        counts["total"] = sum(counts.values())
        assert [bar.get_width() for bar in bars] == [counts[label] for label in labels_on(axes.yaxis)]
        assert bars.get_label() == visualizations.NAMES[name]
        assert matplotlib.colors.same_color(bars[0].get_facecolor(), color)


def texts_in(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_changing_a_constant_changes_the_diagram(models):
    before = texts_in(visualizations.draw_architectures(models))
    other = decoder_only.build_model(**TINY | {"num_layers": 3, "num_heads": 2, "d_ff": 96}).cpu()
    after = texts_in(visualizations.draw_architectures(models | {"decoder_only": other}))
    assert before.count("2 layers") == 4 and after.count("2 layers") == 3 and "3 layers" in after
    assert "2 heads of 16" not in before and "2 heads of 16" in after
    assert "d_ff = 96" not in before and "d_ff = 96" in after


def test_the_diagram_states_each_attentions_reach_as_measured_in_the_models(models):
    texts = texts_in(visualizations.draw_architectures(models))
    assert (texts.count("bidirectional"), texts.count("causal"), texts.count("over the source")) == (2, 2, 1)


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


def test_the_title_on_gradients_compares_the_first_layer_with_the_last_after_training():
    found = {("pre-norm", 0): [1.0, 1.0], ("pre-norm", 9): [6.0, 4.0], ("post-norm", 0): [1.0, 1.0],
             ("post-norm", 9): [0.5, 20.0]}
    figure = visualizations.draw_gradient_flow(found)
    assert (" ".join(figure.get_suptitle().split()) == "Layer 1's gradient after 9 steps, relative to layer 2's: "
            "1/40 with post-norm, 1.5 times with pre-norm")
    assert lines_of(figure.axes[0]) == {f"{name}, " + (f"after {steps} steps" if steps else "untrained"): norms
                                        for (name, steps), norms in found.items()}


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
        assert {kind: (" ".join(rows), " ".join(columns)) for kind, (rows, columns, _) in found.items()} == kinds
        for rows, columns, weights in found.values():
            assert weights.shape == (2, 4, len(rows), len(columns))
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, len(rows)))
    assert visualizations.attention_maps(models["decoder_only"], 512)["layers"][2].triu(1).abs().max() == 0


def boxed_cells(axes) -> set:
    """(row, column) of each frame drawn on a map; hatched cells have no line."""
    frames = [patch for patch in axes.patches if patch.get_linewidth() > 0]
    return {(round(frame.get_y()), round(frame.get_x())) for frame in frames}


def test_cross_attention_is_that_shown_by_the_models_own_file(models, trained):
    _, _, weights = visualizations.attention_maps(models["encoder_decoder"], 90210)["cross"]
    own = encoder_decoder.cross_attention(models["encoder_decoder"], 90210)
    torch.testing.assert_close(weights.mean(dim=(0, 1)), own)
    figure = visualizations.draw_cross_attention(trained["encoder_decoder"], 90210)
    # ninety {9 0}, thousand {9 0}, two {2}, hundred {2}, ten {1 0}; <EOS> has no digits
    boxes = {(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (3, 2), (4, 3), (4, 4)}
    assert boxed_cells(figure.axes[0]) == boxes
    shown = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert shown == {(j + 0.5, i + 0.5): f"{own[i, j]:.0%}" for i in range(own.size(0)) for j in range(own.size(1))}
    share = sum(own[cell].item() for cell in boxes) / 5
    assert f"puts {visualizations.percent(share)} of its weight" in " ".join(figure.get_suptitle().split())
    assert "Uniform attention: 27%" in " ".join(figure.get_supxlabel().split())  # 8 boxes / 5 rows / 6 columns


def test_the_best_head_stands_out_and_is_the_one_with_the_largest_share(trained):
    figure = visualizations.draw_attention_encoder(trained["encoder_only"], 512)
    pairs = visualizations.digit_word_pairs(512)
    _, _, weights = visualizations.attention_maps(trained["encoder_only"].model, 512)["layers"]
    shares = {f"layer {layer + 1}, head {head + 1}": visualizations.share_on_cells(weights[layer, head], pairs).item()
              for layer in range(2) for head in range(4)}
    best = max(shares, key=shares.get)
    titles = [axes.title if axes.title.get_text() else axes._left_title for axes in figure.axes]
    assert [title.get_text() for title in titles if title.get_fontweight() == "bold" and title.get_text()] == [best]
    assert f"best head puts {visualizations.percent(shares[best])}" in " ".join(figure.get_suptitle().split())
    assert all(boxed_cells(axes) == set(pairs) for axes in figure.axes[:8])


def test_the_boxes_of_the_encoders_picture_join_digits_and_their_words():
    tokens = "<CLS> 5 1 2 <SEP> five hundred twelve <SEP>".split()
    pairs = {(tokens[row], tokens[column]) for row, column in visualizations.digit_word_pairs(512)}
    half = {("5", "five"), ("5", "hundred"), ("1", "twelve"), ("2", "twelve")}
    assert pairs == half | {(word, digit) for digit, word in half}


def test_the_share_on_cells_counts_their_rows_alone():
    weights = torch.tensor([[0.2, 0.8, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    assert visualizations.share_on_cells(weights, [(0, 0), (0, 1), (1, 2)]).item() == pytest.approx(1.5 / 2)
    assert visualizations.share_on_cells(weights.expand(2, 4, 3, 3), [(0, 1)]).shape == (2, 4)


def test_each_strategy_keeps_what_it_promises(models):
    prompt = "<SOS> 9 0 2 1 0 <SEP> ninety thousand two hundred".split()
    found = visualizations.next_token_distributions(models["decoder_only"], prompt)
    learned = found["temperature 1"]
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


def test_each_panel_of_the_strategies_holds_all_of_the_probability_and_an_outline_of_the_models_own(trained):
    figure = visualizations.draw_sampling_strategies(trained["decoder_only"], 90210)
    prompt = "<SOS> 9 0 2 1 0 <SEP> ninety thousand two hundred".split()
    found = visualizations.next_token_distributions(trained["decoder_only"].model, prompt)
    own = found["temperature 1"].topk(7).values.tolist()
    for axes, (name, probabilities) in zip(figure.axes, found.items()):
        widths = [bar.get_width() for bar in axes.patches]
        assert axes.get_title("left") == name and len(widths) == 16
        assert [sum(widths[:8]), sum(widths[8:])] == pytest.approx([1, 1], abs=1e-5)
        assert widths[0] == pytest.approx(probabilities.max().item()) and widths[8:15] == pytest.approx(own)
    words = toy_dataset.to_tokens(found["temperature 1"].topk(7).indices.tolist())
    labels = figure.axes[0].get_yticklabels()
    assert labels_on(figure.axes[0].yaxis) == [*words, "all others"] and figure.axes[0].yaxis_inverted()
    assert {label.get_text() for label in labels if label.get_fontweight() == "bold"} == {"ten"} & set(words)
    kept = (found["top-p 0.9"] > 0).sum().item()
    assert f"3 candidates and top-p 0.9 leaves {kept}" in " ".join(figure.get_suptitle().split())


def test_pca_finds_the_directions_of_planted_data():
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(200, 2, generator=generator) * torch.tensor([3.0, 1.0])
    directions = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    points, shares = visualizations.principal_components(coordinates @ directions + 7)
    centered = coordinates - coordinates.mean(dim=0)
    assert shares.sum().item() == pytest.approx(1)
    assert shares[0].item() == pytest.approx((points[:, 0].square().sum() / centered.square().sum()).item(), rel=1e-4)
    assert torch.corrcoef(torch.stack([points[:, 0].float(), coordinates[:, 0]]))[0, 1].abs() > 0.99
    distances = torch.cdist(points, points).float()
    torch.testing.assert_close(distances, torch.cdist(centered, centered), atol=1e-2, rtol=1e-3)
    assert (points.gather(0, points.abs().argmax(dim=0, keepdim=True)) > 0).all()  # the sign convention


def test_the_word_map_sees_planted_kinds_and_reports_when_there_are_none(models, figures):
    model = decoder_only.build_model(**TINY).cpu()
    for i, words in enumerate(visualizations.WORD_KINDS.values()):
        model.embedding.weight.data[to_ids(words), i] += 5
    figure = visualizations.draw_token_embeddings(visualizations.Trained(model, 1.0, ""))
    assert [len(points.get_offsets()) for points in figure.axes[0].collections] == [9, 10, 8]
    title = " ".join(figure.get_suptitle().split())
    assert title == "100% of the words are nearest to one of their own kind in this plane, 100% in all 32 dimensions"
    labels = figure.axes[0].get_xlabel() + figure.axes[0].get_ylabel()  # each component, and its share of the variance
    assert sum(int(share) for share in re.findall(r"(\d+)%", labels)) > 80
    note = " ".join(figure.get_supxlabel().split())
    assert "Random groups of these sizes: 31%" in note  # (9 * 8 + 10 * 9 + 8 * 7) / (27 * 26)
    words = [word for kind in visualizations.WORD_KINDS.values() for word in kind]
    vectors = models["decoder_only"].embedding.weight[to_ids(words)]
    kinds = torch.tensor([0] * 9 + [1] * 10 + [2] * 8)
    assert visualizations.share_beside_own_kind(vectors, kinds) < 0.7
    plane, full = (visualizations.percent(visualizations.share_beside_own_kind(x, kinds))
                   for x in (visualizations.principal_components(vectors)[0], vectors))
    title = " ".join(figures["token_embeddings"].get_suptitle().split())
    assert plane != full and title.startswith(f"{plane} of") and f"{full} in all" in title


def test_the_nearest_neighbor_is_another_word():
    vectors, kinds = torch.tensor([[0.0], [1.0], [5.0], [5.5]]), torch.tensor([0, 0, 1, 0])
    assert visualizations.share_beside_own_kind(vectors, kinds) == 0.5


def test_influence_is_the_derivative(models):
    model, step = decoder_only.build_model(**TINY).cpu().double(), 1e-6
    table = model.positional_encoding
    table.table = table.table.double()
    _, _, found = visualizations.influence(model.float(), 42)
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


def test_influence_is_exactly_0_where_the_masks_leave_no_path_and_nowhere_else(models, figures):
    encoder, decoder, both = (visualizations.influence(models[name], 512) for name in MODULES)
    assert (encoder[2] > 0).all()
    assert torch.equal(decoder[2] > 0, torch.ones(8, 8).tril().bool())
    assert both[1] == "5 1 2 <EOS> <SOS> five hundred twelve".split() and both[0] == both[1][4:]
    assert (both[2][:, :4] > 0).all() and torch.equal(both[2][:, 4:] > 0, torch.ones(4, 4).tril().bool())
    hatched = [sum(bool(patch.get_hatch()) for patch in axes.patches) for axes in figures["influence"].axes[:3]]
    assert hatched == [0, 28, 6]
    for axes, (_, _, norms) in zip(figures["influence"].axes, (encoder, decoder, both)):
        shown = torch.tensor(axes.collections[0].get_array())
        torch.testing.assert_close(shown, norms / norms.amax(dim=1, keepdim=True))
    assert set(figures["influence"].axes[2].lines[0].get_xdata()) == {4}  # after <EOS>
    assert "decoder-only 28 of 28 cells, encoder-only 0 of 36" in " ".join(figures["influence"].get_suptitle().split())


def test_beam_search_step_by_step_is_the_beam_search_of_the_models_own_file(early):
    model = early["encoder_decoder"].model
    for number in (342, 90210, 605112):
        texts, scores = encoder_decoder.beam_search(model, [encoder_decoder.make_source(number)], 3)
        steps = visualizations.beam_steps(model, number, 3, texts.size(2))
        assert scores[0, 0] > -math.inf
        for ids, score in zip(texts[0, scores[0] > -math.inf].tolist(), scores[0].tolist()):
            words = tuple(toy_dataset.to_tokens(ids))
            assert steps[len(words) - 1][words] / len(words) == pytest.approx(score, abs=1e-4)
        for step, following in zip(steps, steps[1:]):
            unfinished = [text for text in step if text[-1] != "<EOS>"]
            assert len(unfinished) == 3 and all(text[:-1] in unfinished for text in following)
            assert list(step.values()) == sorted(step.values(), reverse=True)


def test_the_searches_compared_are_those_of_the_models_own_file_and_the_example_is_a_race(early):
    model, numbers = early["encoder_decoder"].model, toy_dataset.make_splits().test[:300]
    example, shares = visualizations.compare_searches(model, numbers)
    sources = [encoder_decoder.make_source(number) for number in numbers]
    found = {"greedy": encoder_decoder.generate(model, sources, temperature=0.0),
             "beam": encoder_decoder.beam_search(model, sources, visualizations.BEAM_WIDTH)[0][:, 0]}
    for share, (name, ids) in zip(shares, found.items()):
        names = [encoder_decoder.to_words(row) for row in ids]
        correct = [" ".join(toy_dataset.number_to_words(number)) for number in numbers]
        assert share == pytest.approx(sum(a == b for a, b in zip(names, correct)) / 300)
        assert " ".join(example[name]).removesuffix(" <EOS>") == names[numbers.index(example["number"])]
    greedy, beam, steps, behind = (example[key] for key in ("greedy", "beam", "steps", "behind"))
    assert greedy != beam == (*toy_dataset.number_to_words(example["number"]), "<EOS>")
    for length, step in enumerate(steps[:behind], start=1):
        assert step[greedy[:length]] >= step[beam[:length]]
    assert steps[behind][beam[: behind + 1]] > steps[behind].get(greedy[: behind + 1], -math.inf)
    source = torch.tensor([encoder_decoder.make_source(example["number"])])
    probabilities = []
    for words in (beam, greedy):
        logits = model(source, torch.tensor([to_ids(["<SOS>", *words[:-1]])]))[0]
        chosen = logits.log_softmax(-1)[range(len(words)), to_ids(list(words))]
        probabilities.append(chosen.sum().exp().item())
    assert example["ratio"] == pytest.approx(probabilities[0] / probabilities[1], rel=1e-3) and example["ratio"] > 1


def test_the_tree_marks_both_searches_and_where_one_overtakes_the_other(monkeypatch):
    steps = [{("a",): 0.6, ("b",): 0.4}, {("b", "c"): 0.39, ("a", "c"): 0.2}, {("b", "c", "<EOS>"): 0.3}]
    steps = [{text: math.log(p) for text, p in step.items()} for step in steps]
    example = {"number": 7, "greedy": ("a", "c", "<EOS>"), "beam": ("b", "c", "<EOS>"), "steps": steps, "ratio": 3.0,
               "behind": 1}
    monkeypatch.setattr(visualizations, "compare_searches", lambda *_: (example, [0.25, 0.5]))
    monkeypatch.setattr(visualizations, "number_to_words", lambda _: ["b", "c"])
    figure = visualizations.draw_beam_search_tree(visualizations.Trained(None, 0.5, ""), [7, 8])
    axes = figure.axes[0]
    assert (" ".join(figure.get_suptitle().split()) == "For 7, beam search's text overtakes greedy search's in step 2 "
            "and ends 3.0 times as probable")
    assert "on 2 numbers: greedy 25%, beam search (width 4) 50%" in " ".join(figure.get_supxlabel().split())
    boxes = {text.get_text(): text for text in axes.texts}
    assert set(boxes) == {"7", "a\n60%", "b\n40%", "c\n39%", "c\n20%", "<EOS>\n30%", "overtakes"}
    assert boxes["overtakes"].get_position()[0] == boxes["c\n39%"].get_position()[0] == 2
    assert boxes["b\n40%"].get_position() == (1, 1) and boxes["c\n39%"].get_position() == (2, 0)  # row 0 is on top
    colors = {line.get_label(): line.get_color() for line in axes.lines}
    assert [label for label in colors if not label.startswith("_")] == [
        "beam search (correct)", "greedy (wrong)", "also kept"]
    paths = {(tuple(line.get_xdata()), tuple(line.get_ydata())): line.get_color() for line in axes.lines}
    assert paths[(0, 1), (0, 1)] == paths[(1, 2), (1, 0)] == paths[(2, 3), (0, 0)] == colors["beam search (correct)"]
    assert paths[(0, 1), (0, 0)] == paths[(1, 2), (0, 1)] == colors["greedy (wrong)"]


# --- where the numbers come from ---


def history(*accuracies) -> list[dict]:
    """A loss at every step, and an accuracy at every second one."""
    return [{"step": step, "loss": 1.0} | ({"exact_match": accuracies[step // 2 - 1]} if step % 2 == 0 else {})
            for step in range(1, 2 * len(accuracies) + 1)]


def test_an_accuracy_that_falls_back_has_not_been_reached_for_good():
    for accuracies, step in (((0.1, 1.0, 0.7, 0.995, 1.0), 8), ((0.99, 1.0), 2), ((0.5, 1.0, 0.98), None),
                             ((0.2,), None)):
        assert visualizations.stays_above(history(*accuracies)) == step, accuracies


def test_training_curves_circle_where_99_percent_is_kept_and_name_who_never_reaches_it(comparison):
    def draw(*accuracies):
        cells = [cell | {"history": history(*accuracies[list(MODULES).index(cell["architecture"])])}
                 for cell in comparison["cells"]]
        return visualizations.draw_training_curves({"cells": cells})

    figure = draw((1.0, 0.7, 1.0, 1.0), (0.2, 0.99, 1.0, 1.0), (0.2, 0.3, 0.4, 1.0))
    title = " ".join(figure.get_suptitle().split())
    assert title == "From step 8 on, held-out exact match stays at 99% or more for all three"
    circles = {line.get_color(): line.get_xdata()[0] for line in figure.axes[1].lines if len(line.get_xdata()) == 1}
    assert circles == dict(zip(visualizations.COLORS.values(), (6, 4, 8)))
    assert [text.get_text() for text in figure.axes[1].texts] == ["6", "4", "8"]
    curves = {line.get_color(): list(line.get_ydata()) for line in figure.axes[1].lines if len(line.get_ydata()) == 4}
    assert [curves[color][1] for color in visualizations.COLORS.values()] == [0.7, 0.99, 0.3]
    figure = draw((1.0, 0.7, 1.0, 0.9), (0.2, 0.99, 1.0, 1.0), (0.2, 0.3, 0.4, 0.5))
    title = " ".join(figure.get_suptitle().split())
    assert title == "Held-out exact match does not settle at 99% or more in this run: encoder-only, encoder-decoder"
    assert list(lines_of(figure.axes[0])) == list(visualizations.NAMES.values())


def test_what_was_compared_is_drawn_as_it_was_measured(figures):
    shown = {name: " ".join(" ".join(texts_in(figures[name])).split()) for name in ("comparison_matrix", "causal_wall")}
    matrix = shown["comparison_matrix"]
    assert matrix.count("90.0%") == 3 + 1 and matrix.count("20.0%") == 6  # once in the title
    assert "at least 90.0% accurate" in matrix and "falls to 20%" in matrix
    assert matrix.count("85.0 to 95.0") == 3 and matrix.count("15.0 to 25.0") == 6
    assert shown["comparison_matrix"].count("12 ms, 12 passes") == 9
    assert all(share in shown["causal_wall"] for share in ("at most 33%", "33.1%", "99.0%", "100.0%", "98.0%"))
    axes = figures["causal_wall"].axes[0]
    bars = dict(zip(labels_on(axes.xaxis), (bar.get_height() for bar in axes.patches)))
    assert bars == {"decoder-only, while reading": 0.331, "decoder-only, after reading": 0.99, "encoder-only": 1.0,
                    "encoder- decoder": 0.98}
    assert set(axes.lines[0].get_ydata()) == {1 / 3}  # the ceiling


def test_a_cell_of_the_matrix_stands_at_its_architecture_and_task_and_native_ones_are_framed(comparison):
    cells = [cell | {"sequence_accuracy": i / 10} for i, cell in enumerate(comparison["cells"])]
    axes = visualizations.draw_comparison_matrix({"cells": cells}).axes[0]
    rows, columns = (dict(zip(map(int, axis.get_ticklocs()), labels_on(axis))) for axis in (axes.yaxis, axes.xaxis))
    shown = {text.get_text(): tuple(map(int, text.get_position())) for text in axes.texts}
    framed = {(rows[row], columns[column]) for row, column in boxed_cells(axes)}
    for i, cell in enumerate(cells):
        column, row = shown[f"{10 * i}.0%"]
        assert (rows[row], columns[column]) == (visualizations.NAMES[cell["architecture"]], cell["task"])
        assert ((rows[row], columns[column]) in framed) == cell["native"]


def test_a_comparison_is_used_only_if_it_belongs_to_todays_constants(monkeypatch, tmp_path):
    path = tmp_path / "comparison.json"
    monkeypatch.setattr(compare_architectures, "COMPARISON", path)
    assert visualizations.load_comparison() is None
    constants = compare_architectures.all_constants()
    without_one = {name: value for name, value in constants.items() if name != "D_MODEL"}
    for text, fits in ((json.dumps({"constants": constants}), True), ("{\"constants\": {", False), ("{}", False),
                       (json.dumps({"constants": constants | {"D_MODEL": 7}}), False),
                       (json.dumps({"constants": constants | {"toy_dataset.SEED": 7}}), False),
                       (json.dumps({"constants": without_one}), False)):
        path.write_text(text)
        assert (visualizations.load_comparison() is not None) == fits, text


def test_the_committed_measurements_have_what_the_pictures_draw(comparison):
    if not compare_architectures.COMPARISON.exists():
        pytest.skip("no figures/comparison.json: python compare_architectures.py writes it")
    found = json.loads(compare_architectures.COMPARISON.read_text())
    for cell, made_up in zip(found["cells"], comparison["cells"]):
        assert set(made_up) <= set(cell)
        assert [cell[key] for key in ("architecture", "task", "native")] == [
            made_up[key] for key in ("architecture", "task", "native")]
    assert set(comparison["wall"]) <= set(found["wall"]) and set(comparison["kv_cache"]) <= set(found["kv_cache"])
    for draw in (visualizations.draw_training_curves, visualizations.draw_kv_cache,
                 visualizations.draw_comparison_matrix, visualizations.draw_causal_wall):
        assert draw(found).get_suptitle().count("\n") <= 1


def test_a_fitting_checkpoint_is_used_and_otherwise_a_new_model_is_trained_and_not_saved(models, monkeypatch):
    trainings = []

    def train(model, loaders, num_epochs, num_evaluations, progress):
        trainings.append((model, num_epochs * len(loaders.train)))

    monkeypatch.setattr(decoder_only, "train", train)
    monkeypatch.setattr(decoder_only, "evaluate", lambda *_: {"exact_match": 0.25})
    monkeypatch.setattr(decoder_only, "save", None)  # calling it would raise
    monkeypatch.setattr(decoder_only, "load", lambda: models["decoder_only"])
    found = visualizations.train_and_measure(decoder_only)
    assert found.model is models["decoder_only"] and not trainings
    assert found.accuracy == 0.25 and found.note == "Held-out accuracy: 25% of 2,000 names."
    new = visualizations.train_and_measure(decoder_only, num_steps=5).model  # undertrained, whatever was saved
    assert new is not models["decoder_only"] and trainings == [(new, 5)] and not new.training

    def load():
        raise toy_dataset.InputError("of other sizes")

    monkeypatch.setattr(decoder_only, "load", load)
    new = visualizations.train_and_measure(decoder_only).model
    num_steps = visualizations.EPOCHS * len(decoder_only.create_dataloaders().train)
    assert trainings[1:] == [(new, num_steps)]


@pytest.fixture(scope="module")
def small_copy(tmp_path_factory, comparison):
    """The repository's scripts in a folder of their own, with small models, and no checkpoints."""
    folder = tmp_path_factory.mktemp("copy")
    small = {"D_MODEL": 32, "NUM_LAYERS": 1, "D_FF": 64, "NUM_TRAIN": 300, "NUM_TEST": 400, "EARLY_STEPS": 4,
             "DEPTH": 3, "DEEP_STEPS": 3, "NUM_SEARCHED": 20}
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        for name, value in small.items():
            source = re.sub(rf"^{name} = [\d_]+", f"{name} = {value}", source, flags=re.MULTILINE)
        (folder / path.name).write_text(source)
    (folder / "figures").mkdir()
    constants = {name: small.get(name.rpartition(".")[2], value)
                 for name, value in compare_architectures.all_constants().items()}
    (folder / "figures" / "comparison.json").write_text(json.dumps(comparison | {"constants": constants}))
    shutil.copy(ROOT / "figures" / "style.mplstyle", folder / "figures")
    return folder


def run_script(folder, *arguments):
    """As in an ASCII-only terminal without a display."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLBACKEND")}
    return subprocess.run([sys.executable, "visualizations.py", *arguments], cwd=folder, capture_output=True, text=True,
                          env=environment | {"LC_ALL": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"})


def test_the_script_trains_what_is_missing_writes_all_and_prints_the_titles(small_copy):
    done = run_script(small_copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and max(map(len, done.stdout.splitlines())) <= 100
    for name in visualizations.NAMES.values():
        assert f"{name}, no matching checkpoint: 100%" in done.stderr  # the progress bar
    assert compare_architectures.CELLS[0].name not in done.stderr  # the comparison was read, not measured again
    for name in PROMISED:
        assert re.search(rf"^figures/{name}\.png\n    \S", done.stdout, re.MULTILINE), name
        assert (small_copy / "figures" / f"{name}.png").stat().st_size > 10_000
    assert not (small_copy / "checkpoints").exists()  # what is trained for pictures is not saved as a model


def test_the_script_runs_on_a_gpu(accelerator, small_copy):
    comparison = small_copy / "figures" / "comparison.json"
    comparison.write_text(comparison.read_text().replace('"device": "cpu"', f'"device": "{accelerator.type}"'))
    done = run_script(small_copy)
    assert done.returncode == 0, done.stderr


def test_a_user_error_gets_one_sentence(small_copy):
    wrong = run_script(small_copy, "figures")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "takes no arguments" in wrong.stderr
    (small_copy / "blocked").write_text("a file where the folder should be")
    source = small_copy / "visualizations.py"
    source.write_text(source.read_text().replace('FIGURES = Path(__file__).parent / "figures"',
                                                 'FIGURES = Path(__file__).parent / "blocked"'))
    blocked = run_script(small_copy)
    assert blocked.returncode == 1 and len(blocked.stderr.splitlines()) == 1 and "blocked" in blocked.stderr


@pytest.mark.parametrize("name, what", [("encoder_only", "the masked tokens in 2,000 texts"),
                                        ("decoder_only", "2,000 names")])
def test_the_accuracy_in_a_note_is_measured_on_test_numbers(name, what, models, monkeypatch):
    seen, shares, module = [], {"accuracy": 0.5, "exact_match": 0.5}, MODULES[name]
    monkeypatch.setattr(module, "load", lambda: models[name])
    monkeypatch.setattr(module, "evaluate", lambda _, batches: seen.extend(batches) or shares)
    assert f"50% of {what}" in visualizations.train_and_measure(module).note
    make_example = visualizations.EXAMPLES[type(models[name])]
    expected = [make_example(number)["ids"] for number in toy_dataset.make_splits().test[:2000]]
    found = [[token for token in row if token != toy_dataset.PAD_ID] for batch in seen for row in batch["ids"].tolist()]
    assert found == expected


def test_shown_numbers_are_held_out():
    assert visualizations.NUMBER not in toy_dataset.make_splits().train
    assert visualizations.SHORT_NUMBER not in toy_dataset.make_splits().train


def test_percentages_keep_two_significant_digits_and_more_near_the_ends():
    shares = {0.0: "0%", 1.0: "100%", 0.736: "74%", 0.9981: "99.81%", 0.00004: "<0.01%", 0.0123: "1.23%",
              0.99999: ">99.99%"}
    assert {share: visualizations.percent(share) for share in shares} == shares
