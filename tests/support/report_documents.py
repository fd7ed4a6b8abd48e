"""Report documents for the tests of the page: one with plausible values, and one in which every text is hostile."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from PIL import Image

SKILLS = ("arithmetic", "charts", "spatial")
SOURCES = ("student", "teacher_a", "teacher_b")

HOSTILE = {
    "script": "</script><script>window.hacked = 1</script><!--<script>",
    "markup": "javascript:window.hacked=1//\"'><img src=x onerror=\"window.hacked = 1\" autofocus onfocus='window.hacked = 1'>"
    "<svg onload=\"window.hacked = 1\"><animate onbegin='window.hacked = 1'/></svg>"
    '<a href="javascript:window.hacked=1">x</a>{{ 7 * 7 }} {% raw %} ${window.hacked = 1} `',
    "characters": "\u202egnihton si siht\u2066 \u05d0\u05d1\u05d2 \u0627\u0644\u0639\u0631\u0628\u064a\u0629"
    " a\x00b\x1b[31m\x07\x7f\r\n half \ud83d and \udc00 of a pair, \u2028\u2029\ufeff\ufffd",
    "unbroken": "W" * 3000,
    "prototype": "__proto__",
}


def picture(color: tuple[int, int, int], size: tuple[int, int] = (96, 72)) -> str:
    """A plain picture as the address that a document holds."""
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def member(source: str, index: int, rng: random.Random) -> dict[str, Any]:
    right = float(rng.random() < 0.6)
    similarity = float(source != "student" or rng.random() < 0.3)
    return {
        "source": source, "index": index, "text": f"there are {rng.randrange(9)} cars. so the answer is {rng.randrange(9)}.",
        "extracted": str(rng.randrange(9)), "student_prob": round(rng.random(), 3), "similarity": similarity,
        "verdict": right, "explanation": "The response names the right number." if right else None,
        "rewards": {"similarity": similarity, "answer": right}, "reward": similarity + right, "advantage": 0.0,
        "tokens": rng.randrange(4, 60), "finish_reason": "stop", "learned": 20,
    }  # fmt: skip


def make_group(run: int, step: int, position: int, rng: random.Random) -> dict[str, Any]:
    members = [member(SOURCES[0 if i < 2 else 1 + i % 2], i, rng) for i in range(4)]
    mean = sum(m["reward"] for m in members) / len(members)
    for m in members:
        m["advantage"] = m["reward"] - mean
    skill = SKILLS[(step + position) % 3]
    verdicts = [m["verdict"] for m in members]
    flags = [name for name, on in (("all_right", all(verdicts)), ("all_wrong", not any(verdicts))) if on]
    return {
        "run": run, "id": f"{run}-{step}-{position}", "step": step, "question_id": f"q{(step * 2 + position) % 7}",
        "question": f"how many cars are in picture {step}?", "choices": ["2", "3"] if skill == "charts" else [],
        "truths": ["3"], "rule": "number", "skill": skill, "images": [f"hash{position}"], "missing_images": [],
        "flags": flags, "longest": max(m["tokens"] for m in members), "members": members,
    }  # fmt: skip


def make_run(name: str, groups: list[dict[str, Any]], steps: int, rng: random.Random) -> dict[str, Any]:
    each = range(1, steps + 1)
    curve = [round(0.2 + 0.5 * s / steps + 0.1 * rng.random(), 4) for s in each]
    ids = [g["id"] for g in groups]
    score = {"score": 0.7, "standard_error": 0.02, "questions": 280, "unknown": 0}
    skills = {s: {"n": 20, "right": round(rng.random(), 2)} for s in SKILLS}
    return {
        "name": name, "path": f"runs/{name}", "steps": steps, "groups": len(groups), "responses": 4 * len(groups),
        "recipe": [{"key": "train.beta", "value": 0.01, "default": 0.0}], "versions": {"torch": "2.9.0"},
        "device": "one CPU", "seconds": {"sampling": 40.0, "update": 60.0, "rewards": 20.0},
        "metrics": {
            "step": list(each), "reward/student_similarity": curve, "reward/student_answer": curve[::-1],
            "eval/score": [c if s % 5 == 0 else None for s, c in zip(each, curve, strict=True)],
            "discriminator/accuracy": curve, "discriminator/length_only_accuracy": [0.6] * steps, "train/kl": curve,
        },
        "warnings": [{"step": 3, "text": "2 of 8 rewards are unknown."}, {"step": None, "text": "No cache."}],
        "skills": list(SKILLS), "sources": list(SOURCES),
        "evaluations": [
            {"name": "final", **score, "groups": {"skill": dict.fromkeys(SKILLS, score)},
             "paired": {"to": "base", "difference": 0.1, "low": 0.05, "high": 0.15}},
        ],
        "discriminator": {
            "calibration": [{"low": i / 10, "high": (i + 1) / 10, "predicted": i / 10 + 0.05, "student_share": i / 10, "n": i}
                            for i in range(10)],
            "length": [{"tokens": m["tokens"], "student_prob": m["student_prob"], "source": m["source"]}
                       for g in groups for m in g["members"]],
            "over_time": {"step": list(each), "balanced_accuracy": curve, "length_only_accuracy": [0.6] * steps,
                          "accuracy_teacher_a": curve},
            "confident_and_wrong": [f"{ids[0]}/0", f"{ids[-1]}/2"],
        },
        "audit": {
            "seed": 0, "sample": [f"{i}/{k}" for k, i in enumerate(ids[:4])],
            "disagreements": [{"member": f"{ids[-1]}/1", "judge": 1.0, "rule": 0.0, "rule_name": "number"}], "ticks": None,
        },
        "teachers": [{"source": s, "responses": 100, "right": 0.6, "wins": 0.3, "positive_advantage": 0.4, "too_long": 3,
                      "skills": skills} for s in SOURCES],
    }  # fmt: skip


def make_document(runs: int = 1, steps: int = 20, per_step: int = 2, seed: int = 0) -> dict[str, Any]:
    """A document with made-up values; the same seed gives the same one."""
    rng = random.Random(seed)
    groups = [make_group(r, s + 1, p, rng) for r in range(runs) for s in range(steps) for p in range(per_step)]
    names = ("ril", "dr_grpo", "ril_one")
    made = [make_run(names[r], [g for g in groups if g["run"] == r], steps, rng) for r in range(runs)]
    comparison = {
        "recipe": [{"key": "discriminator.enabled", "values": [True, False, True][:runs]}],
        "paired": [
            {"evaluation": "final", "a": 0, "b": 1, "difference": -0.1, "low": -0.2, "high": -0.01, "questions": 280}
        ],
    }
    colors = ((40, 90, 160), (190, 120, 40))
    return {
        "schema": "openril.report/1", "openril": "0.1.0", "made": "2026-01-01T00:00:00Z", "runs": made,
        "comparison": comparison if runs > 1 else None, "shown": len(groups), "total": len(groups) + 5, "groups": groups,
        "images": {f"hash{i}": {"thumb": picture(c), "full": picture(c, (400, 300)), "width": 400, "height": 300,
                                "name": f"cars-{i}.png"} for i, c in enumerate(colors)},
    }  # fmt: skip


KEPT = {"schema", "id", "flags", "thumb", "full", "member", "sample", "confident_and_wrong", "images"}
"""Keys whose texts the builder makes itself: addresses of groups and pictures, names of flags."""


def poison(value: Any, text: str, key: str = "") -> Any:
    """Return a copy in which every text that models, data or file names contribute is ``text``."""
    if isinstance(value, str):
        return value if key in KEPT else text
    if isinstance(value, list):
        return value if key in KEPT else [poison(v, text, key) for v in value]
    if isinstance(value, dict):
        # Names of metrics, rewards and skills come from recipes and data too.
        added = (
            {text: next(iter(value.values()))} if key in ("rewards", "skill", "skills", "versions", "seconds") else {}
        )
        return {k: poison(v, text, k) for k, v in {**value, **added}.items()}
    return value


def hostile_document(kind: str) -> dict[str, Any]:
    """A document of two runs in which every text is the hostile one of this kind."""
    document = make_document(runs=2, steps=3)
    made = poison(document, HOSTILE[kind])
    for group in made["groups"]:
        group["missing_images"] = [HOSTILE[kind]]
        group["images"] = [*group["images"], "bad", "__proto__"]
    made["images"]["bad"] = {
        "thumb": HOSTILE[kind],
        "full": "javascript:window.hacked=1",
        "width": 1,
        "height": 1,
        "name": "",
    }
    return made
