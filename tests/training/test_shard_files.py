"""Checkpoint files of sharded runs: the same contents as those of whole models, and readable by any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from openril.errors import StateError
from openril.models.loading import load_model
from openril.recipe.schema import OptimizerConfig
from openril.training.optimization import build_optimizer
from openril.training.shard_files import load_optimizer
from support.launch import launch


@pytest.fixture(scope="module")
def written(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, which compared their states and swaps themselves."""
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).with_name("two_sharded.py")
    done = launch(2, script, tiny_qwen, tied(tiny_qwen, folder / "tied_model"), folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def tied(checkpoint: Path, folder: Path) -> Path:
    from openril.hf import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(checkpoint)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["full", "bfloat16", "lora"])
def test_a_sharded_model_is_written_like_a_whole_one(kind: str, written: Path):
    whole, stream = written / f"{kind}_whole", written / f"{kind}_stream"
    files = [load_file(path) for path in stream.glob("*.safetensors")]
    values = {key: value for file in files for key, value in file.items()}
    expected = load_file(whole / "model.safetensors")
    assert len(files) > 2 and sum(map(len, files)) == len(expected)  # each tensor once
    assert ("lm_head.weight" in values) == (kind != "bfloat16")  # that one is tied
    assert all(torch.equal(value, values[key]) and value.dtype == values[key].dtype for key, value in expected.items())
    for path in whole.glob("*.json"):
        assert json.loads(path.read_text()) == json.loads((stream / path.name).read_text())
    read, other = (load_model(str(folder)).state_dict() for folder in (whole, stream))
    assert all(torch.equal(value, other[key]) for key, value in read.items())


def test_each_part_holds_the_rows_of_its_process(written: Path):
    whole = load_file(written / "optimizer_full_one.safetensors")
    parts = [written / f"optimizer_full_two-0000{n}-of-00002.safetensors" for n in (1, 2)]
    contents = [load_file(part) for part in parts]
    with safe_open(parts[1], framework="pt") as f:
        first_rows = json.loads(f.metadata()["first_rows"])
    moments = [key for key, value in whole.items() if value.dim()]
    assert len(moments) > 20 and contents[1].keys() == set(moments)  # the steps are in the first part alone
    for key in moments:
        assert torch.equal(torch.cat([c[key] for c in contents]), whole[key]), key
        assert first_rows[key] == len(contents[0][key]) == (len(whole[key]) + 1) // 2


def test_missing_parts_and_other_shapes_are_refused(written: Path, tmp_path: Path):
    def optimizer(rows: int) -> torch.optim.Optimizer:
        return build_optimizer([nn.Parameter(torch.zeros(rows, 2))], OptimizerConfig())

    for number in (1, 2):
        name = f"optimizer_full_two-0000{number}-of-00002.safetensors"
        (tmp_path / name).write_bytes((written / name).read_bytes())
    with pytest.raises(StateError, match=r"optimizer_full_two.*other trainable parameters"):
        load_optimizer(tmp_path, "full_two", optimizer(3))
    (tmp_path / name).unlink()
    with pytest.raises(StateError, match=r"expected 2 files.*full_two.*got 1"):
        load_optimizer(tmp_path, "full_two", optimizer(3))
    with pytest.raises(StateError, match=r"absent.*got 0"):
        load_optimizer(tmp_path, "absent", optimizer(3))


def test_a_file_of_an_earlier_version_is_read_and_its_shapes_are_checked(tmp_path: Path):
    from safetensors.torch import save_file

    values = {
        "0.step": torch.tensor(7.0),
        "0.exp_avg": torch.arange(6.0).view(3, 2),
        "0.exp_avg_sq": torch.arange(6.0).view(3, 2) + 1,
    }
    group = {"lr": 0.5, "betas": [0.9, 0.999], "weight_decay": 0.0, "params": [0]}
    save_file(values, tmp_path / "optimiser_student.safetensors", metadata={"param_groups": json.dumps([group])})
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = build_optimizer([parameter], OptimizerConfig())
    load_optimizer(tmp_path, "student", optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    for key, value in values.items():
        assert torch.equal(optimizer.state[parameter][key.removeprefix("0.")], value)
    other = build_optimizer([nn.Parameter(torch.zeros(4, 2))], OptimizerConfig())
    with pytest.raises(StateError, match=r"0\.exp_avg.*\(4, 2\).*\(3, 2\)"):
        load_optimizer(tmp_path, "student", other)
