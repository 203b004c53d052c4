"""A pass of calibration text through the decoder, block by block.

`Walk` is one pass over the blocks. The caller sees each block with the states that reach it and may change or replace
the block; its output is then carried on to the next block. Only the states in front of one block are held, so memory
does not grow with depth, and a block need not be in memory before its turn. The blocks' other arguments (masks,
positions) and the features that a vision tower adds after the first blocks come from the model itself, which runs once
with blocks that return zeros.

Shapes: B sequences, T tokens, H hidden.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lib.errors import UserError
from lib.models.structure.anatomy import Block, anatomy
from lib.models.structure.logits import logits_of

NO_NUMBERS = (
    "on the calibration text are not finite (NaN or infinite); float16 may overflow in this way: run in bfloat16 or "
    "float32, or repair the checkpoint"
)


@dataclass
class TextBatch:
    """One batch in front of a block: states [B, T, H], mask of real tokens [B, T], and by block the other arguments and
    the features added after it.
    """

    mask_BT: torch.Tensor
    states_BTH: torch.Tensor
    arguments: list[dict[str, Any]]
    added: dict[int, torch.Tensor]

    @property
    def mask_T(self) -> torch.Tensor:
        """The mask of real tokens of the concatenated sequences."""
        return self.mask_BT.flatten()

    def first(self, sequences: int) -> "TextBatch":
        """Return the batch with its first `sequences` only; unchanged if it has no more, or has added features."""
        count = len(self.mask_BT)
        if count <= sequences or self.added:
            return self

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(part) for part in value)
            return value[:sequences] if torch.is_tensor(value) and value.dim() and len(value) == count else value

        arguments = [{name: cut(value) for name, value in by_block.items()} for by_block in self.arguments]
        return TextBatch(self.mask_BT[:sequences], self.states_BTH[:sequences], arguments, {})


class BlockStore(Protocol):
    """Holds the blocks that are not in memory."""

    def load(self, index: int) -> None:
        """Load the weights of a block into memory."""

    def release(self, index: int) -> None:
        """Store a block, which may have changed, and free its memory."""


def real_BT(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mask [B, T] of the real tokens of a batch, which are not padding."""
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


class Walk:
    """One pass of calibration text through the blocks of `model`; iterate over it to go from block to block.

    `store` loads and releases blocks; without it, all blocks must be in memory. Raises UserError without any
    calibration token, and for a block whose weights, or whose outputs on the text, are not finite.
    """

    def __init__(
        self, model: nn.Module, calibration: Iterable[dict[str, torch.Tensor]], *, store: BlockStore | None = None
    ):
        self.model, self.store = model, store
        self.carried = enter(model, calibration)
        self.tokens = sum(int(batch.mask_BT.sum()) for batch in self.carried)
        if not self.tokens:
            raise UserError("calibration: no token to observe; give at least one sequence")
        self._outputs: list[torch.Tensor] | None = None

    def __iter__(self) -> Iterator[Block]:
        """Yield a new view of each block in turn, which includes earlier changes to it."""
        count = len(anatomy(self.model).blocks)
        for self.index in range(count):
            if self.store is not None:
                self.store.load(self.index)
            self._require_finite_states()
            require_finite(anatomy(self.model).blocks[self.index])
            yield anatomy(self.model).blocks[self.index]
            if self.index < count - 1:
                self._advance()
            if self.store is not None:
                self.store.release(self.index)

    @torch.no_grad()
    def outputs(self) -> Iterator[torch.Tensor]:
        """Yield the output of the current block, including changes so far, for each batch, [B, T, H]."""
        module = anatomy(self.model).blocks[self.index].module
        for batch in self.carried:
            yield run(module, batch.states_BTH, batch.arguments[self.index])

    def carry_on(self, outputs: Sequence[torch.Tensor]) -> None:
        """Use `outputs` as the outputs of the current block, so that it does not run again."""
        self._outputs = list(outputs)

    def forget(self) -> None:
        """Discard the outputs given to `carry_on`, so that the current block, since changed, runs again."""
        self._outputs = None

    def _require_finite_states(self) -> None:
        """Raise UserError if states of real tokens are not finite, naming the block or embeddings that caused it."""
        for batch in self.carried:
            if not bool(batch.states_BTH.isfinite().all(-1)[batch.mask_BT].all()):
                before = f"block {self.index - 1}: its outputs" if self.index else "embeddings: their outputs"
                raise UserError(f"{before} {NO_NUMBERS}")

    def _advance(self) -> None:
        outputs, self._outputs = self._outputs, None
        for batch, output in zip(self.carried, self.outputs() if outputs is None else outputs):
            added = batch.added.get(self.index)
            batch.states_BTH = output if added is None else output + added


