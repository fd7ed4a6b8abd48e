"""Checks that the settings of a recipe fit together, before anything is loaded or paid for.

``cross_check`` looks at the recipe, at files on this machine and at environment variables. It opens no model and no
connection, and this module does not import torch.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from openril.checkpoint_files import CheckpointError, check_folder
from openril.errors import RecipeError
from openril.recipe.export_checks import check_export
from openril.recipe.loop_checks import LOOP_CHECKS, check_schedule
from openril.recipe.problems import Problem, has_responses, in_loop
from openril.recipe.schema import DiscriminatorConfig, EndpointConfig, ModuleGroup, Recipe, RetryConfig
from openril.recipe.validation import nearest
from openril.records import STUDENT

Stage = Literal["sft", "collect", "select", "discriminator", "train", "eval", "run"]
STAGES: tuple[str, ...] = get_args(Stage)

ANSWER_RULES = ("auto", "exact", "choice", "number", "relaxed_number", "boolean", "contains")
"""Names of the answer rules that recipes and questions may use."""

QUESTION_FIELDS = ("id", "images", "question", "answer", "choices", "rule", "answers", "answer_index", "answer_number",
                   "context", "history", "videos", "audios")  # fmt: skip
"""Fields of a question that ``data.columns`` can map."""

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".gz")

_ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_FROM_HERE = "Correct the path; relative paths start at the current directory"


def cross_check(recipe: Recipe, stage: str, world_size: int = 1) -> list[Problem]:
    """Return everything in ``recipe`` that would make ``stage`` fail or waste its work.

    Args:
        stage: sft, collect, select, discriminator, train, eval, or run (all of them in order, so that no file that an
            earlier stage writes has to exist yet).
        world_size: Number of training processes.

    Raises:
        RecipeError: For an unknown stage.
    """
    if stage not in STAGES:
        raise RecipeError(f"stage: expected one of {', '.join(STAGES)}, got {stage!r}.")
    checks = (_folders, _data, _student, _teachers, _judge, _sft, _collection, _discriminator, _rewards, _retries)
    return [problem for check in (*checks, *LOOP_CHECKS, check_export) for problem in check(recipe, stage, world_size)]


def require(recipe: Recipe, stage: str, world_size: int = 1) -> list[Problem]:
    """Raise RecipeError with all errors that ``cross_check`` finds, or return its warnings."""
    problems = cross_check(recipe, stage, world_size)
    errors = [str(p) for p in problems if p.level == "error"]
    if errors:
        raise RecipeError("\n".join(errors))
    return problems


def collects_all(recipe: Recipe) -> bool:
    """Return whether ``ril run`` needs responses of every source in the cache."""
    pretrains = recipe.uses_discriminator and recipe.discriminator.pretraining.enabled
    trains_on_text = recipe.sft.enabled and recipe.sft.targets != "answers"
    shown = bool(recipe.teacher_responses_per_question) or recipe.shows_teacher_answers
    return shown or pretrains or trains_on_text


def filters_overlong(recipe: Recipe) -> bool:
    """Return whether questions are selected by the student's responses, so that the selection has two parts."""
    return recipe.data.selection.enabled and recipe.data.selection.drop_overlong


def collects_student_last(recipe: Recipe) -> bool:
    """Return whether the student's responses are collected after a warm start on those of the teachers."""
    warmed = recipe.sft.enabled and recipe.sft.targets != "answers"
    return recipe.collect.student_after_sft and recipe.collect.student and warmed


def _unknown(key: str, what: str, word: str, choices: Sequence[str]) -> Problem:
    match = nearest(word, choices)
    fix = f"Did you mean {match}? Choices: " if match else "Choices: "
    return Problem(key, f"expected {what}, got {word!r}", fix + (", ".join(choices) or "none"))


