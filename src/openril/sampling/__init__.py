"""Sampling engines: responses drawn from a model."""

import openril.models  # noqa: F401  (makes torchvision importable, before anything here imports transformers)
