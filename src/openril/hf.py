"""The one door to transformers and TRL: ``from openril.hf import AutoProcessor``.

transformers imports torchvision as soon as a processor is used. The compiled operators of torchvision's default wheels
do not load next to a CPU-only torch, so the missing operators are declared first (``torchvision_compat``). Every file of
the project imports transformers and TRL through this module, which makes that order certain.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from openril import torchvision_compat

torchvision_compat.apply()

import transformers  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

if TYPE_CHECKING:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    from transformers import AttentionInterface as AttentionInterface
    from transformers import AttentionMaskInterface as AttentionMaskInterface
    from transformers import AutoConfig as AutoConfig
    from transformers import AutoModel as AutoModel
    from transformers import AutoModelForCausalLM as AutoModelForCausalLM
    from transformers import AutoModelForImageTextToText as AutoModelForImageTextToText
    from transformers import AutoProcessor as AutoProcessor
    from transformers import AutoTokenizer as AutoTokenizer
    from transformers import DynamicCache as DynamicCache
    from transformers import Gemma3Config as Gemma3Config
    from transformers import Gemma3ForConditionalGeneration as Gemma3ForConditionalGeneration
    from transformers import Gemma3ImageProcessor as Gemma3ImageProcessor
    from transformers import Gemma3Processor as Gemma3Processor
    from transformers import GenerationConfig as GenerationConfig
    from transformers import GotOcr2ImageProcessor as GotOcr2ImageProcessor
    from transformers import GraniteConfig as GraniteConfig
    from transformers import GraniteForCausalLM as GraniteForCausalLM
    from transformers import InternVLConfig as InternVLConfig
    from transformers import InternVLForConditionalGeneration as InternVLForConditionalGeneration
    from transformers import InternVLProcessor as InternVLProcessor
    from transformers import InternVLVideoProcessor as InternVLVideoProcessor
    from transformers import LlavaOnevisionConfig as LlavaOnevisionConfig
    from transformers import LlavaOnevisionForConditionalGeneration as LlavaOnevisionForConditionalGeneration
    from transformers import LlavaOnevisionImageProcessor as LlavaOnevisionImageProcessor
    from transformers import LlavaOnevisionProcessor as LlavaOnevisionProcessor
    from transformers import LlavaOnevisionVideoProcessor as LlavaOnevisionVideoProcessor
    from transformers import PreTrainedTokenizerFast as PreTrainedTokenizerFast
    from transformers import PrinterCallback as PrinterCallback
    from transformers import Qwen2_5_VLConfig as Qwen2_5_VLConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as Qwen2_5_VLForConditionalGeneration
    from transformers import Qwen2_5_VLProcessor as Qwen2_5_VLProcessor
    from transformers import Qwen2Config as Qwen2Config
    from transformers import Qwen2ForCausalLM as Qwen2ForCausalLM
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessor
    from transformers import Qwen2VLVideoProcessor as Qwen2VLVideoProcessor
    from transformers import Qwen3VLConfig as Qwen3VLConfig
    from transformers import Qwen3VLForConditionalGeneration as Qwen3VLForConditionalGeneration
    from transformers import Qwen3VLProcessor as Qwen3VLProcessor
    from transformers import Qwen3VLVideoProcessor as Qwen3VLVideoProcessor
    from transformers import SmolVLMConfig as SmolVLMConfig
    from transformers import SmolVLMForConditionalGeneration as SmolVLMForConditionalGeneration
    from transformers import SmolVLMImageProcessor as SmolVLMImageProcessor
    from transformers import SmolVLMProcessor as SmolVLMProcessor
    from transformers import SmolVLMVideoProcessor as SmolVLMVideoProcessor
    from transformers import TrainerCallback as TrainerCallback
    from trl import GRPOConfig as GRPOConfig
    from trl import GRPOTrainer as GRPOTrainer
    from trl import SFTConfig as SFTConfig
    from trl import SFTTrainer as SFTTrainer

_FROM_TRL = ("GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer")

__all__ = ["transformers", "transformers_logging"]


def __getattr__(name: str) -> Any:
    """Return a public name of transformers, or one of the TRL names that the project uses."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("trl") if name in _FROM_TRL else transformers, name)
