"""Models: loading, prompts, freezing, adapters, and the pass over groups.

torchvision is made importable first: transformers reads it as soon as a processor is used, so every room that imports
transformers imports this one in its own ``__init__``.
"""

from openril.models import torchvision_cure as torchvision_cure