def run(module: nn.Module, states_BTH: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Return the output of a block for `states_BTH`, [B, T, H]."""
    output = module(states_BTH, **arguments)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def finish(model: nn.Module, batch: TextBatch, index: int) -> torch.Tensor:
    """Return the logits [B, T, V] of `model` run from block `index` on; `batch` is in front of that block.

    If `index` is the number of blocks, the states of `batch` are the outputs of the last block.
    """
    view, states_BTH = anatomy(model), batch.states_BTH
    for block in view.blocks[index:]:
        states_BTH = run(block.module, states_BTH, batch.arguments[block.index])
        if block.index in batch.added:
            states_BTH = states_BTH + batch.added[block.index]
    return logits_of(model, view.final_norm(states_BTH))


@torch.no_grad()
def enter(model: nn.Module, calibration: Iterable[dict[str, torch.Tensor]]) -> list[TextBatch]:
    """Return the batches in front of the first block, with the arguments of every block. No block runs."""
    entering = []
    for inputs in calibration:
        with _blocks_of_zeros(model) as calls:
            model(**inputs, use_cache=False, logits_to_keep=1)
        (first, _), *others = calls
        assert first is not None
        # After a block that returns zeros, the states are only the features added to its output.
        added = {index: state for index, (state, _) in enumerate(others) if state is not None}
        entering.append(TextBatch(real_BT(inputs), first, [arguments for _, arguments in calls], added))
    return entering


class _ZeroBlock(nn.Module):
    """Takes the place of a block: records its input (None if zero) and other arguments, and returns zeros."""

    def __init__(self, block: nn.Module, calls: list[tuple[torch.Tensor | None, dict[str, Any]]]):
        super().__init__()
        self.__dict__.update(whole=block, calls=calls)  # so that the block is no submodule of this module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["whole"], name)

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.calls.append((hidden_states if not self.calls or hidden_states.any() else None, arguments))
        return torch.zeros_like(hidden_states)


@contextmanager
def _blocks_of_zeros(model: nn.Module) -> Iterator[list[tuple[torch.Tensor | None, dict[str, Any]]]]:
    """Replace every block by a `_ZeroBlock` while the context is open; yield the list in which they record their calls.

    Chunked prefill is off meanwhile, since a block would record each chunk separately.
    """
    decoder = anatomy(model).decoder
    calls: list[tuple[torch.Tensor | None, dict[str, Any]]] = []
    layers, in_chunks = decoder.layers, decoder.__dict__.pop("forward", None)
    decoder.layers = nn.ModuleList(_ZeroBlock(layer, calls) for layer in layers)
    try:
        yield calls
    finally:
        decoder.layers = layers
        if in_chunks is not None:
            decoder.forward = in_chunks


def require_finite(block: Block) -> None:
    """Raise UserError if weights of `block` are not finite, naming the tensor and, in stacked experts, the expert."""
    experts = block.feed_forward.experts
    for name, parameter in block.module.named_parameters():
        if not parameter.is_floating_point() or parameter.layout != torch.strided or parameter.is_meta:
            continue
        if torch.isfinite(parameter.sum(dtype=torch.float32)):
            continue
        where = f"block {block.index}"
        if experts is not None and parameter.dim() == 3 and len(parameter) == experts.count:
            finite_E = torch.isfinite(parameter.flatten(1).sum(1, dtype=torch.float32))
            where += f", expert {int(finite_E.long().argmin())}"
        raise UserError(f"{where}: {name} holds numbers that are not finite; repair the checkpoint")
