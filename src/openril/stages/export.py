"""`ril export`: write a student in the format of another runtime, and check that it still answers the same there."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openril.checkpoint_files import missing_fix
from openril.export.request import FORMATS, RECORD, ExportError, ExportRequest, format_module
from openril.report.progress import say

if TYPE_CHECKING:
    from rich.console import Console

    from openril.recipe.schema import Recipe

EPILOG = """\
The check compares the export with the checkpoint on data.validation of the recipe. Without --recipe this is the recipe
that the run saved next to its checkpoint. Settings of a recipe can be given as well, for instance
--data.validation questions.jsonl.

  ril export runs/mine/student --to gguf --type f16 q8_0 q4_0
  ril export --check runs/mine/export/gguf
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    p = argparse.ArgumentParser(
        "ril export",
        description="Write a checkpoint in the format of another runtime, and check that it answers the same there.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", default="", help="the folder of the student")
    add("--to", metavar="FORMAT", default="", help=f"the format: {', '.join(FORMATS)}")
    add("--type", metavar="TYPE", nargs="+", default=[], help="types of the weights; default: the format's first")
    add("--out", metavar="FOLDER", default="", help="where to write; default: export/FORMAT next to the checkpoint")
    add("--recipe", metavar="RECIPE", default="", help="the recipe with the questions of the check")
    add("--questions", metavar="N", type=_positive, default=100, help="questions of the check; default: 100")
    add("--max-kl", metavar="X", type=float, help="the largest mean KL of types without a limit of ours, such as q4_0")
    add("--resize-images", action="store_true", help="send pictures in the sizes of the model's own grid")
    add("--threads", metavar="N", type=_positive, default=0, help="CPU threads of the runtime; default: the cores here")
    add("--python", metavar="PATH", default="", help="the interpreter with the format's tools, where it needs one")
    add("--no-check", action="store_true", help="only write the files")
    add(
        "--check", metavar="FOLDER", default="", help="check an export that was written earlier, and write nothing else"
    )
    return p


def run_export(arguments: Sequence[str], console: Console) -> int:
    """Export or check as the flags say. Returns 0, or 1 if the export does not answer like the checkpoint."""
    own, settings = split_arguments(arguments)
    flags = parser().parse_args(own)
    request = _check_request(flags, settings) if flags.check else _export_request(flags, settings)
    request = ExportRequest(**{**vars(request), "say": partial(say, console)})
    module = format_module(request.to)
    return 0 if (module.check if flags.check else module.export)(request) else 1


def run_recipe(recipe: Recipe, console: Console) -> None:
    """Export the trained student as the recipe's ``export`` says, the last stage of ``ril run``.

    Raises:
        ExportError: It cannot be exported, or the export does not answer like the student.
    """
    e = recipe.export
    module = format_module(e.to)
    request = ExportRequest(
        e.to,
        str(recipe.run_path / "student"),
        Path(e.out).expanduser() if e.out else recipe.run_path / "export" / e.to,
        tuple(dict.fromkeys(e.type or module.TYPES[:1])),
        recipe,
        str(recipe.run_path / "recipe.yaml"),
        check=e.check,
        say=partial(say, console),
        questions=e.questions,
        max_kl=e.max_kl or None,
        resize=e.resize_images,
        threads=e.threads or len(os.sched_getaffinity(0)),
        python=e.python,
    )
    if not module.export(request):
        raise ExportError(
            f"export.to: expected {request.out} to answer like the student, got other answers ({RECORD} has the figures)."
            " Choose another export.type, or set export.check to false."
        )


def _export_request(flags: argparse.Namespace, settings: list[str]) -> ExportRequest:
    if not flags.checkpoint:
        raise ExportError("CHECKPOINT: expected a folder, got nothing. Write: ril export CHECKPOINT --to gguf")
    if not flags.to:
        raise ExportError(f"--to: expected {' or '.join(FORMATS)}, got nothing.")
    known = format_module(flags.to).TYPES
    types = tuple(dict.fromkeys(flags.type or known[:1]))
    if unknown := [t for t in types if t not in known]:
        raise ExportError(f"--type: expected {', '.join(known)}, got {unknown[0]!r}.")
    if not Path(flags.checkpoint).expanduser().is_dir():
        raise ExportError(f"CHECKPOINT: expected a folder, got {flags.checkpoint!r}. {missing_fix(flags.checkpoint)}.")
    recipe, path = find_recipe(flags.recipe, flags.checkpoint, settings, check=not flags.no_check)
    out = Path(flags.out or Path(flags.checkpoint).expanduser().resolve().parent / "export" / flags.to).expanduser()
    return ExportRequest(
        flags.to, flags.checkpoint, out, types, recipe, path, not flags.no_check, **_check_settings(flags)
    )


def _check_request(flags: argparse.Namespace, settings: list[str]) -> ExportRequest:
    """Read what to check from the record in the export's folder."""
    given = [name for name in ("checkpoint", "to", "type", "out", "no_check", "resize_images") if getattr(flags, name)]
    if given:
        raise ExportError(f"--check: got {given[0]} too, which the export's own {RECORD} names. Leave it out.")
    folder = Path(flags.check).expanduser()
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        to, checkpoint, types = record["to"], record["checkpoint"], tuple(record["types"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ExportError(f"--check: expected a folder that ril export wrote, got {folder} ({e!r}).") from e
    recipe, path = find_recipe(flags.recipe or record.get("recipe", ""), checkpoint, settings)
    return ExportRequest(to, checkpoint, folder, types, recipe, path, **_check_settings(flags))


def _check_settings(flags: argparse.Namespace) -> dict[str, Any]:
    threads = flags.threads or len(os.sched_getaffinity(0))
    return {
        "questions": flags.questions,
        "max_kl": flags.max_kl,
        "threads": threads,
        "resize": flags.resize_images,
        "python": flags.python,
    }


def find_recipe(given: str, checkpoint: str, settings: list[str], *, check: bool = True) -> tuple[Recipe, str]:
    """Return the recipe with the questions of the check, and its path.

    Args:
        given: The path of a recipe, or "" for the one that the run saved in a folder above the checkpoint.
        settings: Overrides of the command line.
        check: Whether questions are needed.

    Raises:
        ExportError: There are no questions.
    """
    from openril.recipe.loading import load_recipe, load_saved_recipe
    from openril.recipe.overrides import override
    from openril.recipe.schema import Recipe

    above = Path(checkpoint).expanduser().resolve().parents
    saved = next((p for folder in list(above)[:4] if (p := folder / "recipe.yaml").is_file()), None)
    if given:
        recipe, path = load_recipe(given, settings), given
    else:
        recipe, path = (load_saved_recipe(saved), str(saved)) if saved else (Recipe(), "")
        recipe = override(recipe, settings, "ril export") if settings else recipe
    if check and not recipe.data.validation:
        where = f"{path} names none" if path else f"no recipe.yaml was found above {checkpoint}"
        raise ExportError(
            f"data.validation: expected the questions of the check, got none ({where}). Give --recipe RECIPE or"
            " --data.validation FILE, or skip the check with --no-check."
        )
    return recipe, path


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the command's own arguments from settings of the recipe, each with the values up to the next flag."""
    known = parser()._option_string_actions
    own: list[str] = []
    settings: list[str] = []
    target = own
    for argument in arguments:
        if argument.startswith("-"):
            target = own if argument.partition("=")[0] in known else settings
        target.append(argument)
    return own, settings


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value
