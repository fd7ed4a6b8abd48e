"""Start the worker process of the benchmarks, and answer its questions if it asks for answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from openril.errors import EndpointError, JudgeError, ModelError, OpenRILError
from openril.evaluation.suite.remote import Answerer, answer
from openril.recipe.schema import Recipe

NOWHERE = "http://127.0.0.1:9/v1"


def worker_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe for the worker, which runs in another folder: its own paths are absolute."""
    settings = recipe.model_dump(mode="json")
    settings["run_dir"] = str(recipe.run_path)
    for section, key in ((settings["eval"], "suite_data"), (settings["student"]["sampler"], "weights_dir")):
        section[key] = str(Path(section[key]).expanduser().resolve()) if section[key] else ""
    return settings


def run_worker(
    job: Any, folder: Path, *, download: bool = False, answerer: Answerer | None = None
) -> Iterator[dict[str, Any]]:
    """Run a job in another process and yield its events. Its log is ``worker.log`` in ``folder``.

    Args:
        answerer: Answers the questions of a job with ``remote``.

    Raises:
        OpenRILError: The error that the worker reports.
        ModelError: The worker died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / (f"job.{job.rank}.json" if job.rank else "job.json"), folder / "worker.log"
    job.write(path)
    with open(log, "a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "openril.evaluation.suite.worker", str(path)],
            stdin=subprocess.DEVNULL if answerer is None else subprocess.PIPE,
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
            elif event["event"] == "questions":
                assert process.stdin is not None and answerer is not None
                line = answer(event, answerer)
                with suppress(BrokenPipeError):  # it has died, which its exit code tells
                    process.stdin.write(line)
                    process.stdin.flush()
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
