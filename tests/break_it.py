"""break_it.py - the lab: classic bugs, each planted in a copy of the code, which is then retrained and evaluated.

    python tests/break_it.py                       all of them (half an hour on two CPU cores)
    python tests/break_it.py "no scale"            only those named

For each it prints the expected symptom, the metrics of the unbroken and of the broken code, and the first failing test.
`loss` is the last training loss, `exact` the exact match on 2,000 held-out numbers as evaluate computes it, with
teacher forcing, and `generated` that of generated answers on 500: greedy (decoder_only), by beam search
(encoder_decoder), or by mask-predict with the true number of masks (encoder_only). Not every bug shows at this size,
and that is the lesson: a model that learns does not prove that its code is correct. That is what the tests are for.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Break(NamedTuple):
    """One bug: in `file`, the text `old`, which must occur exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    expected: str


BREAKS = [
    Break("no scale", "decoder_only", " / math.sqrt(query.size(-1)) ", " ",
          "scores too large, softmax saturated, slower learning"),
    Break("no causal mask", "decoder_only", ".tril(diagonal=S - T)", "",
          "inputs leak the targets: the loss falls below the entropy of the data; generates nonsense"),
    Break("causal mask shifted by one", "decoder_only", ".tril(diagonal=S - T)", ".tril(diagonal=S - T + 1)",
          "each position sees its own target: loss near 0; generates nonsense"),
    Break("no positions", "decoder_only", "x + self.positional_encoding(positions)", "x",
          "order is visible only through the causal mask: worse"),
    Break("positions forget the cache", "decoder_only", "self.embed(ids[:, start:], positions[:, start:])",
          "self.embed(ids[:, start:], positions[:, :ids.size(1) - start])",
          "training is unaffected; with the cache every new token gets position 0"),
    Break("padding is attended to", "decoder_only", "mask = make_padding_mask(ids) ",
          "mask = make_padding_mask(ids) | True ",
          "no effect in training (right padding is behind the causal mask); breaks prompts padded on the left"),
    Break("no residual around attention", "decoder_only", "x = x + self.dropout(self.attention(",
          "x = self.dropout(self.attention(", "no identity path around attention: deep stacks train worse"),
    Break("no final norm", "decoder_only", "F.linear(self.final_norm(x), ", "F.linear(x, ",
          "unnormalized logits: a high initial loss"),
    Break("-1e9 for masked scores", "decoder_only", "torch.finfo(scores.dtype).min", "-1e9",
          "no effect in float32; overflows in float16"),
    Break("targets not shifted", "toy_dataset", "    targets = text[1:]\n", "    targets = text[:-1]\n",
          "learns to copy its input: loss near 0, exact match 0"),
    Break("padding counts in the loss", "toy_dataset", 'filler = IGNORE if field in ("targets", "places") else PAD_ID',
          "filler = PAD_ID", "the loss looks too good: padding is easy to predict"),
    Break("gradients never zeroed", "decoder_only", "    optimizer.zero_grad() ", "    pass #",
          "gradients accumulate over all steps so far"),
    Break("decay on everything", "decoder_only", '{"params": others, "weight_decay": 0.0}',
          '{"params": others, "weight_decay": WEIGHT_DECAY}', "embeddings, norm scales and biases are pulled toward 0"),
    Break("no learning-rate decay", "decoder_only", "return lowest + (peak - lowest) * 0.5", "return peak + 0.0",
          "keeps oscillating around the minimum"),
    Break("dropout left on", "decoder_only", "    was_training = model.training\n    model.eval()\n    loss_sum",
          "    was_training = model.training\n    loss_sum", "no effect while DROPOUT is 0; noisy metrics otherwise"),
    Break("top-p drops the crossing token", "decoder_only", "before >= p", "before + probabilities >= p",
          "greedy is unaffected; sampling drops a token, and fails if that was the only one"),
    Break("no cross-attention", "encoder_decoder", "x = x + self.dropout(\n            self.cross_attention(",
          "x = x + 0 * self.dropout(\n            self.cross_attention(", "no access to the digits: fluent but wrong"),
    Break("source padding is attended to", "encoder_decoder", "        memory_mask = make_padding_mask(source) ",
          "        memory_mask = make_padding_mask(source) | True #", "short sources depend on the rest of the batch"),
    Break("caches not reordered with their beams", "encoder_decoder", "parent.gather(1, best))[going]",
          "torch.arange(best.size(1), device=device) % K)[going]", "greedy is unaffected; beams read others' caches"),
    Break("special tokens are masked too", "encoder_only", "(ids >= len(SPECIAL_TOKENS)) & (chance", "(chance",
          "some targets are `<CLS>`, `<SEP>` and `<PAD>`, which are easy to predict"),
    Break("loss on unmasked tokens too", "encoder_only", "ids.masked_fill(~chosen, IGNORE)", "ids",
          "most targets are copies of the input: the loss looks too good"),
    Break("values rotated too", "variations/positional_encodings", "rotate(key, positions, self.base)\n",
          "rotate(key, positions, self.base)\n        value = rotate(value, positions, self.base)\n",
          "what a head reads depends on its position: trains equally well, generalizes worse to longer texts"),
    Break("keys cached before rotating", "variations/positional_encodings",
          "        query, key = rotate(query, positions, self.base), rotate(key, positions, self.base)\n"
          "        if cache is not None:\n            key, value = cache.append(key, value) ",
          "        if cache is not None:\n            key, value = cache.append(key, value)\n"
          "        query, key = rotate(query, positions, self.base), rotate(key, positions, self.base)  #",
          "training is unaffected; with the cache all keys are rotated by the newest position, and order is lost"),
    Break("rotation forgets the cache", "variations/positional_encodings",
          "start = 0 if cache is None else len(cache)", "start = 0",
          "training is unaffected; with the cache every new token is rotated by position 0"),
    Break("ALiBi rewards distance", "variations/positional_encodings", "return -self.slopes", "return self.slopes",
          "the sign of a bias: no effect on RoPE, which is what is trained here"),
    Break("key-value heads tiled", "variations/llama", "heads.repeat_interleave(self.group_size, dim=1)",
          "heads.repeat(1, self.group_size, 1, 1)",
          "trains equally well; a published model's query heads would read the wrong key-value heads"),
    Break("epsilon outside the root", "variations/llama",
          "torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPSILON)",
          "1 / (wide.square().mean(dim=-1, keepdim=True).sqrt() + EPSILON)",
          "no visible effect, except on vectors near 0"),
    Break("LoRA starts at random", "variations/parameter_efficient_fine_tuning",
          "        nn.init.zeros_(self.up.weight)\n\n", "\n",
          "little to see from scratch; a trained model is damaged before its fine-tuning begins"),
    Break("soft prompt shifts the text", "variations/parameter_efficient_fine_tuning",
          "(positions - P).clamp(min=0)", "positions",
          "the text is at positions it was not trained on: no effect on LoRA, which is what is trained here"),
    Break("no straight-through estimator", "variations/quantization", "rounded + (x - x.detach())", "rounded",
          "rounding has no gradient: the Linear layers stay as they started"),
    Break("one level too many", "variations/quantization", "levels = 2 ** (bits - 1) - 1", "levels = 2 ** (bits - 1)",
          "smaller errors, and integers that do not fit their bits: the packed file holds other numbers"),
    Break("replacement drawn from p", "variations/speculative_decoding", "leftover(p[n], q[n]), 1", "p[n], 1",
          "greedy is unaffected; sampling no longer follows the target: tokens that the draft favors come too often"),
    Break("rejected tokens stay cached", "variations/speculative_decoding",
          "        roll_back(cache, ids.size(1) - 1)\n        examined", "        examined",
          "after a rejection the target attends to the rejected token, and never reads its replacement"),
    Break("proposals after a rejection are kept", "variations/speculative_decoding",
          "accepted.long().cumprod(dim=0).sum()", "accepted.long().sum()",
          "more tokens per pass, and a text that the target would not have written"),
    Break("KL with the wrong sign", "variations/preference_optimization", "rewards - beta * (log_policy.detach()",
          "rewards + beta * (log_policy.detach()", "distance from the start model is rewarded: collapse"),
    Break("DPO without its reference", "variations/preference_optimization",
          "(log_chosen - start_chosen) - (log_rejected - start_rejected)", "log_chosen - log_rejected",
          "pairs still get ranked; the policy does not stop at the optimum for beta, but goes far beyond"),
    Break("the baseline contains the text's own return", "variations/preference_optimization",
          "(returns.sum() - returns) / (len(returns) - 1) ", "returns.mean() ",
          "a gradient too small by 1 / B: no visible effect at B = 256"),
    Break("output not multiplied by its gate", "variations/mixture_of_experts",
          "gates[token, rank, None] * expert(tokens[token])", "expert(tokens[token])",
          "the router has no gradient: tokens stay with the experts that random weights gave them"),
    Break("softmax after top-1", "variations/mixture_of_experts", "    if top_k > 1:\n", "    if True:\n",
          "a single gate is always 1: the router learns from the balancing loss only"),
    Break("padding is routed", "variations/mixture_of_experts", "real = mask[:, 0, -1, -x.size(1):] ",
          "real = mask[:, 0, -1, -x.size(1):] | True ",
          "padding counts in the balancing loss and takes up capacity: little to see in exact match"),
    Break("capacity at inference", "variations/mixture_of_experts",
          "            if self.capacity_factor is not None:\n                capacity =",
          "        if self.capacity_factor is not None:\n            capacity =",
          "no effect without a capacity; with one, answers depend on the other texts in the batch"),
    Break("floor not subtracted", "variations/scaling_laws", "target = (loss - E).log()", "target = loss.log()",
          "no effect while E is 0, as here; with a floor the fitted exponents are too small"),
    Break("exponents swapped in the optimum", "variations/scaling_laws", "log_G + beta / (alpha + beta)",
          "log_G + alpha / (alpha + beta)", "the budget goes to parameters where it should go to data"),
    Break("facts without a row share a trained one", "variations/scaling_laws", "padding_idx=rows, sparse=True",
          "sparse=True", "their nicknames compete for one row: worse than guessing, above the computed loss"),
    Break("ties in the order of the texts", "variations/byte_pair_encoding",
          "min(pairs, key=lambda pair: (-pairs[pair], self.tokens[pair[0]], self.tokens[pair[1]], pair))",
          "max(pairs, key=pairs.get)",
          "shuffled texts give other merges: two machines no longer share a vocabulary"),
    Break("merges applied from left to right", "variations/byte_pair_encoding",
          "self.merges.get(pair, math.inf))\n", "pair not in self.merges)\n",
          "text survives, in other tokens than those that were counted when the merges were learned"),
    Break("tokens decoded one at a time", "variations/byte_pair_encoding",
          'b"".join(self.tokens[i] for i in ids).decode(errors="replace")',
          '"".join(self.tokens[i].decode(errors="replace") for i in ids)',
          "English is unaffected; a character of several bytes becomes several replacement characters"),
    Break("spaces lost between words", "variations/byte_pair_encoding", '" ?[^ ]+| "', '"[^ ]+"',
          "names are decoded without spaces; no effect on the decoder trained here, which reads whole words"),
    Break("equal layers instead of a shared one", "variations/parameter_sharing", "getattr(layers[0], part))",
          "__import__('copy').deepcopy(getattr(layers[0], part)))",
          "trains as well or better: the layers differ after the first step, and nothing is saved"),
    Break("tensors shared one by one", "variations/parameter_sharing",
          "            setattr(layer, part, getattr(layers[0], part))",
          "            for one, other in zip(getattr(layer, part).modules(), getattr(layers[0], part).modules()):\n"
          "                one._parameters = other._parameters",
          "the same function; the optimizer lists a shared matrix at each use, and moves it as often per step"),
    Break("every use has the first one's depth", "variations/parameter_sharing", "encode(torch.tensor(depth))",
          "encode(torch.tensor(0))", "no effect without the depth encoding, and little with it"),
    Break("temperature for the teacher alone", "variations/distillation", "(student / temperature).log_softmax",
          "student.log_softmax", "no effect at T = 1; above it the student becomes as flat as the softened teacher"),
    Break("no T squared", "variations/distillation", "return temperature ** 2 * (log_p", "return (log_p",
          "no effect at T = 1; above it the labels weigh more than LABEL_WEIGHT says"),
    Break("padding is distilled too", "variations/distillation", "scored = targets != IGNORE  ",
          "scored = targets != PAD_ID  ",
          "no effect on labels; the soft loss also covers the prompt and what follows the end"),
    Break("KL in the other direction", "variations/distillation", "(log_p.exp() * (log_p - log_q))",
          "(log_q.exp() * (log_q - log_p))", "the student picks one of the teacher's tokens instead of covering all"),
]
# How a broken variation is put into the model before it is trained; `v` is its module.
EXCHANGES = {
    "variations/positional_encodings": 'v.exchange(model, "RoPE")',
    "variations/llama": "v.exchange(model, v.PARTS)",
    "variations/parameter_efficient_fine_tuning": 'v.exchange(model, "LoRA, rank 4").requires_grad_()',
    "variations/quantization": 'v.exchange(model, 3, "channel")',
    "variations/mixture_of_experts": "v.exchange(model, 4, 1)",
    "variations/parameter_sharing": "v.exchange(model, v.WHOLE_LAYER)",
}

