"""Measure the divergence of a changed model's output from the original's, starting at any block.

The original's inputs to every block are kept, so a change in block 4 is judged by running only blocks 4 and later.

Shapes: B batch, T tokens, H hidden, V vocabulary, R real tokens of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lib.errors import UserError
from lib.models.calibration.blockwise import Stream, streams
from lib.models.structure.anatomy import anatomy
from lib.models.structure.logits import logits_of


@dataclass
class Probe:
    """The inputs and outputs of the original's blocks on each batch, and its log-probabilities [R, V]."""

    streams: list[Stream]
    expected_RV: list[torch.Tensor]

    @property
    def tokens(self) -> int:
        """The number of tokens compared."""
        return sum(len(expected) for expected in self.expected_RV)


@torch.no_grad()
def probe(model: nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> Probe:
    """Run `model` on `batches` (keyword arguments, batch by batch) and keep the inputs and outputs of its blocks.

    Raises UserError if its own outputs are NaN, since no divergence from them is a number.
    """
    passed = streams(model, batches)
    last = len(anatomy(model).blocks) - 1
    expected = [_log_probabilities(model, stream.outputs[last], stream) for stream in passed]
    if any(bool(log_RV.isnan().any()) for log_RV in expected):
        raise UserError("the model's own outputs on the search text are not numbers; repair its checkpoint")
    return Probe(passed, expected)


@torch.no_grad()
def divergence(model: nn.Module, original: Probe, first: int = 0) -> float:
    """Return KL(original ‖ model) in nats per token. All blocks of `model` before `first` must be the original's."""
    view, total = anatomy(model), 0.0
    dtype = view.embeddings.weight.dtype
    last = len(view.blocks) - 1
    for stream, expected_RV in zip(original.streams, original.expected_RV):
        hidden_BTH = stream.inputs[first].to(dtype)
        for block in view.blocks[first:]:
            arguments = {name: _cast(value, dtype) for name, value in stream.arguments[block.index].items()}
            output = block.module(hidden_BTH, **arguments)
            hidden_BTH = output[0] if isinstance(output, tuple) else output
            if block.index < last and view.vision is not None:  # between blocks a vision tower adds its features
                added = stream.inputs[block.index + 1] - stream.outputs[block.index]
                hidden_BTH = hidden_BTH + added.to(dtype)
        changed_RV = _log_probabilities(model, hidden_BTH, stream)
        total += float(nn.functional.kl_div(changed_RV, expected_RV, reduction="sum", log_target=True))
    return max(total, 0.0) / original.tokens


def _log_probabilities(model: nn.Module, hidden_BTH: torch.Tensor, stream: Stream) -> torch.Tensor:
    view = anatomy(model)
    real_RH = view.final_norm(hidden_BTH.to(view.embeddings.weight.dtype)[stream.mask_BT.to(hidden_BTH.device)])
    return logits_of(model, real_RH).float().log_softmax(-1)


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
