"""Linear layers and stacked experts whose matrices are stored and executed sparse, and their form on disk.

Three layouts, each a parameter with a tensor type of its own, so that byte counts include indices and values:

- `csr`: values with 32-bit column indices; a product with few tokens is bound by reading them. MKL has no bfloat16
  kernel, so on a CPU values are float32 and inputs are converted, which costs little for a few tokens; on CUDA values
  keep the dtype of the model.
- `columns`: the rows of each group of R keep the same columns, and all groups keep the same number; executed as dense
  products of gathered inputs, in the dtype of the model. Stored as blocks of R × 1.
- `semi_structured`: two of every four inputs, in the format of the tensor cores; CUDA only.

The modules support the forward pass only, without gradients. Knows nothing of which weights are dropped.

Shapes: T tokens, O outputs, I inputs, E experts, K experts per token, G groups of R rows, N stored values.
"""

import copy
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import nn

from lib.errors import UserError

# Torch warns once per process that these layouts are in beta, which only clutters a notebook.
warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")

LAYOUTS = ("csr", "columns", "semi_structured")
MANY_TOKENS = 64  # from this number on, `embedding_bag` is faster than `mm` on a CPU
LINEAR_NAMES = ("weight",)
EXPERT_NAMES = ("gate_up_proj", "down_proj")


# --- storing ---------------------------------------------------------------------------------------------------------


def compress(weight: torch.Tensor, mask: torch.Tensor, layout: str = "csr", rows: int = 1) -> torch.Tensor:
    """Return the elements of `weight` [O, I] or [E, O, I] that `mask` (bool, same shape) keeps, in a sparse layout.

    Every expert must keep the same number of elements. In `columns`, the rows of each group of `rows` must keep the
    same columns, and every group the same number. Raises ValueError otherwise.
    """
    if layout == "semi_structured":
        return torch.sparse.to_sparse_semi_structured(weight * mask)
    if layout == "columns":
        return _compress_columns(weight, mask, rows)
    crow = nn.functional.pad(mask.sum(-1).cumsum(-1), (1, 0)).int()
    if weight.dim() == 2:
        return _csr(crow, mask.nonzero()[:, 1].int(), _values(weight[mask]), tuple(weight.shape))
    if len(crow[:, -1].unique()) > 1:
        raise ValueError("experts that keep different numbers of weights cannot be stacked")
    columns = torch.stack([expert_mask.nonzero()[:, 1].int() for expert_mask in mask])
    values = torch.stack([_values(expert[expert_mask]) for expert, expert_mask in zip(weight, mask)])
    return _csr(crow, columns, values, tuple(weight.shape))


def _values(weights: torch.Tensor) -> torch.Tensor:
    return weights if weights.is_cuda else weights.float()


