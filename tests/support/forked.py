"""Run a script in several processes after importing the libraries once: ``forked.py COUNT SCRIPT|-m MODULE [ARGUMENT ...]``.

torchrun imports them in each process and in its own, which takes longer than most tests. The processes get torchrun's
variables. If one fails, the others are killed, and the command fails.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
from pathlib import Path

import openril.stages.train  # noqa: F401

COUNT, ARGUMENTS = int(sys.argv[1]), sys.argv[2:]


def run() -> None:
    if ARGUMENTS[0] == "-m":
        sys.argv = ARGUMENTS[1:]
        runpy.run_module(ARGUMENTS[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ARGUMENTS
        sys.path[0] = str(Path(ARGUMENTS[0]).parent)
        runpy.run_path(ARGUMENTS[0], run_name="__main__")


def main() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT}
    running = []
    for rank in range(COUNT):
        if (child := os.fork()) == 0:
            os.environ.update(
                {name: str(value) for name, value in {**places, "RANK": rank, "LOCAL_RANK": rank}.items()}
            )
            return run()
        running.append(child)
    failed = False
    while running:
        ended, status = os.wait()
        running.remove(ended)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    sys.exit(int(failed))


main()
