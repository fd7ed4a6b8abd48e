"""OpenRIL: unified reinforcement and imitation learning for vision-language models (arXiv 2510.19307).

All public names are importable from here, and heavy modules load on first use. docs/api.md is the introduction. Type
checkers and editors read the names from ``__init__.pyi``.
"""

from __future__ import annotations

import importlib
from typing import Any

from openril._version import __version__ as __version__

_MODULES = {
    "algorithm.advantages": "group_advantages",
    "algorithm.objective": "token_loss",
    "data.reading": "read_questions",
    "discriminator.losses": "bce_loss bradley_terry_loss",
    "discriminator.network": "DiscriminatorModel",
    "errors": "CacheError DataError EndpointError JudgeError ModelError OpenRILError RecipeError StateError",
    "models.packing": "Policy",
    "models.prompts": "PromptEncoder",
    "recipe.loading": "load_recipe save_recipe",
    "recipe.schema": "Recipe Sampling SamplingConfig",
    "records": "Group ImageSource Question Response Rollout",
    "responses.cache": "ResponseCache",
    "responses.teacher_sampling": "draw",
    "rewards.answers": "score_answers",
    "rewards.combine": "RewardSystem",
    "rewards.judge": "JudgeService build_judge_service",
    "sampling.protocol": "Sampler",
    "sampling.transformers_engine": "TransformersSampler",
    "stages.train": "open_trainer",
    "testing.tiny_models": "build_tiny_model",
    "training.discriminator_update": "Discriminator",
    "training.loop": "RILTrainer",
}
_WHERE = {name: f"openril.{module}" for module, names in _MODULES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'openril' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
