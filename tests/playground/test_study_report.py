"""Findings, tables, figures and the page from finished cells, and the measurements of a single cell."""

import json
import re

import pytest

from openril.errors import DataError
from openril.records import Question
from openril.storage import write_json, write_jsonl
from playground.study.figures import styles_figure
from playground.study.findings import Findings
from playground.study.metrics import agreement, mean_validation_score, median, seconds_of
from playground.study.page import PAGE, default_page, replace_blocks, write_report
from playground.study.plan import ABLATIONS, METHODS, STUDENTS
from playground.study.recipes import Place
from playground.study.scores import read_results
from playground.study.tables import BLOCKS
from support.finished_study import write_cell, write_scores

QWEN = "student_qwen"


def finish(out, seeds=2, ablations=("beta_0", "similarity_3", "cached_1", "cached_4")):
    for student in STUDENTS:
        for name, cell in METHODS.items():
            for seed in [None] if cell.how == "as_is" else range(seeds):
                write_cell(out, Place(student, "contenders", name, seed))
    for name in ablations:
        write_cell(out, Place(QWEN, "ablations", name, 0), chance=0.2 if name == "beta_0" else None)
    write_cell(out, Place(QWEN, "compute", "dr_grpo", 0), steps=60)
    for teacher in ("teacher_a", "teacher_b"):
        ids = read_results(out).questions.ids
        write_scores(out / "teachers" / teacher, "base", {i: float(n % 3 == 0) for n, i in enumerate(ids)})
    write_json(out / "study.json", {"split": "test"})
    return out


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def found(study):
    return Findings(read_results(study), 500).everything()


def goal(found, beginning, student=QWEN):
    return next(g for g in found["students"][student]["goals"] if g["goal"].startswith(beginning))


def test_goals_are_judged_by_value_and_interval(found):
    both = goal(found, "RIL, both, over Dr.GRPO")
    assert both["reached"] is True  # chances .8 against .5
    assert both["found"].startswith("+")
    assert goal(found, "both over the better single")["reached"] in (True, False)
    assert goal(found, "similarity reward")["reached"] is True  # 0.2 to 0.65 in the made-up metrics
    assert goal(found, "beta 0")["reached"] is None
    assert goal(found, "beta 0")["found"].startswith("-")
    assert goal(found, "beta 0", "student_internvl")["found"] is None


def test_a_response_style_that_no_student_has_gets_no_panel(tmp_path):
    def panels():
        figure = styles_figure(read_results(tmp_path))
        assert figure is not None
        return [axes.get_title(loc="left") for axes in figure.axes]

    folder = write_cell(tmp_path, Place(QWEN, "contenders", "ril_both", 0))
    assert panels() == ["answers alone", "derivations in a third style"]
    done = json.loads((folder / "done.json").read_text())
    done["ways"] = {step: ways | {"own": 0.01, "b": 0.5} for step, ways in done["ways"].items()}
    write_json(folder / "done.json", done)
    assert panels() == ["answers alone", "derivations in teacher B's style"]


def test_a_figure_with_nothing_to_draw_removes_the_older_one_from_the_page(tmp_path):
    out, page = finish(tmp_path / "study", seeds=1, ablations=()), tmp_path / "study.md"
    begin, end = "<!-- generated: figure_responses -->", "<!-- end: figure_responses -->"
    page.write_text(f"{begin}\n![old](images/study/responses.png)\n{end}\n")
    write_report(out, page, 50, lambda line: None)
    assert page.read_text() == f"{begin}\nNot measured yet.\n{end}\n"


def test_a_small_gain_does_not_reach_a_large_goal(tmp_path):
    ids = [f"test{i}-charts" for i in range(200)]
    for name, right in (("dr_grpo", 100), ("ril_both", 106)):
        place = Place(QWEN, "contenders", name, 0)
        write_scores(tmp_path / place.path, "final", {i: float(n < right) for n, i in enumerate(ids)})
    found = Findings(read_results(tmp_path), 500).everything()
    both = goal(found, "RIL, both, over Dr.GRPO")
    assert both["found"].startswith("+3.0 [+")  # the interval excludes 0, but 3.0 is less than 5.1
    assert both["reached"] is False
    row = next(row for row in BLOCKS["contenders"](found).splitlines() if row.startswith("| Dr.GRPO"))
    assert row.split("|")[4:6] == ["  ", f" **{both['found']}** "]  # not over itself; RIL, both, over it


def test_a_student_passes_a_teacher_skill_by_skill(tmp_path):
    def scores(charts, open_):
        return {f"test{i}-charts": float(i < charts) for i in range(4)} | {
            f"test{i}-open": float(i < open_) for i in range(4)
        }

    write_scores(tmp_path / Place(QWEN, "contenders", "ril_both", 0).path, "final", scores(3, 2))
    write_scores(tmp_path / "teachers/teacher_a", "base", scores(2, 3))
    write_scores(tmp_path / "teachers/teacher_b", "base", scores(1, 2))
    passes = Findings(read_results(tmp_path), 200).passes(QWEN)
    assert passes["by_teacher"] == {"teacher_a": ["charts"], "teacher_b": ["charts"]}
    assert passes["all"] == ["charts"]
    assert passes["number"]["value"] == 1.0


def test_the_reference_is_compared_on_common_seeds(found):
    over = found["students"][QWEN]["ablations"]["beta_0"]["over_reference"]
    assert over["seeds"] == 1  # seed 0 alone, of two
    assert over["high"] < 0


