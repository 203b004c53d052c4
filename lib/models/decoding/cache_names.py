"""What transformers calls the cache of keys and values: `cache`, in releases before that `past_key_values`.

Both names are taken; the one of the release that is installed is given on. Knows nothing of what a cache holds.
"""

from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("cache", "past_key_values")
NAME = next(name for name in NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)


def given(cache: object) -> dict[str, object]:
    """Return a cache as the keyword argument that a model, a decoder and an attention of this release take."""
    return {NAME: cache}


def taken(arguments: dict[str, object]) -> object:
    """Take the cache, by either name, out of keyword arguments; None where there is none."""
    found = [arguments.pop(name, None) for name in NAMES]
    return next((cache for cache in found if cache is not None), None)


def of(output: object) -> object:
    """Return the cache that a model gave back."""
    return getattr(output, NAME)
