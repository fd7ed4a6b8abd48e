"""`ril bench`: measure a step and its parts next to TRL's GRPOTrainer and our own plain pass."""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast, get_args

from rich.console import Console

from openril.benchmarking.plan import CONTENDERS, make_plan
from openril.benchmarking.results import cell_figures, summary
from openril.benchmarking.session import CellResult, Session
from openril.benchmarking.shapes import MODELS, QUESTIONS, Precision, parse_shape
from openril.benchmarking.table import print_cell, print_summary
from openril.errors import OpenRILError
from openril.report.progress import ProgressDisplay
from openril.storage import write_json

EPILOG = f"""\
A shape is MODEL-IMAGETOKENS-RESPONSETOKENS-GROUPSIZE, for example tiny-1000-32-16, or a MODEL for its whole grid.
A precision may follow, for example tiny-1000-32-16-bfloat16. Every step has {QUESTIONS} questions.
Models (random weights, the architecture of Qwen2.5-VL): {", ".join(MODELS)}.
Precisions: float32, bfloat16 (autocast over float32 weights, the default of train.precision), pure_bf16 (bfloat16 weights).
Contenders: trl (GRPOTrainer), plain (our loop with the prompt repeated for every response), ours.
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    p = argparse.ArgumentParser(
        "ril bench",
        description="Measure a step and its parts for ours, our plain pass and TRL's GRPOTrainer, which take turns.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--quick", action="store_true", help="only the headline figures, in about five minutes on two cores")
    add("--json", metavar="PATH", type=Path, help="write every figure to this file, after each shape")
    add("--device", choices=("cpu", "cuda"), help="cuda measures the 3B model; default: cuda if there is a GPU")
    add("--shape", metavar="NAME", nargs="+", default=[], help="measure only these shapes, with all their parts")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="run only these")
    text = "rounds for each shape; default: 3, or 2 for long ones"
    add("--repeats", metavar="N", type=_positive, default=0, help=text)
    add("--threads", metavar="N", type=_positive, default=0, help="CPU threads; default: torch's choice")
    text = "weights and products; default: float32, and pure_bf16 on cuda; one shape is always measured in bfloat16"
    add("--precision", choices=get_args(Precision), help=text)
    text = "TRL's per_device_train_batch_size, the rest by accumulation; default: one group (2G), as our passes have"
    add("--trl-rows", metavar="N", type=_positive, default=0, help=text)
    return p


def run_bench(arguments: Sequence[str], console: Console) -> dict[str, Any]:
    """Measure, print tables and write JSON; return its content. Raises OpenRILError when a flag makes no sense."""
    flags = parser().parse_args(list(arguments))
    if flags.json is not None and (flags.json.is_dir() or not flags.json.resolve().parent.is_dir()):
        raise OpenRILError(f"--json: expected a file in an existing folder, got {flags.json}")
    shapes = list(dict.fromkeys(s for name in flags.shape for s in parse_shape(name)))
    device: Literal["cpu", "cuda"] = flags.device or ("cuda" if cuda_there() else "cpu")
    if device == "cuda" and not cuda_there():
        raise OpenRILError("--device: got cuda, but torch sees no GPU here. Use --device cpu.")
    precision = cast(Precision, flags.precision or ("pure_bf16" if device == "cuda" else "float32"))
    chosen = {"shapes": shapes, "contenders": flags.contenders, "repeats": flags.repeats}
    plan = make_plan(quick=flags.quick, device=device, precision=precision, **chosen)
    started = time.perf_counter()
    results: list[CellResult] = []
    total = len(plan.cells)

    def figures_so_far(machine: dict[str, Any]) -> dict[str, Any]:
        settings = {"quick": flags.quick, "device": device, "precision": precision, "contenders": flags.contenders}
        settings |= {"threads": flags.threads or None, "trl_rows": flags.trl_rows or None}
        settings |= {"shapes_measured": len(results), "shapes_planned": total}
        settings["wall_seconds"] = time.perf_counter() - started
        return summary(plan, results, machine, settings)

    try:
        with (
            ended_by_signals(),
            tempfile.TemporaryDirectory(prefix="ril-bench-", ignore_cleanup_errors=True) as folder,
            ProgressDisplay(console, every=30.0) as progress,
            closing(
                Session(
                    Path(folder),
                    device=device,
                    precision=precision,
                    threads=flags.threads,
                    peer_rows=flags.trl_rows,
                    say=lambda text: progress.show("bench", len(results), total, state=text),
                    warn=lambda text: progress.warn(f"bench: {text}"),
                )
            ) as session,
        ):
            for cell in plan.cells:
                progress.note(f"bench: shape {len(results) + 1} of {total}: {cell.shape.words}")
                results.append(session.run(cell))
                print_cell(console, cell_figures(results[-1]))
                if flags.json is not None:  # after each shape, so that a time limit loses only the one being measured
                    write_json(flags.json, figures_so_far(session.machine.about))
    except KeyboardInterrupt:
        kept = f"the figures of {len(results)} of {total} shapes are in {flags.json}"
        kept = kept if results and flags.json is not None else "nothing was written"
        raise KeyboardInterrupt(f"bench: interrupted; {kept}") from None
    figures = figures_so_far(session.machine.about)
    print_summary(console, figures)
    if flags.json is not None:
        write_json(flags.json, figures)
        console.print(f"bench: the figures are in {flags.json}", highlight=False, markup=False)
    return figures


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the run on SIGTERM and SIGHUP as on Ctrl-C, so that no process and no temporary folder remains."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def cuda_there() -> bool:
    """Return whether torch sees a GPU, without creating a context in this process."""
    import torch

    return torch.cuda.is_available()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
