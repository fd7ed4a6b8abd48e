"""Checks of the loop's settings: groups, rewards of a group, steps, and switches that do not go together."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from openril.recipe.problems import Problem, has_responses, in_loop
from openril.recipe.schema import OptimizerConfig, Recipe

_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
JUDGED_BENCHMARKS = ("mathvista_testmini_format", "mmvet", "mmvetv2")


def check_groups(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    """Check that every group can be filled and has responses to compare."""
    if not in_loop(stage):
        return
    train, names = recipe.train, recipe.teacher_names
    if train.num_teacher_responses is not None and train.num_teacher_responses < 0:
        reason = f"expected a number >= 0, got {train.num_teacher_responses}"
        yield Problem("train.num_teacher_responses", reason, "Leave it out to use train.num_generations")
        return
    count = recipe.teacher_responses_per_question
    if train.algorithm == "ril" and not names and not recipe.uses_discriminator:
        fix = "Add teachers, or set train.algorithm to dr_grpo or grpo"
        yield Problem("teachers", "ril puts teacher responses into every group, but there are no teachers", fix)
    if recipe.uses_discriminator and names and count == 0:
        fix = "Raise it, or use the algorithm dr_grpo or grpo"
        yield Problem("train.num_teacher_responses", "got 0, so the discriminator has nothing to compare with", fix)
    if names and count:
        each = -(-count // len(names))  # shares differ by at most one, so the largest is rounded up
        if each > recipe.collect.num_responses:
            reason = (
                f"a group needs up to {each} responses of one teacher, but collect.num_responses is "
                f"{recipe.collect.num_responses}, so some are used more than once"
            )
            fix = "Lower it, or raise collect.num_responses and collect more"
            yield Problem("train.num_teacher_responses", reason, fix, "warning")
        if train.num_teacher_responses is not None and not train.per_teacher and count < len(names):
            reason = f"got {count} for {len(names)} teachers, so some are absent from every group"
            yield Problem("train.num_teacher_responses", reason, "Raise it, or turn on train.per_teacher", "warning")
        if stage == "train" and not has_responses(recipe):
            reason = f"the loop needs teacher responses, but {recipe.cache_path} holds none"
            yield Problem("cache_dir", reason, "Run `ril collect` first")
    if not train.num_generations and (problem := _without_samples(recipe)):
        yield Problem(
            "train.num_generations", f"got 0, so that the student does not sample, but {problem}", "Use 1 or more"
        )
        return
    size = train.num_generations + (count if train.teacher_responses_in_update else 0)
    if size < 2:
        std = " (and a standard deviation of 0)" if train.algorithm == "grpo" else ""
        reason = f"a group of one response has advantage 0{std}"
        yield Problem("train.num_generations", reason, "Use at least 2")
    elif train.baseline == "students" and train.num_generations < 2:
        reason = "the mean of one sample is the sample, so that it has advantage 0 with train.baseline: students"
        yield Problem("train.num_generations", reason, "Use at least 2")


def _without_samples(recipe: Recipe) -> str:
    """Return why the loop needs the student's samples, or ""."""
    train = recipe.train
    if recipe.uses_discriminator:
        return "the discriminator learns from its samples"
    if train.retry.questions_per_step:
        return "train.retry asks about its samples"
    if not (recipe.teacher_responses_per_question and train.teacher_responses_in_update):
        return "no teacher responses take part in the update either"
    if train.baseline == "students":
        return "train.baseline: students is the mean of its samples"
    return ""


