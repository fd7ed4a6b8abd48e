"""`ril eval --suite`: the paper's fourteen benchmarks, or any task of lmms-eval, in one table."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openril.errors import DataError, EndpointError, JudgeError, ModelError, OpenRILError, RecipeError
from openril.evaluation.suite import benchmarks as known
from openril.evaluation.suite.benchmarks import Benchmark
from openril.evaluation.suite.process import run_worker, worker_recipe
from openril.evaluation.suite.results import BenchmarkResult, Scored, mean_score
from openril.evaluation.suite.table import Checkpoint, OtherRow, markdown, paper_rows, rich_table, suite_data
from openril.evaluation.suite.vlmevalkit import read_vlmevalkit
from openril.recipe.schema import Recipe
from openril.report.progress import ProgressDisplay, say
from openril.storage import read_jsonl, stable_hash, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

    from openril.stages.eval import Target

SECONDS_UNKNOWN = "the time is not known before the first answers"


def run_suite(
    recipe: Recipe,
    console: Console,
    targets: Sequence[Target],
    benchmarks: Sequence[Benchmark],
    *,
    offline: bool = False,
    check: bool = False,
    download: bool = False,
    others: Sequence[OtherRow] = (),
) -> Path:
    """Evaluate checkpoints on benchmarks, and return the path of the Markdown table.

    Under a launcher, the processes share the questions of each checkpoint, and the first one scores and writes the table.

    Args:
        offline: Ask no judge.
        check: Only say what is here and what is missing.
        download: Allow the download of data sets.
        others: Rows that were measured elsewhere.

    Raises:
        RecipeError: lmms-eval is not installed, or a judge is needed and not set.
        JudgeError: The judge does not answer.
        DataError: With ``check``, if data are missing or the judge does not answer.
        OpenRILError: A benchmark has no score. The table is written all the same.
    """
    folder = recipe.run_path / "eval" / "suite"
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    version = _lmms_eval()
    use_judge = not offline and any(b.judge != "never" for b in benchmarks)
    if use_judge and not recipe.judge.base_urls:
        raise RecipeError(_no_judge(recipe, benchmarks))
    if check:
        if rank == 0:
            _check(recipe, console, targets, benchmarks, use_judge=use_judge, download=download, folder=folder)
        return folder.parent / "suite.md"
    if recipe.student.sampler.engine == "vllm":  # one process keeps its servers busy
        world = 1
    if rank >= world:
        return folder.parent / "suite.md"
    if use_judge and rank == 0:
        _probe(recipe, folder)
    share = rank, world
    for target in targets:
        _evaluate(recipe, console, target, benchmarks, version, folder, share, use_judge=use_judge, download=download)
    if rank:
        return folder.parent / "suite.md"
    read = [
        read_checkpoint(folder, t.name, t.checkpoint, benchmarks, _keys(recipe, t, version, use_judge)[1])
        for t in targets
    ]
    path = _write(recipe, console, folder, read, benchmarks, others)
    failed = [f"{c.name}: {r.column}: {r.failed}" for c in read for r in c.results.values() if r.failed]
    if failed:
        raise OpenRILError(
            f"{len(failed)} benchmarks have no score, the first is {failed[0]} ({path} lists all). The answers are kept; run "
            "the same command again when the cause is fixed."
        )
    return path


def find_benchmarks(suite: str, tasks: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks of a suite or the named lmms-eval tasks. Those outside the fourteen have no metric yet."""
    whole = known.suite(suite)
    if tasks:
        return [known.named(task) or Benchmark(task, task, "") for task in dict.fromkeys(tasks)]
    return list(whole)


def _no_judge(recipe: Recipe, benchmarks: Sequence[Benchmark]) -> str:
    asking = ", ".join(b.column for b in benchmarks if b.judge != "never")
    if path := recipe.judge.model_path:
        key, found = "judge.model_path", f"the checkpoint {path}, which is not used here"
        fix = f"Serve it (vllm serve {path}) and set judge.base_urls instead"
    else:
        key, found, fix = "judge.base_urls", "none", "Set it"
    return f"{key}: expected the server of a judge for {asking}, got {found}. {fix}, or use --suite offline."


