"""Masking, the best possible predictor, heads, fine-tuning, filling in, mask-predict."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, tiny
from tqdm import tqdm

import encoder_only as bert
import toy_dataset
from toy_dataset import CLS_ID, IGNORE, MASK_ID, PAD_ID, SEP_ID, SPECIAL_TOKENS, VOCABULARY, InputError

TASKS = list(bert.TASKS)
FINE_TUNING_TASKS = list(bert.NUM_CLASSES)


def text_of(number):
    return torch.tensor([toy_dataset.masked_lm_example(number)["ids"]])


# --- which positions may attend to which ---


@pytest.mark.parametrize("task", TASKS)
def test_changing_any_token_changes_every_output(task):
    model, ids = tiny(bert, task=task), text_of(342)
    before = model(ids)
    for s in range(ids.size(1)):
        changed = ids.clone()
        changed[0, s] = 20 if ids[0, s] != 20 else 21
        assert (model(changed) != before).any(dim=-1).all()


@pytest.mark.parametrize("task", TASKS)
def test_padding_changes_no_real_output_and_no_pooled_output(task):
    model, ids = tiny(bert, task=task), text_of(342)
    padded = torch.cat([ids, torch.full((1, 5), PAD_ID)], dim=1)
    expected = model(ids)
    torch.testing.assert_close(model(padded)[:, : expected.size(1)], expected, atol=1e-5, rtol=1e-5)


def test_permuting_the_input_permutes_the_output_only_without_positions():
    model, ids = tiny(bert), text_of(90210)
    order = torch.randperm(ids.size(1), generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(model(ids[:, order]), model(ids)[:, order], atol=1e-3)
    model.positional_encoding.table.zero_()
    torch.testing.assert_close(model(ids[:, order]), model(ids)[:, order], atol=1e-5, rtol=1e-5)


def test_there_is_an_attention_map_for_each_layer_and_head():
    maps = []
    tiny(bert)(text_of(342), attention_maps=maps)
    assert [tuple(m.shape) for m in maps] == [(1, 4, 10, 10)] * 2


# --- masking ---


def test_of_the_chosen_tokens_80_percent_are_masked_10_random_10_unchanged():
    ids = text_of(777777).expand(20000, -1)
    corrupted, targets = bert.mask_tokens(ids, torch.Generator().manual_seed(0))
    chosen = targets != IGNORE
    words = ids >= len(SPECIAL_TOKENS)
    assert chosen.sum() / words.sum() == pytest.approx(bert.MASK_PROBABILITY, abs=0.003)
    share = [(corrupted[chosen] == MASK_ID), (corrupted[chosen] != MASK_ID) & (corrupted[chosen] != ids[chosen])]
    kept = 1 / (len(VOCABULARY) - len(SPECIAL_TOKENS))  # a random token is sometimes the right one
    assert share[0].float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert share[1].float().mean().item() == pytest.approx(0.1 * (1 - kept), abs=0.01)


def test_special_tokens_are_never_chosen_and_only_chosen_tokens_are_targets():
    ids = toy_dataset.pad_batch([toy_dataset.masked_lm_example(n) for n in (7, 342, 777777)] * 100)["ids"]
    corrupted, targets = bert.mask_tokens(ids, torch.Generator().manual_seed(0))
    special = ids < len(SPECIAL_TOKENS)
    assert (targets[special] == IGNORE).all() and corrupted[special].equal(ids[special])
    asked = targets != IGNORE
    assert targets[asked].equal(ids[asked]) and corrupted[~asked].equal(ids[~asked])
    assert (corrupted[asked] == MASK_ID).any()
    assert ((corrupted[asked] == MASK_ID) | (corrupted[asked] >= len(SPECIAL_TOKENS))).all()


def test_masking_differs_each_time_unless_a_generator_fixes_it():
    ids = text_of(777777).expand(50, -1)
    torch.manual_seed(0)
    assert not bert.mask_tokens(ids)[0].equal(bert.mask_tokens(ids)[0])
    state = torch.get_rng_state()
    first, second = (bert.mask_tokens(ids, torch.Generator().manual_seed(5))[0] for _ in range(2))
    assert first.equal(second) and torch.get_rng_state().equal(state)


def test_evaluation_masks_the_same_tokens_each_time(trained_encoder):
    loader = [toy_dataset.pad_batch([toy_dataset.masked_lm_example(n) for n in range(100, 400)])]
    found = bert.evaluate(trained_encoder, loader)
    assert found == bert.evaluate(trained_encoder, loader)
    assert 0 < found["exact_match"] < found["accuracy"] < 1


# --- the best possible predictor ---


def enumerate_texts(num_digits, num_words):
    """The texts of all numbers with this many digits and words: (N, T)."""
    first = 10 ** (num_digits - 1) if num_digits > 1 else 0
    examples = [toy_dataset.masked_lm_example(number)["ids"] for number in range(first, 10**num_digits)]
    return torch.tensor([ids for ids in examples if len(ids) == num_digits + num_words + 3])


def posterior_by_enumeration(c, j, texts):
    """P(x_j = t | c, j chosen) for each token t, by Bayes' rule in plain loops over all texts."""
    others = len(VOCABULARY) - len(SPECIAL_TOKENS)
    posterior = torch.zeros(len(VOCABULARY), dtype=torch.float64)
    for x in texts.tolist():
        p = 1.0
        for i, (seen, true) in enumerate(zip(c, x)):
            if true < len(SPECIAL_TOKENS):
                continue
            chosen = 0.15 * (0.8 if seen == MASK_ID else 0.1 / others + 0.1 * (seen == true))
            p *= chosen if i == j else chosen + 0.85 * (seen == true)
        posterior[x[j]] += p
    return posterior / posterior.sum()


