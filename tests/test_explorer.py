"""The explorer page, in a real browser: it computes what PyTorch computes, and everything on it can be used.

The models are the small ones that the other tests train; what the page should say is computed by the Python files, so
nothing here depends on how good they are. Needs Playwright and an installed Chromium (`apt-get install chromium`) or
Chrome; without them these tests are skipped and say so.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import MODULES, ROOT, tiny
from test_scripts import FAST, SMALL, set_constants

import decoder_only
import encoder_decoder
import encoder_only
import toy_dataset
from toy_dataset import MASK_ID, SOS_ID, VOCABULARY, number_to_words, to_ids

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
if BROWSER is None:
    pytest.skip("no Chromium or Chrome is installed", allow_module_level=True)

specification = importlib.util.spec_from_file_location("explorer_build", ROOT / "explorer" / "build.py")
build = importlib.util.module_from_spec(specification)
specification.loader.exec_module(build)

FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()  # as root in a container; and no requests of the browser's own
NAMES = [module.__name__ for module in MODULES]
VIEWS = ["attention", "next", "switch", "change", "layers"]
NUMBERS = [0, 7, 342, 1010, 90210, 600006]


@pytest.fixture(scope="session")
def models(trained_encoder, trained_decoder, trained_encoder_decoder):
    return dict(zip(NAMES, (trained_encoder, trained_decoder, trained_encoder_decoder)))


@pytest.fixture(scope="session")
def html(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    path.write_text(build.build_page(models, dict.fromkeys(models, "trained in a test")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def default_html(tmp_path_factory):
    """The page with models of the default sizes, untrained: as large, and as slow, as the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "measure", lambda *_: 0.5)
        patch.setattr(build, "self_test", lambda *_: [])
        torch.manual_seed(0)
        models = {module.__name__: module.build_model().cpu().eval() for module in MODULES}
        path = tmp_path_factory.mktemp("explorer") / "explorer.html"
        path.write_text(build.build_page(models, dict.fromkeys(models, "")), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, html):
    """visit("model=decoder_only&number=342"): the page, opened there. At the end: no error and no request happened."""
    problems, pages = [], []

    def open_at(address="", path=html, width=1200, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(60_000)  # a busy machine is slow, not wrong
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: request.url.startswith(path.as_uri()) or problems.append(request.url))
        page.goto(f"{path.as_uri()}#{address}")
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.close()
    assert problems == []


def wait_until(page, expression):
    """Until a JavaScript expression is true. (Playwright's wait_for_function needs eval, which the page forbids.)"""
    for _ in range(400):
        if page.evaluate(expression):
            return
        time.sleep(0.025)
    raise AssertionError(f"never true: {expression}")


def answer_of(page):
    return page.inner_text("#answer").replace("\n", " ")


def spoken(page, selector):
    """The text of some buttons, without their marks."""
    return page.eval_on_selector_all(selector, "elements => elements.map((element) => element.firstChild.textContent)")


def python_answer(model, number):
    """The greedy answer of a decoder, as words."""
    module = decoder_only if hasattr(model, "layers") else encoder_decoder
    prompt = module.make_prompt(number) if module is decoder_only else module.make_source(number)
    return module.to_words(module.generate(model, [prompt], temperature=0.0)[0])


@torch.no_grad()
def forward(model, number, maps=None):
    """Logits (T, V) of a decoder that reads a number and its answer. maps: receives its (cross-)attention weights."""
    maps = [] if maps is None else maps
    if hasattr(model, "layers"):
        prompt = decoder_only.make_prompt(number)
        said = decoder_only.generate(model, [prompt], temperature=0.0)[0].tolist()
        return model(torch.tensor([prompt + said[:-1]]), attention_maps=maps)[0]
    source = torch.tensor([encoder_decoder.make_source(number)])
    said = encoder_decoder.generate(model, source.tolist(), temperature=0.0)[0].tolist()
    memory = model.encode(source)
    return model.decode(torch.tensor([[SOS_ID, *said[:-1]]]), memory, source, cross_maps=maps)[0]


def probabilities(logits):
    """Softmax of (T, V) logits without <PAD>, which is never written."""
    return logits.index_fill(1, torch.tensor([0]), -torch.inf).softmax(-1)


