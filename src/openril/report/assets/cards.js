// The card of a group: its pictures, its question, and a row for every member.

/** A picture as a button that opens it in full size, or a note where there is none to show. */
function thumbnail(store, group, at) {
  const address = store.image(group.images[at], "thumb");
  if (!address) return el("span", { class: "missing" }, "Picture left out");
  const label = `Picture ${at + 1} of ${group.images.length}`;
  const name = visible(store.imageName(group.images[at])).slice(0, 200);
  const loading = address.startsWith("data:") ? null : "lazy";
  const picture = el("img", { src: address, alt: name ? `${label}: ${name}` : label, loading, decoding: "async" });
  picture.addEventListener("error", () => picture.closest("button")?.replaceWith(el("span", { class: "missing" }, "Picture cannot be read")));
  return button(picture, () => openViewer(store, group, at), { class: "thumb", title: "Show in full size" });
}

/** Show a picture of a group in full size; the arrow keys move between its pictures. */
function openViewer(store, group, at) {
  const viewer = document.getElementById("viewer");
  const show = (place) => {
    const i = (place + group.images.length) % group.images.length;
    const hash = group.images[i];
    const address = store.image(hash, "full");
    viewer.replaceChildren(
      el("div", { class: "viewer-bar" },
        inline(store.imageName(hash) || `Picture ${i + 1}`, 120), group.images.length > 1 ? `${i + 1} of ${group.images.length}` : null,
        button("\u2715", () => viewer.close(), { "aria-label": "Close", autofocus: true })),
      address ? el("img", { src: address, alt: `Picture ${i + 1} in full size` }) : empty("The picture is not in this file."),
    );
    viewer.onkeydown = (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move && group.images.length > 1) show(i + move);
    };
  };
  show(at);
  viewer.showModal();
}

/** The pictures, the question, its choices and the right answers. */
function promptOf(store, group, query) {
  const pictures = [
    ...group.images.map((_, i) => thumbnail(store, group, i)),
    ...(group.missing_images ?? []).map((name) => el("span", { class: "missing" }, "Not found: ", inline(name, 80))),
  ];
  const truths = group.truths.slice(0, 12);
  return el("div", { class: `prompt ${pictures.length ? "" : "bare"}` },
    pictures.length ? el("div", { class: "pictures" }, pictures) : null,
    el("div", { class: "question" },
      block(group.question, { query, kind: "asked", title: "Question", cut: group.question_cut ?? 0 }),
      group.choices?.length ? el("ol", { class: "choices" }, group.choices.slice(0, 26).map((text, i) =>
        el("li", { class: rightChoice(group, text, i) ? "is-right" : null }, el("span", { class: "letter" }, String.fromCharCode(65 + i)), inline(text, 300)))) : null,
      el("p", { class: "truth" }, key(truths.length === 1 ? "Right answer" : "Right answers"),
        truths.length ? truths.map((t, i) => [i ? ", " : " ", el("strong", {}, inline(t, 200))]) : " none given",
        group.truths.length > 12 ? ` and ${group.truths.length - 12} more` : "",
        group.rule ? tag(["rule: ", inline(group.rule, 40)]) : null)));
}

/** Whether a choice is a right answer, which data give as its letter or as its text. */
function rightChoice(group, text, at) {
  return group.truths.some((truth) => truth === String.fromCharCode(65 + at) || truth === text);
}

function verdictTag(verdict) {
  if (typeof verdict !== "number") return el("span", { class: "verdict open" }, "? unknown");
  if (verdict >= 1) return el("span", { class: "verdict good" }, "\u2713 right");
  if (verdict <= 0) return el("span", { class: "verdict bad" }, "\u2717 wrong");
  return el("span", { class: "verdict part" }, `\u25d0 ${number(verdict)}`);
}

/** What a member wrote, what was read from it, and what the judge said. */
function said(member, query) {
  const explained = member.explanation;
  const contrary = typeof member.rule_score === "number" && member.rule_score !== member.verdict;
  return el("div", { class: "said" },
    block(member.text, { query, cut: member.cut ?? 0 }),
    el("p", { class: "read" }, verdictTag(member.verdict),
      contrary ? el("span", {}, key("rule: "), member.rule_score > 0 ? "right" : "wrong") : null,
      member.extracted ?? null ? el("span", {}, key("read as "), el("strong", {}, inline(member.extracted, 120))) : null),
    explained ? el("details", { class: "why" }, el("summary", {}, "What the judge said"),
      block(explained, { cut: member.explanation_cut ?? 0, title: "The judge's reply" })) : null);
}