def _folders(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    if not recipe.run_dir:
        yield Problem(
            "run_dir", "expected a folder, got nothing", "Name a folder for the results, for instance runs/mine"
        )
    for key, path in (("run_dir", recipe.run_path), ("cache_dir", recipe.cache_path)):
        if path.exists() and not path.is_dir():
            yield Problem(key, f"expected a folder, but {path} is a file", "Name a folder")


def _data(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    data = recipe.data
    if stage != "eval" and not data.train:
        fix = "List question files, `datasets` folders or hub names"
        yield Problem("data.train", "expected questions, got an empty list", fix)
    if stage == "eval" and not data.validation:
        reason = "expected the questions that `ril eval` scores, got an empty list"
        yield Problem("data.validation", reason, "List question files")
    validates = stage in ("eval", "run") or (stage == "train" and recipe.train.eval_every > 0)
    read = [("data.train", data.train)] if stage != "eval" else []
    read += [("data.validation", data.validation)] if validates else []
    for key, names in read:
        for name in names:
            path = Path(name).expanduser()
            if not re.search(r"[*?\[]", name) and path.suffix in DATA_SUFFIXES and not path.exists():
                yield Problem(key, f"no such file: {path.resolve()}", _FROM_HERE)
    both = {n for n in data.train if n in data.validation}
    if data.split != data.validation_split:  # then a folder or hub name means two different splits
        both = {n for n in both if Path(n).suffix in DATA_SUFFIXES}
    if both:
        reason = f"these are also in data.train: {', '.join(sorted(both))}"
        fix = "Keep validation questions out of training, or their score means nothing"
        yield Problem("data.validation", reason, fix, "warning")
    for field in data.columns:
        if field not in QUESTION_FIELDS:
            yield _unknown(f"data.columns.{field}", "a field of a question", field, QUESTION_FIELDS)
    if (data.selection.enabled and in_loop(stage)) or stage == "select":
        key = "data.selection.drop_overlong"
        if data.selection.drop_overlong and not recipe.collect.student:
            reason = "it needs cached student responses, and collect.student is off"
            yield Problem(key, reason, "Set collect.student to true, or drop_overlong to false")
        if data.selection.drop_overlong and recipe.collect.max_completion_length != recipe.train.max_completion_length:
            reason = (
                f"it counts responses cut at collect.max_completion_length ({recipe.collect.max_completion_length}), "
                f"but the loop cuts at train.max_completion_length ({recipe.train.max_completion_length})"
            )
            yield Problem(key, reason, "Set both to the same value", "warning")
        if data.selection.reference and data.selection.reference in (recipe.student.model, recipe.collected_student):
            fix = "Name a larger model, or leave it empty to use the student alone"
            yield Problem("data.selection.reference", "it is the student itself, so every score is 0", fix)
        elif data.selection.reference:
            yield from _checkpoint("data.selection.reference", data.selection.reference)


def _checkpoint(key: str, name: str, *, fix: str = "", reason: str = "", trained: bool = True) -> Iterator[Problem]:
    """Yield why ``name`` cannot be a checkpoint on this machine, unless it can be one (or a hub name).

    Args:
        reason: Words before the cause.
        fix: What to do where the folder does not exist.
    """
    try:
        check_folder(name, trained=trained)
    except CheckpointError as e:
        missing = fix and not Path(name).exists()
        yield Problem(key, reason + e.reason, fix if missing else e.fix)


def _student(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    student = recipe.student
    uses = stage != "collect" or recipe.collect.student
    if uses and not student.model:
        yield Problem("student.model", "expected a model, got nothing", "Name a checkpoint folder or a hub model")
    elif uses:
        yield from _checkpoint("student.model", student.model)
    # SFT on cached text comes after the collection, which then uses the student as it is.
    after_sft = ("discriminator", "train", *(["select", "collect"] if recipe.sft.targets == "answers" else []))
    if recipe.sft.enabled and uses and stage in after_sft:
        reason, fix = "this stage starts from the SFT student, but ", "Run `ril sft` first, or turn it off"
        yield from _checkpoint("sft.enabled", str(recipe.sft_student_path), reason=reason, fix=fix)
    name = student.attn_implementation
    if (package := _ATTENTION_PACKAGES.get(name)) and not importlib.util.find_spec(package):
        reason = f"{name} needs the package {package.replace('_', '-')}, which is not installed"
        yield Problem("student.attn_implementation", reason, "Install it, or use sdpa")
    if package and recipe.train.precision == "float32" and stage in ("discriminator", "train", "run"):
        reason = f"{name} works with 16-bit numbers only, but train.precision is float32"
        yield Problem("student.attn_implementation", reason, "Use sdpa, or another precision")
    if student.sampler.engine == "vllm" and uses and stage in ("collect", "train", "eval", "run"):
        if student.sampler.base_urls:
            yield from _endpoint(student.sampler.endpoint, "student.sampler", True)
        else:
            fix = "Start `vllm serve` for the student (docs/vllm.md) and list it, or use engine: transformers"
            yield Problem("student.sampler.base_urls", "expected servers for the engine vllm, got an empty list", fix)
        if student.sampler.sync == "adapter" and not student.lora.enabled and stage in ("train", "run"):
            fix = "Turn student.lora on, or use sync: file"
            yield Problem("student.sampler.sync", "expected student.lora with adapter, but it is not enabled", fix)
    if student.min_pixels and student.max_pixels and student.min_pixels > student.max_pixels:
        reason = f"expected at most student.max_pixels ({student.max_pixels}), got {student.min_pixels}"
        yield Problem("student.min_pixels", reason, "Lower it, or raise student.max_pixels")
    if stage in ("sft", "train", "run"):
        if student.lora.enabled and not student.lora.target_modules:
            reason = "expected linear layers, got an empty list, so nothing would train"
            yield Problem("student.lora.target_modules", reason, "Name the linear layers that get adapters")
        if not student.lora.enabled and set(student.freeze) == set(get_args(ModuleGroup)):
            yield Problem("student.freeze", "it names every part, so nothing would train", "Remove a part from it")


def _endpoint(endpoint: EndpointConfig, key: str, calls: bool) -> Iterator[Problem]:
    """Check a server or local model. ``calls``: the stage sends it requests, so it has to be set."""
    if endpoint.base_urls and endpoint.model_path:
        yield Problem(f"{key}.model_path", "base_urls is set too", "Keep one of them: servers, or a local checkpoint")
    for url in endpoint.base_urls:
        if not re.match(r"^https?://[^/]+", url):
            reason = f"expected an http(s) address, got {url!r}"
            yield Problem(f"{key}.base_urls", reason, "Write for instance http://127.0.0.1:8000/v1")
    if not calls:
        return
    if endpoint.base_urls and not endpoint.model:
        yield Problem(f"{key}.model", "expected a model name, got nothing", "Write the name that the servers know")
    if not endpoint.base_urls and not endpoint.model_path:
        yield Problem(key, "neither base_urls nor model_path is set", "Set base_urls and model, or model_path")
    if endpoint.model_path and not endpoint.base_urls:
        yield from _checkpoint(f"{key}.model_path", endpoint.model_path, trained=key != "judge")
    if endpoint.base_urls and endpoint.api_key_env and not os.environ.get(endpoint.api_key_env):
        name = endpoint.api_key_env
        yield Problem(f"{key}.api_key_env", f"environment variable {name} is not set", f"Run export {name}=... first")


def _teachers(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    seen: set[str] = set()
    for i, teacher in enumerate(recipe.teachers):
        key = f"teachers.{i}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", teacher.name):
            reason = f"expected a short name, got {repr(teacher.name) if teacher.name else 'nothing'}"
            yield Problem(f"{key}.name", reason, "Use letters, digits and . _ -")
        elif teacher.name == STUDENT:
            reason = "'student' is reserved for the student's own responses"
            yield Problem(f"{key}.name", reason, "Choose another name")
        elif teacher.name in seen:
            yield Problem(f"{key}.name", f"{teacher.name!r} is used twice", "Give every teacher a different name")
        seen.add(teacher.name)
        yield from _endpoint(teacher, key, calls=stage == "collect" or (stage == "run" and collects_all(recipe)))
    names = [t.name for t in recipe.teachers]
    for name in recipe.train.teachers:
        if name not in names:
            yield _unknown("train.teachers", "the name of a teacher", name, names)
    for name in recipe.sft.sources:
        if name not in (*names, STUDENT):
            yield _unknown("sft.sources", "the name of a teacher", name, [*names, STUDENT])


def _judge(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    needed_by = ""
    if in_loop(stage) and recipe.answer_kind in ("judge", "rules_then_judge"):
        needed_by = f"rewards.answer.kind is {recipe.answer_kind}"
    elif stage in ("eval", "run") and recipe.data.validation and recipe.eval.score in ("judge", "rules_then_judge"):
        needed_by = f"eval.score is {recipe.eval.score}"
    elif stage in ("collect", "run") and recipe.collect.judge_responses:
        needed_by = "collect.judge_responses is on" if recipe.answer_kind in ("judge", "rules_then_judge") else ""
    if needed_by and not recipe.judge.base_urls and not recipe.judge.model_path:
        fix = "Set judge.base_urls and judge.model, or judge.model_path, or use rules"
        yield Problem("judge", f"{needed_by}, but neither base_urls nor model_path is set", fix)
    else:
        yield from _endpoint(recipe.judge, "judge", calls=bool(needed_by))


def _sft(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    sft = recipe.sft
    if not (stage == "sft" or (stage == "run" and sft.enabled)):
        return
    if sft.targets != "answers":
        if not recipe.teachers and STUDENT not in sft.sources:
            reason = f"got {sft.targets}, but the recipe has no teachers"
            yield Problem("sft.targets", reason, "Add teachers, or set sft.targets to answers")
        if stage == "sft" and not has_responses(recipe):
            reason = f"got {sft.targets}, but {recipe.cache_path} holds no responses"
            yield Problem("sft.targets", reason, "Run `ril collect` first")
        if sft.targets == "judged_responses" and recipe.rewards.answer.kind == "none":
            reason = "got none, so no response can be judged right"
            yield Problem("rewards.answer.kind", reason, "Set it to judge, rules or rules_then_judge")
    share, rest = divmod(sft.batch_size, world_size)
    if rest or share % min(sft.micro_batch_size, share):
        reason = f"expected a multiple of micro_batch_size ({sft.micro_batch_size}) x processes ({world_size}), "
        yield Problem("sft.batch_size", f"{reason}got {sft.batch_size}", "Change one of them")
    yield from check_schedule(sft.optimizer, "sft.optimizer")


def _collection(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    if stage == "collect" and not recipe.teachers and not recipe.collect.student:
        reason = "there are no teachers and collect.student is off"
        yield Problem("collect", reason, "Add teachers, or turn collect.student on")
    if not recipe.collect.student_after_sft or stage == "eval":
        return
    key = "collect.student_after_sft"
    if not collects_student_last(recipe):
        reason = "it needs collect.student and a warm start on cached text, so that nothing changes"
        yield Problem(key, reason, "Turn it off, or set sft.targets to teacher_responses", "warning")
    elif STUDENT in recipe.sft.sources:
        yield Problem(key, "sft.sources names the student, whose responses come after", "Name teachers alone")
    elif recipe.data.selection.enabled:
        reason = "data.selection is enabled, and selects by the student before the warm start"
        yield Problem(key, reason, "Turn one of them off")


def _discriminator(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    enabled = recipe.discriminator.pretraining.enabled
    pretrains = stage == "discriminator" or (stage == "run" and recipe.uses_discriminator and enabled)
    needed = pretrains or (in_loop(stage) and recipe.uses_discriminator)
    if not needed:
        return
    d = recipe.discriminator
    if not recipe.teacher_names:
        reason = "the discriminator needs teacher responses, but there are no teachers"
        yield Problem("teachers", reason, "Add teachers")
    if d.at_chance_accuracy >= d.saturated_accuracy:
        reason = f"expected less than saturated_accuracy ({d.saturated_accuracy:g}), got {d.at_chance_accuracy:g}"
        yield Problem("discriminator.at_chance_accuracy", reason, "Use for instance 0.55 and 0.98")
    if d.mode == "fixed":
        names = ("replay", "num_iterations", "update_below", "ema_decay")
        for name in (n for n in names if getattr(d, n) != DiscriminatorConfig.model_fields[n].default):
            reason = "it is set, but a fixed discriminator does not train in the loop"
            yield Problem(f"discriminator.{name}", reason, "Remove it, or set discriminator.mode to updated", "warning")
    if d.gradient_penalty:
        key, one = "discriminator.gradient_penalty", "it needs second derivatives, which "
        if recipe.train.shard and world_size > 1:
            yield Problem(key, f"{one}sharded weights do not have", "Set it to 0, or train.shard to false")
        if recipe.student.gradient_checkpointing:
            fix = "Set it to 0, or student.gradient_checkpointing to false"
            yield Problem(key, f"{one}checkpointed layers do not have", fix)
        if recipe.student.attn_implementation not in ("sdpa", "eager"):
            reason = f"{one}{recipe.student.attn_implementation} does not have"
            yield Problem(key, reason, "Set it to 0, or student.attn_implementation to sdpa")
    if d.init:
        yield from _checkpoint("discriminator.init", d.init)
    if set(d.freeze) == set(get_args(ModuleGroup)):
        reason = "it names every part, so only the head trains"
        yield Problem("discriminator.freeze", reason, "Remove a part from it", "warning")
    if pretrains:
        n = recipe.collect.num_responses
        if not recipe.collect.student:
            reason = "it is off, but pre-training of the discriminator needs student responses"
            usable = stage == "discriminator" and has_responses(recipe)
            yield Problem("collect.student", reason, "Turn it on", "warning" if usable else "error")
        if d.pretraining.responses_per_question > n:
            reason = f"expected at most collect.num_responses ({n}), got {d.pretraining.responses_per_question}"
            fix = "Lower it, or raise collect.num_responses"
            yield Problem("discriminator.pretraining.responses_per_question", reason, fix)
        if recipe.train.num_generations > n and stage == "run":
            reason = (
                f"pre-training uses {n} student responses per question, but the loop {recipe.train.num_generations}"
            )
            fix = "Raise it to train.num_generations, so that both train on the same number"
            yield Problem("collect.num_responses", reason, fix, "warning")
        if d.pretraining.questions_per_step % world_size:
            key = "discriminator.pretraining.questions_per_step"
            reason = f"expected a multiple of the {world_size} processes, got {d.pretraining.questions_per_step}"
            yield Problem(key, reason, f"Use a multiple of {world_size}")
        yield from check_schedule(d.pretraining.optimizer, "discriminator.pretraining.optimizer")
    if stage == "discriminator" and not has_responses(recipe):
        yield Problem("cache_dir", f"{recipe.cache_path} holds no responses", "Run `ril collect` first")
    if in_loop(stage) and not enabled and d.mode == "fixed":
        reason = "it is off, so a fixed discriminator would never be trained"
        fix = "Turn it on, or set discriminator.mode to updated"
        yield Problem("discriminator.pretraining.enabled", reason, fix)
    if stage == "train" and enabled:
        reason, fix = f"got {d.mode}, but ", "Run `ril discriminator` first"
        yield from _checkpoint("discriminator.mode", str(recipe.discriminator_path), reason=reason, fix=fix)


def _retries(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    """Check the questions about answers that the student failed."""
    retry, key = recipe.train.retry, "train.retry.questions_per_step"
    if not in_loop(stage):
        return
    if not retry.questions_per_step:
        if retry != RetryConfig():
            reason = "it is 0, so that the other settings of train.retry change nothing"
            yield Problem(key, reason, "Set for instance 4, or remove them", "warning")
        return
    if retry.questions_per_step % world_size:
        reason = f"expected a multiple of the {world_size} processes, got {retry.questions_per_step}"
        yield Problem(key, reason, f"Use a multiple of {world_size}")
    if recipe.uses_discriminator:
        reason = "groups that are asked again have no teacher responses, which the discriminator needs"
        yield Problem(key, reason, "Set it to 0, or discriminator.mode to none and rewards.similarity.weight to 0")
    if recipe.answer_kind == "none" or recipe.rewards.answer.weight == 0:
        reason = "it asks again what was answered wrong, but no answer reward is in use"
        yield Problem(key, reason, "Set it to 0, or give rewards.answer a kind and a weight")
    if not recipe.shows_teacher_answers:
        return
    if not recipe.teacher_names:
        reason = "compare shows right answers of teachers, but there are no teachers"
        yield Problem("train.retry.forms", reason, "Add teachers, or use the forms again and plain alone")
    elif stage == "train" and not has_responses(recipe):
        reason = f"train.retry shows teacher responses, but {recipe.cache_path} holds none"
        yield Problem("cache_dir", reason, "Run `ril collect` first")
    if stage == "run" and recipe.rewards.answer.kind != "rules" and not recipe.collect.judge_responses:
        reason = "it is off, but the form compare of train.retry needs verdicts of cached responses"
        yield Problem("collect.judge_responses", reason, "Turn it on, or use rewards.answer.kind: rules")


def _rewards(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    rules = [("eval.rule", recipe.eval.rule)] if stage in ("eval", "run") else []
    rules += [("rewards.answer.rule", recipe.rewards.answer.rule)] if stage != "eval" else []
    for key, rule in rules:
        if rule not in ANSWER_RULES:
            yield _unknown(key, "an answer rule", rule, ANSWER_RULES)
    if not in_loop(stage):
        return
    rewards, algorithm = recipe.rewards, recipe.train.algorithm
    needs_similarity = algorithm in ("ril", "gail") and rewards.similarity.weight != 0
    if needs_similarity and recipe.discriminator.mode == "none":
        fix = "Set it to updated or fixed" + ("" if algorithm == "gail" else ", or rewards.similarity.weight to 0")
        yield Problem("discriminator.mode", "got none, but the similarity reward needs a discriminator", fix)
    weighted = [recipe.uses_discriminator and rewards.similarity.weight != 0]
    weighted += [recipe.answer_kind != "none" and rewards.answer.weight != 0]
    weighted += [f.weight != 0 for f in rewards.functions]
    gate = rewards.similarity.gate
    if gate.closed_below >= gate.open_above:
        reason = f"expected less than open_above ({gate.open_above:g}), got {gate.closed_below:g}"
        yield Problem("rewards.similarity.gate.closed_below", reason, "Use for instance 0.55 and 0.7")
    if gate.enabled and not weighted[0]:
        reason = "it is on, but there is no similarity reward with a weight"
        yield Problem("rewards.similarity.gate.enabled", reason, "Turn it off, or give the reward a weight", "warning")
    if not any(weighted) and not (needs_similarity and recipe.discriminator.mode == "none"):
        reason = "no reward in use has a weight other than 0, so there is nothing to learn"
        yield Problem("rewards", reason, "Give one a weight")
    for i, f in enumerate(rewards.functions):
        place, colon, name = f.function.rpartition(":")
        key = f"rewards.functions.{i}.function"
        if not colon or not place or not name.isidentifier():
            fix = "Write package.module:name or path/to/file.py:name"
            yield Problem(key, f"expected the location of a function, got {f.function!r}", fix)
        elif place.endswith(".py") and not Path(place).expanduser().is_file():
            yield Problem(key, f"no such file: {Path(place).resolve()}", _FROM_HERE)
