"""debug.py - find the bug: a mistake is planted in a copy of the project, and all you get is a report of its symptom.

    python exercises/debug.py              the next bug: plants it, and says what was noticed (half a minute)
    python exercises/debug.py 3            bug 3
    python exercises/debug.py check        is the mistake gone?
    python exercises/debug.py --hint       which file; again: which function; again: the lines
    python exercises/debug.py --pytest     all of pytest's output for the tests that look for it
    python exercises/debug.py --give-up    shows the mistake
    python exercises/debug.py --restart    plants it again in a fresh copy; yours is moved aside

The last five are about the bug that was planted last, or about the one given: debug.py 3 check.

The copy is workbench/bug_N/: run it, print, change what you like. The mistakes are those of tests/break_it.py. The
report is real: its script runs in the broken copy and in the project, and you see both outputs. The list below says
what is wrong, so don't read on if you want to find out yourself.
"""

import ast
import difflib
import inspect
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import workbench
from workbench import ROOT, InputError

from break_it import BREAKS, Break, apply
from toy_dataset import run_script

WORDS = ("check", "--hint", "--pytest", "--give-up", "--restart")
COMMAND = "python exercises/debug.py"


class Bug(NamedTuple):
    """A mistake, and how a colleague noticed it.

    mistake: its name in break_it.BREAKS
    report: what was noticed, without saying why
    script: how it was noticed; it is run, and shown with what it prints
    tests: those that catch the mistake, as pytest names them below tests/
    """

    mistake: str
    report: str
    script: str
    tests: list[str]

    @property
    def number(self) -> int:
        return BUGS.index(self) + 1

    @property
    def name(self) -> str:
        return f"bug_{self.number}"

    @property
    def made(self) -> Break:
        return next(mistake for mistake in BREAKS if mistake.name == self.mistake)


