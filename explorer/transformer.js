// transformer.js - the three transformers of this repository, forward passes and decoding, in plain JavaScript.
//
// The names and the order are those of encoder_only.py, decoder_only.py and encoder_decoder.py, so each function can be
// read beside its twin there. There is no library underneath: every multiplication is in this file. Two things are
// simpler than in Python. There is no batch dimension, since the page asks one question at a time; hence there is no
// padding and no padding mask. And there is no training: the weights come from PyTorch, as 32-bit floats.
//
// Letters used for shapes: T positions (S those attended to), C = D_MODEL, H heads, d_k = C / H per head, V vocabulary.
// A tensor of shape (T, C) is an array of T Float32Arrays, one vector of length C for each position.
//
// model    {architecture, constants: {D_MODEL, NUM_LAYERS, NUM_HEADS, MAX_LENGTH, ...},
//           weights: {"layers.0.attention.query.weight": Float32Array, ...}}, named as in model.state_dict()
// watch    what the page wants to see, or to change, while the model runs; everything in it is optional:
//          attention  a Map that receives the attention weights (H, T, S) of each attention layer, by its name
//          stream     an array that receives the residual stream (T, C) after the embedding and after each layer
//          off        a Set of parts that contribute nothing: "layers.0.attention.head.2", "layers.0.feed_forward"
"use strict";

// The order of toy_dataset.SPECIAL_TOKENS.
const PAD_ID = 0, SOS_ID = 1, EOS_ID = 2, CLS_ID = 3, SEP_ID = 4, MASK_ID = 5, NUM_SPECIAL_TOKENS = 6;

// ====================================================================================================================
// WHAT PYTORCH BRINGS ALONG: dot products, nn.Linear, nn.LayerNorm, GELU, softmax
// ====================================================================================================================

// The dot product of a vector with the part of a matrix that begins at `start`. Nearly all of the time is spent here.
// Four partial sums instead of one: the processor can work on all four while one sum would wait for each addition.
function dot(vector, matrix, start = 0) {
  const n = vector.length;
  let a = 0, b = 0, c = 0, d = 0, i = 0;
  for (; i + 3 < n; i += 4) {
    a += vector[i] * matrix[start + i];
    b += vector[i + 1] * matrix[start + i + 1];
    c += vector[i + 2] * matrix[start + i + 2];
    d += vector[i + 3] * matrix[start + i + 3];
  }
  for (; i < n; i++) a += vector[i] * matrix[start + i];
  return a + b + c + d;
}

// y = x W^T + b for each position. PyTorch stores W as (out, in), so output o is the dot product of x with row o of W.
function linear(model, name, x) {
  const weight = model.weights[name + ".weight"], bias = model.weights[name + ".bias"];
  return x.map((row) => bias.map((b, o) => b + dot(row, weight, o * row.length)));               // (T, in) -> (T, out)
}

// Each position's vector is brought to mean 0 and variance 1, then scaled and shifted by learned numbers.
function layerNorm(model, name, x) {
  const weight = model.weights[name + ".weight"], bias = model.weights[name + ".bias"];
  return x.map((row) => {
    const mean = row.reduce((sum, value) => sum + value, 0) / row.length;
    const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / row.length;
    const scale = 1 / Math.sqrt(variance + 1e-5);               // 1e-5: PyTorch's default, so that nothing divides by 0
    return row.map((value, i) => (value - mean) * scale * weight[i] + bias[i]);                  // (C)
  });
}

// GELU(x) = x * Phi(x), where Phi is the normal distribution function: near x for large x, near 0 for very negative x.
// Phi(x) = (1 + erf(x / sqrt(2))) / 2. JavaScript has no erf; this approximation (Abramowitz & Stegun 1964, 7.1.26) is
// off by 1.5e-7 at most.
function gelu(x) {
  const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * z);
  const polynomial = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  const erf = 1 - polynomial * Math.exp(-z * z);                                                 // erf(|x| / sqrt(2))
  return 0.5 * x * (1 + Math.sign(x) * erf);
}

// softmax(z)_i = exp(z_i) / sum_j exp(z_j). Subtracting the largest z first changes nothing, and exp can't overflow.
function softmax(z) {
  let largest = -Infinity, sum = 0;
  for (const value of z) largest = Math.max(largest, value);
  const exponentials = z.map((value) => Math.exp(value - largest));
  for (const value of exponentials) sum += value;
  return exponentials.map((value) => value / sum);
}

const add = (x, y) => x.map((row, t) => row.map((value, i) => value + y[t][i]));                 // (T, C) + (T, C)

