"""List the contenders, how each is tuned, and every cell of every part. docs/study_protocol.md explains the choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

STUDENTS = ("student_qwen", "student_internvl")
TEACHERS = ("teacher_a", "teacher_b")
START = "start"
"""The student that every contender starts from, measured as it is."""
STEPS = 80
TUNING_SEED = 100
"""Seed of the tuning runs. The scored cells use 0, 1, 2 and so on."""


@dataclass(frozen=True)
class Rate:
    """A learning rate of the student, and whether it falls to a tenth until the last step."""

    peak: float
    falls: bool = True

    @property
    def name(self) -> str:
        return f"{self.peak:g}" + ("" if self.falls else "_constant")

    def settings(self) -> dict[str, Any]:
        if not self.falls:
            return {"train.optimizer.learning_rate": self.peak, "train.optimizer.schedule": "constant"}
        return {
            "train.optimizer.learning_rate": self.peak,
            "train.optimizer.schedule": "linear",
            "train.optimizer.final_learning_rate": self.peak / 10,
        }

    @staticmethod
    def of(name: str) -> Rate:
        """Return the rate of a name."""
        peak, _, constant = name.partition("_")
        return Rate(float(peak), not constant)


RATES = (Rate(1.5e-4, falls=False), Rate(1.5e-4), Rate(5e-4), Rate(1e-3))
"""The tuning runs of every contender, on validation questions."""


@dataclass(frozen=True)
class Contender:
    """A recipe that takes part."""

    title: str
    recipe: str
    """Its name in recipes/methods."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings in addition to the recipe's."""
    tuned_as: str = ""
    """The contender whose tuned rate it takes, if it is not tuned itself, because it is a control of that one."""
    second: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a second run with the other half of the steps, which starts from the student of the first."""
    second_recipe: str = ""
    """The recipe of that second run, if it is another."""
    labels: str = ""
    """``shuffled``: the discriminator learns which response is whose from labels that are shuffled in every group."""
    logits: Literal["", "forward", "reverse"] = ""
    """The divergence from the distribution of ``SAME_TOKENIZER``'s teacher that it learns in the place of rewards."""


def _rows(students: int, teachers: int) -> dict[str, int]:
    return {"train.num_generations": students, "train.num_teacher_responses": teachers}


_D = {
    "discriminator.mode": "updated", "rewards.similarity.weight": 1.0, "rewards.similarity.gate.enabled": True,
}  # fmt: skip
_LENGTH = {
    "discriminator.mode": "none", "rewards.similarity.weight": 0.0,
    "rewards.functions": [{"function": "playground.comparison.rewards:long_enough", "weight": 1.0}],
}  # fmt: skip
_ALL = {
    "train.teacher_draw": "any", "rewards.answer.weight": 0.0,
    "rewards.functions": [{"function": "playground.comparison.rewards:one", "weight": 1.0}],
}  # fmt: skip
_JUDGE_ALONE = {"train.algorithm": "dr_grpo"}

CONTENDERS: dict[str, Contender] = {
    "dr_grpo": Contender("Dr.GRPO", "dr_grpo", {"train.num_generations": 12}),
    "rejection_sampling": Contender("rejection sampling", "rejection_sampling_balanced", _rows(0, 12)),
    "ril": Contender("RIL as published", "ril"),
    "ril_plus": Contender("RIL+", "ril_plus"),
    "ril_plus_d": Contender("RIL+ with a gated discriminator", "ril_plus", _D),
    "raft_mix": Contender("RAFT-mix", "raft_mix", _rows(8, 4)),
    "zppo_like": Contender("ZPPO-like", "zppo_like", {"train.num_generations": 8, "train.retry.questions_per_step": 8}),
    "luffy_like": Contender("LUFFY-like", "luffy_like", _rows(11, 1)),
    "gad": Contender("GAD", "gad", {"train.num_generations": 8, "train.num_teacher_responses": 4}),
    "gail": Contender("GAIL", "gail"),
    "prism_like": Contender(
        "PRISM-like", "prism_like", {"train.num_generations": 8, "train.num_teacher_responses": 4}, second=_JUDGE_ALONE
    ),
    "persistent": Contender("persistent discriminator", "persistent"),
    "sft_teacher_text": Contender("SFT on teacher text", "rejection_sampling_balanced", {**_rows(0, 12), **_ALL}),
    "grpo": Contender("GRPO", "grpo", {"train.num_generations": 12}),
}  # fmt: skip
"""In the order of the tables."""
GOALS = ("dr_grpo", "rejection_sampling", "ril", "ril_plus", "ril_plus_d")
"""Contenders of the goals, which come first and have the most seeds."""

