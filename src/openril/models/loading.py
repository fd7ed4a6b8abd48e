"""Load models and processors from checkpoints with safetensors files, on disk or on the hub."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from openril.checkpoint_files import CheckpointError, missing_fix, quantization, require_folder, sampling_defaults
from openril.errors import ModelError
from openril.hf import AutoConfig, AutoModelForImageTextToText, AutoProcessor, submodule, transformers_logging
from openril.models.prompts import image_token_ids
from openril.recipe.schema import StudentConfig

# A bar for every model that is loaded would hide our own progress display.
transformers_logging.disable_progress_bar()

_HUB_SECONDS = 10.0
# transformers switches the tying of weights off for all models while it loads one: two threads that load at the same time
# could leave it off.
_ONE_AT_A_TIME = threading.Lock()


def checked(
    checkpoint: str, what: str, revision: str | None = None, *, weights: bool = False, trained: bool = True
) -> str:
    """Return the folder or hub name to load. Raises ModelError if it cannot be used; see ``checkpoint_files``."""
    if not checkpoint:
        raise ModelError(f"{what}: expected a checkpoint folder or a hub name, got an empty string")
    require_folder(what, checkpoint, weights=weights, trained=trained)
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return str(path)
    try:
        _find_on_hub(checkpoint, revision)
    except CheckpointError as e:
        raise ModelError(f"{what}: {e}") from e
    return checkpoint


@lru_cache
def _find_on_hub(name: str, revision: str | None) -> None:
    """Raise CheckpointError if a name is not in the hub's cache on this machine, and one request does not find it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_HUB_SECONDS)
    except Exception as e:  # unknown, gated, offline, no connection: of the hub's classes or of its HTTP client's
        cause = " ".join(str(e).split())[:200]
        reason = f"no such folder: {Path(name).resolve()}, and as a hub name it cannot be loaded ({cause})"
        raise CheckpointError(reason, missing_fix(name)) from e


def load_model(
    checkpoint: str,
    *,
    what: str = "student",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
    meta: bool = False,
    only_check: bool = False,
) -> nn.Module:
    """Load an ``AutoModelForImageTextToText`` and put it into evaluation mode.

    Args:
        what: The model's name in errors.
        meta: Leave the weights on the meta device, which checks their names and shapes within seconds; ``model.pending`` is
            their ``PendingWeights``.
        only_check: With ``meta``: make no ``PendingWeights``.

    Raises:
        ModelError: There is no checkpoint, it is not a vision-language model, its weights are not in safetensors files,
            or weights are missing or of other shapes (they would be random), or some of a layer would not be used.
    """
    config = load_config(checkpoint, what=what, revision=revision, trust_remote_code=trust_remote_code)
    require_vision_language(config, checkpoint, what)
    checkpoint = checked(checkpoint, what, revision, weights=True)
    try:
        with _ONE_AT_A_TIME:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                checkpoint,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below
                output_loading_info=True,
                device_map={"": "meta"} if meta else None,
            )
    except ImportError as e:  # the package of another attention is missing
        raise ModelError(f"student.attn_implementation: {attn_implementation!r} cannot be used: {e}") from e
    except (OSError, ValueError) as e:
        raise ModelError(f"{what}: {checkpoint} cannot be loaded as a vision-language model: {e}") from e
    model, info = loaded
    require_all_weights(model, info, f"{what}: {checkpoint}")
    if meta and not only_check:
        model.pending = PendingWeights(model, checkpoint, revision)
    return model.eval()