// ====================================================================================================================
// THE MODEL, bottom up
// ====================================================================================================================

// PE(pos, 2i) = sin(pos / 10000^(2i / C)),  PE(pos, 2i+1) = cos(pos / 10000^(2i / C))            (section 3.5)
function positionalEncoding(position, C) {
  return Float32Array.from({length: C}, (_, i) => {
    const angle = position * 10000 ** (-(i - i % 2) / C);
    return i % 2 ? Math.cos(angle) : Math.sin(angle);
  });
}

// Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V                                              (equation 1)
// query (T, d_k), key and value (S, d_k), mask (T, S) with true = may attend, or null: everything may.
// Returns [output (T, d_k), weights (T, S)].
function scaledDotProductAttention(query, key, value, mask) {
  const scale = 1 / Math.sqrt(query[0].length);
  const scores = query.map((q) => Float32Array.from(key, (k) => dot(q, k) * scale));             // (T, S)
  // exp(-Infinity) is exactly 0: a masked position has no weight at all. Every row here has at least one that isn't.
  if (mask) scores.forEach((row, t) => row.forEach((_, s) => { if (!mask[t][s]) row[s] = -Infinity; }));
  const weights = scores.map(softmax);                                                           // (T, S), sums: 1
  const output = weights.map((row) => {
    const mixed = new Float32Array(value[0].length);
    row.forEach((weight, s) => { for (let i = 0; i < mixed.length; i++) mixed[i] += weight * value[s][i]; });
    return mixed;
  });
  return [output, weights];                                                                      // (T, d_k), (T, S)
}

// The keys and values that one attention layer has already computed, (H, S, d_k) each. A causal position never changes
// once it is computed, so a new token costs one position of work instead of all of them.
class KVCache {
  key = null;
  value = null;
  get length() { return this.key ? this.key[0].length : 0; }
  append(key, value) {
    this.key = this.key ? this.key.map((rows, h) => [...rows, ...key[h]]) : key;
    this.value = this.value ? this.value.map((rows, h) => [...rows, ...value[h]]) : value;
  }
}

// (T, C) -> (H, T, d_k): each vector is cut into H pieces. subarray is a view, nothing is copied.
function splitHeads(x, H) {
  const d_k = x[0].length / H;
  return Array.from({length: H}, (_, h) => x.map((row) => row.subarray(h * d_k, (h + 1) * d_k)));
}

// MultiHead(x) = Concat(head_1, ..., head_H) W_O,   head_i = Attention(x W_Q_i, x W_K_i, x W_V_i)   (section 3.2.2)
// memory: the encoder's output (S, C) in cross-attention; null in self-attention, where x attends to itself.
function multiHeadAttention(model, name, x, mask, memory, cache, watch) {
  const H = model.constants.NUM_HEADS;
  const query = splitHeads(linear(model, name + ".query", x), H);                                // (H, T, d_k)
  let key = cache?.key, value = cache?.value;
  if (!(memory && cache?.length)) {  // cross-attention fills its cache once: the source doesn't change
    const attended = memory ?? x;                                                                // (S, C)
    key = splitHeads(linear(model, name + ".key", attended), H);                                 // (H, S, d_k)
    value = splitHeads(linear(model, name + ".value", attended), H);                             // (H, S, d_k)
    if (cache) { cache.append(key, value); ({key, value} = cache); }
  }
  const heads = [], weights = [];
  for (let h = 0; h < H; h++) {
    [heads[h], weights[h]] = scaledDotProductAttention(query[h], key[h], value[h], mask);
    // Switched off, a head leaves zeros in its place of the concatenation, so W_O adds nothing for it.
    if (watch.off?.has(`${name}.head.${h}`)) heads[h].forEach((row) => row.fill(0));
  }
  watch.attention?.set(name, weights);                                                           // (H, T, S)
  const concatenated = x.map((row, t) => {
    const whole = new Float32Array(row.length);
    heads.forEach((head, h) => whole.set(head[t], h * head[t].length));
    return whole;
  });
  return linear(model, name + ".output", concatenated);                                          // (T, C)
}

// FFN(x) = GELU(x W_1 + b_1) W_2 + b_2, at each position by itself                                 (section 3.3)
function feedForward(model, name, x, watch) {
  if (watch.off?.has(name)) return x.map((row) => new Float32Array(row.length));
  const expanded = linear(model, name + ".expand", x);                                           // (T, D_FF)
  return linear(model, name + ".contract", expanded.map((row) => row.map(gelu)));                // (T, C)
}

