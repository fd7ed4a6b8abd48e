"""`ril eval`: score the student's checkpoints on data.validation and compare them in one table."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openril._version import __version__
from openril.checkpoint_files import require_folder
from openril.errors import ModelError
from openril.recipe.schema import Recipe
from openril.report.progress import ProgressDisplay, say, warn_line
from openril.storage import read_jsonl, stable_hash, weights_fingerprint, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

    from openril.evaluation.evaluate import Journal
    from openril.evaluation.summary import Evaluation
    from openril.records import Question
    from openril.rewards.judge import JudgeService
    from openril.sampling.protocol import Sampler


@dataclass(frozen=True)
class Target:
    """A checkpoint to evaluate. name: the name of its files and of its row in the table."""

    name: str
    checkpoint: str


def run_eval(
    recipe: Recipe,
    console: Console,
    checkpoints: list[str] | None = None,
    *,
    suite: list[str] | None = None,
    tasks: list[str] | None = None,
    check: bool = False,
    download: bool = False,
    beside: list[str] | None = None,
    import_: list[str] | None = None,
    make_sampler: Callable[[Recipe, str], Sampler] | None = None,
) -> Path:
    """Evaluate what has not been evaluated with these settings yet, and return the path of the Markdown table.

    Writes ``run_dir/eval/``: ``<name>.json``, ``<name>.jsonl`` (every answer), ``table.json`` and ``table.md``. Under a
    launcher only the first process works.

    Args:
        checkpoints: Folders or hub names; None for the base student, the SFT student, every student in ``checkpoints/``
            and the final one, as far as they exist.
        suite: ``["paper"]`` or ``["offline"]``: run benchmarks instead of data.validation (``stages/suite.py``).
        tasks: Run these lmms-eval tasks instead.
        check, download, beside, import_: Options of benchmarks.
        make_sampler: Makes the sampler from (recipe, checkpoint); None follows student.sampler.

    Raises:
        JudgeError: If too many verdicts are missing. The answers are kept, and the same command continues.
    """
    if suite or tasks or check or download or beside or import_:
        from openril.stages.suite import find_benchmarks, other_rows, run_suite

        name = " ".join(suite or ["paper"])
        return run_suite(
            recipe,
            console,
            find_targets(recipe) if checkpoints is None else [named(recipe, c) for c in checkpoints],
            find_benchmarks(name, tasks or []),
            offline=name == "offline",
            check=check,
            download=download,
            others=other_rows(beside or [], import_ or []),
        )
    folder = recipe.run_path / "eval"
    if int(os.environ.get("RANK", "0")):
        return folder / "table.md"
    from openril.data.reading import read_questions
    from openril.evaluation.summary import TOO_LONG
    from openril.evaluation.table import markdown_table, rich_table, table_data
    from openril.recipe.checks import require
    from openril.rewards.judge import build_judge_service
    from openril.rewards.verdict_store import OUTDATED
    from openril.stages.data_checks import check_questions

    require(recipe, "eval")
    questions = read_questions(recipe.data, "validation")
    questions = questions[: recipe.eval.limit] if recipe.eval.limit else questions
    targets = find_targets(recipe) if checkpoints is None else [named(recipe, c) for c in checkpoints]
    for target in targets:
        require_folder(f"eval {target.name}", target.checkpoint)
    check_questions(
        recipe, "eval", questions, partial(warn_line, console, "eval"), "validation", processed=make_sampler is None
    )
    settings = settings_of(recipe, questions)
    judge: JudgeService | None = None
    evaluations: dict[str, Evaluation] = {}
    try:
        for target in targets:
            identity = identity_of(target.checkpoint, recipe)
            done = read_evaluation(folder, target.name, settings, identity)
            if done is None:
                if judge is None and recipe.eval.score != "rules":
                    judge = build_judge_service(recipe, "eval")
                    if judge.store.outdated:
                        say(console, f"eval: {OUTDATED}")
                with ProgressDisplay(console, f"eval {target.name}") as progress:
                    done = _evaluate(
                        recipe, target, questions, settings, identity, judge, progress.report, make_sampler
                    )
            if too_long := sum(row.finish_reason == TOO_LONG for row in done.rows):
                say(
                    console,
                    f"eval {target.name}: {too_long} of {len(done.rows)} questions are longer than data.max_prompt_length"
                    f" and count as unknown; {recipe.run_path / 'left_out.jsonl'} lists them",
                )
            evaluations[target.name] = done
    finally:
        if judge is not None:
            judge.close()
    # Checkpoints that were removed after their evaluation keep their row.
    for path in sorted(folder.glob("*.json")):
        if path.stem not in evaluations and path.name != "table.json":
            older = read_evaluation(folder, path.stem, settings)
            if older is not None:
                evaluations[path.stem] = older
    ordered = [evaluations[name] for name in sorted(evaluations, key=place)]
    write_json(folder / "table.json", {"settings": settings, "evaluations": table_data(ordered)})
    write_text(folder / "table.md", markdown_table(ordered))
    console.print(rich_table(ordered, console.width))
    return folder / "table.md"


def find_targets(recipe: Recipe) -> list[Target]:
    """Return the base student, the SFT student, the loop's checkpoints and the final student, as far as they exist."""
    found = [Target("base", recipe.student.model)] if recipe.student.model else []
    if recipe.sft_student_path.is_dir():
        found.append(Target("sft", str(recipe.sft_student_path)))
    steps = sorted((recipe.run_path / "checkpoints").glob("step_*/student"))
    found += [Target(path.parent.name, str(path)) for path in steps]
    if (recipe.run_path / "student").is_dir():
        found.append(Target("final", str(recipe.run_path / "student")))
    if not found:
        raise ModelError("found no checkpoint to evaluate. Set student.model, or name checkpoints with --checkpoints.")
    return found


