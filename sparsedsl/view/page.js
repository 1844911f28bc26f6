"use strict";
// The page over its answers: from the server it came from, or from what the file keeps (DATA.kept). No library.

const $ = (id) => document.getElementById(id);
const EMPTY = 0, PARTIAL = 1, FULL = 2, GUESSED = 4;
const state = { start: null, setting: null, view: null, layers: [], shown: "", theme: null, kept: null, pinned: null, hover: null };

function make(tag, words = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), words);
  made.append(...inside);
  return made;
}

// ---- answers ------------------------------------------------------------------------------------------------------------

async function ask(name, question) {
  if (DATA.kept) return answerOf(DATA.kept, name, question);
  const words = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question) };
  try {
    return await (await fetch("/" + name, words)).json();
  } catch (error) {
    return { refused: "The server does not answer. Start it again: python -m sparsedsl view " + (state.start?.name ?? "SPEC") };
  }
}

async function answerOf(kept, name, question) {
  if (name === "start") return kept.start;
  if (name === "program") return kept.program;
  if (name === "graph") return kept.graph[question.theme];
  if (name in kept.facts) return kept.facts[name];
  if (name === "view") return keptView(kept, question);
  return {};
}

async function keptView(kept, question) {
  // the coarsest level that has a cell for two points of the screen, or the finest there is
  const span = Math.max(question.q1 - question.q0, question.kv1 - question.kv0);
  const wanted = span / question.most;
  const fits = kept.levels.find((level) => level.cell[0] <= wanted) ?? kept.levels[kept.levels.length - 1];
  // within tiles, over a tint of their classes
  if (kept.tiles && fits.cell[0] < Math.min(...kept.tiles.cell)) return { tiles: kept.tiles, fine: fits };
  return { tiles: fits, fine: null };
}

async function codes(layer) {
  // the bytes of a layer, once
  if (layer.codes) return layer.codes;
  let bytes = Uint8Array.from(atob(layer.data), (letter) => letter.charCodeAt(0));
  if (layer.packed) {
    const open = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    bytes = new Uint8Array(await new Response(open).arrayBuffer());
  }
  layer.codes = bytes;
  return bytes;
}

function newest(work) {
  // one at a time, and of those that come meanwhile the last: a slider that is dragged never piles up questions
  let busy = false, again = null;
  return async function run(...words) {
    if (busy) { again = words; return; }
    busy = true;
    try { await work(...words); } finally { busy = false; }
    if (again) { const next = again; again = null; run(...next); }
  };
}

// ---- the map ------------------------------------------------------------------------------------------------------------

const EDGE = { left: 68, right: 10, top: 10, bottom: 34 };

function whole() {
  const s = state.setting, keys = s.kv_len ?? s.q_offset + s.q_len;
  const length = state.call ?? null;
  return length ? { q0: 0, q1: length, kv0: 0, kv1: length } : { q0: s.q_offset, q1: s.q_offset + s.q_len, kv0: 0, kv1: keys };
}

function frame() {
  // the part of the canvas that positions fill: tokens are square where the whole is no strip
  const canvas = $("map"), width = canvas.clientWidth - EDGE.left - EDGE.right, height = canvas.clientHeight - EDGE.top - EDGE.bottom;
  const all = whole(), ratio = (all.q1 - all.q0) / (all.kv1 - all.kv0);
  if (ratio < 0.25 || ratio > 4) return { x: EDGE.left, y: EDGE.top, width, height };
  const wide = Math.min(width, height / ratio);
  return { x: EDGE.left, y: EDGE.top, width: wide, height: wide * ratio };
}

const xOf = (kv, v, f) => f.x + (kv - v.kv0) / (v.kv1 - v.kv0) * f.width;
const yOf = (q, v, f) => f.y + (q - v.q0) / (v.q1 - v.q0) * f.height;

function clampView(v) {
  const all = whole();
  for (const [a, b, low, high] of [["q0", "q1", all.q0, all.q1], ["kv0", "kv1", all.kv0, all.kv1]]) {
    let span = Math.min(Math.max(v[b] - v[a], Math.min(8, high - low)), high - low);
    const middle = (v[a] + v[b]) / 2;
    v[a] = Math.min(Math.max(middle - span / 2, low), high - span);
    v[b] = v[a] + span;
  }
  return v;
}