TRAIN = """
import sys, torch, {module} as m
from tqdm import tqdm
from toy_dataset import make_splits, number_to_words
torch.manual_seed(0)
loaders = m.create_dataloaders(m.BATCH_SIZE)
model = m.build_model()
{exchange}
history = m.train(model, loaders, 2, m.LEARNING_RATE, 1, tqdm(disable=True, total=1))
numbers = make_splits().validation[:500]
if "{module}" == "encoder_only":
    prompts = [m.to_ids(["<CLS>", *str(n), "<SEP>", *["<MASK>"] * len(number_to_words(n)), "<SEP>"]) for n in numbers]
    filled = m.generate(model, prompts).tolist()
    said = [" ".join(m.to_tokens(ids)[len(str(n)) + 2:-1]) for n, ids in zip(numbers, filled)]
elif "{module}" == "decoder_only":
    said = [m.to_words(ids) for ids in m.generate(model, [m.make_prompt(n) for n in numbers])]
else:
    said = [m.to_words(ids) for ids in m.beam_search(model, [m.make_source(n) for n in numbers])[0][:, 0]]
right = sum(text == " ".join(number_to_words(n)) for n, text in zip(numbers, said)) / len(numbers)
print(f"loss {{history[-1]['loss']:.3f}}, exact {{history[-1]['exact_match']:.1%}}, generated {{right:.1%}}")
"""
# Not test_twins: it fails for every bug in an architecture file, as each changes one file only.
TESTS = ["test_toy_dataset", "test_all_architectures", "test_decoder_only", "test_encoder_decoder", "test_encoder_only"]


