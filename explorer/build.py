"""build.py - your own trained models, live in one web page.

    python explorer/build.py          writes explorer/explorer.html: open it with a double click

The page holds the weights of all three models and runs them in the browser, in plain JavaScript (transformer.js, the
twin of the three Python files). It sends and loads nothing: it works offline, and so do copies of it. In it you can

    type a number and watch the answer appear, token by token, each marked correct or wrong
    see the distribution of the next token, and what temperature, top-k and top-p make of it
    see the attention weights of every head, switch heads off, and measure what that costs
    change one digit and see which outputs move; see what each layer would already answer

The models come from checkpoints/ where they fit today's constants (python decoder_only.py and the others save them
there, train_all.py too). What is missing is trained now, briefly, and is not saved: about a minute for each model on
two CPU cores.

    page.html + page.css + page.js    the page
    language.js                       the rules of the toy language, by which answers are marked
    transformer.js                    the models
    weights, held-out numbers, source code to show, and a self-test: from Python, below

The self-test compares the two implementations: explorer.html#selftest runs 30 inputs through each JavaScript model and
compares its logits and answers with those that PyTorch gave when the page was built.
"""

import base64
import inspect
import json
import os
import random
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import decoder_only  # noqa: E402
import encoder_decoder  # noqa: E402
import encoder_only  # noqa: E402
import toy_dataset  # noqa: E402
from toy_dataset import IGNORE, InputError, number_to_words, run_script  # noqa: E402

# ======================================================================================================
# CONSTANTS
# ======================================================================================================

FOLDER = Path(__file__).parent
PAGE = FOLDER / "explorer.html"
EPOCHS = {"encoder_only": 5, "decoder_only": 4, "encoder_decoder": 3}  # of a model that has no checkpoint. Try 1
NUM_HELD_OUT = 200   # numbers on which the page measures what a switched-off part costs. Try 1000: slower, less noise
NUM_SELF_TEST = 30   # inputs of each model in the self-test
SEED = 0             # initial weights, and which tokens are masked

MODULES = (encoder_only, decoder_only, encoder_decoder)

# ======================================================================================================
# THE MODELS
# ======================================================================================================


def load_models() -> tuple[dict, dict]:
    """The three models, on the CPU, and where each comes from, as text; both by module name."""
    models, origins = {}, {}
    for module in MODULES:
        try:
            models[module.__name__] = module.load()
            origins[module.__name__] = f"from checkpoints/{module.CHECKPOINT.name}"
        except (InputError, FileNotFoundError):
            origins[module.__name__] = f"trained for this page, {EPOCHS[module.__name__]} epochs"
    missing = [module for module in MODULES if module.__name__ not in models]
    if missing:
        print("No checkpoint that fits for " + ", ".join(module.__name__ for module in missing) + ": training now.")
        loaders = {module.__name__: module.create_dataloaders() for module in missing}
        num_steps = sum(EPOCHS[name] * len(loader.train) for name, loader in loaders.items())
        with tqdm(total=num_steps, ascii=True, ncols=95, mininterval=0.5) as bar:
            for module in missing:
                name = module.__name__
                bar.set_description(name)
                torch.manual_seed(SEED)
                models[name] = module.build_model()
                module.train(models[name], loaders[name], EPOCHS[name], num_evaluations=0, progress=bar)
    return {module.__name__: models[module.__name__].cpu().eval() for module in MODULES}, origins


def choose_hole(number: int) -> int:
    """Which token of [*digits, *words] to mask: the same for a number each time. What is left determines it."""
    return random.Random(f"{SEED} {number}").randrange(len(str(number)) + len(number_to_words(number)))


def mask_one(number: int) -> dict:
    """An example for the masked LM in which one token is masked, a digit or a word; `targets` asks for it alone."""
    ids = toy_dataset.masked_lm_example(number)["ids"]
    hole = choose_hole(number)
    at = hole + (1 if hole < len(str(number)) else 2)  # after <CLS>, or after <CLS> and <SEP>
    targets = [IGNORE] * len(ids)
    targets[at], ids[at] = ids[at], toy_dataset.MASK_ID
    return {"ids": ids, "targets": targets}


def measure(module, model) -> float:
    """Exact match on the validation numbers; for the masked LM with one token of each masked."""
    numbers = toy_dataset.make_splits().validation
    make_example = {encoder_only: mask_one, decoder_only: toy_dataset.decoder_only_example,
                    encoder_decoder: toy_dataset.encoder_decoder_example}[module]
    examples = [make_example(number) for number in numbers]
    batches = [toy_dataset.pad_batch(examples[i : i + 1000]) for i in range(0, len(examples), 1000)]
    return module.evaluate(model, batches)["exact_match"]


def encode_floats(tensors) -> str:
    """Tensors, flattened and joined, as 32-bit floats in base64: a quarter of the size of numbers written out."""
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    return base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode()


