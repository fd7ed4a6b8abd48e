"""Run llama.cpp's server from the package xllamacpp until standard input ends. ``runtime.py`` starts this file.

It imports nothing of openril, so that the memory of the process is that of the runtime.
"""

import json
import os
import sys


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.environ["LLAMA_MEDIA_MARKER"] = settings.pop("marker")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = settings.pop("model"), settings.pop("mmproj")
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.pop("threads")
    for name, value in settings.items():
        setattr(params, name, value)
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
