// The tab "Discriminator": is it calibrated, does it only count tokens, and what is it most sure of and wrong about.

function runOf(report, view) {
  return Math.min(report.runs.length - 1, view.run === "" ? 0 : Number(view.run));
}

/** Buttons that choose one run, where there are several. */
function runChoice(report, view) {
  if (report.runs.length < 2) return null;
  const now = runOf(report, view);
  return el("div", { class: "controls", role: "group", "aria-label": "Run" }, report.runs.map((run, i) =>
    button(inline(run.name, 40), () => navigate({ run: String(i), item: null }), { id: `run-${i}`, class: "chip", "aria-pressed": String(i === now) })));
}

function sourceLegend(names) {
  return el("p", { class: "legend" }, [...names].sort((a, b) => sourceLook(a).index - sourceLook(b).index).map(sourceName));
}

function discriminatorTab(report, view, store) {
  const run = report.runs[runOf(report, view)];
  const d = run.discriminator;
  if (!d) return [runChoice(report, view), nothing(run, "This run has no discriminator.")];
  const bins = (d.calibration ?? []).filter((bin) => bin.n > 0);
  const most = largest(bins.map((bin) => bin.n));
  const calibration = dotChart(
    bins.map((bin) => ({
      x: bin.predicted, y: bin.student_share, size: 2.5 + 5 * Math.sqrt(bin.n / most),
      title: `${number(bin.low)} to ${number(bin.high)}: predicted ${number(bin.predicted, 3)}, truly ${number(bin.student_share, 3)} of ${number(bin.n)}`,
    })),
    { title: "Calibration", xName: "predicted P(student)", yName: "share that the student wrote", xMost: 1, diagonal: true });
  const unit = d.length_unit === "characters" ? "characters" : "tokens";
  const dots = (d.length ?? []).filter((dot) => typeof dot[unit] === "number" && typeof dot.student_prob === "number");
  const lengths = dots.length ? dotChart(
    dots.map((dot) => ({
      x: dot[unit], y: dot.student_prob, source: dot.source,
      title: `${visible(dot.source).slice(0, 40)}: ${number(dot[unit])} ${unit}, P(student) ${number(dot.student_prob, 3)}`,
    })),
    { title: "Score against length", xName: unit, yName: "P(student)" }) : null;
  const time = d.over_time ?? {};
  const line = (name, label, color, dash) => ({ label, color, dash, steps: time.step ?? [], values: time[name] });
  const hover = new HoverGroup();
  const options = { wide: true, share: true, level: 0.5, ...curveOptions(view, hover) };
  const bySource = Object.keys(time).filter((name) => name.startsWith("accuracy_")).slice(0, 12).map((name) => {
    const source = name.slice("accuracy_".length);
    const look = sourceLook(source);
    return line(name, `${look.letter} ${source}`, look.color, DASHES[look.index % DASHES.length]);
  });
  const whole = [line("balanced_accuracy", "discriminator", "var(--run-0)"), line("length_only_accuracy", "length alone", "var(--run-5)", "5 3")];
  const charts = [
    lineChart(whole, { ...options, title: "Balanced accuracy" }),
    lineChart(bySource, { ...options, title: "Accuracy by source" }),
  ].filter(Boolean);
  const wrong = el("div", { class: "list" }, empty("Loading\u2026"));
  showWrong(report, view, store, d.confident_and_wrong ?? [], wrong);
  return [
    runChoice(report, view),
    charts.length ? panel("Over time",
      "A discriminator that is no better than length alone has learned the length of the responses. Dotted: chance.",
      el("div", { class: "plots two" }, charts)) : null,
    panel("What its scores mean",
      "Calibration: on the dotted line a score is the true share; the size of a point is its number of responses. Score against length: a slope is a leak of length.",
      sourceLegend([...new Set(dots.map((dot) => dot.source))].slice(0, 12)),
      el("div", { class: "plots two" }, bins.length ? calibration : null, lengths)),
    heading("Sure and wrong", "The responses about which it was most certain of the wrong side.", "above"),
    wrong,
  ];
}

async function showWrong(report, view, store, references, box) {
  try {
    const members = references.slice(0, 20).map((r) => r.split("/"));
    const groups = new Map((await groupsById(store, [...new Set(members.map(([id]) => id))])).map((g) => [g.id, g]));
    const places = (group) => members.filter(([id]) => id === group.id).map(([, at]) => Number(at));
    const cards = [...groups.values()].map((group) => memberCard(store, group, places(group))).filter(Boolean);
    box.replaceChildren(...(cards.length ? cards : [empty("None.")]));
  } catch (problem) {
    box.replaceChildren(empty(visible(problem.message)));
  }
}

/** A card with some members of a group, and a link to the whole group. */
function memberCard(store, group, places) {
  const members = places.filter((at) => group.members[at]).map((at) => [group.members[at], at]);
  if (!members.length) return null;
  return el("article", { class: "card" },
    el("header", {},
      el("h3", {}, `Step ${group.step}`), group.skill ? tag(inline(group.skill, 40)) : null, el("span", { class: "id" }, inline(group.question_id, 60)),
      el("span", { class: "actions" }, el("a", { href: formatView(parseView(`tab=groups&group=${group.id}`)) }, "Whole group"))),
    promptOf(store, group, ""),
    memberTable(group, members));
}