// One round of communication between positions, one of computation at each; both are added to the residual stream.
// decoder_only.py calls this a DecoderLayer: the same two lines, with a causal mask and a cache.
function encoderLayer(model, name, x, mask, cache, watch) {
  const norm = (part) => layerNorm(model, `${name}.${part}_norm`, x);
  x = add(x, multiHeadAttention(model, name + ".attention", norm("attention"), mask, null, cache, watch));
  x = add(x, feedForward(model, name + ".feed_forward", norm("feed_forward"), watch));
  return x;                                                                                      // (T, C)
}

// encoder_decoder.py's decoder layer: attend to the target so far, attend across to the source, compute.
function decoderLayer(model, name, x, mask, memory, cache, watch) {
  const norm = (part) => layerNorm(model, `${name}.${part}_norm`, x);
  const attend = (part, ...rest) => multiHeadAttention(model, `${name}.${part}`, norm(part), ...rest, watch);
  x = add(x, attend("self_attention", mask, null, cache?.[0]));
  x = add(x, attend("cross_attention", null, memory, cache?.[1]));
  x = add(x, feedForward(model, name + ".feed_forward", norm("feed_forward"), watch));
  return x;                                                                                      // (T, C)
}

// No looking ahead: the last T of S positions may each attend to themselves and to those before them. (T, S).
function makeCausalMask(T, S) {
  return Array.from({length: T}, (_, t) => Array.from({length: S}, (_, s) => s <= t + S - T));
}

// What each token is, times sqrt(C), plus where it stands. `start` is the position of the first one.
function embed(model, ids, start = 0) {
  const C = model.constants.D_MODEL, table = model.weights["embedding.weight"];                  // (V, C)
  if (start + ids.length > model.constants.MAX_LENGTH) {
    throw new RangeError(`More than MAX_LENGTH = ${model.constants.MAX_LENGTH} tokens.`);
  }
  return ids.map((id, t) => {
    const position = positionalEncoding(start + t, C);
    return position.map((value, i) => table[id * C + i] * Math.sqrt(C) + value);                 // (C)
  });
}

// logits = norm(x) E^T: a token's logit is how well the output fits its embedding (weight tying, Press & Wolf 2017).
// Applied to the stream after an earlier layer, this is the logit lens (nostalgebraist 2020).
function unembed(model, norm, x) {
  const C = model.constants.D_MODEL, table = model.weights["embedding.weight"];                  // (V, C)
  return layerNorm(model, norm, x).map(
    (row) => Float32Array.from({length: table.length / C}, (_, id) => dot(row, table, id * C))); // (T, V)
}

// ids (T) -> logits (T, V): which token stands at each position. Nothing is masked: all positions see all others.
function encoderOnlyTransformer(model, ids, watch = {}) {
  let x = embed(model, ids);                                                                     // (T, C)
  watch.stream?.push(x);
  for (let i = 0; i < model.constants.NUM_LAYERS; i++) {
    x = encoderLayer(model, `layers.${i}`, x, null, null, watch);
    watch.stream?.push(x);
  }
  return unembed(model, "final_norm", x);                                                        // (T, V)
}

// ids (S) -> logits (T, V): which token follows each position. With a cache, only the T new positions are computed.
function decoderOnlyTransformer(model, ids, cache = null, watch = {}) {
  const start = cache ? cache[0].length : 0;
  const mask = makeCausalMask(ids.length - start, ids.length);                                   // (T, S)
  let x = embed(model, ids.slice(start), start);                                                 // (T, C)
  watch.stream?.push(x);
  for (let i = 0; i < model.constants.NUM_LAYERS; i++) {
    x = encoderLayer(model, `layers.${i}`, x, mask, cache?.[i], watch);
    watch.stream?.push(x);
  }
  return unembed(model, "final_norm", x);                                                        // (T, V)
}

// Read: source ids (S) -> memory (S, C). Done once, however long the target becomes.
function encode(model, source, watch = {}) {
  let x = embed(model, source);                                                                  // (S, C)
  for (let i = 0; i < model.constants.NUM_LAYERS; i++) x = encoderLayer(model, `encoder.${i}`, x, null, null, watch);
  return layerNorm(model, "encoder_norm", x);                                                    // (S, C)
}

// Write: target ids, all that is written so far, and the memory -> logits (T, V) for what follows each position.
function decode(model, target, memory, cache = null, watch = {}) {
  const start = cache ? cache[0][0].length : 0;
  const mask = makeCausalMask(target.length - start, target.length);                             // (T, S)
  let x = embed(model, target.slice(start), start);                                              // (T, C)
  watch.stream?.push(x);
  for (let i = 0; i < model.constants.NUM_LAYERS; i++) {
    x = decoderLayer(model, `decoder.${i}`, x, mask, memory, cache?.[i], watch);
    watch.stream?.push(x);
  }
  return unembed(model, "decoder_norm", x);                                                      // (T, V)
}

