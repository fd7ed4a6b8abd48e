"""OpenRIL: unified reinforcement and imitation learning for vision-language models (arXiv 2510.19307).

All public names are importable from here, and heavy modules load on first use. docs/api.md is the introduction.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


if TYPE_CHECKING:
    from openril.algorithm.advantages import group_advantages as group_advantages
    from openril.algorithm.objective import token_loss as token_loss
    from openril.data.reading import read_questions as read_questions
    from openril.discriminator.losses import bce_loss as bce_loss
    from openril.discriminator.losses import bradley_terry_loss as bradley_terry_loss
    from openril.discriminator.network import DiscriminatorModel as DiscriminatorModel
    from openril.errors import CacheError as CacheError
    from openril.errors import DataError as DataError
    from openril.errors import EndpointError as EndpointError
    from openril.errors import JudgeError as JudgeError
    from openril.errors import ModelError as ModelError
    from openril.errors import OpenRILError as OpenRILError
    from openril.errors import RecipeError as RecipeError
    from openril.errors import StateError as StateError
    from openril.models.packing import Policy as Policy
    from openril.models.prompts import PromptEncoder as PromptEncoder
    from openril.recipe.loading import load_recipe as load_recipe
    from openril.recipe.loading import save_recipe as save_recipe
    from openril.recipe.schema import Recipe as Recipe
    from openril.recipe.schema import Sampling as Sampling
    from openril.recipe.schema import SamplingConfig as SamplingConfig
    from openril.records import Group as Group
    from openril.records import ImageSource as ImageSource
    from openril.records import Question as Question
    from openril.records import Response as Response
    from openril.records import Rollout as Rollout
    from openril.responses.cache import ResponseCache as ResponseCache
    from openril.responses.teacher_sampling import draw as draw
    from openril.rewards.answers import score_answers as score_answers
    from openril.rewards.combine import RewardSystem as RewardSystem
    from openril.rewards.judge import JudgeService as JudgeService
    from openril.rewards.judge import build_judge_service as build_judge_service
    from openril.sampling.protocol import Sampler as Sampler
    from openril.sampling.transformers_engine import TransformersSampler as TransformersSampler
    from openril.stages.train import open_trainer as open_trainer
    from openril.testing.tiny_models import build_tiny_model as build_tiny_model
    from openril.training.discriminator_update import Discriminator as Discriminator
    from openril.training.loop import RILTrainer as RILTrainer
