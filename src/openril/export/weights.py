"""Stream the weights of a checkpoint as they are stored, and write others in a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from openril.export.request import ExportError
from openril.models.saving import MAX_FILE_BYTES, name_parts


def stored_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the name in ``model.state_dict()`` and the stored value of each weight, tied ones under each of their names.

    Args:
        model: A model that ``load_model`` has loaded with ``meta=True``.

    Raises:
        ExportError: The files hold a weight that the model does not have, or lack one.
    """
    names = {id(module): name for name, module in model.named_modules()}
    left = set(model.state_dict())
    for file in model.pending.files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (it is no dictionary)
                if (places := model.pending.places.get(key)) is None:
                    raise ExportError(
                        f"CHECKPOINT: expected the weights of {type(model).__name__}, got {key!r} too ({file}), which"
                        " would be left over. Remove it from the file."
                    )
                value = opened.get_tensor(key)
                for i, (module, leaf) in enumerate(places):
                    name = f"{names[id(module)]}.{leaf}".lstrip(".")
                    if name in left:  # not yet written for the other name of a tied weight
                        left.remove(name)
                        yield name, value.clone() if i else value
    if left:
        raise ExportError(f"CHECKPOINT: the files lack {len(left)} weights, for instance {sorted(left)[0]}.")


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None) -> int:
    """Write weights in safetensors files of up to ``MAX_FILE_BYTES``, with an index if there are several. Return their number.

    Args:
        dtype: The type that floating weights are converted to, or None for the stored one.

    Raises:
        ExportError: A weight is infinite or not a number in this type, or a name comes twice.
    """
    held: dict[str, Tensor] = {}
    seen: set[str] = set()
    files, size, values = 0, 0, 0

    def flush() -> None:
        nonlocal files
        files += 1
        save_file(held, folder / f"part{files}", metadata={"format": "pt"})
        held.clear()

    for name, value in weights:
        if name in seen:
            raise ExportError(f"CHECKPOINT: two weights would be written as {name}.")
        seen.add(name)
        value = value.to(dtype if dtype is not None and value.is_floating_point() else value.dtype).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise ExportError(f"--type: expected a type that holds every weight, got infinite values in {name}.")
        if held and sum(v.nbytes for v in held.values()) + value.nbytes > MAX_FILE_BYTES:
            flush()
        held[name] = value
        size, values = size + value.nbytes, values + value.numel()
    flush()
    name_parts(folder, files, {"total_parameters": values, "total_size": size})
    return len(seen)
