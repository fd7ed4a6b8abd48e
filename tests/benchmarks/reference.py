"""Score kept answers with lmms-eval's own ``simple_evaluate``: reference.py ANSWERS MIRROR OUT.

It also records what ``simple_evaluate`` does to the process, and how timeouts are scored.
"""

import json
import random
import signal
import sys
import time
from pathlib import Path

import numpy
import torch

from openril import hf  # noqa: F401  (declares torchvision's missing operators first)

import datasets  # isort: skip
from lmms_eval.api.model import lmms  # isort: skip
from lmms_eval import evaluator  # isort: skip

from openril.evaluation.suite.benchmarks import PAPER
from openril.evaluation.suite.loading import Source, find_mirror, open_tasks, read_mirror, strip_thinking
from openril.evaluation.suite.scoring import Answer, score_task
from openril.storage import read_jsonl

TASKS = ["ai2d", "chartqa", "mmbench_en_dev_static", "mmstar", "blink", "seedbench", "seedbench_2_plus", "realworldqa"]


class Replay(lmms):
    is_simple = False

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers = answers
        self._model = torch.nn.Linear(1, 1)

    def generate_until(self, requests):  # type: ignore[no-untyped-def]
        out = []
        for request in requests:
            _, _, _, number, task, _ = request.args
            out.append(strip_thinking(self.answers.get(f"{task.removesuffix('_static')}/{number}", "")))
        return out

    def loglikelihood(self, requests):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    generate_until_multi_round = loglikelihood


class TimeoutException(BaseException):
    """What newer versions of math-verify raise."""


def timeouts(mirror: str) -> dict[str, object]:
    """Score AI2D's questions when two of them take too long, and two answers are wrong."""

    def alarm(*_: object) -> None:
        raise TimeoutError("too long")

    (task,) = open_tasks(next(b for b in PAPER if b.task == "ai2d"), Source(Path(mirror)))
    process, asked = task.task.process_results, []

    def slow(doc, results):  # type: ignore[no-untyped-def]
        asked.append(doc)
        if len(asked) == 11:
            raise TimeoutException("too long")
        if len(asked) == 12:
            signal.signal(signal.SIGALRM, alarm)  # as math-verify does it, which needs the main thread
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            time.sleep(20)
        return process(doc, results)

    task.task.process_results = slow
    right = [Answer(n, "ABCD"[n % 4] if n not in (3, 5) else "ABCD"[(n + 1) % 4]) for n in range(12)]
    scored, figure = score_task(task, right, None)
    return {"scores": [s.score for s in scored], "causes": [s.cause for s in scored], "figure": figure}


def states() -> dict[str, object]:
    return {
        "random": random.getstate(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
    }


def main(answers: str, mirror: str, out: str) -> None:
    load = datasets.load_dataset
    benchmarks = {}
    for repository, task in {
        "lmms-lab-encoder/ai2d": "ai2d", "lmms-lab-encoder/ChartQA": "chartqa", "lmms-lab-encoder/MMBench": "mmbench_en_dev",
        "Lin-Chen/MMStar": "mmstar", "BLINK-Benchmark/BLINK": "blink", "lmms-lab-encoder/SEED-Bench": "seedbench",
        "doolayer/SEED-Bench-2-Plus": "seedbench_2_plus", "lmms-lab-encoder/RealWorldQA": "realworldqa",
    }.items():  # fmt: skip
        benchmarks[repository] = next(b for b in PAPER if b.task == task)

    def from_mirror(path, name=None, **_):  # type: ignore[no-untyped-def]
        return read_mirror(datasets, load, find_mirror(Path(mirror), benchmarks[path], path, name))

    datasets.load_dataset = from_mirror
    rows = read_jsonl(Path(answers))[1:]
    model = Replay({row["question_id"]: row["text"] for row in rows})
    evaluator._enable_reentrant_filelocks = lambda: None  # it patches a module that newer versions of filelock lack
    before = states()
    found = evaluator.simple_evaluate(model, tasks=TASKS, bootstrap_iters=0, process_docs_parallel=1)["results"]
    after = states()
    traps = {name: before[name] != after[name] for name in before}
    datasets.load_dataset = load
    figures: dict[str, object] = {
        "traps": {**traps, "module deleted": not hasattr(model, "_model")},
        "timeouts": timeouts(mirror),
    }
    for task in TASKS:
        name = task.removesuffix("_static")
        benchmark = next(b for b in PAPER if b.task == name)
        value = next(v for k, v in found[task].items() if k.startswith(f"{benchmark.metric},"))
        figures[task] = float(value) * (1 if benchmark.percent else 100)
    Path(out).write_text(json.dumps(figures))


main(*sys.argv[1:])
