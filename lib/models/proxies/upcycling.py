"""Start a stand-in from another one's weights, as real model families do.

Everything of the decoder that has the same name and shape is taken over; where the new model has experts and the old
one a dense feed-forward part, the experts are slices of it (sparse upcycling, Komatsuzaki et al., 2023). Vision towers
and routers keep their random weights. Knows the anatomy; knows nothing of training.

Shapes: E experts, I width of one expert, C channels of the dense part, H hidden.
"""

from pathlib import Path

import torch

from lib.errors import UserError
from lib.models.checkpoints import io
from lib.models.structure.anatomy import Experts, FeedForward, anatomy


@torch.no_grad()
def inherit(model: torch.nn.Module, folder: Path) -> list[str]:
    """Copy into `model` what the checkpoint in `folder` has for it; return the names of what was copied.

    Raises UserError where the checkpoint is missing or nothing of it fits.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no checkpoint to start from; train {folder.name} first")
    source, target = anatomy(io.load_folder(folder, torch.float32)), anatomy(model)
    stored, own = source.decoder.state_dict(), target.decoder.state_dict()
    shared = {name: stored[name] for name in own if name in stored and stored[name].shape == own[name].shape}
    if "embed_tokens.weight" not in shared:
        raise UserError(f"{folder}: vocabulary or hidden size differ from the model that should start from it")
    target.decoder.load_state_dict(shared, strict=False)
    target.head.weight.copy_(source.head.weight)
    for old, new in zip(source.blocks, target.blocks):
        if new.feed_forward.experts is not None and old.feed_forward.kind == "dense":
            slice_experts(old.feed_forward, new.feed_forward.experts)
    return sorted(shared)


def slice_experts(dense: FeedForward, experts: Experts) -> None:
    """Make every expert a slice of a dense feed-forward part, evenly spaced, wrapping around at the end.

    The router's weights sum to one over the experts it chooses, so slices count as in the dense part only if they are
    raised by the number of chosen experts.
    """
    count, channels = experts.count, dense.channels
    for expert in range(count):
        slice_I = (torch.arange(experts.channels) + expert * channels // count) % channels
        experts.gate_up[expert].copy_(torch.cat([dense.gate.weight[slice_I], dense.up.weight[slice_I]]))
        experts.down[expert].copy_(dense.down.weight[:, slice_I] * experts.top_k)
