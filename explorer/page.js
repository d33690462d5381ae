// page.js - what one can do with the models: the page's own code. The models are in transformer.js, the rules by which
// answers are marked in language.js, everything that Python measured in DATA.
//
// There is one `state`, all of which the address holds. Whatever changes it calls update(), which asks the model again
// and draws the answer at once, and the open view in the next frame.
"use strict";

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent);
const VOCABULARY = DATA.vocabulary, RULES = DATA.rules, TRAINED_ON = new Set(DATA.train);
const IDS = new Map(VOCABULARY.map((token, id) => [token, id]));
const toIds = (tokens) => tokens.map((token) => IDS.get(token));
const MODELS = ["encoder_only", "decoder_only", "encoder_decoder"];
const VIEWS = ["attention", "next", "switch", "change", "layers"];
const TASKS = {
  encoder_only: "Reads the whole text at once and predicts the masked tokens: click a digit or a word to mask it.",
  decoder_only: "Reads from left to right and predicts the next token: the digits are the prompt, their name is the "
    + "continuation.",
  encoder_decoder: "Reads the digits with one stack and writes their name with the other, which attends to the first.",
};

// `number` is what was typed for the decoders, `text` for the encoder-only model. `off` and `head` are kept per model.
const state = {
  model: "decoder_only", number: "90210", text: null, original: null, view: "attention",
  seed: 1, temperature: 0, topK: null, topP: null, off: {}, head: {}, group: {},
  changed: null, replacement: null, selected: null, shown: Infinity, row: null,
};
MODELS.forEach((name) => { state.off[name] = new Set(); });
let current = null;   // the answer on the page, from answerQuestion(); null while the input is not valid

// ====================================================================================================================
// SMALL HELPERS
// ====================================================================================================================

// make("button", {className: "token"}, "text", child): an element. Text is set as text, never parsed as HTML.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else if (value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// A probability as a percentage that does not round to a certainty: 42%, 3.1%, >99.9%.
function percent(p) {
  if (p === 0 || p === 1) return `${100 * p}%`;
  if (p < 0.0005) return "<0.1%";
  if (p > 0.9995) return ">99.9%";
  return `${(100 * p).toFixed(p < 0.0995 || p > 0.9 ? 1 : 0)}%`;
}

