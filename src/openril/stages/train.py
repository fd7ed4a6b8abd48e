"""`ril train`: the RIL loop, from the recipe to the trained student."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console

from openril._version import __version__
from openril.benchmarking.measuring import PeakMemory
from openril.data.reading import read_questions
from openril.evaluation.evaluate import GREEDY
from openril.models.loading import torch_dtype
from openril.models.memory_estimate import GIB, shape_of_model
from openril.models.prompt_lengths import LeftOut
from openril.models.stage_memory import stage_memory
from openril.recipe.checks import require
from openril.recipe.loading import save_recipe
from openril.recipe.schema import Recipe
from openril.records import Question, Response
from openril.report.curves import draw_curves
from openril.report.progress import ProgressDisplay, say, warn_line
from openril.responses.cache import ResponseCache
from openril.responses.loaded import LoadedResponses
from openril.responses.teacher_sampling import draw, draw_pooled
from openril.rewards.answers import score_answers
from openril.rewards.combine import RewardSystem
from openril.rewards.judge import JudgeService, build_judge_service
from openril.rewards.verdict_store import OUTDATED
from openril.sampling.protocol import gathered, sample_fitting
from openril.stages.data_checks import check_questions, check_responses
from openril.stages.questions import training_questions
from openril.stages.report import TrainingReport
from openril.storage import write_json
from openril.training.checkpoint import Checkpoints, refuse_changed_recipe
from openril.training.distributed import make_accelerator, start_trackers
from openril.training.loop import RILTrainer, TeacherResponses, total_steps
from openril.training.right_responses import read_right_responses, write_right_responses
from openril.training.run_folder import RunFolder
from openril.training.setup import TrainingComponents


def run_train(recipe: Recipe, console: Console) -> Path:
    """Train, or continue, to the last step, and return the folder of the trained student (an ordinary checkpoint).

    Raises:
        Interrupted: When asked to stop; the state is saved.
        JudgeError: If too many verdicts are missing. The errors of data, cache, models and recipe are raised as well.
    """
    folder = RunFolder(recipe.run_path)
    if _finished(recipe, folder):
        say(console, f"train: already finished, the student is in {folder.student_path}")
        return folder.student_path
    peak = PeakMemory("cuda" if torch.cuda.is_available() else "cpu")
    peak.start()
    with open_trainer(recipe, console) as trainer:
        if trainer.step_number and trainer.accelerator.is_main_process:
            say(console, f"train: continuing after step {trainer.step_number}")
        with ProgressDisplay(console, "train") as progress:
            page = TrainingReport(recipe.run_path, recipe.train.report_every, progress.warn)
            trainer.warn = recorded(progress.warn, trainer)

            def report(step: int, total: int, row: dict[str, Any]) -> None:
                progress.report(step, total, row)
                page.step(step)

            trainer.report = report
            try:
                trainer.train()
            finally:
                if trainer.accelerator.is_main_process and folder.metrics_path.exists():
                    draw_curves(recipe.run_path)
                    trainer.folder.pictures.wait()
                    if line := page.write():
                        say(console, line)
        trainer.write_student(folder.student_path, torch_dtype(recipe.student.dtype))
        if trainer.accelerator.is_main_process:
            memory = _memory(recipe, trainer, peak.peak())
            write_json(folder.path / "finished.json", {"step": trainer.step_number, "peak_memory_gib": memory})
            if trainer.accelerator.trackers:
                measures = {f"memory/{name}_gib": value for name, value in memory.items()}
                trainer.accelerator.log(measures, step=trainer.step_number)
            said = " and ".join(f"{value:.2f} GiB {name}" for name, value in memory.items())
            say(console, f"train: peak memory of the models and their work, {said}")
            say(console, f"train: the student is in {folder.student_path}")
        trainer.accelerator.wait_for_everyone()
    return folder.student_path


def _memory(recipe: Recipe, trainer: RILTrainer, measured: int | None) -> dict[str, float]:
    """Return the peak above what was held before the models were loaded, predicted as `ril check` does and measured.

    On a CPU main memory is what is measured, which holds the cache of the vision side too, as far as it is filled.
    """
    shape = shape_of_model(trainer.policy.unwrapped.model)
    longest, processes = trainer.policy.encoder.longest, trainer.accelerator.num_processes
    other = trainer.discriminator if recipe.discriminator.init else None
    network = trainer.accelerator.unwrap_model(other.network) if other is not None else None
    d_shape = shape_of_model(network.backbone) if network is not None else None
    memory = stage_memory(recipe, shape, longest, processes=processes, discriminator=d_shape)[-1]
    found = {"predicted": memory.total / GIB}
    return found if measured is None else found | {"measured": measured / GIB}


def recorded(warn: Callable[[str], None], trainer: RILTrainer) -> Callable[[str], None]:
    """Return a function that prints a warning and records it in the run folder with the last step."""

    def both(message: str) -> None:
        warn(message)
        if trainer.accelerator.is_main_process:
            trainer.folder.log_warning(message, trainer.step_number)

    return both


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Return the versions of the packages that compute, the device, and the number of processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    versions = {"openril": __version__, "python": platform.python_version()}
    return {
        "versions": versions | {package: version(package) for package in ("torch", "transformers", "accelerate")},
        "device": name if processes == 1 else f"{processes} x {name}",
        "processes": processes,
    }


@contextmanager
def open_trainer(recipe: Recipe, console: Console | None = None) -> Iterator[RILTrainer]:
    """Build the ``RILTrainer`` of a recipe, and continue from the last checkpoint of the run folder if there is one.

    ``with open_trainer(recipe) as trainer: trainer.train()``. The end of the block closes judge and trackers.
    """
    accelerator = make_accelerator(recipe)
    folder = RunFolder(recipe.run_path)
    trainer: RILTrainer | None = None
    early: list[str] = []  # warnings from before the run folder may be written to

    def record(message: str) -> None:
        if trainer is None:
            early.append(message)
        elif accelerator.is_main_process:
            folder.log_warning(message, trainer.step_number)

    def warn(message: object) -> None:
        record(str(message))
        if console is not None and accelerator.is_main_process:
            say(console, f"train: {message}")

    def warn_of_data(message: str) -> None:
        record(message)
        if console is not None:
            warn_line(console, "train", message)

    folder.pictures.warn = warn

    for warning in require(recipe, "train", accelerator.num_processes):
        warn(warning)
    questions = training_questions(recipe, "train", accelerator, warn)
    check_questions(recipe, "train", questions, warn_of_data)
    evaluates = recipe.train.eval_every > 0 and bool(recipe.data.validation)
    judge: JudgeService | None = None
    parts: TrainingComponents | None = None

    def fits(response: Response) -> bool:
        assert parts is not None
        return parts.policy_update.fits(response)

    teacher_responses = cached_teacher_responses(
        recipe,
        questions,
        check=accelerator.is_main_process,
        fits=fits,
        inspect=lambda loaded: check_responses(recipe, questions, loaded, warn_of_data),
        wait=accelerator.wait_for_everyone,
        say=warn,
    )
    if recipe.answer_kind in ("judge", "rules_then_judge") or (evaluates and recipe.eval.score != "rules"):
        judge = build_judge_service(recipe, f"rank{accelerator.process_index}")
        if judge.store.outdated:
            warn(OUTDATED)
    try:
        rewards = RewardSystem(recipe, judge, gather=gather_object if accelerator.num_processes > 1 else None)
        parts = TrainingComponents(recipe, accelerator, folder.checkpoints_path, questions, probes(questions), warn)
        if parts.retry is not None and recipe.shows_teacher_answers:
            main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
            parts.retry.right = right_answers(recipe, questions, check=main, wait=wait, say=warn)
        if accelerator.is_main_process:
            save_recipe(recipe, recipe.run_path / "recipe.yaml")
            folder.cut_after(parts.step)
            folder.log_environment(**environment(accelerator.device, accelerator.num_processes))
            for message in early:
                folder.log_warning(message)
        start_trackers(accelerator, recipe)
        accelerator.wait_for_everyone()
        trainer = RILTrainer(
            recipe,
            questions,
            accelerator=accelerator,
            sampler=parts.sampler,
            policy=parts.policy_update,
            discriminator=parts.discriminator,
            teacher_responses=teacher_responses,
            rewards=rewards,
            folder=folder,
            save=parts.saver.save,
            write_student=parts.saver.write_student,
            evaluate=_evaluations(recipe, parts, judge if evaluates else None, warn),
            offload=parts.offload,
            gate=parts.gate,
            retry=parts.retry,
            first_step=parts.step,
        )
        yield trainer
    finally:
        if judge is not None:
            judge.close()
        if parts is not None:
            parts.close()
        for tracker in accelerator.trackers:
            tracker.finish()


def probes(questions: Sequence[Question]) -> list[Question]:
    """Return the first question with images and the first without."""
    firsts = [next((q for q in questions if bool(q.images) == images), None) for images in (True, False)]
    return [q for q in firsts if q is not None]


def cached_teacher_responses(
    recipe: Recipe,
    questions: list[Question],
    *,
    check: bool = True,
    fits: Callable[[Response], bool] | None = None,
    inspect: Callable[[LoadedResponses], None] = lambda loaded: None,
    wait: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda message: None,
) -> TeacherResponses:
    """Return a function that draws a question's teacher responses from the cache, those that ``fits`` accepts.

    Args:
        check: Compare the cache with the questions and their images now; one process of a run is enough.
        inspect: Receives all responses.
        wait: With ``train.teacher_draw: judged_right``, returns once every process has called it; the process with
            ``check`` writes what is right before.
        say: Receives the counts of what is right.
    """
    count = recipe.teacher_responses_per_question
    if not count:
        return lambda question, epoch: []
    cache = ResponseCache.open(recipe.cache_path).load(
        questions, recipe.teacher_names, recipe.collect.num_responses, check_hashes=check
    )
    inspect(cache)
    train = recipe.train
    each = train.num_generations if train.num_teacher_responses is None else train.num_teacher_responses
    amount = {"per_teacher": each} if train.per_teacher else {"total": count}

    right = None
    if train.teacher_draw == "judged_right":
        right = right_responses(recipe, questions, cache, write=check, wait=wait, say=say)

    def responses(question: Question, epoch: int) -> list[Response]:
        fitting = fits
        if right is not None:
            every = [r for t in recipe.teacher_names for r in cache.responses_for(question.id, t)]
            every = [r for r in every if fits is None or fits(r)]
            if pool := [r for r in every if right(r)]:
                return draw_pooled(pool, question.id, total=count, seed=recipe.seed, epoch=epoch)
            fitting = every.__contains__  # so that ``fits`` counts each once
        return draw(cache, question.id, recipe.teacher_names, seed=recipe.seed, epoch=epoch, fits=fitting, **amount)

    return responses


def right_responses(
    recipe: Recipe,
    questions: list[Question],
    cache: LoadedResponses,
    *,
    write: bool,
    wait: Callable[[], None],
    say: Callable[[str], None],
) -> Callable[[Response], bool]:
    """Return whether a cached response was judged right when the run started, which one process writes down before."""
    if write and Checkpoints(RunFolder(recipe.run_path).checkpoints_path).latest() is None:
        write_right_responses(recipe, questions, cache, say)
    wait()
    return read_right_responses(recipe)


def right_answers(
    recipe: Recipe, questions: list[Question], *, check: bool, wait: Callable[[], None], say: Callable[[str], None]
) -> Callable[[Question], list[str]]:
    """Return a function that returns the texts of a question's cached teacher responses that were judged right.

    Args: As for ``cached_teacher_responses``.
    """
    names, number = recipe.teacher_names, recipe.collect.num_responses
    cache = ResponseCache.open(recipe.cache_path).load(questions, names, number, check_hashes=check)
    right = right_responses(recipe, questions, cache, write=check, wait=wait, say=say)
    return lambda question: [r.text for name in names for r in cache.responses_for(question.id, name) if right(r)]


def _finished(recipe: Recipe, folder: RunFolder) -> bool:
    """Return whether the student of the last step exists. A recipe with more steps than before continues."""
    marker = folder.path / "finished.json"
    if not (marker.exists() and folder.student_path.is_dir()):
        return False
    latest = Checkpoints(folder.checkpoints_path).latest()
    if latest is not None:
        refuse_changed_recipe(folder.path, latest / "recipe.yaml", recipe, fix="set another run_dir for a new run")
    steps = recipe.train.max_steps or total_steps(recipe, len(training_questions(recipe)))
    return int(json.loads(marker.read_text())["step"]) >= steps


def _evaluations(
    recipe: Recipe, parts: TrainingComponents, judge: JudgeService | None, warn: Callable[[object], None]
) -> Callable[[int], dict[str, float]] | None:
    """Return a function that evaluates the student after a step as the recipe says, or None if it says nothing."""
    if not recipe.train.eval_every:
        return None
    found: list[Callable[[int], dict[str, float]]] = []
    if recipe.data.validation:
        found.append(_evaluation(recipe, parts, judge))
    if recipe.train.eval_suite:
        from openril.stages.suite_in_training import suite_evaluation

        found.append(suite_evaluation(recipe, parts, warn))
    return lambda step: {name: value for evaluate in found for name, value in evaluate(step).items()}


def _evaluation(
    recipe: Recipe, parts: TrainingComponents, judge: JudgeService | None
) -> Callable[[int], dict[str, float]]:
    """Return a function that scores the current student's greedy answers, with the questions split over processes."""
    questions = read_questions(recipe.data, "validation")
    questions = questions[: recipe.eval.limit] if recipe.eval.limit else questions
    accelerator, left_out = parts.accelerator, LeftOut(recipe, "eval")

    def evaluate(step: int) -> dict[str, float]:
        mine = questions[accelerator.process_index :: accelerator.num_processes]
        # Also without questions, because all processes sync the servers, or gather the weights, together.
        with accelerator.autocast(), gathered(parts.sampler):
            limit = recipe.eval.max_completion_length
            answers = sample_fitting(
                parts.sampler, mine, 1, left_out.add, settings=GREEDY, max_completion_length=limit, seed=recipe.seed
            )
        items = [(q, a[0].text) for q, a in zip(mine, answers, strict=True) if a]
        scores = [s.score for s in score_answers(items, recipe.eval.score, recipe.eval.rule, judge)]
        scores += [None] * (len(mine) - len(items))  # too long to be answered
        everyone = [s for part in gather_object([scores]) for s in part]
        known = [s for s in everyone if s is not None]
        out = {"questions": float(len(everyone)), "unknown": float(len(everyone) - len(known))}
        return out | ({"score": sum(known) / len(known)} if known else {})

    return evaluate