# --- what is built ---


def test_with_the_default_sizes_the_page_is_one_file_of_at_most_12_MB(default_html):
    page = default_html.read_text(encoding="utf-8")
    assert 6_000_000 < default_html.stat().st_size < 11_000_000  # the self-test, left out here, adds less than 1 MB
    assert re.findall(r'(?:src|href)="(?!data:,)[^"]*"|@import|url\(', page) == []


def test_build_trains_what_has_no_checkpoint_and_prints_where_the_page_is(tmp_path, monkeypatch):
    for module in MODULES + [toy_dataset]:
        shutil.copy(module.__file__, tmp_path)
        name = module.__name__
        set_constants(tmp_path / f"{name}.py", SMALL if module is toy_dataset else FAST)
    shutil.copytree(ROOT / "explorer", tmp_path / "explorer", ignore=shutil.ignore_patterns("explorer.html"))
    set_constants(tmp_path / "explorer" / "build.py", {"EPOCHS": dict.fromkeys(NAMES, 1), "NUM_HELD_OUT": 10})
    monkeypatch.setattr(toy_dataset, "NUM_TRAIN", SMALL["NUM_TRAIN"])  # a checkpoint says what it was trained on
    sizes = [FAST[name] for name in ("D_MODEL", "NUM_LAYERS", "NUM_HEADS", "D_FF")]
    decoder_only.save(decoder_only.build_model(*sizes), tmp_path / "checkpoints" / "decoder_only.pt")
    done = subprocess.run([sys.executable, "explorer/build.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No checkpoint that fits for encoder_only, encoder_decoder: training now." in done.stdout
    assert "from checkpoints/decoder_only.pt" in done.stdout and "encoder_decoder" in done.stderr  # the progress bar
    path = tmp_path / "explorer" / "explorer.html"
    assert f"\n{path}  (" in done.stdout and path.exists()
    assert [line for line in done.stdout.splitlines() if len(line) > 100 and str(tmp_path) not in line] == []


# --- the engine: the same numbers as PyTorch ---


def test_the_engine_has_the_names_and_the_order_of_the_python_files():
    source = (ROOT / "explorer" / "transformer.js").read_text(encoding="utf-8")
    defined = re.findall(r"^(?:function|class|const) (\w+)", source, flags=re.MULTILINE)
    for module in MODULES:
        names = re.findall(r"^(?:class|def) (\w+)", (ROOT / f"{module.__name__}.py").read_text(), flags=re.MULTILINE)
        camel_case = [re.sub(r"_(\w)", lambda match: match[1].upper(), name[0].lower() + name[1:]) for name in names]
        shared = [name for name in camel_case if name in defined]
        assert {"positionalEncoding", "scaledDotProductAttention", "multiHeadAttention", "feedForward"} < set(shared)
        assert shared == sorted(shared, key=defined.index)


def test_the_self_test_finds_the_logits_and_the_answers_of_pytorch(visit):
    page = visit("selftest")
    wait_until(page, "document.getElementById('selftest').textContent")
    found = json.loads(page.inner_text("#selftest"))
    assert found["largest_difference"] <= 1e-3 and found["same_answers"] is True and found["inputs"] == 90


def test_the_self_test_notices_one_changed_weight(visit):
    page = visit()
    page.evaluate("getModel('encoder_decoder').weights['decoder.1.cross_attention.value.weight'][5] += 1")
    page.click("#run-selftest")
    wait_until(page, "document.getElementById('selftest').textContent")
    assert json.loads(page.inner_text("#selftest"))["largest_difference"] > 1e-3


def zero(model, part):
    """Switch a part off in PyTorch: zero what its output is multiplied with."""
    name, _, head = part.partition(".head.")
    module = model.get_submodule(name)
    with torch.no_grad():
        if head:
            d_k = module.output.in_features // module.num_heads
            module.output.weight[:, int(head) * d_k : (int(head) + 1) * d_k] = 0
        else:
            module.contract.weight.zero_()
            module.contract.bias.zero_()


@pytest.mark.parametrize("module, parts", [
    (encoder_only, ["layers.0.attention.head.1", "layers.1.feed_forward"]),
    (decoder_only, ["layers.1.attention.head.3", "layers.0.feed_forward"]),
    (encoder_decoder, ["encoder.0.attention.head.0", "decoder.1.cross_attention.head.2",
                       "decoder.0.self_attention.head.1"]),
], ids=NAMES)
def test_a_part_that_is_switched_off_adds_nothing(module, parts, visit):
    model = tiny(module)
    for part in parts:
        zero(model, part)
    ids, target = to_ids(["<CLS>", *"90210", "<SEP>"]), to_ids(["<SOS>", "ninety", "thousand"])
    with torch.no_grad():
        logits = model(torch.tensor([ids]), torch.tensor([target])) if module is encoder_decoder else \
            model(torch.tensor([ids]))
    page = visit()
    exported = build.export_model(module, tiny(module), "")  # everything on: the page does the switching
    found = page.evaluate("""([name, exported, off, text, source]) => {
        DATA.models[name] = exported;
        delete loaded[name];
        Object.assign(state, {model: name});
        return run({source, text}, new Set(off)).logits.map((row) => [...row]);
    }""", [module.__name__, exported, parts, target if module is encoder_decoder else ids, ids])
    torch.testing.assert_close(torch.tensor(found), logits[0], atol=1e-4, rtol=1e-4)


def test_strategies_leave_the_logits_that_python_leaves(visit):
    logits = torch.randn(46, generator=torch.Generator().manual_seed(3)) * 3
    page = visit()

    def in_page(expression):
        found = page.evaluate(f"(logits) => [...{expression}].map((x) => x === -Infinity ? null : x)", logits.tolist())
        return torch.tensor([float("-inf") if value is None else value for value in found])

    row = logits[None]
    for k in (1, 5, 46):
        assert torch.equal(in_page(f"keepTopK(logits, {k})"), decoder_only.keep_top_k(row, k)[0])
    for p in (0.05, 0.5, 0.9, 1):
        assert torch.equal(in_page(f"keepTopP(logits, {p})"), decoder_only.keep_top_p(row, p)[0])
    both = decoder_only.keep_top_p(decoder_only.keep_top_k(row / 2, 10), 0.8)[0]
    torch.testing.assert_close(in_page("applyStrategies(logits, {temperature: 2, topK: 10, topP: 0.8})"), both)


def test_tokens_are_drawn_as_often_as_they_are_likely(visit):
    shares = visit().evaluate("""() => {
        const logits = [2, 0, 1, -Infinity].map((x) => x), counts = [0, 0, 0, 0];
        for (let i = 0; i < 1000; i++) counts[chooseToken(logits, {temperature: 1}, () => (i + 0.5) / 1000)]++;
        return counts.map((count) => count / 1000);
    }""")
    expected = torch.tensor([2, 0, 1, float("-inf")]).softmax(0)
    torch.testing.assert_close(torch.tensor(shares), expected, atol=2e-3, rtol=0)


# --- the language, by which answers are marked ---


def test_numbers_are_named_by_the_rules_of_toy_dataset(visit):
    numbers = [*range(1200), *toy_dataset.make_splits().test[:500], 10**6 - 1]
    found = visit().evaluate("(numbers) => numbers.map((n) => numberToWords(RULES, n).join(' '))", numbers)
    assert found == [" ".join(number_to_words(number)) for number in numbers]


@pytest.mark.parametrize("text", ["3 <MASK> 2 <SEP> three hundred <MASK> two", "<MASK> <MASK> <SEP> <MASK>",
                                  "<MASK> 0 0 <MASK> <SEP> <MASK> thousand <MASK>", "3 4 2 <SEP> three hundred two",
                                  "<MASK> <MASK> <MASK> <MASK> <SEP> <MASK> <MASK> <MASK> <MASK> twelve"])
def test_the_numbers_that_fit_a_text_with_holes_are_all_counted(text, visit):
    tokens = text.split()
    middle = tokens.index("<SEP>")
    digits, words = tokens[:middle], tokens[middle + 1:]

    def fits(pattern, real):
        return len(pattern) == len(real) and all(a in (b, "<MASK>") for a, b in zip(pattern, real))

    length = len(digits)
    numbers = [n for n in range(10 ** (length - 1) if length > 1 else 0, 10**length)
               if fits(digits, str(n)) and fits(words, number_to_words(n))]
    found = visit().evaluate("""([digits, words]) => {
        const {count, shares} = possibleNumbers(RULES, digits, words);
        return {count, shares: shares.map((share) => Object.fromEntries(share))};
    }""", [digits, words])
    assert found["count"] == len(numbers)
    for i, share in enumerate(found["shares"]):
        expected = {}
        for number in numbers:
            token = [*str(number), *number_to_words(number)][i]
            expected[token] = expected.get(token, 0) + 1 / len(numbers)
        assert share == pytest.approx(expected)


# --- the answer ---


@pytest.mark.parametrize("name", ["decoder_only", "encoder_decoder"])
def test_a_number_is_answered_as_in_python_and_each_token_is_marked_by_the_rules(name, models, visit):
    page = visit(f"model={name}&number=7")
    for number in NUMBERS:
        page.fill("#input", str(number))
        said = python_answer(models[name], number)
        assert answer_of(page) == said
        truth = number_to_words(number)
        marks = page.eval_on_selector_all("#answer .said", "all => all.map((word) => word.classList.contains('right'))")
        assert marks == [i < len(truth) and word == truth[i] for i, word in enumerate(said.split())]
        assert page.inner_text("#verdict b") == ("Correct." if said.split() == truth else "Wrong.")
    trained_on = toy_dataset.make_splits().train[0]
    page.fill("#input", str(trained_on))
    assert "was trained on this number" in page.inner_text("#verdict")


def test_a_text_with_holes_is_filled_in_as_in_python(models, visit):
    texts = ["90210 <SEP> ninety <MASK> two hundred ten", "<MASK> <MASK> 2 <SEP> three hundred <MASK> two"]
    for text in texts:
        prompt = encoder_only.parse_text(text)
        filled = encoder_only.generate(models["encoder_only"], [prompt], iterations=prompt.count(MASK_ID))[0]
        page = visit(f"model=encoder_only&text={text}")
        assert answer_of(page).replace("✓", "").split() == [VOCABULARY[i] for i in filled[1:-1].tolist()]
        assert len(page.query_selector_all("#answer .said")) == prompt.count(MASK_ID)


def test_any_digit_or_word_becomes_a_hole_with_a_click_and_comes_back_with_another(visit):
    page = visit("model=encoder_only&number=342")
    assert spoken(page, "#prompt .token") == "<CLS> 3 4 2 <SEP> three hundred <MASK> two <SEP>".split()
    page.click("#prompt .token:nth-child(8)")
    assert "<MASK>" not in spoken(page, "#prompt .token")
    assert page.input_value("#input") == "342 <SEP> three hundred forty two"
    assert "Nothing is masked" in page.inner_text("#verdict")
    page.click("#prompt .token:nth-child(3)")
    page.click("#prompt .token:nth-child(8)")
    assert page.input_value("#input") == "3 <MASK> 2 <SEP> three hundred <MASK> two"
    assert "8 numbers fit this text." in page.inner_text("#verdict")
    page.click("#prompt .token:nth-child(1)")
    assert "can't be masked" in page.inner_text("#message")
    page.fill("#input", "342 <SEP> three hundred five")  # not the name of any number
    page.click("#prompt .token:nth-child(2)")
    assert "No number fits" in page.inner_text("#verdict")


def test_the_answer_is_stepped_through_and_played(models, visit):
    page = visit("model=decoder_only&number=342")
    words = python_answer(models["decoder_only"], 342).split()
    page.click("#back")
    page.click("#back")
    assert answer_of(page).split() == words[:-1]
    page.click("#step")
    assert answer_of(page).split() == words and page.is_enabled("#step")  # <EOS> is a token too
    page.click("#step")
    page.click("#play")
    assert len(answer_of(page).split()) < len(words)
    wait_until(page, "document.getElementById('play').textContent === 'Play'")
    assert answer_of(page).split() == words and page.is_disabled("#step")


def test_the_answer_appears_within_100_ms_of_typing_with_the_default_sizes(visit, default_html):
    page = visit("number=1", default_html)
    for name in NAMES:
        page.click(f"#model-{name}")
        times = page.evaluate("""() => ["777777", "123456", "999999", "654321", "888888"].map((text) => {
            const start = performance.now();
            $("input").value = text;
            $("input").dispatchEvent(new Event("input"));
            return $("answer").textContent ? performance.now() - start : 1e9;
        })""")
        assert min(times) < 100, (name, times)  # the least of five: the machine may be busy with something else


# --- the views ---


def test_the_bars_are_the_probabilities_of_pytorch_and_the_sliders_act_at_once(models, visit):
    page = visit("model=decoder_only&number=342&view=next&temperature=2")
    logits = forward(models["decoder_only"], 342)[4].clone()  # at <SEP>: predicts the first word
    logits[0] = float("-inf")

    def shown():
        return {token: float(p) for token, p in page.eval_on_selector_all(
            "#bars .bar", "bars => bars.map((bar) => [bar.dataset.token, bar.dataset.probability])")}

    def expected(logits):
        return {VOCABULARY[i]: p for i, p in enumerate(logits.softmax(0).tolist())}

    page.wait_for_selector("#bars .bar")
    for token, p in shown().items():
        assert p == pytest.approx(expected(logits / 2)[token], abs=1e-4)
    page.fill("#temperature", "3")
    page.fill("#top-k", "4")
    wait_until(page, "document.querySelectorAll('#bars .cut-away').length === 6")
    kept = decoder_only.keep_top_k(logits[None] / 3, 4)[0]
    for token, p in shown().items():
        assert p == pytest.approx(expected(kept)[token], abs=1e-4)
    cut = 1 - (logits / 3).softmax(0).topk(4).values.sum().item()
    share = page.eval_on_selector("#cut-kept", "bar => parseFloat(bar.style.width) / 100")
    assert share == pytest.approx(1 - cut, abs=1e-3) and "4 of 45" in page.inner_text("#cut-note")
    page.fill("#top-k", "46")
    page.fill("#top-p", "0.5")
    wait_until(page, "!location.hash.includes('top_k') && location.hash.includes('top_p=0.5')")
    answers = set()
    for _ in range(5):
        page.click("#sample")
        answers.add(answer_of(page))
    page.fill("#top-p", "1")
    page.fill("#temperature", "5")
    for _ in range(5):
        page.click("#sample")
        answers.add(answer_of(page))
    assert len(answers) > 3
    page.fill("#temperature", "0")
    assert answer_of(page) == python_answer(models["decoder_only"], 342) and page.is_disabled("#sample")


def test_the_best_possible_prediction_of_a_hole_is_marked(visit):
    page = visit("model=encoder_only&text=<MASK> <SEP> <MASK>&view=next&temperature=1")
    page.wait_for_selector("#bars .bar")
    ideals = page.eval_on_selector_all("#bars .ideal", "marks => marks.map((mark) => mark.style.left)")
    assert ideals and set(ideals) == {"10%"}  # ten digits, ten names: any of them


@pytest.mark.parametrize("name", ["decoder_only", "encoder_decoder"])
def test_every_head_is_shown_and_pointing_at_a_token_shows_what_it_attends_to(name, models, visit):
    page = visit(f"model={name}&number=342")
    maps = []
    forward(models[name], 342, maps)
    page.click('[data-head="1.2"]')
    assert len(page.query_selector_all("#heads .tile canvas")) == 2 * 4
    cells = page.eval_on_selector_all("#map .cell", "cells => cells.map((cell) => Number(cell.dataset.value))")
    expected = maps[1][0, 2]
    torch.testing.assert_close(torch.tensor(cells).view_as(expected), expected, atol=1e-4, rtol=0)
    page.hover('#map .row-label[data-row="2"]')
    weights = page.eval_on_selector_all("#attended .weight", "all => all.map((token) => Number(token.dataset.weight))")
    torch.testing.assert_close(torch.tensor(weights), expected[2], atol=1e-4, rtol=0)
    if name == "encoder_decoder":
        assert spoken(page, "#groups button") == ["cross-attention", "decoder self-attention", "encoder self-attention"]
        word = python_answer(models[name], 342).split()[2]
        assert page.inner_text("#attended p") == f"The position that predicts {word} attends to"
        page.click("#groups button:nth-child(3)")
        assert len(page.query_selector_all("#map .cell")) == 4 * 4


def test_a_head_switched_off_changes_the_answer_and_is_measured_on_held_out_numbers(models, visit):
    part, numbers = "layers.0.feed_forward", toy_dataset.make_splits().test[: build.NUM_HELD_OUT]
    batch = toy_dataset.pad_batch([toy_dataset.decoder_only_example(number) for number in numbers])
    before = decoder_only.evaluate(models["decoder_only"], [batch])["exact_match"]
    broken = decoder_only.build_model(*[models["decoder_only"].constants[name] for name in
                                        ("D_MODEL", "NUM_LAYERS", "NUM_HEADS", "D_FF")], 0.0, 40).cpu().eval()
    broken.load_state_dict(models["decoder_only"].state_dict())
    zero(broken, part)
    after = decoder_only.evaluate(broken, [batch])["exact_match"]

    page = visit("model=decoder_only&number=777777&view=switch")
    page.click(f'[data-part="{part}"]')
    assert page.get_attribute(f'[data-part="{part}"]', "aria-pressed") == "false"
    wait_until(page, f"location.hash.includes('off={part}')")
    assert answer_of(page) == python_answer(broken, 777777) != python_answer(models["decoder_only"], 777777)
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => seen.push($("measure-note").textContent))
        .observe($("measure-note"), {childList: true}); }""")
    page.click("#measure")
    wait_until(page, "document.querySelectorAll('#measured td').length === 2")
    wait_until(page, "!document.getElementById('measured').textContent.includes('not measured')")
    shares = page.evaluate("measured.decoder_only")
    assert shares == {"": pytest.approx(before), part: pytest.approx(after)}
    assert any("of 400 answers" in note for note in page.evaluate("seen"))  # progress was shown
    page.click("#all-on")
    assert answer_of(page) == python_answer(models["decoder_only"], 777777)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_counts_as_correct_where_evaluate_counts_it(name, models, visit):
    numbers, module = toy_dataset.make_splits().test[: build.NUM_HELD_OUT], MODULES[NAMES.index(name)]
    make_example = {encoder_only: build.mask_one, decoder_only: toy_dataset.decoder_only_example,
                    encoder_decoder: toy_dataset.encoder_decoder_example}[module]
    batch = toy_dataset.pad_batch([make_example(number) for number in numbers])
    mistakes = module.evaluate(models[name], [batch])["mistakes"]
    found = visit().evaluate(f"DATA.heldOut.map((example) => isCorrect(getModel('{name}'), new Set(), example))")
    assert [i for i, right in enumerate(found) if not right] == mistakes and 0 < len(mistakes) < len(numbers)


def test_without_cross_attention_the_answer_does_not_depend_on_the_number(visit):
    page = visit("model=encoder_decoder&number=342&view=switch")
    for name in page.query_selector_all(".row > .link"):
        if name.inner_text() == "cross-attention":
            name.evaluate("(button) => button.click()")
    assert page.evaluate("state.off.encoder_decoder.size") == 8
    said = answer_of(page)
    for number in NUMBERS:
        page.fill("#input", str(number))
        assert answer_of(page) == said


def test_each_part_can_be_measured_alone_and_the_measurement_stopped(visit):
    page = visit("model=encoder_only&number=342&view=switch")
    page.evaluate("DATA.heldOut.length = 4")
    page.click("#measure-each")
    wait_until(page, "document.querySelectorAll('.switch .share').length === 10")
    page.click("#model-encoder_decoder")
    page.evaluate("while (DATA.heldOut.length < 4000) DATA.heldOut.push(DATA.heldOut[0])")
    page.click("#measure-each")
    wait_until(page, "document.getElementById('measure-note').textContent.includes('answers')")
    page.click("#measure-each")
    wait_until(page, "document.getElementById('measure').textContent === 'Measure'")


def influence_of(page):
    page.wait_for_selector("#influence .cell")
    rows = {}
    for row, value in page.eval_on_selector_all(
            "#influence .cell", "all => all.map((cell) => [cell.dataset.row, cell.dataset.value])"):
        rows.setdefault(int(row), []).append(None if value == "" else float(value))
    return list(rows.values())


def test_no_output_before_a_changed_token_moves_in_a_causal_model(visit):
    values = influence_of(visit("model=decoder_only&number=90210&view=change"))
    for t, row in enumerate(values):
        for s, value in enumerate(row):
            assert value is None or (value == 0 if s > t else value > 0), (t, s, value)


def test_every_output_moves_in_a_bidirectional_model(visit):
    values = influence_of(visit("model=encoder_only&number=90210&view=change"))
    assert all(value is None or value > 0 for row in values for value in row)


def test_a_digit_is_changed_and_the_outputs_move_as_far_as_in_pytorch(models, visit):
    page = visit("model=encoder_decoder&number=342&view=change")
    page.click('#influence [data-column="1"]')
    page.select_option("#replacement", label="9")
    model, source = models["encoder_decoder"], torch.tensor([encoder_decoder.make_source(342)])
    target = torch.tensor([[SOS_ID, *to_ids(python_answer(model, 342).split())]])
    changed = torch.tensor([encoder_decoder.make_source(392)])
    with torch.no_grad():
        before, after = (probabilities(model(ids, target)[0]) for ids in (source, changed))
    expected = (before - after).abs().sum(-1) / 2
    moved = page.eval_on_selector_all("#moved > div", "rows => rows.map((row) => Number(row.dataset.moved))")
    torch.testing.assert_close(torch.tensor(moved), expected, atol=1e-4, rtol=0)


def test_the_logit_lens_reads_the_stream_after_each_layer(models, visit):
    model, streams = models["decoder_only"], []
    hooks = [layer.register_forward_hook(lambda layer, given, x: streams.append(x)) for layer in model.layers]
    hooks.append(model.layers[0].register_forward_pre_hook(lambda layer, given: streams.append(given[0])))
    text = decoder_only.make_prompt(342)
    text += to_ids(python_answer(model, 342).split())
    streams.clear()
    with torch.no_grad():
        logits = model(torch.tensor([text]))
        lens = [(model.final_norm(x) @ model.embedding.weight.T)[0] for x in streams]
    for hook in hooks:
        hook.remove()
    assert len(lens) == 3 and torch.allclose(lens[-1], logits[0], atol=1e-5)
    page = visit("model=decoder_only&number=342&view=layers")
    page.wait_for_selector("#lens td")
    cells = page.eval_on_selector_all(
        "#lens td", "all => all.map((cell) => [cell.dataset.token, Number(cell.dataset.probability)])")
    rows = zip(*(probabilities(x[4:]) for x in lens))  # from <SEP> on, at which the first word is predicted
    for (token, p), expected in zip(cells, [layer for row in rows for layer in row], strict=True):
        assert token == VOCABULARY[expected.argmax()] and p == pytest.approx(expected.max().item(), abs=1e-4)


def test_each_view_shows_the_code_that_does_it(visit):
    page = visit("model=decoder_only&number=342")
    page.click('#view-attention [data-name="scaled_dot_product_attention"]')
    title, code = page.inner_text("#source-title"), page.inner_text("#code")
    line = int(re.search(r"line (\d+)", title)[1])
    source = (ROOT / "decoder_only.py").read_text().splitlines()
    assert title.startswith("decoder_only.py") and source[line - 1].startswith("def scaled_dot_product_attention(")
    assert "scores.softmax(dim=-1)" in code
    page.click("#languages button:nth-child(2)")
    assert "function scaledDotProductAttention(" in page.inner_text("#code")
    page.keyboard.press("Escape")
    for name in NAMES:
        page.click(f"#model-{name}")
        for view in VIEWS:
            versions = page.eval_on_selector_all(f"#view-{view} .sources button", """links => links.map((link) => {
                link.click();
                const languages = [...$("languages").children].map((button) => button.textContent).join();
                $("close").click();
                return languages;
            })""")
            assert versions and set(versions) == {"Python,JavaScript"}, (name, view)
    for hint in page.eval_on_selector_all(".hint", "hints => hints.map((hint) => hint.textContent)"):
        assert len(re.findall(r"[.?](?:\s|$)", hint)) == 2  # two sentences


# --- the address ---


def test_the_address_opens_the_page_where_it_was_left(models, visit):
    page = visit()
    page.click("#model-encoder_decoder")
    page.fill("#input", "1010")
    page.click("#tab-next")
    page.fill("#temperature", "4")
    page.click("#sample")
    page.click("#tab-switch")
    page.click('[data-part="decoder.1.feed_forward"]')
    page.click("#tab-attention")
    page.click("#groups button:nth-child(2)")
    page.click('[data-head="1.3"]')
    wait_until(page, "location.hash.includes('head=2.4')")
    again = visit(page.url.partition("#")[2])
    assert answer_of(again) == answer_of(page) and again.inner_text("#head-title") == "Layer 2, head 4"
    assert again.inner_text("#groups [aria-pressed=true]") == "decoder self-attention"
    again.click("#tab-switch")
    page.click("#tab-switch")
    wait_until(page, "location.hash.includes('view=switch')")
    wait_until(again, "location.hash.includes('view=switch')")
    assert again.get_attribute('[data-part="decoder.1.feed_forward"]', "aria-pressed") == "false"
    assert again.url == page.url
    again.evaluate("location.hash = 'model=decoder_only&number=42'")
    wait_until(again, "document.body.dataset.model === 'decoder_only'")
    assert answer_of(again) == python_answer(models["decoder_only"], 42)


def test_an_invalid_address_still_opens_the_page(visit):
    page = visit("model=mamba&number=342&view=&temperature=-1&top_k=x&top_p=7&seed=&off=everything&head=9.9&group=x")
    assert answer_of(page) and page.is_visible("#view-attention")


# --- bad input, keyboards, small screens, screen readers ---


BAD_INPUT = {
    "decoder_only": {"": "Type a number", "12a": "not a number", "3 <MASK> 2": "can't fill in holes"},
    "encoder_decoder": {"007": "leading zero", "1234567": "too long"},
    "encoder_only": {
        "": "Type a number",
        "342 <SEP> three hundred fourty two": "not in the vocabulary",
        "342 <MASK> three": "Write digits, <SEP>, then words",
        "3 <SEP> <SEP> three": "Write digits",
        "12345678 <SEP> <MASK>": "too many",
        "1 <SEP>" + 40 * " <MASK>": "too many",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_gets_one_line_and_the_page_keeps_working(name, visit):
    page = visit(f"model={name}&number=342")
    for text, message in BAD_INPUT[name].items():
        page.fill("#input", text)
        said = page.inner_text("#message")
        assert message in said and "\n" not in said and answer_of(page) == ""
    for view in VIEWS:
        page.click(f"#tab-{view}")  # nothing to show, and no error
    page.fill("#input", "7")
    assert page.inner_text("#message") == "" and answer_of(page)


def test_the_keyboard_alone_is_enough(visit):
    page = visit("model=decoder_only&number=342")
    page.focus("#model-decoder_only")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.body.dataset.model") == "encoder_decoder"
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.classList[0]"))
    assert {"input", "back", "play", "tab-attention", "tile", "row-label", "run-selftest"} <= set(reached)
    page.focus("#tab-attention")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#view-switch")
    page.focus('[data-part="decoder.0.feed_forward"]')
    page.keyboard.press("Space")
    wait_until(page, "document.querySelector('[data-part=\"decoder.0.feed_forward\"]').ariaPressed === 'false'")
    assert page.evaluate("document.activeElement.dataset.part") == "decoder.0.feed_forward"  # the focus stays


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wider_than_a_phone_and_everything_has_a_name(name, visit):
    page = visit(f"model={name}&number=777777", width=360, scheme="dark")
    for view in VIEWS:
        page.click(f"#tab-{view}")
        page.evaluate("new Promise(requestAnimationFrame)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
        nameless = page.evaluate("""[...document.querySelectorAll("button, input, select, progress")]
            .filter((element) => !(element.textContent.trim() || element.ariaLabel || element.labels?.length))
            .map((element) => element.outerHTML)""")
        assert nameless == []