function rgb(hex) { return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)); }

function image(layer, fine) {
  // a layer as a small canvas, once for each theme
  const key = state.theme + fine;
  if (layer.image?.key === key) return layer.image;
  const t = DATA.themes[state.theme], canvas = make("canvas", { width: layer.columns, height: layer.rows });
  const data = new ImageData(layer.columns, layer.rows), shades = layer.name !== undefined;
  const ends = [rgb(t.faint), rgb(t.pair)], whole_ = rgb(fine ? t.pair : t.full), part = rgb(t.partial);
  for (let i = 0; i < layer.codes.length; i++) {
    const code = layer.codes[i], kind = code % GUESSED;
    let colour = null, alpha = 255;
    if (shades) {
      const much = Math.pow(code / 255, 0.4);
      colour = code ? ends[0].map((low, n) => low + (ends[1][n] - low) * much) : null;
    } else if (kind === FULL) colour = whole_;
    else if (kind === PARTIAL) { colour = fine ? whole_ : part; alpha = fine ? 120 : 255; }
    if (!shades && code >= GUESSED) { colour = kind === EMPTY ? part : colour; alpha = kind === EMPTY ? 45 : 150; }
    if (colour) data.data.set([...colour, alpha], 4 * i);
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
  canvas.key = key;
  return (layer.image = canvas);
}

function draw() {
  const canvas = $("map"), ratio = window.devicePixelRatio || 1, t = DATA.themes[state.theme], v = state.view;
  if (!v || !canvas.clientWidth) return;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  const g = canvas.getContext("2d"), f = frame();
  g.scale(ratio, ratio);
  g.imageSmoothingEnabled = false;
  g.fillStyle = t.nothing;
  g.fillRect(f.x, f.y, f.width, f.height);
  g.save();
  g.beginPath(); g.rect(f.x, f.y, f.width, f.height); g.clip();
  for (const [layer, fine] of state.layers) {
    g.globalAlpha = !fine && state.layers.length > 1 ? 0.18 : 1;
    const x = xOf(layer.kv, v, f), y = yOf(layer.q, v, f);
    const right = xOf(layer.kv + layer.columns * layer.cell[1], v, f), bottom = yOf(layer.q + layer.rows * layer.cell[0], v, f);
    g.drawImage(image(layer, fine), x, y, right - x, bottom - y);
  }
  g.globalAlpha = 1;
  lines(g, f, v, t);
  for (const [pair, colour] of [[state.hover, t.dim], [state.pinned, t.query]]) if (pair) mark(g, f, v, pair, colour);
  g.restore();
  axes(g, f, v, t);
}

function lines(g, f, v, t) {
  // between tiles, where they are not too near
  const s = state.setting;
  g.strokeStyle = t.page; g.lineWidth = 1;
  for (const [size, first, a, b, length, at] of [
    [s.q_block, s.q_offset, v.q0, v.q1, f.height, (n) => [f.x, yOf(n, v, f), f.x + f.width, yOf(n, v, f)]],
    [s.kv_block, 0, v.kv0, v.kv1, f.width, (n) => [xOf(n, v, f), f.y, xOf(n, v, f), f.y + f.height]],
  ]) {
    if (state.start.program || size / (b - a) * length < 6) continue;
    g.beginPath();
    for (let n = first + Math.ceil((a - first) / size) * size; n <= b; n += size) { const [x0, y0, x1, y1] = at(n); g.moveTo(x0, y0); g.lineTo(x1, y1); }
    g.stroke();
  }
}

function mark(g, f, v, pair, colour) {
  const x = xOf(pair.kv_idx, v, f), y = yOf(pair.q_idx, v, f);
  const width = Math.max(xOf(pair.kv_idx + 1, v, f) - x, 5), height = Math.max(yOf(pair.q_idx + 1, v, f) - y, 5);
  g.strokeStyle = colour; g.lineWidth = 1.5;
  g.strokeRect(x, y, width, height);
  g.globalAlpha = 0.4;
  g.beginPath(); g.moveTo(f.x, y + height / 2); g.lineTo(x, y + height / 2); g.moveTo(x + width / 2, f.y); g.lineTo(x + width / 2, y); g.stroke();
  g.globalAlpha = 1;
}

function ticks(low, high, room) {
  const rough = (high - low) / Math.max(2, room / 80), ten = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, ten * ([1, 2, 5, 10].find((n) => n * ten >= rough) ?? 10));
  const found = [];
  for (let n = Math.ceil(low / step) * step; n <= high; n += step) found.push(n);
  return found;
}

