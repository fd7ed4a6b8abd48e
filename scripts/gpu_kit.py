"""Show on one GPU, in under ten minutes, what only a GPU can show: ``python scripts/gpu_kit.py``, or ``make gpu``.

It runs the tests that need a GPU, ten steps of `ril train` on a random model of Qwen2.5-VL-3B's shape with and without
packing, a profile, and one shape of `ril bench` next to TRL. The results are gpu.json and gpu.md in the folder --out,
which are written again after each part. Each part runs in a separate process with a time limit. Exit code: 0 if every
part is done, 1 if one failed or ran out of time, 2 for a wrong flag.

    python scripts/gpu_kit.py --device cpu --model micro     # tries the kit on a CPU, in under a minute
    python scripts/gpu_kit.py wheels FOLDER                  # for a machine without network: docs/gpu.md

This file imports the standard library alone, so that it starts on a bare machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "scripts" / "gpu_worker.py"
PARTS = {"machine": 60, "tests": 150, "packed": 170, "plain": 90, "bench": 110}
"""Parts in their order, with their time limits in seconds of --seconds 580. What a part leaves is for those after it."""
HEARTBEAT = 15.0
BENCH = {"micro": "micro-16-8-4", "qwen2_5_vl_3b": "qwen2_5_vl_3b-200-32-8"}


# ---- parts ----------------------------------------------------------------------------------------------------------


def command_of(part: str, flags: argparse.Namespace, result: Path) -> list[str]:
    python = [sys.executable]
    where = ["--json", str(result), "--device", flags.device, "--model", flags.model, "--work", str(flags.out / "work")]
    if part == "machine":
        return [*python, str(WORKER), "machine", *where]
    if part in ("packed", "plain"):
        return [*python, str(WORKER), "train", *where, "--steps", str(flags.steps), *["--plain"] * (part == "plain")]
    if part == "tests":
        # Only the files that have such tests, because collecting all others takes longer than running these.
        marked = [
            p for p in sorted(ROOT.glob("tests/**/test_*.py")) if re.search(r"\bmark\.gpu\b", p.read_text("utf-8"))
        ]
        test = [*python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-v", "--durations", "5"]
        test += [f"--junitxml={result.with_suffix('.xml')}"] if flags.device == "cuda" else ["--collect-only", "-q"]
        return [*test, *map(str, marked)]
    bench = [*python, "-m", "openril.cli", "bench", "--device", flags.device, "--shape", BENCH[flags.model]]
    return [*bench, "--contenders", "trl", "ours", "--repeats", "1", "--json", str(result)]


def environment(flags: argparse.Namespace) -> dict[str, str]:
    found = [str(ROOT / "src"), str(ROOT), *([str(flags.out / "site")] if flags.wheels else [])]
    found += [p] if (p := os.environ.get("PYTHONPATH")) else []
    more = {"PYTHONPATH": os.pathsep.join(found), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    more |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    more |= (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if flags.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    )
    return os.environ | more


def run_part(part: str, flags: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run one part with its output on the screen and in a log, and return its status, seconds and result.

    A part that exceeds ``limit`` seconds is killed with all processes it started.
    """
    result, log = flags.out / f"{part}.json", flags.out / f"{part}.log"
    result.unlink(missing_ok=True)
    command = command_of(part, flags, result)
    print(f"==> {part} (at most {limit:.0f} s): {' '.join(command[1:])}", flush=True)
    started = last = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []

    def show() -> None:
        assert process.stdout is not None
        with log.open("w", encoding="utf-8") as file:
            for line in process.stdout:
                lines.append(line.rstrip())
                file.write(line)
                if not line.startswith("USDT:"):  # torch's profiler
                    print(f"    {line}", end="", flush=True)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    status = ""
    try:
        while process.poll() is None:
            now = time.monotonic()
            if now - started > limit:
                status = "out of time"
                break
            if now - last > HEARTBEAT:
                last = now
                print(f"    ... {part}: {now - started:.0f} of {limit:.0f} s", flush=True)
            time.sleep(0.2)
    finally:
        kill(process)
    reader.join(5)
    status = status or ("done" if process.returncode == 0 else "failed")
    found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    if part == "tests":
        found |= tests_result(flags, result.with_suffix(".xml"), lines)
    elif result.exists():
        found["result"] = json.loads(result.read_text("utf-8"))
    if found["status"] != "done":
        found |= {"exit_code": process.returncode, "last_lines": [line for line in lines if line][-15:]}
    print(f"==> {part}: {found['status']} after {found['seconds']} s", flush=True)
    return found


