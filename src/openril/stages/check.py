"""`ril check`: show on one page what can be known before a run costs anything."""

from __future__ import annotations

import math
import operator
import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openril.data.preflight import CountTokens, Report, preflight
from openril.data.reading import read_questions
from openril.endpoints import ChatClient, Completion
from openril.errors import EndpointError, OpenRILError, RecipeError
from openril.models import memory_estimate as estimate
from openril.models.published_shapes import published_shape
from openril.models.stage_memory import CONTEXT_BYTES, stage_memory
from openril.recipe.checks import cross_check
from openril.recipe.schema import EndpointConfig, JudgeConfig, Recipe, TeacherConfig
from openril.report.page import Page
from openril.responses.cache import ResponseCache
from openril.responses.chat_requests import request_settings
from openril.rewards.judge import judge_request_settings
from openril.rewards.judge_prompt import Prompt, read_reply
from openril.stages.check_models import check_discriminator, check_local, check_student
from openril.stages.data_checks import check_responses, warn_of_shared_questions

if TYPE_CHECKING:
    from rich.console import Console

_PROBE_SECONDS = 60.0
_QUESTION = "What color is a clear sky at noon? Answer in one word."


def run_check(
    recipe: Recipe, console: Console, world_size: int | None = None, device_memory: Sequence[str] = ()
) -> int:
    """Check settings, data, models, servers, memory and disk for ``ril run``, and return 0 if the run can start, else 2.

    Nothing is trained or written, and each server is asked for one short answer.

    Args:
        world_size: The number of planned training processes; by default that of the launcher ($WORLD_SIZE), else 1.
        device_memory: The memory of the planned devices in GiB (one value), instead of that of this machine's device.
    """
    device = _device_memory(device_memory)
    world_size = int(os.environ.get("WORLD_SIZE") or 1) if world_size is None else world_size
    page = Page(console)
    page.heading("Settings")
    problems = cross_check(recipe, "run", world_size)
    for problem in problems:
        (page.error if problem.level == "error" else page.warn)(str(problem))
    if not problems:
        page.good("the settings fit together")

    page.heading("Models")
    shape, count_tokens = check_student(recipe, page)
    if recipe.uses_discriminator and (start := recipe.discriminator.init):
        check_discriminator(recipe, start, page)
    d_shape = published_shape(recipe.discriminator.init)
    judge = 0
    for what, endpoint in _endpoints(recipe):
        if endpoint.model_path and not endpoint.base_urls:
            size = check_local(recipe, endpoint, what, page)
            judge = size if what == "judge" else 0

    page.heading("Data")
    reports = {which: _check_data(recipe, which, count_tokens, page) for which in ("train", "validation")}

    warn_of_shared_questions(recipe, page.warn)
    _check_cached_responses(recipe, page)

    page.heading("Servers")
    _check_servers(recipe, page)

    page.heading("What the run needs")
    train, validation = reports["train"], reports["validation"]
    _say_needs(recipe, train, validation, page)
    if shape is not None:
        lengths = [r for r in (train, validation) if r is not None and r.prompt_tokens is not None]
        prompt = max((r.prompt_tokens.largest for r in lengths if r.prompt_tokens), default=0)
        prompt = min(prompt or math.inf, recipe.data.max_prompt_length)  # longer ones never run
        # Without a processor nothing was counted, and an image may fill the prompt.
        image = max((r.image_tokens.largest for r in lengths if r.image_tokens), default=0) if count_tokens else prompt
        _check_memory(recipe, (shape, prompt, min(image, prompt), world_size, judge, d_shape), device, page)
        _check_disk(recipe, shape, page)

    if page.errors:
        console.print(f"\n[red]{page.errors} problem{'s' * (page.errors != 1)}[/red], {page.warnings} warnings")
        return 2
    console.print(f"\n[green]Ready.[/green] {page.warnings} warning{'s' * (page.warnings != 1)}")
    return 0


def _endpoints(recipe: Recipe) -> list[tuple[str, EndpointConfig]]:
    """Return the teachers, and the judge and the student's servers if the run uses them."""
    found: list[tuple[str, EndpointConfig]] = [(f"teacher {t.name}", t) for t in recipe.teachers]
    asked = [recipe.answer_kind, recipe.eval.score if recipe.data.validation else "rules"]
    if any(kind in ("judge", "rules_then_judge") for kind in asked):
        found.append(("judge", recipe.judge))
    if recipe.student.sampler.engine == "vllm":
        found.append(("student.sampler", recipe.student.sampler.endpoint))
    return found


# Data