def require_all_weights(model: Any, info: dict[str, Any], where: str) -> None:
    """Raise ModelError if the weights of a checkpoint are not those of its config.json. info: of ``from_pretrained``."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{where} lacks {len(missing)} weights its architecture needs ({', '.join(missing[:3])}, ...);"
            f" they would be random. {_SAME}"
        )
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"{where}: expected weights of the shapes in its config.json, got {len(info['mismatched_keys'])} others (for"
            f" instance {name}: expected {list(expected)}, got {list(found)}). {_SAME}"
        )
    # Transformers leaves out weights that no module has. Those of further layers mean that config.json has too few.
    layers = {re.sub(r"\d+", "0", name) for name, _ in model.named_parameters()}
    if unused := sorted(name for name in info["unexpected_keys"] if re.sub(r"\d+", "0", name) in layers):
        raise ModelError(
            f"{where}: expected the layers that its config.json names, got {len(unused)} weights of more layers"
            f" ({', '.join(unused[:3])}, ...), which would not be used. {_SAME}"
        )


_SAME = "Use the config.json and the weights of one checkpoint."


def require_vision_language(config: Any, checkpoint: str, what: str = "student") -> None:
    """Raise ModelError if a configuration is not that of a vision-language model that can be trained."""
    where = f"{what}: expected a vision-language model (AutoModelForImageTextToText), got {checkpoint}"
    if type(config) not in AutoModelForImageTextToText._model_mapping and not getattr(config, "auto_map", None):
        raise ModelError(f"{where}, a {config.model_type} model that takes no images. Use one that does.")
    if method := quantization(config.to_dict()):
        raise ModelError(f"{where}, which is quantized ({method}). Give the unquantized checkpoint.")


def require_embedded_tokens(model: Any, processor: Any, what: str, checkpoint: str) -> None:
    """Raise ModelError if the tokenizer has tokens beyond the embedding, on which a model fails in the middle of a run."""
    rows = model.get_input_embeddings().weight.shape[0]
    images = image_token_ids(model, processor)  # which some models replace before the embedding
    vocabulary = getattr(processor, "tokenizer", processor).get_vocab()
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= rows and i not in images)
    if beyond:
        shown = ", ".join(token for _, token in beyond[:5]) + ", ..." * (len(beyond) > 5)
        raise ModelError(
            f"{what}: expected token ids below {rows}, the rows of the embedding of {checkpoint}, got"
            f" {len(beyond)} {'token' if len(beyond) == 1 else 'tokens'} beyond it: {shown}. Resize the embedding"
            " (resize_token_embeddings) and save the model, or remove them from the tokenizer."
        )


def sampling_note(checkpoint: str) -> str:
    """Return what a checkpoint's generation_config.json says about sampling and where it applies, or ""."""
    found = ", ".join(f"{k} {v}" for k, v in sampling_defaults(Path(checkpoint).expanduser()).items())
    return found and (
        f"student: the generation_config.json of {checkpoint} sets {found}. Runs do not use it: samples follow the recipe"
        " and evaluation is greedy. Servers apply it to requests that name no value."
    )


class PendingWeights:
    """Where the weights of a model on the meta device are on disk, and where in the model they belong.

    Make it before adapters are added or weights are sharded, which changes names and parameters, but not the modules. It
    also computes the buffers, which are not on disk.
    """

    def __init__(self, model: Any, checkpoint: str | Path, revision: str | None = None) -> None:
        self.files = _weight_files(str(checkpoint), revision)
        with init_empty_weights(include_buffers=False):
            twin = type(model)(model.config)
        for name, buffer in twin.named_buffers():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = buffer
        state = model.state_dict(keep_vars=True)
        places: dict[int, list[tuple[nn.Module, str]]] = {}  # tied weights have several
        for name, tensor in state.items():
            path, _, leaf = name.rpartition(".")
            places.setdefault(id(tensor), []).append((model.get_submodule(path), leaf))
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        """(module, name of its parameter or buffer) by the name in the files."""
        name_of = names_in_model(model, state)
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no dictionary)
                    if (tensor := state.get(name_of(key))) is not None:
                        self.places[key] = places[id(tensor)]
                        if opened.get_slice(key).get_dtype() == "BF16":
                            tensor.stored = torch.bfloat16


