"""Sizes of the paper's models, for planning with a model that is not downloaded."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch
from ruamel.yaml import YAML

from openril.hf import AutoConfig, AutoModelForImageTextToText
from openril.models.memory_estimate import Shape, by_group, shape_of


def published_models() -> dict[str, dict[str, Any]]:
    """Return ``parameters`` (their published number) and ``config`` (fields that decide sizes) by hub name."""
    text = files("openril.models").joinpath("published_shapes.yaml").read_text(encoding="utf-8")
    return YAML(typ="safe").load(text)


def published_config(name: str) -> Any:
    """Return the configuration of a model of the list by its hub name, or None for any other."""
    found = published_models().get(name)
    return AutoConfig.for_model(**found["config"]) if found else None


def model_on_meta(config: Any) -> Any:
    """Build a model with parameters on the meta device, which have a size and take no memory."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model


def published_shape(name: str) -> Shape | None:
    """Return the shape of a model of the list by its hub name, or None for any other."""
    config = published_config(name)
    if config is None:
        return None
    return shape_of(config, by_group({n: p.numel() for n, p in model_on_meta(config).named_parameters()}))
