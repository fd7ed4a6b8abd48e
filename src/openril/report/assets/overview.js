// The tab "Overview": what ran, curves, evaluations, recipe and warnings.

const CURVES = [
  ["Similarity reward", [["reward/student_similarity", "student"]], { share: true }],
  ["Answer reward", [["reward/student_answer", "student"]], { share: true }],
  ["Evaluation score", [["eval/score", "validation", true]], {}],
];

const HEALTH = [
  ["Discriminator accuracy", [["discriminator/accuracy", "discriminator"], ["discriminator/length_only_accuracy", "length alone"]], { share: true, level: 0.5 }],
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
  const facts = [
    ["Steps", number(run.steps)],
    ["Groups", number(run.groups)],
    ["Responses", number(run.responses)],
    ["Time", total ? duration(total) : "\u2013"],
  ];
  const versions = Object.entries(run.versions ?? {});
  return el("article", { class: "panel run" },
    el("div", { class: "panel-head" }, el("h2", {}, inline(run.name, 60)), el("p", { class: "note path" }, inline(run.path, 200))),
    el("dl", { class: "facts" }, facts.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v)))),
    total ? el("div", { class: "times" },
      el("div", { class: "stack", "aria-hidden": "true" }, seconds.map(([, s], i) => el("span", { vars: { "flex-grow": String(s), background: lineColor(i) } }))),
      el("p", { class: "legend" }, seconds.map(([name, s], i) => el("span", {}, el("i", { class: "swatch", vars: { background: lineColor(i) } }), inline(name, 30), el("b", {}, `${number((100 * s) / total, 0)}\u2009%`))))) : null,
    el("p", { class: "fine" }, run.device ? inline(run.device, 80) : null, versions.length && run.device ? " \u00b7 " : "", versions.map(([k, v], i) => [i ? ", " : "", inline(`${k} ${v}`, 60)])));
}

/** Charts that share their step range, their smoothing and the step under the pointer. */
function curves(runs, view, hover, title, note, panels) {
  const charts = panels.map(([name, metrics, options]) =>
    lineChart(metricLines(runs, metrics), {
      ...options, title: name, from: view.from, to: view.to, smooth: view.smooth ?? 5, hover,
      onrange: (from, to) => navigate({ from, to }),
    })).filter(Boolean);
  const missing = panels.length - charts.length;
  if (!charts.length) return null;
  return panel(title, note, el("div", { class: "plots" }, charts), missing ? el("p", { class: "fine" }, `${count(missing, "curve")} without values ${missing === 1 ? "is" : "are"} left out.`) : null);
}

function curveControls(runs, view) {
  const last = largest(runs.flatMap((run) => run.metrics.step ?? []).concat(0));
  const field = (label, key, other) =>
    el("label", { class: "field small" }, el("span", {}, label),
      el("input", { type: "number", min: 0, max: last, value: view[key] ?? "", placeholder: other, onchange: (event) => navigate({ [key]: event.target.value === "" ? null : Math.max(0, Math.round(Number(event.target.value))) }) }));
  const output = el("span", {}, `${view.smooth ?? 5}\u2009%`);
  return el("div", { class: "controls" },
    field("From step", "from", "1"), field("To step", "to", String(last)),
    el("label", { class: "field" }, el("span", {}, "Smoothing ", output),
      el("input", { type: "range", "aria-label": "Smoothing, percent of the run", min: 0, max: 30, value: view.smooth ?? 5, oninput: (event) => { output.textContent = `${event.target.value}\u2009%`; }, onchange: (event) => navigate({ smooth: Number(event.target.value) }) })),
    view.from !== null || view.to !== null ? el("button", { type: "button", onclick: () => navigate({ from: null, to: null }) }, "All steps") : null,
    el("p", { class: "note grow" }, "Drag over a curve to select steps, double-click for all."));
}

function anyMetric(runs, view, hover) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => name !== "step").sort();
  if (!names.length) return null;
  const chosen = names.includes(view.metric) ? view.metric : "";
  const chart = chosen ? lineChart(metricLines(runs, [[chosen, chosen]]), { title: visible(chosen).slice(0, 80), wide: true, from: view.from, to: view.to, smooth: view.smooth ?? 5, hover, onrange: (from, to) => navigate({ from, to }) }) : null;
  return panel("Any metric", null,
    el("div", { class: "controls" }, choice("Metric", [["", "Choose one of the run's metrics"], ...names.map((n) => [n, n])], chosen, (metric) => navigate({ metric }))),
    chart ? el("div", { class: "plots one" }, chart) : chosen ? empty("This metric has no values in the selected steps.") : null);
}