// Uniform numbers in [0, 1) from a seed (mulberry32): the same address shows the same sample.
function makeRandom(seed) {
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function decodeFloats(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}

const loaded = {};
function getModel(name = state.model) {
  if (!loaded[name]) {
    const {constants, tensors, weights: packed} = DATA.models[name], floats = decodeFloats(packed), weights = {};
    let start = 0;
    for (const [tensor, size] of tensors) weights[tensor] = floats.subarray(start, start += size);
    loaded[name] = {architecture: name, constants, weights};
  }
  return loaded[name];
}

// 0 is the page's own background, 1 the model's colour at its strongest: darker on a light page, lighter on a dark one.
let heat = null;
function shade(p) {
  heat ??= ["--surface", "--accent", "--strong"].map((name) => getComputedStyle(document.body).getPropertyValue(name)
    .match(/[0-9a-f]{2}/gi).map((hex) => parseInt(hex, 16)));
  const [from, to, share] = p < 0.6 ? [heat[0], heat[1], p / 0.6] : [heat[1], heat[2], (p - 0.6) / 0.4];
  return from.map((value, i) => Math.round(value + (to[i] - value) * share));
}
const colour = (p) => `rgb(${shade(p)})`;

// ====================================================================================================================
// ASKING THE MODEL
// ====================================================================================================================

// Everything that is known about one question. slots: the tokens that can be examined, each {id, context, row, right,
// ideal, given}: `id` was drawn from the logits in `row` of a pass over `context`; `ideal` is a Map from token to the
// best possible probability, null where nothing is known; `given` is true where the token was typed, not predicted.
function answerQuestion() {
  const model = getModel(), watch = {off: state.off[state.model]}, random = makeRandom(state.seed);
  return state.model === "encoder_only" ? fillIn(model, watch, random) : writeName(model, watch, random);
}

function writeName(model, watch, random) {
  const number = parseNumber(RULES, state.number), digits = [...String(number)];
  const truth = [...numberToWords(RULES, number), "<EOS>"];
  const hasSource = model.architecture === "encoder_decoder";
  const prompt = toIds(hasSource ? [...digits, "<EOS>"] : ["<SOS>", ...digits, "<SEP>"]);
  const written = generate(model, prompt, state, watch, random);
  const before = hasSource ? [SOS_ID] : prompt;
  const text = [...before, ...written.slice(0, -1)];       // nothing is predicted after the last token
  const context = {source: hasSource ? prompt : null, text};
  const slots = hasSource ? [] : digits.map((digit, i) => ({id: IDS.get(digit), context, row: i, given: true}));
  const prefixRight = (i) => written.slice(0, i).every((id, j) => VOCABULARY[id] === truth[j]);
  written.forEach((id, i) => slots.push({
    id, context, row: before.length - 1 + i, right: VOCABULARY[id] === truth[i],
    ideal: prefixRight(i) && truth[i] ? new Map([[truth[i], 1]]) : null,
  }));
  const right = written.length === truth.length && prefixRight(written.length);
  return {number, prompt, slots, right, truth: truth.slice(0, -1), numGiven: slots.length - written.length};
}

function fillIn(model, watch, random) {
  const {digits, words} = currentText();
  const prompt = toIds(["<CLS>", ...digits, "<SEP>", ...words, "<SEP>"]);
  const numHoles = prompt.filter((id) => id === MASK_ID).length;
  const texts = maskPredict(model, prompt, numHoles, state, watch, random), slots = [];
  const possible = (ids) => possibleNumbers(RULES, ids.slice(1, digits.length + 1).map((id) => VOCABULARY[id]),
                                            ids.slice(digits.length + 2, -1).map((id) => VOCABULARY[id]));
  const atStart = possible(prompt);
  for (let i = 1; i < texts.length; i++) {  // as many rounds as holes: one token in each
    const row = texts[i].findIndex((id, t) => texts[i - 1][t] === MASK_ID && id !== MASK_ID);
    const {count, shares} = possible(texts[i - 1]), ideal = shares[row - (row <= digits.length ? 1 : 2)];
    const id = texts[i][row];
    slots.push({id, row, context: {source: null, text: texts[i - 1]}, ideal: count ? ideal : null,
                right: atStart.count ? ideal.has(VOCABULARY[id]) : null});
  }
  const final = texts.at(-1), right = atStart.count ? slots.every((slot) => slot.right) : null;
  return {prompt, slots, right, final, count: atStart.count, digits, words, numGiven: 0,
          pass: {source: null, text: prompt}};
}

// The text with holes: what was typed, or a number's name with its middle word masked.
function currentText() {
  if (state.text !== null) return parseText(RULES, VOCABULARY, state.text);
  const {digits, words} = parseText(RULES, VOCABULARY, state.number);
  words[Math.floor(words.length / 2)] = "<MASK>";
  return {digits, words};
}

// One pass over a context, without sampling: logits (T, V), and what the views want to see.
function run({source, text}, off = state.off[state.model]) {
  const model = getModel(), watch = {off, attention: new Map(), stream: []};
  let logits;
  if (model.architecture === "encoder_only") logits = encoderOnlyTransformer(model, text, watch);
  else if (model.architecture === "decoder_only") logits = decoderOnlyTransformer(model, text, null, watch);
  else logits = decode(model, text, encode(model, source, watch), null, watch);
  return {logits, ...watch};
}

// The passes of the current answer are made when a view first asks for them.
function passOf(context) {
  current.passes ??= new Map();
  if (!current.passes.has(context)) current.passes.set(context, run(context));
  return current.passes.get(context);
}

const numTokens = () => current.slots.length - current.numGiven;  // tokens of the answer, <EOS> included
const selectedSlot = () => current.slots[Math.min(state.selected ?? current.numGiven, current.slots.length - 1)];
const shownContext = () => selectedSlot()?.context ?? current.pass;  // a text without holes has no slots

// Logits of tokens that are never drawn: generate() and maskPredict() rule them out in the same way.
function allowed(logits) {
  const row = Float32Array.from(logits);
  return state.model === "encoder_only" ? row.fill(-Infinity, 0, NUM_SPECIAL_TOKENS) : row.fill(-Infinity, 0, 1);
}

// ====================================================================================================================
// THE ANSWER
// ====================================================================================================================

function update({keepShown = false} = {}) {
  stopPlaying();
  if (!keepShown) Object.assign(state, {selected: null, shown: Infinity, changed: null, replacement: null, row: null});
  let problem = "";
  try {
    current = answerQuestion();
  } catch (error) {
    if (!(error instanceof InputError || error instanceof RangeError)) throw error;
    [current, problem] = [null, error.message];
  }
  $("message").textContent = problem;
  $("input").setAttribute("aria-invalid", String(Boolean(problem)));
  document.body.classList.toggle("invalid", !current);
  drawAnswer();
  writeAddress();
  requestAnimationFrame(drawView);
}

function drawAnswer() {
  const isEncoder = state.model === "encoder_only";
  $("prompt").replaceChildren();
  $("answer").replaceChildren();
  $("after").replaceChildren();
  $("verdict").replaceChildren();
  if (!current) return;
  const shown = Math.min(state.shown, numTokens());
  if (isEncoder) {
    drawText();
    const visible = new Map(current.slots.slice(0, shown).map((slot, i) => [slot.row, i]));
    const tokens = current.final.slice(1, -1).map((id, i) => {
      const at = visible.get(i + 1);
      if (at !== undefined) return answerToken(at);
      const token = VOCABULARY[current.prompt[i + 1]];
      return make("span", {className: `token ${kind(token)}`}, token);
    });
    $("answer").append(...tokens.flatMap((token, i) => i ? [" ", token] : [token]));
  } else {
    $("prompt").append(...current.prompt.map((id, position) => {
      const token = VOCABULARY[id], i = position - 1;
      return i >= 0 && i < current.numGiven && state.model === "decoder_only" ? givenToken(i)
        : make("span", {className: `token ${kind(token)}`}, token);
    }));
    const tokens = current.slots.slice(current.numGiven, current.numGiven + shown)
      .map((slot, i) => [slot, answerToken(current.numGiven + i)]);
    const words = tokens.filter(([slot]) => slot.id !== EOS_ID).map(([, token]) => token);
    $("answer").append(...words.flatMap((token, i) => i ? [" ", token] : [token]));
    $("after").append(...tokens.filter(([slot]) => slot.id === EOS_ID).map(([, token]) => token));
  }
  drawVerdict(shown);
  $("back").disabled = shown === 0;
  $("step").disabled = shown === numTokens();
}

const kind = (token) => token === "<MASK>" ? "mask" : token.startsWith("<") ? "special" : "";

// The encoder-only text: each digit and word is a button that masks and unmasks it.
function drawText() {
  const ids = current.prompt;
  $("prompt").append(...ids.map((id, t) => {
    const token = VOCABULARY[id];
    if (kind(token) === "special") {
      return make("button", {className: "token special", onclick: () => {
        $("message").textContent = `${token} marks a boundary and can't be masked: only digits and words can.`;
      }}, token);
    }
    return make("button", {className: `token ${kind(token)}`, "aria-pressed": String(id === MASK_ID),
                           "aria-label": id === MASK_ID ? `unmask token ${t}` : `mask ${token}`,
                           onclick: () => toggleHole(t)}, token);
  }));
}

// What stood at a hole comes back if it is known: where a number was typed. Otherwise the model's prediction takes it.
function toggleHole(t) {
  const {digits, words} = currentText(), tokens = [...digits, "<SEP>", ...words];
  if (state.text === null) {
    const typed = parseText(RULES, VOCABULARY, state.number);
    state.original = [...typed.digits, "<SEP>", ...typed.words];
  }
  if (tokens[t - 1] === "<MASK>") tokens[t - 1] = state.original?.[t - 1] ?? VOCABULARY[current.final[t]];
  else tokens[t - 1] = "<MASK>";
  state.text = joinText(tokens);
  $("input").value = state.text;
  update();
  $("prompt").children[t].focus();
}

// Digits in one piece where none is masked: "90210 <SEP> ninety <MASK> two hundred ten".
const joinText = (tokens) => tokens.join(" ")
  .replace(/^[0-9]( [0-9])+ (?=<SEP>)/, (digits) => digits.replaceAll(" ", "") + " ");

function answerToken(i) {
  const slot = current.slots[i], token = VOCABULARY[slot.id];
  const mark = slot.right === null ? "" : slot.right ? "right" : "wrong";
  const spoken = slot.right === null ? token : `${token}, ${slot.right ? "correct" : "wrong"}`;
  return make("button", {className: `token said ${mark} ${kind(token)}`, "aria-label": spoken,
                         "aria-pressed": String(slot === selectedSlot()), onclick: () => select(i)}, token);
}

function givenToken(i) {
  const slot = current.slots[i];
  return make("button", {className: "token", "aria-pressed": String(slot === selectedSlot()),
                         "aria-label": `digit ${VOCABULARY[slot.id]}, as predicted from what stands before it`,
                         onclick: () => select(i)}, VOCABULARY[slot.id]);
}

function select(i) {
  state.selected = i;
  state.row = null;
  const hadFocus = document.activeElement?.classList.contains("token");
  drawAnswer();
  drawView();
  if (hadFocus) document.querySelector(".ask .token[aria-pressed=true]:not(#prompt .mask)")?.focus();
}

function drawVerdict(shown) {
  const parts = [];
  if (shown < numTokens()) {
    parts.push(`${shown} of ${numTokens()} tokens`);
  } else if (state.model === "encoder_only") {
    const {count, right, slots} = current;
    const fit = count === 1 ? "Exactly one number fits this text."
      : `${count.toLocaleString("en")} numbers fit this text.`;
    if (!slots.length) parts.push("Nothing is masked: click a digit or a word.");
    else if (!count) parts.push("No number fits this text, so no answer can be correct.");
    else parts.push(make("b", {className: right ? "good" : "bad"}, right ? "Correct." : "Wrong."), ` ${fit}`);
  } else {
    parts.push(make("b", {className: current.right ? "good" : "bad"}, current.right ? "Correct." : "Wrong."));
    if (!current.right) parts.push(` ${current.number} is ${current.truth.join(" ")}.`);
    parts.push(TRAINED_ON.has(current.number) ? " The model was trained on this number."
                                              : " The model was not trained on this number.");
  }
  $("verdict").append(...parts);
}

let timer = null;
function stopPlaying() {
  clearInterval(timer);
  timer = null;
  $("play").textContent = "Play";
}

function showTokens(shown) {
  state.shown = Math.max(0, Math.min(shown, numTokens()));
  select(current.numGiven + Math.max(0, state.shown - 1));
}

function play() {
  if (timer) { stopPlaying(); return; }
  if (!current) return;
  if (state.shown >= numTokens()) showTokens(0);
  $("play").textContent = "Pause";
  timer = setInterval(() => {
    showTokens(state.shown + 1);
    if (state.shown >= numTokens()) stopPlaying();
  }, 450);
}

// ====================================================================================================================
// VIEW: ATTENTION
// ====================================================================================================================

// The attention layers of a model, in groups: name of the group -> names of its layers, as in the state_dict.
function attentionGroups() {
  const L = getModel().constants.NUM_LAYERS, layers = (prefix, part) =>
    Array.from({length: L}, (_, i) => `${prefix}.${i}.${part}`);
  return state.model === "encoder_decoder"
    ? {"cross-attention": layers("decoder", "cross_attention"),
       "decoder self-attention": layers("decoder", "self_attention"),
       "encoder self-attention": layers("encoder", "attention")}
    : {"self-attention": layers("layers", "attention")};
}

// The tokens beside the rows and under the columns of a group's maps. A row of cross-attention is labelled with the
// token that is predicted there, as in figures/cross_attention.png: that is what it looks for in the source.
function labels(group, {source, text}) {
  const tokens = text.map((id) => VOCABULARY[id]);
  if (group === "encoder self-attention") return Array(2).fill(source.map((id) => VOCABULARY[id]));
  if (group !== "cross-attention") return [tokens, tokens];
  return [current.slots.map((slot) => VOCABULARY[slot.id]), source.map((id) => VOCABULARY[id])];
}

function drawAttention() {
  const groups = attentionGroups(), group = state.group[state.model] ?? Object.keys(groups)[0];
  const context = shownContext(), {attention} = passOf(context), [rows, columns] = labels(group, context);
  const {layer, head} = state.head[state.model] ?? {layer: 0, head: 0};
  $("groups").replaceChildren(...Object.keys(groups).length < 2 ? [] : Object.keys(groups).map((name) =>
    make("button", {"aria-pressed": String(name === group),
                    onclick: () => {
      state.group[state.model] = name;
      state.row = null;
      writeAddress();
      drawView();
    }}, name)));
  $("heads").style.setProperty("--heads", Math.min(getModel().constants.NUM_HEADS, 8));
  $("heads").replaceChildren(...groups[group].flatMap((name, i) => [make("h3", {}, `Layer ${i + 1}`),
    ...attention.get(name).map((weights, h) => {
      const off = state.off[state.model].has(`${name}.head.${h}`);
      return make("button", {
        className: `tile${off ? " off" : ""}`, "aria-pressed": String(i === layer && h === head),
        "data-head": `${i}.${h}`, "aria-label": `layer ${i + 1}, head ${h + 1}${off ? ", switched off" : ""}`,
        onclick: () => {
          state.head[state.model] = {layer: i, head: h};
          writeAddress();
          drawView();
          $("heads").querySelector(`[data-head="${i}.${h}"]`).focus();
        },
      }, paintMap(weights), make("span", {}, off ? "off" : `head ${h + 1}`));
    })]));

  const weights = attention.get(groups[group][layer])[head];
  $("head-title").textContent = `Layer ${layer + 1}, head ${head + 1}`;
  const where = group === "cross-attention" ? "The position that predicts " : "The position of ";
  const showRow = (t) => {
    state.row = t;
    $("map").querySelectorAll("[data-row]").forEach((element) => {
      element.classList.toggle("active", Number(element.dataset.row) === t);
    });
    $("attended").replaceChildren(make("p", {}, where, make("code", {}, rows[t]), " attends to"), make("div", {
      className: "strip"}, ...columns.map((token, s) => make("span", {
      className: "weight", "data-weight": weights[t][s], style: `--p:${weights[t][s].toFixed(4)}`},
      make("code", {}, token), make("small", {}, percent(weights[t][s]))))));
  };
  drawMap($("map"), weights, rows, columns, {onRow: showRow, label: (t, s) =>
    `${rows[t]} attends to ${columns[s]}: ${percent(weights[t][s])}`});
  $("map-note").textContent = group === "cross-attention"
    ? "Rows: the token being predicted. Columns: the digits that it attends to."
    : "Rows attend to columns. Point at a row to see its weights.";
  showRow(Math.min(state.row ?? (group === "encoder self-attention" ? 0 : selectedSlot()?.row ?? 0), rows.length - 1));
}

// A small map: one pixel for each weight, enlarged by the browser without smoothing.
function paintMap(weights) {
  const canvas = make("canvas", {width: weights[0].length, height: weights.length, "aria-hidden": "true"});
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  weights.forEach((row, t) => row.forEach((weight, s) =>
    image.data.set([...shade(weight), 255], 4 * (t * canvas.width + s))));
  context.putImageData(image, 0, 0);
  canvas.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
  return canvas;
}

// A large map with its tokens. values (T, S) in [0, 1]; null: nothing is there. Rows with an onRow, and columns with an
// onColumn, are buttons; pointing at a cell is pointing at its row.
function drawMap(box, values, rows, columns, {onRow, onColumn, chosen, label, tint = (value) => value}) {
  const cells = [make("span")];
  box.style.setProperty("--columns", columns.length);
  columns.forEach((token, s) => cells.push(onColumn && values.some((row) => row[s] !== null)
    ? make("button", {className: "column-label", "aria-pressed": String(s === chosen), "data-column": s,
                      "aria-label": `replace ${token}, token ${s + 1}`, onclick: () => onColumn(s)},
           make("span", {}, token))
    : make("span", {className: "column-label"}, make("span", {}, token))));
  values.forEach((row, t) => {
    cells.push(make(onRow ? "button" : "span", {className: "row-label", "data-row": t, onfocus: () => onRow?.(t),
                                                onclick: () => onRow?.(t)}, rows[t]));
    row.forEach((value, s) => cells.push(make("i", {
      className: `cell${value === null ? " none" : ""}${s === chosen ? " chosen" : ""}`, "data-row": t,
      "data-value": value ?? "", ...value === null ? {}
        : {title: label(t, s), style: `background:${colour(tint(value))}`}})));
  });
  box.replaceChildren(...cells);
  box.onpointerover = (event) => { if (onRow && event.target.dataset?.row) onRow(Number(event.target.dataset.row)); };
}

// ====================================================================================================================
// VIEW: NEXT TOKEN
// ====================================================================================================================

const NUM_BARS = 10;

function drawNext() {
  $("temperature").value = state.temperature;
  $("temperature-value").textContent = state.temperature ? state.temperature.toFixed(1) : "0 (greedy)";
  $("top-k").max = VOCABULARY.length;
  $("top-k").value = state.topK ?? VOCABULARY.length;
  $("top-k-value").textContent = state.topK ?? "off";
  $("top-p").value = state.topP ?? 1;
  $("top-p-value").textContent = state.topP?.toFixed(2) ?? "off";
  $("top-k").disabled = $("top-p").disabled = $("sample").disabled = state.temperature === 0;
  $("sample-note").textContent = state.temperature === 0 ? "Greedy decoding is deterministic: raise the temperature to "
    + "sample." : `Sample ${state.seed}.`;
  const slot = selectedSlot();
  if (!slot) {
    $("next-title").textContent = "Nothing is masked";
    $("bars").replaceChildren();
    $("rest").textContent = $("cut-note").textContent = "";
    return;
  }
  const logits = allowed(passOf(slot.context).logits[slot.row]);
  const scaled = softmax(scaleByTemperature(logits, state.temperature || 1));  // before anything is cut away
  const final = softmax(applyStrategies(logits, state));                      // what is drawn from
  const order = descending(logits).filter((id) => scaled[id] > 0), cut = order.filter((id) => final[id] === 0)
    .reduce((sum, id) => sum + scaled[id], 0);
  $("next-title").replaceChildren(...describeSlot(slot));
  $("bars-model").textContent = `T = ${state.temperature ? state.temperature.toFixed(1) : 1}`;
  $("bars").replaceChildren(...order.slice(0, NUM_BARS).map((id) => {
    const token = VOCABULARY[id], ideal = slot.ideal?.get(token) ?? 0;
    const best = ideal ? `; the best prediction: ${percent(ideal)}` : "";
    return make("div", {className: `bar${final[id] ? "" : " cut-away"}${id === slot.id ? " drawn" : ""}`,
                        role: "listitem", "data-token": token, "data-probability": final[id],
                        "aria-label": `${token}: ${final[id] ? percent(final[id]) : "cut away"}${best}`},
      make("code", {}, token, ideal ? make("sup", {title: "can be correct"}, "✓") : ""),
      make("span", {className: "track"}, make("span", {className: "fill", style: `width:${100 * scaled[id]}%`}),
        ideal ? make("span", {className: "ideal", style: `left:${100 * ideal}%`}) : ""),
      make("small", {}, percent(scaled[id])), make("small", {}, final[id] ? percent(final[id]) : "cut"));
  }));
  const others = order.slice(NUM_BARS).reduce((sum, id) => sum + scaled[id], 0);
  $("rest").textContent = `The other ${order.length - NUM_BARS} tokens together: ${percent(others)}. `
    + (slot.ideal ? "The line marks the best possible prediction." : "");
  $("cut-kept").style.width = `${100 * (1 - cut)}%`;
  $("cut-note").textContent = `Cut away: ${percent(cut)}. ${order.filter((id) => final[id] > 0).length} of `
    + `${order.length} tokens can be drawn.`;
}

// What a distribution is about: "After <SEP>" or, encoder-only, "For the <MASK> between 3 and 2".
function describeSlot({context: {text}, row}) {
  const code = (id) => make("code", {}, VOCABULARY[id]);
  return state.model === "encoder_only"
    ? ["For the ", code(MASK_ID), " between ", code(text[row - 1]), " and ", code(text[row + 1])]
    : ["After ", code(text[row])];
}

// ====================================================================================================================
// VIEW: SWITCH OFF
// ====================================================================================================================

// The parts that can be switched off: [[title of a row, [[name, label], ...]], ...], in the order of computation.
function listParts() {
  const {NUM_LAYERS, NUM_HEADS} = getModel().constants, rows = [];
  const stack = (prefix, title, attentions) => {
    for (let i = 0; i < NUM_LAYERS; i++) {
      for (const [part, name] of attentions) {
        rows.push([`${title} ${i + 1}`, name, Array.from({length: NUM_HEADS}, (_, h) =>
          [`${prefix}.${i}.${part}.head.${h}`, `head ${h + 1}`])]);
      }
      rows.push([`${title} ${i + 1}`, "feed-forward", [[`${prefix}.${i}.feed_forward`, "FFN"]]]);
    }
  };
  if (state.model === "encoder_decoder") {
    stack("encoder", "Encoder layer", [["attention", "self-attention"]]);
    stack("decoder", "Decoder layer", [["self_attention", "self-attention"], ["cross_attention", "cross-attention"]]);
  } else {
    stack("layers", "Layer", [["attention", "self-attention"]]);
  }
  return rows;
}

const allParts = () => listParts().flatMap(([, , parts]) => parts.map(([part]) => part));

// Exact match on held-out numbers by what is switched off: measured[model][names of the parts, joined] = share.
const measured = Object.fromEntries(MODELS.map((name) => [name, {}]));
const keyOf = (off) => [...off].sort().join(",");

function drawSwitches() {
  const off = state.off[state.model], buttons = () => [...$("parts").querySelectorAll("button")];
  const focused = buttons().indexOf(document.activeElement);
  let title = null;
  $("parts").replaceChildren(...listParts().flatMap(([layer, name, parts]) => {
    const heading = layer === title ? [] : [make("h3", {}, layer)];
    title = layer;
    const names = parts.map(([part]) => part), all = `${layer}, ${name}: switch all ${parts.length}`;
    return [...heading, make("div", {className: "row"}, make("button", {
      className: "link", "aria-label": all, title: all, onclick: () => toggleParts(names),
    }, name), make("div", {className: "switches"},
      ...parts.map(([part, label]) => {
        const share = measured[state.model][part];
        return make("button", {className: "switch", "aria-pressed": String(!off.has(part)), "data-part": part,
                               "aria-label": `${layer}, ${name}, ${label}: ${off.has(part) ? "off" : "on"}`,
                               onclick: () => toggleParts([part])}, label,
          share === undefined ? "" : make("small", {className: "share", title: "exact match without this part",
                                                    style: `--p:${share}`}, percent(share)));
      })))];
  }));
  buttons()[focused]?.focus();
  $("all-on").disabled = off.size === 0;
  $("compare").replaceChildren(...comparison(off));
  $("measure-title").textContent = `${DATA.heldOut.length} held-out numbers`;
  const rows = [["all parts on", measured[state.model][""]]];
  if (off.size) rows.push([`without ${describeParts(off)}`, measured[state.model][keyOf(off)]]);
  $("measured").replaceChildren(...rows.map(([name, share]) => make("tr", {}, make("th", {scope: "row"}, name),
    make("td", {}, share === undefined ? "not measured yet" : percent(share)))));
  if (!measuring) $("measure-note").textContent = state.model === "encoder_only"
    ? "One token of each text is masked, a digit or a word; the others determine it."
    : "Counted as correct if every word of the name is.";
}

// "layer 1 self-attention head 2, layer 2 feed-forward"; a row that is off as a whole is named as a whole.
const describeParts = (off) => listParts().flatMap(([layer, name, parts]) => {
  const these = parts.filter(([part]) => off.has(part)), row = `${layer.toLowerCase()} ${name}`;
  return these.length === parts.length ? [row] : these.map(([, label]) => `${row} ${label}`);
}).join(", ");

// One part, or a whole row of heads: on if all of them are off.
function toggleParts(parts) {
  const off = state.off[state.model], allOff = parts.every((part) => off.has(part));
  parts.forEach((part) => allOff ? off.delete(part) : off.add(part));
  update();
}

// The answer with everything on beside the answer as it is now, both greedy.
function comparison(off) {
  const answer = (parts) => {
    const kept = [state.off[state.model], state.temperature];
    [state.off[state.model], state.temperature] = [parts, 0];
    try { return answerQuestion(); } finally { [state.off[state.model], state.temperature] = kept; }
  };
  const say = ({slots, numGiven}) => slots.slice(numGiven).map((slot) => VOCABULARY[slot.id]);
  const before = say(answer(new Set())), after = say(answer(off));
  const line = (title, tokens, other) => [make("span", {className: "muted"}, title), make("span", {className: "tokens"},
    ...tokens.map((token, i) => make("code", {className: other && token !== other[i] ? "moved-token" : ""}, token)))];
  return off.size ? [...line("all on", before), ...line("now", after, before)]
    : [make("span", {className: "muted"}, "all on"), ...line("", before).slice(1)];
}

// Whether the model answers one held-out number correctly. One pass with the true words before each prediction is
// enough: greedy decoding makes its first mistake exactly where this pass makes one (see evaluate in decoder_only.py).
function isCorrect(model, off, [number, hole]) {
  const digits = [...String(number)], words = numberToWords(RULES, number), watch = {off};
  const hits = (logits, ids) => ids.every((id, t) => argmax(logits[t]) === id);
  if (model.architecture === "encoder_only") {
    const ids = toIds(["<CLS>", ...digits, "<SEP>", ...words, "<SEP>"]), at = hole + (hole < digits.length ? 1 : 2);
    const masked = ids.with(at, MASK_ID);
    return argmax(encoderOnlyTransformer(model, masked, watch)[at]) === ids[at];
  }
  const targets = toIds([...words, "<EOS>"]);
  if (model.architecture === "decoder_only") {
    const prompt = toIds(["<SOS>", ...digits, "<SEP>"]);
    const logits = decoderOnlyTransformer(model, [...prompt, ...targets.slice(0, -1)], null, watch);
    return hits(logits.slice(prompt.length - 1), targets);
  }
  const memory = encode(model, toIds([...digits, "<EOS>"]), watch);
  return hits(decode(model, [SOS_ID, ...targets.slice(0, -1)], memory, null, watch), targets);
}

let measuring = null;  // the measurement that is running, an object; another click, or another model, ends it
async function measure(settings) {
  if (measuring) { measuring = null; return; }
  const mine = measuring = {}, name = state.model, model = getModel();
  const open = [...new Map(settings.map((off) => [keyOf(off), off])).values()]  // each once, and only if it is new
    .filter((off) => measured[name][keyOf(off)] === undefined);
  const total = open.length * DATA.heldOut.length;
  let done = 0, drawn = performance.now();
  $("measure").textContent = $("measure-each").textContent = "Stop";
  $("progress").hidden = false;
  for (const off of open) {
    let correct = 0;
    for (const example of DATA.heldOut) {
      correct += isCorrect(model, off, example);
      done++;
      if (performance.now() - drawn > 40) {  // let the page draw, and hear clicks
        $("progress").value = done / total;
        $("measure-note").textContent = `${done.toLocaleString("en")} of ${total.toLocaleString("en")} answers`;
        await new Promise((resolve) => setTimeout(resolve));
        if (measuring !== mine) { endMeasuring(); return; }
        drawn = performance.now();
      }
    }
    measured[name][keyOf(off)] = correct / DATA.heldOut.length;
    if (state.view === "switch" && current) drawSwitches();
  }
  measuring = null;
  endMeasuring();
}

function endMeasuring() {
  if (measuring) return;
  $("progress").hidden = true;
  $("progress").value = 0;
  $("measure").textContent = "Measure";
  $("measure-each").textContent = "Measure each part alone";
  if (state.view === "switch" && current) drawSwitches();
}

// ====================================================================================================================
// VIEW: CHANGE A TOKEN
// ====================================================================================================================

const isBoundary = (id) => id < NUM_SPECIAL_TOKENS && id !== MASK_ID;

// The tokens that may stand in for one: other digits for a digit, other words for a word; none for special tokens.
function replacements(id) {
  const isDigit = (other) => other >= NUM_SPECIAL_TOKENS && other < NUM_SPECIAL_TOKENS + 10;
  if (id < NUM_SPECIAL_TOKENS) return [];
  return VOCABULARY.map((_, other) => other).filter((other) => other >= NUM_SPECIAL_TOKENS && other !== id
                                                               && isDigit(other) === isDigit(id));
}

// Total variation distance, (1/2) sum |p - q|: how much probability has moved. 0: the same; 1: nothing in common.
const distance = (p, q) => p.reduce((sum, value, i) => sum + Math.abs(value - q[i]), 0) / 2;

function drawChange() {
  const context = shownContext(), {source, text} = context, numSource = source?.length ?? 0;
  const inputs = [...source ?? [], ...text];
  const replace = (s, id) => s < numSource ? {source: source.with(s, id), text}
    : {source, text: text.with(s - numSource, id)};
  const outputs = (context) => run(context).logits.map((row) => softmax(allowed(row)));           // (T, V)
  const before = passOf(context).logits.map((row) => softmax(allowed(row)));
  const candidates = inputs.map(replacements);
  let chosen = state.changed;
  if (chosen === null || !candidates[chosen]?.length) chosen = candidates.findIndex((ids) => ids.length);
  if (!candidates[chosen].includes(state.replacement)) state.replacement = next(inputs[chosen], candidates[chosen]);
  const after = inputs.map((id, s) => candidates[s].length
    ? outputs(replace(s, s === chosen ? state.replacement : next(id, candidates[s]))) : null);
  const values = before.map((p, t) => after.map((moved) => moved ? distance(p, moved[t]) : null));

  const columns = inputs.map((id) => VOCABULARY[id]);
  const rows = state.model === "encoder_only" ? text.map((id) => VOCABULARY[id])
    : text.map((id, t) => VOCABULARY[current.slots.find((slot) => slot.row === t)?.id ?? SEP_ID]);
  // A faint tint for everything above 0, however small: what is blank is exactly 0.
  const tint = (value) => value && 0.08 + 0.92 * value;
  drawMap($("influence"), values, rows, columns, {chosen, tint, label: (t, s) =>
    `output ${rows[t]} moves by ${values[t][s] === 0 ? "exactly 0" : percent(values[t][s])}`,
    onColumn: (s) => { Object.assign(state, {changed: s, replacement: null}); drawView();
                       document.querySelector(`#influence [data-column="${s}"]`)?.focus(); }});
  $("influence-note").textContent = (state.model === "encoder_only" ? "Rows: the output at each token. " :
    "Rows: the output that predicts this token. ") + "Columns: the input token that is replaced by a neighbor of its "
    + "kind; click one. How far an output moves is the total variation distance between its distributions.";

  $("replacement-label").replaceChildren("Replace ", make("code", {}, columns[chosen]), ` (token ${chosen + 1}) by`);
  $("replacement").replaceChildren(...candidates[chosen].map((id) =>
    make("option", {value: id, selected: id === state.replacement}, VOCABULARY[id])));
  $("moved").replaceChildren(...before.map((p, t) => {
    const q = after[chosen][t], moved = values[t][chosen], was = VOCABULARY[argmax(p)], is = VOCABULARY[argmax(q)];
    return make("div", {className: moved === 0 ? "unmoved" : "", "data-moved": moved}, make("code", {}, rows[t]),
      make("span", {className: "track"}, make("span", {className: "fill", style: `width:${100 * moved}%`})),
      make("span", {}, moved === 0 ? "exactly 0" : was === is ? percent(moved) : `now ${is}`));
  }));
}

// The next token of the same kind, "four" for "three"; the last one, and 9, gives the one before it. Never a leading 0.
const next = (id, candidates) => candidates.find((other) => other > id) ?? candidates.at(-1);

// ====================================================================================================================
// VIEW: LAYER BY LAYER
// ====================================================================================================================

function drawLayers() {
  const context = shownContext(), {stream} = passOf(context), model = getModel();
  const norm = state.model === "encoder_decoder" ? "decoder_norm" : "final_norm";
  const layers = stream.map((x) => unembed(model, norm, x).map((row) => softmax(allowed(row))));  // (L + 1, T, V)
  // One row for each predicted token; in the encoder-only model for each digit and word, where the best prediction of a
  // token that is not masked is that token.
  const slots = current.slots.filter((slot) => slot.context === context && !slot.given);
  const rows = state.model !== "encoder_only" ? slots : context.text.map((id, row) => slots.find((s) => s.row === row)
    ?? {row, ideal: new Map([[VOCABULARY[id], 1]])}).filter(({row}) => !isBoundary(context.text[row]));
  const titles = ["embedding", ...stream.slice(1).map((_, i) => `layer ${i + 1}`)];
  const head = make("tr", {}, make("th", {scope: "col"}, state.model === "encoder_only" ? "at" : "after"),
    ...titles.map((title) => make("th", {scope: "col"}, title)));
  $("lens").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows.map(({row, ideal}) =>
    make("tr", {className: row === selectedSlot()?.row ? "selected" : ""},
      make("th", {scope: "row"}, make("code", {}, VOCABULARY[context.text[row]])),
      ...layers.map((rowsOfLayer) => {
        const probabilities = rowsOfLayer[row], best = argmax(probabilities), p = probabilities[best];
        const token = VOCABULARY[best], top = descending(probabilities).slice(0, 3);
        return make("td", {title: top.map((id) => `${VOCABULARY[id]} ${percent(probabilities[id])}`).join(", "),
                           style: `--p:${p.toFixed(3)}`, "data-token": token, "data-probability": p},
          make("code", {}, token), ideal?.has(token) ? make("sup", {}, "✓") : "", make("small", {}, percent(p)));
      })))));
}