def _check_data(recipe: Recipe, which: Any, count_tokens: CountTokens | None, page: Page) -> Report | None:
    if not getattr(recipe.data, which):
        if which == "validation":
            page.warn("data.validation is empty, so training has no score and `ril eval` has no questions")
        return None
    from openril.report.progress import ProgressDisplay
    from openril.rewards.answers import truth_problem

    answer = recipe.answer_kind != "none" and recipe.rewards.answer.without_truth == "refuse"
    needed = answer or (recipe.sft.enabled and recipe.sft.targets == "answers")
    try:
        with ProgressDisplay(page.console, transient=True) as display:
            report = preflight(
                recipe.data,
                which,
                count_tokens,
                answers_needed=needed,
                rule=recipe.rewards.answer.rule,
                truth_problem=truth_problem if recipe.answer_kind.startswith("rules") else None,
                progress=lambda done, total: display.show(f"reading data.{which}", done, total),
            )
    except OpenRILError as e:
        page.error(str(e))
        return None
    report.print(page.console)
    page.errors += len(report.errors)
    page.warnings += len(report.warnings)
    if not report.num_questions and not report.errors:
        page.error(f"data.{which} has no questions")
    return report


def _check_cached_responses(recipe: Recipe, page: Page) -> None:
    """Look at the responses of the teachers that are complete already."""
    names = [t.name for t in recipe.teachers]
    if not names or not recipe.cache_path.is_dir():
        return
    try:
        questions = read_questions(recipe.data, "train", [])
        cache = ResponseCache.open(recipe.cache_path)
        for name in names:
            here = {q.id for q in questions} - {q.id for q, _ in cache.missing(questions, name, 1)}
            asked = [q for q in questions if q.id in here]
            if asked:
                check_responses(recipe, asked, cache.load(asked, [name], check_hashes=False), page.warn)
    except (OpenRILError, OSError) as e:
        page.plain(f"the response cache is not looked at: {e}")


# Servers


def _check_servers(recipe: Recipe, page: Page) -> None:
    """Ask every server for one short completion, with the settings of the run."""
    asked = [(what, endpoint) for what, endpoint in _endpoints(recipe) if endpoint.base_urls]
    if not asked:
        page.good("the run uses none")
    for what, endpoint in asked:
        try:
            client = ChatClient(endpoint, what)
        except OpenRILError as e:
            page.error(str(e))
            continue
        messages: list[dict[str, Any]] = [{"role": "user", "content": _QUESTION}]
        if isinstance(endpoint, JudgeConfig):
            messages = [*Prompt(_QUESTION, "Blue", "It is blue.").messages()]
            settings = judge_request_settings(endpoint, seed=0)
        elif isinstance(endpoint, TeacherConfig):
            settings = {"seed": 0, **request_settings(recipe, endpoint)}
        else:
            settings = {"seed": 0, "max_tokens": 32}
        try:
            answers = client.loop_thread.submit(client.probe(messages, **settings)).result(timeout=_PROBE_SECONDS)
        except (TimeoutError, OpenRILError) as e:
            page.error(str(e) or f"{what}: no answer within {_PROBE_SECONDS:g} s. Are the servers running?")
            continue
        finally:
            client.close()
        for url, answer in answers:
            _report_answer(recipe, endpoint, f"{what}: {endpoint.model} at {url}", answer, page)


def _report_answer(
    recipe: Recipe, endpoint: EndpointConfig, where: str, answer: Completion | EndpointError, page: Page
) -> None:
    if isinstance(answer, EndpointError):
        page.error(str(answer))
        return
    text = " ".join(answer.text.split())
    came = f"{text[:100]!r}{'...' if len(text) > 100 else ''} (finish reason {answer.finish_reason})"
    if isinstance(endpoint, JudgeConfig):
        read = read_reply(answer, endpoint.max_tokens)
        if isinstance(read, str):
            page.error(f"{where} answered {came}, which is no verdict: {read}")
        else:
            page.good(f"{where} answered {came}, read as verdict {read[0]:g}")
    elif text:
        page.good(f"{where} answered {came}")
    else:
        thoughts = f" and {len(answer.reasoning):,} characters of thoughts (reasoning_content)" * bool(answer.reasoning)
        page.warn(
            f"{where} answered with an empty text{thoughts} (finish reason {answer.finish_reason}). Raise"
            f" collect.max_completion_length ({recipe.collect.max_completion_length}), or turn thinking off (for vLLM:"
            " extra_body: {chat_template_kwargs: {enable_thinking: false}})"
        )


# Needs


def _say_needs(
    recipe: Recipe,
    train: Report | None,
    validation: Report | None,
    page: Page,
) -> None:
    if train is not None and train.num_usable:
        work = estimate.work(recipe, train.num_usable, validation.num_usable if validation else 0)
        selected = recipe.data.selection.enabled
        chosen = (
            f"{work.provisional:,} chosen provisionally, {work.questions:,} " if selected else f"{work.questions:,} "
        )
        page.plain(f"questions: {work.sft_questions:,} for the warm start, {chosen}for the loop")
        page.plain(
            f"{work.steps:,} steps on {work.questions:,} questions, {work.student_samples:,} student samples; "
            f"{work.collected_responses:,} responses to collect"
        )
        for source, number in work.collected.items():
            page.plain(f"{number:,} responses of {source}")
        for server, number in work.requests.items():
            page.plain(f"up to {number:,} requests to {server}")
        if recipe.train.questions_per_step > work.questions:
            page.error(
                f"train.questions_per_step: expected at most the {work.questions} questions of the loop, "
                f"got {recipe.train.questions_per_step}"
            )


