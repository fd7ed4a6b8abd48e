// The tab "Overview": what ran, curves, evaluations, recipe and warnings.

const CURVES = [
  ["Similarity reward", [["reward/student_similarity", "student"]], { share: true }],
  ["Answer reward", [["reward/student_answer", "student"]], { share: true }],
  ["Evaluation score", [["eval/score", "validation", true]], {}],
];

const HEALTH = [
  [
    "Discriminator accuracy",
    [["discriminator/accuracy", "discriminator"], ["discriminator/length_only_accuracy", "length alone"]],
    { share: true, level: 0.5 },
  ],
  ["Discriminator entropy (nats)", [["discriminator/entropy", "entropy"]], {}],
  ["Discriminator margin", [["discriminator/margin", "margin"]], { level: 0 }],
  ["KL to the SFT student (nats per token)", [["train/kl", "k3"]], {}],
  ["Completion length (tokens)", [["train/completions/mean_length", "student"]], {}],
  ["Share of samples cut at the limit", [["train/completions/clipped_ratio", "student"]], {}],
];

const DASHES = [null, "5 3", "2 3", "8 3 2 3"];
const lineColor = (i) => `var(--run-${i % 6})`;

/** Lines of some metrics of all runs. With one run a metric has its color; with several a run has it. */
function metricLines(runs, metrics) {
  return runs.flatMap((run, r) =>
    metrics.map(([name, label, sparse], m) => ({
      label: runs.length > 1 ? (metrics.length > 1 ? `${run.name}: ${label}` : run.name) : label,
      color: lineColor(runs.length > 1 ? r : m),
      dash: DASHES[(runs.length > 1 ? m : 0) % DASHES.length],
      steps: run.metrics.step ?? [],
      values: Object.hasOwn(run.metrics, name) ? run.metrics[name] : null,
      sparse,
    })));
}

function whatRan(run) {
  const seconds = Object.entries(run.seconds ?? {}).filter(([name, s]) => name !== "step" && s > 0).sort((a, b) => b[1] - a[1]);
  const total = seconds.reduce((sum, [, s]) => sum + s, 0);
  const background = (i) => ({ background: lineColor(i) });
  const share = ([name, s], i) => el("span", {},
    el("i", { class: "swatch", vars: background(i) }), inline(name, 30), el("b", {}, `${number((100 * s) / total, 0)}\u2009%`));
  const made = [...(run.device ? [run.device] : []), ...Object.entries(run.versions ?? {}).map(([name, version]) => `${name} ${version}`)];
  return el("article", { class: "panel run" },
    el("div", { class: "panel-head" }, el("h2", {}, inline(run.name, 60)), el("p", { class: "note path" }, inline(run.path, 200))),
    facts([["Steps", number(run.steps)], ["Groups", number(run.groups)], ["Responses", number(run.responses)], ["Time", total ? duration(total) : "\u2013"]]),
    total ? el("div", { class: "times" },
      el("div", { class: "stack", "aria-hidden": "true" }, seconds.map(([, s], i) => el("span", { vars: { "flex-grow": String(s), ...background(i) } }))),
      el("p", { class: "legend" }, seconds.map(share))) : null,
    el("p", { class: "fine" }, made.map((text, i) => [i ? ", " : "", inline(text, 60)])));
}

/** What all curves of a tab share: the range of steps, the smoothing, and the step under the pointer. */
function curveOptions(view, hover) {
  return { from: view.from, to: view.to, smooth: view.smooth ?? 5, hover, onrange: (from, to) => navigate({ from, to }) };
}

function curves(runs, view, hover, title, note, panels) {
  const charts = panels.map(([name, metrics, options]) =>
    lineChart(metricLines(runs, metrics), { ...options, ...curveOptions(view, hover), title: name })).filter(Boolean);
  const missing = panels.length - charts.length;
  if (!charts.length) return null;
  return panel(title, note, el("div", { class: "plots" }, charts),
    missing ? el("p", { class: "fine" }, `${count(missing, "curve")} without values ${missing === 1 ? "is" : "are"} left out.`) : null);
}