@pytest.mark.parametrize("number", [0, 7, 40, 342, 600, 1010])
def test_the_best_possible_predictor_is_bayes_rule_over_all_numbers(number):
    ids, generator = text_of(number), torch.Generator().manual_seed(number)
    texts = enumerate_texts(len(str(number)), len(toy_dataset.number_to_words(number)))
    corrupted = ids.repeat(2, 1)
    while (corrupted == ids).all():  # one text as drawn, and one with most tokens replaced
        corrupted[0] = bert.mask_tokens(ids, generator)[0]
    kept = (ids < len(SPECIAL_TOKENS)) | (torch.rand(ids.shape, generator=generator) < 0.3)
    corrupted[1] = torch.where(kept, ids, 20)
    probabilities = bert.BayesOptimalPredictor()(corrupted).softmax(dim=-1)
    for row, c in zip(probabilities, corrupted.tolist()):
        for j in (ids[0] >= len(SPECIAL_TOKENS)).nonzero().flatten().tolist():
            torch.testing.assert_close(row[j].double(), posterior_by_enumeration(c, j, texts), atol=1e-4, rtol=1e-3)


def test_the_sum_over_all_numbers_counts_them():
    def count(num_digits, num_words):
        scores = torch.zeros(1, num_digits + num_words + 3, len(VOCABULARY))
        return toy_dataset.log_sum_over_numbers(scores, num_digits).exp().item()

    for num_digits in range(1, 5):
        numbers = range(10 ** (num_digits - 1) if num_digits > 1 else 0, 10**num_digits)
        for num_words, expected in Counter(len(toy_dataset.number_to_words(number)) for number in numbers).items():
            assert count(num_digits, num_words) == pytest.approx(expected, rel=1e-4)
    assert sum(count(6, num_words) for num_words in range(3, 10)) == pytest.approx(900_000, rel=1e-4)


