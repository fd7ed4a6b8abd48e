"""`ril bench`: how fast a step is, and its parts, against TRL's GRPOTrainer and our own plain pass."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

from rich.console import Console

from openril.benchmarking.contender import Precision
from openril.benchmarking.plan import CONTENDERS, make_plan
from openril.benchmarking.results import cell_figures, summary
from openril.benchmarking.session import Session
from openril.benchmarking.shapes import MODELS, QUESTIONS, parse_shape
from openril.benchmarking.table import print_cell, print_summary
from openril.errors import OpenRILError
from openril.storage import write_json

EPILOG = f"""\
A shape is MODEL-IMAGETOKENS-RESPONSETOKENS-GROUPSIZE, for instance tiny-1000-32-16, or a MODEL for its whole grid.
Models (random weights, Qwen2.5-VL's architecture): {", ".join(MODELS)}. Every step has {QUESTIONS} questions.
Contenders: trl (GRPOTrainer), plain (our loop, the prompt repeated for every response), ours.
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = argparse.ArgumentParser(
        "ril bench",
        description="Measure a step and its parts: ours, our plain pass and TRL's GRPOTrainer, taking turns in one run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--quick", action="store_true", help="the headline figures alone, in about five minutes on two cores"
    )
    p.add_argument("--json", metavar="PATH", type=Path, help="write every figure to this file")
    p.add_argument(
        "--device", choices=("cpu", "cuda"), help="cuda measures the 3B shape; default: cuda if there is one"
    )
    p.add_argument("--shape", metavar="NAME", nargs="+", default=[], help="only these shapes, all parts of each")
    p.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="only these")
    p.add_argument(
        "--repeats", metavar="N", type=_positive, default=0, help="rounds a shape; default 3 (2 for long ones)"
    )
    p.add_argument("--threads", metavar="N", type=_positive, default=0, help="CPU threads; default torch's own choice")
    p.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "pure_bf16"),
        help="float32; bfloat16 autocast over float32 weights; bfloat16 weights. Default float32, on cuda pure_bf16",
    )
    p.add_argument(
        "--trl-rows",
        metavar="N",
        type=_positive,
        default=0,
        help="TRL's per_device_train_batch_size, the rest by accumulation; default one group (2G), as our passes have",
    )
    return p


def run_bench(arguments: Sequence[str], console: Console) -> dict[str, Any]:
    """Measure, print tables, write JSON; returns its content. Raises OpenRILError when a flag makes no sense."""
    flags = parser().parse_args(list(arguments))
    if flags.json is not None and (flags.json.is_dir() or not flags.json.resolve().parent.is_dir()):
        raise OpenRILError(f"--json {flags.json}: give a file in a folder that exists")
    shapes = list(dict.fromkeys(s for name in flags.shape for s in parse_shape(name)))
    if "trl" in flags.contenders and importlib.util.find_spec("trl") is None:
        raise OpenRILError("TRL is not installed: pip install 'openril[bench]', or leave it out with --contenders")
    device: Literal["cpu", "cuda"] = flags.device or ("cuda" if cuda_there() else "cpu")
    if device == "cuda" and not cuda_there():
        raise OpenRILError("--device cuda: torch sees no GPU here; use --device cpu")
    precision = cast(Precision, flags.precision or ("pure_bf16" if device == "cuda" else "float32"))
    plan = make_plan(
        quick=flags.quick, device=device, shapes=shapes, contenders=flags.contenders, repeats=flags.repeats
    )
    started = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="ril-bench-"))
    session, results = None, []
    # Bytes of a weight while sampling: under autocast the float32 weights are what is read.
    width = 2 if precision == "pure_bf16" else 4
    try:
        with ended_by_signals(), console.status("starting") as status:
            quiet = not console.is_terminal

            def say(text: str) -> None:
                status.update(text)

            session = Session(
                folder,
                device=device,
                precision=precision,
                threads=flags.threads,
                peer_rows=flags.trl_rows,
                say=say,
                warn=lambda text: console.print(f"bench: {text}", style="yellow", highlight=False),
            )
            for number, cell in enumerate(plan.cells, 1):
                if quiet:
                    console.print(f"bench: shape {number} of {len(plan.cells)}: {cell.shape.words}", highlight=False)
                result = session.run(cell)
                results.append(result)
                print_cell(console, cell_figures(result, width))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("bench: stopped; nothing was written") from None
    finally:
        if session is not None:
            session.close()
        shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "quick": flags.quick,
        "device": device,
        "precision": precision,
        "threads": flags.threads or None,
        "trl_rows": flags.trl_rows or None,
        "contenders": flags.contenders,
        "wall_seconds": time.perf_counter() - started,
    }
    figures = summary(plan, results, session.machine.about, width, settings)
    print_summary(console, figures)
    if flags.json is not None:
        write_json(flags.json, figures)
        console.print(f"bench: figures in {flags.json}", highlight=False)
    return figures


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the run as Ctrl-C does, so that no worker and no folder is left behind."""

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
    """Whether torch sees a GPU; asked without making a context in this process."""
    import torch

    return torch.cuda.is_available()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