function told(n) {
  return n >= 10000 && n % 100 === 0 ? `${n / 1000}K` : n.toLocaleString("en");
}

function axes(g, f, v, t) {
  g.strokeStyle = t.line; g.lineWidth = 1; g.strokeRect(f.x - 0.5, f.y - 0.5, f.width + 1, f.height + 1);
  g.fillStyle = t.dim; g.font = "11px system-ui, sans-serif";
  g.textAlign = "center"; g.textBaseline = "top";
  for (const n of ticks(v.kv0, v.kv1, f.width)) g.fillText(told(n), xOf(n, v, f), f.y + f.height + 4);
  g.fillText("kv_idx (key)", f.x + f.width / 2, f.y + f.height + 19);
  g.textAlign = "right"; g.textBaseline = "middle";
  for (const n of ticks(v.q0, v.q1, f.height)) g.fillText(told(n), f.x - 5, yOf(n, v, f));
  g.save(); g.translate(9, f.y + f.height / 2); g.rotate(-Math.PI / 2); g.textAlign = "center"; g.fillText("q_idx (query)", 0, 0); g.restore();
}

function seen() {
  // what the map is asked for: the part that is seen, in cells of two points of the screen
  const v = state.view, f = frame(), most = Math.round(Math.min(512, Math.max(f.width, f.height) / 2));
  return { setting: state.setting, q0: Math.floor(v.q0), q1: Math.ceil(v.q1), kv0: Math.floor(v.kv0), kv1: Math.ceil(v.kv1), most };
}

const look = newest(async () => {
  // the cells of what is seen
  if (state.start.program) return;
  const question = seen(), began = performance.now(), answer = await ask("view", question);
  refuse(answer.refused);
  if (answer.refused) { state.layers = []; draw(); return; }
  const found = [[answer.tiles, false], [answer.fine, true]].filter(([layer]) => layer);
  for (const [layer] of found) await codes(layer);
  state.layers = found;
  draw();
  legend();
  const took = performance.now() - began;
  $("time").textContent = `map in ${took.toFixed(0)} ms`;
  document.body.dataset.ms = took.toFixed(1);
  document.body.dataset.cells = JSON.stringify(answer.tiles?.counts ?? {});
  document.body.dataset.shown = JSON.stringify(question);
});

function legend() {
  const t = DATA.themes[state.theme], entries = [];
  const square = (colour, words) => entries.push(make("span", {}, make("i", { style: `background:${colour}` }), words));
  if (state.start.program) {
    square(t.pair, state.shown === "weights" ? "largest weight" : "chosen");
    square(t.nothing, state.shown === "weights" ? "none" : "not chosen");
  } else {
    const close = state.layers.find(([, fine]) => fine)?.[0], tiles = state.layers.find(([, fine]) => !fine)?.[0];
    const [a, b] = tiles?.cell ?? [1, 1], s = state.setting, times = (a / s.q_block) * (b / s.kv_block);
    square(t.full, "full tile"); square(t.partial, "partial tile"); square(t.nothing, "empty");
    if (close) {
      square(t.pair, close.cell[0] === 1 ? "allowed pair" : `allowed, in cells of ${close.cell[0]} tokens`);
      entries.push(make("span", {}, "tint: the class of the tile"));
    }
    if (times > 1) entries.push(make("span", {}, `a cell is ${times.toLocaleString("en")} tiles: partial where they differ`));
    const guessed = (close?.guessed ?? 0) + (tiles?.guessed ?? 0);
    if (guessed) entries.push(make("span", { className: "part" }, `${guessed.toLocaleString("en")} cells told by a sample: pale, palest where it found no allowed pair`));
  }
  $("legend").replaceChildren(...entries);
}

function refuse(message) {
  $("refused").hidden = !message;
  $("refused").textContent = message ?? "";
}

// ---- pairs --------------------------------------------------------------------------------------------------------------

