"""Run the core tests with the lowest declared versions of the dependencies, or with the newest ones.

    python scripts/test_versions.py                        # the lowest versions of pyproject.toml
    python scripts/test_versions.py --newest               # the newest versions that pip finds
    python scripts/test_versions.py --python python3.12 tests/recipe tests/rewards

Everything is installed into a separate virtual environment (.venv-lowest or .venv-newest), which the next call uses
again. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE_TESTS = (
    "tests/algorithm",
    "tests/recipe",
    "tests/rewards/test_rules.py",
    "tests/models/test_packing.py",
    "tests/training/test_loop.py",
)
"""Tests of every layer that take a few minutes together."""


def lowest_pins(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """Return ``name==version`` for the lower bound of every dependency. Raises ValueError for one without a bound."""
    pins = []
    for requirement in tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]:
        match = re.match(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9][0-9.]*)", requirement)
        if match is None:
            raise ValueError(f"dependencies: expected NAME>=VERSION, got {requirement!r} ({pyproject})")
        pins.append(f"{match[1]}=={match[2]}")
    return pins


def run(step: str, command: list[str], **settings: str) -> None:
    """Run one command with its output on the terminal; end the script with its exit code when it fails."""
    started = time.monotonic()
    print(f"==> {step}\n    {shlex.join(command)}", flush=True)
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}).returncode
    print(f"    {'done' if code == 0 else f'failed with exit code {code}'} after {time.monotonic() - started:.0f} s")
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment (default: this one)")
    parser.add_argument("--newest", action="store_true", help="install the newest versions instead of the lowest")
    parser.add_argument("--pip", default="", metavar="ARGS", help="more arguments of pip install, as one string")
    parser.add_argument("tests", nargs="*", default=list(CORE_TESTS), help="what pytest runs (default: the core tests)")
    flags = parser.parse_args()
    which = "newest" if flags.newest else "lowest"
    folder = ROOT / f".venv-{which}"
    python = str(folder / "bin" / "python")
    missing = [test for test in flags.tests if not (ROOT / test.split("::")[0]).exists()]
    if missing:
        parser.error(f"no such tests: {', '.join(missing)}")

    if not Path(python).exists():
        run(f"1/3 making {folder.name}", [flags.python, "-m", "venv", str(folder)])
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--editable", ".", "pytest", "num2words"]
    if not flags.newest:
        pins = folder / "lowest.txt"
        pins.write_text("".join(f"{pin}\n" for pin in lowest_pins()), encoding="utf-8")
        install += ["--constraint", str(pins)]
    run(f"2/3 installing the {which} versions (several minutes)", [*install, *shlex.split(flags.pip)])
    run(
        f"3/3 running the tests with the {which} versions",
        [python, "-m", "pytest", "-q", "-m", "not vllm and not gpu and not benchmarks and not slow", *flags.tests],
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    )
    print(f"==> the tests pass with the {which} versions")


if __name__ == "__main__":
    main()
