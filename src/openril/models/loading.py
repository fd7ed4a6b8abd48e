"""Load models and processors from checkpoints with safetensors files, on disk or on the hub."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from openril.errors import ModelError
from openril.hf import AutoConfig, AutoModelForImageTextToText, AutoProcessor, submodule, transformers_logging
from openril.recipe.schema import StudentConfig

# A bar for every model that is loaded would hide our own progress display.
transformers_logging.disable_progress_bar()


def _checked(checkpoint: str, what: str) -> str:
    if not checkpoint:
        raise ModelError(f"{what}: expected a checkpoint folder or a hub name, got an empty string")
    path = Path(checkpoint).expanduser()
    looks_local = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        raise ModelError(f"{what}: {checkpoint} holds no checkpoint (no config.json). Run the stage that writes it.")
    return str(path) if path.is_dir() else checkpoint


def load_model(
    checkpoint: str,
    *,
    what: str = "student",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
    meta: bool = False,
) -> nn.Module:
    """Load an ``AutoModelForImageTextToText`` and put it into evaluation mode.

    Args:
        what: The model's name in errors.
        meta: Leave the weights on the meta device; ``model.pending`` is their ``PendingWeights``.

    Raises:
        ModelError: There is no checkpoint, it is not a vision-language model, its weights are not in safetensors files,
            or weights are missing (they would be random).
    """
    checkpoint = _checked(checkpoint, what)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            device_map={"": "meta"} if meta else None,
        )
    except ImportError as e:  # the package of another attention is missing
        raise ModelError(f"student.attn_implementation: {attn_implementation!r} cannot be used: {e}") from e
    except (OSError, ValueError) as e:
        raise ModelError(f"{what}: {checkpoint} cannot be loaded as a vision-language model: {e}") from e
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{what}: {checkpoint} lacks {len(missing)} weights its architecture needs ({', '.join(missing[:3])}, ...);"
            " they would be random"
        )
    if meta:
        model.pending = PendingWeights(model, checkpoint, revision)
    return model.eval()


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
        name_of = _names_in_model(model, state)
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


def _names_in_model(model: Any, state: dict[str, Any]) -> Callable[[str], str]:
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
    checkpoint = _checked(checkpoint, what)
    try:
        processor = AutoProcessor.from_pretrained(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as e:
        raise ModelError(f"{what}: the processor of {checkpoint} cannot be loaded: {e}") from e
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
    return model, processor


def load_config(checkpoint: str, *, what: str = "student", trust_remote_code: bool = False) -> Any:
    """Load the configuration only, for checks before anything is loaded."""
    checkpoint = _checked(checkpoint, what)
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise ModelError(f"{what}: {checkpoint} cannot be read: {e}") from e


def torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