function pairAt(event) {
  const box = $("map").getBoundingClientRect(), f = frame(), v = state.view;
  const x = event.clientX - box.left, y = event.clientY - box.top;
  if (x < f.x || y < f.y || x >= f.x + f.width || y >= f.y + f.height) return null;
  return { q_idx: Math.floor(v.q0 + (y - f.y) / f.height * (v.q1 - v.q0)), kv_idx: Math.floor(v.kv0 + (x - f.x) / f.width * (v.kv1 - v.kv0)) };
}

function reasonOf(reason, top) {
  const mark_ = { true: ["✓ ", "yes"], false: ["✗ ", "no"], some: ["± ", "part"], unknown: ["? ", ""] }[String(reason.holds)];
  const item = make("li", {}, make("span", { className: mark_[1] }, mark_[0]), reason.text || reason.word);
  if (reason.parts.length) item.append(listOf(reason.parts));
  return top ? make("ul", { className: "reason top" }, item) : item;
}

function listOf(parts) { return make("ul", { className: "reason" }, ...parts.map((part) => reasonOf(part, false))); }

const tell = newest(async (pair) => {
  if (state.start.program) { tellProgram(pair); return; }
  const answer = DATA.kept ? keptPair(pair) : await ask("pair", { setting: state.setting, ...pair });
  if (answer.refused) { $("pair").replaceChildren(make("pre", { className: "wrap" }, answer.refused)); return; }
  const words = { true: ["allowed", "yes"], false: ["masked", "no"], some: ["some pairs of this cell are allowed", "part"], unknown: ["finer than this file", ""] }[String(answer.allowed)];
  const place = `q_idx ${pair.q_idx.toLocaleString("en")}, kv_idx ${pair.kv_idx.toLocaleString("en")}, difference ${(pair.q_idx - pair.kv_idx).toLocaleString("en")}`;
  $("pair").replaceChildren(
    make("div", {}, place), make("div", { className: "verdict " + words[1] }, words[0]),
    make("div", {}, answer.tile ? `in a ${answer.tile.class} tile (${answer.tile.row}, ${answer.tile.column})` : answer.note ?? ""),
    ...(answer.reads ?? []).map((read) => make("pre", {}, read)), ...(answer.reason ? [reasonOf(answer.reason, true)] : []),
  );
});

function kindAt(layer, pair) {
  const row = Math.floor((pair.q_idx - layer.q) / layer.cell[0]), column = Math.floor((pair.kv_idx - layer.kv) / layer.cell[1]);
  const code = layer.codes[row * layer.columns + column];
  return code === undefined ? "unknown" : { [EMPTY]: false, [PARTIAL]: "some", [FULL]: true }[code % GUESSED];
}

function keptPair(pair) {
  // from the levels and conditions of the file: exact where its cells are pairs
  const { levels, conditions } = DATA.kept, finest = levels[levels.length - 1];
  const reason = (node) => ({ ...node, holds: node.parts.length ? joined(node.word, node.parts.map((p) => reason(p).holds)) : node.layer == null ? "unknown" : kindAt(conditions.layers[node.layer], pair), parts: node.parts.map(reason) });
  const cell = conditions.layers[0]?.cell[0] ?? 1;
  const note = finest.cell[0] > 1 || cell > 1 ? `of cells of ${finest.cell[0]} tokens; conditions of cells of ${cell}` : "";
  return { allowed: finest.codes ? kindAt(finest, pair) : "unknown", reason: reason(conditions.tree), note };
}

function joined(word, holds) {
  if (word === "not") return { true: false, false: true }[holds[0]] ?? holds[0];
  const decides = word === "one of";
  if (holds.includes(decides)) return decides;
  return holds.every((one) => one === !decides) ? !decides : holds.includes("unknown") ? "unknown" : "some";
}

function tellProgram(pair) {
  const lines_ = state.program.layers.map((layer) => {
    const code = layer.codes[Math.floor(pair.q_idx / layer.cell[0]) * layer.columns + Math.floor(pair.kv_idx / layer.cell[1])];
    if (layer.name === "weights") return `weight: ${(code / 2.55).toFixed(1)} % of the largest`;
    return `${layer.name}: block of queries ${Math.floor(pair.q_idx / layer.cell[0])}, keys ${Math.floor(pair.kv_idx / layer.cell[1])} ${code ? "chosen" : "not chosen"}`;
  });
  $("pair").replaceChildren(make("div", {}, `q_idx ${pair.q_idx}, kv_idx ${pair.kv_idx}`), ...lines_.map((line) => make("pre", { className: "wrap" }, line)));
}

