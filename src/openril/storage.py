"""Write files that survive a kill at any moment: written next to the target and renamed, or appended line by line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openril.errors import OpenRILError, StateError

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
_CHUNK, _CHUNKS = 1 << 20, 64


def stable_hash(*parts: Any) -> int:
    """Return a 63-bit integer from JSON-serializable parts. Unlike ``hash``, it is the same in every process."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target``, which replaces it on success and is removed on an error.

    Works for files and folders. A reader sees the old content or the new one, never a part.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_dir() and target.exists():
            # A folder cannot replace a folder with files in one call, so the old one is moved away first.
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            remove(old)
            os.replace(target, old)
            os.replace(temporary, target)
            remove(old)
        else:
            os.replace(temporary, target)
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, and flush it to disk."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]], errors: str = "strict") -> None:
    """Write rows atomically, one line each, without holding them all in memory. errors: "replace" for lone surrogates."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", errors=errors) as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        f.flush()
        os.fsync(f.fileno())


def append_jsonl(path: Path, *rows: dict[str, Any]) -> None:
    """Append rows, one line each, in a single write. A partial last line of a killed writer is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with open(path, "ab+") as f:
        if f.seek(0, os.SEEK_END) > 0:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                text = "\n" + text
        f.write(text.encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file written by ``append_jsonl``, without lines that a kill cut off."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that ``read_jsonl`` returns, one by one."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


class Lock:
    """An advisory lock on a file. It is released when its holder dies. Not re-entrant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self, *, wait: bool = True, shared: bool = False) -> bool:
        """Try to take the lock and return whether it is held now. With ``wait`` that is always true."""
        assert self._file is None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not lock_file(file, self.path, wait=wait, shared=shared):
            os.close(file)
            return False
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_file(file: int, path: Path, *, wait: bool, shared: bool = False) -> bool:
    """Lock an open file. Return False if another process holds the lock and ``wait`` is off."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise StateError(
                f"{path}: expected a file system with file locks, without which processes could overwrite each other, got"
                f" an error: {e.strerror}. Use a local disk, or mount the file system with locking."
            ) from e
        raise
    return True


def weights_fingerprint(folder: Path) -> str | None:
    """Return ``weights:`` and a hash of the folder's weight files, or None where there are none (a hub name).

    Files of up to 64 MiB are hashed whole and larger ones by 64 pieces of 1 MiB spread evenly, so that a 72B checkpoint
    takes seconds and any training still changes the result.
    """
    if not folder.is_dir():
        return None
    paths = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as f:
            for i in range(_CHUNKS):
                if size > _CHUNK * _CHUNKS:
                    f.seek(i * (size - _CHUNK) // (_CHUNKS - 1))
                digest.update(f.read(_CHUNK))
    return f"weights:{digest.hexdigest()[:32]}" if paths else None


def changed_keys(
    saved: Any, now: Any, ignored: Callable[[str], bool] = lambda key: False
) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ between two nested mappings, each with its old and new value.

    Args:
        ignored: Whether the difference of a dotted key does not count.
    """

    def walk(old: Any, new: Any, prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in dict.fromkeys([*old, *new]):
                yield from walk(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        elif old != new and not ignored(prefix):
            yield prefix, (old, new)

    return dict(walk(saved, now, ""))


def refuse_changed(
    path: Path,
    saved: Any,
    now: Any,
    *,
    fix: str,
    ignored: Callable[[str], bool] = lambda key: False,
    error: type[OpenRILError] = StateError,
) -> None:
    """Refuse to continue work in ``path`` with settings other than those it was started with.

    Args:
        path: The file or folder that the message names.
        saved: The settings that ``path`` was started with, as plain data.
        now: The settings that it would be continued with.
        fix: What the user can do besides restoring the old values, for example ``set another run_dir``.
        ignored: Whether a dotted key may change.
        error: The class to raise.

    Raises:
        StateError: Or ``error``, naming up to six keys with their old and new values.
    """
    changed = changed_keys(saved, now, ignored)
    if not changed:
        return
    shown = [f"{key} (was {_short(old)}, now {_short(new)})" for key, (old, new) in list(changed.items())[:6]]
    more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
    raise error(f"{path} was made with other values of {', '.join(shown)}{more}. Restore them, or {fix}.")


def _short(value: Any, limit: int = 60) -> str:
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
