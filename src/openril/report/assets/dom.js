// Building elements and writing values. Everything that comes from models, data or file names enters the page through
// `visible` and a text node, never as markup, and nothing of it becomes an address.

const SVG_TAGS = new Set(["svg", "g", "path", "line", "rect", "circle", "polygon", "text", "title", "polyline"]);

/** Create an element with attributes, `on...` listeners and children (nodes, strings, nested lists; null is left out). */
function el(tag, attributes, ...children) {
  const node = SVG_TAGS.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Control characters, bidirectional overrides and halves of surrogate pairs: they hide text, reverse it, or end it.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\ufeff]|\p{Surrogate}/gu;

/** Return the text with its control characters written out, so that a reader sees them and they have no effect. */
function visible(text) {
  return String(text ?? "").replace(/\r\n?/g, "\n").replace(INVISIBLE, (c) => {
    const code = c.codePointAt(0);
    return code < 0x20 ? String.fromCharCode(0x2400 + code) : `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
}

/** Text from the data inside a line: cut at `most` characters, its direction kept apart from what surrounds it. */
function inline(text, most = 200, attributes = {}) {
  const whole = visible(text);
  const cut = whole.length > most ? `${whole.slice(0, most)}\u2026` : whole;
  return el("bdi", { ...attributes, title: cut === whole ? attributes.title : whole.slice(0, 2000) }, cut);
}

/** Text from the data, split so that every occurrence of `query` is marked. */
function marked(text, query) {
  if (!query) return [text];
  const nodes = [];
  const lower = text.toLowerCase();
  let done = 0;
  // Lower-casing may change the length of a text ("\u0130"): then nothing is marked rather than the wrong letters.
  for (let at = lower.length === text.length ? lower.indexOf(query) : -1; at >= 0 && nodes.length < 400; ) {
    nodes.push(text.slice(done, at), el("mark", {}, text.slice(at, at + query.length)));
    done = at + query.length;
    at = lower.indexOf(query, done);
  }
  return [...nodes, text.slice(done)];
}

const SHORT = 450;

/** A block of text from the data. A long one is shortened, with a button that shows the whole in a box that scrolls. */
function block(text, { query = "", cut = 0, kind = "", title = "Response" } = {}) {
  const whole = visible(text);
  const box = el("div", { class: `text ${kind}`, dir: "auto" });
  if (!whole.trim()) return el("div", { class: `text ${kind} hollow` }, whole ? "(white space only)" : "(empty)");
  const found = query ? whole.toLowerCase().indexOf(query) : -1;
  const start = found > SHORT - 100 ? found - 200 : 0;
  const short = whole.length > SHORT + 200;
  box.append(start ? "\u2026" : "", ...marked(short ? whole.slice(start, start + SHORT) : whole, query), short ? "\u2026" : "");
  const left = cut ? el("p", { class: "fine" }, `${count(cut, "character")} more are not in this file; ril view shows them.`) : null;
  if (!short) return left ? el("div", {}, box, left) : box;
  const more = el("button", {
    type: "button", class: "quiet", "aria-expanded": "false",
    onclick: () => {
      box.replaceChildren(...marked(whole, query));
      box.classList.add("whole");
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", title);
      box.tabIndex = 0;
      box.focus();
      more.remove();
    },
  }, `Show all ${whole.length.toLocaleString("en")} characters`);
  return el("div", {}, box, more, left);
}

/** A number for people: at most `digits` decimals, a true minus sign, a dash where there is none. */
function number(value, digits = 2) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "\u2013";
  const size = Math.abs(value);
  if (size !== 0 && size < 10 ** -digits / 2) return value.toExponential(1).replaceAll("-", "\u2212");
  const most = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : digits;
  return value.toLocaleString("en", { maximumFractionDigits: Math.min(most, digits) }).replace("-", "\u2212");
}

function signed(value, digits = 2) {
  return typeof value === "number" && value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

function percent(value, digits = 1) {
  return typeof value === "number" && Number.isFinite(value) ? `${number(100 * value, digits)}\u2009%` : "\u2013";
}

function count(n, noun) {
  return `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
}

function duration(seconds) {
  if (seconds < 60) return `${number(seconds, 1)} s`;
  if (seconds < 3600) return `${number(seconds / 60, 1)} min`;
  return `${number(seconds / 3600, 1)} h`;
}

// A source is told apart by letter, shape and color together, so that any one of them is enough.
const SHAPES = [
  "M12 2a10 10 0 1 0 0 20a10 10 0 1 0 0-20z", // circle: the student
  "M4 3h16a1 1 0 0 1 1 1v16a1 1 0 0 1-1 1H4a1 1 0 0 1-1-1V4a1 1 0 0 1 1-1z",
  "M12 1.2L22.8 12L12 22.8L1.2 12z",
  "M12 1.5L21.5 6.8V17.2L12 22.5L2.5 17.2V6.8z",
  "M12 1.5L22.6 9.3L18.5 22H5.5L1.4 9.3z",
  "M7.5 1.5h9L22.5 7.5v9l-6 6h-9l-6-6v-9z",
];
const sources = new Map();

/** Give every source of the runs its letter, shape and color: the student first, then in order of appearance. */
function nameSources(runs) {
  sources.clear();
  const names = [...new Set(["student", ...runs.flatMap((run) => run.sources ?? [])])];
  names.forEach((name, i) => sources.set(name, { index: i, letter: i === 0 ? "S" : String.fromCharCode(64 + i) }));
}

function sourceLook(name) {
  if (!sources.has(name)) sources.set(name, { index: sources.size, letter: String.fromCharCode(64 + Math.min(sources.size, 26)) });
  const { index, letter } = sources.get(name);
  return { letter, index, shape: SHAPES[index === 0 ? 0 : 1 + ((index - 1) % (SHAPES.length - 1))], color: `var(--source-${index % 6})` };
}

/** The mark of a source as SVG, without its name. */
function sourceMark(name, size = 20) {
  const look = sourceLook(name);
  const mark = el("svg", { viewBox: "0 0 24 24", width: size, height: size, class: "mark", "aria-hidden": "true" });
  mark.append(el("path", { d: look.shape, vars: { fill: look.color } }));
  mark.append(el("text", { x: 12, y: 16.6, "text-anchor": "middle" }, look.letter));
  return mark;
}

function sourceName(name) {
  return el("span", { class: "source" }, sourceMark(name), inline(name, 40));
}

/** A table with its header cells; `rows` hold cells (text or nodes), and columns named in `numeric` are set right. */
function table(caption, header, rows, numeric = []) {
  const side = (i) => (numeric.includes(i) ? "num" : null);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", { class: "grid" },
      el("caption", { class: "unseen" }, caption),
      el("thead", {}, el("tr", {}, header.map((h, i) => el("th", { scope: "col", class: side(i) }, h)))),
      el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((c, i) => el(i ? "td" : "th", { scope: i ? null : "row", class: side(i) }, c)))))));
}