def test_the_best_possible_predictor_is_calibrated():
    """Its confidence matches its accuracy on what mask_tokens draws, for masked targets and for visible ones."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(100_000, 1_000_000, (4000,), generator=generator).tolist()
    ids = toy_dataset.pad_batch([toy_dataset.masked_lm_example(number) for number in numbers])["ids"]
    corrupted, targets = bert.mask_tokens(ids, generator)
    confidence, best = bert.BayesOptimalPredictor()(corrupted).softmax(dim=-1).max(dim=-1)
    for asked in ((targets != IGNORE) & (corrupted == MASK_ID), (targets != IGNORE) & (corrupted != MASK_ID)):
        right = (best == targets)[asked].float()
        assert right.mean().item() == pytest.approx(confidence[asked].mean().item(), abs=3 * (0.25 / len(right)) ** 0.5)


def test_no_model_does_better_than_the_best_possible_predictor_on_the_same_masks(trained_encoder):
    loader = bert.create_dataloaders().validation
    found, best = bert.evaluate(trained_encoder, loader), bert.evaluate(bert.BayesOptimalPredictor(), loader)
    assert found["loss"] > best["loss"] and found["accuracy"] < best["accuracy"]
    assert bert.describe_floor(loader.dataset).startswith(f"{best['loss']:.3f}")


# --- fine-tuning ---


def test_half_of_the_pairs_match_and_the_others_differ_in_one_digit_or_the_order_of_two():
    numbers = toy_dataset.make_splits().validation
    matches = same_bag = 0
    for number in numbers:
        example = toy_dataset.matching_example(number)
        assert example == toy_dataset.matching_example(number)
        digits, _, words = " ".join(toy_dataset.to_tokens(example["ids"][1:-1])).partition(" <SEP> ")
        other = toy_dataset.parse_number(digits.replace(" ", ""))
        assert toy_dataset.words_to_number(words.split()) == number and example["match"] == (other == number)
        different = [pair for pair in zip(str(other), str(number)) if len(set(pair)) == 2]
        assert len(str(other)) == len(str(number)) and len(different) <= 2
        if len(different) == 2:
            assert different[0] == different[1][::-1]
        matches += example["match"]
        same_bag += len(different) == 2
    assert matches / len(numbers) == pytest.approx(0.5, abs=0.05)
    assert same_bag / (len(numbers) - matches) > 0.3


@pytest.mark.parametrize("task", FINE_TUNING_TASKS)
def test_fine_tuning_starts_from_the_pretrained_encoder_and_a_new_head(task):
    pretrained = tiny(bert)
    model = bert.build_fine_tuned(pretrained, task).eval()
    assert model.encode(text_of(342)).equal(pretrained.encode(text_of(342)))
    assert model(text_of(342)).shape[-1] == bert.NUM_CLASSES[task]


def test_fine_tuning_takes_as_many_steps_for_few_labels_as_for_many():
    pretrained = tiny(bert)
    for num_train in (10, 200, 512):
        loaders = bert.create_dataloaders(64, 0, "tagging", num_train)
        _, history = bert.fine_tune(pretrained, loaders, "tagging", 12, 1e-3, 1, tqdm(disable=True, total=1))
        assert [entry["step"] for entry in history] == list(range(1, 13))


def test_wrong_labels_are_marked_with_the_correct_ones():
    model = tiny(bert, task="matching")
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([-1e3, 1e3]))  # finds that everything matches
    for number in range(100, 120):
        said, _, truth = bert.answer(model, [number])[0].partition("\n    WRONG: ")
        assert said.endswith("-> the same number")
        assert truth == ("" if toy_dataset.matching_example(number)["match"] else "different numbers")


def test_typed_numbers_are_labeled_masks_filled_in_and_pairs_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bert, "CHECKPOINT", tmp_path / "encoder_only.pt")
    for task in TASKS:
        bert.save(bert.build_model(task=task), bert.checkpoint_of(task))
    bert.main(342, "342 <SEP> three <MASK> forty two", "342 <SEP> three hundred forty seven")
    lines = capsys.readouterr().out.splitlines()
    places, count, filled, pair = (line for line in lines if "WRONG" not in line)
    assert places.count(", ") == 2 and " word" in count and "three [" in filled
    assert pair.startswith("342 <SEP> three hundred forty seven -> ") and "number" in pair
    bert.checkpoint_of("matching").unlink()
    bert.main(342)  # needs two of the models only
    assert capsys.readouterr().out.count("342 -> ") == 2


def test_tagging_is_learned_in_seconds():
    torch.manual_seed(0)
    model = bert.build_model(**TINY | {"d_model": 64}, task="tagging")
    history = bert.train(model, bert.create_dataloaders(64, 0, "tagging"), 1, 5e-3, 1, tqdm(disable=True, total=1))
    assert history[-1]["exact_match"] > 0.9


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="'singing'"):
        bert.build_model(task="singing")


# --- filling in ---

TEXTS = ["90210 <SEP> ninety <MASK> two hundred ten", "3 <MASK> 2 <SEP> three <MASK> <MASK> two", "7 <SEP> <MASK>"]


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_all_masks_and_no_other_tokens_are_replaced_by_digits_or_words(trained_encoder, iterations):
    prompts = [bert.parse_text(text) for text in TEXTS]
    filled = bert.generate(trained_encoder, prompts, iterations)
    for prompt, ids in zip(prompts, filled.tolist()):
        assert MASK_ID not in ids and ids[len(prompt):] == [PAD_ID] * (len(ids) - len(prompt))
        for before, after in zip(prompt, ids):
            assert after == before if before != MASK_ID else after >= len(SPECIAL_TOKENS)


def test_one_round_takes_the_most_likely_token_at_each_mask(trained_encoder):
    prompt = bert.parse_text(TEXTS[1])
    logits = trained_encoder(torch.tensor([prompt]))[0]
    logits[:, : len(SPECIAL_TOKENS)] = -torch.inf
    expected = [best if before == MASK_ID else before for before, best in zip(prompt, logits.argmax(-1).tolist())]
    assert bert.generate(trained_encoder, [prompt], 1)[0].tolist() == expected


def test_each_round_keeps_the_most_confident_and_remasks_the_others(trained_encoder):
    seen, forward = [], trained_encoder.encode
    trained_encoder.encode = lambda ids, maps: seen.append((ids == MASK_ID).sum().item()) or forward(ids, maps)
    bert.generate(trained_encoder, [bert.parse_text("777777 <SEP> " + "<MASK> " * 8)], 4)
    del trained_encoder.encode
    assert seen == [8, 6, 4, 2]


def test_texts_of_different_lengths_are_filled_in_one_batch_as_they_are_alone(trained_encoder):
    prompts = [bert.parse_text(text) for text in TEXTS]
    for prompt, ids in zip(prompts, bert.generate(trained_encoder, prompts, 3)):
        assert ids[: len(prompt)].tolist() == bert.generate(trained_encoder, [prompt], 3)[0].tolist()


def test_filling_in_restores_the_mode():
    model = tiny(bert, dropout=0.5).train()
    bert.generate(model, [bert.parse_text(TEXTS[0])], 2)
    assert model.training


def test_a_typed_text_gets_the_form_that_the_model_was_trained_on():
    ids = bert.parse_text("342 <SEP> <MASK> hundred forty two")
    assert ids[:6] == [CLS_ID, *toy_dataset.to_ids("3 4 2 <SEP> <MASK>".split())]
    assert bert.parse_text("342 <SEP> three <MASK> forty two")[-1] == SEP_ID


@pytest.mark.parametrize("text, message", [
    ("342 <SEP> three frog <MASK>", "'frog'"), ("342 <MASK>", "not of the form"),
    ("1 <SEP> " + "<MASK> " * 99, "not of the form")])
def test_texts_that_cannot_be_filled_in_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        bert.parse_text(text)


@pytest.mark.parametrize("prompts, iterations", [([], 1), ([[]], 1), ([[MASK_ID]], 0)])
def test_empty_prompts_and_less_than_one_round_are_refused(prompts, iterations):
    with pytest.raises(InputError):
        bert.generate(tiny(bert), prompts, iterations)


# --- mask-predict, round by round ---


def rounds_of(model, prompts, iterations):
    """What the model read in each round, and at the end what generate returned: (B, T) each."""
    read = []
    handle = model.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].clone()))
    filled = bert.generate(model, prompts, iterations)
    handle.remove()
    return [state.clone() for state in [*read, filled]]  # clones: in inference mode tensors cannot be used again


def test_a_filled_token_stays_and_is_the_most_likely_digit_or_word(trained_encoder):
    texts = ["777777 <SEP> " + "<MASK> " * 9, "<MASK> 2 <SEP> <MASK> two", TEXTS[1]]
    prompts = [bert.parse_text(text) for text in texts]
    states = rounds_of(trained_encoder, prompts, 4)
    assert len(states) == 5
    for before, after in zip(states, states[1:]):
        logits = trained_encoder(before)
        logits[..., : len(SPECIAL_TOKENS)] = -torch.inf
        filled = (before == MASK_ID) & (after != MASK_ID)
        assert filled.any() and after[before != MASK_ID].equal(before[before != MASK_ID])
        assert after[filled].equal(logits.argmax(dim=-1)[filled])


def test_the_least_confident_predictions_of_a_round_are_remasked(trained_encoder):
    prompts = [bert.parse_text(text) for text in ("777777 <SEP> " + "<MASK> " * 9, "342 <SEP> " + "<MASK> " * 4)]
    states = rounds_of(trained_encoder, prompts, 3)
    for before, after in zip(states, states[1:-1]):
        logits = trained_encoder(before)
        logits[..., : len(SPECIAL_TOKENS)] = -torch.inf
        sure = logits.softmax(dim=-1).max(dim=-1).values
        for row in range(len(prompts)):
            again = after[row] == MASK_ID
            kept = (before[row] == MASK_ID) & ~again
            assert sure[row][again].max() <= sure[row][kept].min()
    assert [(state == MASK_ID).sum(dim=1).tolist() for state in states] == [[9, 4], [6, 2], [3, 1], [0, 0]]


def test_both_digits_and_words_may_be_filled_in_and_special_tokens_may_not():
    model = tiny(bert)
    for token, expected in (("7", "7"), ("0", "0"), ("seven", "seven"), ("<PAD>", "two"), ("<MASK>", "two")):
        logits = torch.zeros(len(VOCABULARY))
        logits[toy_dataset.TOKEN_TO_ID["two"]], logits[toy_dataset.TOKEN_TO_ID[token]] = 1.0, 2.0
        model.forward = lambda ids, logits=logits: logits.repeat(*ids.shape, 1)
        for iterations in (1, 2):
            filled = bert.generate(model, [[MASK_ID] * 3], iterations)[0].tolist()
            assert toy_dataset.to_tokens(filled) == [expected] * 3


def test_mask_predict_disables_dropout():
    model = tiny(bert, dropout=0.5).train()
    prompts = [bert.parse_text("777777 <SEP> " + "<MASK> " * 9)]
    assert bert.generate(model, prompts, 3).equal(bert.generate(model, prompts, 3))
    assert bert.generate(model, prompts, 3).equal(bert.generate(model.eval(), prompts, 3))


def test_the_longest_text_that_fits_is_accepted_and_one_token_more_is_not(monkeypatch):
    monkeypatch.setattr(bert, "MAX_LENGTH", 8)
    assert len(bert.parse_text("1 <SEP> <MASK> <MASK> <MASK> <MASK>")) == 8
    with pytest.raises(InputError):
        bert.parse_text("1 <SEP> <MASK> <MASK> <MASK> <MASK> <MASK>")


def test_filled_tokens_are_shown_in_brackets(monkeypatch):
    monkeypatch.setattr(bert, "generate", lambda model, prompts: torch.tensor(
        [bert.to_ids("<CLS> 3 4 2 <SEP> three hundred forty two <SEP>".split())]))
    filled = bert.fill_in(None, ["3 <MASK> 2 <SEP> three <MASK> forty two"])
    assert filled == ["3 [4] 2 <SEP> three [hundred] forty two"]


# --- masking, pooling, evaluation, fine-tuning: what the rest of the file relies on ---


def test_every_digit_and_word_is_sometimes_masked_replaced_or_a_replacement():
    """No token is spared and none is preferred: random ones are drawn from all digits and words."""
    everything = torch.arange(len(SPECIAL_TOKENS), len(VOCABULARY)).expand(4000, -1)
    corrupted, targets = bert.mask_tokens(everything, torch.Generator().manual_seed(0))
    asked = (targets != IGNORE).float().mean(dim=0)
    assert asked.min() > 0.6 * bert.MASK_PROBABILITY and asked.max() < 1.4 * bert.MASK_PROBABILITY
    others = corrupted[(corrupted != everything) & (corrupted != MASK_ID)].bincount(minlength=len(VOCABULARY))
    assert not others[: len(SPECIAL_TOKENS)].any() and others[len(SPECIAL_TOKENS):].min() > 20


def test_training_masks_anew_each_time_and_keeps_targets_given_in_a_batch():
    torch.manual_seed(0)
    model, batch = tiny(bert), toy_dataset.pad_batch([toy_dataset.masked_lm_example(n) for n in range(500, 600)])
    assert not bert.predict(model, batch)[1].equal(bert.predict(model, batch)[1])
    given = {"ids": batch["ids"], "targets": torch.full_like(batch["ids"], 30)}
    logits, targets = bert.predict(model, given)
    assert targets.equal(given["targets"]) and logits.equal(model(batch["ids"]))


def test_the_masked_lm_reads_the_masks_and_not_the_targets():
    """If it read the original text, each target would be visible at its own position."""
    model, (text,) = tiny(bert), [toy_dataset.masked_lm_example(777777)]
    batch, read = toy_dataset.pad_batch([text] * 50), []
    model.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    _, targets = bert.predict(model, batch)
    asked = targets != IGNORE
    assert (read[0][asked] == MASK_ID).float().mean() > 0.7 and targets[asked].equal(batch["ids"][asked])


def test_the_pooled_vector_is_bounded():
    """tanh, as in BERT: however large the pooler's weights, its outputs stay within -1 and 1, bounding the logits."""
    model = tiny(bert, task="counting")
    model.pooler.weight.data *= 1000
    head = model.head
    bound = head.weight.abs().sum(dim=1) + head.bias.abs()
    logits = model(text_of(90210))[0, 0]
    assert (logits.abs() <= bound + 1e-4).all() and (logits.abs() > 0.1 * bound).any()


