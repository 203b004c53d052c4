"""The FLOPs of a forward pass as torch counts them, for comparison with the formulas."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lib.measure.timing import workloads
from lib.models.structure.anatomy import anatomy

LINEAR = ("aten.mm", "aten.addmm")


@torch.no_grad()
def prefill(model: nn.Module, tokens: int, batch: int) -> int:
    """Return the FLOPs of reading `tokens` of `batch` sequences: linear layers as torch counts them, attention, which
    torch does not count as it is computed, from heads and widths.
    """
    model.set_experts_implementation("eager")
    ids_BT = workloads.random_prompt(model, batch, tokens)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BT, use_cache=False)
    linear = sum(count for op, count in counter.get_flop_counts()["Global"].items() if str(op) in LINEAR)
    widths = (b.attention.heads * (b.attention.head_dim + b.attention.value_dim) for b in anatomy(model).blocks)
    return linear + batch * tokens**2 * sum(widths)