def _weight_files(checkpoint: str, revision: str | None) -> list[str]:
    utils: Any = submodule("transformers.utils")
    find = partial(utils.cached_file, checkpoint, revision=revision, _raise_exceptions_for_missing_entries=False)
    if (single := find("model.safetensors")) is not None:
        return [single]
    index = find("model.safetensors.index.json")
    return submodule("transformers.utils.hub").get_checkpoint_shard_files(checkpoint, index, revision=revision)[0]


def names_in_model(model: Any, state: dict[str, Any]) -> Callable[[str], str]:
    """Return a function that translates names of a checkpoint as ``from_pretrained`` does."""
    rules = submodule("transformers.conversion_mapping").get_model_conversion_mapping(model)
    core: Any = submodule("transformers.core_model_loading")
    renamings = [r for r in rules if isinstance(r, core.WeightRenaming)]
    converters = [r for r in rules if not isinstance(r, core.WeightRenaming)]

    def name_of(key: str) -> str:
        name, converted = core.rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise ModelError(
                f"train.shard: {type(model).__name__} computes {name} from other tensors of its checkpoint, which is only"
                " supported for whole models. Set train.shard to false."
            )
        if name not in state and key in state:
            return key
        return name

    return name_of


def load_processor(
    checkpoint: str,
    *,
    what: str = "student",
    revision: str | None = None,
    trust_remote_code: bool = False,
    min_pixels: int = 0,
    max_pixels: int = 0,
) -> Any:
    """Load the checkpoint's processor; min_pixels and max_pixels limit the area of resized images (0: no limit)."""
    checkpoint = checked(checkpoint, what, revision)
    try:
        processor = AutoProcessor.from_pretrained(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as e:
        raise ModelError(f"{what}: the processor of {checkpoint} cannot be loaded: {e}") from e
    template = getattr(processor, "chat_template", None) or getattr(
        getattr(processor, "tokenizer", processor), "chat_template", None
    )
    if template is None:
        raise ModelError(
            f"{what}: expected a chat template (chat_template.jinja) in {checkpoint}, got none. Add that of the instruct"
            " checkpoint it was made from."
        )
    if min_pixels or max_pixels:
        image_processor = getattr(processor, "image_processor", None)
        size = dict(getattr(image_processor, "size", None) or {})
        # Some processors have one of the two, for the length of a side.
        if not {"shortest_edge", "longest_edge"} <= set(size):
            raise ModelError(
                f"{what}: {type(image_processor).__name__} does not support min_pixels and max_pixels. Set"
                " student.min_pixels and student.max_pixels to 0."
            )
        if min_pixels:
            size["shortest_edge"] = min_pixels
        if max_pixels:
            size["longest_edge"] = max_pixels
        assert image_processor is not None
        image_processor.size = size
    return processor


def load_student(
    student: StudentConfig, checkpoint: str, dtype: torch.dtype = torch.float32, *, meta: bool = False
) -> tuple[nn.Module, Any]:
    """Load model and processor of the recipe's student from ``checkpoint``, its SFT version or student.model."""
    remote = student.trust_remote_code
    revision = student.revision if checkpoint == student.model else None
    model = load_model(
        checkpoint,
        dtype=dtype,
        revision=revision,
        attn_implementation=student.attn_implementation,
        trust_remote_code=remote,
        meta=meta,
    )
    processor = load_processor(
        checkpoint,
        revision=revision,
        min_pixels=student.min_pixels,
        max_pixels=student.max_pixels,
        trust_remote_code=remote,
    )
    require_embedded_tokens(model, processor, "student", checkpoint)
    return model, processor


def load_config(
    checkpoint: str,
    *,
    what: str = "student",
    revision: str | None = None,
    trust_remote_code: bool = False,
    trained: bool = True,
) -> Any:
    """Load the configuration only, for checks before anything is loaded."""
    checkpoint = checked(checkpoint, what, revision, trained=trained)
    try:
        return AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(f"{what}: {checkpoint} cannot be read: {e}") from e


def torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
