"""FSDP2 around the packed pass: weights spread over two processes, the same log-probabilities and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_that_share_the_weights_agree_with_one_that_has_them(tiny_student: Path, tmp_path: Path):
    script = Path(__file__).with_name("fully_sharded.py")
    paths = [str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
         str(tiny_student), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
