"""How rewards add up, who is asked, and what is counted. Numbers worked by hand."""

import pytest

from openril.errors import DataError, JudgeError, RecipeError
from openril.recipe.schema import Recipe
from openril.records import Group, Question, Response, Rollout
from openril.rewards.answers import judge_item, score_answers
from openril.rewards.combine import RewardStats, RewardSystem, weighted_sum
from openril.rewards.functions import LoadedFunction
from openril.rewards.judge import JudgeService, build_judge_service
from support.misbehaving_server import MisbehavingServer, Say, Status

LONG = "I have looked at the whole picture for a long time and find nothing to add to what was said before"


def judge_says(request):
    text = request.text
    if "unavailable" in text:
        return Status(400, "no")
    return Say("Same. <answer>1</answer>" if "It is red" in text else "Different. <answer>0</answer>")


def group(*texts, answer="red", teachers=("big",), probs=None, **question):
    q = Question("q1", "Which color?", answer, **question)
    students = [
        Rollout(Response("q1", "student", i, text)) for i, text in enumerate(texts[: len(texts) - len(teachers)])
    ]
    theirs = [Rollout(Response("q1", t, 0, x)) for t, x in zip(teachers, texts[len(students) :], strict=True)]
    rollouts = students + theirs
    for rollout, prob in zip(rollouts, probs or [None] * len(rollouts), strict=True):
        rollout.student_prob = prob
    return Group(q, rollouts)


def recipe_for(tmp_path, server=None, **overrides):
    recipe = Recipe(run_dir=str(tmp_path / "run"))
    if server is not None:
        recipe.judge.base_urls, recipe.judge.model = [server.url], "fake"
        recipe.judge.max_retries, recipe.judge.max_unknown_share = 0, 1.0
    for key, value in overrides.items():
        section = recipe
        *path, last = key.split("__")
        for name in path:
            section = getattr(section, name)
        setattr(section, last, value)
    return recipe


def system_for(recipe, functions=(), **more):
    judged = recipe.answer_kind in ("judge", "rules_then_judge")
    return RewardSystem(recipe, build_judge_service(recipe) if judged else None, list(functions), **more)