def check_loop(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    if not in_loop(stage):
        return
    train = recipe.train
    if train.questions_per_step % world_size:
        lower = train.questions_per_step // world_size * world_size
        near = " or ".join(str(n) for n in (lower, lower + world_size) if n)
        reason = f"expected a multiple of the {world_size} processes, got {train.questions_per_step}"
        yield Problem("train.questions_per_step", reason, f"Use for instance {near}")
    for tracker in train.log_to:
        if not any(importlib.util.find_spec(package) for package in _TRACKERS[tracker]):
            yield Problem("train.log_to", f"{tracker} is not installed", f'Run pip install "openril[{tracker}]"')
    if train.log_groups_every and not train.log_to:
        reason = f"got {train.log_groups_every}, but train.log_to names no tracker to log groups to"
        yield Problem("train.log_groups_every", reason, "Name one in train.log_to, or set it to 0")
    if train.eval_every and not recipe.data.validation and not train.eval_suite:
        reason = "it is set, but data.validation is empty"
        yield Problem("train.eval_every", reason, "List questions in data.validation, or set it to 0")
    if train.eval_suite:
        yield from _eval_suite(recipe)
    damped = train.negative_scale <= 0.5 or train.baseline != "group"  # docs/algorithm.md: either keeps the entropy
    if train.beta == 0 and train.algorithm in ("ril", "gail") and not damped:
        reason = "got 0, so no KL term keeps the student near its start (the paper's runs collapse, Table 5)"
        yield Problem("train.beta", reason, "The paper uses 0.01", "warning")
    yield from check_schedule(train.optimizer, "train.optimizer")


def _eval_suite(recipe: Recipe) -> Iterator[Problem]:
    key, asked = "train.eval_suite", recipe.train.eval_suite
    if not recipe.train.eval_every:
        yield Problem("train.eval_every", f"expected a number of steps for {key}, got 0", "Set it, or empty the list")
    if not recipe.eval.suite_max_tokens:
        reason = f"expected the most tokens of an answer for {key}, got 0 (some tasks allow 16384)"
        yield Problem("eval.suite_max_tokens", reason, "Set it, for instance to 256")
    if importlib.util.find_spec("lmms_eval") is None:
        yield Problem(key, "lmms-eval is not installed", 'Run pip install "openril[benchmarks]"')
    judged = [name for name in asked if name in JUDGED_BENCHMARKS]
    if judged and not recipe.judge.base_urls:
        local = ", and judge.model_path is not used here" if recipe.judge.model_path else ""
        reason = f"{', '.join(judged)} need a judge's server, and judge.base_urls is empty{local}"
        yield Problem(key, reason, "Set judge.base_urls, or leave them out")


def check_switches(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    """Check the switches that the paper does not have against each other, and that each has an effect."""
    if not in_loop(stage):
        return
    train, rewards, teachers = recipe.train, recipe.rewards, recipe.teacher_responses_per_question
    if train.teacher_draw == "judged_right":
        key, kind = "train.teacher_draw", rewards.answer.kind
        if not teachers:
            reason = "got judged_right, but no group has teacher responses"
            yield Problem(key, reason, "Leave it out, or use an algorithm with teacher responses", "warning")
        elif train.per_teacher:
            reason = "got judged_right, which pools the teachers, but train.per_teacher counts for each"
            yield Problem(key, reason, "Set one of them back, and train.num_teacher_responses to the number in all")
        elif kind != "rules" and stage == "run" and not recipe.collect.judge_responses:
            reason = "it is off, but train.teacher_draw: judged_right needs verdicts of cached responses"
            yield Problem("collect.judge_responses", reason, "Turn it on, or use rewards.answer.kind: rules")
        elif kind != "rules" and not recipe.judge.base_urls and not recipe.judge.model_path:
            reason = "got judged_right, but neither judge.base_urls nor judge.model_path says whose verdicts count"
            yield Problem(key, reason, "Set the judge that judged the cache, or use rewards.answer.kind: rules")
    if train.teacher_responses_below is not None:
        yield from _teacher_responses_below(recipe)
    if train.baseline == "none" and (train.algorithm == "grpo" or rewards.combine == "per_reward"):
        reason = "got none, but what is divided by a standard deviation has its mean subtracted"
        yield Problem("train.baseline", reason, "Set it to group, or leave train.algorithm: grpo and per_reward out")
    if not (teachers and train.teacher_responses_in_update):
        changed = {"teacher_advantages": "signed", "teacher_weight": "ratio", "baseline": "group"}
        for name, default in changed.items():
            if (value := getattr(train, name)) not in (default, "none"):
                reason = f"got {value}, which changes nothing without teacher responses in the update"
                yield Problem(f"train.{name}", reason, f"Leave it out, or at {default}", "warning")
    elif train.teacher_weight == "shaped" and not train.clip_teacher_upper:
        reason = "it is off, but train.teacher_weight: shaped has no ratio to clip"
        yield Problem("train.clip_teacher_upper", reason, "Leave it on, or set train.teacher_weight to ratio")
    if rewards.answer.without_truth == "leave_out" and recipe.answer_kind != "none":
        key = "rewards.answer.without_truth"
        if rewards.combine != "sum":
            reason = f"got leave_out, but rewards.combine: {rewards.combine} needs every reward of every response"
            yield Problem(key, reason, "Set rewards.combine to sum")
        others = [recipe.uses_discriminator and rewards.similarity.weight, *(f.weight for f in rewards.functions)]
        if not any(others):
            reason = "got leave_out, but no other reward has a weight, so that those questions teach nothing"
            yield Problem(key, reason, "Leave them out of data.train, or use a discriminator")
    similarity = recipe.uses_discriminator and rewards.similarity.weight != 0
    answer = recipe.answer_kind != "none" and rewards.answer.weight != 0
    if rewards.combine == "right_only" and not (similarity and answer):
        reason = f"got right_only, which needs both rewards, but {'similarity' if answer else 'answer'} is not in use"
        yield Problem("rewards.combine", reason, "Set it to sum, or give both rewards a weight")
    if rewards.combine == "per_reward" and similarity + answer + sum(f.weight != 0 for f in rewards.functions) == 1:
        reason = "got per_reward, but one reward is in use, which is only divided by its standard deviation"
        yield Problem("rewards.combine", reason, "Set it to sum, or add a reward", "warning")


def _teacher_responses_below(recipe: Recipe) -> Iterator[Problem]:
    train, key = recipe.train, "train.teacher_responses_below"
    value = f"got {train.teacher_responses_below:g}"
    if not (recipe.teacher_responses_per_question and train.teacher_responses_in_update):
        reason = f"{value}, which changes nothing without teacher responses in the update"
        yield Problem(key, reason, "Leave it out", "warning")
    elif not train.num_generations:
        yield Problem(key, f"{value}, but train.num_generations is 0: no sample can be right", "Leave it out")
    elif recipe.answer_kind == "none":
        reason = f"{value}, but no answer reward says which samples are right"
        yield Problem(key, reason, "Leave it out, or set rewards.answer.kind")


def check_schedule(optimizer: OptimizerConfig, key: str) -> Iterator[Problem]:
    if optimizer.schedule != "constant" and optimizer.final_learning_rate > optimizer.learning_rate:
        reason = "it is larger than learning_rate, so the rate would rise"
        yield Problem(f"{key}.final_learning_rate", reason, "Lower it", "warning")


LOOP_CHECKS = (check_groups, check_loop, check_switches)
