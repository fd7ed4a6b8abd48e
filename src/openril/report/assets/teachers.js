// The tab "Teachers": what every source contributes.

function teachersTab(report, view) {
  const run = report.runs[runOf(report, view)];
  const teachers = run.teachers ?? [];
  if (!teachers.length) return [runChoice(report, view), nothing(run, "This run has no teachers.")];
  const skills = [...new Set(teachers.flatMap((t) => Object.keys(t.skills ?? {})))].sort();
  return [
    runChoice(report, view),
    panel("Teachers",
      "Right: share of right answers. Wins: share of groups in which it has the largest reward. Positive advantage: share of its responses that the student is pulled toward.",
      table("Teachers", ["Source", "Responses", "Right", "Wins", "Positive advantage", "Too long"],
        teachers.map((t) => [
          sourceName(t.source), number(t.responses), shareBar(t.right), shareBar(t.wins), shareBar(t.positive_advantage), number(t.too_long),
        ]), [1, 5])),
    skills.length ? panel("Right answers by skill", "The share of right answers, and the number of responses.",
      table("Right answers by teacher and skill", ["Skill", ...teachers.map((t) => sourceName(t.source))],
        skills.map((skill) => [inline(skill, 60), ...teachers.map((t) => {
          const own = Object.hasOwn(t.skills ?? {}, skill) ? t.skills[skill] : null;
          return own ? el("span", {}, shareBar(own.right), el("small", {}, ` of ${number(own.n)}`)) : "\u2013";
        })]))) : null,
  ];
}