def test_the_papers_reward_is_similarity_plus_answer(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        system = system_for(recipe_for(tmp_path, server))
        g = group("It is red.", "It is blue.", "It is red!", probs=[0.9, 0.2, 0.1])
        metrics = system.score([g])
    # taken for the student but right: 0 + 1; for a teacher but wrong: 1 + 0; a teacher's, right: 1 + 1
    assert [r.reward for r in g.rollouts] == [1.0, 1.0, 2.0]
    assert [r.similarity for r in g.rollouts] == [0.0, 1.0, 1.0]
    assert [r.verdict for r in g.rollouts] == [1.0, 0.0, 1.0]
    assert g.rollouts[1].rewards == {"similarity": 1.0, "answer": 0.0}
    assert (metrics["judge_asked"], metrics["judge_unknown"]) == (3.0, 0.0)


def test_an_unknown_verdict_makes_the_reward_unknown_not_0(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        g = group("It is red.", "unavailable", "It is red!", probs=[0.1, 0.1, 0.1])
        system = system_for(recipe_for(tmp_path, server))
        metrics = system.score([g])
    assert [r.reward for r in g.rollouts] == [2.0, None, 2.0]
    assert g.rollouts[1].rewards == {"similarity": 1.0, "answer": None}
    assert metrics["judge_unknown"] == 1.0 and "answered 400" in system.stats.causes[0]


def test_too_many_unknown_verdicts_stop_the_step(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        g = group("It is red.", "unavailable 1", "unavailable 2", "It is red!", probs=[0.1] * 4)
        system = system_for(recipe_for(tmp_path, server, judge__max_unknown_share=0.5))
        system.score([g])  # 2 of 4 is the half that is allowed
        system.budget = type(system.budget)(0.49)
        with pytest.raises(JudgeError, match=r"2 of 4 .*\n  2 x judge: .*answered 400"):
            system.score([g])


def test_weight_0_only_logs_even_what_is_unknown(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        recipe = recipe_for(tmp_path, server, rewards__answer__weight=0.0, judge__max_unknown_share=0.0)
        g = group("unavailable", "It is red.", probs=[0.1, 0.9])
        system_for(recipe).score([g])
    assert [r.reward for r in g.rollouts] == [1.0, 0.0]
    assert [r.rewards["answer"] for r in g.rollouts] == [None, 1.0]


def test_weights_and_functions_add_up(tmp_path):
    recipe = recipe_for(
        tmp_path, rewards__answer__kind="rules", rewards__answer__weight=2.0, rewards__similarity__weight=0.5
    )
    brevity = LoadedFunction(
        "brevity", "w", -0.25, "text", lambda completions, **k: [float(len(c)) for c in completions]
    )
    logged = LoadedFunction("logged", "w", 0.0, "text", lambda completions, **k: [None] * len(completions))
    g = group("red", "blue", probs=[0.3, 0.6])
    metrics = system_for(recipe, [brevity, logged]).score([g])
    # 0.5 x 1 + 2 x 1 - 0.25 x 3 = 1.75;   0.5 x 0 + 2 x 0 - 0.25 x 4 = -1
    assert [r.reward for r in g.rollouts] == [1.75, -1.0]
    assert g.rollouts[0].rewards == {"similarity": 1.0, "answer": 1.0, "brevity": 3.0, "logged": None}
    assert metrics["function_seconds"] >= 0


def test_a_function_without_a_value_makes_the_reward_unknown(tmp_path):
    recipe = recipe_for(tmp_path, rewards__answer__kind="rules", train__algorithm="dr_grpo")
    some = LoadedFunction("some", "w", 1.0, "text", lambda completions, **k: [1.0, None])
    g = group("red", "red")
    system_for(recipe, [some]).score([g])
    assert [r.reward for r in g.rollouts] == [2.0, None]


@pytest.mark.parametrize("algorithm", ["dr_grpo", "grpo"])
def test_without_a_discriminator_similarity_is_no_part(tmp_path, algorithm):
    recipe = recipe_for(tmp_path, rewards__answer__kind="rules", train__algorithm=algorithm)
    g = group("red", "blue", teachers=())
    system_for(recipe).score([g])
    assert [r.reward for r in g.rollouts] == [1.0, 0.0]
    assert g.rollouts[0].similarity is None and g.rollouts[0].rewards == {"answer": 1.0}


def test_gail_is_similarity_alone_and_asks_nobody(tmp_path):
    g = group("red", "blue", probs=[0.4, 0.6], answer="")
    metrics = system_for(recipe_for(tmp_path, train__algorithm="gail")).score([g])
    assert [r.reward for r in g.rollouts] == [1.0, 0.0]
    assert g.rollouts[0].verdict is None and metrics == {}


def test_similarity_kind_follows_the_recipe(tmp_path):
    recipe = recipe_for(
        tmp_path, train__algorithm="gail", rewards__similarity__kind="levels", rewards__similarity__levels=3
    )
    g = group("a", "b", probs=[0.4, 0.1])
    system_for(recipe).score([g])
    assert [r.reward for r in g.rollouts] == [0.5, 1.0]


def test_rules_score_unparsed_0_and_count_it(tmp_path):
    g = group("red", "blue", LONG, "", "red " * 50, "Answer: red", probs=[0.9] * 6)
    metrics = system_for(recipe_for(tmp_path, rewards__answer__kind="rules")).score([g])
    assert [r.verdict for r in g.rollouts] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert (metrics["unparsed"], metrics["empty"], metrics["repetitive"]) == (1.0, 1.0, 1.0)
    assert "judge_asked" not in metrics


def test_rules_then_judge_asks_only_where_rules_find_nothing(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        g = group("blue", f"{LONG}. It is red, I mean crimson", LONG, "red", probs=[0.9] * 4, answer="scarlet")
        settings = {"rewards__answer__kind": "rules_then_judge", "rewards__answer__rule": "contains"}
        metrics = system_for(recipe_for(tmp_path, server, **settings)).score([g])
        assert server.count == 2
    assert [r.verdict for r in g.rollouts] == [0.0, 1.0, 0.0, 0.0]
    assert (metrics["unparsed"], metrics["judge_asked"]) == (2.0, 2.0)


def test_a_questions_own_rule_comes_first(tmp_path):
    items = [(Question("q", "?", "100", rule="relaxed_number"), "104"), (Question("q", "?", "100"), "104")]
    assert [s.score for s in score_answers(items, "rules", "number")] == [1.0, 0.0]


def test_teacher_verdicts_are_asked_for_once_over_runs_that_share_a_cache(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        for run in ("one", "two"):
            recipe = recipe_for(tmp_path, server, run_dir=str(tmp_path / run), cache_dir=str(tmp_path / "cache"))
            g = group("It is red.", "It is red!", probs=[0.1, 0.1])
            metrics = system_for(recipe).score([g])
        # the student's sample is judged in each run, the teacher's response only in the first
        assert server.count == 3 and metrics["judge_cached"] == 1.0


def test_begin_lets_the_judge_work_before_the_discriminator_has_scored(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        system = system_for(recipe_for(tmp_path, server))
        g = group("It is red.", "It is blue.")
        system.begin([g])
        for r in g.rollouts:
            r.student_prob = 0.1
        system.score([g])
        assert server.count == 2
    assert [r.reward for r in g.rollouts] == [2.0, 1.0]


def test_counts_of_all_processes_decide_together(tmp_path):
    other = RewardStats(judged=8, unknown=8, causes=["x"] * 8, answer_seconds=9.0)
    with MisbehavingServer(then=judge_says) as server:
        recipe = recipe_for(tmp_path, server, judge__max_unknown_share=0.25)
        system = system_for(recipe, gather=lambda mine: [*mine, other])
        with pytest.raises(JudgeError, match="8 of 10"):
            system.score([group("It is red.", "It is blue.", probs=[0.1, 0.1])])
    assert system.stats.answer_seconds == 9.0


def test_a_choice_is_shown_to_the_judge_with_letter_text_and_options():
    question = Question("q", "Which pet?", "B", choices=("cat", "dog"))
    assert judge_item(question, "the dog")[:3] == ("Which pet?\nA. cat\nB. dog", "B. dog", "the dog")


def test_the_judge_reads_all_accepted_answers():
    question = Question("q", "Which color?", "red", other_answers=("crimson",))
    assert judge_item(question, "it")[:3] == ("Which color?", "Any one of these is right:\n- red\n- crimson", "it")


def test_score_answers_serves_evaluation(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        service = build_judge_service(recipe_for(tmp_path, server), "eval")
        q = Question("q", "Which color?", "red")
        scores = score_answers([(q, "It is red"), (q, "unavailable"), (q, "")], "judge", "auto", service)
    assert [(s.score, s.asked_judge) for s in scores] == [(1.0, True), (None, True), (0.0, False)]
    assert scores[0].verdict.explanation == "Same." and "400" in scores[1].cause
    assert (tmp_path / "run" / "verdicts" / "eval.jsonl").exists()


def test_a_question_without_truth_is_an_error():
    with pytest.raises(DataError, match=r"question q: .*answer.*f.jsonl:3"):
        score_answers([(Question("q", "?", " ", origin="f.jsonl:3"), "x")], "rules", "auto")


def test_a_judge_that_is_needed_but_not_there_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"rewards.answer.kind: judge"):
        RewardSystem(recipe_for(tmp_path), None, [])
    with pytest.raises(RecipeError, match=r"rewards.answer.kind.* judge"):
        score_answers([(Question("q", "?", "x"), "x")], "judge", "auto")


def test_weighted_sum():
    assert weighted_sum({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": -2.0}) == 0.0
    assert weighted_sum({"a": None, "b": 1.0}, {"a": 1.0, "b": 1.0}) is None
    assert weighted_sum({"a": None, "b": 1.0}, {"a": 0.0, "b": 1.0}) == 1.0


def test_a_service_is_shared_by_reward_and_evaluation(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        recipe = recipe_for(tmp_path, server)
        service = build_judge_service(recipe)
        assert isinstance(service, JudgeService)
        g = group("It is red.", "It is blue.", probs=[0.1, 0.1])
        RewardSystem(recipe, service, []).score([g])
        score_answers([(g.question, "It is red.")], "judge", "auto", service)
        assert server.count == 2


def test_similarity_can_count_in_right_responses_alone(tmp_path):
    with MisbehavingServer(then=judge_says) as server:
        recipe = recipe_for(tmp_path, server, rewards__combine="right_only", rewards__similarity__weight=0.5)
        g = group("It is red.", "It is blue.", "unavailable", "It is red!", probs=[0.9, 0.2, 0.2, 0.1])
        system_for(recipe).score([g])
    # right, like a student: 1; wrong, like a teacher: 0, where the sum gives 0.5; unknown; right, like a teacher: 1 + 0.5
    assert [r.reward for r in g.rollouts] == [1.0, 0.0, None, 1.5]
    assert [r.rewards["similarity"] for r in g.rollouts] == [0.0, 1.0, 1.0, 1.0]  # logged as they are


def test_a_question_without_truth_is_rewarded_by_the_other_rewards(tmp_path):
    recipe = recipe_for(tmp_path, rewards__answer__kind="rules", rewards__answer__without_truth="leave_out")
    known = group("It is red.", "It is blue.", probs=[0.2, 0.9])
    unknown = group("It is red.", "It is blue.", answer="", probs=[0.2, 0.9])
    metrics = system_for(recipe).score([known, unknown])
    # The first text looks like a teacher's (similarity 1), the second like the student's (0).
    assert [r.reward for r in known.rollouts] == [2.0, 0.0]
    assert [r.reward for r in unknown.rollouts] == [1.0, 0.0]
    assert [r.verdict for r in unknown.rollouts] == [None, None]
    assert [r.cause for r in unknown.rollouts] == ["no ground truth"] * 2
    assert metrics["without_truth"] == 2.0
    assert metrics["unparsed"] == 0.0


def test_a_question_without_truth_is_refused_unless_it_is_left_out(tmp_path):
    system = system_for(recipe_for(tmp_path, rewards__answer__kind="rules"))
    with pytest.raises(DataError, match=r"q1.*without_truth"):
        system.score([group("It is red.", "It is blue.", answer=" ", probs=[0.5, 0.5])])
