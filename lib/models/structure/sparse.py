"""Matrices stored and executed sparse: a linear layer and a stack of experts, and their way to disk and back.

Three layouts, each a parameter of its own kind, so that whoever counts bytes finds indices and values:

- `csr`: values in float32 with 32-bit column indices; a product with few tokens is bound by reading them. MKL on a
  processor knows no bfloat16, so inputs are converted, which for a few tokens costs little.
- `columns`: groups of R rows share their columns, all groups the same number of them; executed as dense products of
  gathered inputs, in the dtype of the model. Stored as blocks of R × 1.
- `semi_structured`: two of every four inputs, in the format of the tensor cores; CUDA only.

Knows nothing of which weights are dropped. These modules run forward only; they carry no gradient.

Shapes: T tokens, O outputs, I inputs, E experts, K experts per token, G groups of R rows, N stored values.
"""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import nn

from lib.errors import UserError

# Torch says once per process that these layouts are new; a reader of a notebook need not hear it.
warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")

LAYOUTS = ("csr", "columns", "semi_structured")
MANY_TOKENS = 64  # from here on the embedding kernel is the faster of the two
LINEAR_NAMES = ("weight",)
EXPERT_NAMES = ("gate_up_proj", "down_proj")


# --- storing ---------------------------------------------------------------------------------------------------------


def compress(weight: torch.Tensor, kept: torch.Tensor, layout: str = "csr", rows: int = 1) -> torch.Tensor:
    """Return `weight` [O, I] or [E, O, I] with only the elements `kept` (bool, same shape), in a sparse layout.

    Experts need the same number of kept elements each; `columns` needs groups of `rows` rows that keep the same
    columns, every group equally many. Raises ValueError otherwise.
    """
    if layout == "semi_structured":
        return torch.sparse.to_sparse_semi_structured(weight * kept)
    if layout == "columns":
        return _compress_columns(weight, kept, rows)
    crow = nn.functional.pad(kept.sum(-1).cumsum(-1), (1, 0)).int()
    if weight.dim() == 2:
        return _csr(crow, kept.nonzero()[:, 1].int(), weight[kept].float(), tuple(weight.shape))
    if len(crow[:, -1].unique()) > 1:
        raise ValueError("experts that keep different numbers of weights cannot be stacked")
    columns = torch.stack([mask.nonzero()[:, 1].int() for mask in kept])
    values = torch.stack([one[mask].float() for one, mask in zip(weight, kept)])
    return _csr(crow, columns, values, tuple(weight.shape))