// ====================================================================================================================
// THE SOURCE CODE: each view shows the functions that do what it shows
// ====================================================================================================================

const camelCase = (name) => name.replace(/_([a-z])/g, (_, letter) => letter.toUpperCase());

function drawSources() {
  document.querySelectorAll("[data-source]").forEach((box) => {
    const names = box.dataset.source.split(/\s+/);
    let file = state.model;
    if (!names.some((name) => DATA.sources[file][name])) file = "decoder_only";  // encoder_only.py doesn't sample
    const found = names.filter((name) => DATA.sources[file][name]);
    box.replaceChildren(`Code in ${DATA.models[file].file}:`, ...found.map((name) => make("button", {
      className: "link", "data-name": name, onclick: () => showSource(file, name)}, name.replace(/\.forward$/, ""))));
  });
}

// The twin in transformer.js: keepTopK for keep_top_k, multiHeadAttention for MultiHeadAttention.forward.
function findTwin(file, name) {
  const [first, last] = name.split(".");
  const base = last === "forward" ? first[0].toLowerCase() + first.slice(1) : camelCase(last ?? first);
  const renamed = {chooseTokens: "chooseToken",                        // one text instead of a batch
                   "decoder_only decoderLayer": "encoderLayer",        // the same two lines
                   "encoder_only encode": "encoderOnlyTransformer"};
  const twin = renamed[base] ?? renamed[`${file} ${base}`] ?? base;
  return $("transformer-js").textContent.match(
    new RegExp(`(?:^//[^\\n]*\\n)*^(?:function ${twin}\\(.*?^}|const ${twin} = .*?;$)`, "ms"))?.[0];
}

