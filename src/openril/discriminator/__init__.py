"""The discriminator: network, prompt, training, health."""

import openril.models  # noqa: F401  (makes torchvision importable, before anything here imports transformers)