def _csr(crow: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.sparse_csr_tensor(crow, columns, values, shape, check_invariants=False)


def _compress_columns(weight: torch.Tensor, kept: torch.Tensor, rows: int) -> torch.Tensor:
    *batch, outputs, inputs = weight.shape
    grouped = kept.view(*batch, outputs // rows, rows, inputs)
    kept_GI = grouped[..., 0, :]
    counts_G = kept_GI.sum(-1)
    if not torch.equal(grouped, kept_GI.unsqueeze(-2).expand_as(grouped)) or counts_G.unique().numel() != 1:
        raise ValueError(f"groups of {rows} rows must share their columns, every group equally many")
    count, groups = int(counts_G.flatten()[0]), outputs // rows
    columns = kept_GI.nonzero()[:, -1].view(*batch, groups, count)
    by_column = weight.view(*batch, groups, rows, inputs).transpose(-1, -2)
    values = by_column.gather(-2, columns.unsqueeze(-1).expand(*batch, groups, count, rows))
    crow = torch.arange(groups + 1, dtype=torch.int32, device=weight.device) * count
    return _bsr(crow.expand(*batch, -1).contiguous(), columns.flatten(-2).int(), values.flatten(-3, -2), weight.shape)


def _bsr(crow: torch.Tensor, columns: torch.Tensor, values_NR: torch.Tensor, shape) -> torch.Tensor:
    return torch.sparse_bsr_tensor(crow, columns, values_NR.unsqueeze(-1), tuple(shape), check_invariants=False)


def is_dense(weight: torch.Tensor) -> bool:
    """Return whether a weight is a plain tensor: not of a sparse layout, nor of a class that packs it."""
    return weight.layout == torch.strided and not hasattr(weight, "__tensor_flatten__")


def layout_of(weight: torch.Tensor) -> str:
    """Return which of LAYOUTS a stored weight has."""
    names = {torch.sparse_csr: "csr", torch.sparse_bsr: "columns"}
    return names.get(weight.layout, "semi_structured")


def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the plain tensors that a stored weight consists of, by suffix: what a checkpoint holds."""
    if layout_of(weight) == "semi_structured":
        return {"dense": weight.to_dense()}
    return {"crow": weight.crow_indices(), "columns": weight.col_indices(), "values": weight.values()}


def from_parts(found: dict[str, torch.Tensor], layout: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the stored weight made of `parts`."""
    if layout == "semi_structured":
        return torch.sparse.to_sparse_semi_structured(found["dense"])
    values = found["values"]
    if layout == "columns":
        return _bsr(found["crow"], found["columns"], values.squeeze(-1), shape)
    return _csr(found["crow"], found["columns"], values, shape)


def slices(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the matrices of a stack [E, O, I] one by one; they share its memory."""
    make = {"csr": _csr, "columns": lambda crow, col, values, shape: _bsr(crow, col, values.squeeze(-1), shape)}
    stacked = zip(weight.crow_indices(), weight.col_indices(), weight.values())
    return [make[layout_of(weight)](*one, tuple(weight.shape[1:])) for one in stacked]


# --- executing -------------------------------------------------------------------------------------------------------


def product(weight: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Return x·Wᵀ [T, O] in the dtype of x, for a stored weight [O, I]."""
    if weight.layout == torch.sparse_csr:
        return _csr_product(weight, x_TI.to(weight.dtype)).to(x_TI.dtype)
    if weight.layout == torch.sparse_bsr:
        return _columns_product(weight, x_TI.to(weight.dtype)).to(x_TI.dtype)
    return nn.functional.linear(x_TI, weight)


def _csr_product(weight: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Tokens lie side by side in memory, so that each stored value meets all of them in one vector operation.

    For many tokens the sum of weighted rows that embeddings use does the same product, and on a processor sooner.
    """
    if len(x_TI) == 1:
        return torch.mv(weight, x_TI[0])[None]
    x_IT = x_TI.T.contiguous()
    if len(x_TI) < MANY_TOKENS or weight.is_cuda:
        return torch.mm(weight, x_IT).T
    options = {"mode": "sum", "per_sample_weights": weight.values(), "include_last_offset": True}
    return nn.functional.embedding_bag(weight.col_indices(), x_IT, weight.crow_indices(), **options).T


def _columns_product(weight: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Gather each group's inputs, then one dense product per group."""
    rows = weight.values().shape[1]
    groups = weight.shape[0] // rows
    columns_GN, values_GNR = weight.col_indices().view(groups, -1), weight.values().view(groups, -1, rows)
    if len(x_TI) == 1:
        return torch.bmm(x_TI[0][columns_GN].unsqueeze(1), values_GNR).view(1, weight.shape[0])
    gathered_GNT = x_TI.T.contiguous()[columns_GN]
    return torch.bmm(values_GNR.transpose(1, 2), gathered_GNT).view(weight.shape[0], len(x_TI)).T


def _copied(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy in memory of its own, by the packed parts where torch (before 2.13) cannot copy the whole."""
    if layout_of(weight) != "semi_structured":
        return weight.clone()
    names, told = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name).clone() for name in names}
    return type(weight).__tensor_unflatten__(inner, told, weight.shape, weight.stride())


class _Stored(nn.Module):
    """What both modules share: stored weights reach checkpoints as plain tensors, and copies are copies."""

    stored: tuple[str, ...] = ()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.stored:
            weight = destination.pop(prefix + name)
            destination.update({f"{prefix}{name}.{part}": tensor for part, tensor in parts(weight).items()})

    def __deepcopy__(self, memo: dict) -> "_Stored":
        """Torch copies no sparse parameter."""
        for name in self.stored:
            weight = getattr(self, name)
            if id(weight) not in memo:
                memo[id(weight)] = nn.Parameter(_copied(weight.detach()), requires_grad=False)
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy({name: v for name, v in self.__dict__.items() if name != "views"}, memo)
        return made


class SparseLinear(_Stored):
    """A linear layer whose weight [O, I] is stored and executed sparse; the bias stays as it was."""

    stored = LINEAR_NAMES

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y_TO = product(self.weight, x.reshape(-1, self.in_features))
        y_TO = y_TO if self.bias is None else y_TO + self.bias
        return y_TO.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {layout_of(self.weight)}"


class SparseExperts(_Stored):
    """Routed experts whose matrices `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] are stored and executed sparse.

    One expert after the other on its own tokens, as transformers' `eager` backend does. A stack that stays dense stays
    as it was; so do factors that experts share (`lib.models.structure.factored`): their cores are what is stored
    sparse.
    """

    def __init__(self, experts: nn.Module, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.act_fn, self.num_experts = experts.act_fn, down.shape[0]
        self.intermediate_dim, self.hidden_dim = down.shape[2], down.shape[1]
        self.input_factor = getattr(experts, "input_factor", None)
        self.output_factor = getattr(experts, "output_factor", None)
        for name, weight in zip(EXPERT_NAMES, (gate_up, down)):
            setattr(self, name, nn.Parameter(weight, requires_grad=False))
        self.stored = tuple(name for name in EXPERT_NAMES if getattr(self, name).layout != torch.strided)

    def forward(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        entering_TH = hidden_TH if self.input_factor is None else self.input_factor(hidden_TH)
        total_TH = hidden_TH.new_zeros(len(hidden_TH), self.hidden_dim)
        gate_up, down = self._stacks()
        for expert in index_TK.unique().tolist():
            token, position = torch.where(index_TK == expert)
            gate, up = _apply(gate_up[expert], entering_TH[token]).chunk(2, dim=-1)
            out = _apply(down[expert], self.act_fn(gate) * up) * weight_TK[token, position, None]
            total_TH.index_add_(0, token, out.to(total_TH.dtype))
        return total_TH if self.output_factor is None else self.output_factor(total_TH)

    def _stacks(self) -> list[list[torch.Tensor]]:
        """Return the experts' matrices one by one, made once: cutting a stack takes longer than a small product."""
        weights = [getattr(self, name) for name in EXPERT_NAMES]
        at = [w.data_ptr() if w.layout == torch.strided else w.values().data_ptr() for w in weights]
        if self.__dict__.get("views", (None,))[0] != at:
            cut = [list(w.detach()) if w.layout == torch.strided else slices(w.detach()) for w in weights]
            self.__dict__["views"] = (at, cut)
        return self.__dict__["views"][1]


def _apply(weight: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x_TI, weight) if weight.layout == torch.strided else product(weight, x_TI)


# --- models ----------------------------------------------------------------------------------------------------------


def store(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Put stored weights (parameter name → sparse tensor) in place of the model's dense ones; return the model."""
    owners: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        owners.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = weight
    for path, found in owners.items():
        old = model.get_submodule(path)
        if isinstance(old, nn.Linear):
            new: nn.Module = SparseLinear(found["weight"], old.bias)
        else:
            gate_up, down = (found.get(name, getattr(old, name).data) for name in EXPERT_NAMES)
            new = SparseExperts(old, gate_up, down)
        model.set_submodule(path, new.train(old.training))
    return model


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every sparsely stored weight of the model, by name."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, _Stored)]
    return {f"{name}.{one}": getattr(module, one) for name, module in modules for one in module.stored}


def describe(model: nn.Module) -> dict[str, dict]:
    """Return what a manifest says of the sparsely stored weights: name → layout and shape. Empty for a dense model."""
    found = stored(model).items()
    return {name: {"layout": layout_of(weight), "shape": list(weight.shape)} for name, weight in found}


def restore(
    model: nn.Module,
    described: dict[str, dict],
    tensors: dict[str, Callable[[], torch.Tensor]],
    dtype: torch.dtype | None = None,
) -> None:
    """Give the dense `model` (perhaps without weights) the stored weights `described`, taken out of `tensors`.

    `tensors`: by name, what reads each one. `dtype` is that of the model's other parameters; values in `csr` stay as
    they are. Raises UserError with the name of a tensor that is missing.
    """
    weights = {}
    for name, said in described.items():
        names = ("dense",) if said["layout"] == "semi_structured" else ("crow", "columns", "values")
        if missing := [f"{name}.{part}" for part in names if f"{name}.{part}" not in tensors]:
            raise UserError(f"the checkpoint lacks {missing[0]}, which its manifest names; save the model again")
        found = {part: tensors.pop(f"{name}.{part}")() for part in names}
        if said["layout"] != "csr" and dtype is not None:
            found = {part: t.to(dtype) if t.is_floating_point() else t for part, t in found.items()}
        weights[name] = from_parts(found, said["layout"], tuple(said["shape"]))
    store(model, weights)