function curveControls(runs, view) {
  const last = largest(runs.flatMap((run) => run.metrics.step ?? []).concat(0));
  const shown = el("span", {}, `${view.smooth ?? 5}\u2009%`);
  const smooth = el("input", {
    id: "smooth", type: "range", "aria-label": "Smoothing, percent of the run", min: 0, max: 30, value: view.smooth ?? 5,
    oninput: (event) => { shown.textContent = `${event.target.value}\u2009%`; },
    onchange: (event) => navigate({ smooth: Number(event.target.value) }),
  });
  return el("div", { class: "controls" },
    stepField("From step", "from", view.from, "1", (from) => navigate({ from })),
    stepField("To step", "to", view.to, String(last), (to) => navigate({ to })),
    el("label", { class: "field" }, el("span", {}, "Smoothing ", shown), smooth),
    view.from !== null || view.to !== null ? button("All steps", () => navigate({ from: null, to: null })) : null,
    el("p", { class: "note grow" }, "Drag over a curve to select steps, double-click for all."));
}

function anyMetric(runs, view, hover) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => name !== "step").sort();
  if (!names.length) return null;
  const chosen = names.includes(view.metric) ? view.metric : "";
  const options = { ...curveOptions(view, hover), wide: true, title: visible(chosen).slice(0, 80) };
  const chart = chosen ? lineChart(metricLines(runs, [[chosen, chosen]]), options) : null;
  const all = [["", "Choose one of the run's metrics"], ...names.map((name) => [name, name])];
  return panel("Any metric", null,
    el("div", { class: "controls" }, choice("Metric", all, chosen, (metric) => navigate({ metric }))),
    chart ? el("div", { class: "plots one" }, chart) : chosen ? empty("This metric has no values in the selected steps.") : null);
}

/** An interval as a bar around zero, next to its numbers. */
function difference(paired, reach) {
  if (!paired) return "\u2013";
  const x = (v) => `${50 + (50 * Math.max(-reach, Math.min(reach, v))) / reach}%`;
  const width = (50 * (Math.min(reach, paired.high) - Math.max(-reach, paired.low))) / reach;
  const sure = paired.low > 0 ? "up" : paired.high < 0 ? "down" : "open";
  return el("span", { class: `interval ${sure}` },
    el("span", { class: "track", "aria-hidden": "true" },
      el("i", { vars: { left: x(paired.low), width: `${Math.max(1, width)}%` } }), el("b", { vars: { left: x(paired.difference) } })),
    el("span", {}, `${signed(100 * paired.difference, 1)} `, el("small", {}, `[${number(100 * paired.low, 1)}, ${number(100 * paired.high, 1)}]`)));
}

function reachOf(all) {
  return largest([0.01, ...all.filter(Boolean).flatMap((p) => [Math.abs(p.low), Math.abs(p.high)])]);
}

function evaluations(runs) {
  const all = runs.flatMap((run) => (run.evaluations ?? []).map((e) => ({ run, e })));
  if (!all.length) return null;
  const reach = reachOf(all.map(({ e }) => e.paired));
  const parts = [...new Set(all.flatMap(({ e }) => Object.keys(e.groups ?? {})))];
  const score = (e) => el("span", {}, el("b", {}, percent(e.score)), " ", el("small", {}, `\u00b1 ${number(100 * e.standard_error, 1)}`));
  const several = runs.length > 1;
  return panel("Evaluations", "Score with its standard error. A difference is paired by question; its bar shows the 95\u2009% interval.",
    table("Evaluations", [...(several ? ["Run"] : []), "Evaluation", "Score", "Questions", "Unknown", "Difference, in points"],
      all.map(({ run, e }) => [...(several ? [inline(run.name, 40)] : []), inline(e.name, 60), score(e), number(e.questions), number(e.unknown),
        e.paired ? el("span", {}, difference(e.paired, reach), el("small", { class: "to" }, " to ", inline(e.paired.to, 40))) : "\u2013"]),
      several ? [3, 4] : [2, 3]),
    parts.map((part) => scoresBy(part, all, several)));
}

