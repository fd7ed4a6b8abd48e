// Charts as SVG. They are drawn in a fixed system of units and scale with their column.

const BOX = { width: 400, height: 200, left: 44, right: 10, top: 10, bottom: 24 };
const WIDE = { width: 580, height: 250, left: 44, right: 10, top: 26, bottom: 40 };

/** Round numbers that divide an interval in about `wanted` parts. */
function ticks(low, high, wanted = 4) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const values = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) values.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return values;
}

/** A linear map from an interval of values to one of units. */
function scale(low, high, from, to) {
  const map = (value) => from + ((value - low) / (high - low || 1)) * (to - from);
  map.back = (unit) => low + ((unit - from) / (to - from)) * (high - low);
  return map;
}

/** The centered mean over `width` values (an odd number), and over those that exist at both ends. */
function smoothed(values, width) {
  const half = (width - 1) / 2;
  const sums = [0];
  for (const v of values) sums.push(sums[sums.length - 1] + v);
  return values.map((_, i) => {
    const [a, b] = [Math.max(0, i - half), Math.min(values.length, i + half + 1)];
    return (sums[b] - sums[a]) / (b - a);
  });
}

/** The finite points of a metric within a range of steps, as two lists. */
function points(steps, values, from, to) {
  const kept = steps.map((s, i) => [s, values?.[i]]).filter(([s, v]) => Number.isFinite(v) && s >= from && s <= to);
  return { steps: kept.map(([s]) => s), values: kept.map(([, v]) => v) };
}