function showSource(file, name) {
  const {line, code} = DATA.sources[file][name], twin = findTwin(file, name);
  const versions = {Python: [`${DATA.models[file].file}, line ${line}: ${name}`, code]};
  if (twin) versions.JavaScript = [`transformer.js: ${twin.match(/(?:function|const) (\w+)/)[1]}`, twin];
  const show = (language) => {
    [$("source-title").textContent, $("code").textContent] = versions[language];
    $("languages").replaceChildren(...Object.keys(versions).map((other) => make("button", {
      "aria-pressed": String(other === language), onclick: () => show(other)}, other)));
  };
  show("Python");
  $("source").showModal();
  $("code").scrollTop = 0;
}

// ====================================================================================================================
// THE SELF-TEST: this page against PyTorch
// ====================================================================================================================

async function selfTest() {
  $("selftest").textContent = "";
  let largest = 0, same = 0, inputs = 0;
  for (const name of MODELS) {
    const model = getModel(name);
    for (const {prompt, text, logits, answer} of DATA.selftest[name]) {
      const expected = decodeFloats(logits);
      const found = name === "encoder_only" ? encoderOnlyTransformer(model, prompt)
        : name === "decoder_only" ? decoderOnlyTransformer(model, text) : decode(model, text, encode(model, prompt));
      found.forEach((row, t) => row.forEach((logit, id) => {
        const difference = Math.abs(logit - expected[t * row.length + id]);
        if (!(difference <= largest)) largest = difference;  // so that NaN, too, counts as a difference
      }));
      const said = name === "encoder_only"
        ? maskPredict(model, prompt, prompt.filter((id) => id === MASK_ID).length, {temperature: 0}).at(-1)
        : generate(model, prompt, {temperature: 0});
      same += said.join() === answer.join();
      inputs++;
    }
    $("selftest-title").textContent = `${inputs} inputs …`;
    await new Promise((resolve) => setTimeout(resolve));
  }
  $("selftest-title").textContent = `${inputs} inputs: ${same} answers are the same, and logits differ by at most `
    + `${largest.toExponential(1)}.`;
  $("selftest").textContent = JSON.stringify({largest_difference: largest, same_answers: same === inputs, inputs});
}

