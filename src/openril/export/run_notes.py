"""RUN.md: how to run an export so that it answers as it was checked."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from openril.export import image_sizes
from openril.export.fidelity import markdown_table
from openril.models.prompts import PromptEncoder


def run_notes(record: dict[str, Any], encoder: PromptEncoder, folder: Path) -> str:
    """Return the text of RUN.md. record: what ``export.json`` holds."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QUESTION"}]}]
    if encoder.system_prompt:
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": encoder.system_prompt}]})
    prompt = encoder.render(chat)
    model = next((f"model-{kind}.gguf" for kind in record["types"]), "model-f16.gguf")
    limits = record["image_token_limits"]
    flags = f" --image-min-tokens {limits[0]} --image-max-tokens {limits[1]}" if limits else ""
    parts = [
        f"# {record['model_type']} for llama.cpp\n",
        f"Made by `ril export` of OpenRIL {record['openril']} from `{record['checkpoint']}`. `export.json` has every"
        " figure of this page.\n",
    ]
    if types := record.get("check"):
        parts += ["## Check\n", markdown_table(types)]
        parts += [f"- `{t['type']}` failed: {t['why']}." for t in types if not t["passed"]]
    else:
        parts.append("**Not checked.** Run `ril export --check` on this folder before you use it.\n")
    parts += [
        "## llama.cpp\n",
        "```",
        f"llama-server -m {model} --mmproj mmproj-f16.gguf -c 4096 --jinja{flags}",
        "```\n",
    ]
    if limits:
        parts.append(
            f"An image has {limits[0]} to {limits[1]} tokens. No GGUF file of this family holds these limits; without the"
            " two options the runtime uses 8 and 4096, and the model answers about images it was never trained on.\n"
        )
    parts += [
        "The exact prompt of one image, with its newlines (`/completion`, and `mtmd-cli` with `-p`):\n",
        "```json",
        _json({"prompt_string": prompt, "image": "base64 of the picture, in the place of the image token"}),
        "```\n",
    ]
    if found := record.get("chat_endpoint"):
        same = found["expected"] == found["prompt_tokens"]
        parts.append(
            f"`/v1/chat/completions` {'gives' if same else '**does not give**'} the same prompt:"
            f" {found['prompt_tokens']} tokens, expected {found['expected']}."
            + ("" if same else " Use `/completion` with the exact prompt.")
            + "\n"
        )
    if positions := record.get("positions"):
        measured = f"measured with xllamacpp {positions['runtime']}" if positions["runtime"] else "not measured"
        parts.append(
            f"The table of positions has the {positions['order']} ({measured}). Another runtime needs a check.\n"
        )
    if record["resize_images"]:
        parts += [
            "## Pictures\n",
            "**Resize every picture (bicubic) before it is sent.** The runtime resizes in another way than the model was"
            " trained with. The check has sent resized pictures.\n",
            "```python",
            inspect.getsource(image_sizes).strip(),
            "```\n",
        ]
    parts += [
        "## Smaller types\n",
        "K-quants are made by llama.cpp's own tool, and checked like the others:\n",
        "```",
        "llama-quantize model-f16.gguf model-q4_k_m.gguf Q4_K_M",
        f"ril export --check {folder}",
        "```\n",
        "## Ollama and LM Studio\n",
        "Neither was run by OpenRIL."
        + (" Neither has options for the image token limits above, so resize pictures to at most"
           f" {limits[1]} tokens yourself." if limits else "")
        + " Both use the chat template of the file.\n",
        "```",
        "# Modelfile; then: ollama create student -f Modelfile",
        f"FROM ./{model}",
        "FROM ./mmproj-f16.gguf",
        "PARAMETER temperature 0",
        "```\n",
        f"LM Studio: copy `{model}` and `mmproj-f16.gguf` into one folder, `models/openril/student/`.\n",
    ]  # fmt: skip
    return "\n".join(parts)


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=2)
