"""Linear layers and stacked experts whose matrices are stored and executed as two thin factors.

`FactoredLinear` is two thin products in a row. `FactoredExperts` is the Tucker form of both stacked tensors along the
hidden dimension (Tucker 1966; De Lathauwer et al. 2000, HOSVD): one input factor, applied once to every token, a core
per expert for the tokens routed to it, and one output factor, applied once per token to the weighted sum. Only the
hidden dimension can be shared this way, since the channels of an expert lie between its own two products. The cores run
on the same three experts backends as dense experts. No dense matrix is restored while a model runs. Knows nothing of
how factors are computed.

Shapes: E experts, H hidden, I width of one expert, T tokens, K experts per token, S = T·K pairs of token and expert,
R rank (P of the input factor, Q of the output factor).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import _grouped_linear

from lib.errors import UserError


class FactoredLinear(nn.Module):
    """A linear layer of rank R: `inner` [R, in], then `outer` [out, R], which carries the bias."""

    def __init__(self, inner: nn.Linear, outer: nn.Linear):
        super().__init__()
        self.inner, self.outer = inner, outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x))

    @property
    def in_features(self) -> int:
        return self.inner.in_features  # not from the shape of the weight, which may be packed

    @property
    def out_features(self) -> int:
        return self.outer.out_features

    @property
    def rank(self) -> int:
        return self.inner.out_features

    @property
    def bias(self) -> torch.Tensor | None:
        return self.outer.bias

    @property
    def weight(self) -> torch.Tensor:
        """The product of the factors [out, in], for inspection; a forward pass does not use it."""
        return self.outer.weight @ self.inner.weight


class FactoredExperts(nn.Module):
    """Experts with cores `gate_up_proj` [E, 2I, P] and `down_proj` [E, Q, I] between two shared factors.

    `input_factor` [P, H] or None (then P = H), `output_factor` [H, Q] or None (then Q = H). Has the attributes and the
    call signature of dense experts.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    num_experts: int
    config: Any
    act_fn: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, experts: Any, input_factor: nn.Linear | None, output_factor: nn.Linear | None):
        super().__init__()
        self.config, self.act_fn = experts.config, experts.act_fn
        self.num_experts, self.intermediate_dim = experts.num_experts, experts.intermediate_dim
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.input_factor, self.output_factor = input_factor, output_factor

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return [T, H] for hidden states [T, H], chosen experts [T, K] and their weights [T, K]."""
        multiply = PRODUCTS.get(self.config._experts_implementation, grouped_product)
        tokens, chosen = top_k_index.shape
        expert_S, order_S = top_k_index.reshape(-1).sort()
        counts_E = torch.bincount(expert_S, minlength=self.num_experts)
        inside_TP = self.enter(hidden_states)
        inner_SI = self._apply_gate(multiply(inside_TP[order_S // chosen], self.gate_up_proj, counts_E))
        out_SQ = multiply(inner_SI, self.down_proj, counts_E) * top_k_weights.reshape(-1)[order_S, None]
        sum_TQ = out_SQ[order_S.argsort()].view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)
        return self.leave(sum_TQ)

    def enter(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the cores of `gate_up_proj`, [T, P]."""
        return hidden_TH if self.input_factor is None else self.input_factor(hidden_TH)

    def leave(self, sum_TQ: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the cores of `down_proj` in hidden space, [T, H]."""
        return sum_TQ if self.output_factor is None else self.output_factor(sum_TQ)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def each_product(x_SI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Return [S, O]: each row of `x_SI` (sorted by expert, `counts_E` rows each) times its expert's matrix.

    Computes one product per expert.
    """
    parts = x_SI.split(counts_E.tolist())
    return torch.cat([nn.functional.linear(part, weight_EOI[e]) for e, part in enumerate(parts) if len(part)])


def grouped_product(x_SI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Return the same as `each_product`, computed in one grouped kernel."""
    return _grouped_linear(x_SI, weight_EOI, counts_E.cumsum(0).int())


def batched_product(x_SI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Return the same as `each_product`, computed with a copy of the matrix for every row; suited to few rows."""
    expert_S = torch.repeat_interleave(torch.arange(len(counts_E), device=x_SI.device), counts_E)
    return torch.bmm(weight_EOI[expert_S], x_SI.unsqueeze(-1)).squeeze(-1)


# Keys are the names of transformers' experts implementations.
PRODUCTS: dict[str, Callable] = {
    "eager": each_product,
    "grouped_mm": grouped_product,
    "batched_mm": batched_product,
}


def factor_linear(model: nn.Module, name: str, outer_OR: torch.Tensor, inner_RI: torch.Tensor) -> None:
    """Replace the linear layer `name` of `model` by two factors in the layer's dtype, in place; the bias is kept."""
    linear: Any = model.get_submodule(name)
    _replace(
        model, name, FactoredLinear(_linear(inner_RI, linear.weight), _linear(outer_OR, linear.weight, linear.bias))
    )


def factor_experts(
    model: nn.Module,
    name: str,
    *,
    gate_up: tuple[torch.Tensor, torch.Tensor] | None = None,
    down: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Replace the experts `name` of `model` by Tucker factors, in place; a stack without factors is unchanged.

    gate_up: (cores [E, 2I, P], input factor [P, H]); down: (output factor [H, Q], cores [E, Q, I]).
    """
    experts: Any = model.get_submodule(name)
    dense = experts.down_proj
    factored = FactoredExperts(
        experts,
        _linear(gate_up[1], dense) if gate_up else getattr(experts, "input_factor", None),
        _linear(down[0], dense) if down else getattr(experts, "output_factor", None),
    )
    if gate_up:
        factored.gate_up_proj = _parameter(gate_up[0], dense)
    if down:
        factored.down_proj = _parameter(down[1], dense)
    _replace(model, name, factored)


def _parameter(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.device, like.dtype).contiguous(), requires_grad=like.requires_grad)


def _linear(weight: torch.Tensor, like: torch.Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = _parameter(weight, like)
    linear.register_parameter("bias", bias)
    return linear


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module.train(model.training))


def ranks(model: nn.Module) -> dict[str, dict[str, int | None]]:
    """Return the ranks of the factored modules of `model`, by name: {"rank"} or {"input_rank", "output_rank"}.

    The result is plain JSON and the input of `restore`.
    """
    by_name: dict[str, dict[str, int | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            by_name[name] = {"rank": module.rank}
        if factors := shared_factors(module):
            inside, outside = (None if factor is None else min(factor.weight.shape) for factor in factors)
            by_name[name] = {"input_rank": inside, "output_rank": outside}
    return by_name


def shared_factors(module: nn.Module) -> tuple[nn.Linear | None, nn.Linear | None] | None:
    """Return the (input, output) factors of experts if they share at least one, else None.

    Works for cores stored dense, sparse or quantized.
    """
    factors = getattr(module, "input_factor", None), getattr(module, "output_factor", None)
    return None if factors == (None, None) else factors


def restore(model: nn.Module, stored: Mapping[str, Mapping[str, Any]]) -> None:
    """Insert factored modules of the ranks in `stored`, as `ranks` returns them, into a dense `model` on device `meta`,
    in place.

    Raises UserError for a module that the model lacks.
    """
    for name, rank in stored.items():
        try:
            module: Any = model.get_submodule(name)
        except AttributeError:
            raise UserError(f"factors: this model has no module {name}; the manifest is of another model") from None
        if "rank" in rank:
            rows, columns = module.weight.shape
            empty = module.weight.new_empty
            factor_linear(model, name, empty(rows, rank["rank"]), empty(rank["rank"], columns))
            continue
        (experts, wide, hidden), channels = module.gate_up_proj.shape, module.down_proj.shape[2]
        empty, inside, outside = module.down_proj.new_empty, rank["input_rank"], rank["output_rank"]
        gate_up = (empty(experts, wide, inside), empty(inside, hidden)) if inside else None
        down = (empty(hidden, outside), empty(experts, outside, channels)) if outside else None
        factor_experts(model, name, gate_up=gate_up, down=down)