// ====================================================================================================================
// THE ADDRESS, AND EVERYTHING THAT CAN BE CLICKED
// ====================================================================================================================

const RANGES = {temperature: [0, 5], top_k: [1, VOCABULARY.length], top_p: [0.01, 1], seed: [1, 1e9]};

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  if (address.has("selftest")) selfTest();
  const numberOf = (name, otherwise) => {
    const value = Number(address.get(name) ?? NaN), [low, high] = RANGES[name];
    return value >= low && value <= high ? value : otherwise;
  };
  if (MODELS.includes(address.get("model"))) state.model = address.get("model");
  if (VIEWS.includes(address.get("view"))) state.view = address.get("view");
  if (address.has("number")) Object.assign(state, {number: address.get("number"), text: null});
  if (address.has("text")) Object.assign(state, {text: address.get("text"), original: null});
  state.temperature = numberOf("temperature", 0);
  state.topK = address.has("top_k") ? Math.round(numberOf("top_k", VOCABULARY.length)) : null;
  state.topP = address.has("top_p") ? numberOf("top_p", 1) : null;
  state.seed = Math.round(numberOf("seed", 1));
  const {NUM_LAYERS, NUM_HEADS} = getModel().constants;
  const [, layer, head] = /^([1-9]\d*)[.]([1-9]\d*)$/.exec(address.get("head")) ?? [];
  state.head[state.model] = layer <= NUM_LAYERS && head <= NUM_HEADS ? {layer: layer - 1, head: head - 1} : null;
  state.group[state.model] = Object.keys(attentionGroups()).find((name) => name === address.get("group")) ?? null;
  const wanted = (address.get("off") ?? "").split(",");
  state.off[state.model] = new Set(allParts().filter((part) => wanted.includes(part)));
  drawModel();
}

