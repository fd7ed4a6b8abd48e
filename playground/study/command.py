"""The study's command: its settings, what must stay the same between its calls, and the report at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from openril.errors import DataError, StateError
from openril.report.progress import duration
from openril.storage import Lock, refuse_changed, weights_fingerprint, write_json
from playground.runner import Clock, Runner, exit_code
from playground.study.jobs import MODEL_NAMES, Plan
from playground.study.plan import CELLS, STUDENTS, TEACHERS, Settings


def say(line: str = "") -> None:
    print(line, flush=True)


def check(settings: Settings) -> None:
    """Raise DataError for unknown names and missing models."""
    names = {name for cells in CELLS.values() for name in cells}
    for what, given, known in (
        ("student", settings.students, set(STUDENTS)),
        ("student", settings.ablation_students, set(STUDENTS)),
        ("cell", settings.only, names),
    ):
        if unknown := sorted(set(given) - known):
            raise DataError(f"no {what} {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    needed = [f"{s}/{start}" for s in settings.students for start in ("base", "sft")]
    missing = [m for m in (*needed, *TEACHERS, "judge") if not (settings.models / m / "config.json").is_file()]
    if missing:
        raise DataError(
            f"{settings.models} lacks {', '.join(missing)}. Name the folder of the models with --models, or make them with"
            " `make playground`."
        )


def prepare(settings: Settings) -> None:
    """Draw the world, and note what all cells share. Raises StateError when the folder belongs to another study."""
    path = settings.out / "study.json"
    models = {name: found for name in MODEL_NAMES if (found := weights_fingerprint(settings.models / name))}
    keys = ("num_train", "num_validation", "num_test", "world_seed", "split")
    now: dict[str, Any] = {key: getattr(settings, key) for key in keys}
    if path.is_file():
        was = json.loads(path.read_text(encoding="utf-8"))
        models = {**was["models"], **models}  # A student may be added later, but not exchanged.
        was["models"] = {**models, **was["models"]}
        refuse_changed(settings.out, was, {**now, "models": models}, fix="name another --out")
    write_json(path, {**now, "models": models})
    if not (settings.out / "world" / "train.jsonl").is_file():
        from playground.world import write_skills_world

        numbers = (settings.num_train, settings.num_validation, settings.num_test)
        write_skills_world(settings.out / "world", *numbers, settings.world_seed, difficulty=1)
        say(f"world: {sum(numbers)} questions in {settings.out / 'world'}")


def run(settings: Settings) -> int:
    """Run the study; returns the exit code, which is 1 when a job failed (the same command tries it again)."""
    from rich.console import Console

    check(settings)
    prepare(settings)
    jobs = Plan(settings).jobs()
    clock = Clock(settings.out / "clock.json")
    runner = Runner(jobs, settings.out / "logs", Console(), width=settings.lanes, clock=clock, keep_going=True)
    if settings.list_jobs:
        for job in jobs:
            say(f"{'done' if job.name in runner.finished else '    '}  {job.name}")
        return 0
    changed = {job.name: keys for job in jobs if (keys := job.changed())}
    if changed:
        lines = "\n".join(f"  {name}: {', '.join(keys[:6])}" for name, keys in list(changed.items())[:8])
        raise StateError(
            f"{len(changed)} folders of {settings.out} were made with other settings:\n{lines}\nRestore them, remove those"
            " folders to make them again, or name another --out."
        )
    say(f"study: {len(jobs)} jobs, {len(runner.finished)} of them done; about {duration(runner.seconds_left())} left")
    say(
        f"by hand, for instance: ril train {settings.out}/{settings.students[0]}/contenders/ril_both/seed_0/recipe.yaml"
    )
    failed = runner.run()
    say(f"study: {len(runner.finished)} of {len(jobs)} jobs done, {duration(clock.seconds)} so far")
    for name, why in failed.items():
        say(f"  failed: {name}: {why.splitlines()[0]}")
    return 1 if failed else 0


def make_report(settings: Settings) -> None:
    from playground.study.page import default_page, write_report

    write_report(settings.out, settings.page or default_page(settings.out, settings.split), settings.resamples, say)


def main(arguments: Sequence[str] | None = None) -> int:
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="python -m playground.study")

    def body() -> int:
        if settings.report:
            make_report(settings)
            return 0
        lock = Lock(settings.out / ".lock")
        if not lock.acquire(wait=False):
            raise StateError(f"a study is running in {settings.out}. Wait for it, or name another --out.")
        try:
            code = run(settings)
        finally:
            lock.release()
        if not settings.list_jobs:
            make_report(settings)
        return code

    return exit_code("study", body)