def test_accuracy_counts_targets_and_exact_match_counts_texts_with_targets(trained_encoder):
    loader = [toy_dataset.pad_batch([toy_dataset.masked_lm_example(n) for n in numbers])
              for numbers in (range(300), range(90000, 90100))]  # short ones often have no mask at all
    generator = torch.Generator().manual_seed(bert.SEED)
    answers = [[(guess == target).item() for guess, target in zip(row.argmax(-1), wanted) if target != IGNORE]
               for batch in loader for row, wanted in zip(*bert.predict(trained_encoder, batch, generator))]
    assert [] in answers
    found, asked = bert.evaluate(trained_encoder, loader), [row for row in answers if row]
    assert found["accuracy"] == pytest.approx(sum(map(sum, answers)) / sum(map(len, answers)))
    assert found["exact_match"] == pytest.approx(sum(map(all, asked)) / len(asked))
    assert found["mistakes"] == [i for i, row in enumerate(answers) if not all(row)]


@pytest.mark.parametrize("task", ["tagging", "counting"])
def test_fine_tuning_moves_all_weights_at_its_own_rate_and_leaves_the_pretrained_model_alone(task):
    pretrained, loaders = tiny(bert), bert.create_dataloaders(64, 0, task, 128)
    loaders = loaders._replace(validation=[next(iter(loaders.validation))])
    before = {name: value.clone() for name, value in pretrained.state_dict().items()}
    model, history = bert.fine_tune(pretrained, loaders, task, 2, 4e-4, 1, tqdm(disable=True, total=1))
    assert [row["learning_rate"] for row in history] == [bert.learning_rate_at(step, 2, 4e-4) for step in range(2)]
    after = model.state_dict()
    for name, value in pretrained.state_dict().items():
        assert value.equal(before[name]) and not after[name].equal(value), name
    scratch, _ = bert.fine_tune(None, loaders, task, 2, 4e-4, 1, tqdm(disable=True, total=1))
    assert scratch.constants["D_MODEL"] == bert.D_MODEL and scratch.task == task


