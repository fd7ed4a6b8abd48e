from typing import Any

import transformers as transformers
from transformers import *  # noqa: F403
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig as GRPOConfig
from trl import GRPOTrainer as GRPOTrainer
from trl import SFTConfig as SFTConfig
from trl import SFTTrainer as SFTTrainer

__all__ = ["submodule", "transformers", "transformers_logging"]

def submodule(name: str) -> Any: ...
