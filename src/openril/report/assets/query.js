// The state of a view lives in the address (#tab=groups&flags=cut&...), so that a link leads back to it. The filters and
// orders here have the same meaning as those of the server of `ril view`.

const FLAGS = {
  all_right: ["All right", "Every sample of the student is right"],
  all_wrong: ["All wrong", "Every sample of the student is wrong"],
  zero_advantage: ["Zero advantage", "The group teaches nothing: all its advantages are zero"],
  d_fooled: ["Discriminator fooled", "The discriminator takes half of the student's responses or more for a teacher's"],
  d_judge_disagree: ["Discriminator vs. judge", "The discriminator takes a wrong response of the student more for a teacher's than a right one"],
  verdict_unknown: ["Verdict unknown", "The judge gave no verdict on a member"],
  cut: ["Cut at the limit", "A response ended at the limit of its length"],
  mixed: ["Mixed text and image", "The step holds questions with and without pictures"],
};

const SORTS = {
  step: "Step, first to last",
  "-step": "Step, last to first",
  longest: "Longest response",
  "-spread": "Widest spread of rewards",
  advantage: "Largest advantage",
};

const TEXTS = ["tab", "run", "skill", "source", "q", "question", "sort", "group", "metric"];
const NUMBERS = ["step_min", "step_max", "from", "to", "smooth", "shown", "item", "side"];

/** Read a view from the part of the address after "#". Unknown keys and broken numbers are left out. */
function parseView(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const view = { flags: (given.get("flags") ?? "").split(",").filter((flag) => Object.hasOwn(FLAGS, flag)) };
  for (const key of TEXTS) view[key] = given.get(key) ?? "";
  for (const key of NUMBERS) {
    const text = given.get(key);
    view[key] = text !== null && /^\d{1,9}$/.test(text) ? Number(text) : null;
  }
  if (!Object.hasOwn(SORTS, view.sort)) view.sort = "";
  if (!/^\d+$/.test(view.run)) view.run = "";
  if (!/^\d+-\d+-\d+$/.test(view.group)) view.group = "";
  return view;
}

/** Write a view as the part of the address after "#": only what differs from the default. */
function formatView(view) {
  const pairs = new URLSearchParams();
  for (const key of TEXTS) if (view[key]) pairs.set(key, view[key]);
  for (const key of NUMBERS) if (view[key] !== null && view[key] !== undefined) pairs.set(key, view[key]);
  if (view.flags.length) pairs.set("flags", view.flags.join(","));
  return `#${pairs}`;
}

/** The conditions on groups of a view, as the parameters of /api/groups. */
function groupQuery(view) {
  const query = new URLSearchParams();
  for (const key of ["run", "step_min", "step_max", "skill", "source", "q", "question", "sort"]) {
    const value = typeof view[key] === "string" ? view[key].trim() : view[key];
    if (value !== "" && value !== null && value !== undefined) query.set(key, value);
  }
  if (view.flags?.length) query.set("flags", view.flags.join(","));
  return query;
}

function needle(view) {
  return (view.q ?? "").trim().toLowerCase();
}

/** Whether a group meets all conditions of a query. */
function matches(group, query) {
  const text = (query.get("q") ?? "").trim().toLowerCase();
  const has = (value) => String(value ?? "").toLowerCase().includes(text);
  return (
    (!query.has("run") || group.run === Number(query.get("run"))) &&
    (!query.has("step_min") || group.step >= Number(query.get("step_min"))) &&
    (!query.has("step_max") || group.step <= Number(query.get("step_max"))) &&
    (!query.has("skill") || group.skill === query.get("skill")) &&
    (!query.has("source") || group.members.some((member) => member.source === query.get("source"))) &&
    (!query.has("question") || group.question_id === query.get("question")) &&
    (!query.has("flags") || query.get("flags").split(",").every((flag) => group.flags.includes(flag))) &&
    (!text || has(group.question) || has(group.question_id) || group.truths.some(has) || group.members.some((m) => has(m.text)))
  );
}

/** The place of a group: run, step, position in the step. */
function placeOf(group) {
  const [run, step, position] = group.id.split("-").map(Number);
  return [step, run, position];
}

function byPlace(a, b) {
  const [x, y] = [placeOf(a), placeOf(b)];
  return x[0] - y[0] || x[1] - y[1] || x[2] - y[2];
}

const largest = (values) => values.reduce((most, v) => (v > most ? v : most), -Infinity);
const rewardsOf = (group) => group.members.map((m) => m.reward).filter((r) => typeof r === "number");
const KEYS = {
  longest: (group) => group.longest ?? 0,
  "-spread": (group) => (rewardsOf(group).length ? largest(rewardsOf(group)) + largest(rewardsOf(group).map((r) => -r)) : 0),
  advantage: (group) => largest([0, ...group.members.map((m) => Math.abs(m.advantage ?? 0))]),
};

/** Return the groups in the order of a sort key; ties by step, run, position. */
function sorted(groups, sort) {
  if (sort === "-step") return [...groups].sort((a, b) => b.step - a.step || byPlace(a, b));
  const key = KEYS[sort];
  return [...groups].sort(key ? (a, b) => key(b) - key(a) || byPlace(a, b) : byPlace);
}

/** The interval of Wilson around a share of `right` among `n`, at 95 %. */
function wilson(right, n) {
  if (!n) return null;
  const z = 1.959963984540054;
  const share = right / n;
  const middle = (share + (z * z) / (2 * n)) / (1 + (z * z) / n);
  const half = (z / (1 + (z * z) / n)) * Math.sqrt((share * (1 - share)) / n + (z * z) / (4 * n * n));
  return { share, low: Math.max(0, middle - half), high: Math.min(1, middle + half) };
}
