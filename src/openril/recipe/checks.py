"""Whether a recipe's settings fit together, before anything is loaded or paid for. Imports no torch.

``cross_check`` looks at the recipe, at what lies on this disk and at the environment; it opens no model and no socket.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from openril.errors import RecipeError
from openril.recipe.loading import nearest
from openril.recipe.schema import EndpointConfig, ModuleGroup, OptimizerConfig, Recipe
from openril.records import STUDENT

Stage = Literal["sft", "collect", "select", "discriminator", "train", "eval", "run"]
STAGES: tuple[str, ...] = get_args(Stage)

ANSWER_RULES = ("auto", "exact", "choice", "number", "relaxed_number", "boolean", "contains")
"""Names of the answer rules that recipes and questions may ask for."""

QUESTION_FIELDS = ("id", "images", "question", "answer", "choices", "rule")
"""Fields of a question that ``data.columns`` can map."""

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")

_ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


@dataclass(frozen=True)
class Problem:
    """Something that does not fit. key: dotted setting. level: "error" stops the stage, "warning" is only said."""

    key: str
    reason: str
    fix: str
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}; {self.fix}"


def cross_check(recipe: Recipe, stage: str, world_size: int = 1) -> list[Problem]:
    """Everything in ``recipe`` that would make ``stage`` fail or waste its work.

    stage: sft, collect, select, discriminator, train, eval, or run (all in order: nothing has to be there yet).
    world_size: number of training processes. Raises RecipeError for an unknown stage.
    """
    if stage not in STAGES:
        raise RecipeError(f"unknown stage {stage!r}; one of {', '.join(STAGES)} is wanted")
    checks = (_folders, _data, _student, _teachers, _judge, _sft, _collection, _discriminator, _rewards, _groups, _loop)
    return [problem for check in checks for problem in check(recipe, stage, world_size)]


def require(recipe: Recipe, stage: str, world_size: int = 1) -> list[Problem]:
    """Raise RecipeError with all errors that ``cross_check`` finds; returns the warnings."""
    problems = cross_check(recipe, stage, world_size)
    errors = [str(p) for p in problems if p.level == "error"]
    if errors:
        raise RecipeError("\n".join(errors))
    return problems


def _loop_in(stage: str) -> bool:
    return stage in ("train", "run")


def _collects(recipe: Recipe) -> bool:
    """Whether ``ril run`` needs responses in the cache."""
    pretrains = recipe.uses_discriminator and recipe.discriminator.pretraining.enabled
    learns_text = recipe.sft.enabled and recipe.sft.targets != "answers"
    filters = recipe.data.selection.enabled and recipe.data.selection.drop_overlong
    return bool(recipe.teacher_responses_per_question) or pretrains or learns_text or filters


def _suggest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    match = nearest(word, choices)
    listed = ", ".join(choices) or "none"
    return f"did you mean {match}? There are: {listed}" if match else f"there are: {listed}"


def _folders(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    if not recipe.run_dir:
        yield Problem(
            "run_dir", "is empty", "name the folder that holds what this recipe makes, for instance runs/mine"
        )
    for key, path in (("run_dir", recipe.run_path), ("cache_dir", recipe.cache_path)):
        if path.exists() and not path.is_dir():
            yield Problem(key, f"{path} is a file", "name a folder")


def _data(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    data = recipe.data
    if stage != "eval" and not data.train:
        yield Problem("data.train", "is empty", "list question files, datasets folders or hub names")
    if stage == "eval" and not data.validation:
        yield Problem("data.validation", "is empty, and `ril eval` scores these questions", "list question files there")
    validates = stage in ("eval", "run") or (stage == "train" and recipe.train.eval_every > 0)
    read = [("data.train", data.train)] if stage != "eval" else []
    read += [("data.validation", data.validation)] if validates else []
    for key, names in read:
        for name in names:
            path = Path(name).expanduser()
            if not re.search(r"[*?\[]", name) and path.suffix in DATA_SUFFIXES and not path.exists():
                yield Problem(
                    key, f"no such file: {path.resolve()}", "paths count from the current directory; correct it"
                )
    both = {n for n in data.train if n in data.validation}
    if data.split != data.validation_split:  # then folders and hub names stand for two different things
        both = {n for n in both if Path(n).suffix in DATA_SUFFIXES}
    if both:
        fix = "keep validation questions out of training, or the score says nothing"
        yield Problem("data.validation", f"also in data.train: {', '.join(sorted(both))}", fix, "warning")
    for field in data.columns:
        if field not in QUESTION_FIELDS:
            yield Problem(f"data.columns.{field}", "is no field of a question", _suggest(field, QUESTION_FIELDS))
    if (data.selection.enabled and _loop_in(stage)) or stage == "select":
        if stage == "select" and data.selection.drop_overlong and not _cached(recipe):
            reason = f"looks at cached student responses, and {recipe.cache_path} holds none"
            yield Problem("data.selection.drop_overlong", reason, "run `ril collect` first, or turn it off")
        if data.selection.drop_overlong and not recipe.collect.student:
            yield Problem(
                "data.selection.drop_overlong",
                "looks at cached student responses, and collect.student is off",
                "set collect.student to true, or drop_overlong to false",
            )
        if data.selection.drop_overlong and recipe.collect.max_completion_length != recipe.train.max_completion_length:
            yield Problem(
                "data.selection.drop_overlong",
                f"counts responses cut at collect.max_completion_length ({recipe.collect.max_completion_length}), "
                f"while the loop cuts at train.max_completion_length ({recipe.train.max_completion_length})",
                "make them equal",
                "warning",
            )
        if data.selection.reference and data.selection.reference in (recipe.student.model, recipe.start_student):
            fix = "name a larger model, or leave it empty to use the student alone"
            yield Problem("data.selection.reference", "is the student itself, so every score is 0", fix)


def _missing_checkpoint(name: str) -> str | None:
    """Why ``name`` cannot be a checkpoint, judged from this disk alone; None when it may be one (or a hub name)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return None if (path / "config.json").is_file() else f"{path} holds no config.json"
    if path.is_file():
        return f"{path} is a file, not a checkpoint folder"
    looks_local = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or "\\" in name
    return f"no such folder: {path.resolve()}" if looks_local else None


