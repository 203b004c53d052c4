"""Initialises a proxy model from the weights of another proxy model, as real model families do.

Every tensor of the decoder with the same name and shape is copied. Where the target has experts and the source a dense
feed-forward part, the experts become slices of the dense part (sparse upcycling, Komatsuzaki et al., 2023). Vision
towers and routers keep their random weights.

Shapes: E experts, I width of one expert, C channels of the dense part, H hidden.
"""

from pathlib import Path

import torch

from lib.errors import UserError
from lib.models.checkpoints import io
from lib.models.structure.anatomy import Experts, FeedForward, anatomy


@torch.no_grad()
def copy_weights(model: torch.nn.Module, folder: Path) -> list[str]:
    """Copy all matching tensors of the checkpoint in `folder` into `model`, in place; return their names.

    Raises UserError if the checkpoint is missing, or its vocabulary or hidden size differs.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no checkpoint to start from; train {folder.name} first")
    source, target = anatomy(io.load_folder(folder, torch.float32)), anatomy(model)
    source_state, target_state = source.decoder.state_dict(), target.decoder.state_dict()
    shared = {
        name: source_state[name]
        for name, tensor in target_state.items()
        if name in source_state and source_state[name].shape == tensor.shape
    }
    if "embed_tokens.weight" not in shared:
        raise UserError(f"{folder}: vocabulary or hidden size differ from the model that should start from it")
    target.decoder.load_state_dict(shared, strict=False)
    target.head.weight.copy_(source.head.weight)
    for source_block, target_block in zip(source.blocks, target.blocks):
        if target_block.feed_forward.experts is not None and source_block.feed_forward.kind == "dense":
            slice_experts(source_block.feed_forward, target_block.feed_forward.experts)
    return sorted(shared)


def slice_experts(dense: FeedForward, experts: Experts) -> None:
    """Make every expert a slice of a dense feed-forward part, in place: evenly spaced, wrapping around at the end.

    The router's weights sum to one over the chosen experts, so the slices are scaled by the number of chosen experts to
    contribute as much as in the dense part.
    """
    assert dense.gate is not None and dense.up is not None and dense.down is not None, "a dense part has all three"
    count, channels = experts.count, dense.channels
    for expert in range(count):
        slice_I = (torch.arange(experts.channels) + expert * channels // count) % channels
        experts.gate_up[expert].copy_(torch.cat([dense.gate.weight[slice_I], dense.up.weight[slice_I]]))
        experts.down[expert].copy_(dense.down.weight[:, slice_I] * experts.top_k)
