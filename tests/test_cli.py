"""The command line: help is fast, messages say how to fix a mistake, and exit codes have a meaning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from openril import __version__
from openril.cli import COMMANDS, main


def test_no_arguments_show_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    out = capsys.readouterr().out
    for name in ("check", "sft", "collect", "discriminator", "train", "eval", "run"):
        assert f"  {name} " in out and name in COMMANDS
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_a_misspelt_command_is_guessed(capsys: pytest.CaptureFixture[str]):
    assert main(["trian", "r.yaml"]) == 2
    error = capsys.readouterr().err
    assert "'trian'" in error and "`ril train`" in error


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.takes_recipe])
def test_every_command_needs_a_recipe_and_explains_its_settings(name: str, capsys: pytest.CaptureFixture[str]):
    assert main([name]) == 2
    assert f"ril {name} RECIPE.yaml" in capsys.readouterr().err
    assert main([name, "--train.beta", "0.02"]) == 2
    assert "'--train.beta'" in capsys.readouterr().err
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--train.beta" in out and "k3" in out


def test_mistakes_in_a_recipe_name_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {bta: 0.1}\n")
    assert main(["train", str(recipe)]) == 2
    assert "train.bta" in (error := capsys.readouterr().err) and "beta" in error
    recipe.write_text("run_dir: x\n")
    assert main(["train", str(recipe), "--train.bta", "1"]) == 2
    assert "--train.beta" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert str(tmp_path / "none.yaml") in capsys.readouterr().err


def test_a_stage_that_lacks_what_comes_before_says_so(
    tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "r.yaml"
    (tmp_path / "q.jsonl").write_text('{"id": "1", "question": "Say red.", "answer": "red"}\n')
    recipe.write_text(
        f"run_dir: {tmp_path}/run\nstudent: {{model: {tiny_qwen}}}\nsft: {{enabled: false}}\n"
        f"data: {{train: [{tmp_path}/q.jsonl]}}\nteachers: [{{name: a, model_path: {tiny_qwen}}}]\n"
        "rewards: {answer: {kind: rules}}\ntrain: {questions_per_step: 1}\n"
    )
    assert main(["discriminator", str(recipe)]) == 2
    assert "ril collect" in capsys.readouterr().err
    assert main(["train", str(recipe)]) == 2
    assert "ril " in (error := capsys.readouterr().err) and "Traceback" not in error


def test_options_of_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"run_dir: {tmp_path}/run\n")
    assert main(["collect", str(recipe), "--sources"]) == 2
    assert "--sources" in capsys.readouterr().err
    assert main(["collect", str(recipe), "--sources", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from openril.cli import main; main(['train', '--help']); "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'trl', 'accelerate'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_heavy_and_exports_everything():
    code = (
        "import sys, openril; assert 'torch' not in sys.modules; "
        "[getattr(openril, name) for name in openril.__all__]; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_into_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m openril.cli train --help | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1