# --- answers ---


@pytest.mark.parametrize("task, right, wrong", [("tagging", "hundreds, tens, ones", "hundreds, hundreds, hundreds"),
                                                ("counting", "4 words", "3 words")])
def test_an_answer_is_marked_wrong_if_and_only_if_it_is(monkeypatch, task, right, wrong):
    labels = {"hundreds, tens, ones": [0, 2, 1, 0, 0], "hundreds, hundreds, hundreds": [2] * 5,
              "4 words": [3], "3 words": [2]}
    example = toy_dataset.pad_batch([bert.TASKS[task](342)])
    targets = example["places"] if task == "tagging" else example["count"][:, None]
    for said, line in ((right, f"342 -> {right}"), (wrong, f"342 -> {wrong}\n    WRONG: {right}")):
        logits = torch.nn.functional.one_hot(torch.tensor([labels[said]]), 9).float()
        monkeypatch.setattr(bert, "predict", lambda model, batch, logits=logits: (logits, targets))
        assert bert.answer(tiny(bert, task=task), [342]) == [line]


def test_a_masked_lms_answer_masks_the_middle_word(monkeypatch):
    asked, said = [], "3 4 2 <SEP> three hundred [ten] two"
    monkeypatch.setattr(bert, "fill_in", lambda model, texts: asked.extend(texts) or [said])
    line, = bert.answer(tiny(bert), [342])
    assert line.startswith(f"{said}\n    WRONG: ") and "[forty]" in line
    assert asked == ["3 4 2 <SEP> three hundred <MASK> two"]