def named(recipe: Recipe, checkpoint: str) -> Target:
    """Name a checkpoint of the command line: known ones keep their names, others are named after their last folders."""
    path = Path(checkpoint).expanduser()
    for target in find_targets(recipe) if recipe.student.model else []:
        if target.checkpoint == checkpoint or (path.is_dir() and path.resolve() == Path(target.checkpoint).resolve()):
            return target
    parts = (path.resolve() if path.is_dir() else path).parts[-2:]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-.") or "checkpoint"
    # Two paths may end in the same folders, so a hash of the whole path makes the name unique.
    location = str(path.resolve()) if path.is_dir() else checkpoint
    return Target(f"{readable}-{stable_hash(location) % 16**4:04x}", checkpoint)


def place(name: str) -> tuple[int, str]:
    """Return the sort key of the table's rows."""
    order = {"base": 0, "sft": 1, "final": 3}
    return order.get(name, 2 if re.fullmatch(r"step_\d+", name) else 4), name


def settings_of(recipe: Recipe, questions: list[Question]) -> dict[str, Any]:
    """Return everything except the checkpoint that a score depends on, as plain data that is stored with the score."""
    from openril.rewards.judge_protocol import judge_identity

    student = recipe.student
    asked = recipe.eval.score != "rules"
    content = [[q.content_hash(), q.answer, list(q.choices), q.rule, *q.other_answers] for q in questions]
    return {
        **recipe.eval.model_dump(
            mode="json", exclude={"questions_per_batch", "limit", "suite_data", "suite_max_tokens"}
        ),
        "decoding": "greedy",
        "questions": len(questions),
        "questions_hash": f"{stable_hash(content):016x}",
        "system_prompt": student.system_prompt,
        "max_prompt_length": recipe.data.max_prompt_length,
        "min_pixels": student.min_pixels,
        "max_pixels": student.max_pixels,
        "judge": judge_identity(recipe.judge) if asked else None,
    }


def identity_of(checkpoint: str, recipe: Recipe) -> str:
    """Return the fingerprint of a folder's weights, or the name and revision of a checkpoint on the hub."""
    revision = recipe.student.revision if checkpoint == recipe.student.model else None
    return weights_fingerprint(Path(checkpoint).expanduser()) or f"{checkpoint}@{revision or 'main'}"


def read_evaluation(
    folder: Path, name: str, settings: dict[str, Any], identity: str | None = None
) -> Evaluation | None:
    """Return the finished evaluation with these settings (and of these weights), or None. One with unknown verdicts is not
    finished, so that it is continued."""
    from openril.evaluation.summary import TOO_LONG, Row, build_evaluation

    try:
        saved = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if saved.get("settings") != settings or (identity is not None and saved.get("weights") != identity):
        return None
    rows = [Row(**row) for row in read_jsonl(folder / f"{name}.jsonl") if "question_id" in row]
    unknown = any(row.score is None and row.finish_reason != TOO_LONG for row in rows)
    if len(rows) != saved["n"] or (identity is not None and unknown):
        return None
    return build_evaluation(name, saved["checkpoint"], rows)


def _evaluate(
    recipe: Recipe,
    target: Target,
    questions: list[Question],
    settings: dict[str, Any],
    identity: str,
    judge: JudgeService | None,
    report: Callable[[int, int, dict[str, Any]], None],
    make_sampler: Callable[[Recipe, str], Sampler] | None,
) -> Evaluation:
    import torch

    from openril.evaluation.evaluate import Journal, evaluate
    from openril.hf import transformers
    from openril.models.prompt_lengths import LeftOut
    from openril.sampling.checkpoint_sampler import open_sampler

    folder = recipe.run_path / "eval"
    journal: Journal = Journal(folder / f"{target.name}.jsonl", f"{stable_hash(settings, identity):016x}")
    with ExitStack() as stack:

        def sampler() -> Sampler:
            if make_sampler is not None:
                return make_sampler(recipe, target.checkpoint)
            opened = open_sampler(recipe, target.checkpoint, questions, recipe.eval.questions_per_batch)
            return stack.enter_context(opened)

        result = evaluate(
            sampler,
            questions,
            recipe.eval,
            judge,
            name=target.name,
            checkpoint=target.checkpoint,
            journal=journal,
            max_unknown_share=recipe.judge.max_unknown_share,
            report=report,
            too_long=LeftOut(recipe, "eval").add,
        )
    versions = {"openril": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(
        folder / f"{target.name}.json",
        {**result.as_dict(), "weights": identity, "settings": settings, "versions": versions, "date": date},
    )
    return result
