"""Model configurations as plain dictionaries: merged section by section, cut to fewer decoder blocks, and checked for
values that are invalid in every model.

Knows no architecture; a vision-language model keeps its decoder's dimensions under `text_config`.
"""

import difflib
import functools
import re
from typing import Any

# Keys whose value, if a model has them, is a whole number of at least 1.
COUNTS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
)  # fmt: skip
BY_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with an entry for every decoder block
ALMOST = 0.93  # similarity of a misspelt name; that of `num_` and `max_position_embeddings` is lower
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|true|false", re.IGNORECASE)


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return `config` with its decoder cut to the first `layers` blocks."""
    if isinstance(config.get("text_config"), dict):
        return config | {"text_config": cut(config["text_config"], layers)}
    return per_block(config, config | {"num_hidden_layers": layers})


def per_block(whole: dict[str, Any], cut: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration `cut` with its per-block lists, inherited from `whole`, shortened to its own blocks."""
    if isinstance(cut.get("text_config"), dict):
        return cut | {"text_config": per_block(whole.get("text_config") or {}, cut["text_config"])}
    before, layers = whole.get("num_hidden_layers"), cut.get("num_hidden_layers")
    kinds = {
        key: value[:layers]
        for key, value in cut.items()
        if isinstance(value, list) and len(value) == before != layers and value == whole.get(key)
        if key == "no_rope_layers" or all(isinstance(kind, str) for kind in value)
    }
    return cut | kinds


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with the values of `override`, section by section."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def blocks(config: dict[str, Any]) -> int | None:
    """Return the number of decoder blocks in a configuration, or None if it states no number."""
    nested = config.get("text_config")
    count = (nested if isinstance(nested, dict) else config).get("num_hidden_layers")
    return count if isinstance(count, int) else None


def fault(config: dict[str, Any], section: str) -> str | None:
    """Return None, or a message on the first invalid value of a configuration: a count that is not a positive whole
    number, a number in quotation marks, a list without an entry for every block, key-value heads that do not divide the
    heads.

    `section`: where in a parameter file the configuration stands. Everything else is left to transformers to check.
    """
    for key, value in config.items():
        where = f'key "{key}" in section "{section}"'
        if (near := _near(str(key))) and near not in config:
            return f'{where}: no dimension has this name; did you mean "{near}"?'
        if isinstance(value, dict):
            if reason := fault(value, f"{section}.{key}"):
                return reason
        elif isinstance(value, str) and NUMBER.fullmatch(value.strip()) and "version" not in str(key):
            return f"{where}: expected a number or true/false, got the text {value!r}; leave out the quotation marks"
        elif key in COUNTS and not (value is None or isinstance(value, list) or (type(value) is int and value >= 1)):
            return f"{where}: expected a whole number of at least 1, got {value!r}"
    return _disagreement(config, section)


@functools.cache
def _near(key: str) -> str:
    """Return the name in COUNTS that `key` misspells, since transformers would silently ignore it; empty if none.

    A key that contains such a name, as `v_head_dim` does, is not a misspelling.
    """
    if any(name in key for name in COUNTS):
        return ""
    return next(iter(difflib.get_close_matches(key, COUNTS, n=1, cutoff=ALMOST)), "")


def _disagreement(config: dict[str, Any], section: str) -> str | None:
    """Return None, or a message on two values of a configuration that contradict each other."""
    layers = config.get("num_hidden_layers")
    for key in BY_BLOCK if isinstance(layers, int) else ():
        kinds = config.get(key)
        if isinstance(kinds, list) and kinds and len(kinds) != layers:
            expected = f"expected an entry for each of the {layers} blocks, got {len(kinds)}"
            return f'key "{key}" in section "{section}": {expected}'
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        expected = f"expected a divisor of num_attention_heads, which is {heads}, got {groups}"
        return f'key "num_key_value_heads" in section "{section}": {expected}'
    return None