def kill(process: subprocess.Popen[str]) -> None:
    """End a part and everything it started, which has the part's own process group."""
    for sent, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, sent)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def tests_result(flags: argparse.Namespace, report: Path, lines: list[str]) -> dict[str, Any]:
    """Return counts and the names of failed tests. A skipped test was not run, so it makes the part fail."""
    if flags.device == "cpu":
        found = re.search(r"(\d+)(?:/\d+)? tests? collected", "\n".join(lines))
        return {"result": {"collected": int(found[1]) if found else 0}}
    if not report.exists():
        return {}
    cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = {kind: [c for c in cases if c.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    names = {kind: [f"{c.get('classname')}::{c.get('name')}" for c in found] for kind, found in kinds.items()}
    seconds = {f"{c.get('name')}": float(c.get("time") or 0) for c in cases}
    slowest = dict(sorted(seconds.items(), key=lambda item: -item[1])[:5])
    out: dict[str, Any] = {"result": {"tests": len(cases), **names, "slowest_seconds": slowest}}
    if not cases or names["skipped"]:
        out["status"] = "failed"
    return out


# ---- the page -------------------------------------------------------------------------------------------------------


def page(report: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    parts = report["parts"]

    def result(part: str) -> dict[str, Any]:
        return parts.get(part, {}).get("result", {})

    about, versions = result("machine").get("machine", {}), result("machine").get("versions", {})
    memory = f", {about['gib']:.1f} GiB" if "gib" in about else ""
    lines = [f"# {report['model']} on {about.get('device', report['device'])}{memory}", ""]
    lines += [f"`{report['command']}` at revision {report['revision']}, {report['date']}.", ""]
    lines += [", ".join(f"{k} {v}" for k, v in versions.items() if v), ""]
    if peaks := result("machine").get("peaks"):
        lines += [f"Peaks: {peaks['matmul_flops'] / 1e12:.1f} TFLOP/s, {peaks['bandwidth'] / 1e9:.0f} GB/s.", ""]
    lines += table("part", {k: [v["status"], f"{v['seconds']}"] for k, v in parts.items()}, ["status", "seconds"])
    if tests := result("tests"):
        lines += ["", "## Tests", "", ", ".join(f"{k}: {len(v) if isinstance(v, list) else v}"
                                              for k, v in tests.items() if k != "slowest_seconds")]  # fmt: skip
        lines += [f"- {kind}: `{name}`" for kind in ("failure", "error", "skipped") for name in tests.get(kind, [])]
    lines += training({name: result(name) for name in ("packed", "plain")})
    lines += benchmark(result("bench"))
    for name, part in parts.items():
        if part["status"] != "done":
            lines += ["", f"## {name}: {part['status']}", "", "```", *part.get("last_lines", []), "```"]
    return "\n".join(lines) + "\n"


def training(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return the sections of steps, memory and profile."""
    there = {name: run for name, run in runs.items() if "summary" in run}
    if not there:
        return []
    rows: dict[str, list[str]] = {}
    for name, run in there.items():
        s = run["summary"]
        seconds = [f"{s['seconds'].get(k, 0):.2f}" for k in ("sampling", "discriminator", "update", "step")]
        fast = f"{s['update_is_packed']}, {s['discriminator_is_packed']}"
        rows[name] = [
            run["variant"],
            *seconds,
            f"{s['first_step_seconds']:.1f}",
            f"{s['sampled_tokens_per_second']:.0f}",
            fast,
        ]
    names = ["variant", "sampling", "discriminator", "update", "step", "first step", "sampled tokens/s",
             "packed (student, discriminator)"]  # fmt: skip
    lines = ["", "## Steps", "", "Medians in seconds, without the first step, which compiles.", ""]
    lines += table("run", rows, names)
    lines += ["", "## Peak memory in GiB, estimated and measured", ""]
    compared = {
        f"{name}, {phase}": [
            f"{m['estimated_gib']:.2f}",
            "-" if m["measured_gib"] is None else f"{m['measured_gib']:.2f}",
        ]
        for name, run in there.items()
        for phase, m in run["memory"].items()
    }
    lines += table("phase", compared, ["estimated", "measured"])
    for part, operations in runs["packed"].get("profile", {}).items():
        lines += ["", f"## Profile: {part}", ""]
        found = {f"`{o['operation']}`": [f"{o['ms']:.2f}", str(o["calls"])] for o in operations[:10]}
        lines += table("operation", found, ["ms", "calls"])
    return lines


def benchmark(figures: dict[str, Any]) -> list[str]:
    """Return the section of `ril bench`: medians of each contender on the shape."""
    lines: list[str] = []
    for shape in figures.get("shapes", []):
        rows = {
            name: [
                f"{part['seconds']['median']:.3f}" if (part := contender["measured"].get(k)) else "-"
                for k in ("update", "sampling", "step")
            ]
            for name, contender in shape["contenders"].items()
        }
        lines += ["", f"## ril bench, {shape['name']}, seconds", ""]
        lines += table("contender", rows, ["update", "sampling", "step"])
        ratios = shape["ratios"].get("trl", {})
        lines += (
            ["", "TRL over ours: " + ", ".join(f"{k} {v['median']:.2f}" for k, v in ratios.items())] if ratios else []
        )
        lines += [f"- failed: {failure}" for failure in shape["failures"]]
    return lines


def table(first: str, rows: dict[str, list[str]], names: list[str]) -> list[str]:
    head = [f"| {' | '.join([first, *names])} |", "|" + "---|" * (1 + len(names))]
    return head + [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]


# ---- a machine without network --------------------------------------------------------------------------------------


def closure(roots: list[str]) -> dict[str, str]:
    """Return the installed versions of some packages and of everything they need, without torch and what is built on it."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    todo = list(roots)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found or re.match(r"(torch|torchvision|triton|nvidia-.*|openril|setuptools|pip)$", name):
            continue
        found[name] = version(name)
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed.name)
    return dict(sorted(found.items()))


def project_requirements() -> list[str]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [re.split(r"[<>=!~\[; ]", text)[0] for text in project["dependencies"]]


def download(arguments: list[str]) -> int:
    """Download the wheels that a machine with nothing but PyTorch needs, in the versions of this environment."""
    parser = argparse.ArgumentParser(prog="python scripts/gpu_kit.py wheels", description=download.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="Python version of that machine; its processor is x86-64")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="packages that the machine has")
    parser.add_argument("--list", action="store_true", help="only print the packages and their versions")
    flags = parser.parse_args(arguments)
    pins = [f"{k}=={v}" for k, v in closure([*project_requirements(), "pytest"]).items() if k not in flags.without]
    if flags.list:
        print("\n".join(pins))
        return 0
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--implementation=cp",
    ]
    done = subprocess.run([*pip, f"--python-version={flags.python}", *platforms, f"--dest={flags.folder}", *pins])
    if done.returncode == 0:
        size = sum(p.stat().st_size for p in flags.folder.glob("*.whl"))
        print(f"{len(pins)} wheels in {flags.folder}, {size / 2**20:.0f} MiB")
    return done.returncode


def install(wheels: Path, site: Path) -> int:
    """Install into a separate folder those wheels whose package is missing or older here."""
    chosen = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, carried = wheel.name.split("-")[:2]
        try:
            here = version(name)
        except PackageNotFoundError:
            here = "0"
        if numbers(here) < numbers(carried):
            chosen.append(str(wheel))
    if not list(wheels.glob("*.whl")):
        print(f"--wheels: expected a folder with wheels, got {wheels}", file=sys.stderr)
        return 2
    print(f"==> installing {len(chosen)} of the wheels into {site}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    return subprocess.run([*pip, f"--target={site}", *chosen]).returncode if chosen else 0


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results; default runs/gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=tuple(BENCH), default="qwen2_5_vl_3b")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=580.0, help="time for everything; default 580")
    parser.add_argument("--steps", type=int, default=10, help="steps of training; default 10")
    parser.add_argument("--wheels", type=Path, help="wheels to install first, into a folder inside --out")
    flags = parser.parse_args()
    flags.out = flags.out.resolve()
    return flags


