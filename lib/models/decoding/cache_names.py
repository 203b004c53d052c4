"""The argument name of the key-value cache in transformers: `cache`, or `past_key_values` in older releases.

Accepts both names and passes on the name that the installed release uses. Knows nothing of what a cache holds.
"""

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("cache", "past_key_values")
NAME = next(name for name in NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)


def as_kwargs(cache: Any) -> dict[str, Any]:
    """Return `cache` as a keyword argument for a model, decoder or attention module of the installed release."""
    return {NAME: cache}


def pop_from(arguments: dict[str, Any]) -> Any:
    """Remove the cache, under either name, from keyword arguments and return it; None if there is none."""
    caches = [arguments.pop(name, None) for name in NAMES]
    return next((cache for cache in caches if cache is not None), None)


def of(output: object) -> Any:
    """Return the cache of a model's output."""
    return getattr(output, NAME)
