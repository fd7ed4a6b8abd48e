// The tab "Judge audit": people tick verdicts of the judge as right or wrong, and export the ticks.

const memory = new Map(); // ticks where the browser keeps nothing

function ticksKey(run) {
  return `openril.audit/1:${run.path ?? run.name}:${run.audit.seed}`;
}

/** The ticks of a run: from the browser's storage where that is possible. */
function loadTicks(run) {
  const key = ticksKey(run);
  if (!memory.has(key)) {
    let stored = {};
    try {
      stored = JSON.parse(localStorage.getItem(key) ?? "{}");
    } catch { /* a file that is opened from disk may have no storage */ }
    memory.set(key, new Map(Object.entries(stored ?? {}).filter(([, tick]) => tick === "right" || tick === "wrong")));
  }
  return memory.get(key);
}

function storeTicks(run) {
  try {
    localStorage.setItem(ticksKey(run), JSON.stringify(Object.fromEntries(loadTicks(run))));
    storeTicks.failed = false;
  } catch {
    storeTicks.failed = true;
  }
}

/** What there is to tick: the sample, then the disagreements that are not in it. */
function auditItems(audit) {
  const rules = new Map((audit.disagreements ?? []).map((d) => [d.member, d]));
  const known = new Set(audit.sample ?? []);
  const sample = [...known].map((member) => ({ member, part: "sample", rule: rules.get(member) }));
  const others = [...rules.values()].filter((d) => !known.has(d.member));
  return [...sample, ...others.map((rule) => ({ member: rule.member, part: "disagreements", rule }))];
}

function interval(share, low, high) {
  return `${percent(share)} [${number(100 * low, 1)}, ${number(100 * high, 1)}]`;
}

function agreementText(right, n) {
  const found = wilson(right, n);
  return found ? interval(found.share, found.low, found.high) : "\u2013";
}

function auditTab(report, view, store) {
  const at = runOf(report, view);
  const run = report.runs[at];
  const audit = run.audit;
  const items = audit ? auditItems(audit) : [];
  if (!items.length) return [runChoice(report, view), nothing(run, "This run has no verdicts to check.")];
  const ticks = loadTicks(run);
  const place = Math.min(items.length - 1, view.item ?? Math.max(0, items.findIndex((item) => !ticks.has(item.member))));
  const done = (part, tick) => items.filter((i) => i.part === part && (tick ? ticks.get(i.member) === tick : ticks.has(i.member))).length;
  const [right, wrong] = [done("sample", "right"), done("sample", "wrong")];
  const size = (part) => items.filter((i) => i.part === part).length;
  const other = size("disagreements");
  const box = el("div", { class: "list" });
  showItem(store, items[place], ticks, box);
  const folded = audit.ticks;
  const go = (item) => () => navigate({ item }, { replace: true });
  const drawn = (audit.sample_total ?? 0) > size("sample")
    ? ` The page holds a sample of ${number(size("sample"))} of the run's ${number(audit.sample_total)} verdicts.` : "";
  return [
    runChoice(report, view),
    panel("Is the judge right?",
      `Say whether the judge's verdict is right, not whether the response is. The ticks stay in this browser until you export them.${drawn}`,
      facts([
        ["Sample ticked", `${right + wrong} of ${size("sample")}`],
        ["Judge right, with 95\u2009% interval", agreementText(right, right + wrong), "agreement"],
        other ? ["Against the rules, ticked", `${done("disagreements")} of ${other}`] : null,
        folded ? [`In the report: ${number(folded.right)} right, ${number(folded.wrong)} wrong`, interval(folded.agreement, folded.low, folded.high)] : null,
      ]),
      el("progress", { max: items.length, value: ticks.size, "aria-label": "Verdicts ticked" }),
      el("div", { class: "controls" },
        button("Export the ticks", () => exportTicks(run, items, ticks, store), { id: "export", disabled: !ticks.size }),
        storeTicks.failed ? el("p", { class: "note" }, "This browser keeps no ticks for this page: export them before you close it.") : null)),
    el("div", { class: "controls audit-bar" },
      button("Back", go(place - 1), { id: "audit-back", disabled: place === 0 }),
      el("p", { class: "grow" }, `Verdict ${place + 1} of ${items.length}`, items[place].part === "disagreements" ? tag("judge against rule", "flag") : null),
      button("Next", go(place + 1), { id: "audit-next", disabled: place === items.length - 1 })),
    box,
  ];
}

async function showItem(store, item, ticks, box) {
  const [id, position] = item.member.split("/");
  try {
    const [group] = await groupsById(store, [id]);
    const member = group?.members[Number(position)];
    if (!member) {
      box.replaceChildren(empty("The group of this verdict is not in this file."));
      return;
    }
    const tick = ticks.get(item.member);
    const choose = (kind, text, letter) => button([text, el("kbd", {}, letter)], () => tickItem(kind),
      { id: `tick-${kind}`, class: `tick ${kind}`, "aria-pressed": String(tick === kind), "aria-keyshortcuts": letter });
    const rule = item.rule;
    const card = memberCard(store, group, [Number(position)]);
    card.querySelector("details.why")?.setAttribute("open", "");
    card.append(el("footer", { class: "ticks" },
      el("p", {}, "The judge says ", verdictTag(member.verdict),
        rule ? [", the rule ", inline(rule.rule_name, 30), " says ", verdictTag(rule.rule)] : null, "."),
      el("div", { class: "controls" },
        choose("right", "The verdict is right", "y"), choose("wrong", "The verdict is wrong", "n"), choose("clear", "Clear", "u"))));
    if (box.isConnected || !box.childNodes.length) box.replaceChildren(card);
  } catch (problem) {
    box.replaceChildren(empty(visible(problem.message)));
  }
}

/** Tick the verdict in view, and go on to the next one. */
function tickItem(kind) {
  const { report, view } = state;
  const run = report.runs[runOf(report, view)];
  const items = run.audit ? auditItems(run.audit) : [];
  if (!items.length) return;
  const ticks = loadTicks(run);
  const place = Math.min(items.length - 1, view.item ?? Math.max(0, items.findIndex((item) => !ticks.has(item.member))));
  if (kind === "clear") ticks.delete(items[place].member);
  else ticks.set(items[place].member, kind);
  storeTicks(run);
  announce(kind === "clear" ? "Cleared." : `Ticked as ${kind}.`);
  navigate({ item: kind === "clear" ? place : Math.min(items.length - 1, place + 1) }, { replace: true });
}

/** Export the ticks as JSON lines. */
async function exportTicks(run, items, ticks, store) {
  const ticked = items.filter((item) => ticks.has(item.member));
  const groups = new Map((await groupsById(store, [...new Set(ticked.map((item) => item.member.split("/")[0]))])).map((g) => [g.id, g]));
  const rows = ticked.map(({ member, part }) => {
    const [id, position] = member.split("/");
    const group = groups.get(id);
    const told = group?.members[Number(position)];
    return {
      schema: "openril.audit/1", run: run.name, member, step: group?.step ?? null, question_id: group?.question_id ?? "", source: told?.source ?? "",
      index: told?.index ?? null, verdict: told?.verdict ?? null, tick: ticks.get(member), part, seed: run.audit.seed,
    };
  });
  save(`audit-${fileName(run.name)}.jsonl`, rows.map((row) => `${JSON.stringify(row)}\n`).join(""), "application/x-ndjson");
}

function fileName(text) {
  return String(text).replace(/[^A-Za-z0-9_-]+/g, "_").slice(0, 60) || "run";
}
