"""The fourteen benchmarks of the paper's Tables 1 and 2, as lmms-eval names them, and the paper's own rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openril.errors import RecipeError
from openril.recipe.validation import nearest

SUITES = ("paper", "offline")
LMMS_EVAL = "lmms-eval"
INSTALL = 'pip install "openril[benchmarks]"'

_BLINK = (  # lmms-eval's tasks blink_...
    *("art_style", "counting", "forensic_detection", "functional_correspondence", "iq_test", "jigsaw"),
    *("multi_view_reasoning", "object_localization", "relative_depth", "relative_reflectance"),
    *("semantic_correspondence", "spatial_relation", "visual_correspondence", "visual_similarity"),
)


@dataclass(frozen=True)
class Benchmark:
    """One column of the table.

    Args:
        column: Its title.
        task: lmms-eval's task or group.
        metric: The key of ``process_results`` that is the benchmark's score.
        percent: Whether lmms-eval's aggregation returns percent and not a share.
        judge: Whether scoring asks the judge: never, for answers that rules cannot read, or for most answers.
        subtasks: The tasks of a group.
        strata: The score is the unweighted mean over the values of this column ("task": over the subtasks); "" means the
            mean over all questions.
        images_only: Whether questions about videos are left out.
    """

    column: str
    task: str
    metric: str
    percent: bool = False
    judge: Literal["never", "extraction", "always"] = "never"
    subtasks: tuple[str, ...] = ()
    strata: str = ""
    images_only: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The lmms-eval tasks with questions."""
        return self.subtasks or (self.task,)


PAPER = (
    Benchmark("AI2D", "ai2d", "exact_match"),
    Benchmark("ChartQA", "chartqa", "relaxed_overall"),
    Benchmark("MathVista", "mathvista_testmini_format", "llm_as_judge_eval", percent=True, judge="always"),
    Benchmark("MMB", "mmbench_en_dev", "gpt_eval_score", percent=True, judge="extraction"),
    Benchmark("MMB-CN", "mmbench_cn_dev", "gpt_eval_score", percent=True, judge="extraction"),
    Benchmark("MM-Vet", "mmvet", "gpt_eval_score", percent=True, judge="always"),
    Benchmark("MM-Vet-v2", "mmvetv2", "gpt_eval_score", percent=True, judge="always"),
    Benchmark("MMMU", "mmmu_val", "mmmu_acc"),
    Benchmark("MMMU-Pro", "mmmu_pro", "mmmu_acc", subtasks=("mmmu_pro_standard", "mmmu_pro_vision"), strata="task"),
    Benchmark("MMStar", "mmstar", "average", strata="l2_category"),
    Benchmark("BLINK", "blink", "blink_acc", subtasks=tuple(f"blink_{name}" for name in _BLINK)),
    Benchmark("SEED", "seedbench", "seed_image", images_only=True),
    Benchmark("SEED2+", "seedbench_2_plus", "seedbench_2_plus_all"),
    Benchmark("RealWorldQA", "realworldqa", "exact_match"),
)

PAPER_SOURCE = "arXiv 2510.19307, Tables 1 and 2"
PAPER_MEANS: dict[str, tuple[float, float, float]] = {
    "Qwen2.5-VL-7B": (69.35, 71.11, 76.22),
    "Qwen2.5-VL-3B": (64.05, 66.40, 72.30),
    "InternVL3-8B": (71.36, 73.11, 76.26),
    "InternVL3-2B": (62.61, 64.52, 68.31),
    "InternVL3-1B": (55.72, 57.23, 61.97),
}
"""Means over the fourteen, recomputed from the paper's tables: as released, after Dr.GRPO, and after RIL with both
teachers."""
PAPER_SCORES: dict[str, dict[str, tuple[float | None, float, float]]] = {
    "Qwen2.5-VL-7B": {
        "ChartQA": (87.3, 90.0, 95.6),
        "MathVista": (67.8, 69.5, 79.7),
        "MMB": (None, 84.3, 86.3),  # its ablation without and with a discriminator
        "MMMU": (55.0, 57.2, 65.7),
        "BLINK": (56.4, 60.7, 70.0),
        "MM-Vet": (71.8, 73.5, 80.4),
        "RealWorldQA": (68.5, 70.3, 72.8),
    }
}
"""Scores of single benchmarks, in the order of ``PAPER_MEANS``. There is no record of the others here, and the
table says so."""
PAPER_METHODS = ("base", "Dr.GRPO", "RIL, both teachers")


def suite(name: str) -> tuple[Benchmark, ...]:
    """Return the benchmarks of ``--suite paper`` (all) or ``--suite offline`` (those that need no judge).

    Raises:
        RecipeError: For another name.
    """
    if name not in SUITES:
        hint = f" Did you mean {near}?" if (near := nearest(name, SUITES)) else ""
        raise RecipeError(f"--suite: expected one of {', '.join(SUITES)}, got {name!r}.{hint}")
    return PAPER if name == "paper" else tuple(b for b in PAPER if b.judge != "always")


def named(task: str) -> Benchmark | None:
    """Return the benchmark with this lmms-eval name, or None for a task outside the fourteen."""
    return next((b for b in PAPER if b.task == task), None)