// The address follows a moment later: browsers refuse a hundred changes in a row, which a dragged slider soon makes.
let addressTimer = null;
function writeAddress() {
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => {
    if (!location.hash.startsWith("#selftest")) history.replaceState(null, "", `#${describeState()}`);
  }, 150);
}

function describeState() {
  const address = new URLSearchParams({model: state.model});
  if (state.model === "encoder_only" && state.text !== null) address.set("text", state.text);
  else address.set("number", state.number);
  address.set("view", state.view);
  if (state.temperature) address.set("temperature", state.temperature);
  if (state.topK) address.set("top_k", state.topK);
  if (state.topP) address.set("top_p", state.topP);
  if (state.seed > 1) address.set("seed", state.seed);
  const {layer, head} = state.head[state.model] ?? {layer: 0, head: 0};
  if (layer || head) address.set("head", `${layer + 1}.${head + 1}`);
  if (state.group[state.model]) address.set("group", state.group[state.model]);
  if (state.off[state.model].size) address.set("off", keyOf(state.off[state.model]));
  return address.toString().replaceAll("%2C", ",");
}

// Everything that depends on which model is shown.
function drawModel() {
  heat = null;
  document.body.dataset.model = state.model;
  MODELS.forEach((name) => markTab($(`model-${name}`), name === state.model));
  $("task").textContent = TASKS[state.model];
  const isEncoder = state.model === "encoder_only";
  $("tab-next").textContent = isEncoder ? "Masked token" : "Next token";
  $("input-label").textContent = isEncoder ? "Number or text" : "Number";
  $("input").value = isEncoder && state.text !== null ? state.text : state.number;
  $("input").inputMode = isEncoder ? "text" : "numeric";
  $("prompt").setAttribute("aria-label", isEncoder ? "Text: click a token to mask it" : "Prompt");
  const examples = isEncoder
    ? ["90210 <SEP> ninety <MASK> two hundred ten", "<MASK> <MASK> <MASK> <SEP> seven hundred seventeen",
       "3 <MASK> 2 <SEP> three hundred <MASK> two"]
    : ["7", "342", "90210", "600006"];
  const link = (label, getText) => make("button", {className: "link", onclick: () => ask(getText())}, label);
  $("examples").replaceChildren("Try ",
    ...examples.map((text) => link(text.replaceAll("<MASK>", "_").replace("<SEP>", "="), () => text)),
    link("a held-out number", () => String(DATA.heldOut[Math.floor(Math.random() * DATA.heldOut.length)][0])));
  const {parameters, constants, origin, exact_match, file} = DATA.models[state.model];
  $("facts").textContent = `${file}: ${parameters.toLocaleString("en")} parameters, ${constants.NUM_LAYERS} layers of `
    + `${constants.NUM_HEADS} heads, ${origin}. PyTorch measured ${percent(exact_match)} exact match on validation `
    + "numbers" + (isEncoder ? " with one masked token each." : ".");
  measuring = null;
  endMeasuring();
  drawSources();
  drawTabs();
  update();
}

