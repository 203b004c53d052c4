"""Configurations of models as plain dictionaries: merged section by section, cut to fewer decoder blocks.

Knows no architecture; a vision-language model keeps its decoder's dimensions under `text_config`.
"""

from typing import Any


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return `config` with its decoder cut to the first `layers` blocks."""
    if "text_config" in config:
        return config | {"text_config": cut(config["text_config"], layers)}
    return per_block(config, config | {"num_hidden_layers": layers})


def per_block(whole: dict[str, Any], cut: dict[str, Any]) -> dict[str, Any]:
    """Return `cut` with the lists that name the kind of every block of `whole` as long as it has blocks."""
    if "text_config" in cut:
        return cut | {"text_config": per_block(whole.get("text_config", {}), cut["text_config"])}
    before, layers = whole.get("num_hidden_layers"), cut.get("num_hidden_layers")
    kinds = {
        key: value[:layers]
        for key, value in cut.items()
        if isinstance(value, list) and len(value) == before != layers and value == whole.get(key)
        if key == "no_rope_layers" or all(isinstance(kind, str) for kind in value)
    }
    return cut | kinds


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `override`, section by section."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged
