"""A digest of a model's structure: two models with the same signature run the same code on tensors of the same shapes.

Shows whether a model that was saved and reloaded is still the optimized one, or lost what no file holds (hooks,
replaced forward methods, another attention implementation).
"""

import hashlib
from typing import Any

from torch import nn


def signature(model: nn.Module) -> str:
    """Return a digest of modules, hooks and replaced methods, and of all tensors' names, shapes, dtypes and layouts."""
    config: Any = model.config
    text = config.get_text_config()
    lines = [f"{getattr(text, '_attn_implementation', None)} {getattr(text, '_experts_implementation', None)}"]
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        replaced = sorted(key for key, value in vars(module).items() if callable(value) and key in dir(type(module)))
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        lines.append(f"{name} {kind} {replaced} {hooks}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        lines.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.layout}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
