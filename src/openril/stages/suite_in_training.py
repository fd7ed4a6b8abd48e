"""Benchmarks inside training (``train.eval_suite``): the student in memory answers, and another process scores.

lmms-eval seeds random numbers, replaces library functions and deletes the modules that it has evaluated. All of it stays
in the worker process, so that an evaluation changes nothing of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from openril.errors import DataError
from openril.evaluation.evaluate import GREEDY
from openril.evaluation.suite.benchmarks import named
from openril.evaluation.suite.process import run_worker, worker_recipe
from openril.evaluation.suite.worker import Job
from openril.models.prompt_lengths import LeftOut
from openril.recipe.schema import Recipe
from openril.records import Question, Response
from openril.sampling.protocol import gathered, sample_fitting
from openril.stages.suite import local_checkpoint
from openril.training.setup import TrainingComponents

WAIT: tuple[str, Any] = ("wait", None)


def suite_evaluation(
    recipe: Recipe, parts: TrainingComponents, warn: Callable[[str], None]
) -> Callable[[int], dict[str, float]]:
    """Return a function that evaluates the current student after a step, and returns the metrics on the main process.

    All processes must call it together. They share the questions.

    Raises:
        DataError: A data set is not here.
    """
    accelerator = parts.accelerator
    folder = recipe.run_path / "eval" / "in_training"
    benchmarks = [asdict(b) for name in dict.fromkeys(recipe.train.eval_suite) if (b := named(name)) is not None]
    settings = worker_recipe(recipe)
    sampler = recipe.student.sampler
    at_a_time = sampler.concurrency if sampler.engine == "vllm" else recipe.train.questions_per_sampling_batch
    settings["eval"]["questions_per_batch"] = at_a_time * accelerator.num_processes
    if accelerator.is_main_process:
        for event in run_worker(Job("check", settings, benchmarks), folder):
            if missing := event.get("missing"):
                raise DataError(f"train.eval_suite: {missing}")
    start = local_checkpoint(recipe.start_student, recipe)  # for its processor's settings
    left_out = LeftOut(recipe, "eval")

    def mine(questions: Sequence[Question], limit: int) -> list[Response | None]:
        options = {"settings": GREEDY, "max_completion_length": limit, "seed": recipe.seed}
        drawn = sample_fitting(parts.sampler, questions, 1, left_out.add, **options)
        return [responses[0] if responses else None for responses in drawn]

    def together(questions: Sequence[Question], limit: int) -> list[Response | None]:
        """Answer this process's share, and return the answers of all."""
        rank, world = accelerator.process_index, accelerator.num_processes
        answered: list[Response | None] = [None] * len(questions)
        for process, answers in enumerate(gather_object([mine(questions[rank::world], limit)])):
            answered[process::world] = answers
        return answered

    def tell(what: tuple[str, Any]) -> tuple[str, Any]:
        """Send the main process's next step to all processes."""
        return broadcast_object_list([what])[0]

    def lead(step: int) -> dict[str, float]:
        def answerer(questions: Sequence[Question], limit: int) -> list[Response | None]:
            tell(("answer", (questions, limit)))
            return together(questions, limit)

        place = folder / f"step_{step:06d}"
        shutil.rmtree(place, ignore_errors=True)  # of a run that was killed before this step was saved
        use_judge = bool(recipe.judge.base_urls) and any(b["judge"] != "never" for b in benchmarks)
        job = Job("evaluate", settings, benchmarks, start, str(place), use_judge=use_judge, remote=True)
        metrics = {"suite/failed": 0.0}
        for event in run_worker(job, place, answerer=answerer):
            tell(WAIT)  # so that nobody waits longer than the process group allows
            if event["event"] != "result":
                continue
            name = f"suite/{event['task']}"
            metrics |= {f"{name}_{kind}": float(event[kind]) for kind in ("unparsed", "unknown")}
            if event["score"] is None:
                metrics["suite/failed"] += 1.0
                warn(f"train.eval_suite: {event['column']} has no score after step {step}: {event['failed']}")
            else:
                metrics[name] = float(event["score"])
        return metrics

    def evaluate(step: int) -> dict[str, float]:
        with accelerator.autocast(), gathered(parts.sampler):
            if accelerator.is_main_process:
                try:
                    return lead(step)
                finally:
                    tell(("end", None))
            while (what := tell(WAIT))[0] != "end":
                if what[0] == "answer":
                    together(*what[1])
        return {}

    return evaluate
