"""Which questions each stage works on: all of data.train, or those that `ril select` has chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openril.data.reading import read_questions
from openril.errors import DataError
from openril.recipe.checks import filters_overlong
from openril.recipe.schema import Recipe
from openril.records import STUDENT, Question
from openril.storage import iterate_jsonl

if TYPE_CHECKING:
    from accelerate import Accelerator


def selection_folder(recipe: Recipe) -> Path:
    return recipe.run_path / "selection"


def selection_file(recipe: Recipe) -> Path:
    """Return the JSONL file with the ids of the chosen questions and the reasons why others were left out."""
    return selection_folder(recipe) / "selection.jsonl"


def provisional_file(recipe: Recipe) -> Path:
    """Return the JSONL file of the questions that the student answers before the overlong filter chooses among them."""
    return selection_folder(recipe) / "provisional.jsonl"


def chosen_of(path: Path, questions: Sequence[Question]) -> list[Question]:
    """Return the questions that a file of ``data.selection.write_selection`` selects."""
    chosen = {row["id"] for row in iterate_jsonl(path) if row["selected"]}
    return [q for q in questions if q.id in chosen]


def selected_questions(recipe: Recipe, source: str = "") -> list[Question]:
    """Return the questions of the loop, or those that a source of responses is asked.

    With ``data.selection`` they are the chosen ones; for the student, whose responses the overlong filter needs, the
    provisional ones. Without it they are all of data.train.

    Raises:
        DataError: Naming the command to run first, if they have not been chosen yet.
    """
    if not recipe.data.selection.enabled:
        return read_questions(recipe.data, "train")
    provisional = source == STUDENT and filters_overlong(recipe)
    path = provisional_file(recipe) if provisional else selection_file(recipe)
    if not path.exists():
        part = "`ril collect` for the student's responses, then `ril select`"
        first = part if provisional_file(recipe).exists() else "`ril select`"
        raise DataError(f"data.selection is enabled, but {path} does not exist. Run {first} first.")
    return chosen_of(path, read_questions(recipe.data, "train"))


def training_questions(
    recipe: Recipe,
    stage: str = "train",
    accelerator: Accelerator | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Question]:
    """Return the questions of the loop that fit ``data.max_prompt_length``. The discriminator is pre-trained on them too.

    Args:
        stage: The stage under which questions that do not fit are listed.
        accelerator: Of the processes that share the counting of tokens.

    Raises:
        DataError: If they are too few for a step of the loop, or have not been chosen yet.
    """
    from openril.models.prompt_lengths import fitting_questions

    shared: dict[str, Any] = {}
    if accelerator is not None:
        from accelerate.utils import gather_object

        shared = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
        shared["gather"] = gather_object
    questions = fitting_questions(recipe, selected_questions(recipe), stage, warn, **shared)
    if len(questions) < recipe.train.questions_per_step:
        raise DataError(
            f"train.questions_per_step: expected at most the number of questions, {len(questions)}, got "
            f"{recipe.train.questions_per_step}. Lower it or add questions."
        )
    return questions
