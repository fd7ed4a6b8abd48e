"""Module groups of real architectures, and adapters whose absence is the reference model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openril.errors import ModelError
from openril.models.adapters import add_adapters, without_adapters
from openril.models.freezing import freeze, module_group
from openril.models.loading import load_model, load_processor
from openril.models.packing import GroupTokens, Policy, pad_rows
from openril.models.prompts import PromptEncoder
from openril.models.saving import full_weights
from openril.recipe.schema import LoraConfig
from support.tiny import tiny_questions

GROUPS = [
    "vision_tower", "projector", "word_embeddings", "attention", "mlp_gate", "mlp_up", "mlp_down", "layer_norms", "lm_head",
]  # fmt: skip


def test_every_parameter_belongs_to_a_group(tiny_family: Path):
    model = load_model(str(tiny_family))
    found = {module_group(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    assert found == set(GROUPS)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision_tower"),
        ("model.visual.blocks.0.norm1.weight", "vision_tower"),
        ("model.visual.deepstack_merger_list.0.norm.weight", "projector"),
        ("model.visual.pos_embed.weight", "vision_tower"),
        ("model.multi_modal_projector.layer_norm.weight", "projector"),
        ("model.multi_modal_projector.mm_input_projection_weight", "projector"),
        ("model.image_newline", "projector"),
        ("model.connector.modality_projection.proj.weight", "projector"),
        ("model.vision_model.encoder.layers.0.layer_norm1.weight", "vision_tower"),
        ("model.text_model.layers.0.self_attn.o_proj.weight", "attention"),
        ("model.language_model.layers.0.pre_feedforward_layernorm.weight", "layer_norms"),
        ("model.vision_tower.encoder.layer.0.attention.q_proj.weight", "vision_tower"),
        ("model.language_model.layers.3.input_layernorm.weight", "layer_norms"),
        ("model.language_model.layers.3.self_attn.q_norm.weight", "layer_norms"),
        ("model.language_model.norm.weight", "layer_norms"),
        ("model.language_model.layers.3.mlp.down_proj.weight", "mlp_down"),
        ("base_model.model.lm_head.weight", "lm_head"),
    ],
)
def test_groups_by_name(name: str, group: str):
    assert module_group(name) == group


def test_only_the_named_groups_freeze(tiny_family: Path):
    model = load_model(str(tiny_family))
    trainable = freeze(model, ["vision_tower", "attention"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (module_group(name) not in ("vision_tower", "attention"))
    assert sum(trainable.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_freezing_everything_is_refused(tiny_student: Path):
    with pytest.raises(ModelError, match="nothing"):
        freeze(load_model(str(tiny_student)), GROUPS)  # type: ignore[arg-type]


def test_adapters_off_is_the_base_and_merging_is_exact(tiny_family: Path, tmp_path: Path):
    base = load_model(str(tiny_family))
    encoder = PromptEncoder(load_processor(str(tiny_family)), base)
    [question] = tiny_questions(tmp_path, 1)
    rows = pad_rows([GroupTokens(encoder(question), [torch.tensor([50, 51, 52])])], encoder.pad_token_id)
    with torch.no_grad():
        before = Policy(base)(rows)
        model = add_adapters(load_model(str(tiny_family)), LoraConfig(enabled=True, r=4))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            assert "lora_" not in name or module_group(name) in ("attention", "mlp_gate", "mlp_up", "mlp_down")
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted = Policy(model)(rows)
        with without_adapters(model):
            off = Policy(model)(rows)
        merged = load_model(str(tiny_family))
        left_out = merged.load_state_dict(dict(full_weights(model)), strict=False)
        after = Policy(merged)(rows)
    assert not left_out.unexpected_keys and set(left_out.missing_keys) <= {"lm_head.weight"}  # tied weights come once
    assert torch.equal(off, before)
    assert (adapted - before).abs().max() > 1e-3
    assert torch.allclose(after, adapted, atol=1e-5)


def test_unknown_target_modules_are_named(tiny_qwen: Path):
    with pytest.raises(ModelError, match="nonsense"):
        add_adapters(load_model(str(tiny_qwen)), LoraConfig(enabled=True, target_modules=["nonsense"]))
