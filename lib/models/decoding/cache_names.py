"""What transformers calls the cache of keys and values: `cache`, in releases before that `past_key_values`.

Both names are accepted; the one of the installed release is passed on. Knows nothing of what a cache holds.
"""

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("cache", "past_key_values")
NAME = next(name for name in NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)


def as_kwargs(cache: Any) -> dict[str, Any]:
    """Return a cache as the keyword argument of a model, a decoder and an attention module of the installed release."""
    return {NAME: cache}


def pop_from(arguments: dict[str, Any]) -> Any:
    """Remove the cache, by either name, from keyword arguments and return it; None without one."""
    caches = [arguments.pop(name, None) for name in NAMES]
    return next((cache for cache in caches if cache is not None), None)


def of(output: object) -> Any:
    """Return the cache of a model's output."""
    return getattr(output, NAME)