def _student(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    student = recipe.student
    uses = stage != "collect" or recipe.collect.student
    if uses and not student.model:
        yield Problem("student.model", "is empty", "name a checkpoint folder or a hub model")
    elif uses and (why := _missing_checkpoint(student.model)):
        yield Problem("student.model", why, "correct the path (it counts from the current directory)")
    # SFT on cached text comes after the collection, which then uses the student as it is.
    after_sft = ("select", "discriminator", "train", *(["collect"] if recipe.sft.targets == "answers" else []))
    if recipe.sft.enabled and uses and stage in after_sft:
        why = _missing_checkpoint(str(recipe.sft_student_path))
        if why:
            yield Problem(
                "sft.enabled",
                f"this stage starts from the SFT student, but {why}",
                "run `ril sft` first, or turn it off",
            )
    name = student.attn_implementation
    if (package := _ATTENTION_PACKAGES.get(name)) and not importlib.util.find_spec(package):
        reason = f"{name} needs the package {package.replace('_', '-')}, which is not installed"
        yield Problem("student.attn_implementation", reason, "install it, or use sdpa")
    if package and recipe.train.precision == "float32" and stage in ("discriminator", "train", "run"):
        reason = f"{name} takes 16-bit numbers only, but train.precision is float32"
        yield Problem("student.attn_implementation", reason, "use sdpa, or another precision")
    if student.min_pixels and student.max_pixels and student.min_pixels > student.max_pixels:
        yield Problem("student.min_pixels", "is larger than student.max_pixels", "exchange them")
    if stage in ("sft", "train", "run"):
        if student.lora.enabled and not student.lora.target_modules:
            yield Problem("student.lora.target_modules", "is empty, so nothing would train", "name linear layers")
        if not student.lora.enabled and set(student.freeze) == set(get_args(ModuleGroup)):
            yield Problem("student.freeze", "names every part, so nothing would train", "leave some part out")


def _endpoint(endpoint: EndpointConfig, key: str, calls: bool) -> Iterator[Problem]:
    """calls: this stage asks the endpoint something, so it has to be set."""
    if endpoint.base_urls and endpoint.model_path:
        yield Problem(f"{key}.model_path", "is set beside base_urls", "keep one: servers, or a local checkpoint")
    for url in endpoint.base_urls:
        if not re.match(r"^https?://[^/]+", url):
            yield Problem(
                f"{key}.base_urls", f"{url!r} is no http(s) address", "write for instance http://127.0.0.1:8000/v1"
            )
    if not calls:
        return
    if endpoint.base_urls and not endpoint.model:
        yield Problem(f"{key}.model", "is empty", "write the model name that the servers know")
    if not endpoint.base_urls and not endpoint.model_path:
        yield Problem(key, "has neither base_urls nor model_path", "set base_urls and model, or model_path")
    if endpoint.model_path and not endpoint.base_urls and (why := _missing_checkpoint(endpoint.model_path)):
        yield Problem(f"{key}.model_path", why, "correct the path (it counts from the current directory)")
    if endpoint.base_urls and endpoint.api_key_env and not os.environ.get(endpoint.api_key_env):
        name = endpoint.api_key_env
        yield Problem(f"{key}.api_key_env", f"environment variable {name} is not set", f"export {name}=... first")


def _teachers(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    seen: set[str] = set()
    for i, teacher in enumerate(recipe.teachers):
        key = f"teachers.{i}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", teacher.name):
            shown = repr(teacher.name) if teacher.name else "is empty"
            yield Problem(f"{key}.name", f"{shown}: a teacher needs a short name", "use letters, digits and . _ -")
        elif teacher.name == STUDENT:
            yield Problem(f"{key}.name", "'student' is reserved for the student's own responses", "choose another name")
        elif teacher.name in seen:
            yield Problem(f"{key}.name", f"{teacher.name!r} is used twice", "give every teacher a name of its own")
        seen.add(teacher.name)
        yield from _endpoint(teacher, key, calls=stage == "collect" or (stage == "run" and _collects(recipe)))
    names = [t.name for t in recipe.teachers]
    for name in recipe.train.teachers:
        if name not in names:
            yield Problem("train.teachers", f"no teacher is named {name!r}", _suggest(name, names))
    for name in recipe.sft.sources:
        if name not in (*names, STUDENT):
            yield Problem("sft.sources", f"no teacher is named {name!r}", _suggest(name, [*names, STUDENT]))


def _judge(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    wanted_by = ""
    if _loop_in(stage) and recipe.answer_kind in ("judge", "rules_then_judge"):
        wanted_by = f"rewards.answer.kind is {recipe.answer_kind}"
    elif stage in ("eval", "run") and recipe.data.validation and recipe.eval.score in ("judge", "rules_then_judge"):
        wanted_by = f"eval.score is {recipe.eval.score}"
    elif stage in ("collect", "run") and recipe.collect.judge_responses:
        wanted_by = "collect.judge_responses is on" if recipe.answer_kind in ("judge", "rules_then_judge") else ""
    if wanted_by and not recipe.judge.base_urls and not recipe.judge.model_path:
        fix = "set judge.base_urls and judge.model, or judge.model_path, or use rules"
        yield Problem("judge", f"{wanted_by}, but the judge has neither base_urls nor model_path", fix)
    else:
        yield from _endpoint(recipe.judge, "judge", calls=bool(wanted_by))


def _cached(recipe: Recipe) -> bool:
    return next(recipe.cache_path.rglob("*.parquet"), None) is not None if recipe.cache_path.is_dir() else False


def _sft(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    sft = recipe.sft
    if not (stage == "sft" or (stage == "run" and sft.enabled)):
        return
    if sft.targets != "answers":
        if not recipe.teachers and STUDENT not in sft.sources:
            yield Problem(
                "sft.targets",
                f"is {sft.targets}, but the recipe has no teachers",
                "add teachers, or set sft.targets to answers",
            )
        if stage == "sft" and not _cached(recipe):
            yield Problem(
                "sft.targets",
                f"is {sft.targets}, but {recipe.cache_path} holds no responses",
                "run `ril collect` first",
            )
        if sft.targets == "judged_responses" and recipe.rewards.answer.kind == "none":
            fix = "set it to judge, rules or rules_then_judge"
            yield Problem("rewards.answer.kind", "is none, so no response can be judged right", fix)
    share, rest = divmod(sft.batch_size, world_size)
    if rest or share % min(sft.micro_batch_size, share):
        fix = f"make it a multiple of micro_batch_size ({sft.micro_batch_size}) x processes ({world_size})"
        yield Problem("sft.batch_size", f"{sft.batch_size} cannot be divided over processes and micro batches", fix)
    yield from _schedule(sft.optimizer, "sft.optimizer")


def _schedule(optimizer: OptimizerConfig, key: str) -> Iterator[Problem]:
    if optimizer.schedule != "constant" and optimizer.final_learning_rate > optimizer.learning_rate:
        yield Problem(
            f"{key}.final_learning_rate", "is above learning_rate", "the rate would rise; lower it", "warning"
        )


def _collection(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    if stage == "collect" and not recipe.teachers and not recipe.collect.student:
        yield Problem("collect", "there are no teachers and collect.student is off", "add teachers, or turn it on")


def _discriminator(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    enabled = recipe.discriminator.pretraining.enabled
    pretrains = stage == "discriminator" or (stage == "run" and recipe.uses_discriminator and enabled)
    needed = pretrains or (_loop_in(stage) and recipe.uses_discriminator)
    if not needed:
        return
    d = recipe.discriminator
    if not recipe.teacher_names:
        yield Problem(
            "teachers", "the discriminator needs teacher responses, and there are no teachers", "add teachers"
        )
    if d.at_chance_accuracy >= d.saturated_accuracy:
        yield Problem(
            "discriminator.at_chance_accuracy", "is not below saturated_accuracy", "for instance 0.55 and 0.98"
        )
    if d.replay and d.mode == "fixed":
        reason = "is set, but a fixed discriminator does not learn in the loop"
        yield Problem("discriminator.replay", reason, "set it to 0, or discriminator.mode to updated", "warning")
    if d.init and (why := _missing_checkpoint(d.init)):
        yield Problem("discriminator.init", why, "correct the path (it counts from the current directory)")
    if set(d.freeze) == set(get_args(ModuleGroup)):
        yield Problem(
            "discriminator.freeze", "names every part: only the head trains", "leave some part out", "warning"
        )
    if pretrains:
        n = recipe.collect.num_responses
        if not recipe.collect.student:
            yield Problem(
                "collect.student",
                "is off, but the discriminator's pre-training needs student responses",
                "turn it on",
                "warning" if stage == "discriminator" and _cached(recipe) else "error",
            )
        if d.pretraining.responses_per_question > n:
            fix = "lower it, or raise collect.num_responses"
            key = "discriminator.pretraining.responses_per_question"
            yield Problem(key, f"{d.pretraining.responses_per_question} are wanted of {n} collected", fix)
        if recipe.train.num_generations > n and stage == "run":
            yield Problem(
                "collect.num_responses",
                f"pre-training sees {n} student responses a question, the loop train.num_generations = "
                f"{recipe.train.num_generations}",
                "raise it so that the discriminator is trained on as many as it will meet",
                "warning",
            )
        if d.pretraining.questions_per_step % world_size:
            yield Problem(
                "discriminator.pretraining.questions_per_step",
                f"{d.pretraining.questions_per_step} questions cannot be shared by {world_size} processes",
                "make it a multiple of their number",
            )
        yield from _schedule(d.pretraining.optimizer, "discriminator.pretraining.optimizer")
    if stage == "discriminator" and not _cached(recipe):
        yield Problem("cache_dir", f"{recipe.cache_path} holds no responses", "run `ril collect` first")
    if _loop_in(stage) and not enabled and d.mode == "fixed":
        fix = "turn it on, or set discriminator.mode to updated"
        yield Problem("discriminator.pretraining.enabled", "is off, so a fixed discriminator would know nothing", fix)
    if stage == "train" and enabled and (why := _missing_checkpoint(str(recipe.discriminator_path))):
        yield Problem("discriminator.mode", f"is {d.mode}, but {why}", "run `ril discriminator` first")


def _rewards(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    rules = [("eval.rule", recipe.eval.rule)] if stage in ("eval", "run") else []
    rules += [("rewards.answer.rule", recipe.rewards.answer.rule)] if stage != "eval" else []
    for key, rule in rules:
        if rule not in ANSWER_RULES:
            yield Problem(key, f"no answer rule is named {rule!r}", _suggest(rule, ANSWER_RULES))
    if not _loop_in(stage):
        return
    rewards, algorithm = recipe.rewards, recipe.train.algorithm
    wants_similarity = algorithm in ("ril", "gail") and rewards.similarity.weight != 0
    if wants_similarity and recipe.discriminator.mode == "none":
        fix = "set it to updated or fixed" + ("" if algorithm == "gail" else ", or rewards.similarity.weight to 0")
        yield Problem("discriminator.mode", "is none, but the similarity reward comes from the discriminator", fix)
    earned = [recipe.uses_discriminator and rewards.similarity.weight != 0]
    earned += [recipe.answer_kind != "none" and rewards.answer.weight != 0]
    earned += [f.weight != 0 for f in rewards.functions]
    if not any(earned) and not (wants_similarity and recipe.discriminator.mode == "none"):
        yield Problem(
            "rewards", "nothing that is switched on has a weight, so there is nothing to learn", "give one a weight"
        )
    for i, f in enumerate(rewards.functions):
        place, colon, name = f.function.rpartition(":")
        key = f"rewards.functions.{i}.function"
        if not colon or not place or not name.isidentifier():
            yield Problem(key, f"{f.function!r} names no function", "write package.module:name or path/to/file.py:name")
        elif place.endswith(".py") and not Path(place).expanduser().is_file():
            yield Problem(key, f"no such file: {Path(place).resolve()}", "paths count from the current directory")


def _groups(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    """Whether every group can be filled and has something to compare."""
    if not _loop_in(stage):
        return
    train, names = recipe.train, recipe.teacher_names
    if train.sampler.engine == "vllm" and not train.sampler.base_urls:
        fix = "start `vllm serve` for the student (docs/vllm.md) and name it there, or use engine: transformers"
        yield Problem("train.sampler.base_urls", "the engine is vllm, but no server is named", fix)
    if train.num_teacher_responses is not None and train.num_teacher_responses < 0:
        yield Problem("train.num_teacher_responses", "is negative", "use 0 or more, or leave it out for G")
        return
    wanted = recipe.teacher_responses_per_question
    if train.algorithm == "ril" and not names and not recipe.uses_discriminator:
        fix = "add teachers, or set train.algorithm to dr_grpo or grpo"
        yield Problem("teachers", "ril puts teacher responses into every group, and there are no teachers", fix)
    if recipe.uses_discriminator and names and wanted == 0:
        fix = "raise it, or use the algorithms dr_grpo or grpo"
        yield Problem("train.num_teacher_responses", "is 0, so the discriminator has nothing to compare with", fix)
    if names and wanted:
        each = -(-wanted // len(names))  # balanced to within one, so the fullest share rounds up
        if each > recipe.collect.num_responses:
            yield Problem(
                "train.num_teacher_responses",
                f"a group draws up to {each} responses of one teacher, but collect.num_responses is "
                f"{recipe.collect.num_responses}, so some come more than once",
                "lower it, or raise collect.num_responses and collect more",
                "warning",
            )
        if train.num_teacher_responses is not None and not train.per_teacher and wanted < len(names):
            fix = "raise it, or turn on train.per_teacher"
            reason = f"{wanted} responses a group for {len(names)} teachers: some are absent from every group"
            yield Problem("train.num_teacher_responses", reason, fix, "warning")
        if stage == "train" and not _cached(recipe):
            reason = f"teacher responses are wanted, but {recipe.cache_path} holds none"
            yield Problem("cache_dir", reason, "run `ril collect` first")
    size = train.num_generations + (wanted if train.teacher_responses_in_update else 0)
    if size < 2:
        std = " (and a standard deviation of 0)" if train.algorithm == "grpo" else ""
        reason = f"a group of one response has advantage 0{std}"
        yield Problem("train.num_generations", reason, "use at least 2")


def _loop(recipe: Recipe, stage: str, world_size: int) -> Iterator[Problem]:
    if not _loop_in(stage):
        return
    train = recipe.train
    if train.questions_per_step % world_size:
        lower = train.questions_per_step // world_size * world_size
        near = " or ".join(str(n) for n in (lower, lower + world_size) if n)
        reason = f"{train.questions_per_step} questions cannot be shared by {world_size} processes"
        yield Problem("train.questions_per_step", reason, f"use a multiple of {world_size}, for instance {near}")
    for tracker in train.log_to:
        if not any(importlib.util.find_spec(package) for package in _TRACKERS[tracker]):
            yield Problem("train.log_to", f"{tracker} is not installed", f'pip install "openril[{tracker}]"')
    if train.eval_every and not recipe.data.validation:
        yield Problem(
            "train.eval_every", "is set, but data.validation is empty", "list questions there, or set it to 0"
        )
    if train.beta == 0 and train.algorithm in ("ril", "gail"):
        reason = "is 0: nothing holds the student near its start (the paper's runs collapse, Table 5)"
        yield Problem("train.beta", reason, "0.01 is the paper's", "warning")
    if train.precision == "pure_bf16" and train.optimizer.learning_rate < 1e-5 and not recipe.student.lora.enabled:
        reason = "bfloat16 weights round away steps as small as this learning rate makes"
        yield Problem("train.precision", reason, "use bfloat16, which keeps float32 weights", "warning")
    yield from _schedule(train.optimizer, "train.optimizer")
