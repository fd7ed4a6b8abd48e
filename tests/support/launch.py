"""Start the scripts of tests that need several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def launch(processes: int, *arguments: Any, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Run a script of tests/ in one process, or in several (gloo) as torchrun does, but with one import of libraries."""
    command = [sys.executable]
    if processes > 1:
        command += [str(Path(__file__).with_name("forked.py")), str(processes)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