@pytest.mark.parametrize("task", TASKS)
def test_answering_disables_dropout_and_restores_the_mode(task):
    model = tiny(bert, task=task, dropout=0.5)
    expected = bert.answer(model.eval(), [342, 90210])
    assert bert.answer(model.train(), [342, 90210]) == expected and model.training


def test_questions_are_answered_from_checkpoints_only_if_all_they_need_exist(monkeypatch, tmp_path, capsys):
    models = {task: tiny(bert, task=task) for task in TASKS}
    trained = []
    monkeypatch.setattr(bert, "CHECKPOINT", tmp_path / "model.pt")
    monkeypatch.setattr(bert, "build_model", lambda *_, task="masked_lm": copy.deepcopy(models[task]))
    monkeypatch.setattr(bert, "train_and_test", lambda: trained.append(True) or models)
    questions = [342, "3 <MASK> 2 <SEP> three"]
    for missing in ("masked_lm", "tagging", "counting"):
        for task, model in models.items():
            bert.save(model, bert.checkpoint_of(task))
        bert.checkpoint_of(missing).unlink()
        bert.main(*questions)
        assert trained.pop()
    bert.save(models[missing], bert.checkpoint_of(missing))
    bert.main(*questions)
    assert not trained and "342 -> " in capsys.readouterr().out


