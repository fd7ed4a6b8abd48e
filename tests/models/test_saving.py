"""Models that are written in a stream are the folders that ``save_pretrained`` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from openril.hf import submodule
from openril.models.loading import load_model, load_processor
from openril.models.saving import write_model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_stream_of_weights_is_what_save_pretrained_writes(tiny_family: Path, tmp_path: Path):
    processor = load_processor(str(tiny_family))
    whole: Any = load_model(str(tiny_family))
    for name, model in (("model", whole), ("backbone", whole.model)):
        expected, one, many = (tmp_path / f"{name}_{kind}" for kind in ("expected", "one", "many"))
        model.save_pretrained(expected)
        processor.save_pretrained(expected)
        write_model(model, one, processor)
        assert contents(one) == contents(expected)  # byte for byte
        write_model(model, many, processor, max_bytes=100_000)
        files = {path.name: load_file(path) for path in many.glob("*.safetensors")}
        places = {key: file for file, tensors in files.items() for key in tensors}
        values = load_file(expected / "model.safetensors")
        assert len(files) > 3 and places.keys() == values.keys()
        assert all(torch.equal(value, files[places[key]][key]) for key, value in values.items())
        sizes = [[t.nbytes for t in tensors.values()] for tensors in files.values()]
        assert all(sum(s) <= 100_000 or len(s) == 1 for s in sizes)
        index = json.loads((many / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == places and index["metadata"]["total_size"] == sum(map(sum, sizes))
        read = type(model).from_pretrained(many).state_dict()
        assert all(torch.equal(value, read[key]) for key, value in model.state_dict().items())


def test_weights_that_the_checkpoint_joins_are_written_together(tiny_qwen: Path, tmp_path: Path):
    loading = submodule("transformers.core_model_loading")
    model: Any = load_model(str(tiny_qwen))
    parts = ["self_attn.k_proj.bias", "self_attn.v_proj.bias"]
    split = loading.WeightConverter("self_attn.kv.bias", parts, operations=[loading.Chunk(dim=0)])
    model._weight_conversions = [split]
    write_model(model, tmp_path / "written", load_processor(str(tiny_qwen)), max_bytes=100_000)
    assert not list(tmp_path.glob("written/*.index.json"))
    written = load_file(tmp_path / "written/model.safetensors")
    layer = model.model.language_model.layers[1].self_attn
    [key] = [k for k in written if k.endswith("language_model.layers.1.self_attn.kv.bias")]
    assert torch.equal(written[key], torch.cat([layer.k_proj.bias, layer.v_proj.bias]))
