// The tab "Groups": filters, search, order, and the cards.

const PAGE = 20;
const NO_FILTERS = { run: "", skill: "", source: "", flags: [], q: "", question: "", step_min: null, step_max: null, side: null, shown: null };
let listing = { node: null, ask: 0 };

/** Keep what was typed from asking for groups at every letter. */
function later(call, milliseconds = 200) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}

const typed = later((q) => navigate({ q, shown: null, group: "" }, { replace: true }));

function filterPanel(report, view) {
  const { runs } = report;
  const set = (change) => navigate({ ...change, shown: null, group: "" });
  const names = (name) => [...new Set(runs.flatMap((run) => run[name] ?? []))];
  const select = (id, label, every, options, set) => choiceWithId(`f-${id}`, label, [["", every], ...options], view[id], set);
  const same = (name) => [name, name];
  const step = (label, name) => stepField(label, `f-${name}`, view[name], null, (value) => set({ [name]: value }));
  const flag = ([name, [text, title]]) => {
    const on = view.flags.includes(name);
    const flags = on ? view.flags.filter((f) => f !== name) : [...view.flags, name];
    return button(text, () => set({ flags }), { id: `f-${name}`, class: "chip", title, "aria-pressed": String(on) });
  };
  const active = Object.keys(NO_FILTERS).some((name) => name !== "shown" && String(view[name] ?? "") !== "");
  const wide = matchMedia("(min-width: 900px)").matches;
  return el("details", { class: "filters", open: wide || filterPanel.open, ontoggle: (event) => { filterPanel.open = event.target.open; } },
    el("summary", {}, "Filters and order"),
    el("div", { class: "filter-body" },
      el("label", { class: "field" }, el("span", {}, "Search ", el("kbd", {}, "/")),
        el("input", {
          id: "search", type: "search", value: view.q, placeholder: "Question or response", autocomplete: "off", spellcheck: "false",
          oninput: (event) => typed(event.target.value),
        })),
      choiceWithId("f-sort", "Order", Object.entries(SORTS), view.sort || "step", (sort) => set({ sort: sort === "step" ? "" : sort })),
      runs.length > 1 ? select("run", "Run", "All runs", runs.map((run, i) => [String(i), run.name]), (run) => set({ run })) : null,
      el("div", { class: "pair" }, step("From step", "step_min"), step("To step", "step_max")),
      names("skills").length ? select("skill", "Skill or benchmark", "All", names("skills").map(same), (skill) => set({ skill })) : null,
      select("source", "Source", "All", names("sources").map(same), (source) => set({ source })),
      el("fieldset", { class: "flags" }, el("legend", {}, "Only groups with"), Object.entries(FLAGS).map(flag)),
      view.question ? el("p", { class: "pinned" }, "Question ", inline(view.question, 40), " ",
        button("All questions", () => set({ question: "", side: null }), { class: "quiet" })) : null,
      active ? button("Reset filters", () => navigate({ ...NO_FILTERS, group: "" }), { id: "f-reset" }) : null));
}

function choiceWithId(id, ...rest) {
  const field = choice(...rest);
  field.querySelector("select").id = id;
  return field;
}

function groupsTab(report, view, store) {
  const list = listing.node ?? el("div", { class: "list" });
  listing.node = list;
  list.setAttribute("aria-busy", "true");
  fillList(report, view, store, list);
  return [el("div", { class: "browse" }, filterPanel(report, view), list)];
}

async function fillList(report, view, store, list) {
  const ask = ++listing.ask;
  const query = groupQuery(view);
  const wanted = Math.max(PAGE, view.shown ?? 0);
  const groups = [];
  let total = 0;
  try {
    while (groups.length < wanted) {
      const page = await store.groups(query, groups.length, Math.min(LIMIT, wanted - groups.length));
      if (ask !== listing.ask) return;
      total = page.total;
      groups.push(...page.groups);
      if (!page.groups.length || groups.length >= total) break;
    }
    const linked = view.group && !groups.some((group) => group.id === view.group) ? await groupsById(store, [view.group]) : [];
    if (ask !== listing.ask) return;
    showList(report, view, store, list, { groups, total, linked });
  } catch (problem) {
    if (ask === listing.ask) list.replaceChildren(empty(visible(problem.message)));
  } finally {
    list.removeAttribute("aria-busy");
  }
}

function showList(report, view, store, list, { groups, total, linked }) {
  const all = report.total ?? 0;
  const held = store.embedded ? report.shown : all;
  const line = el("p", { class: "found", role: "status" }, el("b", {}, total.toLocaleString("en")), total === 1 ? " group" : " groups",
    groups.length < total ? `, ${groups.length} of them shown` : "",
    held < all ? el("span", { class: "note" }, ` This file holds ${held.toLocaleString("en")} of the ${all.toLocaleString("en")} groups: `,
      el("code", {}, "ril report --all"), " or ", el("code", {}, "ril view"), " shows them all.") : null);
  const card = (group) => groupCard(report, store, group, view);
  const column = (run, at) => {
    const own = groups.filter((group) => group.run === at);
    return el("section", { "aria-label": `Run ${at + 1}` }, el("h2", {}, runName(report.runs, at)),
      own.length ? own.map(card) : empty("This question is not among the groups of this run."));
  };
  const side = view.side && view.question && report.runs.length > 1;
  const parts = [line];
  if (linked.length) {
    parts.push(el("section", { class: "linked", "aria-label": "Group of the link" },
      el("p", { class: "note" }, "The group of the link, which is not in the list below:"), linked.map(card)));
  }
  if (!groups.length && !linked.length) parts.push(empty(all || total ? "No group meets these conditions." : "There are no groups yet."));
  if (side) parts.push(el("div", { class: "sides", vars: { "--columns": String(report.runs.length) } }, report.runs.map(column)));
  else parts.push(...groups.map(card));
  if (groups.length < total) {
    const more = () => navigate({ shown: groups.length + PAGE }, { replace: true });
    parts.push(button(`Show ${Math.min(PAGE, total - groups.length)} more`, more, { class: "more" }));
  }
  list.replaceChildren(...parts);
  if (view.group) selectCard(view.group, { scroll: listing.arrived !== view.group });
}

/** Make a card the current one. */
function selectCard(id, { scroll = true, focus = false } = {}) {
  document.querySelectorAll(".card.current").forEach((card) => card.classList.remove("current"));
  const card = [...document.querySelectorAll(".card")].find((c) => c.dataset.group === id);
  if (!card) return;
  card.classList.add("current");
  listing.arrived = id;
  if (scroll) card.scrollIntoView({ block: "start" });
  if (focus) card.focus({ preventScroll: true });
}

/** Move to the next or the previous card; past the last one, ask for more. */
function moveCard(by) {
  const cards = [...document.querySelectorAll(".card")];
  if (!cards.length) return;
  const at = cards.findIndex((card) => card.classList.contains("current"));
  const next = at < 0 ? 0 : at + by;
  if (next >= cards.length) {
    document.querySelector(".more")?.click();
    return;
  }
  const id = cards[Math.max(0, next)].dataset.group;
  navigate({ group: id }, { quiet: true });
  selectCard(id, { focus: true });
}
