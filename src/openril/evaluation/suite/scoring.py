"""Score answers with lmms-eval's own functions, and count what they cannot read.

Each benchmark's ``process_results`` and aggregation run unchanged. Around them, three of lmms-eval's habits are caught:
it draws a letter where it finds none (MMMU, MMBench), it takes the nearest choice (MathVista), and it counts a failed
judgement as 0 (MM-Vet) or draws (MMBench). Every unit therefore has two scores (see ``results.Scored``).
"""

from __future__ import annotations

import random
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

from openril.errors import DataError
from openril.evaluation.suite.judging import SuiteJudge
from openril.evaluation.suite.loading import OpenTask, strip_thinking
from openril.evaluation.suite.results import Scored
from openril.storage import stable_hash

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TOLERANCE = 0.02
"""Largest difference in points between lmms-eval's figure, which it may round, and that of its per-question scores."""


@dataclass(frozen=True)
class Answer:
    """A student's answer. text: without thinking text and stop strings; None if the prompt was too long to be answered."""

    number: int
    text: str | None


def score_task(task: OpenTask, answers: Sequence[Answer], judge: SuiteJudge | None) -> tuple[list[Scored], float]:
    """Return the scored units of a task, and lmms-eval's own figure in percent.

    Args:
        judge: Required by benchmarks that always ask it; without one MMBench's letters are read by rules alone.

    Raises:
        DataError: If lmms-eval's figure is not the mean of its per-question scores, so that a version is in use that scores
            differently.
    """
    benchmark = task.benchmark
    docs = task.task.eval_docs_no_media
    if benchmark.task in _SCORERS:
        return _SCORERS[benchmark.task](task, docs, answers, judge)
    filtered = _filter(task, docs, [a.text or "" for a in answers])
    scored, values, lost = [], [], []
    for answer, response in zip(answers, filtered, strict=True):
        doc = docs[answer.number]
        stratum = task.name if benchmark.strata == "task" else str(doc.get(benchmark.strata, ""))
        with _Draws(f"{task.name}/{answer.number}") as draws:
            try:
                value = task.task.process_results(doc, [response])[benchmark.metric]
            except BaseException as e:
                if not _timed_out(e):
                    raise
                lost.append(_scored(task, answer, None, 0.0, stratum=stratum, cause=f"{type(e).__name__}: {e}"))
                continue
        values.append(value)
        theirs = _share(task, value)
        parsed = not draws.drawn and _reads(task, doc, answer.text or "", response, value)
        scored.append(_scored(task, answer, theirs if parsed else 0.0, theirs, parsed=parsed, stratum=stratum))
    figure = _figure(task, values)
    _agree(task, figure, scored)
    return scored + lost, figure


def _timed_out(error: BaseException) -> bool:
    """math-verify raises TimeoutError, and newer versions a class that is no Exception."""
    stops = KeyboardInterrupt, SystemExit, GeneratorExit
    return isinstance(error, TimeoutError) or not isinstance(error, (Exception, *stops))


def _filter(task: OpenTask, docs: Any, texts: list[str]) -> list[Any]:
    """Apply the task's filters, which extract letters from answers."""
    instances = [SimpleNamespace(resps=[text], filtered_resps={}) for text in texts]
    ensemble = task.task._filters[0]
    ensemble.apply(instances, [docs[n] for n in task.numbers[: len(texts)]])
    return [instance.filtered_resps[ensemble.name] for instance in instances]


def _figure(task: OpenTask, values: list[Any]) -> float:
    """Return lmms-eval's aggregation of the values in percent. MathVista's gives None for zero."""
    aggregate = task.task.aggregation()[task.benchmark.metric]
    value = aggregate(values, SimpleNamespace()) if task.benchmark.task.startswith("mathvista") else aggregate(values)
    return float(value or 0.0) * (1.0 if task.benchmark.percent else 100.0)


def _agree(task: OpenTask, figure: float, scored: Sequence[Scored]) -> None:
    strata: dict[str, list[float]] = {}
    for s in scored:
        strata.setdefault(s.stratum, []).append(s.lmms_eval)
    ours = 100 * sum(sum(v) / len(v) for v in strata.values()) / len(strata)
    if abs(ours - figure) > TOLERANCE:
        raise DataError(
            f"{task.name}: lmms-eval gives {figure:.3f}, and the mean of its scores is {ours:.3f}. This version of "
            "lmms-eval scores in another way; install the tested one (docs/benchmarks.md)."
        )


