"""`ril eval --suite` with a student and a judge on real vLLM servers.

lmms-eval stays in the environment that `make test-benchmarks` builds; the command runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openril.storage import read_jsonl
from support.benchmark_data import write_benchmarks

pytestmark = pytest.mark.vllm

PYTHON = Path(__file__).parents[2] / ".venv-benchmarks" / "bin" / "python"
RECIPE = """
run_dir: {run}
student: {{model: {model}, dtype: float32{sampler}}}
judge: {{base_urls: ["{judge}"], model: judge, max_retries: 0, bad_verdict_retries: 1, max_unknown_share: 1.0}}
eval: {{suite_data: {mirror}, suite_max_tokens: 4, limit: 6}}
"""


def evaluate(folder: Path, name: str, *tasks: str, **values: object) -> dict:
    """Run the command and return the checkpoint's entry of suite.json."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.format(run=folder / name, **values))
    command = [str(PYTHON), "-m", "openril.cli", "eval", str(recipe), "--tasks", *tasks]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert (folder / name / "eval" / "suite.json").exists(), done.stderr[-2000:] + done.stdout[-2000:]
    return json.loads((folder / name / "eval" / "suite.json").read_text())["checkpoints"][0]


def test_the_suite_on_servers_gives_the_answers_and_scores_of_this_process(
    vlm_server, judge_server, vlm_checkpoint: Path, tmp_path: Path
) -> None:
    assert PYTHON.exists(), "`make test-vllm` installs lmms-eval into .venv-benchmarks"
    common = {"model": vlm_checkpoint, "judge": judge_server.url, "mirror": write_benchmarks(tmp_path / "mirror")}
    sampler = f', sampler: {{engine: vllm, base_urls: ["{vlm_server.url}"], max_logprob_difference: 0.01}}'
    with ThreadPoolExecutor(2) as both:
        runs = [
            both.submit(evaluate, tmp_path, "served", "ai2d", "realworldqa", "mmvet", sampler=sampler, **common),
            both.submit(evaluate, tmp_path, "here", "ai2d", "realworldqa", sampler="", **common),
        ]
        served, here = (run.result() for run in runs)
    known, expected = (
        {row["question_id"]: row["text"] for row in read_jsonl(tmp_path / name / "eval/suite/base/answers.jsonl")[1:]}
        for name in ("served", "here")
    )
    assert len(known) == 18 and len(expected) == 12
    assert {question: known[question] for question in expected} == expected
    for task in ("ai2d", "realworldqa"):
        fields = ("n", "score", "unparsed", "lmms_eval_score")
        found = [[run["results"][task][f] for f in fields] for run in (served, here)]
        assert found[0] == found[1] and found[0][0] == 6, task
    # Each readable reply of the judge is a score, and any other is unknown.
    replies = [float(r["reply"].split(" ")[0]) for r in read_jsonl(tmp_path / "served/eval/suite/base/judge.jsonl")]
    judged = served["results"]["mmvet"]
    assert judged["n"] == 6 and judged["details"]["judge"] == "judge"
    assert all(0.0 <= reply <= 1.0 for reply in replies)
    assert judged["unknown"] == 6 or len(replies) > 0
    assert (judged["score"] is None) == (judged["unknown"] == 6)