def test_cells_that_are_not_finished_are_left_out(tmp_path):
    write_cell(tmp_path, Place(QWEN, "contenders", "dr_grpo", 0), 1)
    (write_cell(tmp_path, Place(QWEN, "contenders", "dr_grpo", 1), 1) / "done.json").unlink()
    assert read_results(tmp_path).cells[QWEN]["contenders"]["dr_grpo"].seeds == [0]


def test_cells_scored_on_other_questions_are_refused(tmp_path):
    write_cell(tmp_path, Place(QWEN, "contenders", "dr_grpo", 0), 2)
    write_cell(tmp_path, Place(QWEN, "contenders", "ril_both", 0), 1)
    with pytest.raises(DataError, match="14 questions"):
        read_results(tmp_path)


def test_an_empty_folder_has_nothing_to_report(tmp_path):
    with pytest.raises(DataError, match="finished"):
        read_results(tmp_path)


def test_report_writes_results_figures_and_page(study, tmp_path):
    page = tmp_path / "study.md"
    write_report(study, page, 200, lambda line: None)
    text = page.read_text()
    assert "| RIL, both teachers | " in text
    assert "99.0 %" in text  # the judge's agreement
    figures = {p.name for p in (tmp_path / "images/study").iterdir()}
    assert figures == {"skills.png", "curves.png", "styles.png", "similarity.png", "responses.png"}
    assert all(f"images/study/{f}" in text for f in figures)
    results = json.loads((study / "results.json").read_text())
    assert set(results["students"]) == set(STUDENTS)


@pytest.mark.parametrize("name", METHODS)
def test_report_of_one_cell_says_what_is_missing(tmp_path, name):
    write_cell(tmp_path, Place(QWEN, "contenders", name, None if METHODS[name].how == "as_is" else 0))
    write_json(tmp_path / "study.json", {"split": "validation"})
    write_report(tmp_path, tmp_path / "study.md", 100, lambda line: None)
    text = (tmp_path / "study.md").read_text()
    assert "140 validation questions" in text
    for missing in ("passes", "compute", "ablations", "figure_similarity", "figure_responses"):
        assert f"<!-- generated: {missing} -->\nNot measured yet.\n<!-- end: {missing} -->" in text, missing
    shown = re.findall(r"\]\((images/study/[^)]*)\)", text)
    assert len(shown) + text.count("Not measured yet.") == 8  # five figures, and three tables
    assert all((tmp_path / picture).is_file() for picture in shown)


def test_the_shipped_page_has_every_block():
    text = PAGE.read_text()
    for name in [*BLOCKS, "figure_skills", "figure_curves", "figure_styles", "figure_similarity", "figure_responses"]:
        assert f"<!-- generated: {name} -->" in text
        assert f"<!-- end: {name} -->" in text


def test_only_text_between_markers_is_replaced():
    text = (
        "mine\n<!-- generated: a -->\nold\n<!-- end: a -->\nalso mine\n<!-- generated: b -->\nkept\n<!-- end: b -->\n"
    )
    new = replace_blocks(text, {"a": "new \\1\n", "c": "nowhere"})
    assert new == text.replace("old", "new \\1")


def test_a_marker_without_its_end_is_refused():
    with pytest.raises(DataError, match="<!-- end: a -->"):
        replace_blocks("<!-- generated: a -->\n", {"a": "x"})


def test_only_the_shipped_study_writes_the_docs(tmp_path):
    assert default_page(PAGE.parents[1] / "runs" / "study", "test") == PAGE
    assert default_page(PAGE.parents[1] / "runs" / "study", "validation") != PAGE
    assert default_page(tmp_path, "test") == tmp_path / "study.md"


def test_every_ablation_has_a_row(tmp_path):
    for _, cells in ABLATIONS.values():
        for name in cells:
            write_cell(tmp_path, Place(QWEN, "ablations", name, 0), 1)
    write_cell(tmp_path, Place(QWEN, "contenders", "ril_both", 0), 1)
    text = BLOCKS["ablations"](Findings(read_results(tmp_path), 100).everything())
    assert text.count("\n|") == 2 + 1 + sum(len(cells) for _, cells in ABLATIONS.values())


def test_agreement_counts_by_the_exact_rule():
    q = Question("q", "how many?", "7", rule="number")
    # right and called right; wrong and called right; wrong and called wrong; right and called wrong; unknown
    items = [(q, "7", 1.0), (q, "6", 1.0), (q, "5", 0.0), (q, "7", 0.0), (q, "7", None)]
    assert agreement(items) == {
        "verdicts": 4, "unknown": 1, "agreement": 0.5, "wrongly_right": 0.5, "wrongly_wrong": 0.5,
    }  # fmt: skip
    assert agreement([])["agreement"] is None


def test_validation_scores_during_training_are_averaged(tmp_path, found):
    assert mean_validation_score(tmp_path) is None
    write_jsonl(
        tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2, "eval/score": 0.2}, {"step": 4, "eval/score": 0.7}]
    )
    assert mean_validation_score(tmp_path) == pytest.approx(0.45)
    # 0.4 + 0.3 times 1/4, 2/4, 3/4 and 4/4 of the run (support/finished_study.py).
    assert found["students"][QWEN]["ablations"]["beta_0"]["on_the_way"] == pytest.approx(0.5875)
    assert found["students"][QWEN]["contenders"]["sft_teacher_text"]["on_the_way"] is None


def test_seconds_are_the_median_steps():
    assert median([1.0, 100.0, 2.0]) == 2.0
    assert median([1.0, 2.0]) == 1.5
    assert median([]) is None
    assert seconds_of({"steps": 10, "seconds_per_step": 1.5}) == 15.0
    assert seconds_of({}) is None