def export_model(module, model, origin: str) -> dict:
    """What the page needs of one model: constants, weights under their state_dict names, and facts to show."""
    weights = model.state_dict()
    return {
        "constants": model.constants | {"MAX_NEW_TOKENS": getattr(module, "MAX_NEW_TOKENS", 0)},
        "tensors": [[name, tensor.numel()] for name, tensor in weights.items()],
        "weights": encode_floats(weights.values()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "origin": origin,
        "exact_match": measure(module, model),
        "file": Path(module.__file__).name,
    }


# ======================================================================================================
# THE SELF-TEST: what PyTorch computes
# ======================================================================================================


@torch.no_grad()
def self_test(module, model, numbers: list[int]) -> list[dict]:
    """For each number: the input, PyTorch's logits (T, V) for it, and its greedy answer."""
    cases = []
    for number in numbers:
        if module is encoder_only:
            rng = random.Random(f"{SEED} {number}")
            ids = toy_dataset.masked_lm_example(number)["ids"]
            tokens = [i for i, token in enumerate(ids) if token >= len(toy_dataset.SPECIAL_TOKENS)]
            holes = rng.sample(tokens, rng.randint(1, min(4, len(tokens))))
            prompt = [toy_dataset.MASK_ID if i in holes else token for i, token in enumerate(ids)]
            logits = model(torch.tensor([prompt]))
            case = {"prompt": prompt, "answer": module.generate(model, [prompt], iterations=len(holes))[0].tolist()}
        elif module is decoder_only:
            prompt, text = module.make_prompt(number), toy_dataset.decoder_only_example(number)["ids"]
            logits = model(torch.tensor([text]))
            case = {"prompt": prompt, "text": text,
                    "answer": module.generate(model, [prompt], temperature=0.0)[0].tolist()}
        else:
            source, target = module.make_source(number), toy_dataset.encoder_decoder_example(number)["target"]
            logits = model(torch.tensor([source]), torch.tensor([target]))
            case = {"prompt": source, "text": target,
                    "answer": module.generate(model, [source], temperature=0.0)[0].tolist()}
        cases.append(case | {"logits": encode_floats([logits])})
    return cases


# ======================================================================================================
# THE PAGE
# ======================================================================================================


def find_source(module, name: str) -> dict | None:
    """The source of a function or method ("KVCache" or "EncoderLayer.forward"); None where the file has none."""
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        return None
    lines, first = inspect.getsourcelines(found)
    return {"line": first, "code": inspect.cleandoc("\n" + "".join(lines))}


def collect_sources(html: str) -> dict:
    """All functions that the page shows, by its data-source attributes: file -> name -> {line, code}."""
    names = sorted({name for names in re.findall(r'data-source="([^"]+)"', html) for name in names.split()})
    sources = {module.__name__: {name: source for name in names if (source := find_source(module, name))}
               for module in MODULES}
    absent = [name for name in names if not any(name in of_file for of_file in sources.values())]
    assert not absent, f"page.html links to {absent}, which no architecture file has"
    return sources


def embed_json(data) -> str:
    """JSON that may stand inside a <script> element: a "</script>" in it would end the element."""
    return json.dumps(data, separators=(",", ":")).replace("</", "<\\/")


def build_page(models: dict, origins: dict) -> str:
    """The whole page as one text."""
    html, css, page_js, language_js, transformer_js = (
        (FOLDER / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js", "language.js", "transformer.js"))
    splits = toy_dataset.make_splits()
    # Short numbers are all in the training split; the others are held out, and test[:n] is a fair sample of lengths.
    tested = [0, 7, 42, *splits.test[: NUM_SELF_TEST - 3]]
    data = {
        "vocabulary": toy_dataset.VOCABULARY,
        "rules": {"maxDigits": toy_dataset.MAX_DIGITS, "maxWords": toy_dataset.MAX_WORDS, "ones": toy_dataset.ONES,
                  "tens": toy_dataset.TENS, "units": list(toy_dataset.UNITS.items())},
        "models": {module.__name__: export_model(module, models[module.__name__], origins[module.__name__])
                   for module in MODULES},
        "train": sorted(splits.train),
        "heldOut": [[number, choose_hole(number)] for number in splits.test[:NUM_HELD_OUT]],
        "selftest": {module.__name__: self_test(module, models[module.__name__], tested) for module in MODULES},
        "sources": collect_sources(html),
    }
    parts = {"page.css": css, "data": embed_json(data), "transformer.js": transformer_js,
             "language.js": language_js, "page.js": page_js}
    # One pass, so that nothing in an inserted part is taken for a mark; and a function, so that no "\" is an escape.
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], html)


def main() -> None:
    """Load or train the models, and write the page."""
    if not os.access(FOLDER, os.W_OK):
        raise PermissionError(f"{FOLDER} is not writable: change its permissions, or PAGE in this file.")
    models, origins = load_models()
    page = build_page(models, origins)
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, PAGE)  # at once or not at all
    for name, model in models.items():
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"  {name:16}{parameters:9,} parameters, {origins[name]}")
    print(f"{PAGE}  ({PAGE.stat().st_size / 1e6:.1f} MB)\n"
          "Open it in a browser: a double click will do. It needs no network.")


if __name__ == "__main__":
    run_script(main)