// ---- programs -----------------------------------------------------------------------------------------------------------

const call = newest(async () => {
  const began = performance.now(), answer = await ask("program", { setting: state.setting });
  refuse(answer.refused);
  if (answer.refused) { state.layers = []; draw(); return; }
  for (const layer of answer.layers) await codes(layer);
  state.program = answer; state.call = answer.length;
  state.view = whole();
  const names = answer.layers.map((layer) => layer.name);
  if (!names.includes(state.shown)) state.shown = names[0];
  $("layers").replaceChildren(...names.map((name) => make("button", { textContent: name, ariaPressed: String(name === state.shown), onclick: () => { state.shown = name; show(); } })));
  show();
  $("pair").replaceChildren(...answer.notes.map((note) => make("div", {}, note)));
  $("time").textContent = `call in ${(performance.now() - began).toFixed(0)} ms`;
});

function show() {
  state.layers = state.program.layers.filter((layer) => layer.name === state.shown).map((layer) => [layer, true]);
  for (const button of $("layers").children) button.ariaPressed = String(button.textContent === state.shown);
  draw(); legend();
}

const graph = newest(async () => {
  const answer = await ask("graph", { setting: state.setting, theme: state.theme });
  const place = $("graph");
  if (answer.refused) place.textContent = answer.refused; else place.innerHTML = answer.svg;
  document.body.dataset.graph = "yes";
});

// ---- facts --------------------------------------------------------------------------------------------------------------

const TITLES = { causal: "Causality", cache: "Cache", cost: "Cost", source: "Generated source", text: "Text" };

function placeFacts() {
  const found = Object.entries(TITLES).map(([name, title]) => {
    const open = name !== "source" && name !== "text";
    const place = make("details", { open }, make("summary", {}, title), make("div", { className: "fact", id: "fact-" + name }));
    place.addEventListener("toggle", () => place.open && prove());
    return place;
  });
  if (state.start.program) found.unshift(make("details", { open: true }, make("summary", {}, "Graph"), make("div", { id: "graph", className: "fact" })));
  $("facts").replaceChildren(...found);
}

const prove = newest(async () => {
  for (const name of Object.keys(TITLES)) {
    const place = $("fact-" + name);
    if (!place.parentElement.open) continue;
    const setting = state.setting, answer = await ask(name, { setting });
    const inside = [make("pre", { className: name === "source" || name === "cost" ? "" : "wrap" }, typeof answer.refused === "string" ? "–" : answer.text)];
    if (answer.status) inside.unshift(make("div", { className: "verdict " + ({ PROVED: "yes", REFUTED: "no" }[answer.status] ?? "part") }, { PROVED: "proved for all lengths", REFUTED: "no: there is a pair", UNKNOWN: "not known" }[answer.status]));
    if (answer.witness && !state.start.program) inside.push(make("button", { textContent: `show (${answer.witness.q_idx}, ${answer.witness.kv_idx})`, onclick: () => goTo(answer.witness) }));
    place.replaceChildren(...inside);
    if (setting !== state.setting) return; // it moved on: the next run begins anew
  }
  document.body.dataset.proofs = Number(document.body.dataset.proofs ?? 0) + 1;
});

let proving = 0;
function proveSoon() { clearTimeout(proving); proving = setTimeout(prove, DATA.kept ? 0 : 350); }

function goTo(pair) {
  const all = whole();
  if (pair.q_idx < all.q0 || pair.q_idx >= all.q1 || pair.kv_idx >= all.kv1) {
    $("pair").replaceChildren(make("div", {}, `the pair (${pair.q_idx}, ${pair.kv_idx}) lies beyond these lengths`));
    return;
  }
  state.pinned = { q_idx: pair.q_idx, kv_idx: pair.kv_idx };
  state.view = clampView({ q0: pair.q_idx - 32, q1: pair.q_idx + 32, kv0: pair.kv_idx - 32, kv1: pair.kv_idx + 32 });
  draw(); look(); tell(state.pinned);
}

// ---- controls -----------------------------------------------------------------------------------------------------------