AT_D_RATE = "ril_plus_at_d_rate"
"""Tells what a discriminator gives from what the rate gives that was tuned for it."""
CONTROLS: dict[str, Contender] = {
    "ril_without_d": Contender(
        "RIL without its discriminator", "ril", {"discriminator.mode": "none", "rewards.similarity.weight": 0.0}, "ril"
    ),
    "ril_fixed_d": Contender(
        "RIL with its discriminator as pre-trained", "ril", {"discriminator.mode": "fixed"}, "ril"
    ),
    "ril_length": Contender("RIL with a length reward in the discriminator's place", "ril", _LENGTH, "ril"),
    "ril_shuffled": Contender("RIL with shuffled labels", "ril", {}, "ril", labels="shuffled"),
    "ril_plus_length": Contender("RIL+ with a length reward", "ril_plus", _LENGTH, "ril_plus"),
    "ril_plus_always": Contender(
        "RIL+ with teachers in all groups", "ril_plus", {"train.teacher_responses_below": None}, "ril_plus"
    ),
    # Added after the first results: at the other's rate the discriminator does not follow the student.
    "ril_plus_d_fast": Contender(
        "RIL+ with a gated discriminator, ten times its rate",
        "ril_plus",
        {**_D, "discriminator.optimizer.learning_rate": 1.5e-4},
        "ril_plus_d",
    ),
    AT_D_RATE: Contender("RIL+ at the rate of RIL+ with a gated discriminator", "ril_plus", {}, "ril_plus_d"),
}
IN_TWO_PARTS: dict[str, Contender] = {
    "sft_then_ril_plus": Contender(
        "SFT on teacher text, then RIL+",
        "rejection_sampling_balanced",
        {**_rows(0, 12), **_ALL},
        "ril_plus",
        second=_rows(8, 4),
        second_recipe="ril_plus",
    ),
}
"""For questions of which a part has ground truth: half of the steps on all of them, half on that part."""
DISTILLATION: dict[str, Contender] = {
    "logits_of_text": Contender(
        "logits on the teacher's text", "rejection_sampling_balanced", {**_rows(0, 8), **_ALL}, logits="forward"
    ),
    "logits_of_both": Contender(
        "logits on both", "ril_plus", {**_rows(4, 4), "train.teacher_draw": "any", "train.teacher_responses_below": None},
        logits="forward",
    ),
    "logits_of_samples": Contender(
        "logits on the student's samples", "dr_grpo", {"train.num_generations": 8, "train.beta": 0}, logits="reverse"
    ),
}  # fmt: skip
"""Distillation by logits, which is not a method of the package."""
SAME_TOKENIZER = {"student_qwen": "teacher_a"}
"""The teacher whose logits a student can learn."""
ONE_TEACHER = "one_teacher"
"""The regime in which that teacher is the only one."""
WITH_ONE_TEACHER = ("sft_teacher_text", "rejection_sampling", "ril_plus", *DISTILLATION)
EVERYBODY = {**CONTENDERS, **CONTROLS, **IN_TWO_PARTS, **DISTILLATION}