def _device_memory(given: Sequence[str]) -> tuple[float, str] | None:
    """Return the bytes of a device and where they are from, or None if no device is known."""
    if given:
        try:
            (text,) = given
            if (gib := float(text)) > 0:
                return gib * estimate.GIB, "--device-memory"
        except ValueError:
            pass
        raise RecipeError(f"--device-memory: expected a number of GiB, got {' '.join(given)!r}")
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.total_memory, f"this machine's {properties.name}"


def _check_memory(recipe: Recipe, sizes: tuple[Any, ...], device: tuple[float, str] | None, page: Page) -> None:
    """Say what each stage needs on the device of one process, and compare the largest with the device.

    sizes: the arguments of ``stage_memory`` after the recipe.
    """
    stages = stage_memory(recipe, *sizes)
    most = max(stages, key=lambda m: m.total)
    processes = sizes[3]
    models = "share the models (train.shard)" if recipe.train.shard else "all hold everything"
    each = f"each of {processes} processes, which {models}" if processes > 1 else "the process"
    page.plain(f"device memory of {each}, at the peak of a stage:")
    for memory in stages:
        page.plain(f"{_gib(memory.total + CONTEXT_BYTES):>12}  ril {memory.stage} ({memory.phase})")
    page.plain(f"parts of ril {most.stage}:")
    for name, amount in {**most.parts, "CUDA context and libraries (assumed)": CONTEXT_BYTES}.items():
        page.plain(f"{_gib(amount):>12}  {name}")
    for name in most.parked:
        if name not in most.parts:
            page.plain(f"{'parked':>12}  {name}")
    for name, amount in most.host.items():
        page.plain(f"{_gib(amount):>12}  in main memory: {name}")
    need = most.total + CONTEXT_BYTES
    if device is None:
        page.plain(f"{_gib(need)} was compared with nothing: no device is visible here. Give --device-memory GIB.")
        return
    there, source = device
    if need <= there:
        near = f", which leaves little for fragmentation ({_gib(there - need)})" if need > 0.9 * there else ""
        (page.warn if near else page.good)(f"memory: {_gib(need)} of {_gib(there)} ({source}){near}")
        return
    largest = sorted(most.parts.items(), key=lambda part: -part[1])[:4]
    page.error(
        f"memory: expected at most {_gib(there)} ({source}), got an estimate of {_gib(need)} for ril {most.stage}. The "
        f"largest parts are {', '.join(f'{name} {_gib(n)}' for name, n in largest)}. These settings lower it:"
    )
    together: dict[str, Any] = {}
    for changes in _SMALLER:
        changes = {key: value for key, value in changes.items() if _differs(recipe, key, value)}
        if processes == 1:
            changes.pop("train.shard", None)
        together |= changes
        if changes:
            _say_change(recipe, changes, sizes, page)
    if len(together) > 1:
        _say_change(recipe, together, sizes, page)


# Settings that lower the memory, those that belong together in one entry.
_SMALLER: list[dict[str, Any]] = [
    {"train.shard": True},
    {"train.offload": "swap"},
    {"student.lora.enabled": True},
    {"train.precision": "pure_bf16"},
    {"student.gradient_checkpointing": True},
    {
        "train.max_tokens_per_micro_batch": 1024,
        "discriminator.max_tokens_per_micro_batch": 1024,
        "sft.micro_batch_size": 1,
    },
]


def _differs(recipe: Recipe, key: str, value: Any) -> bool:
    now = operator.attrgetter(key)(recipe)
    return now != value and (isinstance(value, bool | str) or now > value)


def _say_change(recipe: Recipe, changes: dict[str, Any], sizes: tuple[Any, ...], page: Page) -> None:
    changed = recipe.model_copy(deep=True)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        setattr(operator.attrgetter(section)(changed), name, value)
    need = max(m.total for m in stage_memory(changed, *sizes)) + CONTEXT_BYTES
    page.plain(f"{_gib(need):>12}  with {', '.join(f'{k}: {str(v).lower()}' for k, v in changes.items())}")


def _check_disk(recipe: Recipe, shape: estimate.Shape, page: Page) -> None:
    checkpoints = estimate.checkpoint_bytes(recipe, shape) * (recipe.train.keep_checkpoints + 1)
    place = recipe.run_path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"disk: about {_gib(checkpoints)} for checkpoints, {_gib(free)} free at {place}"
    (page.error if checkpoints > free else page.good)(text)


def _gib(amount: float) -> str:
    return f"{amount / estimate.GIB:,.1f} GiB" if amount >= 0.1 * estimate.GIB else f"{amount / 2**20:,.1f} MiB"