def main() -> int:
    if sys.argv[1:2] == ["wheels"]:
        return download(sys.argv[2:])
    flags = arguments()
    started = time.monotonic()
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.wheels and (code := install(flags.wheels, flags.out / "site")):
        return code
    sees_gpu = [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"]
    if flags.device == "cuda" and subprocess.run(sees_gpu, env=environment(flags)).returncode:
        print(
            "--device: expected a GPU that torch sees, got none. Try the kit with --device cpu --model micro.",
            file=sys.stderr,
        )
        return 2
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True) if shutil.which(
        "git") else None  # fmt: skip
    report: dict[str, Any] = {
        "model": flags.model,
        "device": flags.device,
        "command": " ".join(["python", *sys.argv]),
        "revision": (git.stdout.strip() if git else "") or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "parts": {},
    }
    limits = {part: PARTS[part] for part in PARTS if part in flags.parts}
    for part in limits:
        left = flags.seconds - (time.monotonic() - started)
        later = sum(limits[p] for p in list(limits)[list(limits).index(part) + 1 :])
        # What earlier parts left over is divided among the rest.
        limit = left * limits[part] / (limits[part] + later)
        report["parts"][part] = run_part(part, flags, limit)
        for path, text in (
            (flags.out / "gpu.json", json.dumps(report, indent=1)),
            (flags.out / "gpu.md", page(report)),
        ):
            new = path.with_name(path.name + ".new")
            new.write_text(text, encoding="utf-8")
            os.replace(new, path)
    states = {part: found["status"] for part, found in report["parts"].items()}
    print(f"==> {flags.out / 'gpu.md'} and gpu.json: " + ", ".join(f"{k} {v}" for k, v in states.items()))
    return int(any(state != "done" for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
