"""The schema of a recipe: every setting, its default and its meaning. Defaults are the paper's (arXiv 2510.19307).

What goes in is in sources.py, what is learnt from it in learning.py; here is the whole. No torch here, so that ``--help``
and ``ril check``'s first messages are fast. Field docstrings are the command line's help.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from openril.recipe.learning import (
    AnswerRewardConfig,
    DiscriminatorConfig,
    EvaluationConfig,
    PretrainingConfig,
    RewardFunctionConfig,
    RewardsConfig,
    SamplerConfig,
    SFTConfig,
    SimilarityConfig,
    TrainConfig,
)
from openril.recipe.sources import (
    CollectConfig,
    DataConfig,
    EndpointConfig,
    JudgeConfig,
    LoraConfig,
    ModuleGroup,
    NonNegativeInt,
    OptimizerConfig,
    SamplingConfig,
    Section,
    SelectionConfig,
    StudentConfig,
    TeacherConfig,
)


class Recipe(Section):
    """One file that serves every command."""

    run_dir: str = "runs/ril"
    """Folder that holds everything this recipe makes."""
    cache_dir: str = ""
    """Response cache; "" means `responses` inside run_dir. Recipes may share one."""
    seed: NonNegativeInt = 0
    """Everything random follows from it."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Questions."""
    student: StudentConfig = Field(default_factory=StudentConfig)
    """The model to lift."""
    teachers: list[TeacherConfig] = Field(default_factory=list)
    """Where teacher responses come from."""
    collect: CollectConfig = Field(default_factory=CollectConfig)
    """Response collection."""
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    """The LLM judge."""
    sft: SFTConfig = Field(default_factory=SFTConfig)
    """Supervised warm start."""
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    """The discriminator."""
    rewards: RewardsConfig = Field(default_factory=RewardsConfig)
    """What responses earn."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The RIL loop."""
    eval: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Evaluation."""

    # Derived values, in one place so that no two rooms disagree about them.

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir).expanduser().resolve()

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir).expanduser().resolve() if self.cache_dir else self.run_path / "responses"

    @property
    def sft_student_path(self) -> Path:
        """Where `ril sft` leaves its model: the student every later stage starts from when sft.enabled."""
        return self.run_path / "sft" / "student"

    @property
    def start_student(self) -> str:
        """Checkpoint the loop and the discriminator start from."""
        return str(self.sft_student_path) if self.sft.enabled else self.student.model

    @property
    def collected_student(self) -> str:
        """Checkpoint whose responses are collected: the SFT student, unless SFT itself learns from the cache."""
        return self.student.model if self.sft.targets != "answers" else self.start_student

    @property
    def discriminator_path(self) -> Path:
        """Where `ril discriminator` leaves the pre-trained discriminator."""
        return self.run_path / "discriminator" / "discriminator"

    @property
    def teacher_names(self) -> list[str]:
        """Teachers the loop uses, in the recipe's order."""
        return [t.name for t in self.teachers if not self.train.teachers or t.name in self.train.teachers]

    @property
    def uses_discriminator(self) -> bool:
        """Whether the loop has a discriminator: RL-only algorithms have none."""
        return self.discriminator.mode != "none" and self.train.algorithm in ("ril", "gail")

    @property
    def uses_replay(self) -> bool:
        """Whether the loop's discriminator is reminded of earlier groups."""
        return self.uses_discriminator and self.discriminator.mode == "updated" and self.discriminator.replay > 0

    @property
    def teacher_responses_per_question(self) -> int:
        """Teacher responses drawn for each group (training the discriminator, and in the update if so set)."""
        if self.train.algorithm in ("dr_grpo", "grpo") or not self.teacher_names:
            return 0
        wanted = self.train.num_teacher_responses
        wanted = self.train.num_generations if wanted is None else wanted
        return wanted * len(self.teacher_names) if self.train.per_teacher else wanted

    @property
    def answer_kind(self) -> Literal["judge", "rules", "rules_then_judge", "none"]:
        """Answer reward in force: GAIL has none."""
        return "none" if self.train.algorithm == "gail" else self.rewards.answer.kind


Sampling = SamplingConfig
"""The name under which ``openril.Sampling`` is public."""

__all__ = [
    "AnswerRewardConfig",
    "CollectConfig",
    "DataConfig",
    "DiscriminatorConfig",
    "EndpointConfig",
    "EvaluationConfig",
    "JudgeConfig",
    "LoraConfig",
    "ModuleGroup",
    "OptimizerConfig",
    "PretrainingConfig",
    "Recipe",
    "RewardFunctionConfig",
    "RewardsConfig",
    "SFTConfig",
    "SamplerConfig",
    "Sampling", "SamplingConfig",
    "Section",
    "SelectionConfig",
    "SimilarityConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
]  # fmt: skip