def _scored(
    task: OpenTask,
    answer: Answer,
    score: float | None,
    theirs: float,
    *,
    parsed: bool = True,
    stratum: str = "",
    cause: str = "",
) -> Scored:
    if answer.text is None:
        score, parsed, cause = None, True, "the prompt is longer than data.max_prompt_length"
    return Scored(f"{task.name}/{answer.number}", score, theirs, parsed, stratum, cause)


def _share(task: OpenTask, value: Any) -> float:
    """Return a question's score in [0, 1] from what ``process_results`` gives for it."""
    if isinstance(value, bool | int | float):
        return float(value)
    if "score" in value:
        return float(value["score"])
    if "is_correct" in value:
        return float(value["is_correct"])
    if "pred" in value:
        return float(value["pred"].lower().strip() == value["answer"].lower().strip())
    if "parsed_pred" in value:  # MMMU and MMMU-Pro: their aggregation of one question
        name = "mmmu_pro_aggregate_results" if task.name.startswith("mmmu_pro") else "mmmu_aggregate_results"
        return float(_function(task, name)([value]))
    raise DataError(
        f"{task.name}: expected a number for each question from lmms-eval, got {sorted(value)}. Only tasks that score "
        "questions one by one can be compared."
    )


def _reads(task: OpenTask, doc: dict[str, Any], text: str, response: Any, value: Any) -> bool:
    """Return whether the task's parser found an answer. Free answers only have to say something."""
    name = task.benchmark.task
    if not text.strip():
        return False
    if name == "ai2d":
        letter = re.sub(r"[^\w\s]", "", str(response)).strip().upper()
        return len(letter) == 1 and letter in LETTERS[: len(doc["options"])]
    if name in ("mmstar", "realworldqa"):
        from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

        truth = doc["answer"].strip().upper()
        return truth not in list("ABCD") or extract_mcq_answer(text, choices=list("ABCD")) != ""
    if name == "blink":
        return value["pred_parsed"] != ""
    if name in ("seedbench", "seedbench_2_plus"):  # they take the first character, also that of a word
        return re.match(r"[A-Da-d](?![A-Za-z])", text) is not None
    if task.name == "mmmu_pro_vision":  # it compares the whole answer with the letter
        return text in list(LETTERS[:10])
    return True


def _function(task: OpenTask, name: str) -> Callable[..., Any]:
    """Return a function of the module of a task's ``process_results``."""
    return _globals(task)[name]


def _globals(task: OpenTask) -> dict[str, Any]:
    function = task.task.config.process_results
    return function.__globals__


class _Draws:
    """Notice a letter that MMMU's parser draws, and draw it by the question, so that order and threads do not matter."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.drawn = False

    def choice(self, letters: Sequence[str]) -> str:
        self.drawn = True
        return random.Random(stable_hash("draw", self.key)).choice(list(letters))

    def __enter__(self) -> _Draws:
        from lmms_eval.tasks._task_utils import mmmu_mcq_utils

        self.module: ModuleType = mmmu_mcq_utils
        self.before, mmmu_mcq_utils.random = mmmu_mcq_utils.random, self
        return self

    def __exit__(self, *_: object) -> None:
        self.module.random = self.before  # type: ignore[attr-defined]


class _Failures(threading.local):
    """What went wrong in the judgement that this thread is at."""

    cause = ""
    guessed = False


def _replaced(
    task: OpenTask, owner: Any, judge: SuiteJudge, readable: Callable[[str], bool], failures: _Failures
) -> None:
    """Replace ``get_chat_response`` of lmms-eval's module or object by our judge, for this process."""

    def reply(prompt: str, *_: Any, max_tokens: int = 128, **__: Any) -> Any:
        text = judge.ask(prompt, max_tokens, readable)
        if text is None:
            failures.cause = judge.cause(prompt)
        return (text or "", judge.settings.model if text else "") if isinstance(owner, dict) else text or ""

    if isinstance(owner, dict):
        if "get_chat_response" not in owner:
            raise DataError(f"{task.name}: this version of lmms-eval has no get_chat_response to replace.")
        owner["get_chat_response"] = reply
    else:
        owner.get_chat_response = reply


