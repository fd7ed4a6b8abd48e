"""Which model a response came from: its name and revision, or for a local checkpoint a fingerprint of the weights."""

from __future__ import annotations

from pathlib import Path

from openril.errors import ModelError
from openril.recipe.schema import Recipe, TeacherConfig
from openril.storage import weights_fingerprint


def model_identity(recipe: Recipe, teacher: TeacherConfig | None) -> tuple[str, str | None]:
    """(model, revision) of a teacher, or of the student for None.

    Raises ModelError when the student's checkpoint has yet to be made.
    """
    if teacher is not None:
        if not teacher.model_path:
            return teacher.model, teacher.revision
        return teacher.model_path, weights_fingerprint(Path(teacher.model_path)) or teacher.revision
    student = recipe.collected_student
    if recipe.sft.enabled and recipe.sft.targets == "answers" and not Path(student).is_dir():
        raise ModelError(f"{student}: the SFT student is not there yet; run `ril sft` first, or set sft.enabled: false")
    return student, weights_fingerprint(Path(student)) or recipe.student.revision
