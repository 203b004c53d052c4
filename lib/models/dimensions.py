"""Configurations of models as plain dictionaries: merged section by section, cut to fewer decoder blocks, and checked
for values that can be no dimension of any model.

Knows no architecture; a vision-language model keeps its decoder's dimensions under `text_config`.
"""

import difflib
import functools
import re
from typing import Any

# What every model that has it counts in whole numbers of at least 1.
COUNTS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
)  # fmt: skip
BY_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with an entry for every decoder block
ALMOST = 0.93  # of a name's letters; `num_position_embeddings` is no `max_position_embeddings`
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|true|false", re.IGNORECASE)


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return `config` with its decoder cut to the first `layers` blocks."""
    if isinstance(config.get("text_config"), dict):
        return config | {"text_config": cut(config["text_config"], layers)}
    return per_block(config, config | {"num_hidden_layers": layers})


def per_block(whole: dict[str, Any], cut: dict[str, Any]) -> dict[str, Any]:
    """Return `cut` with the lists that name the kind of every block of `whole` as long as it has blocks."""
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
    """Return `base` with the values of `override`, section by section."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def blocks(config: dict[str, Any]) -> int | None:
    """Return how many decoder blocks a configuration states, None where it states none."""
    nested = config.get("text_config")
    count = (nested if isinstance(nested, dict) else config).get("num_hidden_layers")
    return count if isinstance(count, int) else None


def fault(config: dict[str, Any], section: str) -> str | None:
    """Return None, or in words which value of a configuration can be no model's: a count that is none, a number in
    quotation marks, a list that does not name every block, heads that the key-value heads do not divide.

    `section`: where in a parameter file the configuration stands. Whether the rest makes a model, transformers knows.
    """
    for key, value in config.items():
        where = f'key "{key}" in section "{section}"'
        if (near := _near(str(key))) and near not in config:
            return f'{where}: no dimension has this name; did you mean "{near}"?'
        if isinstance(value, dict):
            if reason := fault(value, f"{section}.{key}"):
                return reason
        elif isinstance(value, str) and NUMBER.fullmatch(value.strip()) and "version" not in str(key):
            return f"{where}: expected a number or a truth value, got the text {value!r}; leave out the quotation marks"
        elif key in COUNTS and not (value is None or isinstance(value, list) or (type(value) is int and value >= 1)):
            return f"{where}: expected a whole number of at least 1, got {value!r}"
    return _disagreement(config, section)


@functools.cache
def _near(key: str) -> str:
    """Return the count that a key means by a name a letter off, which transformers would keep and never read; empty
    where it means another one, as `v_head_dim` does.
    """
    if any(name in key for name in COUNTS):
        return ""
    return next(iter(difflib.get_close_matches(key, COUNTS, n=1, cutoff=ALMOST)), "")


def _disagreement(config: dict[str, Any], section: str) -> str | None:
    """Return None, or which two values of a configuration contradict each other."""
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
