"""`ril view`: show all groups of run folders in the browser, while they train or afterwards."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from openril.errors import OpenRILError
from openril.report.progress import say
from openril.report.run_files import require_run

PORT = 8642
SECONDS_BETWEEN_LOOKS = 2.0
"""How long the server waits before it looks for new steps again."""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    p = argparse.ArgumentParser("ril view", description="Show all groups of runs in the browser.", allow_abbrev=False)
    p.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="a run folder; several are compared")
    p.add_argument("--port", type=int, help=f"port on 127.0.0.1; default: the first free one from {PORT} on")
    p.add_argument("--no-browser", action="store_true", help="print the address and open no browser")
    return p


def run_view(arguments: Sequence[str], console: Console) -> int:
    """Serve the page until Ctrl-C. Raises OpenRILError for a folder that is no run, and for a port that is taken."""
    flags = parser().parse_args(list(arguments))
    run_dirs = [path.resolve() for path in flags.run_dirs]
    for path in run_dirs:
        require_run(path)
    try:
        import duckdb  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise OpenRILError(
            f"ril view: expected the package {e.name}, which is not installed. Run pip install 'openril[view]'."
        ) from e
    from openril.report.serving.background import Viewer
    from openril.report.serving.server import make_app

    listener = bind(flags.port)
    port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    if flags.port is None and port != PORT:
        say(console, f"view: port {PORT} is taken, so this is port {port}")
    say(console, f"view: {address} (Ctrl-C ends it)")
    say(console, f"view: from another machine, first run there: {tunnel(port)}")
    with Viewer(run_dirs, cache_path(run_dirs), SECONDS_BETWEEN_LOOKS) as viewer:
        # The server listens already, so the browser waits for the first answer.
        if not flags.no_browser and has_display():
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        config = uvicorn.Config(
            make_app(viewer.source),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    say(console, "view: ended")
    return 0


def bind(port: int | None) -> socket.socket:
    """Return a socket that listens on 127.0.0.1: at ``port``, or at the first free port from ``PORT`` on."""
    for candidate in range(PORT, PORT + 50) if port is None else [port]:
        try:
            return socket.create_server(("127.0.0.1", candidate))
        except (OSError, OverflowError) as e:
            reason = e.strerror if isinstance(e, OSError) else "no such port"
    got = f"{PORT} to {PORT + 49}" if port is None else port
    raise OpenRILError(f"--port: expected a free port, got {got} ({reason}). Name another with --port.")


def cache_path(run_dirs: Sequence[Path]) -> Path:
    """Return the file of the index in the user's cache, so that run folders may be read-only."""
    name = hashlib.sha256(os.fsencode("\n".join(map(str, run_dirs)))).hexdigest()[:32]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openril" / "view" / f"{name}.duckdb"


def tunnel(port: int) -> str:
    """Return the command that makes the server reachable from another machine."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    host = connection[2] if len(connection) == 4 else socket.gethostname()
    user = os.environ.get("USER") or os.environ.get("LOGNAME")
    return f"ssh -N -L {port}:127.0.0.1:{port} {f'{user}@' if user else ''}{host}"


def has_display() -> bool:
    """Return whether a browser window can open here."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("darwin", "win32") or any(os.environ.get(k) for k in ("DISPLAY", "WAYLAND_DISPLAY"))