def _in_threads(function: Callable[[Any], Any], items: Sequence[Any], judge: SuiteJudge) -> list[Any]:
    with ThreadPoolExecutor(judge.settings.concurrency) as pool:
        return list(pool.map(function, items))


def _judged(task: OpenTask, judge: SuiteJudge | None) -> SuiteJudge:
    if judge is None:
        raise DataError(f"{task.name}: judge: expected a judge for this benchmark, got none. Set judge.base_urls.")
    return judge


def _correctness(text: str) -> bool:
    try:
        return 0.0 <= float(text.split(" ")[0].strip()) <= 1.0
    except ValueError:
        return False


def _mm_vet(
    task: OpenTask, docs: Any, answers: Sequence[Answer], judge: SuiteJudge | None
) -> tuple[list[Scored], float]:
    judge, failures = _judged(task, judge), _Failures()
    _replaced(task, _globals(task), judge, _correctness, failures)

    def one(answer: Answer) -> tuple[Any, Scored]:
        failures.cause = ""
        doc = docs[answer.number]
        doc = {
            "question_id": doc.get("id"),
            **doc,
        }  # lmms-eval names it when a verdict is missing, and version 2 has none
        value = task.task.process_results(doc, [answer.text or ""])[task.benchmark.metric]
        known = None if failures.cause else value["score"]
        return value, _scored(task, answer, known, value["score"], cause=failures.cause)

    done = _in_threads(one, answers, judge)
    figure = _figure(task, [value for value, _ in done])
    _agree(task, figure, [s for _, s in done])
    return [s for _, s in done], figure


def _math_vista(
    task: OpenTask, docs: Any, answers: Sequence[Answer], judge: SuiteJudge | None
) -> tuple[list[Scored], float]:
    judge, failures = _judged(task, judge), _Failures()
    evaluator = _globals(task)["mathvista_evaluator"]
    _replaced(task, evaluator, judge, bool, failures)

    def one(answer: Answer) -> tuple[Any, Scored]:
        failures.cause = ""
        value = task.task.process_results(docs[answer.number], [answer.text or ""])[task.benchmark.metric]
        theirs = float(value["true_false"])
        # lmms-eval rounds with the precision as it is, which fails and counts as wrong where the data give it as a float.
        digits = int(value["precision"] or 0)
        kinds = value["choices"], value["question_type"], value["answer_type"], digits
        prediction = evaluator.normalize_extracted_answer(value["extraction"], *kinds)
        parsed = _math_vista_reads(value, prediction)
        right = float(parsed and evaluator.safe_equal(prediction, value["answer"]))
        known = None if failures.cause else right
        return value, _scored(task, answer, known, theirs, parsed=parsed or bool(failures.cause), cause=failures.cause)

    done = _in_threads(one, answers, judge)
    figure = _figure(task, [dict(value) for value, _ in done])
    _agree(task, figure, [s for _, s in done])
    return [s for _, s in done], figure


def _math_vista_reads(value: dict[str, Any], prediction: str | None) -> bool:
    """Return whether the extraction is a choice or a number, and not the nearest choice to something else."""
    extraction = str(value["extraction"]).strip()
    if value["question_type"] == "multi_choice":
        letters = re.findall(r"\(([a-zA-Z])\)", extraction)
        letter = letters[0].upper() if letters else extraction
        return letter in list(LETTERS[: len(value["choices"])]) or (not letters and extraction in value["choices"])
    return bool(extraction) and prediction is not None


