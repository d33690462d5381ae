"""What the three architecture files share is identical in all of them; what differs is listed here, with the reason."""

import ast
from functools import cache

from conftest import ROOT

FILES = ["encoder_only", "decoder_only", "encoder_decoder"]
# Name -> why at least two of the files differ in it.
DIFFERENT = {
    "MultiHeadAttention.forward": "cross-attention attends to a source; only decoders have a cache",
    "DecoderLayer": "an encoder-decoder's has cross-attention",
    "DecoderLayer.__init__": "an encoder-decoder's has cross-attention",
    "DecoderLayer.forward": "an encoder-decoder's has cross-attention",
    "build_model": "each builds its own model; an encoder's needs a task",
    "create_dataloaders": "each is fed its own examples",
    "predict": "each reads its own batches",
    "evaluate": "what counts as the answer: masked tokens, the words after <SEP>, the target",
    "generate": "the point of having three architectures",
    "answer": "each has its own kind of question and answer",
    "parameter_formula": "each has its own parts",
    "describe_floor": "masked tokens, free text and names differ in what can be predicted",
    "show_strategies": "they have different strategies",
    "check_constants": "each has constants of its own",
    "train_and_test": "an encoder is pretrained, then fine-tuned",
    "main": "each shows what it is for",
}


def units(name: str) -> dict[str, str]:
    """The source of every function, of every method, and of every class without its methods, by name."""
    source = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            text = ast.get_source_segment(source, node)
            for method in methods:
                segment = ast.get_source_segment(source, method)
                found[f"{node.name}.{method.name}"] = segment
                text = text.replace(segment, "")
            found[node.name] = text
            if node.name.endswith("Transformer"):  # the classes' names differ, but `embed` is the same in all
                found["embed"] = found[f"{node.name}.embed"]
    return found


@cache
def shared() -> dict[str, set[str]]:
    """Names that are defined in more than one file -> their different sources."""
    sources = [units(name) for name in FILES]
    names = [name for found in sources for name in found]
    return {name: {found[name] for found in sources if name in found} for name in names if names.count(name) > 1}


def test_what_has_the_same_name_is_written_the_same():
    assert len(shared()) > 30
    assert {name for name, variants in shared().items() if len(variants) > 1} - set(DIFFERENT) == set()


def test_the_list_of_differences_has_no_superfluous_entry():
    assert {name for name in DIFFERENT if len(shared().get(name, set())) < 2} == set()