def _lmms_eval() -> str:
    try:
        return importlib.metadata.version(known.LMMS_EVAL)
    except importlib.metadata.PackageNotFoundError:
        raise RecipeError(f"--suite: lmms-eval is not installed. Install it with: {known.INSTALL}") from None


def _probe(recipe: Recipe, folder: Path) -> None:
    from openril.evaluation.suite.judging import SuiteJudge

    judge = SuiteJudge(recipe.judge, folder / "probe.jsonl")
    try:
        judge.probe()
    finally:
        judge.close()


def _evaluate(
    recipe: Recipe,
    console: Console,
    target: Target,
    benchmarks: Sequence[Benchmark],
    version: str,
    folder: Path,
    share: tuple[int, int],
    *,
    use_judge: bool,
    download: bool,
) -> None:
    from openril.evaluation.suite.worker import Job

    answers, key = _keys(recipe, target, version, use_judge)
    place = folder / target.name
    todo = [b for b in benchmarks if not _finished(place, b, key)]
    if not todo:
        return
    job = Job(
        action="evaluate",
        recipe=worker_recipe(recipe),
        benchmarks=[asdict(b) for b in todo],
        checkpoint=local_checkpoint(target.checkpoint, recipe),
        folder=str(place),
        key=answers,
        result_key=key,
        use_judge=use_judge,
        rank=share[0],
        world=share[1],
    )
    with ProgressDisplay(console, f"eval {target.name}") as progress:
        done: dict[str, int] = {}
        for event in run_worker(job, place, download=download):
            if event["event"] == "answers":
                done[event["task"]] = event["done"]
                progress.report(event["done"], event["total"], {})
            elif event["event"] == "result":
                score = event["score"]
                shown = f"{score:.1f}" if score is not None else f"no score: {event['failed']}"
                say(console, f"eval {target.name}: {event['column']}: {shown}")


def _keys(recipe: Recipe, target: Target, version: str, use_judge: bool) -> tuple[str, str]:
    """Return what a checkpoint's answers depend on, and what its scores depend on."""
    from openril.stages.eval import identity_of

    answers = f"{stable_hash(identity_of(target.checkpoint, recipe), version, *_settings(recipe).values()):016x}"
    judged = recipe.judge.model_dump(include={"model", "revision", "extra_body"}) if use_judge else None
    mirror = Path(recipe.eval.suite_data).expanduser() if recipe.eval.suite_data else None
    files = sorted(mirror.rglob("*")) if mirror else []
    state = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return answers, f"{answers}-{stable_hash(str(judged), recipe.eval.limit, str(state)):016x}"


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that answers depend on."""
    student = recipe.student
    return {
        "system_prompt": student.system_prompt,
        "max_prompt_length": recipe.data.max_prompt_length,
        "min_pixels": student.min_pixels,
        "max_pixels": student.max_pixels,
        "max_completion_length": recipe.eval.max_completion_length,
        "suite_max_tokens": recipe.eval.suite_max_tokens,
        "engine": student.sampler.engine,
    }


def local_checkpoint(checkpoint: str, recipe: Recipe) -> str:
    """Return the folder of a checkpoint, which the worker opens without the hub."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return str(path.resolve())
    from huggingface_hub import snapshot_download

    revision = recipe.student.revision if checkpoint == recipe.student.model else None
    try:
        return snapshot_download(checkpoint, revision=revision)
    except Exception as e:
        raise ModelError(f"{checkpoint}: expected a checkpoint folder or hub name; the hub gave: {str(e)[:200]}") from e


