// The page itself: tabs, address, keyboard, theme.

const TABS = [
  ["overview", "Overview", overviewTab],
  ["groups", "Groups", groupsTab],
  ["discriminator", "Discriminator", discriminatorTab],
  ["audit", "Judge audit", auditTab],
  ["teachers", "Teachers", teachersTab],
];

const KEYS_HELP = [
  ["1 \u2013 5", "Go to a tab"],
  ["j / k", "Next or previous group, or verdict"],
  ["/", "Search in the groups"],
  ["y / n / u", "In the audit: the verdict is right, is wrong, clear"],
  ["\u2190 / \u2192", "On a curve: the values of the step; in a picture: the next one"],
  ["Esc", "Close a picture or this help"],
  ["?", "This help"],
];

const state = { report: null, store: null, view: parseView("") };

function tabOf(view) {
  return TABS.find(([name]) => name === view.tab) ?? TABS[0];
}

/**
 * Change the view and the address. replace: leave no entry in the browser's history. quiet: draw nothing, since the
 * caller has changed the page.
 */
function navigate(change, { replace = false, quiet = false } = {}) {
  const before = state.view;
  state.view = { ...before, ...change };
  const hash = formatView(state.view);
  if (hash !== formatView(before)) history[replace || quiet ? "replaceState" : "pushState"](null, "", hash);
  if (!quiet) render();
}

/** Draw the tab of the view, and keep focus, cursor and place where they were. */
function render() {
  const { report, store, view } = state;
  const [tab, , build] = tabOf(view);
  const main = document.getElementById("main");
  const focused = document.activeElement?.id;
  const cursor = document.activeElement?.selectionStart;
  for (const link of document.querySelectorAll("#tabs a")) {
    link.removeAttribute("aria-current");
    if (link.dataset.tab === tab) link.setAttribute("aria-current", "page");
  }
  const parts = build(report, view, store).flat(Infinity).filter(Boolean);
  main.replaceChildren(el("h1", { class: "unseen" }, tabOf(view)[1]), ...parts);
  main.dataset.tab = tab;
  document.querySelector("#tabs [aria-current]").scrollIntoView({ block: "nearest", inline: "nearest" });
  if (focused && focused !== "main") {
    const again = document.getElementById(focused);
    again?.focus({ preventScroll: true });
    if (typeof cursor === "number" && again?.setSelectionRange && again.type === "search") again.setSelectionRange(cursor, cursor);
  }
}

function openTab(name) {
  const kept = name === "groups" && state.view.tab === "groups";
  if (kept) return;
  navigate({ tab: name === "overview" ? "" : name });
  window.scrollTo(0, 0);
}

function drawFrame() {
  const { report } = state;
  document.getElementById("runs").replaceChildren(...report.runs.map((run, i) =>
    el("span", {}, runName(report.runs, i), el("small", {}, count(run.steps, "step")))));
  const click = (event) => {
    if (event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    openTab(event.target.dataset.tab);
  };
  document.getElementById("tabs").replaceChildren(...TABS.map(([name, text]) => el("a", { href: `#tab=${name}`, "data-tab": name, onclick: click }, text)));
  const about = [report.openril && `OpenRIL ${report.openril}`, report.made && `made ${report.made}`, report.schema].filter(Boolean);
  document.getElementById("foot").replaceChildren(inline(about.join(", "), 120), ". This page loads nothing from other servers.");
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

function switchTheme() {
  const chosen = document.documentElement.dataset.theme;
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(dark ? "light" : "dark");
  try {
    localStorage.setItem("openril.theme", dark ? "light" : "dark");
  } catch { /* a file that is opened from disk may have no storage */ }
}

function openHelp() {
  const help = document.getElementById("help");
  help.replaceChildren(
    el("h2", { id: "help-title" }, "Keyboard"),
    el("dl", {}, KEYS_HELP.map(([keys, text]) => el("div", {}, el("dt", {}, el("kbd", {}, keys)), el("dd", {}, text)))),
    button("Close", () => help.close(), { autofocus: true }));
  if (!help.open) help.showModal();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const tab = tabOf(state.view)[0];
  const actions = { "?": openHelp, "/": searchGroups };
  TABS.forEach(([name], i) => { actions[i + 1] = () => openTab(name); });
  if (tab === "groups") Object.assign(actions, { j: () => moveCard(1), k: () => moveCard(-1) });
  if (tab === "audit") {
    Object.assign(actions, { y: () => tickItem("right"), n: () => tickItem("wrong"), u: () => tickItem("clear") });
    Object.assign(actions, { j: () => document.getElementById("audit-next")?.click(), k: () => document.getElementById("audit-back")?.click() });
  }
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

function searchGroups() {
  openTab("groups");
  const filters = document.querySelector(".filters");
  if (filters) filters.open = true;
  document.getElementById("search")?.focus();
}

/** Fetch the report, and fill in what is not there while a server still reads the run. */
async function loadReport() {
  const report = await state.store.report();
  for (const run of report.runs) for (const [key, value] of [["metrics", {}], ["steps", 0], ["name", ""]]) run[key] ??= value;
  state.report = report;
  nameSources(report.runs);
  drawFrame();
}

/** Follow a run that is read or trained. What is being read is replaced only when the reader asks for it. */
async function onVersion(version, before) {
  const moved = before !== null && (version.steps !== before.steps || version.report !== before.report);
  const pending = state.report.runs.some((run) => run.pending);
  if (moved) await loadReport();
  const problems = Object.entries(version.problems ?? {});
  const current = tabOf(state.view)[0];
  const reading = current === "groups" || (current === "audit" && !pending); // with nothing to read, draw at once
  const fresh = moved && version.steps !== before.steps;
  onVersion.waiting = (onVersion.waiting || fresh) && reading;
  const notice = document.getElementById("notice");
  const show = (event) => {
    onVersion.waiting = false;
    event.target.closest("p").remove();
    notice.hidden = !notice.childNodes.length;
    render();
  };
  notice.replaceChildren(...[
    version.indexing ? el("p", {}, `Reading the run: ${number(version.steps)} of ${number(version.total_steps)} steps.`) : null,
    onVersion.waiting ? el("p", {}, "There are new steps. ", button("Show them", show)) : null,
    ...problems.slice(0, 10).map(([path, text]) => el("p", {}, inline(path, 120), ": ", inline(text, 300))),
  ].filter(Boolean));
  notice.hidden = !notice.childNodes.length;
  if (moved && !reading) render();
}

async function start() {
  try {
    setTheme(localStorage.getItem("openril.theme"));
  } catch { /* as above */ }
  const embedded = document.getElementById("document");
  const main = document.getElementById("main");
  try {
    state.store = embedded ? new EmbeddedStore(embedded.textContent) : new ServedStore();
    await loadReport();
  } catch (problem) {
    main.replaceChildren(empty(`The report cannot be read: ${visible(problem.message)}`));
    return;
  }
  state.view = parseView(location.hash);
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
  document.getElementById("download").addEventListener("click", () => state.store.download());
  document.getElementById("theme").addEventListener("click", switchTheme);
  document.getElementById("help-open").addEventListener("click", openHelp);
  document.addEventListener("keydown", onKey);
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  }
  const moved = () => { state.view = parseView(location.hash); render(); };
  addEventListener("hashchange", moved);
  render();
  state.store.watch(onVersion);
}

start();