/** An interval as a bar around zero, next to its numbers. */
function difference(paired, reach) {
  if (!paired) return "\u2013";
  const x = (v) => `${50 + (50 * Math.max(-reach, Math.min(reach, v))) / reach}%`;
  const width = (50 * (Math.min(reach, paired.high) - Math.max(-reach, paired.low))) / reach;
  const sure = paired.low > 0 ? "up" : paired.high < 0 ? "down" : "open";
  return el("span", { class: `interval ${sure}` },
    el("span", { class: "track", "aria-hidden": "true" }, el("i", { vars: { left: x(paired.low), width: `${Math.max(1, width)}%` } }), el("b", { vars: { left: x(paired.difference) } })),
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
  const score = (e) => [el("b", {}, percent(e.score)), " ", el("small", {}, `\u00b1 ${number(100 * e.standard_error, 1)}`)];
  const several = runs.length > 1;
  return panel("Evaluations", "Score with its standard error. A difference is paired by question; its bar shows the 95\u2009% interval.",
    table("Evaluations", [...(several ? ["Run"] : []), "Evaluation", "Score", "Questions", "Unknown", "Difference, in points"],
      all.map(({ run, e }) => [...(several ? [inline(run.name, 40)] : []), inline(e.name, 60), score(e), number(e.questions), number(e.unknown),
        e.paired ? el("span", {}, difference(e.paired, reach), el("small", { class: "to" }, " to ", inline(e.paired.to, 40))) : "\u2013"]),
      several ? [3, 4] : [2, 3]),
    parts.map((part) => {
      const names = [...new Set(all.flatMap(({ e }) => Object.keys(e.groups?.[part] ?? {})))].sort();
      return el("details", {}, el("summary", {}, "By ", inline(part, 40)),
        table(`Scores by ${visible(part).slice(0, 40)}`, [inline(part, 40), ...all.map(({ run, e }) => inline(several ? `${run.name}: ${e.name}` : e.name, 40))],
          names.map((name) => [inline(name, 60), ...all.map(({ e }) => { const g = e.groups?.[part]?.[name]; return g ? el("span", {}, shareBar(g.score), el("small", {}, ` of ${number(g.questions)}`)) : "\u2013"; })])));
    }));
}

function comparisonPanel({ runs, comparison }) {
  if (!comparison?.paired?.length) return null;
  const reach = reachOf(comparison.paired);
  return panel("Runs compared", "The same questions in both runs, paired; differences in points with a 95\u2009% interval.",
    table("Paired differences between runs", ["Evaluation", "Run", "minus", "Difference", "Questions"],
      comparison.paired.map((p) => [inline(p.evaluation, 60), inline(runs[p.b]?.name, 40), inline(runs[p.a]?.name, 40), difference(p, reach), number(p.questions)]), [4]));
}

function recipeDifferences({ runs, comparison }) {
  if (!comparison?.recipe?.length) return null;
  const code = (text, most) => el("code", {}, inline(text, most));
  return panel("Recipe settings that differ between the runs", null,
    table("Recipe settings that differ between the runs", ["Setting", ...runs.map((run) => inline(run.name, 40))],
      comparison.recipe.map((row) => [code(row.key, 80), ...row.values.map((v) => code(plain(v), 120))])));
}

/** A value of a recipe as people write it. */
function plain(value) {
  return typeof value === "string" ? value || '""' : value === undefined ? "\u2013" : JSON.stringify(value);
}

function recipePanel(runs) {
  const tables = runs.filter((run) => run.recipe?.length).map((run, i) =>
    el("details", { open: runs.length === 1 && run.recipe.length <= 40 },
      el("summary", {}, runs.length > 1 ? inline(run.name, 60) : "Settings", ` (${run.recipe.length})`),
      table(`Settings of run ${i + 1}`, ["Setting", "Value", "Default"], run.recipe.map((row) => [el("code", {}, inline(row.key, 80)), el("code", {}, inline(plain(row.value), 160)), el("code", { class: "faint" }, inline(plain(row.default), 80))]))));
  return tables.length ? panel("Recipe", "Settings that differ from their defaults.", tables) : null;
}

function warningsPanel(runs) {
  const all = runs.flatMap((run) => (run.warnings ?? []).map((w) => ({ run, w })));
  if (!all.length) return null;
  return el("section", { class: "panel warn" }, el("div", { class: "panel-head" }, el("h2", {}, count(all.length, "warning"))),
    el("ul", { class: "warnings" }, all.slice(0, 100).map(({ run, w }) =>
      el("li", {}, runs.length > 1 ? el("b", {}, inline(run.name, 40), " ") : null, typeof w.step === "number" ? el("span", { class: "tag" }, `step ${w.step}`) : null, " ", inline(w.text, 600)))),
    all.length > 100 ? el("p", { class: "fine" }, `${all.length - 100} more are in the JSON.`) : null);
}

function overviewTab(report, view) {
  const { runs } = report;
  const hover = new HoverGroup();
  const learning = curves(runs, view, hover, "Learning", "Student samples over the run, as in Fig. 5 of the paper. Pale: each step. Strong: the mean over neighboring steps.", CURVES);
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