def test_every_fine_tuning_run_starts_from_the_pretrained_model(monkeypatch, tmp_path):
    started, model = [], tiny(bert)
    fine_tuned = {task: tiny(bert, task=task) for task in TASKS}
    monkeypatch.setattr(bert, "CHECKPOINT", tmp_path / "model.pt")
    monkeypatch.setattr(bert, "build_model", lambda *_, **__: model)
    monkeypatch.setattr(bert, "evaluate", lambda *_: {"loss": 1.0, "exact_match": 1.0, "accuracy": 1.0, "mistakes": []})
    monkeypatch.setattr(bert, "train", lambda *_: [])
    monkeypatch.setattr(bert, "fine_tune", lambda pretrained, loaders, task, *_: started.append(
        (task, pretrained is model)) or (fine_tuned[task], []))
    bert.train_and_test()
    assert sorted(started) == sorted((task, True) for task in TASKS if task != "masked_lm")


def test_the_gain_of_pretraining_is_measured_with_the_same_three_seeds_and_the_better_rate_on_both_sides(
        monkeypatch, capsys):
    runs, pretrained = [], tiny(bert)
    half, full = bert.FINE_TUNING_LEARNING_RATE / 2, bert.FINE_TUNING_LEARNING_RATE
    loader = torch.utils.data.DataLoader([0], generator=torch.Generator())
    loaders = toy_dataset.Splits(loader, "validation", ())

    def fine_tune(start, loaders, task, num_steps, rate, *_):
        runs.append((start is pretrained, torch.initial_seed(), loader.generator.initial_seed(), rate, num_steps))
        return SimpleNamespace(rate=rate, pretrained=start is pretrained), []

    def evaluate(model, data):  # on validation, half the rate is better from scratch, and the full rate when pretrained
        better = (model.rate == full) == model.pretrained
        return {"exact_match": (0.9 if better else 0.1) if data == "validation" else 0.8 if model.pretrained else 0.3}

    monkeypatch.setattr(bert, "create_dataloaders", lambda *_: loaders)
    monkeypatch.setattr(bert, "fine_tune", fine_tune)
    monkeypatch.setattr(bert, "evaluate", evaluate)
    monkeypatch.setattr(bert, "NUM_LABELS", [300])
    bert.show_pretraining_gain(pretrained)
    seeds = [bert.SEED, bert.SEED + 1, bert.SEED + 2]
    expected = [(start, seed, seed, rate, bert.FINE_TUNING_STEPS) for start, better in ((False, half), (True, full))
                for seed, rate in [(bert.SEED, half), (bert.SEED, full), *((seed, better) for seed in seeds[1:])]]
    assert runs == expected * 3  # the three tasks
    assert capsys.readouterr().out.count("30.0% (30.0% to 30.0%)    80.0% (80.0% to 80.0%)  *") == 3
