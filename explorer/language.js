// language.js - the rules of the toy language: what toy_dataset.py does in Python, for checking answers in the page.
//
// Every answer on the page is marked correct or wrong by the rules in this file, never by the model. `rules` comes from
// build.py: {maxDigits, maxWords, ones, tens, units: [["thousand", 1000], ["hundred", 100]]}, large units first.
"use strict";

class InputError extends Error {}  // something that the person at the keyboard can fix: shown as one line

// number_to_words: 90210 -> ["ninety", "thousand", "two", "hundred", "ten"].
function numberToWords(rules, number) {
  if (number < 20) return [rules.ones[number]];
  if (number < 100) {
    return [rules.tens[Math.floor(number / 10) - 2], ...(number % 10 ? [rules.ones[number % 10]] : [])];
  }
  const [unit, value] = rules.units.find(([, value]) => value <= number);
  const rest = number % value;
  return [...numberToWords(rules, Math.floor(number / value)), unit, ...(rest ? numberToWords(rules, rest) : [])];
}

// parse_number: the number that was typed, or an InputError in one sentence.
function parseNumber(rules, text) {
  text = text.trim();
  if (text === "") throw new InputError(`Type a number of 1 to ${rules.maxDigits} digits.`);
  if (text.includes("<")) {
    throw new InputError("This model writes from left to right and can't fill in holes: type a number, digits only.");
  }
  if (!/^[0-9]+$/.test(text) || (text !== "0" && text.startsWith("0"))) {
    throw new InputError(`“${shorten(text)}” is not a number here: digits only, no sign, comma or leading zero.`);
  }
  if (text.length > rules.maxDigits) {
    throw new InputError(`${shorten(text)} is too long: this language has numbers of 1 to ${rules.maxDigits} digits.`);
  }
  return Number(text);
}

const shorten = (text) => text.length > 24 ? text.slice(0, 24) + "…" : text;

// A text for the encoder-only model, "90210 <SEP> ninety <MASK> two hundred ten", to the tokens of its two segments:
// {digits, words}. A number alone stands for itself and its name. "_" is short for <MASK>.
function parseText(rules, vocabulary, text) {
  const pieces = text.trim().split(/\s+/).map((piece) => piece === "_" ? "<MASK>" : piece);
  if (pieces.length === 1 && !pieces[0].startsWith("<")) {
    const number = parseNumber(rules, pieces[0]);
    return {digits: [...String(number)], words: numberToWords(rules, number)};
  }
  const tokens = pieces.flatMap((piece) => /^[0-9]+$/.test(piece) ? [...piece] : [piece]);
  const unknown = tokens.find((token) => !vocabulary.includes(token));
  if (unknown !== undefined) throw new InputError(`“${shorten(unknown)}” is not in the vocabulary.`);
  const form = "Write digits, <SEP>, then words, as in: 342 <SEP> three <MASK> forty two";
  if (tokens.filter((token) => token === "<SEP>").length !== 1) throw new InputError(form + ".");
  const middle = tokens.indexOf("<SEP>"), digits = tokens.slice(0, middle), words = tokens.slice(middle + 1);
  const isDigit = (token) => /^[0-9]$/.test(token), isSpecial = (token) => /^<(?!MASK>)/.test(token);
  if (!digits.length || !words.length || words.some(isDigit) || tokens.some((t) => isSpecial(t) && t !== "<SEP>")
      || digits.some((token) => !isDigit(token) && token !== "<MASK>")) {
    throw new InputError(form + ".");
  }
  if (digits.length > rules.maxDigits) {
    throw new InputError(`${digits.length} digits are too many: numbers have 1 to ${rules.maxDigits} digits.`);
  }
  if (words.length > rules.maxWords) {
    throw new InputError(`${words.length} words are too many: names have at most ${rules.maxWords} words.`);
  }
  return {digits, words};
}

// Which numbers fit a text with holes? Counts them all, without listing them, and says what share of them has which
// token at each hole. This share is the best that any model can do: if all that fit are equally likely, no
// prediction of a single hole can be better than it.
//
// A number is a row of groups of three digits, each named by itself, so this is a sum over paths, one step for each
// group: forward[g][p] counts the ways to name the groups before g with the first p words, backward[g][p] the ways to
// name the groups from g on with the words from p on.
// Returns {count, shares}: shares[i] is a Map from token to share, for token i of [...digits, ...words].
function possibleNumbers(rules, digits, words) {
  const numGroups = Math.ceil(digits.length / 3), groups = [];
  const fits = (pattern, tokens) => pattern.length === tokens.length
    && tokens.every((token, i) => pattern[i] === "<MASK>" || pattern[i] === token);
  for (let g = 0; g < numGroups; g++) {
    const end = digits.length - 3 * (numGroups - 1 - g), start = Math.max(0, end - 3);
    const unit = rules.units.find(([, value]) => value === 1000 ** (numGroups - 1 - g))?.[0];
    groups.push({start, candidates: []});
    for (let value = 0; value < 10 ** (end - start); value++) {
      const text = [...String(value).padStart(end - start, "0")];
      if (!fits(digits.slice(start, end), text) || (g === 0 && text[0] === "0" && digits.length > 1)) continue;
      const name = value || digits.length === 1 ? [...numberToWords(rules, value), ...(unit ? [unit] : [])] : [];
      groups[g].candidates.push({text, name});
    }
  }
  const length = words.length;
  const table = () => Array.from({length: numGroups + 1}, () => new Array(length + 1).fill(0));
  const forward = table(), backward = table();
  const steps = (g, p) => groups[g].candidates.filter(({name}) => fits(words.slice(p, p + name.length), name));
  forward[0][0] = backward[numGroups][length] = 1;
  for (let g = 0; g < numGroups; g++) {
    for (let p = 0; p <= length; p++) {
      if (forward[g][p]) steps(g, p).forEach(({name}) => { forward[g + 1][p + name.length] += forward[g][p]; });
    }
  }
  const count = forward[numGroups][length], shares = [...digits, ...words].map(() => new Map());
  for (let g = numGroups - 1; g >= 0 && count; g--) {
    for (let p = 0; p <= length; p++) {
      for (const {text, name} of steps(g, p)) {
        const after = backward[g + 1][p + name.length];
        backward[g][p] += after;
        const share = forward[g][p] * after / count;
        if (!share) continue;
        const note = (i, token) => shares[i].set(token, (shares[i].get(token) ?? 0) + share);
        text.forEach((token, i) => note(groups[g].start + i, token));
        name.forEach((token, i) => note(digits.length + p + i, token));
      }
    }
  }
  return {count, shares};
}
