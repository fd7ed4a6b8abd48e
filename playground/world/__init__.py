"""Fourteen skills: questions about drawn pictures. Each skill represents the family of one of the paper's benchmarks.

``python -m playground.world --out FOLDER --num-train N`` writes them as question files. docs/skills.md
shows one question of each skill.
"""

from playground.world.questions import STYLES, Derivation, SkillQuestion, Style, style_of
from playground.world.skills import (
    DIFFICULTIES,
    SKILLS,
    Skill,
    Split,
    corpus,
    make_questions,
    write_skills_world,
)

__all__ = [
    "DIFFICULTIES", "SKILLS", "STYLES", "Derivation", "Skill", "SkillQuestion", "Split", "Style", "corpus",
    "make_questions", "style_of", "write_skills_world",
]  # fmt: skip