BUGS = [
    Bug(
        "dropout left on",
        "I evaluate the same model twice on the same numbers and get two different losses.",
        """
        import torch, decoder_only as gpt
        torch.manual_seed(0)
        model = gpt.build_model(d_model=32, d_ff=64, dropout=0.3)
        batch = next(iter(gpt.create_dataloaders(64, 0).validation))
        for _ in range(2):
            print(f"loss {gpt.evaluate(model, [batch])['loss']:.4f}")
        """,
        ["test_all_architectures.py::test_evaluation_disables_dropout_and_restores_the_mode[decoder_only]"],
    ),
    Bug(
        "top-p drops the crossing token",
        "I sample with top_p from four tokens whose probabilities I know: 0.5, 0.3, 0.15 and 0.05. Some tokens that "
        "belong to the nucleus are never drawn.",
        """
        import torch, decoder_only as gpt
        logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(10_000, 4)
        for p in (0.6, 0.9):
            drawn = gpt.choose_tokens(logits, 1.0, None, p, torch.Generator().manual_seed(0))
            shares = drawn.bincount(minlength=4) / 10_000
            print(f"top_p {p}: drawn {[round(share, 2) for share in shares.tolist()]}")
        """,
        ["test_decoder_only.py::test_top_p_keeps_the_smallest_set_that_reaches_p",
         "test_decoder_only.py::test_top_p_keeps_exactly_as_many_tokens_as_a_plain_loop_would"],
    ),
    Bug(
        "padding counts in the loss",
        "The number of targets does not add up: a batch of two texts has more of them than the two texts have "
        "separately. Since this started, the training loss has been lower than ever, but the model is no better.",
        """
        import toy_dataset, decoder_only as gpt
        model = gpt.build_model(d_model=32, d_ff=64)
        one, two = (toy_dataset.decoder_only_example(number) for number in (7, 777777))
        for batch in ([one], [two], [one, two]):
            print(gpt.compute_loss(model, toy_dataset.pad_batch(batch))[1].item(), "targets")
        """,
        ["test_toy_dataset.py::test_padding_fills_ids_with_pad_and_labels_with_ignore",
         "test_all_architectures.py::"
         "test_losses_of_unequal_micro_batches_add_up_to_the_batch_loss[decoder_only]"],
    ),
    Bug(
        "positions forget the cache",
        "The KV cache is supposed to make generation faster, not to change its output. Training is unaffected.",
        """
        import torch, decoder_only as gpt
        torch.manual_seed(0)
        model = gpt.build_model(d_model=32, d_ff=64).eval()
        ids = torch.tensor([gpt.make_prompt(342)]).to(model.embedding.weight.device)
        cache = model.new_cache()
        for length in range(1, 6):
            cached, recomputed = model(ids[:, :length], cache), model(ids[:, :length])
            difference = (cached[0, -1] - recomputed[0, -1]).abs().max()
            print(f"{length} tokens: the logits with and without the cache differ by {difference:.2f}")
        """,
        ["test_decoder_only.py::test_cached_logits_equal_recomputed_logits_at_every_step"],
    ),
    Bug(
        "causal mask shifted by one",
        "The training loss is almost 0 after a few seconds, and held-out accuracy is 100%. But look at what the model "
        "generates.",
        """
        import torch, decoder_only as gpt
        from tqdm import tqdm
        torch.manual_seed(0)
        model, loaders = gpt.build_model(d_model=64, d_ff=128), gpt.create_dataloaders(64, 0)
        last = gpt.train(model, loaders, 2, 4e-3, 1, tqdm(disable=True, total=1))[-1]
        print(f"loss {last['loss']:.3f}, exact match {last['exact_match']:.0%}")
        ids = gpt.generate(model, [gpt.make_prompt(342)], 12, temperature=0.0)
        print(f"for 342 it generates: {gpt.to_words(ids[0])}")
        """,
        ["test_decoder_only.py::test_the_rows_of_a_causal_mask_are_the_last_positions",
         "test_decoder_only.py::test_changing_a_token_leaves_all_earlier_outputs_exactly_as_they_were",
         "test_decoder_only.py::test_the_gradient_with_respect_to_a_later_input_is_exactly_zero"],
    ),
    Bug(
        "targets not shifted",
        "A training loss of almost 0, an accuracy of 100%, and then the model repeats one token forever. I have "
        "checked the causal mask: it is correct.",
        """
        import torch, decoder_only as gpt
        from tqdm import tqdm
        torch.manual_seed(0)
        model, loaders = gpt.build_model(d_model=64, d_ff=128), gpt.create_dataloaders(64, 0)
        last = gpt.train(model, loaders, 2, 4e-3, 1, tqdm(disable=True, total=1))[-1]
        print(f"loss {last['loss']:.3f}, exact match {last['exact_match']:.0%}")
        ids = gpt.generate(model, [gpt.make_prompt(342)], 12, temperature=0.0)
        print(f"for 342 it generates: {gpt.to_words(ids[0])}")
        """,
        ["test_toy_dataset.py::test_each_target_is_the_next_input"],
    ),
    Bug(
        "padding is attended to",
        "On its own, each prompt gives the right logits. In a batch with a longer prompt, the short one gives "
        "different ones.",
        """
        import torch, decoder_only as gpt
        torch.manual_seed(0)
        model = gpt.build_model(d_model=32, d_ff=64).eval()
        short, long = gpt.make_prompt(7), gpt.make_prompt(777777)
        padded = [0] * (len(long) - len(short)) + short
        batch = torch.tensor([padded, long], device=next(model.parameters()).device)
        with torch.inference_mode():
            alone, together = model(batch[:1, -len(short):])[0, -1], model(batch)[0, -1]
        print(f"largest difference of a logit: {(alone - together).abs().max():.4f}")
        """,
        ["test_decoder_only.py::test_padding_on_either_side_changes_no_real_position"],
    ),
    Bug(
        "gradients never zeroed",
        "Training makes little progress, and the gradient norms in the log look odd. To see more, I trained on one "
        "batch again and again with a learning rate of almost 0, so nothing should change from step to step.",
        """
        import torch, decoder_only as gpt
        from tqdm import tqdm
        torch.manual_seed(0)
        model, loaders = gpt.build_model(d_model=32, d_ff=64), gpt.create_dataloaders(16, 0)
        batch = next(iter(loaders.train))
        loaders = loaders._replace(train=[batch] * 4, validation=[batch])
        for row in gpt.train(model, loaders, 1, 1e-12, 1, tqdm(disable=True, total=1)):
            print(f"step {row['step']}  loss {row['loss']:.3f}  gradient norm {row['grad_norm']:.3f}")
        """,
        ["test_all_architectures.py::test_each_step_follows_the_gradient_of_its_own_batch_alone[decoder_only]"],
    ),
    Bug(
        "loss on unmasked tokens too",
        "Since last week the pretraining loss has been much lower, yet the pretrained model is worse at predicting "
        "masked tokens. I counted the targets that the loss is computed from; it should be 15% of digits and words.",
        """
        import torch, encoder_only as bert
        from toy_dataset import PAD_ID
        torch.manual_seed(0)
        model = bert.build_model(d_model=32, d_ff=64)
        batch = next(iter(bert.create_dataloaders(512, 0).train))
        loss_sum, num_targets = bert.compute_loss(model, batch)
        print(f"{num_targets.item():,} targets in {(batch['ids'] != PAD_ID).sum().item():,} tokens")
        """,
        ["test_encoder_only.py::test_special_tokens_are_never_chosen_and_only_chosen_tokens_are_targets",
         "test_encoder_only.py::test_of_the_chosen_tokens_80_percent_are_masked_10_random_10_unchanged"],
    ),
    Bug(
        "no cross-attention",
        "The translator generates valid English names of numbers, but not of the numbers that I give it.",
        """
        import torch, encoder_decoder as t5
        from tqdm import tqdm
        torch.manual_seed(0)
        model = t5.build_model(d_model=64, d_ff=128, num_layers=1)
        loaders = t5.create_dataloaders(64, 0)
        t5.train(model, loaders, 2, 4e-3, 1, tqdm(disable=True, total=1))
        for number in (7, 342, 90210):
            ids = t5.generate(model, [t5.make_source(number)], temperature=0.0)
            print(f"{number}: {t5.to_words(ids[0])}")
        """,
        ["test_all_architectures.py::test_a_cross_attention_layer_equals_pytorchs_on_the_same_weights",
         "test_encoder_decoder.py::test_every_output_depends_on_the_whole_source_and_no_later_target"],
    ),
    Bug(
        "source padding is attended to",
        "The logits for 342 depend on how long the other numbers in the batch are.",
        """
        import torch, encoder_decoder as t5
        torch.manual_seed(0)
        model = t5.build_model(d_model=32, d_ff=64).eval()
        device = next(model.parameters()).device
        target = torch.tensor([[t5.SOS_ID]], device=device)
        with torch.inference_mode():
            for padding in (0, 2, 4):
                source = torch.tensor([t5.make_source(342) + [0] * padding], device=device)
                logit = model(source, target)[0, 0, t5.SOS_ID]
                print(f"{padding} columns of padding: logit of <SOS> {logit:.4f}")
        """,
        ["test_encoder_decoder.py::test_the_content_of_source_padding_changes_nothing"],
    ),
    Bug(
        "caches not reordered with their beams",
        "beam_search is the batched version of beam_search_one, so both should find the same texts with the same "
        "scores. Greedy decoding works, and so does a beam of width 1.",
        """
        import torch, encoder_decoder as t5
        torch.manual_seed(0)
        model = t5.build_model(d_model=32, d_ff=64)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        source = t5.make_source(342)
        for width in (1, 5):
            readable = t5.beam_search_one(model, source, width, 1.0, 8)[0][0]
            fast = t5.beam_search(model, [source], width, 1.0, 8)[1][0, 0].item()
            print(f"width {width}: best score {readable:.4f} (beam_search_one), "
                  f"{fast:.4f} (beam_search)")
        """,
        ["test_beam_search.py::test_both_agree_on_untrained_models_where_many_texts_compete",
         "test_encoder_decoder.py::test_a_beam_as_wide_as_all_hypotheses_finds_what_exhaustive_search_finds[1.0]"],
    ),
]