def _mm_bench(
    task: OpenTask, docs: Any, answers: Sequence[Answer], judge: SuiteJudge | None
) -> tuple[list[Scored], float]:
    """Score circular copies together: a question is right if all its copies are."""
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

    evaluator = _globals(task)["mmbench_evaluator"]
    values = [task.task.process_results(docs[a.number], [a.text or ""])[task.benchmark.metric] for a in answers]

    def letter(value: dict[str, Any]) -> tuple[str, str]:
        """Return the letter of an answer, or "" with the cause ("" if the answer has none)."""
        choices = {c: value[c] for c in "ABCD" if str(value[c]) != "nan"}
        # Rows of the data have the text "nan" for a missing choice, which lmms-eval finds inside words.
        item = {"question": value["question"], "prediction": value["prediction"]} | choices
        found = evaluator.can_infer(item["prediction"], dict(choices))
        if found:
            return str(found), ""
        if judge is None:
            return extract_mcq_answer(item["prediction"], choices=sorted(choices)), ""
        if not item["prediction"].strip():
            return "", ""
        options = evaluator.build_option_str(list(choices.values()))
        prompt = evaluator.build_prompt(item["question"], options, item["prediction"])
        reply = judge.ask(prompt, 256, lambda text: bool(evaluator.can_infer(text, dict(choices))))
        if reply is None:
            return "", judge.cause(prompt)
        found = str(evaluator.can_infer(reply, dict(choices)))
        return ("", "") if found == "E" else (found, "")

    letters = _in_threads(letter, values, judge) if judge is not None else [letter(v) for v in values]
    copies: dict[int, list[tuple[bool, bool, str, Answer]]] = {}
    for value, (found, cause), answer in zip(values, letters, answers, strict=True):
        row = (found == value["answer"], bool(found), cause, answer)
        copies.setdefault(int(value["index"]) % 10**6, []).append(row)
    scored = []
    for index, rows in sorted(copies.items()):
        causes = [cause for _, _, cause, _ in rows if cause]
        wrong = any(not right for right, _, cause, _ in rows if not cause)
        score = 0.0 if wrong else None if causes else 1.0
        first = replace(rows[0][3], text=None if any(a.text is None for *_, a in rows) else "")
        parsed = all(readable or cause for _, readable, cause, _ in rows)
        unit = _scored(
            task, first, score, float(score or 0.0), parsed=parsed, cause="" if wrong else "".join(causes[:1])
        )
        scored.append(replace(unit, id=f"{task.name}/index {index}"))
    return scored, 100 * _mm_bench_figure(evaluator, values, judge)


def _mm_bench_figure(evaluator: Any, values: list[dict[str, Any]], judge: SuiteJudge | None) -> float:
    """Return lmms-eval's own figure as a share, from the replies that the judge has given."""
    if judge is not None:
        replies = {}

        def reply(prompt: str, **_: Any) -> str:
            if prompt not in replies:
                replies[prompt] = judge.ask(prompt, 256) or "Failed to obtain answer via API"
            return replies[prompt]

        evaluator.get_chat_response = reply
    figure, _, _ = evaluator.eval_result(values, eval_method="static" if judge is None else "openai")
    return float(figure)


_SCORERS: dict[str, Callable[..., tuple[list[Scored], float]]] = {
    "mmvet": _mm_vet,
    "mmvetv2": _mm_vet,
    "mathvista_testmini_format": _math_vista,
    "mmbench_en_dev": _mm_bench,
    "mmbench_cn_dev": _mm_bench,
}


def refuse_judge(task: OpenTask) -> None:
    """Raise DataError if a task outside the fourteen asks a judge, since lmms-eval scores failed verdicts as 0."""
    names = {
        "get_server",
        "get_chat_response",
        "get_eval",
        "API_KEY",
        "API_URL",
        "OPENAI_API_KEY",
        "VerificationPipeline",
    }
    own = dict(getattr(task.task.config.process_results, "__globals__", {}))
    for value in list(own.values()):  # also the modules of the objects and functions that it uses
        own |= getattr(value, "__globals__", {})
        if type(value).__module__.startswith("lmms_eval.tasks"):
            own |= vars(sys.modules[type(value).__module__])
    if found := names & set(own):
        raise DataError(
            f"--tasks: {task.name} asks a judge (its module has {sorted(found)[0]}), which only the paper's benchmarks can "
            "do here. Run it with lmms-eval itself."
        )


def answer_text(task: OpenTask, text: str) -> str:
    """Return an answer as it is scored."""
    return strip_thinking(task.finish(text))