// ====================================================================================================================
// GENERATION
// ====================================================================================================================
// A strategy is a function logits (V) -> logits (V). What it rules out becomes -Infinity, probability 0.

const argmax = (values) => values.indexOf(values.reduce((a, b) => Math.max(a, b)));
const descending = (logits) => [...logits.keys()].sort((a, b) => logits[b] - logits[a]);         // most likely first

// Below 1 sharper, above 1 flatter.
const scaleByTemperature = (logits, temperature) => logits.map((logit) => logit / temperature);

// Keep the k most likely tokens (Fan et al. 2018).
function keepTopK(logits, k) {
  const kept = new Set(descending(logits).slice(0, k));
  return logits.map((logit, id) => kept.has(id) ? logit : -Infinity);
}

// Keep the fewest tokens that together have probability p or more (Holtzman et al. 2020).
function keepTopP(logits, p) {
  if (p === 1) return logits;
  const probabilities = softmax(logits), kept = new Set();
  let before = 0;  // the probability of all tokens that are more likely
  for (const id of descending(logits)) {
    if (before >= p) break;
    kept.add(id);
    before += probabilities[id];
  }
  return logits.map((logit, id) => kept.has(id) ? logit : -Infinity);
}

// The logits as the settings leave them: {temperature, topK, topP}, null for "off". Temperature 0 keeps the best alone.
function applyStrategies(logits, {temperature = 0, topK = null, topP = null}) {
  if (temperature === 0) return keepTopK(logits, 1);
  logits = scaleByTemperature(logits, temperature);
  if (topK !== null) logits = keepTopK(logits, topK);
  if (topP !== null) logits = keepTopP(logits, topP);
  return logits;
}

// Draw one token: walk along the probabilities until the random number, uniform in [0, 1), is used up.
function chooseToken(logits, settings, random = Math.random) {
  const probabilities = softmax(applyStrategies(logits, settings));
  let left = random();
  const chosen = probabilities.findIndex((probability) => (left -= probability) < 0);
  return chosen < 0 ? argmax(probabilities) : chosen;
}

// Write until <EOS> or the limit. Decoder-only: prompt is the beginning of the text. Encoder-decoder: it is the source.
// Returns the new ids alone.
function generate(model, prompt, settings, watch = {}, random = Math.random) {
  const {NUM_LAYERS, MAX_LENGTH, MAX_NEW_TOKENS} = model.constants;
  const memory = model.architecture === "encoder_decoder" ? encode(model, prompt, watch) : null;
  const cache = Array.from({length: NUM_LAYERS}, () => memory ? [new KVCache(), new KVCache()] : new KVCache());
  const text = memory ? [SOS_ID] : [...prompt], start = text.length;
  while (text.length - start < MAX_NEW_TOKENS && text.length <= MAX_LENGTH && text.at(-1) !== EOS_ID) {
    const logits = (memory ? decode(model, text, memory, cache, watch)
                           : decoderOnlyTransformer(model, text, cache, watch)).at(-1);          // (V)
    logits[PAD_ID] = -Infinity;                                 // padding is not a word
    text.push(chooseToken(logits, settings, random));
  }
  return text.slice(start);
}

// Encoder-only: mask-predict (Ghazvininejad et al. 2019). Predict all masks at once, keep the predictions with the most
// confidence, mask the others again. Returns the text before the first round and after each; the last has no <MASK>.
function maskPredict(model, prompt, iterations, settings, watch = {}, random = Math.random) {
  const texts = [[...prompt]], numAsked = prompt.filter((id) => id === MASK_ID).length;
  for (let i = 1; i <= iterations; i++) {
    const ids = [...texts.at(-1)], logits = encoderOnlyTransformer(model, ids, watch), predictions = [];
    ids.forEach((id, t) => {
      if (id !== MASK_ID) return;
      logits[t].fill(-Infinity, 0, NUM_SPECIAL_TOKENS);         // answers are digits and words
      ids[t] = chooseToken(logits[t], settings, random);
      predictions.push({t, confidence: softmax(logits[t])[ids[t]]});
    });
    const numMasked = Math.floor(numAsked * (iterations - i) / iterations);
    predictions.sort((a, b) => a.confidence - b.confidence).slice(0, numMasked).forEach(({t}) => { ids[t] = MASK_ID; });
    texts.push(ids);
  }
  return texts;
}