def run_report(bug: Bug, folder: Path) -> str:
    """What the script of the report prints in this folder, or the last line of its traceback."""
    command = [sys.executable, "-B", "-c", textwrap.dedent(bug.script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", errors="replace")
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr.strip().splitlines()[-1] + "\n"


def plant(bug: Bug) -> None:
    """Copy the project, make the mistake in the copy, and write the report."""
    print("Planting a bug, and running the script of its report. This can take a minute.\n", flush=True)
    folder = workbench.create(bug.name)
    apply(bug.made, folder)
    text = textwrap.fill(f"A colleague reports: {bug.report}", 98)
    text += "\n\nThey ran this:\n\n" + textwrap.indent(inspect.cleandoc(bug.script), "    ")
    for where, path in (("in your copy", folder), ("in the project, without the bug", ROOT)):
        text += f"\n\nIt prints, {where}:\n\n" + textwrap.indent(run_report(bug, path).rstrip(), "    ")
    (folder / "REPORT.txt").write_text(text + "\n", encoding="utf-8")
    workbench.note_progress(bug.name, planted=time.time(), hints=0)  # last, so that an interrupted run does not count


def show_report(bug: Bug) -> None:
    """The report, and what can be done next."""
    folder = workbench.folder_of(bug.name)
    print(f"BUG {bug.number} of {len(BUGS)}, somewhere in {workbench.shown(folder)}/\n")
    print((folder / "REPORT.txt").read_text(encoding="utf-8"))
    print(f"Find the mistake in {workbench.shown(folder)}/ and fix it. Then:\n\n"
          f"  {COMMAND} check     is it gone?\n"
          f"  {COMMAND} --hint    which file; again: which function; again: which lines")


def check(bug: Bug) -> None:
    """Whether the tests that catch the mistake pass."""
    folder = workbench.folder_of(bug.name)
    for path in sorted(folder.glob("*.py")):
        workbench.read_source(path)
    outcomes = workbench.run_tests(folder, bug.tests)
    red = [outcome for outcome in outcomes if outcome.message is not None]
    print(f"BUG {bug.number}: {len(outcomes) - len(red)} of {len(outcomes)} tests that look for it pass.")
    if red:
        print(f"It is still there.\n\n  {COMMAND} {bug.number} --pytest    what the tests say\n"
              f"  {COMMAND} {bug.number} --hint      a hint")
        return
    workbench.note_progress(bug.name, done=time.strftime("%Y-%m-%d"))
    print("It is gone. This was the mistake:\n")
    show_mistake(bug)
    print(f"Is everything else intact?      python -m pytest {workbench.shown(folder)}/tests (some minutes)")


def function_of(mistake: Break) -> str:
    """The innermost function or method of the project's file that contains the mistake."""
    source = (ROOT / f"{mistake.file}.py").read_text(encoding="utf-8")
    line = source[: source.index(mistake.old) + len(mistake.old) - len(mistake.old.lstrip())].count("\n") + 1
    names, nodes = [], ast.parse(source).body
    while nodes:
        node = next((node for node in nodes if node.lineno <= line <= node.end_lineno), None)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        nodes = getattr(node, "body", None) if names and isinstance(node, ast.ClassDef) else None
    return ".".join(names)


def show_hint(bug: Bug) -> None:
    """Which file, then which function, then the lines."""
    seen = workbench.read_progress()[bug.name]["hints"] + 1
    workbench.note_progress(bug.name, hints=seen)
    print(f"It is in {bug.made.file}.py.")
    if seen >= 2:
        print(f"It is in {function_of(bug.made)}.")
    if seen >= 3:
        show_mistake(bug)


def show_mistake(bug: Bug) -> None:
    """The planted change, what to expect of it, and how to see more."""
    path = ROOT / f"{bug.made.file}.py"
    right = path.read_text(encoding="utf-8")
    wrong = right.replace(bug.made.old, bug.made.new)
    print("".join(difflib.unified_diff(wrong.splitlines(keepends=True), right.splitlines(keepends=True),
                                       "the bug", path.name, n=2)))
    print(f"It is in {function_of(bug.made)}, called \"{bug.made.name}\" in break_it.py. The expected symptom:")
    print(textwrap.fill(bug.made.expected, 98, initial_indent="  ", subsequent_indent="  "))
    print(f"What longer training shows:     python tests/break_it.py \"{bug.made.name}\"")
    if bug.number < len(BUGS):
        print(f"The next bug:                   {COMMAND} {bug.number + 1}")


def main(*arguments) -> None:
    """arguments: the number of a bug and one of WORDS, both optional, in any order."""
    bugs = [argument for argument in arguments if isinstance(argument, Bug)]
    words = [argument for argument in arguments if isinstance(argument, str)]
    if len(bugs) > 1 or len(words) > 1:
        raise InputError(f"give at most one number and one of {', '.join(WORDS)}: {COMMAND} 3 check")
    progress = workbench.read_progress()
    planted = [bug for bug in BUGS if bug.name in progress and workbench.folder_of(bug.name).exists()]
    last = max(planted, key=lambda bug: progress[bug.name]["planted"], default=None)
    if bugs:
        bug = bugs[0]
    elif words and last is None:
        raise InputError(f"no bug has been planted yet: {COMMAND} plants one.")
    elif words or last is not None and "done" not in progress[last.name]:
        bug = last
    else:
        bug = next((bug for bug in BUGS if bug.name not in progress), None)
        if bug is None:
            print(f"You have been through all {len(BUGS)} bugs. {COMMAND} N shows the report of bug N again.")
            return
    if words and words[0] != "--restart" and bug not in planted:
        raise InputError(f"bug {bug.number} has not been planted yet: {COMMAND} {bug.number} plants it.")
    if words == ["check"]:
        check(bug)
    elif words == ["--hint"]:
        show_hint(bug)
    elif words == ["--pytest"]:
        workbench.show_pytest(workbench.folder_of(bug.name), bug.tests)
    elif words == ["--give-up"]:
        show_mistake(bug)
    else:
        if words == ["--restart"] or bug not in planted:
            plant(bug)
        show_report(bug)


def parse_argument(text: str) -> Bug | str:
    """A bug by its number, or one of WORDS."""
    if text in WORDS:
        return text
    if text in {str(bug.number) for bug in BUGS}:
        return BUGS[int(text) - 1]
    raise InputError(f"{text!r} is neither a bug, 1 to {len(BUGS)}, nor one of {', '.join(WORDS)}.")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # your code may contain what this terminal cannot print
    run_script(main, parse_argument)
