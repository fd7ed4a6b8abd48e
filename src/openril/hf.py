"""Import transformers and TRL: ``from openril.hf import AutoProcessor``.

transformers imports torchvision as soon as a processor is used. The compiled operators of torchvision's default wheels
do not load next to a CPU-only torch, so ``torchvision_compat`` declares them first. Every file of the project imports
transformers and TRL through this module, which guarantees that order. Type checkers read its names from ``hf.pyi``.
"""

from __future__ import annotations

import importlib
from typing import Any

from openril import torchvision_compat

torchvision_compat.apply()

import transformers  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

_FROM_TRL = ("GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer")

__all__ = ["submodule", "transformers", "transformers_logging"]


def submodule(name: str) -> Any:
    """Return a module inside transformers or TRL by its full name."""
    return importlib.import_module(name)


def __getattr__(name: str) -> Any:
    """Return a public name of transformers, or one of the TRL names that the project uses."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("trl") if name in _FROM_TRL else transformers, name)
