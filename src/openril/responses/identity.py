"""Which model a response came from: its name and revision, or for a local checkpoint a fingerprint of the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from openril.errors import ModelError
from openril.recipe.schema import Recipe, Teacher

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
CHUNK, CHUNKS = 1 << 20, 64


def model_identity(recipe: Recipe, teacher: Teacher | None) -> tuple[str, str | None]:
    """(model, revision) of a teacher, or of the student for None.

    Raises ModelError when the student's checkpoint has yet to be made.
    """
    if teacher is not None:
        if not teacher.model_path:
            return teacher.model, teacher.revision
        return teacher.model_path, weights_fingerprint(Path(teacher.model_path)) or teacher.revision
    student = recipe.collected_student
    if recipe.sft.enabled and recipe.sft.on == "answers" and not Path(student).is_dir():
        raise ModelError(f"{student}: the SFT student is not there yet; run `ril sft` first, or set sft.enabled: false")
    return student, weights_fingerprint(Path(student)) or recipe.student.revision


def weights_fingerprint(folder: Path) -> str | None:
    """ "weights:" and a hash of the folder's weight files; None where there are none (a hub name).

    Files of up to 64 MiB enter whole, larger ones by 64 pieces of 1 MiB spread evenly, so that a 72B checkpoint takes
    seconds and training still changes it.
    """
    if not folder.is_dir():
        return None
    paths = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as f:
            for i in range(CHUNKS):
                if size > CHUNK * CHUNKS:
                    f.seek(i * (size - CHUNK) // (CHUNKS - 1))
                digest.update(f.read(CHUNK))
    return f"weights:{digest.hexdigest()[:32]}" if paths else None