function changed(refit) {
  state.setting = { ...state.setting, values: { ...state.setting.values } };
  state.pinned = null;
  if (refit) state.view = whole(); else clampView(state.view);
  const all = whole();
  $("shape").textContent = `${(all.q1 - all.q0).toLocaleString("en")} queries x ${(all.kv1 - all.kv0).toLocaleString("en")} keys`;
  if (state.start.program) call(); else look();
  proveSoon();
}

function control(words) {
  // a number with a slider; log: the slider counts doublings
  const box = make("input", { type: "number", id: "set-" + words.id, value: words.value ?? "", step: words.step ?? 1, placeholder: words.hint ?? "" });
  const slider = make("input", { type: "range", id: "slide-" + words.id, ariaLabel: words.label, min: words.log ? 0 : words.low, max: words.log ? words.high * 4 : words.high, step: words.log ? 1 : words.step ?? 1 });
  const place = () => { slider.value = words.log ? Math.log2(Math.max(1, Number(box.value))) * 4 : box.value; };
  place();
  box.addEventListener("input", () => { place(); words.set(box.value === "" ? null : Number(box.value)); });
  slider.addEventListener("input", () => { const n = words.log ? Math.round(2 ** (slider.value / 4)) : Number(slider.value); box.value = n; words.set(n); });
  return make("div", { className: "control" }, make("label", {}, words.label, box), slider);
}

function tick(words) {
  const box = make("input", { type: "checkbox", id: "set-" + words.id, checked: words.value });
  box.addEventListener("input", () => words.set(box.checked));
  return make("div", { className: "control" }, make("label", {}, words.label, box));
}

function placeControls() {
  const s = state.setting, start = state.start, found = [];
  if (DATA.kept) {
    const shown = { ...s, ...s.values, values: undefined, kv_len: s.kv_len ?? "to the last query" };
    const rows = Object.entries(shown).filter(([, value]) => value !== undefined).map(([name, value]) => make("div", { className: "control" }, make("label", {}, name, make("b", {}, String(value)))));
    $("controls").replaceChildren(make("h2", {}, "Setting"), ...rows, make("p", { id: "hint" }, "This file shows one setting. With sliders: python -m sparsedsl view " + start.name));
    return;
  }
  const set = (name, refit) => (value) => { state.setting[name] = value; changed(refit); };
  if (start.parameters.length) found.push(make("h2", {}, "Parameters"));
  for (const p of start.parameters) {
    const words = { id: p.name, label: p.name, value: s.values[p.name], low: p.low, high: p.high, step: p.step };
    words.set = (value) => { state.setting.values[p.name] = value; changed(false); };
    found.push(p.kind === "bool" ? tick(words) : control(words));
  }
  found.push(make("h2", {}, "Lengths"));
  found.push(control({ id: "q_len", label: "queries", value: s.q_len, log: true, high: 20, set: set("q_len", true) }));
  if (!start.program) {
    found.push(control({ id: "q_offset", label: "first query", value: s.q_offset, log: true, high: 20, set: set("q_offset", true) }));
    found.push(control({ id: "kv_len", label: "keys", value: s.kv_len, log: true, high: 20, hint: "to the last", set: set("kv_len", true) }));
    found.push(make("h2", {}, "Tiles"));
    found.push(control({ id: "q_block", label: "queries in a tile", value: s.q_block, log: true, high: 10, set: set("q_block", false) }));
    found.push(control({ id: "kv_block", label: "keys in a tile", value: s.kv_block, log: true, high: 10, set: set("kv_block", false) }));
  } else found.push(control({ id: "seed", label: "seed of the call", value: s.seed, low: 0, high: 20, set: set("seed", false) }));
  if (start.reads_head || start.reads_batch) found.push(make("h2", {}, "Place"));
  if (start.reads_head) found.push(control({ id: "head", label: "head", value: s.head, low: 0, high: start.program ? 3 : 31, set: set("head", false) }));
  if (start.reads_batch) found.push(control({ id: "batch", label: "batch entry", value: s.batch, low: 0, high: 15, set: set("batch", false) }));
  $("controls").replaceChildren(...found);
}

// ---- hands --------------------------------------------------------------------------------------------------------------

function zoom(times, at) {
  const v = state.view, q = at ? at.q_idx + 0.5 : (v.q0 + v.q1) / 2, kv = at ? at.kv_idx + 0.5 : (v.kv0 + v.kv1) / 2;
  state.view = clampView({ q0: q + (v.q0 - q) * times, q1: q + (v.q1 - q) * times, kv0: kv + (v.kv0 - kv) * times, kv1: kv + (v.kv1 - kv) * times });
  draw(); look();
}

