"""The ``ril`` command. Heavy imports happen inside the stages, so that help and error messages appear at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openril._version import __version__
from openril.errors import OpenRILError
from openril.recipe.schema import Recipe

OK, PROBLEM, USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """One command of ``ril``.

    Args:
        stage: A module of ``openril.stages``.
        run: Its function (recipe, console, **options). An int that it returns becomes the exit code.
        options: The flags of this command only, as (name, its values in the help or "", help).
        takes_recipe: False for a command that parses its own arguments; its function gets them instead of a recipe.
    """

    help: str
    stage: str
    run: str
    options: tuple[tuple[str, str, str], ...] = ()
    takes_recipe: bool = True


COMMANDS: dict[str, Command] = {
    "check": Command(
        "check questions, models, servers, memory and disk before a run costs anything",
        "check",
        "run_check",
        (("device_memory", "GIB", "memory of the planned devices, instead of that of this machine's device"),),
    ),
    "sft": Command(
        "fine-tune the student on answers or cached responses (the supervised warm start)", "sft", "run_sft"
    ),
    "collect": Command(
        "collect the responses of the teachers and the student into the response cache",
        "collect",
        "run_collect",
        (
            ("sources", "NAME ...", "collect only these: names of teachers, or student"),
            ("recollect", "", "first drop cached responses of another model, other settings or older questions"),
        ),
    ),
    "select": Command("choose the questions for the loop (data.selection)", "select", "run_select"),
    "discriminator": Command("pre-train the discriminator on the response cache", "discriminator", "run_discriminator"),
    "train": Command("run the RIL loop", "train", "run_train"),
    "eval": Command(
        "score the student's checkpoints on held-out questions",
        "eval",
        "run_eval",
        (
            ("checkpoints", "NAME ...", "score only these checkpoint folders or hub names"),
            ("suite", "NAME", "run the paper's fourteen benchmarks (paper), or those that need no judge (offline)"),
            ("tasks", "NAME ...", "run these tasks of lmms-eval"),
            (
                "check",
                "",
                "with --suite: only say which data are here, whether the judge answers, and how long it takes",
            ),
            ("download", "", "with --suite: allow the download of data sets"),
            ("beside", "paper", "with --suite: show the paper's rows in the table"),
            ("import_", "vlmevalkit FOLDER", "with --suite: show VLMEvalKit's scores in the table"),
        ),
    ),
    "export": Command(
        "write a checkpoint for another runtime, and check that it answers the same there (no recipe needed)",
        "export",
        "run_export",
        takes_recipe=False,
    ),
    "run": Command("run all stages that are not done yet, in order", "run", "run_all"),
    "report": Command(
        "write one page that shows a run: curves, groups, discriminator, judge (RUN_DIR ..., no recipe)",
        "report",
        "run_report",
        takes_recipe=False,
    ),
    "view": Command(
        "show all groups of runs in the browser, also while they train (no recipe)",
        "view",
        "run_view",
        takes_recipe=False,
    ),
    "bench": Command(
        "measure the speed and memory of a step next to TRL's GRPOTrainer (no recipe)",
        "bench",
        "run_bench",
        takes_recipe=False,
    ),
}

USAGE_TEXT = """\
usage: ril COMMAND RECIPE [--section.key value ...]

  ril check recipes/mine.yaml
  ril run recipes/mine.yaml --train.beta 0.02

commands:
{commands}

  ril COMMAND --help    show every setting with its default and meaning
  ril --version         show the version

A command that was interrupted or killed continues where it stopped when you run it again.
Exit codes: 0 done, 1 failed, 2 a mistake that you can fix (the message says how), 130 interrupted and saved.
"""


def usage() -> str:
    width = max(map(len, COMMANDS))
    return USAGE_TEXT.format(commands="\n".join(f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return OK if arguments else USAGE
    if arguments[0] in ("--version", "-V"):
        print(f"openril {__version__}")
        return OK
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `ril {near[0]}`?" if near else ""
        print(f"ril: expected a command, got {name!r}.{hint}\n\n{usage()}", file=sys.stderr, end="")
        return USAGE
    if not COMMANDS[name].takes_recipe:
        return _run(COMMANDS[name], rest, {})
    try:
        rest, options = _options(COMMANDS[name], rest)
        recipe = _recipe(name, rest)
    except OpenRILError as e:
        return _complain(str(e))
    except SystemExit as e:  # the override parser prints its own help and messages
        return int(e.code or 0)
    return _run(COMMANDS[name], recipe, options)


def _options(command: Command, rest: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Separate the command's own flags from the other arguments. A flag with values takes all up to the next flag."""
    known = {f"--{name.rstrip('_').replace('_', '-')}": (name, takes) for name, takes, _ in command.options}
    left: list[str] = []
    options: dict[str, Any] = {}
    i = 0
    while i < len(rest):
        argument = rest[i]
        i += 1
        if argument not in known:
            left.append(argument)
            continue
        name, takes = known[argument]
        options[name] = True
        if takes:
            options[name] = []
            while i < len(rest) and not rest[i].startswith("--"):
                options[name].append(rest[i])
                i += 1
            if not options[name]:
                raise OpenRILError(f"{argument}: expected at least one value, got none")
    return left, options


def _recipe(name: str, rest: list[str]) -> Recipe:
    from openril.errors import RecipeError
    from openril.recipe.loading import load_recipe
    from openril.recipe.overrides import override

    if rest and rest[0] in ("-h", "--help"):
        print(f"ril {name}: {COMMANDS[name].help}\n")
        for flag, takes, text in COMMANDS[name].options:
            print(f"  --{flag.rstrip('_').replace('_', '-') + ' ' + takes:<24}{text}")
        override(Recipe(), ["--help"], f"ril {name} RECIPE")
        raise SystemExit(OK)
    if not rest or rest[0].startswith("-"):
        usage = f"ril {name} RECIPE.yaml [--section.key value ...]"
        raise RecipeError(f"expected a recipe file, got {repr(rest[0]) if rest else 'nothing'}. Write: {usage}")
    return load_recipe(rest[0], rest[1:], prog=f"ril {name} {rest[0]}")


def _run(command: Command, recipe: Recipe | list[str], options: dict[str, Any]) -> int:
    import importlib

    # The libraries' own progress bars would break ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from rich.console import Console

    console = Console()
    if "LOCAL_RANK" in os.environ:  # under a launcher: each process takes its own device before anything is loaded
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    function: Callable[..., object] = getattr(importlib.import_module(f"openril.stages.{command.stage}"), command.run)
    try:
        code = function(recipe, console, **options)
    except OpenRILError as e:
        return _complain(str(e))
    except SystemExit as e:  # a command's own parser prints its help and messages
        return int(e.code or 0)
    except KeyboardInterrupt as e:
        print(f"ril: {str(e) or 'interrupted; run the same command again to continue'}", file=sys.stderr)
        return INTERRUPTED
    finally:
        if "openril.training.distributed" in sys.modules:
            sys.modules["openril.training.distributed"].leave_process_group()
    return code if isinstance(code, int) and not isinstance(code, bool) else OK


def _complain(message: str) -> int:
    print(f"ril: {message}", file=sys.stderr)
    return USAGE


def entry() -> None:
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `ril train --help | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    sys.exit(code)


if __name__ == "__main__":
    entry()
