"""vLLM's own model of InternVL's original layout answers like the checkpoint that was exported to it."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from openril.export import internvl_original
from openril.export.fidelity import answer_logprobs
from openril.export.request import ExportRequest
from openril.models.loading import load_model, load_processor
from openril.models.prompts import PromptEncoder

pytestmark = pytest.mark.vllm

CONFIGURATION = """
from transformers import PretrainedConfig, Qwen2Config

class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"

class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **others):
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**others)

    def get_text_config(self, *arguments, **others):
        return self.llm_config
"""
"""Classes in place of those on the hub, which ``auto_map`` of an export names. vLLM takes only the values from them."""


@pytest.mark.usefixtures("_servers")  # those of the next tests start in the meantime
def test_vllm_reads_the_original_layout(make_server: Any, internvl_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(str(internvl_checkpoint))
    with torch.no_grad():  # a fresh model's biases and positions are 0, which would hide mistakes
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)), alpha=0.2)
    checkpoint, out = tmp_path / "model", tmp_path / "out"
    processor = load_processor(str(internvl_checkpoint))
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    internvl_original.export(ExportRequest("internvl-original", str(checkpoint), out, ("stored",), check=False))
    (out / "configuration_internvl_chat.py").write_text(CONFIGURATION)
    saved = json.loads((out / "config.json").read_text())
    saved["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (out / "config.json").write_text(json.dumps(saved))

    image = Image.effect_mandelbrot((130, 60), (-2, -1, 1, 1), 40).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    prompt = PromptEncoder(processor, model).encode([{"role": "user", "content": content}], [image])
    assert len(prompt.vision["pixel_values"]) > 2, "several tiles and a thumbnail"
    png = io.BytesIO()
    image.save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    sent = [{"type": "image_url", "image_url": {"url": url}}, content[1]]
    with make_server(out, tmp_path / "log", name="student", options=("--trust-remote-code",)) as server:
        body = {"model": "student", "messages": [{"role": "user", "content": sent}], "max_tokens": 6, "temperature": 0}
        body |= {"logprobs": True, "return_token_ids": True, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/chat/completions", json=body, timeout=120).raise_for_status().json()
    choice = answer["choices"][0]
    assert answer["usage"]["prompt_tokens"] == prompt.length
    found = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
    ids = choice["token_ids"]
    expected = answer_logprobs(model, prompt, ids)[range(len(ids)), ids]
    torch.testing.assert_close(found, expected, atol=5e-2, rtol=0)  # exchanged projections of one layer give 0.5