/** An advantage as a bar left or right of zero. */
function advantageBar(value, reach) {
  if (typeof value !== "number") return el("span", { class: "hollow" }, "\u2013");
  const width = 50 * Math.min(1, Math.abs(value) / reach);
  const side = value > 0 ? "plus" : value < 0 ? "minus" : "zero";
  const left = value < 0 ? `${50 - width}%` : "50%";
  return el("span", { class: `advantage ${side}` },
    el("span", { class: "track", "aria-hidden": "true" }, el("span", { class: "fill", vars: { width: `${width}%`, left } })),
    el("span", { class: "value" }, signed(value)));
}

function lengthCell(member) {
  const tokens = member.tokens ?? (member.learned || null);
  const parts = [
    typeof tokens === "number" ? count(tokens, "token") : null,
    (member.finish_reason ?? "stop") === "stop" ? null : tag(member.finish_reason === "length" ? "cut" : inline(member.finish_reason, 20), "bad"),
    typeof member.learned !== "number" || member.learned === tokens ? null : member.learned ? `${number(member.learned)} learned` : "not learned from",
  ].filter(Boolean);
  return el("span", { class: "lengths" }, parts.map((p) => el("span", {}, p)));
}

const COLUMNS = [
  ["Source", null],
  ["Response", null],
  ["P(student)", "The discriminator's probability that the student wrote the response"],
  ["Reward", "The total, and its parts"],
  ["Advantage", "Reward minus the mean of the group, as it entered the update"],
  ["Length", "Tokens, and how many of them entered the update"],
];

function memberRow(group, member, at, reach, { query = "", source = "" } = {}) {
  const rewards = Object.entries(member.rewards ?? {}).slice(0, 20);
  const cells = [
    [sourceName(member.source), el("span", { class: "faint" }, `response ${member.index}`)],
    said(member, query),
    shareBar(member.student_prob, typeof member.student_prob === "number" ? member.student_prob.toFixed(2) : ""),
    el("span", { class: "rewards" }, el("b", { title: "Total" }, number(member.reward)),
      el("span", {}, rewards.map(([name, value]) => el("span", {}, key(inline(name, 24)), " ", number(value))))),
    advantageBar(member.advantage, reach),
    lengthCell(member),
  ];
  const kinds = ["who", "what", "prob", "pay", "adv", "len"];
  return el("tr", { role: "row", id: `m-${group.id}-${at}`, class: source && member.source !== source ? "other" : null },
    cells.map((cell, i) => el("td", { role: "cell", class: kinds[i], "data-label": COLUMNS[i][0] }, cell)));
}

/** The rows of a group's members. The bars of the advantages share a scale within the group: 1, 2, 4, ... */
function memberTable(group, members, options = {}) {
  const most = largest([0, ...group.members.map((m) => Math.abs(m.advantage ?? 0))]);
  const reach = 2 ** Math.max(0, Math.ceil(Math.log2(most || 1)));
  return el("table", { class: "members", role: "table" },
    el("caption", { class: "unseen" }, `Members of the group at step ${group.step}`),
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, COLUMNS.map(([name, title]) =>
      el("th", { role: "columnheader", scope: "col", title }, name, name === "Advantage" ? el("small", {}, ` \u00b1${reach}`) : null)))),
    el("tbody", { role: "rowgroup" }, members.map(([member, at]) => memberRow(group, member, at, reach, options))));
}

function runName(runs, at) {
  return el("span", { class: "run-name", vars: { "--run": lineColor(at) } }, inline(runs[at]?.name, 30));
}

/** The whole card. `several`: there is more than one run. */
function groupCard(report, store, group, view) {
  const several = report.runs.length > 1;
  const query = needle(view);
  const title = `t-${group.id}`;
  const flags = group.flags.filter((flag) => Object.hasOwn(FLAGS, flag));
  const all = () => navigate({ ...NO_FILTERS, question: group.question_id, side: several ? 1 : null, group: "" });
  return el("article", { class: "card", id: `g-${group.id}`, "data-group": group.id, tabindex: -1, "aria-labelledby": title },
    el("header", {},
      el(view.side ? "h3" : "h2", { id: title }, several ? runName(report.runs, group.run) : null, `Step ${group.step}`),
      group.skill ? tag(inline(group.skill, 40)) : null,
      flags.map((flag) => tag(FLAGS[flag][0], "flag", FLAGS[flag][1])),
      el("span", { class: "id" }, inline(group.question_id, 60)),
      el("span", { class: "actions" },
        view.question ? null : button(several ? "In all runs" : "All steps", all, { class: "quiet" }),
        button("Copy link", () => copyLink(group), { class: "quiet" }))),
    promptOf(store, group, query),
    memberTable(group, group.members.map((member, i) => [member, i]), { query, source: view.source }));
}

async function copyLink(group) {
  navigate({ group: group.id }, { quiet: true });
  try {
    await navigator.clipboard.writeText(location.href);
    announce("The link is in the clipboard.");
  } catch {
    announce("The address of this page now leads to this group.");
  }
}