function drawTabs() {
  VIEWS.forEach((name) => {
    markTab($(`tab-${name}`), name === state.view);
    $(`view-${name}`).hidden = name !== state.view;
  });
}

function markTab(tab, isSelected) {
  tab.setAttribute("aria-selected", String(isSelected));
  tab.tabIndex = isSelected ? 0 : -1;
}

function drawView() {
  if (!current) return;
  const draw = {attention: drawAttention, next: drawNext, switch: drawSwitches, change: drawChange, layers: drawLayers};
  draw[state.view]();
}

// Something was typed or chosen. In the encoder-only tab a number is taken with its middle word masked.
function ask(text) {
  $("input").value = text;
  typed();
}

function typed() {
  const text = $("input").value.trim();
  if (state.model === "encoder_only" && /[\s<_]/.test(text)) {
    Object.assign(state, {text, original: null});
  } else {
    Object.assign(state, {number: text, text: null, original: null});
  }
  update();
}

function setSettings(changes) {
  Object.assign(state, changes);
  update({keepShown: true});
}

function openView(name) { state.view = name; drawTabs(); writeAddress(); drawView(); }

// Tabs move with the arrow keys, as everywhere (WAI-ARIA).
function makeTabs(names, prefix, open) {
  names.forEach((name, i) => {
    $(prefix + name).onclick = () => open(name);
    $(prefix + name).onkeydown = (event) => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!step) return;
      event.preventDefault();
      const other = names[(i + step + names.length) % names.length];
      open(other);
      $(prefix + other).focus();
    };
  });
}

