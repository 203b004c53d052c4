"""Second moments of the inputs of the decoder's matrices on calibration text: Σ x², and on request Σ x·xᵀ.

A matrix is a linear layer of a block, or a stack of matrices of its routed experts. Collected in one pass from block to
block (`lib.models.calibration.walk`), with hooks on one block at a time; padding is left out, and only sums are stored.
Matrices that share an input (queries, keys and values; gate and up) share its moments. Knows nothing of what the
moments are used for.

Shapes: T tokens of a batch without padding, K experts per token, E experts, O outputs and I inputs of a matrix,
H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lib.errors import UserError
from lib.models.calibration.walk import NO_NUMBERS, Walk
from lib.models.structure.anatomy import FeedForward, anatomy
from lib.models.structure.replacements.factored import FactoredLinear, shared_factors
from lib.models.structure.replacements.sparse import is_dense

PARTS = ("attention", "feed_forward", "experts")
WEIGHTINGS = ("tokens", "router")


@dataclass(frozen=True)
class Matrix:
    """A weight [O, I], or [E, O, I] for experts: the parameter `owner.attribute`, named `name` in the model.

    `part` is one of PARTS.
    """

    name: str
    block: int
    part: str
    owner: nn.Module
    attribute: str

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.owner, self.attribute)

    @property
    def module_name(self) -> str:
        """The name of `owner` in the model."""
        return self.name.rpartition(".")[0]

    @property
    def place(self) -> str:
        """Block and name of the matrix, for messages."""
        return f"block {self.block}, {self.name}"


@dataclass
class Moments:
    """Sums over calibration tokens: `squares` = Σ x², [I] or [E, I], and on request `gram` = Σ x·xᵀ, [I, I] or
    [E, I, I]. `tokens`: the number of tokens, [1] or [E].
    """

    tokens: torch.Tensor
    squares: torch.Tensor
    gram: torch.Tensor | None = None


def matrices(
    model: nn.Module, part: str = "all", block: int | None = None, *, inside_factors: bool = True
) -> list[Matrix]:
    """Return the dense matrices of the decoder's blocks (or of one block) in `part`: one of PARTS, or "all".

    "feed_forward" is the whole feed-forward part including its experts; "experts" are only the routed experts. Norms,
    routers, embeddings, the head and the vision tower are left out. `inside_factors`: whether the factors of a factored
    matrix, and the cores of experts next to a shared factor, count as matrices. Empty if the model lacks the part.
    """
    names = {module: name for name, module in model.named_modules()}
    every: list[Matrix] = []
    for view in anatomy(model).blocks:
        if block is None or view.index == block:
            every += _linears(view.attention.module, view.index, "attention", names)
            every += feed_forward_matrices(view.feed_forward, view.index, names)
    parts = {"all": PARTS, "feed_forward": ("feed_forward", "experts")}.get(part, (part,))
    factors = set() if inside_factors else _factors(model)
    return [matrix for matrix in every if matrix.part in parts and (matrix.owner, matrix.attribute) not in factors]


def feed_forward_matrices(part: FeedForward, block: int = 0, names: dict[nn.Module, str] | None = None) -> list[Matrix]:
    """Return the matrices of one feed-forward part; without `names`, their names are relative to the part."""
    names = names or {module: name for name, module in part.module.named_modules()}
    members = [] if part.dense is None else _linears(part.dense, block, "feed_forward", names)
    if part.experts is not None:
        owner = part.experts.module
        for attribute in ("gate_up_proj", "down_proj"):
            weight = getattr(owner, attribute, None)
            if weight is not None and is_dense(weight) and weight.is_floating_point():
                members.append(Matrix(f"{names[owner]}.{attribute}", block, "experts", owner, attribute))
    return members


def _linears(owner: nn.Module, block: int, part: str, names: dict[nn.Module, str]) -> list[Matrix]:
    linears = [module for module in owner.modules() if isinstance(module, nn.Linear)]
    return [Matrix(f"{names[module]}.weight", block, part, module, "weight") for module in linears]


def _factors(model: nn.Module) -> set[tuple[nn.Module, str]]:
    """Return (owner, attribute) of the matrices inside factors: thin matrices, and cores next to a shared factor."""
    factors: set[tuple[nn.Module, str]] = set()
    for module in model.modules():
        if isinstance(module, FactoredLinear):
            factors |= {(module.inner, "weight"), (module.outer, "weight")}
        elif shared := shared_factors(module):
            stacks = ("gate_up_proj", "down_proj")
            factors |= {(module, stack) for stack, factor in zip(stacks, shared) if factor is not None}
    return factors


def moments(
    model: nn.Module,
    calibration: Sequence[dict[str, torch.Tensor]],
    chosen: Sequence[Matrix],
    *,
    gram: bool = False,
    dtype: torch.dtype = torch.float32,
    weighting: str = "tokens",
) -> dict[str, Moments]:
    """Return the moments of the matrices `chosen` of `model` on `calibration`, by name.

    Holds all of them at once, which suits a few matrices; `lib.models.calibration.observed` yields many block by block.
    The options are those of `block_moments`. The pass ends with the last block of `chosen`. Raises UserError without
    any calibration token.
    """
    last = max((matrix.block for matrix in chosen), default=-1)
    by_name: dict[str, Moments] = {}
    if last < 0:
        return by_name
    walk = Walk(model, calibration)
    for block in walk:
        of_block = [matrix for matrix in chosen if matrix.block == block.index]
        by_name |= block_moments(walk, of_block, gram=gram, dtype=dtype, weighting=weighting)
        if block.index == last:
            break
    return by_name


def block_moments(
    walk: Walk,
    chosen: Sequence[Matrix],
    *,
    gram: bool = False,
    dtype: torch.dtype = torch.float32,
    weighting: str = "tokens",
    unchanged: bool = True,
) -> dict[str, Moments]:
    """Return the moments of the matrices `chosen` of the current block of `walk`, by name; the block runs once.

    gram: also sum x·xᵀ, which takes I² elements per input. dtype: of the sums over batches (the products of one batch
    are float32). weighting, for experts: "tokens" sums for each expert the tokens that are routed to it, after the
    shared input factor if there is one; "router" weights every token by its router weight, and gives `gate_up_proj` one
    sum over all experts, [I] and [I, I]. unchanged: the block will not be changed, so its outputs are carried on.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f'weighting "{weighting}"; expected one of {", ".join(WEIGHTINGS)}')
    collector = _Collector(gram, dtype, weighting == "router")
    return _summed(walk, chosen, collector, len(walk.carried), unchanged)[0]