/** The frame of a chart: grid, numbers at both axes, and the names of the axes. */
function frame(box, x, y, xs, ys, { xName, yName }) {
  const { width, height, left, right, top, bottom } = box;
  const g = el("g", { class: "frame" });
  for (const v of ys) {
    g.append(el("line", { x1: left, x2: width - right, y1: y(v), y2: y(v), class: v === 0 ? "axis" : "rule" }));
    g.append(el("text", { x: left - 6, y: y(v) + 3.5, "text-anchor": "end" }, number(v, 3)));
  }
  for (const v of xs) g.append(el("text", { x: x(v), y: height - bottom + 15, "text-anchor": "middle" }, number(v, 1)));
  g.append(el("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis" }));
  if (xName === "step") g.append(el("text", { x: left - 6, y: height - bottom + 15, "text-anchor": "end" }, xName));
  else if (xName) g.append(el("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, xName));
  if (yName) g.append(el("text", { x: left, y: top - 11 }, yName));
  return g;
}

/** Keep charts that share a hover: pointing at one shows the values of the step in all. */
class HoverGroup {
  constructor() {
    this.charts = [];
  }

  show(step) {
    for (const chart of this.charts) chart(step);
  }
}

/**
 * A chart of metrics over the steps, with the values of the step under the pointer in its legend. Dragging selects a
 * range of steps; the arrow keys move the step.
 *
 * lines: {label, color, dash, steps, values, sparse}. options: {title, share, level, from, to, smooth (percent of the
 * run), hover (a HoverGroup), onrange(from, to)}.
 */
function lineChart(lines, options) {
  const box = options.wide && innerWidth > 640 ? { ...WIDE, top: 10, bottom: 24 } : BOX;
  const { width, height, left, right, top, bottom } = box;
  const within = (line) => points(line.steps, line.values, options.from ?? -Infinity, options.to ?? Infinity);
  const drawn = lines.map((line) => ({ ...line, ...within(line) })).filter((line) => line.steps.length);
  if (!drawn.length) return null;
  for (const line of drawn) {
    const span = 2 * Math.floor((line.values.length * (options.smooth ?? 5)) / 200) + 1;
    line.smooth = line.sparse ? line.values : smoothed(line.values, span);
    line.raw = !line.sparse && span > 1;
  }
  const all = drawn.flatMap((line) => line.steps);
  let [first, last] = [options.from ?? largest(all.map((s) => -s)) * -1, options.to ?? largest(all)];
  if (first === last) [first, last] = [first - 1, last + 1];
  let [low, high] = [-largest(drawn.flatMap((l) => l.values.map((v) => -v))), largest(drawn.flatMap((l) => l.values))];
  if (options.level !== undefined) [low, high] = [Math.min(low, options.level), Math.max(high, options.level)];
  if (options.share && low >= 0 && high <= 1) [low, high] = [0, 1];
  else if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  else [low, high] = [low - 0.04 * (high - low), high + 0.04 * (high - low)];
  const x = scale(first, last, left, width - right);
  const y = scale(low, high, height - bottom, top);

  const ends = drawn.map((line) => `${visible(line.label)} from ${number(line.values[0], 3)} to ${number(line.values.at(-1), 3)}`);
  const svg = el("svg", {
    viewBox: `0 0 ${width} ${height}`, class: "chart", tabindex: 0, role: "img",
    "aria-label": `${options.title}: ${ends.join("; ")}. Steps ${first} to ${last}. Arrow keys read out the values.`,
  });
  const level = (value) => el("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "level" });
  svg.append(frame(box, x, y, ticks(first, last, 5).filter(Number.isInteger), ticks(low, high, 4), { xName: "step" }));
  if (options.level !== undefined) svg.append(level(options.level));
  for (const line of drawn) {
    const path = (values) => line.steps.map((s, i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("");
    if (line.raw) svg.append(el("path", { d: path(line.values), class: "raw", vars: { stroke: line.color } }));
    svg.append(el("path", { d: path(line.smooth), class: "line", "stroke-dasharray": line.dash, vars: { stroke: line.color } }));
    if (line.sparse || line.steps.length === 1) {
      svg.append(...line.steps.map((s, i) => el("circle", { cx: x(s), cy: y(line.smooth[i]), r: 3, vars: { fill: line.color } })));
    }
  }
  const cross = el("g", { class: "cross", hidden: true });
  const brush = el("rect", { class: "brush", y: top, height: height - top - bottom, hidden: true });
  svg.append(brush, cross);

  const legend = drawn.map((line) => {
    const value = el("b", {}, "");
    const stroke = { x1: 0, x2: 18, y1: 4, y2: 4, "stroke-dasharray": line.dash, vars: { stroke: line.color, "stroke-width": "2.5" } };
    const sample = el("svg", { viewBox: "0 0 18 8", width: 18, height: 8, "aria-hidden": "true" }, el("line", stroke));
    return { value, node: el("span", {}, sample, inline(line.label, 34), value) };
  });
  const at = el("span", { class: "at" });
  const show = (step) => {
    cross.replaceChildren();
    at.textContent = step === null ? "" : `step ${step}`;
    if (step !== null) cross.append(el("line", { x1: x(step), x2: x(step), y1: top, y2: height - bottom }));
    drawn.forEach((line, k) => {
      let i = -1;
      if (step !== null) i = line.sparse ? line.steps.findLastIndex((s) => s <= step) : line.steps.indexOf(step);
      legend[k].value.textContent = step === null ? number(line.smooth.at(-1), 3) : i < 0 ? "\u2013" : number(line.values[i], 3);
      if (i >= 0) cross.append(el("circle", { cx: x(line.steps[i]), cy: y(line.smooth[i]), r: 3.5, vars: { fill: line.color } }));
    });
    cross.toggleAttribute("hidden", step === null);
  };
  show(null);
  options.hover?.charts.push(show);
  interact(svg, x, brush, {
    width, first, last, steps: [...new Set(all)].sort((a, b) => a - b),
    show: (step) => (options.hover ? options.hover.show(step) : show(step)),
    say: (step) => announce(`step ${step}: ${drawn.map((line, k) => `${visible(line.label)} ${legend[k].value.textContent}`).join(", ")}`),
    onrange: options.onrange,
  });
  return el("figure", { class: "plot" },
    el("figcaption", {}, el("h3", {}, options.title), at), el("div", { class: "legend" }, legend.map((l) => l.node)), svg);
}

/** Pointer and keyboard of a line chart. */
function interact(svg, x, brush, { width, first, last, steps, show, say, onrange }) {
  let start = null;
  let now = steps[0];
  const under = (event) => {
    const place = svg.getBoundingClientRect();
    const step = x.back(((event.clientX - place.left) / place.width) * width);
    return steps.reduce((best, s) => (Math.abs(s - step) < Math.abs(best - step) ? s : best), steps[0]);
  };
  svg.addEventListener("pointermove", (event) => {
    now = under(event);
    show(now);
    if (start === null || start === now) return;
    const [a, b] = [Math.min(start, now), Math.max(start, now)];
    brush.setAttribute("x", x(a));
    brush.setAttribute("width", x(b) - x(a));
    brush.removeAttribute("hidden");
  });
  svg.addEventListener("pointerleave", () => {
    show(null);
    start = null;
    brush.setAttribute("hidden", "");
  });
  svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") start = under(event); });
  svg.addEventListener("pointerup", () => {
    if (start !== null && start !== now && onrange) onrange(Math.min(start, now), Math.max(start, now));
    start = null;
  });
  svg.addEventListener("dblclick", () => onrange?.(null, null));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length }[event.key];
    if (!move) return;
    event.preventDefault();
    now = steps[Math.min(steps.length - 1, Math.max(0, steps.indexOf(now) + move))];
    if (now >= first && now <= last) show(now);
    say(now);
  });
}

/** A chart of points. dots: {x, y, source, size, title}. */
function dotChart(dots, { title, xName, yName, xMost, diagonal = false }) {
  const box = innerWidth > 640 ? WIDE : { ...WIDE, width: BOX.width };
  const { width, height, left, right, top, bottom } = box;
  const x = scale(0, xMost ?? (largest(dots.map((d) => d.x)) || 1), left, width - right);
  const y = scale(0, 1, height - bottom, top);
  const label = `${title}: ${count(dots.length, "point")}, ${xName} across, ${yName} up.`;
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
  svg.append(frame(box, x, y, ticks(0, x.back(width - right), 5), ticks(0, 1, 4), { xName, yName }));
  if (diagonal) svg.append(el("line", { x1: x(0), y1: y(0), x2: x(1), y2: y(1), class: "level" }));
  if (diagonal && dots.length) {
    const d = dots.map((dot, i) => `${i ? "L" : "M"}${x(dot.x)} ${y(dot.y)}`).join("");
    svg.append(el("path", { class: "line", d, vars: { stroke: "var(--source-0)" } }));
  }
  for (const dot of dots) {
    const look = sourceLook(dot.source ?? "student");
    const [cx, cy, r] = [x(dot.x), y(dot.y), dot.size ?? 3];
    const shape = dot.source === undefined || look.index === 0
      ? el("circle", { cx, cy, r })
      : el("path", { d: look.shape, transform: `translate(${cx - r} ${cy - r}) scale(${r / 12})` });
    shape.style.setProperty("fill", look.color);
    shape.classList.add("dot");
    shape.append(el("title", {}, dot.title));
    svg.append(shape);
  }
  return el("figure", { class: "plot" }, el("figcaption", {}, el("h3", {}, title)), svg);
}

/** A small bar that shows a share, with its number. */
function shareBar(value, label = percent(value, 0)) {
  if (typeof value !== "number") return el("span", { class: "hollow" }, "\u2013");
  const width = `${100 * Math.min(1, Math.max(0, value))}%`;
  return el("span", { class: "share" }, el("span", { class: "track", "aria-hidden": "true" }, el("span", { vars: { width } })), el("span", {}, label));
}