def _finished(place: Path, benchmark: Benchmark, key: str) -> bool:
    """Return whether there is a result with the same settings in which nothing is unknown."""
    try:
        saved = json.loads((place / f"{benchmark.task}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return saved.get("key") == key and not saved["failed"] and not saved["unknown"]


def read_checkpoint(
    folder: Path, name: str, checkpoint: str, benchmarks: Sequence[Benchmark], key: str | None = None
) -> Checkpoint:
    """Return what is on disk of a checkpoint. key: leave out results with other settings."""
    results, units = {}, {}
    for b in benchmarks:
        try:
            saved = json.loads((folder / name / f"{b.task}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if saved.pop("key") != key and key is not None:
            continue
        results[b.task] = BenchmarkResult(**saved)
        units[b.task] = [Scored(**row) for row in read_jsonl(folder / name / f"{b.task}.jsonl")]
    return Checkpoint(name, checkpoint, results, units)


def _write(
    recipe: Recipe,
    console: Console,
    folder: Path,
    checkpoints: Sequence[Checkpoint],
    benchmarks: Sequence[Benchmark],
    others: Sequence[OtherRow],
) -> Path:
    data = {"settings": _settings(recipe), **suite_data(checkpoints, benchmarks, others)}
    write_json(folder.parent / "suite.json", data)
    write_text(folder.parent / "suite.md", markdown(data, checkpoints, benchmarks))
    console.print(rich_table(data, checkpoints, benchmarks, console.width))
    for c in checkpoints:
        if mean_score(c.results, [b.task for b in benchmarks]) is None:
            missing = [b.column for b in benchmarks if (r := c.results.get(b.task)) is None or r.score is None]
            say(console, f"eval {c.name}: no mean, because there is no score of {', '.join(missing)}")
    return folder.parent / "suite.md"


def _check(
    recipe: Recipe,
    console: Console,
    targets: Sequence[Target],
    benchmarks: Sequence[Benchmark],
    *,
    use_judge: bool,
    download: bool,
    folder: Path,
) -> None:
    from openril.evaluation.suite.worker import Job

    job = Job(action="check", recipe=worker_recipe(recipe), benchmarks=[asdict(b) for b in benchmarks])
    columns = {b.task: b.column for b in benchmarks}
    questions, size, missing = 0, 0, 0
    for event in run_worker(job, folder, download=download):
        if event.get("missing"):
            missing += 1
            say(console, f"missing  {columns[event['task']]}: {event['missing']}")
        else:
            questions, size = questions + event["questions"], size + event["bytes"]
            gigabytes = f"{event['bytes'] / 1e9:.2f} GB"
            say(console, f"here     {columns[event['task']]}: {event['questions']} questions, {gigabytes}")
    say(
        console,
        f"data: {len(benchmarks) - missing} of {len(benchmarks)} benchmarks, {questions} questions, {size / 1e9:.2f} GB",
    )
    problems = []
    if missing:
        problems.append(f"eval.suite_data: expected the data of {len(benchmarks)} benchmarks, {missing} are missing")
    if use_judge:
        try:
            _probe(recipe, folder)
            say(console, "judge: answers")
        except (JudgeError, EndpointError) as e:
            problems.append(str(e))
            say(console, f"judge: {e}")
    rate = _seconds_a_question(folder, benchmarks)
    hours = SECONDS_UNKNOWN if rate is None else f"about {rate * questions * len(targets) / 3600:.1f} hours"
    say(console, f"time: {hours} for {len(targets)} checkpoints")
    if problems:
        raise DataError(
            "; ".join(problems)
            + ". The lines above name each; benchmarks that are not there need --download or another folder."
        )


def _seconds_a_question(folder: Path, benchmarks: Sequence[Benchmark]) -> float | None:
    """Return the mean of earlier evaluations in this run folder, or None if there are none."""
    seconds = questions = 0.0
    for place in sorted(folder.glob("*/")):
        for result in read_checkpoint(folder, place.name, "", benchmarks).results.values():
            seconds += result.details.get("seconds", 0.0)
            questions += result.details.get("questions", 0)
    return seconds / questions if questions else None


def other_rows(beside: Sequence[str], imported: Sequence[str]) -> list[OtherRow]:
    """Return the rows of ``--beside paper`` and ``--import vlmevalkit FOLDER``."""
    rows: list[OtherRow] = []
    for name in beside:
        if name != "paper":
            raise RecipeError(f"--beside: expected paper, got {name!r}.")
        rows += paper_rows()
    if imported:
        if len(imported) != 2 or imported[0] != "vlmevalkit":
            raise RecipeError(f"--import: expected vlmevalkit FOLDER, got {' '.join(imported)!r}.")
        rows += read_vlmevalkit(Path(imported[1]).expanduser())
    return rows
