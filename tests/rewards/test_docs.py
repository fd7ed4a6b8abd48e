"""The examples of docs/rewards.md run unchanged."""

import re
from pathlib import Path

from ruamel.yaml import YAML

from openril.recipe.schema import Recipe
from openril.records import Group, Question, Response, Rollout
from openril.rewards.combine import RewardSystem

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
