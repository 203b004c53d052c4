"""The manifest of a changed model as plain JSON, with what its configuration cannot express: widths of each block,
factors, sparse layouts.

Knows nothing of files.
"""

from typing import Any

from torch import nn

from lib.errors import UserError
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import factored, no_op, sparse
from lib.models.structure.replacements.quantized import QuantizedExperts, QuantizedLinear


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the manifest of a model: `blocks` (a list of widths, experts, absent parts) and, if the model has any,
    `factors` and `sparse`.

    Raises UserError for quantized matrices, whose layout is specific to one device's kernel.
    """
    if any(isinstance(module, (QuantizedLinear, QuantizedExperts)) for module in model.modules()):
        raise UserError("int8 and int4 matrices are packed for one device's kernel; save the model before quantizing")
    blocks = [
        {
            "heads": block.attention.heads,
            "key_value_heads": block.attention.key_value_heads,
            "channels": block.feed_forward.channels,
            "experts": block.feed_forward.experts.count if block.feed_forward.experts else 0,
        }
        | no_op_entry
        for block, no_op_entry in zip(anatomy(model).blocks, no_op.describe(model))
    ]
    sections = {"factors": factored.ranks(model), "sparse": sparse.describe(model)}
    return {"blocks": blocks} | {name: section for name, section in sections.items() if section}