/** The scores of evaluations by skill, by benchmark, ... */
function scoresBy(part, all, several) {
  const names = [...new Set(all.flatMap(({ e }) => Object.keys(e.groups?.[part] ?? {})))].sort();
  const cell = (name) => ({ e }) => {
    const own = Object.hasOwn(e.groups?.[part] ?? {}, name) ? e.groups[part][name] : null;
    return own ? el("span", {}, shareBar(own.score), el("small", {}, ` of ${number(own.questions)}`)) : "\u2013";
  };
  const header = all.map(({ run, e }) => inline(several ? `${run.name}: ${e.name}` : e.name, 40));
  return el("details", {}, el("summary", {}, "By ", inline(part, 40)),
    table(`Scores by ${visible(part).slice(0, 40)}`, [inline(part, 40), ...header], names.map((name) => [inline(name, 60), ...all.map(cell(name))])));
}

function comparisonPanel({ runs, comparison }) {
  if (!comparison?.paired?.length) return null;
  const reach = reachOf(comparison.paired);
  const name = (at) => inline(runs[at]?.name, 40);
  return panel("Runs compared", "The same questions in both runs, paired; differences in points with a 95\u2009% interval.",
    table("Paired differences between runs", ["Evaluation", "Run", "minus", "Difference", "Questions"],
      comparison.paired.map((p) => [inline(p.evaluation, 60), name(p.b), name(p.a), difference(p, reach), number(p.questions)]), [4]));
}

function recipeDifferences({ runs, comparison }) {
  if (!comparison?.recipe?.length) return null;
  return panel("Recipe settings that differ between the runs", null,
    table("Recipe settings that differ between the runs", ["Setting", ...runs.map((run) => inline(run.name, 40))],
      comparison.recipe.map((row) => [code(row.key, 80), ...row.values.map((v) => code(plain(v), 120))])));
}

/** A value of a recipe as people write it. */
function plain(value) {
  return typeof value === "string" ? value || '""' : value === undefined ? "\u2013" : JSON.stringify(value);
}

function recipePanel(runs) {
  const settings = (run) => run.recipe.map((row) => [code(row.key, 80), code(plain(row.value)), code(plain(row.default), 80, "faint")]);
  const tables = runs.filter((run) => run.recipe?.length).map((run, i) =>
    el("details", { open: runs.length === 1 && run.recipe.length <= 40 },
      el("summary", {}, runs.length > 1 ? inline(run.name, 60) : "Settings", ` (${run.recipe.length})`),
      table(`Settings of run ${i + 1}`, ["Setting", "Value", "Default"], settings(run))));
  return tables.length ? panel("Recipe", "Settings that differ from their defaults.", tables) : null;
}

function warningsPanel(runs) {
  const all = runs.flatMap((run) => (run.warnings ?? []).map((warning) => ({ run, ...warning })));
  if (!all.length) return null;
  const line = ({ run, step, text }) => el("li", {},
    runs.length > 1 ? el("b", {}, inline(run.name, 40), " ") : null, typeof step === "number" ? tag(`step ${step}`) : null, " ", inline(text, 600));
  return el("section", { class: "panel warn" }, heading(count(all.length, "warning")),
    el("ul", { class: "warnings" }, all.slice(0, 100).map(line)),
    all.length > 100 ? el("p", { class: "fine" }, `${all.length - 100} more are in the JSON.`) : null);
}

function overviewTab(report, view) {
  const { runs } = report;
  const hover = new HoverGroup();
  const learning = curves(runs, view, hover, "Learning",
    "Student samples over the run, as in Fig. 5 of the paper. Pale: each step. Strong: the mean over neighboring steps.", CURVES);
  const health = curves(runs, view, hover, "Health", "Discriminator and policy. Dotted: chance, or zero.", HEALTH);
  return [
    el("div", { class: "run-grid" }, runs.map(whatRan)),
    warningsPanel(runs),
    evaluations(runs),
    comparisonPanel(report),
    learning || health ? curveControls(runs, view) : empty("There are no metrics yet."),
    learning,
    health,
    anyMetric(runs, view, hover),
    recipeDifferences(report),
    recipePanel(runs),
  ];
}
