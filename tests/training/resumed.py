"""Run by test_resume_sharded.py, alone or under torchrun: runs and continues two steps of the tiny recipe.

usage: resumed.py FOLDER CHECKPOINT CASE:SOURCE:NAME:SHARD[:kill] ...

Each job writes FOLDER/CASE-NAME, and continues from a copy of step 1 of FOLDER/CASE-SOURCE unless SOURCE is empty or the
same. With ``kill``, one process kills itself with SIGKILL while step 2 is being written.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sharded import trainer_of

import openril.training.checkpoint as checkpoints
from openril.training.distributed import leave_process_group, release_memory

exact = checkpoints.save_rng


def die(folder: Path, process: int) -> None:
    exact(folder, process)
    if process == 1 and "step_000002" in folder.name:
        os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, checkpoint: Path, jobs: list[str]) -> None:
    first = int(os.environ.get("RANK", "0")) == 0
    for job in jobs:
        case, source, name, shard, *kill = job.split(":")
        target = folder / f"{case}-{name}"
        if first and source and source != name:
            copy = target.with_suffix(".partial")
            shutil.copytree(folder / f"{case}-{source}", copy)
            shutil.rmtree(copy / "checkpoints/step_000002")
            os.replace(copy, target)
        while source and not target.is_dir():
            time.sleep(0.05)
        checkpoints.save_rng = die if kill else exact
        overrides: dict[str, Any] = {"train__save_every": 1}
        trainer = trainer_of(target, checkpoint, case, shard == "1", **overrides)
        assert trainer.step_number == (1 if source else 0)
        trainer.train()
        trainer.accelerator.wait_for_everyone()
        del trainer
        release_memory()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    leave_process_group()
