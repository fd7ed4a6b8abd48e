"""`--to internvl-original`: InternVL in the layout of its authors, which LMDeploy, OpenVINO and MLX read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor

from openril.checkpoint_files import weight_files
from openril.export.fidelity import Original, answer_logprobs
from openril.export.folder import is_written, only_type, written
from openril.export.internvl_layout import CONTEXT, IMAGE, MODEL_TYPE, convert, original_config, place, write_tokenizer
from openril.export.original import conclude, load_original
from openril.export.request import ExportError, ExportRequest
from openril.export.weights import stored_weights, write_weights
from openril.hf import PreTrainedTokenizerFast, transformers
from openril.models.loading import load_config, load_model, load_processor
from openril.records import Question
from openril.storage import write_text

LIMITS = {"stored": 1e-6, "bfloat16": 1e-2, "float16": 1e-4}
"""Type -> the largest mean KL that passes, in nats."""
TYPES = tuple(LIMITS)

RUN = """# InternVL in its original layout

This folder holds `InternVLChatModel` weights under the names of OpenGVLab/InternVL3. The model's Python code is not in
it: `auto_map` in config.json names the repository on the Hugging Face hub that has it, so `trust_remote_code` fetches
it from there.

- vLLM: `vllm serve {name} --trust-remote-code`
- Tiles: {low} to {high} of {side} x {side} pixels for each image, and a thumbnail if there are several.
- Prompt: the chat template of tokenizer_config.json. It writes `<image>` and a newline for an image.
- System message: {system}. The method `chat` of the original code, and LMDeploy with its built-in template
  `internvl2_5`, put a system message of their own first unless you pass another one.
"""


def export(request: ExportRequest) -> bool:
    """Write the weights, configuration and tokenizer, and load them back."""
    only_type(request, TYPES)
    config = load_config(request.checkpoint, what="CHECKPOINT")
    if config.model_type != "internvl":
        raise ExportError(f"CHECKPOINT: expected an InternVL (model_type internvl), got {config.model_type}.")
    if is_written(request):
        request.say(f"{request.out} holds this export already")
    else:
        _write(request, config)
    return check(request) if request.check else True


def _write(request: ExportRequest, config: Any) -> None:
    processor = load_processor(request.checkpoint, what="CHECKPOINT")
    dtype = None if request.types[0] == "stored" else getattr(torch, request.types[0])
    # Settings that cannot be expressed are refused before any weight is written.
    saved = original_config(config, processor, str(dtype or config.dtype or torch.float32).removeprefix("torch."))
    model: Any = load_model(request.checkpoint, what="CHECKPOINT", meta=True)
    system = request.recipe.student.system_prompt if request.recipe else ""
    with written(request, {}) as folder:
        write_tokenizer(processor, folder)
        model.generation_config.save_pretrained(folder)
        count = write_weights(convert(stored_weights(model)), folder, dtype)
        write_text(folder / "config.json", json.dumps(saved, indent=2, ensure_ascii=False) + "\n")
        run = RUN.format(
            name=request.out,
            low=saved["min_dynamic_patch"],
            high=saved["max_dynamic_patch"],
            side=saved["force_image_size"],
            system=json.dumps(system, ensure_ascii=False) if system else "none beyond that of the chat template",
        )
        write_text(folder / "RUN.md", run)
    request.say(f"wrote {count} weights to {request.out}")


def check(request: ExportRequest) -> bool:
    """Load the export back into the model of transformers, and compare prompts and distributions with the checkpoint's.

    The names are mapped back by the same table that wrote them. The project's tests compare with the original code.
    """
    original = load_original(request)
    twin = load_back(request.out, original.model.config)
    # AutoTokenizer would ask whether to run the code that config.json names.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(request.out)
    other, kls = 0, []
    for question in original.questions:
        prompt, ids = original.prompts[question.id], prompt_ids(original, question, tokenizer)
        other += ids != prompt.input_ids.tolist()
        answer = original.answers[question.id]["ids"]
        a, b = (answer_logprobs(m, prompt, answer) for m in (original.model, twin))
        kls += (a.exp() * (a - b)).sum(-1).tolist()
    return conclude(request, original, kls, LIMITS[request.types[0]], other_prompts=other)


def prompt_ids(original: Original, question: Question, tokenizer: Any) -> list[int]:
    """Return the ids of a prompt by the export's template and tokenizer, with as many tokens for each image as before."""
    processor = original.encoder.processor
    marks = "".join("x" if i == processor.image_token_id else " " for i in original.prompts[question.id].input_ids)
    text: Any = tokenizer.apply_chat_template(original.messages(question), tokenize=False, add_generation_prompt=True)
    first, *rest = text.split(IMAGE)
    images = [f"{processor.start_image_token}{CONTEXT * len(m)}{processor.end_image_token}" for m in marks.split()]
    filled = first + "".join(image + part for image, part in zip(images, rest, strict=True))
    return list(tokenizer(filled, add_special_tokens=False)["input_ids"])


def load_back(folder: Path, config: Any) -> Any:
    """Return the model of transformers with an export's weights and language configuration, in float32."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if saved.get("model_type") != MODEL_TYPE:
        raise ExportError(f"--check: expected model_type {MODEL_TYPE} in {folder}, got {saved.get('model_type')!r}.")
    text = type(config.text_config)(**saved["llm_config"])
    with init_empty_weights(include_buffers=False):
        model = transformers.InternVLForConditionalGeneration(
            type(config)(**{**config.to_dict(), "text_config": text.to_dict(), "tie_word_embeddings": False})
        )
    stored: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            stored |= {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
    places = {name: place(name) for name in model.state_dict()}
    if differing := {key for key, _ in places.values()} ^ set(stored):
        raise ExportError(
            f"--check: {folder} lacks, or has in excess, {len(differing)} weights: {sorted(differing)[:3]}."
        )
    state = {n: stored[key] if part is None else stored[key].chunk(3)[part] for n, (key, part) in places.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