makeTabs(MODELS, "model-", (name) => { state.model = name; drawModel(); });
makeTabs(VIEWS, "tab-", openView);
$("input").oninput = typed;
$("back").onclick = () => { stopPlaying(); showTokens(Math.min(state.shown, numTokens()) - 1); };
$("step").onclick = () => { stopPlaying(); showTokens(state.shown + 1); };
$("play").onclick = play;
$("temperature").oninput = (event) => setSettings({temperature: Number(event.target.value)});
$("top-k").oninput = (event) => {
  const k = Number(event.target.value);
  setSettings({topK: k === VOCABULARY.length ? null : k});
};
$("top-p").oninput = (event) => {
  const p = Number(event.target.value);
  setSettings({topP: p === 1 ? null : p});
};
$("sample").onclick = () => setSettings({seed: state.seed + 1});
$("all-on").onclick = () => { state.off[state.model].clear(); update(); };
$("measure").onclick = () => measure([new Set(), new Set(state.off[state.model])]);
$("measure-each").onclick = () => measure([new Set(), ...allParts().map((part) => new Set([part]))]);
$("replacement").onchange = (event) => { state.replacement = Number(event.target.value); drawView(); };
$("run-selftest").onclick = selfTest;
$("close").onclick = () => $("source").close();
$("source").onclick = (event) => { if (event.target === $("source")) $("source").close(); };  // outside of its content
window.onhashchange = readAddress;
matchMedia("(prefers-color-scheme: dark)").onchange = () => { heat = null; drawView(); };
readAddress();
