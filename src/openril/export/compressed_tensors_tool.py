"""Quantize a checkpoint with llm-compressor, or compute with the result.

    python compressed_tensors_tool.py quantize CHECKPOINT OUT SCHEME
    python compressed_tensors_tool.py logits EXPORT

This file runs in the interpreter that ``ril export --python`` names. It imports nothing of openril, which is not there.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText


def quantize(checkpoint: str, out: str, scheme: str) -> None:
    """Quantize the linear layers of the language model, from their weights alone, and write them to ``out``."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto")
    parts = dict(model.model.named_children())
    language = next((parts.pop(name) for name in ("language_model", "text_model") if name in parts), None)
    if language is None:
        sys.exit(f"expected a language_model or text_model in {type(model).__name__}, got {', '.join(parts)}")
    # On disk and in vLLM the same layers have other prefixes, so expressions are written in place of names. With
    # llm-compressor's own list a reload would take the vision tower for quantized.
    ignore = ["re:.*lm_head", *(f"re:.*{name}.*" for name in parts)]
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignore))
    model.save_pretrained(out, save_compressed=True)
    path = Path(out) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = ignore
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.inference_mode()
def logits(export: str) -> None:
    """Read paths of inputs from standard input, and write next to each the logits of its last positions."""
    model = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        inputs = load_file(line.strip())
        keep = int(inputs.pop("keep"))
        save_file({"logits": model(**inputs, logits_to_keep=keep).logits[0].float()}, line.strip() + ".out")
        print("done", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:])
    else:
        logits(sys.argv[2])
