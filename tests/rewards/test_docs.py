"""The examples of docs/rewards.md run unchanged."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from openril.recipe.schema import Recipe
from openril.records import Group, Question, Response, Rollout
from openril.rewards.combine import RewardSystem
from openril.rewards.rules import score

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"


def test_the_first_example_runs(tmp_path, monkeypatch):
    code, settings = re.search(r"```python\n(.*?)```.*?```yaml\n(.*?)```", DOCS.read_text(), re.S).groups()
    (tmp_path / "brief.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.model_validate(YAML(typ="safe").load(settings) | {"train": {"algorithm": "dr_grpo"}})
    recipe.rewards.answer.kind = "rules"
    group = Group(Question("q", "Which?", "red"), [Rollout(Response("q", "student", 0, "It is red."))])
    RewardSystem(recipe).score([group])
    assert group.rollouts[0].rewards == {"answer": 1.0, "brief": 0.97}


def test_the_documented_reward_functions_run(tmp_path, monkeypatch):
    section = DOCS.read_text().split("## Your own reward functions")[1]
    code, settings = re.search(r"```python\n(.*?)```.*?```yaml\n(.*?)```", section, re.S).groups()
    (tmp_path / "brief.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.model_validate(
        YAML(typ="safe").load(settings) | {"run_dir": str(tmp_path / "run"), "train": {"algorithm": "dr_grpo"}}
    )
    recipe.rewards.answer.kind = "rules"
    texts = [("student", "red"), ("student", "rosy"), ("big", "blue")]
    group = Group(Question("q", "Which?", "red"), [Rollout(Response("q", s, 0, t)) for s, t in texts])
    RewardSystem(recipe).score([group])
    one, two, three = (r.rewards for r in group.rollouts)
    assert one == {"answer": 1.0, "brief": 0.99, "same_first_letter": 1.0, "think_format_reward": 0.0}
    assert (two["same_first_letter"], three["same_first_letter"], three["brief"]) == (1.0, 0.0, None)
    # 1 + 0.5;  0 + 0.5;  0: the unknown brief has weight 0
    assert [r.reward for r in group.rollouts] == [1.5, 0.5, 0.0]


TABLE = DOCS.read_text(encoding="utf-8").split("**What becomes of an answer.**")[1].split("**Wrong or unparsed.**")[0]
FORMS = re.findall(r"^\| (.*?) \| (`.*?`) \| (.*?) \| (.*?) \| (.*?) \|$", TABLE, re.M)


def test_every_line_of_the_table_of_answers_is_tried():
    assert len(FORMS) == len(re.findall(r"^\| ", TABLE, re.M)) - 1 > 20


@pytest.mark.parametrize(("form", "truth", "right", "wrong", "unparsed"), FORMS)
def test_answers_are_right_wrong_or_unparsed_as_the_table_says(form, truth, right, wrong, unparsed):
    (first, *more) = truth.strip("`").replace("⏎", "\n").split(" / ")
    options = ("red", "blue", "green") if "blue" in right and first in ("B", "blue") else ()
    question = Question("q", "Which?", first, choices=options, other_answers=tuple(more))
    for expected, cell in ((1.0, right), (0.0, wrong), (None, unparsed)):
        responses = re.findall(r"`(.*?)`", cell)
        assert responses and {r: score("auto", question, r) for r in responses} == dict.fromkeys(responses, expected)
