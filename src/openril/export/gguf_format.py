"""`--to gguf`: the files that llama.cpp, Ollama and LM Studio run."""

from __future__ import annotations

from openril.export.request import ExportError, ExportRequest

TYPES = ("f16", "q8_0", "q4_0")


def export(request: ExportRequest) -> bool:
    """Write the language model and the vision model, and check them."""
    raise ExportError("--to: gguf cannot be written yet.")


def check(request: ExportRequest) -> bool:
    """Check an export that was written earlier."""
    raise ExportError("--to: gguf cannot be checked yet.")
