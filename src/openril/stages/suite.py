"""`ril eval --suite`: the paper's fourteen benchmarks, or any task of lmms-eval, in one table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openril.errors import EndpointError, JudgeError, ModelError, OpenRILError, RecipeError
from openril.evaluation.suite import benchmarks as known
from openril.evaluation.suite.benchmarks import Benchmark
from openril.evaluation.suite.results import BenchmarkResult, Scored, mean_score
from openril.evaluation.suite.table import Checkpoint, OtherRow, markdown, paper_rows, rich_table, suite_data
from openril.evaluation.suite.vlmevalkit import read_vlmevalkit
from openril.recipe.schema import Recipe
from openril.report.progress import ProgressDisplay, say
from openril.storage import Lock, read_jsonl, stable_hash, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

    from openril.stages.eval import Target

NOWHERE = "http://127.0.0.1:9/v1"
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

    Under a launcher, each process takes every n-th checkpoint, and the one that ends last writes the whole table.

    Args:
        offline: Ask no judge.
        check: Only say what is here and what is missing.
        download: Allow the download of data sets.
        others: Rows that were measured elsewhere.

    Raises:
        RecipeError: lmms-eval is not installed, or a judge is needed and not set.
        JudgeError: The judge does not answer.
        OpenRILError: A benchmark has no score. The table is written all the same.
    """
    folder = recipe.run_path / "eval" / "suite"
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    version = _lmms_eval()
    use_judge = not offline and any(b.judge != "never" for b in benchmarks)
    if use_judge and not recipe.judge.base_urls:
        raise RecipeError(
            "judge.base_urls: expected the judge's server for MathVista, MM-Vet, MM-Vet-v2 and MMBench, got none. Set it, "
            "or use --suite offline."
        )
    if check:
        if rank == 0:
            _check(recipe, console, targets, benchmarks, use_judge=use_judge, download=download, folder=folder)
        return folder.parent / "suite.md"
    if use_judge:
        _probe(recipe, folder)
    if recipe.student.sampler.engine == "vllm":  # its servers hold one checkpoint at a time
        rank, world, mine = rank, 1, list(targets) if rank == 0 else []
    else:
        mine = list(targets)[rank::world]
    for target in mine:
        _evaluate(recipe, console, target, benchmarks, version, use_judge=use_judge, download=download, folder=folder)
    with Lock(folder / "table.lock"):
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
    *,
    use_judge: bool,
    download: bool,
    folder: Path,
) -> None:
    from openril.evaluation.suite.worker import Job

    answers, key = _keys(recipe, target, version, use_judge)
    place = folder / target.name
    todo = [b for b in benchmarks if not _finished(place, b, key)]
    if not todo:
        return
    job = Job(
        action="evaluate",
        recipe=recipe.model_dump(mode="json"),
        benchmarks=[asdict(b) for b in todo],
        checkpoint=_local(target.checkpoint, recipe),
        folder=str(place),
        key=answers,
        result_key=key,
        use_judge=use_judge,
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


def _local(checkpoint: str, recipe: Recipe) -> str:
    """Return the folder of a checkpoint, which the worker opens without the hub."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return str(path)
    from huggingface_hub import snapshot_download

    revision = recipe.student.revision if checkpoint == recipe.student.model else None
    try:
        return snapshot_download(checkpoint, revision=revision)
    except Exception as e:
        raise ModelError(f"{checkpoint}: expected a checkpoint folder or hub name; the hub gave: {str(e)[:200]}") from e


def run_worker(job: Any, folder: Path, *, download: bool = False) -> Iterator[dict[str, Any]]:
    """Run a job in another process and yield its events. Its log is ``worker.log`` in ``folder``.

    Raises:
        OpenRILError: The error that the worker reports.
        ModelError: The worker died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / "job.json", folder / "worker.log"
    job.write(path)
    with open(log, "a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "openril.evaluation.suite.worker", str(path)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=_environment(download),
            cwd=folder,  # some tasks write files where they run
        )
    error: OpenRILError | None = None
    with _ended(process):
        assert process.stdout is not None
        for line in process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # lmms-eval prints
            if not isinstance(event, dict) or "event" not in event:
                continue
            if event["event"] == "error":
                kinds = {"JudgeError": JudgeError, "EndpointError": EndpointError}
                error = kinds.get(event["kind"], OpenRILError)(event["message"])
            else:
                yield event
    if error is not None:
        raise error
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ModelError(
            f"the evaluation's process ended with exit code {process.returncode} ({''.join(tail)[:200]}). {log} has its "
            "output. The answers so far are kept; run the same command again."
        )


@contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Let no worker outlive this process's interest in it."""
    try:
        yield
    finally:
        if sys.exc_info()[0] is not None:
            process.terminate()
        process.wait()


def _environment(download: bool) -> dict[str, str]:
    """Return the worker's environment: without the variables by which lmms-eval chooses judges, since two families of its
    tasks read OPENAI_API_URL differently, and without a launcher's, since the worker is alone."""
    drop = {
        *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OPENAI_API_URL", "OPENAI_BASE_URL", "API_TYPE"),
        *("MODEL_VERSION", "AZURE_ENDPOINT", "AZURE_API_KEY", "NUM_IMAGE"),
    }
    env = {k: v for k, v in os.environ.items() if k not in drop}
    # lmms-eval's modules want a key at import. Requests of their own would fail at once and not leave this machine.
    env.setdefault("OPENAI_API_KEY", "none")
    env |= dict.fromkeys(("OPENAI_API_URL", "OPENAI_BASE_URL"), NOWHERE)
    if not download:
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return env


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
    console.print(rich_table(data, checkpoints, benchmarks))
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

    job = Job(action="check", recipe=recipe.model_dump(mode="json"), benchmarks=[asdict(b) for b in benchmarks])
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
    if use_judge:
        try:
            _probe(recipe, folder)
            say(console, "judge: answers")
        except (JudgeError, EndpointError) as e:
            say(console, f"judge: {e}")
    rate = _seconds_a_question(folder, benchmarks)
    hours = SECONDS_UNKNOWN if rate is None else f"about {rate * questions * len(targets) / 3600:.1f} hours"
    say(console, f"time: {hours} for {len(targets)} checkpoints")


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