def _csr(crow: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.sparse_csr_tensor(crow, columns, values, shape, check_invariants=False)


def _compress_columns(weight: torch.Tensor, mask: torch.Tensor, rows: int) -> torch.Tensor:
    *batch, outputs, inputs = weight.shape
    grouped = mask.view(*batch, outputs // rows, rows, inputs)
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
    """Return whether a weight is a plain tensor: neither in a sparse layout nor in a packed tensor subclass."""
    return weight.layout == torch.strided and not hasattr(weight, "__tensor_flatten__")


def layout_of(weight: torch.Tensor) -> str:
    """Return the layout of a sparsely stored weight, one of LAYOUTS."""
    names = {torch.sparse_csr: "csr", torch.sparse_bsr: "columns"}
    return names.get(weight.layout, "semi_structured")


def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the plain tensors of a sparsely stored weight by name suffix, as a checkpoint stores them."""
    if layout_of(weight) == "semi_structured":
        return {"dense": weight.to_dense()}
    return {"crow": weight.crow_indices(), "columns": weight.col_indices(), "values": weight.values()}


def from_parts(tensors: dict[str, torch.Tensor], layout: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the sparse weight of `shape` with the `tensors` that `parts` returned."""
    if layout == "semi_structured":
        return torch.sparse.to_sparse_semi_structured(tensors["dense"])
    values = tensors["values"]
    if layout == "columns":
        return _bsr(tensors["crow"], tensors["columns"], values.squeeze(-1), shape)
    return _csr(tensors["crow"], tensors["columns"], values, shape)


def slices(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the matrices of a stack [E, O, I] as a list; they share its memory."""
    make = {"csr": _csr, "columns": lambda crow, col, values, shape: _bsr(crow, col, values.squeeze(-1), shape)}
    stacked = zip(weight.crow_indices(), weight.col_indices(), weight.values())
    return [make[layout_of(weight)](*tensors, tuple(weight.shape[1:])) for tensors in stacked]


# --- executing -------------------------------------------------------------------------------------------------------


def product(weight: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Return x·Wᵀ [T, O] in the dtype of x, for a sparsely stored weight [O, I]."""
    if weight.layout == torch.sparse_csr:
        return _csr_product(weight, x_TI.to(weight.dtype)).to(x_TI.dtype)
    if weight.layout == torch.sparse_bsr:
        return _columns_product(weight, x_TI.to(weight.dtype)).to(x_TI.dtype)
    return nn.functional.linear(x_TI, weight)


def _csr_product(weight: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Return x·Wᵀ. Tokens are contiguous in memory, so that each stored value multiplies all of them at once.

    For many tokens on a CPU, `embedding_bag` (a weighted sum of rows) computes the same product faster.
    """
    if len(x_TI) == 1:
        return torch.mv(weight, x_TI[0])[None]
    x_IT = x_TI.T.contiguous()
    if len(x_TI) < MANY_TOKENS or weight.is_cuda:
        return torch.mm(weight, x_IT).T
    return nn.functional.embedding_bag(
        weight.col_indices(),
        x_IT,
        weight.crow_indices(),
        mode="sum",
        per_sample_weights=weight.values(),
        include_last_offset=True,
    ).T


def _columns_product(weight: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Return x·Wᵀ: gather the inputs of each group, then multiply them by its dense matrix."""
    rows = weight.values().shape[1]
    groups = weight.shape[0] // rows
    columns_GN, values_GNR = weight.col_indices().view(groups, -1), weight.values().view(groups, -1, rows)
    if len(x_TI) == 1:
        return torch.bmm(x_TI[0][columns_GN].unsqueeze(1), values_GNR).view(1, weight.shape[0])
    gathered_GNT = x_TI.T.contiguous()[columns_GN]
    return torch.bmm(values_GNR.transpose(1, 2), gathered_GNT).view(weight.shape[0], len(x_TI)).T


def _copied(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy of a weight. Packed weights are copied part by part, since torch before 2.13 cannot clone them."""
    if layout_of(weight) != "semi_structured":
        return weight.clone()
    packed: Any = weight  # a tensor subclass with the protocol of torch.utils._python_dispatch
    names, context = packed.__tensor_flatten__()
    inner = {name: getattr(weight, name).clone() for name in names}
    return type(packed).__tensor_unflatten__(inner, context, weight.shape, weight.stride())


class _Stored(nn.Module):
    """Base class of the sparse modules, whose state dictionaries hold plain tensors and which can be deep-copied."""

    stored: tuple[str, ...] = ()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.stored:
            weight = destination.pop(prefix + name)
            destination.update({f"{prefix}{name}.{part}": tensor for part, tensor in parts(weight).items()})

    def __deepcopy__(self, memo: dict) -> "_Stored":
        """Return a deep copy. Sparse parameters are copied here, since torch cannot."""
        for name in self.stored:
            weight = getattr(self, name)
            if id(weight) not in memo:
                memo[id(weight)] = nn.Parameter(_copied(weight.detach()), requires_grad=False)
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy({name: v for name, v in self.__dict__.items() if name != "views"}, memo)
        return copied


class SparseLinear(_Stored):
    """A linear layer whose weight [O, I] is stored and executed sparse; the bias is unchanged."""

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

    The experts run one after the other, each on its own tokens, as in transformers' `eager` backend. Either stack may
    stay dense. Factors that experts share (`lib.models.structure.replacements.factored`) always do: only the cores are
    stored sparse.
    """

    act_fn: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, experts: Any, gate_up: torch.Tensor, down: torch.Tensor) -> None:
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
        """Return each expert's matrices, cached, since slicing a stack takes longer than a small product."""
        weights = [getattr(self, name) for name in EXPERT_NAMES]
        addresses = [w.data_ptr() if w.layout == torch.strided else w.values().data_ptr() for w in weights]
        if self.__dict__.get("views", (None,))[0] != addresses:
            matrices = [list(w.detach()) if w.layout == torch.strided else slices(w.detach()) for w in weights]
            self.__dict__["views"] = (addresses, matrices)
        return self.__dict__["views"][1]


def _apply(weight: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x_TI, weight) if weight.layout == torch.strided else product(weight, x_TI)


# --- models ----------------------------------------------------------------------------------------------------------


def store(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Replace dense weights of `model` by sparse ones (parameter name → sparse tensor), in place; return the model."""
    owners: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        owners.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = weight
    for path, stacks in owners.items():
        old = model.get_submodule(path)
        if isinstance(old, nn.Linear):
            new: nn.Module = SparseLinear(stacks["weight"], old.bias)
        else:
            gate_up, down = (stacks.get(name, getattr(old, name).data) for name in EXPERT_NAMES)
            new = SparseExperts(old, gate_up, down)
        model.set_submodule(path, new.train(old.training))
    return model


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the sparsely stored weights of the model by name."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, _Stored)]
    return {f"{name}.{leaf}": getattr(module, leaf) for name, module in modules for leaf in module.stored}


def describe(model: nn.Module) -> dict[str, dict]:
    """Return the manifest entries of the sparsely stored weights: name → layout and shape. Empty for a dense model."""
    return {name: {"layout": layout_of(weight), "shape": list(weight.shape)} for name, weight in stored(model).items()}


def restore(
    model: nn.Module,
    described: dict[str, dict],
    tensors: MutableMapping[str, Callable[[], torch.Tensor]],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Insert the sparse weights `described` into the dense `model` (possibly without weights), in place, on `device`.

    `tensors`: name → function that reads the tensor; entries that are used are removed. `dtype`: of the model's other
    parameters. Values in `csr` keep their stored dtype on CUDA and are float32 on a CPU. Raises UserError naming a
    missing tensor.
    """
    weights = {}
    for name, entry in described.items():
        names = ("dense",) if entry["layout"] == "semi_structured" else ("crow", "columns", "values")
        if missing := [f"{name}.{part}" for part in names if f"{name}.{part}" not in tensors]:
            raise UserError(f"the checkpoint lacks {missing[0]}, which its manifest names; save the model again")
        read = {part: tensors.pop(f"{name}.{part}")().to(device) for part in names}
        if entry["layout"] == "csr":
            read["values"] = _values(read["values"])
        elif dtype is not None:
            read = {part: t.to(dtype) if t.is_floating_point() else t for part, t in read.items()}
        weights[name] = from_parts(read, entry["layout"], tuple(entry["shape"]))
    store(model, weights)