function move(rows, columns) {
  const v = state.view, q = rows * (v.q1 - v.q0), kv = columns * (v.kv1 - v.kv0);
  state.view = clampView({ q0: v.q0 + q, q1: v.q1 + q, kv0: v.kv0 + kv, kv1: v.kv1 + kv });
  draw(); look();
}

function near(q, kv) { state.view = clampView({ q0: q - 48, q1: q + 48, kv0: kv - 48, kv1: kv + 48 }); draw(); look(); }

const DO = {
  in: () => zoom(0.5), out: () => zoom(2), whole: () => { state.view = whole(); draw(); look(); },
  start: () => near(whole().q0, 0), end: () => near(whole().q1, Math.min(whole().q1, whole().kv1)),
};

function hands() {
  const map = $("map");
  let from = null, moved = false;
  map.addEventListener("wheel", (event) => { event.preventDefault(); zoom(2 ** (Math.sign(event.deltaY) * 0.5), pairAt(event)); }, { passive: false });
  map.addEventListener("pointerdown", (event) => { from = { x: event.clientX, y: event.clientY }; moved = false; map.setPointerCapture(event.pointerId); });
  map.addEventListener("pointermove", (event) => {
    if (from && Math.abs(event.clientX - from.x) + Math.abs(event.clientY - from.y) > 3) {
      const f = frame();
      moved = true;
      move((from.y - event.clientY) / f.height, (from.x - event.clientX) / f.width);
      from = { x: event.clientX, y: event.clientY };
      return;
    }
    state.hover = pairAt(event);
    draw();
    if (state.hover && !state.pinned) tell(state.hover);
  });
  map.addEventListener("pointerup", (event) => {
    if (from && !moved) { const pair = pairAt(event); state.pinned = pair && state.pinned?.q_idx === pair.q_idx && state.pinned?.kv_idx === pair.kv_idx ? null : pair; draw(); if (pair) tell(pair); }
    from = null;
  });
  map.addEventListener("pointerleave", () => { state.hover = null; draw(); });
  map.addEventListener("dblclick", (event) => zoom(0.25, pairAt(event)));
  map.addEventListener("keydown", (event) => {
    const done = { "+": DO.in, "=": DO.in, "-": DO.out, 0: DO.whole, ArrowUp: () => move(-0.1, 0), ArrowDown: () => move(0.1, 0), ArrowLeft: () => move(0, -0.1), ArrowRight: () => move(0, 0.1), Escape: () => { state.pinned = null; draw(); } }[event.key];
    if (done) { event.preventDefault(); done(); }
  });
  for (const button of document.querySelectorAll("[data-do]")) button.onclick = () => DO[button.dataset.do]();
  $("theme").onclick = () => paint(state.theme === "dark" ? "light" : "dark");
  new ResizeObserver(() => { if (state.view) { draw(); look(); } }).observe(map);
}

function paint(theme) {
  const t = DATA.themes[(state.theme = theme)], style = document.documentElement.style;
  for (const [name, colour] of Object.entries(t)) style.setProperty("--" + name, colour);
  style.setProperty("--edge", theme === "dark" ? "#343a43" : "#d9d9d4");
  style.setProperty("--field", theme === "dark" ? "#1d2127" : "#fafaf8");
  style.setProperty("--yes", theme === "dark" ? "#6fd3a0" : "#13703f");
  style.colorScheme = theme;
  if (state.view) { draw(); legend(); if (state.start.program) graph(); }
}

async function begin() {
  const asked = new URLSearchParams(location.search).get("theme");
  paint(asked in DATA.themes ? asked : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const start = await ask("start", {});
  if (!start.setting) { refuse(start.refused); document.body.dataset.ready = "refused"; return; }
  state.start = start; state.setting = start.setting;
  $("name").textContent = document.title = start.name;
  state.view = whole();
  placeControls(); placeFacts(); hands();
  if (start.refused) refuse(start.refused);
  if (DATA.kept?.conditions) for (const layer of [...DATA.kept.conditions.layers, DATA.kept.levels.at(-1)]) await codes(layer);
  changed(true);
  if (start.program) graph();
  document.body.dataset.ready = "yes";
}

begin();