def moments_apart(walk: Walk, chosen: Sequence[Matrix], batches: int) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Return the moments of the first `batches` of `walk` and those of the rest, both with `gram`, as `block_moments`
    does. The block may change afterwards.
    """
    first, rest = _summed(walk, chosen, _Collector(True, torch.float32, False), batches, False)
    return first, rest


@torch.no_grad()
def _summed(
    walk: Walk, chosen: Sequence[Matrix], collector: "_Collector", batches: int, unchanged: bool
) -> list[dict[str, Moments]]:
    """Return the sums over the first `batches` and over the rest; the block runs once, unless `chosen` is empty."""
    if not chosen:
        return [{}, {}]
    hooks = _hooks(chosen, collector)
    outputs, first = [], collector.moments
    try:
        running = walk.outputs()
        for index, batch in enumerate(walk.carried):
            if index == batches:
                collector.moments = {}
            collector.start(batch.mask_T)
            output = next(running)
            if unchanged:
                outputs.append(output)
    finally:
        for hook in hooks:
            hook.remove()
    if unchanged:
        walk.carry_on(outputs)
    sums = [first, {} if collector.moments is first else collector.moments]
    for by_name in sums:
        _require_finite(chosen, by_name)
    return sums


def _require_finite(chosen: Sequence[Matrix], by_name: dict[str, Moments]) -> None:
    """Raise UserError naming the first matrix whose inputs are not finite; a ranking by them would be meaningless."""
    for matrix in chosen:
        if matrix.name in by_name and not bool(by_name[matrix.name].squares.isfinite().all()):
            raise UserError(f"{matrix.place}: its inputs {NO_NUMBERS}")


def _hooks(chosen: Sequence[Matrix], collector: "_Collector") -> list[RemovableHandle]:
    hooks = []
    experts: dict[nn.Module, dict[str, str]] = {matrix.owner: {} for matrix in chosen if matrix.part == "experts"}
    for matrix in chosen:
        if matrix.part == "experts":
            experts[matrix.owner][matrix.attribute] = matrix.name
        else:
            hooks.append(matrix.owner.register_forward_pre_hook(_linear_hook(collector, matrix.name)))
    for owner, names in experts.items():
        hooks.append(owner.register_forward_pre_hook(_experts_hook(collector, names)))
    return hooks


def _linear_hook(collector: "_Collector", name: str) -> Callable[[nn.Module, tuple], None]:
    return lambda _module, args: collector.linear(name, args[0])


def _experts_hook(collector: "_Collector", names: dict[str, str]) -> Callable[[nn.Module, tuple], None]:
    return lambda module, args: collector.experts(names, module, *args)


class _Collector:
    """State shared by the hooks: the mask of the current batch, the last linear layer's input, and all sums by name."""

    def __init__(self, gram: bool, dtype: torch.dtype, router: bool):
        self.gram, self.dtype, self.router = gram, dtype, router
        self.moments: dict[str, Moments] = {}
        self.last_input: torch.Tensor | None = None
        self.last_name = ""

    def start(self, mask_T: torch.Tensor) -> None:
        """Begin a batch; `mask_T` is its mask of real tokens."""
        self.mask_T, self.last_input = mask_T, None

    def linear(self, name: str, x: torch.Tensor) -> None:
        if x is self.last_input:  # shared with the previous layer, whose moments include it
            self.moments[name] = self.moments[self.last_name]
            return
        self.last_input, self.last_name = x, name
        self._add(name, self._moments(x.reshape(-1, x.shape[-1])[self.mask_T].float()))

    def experts(
        self, names: dict[str, str], module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Add the moments of the inputs of the observed stacks. For `down_proj`, each expert runs once more on its own
        tokens.

        `names`: observed stack (attribute of `module`) → name of its moments.
        """
        hidden_TH, index_TK, weight_TK = (tensor[self.mask_T] for tensor in (hidden, index, weight.float()))
        hidden_TH = module.enter(hidden_TH) if hasattr(module, "enter") else hidden_TH
        per_expert: dict[str, list[Moments]] = {name: [] for name in names.values()}
        if self.router and (gate_up := names.get("gate_up_proj")):
            scale_T1 = weight_TK.square().sum(1, keepdim=True).sqrt()
            self._add(gate_up, self._moments(hidden_TH.float() * scale_T1))
            del per_expert[gate_up]
        for expert in range(module.down_proj.shape[0]):
            token, position = torch.where(index_TK == expert)
            x_TH = hidden_TH[token]
            if names.get("gate_up_proj") in per_expert:
                per_expert[names["gate_up_proj"]].append(self._moments(x_TH.float()))
            if "down_proj" in names:
                inner_TI = module._apply_gate(nn.functional.linear(x_TH, module.gate_up_proj[expert])).float()
                inner_TI = inner_TI * weight_TK[token, position, None] if self.router else inner_TI
                per_expert[names["down_proj"]].append(self._moments(inner_TI))
        for name, experts in per_expert.items():
            self._add(name, _stacked(experts))

    def _moments(self, x_TI: torch.Tensor) -> Moments:
        return Moments(torch.tensor([len(x_TI)]), x_TI.square().sum(0), x_TI.T @ x_TI if self.gram else None)

    def _add(self, name: str, new: Moments) -> None:
        total = self.moments.get(name)
        if total is None:
            gram = None if new.gram is None else new.gram.to(self.dtype)
            self.moments[name] = Moments(new.tokens, new.squares.to(self.dtype), gram)
            return
        gram = None if new.gram is None or total.gram is None else total.gram.add_(new.gram)
        self.moments[name] = Moments(total.tokens + new.tokens, total.squares + new.squares, gram)


def _stacked(experts: Sequence[Moments]) -> Moments:
    grams = [moments.gram for moments in experts if moments.gram is not None]
    return Moments(
        torch.cat([moments.tokens for moments in experts]),
        torch.stack([moments.squares for moments in experts]),
        torch.stack(grams) if grams else None,
    )
