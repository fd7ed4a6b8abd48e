"""Compute figures from measurements: medians, ratios, shares of limits, the fit of cost against 2G. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import StatisticsError, correlation, linear_regression, median
from typing import Any

from openril.benchmarking.flops import decode_bytes, update_flops
from openril.benchmarking.plan import Plan
from openril.benchmarking.session import CellResult
from openril.benchmarking.shapes import MODELS, QUESTIONS
from openril.benchmarking.worker import Measurement

Entries = Sequence[Measurement | None]

HEADLINES = {
    "update": ("short", "update"),
    "update_long": ("long", "update"),
    "sampling": ("short", "sampling"),
    "step": ("short", "step"),
    "memory_long": ("long", "memory"),
}
"""Headline ratio -> (shape of the plan, part). All are TRL over ours."""


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Return the median, the smallest, the largest and the number of the values; None without values."""
    if not values:
        return None
    return {"median": median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def _ratios(quantity: Callable[[Measurement], float | None], peer: Entries, ours: Entries) -> list[float]:
    """Divide the peer's quantity by ours, round by round, without the rounds in which either is missing."""
    pairs = [(quantity(p), quantity(o)) for p, o in zip(peer, ours, strict=True) if p is not None and o is not None]
    return [p / o for p, o in pairs if p is not None and o]


def ratio(part: str, peer: Entries, ours: Entries) -> dict[str, Any] | None:
    """Return the spread of peer over ours, in bytes for memory and in seconds for every other part."""
    return spread(_ratios(lambda m: m.peak_memory if part == "memory" else m.seconds, peer, ours))


def cpu_ratio(peer: Entries, ours: Entries) -> float | None:
    """Return the median ratio of processor times, which vary less than wall times on a busy machine."""
    values = _ratios(lambda m: m.cpu_seconds, peer, ours)
    return median(values) if values else None


def linear_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Fit y = intercept + slope x by least squares, with its R^2. Returns None for fewer than three points."""
    if len(x) < 3:
        return None
    try:
        slope, intercept = linear_regression(x, y)
        return {"intercept": intercept, "slope": slope, "r_squared": correlation(x, y) ** 2}
    except StatisticsError:  # all x or all y are equal
        return None


def part_figures(entries: Entries, unique_tokens: int) -> dict[str, Any]:
    """Return spread, parts and throughput of one part of one contender, without failed rounds."""
    known = [m for m in entries if m is not None]
    if not known:
        return {"seconds": None}
    seconds = spread([m.seconds for m in known])
    assert seconds is not None
    names = dict.fromkeys(name for m in known for name in m.parts)
    cpu = [m.cpu_seconds for m in known if m.cpu_seconds is not None]
    out: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": median(cpu) if cpu else None,
        "parts": {name: median([m.parts[name] for m in known if name in m.parts]) for name in names},
        "response_tokens_per_second": known[0].tokens / seconds["median"],
        "unique_tokens_per_second": unique_tokens / seconds["median"],
        "rounds": [None if m is None else m.seconds for m in entries],
    }
    peaks = [m.peak_memory for m in known if m.peak_memory is not None]
    if any(m.held_memory is not None for m in known):
        out["peak_memory_bytes"] = spread(peaks)
        out["held_memory_bytes"] = median([m.held_memory for m in known if m.held_memory is not None])
    return out


def matmul_share(result: CellResult) -> dict[str, Any] | None:
    """Operations of the unique tokens over what the machine's fastest matrix products would have done meanwhile.

    share: operations / (our update's seconds without the optimizer's step) / the best peak of the cell's rounds (a peak
    measured while the machine was busy is none). share_of_cpu_time: the same in processor time, the optimizer's step
    included, which other work on the machine does not distort; None on a GPU.
    """
    entries = result.measurements.get("ours", {}).get("update", [])
    shape, prompt = result.cell.shape, prompt_tokens(result)
    known = [m for m in entries if m is not None]
    if not known or prompt is None or not result.limits:
        return None
    flops = update_flops(shape.size, prompt, shape.grid, shape.response_tokens, shape.group_size, QUESTIONS)
    peak = max(limits["matmul_flops"] for limits in result.limits)
    cpu_peak = max(limits.get("matmul_flops_per_cpu_second", 0.0) for limits in result.limits)
    cpu = [flops / m.cpu_seconds / cpu_peak for m in known if m.cpu_seconds and cpu_peak]
    return {
        "shape": shape.name,
        "unique_flops": flops,
        "peak_flops": peak,
        "share": spread([flops / (m.seconds - m.parts.get("optimizer", 0.0)) / peak for m in known]),
        "share_of_cpu_time": spread(cpu) if result.on_cpu else None,
    }


def decode_share(result: CellResult) -> dict[str, Any] | None:
    """Compare our decoding with memory bandwidth: the bytes that a step must read over those that could be read."""
    ours = result.measurements.get("ours", {})
    shape, prompt = result.cell.shape, prompt_tokens(result)
    pairs = [
        (s.seconds - p.seconds, limits["bandwidth"])
        for s, p, limits in zip(ours.get("sampling", []), ours.get("prefill", []), result.limits, strict=False)
        if s is not None and p is not None and s.seconds > p.seconds
    ]
    steps = shape.response_tokens - 1
    if not pairs or prompt is None or steps < 1:
        return None
    width = 2 if result.precision == "pure_bf16" else 4  # under autocast the float32 weights are what is read
    weights, cache = decode_bytes(shape.size, prompt, shape.response_tokens, shape.group_size, QUESTIONS, width)
    return {
        "weight_bytes_per_step": weights,
        "cache_bytes_per_step": cache,
        "seconds_per_step": spread([seconds / steps for seconds, _ in pairs]),
        "share_of_bandwidth": spread([(weights + cache) * steps / seconds / bandwidth for seconds, bandwidth in pairs]),
    }


def prompt_tokens(result: CellResult) -> int | None:
    found = {about["prompt_tokens"] for about in result.about.values()}
    if len(found) > 1:
        raise RuntimeError(f"expected prompts of one length from all contenders, got {sorted(found)} tokens")
    return found.pop() if found else None


def cell_figures(result: CellResult) -> dict[str, Any]:
    """Return everything about one shape."""
    cell = result.cell
    shape = cell.shape
    prompt = prompt_tokens(result)
    unique = QUESTIONS * ((prompt or 0) + shape.group_size * shape.response_tokens)
    ours = result.measurements.get("ours", {})
    contenders, ratios, cpu_ratios = {}, {}, {}
    for name in cell.contenders:
        measured = result.measurements.get(name, {})
        figures = {part: part_figures(entries, unique) for part, entries in measured.items()}
        off = result.fast_path_off.get(name, [])
        contenders[name] = {**result.about.get(name, {}), "fast_path_off": off, "measured": figures}
        if name != "ours":
            shared = [part for part in measured if part in ours]
            ratios[name] = {part: ratio(part, measured[part], ours[part]) for part in shared}
            cpu_ratios[name] = {part: cpu_ratio(measured[part], ours[part]) for part in shared if part != "memory"}
    out = {
        "name": shape.name,
        "model": shape.model,
        "precision": result.precision,
        "image_tokens": math.prod(shape.grid),
        "prompt_tokens": prompt,
        "response_tokens": shape.response_tokens,
        "group_size": shape.group_size,
        "questions": QUESTIONS,
        "alternating": cell.together,
        "contenders": contenders,
        "ratios": ratios,
        "ratios_of_cpu_time": cpu_ratios,
        "matmul_share": matmul_share(result),
        "decoding": decode_share(result),
        "failures": [asdict(f) for f in result.failures],
    }
    if result.sweep:
        out["sweep"] = sweep_figures(result)
    return out


def sweep_figures(result: CellResult) -> dict[str, Any]:
    """Return the seconds of our update for each 2G, and a line fitted to them over the response tokens of a step."""
    points: list[dict[str, Any]] = []
    for size, entries in sorted(result.sweep.items()):
        seconds = spread([m.seconds for m in entries if m is not None])
        if seconds is not None:
            tokens = QUESTIONS * size * result.cell.shape.response_tokens
            points.append({"group_size": size, "response_tokens": tokens, "seconds": seconds})
    fit = linear_fit([p["response_tokens"] for p in points], [p["seconds"]["median"] for p in points])
    return {"points": points, "fit_seconds_per_response_token": fit}


def summary(
    plan: Plan, results: Sequence[CellResult], machine: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the JSON that `ril bench` writes. A figure that was not measured is null."""
    cells = {r.cell.shape.name: cell_figures(r) for r in results}
    headline: dict[str, dict[str, Any] | None] = {}
    cpu: dict[str, float | None] = {}
    for key, (role, part) in HEADLINES.items():
        figures = cells.get(getattr(plan, role), {})
        headline[key] = figures.get("ratios", {}).get("trl", {}).get(part)
        cpu[key] = figures.get("ratios_of_cpu_time", {}).get("trl", {}).get(part)
    share = cells.get(plan.wide, {}).get("matmul_share")
    own = [r for r in results if r.cell.shape.precision is None] or results
    limits = [entry for r in own for entry in r.limits]
    return {
        "ratios": {key: entry["median"] if entry else None for key, entry in headline.items()},
        "matmul_share": share["share"]["median"] if share else None,
        "shapes": list(cells.values()),
        "versions": machine["versions"],
        "machine": machine["machine"],
        "limits": {key: spread([entry[key] for entry in limits]) for key in ("matmul_flops", "bandwidth")},
        "ratios_spread": headline,
        "ratios_of_cpu_time": {k: v for k, v in cpu.items() if k != "memory_long"},
        "matmul_share_detail": share,
        "models": {
            name: {**asdict(size), "vision_to_language_work_per_image_token": size.vision_share}
            for name, size in MODELS.items()
            if any(r.cell.shape.model == name for r in results)
        },
        "settings": settings,
        "failures": [failure for c in cells.values() for failure in c["failures"]],
    }