REGIMES: dict[str, str] = {
    "truth_30": "ground truth for 30 % of the questions",
    "truth_10": "ground truth for 10 %",
    "truth_0": "no ground truth",
    "judge_10": "a judge that errs in 10 % of its verdicts",
    "judge_25": "a judge that errs in 25 %",
    "teachers_30": "teachers right in 30 % of their responses",
    "teachers_60": "teachers right in 60 %",
    "teachers_90": "teachers right in 90 %",
    "teachers_100": "teachers always right, in the words of the world itself",
    "rubric": "no one right wording: a rubric asks for the facts",
    "unjudged": "teacher responses without verdicts, drawn whether right or wrong",
}
"""What is changed, by name; "" is the world as it is."""
IN_REGIMES: tuple[str, ...] = ("rejection_sampling", "ril_plus", "ril_plus_d")
WITH_SOME_TRUTH = (*IN_REGIMES, "ril", *IN_TWO_PARTS)
"""Those that run where a part of the questions has ground truth."""
WITHOUT_VERDICTS = ("ril_plus", "ril_plus_d")
"""Those that can do without verdicts on the cached teacher responses."""
WITHOUT_TRUTH = ("sft_teacher_text", "ril_plus_d", "gail")
"""Those that can learn without any ground truth."""


@dataclass(frozen=True)
class Cell:
    """One training and its score."""

    student: str
    name: str
    """A contender, or START."""
    seed: int = 0
    steps: int = STEPS
    rate: str = ""
    """A tuning run's rate; "" takes the tuned one."""
    regime: str = ""
    split: str = "test"
    """The questions that score it."""

    @property
    def contender(self) -> Contender:
        return EVERYBODY[self.name]

    @property
    def path(self) -> str:
        """Its folder."""
        part = [self.student, "tuning" if self.split == "validation" else self.regime or "plain", self.name]
        return "/".join(
            [*part, *([f"rate_{self.rate}"] if self.rate else []), f"steps_{self.steps}", f"seed_{self.seed}"]
        )

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers that it may learn from."""
        return (SAME_TOKENIZER[self.student],) if self.regime == ONE_TEACHER or self.contender.logits else TEACHERS


def skill_of(question: str) -> str:
    """Return the skill of a question by its id (``test-00001-charts``)."""
    return question.split("-", 2)[2]


PARTS = ("tuning", "contenders", "seconds", "steps", "controls", "regimes", "others", "distillation")
LENGTHS = (40, 160, 320)


def tuning(students: Sequence[str], names: Sequence[str]) -> Iterator[Cell]:
    """Yield the validation runs: the same ones for every contender."""
    for name in names:
        able = [s for s in students if s in SAME_TOKENIZER or not EVERYBODY[name].logits]
        for rate in RATES:
            yield from (Cell(s, name, TUNING_SEED, rate=rate.name, split="validation") for s in able)


def contenders(students: Sequence[str], names: Sequence[str], seeds: int) -> Iterator[Cell]:
    yield from (Cell(s, name, seed) for seed in range(seeds) for name in names for s in students)


def lengths(
    students: Sequence[str], names: Sequence[str], seeds: int, numbers: Sequence[int] = LENGTHS
) -> Iterator[Cell]:
    for cell in contenders(students, names, seeds):
        yield from (replace(cell, steps=steps) for steps in numbers)


def regimes(
    students: Sequence[str], seeds: int, only: Sequence[str] = tuple(REGIMES), named: Sequence[str] = ()
) -> Iterator[Cell]:
    """Yield the cells of some regimes.

    Args:
        named: Contenders. Those of a regime's that are among them run there, or all if none is; ``AT_D_RATE`` only if it is.
    """
    for seed in range(seeds):
        for regime in only:
            names = IN_REGIMES
            if regime.startswith("truth"):
                names = WITHOUT_TRUTH if regime == "truth_0" else WITH_SOME_TRUTH
            elif regime == "unjudged":
                names = WITHOUT_VERDICTS
            names = tuple(n for n in (*names, AT_D_RATE) if n in named) or names
            yield from (Cell(s, name, seed, regime=regime) for name in names for s in students)


def distillation(students: Sequence[str], names: Sequence[str], seeds: int) -> Iterator[Cell]:
    """Yield the cells with one teacher, for the students that have its tokenizer."""
    for cell in contenders([s for s in students if s in SAME_TOKENIZER], names, seeds):
        yield replace(cell, regime=ONE_TEACHER)
