"""Print the figures of `ril bench` on a terminal."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLUMNS = {
    "update": ("update", ""),
    "ref": ("update", "reference"),
    "fwd+bwd": ("update", "forward_backward"),
    "optim": ("update", "optimizer"),
    "sampling": ("sampling", ""),
    "D": ("step", "discriminator"),
    "step": ("step", ""),
}
"""Column -> part, and the piece of it ("" for the whole). In the table they are seconds, then follow MiB (the peak of the
step above what was held before) and tok/s (response tokens of the update per second)."""


def print_cell(console: Console, cell: dict[str, Any]) -> None:
    """Print one shape: a line for each contender with its seconds by part, then the ratios."""
    title = (
        f"{cell['model']}: prompts of {cell['prompt_tokens'] or '?'} tokens, responses of {cell['response_tokens']},"
        f" 2G = {cell['group_size']}, {cell['questions']} questions, {cell['precision']} (seconds, medians)"
    )
    say = partial(console.print, highlight=False)
    say(title, style="bold")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in (*_COLUMNS, "MiB", "tok/s"):
        table.add_column(column, justify="right", no_wrap=True, min_width=max(5, len(column)))
    for name, contender in cell["contenders"].items():
        table.add_row(name + "*" * bool(contender["fast_path_off"]), *_row(contender["measured"]))
    for peer, ratios in cell["ratios"].items():
        if ratios:
            table.add_row(f"{peer} / ours", *_ratio_row(ratios), style="cyan")
    console.print(table)
    for name, contender in cell["contenders"].items():
        for reason in contender["fast_path_off"]:
            say(f"  [yellow]* {name} ran without its fast path: {escape(reason)}")
    for failure in cell["failures"]:
        say(f"  [yellow]{failure['contender']}: {escape(failure['cause'])}")
    if share := cell["matmul_share"]:
        cpu = share["share_of_cpu_time"]
        text = f"{share['unique_flops'] / 1e9:,.1f} GFLOP of unique tokens; share of the matrix-product peak: "
        say(f"  {text}{_spread(share['share'])}" + (f", of processor time {_spread(cpu)}" if cpu else ""))
    if decoding := cell["decoding"]:
        mib = (decoding["weight_bytes_per_step"] + decoding["cache_bytes_per_step"]) / 2**20
        share_text = _spread(decoding["share_of_bandwidth"])
        say(f"  decoding reads {mib:,.1f} MiB per step at {share_text} of the memory bandwidth")
    if sweep := cell.get("sweep"):
        points = ", ".join(f"{p['group_size']}: {p['seconds']['median']:.3f}" for p in sweep["points"])
        say(f"  update against 2G: {points}")
        if fit := sweep["fit_seconds_per_response_token"]:
            line = f"{fit['intercept']:.3f} s + {fit['slope'] * 1e3:.3f} ms per response token"
            say(f"  = {line} (R² {fit['r_squared']:.4f})")


def print_summary(console: Console, figures: dict[str, Any]) -> None:
    """Print the headline, if this run measured any of it."""
    if any(figures["ratios_spread"].values()):
        _print_headline(console, figures)
    limits, share = figures["limits"], figures["matmul_share"]
    if limits["matmul_flops"]:
        flops, bandwidth = limits["matmul_flops"]["max"] / 1e9, limits["bandwidth"]["max"] / 1e9
        text = f"matrix products reach {flops:,.0f} GFLOP/s here, memory {bandwidth:,.1f} GB/s"
        text += f"; share of that peak spent on unique tokens: {share:.2f}" if share is not None else ""
        console.print(text, highlight=False)


def _print_headline(console: Console, figures: dict[str, Any]) -> None:
    console.print("TRL over ours (larger is better)", style="bold", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "median", "range", "rounds", "processor time"):
        table.add_column(column, justify="left" if not column else "right")
    for key, entry in figures["ratios_spread"].items():
        cpu = figures["ratios_of_cpu_time"].get(key)
        if entry is None:
            table.add_row(key, "-", "-", "-", "-")
            continue
        low_high = f"{entry['min']:.2f} - {entry['max']:.2f}"
        table.add_row(key, f"{entry['median']:.2f}", low_high, str(entry["rounds"]), f"{cpu:.2f}" if cpu else "-")
    console.print(table)


def _row(measured: dict[str, Any]) -> list[str]:
    row = []
    for part, piece in _COLUMNS.values():
        figures = measured.get(part, {})
        value = figures.get("parts", {}).get(piece) if piece else (figures.get("seconds") or {}).get("median")
        row.append("-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}")
    memory = measured.get("memory", {}).get("peak_memory_bytes")
    rate = measured.get("update", {}).get("response_tokens_per_second")
    return [*row, f"{memory['median'] / 2**20:,.0f}" if memory else "-", f"{rate:,.0f}" if rate else "-"]


def _ratio_row(ratios: dict[str, Any]) -> list[str]:
    parts = ["" if piece else part for part, piece in _COLUMNS.values()]
    entries = [(part, ratios.get(part)) for part in (*parts, "memory", "")]
    return ["" if not part else f"{entry['median']:.1f}x" if entry else "-" for part, entry in entries]


def _spread(entry: dict[str, Any]) -> str:
    return f"{entry['median']:.2f} ({entry['min']:.2f} - {entry['max']:.2f})"