def copy_code(folder: Path) -> None:
    """Copy the repository, without figures, checkpoints and what does not belong to it."""
    left_out = shutil.ignore_patterns(".*", "figures", "checkpoints", "workbench", "venv", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)


def apply(mistake: Break, folder: Path) -> None:
    """Plant the bug in the copy. Raises ValueError unless its text occurs exactly once."""
    path = folder / f"{mistake.file}.py"
    source = path.read_text()
    if source.count(mistake.old) != 1:
        raise ValueError(f"{mistake.name}: {mistake.old!r} occurs {source.count(mistake.old)} times in {path.name}")
    path.write_text(source.replace(mistake.old, mistake.new))


def train_briefly(file: str, folder: Path) -> str:
    """Train two epochs; returns the metrics. Bugs in variations and in the data are measured with the decoder."""
    module = file if file in ("encoder_only", "decoder_only", "encoder_decoder") else "decoder_only"
    name = file.removeprefix("variations/")
    exchange = f"from variations import {name} as v; {EXCHANGES[file]}" if file in EXCHANGES else ""
    command = [sys.executable, "-c", TRAIN.format(module=module, exchange=exchange)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "stops: " + done.stderr.strip().splitlines()[-1]


def first_red_test(file: str, folder: Path) -> str:
    """The first test that fails because of a bug in this file. Each variation has its own test file."""
    tests = [f"variations/test_{file.removeprefix('variations/')}"] if file.startswith("variations/") else TESTS
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no",
               *(f"tests/{name}.py" for name in tests)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else "NONE"


def main(names: list[str]) -> None:
    """Plant the named bugs, or all of them, one at a time."""
    baselines = {}
    for mistake in BREAKS:
        if names and mistake.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            copy_code(Path(folder))
            if mistake.file not in baselines:
                baselines[mistake.file] = train_briefly(mistake.file, Path(folder))
            apply(mistake, Path(folder))
            print(f"{mistake.name} ({mistake.file}.py)\n"
                  f"  expected  {mistake.expected}\n"
                  f"  unbroken  {baselines[mistake.file]}\n"
                  f"  broken    {train_briefly(mistake.file, Path(folder))}\n"
                  f"  fails     {first_red_test(mistake.file, Path(folder))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
