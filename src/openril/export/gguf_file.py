"""A GGUF file that is written whole or not at all."""

from __future__ import annotations

import errno
import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from openril.export.request import ExportError
from openril.storage import atomic_path

TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2}
"""Type of the weights -> its number in ``general.file_type``."""

BLOCK = 32
"""Values that share a scale in q8_0 and q4_0. Rows of another length stay in f16."""


def gguf_package() -> Any:
    """Return ggml's ``gguf`` package. Raises ExportError if it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as e:
        raise ExportError(f"--to gguf: the package gguf is missing ({e}). {INSTALL}") from e


INSTALL = 'Install it: pip install "openril[export]".'


class GGUFFile:
    """The keys and tensors of one file. ``keys`` is the package's writer, which has a method for each key.

    Args:
        kind: The type of matrices: f16, q8_0 or q4_0. Vectors, norms and position tables stay in f32.
        architecture: Value of ``general.architecture``.
    """

    def __init__(self, kind: str, architecture: str) -> None:
        self._gguf = gguf_package()
        self._kind = kind
        self._tensors: dict[str, tuple[np.ndarray, Any]] = {}
        self.keys = self._gguf.GGUFWriter(None, architecture)
        self.keys.add_file_type(TYPES[kind])
        self.keys.add_quantization_version(self._gguf.GGML_QUANT_VERSION)
        self.left_in_f16: list[str] = []
        """Matrices whose rows do not divide into blocks."""

    def add(self, name: str, values: np.ndarray) -> None:
        """Add a tensor of float32 values [rows, columns], in the file's type."""
        kinds = self._gguf.GGMLQuantizationType
        if name in self._tensors:
            raise ExportError(f"{name}: expected one tensor of this name, got two. The checkpoint is not as expected.")
        kind = self._kind
        if values.ndim == 4:
            kind = "f16"  # the convolution of the patches
        if name in ("token_embd.weight", "output.weight") and kind == "q4_0":
            kind = "q8_0"  # 4 bits cost far more here than in the layers, as in llama.cpp's own tools
        if kind != "f16" and values.shape[-1] % BLOCK and values.ndim > 1 and "norm" not in name:
            self.left_in_f16.append(name)
            kind = "f16"
        if values.ndim <= 1 or "norm" in name or "position_embd" in name:
            data, raw = values.astype(np.float32), None
        elif kind == "f16":
            with np.errstate(over="ignore"):
                data, raw = values.astype(np.float16), None
            if not np.isfinite(data).all():
                raise ExportError(f"{name}: expected values below 65504, the largest of f16, got {values.max():g}.")
        else:
            raw = {"q8_0": kinds.Q8_0, "q4_0": kinds.Q4_0}[kind]
            data = self._gguf.quants.quantize(np.ascontiguousarray(values, np.float32), raw)
        self._tensors[name] = (data, raw)

    def write(self, path: Path) -> int:
        """Write the file, replacing an older one, and return its size in bytes. An error leaves nothing behind."""
        for name, (data, raw) in self._tensors.items():
            self.keys.add_tensor(name, data, raw_dtype=raw)
        needed = sum(data.nbytes for data, _ in self._tensors.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < needed * 1.01:
            raise _disk_full(path, needed, free)
        try:
            with atomic_path(path) as temporary:
                self.keys.write_header_to_file(temporary)
                self.keys.write_kv_data_to_file()
                self.keys.write_tensors_to_file()
                self.keys.close()
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _disk_full(path, needed, shutil.disk_usage(path.parent).free) from e
            raise
        return path.stat().st_size


def _disk_full(path: Path, needed: int, free: int) -> ExportError:
    return ExportError(
        f"--out: expected {needed / 1e6:.0f} MB of free disk for {path}, got {free / 1e6:.0f} MB. Nothing of this file was"
        " kept. Free some disk, or name another folder with --out."
    )


def require(holds: bool, key: str, expected: str, found: Any) -> None:
    """Raise ExportError, because the runtime would compute something else, unless ``holds``."""
    if not holds:
        raise ExportError(
            f"{key}: expected {expected}, got {str(found)[:200]!r}, which llama.cpp is not known to compute in the same way."
            " Such a checkpoint cannot be exported to gguf."
        )
