"""Kill a run at random, continue it each time on another number of processes, and compare the end with an undisturbed run.

usage: python tests/training/random_kills.py FOLDER [KILLS] [SEED]

Takes several minutes, so no test runs it. The student is a tiny Qwen2.5-VL in float64. Runs on 2 and 4 processes are
sharded. The last line gives the largest differences of the weights.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

STEPS = 30


def work(folder: Path, checkpoint: Path, shard: bool) -> None:
    from sharded import trainer_of

    from openril.training.distributed import leave_process_group

    trainer = trainer_of(folder, checkpoint, "mixed", shard, train__max_steps=STEPS, train__save_every=1)
    print(f"from step {trainer.step_number}", flush=True)
    trainer.train()
    leave_process_group()


def start(processes: int, folder: Path, checkpoint: Path) -> subprocess.Popen[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [__file__, "--work", str(folder), str(checkpoint), str(int(processes > 1))]
    log = open(folder.parent / f"{folder.name}.log", "a")  # noqa: SIM115 (the process writes to it)
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)


def steps_of(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("checkpoints/step_*"))


def main(folder: Path, kills: int, seed: int) -> None:
    from safetensors.torch import load_file

    from openril.testing.tiny_models import build_tiny_model

    folder.mkdir(parents=True)
    checkpoint = build_tiny_model(folder / "model", "qwen2_5_vl")
    draw = random.Random(seed)
    assert start(1, folder / "undisturbed", checkpoint).wait() == 0
    run, done, number = folder / "killed", 0, 0
    while True:
        processes = (2, 4, 1)[number % 3]
        number += 1
        before = steps_of(run)
        process = start(processes, run, checkpoint)
        if done < kills:
            # Somewhere within the step after the first or second new checkpoint, or in the writing of the next.
            new = draw.randint(1, 2)
            while process.poll() is None and len(set(steps_of(run)) - set(before)) < new:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 1.5))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                done += 1
            process.wait()
            print(f"kill {done}: {processes} processes, {', '.join(steps_of(run)[-1:]) or 'no checkpoint'}", flush=True)
        elif process.wait() == 0:
            break
        else:
            sys.exit(f"the run on {processes} processes failed; see {run}.log")
        if steps_of(run)[-1:] == [f"step_{STEPS:06}"]:
            break
    last = f"checkpoints/step_{STEPS:06}"
    worst = {}
    for part in ("student", "discriminator"):
        one, other = (
            load_file(folder / name / last / part / "model.safetensors") for name in ("undisturbed", "killed")
        )
        assert one.keys() == other.keys()
        worst[part] = max(float((one[key] - other[key]).abs().max()) for key in one)
    print(f"{done} kills, largest differences: {worst}")


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1")
    else:
        main(Path(sys.argv[1]), *map(int, (*sys.argv[2:], *("10", "0")[len(sys.argv) - 2 :])))
