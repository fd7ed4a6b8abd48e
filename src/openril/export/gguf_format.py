"""`--to gguf`: the files that llama.cpp, Ollama and LM Studio run, and their check in llama.cpp itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from openril._version import __version__
from openril.checkpoint_files import check_folder
from openril.export.fidelity import (
    LIMITS,
    Original,
    answer_logprobs,
    check_type,
    divergences,
    markdown_table,
    summarize_type,
)
from openril.export.folder import identity
from openril.export.gguf_file import GGUFFile, gguf_package, require
from openril.export.gguf_names import Names
from openril.export.gguf_text import ARCHITECTURES, add_text_keys, add_tokenizer, fixed_template
from openril.export.gguf_vision import FAMILIES, image_token_limits
from openril.export.image_sizes import internvl_size, qwen_size
from openril.export.request import RECORD, ExportError, ExportRequest
from openril.export.run_notes import run_notes
from openril.export.runtime import MARKER, Runtime, runtime_version
from openril.models.loading import load_model, load_processor
from openril.models.prompts import PromptEncoder
from openril.models.saving import full_weights
from openril.recipe.schema import Recipe
from openril.storage import refuse_changed, remove, write_json, write_text

TYPES = ("f16", "q8_0", "q4_0")
MMPROJ = "mmproj-f16.gguf"


def export(request: ExportRequest) -> bool:
    """Write the language model in each type and the vision model, and check them.

    Files of an earlier call for the same checkpoint are kept, so that a killed export continues.
    """
    if request.check:
        runtime_version()
    model, encoder = load_checkpoint(request)
    source = {**made_from(request), "openril": __version__}
    record = _read_record(request.out)
    if record.get("to", "gguf") != "gguf" or (not record and request.out.is_dir() and any(request.out.iterdir())):
        raise ExportError(
            f"--out: expected a new folder or one of an export to gguf, got {request.out}. Name another one."
        )
    if {k: record.get(k) for k in source} != source:
        for old in [*request.out.glob("model-*.gguf"), request.out / MMPROJ]:
            remove(old)
        record = {}
    for leftover in request.out.glob(".*.tmp"):  # of a killed export
        remove(leftover)
    config, images = model.config, encoder.processor.image_processor
    record |= {"to": "gguf", **source, "checkpoint": str(Path(request.checkpoint).expanduser().resolve())}
    record["recipe"] = request.recipe_path
    record |= {"model_type": config.model_type, "text_model": config.text_config.model_type}
    record |= {"image_token_limits": image_token_limits(config, images), "resize_images": request.resize}
    record["types"] = list(dict.fromkeys([*record.get("types", []), *request.types]))
    write_json(request.out / RECORD, record)
    for kind in request.types:
        if not (request.out / model_file(kind)).exists():
            left = write_language_model(model, encoder, kind, request.out / model_file(kind))
            if left:
                request.say(
                    f"export: {len(left)} of the matrices stay in f16, because their rows are no multiple of 32"
                )
            record.setdefault("left_in_f16", {})[kind] = left
    if not (request.out / MMPROJ).exists():
        record["positions"] = write_vision_model(model, encoder, request)
    record["files"] = {p.name: p.stat().st_size for p in sorted(request.out.glob("*.gguf"))}
    write_json(request.out / RECORD, record)
    write_text(request.out / "RUN.md", run_notes(record, encoder, request.out))
    request.say(f"export: wrote {', '.join(record['files'])} and RUN.md to {request.out}")
    return _check(request, record, model, encoder) if request.check else True


def check(request: ExportRequest) -> bool:
    """Check every ``model-*.gguf`` of the folder, also those that ``llama-quantize`` has made."""
    record = _read_record(request.out)
    now = made_from(request)
    refuse_changed(
        request.out,
        {k: record.get(k) for k in now},
        now,
        fix="export it again (settings are given like --student.system-prompt)",
        error=ExportError,
    )
    measured = (record.get("positions") or {}).get("runtime")
    if measured and measured != runtime_version():
        request.say(
            f"check: the order of positions was measured with xllamacpp {measured}, here is {runtime_version()}"
        )
    kinds = tuple(sorted(p.stem.removeprefix("model-") for p in request.out.glob("model-*.gguf")))
    if not kinds:
        raise ExportError(f"--check: expected model-*.gguf in {request.out}, got none. Export it again.")
    request = dataclasses.replace(request, types=kinds, resize=record.get("resize_images", False))
    model, encoder = load_checkpoint(request)
    return _check(request, record, model, encoder)


def model_file(kind: str) -> str:
    return f"model-{kind}.gguf"


def made_from(request: ExportRequest) -> dict[str, Any]:
    """Return what decides the files and their prompts: fingerprints of the checkpoint, and settings of the student."""
    student = (request.recipe or Recipe()).student
    found = {key: value for key, value in identity(request).items() if key in ("weights", "settings")}
    return found | {f"student.{key}": getattr(student, key) for key in ("system_prompt", "min_pixels", "max_pixels")}


def load_checkpoint(request: ExportRequest) -> tuple[Any, PromptEncoder]:
    """Load the model in float32, adapters merged, and the encoder of the recipe's prompts.

    Raises:
        ExportError: The runtime is not known to compute this family, or its language model, in the same way.
    """
    gguf_package()
    folder, recipe = Path(request.checkpoint).expanduser(), request.recipe or Recipe()
    adapter = folder / "adapter_config.json"
    base = folder
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = Path(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    check_folder(str(base))
    least, most = recipe.student.min_pixels, recipe.student.max_pixels
    processor = load_processor(str(base), what="export", min_pixels=least, max_pixels=most)
    model: Any = load_model(str(base), what="export")
    if base != folder:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    family, text = model.config.model_type, model.config.get_text_config().model_type
    require(family in FAMILIES, "model_type", " or ".join(FAMILIES), family)
    require(text in ARCHITECTURES, "text_config.model_type", " or ".join(ARCHITECTURES), text)
    prompts = {key: getattr(recipe.data, key) for key in ("max_prompt_length", "max_image_pixels", "allow_urls")}
    return model, PromptEncoder(processor, model, system_prompt=recipe.student.system_prompt, keep=0, **prompts)


def write_language_model(model: Any, encoder: PromptEncoder, kind: str, path: Path) -> list[str]:
    """Write the language model with its tokenizer. Return the matrices that had to stay in f16."""
    config = model.config
    file = GGUFFile(kind, ARCHITECTURES[config.text_config.model_type].name)
    add_text_keys(file, config.text_config, config.model_type)
    if deep := getattr(config.vision_config, "deepstack_visual_indexes", None):
        file.keys.add_num_deepstack_layers(len(deep))
    rows = model.get_input_embeddings().weight.shape[0]
    add_tokenizer(file, encoder.tokenizer, rows, encoder.eos_token_ids, fixed_template(encoder))
    _add_weights(file, model, Names(config, False), language=True)
    file.write(path)
    return file.left_in_f16


def write_vision_model(model: Any, encoder: PromptEncoder, request: ExportRequest) -> dict[str, Any] | None:
    """Write the vision model. Return which order of its table of positions the runtime needs, as measured.

    llama.cpp reads the table of InternVL as if the class token were last, which checkpoints have first. A runtime that
    changes this would make rolled files wrong, so both orders are tried where the runtime is installed.
    """
    family = FAMILIES[model.config.model_type]

    def write(path: Path, rolled: bool) -> None:
        file = GGUFFile("f16", "clip")
        family.add_keys(file, model.config, encoder.processor.image_processor)
        _add_weights(file, model, Names(model.config, rolled), language=False)
        file.write(path)

    target = request.out / MMPROJ
    if not family.rolls:
        write(target, False)
        return None
    try:
        version = runtime_version()
    except ExportError:
        request.say("export: xllamacpp is missing, so the order of positions is that of October 2026, not measured")
        write(target, True)
        return {"order": "class token last", "runtime": None}
    trial = {order: request.out / f".{order}.tmp" for order in ("first", "last", "text")}
    try:
        write(trial["first"], False)
        write(trial["last"], True)
        text = request.out / model_file("f16")
        if not text.exists():
            text = trial["text"]
            write_language_model(model, encoder, "f16", text)
        kl = {order: _probe(model, encoder, text, trial[order], request.threads) for order in ("first", "last")}
        best = min(kl, key=lambda order: kl[order])
        trial[best].replace(target)
    finally:
        for path in trial.values():
            remove(path)
    return {"order": f"class token {best}", "runtime": version, "mean_kl": kl}


def _probe(model: Any, encoder: PromptEncoder, text: Path, mmproj: Path, threads: int) -> float:
    """Return the mean KL along a fixed answer about three pictures of noise, which need no resizing."""
    side = encoder.processor.image_processor.size["height"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
    rendered = encoder.render(chat)
    ids = encoder.tokenizer("The image shows a red circle and a blue square.", add_special_tokens=False)["input_ids"]
    noise = np.random.default_rng(0)
    values: list[float] = []
    with Runtime(text, mmproj, threads=threads, context=4096) as runtime:
        for _ in range(3):
            image = Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8))
            logprobs = answer_logprobs(model, encoder.encode_text(rendered, [image]), ids)
            prompt = rendered.replace(FAMILIES[model.config.model_type].image, MARKER)
            values += divergences(runtime, encoder, prompt, [image], ids, logprobs)
    return fmean(values)


def _add_weights(file: GGUFFile, model: Any, names: Names, *, language: bool) -> None:
    """Add the weights of one of the two files. A weight that belongs to neither is refused."""
    for name, weight in full_weights(model):
        belongs, tensors = names(name, weight.float().numpy())
        require(bool(tensors), name, "a weight that the runtime has a name for", "an unknown one")
        if belongs == language:
            for new, values in tensors.items():
                file.add(new, values)


def resizer(model: Any, images: Any) -> Callable[[int, int], tuple[int, int]]:
    """Return the size in which images must be sent, so that the runtime leaves them as they are."""
    kind, vision = model.config.model_type, model.config.vision_config
    if kind == "internvl":
        limits = {"min_tiles": images.min_patches, "max_tiles": images.max_patches}
        return partial(internvl_size, tile=images.size["height"], **limits)
    if kind == "smolvlm":
        raise ExportError("--resize-images: SmolVLM images need none, got the option. Leave it out.")
    side = vision.patch_size * vision.spatial_merge_size
    return partial(
        qwen_size, side=side, min_pixels=images.size["shortest_edge"], max_pixels=images.size["longest_edge"]
    )


def _check(request: ExportRequest, record: dict[str, Any], model: Any, encoder: PromptEncoder) -> bool:
    """Check each type, and write the table. Returns whether all passed."""
    from openril.data.reading import read_questions

    recipe = request.recipe
    assert recipe is not None
    questions = read_questions(recipe.data, "validation")
    count = min(request.questions, len(questions))
    chosen = [questions[i * len(questions) // count] for i in range(count)]
    if recipe.eval.score != "rules":
        request.say("check: scores are those of the answer rules, also where the recipe asks a judge")
    settings = [made_from(request), [q.content_hash() for q in chosen], recipe.eval.max_completion_length]
    torch.set_num_threads(request.threads)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sizes = resizer(model, encoder.processor.image_processor) if request.resize else None
    mark = FAMILIES[record["model_type"]].image
    original = Original(
        model, encoder, recipe, chosen, mark=mark, resize=sizes, folder=request.out, key=_hash(*settings)
    )
    types, mmproj = [], request.out / MMPROJ
    for kind in request.types:
        path = request.out / model_file(kind)
        key = _hash(*settings, request.resize, request.threads, runtime_version(), _digest(path), _digest(mmproj))
        limits = record["image_token_limits"]
        with closing(
            Runtime(path, mmproj, threads=request.threads, context=original.context, limits=limits)
        ) as runtime:
            rows = list(check_type(original, runtime, kind, request.out / f"check-{kind}.jsonl", key))
            if pictured := next((q for q in original.questions if q.images), None):
                tokens = runtime.chat_prompt_tokens(original.messages(pictured), original.images(pictured))
                record["chat_endpoint"] = {"expected": original.prompts[pictured.id].length, "prompt_tokens": tokens}
        size = path.stat().st_size + mmproj.stat().st_size
        found = summarize_type(original, kind, rows, size=size, threads=request.threads, max_kl=request.max_kl)
        types.append(found)
        request.say(f"check: {kind} {'passed' if found['passed'] else 'FAILED: ' + found['why']}")
    record["check"], record["recipe"] = types, request.recipe_path
    write_json(request.out / RECORD, record)
    write_json(request.out / "check.json", types)
    write_text(request.out / "check.md", markdown_table(types))
    write_text(request.out / "RUN.md", run_notes(record, encoder, request.out))
    request.say(markdown_table(types))
    failed = [t for t in types if not t["passed"] and (t["unequal_prompts"] or t["type"] in LIMITS)]
    if failed and not request.resize and record["model_type"] != "smolvlm":
        request.say("check: pictures of other sizes than the model's grid are a frequent cause; try --resize-images")
    return all(t["passed"] for t in types)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
