"""The reward of a response: similarity, answer, and the user's own rewards, weighted and summed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openril.errors import RecipeError
from openril.recipe.schema import Recipe
from openril.records import Group, Rollout
from openril.rewards.answers import NO_TRUTH, AnswerScore, AnswersHandle, submit_answers
from openril.rewards.functions import FunctionRewards, LoadedFunction, load_functions
from openril.rewards.judge import JudgeService
from openril.rewards.similarity import similarity_reward
from openril.rewards.verdict_store import UnknownBudget

Gather = Callable[[list[Any]], list[Any]]

COUNTS = (
    "responses", "judged", "asked", "cached", "unknown", "unparsed", "empty", "repetitive", "without_truth", "causes",
)  # fmt: skip
"""Fields of ``RewardStats`` that are summed over processes."""


@dataclass
class RewardStats:
    """Counts and seconds of one step."""

    responses: int = 0
    judged: int = 0
    """Responses whose score the judge decides. ``asked`` cost a request, ``cached`` were known, ``unknown`` failed."""
    asked: int = 0
    cached: int = 0
    unknown: int = 0
    unparsed: int = 0
    """Responses in which a rule found no answer to compare."""
    empty: int = 0
    repetitive: int = 0
    without_truth: int = 0
    """Responses to questions that have no ground truth."""
    answer_seconds: float = 0.0
    """Seconds spent waiting for answer scores."""
    function_seconds: float = 0.0
    causes: list[str] = field(default_factory=list)  # of unknown verdicts

    def count(self, scores: Sequence[AnswerScore]) -> None:
        self.responses += len(scores)
        for score in scores:
            self.judged += score.asked_judge
            self.unparsed += not score.parsed
            self.empty += score.cause == "empty response"
            self.repetitive += score.cause == "repetitive response"
            self.without_truth += score.cause == NO_TRUTH
            if score.verdict is not None:
                self.asked += score.verdict.asked
                self.cached += score.verdict.cached
                if score.verdict.unknown:
                    self.unknown += 1
                    self.causes.append(score.cause)

    @staticmethod
    def merge(parts: Sequence[RewardStats]) -> RewardStats:
        """Sum the counts of all processes; the seconds are those of the slowest process."""
        total = RewardStats()
        for part in parts:
            for name in COUNTS:
                setattr(total, name, getattr(total, name) + getattr(part, name))
            total.answer_seconds = max(total.answer_seconds, part.answer_seconds)
            total.function_seconds = max(total.function_seconds, part.function_seconds)
        return total


class RewardSystem:
    """Fills the rewards of groups whose ``student_prob`` the discriminator has set.

    Args:
        judge_service: Needed if the answer reward asks a judge.
        gather: Collects a list over all processes (``accelerate.utils.gather_object``), so that all stop together.
    """

    def __init__(
        self,
        recipe: Recipe,
        judge_service: JudgeService | None = None,
        functions: Sequence[LoadedFunction] | None = None,
        gather: Gather | None = None,
    ) -> None:
        self.recipe = recipe
        self.kind = recipe.answer_kind
        if self.kind in ("judge", "rules_then_judge") and judge_service is None:
            raise RecipeError(f"rewards.answer.kind: {self.kind} needs a judge. Set judge.base_urls or model_path.")
        self.judge_service = judge_service
        self.functions = FunctionRewards(load_functions(recipe.rewards.functions) if functions is None else functions)
        self.budget = UnknownBudget(recipe.judge.max_unknown_share)
        self.gather = gather
        self.stats = RewardStats()
        self._begun: tuple[list[Group], AnswersHandle] | None = None
        self.gate = 1.0  # factor of the similarity reward's weight; the loop sets it (rewards.similarity.gate)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every active reward, by its name in ``Rollout.rewards``."""
        rewards = self.recipe.rewards
        weights = {"similarity": self.gate * rewards.similarity.weight} if self.recipe.uses_discriminator else {}
        if self.kind != "none":
            weights["answer"] = rewards.answer.weight
        return weights | {f.name: f.weight for f in self.functions.functions}

    def begin(self, groups: Sequence[Group]) -> None:
        """Start to ask the judge about these groups, so that it works while the discriminator trains. Optional."""
        self._begun = (list(groups), self._submit(groups))

    def score(self, groups: Sequence[Group]) -> dict[str, float]:
        """Fill ``similarity``, ``verdict``, ``rewards`` and ``reward`` of every rollout, and return the step's metrics.

        A rollout's reward is the weighted sum, or None if a reward with a weight is unknown. A reward with weight 0 is
        only logged. With ``rewards.answer.without_truth: leave_out`` the sum of a question without ground truth has no
        answer reward. With ``rewards.combine: right_only`` a wrong response earns no similarity. ``stats`` holds the counts
        of the last call.

        Raises:
            JudgeError: If too many verdicts are unknown.
            DataError: For a question without ground truth. What a reward function raises is passed on.
        """
        stats = RewardStats()
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        begun, self._begun = self._begun, None
        started = time.perf_counter()
        # The work that ``begin`` started counts only if ``score`` gets the same group objects.
        same = begun is not None and [id(g) for g in begun[0]] == [id(g) for g in groups]
        handle = begun[1] if begun is not None and same else self._submit(groups)
        asked = time.perf_counter()
        function_rewards = self.functions.score(groups)
        stats.function_seconds = time.perf_counter() - asked
        scores = handle.result()
        stats.answer_seconds = time.perf_counter() - started - stats.function_seconds
        stats.count(scores)
        weights, combine = self.weights, self.recipe.rewards.combine
        for i, (rollout, score) in enumerate(zip(rollouts, scores, strict=True)):
            rollout.rewards = {}
            if "similarity" in weights:
                rollout.similarity = rollout.rewards["similarity"] = self._similarity(rollout)
            if "answer" in weights:
                rollout.verdict = rollout.rewards["answer"] = score.score
                rollout.judged, rollout.cause = score.asked_judge, score.cause
                rollout.explanation = score.verdict.explanation if score.verdict else ""
            for name, values in function_rewards.items():
                rollout.rewards[name] = values[i]
            counted = right_only(rollout.rewards) if combine == "right_only" else rollout.rewards
            decided = {n: w for n, w in weights.items() if n != "answer"} if score.cause == NO_TRUTH else weights
            rollout.reward = weighted_sum(counted, decided)
        self.stats = stats if self.gather is None else RewardStats.merge(self.gather([stats]))
        if weights.get("answer", 0.0) != 0.0:
            self.budget.check(self.stats.judged, self.stats.unknown, self.stats.causes)
        return self._metrics(self.stats)

    def _submit(self, groups: Sequence[Group]) -> AnswersHandle:
        pairs = [(group.question, rollout.response) for group in groups for rollout in group.rollouts]
        # Teacher responses come from the cache, so their verdicts are stored there for other runs.
        shared = [not response.from_student for _, response in pairs]
        items = [(question, response.text) for question, response in pairs]
        answer = self.recipe.rewards.answer
        return submit_answers(items, self.kind, answer.rule, self.judge_service, shared, answer.without_truth)

    def _similarity(self, rollout: Rollout) -> float:
        assert rollout.student_prob is not None, "the discriminator must score groups before rewards are summed"
        settings = self.recipe.rewards.similarity
        return similarity_reward(rollout.student_prob, settings.kind, settings.levels)

    def _metrics(self, stats: RewardStats) -> dict[str, float]:
        """Return what this recipe can measure, by the names of docs/metrics.md without their ``reward/``."""
        metrics: dict[str, float] = {}
        if self.kind != "none":
            metrics |= {"empty": float(stats.empty), "repetitive": float(stats.repetitive)}
            metrics["answer_seconds"] = stats.answer_seconds
            if self.recipe.rewards.answer.without_truth == "leave_out":
                metrics["without_truth"] = float(stats.without_truth)
        if self.kind in ("rules", "rules_then_judge"):
            metrics["unparsed"] = float(stats.unparsed)
        if self.kind in ("judge", "rules_then_judge"):
            metrics |= {
                "judge_asked": float(stats.asked),
                "judge_cached": float(stats.cached),
                "judge_unknown": float(stats.unknown),
            }
        if self.functions.functions:
            metrics["function_seconds"] = stats.function_seconds
        return metrics


def right_only(rewards: dict[str, float | None]) -> dict[str, float | None]:
    """Return the rewards with a s in place of the similarity s, where a is the answer reward; unknown if a is."""
    answer, similarity = rewards["answer"], rewards["similarity"]
    known = answer is not None and similarity is not None
    return {**rewards, "similarity": answer * similarity if known else None}  # type: ignore[operator]


def weighted_sum(rewards: dict[str, float | None], weights: dict[str, float]) -> float | None:
    """Return the sum of weight x reward, or None if a reward with a weight other than 0 is unknown."""
    total = 0.0
    for name, weight in weights.items():
        if weight == 0.0:
            continue
        reward = rewards[name]
        if reward is None:
            return None
        total += weight * reward
    return total
