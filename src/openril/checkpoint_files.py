"""Read what a checkpoint folder holds from its files alone, and say why it cannot be used and what to do about it.

Loads no model and opens no connection.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from openril.errors import ModelError

ORIGINAL_LAYOUTS = {
    "internvl_chat": "OpenGVLab/InternVL3-2B-hf",
    "llava_llama": "llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}
"""Model types of the code that came with a paper -> the same kind of checkpoint in the layout of transformers."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_FROM_HERE = "Correct the path; relative paths start at the current directory"
_AGAIN = "Download or write it again"
_GGUF = "Give the folder of the checkpoint that the GGUF file was made from"
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0, "repetition_penalty": 1.0}
_SAMPLING |= {"no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 1.0, "min_length": 0, "min_new_tokens": None}
_SAMPLING |= {"bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None}


class CheckpointError(ModelError):
    """A checkpoint cannot be used. reason and fix: the two sentences of the message, without full stops."""

    def __init__(self, reason: str, fix: str = _FROM_HERE) -> None:
        super().__init__(f"{reason}. {fix}.")
        self.reason, self.fix = reason, fix


def require_folder(what: str, name: str, *, trained: bool = True, weights: bool = True) -> None:
    """Raise ModelError, which names ``what`` the checkpoint is, where ``check_folder`` raises CheckpointError."""
    try:
        check_folder(name, trained=trained, weights=weights)
    except CheckpointError as e:
        raise ModelError(f"{what}: {e}") from e


def check_folder(name: str, *, trained: bool = True, weights: bool = True) -> None:
    """Raise CheckpointError if ``name`` is a path without a checkpoint that can be used. Names on the hub pass.

    Args:
        trained: Whether its weights are to be trained, which quantized ones cannot be.
        weights: Whether the weight files are needed.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            raise CheckpointError(f"expected a checkpoint folder, got the GGUF file {path}", _GGUF)
        fix = "Name the folder that holds config.json and the weights"
        raise CheckpointError(f"{path} is a file, not a checkpoint folder", fix)
    if not path.is_dir():
        if looks_local(name):
            raise CheckpointError(f"no such folder: {path.resolve()}", missing_fix(name))
        return
    if not (path / "config.json").is_file():
        raise _without_config(path)
    config = _read_json(path / "config.json")
    if trained and (method := quantization(config, path)):
        raise CheckpointError(
            f"expected a checkpoint that can be trained, got {path}, which is quantized ({method})",
            "Give the unquantized checkpoint; a teacher or judge can be served quantized (base_urls)",
        )
    if native := ORIGINAL_LAYOUTS.get(str(config.get("model_type"))):
        raise CheckpointError(
            f"expected a checkpoint in the layout of transformers, got {path} in the original layout "
            f"(model_type {config['model_type']}), which needs the code of its authors",
            f"Use the checkpoint whose name ends in -hf, such as {native}",
        )
    if weights:
        for file in weight_files(path):
            odd = next((n for n, (kind, _) in read_header(file).items() if trained and _is_quantized(n, kind)), None)
            if odd:
                raise CheckpointError(
                    f"expected weights that can be trained, got {file}, whose tensor {odd} is quantized",
                    "Give the unquantized checkpoint",
                )


def looks_local(name: str) -> bool:
    """Return whether a name can only be a path, because no name on the hub is written like it."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def missing_fix(name: str) -> str:
    """Return how to correct the name of a folder that does not exist, with similar names in its parent folder."""
    path = Path(name).expanduser()
    there = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=3) or there[:3]
    if not near:
        return _FROM_HERE
    return (
        f"Did you mean {' or '.join(str(path.parent / n) for n in near)}? Relative paths start at the current directory"
    )


def quantization(config: dict[str, Any], folder: Path | None = None) -> str:
    """Return the method by which a checkpoint is quantized, or "". config: the content of config.json."""
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in ("quantization_config", "compression_config"):
            if found := part.get(key):
                return str(
                    found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "unknown method")
                )
    names = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
    return next((name for name in names if folder is not None and (folder / name).is_file()), "")


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return what generation_config.json says about sampling, without the values that change nothing."""
    path = folder / "generation_config.json"
    saved = _read_json(path) if path.is_file() else {}
    return {k: saved[k] for k, neutral in _SAMPLING.items() if k in saved and saved[k] not in (neutral, None)}


def weight_files(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files. Raises CheckpointError if there are none, or some are missing."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = [p.name for p in sorted(folder.glob("*")) if p.suffix in _PICKLED]
        if others:
            raise CheckpointError(
                f"{folder} holds no weights as .safetensors, only {', '.join(others[:3])}, which can run code when loaded",
                "Convert them: load the model with transformers where you trust it, and save_pretrained writes safetensors",
            )
        if any(folder.glob("*.gguf")):
            raise CheckpointError(f"{folder} holds no weights as .safetensors, only GGUF files", _GGUF)
        raise CheckpointError(f"{folder} holds no weights as .safetensors", "Download or write the whole checkpoint")
    index = folder / "model.safetensors.index.json"
    shards = [m for f in files if (m := re.fullmatch(r"(model)-\d+-of-(\d+)\.safetensors", f.name))]
    if index.is_file():
        named = set(_read_json(index).get("weight_map", {}).values())
    elif shards and not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"{folder} holds {len(shards)} of {int(shards[0][2])} weight files but no {index.name}", _AGAIN
        )
    else:
        return files
    if absent := sorted(named - {f.name for f in files}):
        shown = ", ".join(absent[:3])
        raise CheckpointError(f"{folder}: {len(absent)} of {len(named)} weight files are missing: {shown}", _AGAIN)
    return [f for f in files if f.name in named]


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor of a safetensors file. Raises CheckpointError if the file is damaged."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = f.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise CheckpointError(
                f"{path} is a pointer of Git LFS, not the weights", "Run `git lfs pull` in its folder"
            )
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path}: damaged or cut off (its header claims {length} bytes of {size})", _AGAIN)
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            found = {name: (t["dtype"], tuple(t["shape"])) for name, t in header.items()}
            end = max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{path}: not a safetensors file ({e})", _AGAIN) from e
    if size != 8 + length + end:
        raise CheckpointError(f"{path}: damaged or cut off: expected {8 + length + end} bytes, got {size}", _AGAIN)
    return found


def _is_quantized(name: str, kind: str) -> bool:
    return name.endswith(("qweight", "weight_packed")) or (
        (name.endswith("weight") and kind[0] in "UI") or kind[:2] == "F8"
    )


def _without_config(path: Path) -> CheckpointError:
    if (path / "adapter_config.json").is_file():
        base = _read_json(path / "adapter_config.json").get("base_model_name_or_path") or "an unnamed model"
        return CheckpointError(
            f"expected a whole checkpoint, got {path}, a LoRA adapter of {base}",
            "Merge it (PeftModel.merge_and_unload of peft, then save_pretrained) and give the merged folder",
        )
    if any(path.glob("*.gguf")):
        reason = f"expected a checkpoint in the layout of transformers, got {path}, which holds GGUF files only"
        return CheckpointError(reason, _GGUF)
    inner = sorted({str(p.parent) for pattern in ("*", "*/*") for p in path.glob(f"{pattern}/config.json")})
    fix = f"Name the folder inside it that holds one: {' or '.join(inner[:3])}" if inner else _FROM_HERE
    return CheckpointError(f"{path} holds no config.json", fix)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e})", _AGAIN) from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}", _AGAIN)
    return value