function heading(title, note, kind = "") {
  return el("div", { class: `panel-head ${kind}` }, el("h2", {}, title), note ? el("p", { class: "note" }, note) : null);
}

function panel(title, note, ...children) {
  return el("section", { class: "panel" }, heading(title, note), children);
}

function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

function tag(text, kind = "", title = null) {
  return el("span", { class: `tag ${kind}`, title }, text);
}

/** A small label in front of a value. */
function key(text) {
  return el("span", { class: "key" }, text);
}

function code(text, most = 160, kind = null) {
  return el("code", { class: kind }, inline(text, most));
}

/** A field for a step, which reports null when it is empty. */
function stepField(label, id, value, placeholder, onchange) {
  const changed = (event) => onchange(event.target.value === "" ? null : Math.max(0, Math.round(Number(event.target.value))));
  return el("label", { class: "field small" }, el("span", {}, label),
    el("input", { id, type: "number", min: 0, value: value ?? "", placeholder, onchange: changed }));
}

/** Numbers with their names, in a row. */
function facts(pairs) {
  return el("dl", { class: "facts" }, pairs.filter(Boolean).map(([name, value, id]) => el("div", {}, el("dt", {}, name), el("dd", { id }, value))));
}

/** What a tab says of a run without its data: a server may still be reading it. */
function nothing(run, text) {
  return empty(run.pending ? "The run is still being read. This tab fills by itself." : text);
}

function empty(text) {
  return el("p", { class: "empty" }, text);
}

/** A select with a visible label. `options` are pairs of value and text. */
function choice(label, options, value, onchange) {
  return el("label", { class: "field" }, el("span", {}, label),
    el("select", { onchange: (event) => onchange(event.target.value) },
      options.map(([v, text]) => el("option", { value: v, selected: v === value }, visible(text).slice(0, 60)))));
}

/** Say something to screen readers, and to everybody for a moment. */
function announce(text) {
  const live = document.getElementById("live");
  live.textContent = text;
  clearTimeout(announce.timer);
  announce.timer = setTimeout(() => { live.textContent = ""; }, 4000);
}

/** Offer text as a file. */
function save(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
