"""The training room: warm start, pre-training, the loop, and its exact state."""

import openril.models  # noqa: F401  (makes torchvision importable, before anything here imports transformers)
