"""The weights that are sent from GPU to GPU are those that a checkpoint holds, under the same names."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from openril.models.adapters import add_adapters
from openril.models.loading import load_student
from openril.models.packing import Policy
from openril.recipe.schema import LoraConfig, StudentConfig
from openril.sampling.weight_sync import folder_tensors
from openril.training.checkpoint import Checkpoints, Saver
from support.loop import tiny_recipe


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("which", ["tiny_qwen", "tiny_internvl", "tied"])
def test_tensors_equal_the_files_of_a_checkpoint(which, lora, tmp_path, request):
    checkpoint = request.getfixturevalue("tiny_qwen" if which == "tied" else which)
    model, processor = load_student(StudentConfig(), str(checkpoint))
    if which == "tied":
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    if lora:
        model = add_adapters(model, LoraConfig(r=2))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    saver = Saver(
        Checkpoints(tmp_path / "checkpoints", 1),
        Accelerator(cpu=True),
        tiny_recipe(tmp_path, checkpoint, train__precision="bfloat16"),
        policy=Policy(model),
        processor=processor,
    )
    saver.write_student(tmp_path / "student", torch.bfloat16)
    written = dict(folder_tensors(tmp_path / "student"))
    sent = dict(saver.student_tensors(torch.bfloat16))
    assert sorted(sent) == sorted(written)
    assert all(torch.equal(sent[name].cpu(), written[name]) for name in written)
    assert any(name.endswith("lm_head.weight") for name in sent) == (which != "tied")
    assert not any("lora" in name for name in sent)
